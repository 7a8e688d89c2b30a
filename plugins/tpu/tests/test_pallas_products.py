"""Products of experts and of quantized weights in the interpreter of Pallas against plain numpy: a simulation."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="the Pallas kernels need jax: pip install 'anychip-tpu[ahead]'")

from anychip.plugin_api import Unsupported  # noqa: E402
from anychip_tpu.pallas.experts import experts as experts_of_layer  # noqa: E402
from anychip_tpu.pallas.experts import gated  # noqa: E402
from anychip_tpu.pallas.generations import generation  # noqa: E402
from anychip_tpu.pallas.grouped_matmul import grouped_matmul  # noqa: E402
from anychip_tpu.pallas.int4_matmul import int4_matmul, pack_int4  # noqa: E402
from anychip_tpu.pallas.interpreter import INTERPRETED, compiled, race_found  # noqa: E402
from anychip_tpu.pallas.quantized_matmul import quantize_rows, quantized_matmul  # noqa: E402

V5E = generation("v5e")
jnp = jax.numpy


def drawn(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(jnp.dtype(dtype))


def run(fn, *args) -> np.ndarray:
    out = compiled(partial(fn, interpret=INTERPRETED), *args)(*args)
    assert not race_found(out)
    return np.asarray(out)


def experts(x: np.ndarray, weights: np.ndarray, sizes: np.ndarray, first: int) -> np.ndarray:
    out, row = np.zeros((len(x), weights.shape[1])), 0
    for expert, size in enumerate(sizes):
        if first <= expert < first + len(weights):
            out[row : row + size] = x[row : row + size].astype(float) @ weights[expert - first].astype(float).T
        row += size
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_meet_their_experts_matrix(dtype: str) -> None:
    """200 rows in tiles of 128. Any sizes, one compiled kernel: experts without rows, tiles of several experts, rows
    that no expert has."""
    x, weights = drawn(200, 256, dtype=dtype), drawn(5, 136, 256, dtype=dtype, seed=1)
    fn = partial(grouped_matmul, chip=V5E, interpret=INTERPRETED)
    kernel = compiled(fn, x, weights, np.zeros(5, np.int32))
    bound = 16 * {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
    for sizes in ([3, 0, 130, 7, 60], [0, 0, 0, 0, 200], [128, 72, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]):
        groups = np.array(sizes, np.int32)
        out = np.asarray(kernel(x, weights, groups), float)
        np.testing.assert_allclose(out, experts(x, weights, groups, 0), atol=16 * bound, rtol=bound)
        assert not race_found()


def test_experts_of_other_devices_give_zeros() -> None:
    x, weights, sizes = drawn(40, 128), drawn(2, 128, 128, seed=1), np.array([9, 4, 11, 0, 6], np.int32)
    for first in (0, 1, 3):
        out = run(partial(grouped_matmul, chip=V5E, first_group=first), x, weights, sizes)
        np.testing.assert_allclose(out, experts(x, weights, sizes, first), atol=1e-4)


def test_experts_of_eight_bits_are_scaled_back() -> None:
    x, sizes = drawn(24, 128, dtype="bfloat16"), np.array([10, 14], np.int32)
    weights = np.random.default_rng(1).integers(-127, 128, (2, 128, 128)).astype(np.int8)
    scales = np.abs(drawn(2, 128, seed=2)) / 127
    out = run(lambda *a, interpret: grouped_matmul(*a[:3], scales=a[3], chip=V5E, interpret=interpret),
              x, weights, sizes, scales)  # fmt: skip
    expected = experts(x, weights * scales[..., None].astype(float), sizes, 0)
    np.testing.assert_allclose(out.astype(float), expected, atol=0.2, rtol=2**-7)


@pytest.mark.parametrize(("dtype", "chip"), [("int8", "v5e"), ("int8", "v6e"), ("float8_e4m3fn", "v7x")])
def test_products_of_eight_bits_are_exact_before_they_are_scaled(dtype: str, chip: str) -> None:
    x, w = drawn(20, 384), drawn(136, 384, seed=1)
    (rows, row_scales), (weights, weight_scales) = quantize_rows(x, dtype), quantize_rows(w, dtype)
    out = run(lambda *a, interpret: quantized_matmul(
        *a[:3], row_scales=a[3], chip=generation(chip), out_dtype=jnp.float32, interpret=interpret),
        rows, weights, weight_scales, row_scales)  # fmt: skip
    exact = np.asarray(rows, float) @ np.asarray(weights, float).T
    scaled = exact * np.asarray(row_scales, float)[:, None] * np.asarray(weight_scales, float)
    np.testing.assert_allclose(out, scaled, rtol=1e-5, atol=1e-5)
    # What quantizing both sides loses of a sum of 384 products of normal numbers.
    assert np.abs(out - x @ w.T).max() < {"int8": 1.0, "float8_e4m3fn": 4.0}[dtype]


def test_weights_of_eight_bits_alone_run_on_every_generation() -> None:
    x, w = drawn(20, 256, dtype="bfloat16"), drawn(64, 256, seed=1)
    weights, scales = quantize_rows(w, "int8")
    out = run(partial(quantized_matmul, chip=generation("v4")), x, weights, scales)
    expected = x.astype(float) @ (np.asarray(weights, float) * np.asarray(scales, float)[:, None]).T
    np.testing.assert_allclose(out.astype(float), expected, atol=0.1, rtol=2**-7)


def test_a_row_of_zeros_stays_zero() -> None:
    values, scales = quantize_rows(np.zeros((2, 128), np.float32), "int8")
    assert not np.asarray(values).any()
    assert np.asarray(scales).tolist() == [1, 1]


@pytest.mark.parametrize(("dtype", "chip", "able"), [("int8", "v4", "v5e, v5p, v6e"), ("float8_e4m3fn", "v6e", "v7x")])
def test_a_dtype_that_the_chip_does_not_multiply_is_refused(dtype: str, chip: str, able: str) -> None:
    x, scales = jnp.zeros((8, 128), dtype), jnp.ones(8)
    with pytest.raises(Unsupported, match=rf"{chip} multiplies no .*, {able} do; quantize weights alone"):
        quantized_matmul(x, x, scales, row_scales=scales, chip=generation(chip))


@pytest.mark.parametrize(("group", "shifted"), [(32, False), (128, True)])
def test_weights_of_four_bits_are_unpacked_by_group(group: int, shifted: bool) -> None:
    random = np.random.default_rng(3)
    values = random.integers(-8, 8, (256, 136))
    scales = np.abs(drawn(256 // group, 136))
    zeros = random.integers(-8, 8, scales.shape).astype(np.float32) if shifted else None
    x = drawn(12, 256)
    args = (x, pack_int4(values, group), scales, *([zeros] if shifted else []))
    out = run(partial(int4_matmul, chip=V5E), *args)
    wide = (values - (np.repeat(zeros, group, 0) if shifted else 0)) * np.repeat(scales, group, 0)
    np.testing.assert_allclose(out, x.astype(float) @ wide, rtol=1e-5, atol=2e-3)


def test_groups_that_are_no_whole_tiles_are_refused() -> None:
    with pytest.raises(Unsupported, match="groups of 24 of 48 rows are not whole tiles; groups of 32, 64 and 128 are"):
        int4_matmul(jnp.zeros((8, 48)), jnp.zeros((24, 128), jnp.int8), jnp.ones((2, 128)), chip=V5E)


def test_a_product_over_its_vmem_is_refused_with_numbers() -> None:
    # 65,537 is no multiple of 128, so the whole inner dimension is one block.
    x, weights = jax.ShapeDtypeStruct((512, 65_537), jnp.bfloat16), jax.ShapeDtypeStruct((2, 512, 65_537), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises(Unsupported, match=r"needs \d+\.\d MiB of VMEM, a core of v5p has 64 MiB"):
        jax.eval_shape(partial(grouped_matmul, chip=generation("v5p")), x, weights, sizes)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swiglu_clamped"])
def test_experts_of_a_layer_are_weighted_and_summed(activation: str) -> None:
    random = np.random.default_rng(5)
    x, weights = drawn(12, 128), random.random((12, 2), dtype=np.float32)
    ids = np.stack([random.permutation(4)[:2] for _ in range(12)]).astype(np.int32)
    gate_up, down = drawn(4, 128, 128, seed=1) / 11, drawn(4, 128, 64, seed=2) / 8
    biases = (drawn(4, 128, seed=3), drawn(4, 128, seed=4))
    fn = partial(experts_of_layer, num_experts=4, activation=activation, chip=V5E)
    out = run(fn, x, ids, weights, gate_up, down, *biases)
    expected = np.zeros((12, 128))
    for token in range(12):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            hidden = np.asarray(gated(gate_up[expert] @ x[token] + biases[0][expert], activation))
            expected[token] += weight * (down[expert] @ hidden + biases[1][expert])
    np.testing.assert_allclose(out, expected, atol=1e-4, rtol=1e-4)
