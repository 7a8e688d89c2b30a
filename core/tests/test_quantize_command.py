"""`anychip quantize`: what it stores, what that costs, and that the engine holds what was meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_kit import held_matrix, products
from safetensors.torch import load_file, save_file

from anychip import LLM, SamplingParams
from anychip.compress.by_layer import CalibratedLayer, LayerByLayer
from anychip.compress.command import REPORT
from anychip.compress.gptq import gptq
from anychip.compress.quantize import quantize
from anychip.compress.rounding import round_to_nearest, scales_of, stored
from anychip.compress.smoothing import divide_output, smooth
from anychip.compress.targets import TARGETS
from anychip.compress.watching import watched
from anychip.compress.writer import ShardWriter
from anychip.entrypoints.cli.main import main
from anychip.errors import ConfigError
from anychip.ops.reference.canonical import stored_numbers
from anychip.plugin_api import QuantScheme
from anychip.weights.checkpoint import Checkpoint
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import Case, open_llm

INT4 = QuantScheme(values="int4", scales="group", group_size=4)
INT8 = QuantScheme(values="int8", scales="channel")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_checkpoint("llama", folder)
    return folder


def texts(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 100, (24,), generator=generator) for _ in range(count)]


def quantized(source: Path, out: Path, name: str, method: str = "rtn"):
    return quantize(source, out, TARGETS[name], method, texts(), CPU, lambda done, total: None)


# -- one matrix ---------------------------------------------------------------------------------------------


def plainly(weight: torch.Tensor, moments: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """GPTQ's numbers [rows, columns] by its definition, in float64: after each column the inverse of the moments of the
    columns to come says how these make up for the error."""
    wide, scale = weight.double().clone(), scales_of(weight, scheme).double()
    columns = wide.shape[1]
    scales = scale.unsqueeze(1).expand_as(wide) if scheme.group_size is None else scale.repeat_interleave(4, dim=1)
    damped = moments.double() + 0.01 * moments.diagonal().mean().double() * torch.eye(columns, dtype=torch.float64)
    left = damped.diagonal().argsort(descending=True, stable=True).tolist()
    numbers = torch.empty_like(wide)
    while left:
        at = left[0]
        inverse = torch.linalg.inv(damped[left][:, left])
        value = stored(wide[:, at].float(), scales[:, at].float(), scheme)
        numbers[:, at] = stored_numbers(scheme, value).double() - (8 if scheme.values == "int4" else 0)
        error = wide[:, at] - numbers[:, at] * scales[:, at]
        wide[:, left] -= error.unsqueeze(1) * (inverse[0] / inverse[0, 0])
        left = left[1:]
    return numbers * scales


@given(seed=st.integers(0, 2**16), scheme=st.sampled_from([INT4, INT8]), columns=st.sampled_from([4, 8, 20, 132]))
@settings(max_examples=25, deadline=None)
def test_gptq_is_what_its_definition_gives(seed, scheme, columns):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((3, columns), generator=generator)
    inputs = torch.randn((2 * columns, columns), generator=generator) @ torch.randn(
        (columns, columns), generator=generator
    )
    moments = inputs.T @ inputs
    found, expected = gptq(weight, moments, scheme).dequantize().double(), plainly(weight, moments, scheme)
    # A weight between two numbers may fall to either side, and those behind it then differ.
    same = (found - expected).abs() < 1e-4
    assert same[:, 0].all() or same.double().mean() > 0.5
    costs = [torch.einsum("rc,cd,rd->r", e, moments.double(), e) for e in (found - weight, expected - weight)]
    torch.testing.assert_close(costs[0], costs[1], rtol=0.05, atol=1e-6)


@given(seed=st.integers(0, 2**16), scheme=st.sampled_from([INT4, INT8]))
@settings(max_examples=20, deadline=None)
def test_inputs_that_have_nothing_to_do_with_one_another_leave_the_nearest(seed, scheme):
    weight = torch.randn((3, 16), generator=torch.Generator().manual_seed(seed))
    moments = torch.diag(torch.arange(1.0, 17.0))
    assert torch.equal(gptq(weight, moments, scheme).values, round_to_nearest(weight, scheme).values)


def test_columns_that_are_never_fed_do_no_harm():
    weight, moments = torch.randn((3, 8)), torch.zeros((8, 8))
    assert torch.isfinite(gptq(weight, moments, INT4).dequantize()).all()
    moments[:4, :4] = torch.eye(4)
    assert torch.equal(gptq(weight, moments, INT4).values, round_to_nearest(weight, INT4).values)


@given(seed=st.integers(0, 2**16), name=st.sampled_from([*TARGETS]))
@settings(max_examples=30, deadline=None)
def test_a_weight_goes_to_the_nearest_number_that_its_scale_allows(seed, name):
    scheme = TARGETS[name].grouped([32]).scheme
    weight = torch.randn((2, 32), generator=torch.Generator().manual_seed(seed))
    rounded = round_to_nearest(weight, scheme)
    step = scales_of(weight, scheme).view(2, 1)
    error = (rounded.dequantize() - weight).abs()
    if scheme.values == "fp8_e4m3":
        assert (error <= weight.abs() * 2**-4 + step * 2**-9).all()
    else:
        assert (error <= step * 0.5001).all()


# -- smoothing ----------------------------------------------------------------------------------------------


def norms(width: int) -> dict[str, torch.nn.Module]:
    class OnePlus(torch.nn.Module):
        """As Gemma's."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    return {"rms": torch.nn.RMSNorm(width, eps=1e-6), "layer": torch.nn.LayerNorm(width), "one plus": OnePlus()}


@given(seed=st.integers(0, 2**16), kind=st.sampled_from(["rms", "layer", "one plus"]))
@settings(max_examples=20, deadline=None)
def test_a_norms_output_is_divided(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    norm = norms(8)[kind]
    for parameter in norm.parameters():
        parameter.data += torch.randn(8, generator=generator)
    x, factors = torch.randn((5, 8), generator=generator), torch.rand(8, generator=generator) + 0.1
    expected = norm(x).detach() / factors
    divide_output(norm, factors)
    torch.testing.assert_close(norm(x).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("awq", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "granite", "phi3"])
def test_a_smoothed_layer_computes_what_it_did(family, awq, tmp_path):
    make_checkpoint(family, tmp_path)
    model = LayerByLayer(Checkpoint(tmp_path), CPU)
    names = model.linear_names()
    scheme = TARGETS["int4"].grouped([64]).scheme
    for layer in model.calibrated(texts(2)):
        before = layer.first_output()
        changed = smooth(layer, names, scheme, awq=awq)
        assert len(changed) >= 2, "the norms before attention and before the MLP feed linear layers"
        torch.testing.assert_close(layer.first_output(), before, rtol=2e-3, atol=2e-3)


class ReadsTwice(torch.nn.Module):
    """Its norm's output goes to a linear layer, and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.RMSNorm(8), torch.nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.norm(x)
        return self.linear(given) + given


def test_a_norm_with_another_reader_is_left_alone():
    layer, x = ReadsTwice(), torch.randn((6, 8)) * torch.arange(1.0, 9.0)
    with torch.no_grad(), watched(layer, {"linear": layer.linear}) as seen:
        layer(x)
    assert seen.feeds == {"norm": ["linear"]}
    held = [parameter.clone() for parameter in layer.parameters()]
    found = CalibratedLayer(layer, {"linear": layer.linear}, seen, lambda name: name, {}, lambda: layer(x).detach())
    assert smooth(found, ["linear"], INT4, awq=False) == {}
    assert all(torch.equal(now, before) for now, before in zip(layer.parameters(), held, strict=True))


# -- a checkpoint -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_the_engine_holds_what_was_stored(name, plain, tmp_path):
    reports = quantized(plain, tmp_path / "out", name)
    before = Checkpoint(plain)
    columns = [before.shape(f"{module}.weight")[1] for module in reports]
    scheme = TARGETS[name].grouped(columns).scheme
    case = Case("llama", 64, True, False, True, "cpu")
    with open_llm(case, tmp_path / "out", device_options={"isa": "reference"}) as llm:
        found = products(llm)
        assert found.keys() == reports.keys()
        for module, layer in found.items():
            expected = round_to_nearest(before.read(f"{module}.weight"), scheme).dequantize()
            torch.testing.assert_close(held_matrix(layer), expected, rtol=0, atol=0, msg=module)
    assert {report.method for report in reports.values()} == {"rtn"}


METHODS = ("gptq", "awq", "smoothquant")


def total_error(source: Path, out: Path, method: str) -> float:
    """Of the products over the texts, all matrices together."""
    return sum(report.output_error for report in quantized(source, out, "int4", method).values())


def test_sizes_that_move_into_norms_leave_less_to_round_away(tmp_path):
    make_checkpoint("llama", tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    for name in tensors:
        if name.endswith("layernorm.weight"):  # some columns are fed far more than others, as in real models
            tensors[name] *= torch.randn(len(tensors[name]), generator=torch.Generator().manual_seed(1)).mul(1.5).exp()
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    costs = {method: total_error(tmp_path / "plain", tmp_path / method, method) for method in METHODS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "anychip.compress.quantize.gptq", lambda weight, moments, scheme: round_to_nearest(weight, scheme)
        )
        nearest = total_error(tmp_path / "plain", tmp_path / "nearest", "gptq")
    assert max(costs.values()) < 0.9 * nearest


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_scales_of_a_kv_cache_let_its_range_be_used(family, kind, tmp_path):
    make_checkpoint(family, tmp_path / "plain")
    given = texts()
    quantize(tmp_path / "plain", tmp_path / "out", TARGETS["int8"], "rtn", given, CPU, lambda *_: None, kind)
    with open_llm(Case(family, 64, True, False, True, "cpu"), tmp_path / "out", kv_cache_dtype=kind) as llm:
        layers = [layer.attention.layer for layer in llm.engine.executor.worker.program.model.layers]
        assert all(float(layer.k_scale.max()) < 1 and float(layer.v_scale.max()) < 1 for layer in layers)
        assert {layer.k_scale.numel() for layer in layers} == ({1} if kind == "fp8" else {layers[0].k_scale.numel()})
        scaled = score(llm, given)
    with open_llm(Case(family, 64, True, False, True, "cpu"), tmp_path / "plain") as llm:
        plain_scores = score(llm, given)
    assert abs(scaled - plain_scores) < 0.05 * abs(plain_scores)


def score(llm: LLM, given: list[torch.Tensor]) -> float:
    """Sum of the log-probabilities of texts."""
    outputs = llm.generate([text.tolist() for text in given], SamplingParams(max_tokens=1, prompt_logprobs=0))
    return sum(entry.chosen for output in outputs for entry in output.prompt_logprobs)


@pytest.mark.parametrize("family", ["qwen3-moe", "gemma3", "phi3"])
def test_other_families_are_quantized_and_served(family, tmp_path):
    make_checkpoint(family, tmp_path / "plain")
    reports = quantized(tmp_path / "plain", tmp_path / "out", "int8")
    assert len(reports) > 8
    plain_names, names = Checkpoint(tmp_path / "plain").names, Checkpoint(tmp_path / "out").names
    assert {name.removesuffix(".weight") for name in plain_names - names} == reports.keys()
    with open_llm(Case(family, 64, True, False, True, "cpu"), tmp_path / "out") as llm:
        assert len(llm.generate([5, 6, 7])[0].outputs[0].token_ids) > 0


def test_several_files_hold_what_one_does(tmp_path):
    tensors = {f"t{number}": torch.full((4, number + 1), float(number)) for number in range(5)}
    for name, most in (("one", 1 << 20), ("many", 100)):
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name, most)
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        writer.close()
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert len(many.files) > 1 and one.names == many.names == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(many.read(name), tensor) and torch.equal(one.read(name), tensor)


def test_what_breaks_on_the_way_leaves_nothing(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(ShardWriter, "close", lambda self: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        quantized(plain, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == []


# -- the command --------------------------------------------------------------------------------------------


def test_the_command_reports_what_it_cost(tmp_path, capsys):
    text = tmp_path / "texts.txt"
    text.write_text(Path(__file__).read_text())
    command = ["quantize", "quickstart", "--scheme", "int4", "--output", str(tmp_path / "out")]
    options = ["--samples", "3", "--length", "48", "--evaluate", str(text), "--device", "cpu"]
    assert main([*command, "--calibration", str(text), *options]) == 0
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    before, after = report["perplexity"]
    assert 1 < before < after < 2 * before
    assert f"perplexity {before:.3f} before" in capsys.readouterr().out
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {f"{name}.weight_packed" for name in report["matrices"]} <= held.keys()


def refusals() -> dict[str, tuple[list[str], str]]:
    return {
        "kv scales": (["--scheme", "int4", "--kv-scales", "fp8"], "--kv-scales looks at what layers are fed"),
        "scheme": (["--scheme", "int3"], "choose one of int4, int8"),
        "calibration": (["--scheme", "int4", "--method", "gptq"], "--calibration FILE"),
        "short": (["--scheme", "int4", "--calibration", "SHORT"], "fewer than one piece of 512"),
        "lines": (["--scheme", "int4", "--calibration", "LINES"], 'not JSON Lines of objects with "text"'),
        "absent": (["--scheme", "int4", "--calibration", "ABSENT"], "cannot be read"),
        "samples": (["--scheme", "int4", "--samples", "0"], "expected 1 or more"),
    }


@pytest.mark.parametrize("name", refusals())
def test_a_command_that_cannot_be_is_refused_in_one_line(name, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "x"}\n')
    files = {"SHORT": "short.txt", "LINES": "lines.jsonl", "ABSENT": "absent.txt"}
    options, said = refusals()[name]
    options = [str(tmp_path / files[option]) if option in files else option for option in options]
    assert main(["quantize", "quickstart", "--output", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_and_a_quantized_source_are_refused(plain, tmp_path):
    quantized(plain, tmp_path / "out", "int8")
    with pytest.raises(ConfigError, match="is there already"):
        quantized(plain, tmp_path / "out", "int8")
    with pytest.raises(ConfigError, match="is quantized already"):
        quantized(tmp_path / "out", tmp_path / "again", "int8")
    shutil.rmtree(tmp_path / "out")
