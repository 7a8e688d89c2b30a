"""The kernels in Triton's interpreter, on the host: what they compute can be judged where there is no GPU.

A simulation: neither a compiler nor a device has a part in it. Kernels are marked for one or the other when they are
defined, so a process either interprets or compiles.
"""

from __future__ import annotations

import os
import sys

_KERNELS = "anychip_triton.kernels"

if not os.environ.get("TRITON_INTERPRET"):
    if any(name.startswith(_KERNELS) for name in sys.modules):
        raise ImportError(
            "this process has Triton kernels that are compiled; the interpreter needs a process of its own"
        )
    if "triton.language" in sys.modules:  # its own functions are marked as well
        raise ImportError("this process has imported triton; set TRITON_INTERPRET=1 before it starts")
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Mapping  # noqa: E402

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from anychip.plugin_api import Capabilities, PeakMemory  # noqa: E402
from anychip_triton.attention import MAX_HEAD_DIM  # noqa: E402
from anychip_triton.linear import EPILOGUES  # noqa: E402
from anychip_triton.platform import TritonPlatform  # noqa: E402
from anychip_triton.targets import INTERPRETER, Target  # noqa: E402

_KV_BYTES = 64 << 20
"""What is interpreted is small."""

_Builder = interpreter.InterpreterBuilder
_dot, _cast = _Builder.create_dot, _Builder.cast_impl


def _widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, as the interpreter holds it."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
    if a.dtype.scalar == tl.bfloat16:
        a, b = _widened(a), _widened(b)
    return _dot(builder, a, b, d, input_precision, max_num_imprecise_acc)


def _cast_impl(builder, src, dst_type):  # type: ignore[no-untyped-def]
    if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(_narrowed(src.data), tl.bfloat16)
    return _cast(builder, src, dst_type)


# bfloat16 as devices treat it. The interpreter, in all of its versions up to 3.7, holds such values as integers,
# multiplies those in a product, and cuts float32 off where a device rounds. The process only interprets, so this stays.
_Builder.create_dot, _Builder.cast_impl = _create_dot, _cast_impl


class InterpreterPlatform(TritonPlatform):
    capabilities = Capabilities(
        dtypes=frozenset({"float32", "float16", "bfloat16"}),
        head_dims=frozenset(range(8, MAX_HEAD_DIM + 1)),
        epilogues=EPILOGUES,
        lora=True,
    )
    profiled_tokens = 8

    def kv_budget(self, profile: PeakMemory) -> int | None:
        return _KV_BYTES

    def find_target(self) -> Target:
        return INTERPRETER

    def made_with(self) -> Mapping[str, str]:
        return {}
