"""The oracle is itself judged: two implementations that share no line agree, and both give what was worked out by
hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip_conformance.oracle import loops, vectorised
from anychip_conformance.oracle.attention import attention_row
from anychip_conformance.oracle.rounding import UNIT_ROUNDOFF, gamma

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
_seeds = st.integers(0, 2**20)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- worked out by hand ---------------------------------------------------------------------------------------


def test_norm_of_three_and_four() -> None:
    """Mean of squares 12.5: 3 / sqrt(12.5) = 0.848528..."""
    expected = [3 / math.sqrt(12.5), 2 * 4 / math.sqrt(12.5)]
    assert loops.rms_norm([3.0, 4.0], [1.0, 2.0], 0.0, False) == pytest.approx(expected, rel=1e-15)
    found = vectorised.rms_norm(np.array([[3.0, 4.0]]), np.array([0.0, 1.0]), 0.0, True, "float32")
    assert found.value[0].tolist() == pytest.approx(expected, rel=1e-15)


def test_a_quarter_turn() -> None:
    """cos 0, sin 1: halves (1, 2 | 3, 4) become (-3, -4 | 1, 2), neighbours (1, 2), (3, 4) become (-2, 1), (-4, 3)."""
    zero, one = [0.0, 0.0], [1.0, 1.0]
    assert loops.rotary([1.0, 2.0, 3.0, 4.0], zero, one, False) == [-3.0, -4.0, 1.0, 2.0]
    assert loops.rotary([1.0, 2.0, 3.0, 4.0], zero, one, True) == [-2.0, 1.0, -4.0, 3.0]
    x, tables = np.array([[[1.0, 2.0, 3.0, 4.0]]]), (np.array([zero]), np.array([one]), np.array([0]))
    assert vectorised.rotary(x, *tables, False, "float32").value.ravel().tolist() == [-3.0, -4.0, 1.0, 2.0]
    assert vectorised.rotary(x, *tables, True, "float32").value.ravel().tolist() == [-2.0, 1.0, -4.0, 3.0]


def test_attention_over_two_keys() -> None:
    """Scores ln 3 and 0: weights 3/4 and 1/4 of a sum of 4. With a sink of logit 0: 3/5 and 1/5."""
    q, keys, values = [1.0], [[math.log(3.0)], [0.0]], [[8.0], [4.0]]
    assert loops.attention(q, keys, values, position=1, scale=1.0) == pytest.approx([7.0])
    assert loops.attention(q, keys, values, position=1, scale=1.0, sink=0.0) == pytest.approx([5.6])
    assert loops.attention_lse(q, keys, position=1, scale=1.0) == pytest.approx(math.log(4.0))
    assert loops.attention_lse(q, keys, position=1, scale=1.0, sink=0.0) == pytest.approx(math.log(5.0))
    assert loops.attention(q, keys, values, position=1, scale=1.0, window=1) == [4.0]
    assert loops.attention(q, keys, values, position=0, scale=1.0) == [8.0]
    # ALiBi of slope ln 3 takes from the farther key what its score was ahead: equal weights.
    assert loops.attention(q, keys, values, position=1, scale=1.0, slope=math.log(3.0)) == pytest.approx([6.0])

    def array(rows: list[list[float]]) -> np.ndarray:
        return np.array(rows)[:, None, :]

    for extra, expected, total in (({}, 7.0, 4.0), ({"sinks": np.zeros(1)}, 5.6, 5.0), ({"window": 1}, 4.0, 1.0)):
        found = attention_row(array([q]), array(keys), array(values), scale=1.0, dtype="float32", **extra)
        assert float(found.out.value.squeeze()) == pytest.approx(expected)
        assert float(found.lse.value.squeeze()) == pytest.approx(math.log(total))


def test_two_experts_of_four() -> None:
    """Logits ln 1, ln 2, ln 3, ln 4: probabilities 0.1 to 0.4; the best two renormalised are 4/7 and 3/7."""
    logits = [math.log(n) for n in (1, 2, 3, 4)]
    settings = {"top_k": 2, "scoring": "softmax", "num_groups": 1, "top_groups": 1, "scale": 1.0}
    found = loops.route(logits, None, renormalize=True, **settings)
    assert [expert for expert, _ in found] == [3, 2]
    assert [weight for _, weight in found] == pytest.approx([4 / 7, 3 / 7])
    plain = vectorised.route(np.array([logits]), None, renormalize=False, **settings)
    assert plain.ids.tolist() == [[3, 2]] and plain.weights[0].tolist() == pytest.approx([0.4, 0.3])


def test_activations_at_known_points() -> None:
    assert loops.gated_activation(0.0, 5.0, "silu") == 0.0
    assert loops.gated_activation(2.0, 3.0, "silu") == pytest.approx(3 * 2 / (1 + math.exp(-2)))
    assert loops.gated_activation(100.0, 100.0, "swiglu_clamped") == pytest.approx(8 * 7 / (1 + math.exp(-11.914)))
    assert loops.gated_activation(50.0, 2.0, "gelu_tanh") == 100.0


def test_draws_from_four_equal_tokens() -> None:
    """Cumulative quarters: 0.3 falls into the second, and top-p 0.5 keeps the first two."""
    flat = [0.0, 0.0, 0.0, 0.0]
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.3}
    assert loops.draw(flat, **given) == 1
    assert loops.draw(flat, **{**given, "top_p": 0.5, "uniform": 0.99}) == 1
    assert loops.draw(flat, **{**given, "top_k": 3, "uniform": 0.99}) == 2
    assert vectorised.acceptable_tokens(np.zeros(4), **{**given, "top_p": 0.5, "uniform": 0.99}, slack=0.0) == {1}


def test_philox_has_the_known_answers() -> None:
    """Random123's known answers of philox4x32-10 begin 6627e8d5 e169c58d for zeros: docs/reference/randomness.md."""
    assert vectorised.philox_uniform(0, 0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_growth_of_roundings() -> None:
    assert gamma(10, 0.01) == pytest.approx(0.1 / 0.9)
    assert UNIT_ROUNDOFF["bfloat16"] == 1 / 256


# -- held against each other ----------------------------------------------------------------------------------


@given(_seeds, st.booleans())
@settings(max_examples=25, deadline=None)
def test_norms_agree(seed: int, unit_offset: bool) -> None:
    rng = rng_of(seed)
    x, weight = rng.normal(size=(3, 7)), rng.normal(size=7)
    found = vectorised.rms_norm(x, weight, 1e-5, unit_offset, "float32").value
    np.testing.assert_allclose(found, [loops.rms_norm(row, weight, 1e-5, unit_offset) for row in x], **CLOSE)


@given(_seeds, st.booleans(), st.sampled_from([2, 4, 6]))
@settings(max_examples=25, deadline=None)
def test_rotations_agree(seed: int, interleaved: bool, rotary_dim: int) -> None:
    rng = rng_of(seed)
    x, angle = rng.normal(size=(4, 2, 6)), rng.normal(size=(9, rotary_dim // 2))
    positions = rng.integers(0, 9, 4)
    found = vectorised.rotary(x, np.cos(angle), np.sin(angle), positions, interleaved, "float32").value
    for token, head in np.ndindex(4, 2):
        tables = np.cos(angle[positions[token]]), np.sin(angle[positions[token]])
        np.testing.assert_allclose(found[token, head], loops.rotary(x[token, head], *tables, interleaved), **CLOSE)


@given(_seeds, st.sampled_from(["silu", "gelu_tanh", "swiglu_clamped"]))
@settings(max_examples=25, deadline=None)
def test_activations_agree(seed: int, activation: str) -> None:
    gate, up = 6 * rng_of(seed).normal(size=(2, 20))
    found = vectorised.gated_activation(gate, up, activation, "float32").value
    slow = [loops.gated_activation(a, b, activation) for a, b in zip(gate, up, strict=True)]
    np.testing.assert_allclose(found, slow, **CLOSE)


@given(
    _seeds,
    st.sampled_from([None, 1, 3, 50]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
    st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_attention_agrees(
    seed: int, window: int | None, softcap: float | None, alibi: bool, sinks: bool, queries: int, context: int
) -> None:
    rng, heads, kv_heads, dim = rng_of(seed), 4, 2, 3
    q, k, v = rng.normal(size=(queries, heads, dim)), *rng.normal(size=(2, context + queries, kv_heads, dim))
    slopes, sink = (rng.random(heads) if alibi else None), (rng.normal(size=heads) if sinks else None)
    found = attention_row(
        q, k, v, scale=0.7, dtype="float32", window=window, softcap=softcap, slopes=slopes, sinks=sink
    )
    for query, head in np.ndindex(queries, heads):
        given = {
            "position": context + query,
            "scale": 0.7,
            "window": window,
            "softcap": softcap,
            "slope": None if slopes is None else float(slopes[head]),
            "sink": None if sink is None else float(sink[head]),
        }
        slow = loops.attention(q[query, head], k[:, head // 2], v[:, head // 2], **given)
        np.testing.assert_allclose(found.out.value[query, head], slow, **CLOSE)
        summed = loops.attention_lse(q[query, head], k[:, head // 2], **given)
        np.testing.assert_allclose(found.lse.value[query, head], summed, **CLOSE)


@given(_seeds, st.sampled_from(["softmax", "sigmoid"]), st.booleans(), st.booleans(), st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_routes_agree(seed: int, scoring: str, renormalize: bool, corrected: bool, groups: int) -> None:
    rng = rng_of(seed)
    logits, bias = rng.normal(size=(5, 8)), (rng.normal(size=8) if corrected else None)
    settings = {"top_k": 2, "scoring": scoring, "renormalize": renormalize, "num_groups": groups,
                "top_groups": min(2, groups), "scale": 1.5}  # fmt: skip
    found = vectorised.route(logits, bias, **settings)
    for token in range(5):
        slow = loops.route(logits[token], bias, **settings)
        assert found.ids[token].tolist() == [expert for expert, _ in slow]
        np.testing.assert_allclose(found.weights[token], [weight for _, weight in slow], **CLOSE)


@given(_seeds, st.booleans())
@settings(max_examples=25, deadline=None)
def test_products_agree(seed: int, with_bias: bool) -> None:
    rng = rng_of(seed)
    x, weight, bias = rng.normal(size=(3, 5)), rng.normal(size=(4, 5)), (rng.normal(size=4) if with_bias else None)
    found = vectorised.linear(x, weight, bias, "float32").value
    np.testing.assert_allclose(found, [loops.linear(row, weight, bias) for row in x], **CLOSE)


@given(
    _seeds,
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0, 1, 3, 100]),
    st.sampled_from([1.0, 0.8, 0.2]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=150, deadline=None)
def test_draws_agree(seed: int, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> None:
    logits = rng_of(seed).normal(size=20)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "uniform": uniform}
    slow = loops.draw(logits.tolist(), **given)
    assert slow in vectorised.acceptable_tokens(logits, **given, slack=1e-12)
    assert len(vectorised.acceptable_tokens(logits, **given, slack=0.0)) == 1


@given(_seeds)
@settings(max_examples=20, deadline=None)
def test_the_bound_holds_for_float32(seed: int) -> None:
    """An honest evaluation in float32 stays within the bound, and a result off by a thousandth does not."""
    rng = rng_of(seed)
    q, k, v = (rng.normal(size=(n, 2, 16)).astype(np.float32) for n in (3, 20, 20))
    found = attention_row(*(x.astype(float) for x in (q, k, v)), scale=0.25, dtype="float32")
    scores = np.einsum("qhd,khd->hqk", q, k) * np.float32(0.25)
    scores[:, np.arange(20)[None] > np.arange(17, 20)[:, None]] = -np.inf
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    narrow = np.einsum("hqk,khd->qhd", weights / total, v)
    assert (np.abs(narrow - found.out.value) <= found.out.bound).all()
    assert (np.abs(narrow * 1.001 - found.out.value) > found.out.bound).any()
    lse = (most + np.log(total))[..., 0].T
    assert (np.abs(lse - found.lse.value) <= found.lse.bound).all()
    assert (np.abs(lse * 1.001 - found.lse.value) > found.lse.bound).any()
