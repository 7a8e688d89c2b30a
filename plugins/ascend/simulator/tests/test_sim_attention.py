"""npu_fused_infer_attention_score of the simulator against a float64 loop over rows, heads, queries and keys."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("anychip_npu_simulator.runtime", reason="needs torch_npu: make ascend-test", exc_type=ImportError)

import torch
import torch_npu
from torch import Tensor

HEADS, GROUPS, DIM, SIZE = 4, 2, 16, 128
SCALE = DIM**-0.5
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def fixed_mask() -> Tensor:
    return torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1).npu()


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(q: Tensor, k: Tensor, v: Tensor, sees, sink: float | None = None) -> tuple[Tensor, Tensor]:
    """One row: q [queries, heads, dim], k and v [keys, groups, dim]; sees(i, j) of query i and key j."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    sums = torch.full((len(q), q.shape[1], 1), math.inf, dtype=torch.float64)
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        for i in range(len(q)):
            seen = [j for j in range(len(k)) if sees(i, j)]
            if not seen:
                continue
            scores = [float(q[i, head].double() @ k[j, group].double()) * SCALE for j in seen]
            total = sum(math.exp(s) for s in scores) + (math.exp(sink) if sink is not None else 0.0)
            for s, j in zip(scores, seen, strict=True):
                out[i, head] += math.exp(s) / total * v[j, group].double()
            sums[i, head, 0] = math.log(total)
    return out, sums


def paged(keys: list[Tensor], dtype: torch.dtype, four: bool) -> tuple[Tensor, Tensor]:
    """Rows' [length, groups, dim] in a cache of shuffled blocks, and its table."""
    blocks = [-(-len(k) // SIZE) for k in keys]
    order = torch.randperm(sum(blocks) + 1, generator=torch.Generator().manual_seed(7)).tolist()
    cache = drawn(len(order), SIZE, GROUPS, DIM, dtype=dtype, seed=9)  # what no row has is noise
    table = torch.zeros(len(keys), max(blocks), dtype=torch.int32)
    for row, k in enumerate(keys):
        for place in range(blocks[row]):
            block = order.pop()
            table[row, place] = block
            part = k[place * SIZE : (place + 1) * SIZE]
            cache[block, : len(part)] = part
    return cache.transpose(1, 2).contiguous() if four else cache.flatten(2), table


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize(("mode", "window"), [(0, None), (3, None), (4, 3)])
def test_tnd_over_a_paged_cache(dtype, four, mode, window):
    queries, lengths = [3, 1, 5], [140, 1, 9]
    q = drawn(sum(queries), HEADS, DIM, dtype=dtype, seed=1)
    keys = [drawn(n, GROUPS, DIM, dtype=dtype, seed=20 + n) for n in lengths]
    values = [drawn(n, GROUPS, DIM, dtype=dtype, seed=40 + n) for n in lengths]
    (key, table), (value, _) = paged(keys, dtype, four), paged(values, dtype, four)
    more = {} if mode == 0 else {"atten_mask": fixed_mask()}
    if window is not None:
        more |= {"pre_tokens": window - 1, "next_tokens": 0}
    out, sums = torch_npu.npu_fused_infer_attention_score(
        q.npu(), key.npu(), value.npu(), actual_seq_lengths=[3, 4, 9], actual_seq_lengths_kv=lengths,
        block_table=table.npu(), num_heads=HEADS, num_key_value_heads=GROUPS, block_size=SIZE, input_layout="TND",
        sparse_mode=mode, scale=SCALE, softmax_lse_flag=True, **more,
    )  # fmt: skip
    begin = 0
    for count, length, k, v in zip(queries, lengths, keys, values, strict=True):

        def sees(i, j, past=length - count):
            return mode == 0 or (j <= i + past and (window is None or j > i + past - window))

        wanted, log_sums = oracle(q[begin : begin + count], k, v, sees)
        assert float((out[begin : begin + count].cpu().double() - wanted).abs().max()) < TOLERANCE[dtype]
        assert float((sums[begin : begin + count].cpu().double() - log_sums).abs().max()) < 1e-5
        begin += count


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
def test_layouts_of_whole_rows_with_a_given_mask(layout):
    q, k, v = (drawn(2, 6, n, DIM, dtype=torch.float16, seed=n) for n in (HEADS, GROUPS, GROUPS + 6))
    v = v[:, :, :GROUPS].contiguous()
    hidden = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.6

    def laid(x: Tensor) -> Tensor:
        return {"BSH": x.flatten(2), "BSND": x, "BNSD": x.transpose(1, 2).contiguous()}[layout].npu()

    out, _ = torch_npu.npu_fused_infer_attention_score(
        laid(q), laid(k), laid(v), atten_mask=hidden.npu(), actual_seq_lengths_kv=[6, 4], num_heads=HEADS,
        num_key_value_heads=GROUPS, input_layout=layout, scale=SCALE,
    )  # fmt: skip
    got = {"BSH": lambda o: o.unflatten(2, (HEADS, DIM)), "BSND": lambda o: o, "BNSD": lambda o: o.transpose(1, 2)}
    for row, length in enumerate([6, 4]):
        wanted, _ = oracle(q[row], k[row, :length], v[row, :length], lambda i, j, row=row: not hidden[row, 0, i, j])
        assert float((got[layout](out.cpu())[row].double() - wanted).abs().max()) < TOLERANCE[torch.float16]


def test_tnd_without_pages_is_causal_within_each_row():
    q, k, v = (drawn(7, n, DIM, dtype=torch.bfloat16, seed=n) for n in (HEADS, GROUPS, GROUPS))
    out, _ = torch_npu.npu_fused_infer_attention_score(
        q.npu(), k.npu(), v.npu(), atten_mask=fixed_mask(), actual_seq_lengths=[3, 7], actual_seq_lengths_kv=[3, 7],
        num_heads=HEADS, num_key_value_heads=GROUPS, input_layout="TND", sparse_mode=3, scale=SCALE,
    )  # fmt: skip
    for begin, end in ((0, 3), (3, 7)):
        wanted, _ = oracle(q[begin:end], k[begin:end], v[begin:end], lambda i, j: j <= i)
        assert float((out[begin:end].cpu().double() - wanted).abs().max()) < TOLERANCE[torch.bfloat16]


def test_sinks_of_the_second_version_take_weight_and_give_no_value():
    q, k, v = (drawn(4, n, DIM, dtype=torch.bfloat16, seed=n) for n in (HEADS, GROUPS, GROUPS))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.bfloat16)
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(
        q.npu(), k.npu(), v.npu(), atten_mask=fixed_mask(), actual_seq_qlen=[4], actual_seq_kvlen=[4],
        num_query_heads=HEADS, num_key_value_heads=GROUPS, input_layout="TND", sparse_mode=3, softmax_scale=SCALE,
        learnable_sink=sinks.npu(),
    )  # fmt: skip
    for head in range(HEADS):
        group = head * GROUPS // HEADS
        one = (q[:, head : head + 1], k[:, group : group + 1], v[:, group : group + 1])
        wanted, _ = oracle(*one, lambda i, j: j <= i, sink=float(sinks[head]))
        assert float((out[:, head : head + 1].cpu().double() - wanted).abs().max()) < TOLERANCE[torch.bfloat16]


def test_rope_parts_count_in_the_scores():
    q, rope_q = drawn(3, 1, 1, DIM, dtype=torch.float16, seed=1), drawn(3, 1, 1, 64, dtype=torch.float16, seed=2)
    k, rope_k = drawn(3, 5, 1, DIM, dtype=torch.float16, seed=3), drawn(3, 5, 1, 64, dtype=torch.float16, seed=4)
    out, _ = torch_npu.npu_fused_infer_attention_score(
        q.npu(), k.npu(), k.npu(), query_rope=rope_q.npu(), key_rope=rope_k.npu(), num_heads=1, num_key_value_heads=1,
        input_layout="BSND", scale=SCALE,
    )  # fmt: skip
    for row in range(3):
        scores = (
            q[row, 0, 0].double() @ k[row, :, 0].double().T + rope_q[row, 0, 0].double() @ rope_k[row, :, 0].double().T
        )
        wanted = (scores * SCALE).softmax(-1) @ k[row, :, 0].double()
        assert float((out[row, 0, 0].cpu().double() - wanted).abs().max()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("mode", ["Norm", "PA_NZ"])
@pytest.mark.parametrize("slots", [torch.int32, torch.int64])
def test_scatter_writes_the_slots_and_nothing_else(mode, slots):
    tokens, blocks, size = 5, 3, 16
    k, v = drawn(tokens, 2, 32, dtype=torch.float16, seed=1), drawn(tokens, 2, 48, dtype=torch.float16, seed=2)
    where = torch.tensor([3, 47, 16, 0, 31])
    caches = []
    for x in (k, v):
        shape = (blocks, size, 2, x.shape[2]) if mode == "Norm" else (blocks, 2 * x.shape[2] // 16, size, 16)
        cache = torch.zeros(shape, dtype=torch.float16).npu()
        caches.append(torch_npu.npu_format_cast(cache, 29) if mode == "PA_NZ" else cache)
    torch_npu.npu_scatter_pa_kv_cache(k.npu(), v.npu(), *caches, where.to(slots).npu(), cache_mode=mode)
    for x, cache in zip((k, v), caches, strict=True):
        wanted = torch.zeros(blocks * size, 2, x.shape[2], dtype=torch.float16)
        for token, slot in enumerate(where.tolist()):
            wanted[slot] = x[token]
        got = cache.cpu() if mode == "Norm" else cache.cpu().permute(0, 2, 1, 3)
        assert torch.equal(got.reshape(wanted.shape), wanted)


@pytest.fixture(autouse=True)
def internal_formats():
    torch.npu.config.allow_internal_format = True
