"""Grouped mixture of experts: tokens sorted by expert, one product per expert that has any."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.ops.reference import ExpertWeights, ReferenceMoE
from anychip.plugin_api import Routing


class GroupedMoE(ReferenceMoE):
    """Weights and routing are the reference's; the experts run over contiguous slices of sorted tokens."""

    name = "cpu-grouped"

    def experts(
        self, x: Tensor, routing: Routing, packed: ExpertWeights, *, expert_map: Tensor | None = None
    ) -> Tensor:
        ids = routing.expert_ids if expert_map is None else expert_map[routing.expert_ids]
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        token = order // ids.shape[1]
        sorted_ids = flat[order]
        first = int((sorted_ids < 0).sum())  # choices of experts that live elsewhere
        counts = torch.bincount(sorted_ids[first:], minlength=len(packed.gate_up)).tolist()
        weights = routing.weights.flatten()[order].unsqueeze(-1)
        gathered = x[token]
        result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        begin = first
        for expert, count in enumerate(counts):
            if count:
                rows = slice(begin, begin + count)
                share = self.expert(gathered[rows], packed, expert).float() * weights[rows]
                result.index_add_(0, token[rows], share)
                begin += count
        return result.to(x.dtype)
