"""Compiling ahead of time: what needs neither jax nor torch_xla."""

from __future__ import annotations

import argparse
from importlib import metadata

import pytest

from anychip.plugin_api import AttentionSpec, ShapeKey
from anychip_tpu.ahead import command
from anychip_tpu.ahead.compiler import Compiled, collective_bytes, reason_of
from anychip_tpu.ahead.estimate import Load, attention_load, estimate
from anychip_tpu.ahead.fit import ModelSize, problems, smallest
from anychip_tpu.ahead.libtpu import missing
from anychip_tpu.ahead.modules import with_donations, with_shardings
from anychip_tpu.ahead.report import Bucket, SliceReport, as_json
from anychip_tpu.ahead.topology import known, parse
from anychip_tpu.pallas.generations import GENERATIONS, GIB, generation

LLAMA_70B = ModelSize(weight_bytes=141 * 10**9, request_bytes=8192 * 327_680, num_heads=64, num_kv_heads=8)


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v5e:2x4", "v5e:2x4", 8),
        ("v5p:2x2", "v5p:2x2x1", 4),
        ("tpu7x:2x2x1", "v7x:2x2x1", 8),
        ("V6E:1x1", "v6e:1x1", 1),
    ],
)
def test_a_slice_is_known_by_its_name(text: str, name: str, devices: int) -> None:
    topology = parse(text)
    assert (str(topology), topology.num_devices) == (name, devices)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e:2x3", "'v5e:2x3' is no slice; there are v5e:1x1, v5e:2x2, v5e:2x4"),
        ("v5e", "is no slice; there are v5e:1x1"),
        ("v9:2x2", "no generation 'v9'; there are v4:1x1x1"),
    ],
)
def test_a_slice_that_does_not_exist_lists_those_that_do(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text)


def test_every_generation_has_slices_and_figures() -> None:
    for chip in GENERATIONS.values():
        sizes = [each.num_chips for each in known(chip)]
        assert sizes == sorted(sizes) and sizes[0] == 1
        assert chip.hbm_bytes > chip.vmem_bytes > chip.smem_bytes
        assert chip.peak("bfloat16") > chip.peak("float32")
    assert generation("v5e").peak("int8") == 2 * 197e12 - 1e12
    assert generation("v4").peak("fp8") == generation("v4").peak("bfloat16")


def test_a_model_that_is_too_large_names_the_smallest_slice_that_holds_it() -> None:
    (problem,) = problems(LLAMA_70B, parse("v5e:2x4"))
    assert "each of the 8 devices of v5e:2x4 needs 16.73 GiB" in problem
    assert "has 14.40 GiB for them, 2.33 GiB too little; the smallest slice that holds it is v5e:4x4" in problem
    assert problems(LLAMA_70B, parse("v5e:4x4")) == []
    assert str(smallest(LLAMA_70B, generation("v6e"))) == "v6e:2x4"


def test_a_model_that_no_slice_holds_says_what_to_change() -> None:
    huge = ModelSize(weight_bytes=10**15, request_bytes=1, num_heads=512, num_kv_heads=512)
    (problem,) = problems(huge, parse("v6e:2x4"))
    assert "no slice of v6e holds it: lower --max-model-len, or quantize" in problem


def test_heads_that_do_not_divide_name_slices_over_which_they_do() -> None:
    odd = ModelSize(weight_bytes=1, request_bytes=1, num_heads=28, num_kv_heads=4)
    (problem,) = problems(odd, parse("v5e:2x4"))
    assert "28 heads over 4 KV heads do not divide over the 8 devices of v5e:2x4; they do over those of" in problem
    assert problem.endswith("v5e:1x1, v5e:2x2")


def versions(**installed: str):
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    return version


WANTS = ["jaxlib<=0.10.2", 'libtpu==0.0.42.*; extra == "tpu"', 'nvidia-x>=1; extra == "cuda"']


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({}, "jax is not installed"),
        ({"jax": "0.10.2"}, "libtpu is not installed"),
        ({"jax": "0.10.2", "libtpu": "0.0.40"}, "libtpu 0.0.40 is older than jax 0.10.2 wants: ==0.0.42.*"),
        ({"jax": "0.10.2", "libtpu": "0.0.42.1"}, ""),
        ({"jax": "0.10.2", "libtpu": "0.0.52"}, ""),
    ],
)
def test_a_libtpu_that_is_missing_or_too_old_is_named(installed: dict[str, str], said: str) -> None:
    problem = missing(versions(**installed), lambda name: WANTS)
    assert problem.startswith(said) if said else problem == ""


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return command.run(parser.parse_args(words))


def test_the_command_refuses_before_it_loads_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", "--topology", "v5e:3x3") == 2
    assert "there are v5e:1x1" in capsys.readouterr().err
    assert run("model", "--topology", "v5e:2x4", "--tp", "4") == 2
    assert "--tp 4 on v5e:2x4, which has 8 devices" in capsys.readouterr().err


def key(tokens: int, rows: int) -> ShapeKey:
    return ShapeKey(num_tokens=tokens, num_reqs=rows, num_samples=rows, max_query_len=tokens, num_pages=4)


def test_the_largest_steps_are_one_of_decoding_and_one_of_all() -> None:
    keys = [key(8, 8), key(64, 64), key(16, 16), key(512, 64), key(256, 64)]
    assert command.largest(keys) == [key(64, 64), key(512, 64)]
    assert command.decode(keys) == [key(64, 64)]


TEXT = """module @IrToHlo.3 attributes {mhlo.cross_program_prefetches = [], mhlo.input_output_alias = [], mhlo.x = 1} {
  func.func @main(%arg0: tensor<8x4xbf16>, %arg1: tensor<i32>, %arg2: tensor<4xf32>) -> (tensor<8x4xbf16>) {
    %0 = stablehlo.custom_call @Sharding(%arg0) {backend_config = "", mhlo.sharding = "{devices=[2,1]0,1}"} : (x) -> y
    %1 = stablehlo.custom_call @Sharding(%arg0) {backend_config = "", mhlo.sharding = "{replicated}"} : (x) -> y
    %2 = stablehlo.custom_call @Sharding(%arg2) {backend_config = "", mhlo.sharding = "{replicated}"} : (x) -> y
"""


def test_shardings_and_donations_are_written_on_arguments() -> None:
    sharded = with_shardings(TEXT)
    assert '%arg0: tensor<8x4xbf16> {mhlo.sharding = "{devices=[2,1]0,1}"}, %arg1: tensor<i32>, %arg2' in sharded
    donated = with_donations(sharded, {0: 0, 1: 3})
    assert '%arg0: tensor<8x4xbf16> {tf.aliasing_output = 0 : i32, mhlo.sharding = "{devices' in donated
    assert "%arg1: tensor<i32> {tf.aliasing_output = 3 : i32}, %arg2: tensor<4xf32> {mhlo.sharding" in donated
    assert "attributes {mhlo.x = 1}" in donated


def test_bytes_of_collectives_are_counted_once() -> None:
    text = """
  %all-reduce.1 = bf16[64,4096]{1,0:T(8,128)} all-reduce(%x), replica_groups={}
  %g = (f32[8,16]{1,0}, f32[64,16]{1,0}) all-gather-start(%y), dimensions={0}
  %h = f32[64,16]{1,0} all-gather-done(%g)
  %use = bf16[64,4096]{1,0} add(%all-reduce.1, %all-reduce.1)
"""
    assert collective_bytes(text) == 64 * 4096 * 2 + 64 * 16 * 4


def test_a_compilers_reason_is_one_line_with_its_numbers() -> None:
    message = (
        "INTERNAL: x\nRESOURCE_EXHAUSTED: Ran out of memory on HBM, total (27.56G) exceeds available (15.75G).\n\nmore"
    )
    assert reason_of(message) == "Ran out of memory on HBM, total (27.56G) exceeds available (15.75G)."
    assert reason_of("INVALID_ARGUMENT: no such op\nat x") == "INVALID_ARGUMENT: no such op"


COMPILED = Compiled(
    seconds=1.0, argument_bytes=10 * GIB, output_bytes=9 * GIB, alias_bytes=8 * GIB, temporary_bytes=0, code_bytes=0,
    flops=197e9, collective_bytes=200_000_000, num_kernels=2,
)  # fmt: skip


def test_a_step_takes_as_long_as_its_slowest_part_and_its_transfers() -> None:
    load = Load(weight_bytes=819e6, kv_bytes=819e6, attention_flops=0)
    found = estimate(COMPILED, load, parse("v5e:2x4"), "bfloat16")
    assert (found.compute, found.memory, found.collectives) == pytest.approx((1e-3, 2e-3, 1e-3))
    assert found.seconds == pytest.approx(3e-3)
    assert found.bound == "HBM"
    assert estimate(COMPILED, load, parse("v5e:1x1"), "bfloat16").collectives == 0


def test_a_window_bounds_what_attention_reads() -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=1, head_dim=128, dtype="bfloat16", kv_dtype="bfloat16")
    windowed = AttentionSpec(
        num_heads=4, num_kv_heads=1, head_dim=128, dtype="bfloat16", kv_dtype="bfloat16", window=100
    )
    nbytes, flops = attention_load([spec, windowed], key(8, 8), 1000, 2)
    assert nbytes == 2 * 8 * (1000.5 + 100) * 128 * 2
    assert flops == 4 * 8 * (1000.5 + 100) * 4 * 128


def test_a_report_says_what_fits_and_what_is_evidence() -> None:
    topology = parse("v5e:2x4")
    found = estimate(COMPILED, Load(weight_bytes=1, kv_bytes=1, attention_flops=0), topology, "bfloat16")
    fits = Bucket(key=key(8, 8), compiled=COMPILED, estimate=found)
    failed = Bucket(key=key(64, 8), reason="Ran out of memory on HBM")
    report = SliceReport(topology=topology, libtpu="0.0.42", buckets=[fits, failed])
    assert fits.fits(topology) and not failed.fits(topology) and not report.good
    shown = as_json("llama", report)
    assert shown["evidence"] == "compiles"
    assert shown["buckets"][0]["hbm_bytes"] == 11 * GIB
    assert shown["buckets"][1] == {
        "tokens": 64, "rows": 8, "samples": 8, "pages": 4, "compiles": False, "reason": "Ran out of memory on HBM",
    }  # fmt: skip
