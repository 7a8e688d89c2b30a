"""What the simulator refuses.

RuntimeError
└── Refused                a call that CANN would refuse: op, argument, value, what is allowed
    ├── GraphRefused       what a captured graph may not hold, or a replay with what is stale
    └── NotSimulated       the simulator has no such op
ImportError
└── SimulatorUnavailable   no torch_npu, or no compiler
AssertionError
└── Disagreement           the simulator's own fault: the vendor's meta function says otherwise
"""

from __future__ import annotations


class SimulatorUnavailable(ImportError):
    """The simulator cannot be built or loaded here."""


class Refused(RuntimeError):
    """CANN would refuse this call. `argument` is the name in the vendor's schema."""

    def __init__(self, op: str, argument: str, value: object, allowed: str) -> None:
        super().__init__(f"{op}: {argument} is {value}; allowed: {allowed}")
        self.op, self.argument, self.value, self.allowed = op, argument, value, allowed


class GraphRefused(Refused):
    """A capture or a replay that would fail, or would compute with what is no longer true."""


class NotSimulated(Refused):
    """The vendor has this op and the simulator does not."""

    def __init__(self, op: str) -> None:
        super().__init__(op, "op", "not simulated", "the ops that anychip_npu_simulator.ops lists")


class Disagreement(AssertionError):
    """The simulator and the vendor's meta function differ: a fault of the simulator."""
