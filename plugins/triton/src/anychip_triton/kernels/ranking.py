"""Logits as integers in the same order, and which tokens of a row a draw may take: those above a threshold, and those
that equal it up to an id."""

import triton
import triton.language as tl

LOWEST_KEY = tl.constexpr(-2139095041)
"""The key of minus infinity."""

_MOST_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def key_of(x):
    """An int64 for a float32, in the same order; both zeros alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0, bits, -(bits & 0x7FFFFFFF) - 1)


@triton.jit
def logit_of(key):
    """The float32 of a key."""
    bits = tl.where(key >= 0, key, -(key + 1) - 2147483648)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def ranked(x, ids):
    """Key and id in one int64: the largest is the largest logit, the lowest id among equals."""
    return (key_of(x) << 32) | (ids ^ _MOST_ID).to(tl.int64)


@triton.jit
def key_in(rank):
    return rank >> 32


@triton.jit
def id_in(rank):
    return ((rank & _MOST_ID) ^ _MOST_ID).to(tl.int32)


@triton.jit
def bests_of_row(bests, row, parts, PARTS: tl.constexpr):
    """What `best_of_parts` found in each part of a row, [PARTS]; nothing is below what stands past the last."""
    part = tl.arange(0, PARTS)
    return tl.load(bests + row * parts + part, mask=part < parts, other=LOWEST_KEY << 32)


@triton.jit
def logits_of_part(row, part, vocab, BLOCK: tl.constexpr):
    """Ids of a part, and their logits: minus infinity past the vocabulary."""
    ids = part * BLOCK + tl.arange(0, BLOCK)
    return ids, tl.load(row + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def unnormalised(x, highest, temperature):
    """A logit's weight, float64: 1 is the best's."""
    return tl.exp((x.to(tl.float64) - highest) / temperature)


@triton.jit
def kept_weights(x, ids, vocab, threshold, last, floor, highest, temperature):
    """Their weights; 0 for what truncation excludes."""
    key = key_of(x)
    weight = unnormalised(x, highest, temperature)
    kept = ((key > threshold) | ((key == threshold) & (ids <= last))) & (weight >= floor) & (ids < vocab)
    return tl.where(kept, weight, 0.0)
