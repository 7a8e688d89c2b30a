"""Generations of Ascend devices, and what each has. Imports neither torch nor the vendor's runtime.

Sources: the vendor's documents of single ops in the torch_npu 2.13 wheel (`_op_plugin_docs.py`, "supported products"),
CANN's open ops (ops-transformer, the tables of supported products in `*/docs/aclnn*.md`), and `NpuVariables.h` of the
wheel, which names the chips.
"""

from __future__ import annotations

from dataclasses import dataclass

FUSED_ATTENTION = "npu_fused_infer_attention_score"
SCATTER_CACHE = "npu_scatter_pa_kv_cache"
MOE_ROUTING = "npu_moe_init_routing_v2"
TOKEN_QUANT = "npu_dynamic_quant"
SWIGLU = "npu_swiglu"
ROTARY = "npu_rotary_mul"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """`chips` are beginnings of the names that the runtime gives ("Ascend910B3"). `lacks` are ops that the others have,
    each with what serves instead."""

    name: str
    products: str
    chips: tuple[str, ...]
    dtypes: tuple[str, ...]
    memory_gib: tuple[int, ...]
    """Of one device, as sold; the runtime says how much there is."""
    streams: int
    """Streams that a process may have, where the runtime does not say how many are left."""
    fp8: bool = False
    """Whether torch's own ops know 8-bit floats there: schemes with such values or scales are refused elsewhere."""
    nz: bool = True
    """Whether weights may lie in FRACTAL_NZ: the wheel keeps its switch for that off on a 950."""
    graphs: bool = True
    """Whether CANN captures graphs (aclmdlRICaptureBegin)."""
    most_graphs: int | None = None
    """Sizes that are captured at most, whatever streams are left; None: as many as streams allow."""
    lacks: dict[str, str]
    evidence: str


_FLOATS: tuple[str, ...] = ("float32", "float16", "bfloat16")
_ALL_THERE: dict[str, str] = {}
_NEVER_RAN = "no device has run it; simulated"

G310P = Generation(
    name="310P",
    products="Atlas 300I Duo, Atlas 300I Pro",
    chips=("Ascend310P",),
    dtypes=("float32", "float16"),  # its matrix units know no bfloat16
    memory_gib=(24, 48),
    streams=1024,
    graphs=False,
    lacks={
        FUSED_ATTENTION: "core's reference attention on the device, one row at a time",
        SCATTER_CACHE: "indexed writes",
        MOE_ROUTING: "core's reference experts, one at a time",
        TOKEN_QUANT: "core's reference product of dequantized weights",
        SWIGLU: "torch's silu, and a product",
        ROTARY: "core's reference rotary embedding",
    },
    evidence=_NEVER_RAN,
)
G910B = Generation(
    name="910B",
    products="Atlas A2: Atlas 800T A2, Atlas 800I A2",
    chips=("Ascend910B",),
    dtypes=_FLOATS,
    memory_gib=(32, 64),
    streams=1800,
    lacks=_ALL_THERE,
    evidence=_NEVER_RAN,
)
G910C = Generation(
    name="910C",
    products="Atlas A3: Atlas 800T A3, Atlas 800I A3, CloudMatrix; two devices to a package",
    chips=("Ascend910_93",),
    dtypes=_FLOATS,
    memory_gib=(64,),
    streams=1800,
    lacks=_ALL_THERE,
    evidence=_NEVER_RAN,
)
G950 = Generation(
    name="950",
    products="Atlas A5: Ascend 950PR, Ascend 950DT",
    chips=("Ascend950", "Ascend910_95"),
    dtypes=_FLOATS,
    memory_gib=(112, 144),
    streams=1800,
    fp8=True,
    nz=False,
    most_graphs=4,  # more fail to be captured with the drivers of 2026-08, as vllm-ascend found
    lacks=_ALL_THERE,
    evidence=_NEVER_RAN,
)

GENERATIONS: tuple[Generation, ...] = (G310P, G910B, G910C, G950)


def generation_of(chip: str) -> Generation | None:
    """Of a chip's name: the runtime's ("Ascend910B3", "Ascend910_9392"), or npu-smi's, which may lack the word Ascend
    ("910B3"). None: not one of these. "Ascend910" alone, as npu-smi calls a package of two devices, is a 910C: the
    910A of 2019 has another driver, and CANN 8 left it behind."""
    name = chip.strip().replace(" ", "")
    if name[:6].lower() == "ascend":
        name = name[6:]
    if name == "910":
        return G910C
    for generation in GENERATIONS:
        if any(name.startswith(known.removeprefix("Ascend")) for known in generation.chips):
            return generation
    return None


def unknown_chip(chip: str) -> str:
    """Why a device of this name is not served."""
    served = "; ".join(f"{g.name} ({', '.join(g.chips)}*)" for g in GENERATIONS)
    return f"device {chip!r} is of no generation that this plugin knows: {served}"
