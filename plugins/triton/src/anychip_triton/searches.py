"""What is worth a search for tiles: problems that share an entry of a table, and the tiles to try, by worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as combinations
from typing import TYPE_CHECKING, Any

from anychip_triton.tiles import Tile

if TYPE_CHECKING:
    from anychip_triton.problems import Problem

_ANY = 1 << 30
"""A bound that holds everything: entries of a kernel bound the same numbers, so that their order is plain."""

_LARGE = 128 << 10
"""Shared memory in which three stages of large tiles fit."""

_COPY_ENGINE = 200 << 10
"""Shared memory of the targets that have one."""

_QWEN = {"heads": 14, "kv_heads": 2, "dim": 64}
_LLAMA = {"heads": 32, "kv_heads": 8, "dim": 128}


@dataclass(frozen=True, slots=True)
class Search:
    """One entry of a table: the problems that it is for, and the tiles to try."""

    kernel: str
    up_to: Mapping[str, int]
    problems: Sequence[Problem]
    candidates: Sequence[Tile]

    @property
    def name(self) -> str:
        return f"{self.kernel} {', '.join(f'{n} {b}' for n, b in self.up_to.items() if b != _ANY)}"


def searches(shared_bytes: int) -> Iterator[Search]:
    """The most worthwhile first; `shared_bytes` is a program's most shared memory. Weights of 4 and 8 bits have none:
    what is shipped for them stays."""
    few, fewer, more, gated = (partial(_products, shared_bytes, kind) for kind in ("few", "fewer", "more", "gated"))
    yield _experts(shared_bytes, _ANY, (2048, 4096))
    yield _prompts(shared_bytes, _LLAMA)
    yield fewer(1024, _ANY, (4864, 896))
    yield _experts(shared_bytes, 2048, (128,))
    yield _experts(shared_bytes, 256, (32,))
    yield _experts(shared_bytes, 64, (1, 8))
    yield _decode(shared_bytes)
    yield few(2560, _ANY, (4096, 2048), (896, 1152))
    yield more(6144, _ANY, (14336, 4096))
    yield fewer(1024, 2048, (896, 896), (2048, 128))
    yield more(6144, 4096, (4096, 6144), (4096, 4096), (2048, 5120))
    yield gated(_ANY, _ANY, (4096, 28672))
    yield gated(6144, 4096, (896, 9728))
    yield _experts(shared_bytes, 4096, (512,))
    yield _prompts(shared_bytes, _QWEN)
    yield more(_ANY, _ANY, (896, 151936))


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> Tile:
    depth = {"block_k": k} if k else {}
    return {"block_m": m, "block_n": n, **depth, "num_warps": warps, "num_stages": stages}


def _tiles(*choices: Sequence[int]) -> list[Tile]:
    """All combinations of rows, columns, depths (0: the kernel has none), warps and stages."""
    return [_tile(*chosen) for chosen in combinations(*choices)]


def _stages(shared_bytes: int) -> tuple[int, ...]:
    """Of large tiles."""
    return (3, 4) if shared_bytes >= _LARGE else (2,)


def _experts(shared_bytes: int, pairs: int, tokens: Sequence[int]) -> Search:
    """All of a mixture's products have one tile: its rows decide how pairs are sorted."""
    from anychip_triton.problems import experts

    if pairs == _ANY:
        shapes = _tiles((64, 128), (64, 128), (64,), (4, 8), _stages(shared_bytes))
        tiles = [tile for tile in shapes if (tile["block_m"], tile["block_n"], tile["num_warps"]) != (128, 128, 4)]
        tiles += [_tile(128, 128, 32, 8, 4), _tile(128, 128, 32, 8, 3), _tile(64, 256, 64, 8, 3)]
        tiles += [_tile(64, 64, 128, 4, 3), _tile(64, 128, 32, 4, 4)]
    elif pairs == 4096:
        tiles = _tiles((32, 64), (64, 128), (64,), (4, 8), _stages(shared_bytes))
        tiles += [_tile(32, 64, 128, 4, 3), _tile(32, 128, 128, 4, 3)]
    else:
        tiles = _tiles((16,), (32, 64), (64, 128, 256), (4, 8), (3, 4)) + [_tile(16, 128, 64, 4, 4)]
        if pairs > 64:
            tiles += [_tile(32, 64, 64, 4, 4), _tile(32, 64, 128, 4, 3), _tile(32, 128, 64, 4, 3)]
    bounds = {"pairs": pairs, "item": 2, "quantized": 0}
    fitting = [tile for tile in tiles if _product_bytes(tile, gated=True) <= shared_bytes]
    return Search("expert_matmul", bounds, [partial(experts, tokens=count) for count in tokens], fitting)


def _products(shared_bytes: int, kind: str, features: int, columns: int, *shapes: tuple[int, int]) -> Search:
    """Dense products of few rows. `shapes` are columns and rows of weights."""
    from anychip_triton.problems import product

    gated = kind == "gated"
    tiles = {
        "fewer": _tiles((16,), (16, 32), (128, 256, 512), (4, 8), (3, 5)),
        "few": _tiles((16,), (16, 32), (128, 256), (4, 8), (3, 4, 5)),
        "more": _tiles((16,), (16, 32, 64, 128), (64, 128, 256), (4, 8), (3, 5)),
        "gated": _tiles((16,), (16, 32, 64), (64, 128, 256), (4, 8), (3, 5)),
    }[kind]
    problems = [
        partial(product, rows=rows, columns=width, features=height, epilogue="silu" if gated else None)
        for width, height in shapes for rows in (1, 16)
    ]  # fmt: skip
    bounds = {"rows": 16, "gated": int(gated), "features": features, "columns": columns, "item": 2, "quantized": 0}
    fitting = [tile for tile in tiles if _product_bytes(tile, gated=gated) <= shared_bytes]
    return Search("matmul", bounds, problems, fitting)


def _prompts(shared_bytes: int, layer: dict[str, Any]) -> Search:
    from anychip_triton.problems import attention

    tiles = _tiles((64, 128), (32, 64, 128), (0,), (4, 8), (1, 2, 3, 4))
    problems = [partial(attention, **layer, rows=rows, queries=n, context=n) for rows, n in ((1, 8192), (4, 512))]
    bounds = {"dim": layer["dim"], "item": 2, "narrow": 0}
    fitting = [tile for tile in tiles if _attention_bytes(tile, layer["dim"]) <= shared_bytes]
    if shared_bytes >= _COPY_ENGINE:  # there a copy engine reads whole tiles, and fewer registers let more programs in
        fitting += [tile | {"described": 1} for tile in fitting]
        fitting += [
            tile | {"described": 1, "maxnreg": most}
            for tile in _tiles((64,), (64,), (0,), (4,), (2, 3))
            for most in (128, 168)
        ]
    return Search("attention", bounds, problems, fitting)


def _decode(shared_bytes: int) -> Search:
    from anychip_triton.problems import attention

    tiles = _tiles((16,), (16, 32, 64, 128), (0,), (4, 8), (2, 3, 4))
    tiles += _tiles((16,), (32, 64), (0,), (2,), (3, 4))
    problems = [
        partial(attention, **_LLAMA, rows=rows, queries=1, context=context)
        for rows, context in ((1, 2048), (128, 1024))
    ]
    bounds = {"many_tokens": 0, "dim": 128, "item": 2, "narrow": 0}
    fitting = [tile for tile in tiles if _attention_bytes(tile, 128) <= shared_bytes]
    return Search("attention", bounds, problems, fitting)


def _product_bytes(tile: Tile, *, gated: bool) -> int:
    """Shared memory of a product of 2-byte values. Some need a stage less: what is at the limit is not worth trying,
    where a form with a bias may need more."""
    heights = tile["block_m"] + tile["block_n"] * (2 if gated else 1)
    return 2 * heights * tile["block_k"] * tile["num_stages"]


def _attention_bytes(tile: Tile, dim: int) -> int:
    keys_and_values = 2 * tile["block_n"] * tile["num_stages"]
    return 2 * dim * (tile["block_m"] + keys_and_values)
