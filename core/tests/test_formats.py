"""Values and scales beyond a byte and float32: what canonical parts stand for, and the readers of MXFP4 and NVFP4, each
against a plain implementation of the format."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_kit import Held
from safetensors.torch import load_file, save_file

from anychip import LLM
from anychip.config import EngineConfig
from anychip.errors import CheckpointError, ConfigError, PluginFailed, Unsupported
from anychip.launch.plan import plan_engine
from anychip.ops.reference import REFERENCE, WidenedLinear, dequantize
from anychip.ops.reference.linear import ReferenceQuantizedLinear
from anychip.ops.reference.quantized import QuantizedMatrix
from anychip.plugin_api import NAMED, LinearPart, LinearSpec, Platform, PlatformContext, ProbeResult, QuantScheme
from anychip.quantization.compressed_tensors import CompressedTensors
from anychip.quantization.format import Container
from anychip.quantization.group_floats import pairs
from anychip.quantization.modelopt import ModelOpt
from anychip.quantization.mxfp4 import MXFP4
from anychip.registry.plugins import load_plugins
from anychip.weights.matrix import Matrix, MatrixStack, Span, StackPiece
from anychip.weights.register import WeightRegister, load_weights
from anychip_conformance.equality.four_bit_floats import codes, make_mxfp4_gpt_oss, mx, nv, packed
from anychip_conformance.equality.oracle import greedy, judge
from anychip_conformance.equality.quantized_models import make_quantized_checkpoint
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import NUM_TOKENS, Case, generate, open_llm, prompts

WEIGHTS = "model.safetensors"
E2M1 = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 3.0, 6: 4.0, 7: 6.0}


def reference_platform() -> Platform:
    manifest = load_plugins().platforms["cpu"]
    return Platform(
        PlatformContext(
            manifest=manifest, device_indexes=(0,), options=manifest.options(), probe=ProbeResult(), reference=REFERENCE
        )
    )


# -- what canonical parts stand for ---------------------------------------------------------------------------


def test_the_sixteen_numbers_of_e2m1():
    all_codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    one = torch.tensor([127], dtype=torch.uint8).view(1, 1)
    scheme = replace(NAMED["mxfp4"], group_size=16)
    found = dequantize(scheme, all_codes, one)[0].tolist()
    assert found == [*E2M1.values(), *(-x for x in E2M1.values())]
    assert str(found[8]) == "-0.0"


@pytest.mark.parametrize(("byte", "power"), [(0, -127), (1, -126), (126, -1), (127, 0), (128, 1), (254, 127)])
def test_a_byte_of_e8m0_is_a_power_of_two(byte, power):
    held = torch.tensor([[byte]], dtype=torch.uint8)
    values = torch.tensor([[2, 10]], dtype=torch.uint8)  # 1 and -1
    assert dequantize(replace(NAMED["mxfp4"], group_size=2), values, held)[0].tolist() == [2.0**power, -(2.0**power)]


SCHEMES = [
    NAMED["mxfp4"],
    NAMED["nvfp4"],
    NAMED["codebook4"],
    replace(NAMED["codebook4"], codebook=tuple(float(n * n) for n in range(64)), group_size=24),
    replace(NAMED["int4-float-zeros"], group_size=16),
    QuantScheme(values="int8", scales="channel", zero_points="float"),
    NAMED["f16-int5-minima"],
    NAMED["super-int2-minima"],
    replace(NAMED["super-int6"], super_group_size=32),
    replace(NAMED["super-codebook4"], group_size=8, super_group_size=32),
    replace(NAMED["int8-minima"], scales="channel", group_size=None),
    QuantScheme(values="fp8_e5m2", scales="tensor"),
    QuantScheme(values="fp8_e4m3", scales="block", group_size=16, scale_format="e8m0"),
    QuantScheme(values="int4", scales="group", group_size=32, activations="token", activation_format="int8"),
]


def random_parts(scheme: QuantScheme, rows: int, columns: int) -> dict[str, torch.Tensor]:
    size = scheme.group_size or 1
    groups = -(-columns // size)
    shape = {"tensor": (1,), "channel": (rows,), "group": (rows, groups), "block": (-(-rows // size), groups)}[
        scheme.scales
    ]
    if scheme.values == "int8":
        parts = {"": torch.randint(-128, 128, (rows, columns), dtype=torch.int8)}
    elif scheme.values.startswith("fp8"):
        dtype = torch.float8_e4m3fn if scheme.values == "fp8_e4m3" else torch.float8_e5m2
        parts = {"": (torch.randn(rows, columns) * 20).to(dtype)}
    else:
        parts = {"": torch.randint(0, 1 << scheme.bits, (rows, columns), dtype=torch.uint8)}
    parts["scale"] = {
        "float32": lambda: torch.rand(shape) + 0.1,
        "float16": lambda: (torch.rand(shape) + 0.1).half(),
        "int8": lambda: torch.randint(-63, 64, shape, dtype=torch.int8),
        "e8m0": lambda: torch.randint(120, 135, shape, dtype=torch.uint8),
        "e4m3": lambda: (torch.rand(shape) * 400).to(torch.float8_e4m3fn),
    }[scheme.scale_format]()
    if scheme.scale_format == "e4m3":
        parts["global_scale"] = torch.rand(1) * 0.01
    if scheme.zero_points == "minima":
        parts["minimum"] = parts["scale"].flip(0)
    elif scheme.zero_points:
        parts["zero"] = torch.rand(shape) * 15
    if scheme.super_group_size:
        upper = rows, -(-columns // scheme.super_group_size)
        parts |= {f"super_{kind}": torch.rand(upper).half() for kind in ("scale", "minimum") if kind in parts}
    return parts


def element(scheme: QuantScheme, parts: dict[str, torch.Tensor], row: int, column: int) -> float:
    """One element in float64, from the definition."""
    stored = parts[""][row, column]
    if scheme.values == "fp4_e2m1":
        number = E2M1[int(stored) & 7] * (-1 if int(stored) & 8 else 1)
    else:
        number = scheme.codebook[int(stored)] if scheme.codebook else float(stored)
    size = scheme.group_size or 1
    at = {"tensor": (0,), "channel": (row,), "group": (row, column // size), "block": (row // size, column // size)}
    place = at[scheme.scales]
    scale = parts["scale"][place]
    factor = 2.0 ** (int(scale) - 127) if scheme.scale_format == "e8m0" else float(scale)
    above = row, column // (scheme.super_group_size or 1)
    if "global_scale" in parts:
        factor *= float(parts["global_scale"])
    if "super_scale" in parts:
        factor *= float(parts["super_scale"][above])
    if "minimum" in parts:
        return number * factor - float(parts["minimum"][place]) * float(
            parts["super_minimum"][above] if "super_minimum" in parts else 1
        )
    half = {"int2": 2, "int3": 4, "int4": 8, "int5": 16, "int6": 32}.get(scheme.values, 0)
    return (number - (float(parts["zero"][place]) if "zero" in parts else half)) * factor


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.sampled_from([(5,), (16, 64), (32, 3)]),
    columns=st.sampled_from([16, 33, 96]),
    seed=st.integers(0, 999),
)
def test_a_matrix_stands_for_its_elements(scheme, rows, columns, seed):
    torch.manual_seed(seed)
    if scheme.scales == "block":
        rows = (32, 16)  # parts of one product begin at a block
    matrix = QuantizedMatrix.allocate((sum(rows), columns), scheme, reference_platform())
    starts = [sum(rows[:index]) for index in range(len(rows))]
    held = [random_parts(scheme, count, columns) for count in rows]  # each with its own global scale
    for offset, count, parts in zip(starts, rows, held, strict=True):
        for kind, tensor in parts.items():
            matrix.load(kind, tensor, offset, count, 0)
    for offset, count, parts in zip(starts, rows, held, strict=True):
        found = matrix.dequantize()[offset : offset + count]
        rest = {kind: part for kind, part in parts.items() if kind not in ("", "scale")}
        plain = dequantize(scheme, parts[""], parts["scale"], **rest)
        assert found.equal(plain)
        exact = torch.tensor(
            [[element(scheme, parts, row, column) for column in range(columns)] for row in range(count)],
            dtype=torch.float64,
        )
        # A product and a sum of float32: the zero's difference may cancel.
        slack = 4 * 2.0**-24 * exact.abs() + 16 * 2.0**-24 * plain.abs().amax()
        assert ((plain.double() - exact).abs() <= slack).all()


@settings(deadline=None)
@given(weight=st.lists(st.floats(-1e4, 1e4, width=32), min_size=64, max_size=64), power=st.integers(-20, 20))
def test_what_is_packed_is_read_back(weight, power):
    """Of what was rounded once, rounding again changes nothing: packing, nibble order and exponents are undone."""
    given_matrix = torch.tensor(weight).view(1, 64) * 2.0**power
    held, exponents, matrix = mx(given_matrix)
    assert pairs(packed(held)).equal(held)
    assert dequantize(NAMED["mxfp4"], pairs(packed(held)), exponents).equal(matrix)
    held, scale, whole, matrix = nv(given_matrix)
    found = dequantize(NAMED["nvfp4"], pairs(packed(held)), scale, global_scale=whole)
    torch.testing.assert_close(found, matrix, rtol=2**-22, atol=0, equal_nan=True)


def test_rounding_to_the_nearest_of_eight():
    given_numbers = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 2.4, 2.6, 4.9, 5.1, 9.0, -0.3, -6.0])
    assert codes(given_numbers).tolist() == [0, 0, 1, 1, 2, 4, 5, 6, 7, 7, 9, 15]


# -- dequantized at load, for plain kernels ---------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.activations == "plain"], ids=lambda s: s.name)
def test_widened_products_are_those_of_the_reference(scheme, order):
    """Whatever order the kinds of a part come in, with values in two chunks."""
    platform = reference_platform()
    parts = tuple(LinearPart(name=name, offset=offset, rows=96) for name, offset in (("a", 0), ("b", 96)))
    spec = LinearSpec(in_features=96, out_features=192, parts=parts, dtype="float32", bias=True, scheme=scheme)
    kernels = (ReferenceQuantizedLinear(spec, platform), WidenedLinear(spec, platform, platform.linear))
    x, results = torch.randn(5, 96), []
    given = [(part.name, random_parts(scheme, 96, 96), torch.randn(96)) for part in parts]
    for kernel in kernels:
        packed = kernel.begin()
        for name, kinds, bias in given:
            for kind, tensor in list(kinds.items())[::order]:
                if kind:
                    kernel.load(packed, f"{name}.{kind}", tensor)
                else:
                    kernel.load(packed, name, tensor[:64])
                    kernel.load(packed, name, tensor[64:], row=64)
            kernel.load(packed, f"{name}.bias", bias)
        results.append(kernel.apply(x, kernel.finish(packed)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5 * float(results[0].abs().max()))
    fresh = random_parts(scheme, 96, 96)
    for kernel, result in zip(kernels, results, strict=True):
        packed = kernel.begin()
        for name in ("a", "b"):
            for kind, tensor in given[0][1].items():
                kernel.load(packed, f"{name}.{kind}" if kind else name, tensor)
            kernel.load(packed, f"{name}.bias", given[0][2])
        packed = kernel.finish(packed)
        for kind, tensor in fresh.items():
            kernel.update(packed, f"b.{kind}" if kind else "b", tensor)
        result.copy_(kernel.apply(x, packed))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5 * float(results[0].abs().max()))


@pytest.mark.parametrize("isa", ["reference", ""])
def test_a_plan_counts_weights_in_the_form_that_they_are_held_in(isa, tmp_path):
    make_mxfp4_gpt_oss(tmp_path)
    given_settings = {"device": "cpu", "num_kv_blocks": 64, "device_options": {"isa": isa} if isa else {}}
    plan = plan_engine(EngineConfig(model=str(tmp_path), **given_settings))
    with LLM(str(tmp_path), skip_tokenizer=True, **given_settings) as llm:
        assert llm.worker.memory.weights == plan.worker.memory.weights
    assert plan.quantization == "mxfp4"


# -- GPT-OSS in MXFP4 ------------------------------------------------------------------------------------------


def same_tokens(model, case: Case, folder: Path, **settings) -> None:
    with open_llm(case, folder, **settings) as llm:
        answers = list(generate(llm))
    for prompt, tokens in zip(prompts(), answers, strict=True):
        verdict = judge(greedy(model, prompt, NUM_TOKENS), tokens)
        assert verdict.divergence is None or verdict.excused, verdict


@pytest.mark.parametrize("device", ["cpu", pytest.param("cpu-tp2", marks=pytest.mark.full), "fake-static", "fake-spmd"])
def test_gpt_oss_in_mxfp4_gives_the_tokens_of_its_dequantized_weights(device, tmp_path):
    model, _ = make_mxfp4_gpt_oss(tmp_path)
    same_tokens(model, Case("gpt-oss", 64, True, False, True, device), tmp_path)


def test_gpt_oss_in_mxfp4_holds_the_matrices_that_the_library_makes_of_it(tmp_path):
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    _, matrices = make_mxfp4_gpt_oss(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name, matrix in matrices.items():
        theirs = _convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        assert theirs.float().equal(matrix.bfloat16().float().transpose(1, 2))
    # Plain PyTorch's kernels hold what they were given in a form that can be read back.
    given_options = {"device_options": {"isa": "reference"}}
    with open_llm(Case("gpt-oss", 64, True, False, True, "cpu"), tmp_path, **given_options) as llm:
        for index, layer in enumerate(llm.engine.executor.worker.program.model.layers):
            experts = layer.mlp
            assert experts.spec.scheme == NAMED["mxfp4"]
            name = f"model.layers.{index}.mlp.experts"
            for expert in range(4):
                both = experts.packed.gate_up[expert].dequantize()
                stored = matrices[f"{name}.gate_up_proj"][expert]
                assert both.equal(torch.cat((stored[0::2], stored[1::2])))
                assert experts.packed.down[expert].dequantize().equal(matrices[f"{name}.down_proj"][expert])


def spoil(folder: Path, name: str, change) -> None:
    make_mxfp4_gpt_oss(folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors, f"model.layers.1.mlp.experts.{name}")
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("down_proj_scales", lambda t, n: t.pop(n), r"lacks tensor 'model.layers.1.mlp.experts.down_proj_scales'"),
        (
            "gate_up_proj_blocks",
            lambda t, n: t.pop(n),
            r"lacks tensor 'model.layers.1.mlp.experts.gate_up_proj_blocks'",
        ),
        ("gate_up_proj_scales", lambda t, n: t[n].fill_(255), r"gate_up_proj_scales.* scale that is not a number"),
        (
            "down_proj_blocks",
            lambda t, n: t.update({n: t[n].flatten(2)}),
            r"has shape \[4, 64, 64\], the scheme wants \[4, 64, 4, 16\]",
        ),
    ],
)
def test_a_broken_mxfp4_checkpoint_is_refused_by_the_tensors_name(name, change, said, tmp_path):
    spoil(tmp_path, name, change)
    with pytest.raises(CheckpointError, match=said):
        open_llm(Case("gpt-oss", 64, True, False, True, "cpu"), tmp_path)


def test_mxfp4_groups_that_a_rank_would_cut_are_refused(tmp_path):
    make_mxfp4_gpt_oss(tmp_path, intermediate_size=96)
    with pytest.raises(ConfigError, match=r"experts.0.down is quantized in groups of 32 columns, which 48 columns"):
        open_llm(Case("gpt-oss", 64, True, False, True, "cpu-tp2"), tmp_path)


def test_a_device_that_does_not_declare_mxfp4_refuses_it(tmp_path):
    make_mxfp4_gpt_oss(tmp_path)
    with pytest.raises(Unsupported, match=r"fake-hostlen with a checkpoint in mxfp4 .*: int8 is nearest"):
        open_llm(Case("gpt-oss", 64, True, False, True, "fake-hostlen"), tmp_path)


# -- a rank's share ---------------------------------------------------------------------------------------------


def loaded(register: WeightRegister, tensors: dict[str, torch.Tensor]) -> None:
    load_weights(register, iter([(name, Held(name, tensor)) for name, tensor in tensors.items()]), "here")


def gathered(scheme: QuantScheme, parts: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    whole = {kind: torch.cat(tensors) for kind, tensors in parts.items()}
    return dequantize(scheme, whole[""], whole["scale"], global_scale=whole.get("global_scale"))


def compressed(strategy: str, size: int) -> dict:
    weights = {"type": "float", "num_bits": 4, "strategy": strategy, "group_size": size, "symmetric": True}
    return {"config_groups": {"0": {"targets": ["Linear"], "weights": weights}}}


def stored_mx(weight: torch.Tensor) -> tuple[Container, dict[str, torch.Tensor], torch.Tensor]:
    held, exponents, matrix = mx(weight)
    tensors = {"m.weight_packed": packed(held), "m.weight_scale": exponents}
    return CompressedTensors(compressed("group", 32), frozenset(tensors)), tensors, matrix


def stored_nv(weight: torch.Tensor) -> tuple[Container, dict[str, torch.Tensor], torch.Tensor]:
    held, scale, whole, matrix = nv(weight)
    tensors = {"m.weight_packed": packed(held), "m.weight_scale": scale, "m.weight_global_scale": (1 / whole).view(1)}
    return CompressedTensors(compressed("tensor_group", 16), frozenset(tensors)), tensors, matrix


def stored_nv2(weight: torch.Tensor) -> tuple[Container, dict[str, torch.Tensor], torch.Tensor]:
    held, scale, whole, matrix = nv(weight)
    tensors = {"m.weight": packed(held), "m.weight_scale": scale, "m.weight_scale_2": whole}
    return ModelOpt({"quant_algo": "NVFP4"}, frozenset(tensors)), tensors, matrix


_spans = {
    "rows": st.tuples(st.integers(0, 70), st.integers(1, 80)),
    "groups": st.tuples(st.integers(0, 2), st.integers(1, 3)),
    "seed": st.integers(0, 999),
}


@settings(deadline=None)
@given(make=st.sampled_from([stored_mx, stored_nv, stored_nv2]), **_spans)
def test_a_share_of_a_matrix_is_that_part_of_it(make, rows, groups, seed):
    torch.manual_seed(seed)
    weight = torch.randn(rows[0] + rows[1] + 3, 32 * (sum(groups) + 1)) * 2.0 ** torch.randn(())
    container, tensors, whole = make(weight)
    register, parts = WeightRegister(), {}
    scheme = container.scheme("m", weight.shape[1])
    share = Matrix(
        name="m", shape=tuple(weight.shape), rows=Span(*rows), columns=Span(*groups).times(32), scheme=scheme,
        put=lambda kind, tensor, row=0: parts.setdefault(kind, []).append(tensor.clone()),
    )  # fmt: skip
    container.want(register, share)
    loaded(register, tensors)
    expected = whole[slice(*share.rows.bounds), slice(*share.columns.bounds)]
    # One exporter stores the reciprocal of the global scale.
    torch.testing.assert_close(gathered(scheme, parts), expected, rtol=2**-22, atol=0)


@settings(deadline=None)
@given(experts=st.integers(1, 3), **_spans)
def test_a_share_of_stacked_experts_is_that_part_of_them(experts, rows, groups, seed):
    """Gate and up in turns, of which a rank takes some pairs."""
    torch.manual_seed(seed)
    height, width = rows[0] + rows[1] + 3, 32 * (sum(groups) + 1)
    held, exponents, whole = mx(torch.randn(experts, 2 * height, width))
    tensors = {"m_blocks": packed(held).unflatten(-1, (-1, 16)), "m_scales": exponents}
    container, register = MXFP4({}, frozenset(tensors)), WeightRegister()
    scheme = container.scheme("m", width)
    found: dict[tuple[int, int], dict[str, list[torch.Tensor]]] = {}

    def matrix(expert: int, half: int) -> Matrix:
        parts = found.setdefault((expert, half), {})
        return Matrix(
            name=f"m.{expert}.{half}", shape=(height, width), rows=Span(*rows), columns=Span(*groups).times(32),
            scheme=scheme, put=lambda kind, tensor, row=0: parts.setdefault(kind, []).append(tensor.clone()),
        )  # fmt: skip

    first, last = 2 * rows[0], 2 * (rows[0] + rows[1])
    pieces = tuple(
        StackPiece(slice(first + half, last, 2), [matrix(expert, half) for expert in range(experts)]) for half in (0, 1)
    )
    container.want_stack(
        register, MatrixStack(name="m", count=experts, held=Span(0, experts), shape=(2 * height, width), pieces=pieces)
    )
    loaded(register, tensors)
    columns = slice(*Span(*groups).times(32).bounds)
    for (expert, half), parts in found.items():
        assert gathered(scheme, parts).equal(whole[expert, first + half : last : 2, columns])


# -- other containers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["ct-mxfp4", "modelopt-nvfp4"])
def test_experts_of_one_module_each_are_read_too(container, tmp_path):
    model, _ = make_quantized_checkpoint(container, tmp_path, "qwen3-moe")
    same_tokens(model, Case("qwen3-moe", 64, True, False, True, "cpu"), tmp_path)


def test_weight_only_and_activation_quantized_forms_are_declared_apart(tmp_path):
    """fake-static takes fp8 weights, and no activations of eight bits."""
    model, _ = make_quantized_checkpoint("ct-fp8-weights", tmp_path / "weights")
    same_tokens(model, Case("llama", 64, True, False, True, "fake-static"), tmp_path / "weights")
    make_quantized_checkpoint("ct-fp8-channel", tmp_path / "both")
    with pytest.raises(Unsupported, match=r"fake-static with a checkpoint in fp8 .*: fp8-w8a16 is nearest"):
        open_llm(Case("llama", 64, True, False, True, "fake-static"), tmp_path / "both")


@pytest.mark.parametrize(
    ("container", "settings", "tensor", "error", "said"),
    [
        ("modelopt-nvfp4", {"quant_algo": "W4A16_AWQ"}, None, Unsupported, "W4A16_AWQ; FP8, MXFP8, NVFP4 are read"),
        ("modelopt-nvfp4", {"group_size": 48}, None, ConfigError, "64 input features, which groups of 48 do not"),
        ("modelopt-nvfp4", {}, "weight_scale_2", CheckpointError, "lacks tensor '.*down_proj.weight_scale_2'"),
        ("ct-nvfp4", {}, "weight_global_scale", CheckpointError, "lacks tensor '.*down_proj.weight_global_scale'"),
        ("ct-mxfp4", {}, "weight_scale", CheckpointError, "lacks tensor '.*down_proj.weight_scale'"),
    ],
)
def test_four_bit_containers_that_cannot_be_read_are_refused(container, settings, tensor, error, said, tmp_path):
    make_quantized_checkpoint(container, tmp_path)
    if tensor is not None:
        tensors = load_file(tmp_path / WEIGHTS)
        del tensors[f"model.layers.1.mlp.down_proj.{tensor}"]
        save_file(tensors, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=said):
        open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path)


# -- a container of another package ----------------------------------------------------------------------------

READER = """
import torch
from dataclasses import replace
from anychip.plugin_api import NAMED
from anychip.quantization.format import Container

class Reader(Container):
    'NF4 with one byte to a value: module.index uint8 [rows, columns], module.absmax [rows, groups].'

    def scheme(self, module, in_features):
        return replace(NAMED["codebook4"], group_size=32) if f"{module}.index" in self.names else None

    def want_quantized(self, register, matrix, scheme):
        def take(view):
            matrix.put("", view.read(matrix.rows.bounds, matrix.columns.bounds))

        def take_scales(view):
            groups = tuple(bound // 32 for bound in matrix.columns.bounds)
            matrix.put("scale", view.read(matrix.rows.bounds, groups))

        register.want(f"{matrix.name}.index", matrix.shape, take)
        register.want(f"{matrix.name}.absmax", (matrix.shape[0], matrix.shape[1] // 32), take_scales)

    def __init__(self, config, names):
        if "broken" in config:
            raise RuntimeError("no such version")
        super().__init__(names)
"""


@pytest.fixture
def acme(monkeypatch):
    """A package that reads method acme-nf4."""
    module = ModuleType("acme_nf4")
    exec(compile(READER, "<acme_nf4>", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "acme_nf4", module)
    plugins = load_plugins()
    plugins.quant_formats["acme-nf4"] = "acme_nf4:Reader"
    monkeypatch.setattr("anychip.worker.worker.load_plugins", lambda: plugins)


def nf4_checkpoint(folder: Path, **settings: str):
    model = make_checkpoint("llama", folder)
    table = torch.tensor(NAMED["codebook4"].codebook)
    stored, matrices = {}, {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            stored[name] = tensor
            continue
        groups = tensor.unflatten(1, (-1, 32))
        absmax = groups.abs().amax(dim=-1)
        index = (groups / absmax.unsqueeze(-1)).unsqueeze(-1).sub(table).abs().argmin(dim=-1)
        stored |= {f"{module}.index": index.flatten(1).to(torch.uint8), f"{module}.absmax": absmax}
        matrices[name] = (table[index] * absmax.unsqueeze(-1)).flatten(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in matrices:
                parameter.copy_(matrices[name])
    save_file(stored, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "acme-nf4", **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.usefixtures("acme")
def test_another_packages_container_is_read(tmp_path):
    same_tokens(nf4_checkpoint(tmp_path), Case("llama", 64, True, False, True, "cpu"), tmp_path)


@pytest.mark.usefixtures("acme")
def test_another_packages_container_that_raises_is_named(tmp_path):
    nf4_checkpoint(tmp_path, broken="yes")
    with pytest.raises(PluginFailed, match=r"acme_nf4: acme_nf4:Reader raised RuntimeError: no such version"):
        open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path)


def test_a_method_that_nobody_reads_is_refused_with_those_that_are(tmp_path):
    nf4_checkpoint(tmp_path)
    with pytest.raises(
        ConfigError, match="'acme-nf4' is not supported; supported are gptq, awq, fp8, mxfp4, gguf, modelopt"
    ):
        open_llm(Case("llama", 64, True, False, True, "cpu"), tmp_path)
