"""Reference latent attention: rows are expanded to keys and values, one sequence at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anychip.ops.reference.attention import BLOCK_SIZES, BYTE_RANGES
from anychip.ops.reference.block_moves import last_copies
from anychip.plugin_api import BatchView, KVLayout, LatentBackend, LatentLayer, LatentSpec, Unsupported
from anychip.plugin_api import latent_page_bytes as page_bytes

_FP8 = "float8_e4m3fn"


class ReferenceLatent(LatentBackend):
    """[num_blocks, block_size, latent_dim + rope_dim], in the queries' dtype, or in fp8 without scales: rows are normed
    before they are kept. Softmax in float32."""

    name = "reference"

    def __init__(self, spec: LatentSpec) -> None:
        if spec.kv_dtype not in (spec.dtype, _FP8):
            raise Unsupported(
                f"latent attention backend {self.name}",
                [f"a {spec.kv_dtype} cache under {spec.dtype} queries is not implemented"],
            )
        super().__init__(spec)
        self.quantized = spec.kv_dtype == _FP8

    def encoded(self, rows: Tensor) -> Tensor:
        """Rows as the cache holds them: bytes where it is in fp8."""
        if not self.quantized:
            return rows.to(getattr(torch, self.spec.kv_dtype))
        most = BYTE_RANGES[_FP8]
        return rows.float().clamp(-most, most).to(getattr(torch, _FP8)).view(torch.uint8)

    def decoded(self, held: Tensor) -> Tensor:
        """The inverse, in the queries' dtype."""
        return held.view(getattr(torch, _FP8)).to(getattr(torch, self.spec.dtype)) if self.quantized else held

    def kv_layout(self) -> KVLayout:
        return KVLayout(block_sizes=BLOCK_SIZES, page_bytes=page_bytes(self.spec))

    def make_cache(self, raw: Tensor, num_blocks: int, block_size: int) -> Tensor:
        dtype = torch.uint8 if self.quantized else getattr(torch, self.spec.kv_dtype)
        return raw.view(dtype).view(num_blocks, block_size, self.spec.row_dim)

    def write_rows(self, latent: Tensor, k_rope: Tensor, cache: Tensor, plan: BatchView, layer: LatentLayer) -> Tensor:
        written = (plan.slot_mapping >= 0).nonzero().squeeze(-1)
        rows = torch.cat((latent, k_rope), dim=-1)[written]
        cache.flatten(0, 1)[plan.slot_mapping[written]] = self.encoded(rows)
        return cache

    def attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        plan: BatchView,
        layer: LatentLayer,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        shape = (len(q_nope), self.spec.num_heads, self.spec.v_dim)
        result = q_nope.new_zeros(shape) if out is None else out.zero_()
        starts = plan.query_start.tolist()
        for row, length in enumerate(plan.seq_lens.tolist()):
            begin, end = starts[row], starts[row + 1]
            if end > begin:
                blocks = plan.block_table[row, : -(-length // plan.block_size)].long()
                rows = self.decoded(cache[blocks].flatten(0, 1)[:length])
                result[begin:end] = self._attend_row(q_nope[begin:end], q_rope[begin:end], rows, layer)
        return result

    def _attend_row(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, layer: LatentLayer) -> Tensor:
        """The last len(q_nope) tokens of a sequence over all its rows [length, latent_dim + rope_dim]."""
        latent, k_rope = rows.float().tensor_split([self.spec.latent_dim], dim=-1)
        keys = torch.arange(len(rows), device=rows.device)
        queries = keys[len(rows) - len(q_nope) :].unsqueeze(-1)
        hidden = keys > queries
        if self.spec.window is not None:
            hidden = hidden | (keys <= queries - self.spec.window)
            # Blocks that a window has left behind are the null block, whose bytes may be anything.
            latent = latent.masked_fill(hidden.all(dim=0).unsqueeze(-1), 0)
        k_nope = torch.einsum("kc,hdc->khd", latent, layer.k_up.float())
        values = torch.einsum("kc,hdc->khd", latent, layer.v_up.float())
        scores = torch.einsum("qhd,khd->hqk", q_nope.float(), k_nope)
        scores = (scores + torch.einsum("qhd,kd->hqk", q_rope.float(), k_rope)) * layer.scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(q_nope.dtype)

    def copy_blocks(self, cache: Tensor, src: Sequence[int], dst: Sequence[int]) -> Tensor:
        sources, destinations = last_copies(src, dst)
        cache[destinations] = cache[sources]
        return cache

    def zero_blocks(self, cache: Tensor, ids: Sequence[int]) -> Tensor:
        cache[list(ids)] = 0
        return cache

    def export_arrays(self, cache: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
        return {"latent": cache[list(ids)]}

    def import_arrays(self, cache: Tensor, ids: Sequence[int], arrays: Mapping[str, Tensor]) -> Tensor:
        cache[list(ids)] = arrays["latent"]
        return cache
