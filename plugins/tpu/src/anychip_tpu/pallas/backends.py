"""The kernels as core's layers call them: torch_xla tensors go in, and the kernels become part of the traced step.

Of several devices each runs the kernels on its share: heads of attention, and whole experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from anychip.plugin_api import (
    AttentionLayer,
    AttentionSpec,
    KVLayout,
    MoESpec,
    Placed,
    Platform,
    QKNorm,
    Rope,
    Routing,
    Sharded,
    Unsupported,
)
from anychip_tpu.attention import PagedAttention, PagedPlan
from anychip_tpu.moe import StackedExperts, XlaMoE
from anychip_tpu.pallas import attention as kernel
from anychip_tpu.pallas.attention_spec import AttentionSpec as KernelSpec
from anychip_tpu.pallas.attention_spec import choose_tiling
from anychip_tpu.pallas.embed import Axes, EmbeddedFunction, per_device
from anychip_tpu.pallas.experts import experts
from anychip_tpu.pallas.generations import Generation
from anychip_tpu.runtimes import Runtime

_SHARED, _COPIES = "shared", "copies"
_BOTH = (_SHARED, _COPIES)


class EmbeddedCalls:
    """Kernels by the shapes that they were exported for."""

    def __init__(self) -> None:
        self._made: dict[object, EmbeddedFunction] = {}

    def __call__(
        self,
        name: str,
        variant: object,
        make: Callable[[], Callable[..., Any]],
        tensors: Sequence[Tensor],
    ) -> list[Tensor]:
        """Calls what `make` makes for tensors of these shapes. `variant` is what it depends on beside them."""
        shapes = tuple(_described(tensor) for tensor in tensors)
        key = (name, variant, tuple((shape.shape, shape.dtype) for shape in shapes))
        if key not in self._made:
            self._made[key] = EmbeddedFunction(name, make(), shapes)
        return self._made[key](*tensors)


class PallasAttention(PagedAttention):
    """Attention by the Pallas kernel, which also writes the cache, in place.

    A cache is [num_blocks, num_kv_heads, parts, block_size, lanes]: see pallas/attention_spec.
    """

    name = "pallas"

    def __init__(self, spec: AttentionSpec, runtime: Runtime, chip: Generation, calls: EmbeddedCalls) -> None:
        super().__init__(spec)
        self._runtime, self._chip, self._calls = runtime, chip, calls
        reasons = []
        if spec.kv_dtype != spec.dtype:
            reasons.append(f"a KV cache of {spec.kv_dtype} beside {spec.dtype}")
        if spec.alibi:
            reasons.append("ALiBi")
        if spec.lse:
            reasons.append("log-sum-exp of parts")
        reasons = [f"the attention kernel has no {reason}" for reason in reasons]
        if reasons:
            raise Unsupported("anychip-tpu", reasons)

    def _check_division(self) -> None:
        """Here and not as the backend is made: core also plans the cache with one device's share of the heads."""
        devices, heads, kv_heads = self._runtime.num_devices, self.spec.num_heads, self.spec.num_kv_heads
        if heads % devices or not _divides(kv_heads, devices):
            fits = [count for count in range(1, heads + 1) if heads % count == 0 and _divides(kv_heads, count)]
            raise Unsupported(
                "anychip-tpu",
                [
                    f"{heads} heads over {kv_heads} KV heads do not divide over {devices} devices; they do over "
                    f"{', '.join(map(str, fits))}"
                ],
            )

    # -- layout -------------------------------------------------------------------------------------------

    def kv_layout(self) -> KVLayout:
        item = self.cache_dtype.itemsize

        def page_bytes(block_size: int) -> int:
            return int(torch.Size(self._page_shape(block_size)).numel()) * item

        return KVLayout(block_sizes=(16, 128), page_bytes=page_bytes)

    def cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:  # type: ignore[override]
        return num_blocks, *self._page_shape(block_size)

    def cache_placement(self) -> Placed:
        return tuple(Sharded(dim=1, axis=each.axis, uneven=each.uneven) for each in self.spec.pages)

    def _page_shape(self, block_size: int) -> tuple[int, int, int, int]:
        spec = self._kernel_spec(1, 1, 1, block_size, self.spec.head_dim**-0.5, writes=True)
        return self.spec.num_kv_heads, *spec.page_shape[1:]

    def _kernel_spec(
        self, num_tokens: int, num_rows: int, pages: int, block_size: int, scale: float, *, writes: bool
    ) -> KernelSpec:
        """Of one device."""
        spec, devices = self.spec, self._runtime.num_devices
        return KernelSpec(
            num_tokens=num_tokens, num_rows=num_rows, pages_per_row=pages, num_heads=spec.num_heads // devices,
            num_kv_heads=max(1, spec.num_kv_heads // devices), head_dim=spec.head_dim, page_size=block_size,
            dtype=spec.dtype, scale=scale, window=spec.window, softcap=spec.softcap, sinks=spec.sinks, writes=writes,
        )  # fmt: skip

    # -- a step -------------------------------------------------------------------------------------------

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: Tensor,
        plan: PagedPlan,
        layer: AttentionLayer,
        *,
        rope: Rope | None = None,
        qk_norm: QKNorm | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check_division()
        if rope is not None or qk_norm is not None:
            q, k = layer.ops.qkv_norm_rope(q=q, k=k, positions=self.positions(plan), rope=rope, qk_norm=qk_norm)
        writes = k is not None and v is not None
        spec = self._kernel_spec(
            q.shape[0], plan.tables.shape[0], plan.tables.shape[1], cache.shape[3], layer.scale, writes=writes
        )
        choose_tiling(spec, self._chip)  # refuses before anything is exported
        tensors = [q, cache, plan.tables.int(), plan.query_start.int(), plan.seq_lens.int()]
        tensors += [k, v, plan.slots.int()] if writes else []  # type: ignore[list-item]
        tensors += [layer.sinks.float()] if layer.sinks is not None else []
        attended, cache = self._calls("attention", spec, lambda: self._step(spec), tensors)
        return attended, cache

    def _step(self, spec: KernelSpec) -> Callable[..., Any]:
        def step(q: Any, pages: Any, tables: Any, starts: Any, lengths: Any, *rest: Any) -> Any:
            given = list(rest)
            new = (given.pop(0), given.pop(0)) if spec.writes else (None, None)
            slots = given.pop(0) if spec.writes else None
            return kernel.ragged_paged_attention(
                q, *new, pages, tables, starts, lengths, slots, *given, spec=spec, chip=self._chip
            )

        if self._runtime.num_devices == 1:
            return step
        # A KV head that several devices hold is written by each of them into its own pages.
        heads = (None, _BOTH, None)
        shares = min(self._runtime.num_devices, self.spec.num_kv_heads)
        kv = _BOTH if shares == self._runtime.num_devices else _SHARED
        kv_heads, pages = (None, kv, None), (None, kv, None, None, None)
        in_axes: list[Axes] = [heads, pages, (), (), ()]
        in_axes += [kv_heads, kv_heads, ()] if spec.writes else []
        in_axes += [(_BOTH,)] if spec.sinks else []
        return per_device(step, _mesh(self._runtime, shares), in_axes, [heads, pages])

    # -- blocks -------------------------------------------------------------------------------------------

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, plan: PagedPlan, layer: AttentionLayer) -> Tensor:
        raise Unsupported("anychip-tpu", ["the attention kernel writes as it attends: call forward"])

    def attend(
        self, q: Tensor, cache: Tensor, plan: PagedPlan, layer: AttentionLayer, *, out: Tensor | None = None
    ) -> Tensor:
        return self.forward(q, None, None, cache, plan, layer)[0]

    def export_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        held = cache[torch.tensor(list(ids), dtype=torch.int64, device=cache.device)]
        dim, half = self.spec.head_dim, held.shape[-1] // 2
        joined = held.shape[2] == 1
        keys, values = (
            held[:, :, 0, :, :dim],
            held[:, :, -1, :, half : half + dim] if joined else held[:, :, 1, :, :dim],
        )
        return torch.stack((keys, values), dim=1).transpose(2, 3)  # [blocks, 2, block_size, num_kv_heads, head_dim]

    def import_blocks(self, cache: Tensor, ids: Sequence[int], data: Tensor) -> Tensor:
        parts = data.to(cache.dtype).permute(0, 3, 1, 2, 4)  # [blocks, num_kv_heads, 2, block_size, head_dim]
        lanes = cache.shape[-1]
        if cache.shape[2] == 1:
            parts = torch.nn.functional.pad(parts, (0, lanes // 2 - parts.shape[-1]))
            parts = torch.cat((parts[:, :, 0], parts[:, :, 1]), dim=-1).unsqueeze(2)
        else:
            parts = torch.nn.functional.pad(parts, (0, lanes - parts.shape[-1]))
        return cache.index_copy(0, torch.tensor(list(ids), dtype=torch.int64, device=cache.device), parts)


class PallasMoE(XlaMoE):
    """Experts by grouped products. Of several devices each holds whole experts, and the devices' sums are added."""

    name = "pallas"

    def __init__(
        self, spec: MoESpec, platform: Platform, runtime: Runtime, chip: Generation, calls: EmbeddedCalls
    ) -> None:
        super().__init__(spec, platform, runtime)
        self._chip, self._calls = chip, calls
        if spec.num_experts % runtime.num_devices:
            raise Unsupported(
                "anychip-tpu",
                [f"{spec.num_experts} experts do not divide over {runtime.num_devices} devices"],
            )

    def experts(
        self, x: Tensor, routing: Routing, packed: StackedExperts, *, expert_map: Tensor | None = None
    ) -> Tensor:
        plain = isinstance(packed.gate_up, Tensor) and isinstance(packed.down, Tensor)
        if expert_map is not None or not plain:
            return super().experts(x, routing, packed, expert_map=expert_map)
        biases = [bias for bias in (packed.gate_up_bias, packed.down_bias) if bias is not None]
        tensors = [x, routing.expert_ids.int(), routing.weights, packed.gate_up, packed.down, *biases]
        (out,) = self._calls("experts", self.spec, lambda: self._step(len(biases)), tensors)  # type: ignore[arg-type]
        return out

    def _step(self, num_biases: int) -> Callable[..., Any]:
        several = self._runtime.num_devices > 1
        step = partial(
            experts, num_experts=self.spec.num_experts, activation=self.spec.activation, chip=self._chip,
            axis=_BOTH if several else None,
        )  # fmt: skip

        def listed(*arrays: Any) -> tuple[Any]:
            return (step(*arrays),)

        if not several:
            return listed
        by_expert, of_bias = (_BOTH, None, None), (_BOTH, None)
        in_axes: list[Axes] = [(), (), (), by_expert, by_expert, *[of_bias] * num_biases]
        return per_device(listed, _mesh(self._runtime, self._runtime.num_devices), in_axes, [()])


class PallasKernels:
    """What the kernels of a chip serve, for layers over a runtime's devices."""

    def __init__(self, runtime: Runtime, chip: Generation) -> None:
        self._runtime, self._chip, self._calls = runtime, chip, EmbeddedCalls()

    def attention(self, spec: AttentionSpec) -> PallasAttention:
        """Raises Unsupported for what the kernel lacks."""
        return PallasAttention(spec, self._runtime, self._chip, self._calls)

    def moe(self, spec: MoESpec, platform: Platform) -> PallasMoE:
        """Raises Unsupported for what the kernel lacks."""
        if spec.scheme is not None:
            raise Unsupported("anychip-tpu", [f"the experts' kernel takes no weights in {spec.scheme.name}"])
        return PallasMoE(spec, platform, self._runtime, self._chip, self._calls)


def _divides(kv_heads: int, devices: int) -> bool:
    return kv_heads % devices == 0 or devices % kv_heads == 0


def _mesh(runtime: Runtime, shares: int) -> dict[str, int]:
    return {_SHARED: shares, _COPIES: runtime.num_devices // shares}


def _described(tensor: Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(tensor.shape), getattr(jnp, str(tensor.dtype).removeprefix("torch.")))
