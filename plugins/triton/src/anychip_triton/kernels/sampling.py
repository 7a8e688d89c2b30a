"""Token draws without sorting: thresholds by a search on the logits' bits, then one pass in order of ids. A pass of the
search tells WAYS parts of what is left apart: more of them are fewer passes, and more registers.

Ranking, truncation and the draw are docs/reference/randomness.md's. A program takes a row. Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011, has Philox.
"""

import triton
import triton.language as tl

_LOWEST_KEY = tl.constexpr(-2139095041)
"""The key of minus infinity."""

_HIGHEST_KEY = tl.constexpr(2139095040)
"""The key of infinity."""


@triton.jit
def _key(x):
    """An int64 for a float32, in the same order; both zeros alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0, bits, -(bits & 0x7FFFFFFF) - 1)


@triton.jit
def _unnormalised(x, highest, temperature):
    return tl.exp((x.to(tl.float64) - highest) / temperature)


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
def _above(
    row, vocab, thresholds, highest, temperature, WEIGHED: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr
):
    """For each of WAYS thresholds, how many logits have keys above it, and, WEIGHED, their weight."""
    counts = tl.zeros([BLOCK, WAYS], tl.int32)
    weights = tl.zeros([BLOCK, WAYS], tl.float64)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
        over = (_key(x)[:, None] > thresholds[None, :]) & (at < vocab)[:, None]
        counts += over.to(tl.int32)
        if WEIGHED:
            weights += tl.where(over, _unnormalised(x, highest, temperature)[:, None], 0.0)
    return tl.sum(counts, 0), tl.sum(weights, 0)


@triton.jit
def _narrowed(low, high, enough, WAYS: tl.constexpr):
    """The part of low..high in which a search goes on: parts end at `_ends`, and `enough` [WAYS] is where that end is
    not below what is sought."""
    part = tl.sum(1 - enough.to(tl.int32), 0)
    step = (high - low) // WAYS + 1
    return low + part * step, tl.minimum(low + (part + 1) * step - 1, high)


@triton.jit
def _ends(low, high, WAYS: tl.constexpr):
    """Where WAYS parts of low..high end."""
    step = (high - low) // WAYS + 1
    return tl.minimum(low + (tl.arange(0, WAYS) + 1) * step - 1, high)


@triton.jit
def _around(threshold, WAYS: tl.constexpr):
    """The threshold, and the key below it: what is above the one and not above the other equals it."""
    return threshold - tl.minimum(tl.arange(0, WAYS), 1)


@triton.jit
def _nth(values, at: tl.constexpr, WAYS: tl.constexpr):
    """values[at]."""
    return tl.sum(tl.where(tl.arange(0, WAYS) == at, values, 0), 0)


@triton.jit
def _kept_weights(row, start, vocab, seen, threshold, ties, floor, highest, temperature, BLOCK: tl.constexpr):
    """A block's ids, their weights, 0 for what truncation excludes, and how many ties there are up to its end."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
    key = _key(x)
    tied = (key == threshold) & (at < vocab)
    rank = seen + tl.cumsum(tied.to(tl.int32), 0)
    weight = _unnormalised(x, highest, temperature)
    kept = ((key > threshold) | (tied & (rank <= ties))) & (weight >= floor) & (at < vocab)
    return at, tl.where(kept, weight, 0.0), seen + tl.sum(tied.to(tl.int32), 0)


@triton.jit
def sample(
    out,  # [rows] int32
    logits,  # [rows, vocab_size] float32
    temperature,  # [rows], float32 and int32 as plugin_api.Ops.sample has them
    top_k,
    top_p,
    min_p,
    seed_low,
    seed_high,
    sample_index,
    position,
    vocab,
    stride,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    best, best_at = float("-inf"), 0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
        here, where = tl.max(x, return_indices=True, return_indices_tie_break_left=True, axis=0)
        if here > best:
            best = here
            best_at = start + where
    heat = 0.0
    if not ALL_GREEDY:
        heat = tl.load(temperature + index)
    if heat == 0.0:
        tl.store(out + index, best_at)
    else:
        warm, highest = heat.to(tl.float64), best.to(tl.float64)
        k, p, m = tl.load(top_k + index), tl.load(top_p + index), tl.load(min_p + index)
        # What is kept: keys above `threshold`, and the first `ties` of those that equal it.
        threshold = tl.full((), _LOWEST_KEY, tl.int64)
        ties = vocab
        if (k > 0) & (k < vocab):
            low, high = tl.full((), _LOWEST_KEY, tl.int64), tl.full((), _HIGHEST_KEY, tl.int64)
            while low < high:  # the least key with fewer than k above it
                counts, weights = _above(row, vocab, _ends(low, high, WAYS), highest, warm, False, BLOCK, WAYS)
                low, high = _narrowed(low, high, counts < k, WAYS)
            threshold = low
            counts, weights = _above(row, vocab, _around(threshold, WAYS), highest, warm, False, BLOCK, WAYS)
            ties = k - _nth(counts, 0, WAYS)
        if p < 1.0:
            counts, weights = _above(row, vocab, _around(threshold, WAYS), highest, warm, True, BLOCK, WAYS)
            equal = tl.maximum(_nth(counts, 1, WAYS) - _nth(counts, 0, WAYS), 1)
            above = _nth(weights, 0, WAYS)
            share = (_nth(weights, 1, WAYS) - above) / equal
            goal = p.to(tl.float64) * (above + share * tl.minimum(ties, equal))
            low, high = threshold, tl.full((), _HIGHEST_KEY, tl.int64)
            while low < high:  # the least key whose betters weigh less than the goal
                counts, weights = _above(row, vocab, _ends(low, high, WAYS), highest, warm, True, BLOCK, WAYS)
                low, high = _narrowed(low, high, weights < goal, WAYS)
            counts, weights = _above(row, vocab, _around(low, WAYS), highest, warm, True, BLOCK, WAYS)
            better = _nth(weights, 0, WAYS)
            equal = tl.maximum(_nth(counts, 1, WAYS) - _nth(counts, 0, WAYS), 1)
            each = (_nth(weights, 1, WAYS) - better) / equal
            enough = tl.where(each > 0.0, tl.ceil((goal - better) / each), 1.0)
            allowed = tl.where(low == threshold, ties, vocab)
            threshold = low
            ties = tl.minimum(allowed, tl.maximum(enough, 1.0).to(tl.int32))
        floor = m.to(tl.float64)  # of the best's weight, which is 1
        draw = _uniform(
            tl.load(seed_low + index), tl.load(seed_high + index), tl.load(sample_index + index),
            tl.load(position + index),
        )  # fmt: skip
        total = tl.zeros([1], tl.float64)
        seen = 0
        for start in range(0, vocab, BLOCK):
            at, weight, seen = _kept_weights(row, start, vocab, seen, threshold, ties, floor, highest, warm, BLOCK)
            total += tl.sum(weight, 0)
        target = draw * tl.sum(total, 0)
        passed = tl.zeros([1], tl.float64)
        seen = 0
        found = vocab
        last = 0
        for start in range(0, vocab, BLOCK):
            at, weight, seen = _kept_weights(row, start, vocab, seen, threshold, ties, floor, highest, warm, BLOCK)
            has_weight = weight > 0.0
            until = tl.sum(passed, 0) + tl.cumsum(weight, 0)
            found = tl.minimum(found, tl.min(tl.where(has_weight & (until > target), at, vocab), 0))
            last = tl.maximum(last, tl.max(tl.where(has_weight, at, 0), 0))
            passed += tl.sum(weight, 0)
        tl.store(out + index, tl.where(found < vocab, found, last))


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
