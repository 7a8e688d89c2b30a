"""Token draws by parts of the vocabulary, a program each: a part's best, then its weight. What truncation keeps is
`truncation`'s; then a program a row finds the part in which the draw falls, and reads that part alone. Parts are of one
size whatever the batch, so that a row's sums are the same in any company.

Ranking, truncation and the draw are docs/reference/randomness.md's. Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", 2011, has Philox.
"""

import triton
import triton.language as tl

from anychip_triton.kernels.chain import after_earlier
from anychip_triton.kernels.ranking import (
    bests_of_row,
    id_in,
    kept_weights,
    key_in,
    logit_of,
    logits_of_part,
    ranked,
    unnormalised,
)


@triton.jit
def best_of_parts(
    bests,  # [rows, parts] int64: ranking.ranked
    logits,  # [rows, vocab_size] float32
    vocab,
    stride,
    parts,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    if CHAINED:
        after_earlier()
    index, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids, x = logits_of_part(logits + index * stride, part, vocab, BLOCK)
    tl.store(bests + index * parts + part, tl.max(ranked(x, ids), 0))


@triton.jit
def weigh_parts(
    weights,  # [rows, parts] float64; what it was for rows of temperature 0
    logits,
    bests,
    temperature,  # [rows]
    vocab,
    stride,
    parts,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sums of weights before any truncation."""
    index, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + index)
    if heat > 0.0:
        highest = logit_of(key_in(tl.max(bests_of_row(bests, index, parts, PARTS), 0))).to(tl.float64)
        ids, x = logits_of_part(logits + index * stride, part, vocab, BLOCK)
        weight = tl.where(ids < vocab, unnormalised(x, highest, heat.to(tl.float64)), 0.0)
        tl.store(weights + index * parts + part, tl.sum(weight, 0))


@triton.jit
def _uniform(seed_low, seed_high, sample_index, position):
    """One float64 in [0, 1) from 53 bits, as anychip.ops.reference.philox draws it."""
    key0, key1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    c0, c1 = position.to(tl.uint32, bitcast=True), sample_index.to(tl.uint32, bitcast=True)
    c2, c3 = c0 * 0, c0 * 0
    for _ in tl.static_range(10):
        old0, old2 = c0, c2
        c0 = tl.umulhi(old2, c2 * 0 + 0xCD9E8D57) ^ c1 ^ key0
        c1 = old2 * 0xCD9E8D57
        c2 = tl.umulhi(old0, c2 * 0 + 0xD2511F53) ^ c3 ^ key1
        c3 = old0 * 0xD2511F53
        key0 = key0 + 0x9E3779B9
        key1 = key1 + 0xBB67AE85
    return ((c0 >> 5).to(tl.float64) * 67108864.0 + (c1 >> 6).to(tl.float64)) * 1.1102230246251565e-16


@triton.jit
def draw(
    out,  # [rows] int32
    logits,
    bests,
    weights,  # of what is kept
    threshold,  # [rows] int64 and int32: what is kept, as truncation.truncate has it
    last,
    temperature,  # [rows], float32 and int32 as plugin_api.Ops.sample has them
    min_p,
    seed_low,
    seed_high,
    sample_index,
    position,
    vocab,
    stride,
    parts,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    CHAINED: tl.constexpr,
):
    if CHAINED:
        after_earlier()
    index = tl.program_id(0).to(tl.int64)
    best = tl.max(bests_of_row(bests, index, parts, PARTS), 0)
    heat = 0.0
    if not ALL_GREEDY:
        heat = tl.load(temperature + index)
    if heat == 0.0:
        tl.store(out + index, id_in(best))
    else:
        part = tl.arange(0, PARTS)
        weight = tl.load(weights + index * parts + part, mask=part < parts, other=0.0)
        until = tl.cumsum(weight, 0)
        target = tl.sum(weight, 0) * _uniform(
            tl.load(seed_low + index), tl.load(seed_high + index), tl.load(sample_index + index),
            tl.load(position + index),
        )  # fmt: skip
        # A target that rounding put at the total falls on the last part and the last token that have weight.
        found = tl.min(tl.where((weight > 0.0) & (until > target), part, PARTS), 0)
        found = tl.minimum(found, tl.max(tl.where(weight > 0.0, part, 0), 0))
        before = tl.sum(tl.where(part == found - 1, until, 0.0), 0)
        highest = logit_of(key_in(best)).to(tl.float64)
        ids, x = logits_of_part(logits + index * stride, found, vocab, BLOCK)
        chance = kept_weights(
            x, ids, vocab, tl.load(threshold + index), tl.load(last + index), tl.load(min_p + index).to(tl.float64),
            highest, heat.to(tl.float64),
        )  # fmt: skip
        drawn = tl.min(tl.where((chance > 0.0) & (before + tl.cumsum(chance, 0) > target), ids, vocab), 0)
        tl.store(out + index, tl.minimum(drawn, tl.max(tl.where(chance > 0.0, ids, 0), 0)))


@triton.jit
def mask_tokens(out, logits, masks, vocab, stride, words, BLOCK: tl.constexpr):
    """Minus infinity where a packed bit is 0."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    word = tl.load(masks + row * words + at // 32, mask=inside, other=0)
    x = tl.load(logits + row * stride + at, mask=inside, other=0.0)
    allowed = (word >> (at % 32)) & 1
    tl.store(out + row * vocab + at, tl.where(allowed == 1, x, float("-inf")), mask=inside)


@triton.jit
def edit_logits(
    out,  # [rows, vocab_size]
    logits,  # [rows, vocab_size]
    slots,  # [rows] int32
    counts,  # [slots, vocab_size] int32: 1 for a token of the prompt, 2 for each time it was drawn
    repetition,  # [rows] float32, as the next two
    presence,
    frequency,
    vocab,
    stride,
    BLOCK: tl.constexpr,
):
    """Penalties: a counted token's logit is divided by the first where it is positive, multiplied where it is not."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    x = tl.load(logits + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(counts + tl.load(slots + row).to(tl.int64) * vocab + at, mask=inside, other=0)
    factor = tl.load(repetition + row)
    repeated = tl.where(x > 0.0, tl.div_rn(x, factor), x * factor)
    drawn = count >> 1
    taken = tl.load(frequency + row) * drawn.to(tl.float32) + tl.where(drawn > 0, tl.load(presence + row), 0.0)
    tl.store(out + row * vocab + at, tl.where(count > 0, repeated, x) - taken, mask=inside)


@triton.jit
def add_biases(
    out,  # [rows, vocab_size]
    slots,  # [rows] int32
    bias_ids,  # [slots, width] int32
    biases,  # [slots, width] float32
    num_biases,  # [rows] int32
    vocab,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(num_biases + row)
    bias = tl.load(slots + row).to(tl.int64) * width + at
    place = out + row * vocab + tl.load(bias_ids + bias, mask=inside, other=0)
    tl.store(
        place, tl.load(place, mask=inside, other=0.0) + tl.load(biases + bias, mask=inside, other=0.0), mask=inside
    )


@triton.jit(do_not_specialize=["rows"])
def count_tokens(counts, slots, ids, rows, vocab, BLOCK: tl.constexpr):
    """In place, two for each token; a pair that is there twice counts twice."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows
    place = tl.load(slots + at, mask=inside, other=0).to(tl.int64) * vocab + tl.load(ids + at, mask=inside, other=0)
    tl.atomic_add(counts + place, 2, mask=inside)
