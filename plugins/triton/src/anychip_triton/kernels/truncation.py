"""What top-k, top-p and min-p keep of a row, without sorting: thresholds by a search on the logits' keys.

A pass of the search tells WAYS parts of what is left apart: more of them are fewer passes, and more registers. A pass
reads only those parts of the vocabulary whose best is above the least key that it asks about, which soon are few.
"""

import triton
import triton.language as tl

from anychip_triton.kernels.ranking import (
    LOWEST_KEY,
    bests_of_row,
    kept_weights,
    key_in,
    key_of,
    logit_of,
    logits_of_part,
    unnormalised,
)


@triton.jit
def _above(
    row, bests, parts, vocab, thresholds, highest, temperature,
    WEIGHED: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """For each of WAYS thresholds, how many logits have keys above it, and, WEIGHED, their weight."""
    counts = tl.zeros([BLOCK, WAYS], tl.int32)
    weights = tl.zeros([BLOCK, WAYS], tl.float64)
    least = tl.min(thresholds, 0)
    for part in range(parts):
        if key_in(tl.load(bests + part)) > least:
            ids, x = logits_of_part(row, part, vocab, BLOCK)
            over = (key_of(x)[:, None] > thresholds[None, :]) & (ids < vocab)[:, None]
            counts += over.to(tl.int32)
            if WEIGHED:
                weights += tl.where(over, unnormalised(x, highest, temperature)[:, None], 0.0)
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
def _nth(values, at: tl.constexpr, WAYS: tl.constexpr):
    """values[at]."""
    return tl.sum(tl.where(tl.arange(0, WAYS) == at, values, 0), 0)


@triton.jit
def _around(row, bests, parts, vocab, threshold, highest, temperature, BLOCK: tl.constexpr, WAYS: tl.constexpr):
    """How many logits are above a threshold, how many equal it, the weight of the former, and that of each equal."""
    # What is above the key below the threshold, and not above the threshold, equals it.
    asked = threshold - tl.minimum(tl.arange(0, WAYS), 1)
    counts, weights = _above(row, bests, parts, vocab, asked, highest, temperature, True, BLOCK, WAYS)
    above, weight = _nth(counts, 0, WAYS), _nth(weights, 0, WAYS)
    equal = tl.maximum(_nth(counts, 1, WAYS) - above, 1)
    return above, equal, weight, (_nth(weights, 1, WAYS) - weight) / equal


@triton.jit
def truncate(
    threshold_out,  # [rows] int64: what is kept has keys above it,
    last_out,  # [rows] int32: or equals it, up to this id
    weights,  # [rows, parts] float64, as sampling.weigh_parts left them; then of what is kept
    logits,  # [rows, vocab_size] float32
    bests,  # [rows, parts] int64
    temperature,  # [rows], float32 and int32 as plugin_api.Ops.sample has them
    top_k,
    top_p,
    min_p,
    vocab,
    stride,
    parts,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row, bests_here, weights_here = logits + index * stride, bests + index * parts, weights + index * parts
    heat, k = tl.load(temperature + index), tl.load(top_k + index)
    p, m = tl.load(top_p + index), tl.load(min_p + index)
    threshold = tl.full((), LOWEST_KEY, tl.int64)
    last = vocab
    few = (k > 0) & (k < vocab)
    if (heat > 0.0) & (few | (p < 1.0) | (m > 0.0)):
        maxima = key_in(bests_of_row(bests, index, parts, PARTS))
        best = tl.max(maxima, 0)
        highest, warm = logit_of(best).to(tl.float64), heat.to(tl.float64)
        part = tl.arange(0, PARTS)
        total = tl.sum(tl.load(weights_here + part, mask=part < parts, other=0.0), 0)
        ties = vocab
        if few:
            low, high = threshold, best
            while low < high:  # the k-th largest of the parts' bests: the k-th logit is not below it
                counts = tl.sum((maxima[:, None] > _ends(low, high, WAYS)[None, :]).to(tl.int32), 0)
                low, high = _narrowed(low, high, counts < k, WAYS)
            high = best
            while low < high:  # the least key with fewer than k above it
                ends = _ends(low, high, WAYS)
                counts, _ = _above(row, bests_here, parts, vocab, ends, highest, warm, False, BLOCK, WAYS)
                low, high = _narrowed(low, high, counts < k, WAYS)
            threshold = low
            above, equal, weight, each = _around(row, bests_here, parts, vocab, threshold, highest, warm, BLOCK, WAYS)
            ties = k - above
            total = weight + each * tl.minimum(ties, equal)
        if p < 1.0:
            goal = p.to(tl.float64) * total
            # Tokens lighter than this together weigh less than what top-p excludes: it is not among them. Half of it,
            # and a key less, are for rounding.
            light = 0.5 * (1.0 - p.to(tl.float64)) * total / vocab
            least = key_of((highest + warm * tl.log(light)).to(tl.float32)) - 1
            low, high = tl.minimum(tl.maximum(threshold, least), best), best
            while low < high:  # the least key whose betters weigh less than the goal
                ends = _ends(low, high, WAYS)
                _, weighed = _above(row, bests_here, parts, vocab, ends, highest, warm, True, BLOCK, WAYS)
                low, high = _narrowed(low, high, weighed < goal, WAYS)
            above, equal, weight, each = _around(row, bests_here, parts, vocab, low, highest, warm, BLOCK, WAYS)
            enough = tl.where(each > 0.0, tl.ceil((goal - weight) / each), 1.0)
            allowed = tl.where(low == threshold, ties, vocab)
            threshold = low
            ties = tl.minimum(allowed, tl.maximum(enough, 1.0).to(tl.int32))
        floor = m.to(tl.float64)  # of the best's weight, which is 1
        last = -1
        seen = 0
        for number in range(parts):
            kept = tl.zeros([1], tl.float64)
            if key_in(tl.load(bests_here + number)) >= threshold:
                ids, x = logits_of_part(row, number, vocab, BLOCK)
                tied = (key_of(x) == threshold) & (ids < vocab)
                rank = seen + tl.cumsum(tied.to(tl.int32), 0)
                last = tl.maximum(last, tl.max(tl.where(tied & (rank <= ties), ids, -1), 0))
                seen += tl.sum(tied.to(tl.int32), 0)
                kept += tl.sum(kept_weights(x, ids, vocab, threshold, last, floor, highest, warm), 0)
            tl.store(weights_here + number, tl.sum(kept, 0))
    tl.store(threshold_out + index, threshold)
    tl.store(last_out + index, last)
