"""Predicts what a deployment would do, without its devices: the real scheduler on a simulated clock.

    lengths and arrivals (traffic) ─> schedulers, one a lane (run) ─> what each step holds (work)
                                                ^                              │
                                                └── results at the step's end ─┴─ seconds of a step (costs)

The scheduler and the KV cache manager are those that serve. Only the time of a step is made up: by a roofline over a
model's shape, or by a table that was measured. Loads no torch.
"""
