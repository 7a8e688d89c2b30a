"""Runs steps on one rank's devices: opens the platform, loads the model, sizes the cache, keeps request state.

How a worker starts, in reading order: worker calls open_platform, then preparation (limits and shapes; kv_plan lays out
the cache), model_source (weights; held counts their bytes) and memory (what a largest step needs, and how many blocks
remain). planning predicts the same without weights. How a step runs: model_runner, input_batch (staging, step_rows,
row_extras), torch_program (captured, torch_caches, torch_state). A draft model runs beside it: draft_preparation,
draft_runner, draft_coverage.
"""
