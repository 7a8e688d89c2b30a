"""What CANN checks of npu_fused_infer_attention_score and its second version. Source: _op_plugin_docs.py under these
names; that TND takes a paged cache is in the document's paged part and in vllm-ascend's use of it."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip_npu_simulator.calls import Arguments
from anychip_npu_simulator.ops.attention_arguments import Names, kv_heads, lengths, query_dim, row_lengths

LAYOUTS = ("BSH", "BSND", "BNSD", "TND")
MASK = 2048
"""Rows and columns of the one mask that sparse modes 2, 3 and 4 read."""
UNLIMITED = 2147483647
_BLOCK, _MAX_BLOCK, _DECODE_BLOCK = 128, 512, 16
_MAX_DIM, _DIM_STEP, _MAX_HEADS, _MAX_RATIO, _MAX_WIDTH = 512, 16, 256, 64, 65535


def check(a: Arguments, names: Names) -> None:
    a.absent(*names.unsupported)
    a.only("input_layout", *LAYOUTS)
    a.only("sparse_mode", 0, 1, 2, 3, 4)
    a.dtype("query", torch.float16, torch.bfloat16)
    a.dtype("key", a.query.dtype)
    a.dtype("value", a.query.dtype)
    a.dims("query", {"BSH": 3, "BSND": 4, "BNSD": 4, "TND": 3}[a.input_layout])
    a.contiguous("query", "key", "value")
    heads, groups = int(getattr(a, names.heads)), kv_heads(a, names)
    ratio_fits = groups and heads % groups == 0 and heads // groups <= _MAX_RATIO
    a.check(
        ratio_fits,
        "num_key_value_heads",
        groups,
        f"a divisor of the {heads} heads, at most {_MAX_RATIO} of them share one",
    )
    a.check(0 < heads <= _MAX_HEADS, names.heads, heads, f"1 to {_MAX_HEADS}")
    dim = query_dim(a, names)
    a.check(
        dim % _DIM_STEP == 0 and dim <= _MAX_DIM,
        "query",
        f"of head dimension {dim}",
        f"a multiple of {_DIM_STEP} up to {_MAX_DIM}",
    )
    _check_rope(a)
    batch, longest = _check_query_lengths(a, names)
    if a.block_table is not None:
        _check_paged(a, names, batch, longest, dim)
    else:
        _check_plain(a, names, batch)
    _check_mask(a, names, longest)


def _check_rope(a: Arguments) -> None:
    together = (a.query_rope is None) == (a.key_rope is None)
    a.check(
        together, "key_rope" if a.key_rope is None else "query_rope", "given alone", "query_rope and key_rope together"
    )
    for name in ("query_rope", "key_rope"):
        a.dtype(name, a.query.dtype)
        if getattr(a, name) is not None:
            a.check(
                getattr(a, name).shape[-1] == 64 or a.input_layout == "BSH",
                name,
                f"of shape {tuple(getattr(a, name).shape)}",
                "64 in its last dimension",
            )


def _check_query_lengths(a: Arguments, names: Names) -> tuple[int, int]:
    """Number of rows, and the longest of their queries."""
    given, shape = lengths(a, names.query_lengths), tuple(a.query.shape)
    if a.input_layout == "TND":
        a.check(given, names.query_lengths, given, "cumulative lengths of the queries, which TND needs")
        assert given is not None
        rises = all(low <= high for low, high in zip([0, *given], given, strict=False))
        a.check(rises, names.query_lengths, given, "cumulative lengths, none below the one before it")
        a.check(
            given[-1] == shape[0],
            names.query_lengths,
            given,
            f"cumulative lengths that end at the {shape[0]} tokens of query",
        )
        return len(given), max(high - low for low, high in zip([0, *given], given, strict=False))
    batch, size = shape[0], shape[2] if a.input_layout == "BNSD" else shape[1]
    if given is not None and size > 1:
        fits = len(given) in (1, batch) and all(0 <= length <= size for length in given)
        a.check(fits, names.query_lengths, given, f"{batch} lengths from 0 to {size}")
    return batch, size


def _check_kv_lengths(a: Arguments, names: Names, batch: int) -> list[int]:
    given = lengths(a, names.kv_lengths)
    a.check(given is not None, names.kv_lengths, given, f"{batch} lengths of keys, which a paged cache needs")
    assert given is not None
    a.check(len(given) == batch, names.kv_lengths, given, f"{batch} lengths, one a row")
    a.check(all(length >= 0 for length in given), names.kv_lengths, given, "lengths of 0 or more")
    return given


def _check_paged(a: Arguments, names: Names, batch: int, longest: int, dim: int) -> None:
    given, groups, size = _check_kv_lengths(a, names, batch), kv_heads(a, names), int(a.block_size)
    a.dtype("block_table", torch.int32)
    a.dims("block_table", 2)
    a.contiguous("block_table")
    if longest > 1 or a.input_layout == "TND":
        a.check(
            size and size % _BLOCK == 0 and size <= _MAX_BLOCK,
            "block_size",
            size,
            f"a multiple of {_BLOCK} up to {_MAX_BLOCK}",
        )
    else:
        a.check(
            size and size % _DECODE_BLOCK == 0 and size <= _MAX_BLOCK,
            "block_size",
            size,
            f"a multiple of {_DECODE_BLOCK} up to {_MAX_BLOCK}",
        )
    num_blocks = a.key.shape[0]
    a.dims("key", 3, 4)
    if a.key.dim() == 4:
        a.check(
            a.input_layout in ("BNSD", "TND"),
            "key",
            f"of shape {tuple(a.key.shape)} with {a.input_layout}",
            "[num_blocks, block_size, kv_heads * dim]",
        )
        a.shape("key", (num_blocks, groups, size, dim))
    else:
        a.shape("key", (num_blocks, size, groups * dim))
        a.check(
            groups * dim <= _MAX_WIDTH,
            "key",
            f"of width {groups * dim}",
            f"up to {_MAX_WIDTH}, or [num_blocks, kv_heads, block_size, dim]",
        )
    a.shape("value", tuple(a.key.shape))
    a.check(a.key.numel() < 2**31, "key", f"of {a.key.numel()} elements", "fewer than 2**31")
    blocks = max((-(-length // size) for length in given), default=0)
    rows, columns = a.block_table.shape
    a.check(rows == batch, "block_table", f"of shape {tuple(a.block_table.shape)}", f"{batch} rows, one a length")
    a.check(
        columns >= blocks,
        "block_table",
        f"of shape {tuple(a.block_table.shape)}",
        f"{blocks} columns, for keys up to {max(given, default=0)}",
    )
    a.check(
        num_blocks >= sum(-(-length // size) for length in given) or _shares(a.block_table),
        "key",
        f"of {num_blocks} blocks",
        "one block at least for each that the lengths need",
    )


def _shares(table: Tensor) -> bool:
    """Rows share blocks of a common prefix; the document counts them apart, devices do not."""
    return table.unique().numel() < table.numel()


def _check_plain(a: Arguments, names: Names, batch: int) -> None:
    given = lengths(a, names.kv_lengths)
    a.dims("key", a.query.dim())
    a.check(
        a.key.shape[:-1] == a.value.shape[:-1],
        "value",
        f"of shape {tuple(a.value.shape)}",
        f"rows of key, {tuple(a.key.shape)}",
    )
    a.check(a.block_size == 0, "block_size", a.block_size, "0 where there is no block_table")
    if a.input_layout == "TND":
        a.check(given, names.kv_lengths, given, "cumulative lengths of the keys, which TND needs")
        assert given is not None
        rises = all(low <= high for low, high in zip([0, *given], given, strict=False))
        fits = rises and len(given) == batch and given[-1] == a.key.shape[0]
        a.check(
            fits, names.kv_lengths, given, f"{batch} cumulative lengths that end at the {a.key.shape[0]} tokens of key"
        )
    elif given is not None:
        size = a.key.shape[2] if a.input_layout == "BNSD" else a.key.shape[1]
        fits = len(given) in (1, batch) and all(0 <= length <= size for length in given)
        a.check(fits, names.kv_lengths, given, f"{batch} lengths from 0 to {size}")


def _check_mask(a: Arguments, names: Names, longest: int) -> None:
    """Modes 2, 3 and 4 read one fixed mask, of which 1 hides."""
    a.dtype("atten_mask", torch.bool, torch.int8, torch.uint8)
    mode, mask = a.sparse_mode, a.atten_mask
    if mode in (2, 3, 4):
        a.check(mask is not None, "atten_mask", None, f"the mask of {MASK} x {MASK} that sparse_mode {mode} reads")
        a.shape("atten_mask", (MASK, MASK), (1, MASK, MASK), (1, 1, MASK, MASK))
        a.contiguous("atten_mask")
        square = mask.view(MASK, MASK)
        upper = not square.diagonal().any() and bool(square.diagonal(1).all()) and not square[-1].any()
        a.check(upper, "atten_mask", "another pattern", "torch.triu(torch.ones(2048, 2048), 1): 1 hides")
    elif a.input_layout == "TND":
        a.check(
            mask is None,
            "atten_mask",
            "given",
            "None with sparse_mode 0 or 1 in TND; sparse_mode 3 or 4 with the fixed mask",
        )
    if mode == 1:
        a.check(mask is not None, "atten_mask", None, "the whole mask, which sparse_mode 1 reads")
    if mode == 4 and longest == 1 and a.input_layout != "TND":
        a.check(
            a.pre_tokens == UNLIMITED,
            "pre_tokens",
            a.pre_tokens,
            f"{UNLIMITED}: it has no effect on queries of one token; TND has",
        )
    if mode == 4:
        a.check(
            a.pre_tokens + a.next_tokens >= 0,
            "pre_tokens",
            a.pre_tokens,
            f"{-a.next_tokens} or more, with next_tokens {a.next_tokens}",
        )
    if mode == 3 and a.block_table is not None:
        pairs = zip(row_lengths(a, names), lengths(a, names.kv_lengths) or (), strict=True)
        for row, (query, keys) in enumerate(pairs):
            a.check(
                query <= keys,
                names.kv_lengths,
                f"{keys} in row {row}",
                f"{query} or more, the row's queries, with sparse_mode 3",
            )
