"""Registers the simulated npu:: ops. Every other op of the vendor's that computes is refused by name."""

from __future__ import annotations

from typing import Any

import torch

from anychip_npu_simulator import ops
from anychip_npu_simulator.calls import OPS, Kernel
from anychip_npu_simulator.errors import NotSimulated
from anychip_npu_simulator.ops import formats

assert ops.__all__, "importing the package fills OPS"

_VENDORS = frozenset(
    [
        "get_npu_format",
        "empty_with_format",
        "unsafe_empty_with_format",
        "new_empty_with_format",
        "copy_memory_",
        "get_storage_size",
        "npu_format_cast",
        "npu_change_data_ptr",
        "print_npugraph_tensor",
        "save_npugraph_tensor",
        "super_kernel_scope_begin",
        "super_kernel_scope_end",
        "_npu_fused_infer_attention_score_infer_output",
        "_npu_fused_infer_attention_score_v2_infer_output",
    ]
)
"""Bookkeeping that needs no kernel: the wheel's own."""


def _overload(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.npu, base), overload or "default")


def has_meta(name: str) -> bool:
    """Whether the vendor has a meta function for the op."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "Meta"))


def _refusal(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotSimulated(name)

    return refuse


def install(library: torch.library.Library) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        if namespace != "npu" or not has(qualified, "PrivateUse1"):
            continue
        if name in OPS:
            asked = OPS[name].opinion or name
            kernel: Any = Kernel(OPS[name], _overload(name), _overload(asked) if has_meta(asked) else None)
        elif name in ("npu_format_cast", "npu_format_cast.Tensor"):
            kernel = formats.format_cast if name == "npu_format_cast" else formats.format_cast_like
        elif name.partition(".")[0] in _VENDORS:
            continue
        else:
            kernel = _refusal(qualified)
        library.impl(name, kernel, "PrivateUse1", allow_override=True)
        if name in OPS and has(qualified, "AutogradPrivateUse1"):  # the wheel's calls another op, with a backward
            library.impl(name, kernel, "AutogradPrivateUse1", allow_override=True)
