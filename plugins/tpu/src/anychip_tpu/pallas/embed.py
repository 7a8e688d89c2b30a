"""Puts a jax function, Pallas kernels included, into a torch_xla program.

The function is exported for TPUs with jax.export, which needs no TPU and writes the kernels in a form that libtpu
versions older than this jax can read. torch_xla calls it as one computation of its lazy graph, and XLA compiles both
together. Which pages a kernel writes in place is part of its call, so donated caches are not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
from jax.sharding import AbstractMesh, PartitionSpec

Axes = tuple[str | tuple[str, ...] | None, ...]
"""For each dimension of an array, the mesh axes along which it is sharded; None: whole on every device."""


def per_device(
    fn: Callable[..., Any], mesh: Mapping[str, int], in_axes: Sequence[Axes], out_axes: Sequence[Axes]
) -> Callable[..., Any]:
    """`fn`, which sees one device's part of each array, as a function of whole arrays. `mesh`: size of each axis, in
    the order of the program's mesh."""
    specs = tuple(PartitionSpec(*axes) for axes in in_axes), tuple(PartitionSpec(*axes) for axes in out_axes)
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    return jax.shard_map(fn, mesh=abstract, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def exported_module(fn: Callable[..., Any], args: Sequence[jax.ShapeDtypeStruct]) -> tuple[str, list[Any]]:
    """`fn` for TPUs as StableHLO text, and the shapes of its results."""
    # torch_xla's programs are partitioned by GSPMD, so shardings are written as it reads them.
    shardy = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        exported = jax.export.export(jax.jit(fn, keep_unused=True), platforms=["tpu"])(*args)
    finally:
        jax.config.update("jax_use_shardy_partitioner", shardy)
    return exported.mlir_module(), list(exported.out_avals)


class EmbeddedFunction:
    """`fn` for one list of argument shapes, to be called on torch_xla tensors of these shapes. Results are a list.

    attend = EmbeddedFunction("attention", partial(ragged_paged_attention, spec=spec, chip=chip), shapes)
    out, pages = attend(q, k, v, pages, tables, starts, lengths, slots)
    """

    def __init__(self, name: str, fn: Callable[..., Any], args: Sequence[jax.ShapeDtypeStruct]) -> None:
        import torch_xla
        from jaxlib import _jax

        text, self.results = exported_module(fn, args)
        self.name = f"xla::{name}"
        self._xla = torch_xla._XLAC
        computation = _jax.mlir.mlir_module_to_xla_computation(text, use_tuple_args=False, return_tuple=True)
        proto = computation.as_serialized_hlo_module_proto()
        self._computation = self._xla._xla_op_computation_from_module_proto(name, proto)

    def __call__(self, *tensors: Any) -> list[Any]:
        return list(self._xla._xla_user_computation(self.name, list(tensors), self._computation))
