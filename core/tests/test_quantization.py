"""Quantized checkpoints stand for the matrices they were made from, and the reference products are as exact as
float32 allows. Containers: anychip_conformance.equality.quantized_models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_kit import held_matrix, products, spoil
from safetensors.torch import load_file, save_file

from anychip import LLM, SamplingParams
from anychip.errors import CheckpointError, ConfigError, Unsupported
from anychip.ops.reference import REFERENCE, quantized
from anychip.ops.reference.quantized import QuantizedMatrix, quantize_rows
from anychip.plugin_api import FP8_MAX, LinearPart, LinearSpec, Platform, PlatformContext, ProbeResult, QuantScheme
from anychip.quantization.format import put_rows
from anychip.quantization.packing import from_awq_order, pack, to_awq_order, unpack
from anychip.registry.plugins import load_plugins
from anychip.weights.matrix import Matrix, Span
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.quantized_models import CONTAINERS, make_quantized_checkpoint
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import NUM_TOKENS, Case, generate, open_llm, prompts

WEIGHTS = "model.safetensors"


def reference_platform() -> Platform:
    """A platform that overrides nothing."""
    manifest = load_plugins().platforms["cpu"]
    context = PlatformContext(
        manifest=manifest, device_indexes=(0,), options=manifest.options(), probe=ProbeResult(), reference=REFERENCE
    )
    return Platform(context)


WEIGHT_ONLY = [name for name, (_, activations, _) in CONTAINERS.items() if activations is None]
SPLIT = ("gptq", "awq")
"""Containers that every run splits over two ranks: one packs numbers along a matrix's inputs, one along its outputs."""


# -- containers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_container_loads_the_matrices_it_stands_for(container, tmp_path):
    _, matrices = make_quantized_checkpoint(container, tmp_path)
    # Plain PyTorch's kernels hold what they were given in a form that can be read back.
    settings = {"device_options": {"isa": "reference"}}
    with open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path, **settings) as llm:
        found = products(llm)
        assert found.keys() == matrices.keys()
        for name, layer in found.items():
            torch.testing.assert_close(held_matrix(layer), matrices[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("container", "device"),
    [
        *((container, "cpu") for container in WEIGHT_ONLY),
        *(pytest.param(name, "cpu-tp2", marks=[] if name in SPLIT else [pytest.mark.full]) for name in WEIGHT_ONLY),
        ("gptq", "fake-static"),
    ],
)
def test_greedy_tokens_equal_those_of_the_dequantized_model(container, device, tmp_path):
    model, _ = make_quantized_checkpoint(container, tmp_path)
    check_greedy(model, Case("llama", 64, True, False, True, device), tmp_path)


@pytest.mark.parametrize("container", ["gptq-zeros", "awq", "ct-int4", "ct-int8-weights"])
def test_experts_are_read_from_containers_too(container, tmp_path):
    model, _ = make_quantized_checkpoint(container, tmp_path, "qwen3-moe")
    check_greedy(model, Case("qwen3-moe", 64, True, False, True, "cpu"), tmp_path)


@pytest.mark.parametrize(
    ("scheme", "family"), [("int8", "llama"), ("int4", "llama"), ("int8", "qwen3"), ("int4", "qwen3-moe")]
)
def test_a_plain_checkpoint_is_quantized_at_load(scheme, family, tmp_path):
    model = make_checkpoint(family, tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(as_loaded(parameter, scheme, 128 if parameter.shape[1] % 128 == 0 else 64))
            elif "experts" in name:  # one scheme for all three matrices, whose groups divide 64 and 32 features
                for expert in parameter:
                    expert.copy_(as_loaded(expert, scheme, 32))
        # The head is int8 under int4 too; tied, it is a copy, and the embedding stays plain.
        model.lm_head.weight = torch.nn.Parameter(as_loaded(model.lm_head.weight, "int8", 0))
    check_greedy(model, Case(family, 64, True, False, True, "cpu"), tmp_path, quantization=scheme)


def as_loaded(weight: torch.Tensor, scheme: str, group_size: int) -> torch.Tensor:
    if scheme == "int8":
        values, scale = quantize_rows(weight, QuantScheme(values="int8", scales="channel"))
        return values.float() * scale.unsqueeze(-1)
    values, scale = quantize_rows(weight, QuantScheme(values="int4", scales="group", group_size=group_size))
    return (values.float() - 8) * scale.repeat_interleave(group_size, dim=1)


def check_greedy(model, case: Case, folder: Path, **settings) -> None:
    with open_llm(case, folder, **settings) as llm:
        answers = list(generate(llm))
    for prompt, tokens in zip(prompts(), answers, strict=True):
        verdict = judge(greedy(model, prompt, NUM_TOKENS), tokens)
        assert verdict.divergence is None or verdict.excused, verdict


# -- arithmetic ---------------------------------------------------------------------------------------------

SCHEMES = [
    QuantScheme(values="int8", scales="channel"),
    QuantScheme(values="int8", scales="tensor"),
    QuantScheme(values="int4", scales="group", group_size=16),
    QuantScheme(values="int4", scales="group", group_size=16, zero_points="int"),
    QuantScheme(values="fp8_e4m3", scales="tensor", activations="token"),
    QuantScheme(values="fp8_e4m3", scales="channel", activations="static"),
    QuantScheme(values="fp8_e4m3", scales="block", group_size=16, activations="group"),
    QuantScheme(values="int8", scales="channel", activations="token"),
]
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def random_parts(scheme: QuantScheme, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Canonical parts of one matrix."""
    size = scheme.group_size
    shapes = {"tensor": (1,), "channel": (rows,)}
    groups = -(-columns // size) if size else 1
    shape = shapes.get(scheme.scales, (-(-rows // size) if scheme.scales == "block" else rows, groups))
    parts = {"scale": torch.rand(shape) * 0.1 + 1e-3}
    if scheme.values == "int4":
        parts[""] = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    elif scheme.values == "fp8_e4m3":
        parts[""] = quantized.to_fp8(torch.randn(rows, columns) * 50)
    else:
        parts[""] = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    if scheme.zero_points:
        parts["zero"] = torch.randint(0, 16, shape, dtype=torch.uint8)
    if scheme.activations == "static":
        parts["input_scale"] = torch.rand(1) * 0.02 + 1e-3
    return parts


def wide_matrix(scheme: QuantScheme, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the parts stand for, element by element, in float64."""
    values = parts[""].double()
    rows, columns = values.shape
    matrix = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            group = column // scheme.group_size if scheme.group_size else 0
            place = {
                "tensor": (0,),
                "channel": (row,),
                "group": (row, group),
                "block": (row // (scheme.group_size or 1), group),
            }[scheme.scales]
            zero = 8.0 if scheme.values == "int4" else 0.0
            if scheme.zero_points:
                zero = float(parts["zero"][place])
            matrix[row, column] = (values[row, column] - zero) * float(parts["scale"][place])
    return matrix


def activation_error(scheme: QuantScheme, x: torch.Tensor, input_scale: float) -> torch.Tensor:
    """How far rounding may move each activation: half a step of the dtype at that value."""
    wide = x.double()
    if scheme.activations == "plain":
        return torch.zeros_like(wide)
    size = scheme.group_size if scheme.activations == "group" else x.shape[1]
    error = torch.empty_like(wide)
    for start in range(0, x.shape[1], size):
        group = wide[:, start : start + size]
        most = group.abs().amax(dim=1, keepdim=True)
        if scheme.activation_format == "int8":
            step = (most / 127 / 2).expand_as(group)
        else:
            scale = torch.full_like(most, input_scale) if scheme.activations == "static" else most / FP8_MAX
            # Three bits of mantissa, and below the smallest normal a fixed step.
            step = torch.maximum(group.abs() * 2.0**-4, scale * 2.0**-10)
            step = torch.maximum(step, group.abs() - FP8_MAX * scale)
        error[:, start : start + size] = step
    return error


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    tokens=st.integers(1, 5),
    rows=st.sampled_from([1, 16, 33, 70]),
    columns=st.sampled_from([16, 32, 80]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_a_product_is_within_the_bound_of_float64(scheme, tokens, rows, columns, dtype, seed):
    torch.manual_seed(seed)
    parts = random_parts(scheme, rows, columns)
    spec = LinearSpec(
        in_features=columns,
        out_features=rows,
        parts=(LinearPart(name="all", offset=0, rows=rows),),
        dtype=str(dtype).removeprefix("torch."),
        scheme=scheme,
    )
    kernel = reference_platform().linear(spec)
    packed = kernel.begin()
    for kind, tensor in parts.items():
        if kind == "":
            kernel.load(packed, "all", tensor[:64])
            if rows > 64:
                kernel.load(packed, "all", tensor[64:], row=64)
        else:
            kernel.load(packed, f"all.{kind}", tensor)
    packed = kernel.finish(packed)
    x = torch.randn(tokens, columns).to(dtype)
    matrix = wide_matrix(scheme, parts)
    exact = x.double() @ matrix.T
    magnitude = x.double().abs() @ matrix.abs().T
    moved = activation_error(scheme, x, float(parts.get("input_scale", torch.zeros(1)))) @ matrix.abs().T
    # One rounding for each product and sum, a few for scaling, and the result's own.
    bound = (columns + 8) * ROUNDOFF[torch.float32] * (magnitude + moved) + moved * (1 + 1e-6)
    bound = bound + ROUNDOFF[dtype] * (exact.abs() + bound)
    error = (kernel.apply(x, packed).double() - exact).abs()
    assert (error <= bound).all(), f"worst error is {(error / bound).max():.2f} of the bound"


@given(rows=st.sampled_from([8, 24]), columns=st.sampled_from([8, 40]), bits=st.sampled_from([4, 8]), dim=st.booleans())
def test_packing_is_undone_by_unpacking(rows, columns, bits, dim):
    values = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    assert unpack(pack(values, int(dim), bits), int(dim), bits).equal(values)
    assert from_awq_order(to_awq_order(values)).equal(values)


def test_a_known_gptq_word():
    # Rows of ones to eights packed along the input features: the first value in the lowest bits.
    assert pack(torch.arange(1, 9).view(8, 1), 0).item() == 0x87654321 - 2**32
    # AWQ's word holds columns 0 2 4 6 1 3 5 7, lowest first.
    assert pack(to_awq_order(torch.arange(8).view(1, 8)), 1).item() == 0x75316420


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantizing_at_load_is_within_half_a_step(name):
    scheme = QuantScheme(
        values=name, scales="group" if name == "int4" else "channel", group_size=32 if name == "int4" else None
    )
    weight = torch.randn(10, 64)
    weight[3] = 0
    values, scale = quantize_rows(weight, scheme)
    matrix = QuantizedMatrix.allocate((10, 64), scheme, reference_platform())
    matrix.load("", values, 0, 10, 0)
    matrix.load("scale", scale, 0, 10, 0)
    step = scale.abs().view(10, -1).repeat_interleave(64 // scale.view(10, -1).shape[1], dim=1)
    # int4 has no +8: a value near it, opposite the group's greatest, may be a whole step away.
    slack = 0.5 if name == "int8" else 1.0
    assert ((matrix.dequantize() - weight).abs() <= slack * step + 1e-6).all()


# -- the KV cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv", "share"), [("fp8", 4), ("auto", 1)])
def test_a_narrow_cache_holds_more_tokens(kv, share, tmp_path):
    make_checkpoint("llama", tmp_path)
    settings = {"skip_tokenizer": True, "device": "cpu", "kv_cache_bytes": 1 << 20, "max_num_seqs": 4096}
    with LLM(str(tmp_path), kv_cache_dtype=kv, **settings) as llm:
        # Two values x four layers x two heads of 16, four bytes each.
        assert llm.worker.kv.num_blocks == (1 << 20) * share // (16 * 2 * 4 * 2 * 16 * 4)
        assert len(llm.generate([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_an_int8_cache_takes_its_scales_from_the_checkpoint(shape, tmp_path):
    model = make_checkpoint("llama", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for layer in range(4):
        for which in "kv":
            tensors[f"model.layers.{layer}.self_attn.{which}_scale"] = torch.full(shape, 0.05)
    save_file(tensors, tmp_path / WEIGHTS)
    with open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path, kv_cache_dtype="int8") as llm:
        first = [tokens[0] for tokens in generate(llm)]
    expected = [greedy(model, prompt, 1).tokens[0] for prompt in prompts()]
    agree = sum(a == b for a, b in zip(first, expected, strict=True))
    assert agree >= 12, "eight bits of keys and values change few first tokens"


def test_an_int8_cache_without_scales_is_refused(tmp_path):
    make_checkpoint("llama", tmp_path)
    with pytest.raises(CheckpointError, match="int8 KV cache needs the scales model.layers.0.self_attn.k_scale"):
        open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path, kv_cache_dtype="int8")


# -- what is refused ----------------------------------------------------------------------------------------


def make_spoiled(folder: Path, container: str, change=None, **settings) -> None:
    make_quantized_checkpoint(container, folder)
    spoil(folder, change, settings)


MODULE = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("container", "missing", "expected"),
    [
        ("gptq", "scales", f"lacks tensor '{MODULE}.scales' of shape"),
        ("gptq-zeros", "qzeros", f"lacks tensor '{MODULE}.qzeros'"),
        ("awq", "scales", f"lacks tensor '{MODULE}.scales'"),
        (
            "fp8-tensor",
            "weight_scale",
            "stored as float8_e4m3fn, and nothing says how to read that: its scale is missing",
        ),
        ("fp8-static", "input_scale", f"lacks tensor '{MODULE}.input_scale'"),
        ("ct-int4", "weight_scale", f"lacks tensor '{MODULE}.weight_scale'"),
    ],
)
def test_a_missing_scale_is_named(container, missing, expected, tmp_path):
    make_spoiled(tmp_path, container, lambda tensors: tensors.pop(f"{MODULE}.{missing}"))
    with pytest.raises(CheckpointError, match=expected):
        open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path)


@pytest.mark.parametrize(
    ("container", "settings", "error", "expected"),
    [
        ("gptq", {"group_size": 48}, ConfigError, "64 input features, which groups of 48 do not divide"),
        ("gptq", {"bits": 3}, Unsupported, "3 bits; 4 and 8 are read"),
        ("gptq", {"quant_method": "mystery"}, ConfigError, "'mystery' is not supported; supported are gptq, awq, fp8"),
        ("gptq", {"group_size": None}, CheckpointError, "quantization_config of method gptq cannot be read"),
        ("awq", {"version": "gemv_fast"}, Unsupported, "version gemv_fast; 4 bits are read, gemm and gemv"),
        ("ct-int4", {"config_groups": {}}, Unsupported, "no config group names model.layers.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(container, settings, error, expected, tmp_path):
    make_spoiled(tmp_path, container, **settings)
    with pytest.raises(error, match=expected):
        open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path)


def test_columns_ordered_by_activation_are_refused_where_the_settings_deny_it(tmp_path):
    def shuffle(tensors):
        tensors[f"{MODULE}.g_idx"] = tensors[f"{MODULE}.g_idx"].flip(0)

    make_spoiled(tmp_path, "gptq", shuffle)
    with pytest.raises(CheckpointError, match=f"{MODULE}.g_idx.*orders columns by activation"):
        open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path)


def test_a_scheme_that_the_device_lacks_is_refused_with_those_it_has(tmp_path):
    make_quantized_checkpoint("gptq", tmp_path)
    with pytest.raises(Unsupported, match=r"fake-hostlen with a checkpoint in int4 .*: int8 is nearest; available:"):
        open_llm(Case("llama", 64, True, False, True, "fake-hostlen"), tmp_path)


def test_asking_for_another_method_than_the_checkpoints_is_refused(tmp_path):
    make_quantized_checkpoint("gptq", tmp_path)
    with pytest.raises(ConfigError, match="'int8' was asked for, and the checkpoint is gptq"):
        open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path, quantization="int8")
    make_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match="'awq': the checkpoint is not quantized; at load .* int8, int4, fp8, mxfp4"):
        open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path, quantization="awq")


def test_groups_that_a_rank_would_cut_are_refused(tmp_path):
    make_quantized_checkpoint("fp8-block", tmp_path)
    with pytest.raises(ConfigError, match="blocks of 32 rows, and this rank's begin at 16"):
        open_llm(Case("llama", 64, True, False, True, "cpu-tp2"), tmp_path)


def test_stacked_rows_whose_groups_a_rank_would_cut_are_refused():
    """Such experts come without a container, and are checked as any other matrix is."""
    matrix = Matrix(
        name="experts.0.down",
        shape=(8, 64),
        rows=Span(0, 8),
        columns=Span(16, 16),
        scheme=QuantScheme(values="int4", scales="group", group_size=32),
        put=lambda kind, tensor, row=0: None,
    )
    with pytest.raises(
        ConfigError, match="experts.0.down is quantized in groups of 32 columns, which 16 columns a rank"
    ):
        put_rows(matrix, torch.randn(8, 64))
