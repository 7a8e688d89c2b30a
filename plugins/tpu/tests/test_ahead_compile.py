"""libtpu compiles the kernels and whole steps for real TPUs, with none present. Evidence: compiles; nothing ran.

The shapes are small, so that each compilation takes a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from anychip_tpu.ahead.libtpu import missing
from anychip_tpu.ahead.topology import parse, quiet_libtpu

if problem := missing():
    pytest.skip(problem, allow_module_level=True)
quiet_libtpu()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from anychip_tpu.ahead.compiler import CompileFailed, compile_text  # noqa: E402
from anychip_tpu.pallas.attention import ragged_paged_attention  # noqa: E402
from anychip_tpu.pallas.attention_spec import AttentionSpec  # noqa: E402
from anychip_tpu.pallas.embed import exported_module, per_device  # noqa: E402
from anychip_tpu.pallas.grouped_matmul import grouped_matmul  # noqa: E402
from anychip_tpu.pallas.int4_matmul import int4_matmul  # noqa: E402
from anychip_tpu.pallas.quantized_matmul import quantized_matmul  # noqa: E402

SLICES = ("v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "v7x:1x1x1")
NUM_PAGES = 65536  # more than the compiler would move into VMEM
bf16, i32, f32 = jnp.bfloat16, jnp.int32, jnp.float32


def shapes(*given: tuple[tuple[int, ...], object]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in given]


def attention(devices: int = 1, **changes: object):
    fields = {
        "num_tokens": 32, "num_rows": 8, "pages_per_row": 8, "num_heads": 4, "num_kv_heads": 1, "head_dim": 128,
        "page_size": 16, "dtype": "bfloat16", "scale": 0.1,
    } | changes  # fmt: skip
    spec = AttentionSpec(**fields)
    dtype, tokens, rows = jnp.dtype(spec.dtype), spec.num_tokens, spec.num_rows
    kv_heads = spec.num_kv_heads * devices
    page = (NUM_PAGES, kv_heads, *spec.page_shape[1:])
    new = ((tokens, kv_heads, spec.head_dim), dtype)
    args = shapes(
        ((tokens, spec.num_heads * devices, spec.head_dim), dtype), new, new, (page, dtype),
        ((rows, spec.pages_per_row), i32), ((rows + 1,), i32), ((rows,), i32), ((tokens,), i32),
        *([((spec.num_heads,), f32)] if spec.sinks else []),
    )  # fmt: skip
    return spec, args


@pytest.mark.parametrize("name", SLICES)
def test_attention_compiles_for_every_generation_and_writes_in_place(name: str) -> None:
    topology = parse(name)
    spec, args = attention()
    text, _ = exported_module(partial(ragged_paged_attention, spec=spec, chip=topology.generation), args)
    compiled = compile_text(text, topology, {3: 1})
    assert compiled.num_kernels == 1
    assert compiled.alias_bytes >= NUM_PAGES * 2 * 16 * 128 * 2  # the pages are not copied
    assert compiled.temporary_bytes < compiled.alias_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 64, "num_heads": 8, "window": 128, "sinks": True, "softcap": 30.0},
        {"page_size": 128, "num_heads": 7},
        {"dtype": "float32", "head_dim": 256, "decode_only": True, "num_tokens": 8},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_attention_compiles_with(changes: dict[str, object]) -> None:
    topology = parse("v5e:1x1")
    spec, args = attention(**changes)
    text, _ = exported_module(partial(ragged_paged_attention, spec=spec, chip=topology.generation), args)
    assert compile_text(text, topology, {3: 1}).num_kernels == 1


def test_attention_compiles_for_each_device_of_a_mesh() -> None:
    topology = parse("v5e:2x2")
    spec, args = attention(devices=4)
    heads, pages = (None, "tp", None), (None, "tp", None, None, None)
    kernel = partial(ragged_paged_attention, spec=spec, chip=topology.generation)
    sharded = per_device(kernel, {"tp": 4}, [heads, heads, heads, pages, (), (), (), ()], [heads, pages])
    compiled = compile_text(exported_module(sharded, args)[0], topology, {})
    assert compiled.num_kernels == 1
    assert compiled.collective_bytes == 0


PRODUCTS = {
    "experts": (grouped_matmul, shapes(((24, 256), bf16), ((8, 192, 256), bf16), ((8,), i32)), "v6e:1x1"),
    "int4": (int4_matmul, shapes(((16, 256), bf16), ((128, 256), jnp.int8), ((2, 256), f32)), "v5e:1x1"),
    "weights of 8 bits": (
        quantized_matmul, shapes(((16, 256), bf16), ((256, 256), jnp.float8_e4m3fn), ((256,), f32)), "v4:1x1x1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_compile(name: str) -> None:
    fn, args, slice_name = PRODUCTS[name]
    topology = parse(slice_name)
    text, _ = exported_module(partial(fn, chip=topology.generation), args)
    assert compile_text(text, topology, {}).num_kernels == 1


@pytest.mark.parametrize(("dtype", "slice_name"), [(jnp.int8, "v5e:1x1"), (jnp.float8_e4m3fn, "v7x:1x1x1")])
def test_products_of_eight_bits_by_eight_compile_where_they_are_native(dtype: object, slice_name: str) -> None:
    topology = parse(slice_name)

    def product(x: object, weights: object, scales: object, row_scales: object) -> object:
        return quantized_matmul(x, weights, scales, row_scales=row_scales, chip=topology.generation)

    args = shapes(((32, 256), dtype), ((256, 256), dtype), ((256,), f32), ((32,), f32))
    assert compile_text(exported_module(product, args)[0], topology, {}).num_kernels == 1


def test_a_program_that_needs_more_memory_than_a_chip_has_says_how_much() -> None:
    args = shapes(((20 * 2**30,), jnp.int8))
    text, _ = exported_module(lambda x: x + 1, args)
    with pytest.raises(CompileFailed, match=r"(?i)(ran out of memory|exceed).*\d+(\.\d+)?G"):
        compile_text(text, parse("v5e:1x1"), {})


TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2, "vocab_size": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.skipif(
    find_spec("torch_xla") is None or find_spec("anychip_tpu.program") is None, reason="torch_xla is not installed"
)
def test_a_models_steps_compile_without_its_weights(tmp_path: Path) -> None:
    """Two KV heads over four devices, each repeated. In a process of its own: torch_xla counts devices as it starts."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    words = [str(tmp_path), "--topology", "v5e:2x2", "--max-num-seqs", "8", "--buckets", "largest", "--json"]
    code = "import argparse, sys; from anychip_tpu.ahead.command import add_options, run; "
    code += "parser = argparse.ArgumentParser(); add_options(parser); sys.exit(run(parser.parse_args()))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["problems"] == []
    for bucket in report["buckets"]:
        assert bucket["compiles"] and bucket["fits"]
        assert bucket["pallas_kernels"] == 2
        assert bucket["alias_bytes"] >= 2 * report["kv_blocks"] * 16 * 128 * 2
