"""The op add_low_rank: tokens by their adapters, and two thin products for each tile of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from anychip.plugin_api import AdapterStack, op_override
from anychip_triton.kernels.low_rank import low_rank_down, low_rank_up
from anychip_triton.kernels.routing import sort_pairs
from anychip_triton.launch import Launcher, split_tile
from anychip_triton.shapes import power_of_two, rows_of

_UNSORTED_TOKENS = 64
"""Tokens up to which each is a tile of its own: a launch that sorts costs more than adapters that are read twice."""
_MOST_SORTED = 512
"""Places up to which one program of each counts all tokens; slots of many experts have more, and tiles of one token."""
_LEAST_BLOCK = 16
"""The least side of a product's tile, and the ranks that columns take at once: products of float32 numbers are made in
registers."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tokens as the two products take them."""

    arrays: dict[str, Tensor]
    """place_of [tokens], and what SORTED tiles are found by."""
    count: int
    is_sorted: bool


class TritonLowRank:
    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    @op_override("add_low_rank", version=1)
    def add_low_rank(self, *, x: Tensor, y: Tensor, stack: AdapterStack, slots: Tensor) -> Tensor:
        """In place; rows of y must be whole, as every product's are."""
        x, y = rows_of(x), y if y.stride(-1) == 1 else y.contiguous()
        places, parts, max_rank, columns = stack.down.shape
        blocks, options = split_tile(self._launch.tiles.tile("low_rank", rank=max_rank, item=x.element_size()))
        block_r = min(blocks["BLOCK_R"], max(_LEAST_BLOCK, power_of_two(max_rank)))
        tiles = self._tiles(slots.to(torch.int32).contiguous(), places, blocks["BLOCK_M"])
        inner = torch.empty((len(x), parts, max_rank), dtype=torch.float32, device=x.device)
        common = {
            "inner": inner, "ranks": stack.ranks, "places": places, "parts": parts, "max_rank": max_rank,
            "SORTED": tiles.is_sorted, "BLOCK_M": blocks["BLOCK_M"], **tiles.arrays,
        }  # fmt: skip
        self._launch(
            low_rank_down, (parts * -(-max_rank // block_r), tiles.count), options,
            x=x, down=stack.down, scales=stack.scales, columns=columns, x_stride=x.stride(0),
            BLOCK_K=blocks["BLOCK_K"], BLOCK_R=block_r, **common,
        )  # fmt: skip
        for part, (begin, end) in enumerate(pairwise(stack.offsets)):
            self._launch(
                low_rank_up, (-(-(end - begin) // blocks["BLOCK_N"]), tiles.count), options,
                y=y, up=stack.up, part=part, begin=begin, end=end, out_features=y.shape[-1], y_stride=y.stride(0),
                BLOCK_N=blocks["BLOCK_N"], BLOCK_R=_LEAST_BLOCK, **common,
            )  # fmt: skip
        return y

    def _tiles(self, place_of: Tensor, places: int, size: int) -> _Tiles:
        """Tiles of tokens that have one place, unless there are few tokens or many places."""
        tokens = len(place_of)
        if tokens <= _UNSORTED_TOKENS or places > _MOST_SORTED:
            unread = dict.fromkeys(("order", "ends", "tile_ends"), place_of)
            return _Tiles({"place_of": place_of, **unread}, tokens, is_sorted=False)
        order, ends, tile_ends = (
            torch.empty((count,), dtype=torch.int32, device=place_of.device) for count in (tokens, places, places)
        )
        sorting, options = split_tile(self._launch.tiles.tile("sort_pairs", pairs=tokens))
        self._launch(
            sort_pairs, (places,), options,
            order=order, pair_ends=ends, tile_ends=tile_ends, pair_experts=place_of, pairs=tokens, experts=places,
            BINS=power_of_two(places + 1), TILE=size, **sorting,
        )  # fmt: skip
        arrays = {"place_of": place_of, "order": order, "ends": ends, "tile_ends": tile_ends}
        return _Tiles(arrays, -(-tokens // size) + places, is_sorted=True)
