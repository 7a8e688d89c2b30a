"""What a chip of each TPU generation has. Figures are peaks that the vendor gives; none was measured here.

Sources, read in November 2026:
  [doc] docs.cloud.google.com/tpu/docs: the pages v4, v5e, v5p, v6e, tpu7x ("System architecture")
  [jax] jax 0.10.2, jax/_src/pallas/mosaic/tpu_info.py: VMEM, SMEM, MXU columns, and peaks by dtype
  [book] jax-ml.github.io/scaling-book, "How to Think About TPUs": links between chips of v4
  [topology] devices that libtpu 0.0.40 lists for one chip (jax.experimental.topologies)
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One chip. A device is what one copy of a program drives: a chip, or a core where `devices_per_chip` is 2."""

    name: str
    topology_name: str  # how libtpu spells it before the colon
    hbm_bytes: int  # [doc]
    hbm_bytes_per_s: float  # [doc]
    vmem_bytes: int  # [jax], of one core, which is what one kernel has
    smem_bytes: int  # [jax], of one core
    mxu_size: int  # [jax], side of the systolic array
    bf16_flops: float  # [doc]
    int8_ops: float  # [doc]; 0 where the MXU takes no int8
    fp8_flops: float  # [doc]; 0 where the MXU takes no fp8
    ici_bytes_per_s: float  # [doc], of all links of a chip in both directions; v4 [book]
    mesh_dims: int  # [doc], 2 or 3
    devices_per_chip: int  # [topology]
    dtypes: frozenset[str]  # operands of a product that the MXU takes as they are, [jax] TpuInfo.is_matmul_supported

    @property
    def hbm_bytes_per_device(self) -> int:
        return self.hbm_bytes // self.devices_per_chip

    def peak(self, dtype: str) -> float:
        """Operations a second of one device for products of `dtype`; float32 counts as three passes of bfloat16."""
        peaks = {"int8": self.int8_ops, "fp8": self.fp8_flops, "float32": self.bf16_flops / 3}
        return (peaks.get(dtype) or self.bf16_flops) / self.devices_per_chip


_FLOAT = frozenset({"float32", "bfloat16"})

GENERATIONS = {
    generation.name: generation
    for generation in (
        # On a TPU VM both cores of a v4 chip are one device; libtpu's description of a slice has two.
        Generation(
            name="v4", topology_name="v4", hbm_bytes=32 * GIB, hbm_bytes_per_s=1200e9, vmem_bytes=16 * MIB,
            smem_bytes=MIB, mxu_size=128, bf16_flops=275e12, int8_ops=275e12, fp8_flops=0.0,
            ici_bytes_per_s=540e9, mesh_dims=3, devices_per_chip=2, dtypes=_FLOAT,
        ),
        Generation(
            name="v5e", topology_name="v5e", hbm_bytes=16 * GIB, hbm_bytes_per_s=819e9, vmem_bytes=128 * MIB,
            smem_bytes=MIB, mxu_size=128, bf16_flops=197e12, int8_ops=393e12, fp8_flops=0.0,
            ici_bytes_per_s=400e9, mesh_dims=2, devices_per_chip=1, dtypes=_FLOAT | {"int8", "int4"},
        ),
        Generation(
            name="v5p", topology_name="v5p", hbm_bytes=95 * GIB, hbm_bytes_per_s=2765e9, vmem_bytes=64 * MIB,
            smem_bytes=MIB, mxu_size=128, bf16_flops=459e12, int8_ops=918e12, fp8_flops=0.0,
            ici_bytes_per_s=1200e9, mesh_dims=3, devices_per_chip=1, dtypes=_FLOAT | {"int8", "int4"},
        ),
        Generation(
            name="v6e", topology_name="v6e", hbm_bytes=32 * GIB, hbm_bytes_per_s=1638e9, vmem_bytes=128 * MIB,
            smem_bytes=MIB, mxu_size=256, bf16_flops=918e12, int8_ops=1836e12, fp8_flops=0.0,
            ici_bytes_per_s=800e9, mesh_dims=2, devices_per_chip=1, dtypes=_FLOAT | {"int8", "int4"},
        ),
        Generation(
            name="v7x", topology_name="tpu7x", hbm_bytes=192 * GIB, hbm_bytes_per_s=7380e9, vmem_bytes=64 * MIB,
            smem_bytes=MIB, mxu_size=256, bf16_flops=2307e12, int8_ops=0.0, fp8_flops=4614e12,
            ici_bytes_per_s=1200e9, mesh_dims=3, devices_per_chip=2, dtypes=_FLOAT | {"fp8"},
        ),
    )
}  # fmt: skip

ALIASES = {"tpu7x": "v7x", "v7": "v7x", "v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "ironwood": "v7x"}


_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "v7x",
}  # fmt: skip
"""By what runtimes call a device [jax]."""


def by_device_kind(kind: str) -> Generation | None:
    """None for a device of no generation that is known here."""
    name = _KINDS.get(kind)
    return None if name is None else GENERATIONS[name]


def generation(name: str) -> Generation:
    """By its name, or by another that the vendor uses. Raises KeyError that lists the names."""
    found = GENERATIONS.get(ALIASES.get(name.lower(), name.lower()))
    if found is None:
        raise KeyError(f"no TPU generation {name!r}; there are {', '.join(GENERATIONS)}")
    return found
