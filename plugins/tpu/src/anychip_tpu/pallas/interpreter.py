"""Runs kernels on the host in the interpreter of Pallas, which simulates a TPU's memories, transfers and semaphores. A
simulation: no TPU ran. Used by tests; slow."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

INTERPRETED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
"""What no one wrote is NaN; loads and stores that race with a transfer are found."""

_QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""A simulated kernel runs once: what its compilation takes is what a test takes."""


def compiled(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """`fn` for arguments of these shapes, compiled in the least time."""
    return jax.jit(fn).lower(*args).compile(compiler_options=_QUICK)


def race_found(*results: Any) -> bool:
    """Whether the kernel that gave these results, the last that ran, had a race."""
    jax.block_until_ready(results)  # a kernel runs after its call has returned
    # jax has no public name for this, and has moved it: jax.experimental.pallas.tpu prints what it finds, no more.
    try:
        module = import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    except ImportError:
        module = import_module("jax._src.pallas.mosaic.interpret")
    return bool(module.races.races_found)
