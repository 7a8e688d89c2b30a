"""Checkpoints of other packages' formats stand for what their papers say, bit for bit, and are served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published_formats import FORMATS, GROUP
from quantized_kit import Held, held_matrix, products, spoil

from anychip.errors import CheckpointError, ConfigError, Unsupported
from anychip.ops.reference import dequantize
from anychip.ops.reference.quantized import quantize_rows
from anychip.plugin_api import NAMED
from anychip.quantization.detect import weight_format
from anychip.weights.matrix import Matrix, Span
from anychip.weights.register import WeightRegister, load_weights
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.quantized_models import store_checkpoint
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import NUM_TOKENS, Case, generate, open_llm, prompts

WEIGHTS = "model.safetensors"
IN_ORDER = [name for name, (_, _, settings) in FORMATS.items() if "desc-act" in name or "actorder" in name]
CASE = Case("llama", 64, True, False, True, "cpu")
SAMPLE = ("bnb-nf4-double", "gptq-desc-act", "hqq-4", "quark-int8", "ct-mxfp8")
"""Served end to end in every run: one of each way in which parts reach kernels."""


# -- what a container stands for -----------------------------------------------------------------------------------


def read_share(name: str, tensors: dict, shape: tuple[int, int], rows: Span, columns: Span, **more) -> torch.Tensor:
    """What a rank holds of matrix "m", dequantized by the reference; columns as the matrix has them."""
    settings = FORMATS[name][2]
    container = weight_format({"quantization_config": settings}, None, lambda: frozenset(tensors))
    scheme = container.scheme("m", shape[1])
    parts: dict[str, list[torch.Tensor]] = {}
    share = Matrix(
        name="m", shape=shape, rows=rows, columns=columns, scheme=scheme,
        put=lambda kind, tensor, row=0: parts.setdefault(kind, []).append(tensor.clone()), **more,
    )  # fmt: skip
    register = WeightRegister()
    container.want(register, share)
    load_weights(register, iter([(each, Held(each, tensor)) for each, tensor in tensors.items()]), "here")
    whole = {kind: torch.cat(tensors) for kind, tensors in parts.items()}
    matrix = dequantize(scheme, whole[""], whole["scale"], zero=whole.get("zero"))
    return matrix[:, whole["order"].argsort()] if "order" in whole else matrix


def stored(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    tensors, matrix = FORMATS[name][0](weight)
    return {f"m.{part}": tensor for part, tensor in tensors.items()}, matrix


@pytest.mark.parametrize("name", FORMATS)
def test_a_share_of_a_matrix_is_that_part_of_it_bit_for_bit(name):
    generator = torch.Generator().manual_seed(len(name))
    # Blocks of 64 begin within rows of 96.
    for shape in ((96, 192), (72, 96)):
        tensors, matrix = stored(name, torch.randn(shape, generator=generator))
        unit = 64 if shape[1] % 64 == 0 else 32
        for _ in range(4):
            first, width = (int(torch.randint(high, (1,), generator=generator)) for high in (30, 40))
            rows, columns = Span(first, width + 1), Span(unit, shape[1] - unit)
            if name in IN_ORDER:
                columns = Span(0, shape[1])
            # Whatever the order in which tensors come.
            names = list(tensors)
            shuffled = [names[i] for i in torch.randperm(len(names), generator=generator)]
            found = read_share(
                name, {each: tensors[each] for each in shuffled}, shape, rows, columns, takes_order=name in IN_ORDER
            )
            assert found.equal(matrix[slice(*rows.bounds), slice(*columns.bounds)])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SAMPLE else [pytest.mark.full]) for n in FORMATS])
def test_a_checkpoint_of_the_format_is_served(name, tmp_path):
    model, matrices = store_checkpoint(FORMATS[name], tmp_path, "llama")
    with open_llm(CASE, tmp_path, device_options={"isa": "reference"}) as llm:
        found = products(llm)
        assert found.keys() == matrices.keys()
        for module, layer in found.items():
            assert held_matrix(layer).equal(matrices[module]), module
    if FORMATS[name][1] is not None:
        return  # rounded activations: tokens part where a value is rounded the other way
    with open_llm(CASE, tmp_path) as llm:
        answers = list(generate(llm))
    for prompt, tokens in zip(prompts(), answers, strict=True):
        verdict = judge(greedy(model, prompt, NUM_TOKENS), tokens)
        assert verdict.divergence is None or verdict.excused, verdict


@pytest.mark.parametrize("name", ["bnb-nf4", "autoround-gptq"])
def test_experts_are_read_from_the_formats_too(name, tmp_path):
    model, _ = store_checkpoint(FORMATS[name], tmp_path, "qwen3-moe")
    case = Case("qwen3-moe", 64, True, False, True, "cpu")
    with open_llm(case, tmp_path) as llm:
        answers = list(generate(llm))
    for prompt, tokens in zip(prompts(), answers, strict=True):
        verdict = judge(greedy(model, prompt, NUM_TOKENS), tokens)
        assert verdict.divergence is None or verdict.excused, verdict


# -- what is refused -----------------------------------------------------------------------------------------------


def make_spoiled(folder: Path, name: str, change=None, family="llama", **settings) -> None:
    store_checkpoint(FORMATS[name], folder, family)
    spoil(folder, change, settings)


MODULE = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("name", "change", "settings", "error", "said"),
    [
        ("gptq-desc-act", lambda t: t[f"{MODULE}.g_idx"].copy_(t[f"{MODULE}.g_idx"].flip(0)), {}, CheckpointError,
         "order: the columns of q, k, v are ordered by activation, each in its own way"),
        ("gptq-desc-act", lambda t: t[f"{MODULE}.g_idx"].zero_(), {}, CheckpointError, "puts 0 to 64 of 64 columns"),
        ("bnb-nf4", lambda t: t[f"{MODULE}.weight.quant_map"].neg_(), {}, CheckpointError, "holds other numbers than"),
        ("bnb-nf4", lambda t: t.pop(f"{MODULE}.weight.absmax"), {}, CheckpointError, "lacks tensor .*weight.absmax"),
        ("bnb-nf4", None, {"bnb_4bit_blocksize": 32}, CheckpointError, "in blocks of 64, the model wants .* of 32"),
        ("bnb-int8", lambda t: t[f"{MODULE}.weight_format"].fill_(2), {}, Unsupported, "layout 2 of a GPU"),
        ("hqq-4", lambda t: t[f"{MODULE}.axis"].zero_(), {}, CheckpointError, "axis is 0, quantization_config says 1"),
        ("quark-fp8", None, {"global_quant_config": {"weight": {"dtype": "int4"}}}, Unsupported, "int8 by tensor or"),
        ("autoround-gptq", None, {"packing_format": "auto_round:marlin"}, Unsupported, "marlin; auto_round:auto_gptq"),
        ("hqq-4", None, {"quant_method": "aqlm"}, ConfigError, "aqlm.*eight weights at once.*supported are gptq, awq"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_read_is_refused_with_the_reason(name, change, settings, error, said, tmp_path):
    make_spoiled(tmp_path, name, change, **settings)
    with pytest.raises(error, match=said):
        open_llm(CASE, tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"axis": 0}, "along the matrix's rows"), ({"nbits": 3}, "3 bits; 8, 4, 2"), ({"view_as_float": True}, "floats")],
)
def test_hqq_forms_that_no_scheme_holds_are_refused(changed, said, tmp_path):
    params = {"nbits": 4, "group_size": GROUP, "axis": 1, **changed}
    make_spoiled(tmp_path, "hqq-4", quant_config={"weight_quant_params": params})
    with pytest.raises(Unsupported, match=said):
        open_llm(CASE, tmp_path)


def test_columns_ordered_by_activation_are_refused_where_they_cannot_be_held(tmp_path):
    store_checkpoint(FORMATS["gptq-desc-act"], tmp_path / "ranks", "llama")
    with pytest.raises(ConfigError, match="would hold parts of every group; set tensor_parallel_size 1"):
        open_llm(Case("llama", 64, True, False, True, "cpu-tp2"), tmp_path / "ranks")
    store_checkpoint(FORMATS["gptq-desc-act"], tmp_path / "experts", "qwen3-moe")
    with pytest.raises(Unsupported, match="experts and heads are not"):
        open_llm(Case("qwen3-moe", 64, True, False, True, "cpu"), tmp_path / "experts")


# -- quantized at load ---------------------------------------------------------------------------------------------


def rounded(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    if scheme == "fp8":
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale
    groups = weight.unflatten(-1, (-1, 32))
    scale = torch.exp2(groups.abs().amax(dim=-1, keepdim=True).log2().floor() - 2)
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    distance = ((groups / scale).abs().unsqueeze(-1) - numbers).abs()
    return (numbers[distance.argmin(dim=-1)] * groups.sign() * scale).flatten(1)


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4"])
def test_a_plain_checkpoint_is_quantized_at_load(scheme, tmp_path):
    model = make_checkpoint("llama", tmp_path)
    plain = {name.removesuffix(".weight"): parameter for name, parameter in model.named_parameters()}
    with open_llm(CASE, tmp_path, quantization=scheme, device_options={"isa": "reference"}) as llm:
        for module, layer in products(llm).items():
            assert held_matrix(layer).equal(rounded(plain[module].detach(), scheme)), module
    with open_llm(CASE, tmp_path, quantization=scheme) as llm:
        assert all(len(tokens) == NUM_TOKENS for tokens in generate(llm))


def test_mxfp4_at_load_takes_experts_too(tmp_path):
    make_checkpoint("qwen3-moe", tmp_path)
    with open_llm(Case("qwen3-moe", 64, True, False, True, "cpu"), tmp_path, quantization="mxfp4") as llm:
        assert all(len(tokens) == NUM_TOKENS for tokens in generate(llm))


@pytest.mark.parametrize("code", range(16))
def test_numbers_of_e2m1_are_rounded_to_themselves_and_middles_to_even_codes(code):
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    row = torch.zeros(1, 32)
    row[0, 0] = 6.0  # a scale of one
    row[0, 1] = magnitudes[code % 8] * (-1 if code >= 8 else 1)
    if code % 8 < 7:
        row[0, 2] = (magnitudes[code % 8] + magnitudes[code % 8 + 1]) / 2
    values, scale = quantize_rows(row, NAMED["mxfp4"])
    assert scale.tolist() == [[127]]
    assert values[0, 1] % 8 == code % 8 and (code % 8 == 0 or values[0, 1] == code)
    if code % 8 < 7:
        assert values[0, 2] == (code % 8) + (code % 8) % 2
