"""The compiled kernels: which variants were built, which of them this processor runs, and the one that is loaded.

Each variant is an extension module of its own, `_kernels_<name>`, with the functions of kernels/module.cpp. Tensors are
passed by address and structures as packed bytes, so that the modules need nothing of torch to be built.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from anychip.plugin_api import Unsupported

_log = logging.getLogger(__name__)

Kernels = Any
"""An extension module; its functions and their arguments are documented in kernels/module.cpp."""

DTYPES = {
    "float32": 0, "bfloat16": 1, "int8": 2, "float8_e4m3fn": 3, "int4": 4, "int2": 5, "int3": 6, "int5": 7, "int6": 8,
    "table": 9, "float16": 10, "e8m0": 11,
}  # fmt: skip
"""kernels/types.h's DType."""

REFERENCE = "reference"
"""The name under which plain PyTorch is chosen."""

REMEDY = "its kernels were not compiled; install a C++17 compiler and Python's headers, and anychip-cpu again"

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})
EMULATED_AMX = "avx512_amx_emulated"
"""AMX's kernels with its registers as arrays: of a build for tests alone, and never chosen by itself."""

_NEEDS: dict[str, frozenset[str]] = {
    "avx512_amx": _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512_bf16": _AVX512 | {"avx512_bf16"},
    "avx512": _AVX512,
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "generic": frozenset(),
    EMULATED_AMX: _AVX512 | {"avx512_bf16"},
}
"""By variant, fastest first, the processor's features that it uses."""


def fields(*values: int | float) -> bytes:
    """A structure of eight-byte fields, integers and floats."""
    return struct.pack("".join("d" if isinstance(value, float) else "q" for value in values), *values)


def built() -> list[str]:
    """Variants that the installation has, fastest first."""
    return [name for name in _NEEDS if importlib.util.find_spec(_module(name)) is not None]


def usable() -> list[str]:
    """Of those, what this processor runs, the one to choose first."""
    flags, vendor = _processor()
    names = [name for name in built() if _NEEDS[name] <= flags]
    # Intel's cores issue vdpbf16ps every other cycle: two FMAs are twice as fast. AMD's issue two in a cycle.
    if vendor == "GenuineIntel" and {"avx512", "avx512_bf16"} <= set(names):
        names.remove("avx512_bf16")
        names.insert(names.index("avx512") + 1, "avx512_bf16")
    return names


def version() -> str | None:
    """What `doctor` says of the kernels; None where there are none."""
    names = usable()
    return f"{names[0]} (there are {_listed(names)})" if names else None


def load(isa: str) -> Kernels | None:
    """The kernels of a variant, "" for the fastest; None for plain PyTorch, asked for or all that there is. Raises
    Unsupported for a variant that is not here."""
    names = usable()
    if isa and isa not in (*names, REFERENCE):
        why = "was not built" if isa not in built() else "needs a processor with " + ", ".join(sorted(_NEEDS[isa]))
        raise Unsupported("anychip-cpu", [f"isa={isa}: {why}; there are {_listed([*names, REFERENCE])}"])
    for name in [isa] if isa else names:
        if name == REFERENCE:
            return None
        try:
            return _opened(name)
        except ImportError as error:  # the system may forbid what the processor has
            if isa:
                raise Unsupported("anychip-cpu", [f"isa={isa}: {error}"]) from error
            _log.warning("kernels %s are passed over: %s", name, error)
    return None


def name_of(kernels: Kernels) -> str:
    """The variant that a module is."""
    return str(kernels.__name__).rpartition("_kernels_")[2]


@cache
def _opened(name: str) -> Kernels:
    return importlib.import_module(_module(name))


def _module(name: str) -> str:
    return f"anychip_cpu._kernels_{name}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


@cache
def _processor() -> tuple[frozenset[str], str]:
    """Feature flags and vendor, as Linux names them; empty elsewhere, where `generic` serves."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset(), platform.machine()
    first = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in first.items()}
    return frozenset(found.get("flags", "").split()), found.get("vendor_id", "")
