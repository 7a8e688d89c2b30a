"""The simulator: real schedulers, made-up seconds."""

from __future__ import annotations

import dataclasses
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.entrypoints.cli.main import main
from anychip.errors import ConfigError
from anychip.model_config import load_model_config
from anychip.simulate.accelerator import Accelerator, Link
from anychip.simulate.costs import LaneWork, MeasuredCosts, RooflineCosts, StepTime
from anychip.simulate.layout import Layout, cache_tokens, check_layout, token_bytes, weight_bytes
from anychip.simulate.run import Limits, Simulation
from anychip.simulate.shape import model_shape
from anychip.simulate.traffic import Traffic

DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
MIXTURE = {
    **DENSE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
}
ON = Accelerator(
    name="a device",
    memory_gib=80,
    read_gb_per_s=1000,
    tflops={"bfloat16": 100, "fp8": 200},
    kernel_us=0,
    devices_per_node=8,
    node=Link(gb_per_s=100, latency_us=0),
    network=Link(gb_per_s=10, latency_us=0),
    source="made up",
)
FREE_ENGINE = {"engine_s": 0.0, "engine_row_s": 0.0}


def shape_of(folder, raw, dtype="bfloat16"):
    (folder / "config.json").write_text(json.dumps(raw))
    return model_shape(load_model_config(str(folder)), dtype)


class Constant:
    """Every step takes a second; remembers what the lanes had."""

    def __init__(self):
        self.seen = []

    def step(self, lanes):
        self.seen.append(list(lanes))
        return StepTime(attention=0.25, mlp=0.75, head=0.0, communication=0.0)


def test_parameters_are_those_of_the_published_models(tmp_path):
    dense = shape_of(tmp_path, DENSE)
    assert weight_bytes(Layout(), dense) / 2 == pytest.approx(8.03e9, rel=0.002)
    mixture = shape_of(tmp_path, MIXTURE, "fp8")
    own = 61 * mixture.attention + 3 * mixture.dense + 58 * 256 * mixture.experts.each
    assert own + 58 * (mixture.experts.shared + mixture.experts.router) + 2 * mixture.head == pytest.approx(
        671e9, rel=0.005
    )
    assert token_bytes(Layout(), mixture) == (512 + 64) * 2 * 61
    assert token_bytes(Layout(tp=8), mixture) == token_bytes(Layout(), mixture), "latents are whole on every rank"


def test_one_row_takes_the_time_in_which_its_weights_are_read(tmp_path):
    shape = shape_of(tmp_path, DENSE)
    read = weight_bytes(Layout(), shape) - 2 * shape.embedding  # one row of it is looked up
    step = RooflineCosts(shape, Layout(), ON).step([LaneWork(rows=1, tokens=1, cached=0, pairs=0)])
    assert step.total == pytest.approx(read / 1e12)


def test_a_long_prompt_takes_the_time_of_its_products(tmp_path):
    shape = shape_of(tmp_path, DENSE)
    tokens = 8192
    step = RooflineCosts(shape, Layout(), ON).step([LaneWork(rows=1, tokens=tokens, cached=tokens, pairs=0)])
    products = 2 * tokens * 32 * (shape.attention + shape.dense)
    assert step.attention + step.mlp == pytest.approx(products / 100e12, rel=0.01)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 64),
    context=st.integers(1, 4000),
    layout=st.sampled_from([(1, 1, False), (4, 1, False), (2, 4, True), (1, 16, True)]),
    faster=st.sampled_from(["read_gb_per_s", "node", "network", "tflops", "overlap"]),
)
def test_a_better_device_is_never_slower_and_more_work_never_faster(tmp_path_factory, rows, context, layout, faster):
    shape = shape_of(tmp_path_factory.mktemp("shape"), MIXTURE, "fp8")
    over = Layout(tp=layout[0], dp=layout[1], spread_experts=layout[2])
    better = {
        "read_gb_per_s": 2000.0,
        "node": Link(gb_per_s=200, latency_us=0),
        "network": Link(gb_per_s=20, latency_us=0),
        "tflops": {"bfloat16": 200, "fp8": 400},
        "overlap": 0.5,
    }
    work = [LaneWork(rows=rows, tokens=rows, cached=rows * context, pairs=rows * context)] * layout[1]
    more = [dataclasses.replace(lane, cached=2 * lane.cached, pairs=2 * lane.pairs) for lane in work]
    plain = RooflineCosts(shape, over, ON).step(work).total
    on_better = msgspec.structs.replace(ON, **{faster: better[faster]})
    assert RooflineCosts(shape, over, on_better).step(work).total <= plain
    assert RooflineCosts(shape, over, ON).step(more).total >= plain
    assert RooflineCosts(shape, over, ON, imbalance=2.0).step(work).total >= plain


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 30),
    lanes=st.integers(1, 4),
    spread=st.floats(0, 0.9),
    rate=st.sampled_from([None, 0.5, 5.0]),
    overlap=st.booleans(),
    cache=st.sampled_from([128, 256, 4096]),
)
def test_every_request_gets_its_tokens_whatever_the_traffic(count, lanes, spread, rate, overlap, cache):
    traffic = Traffic(num_requests=count, input_len=40, output_len=12, spread=spread, rate=rate)
    limits = Limits(cache_tokens=cache, max_rows=8, max_tokens=32, overlap=overlap, **FREE_ENGINE)
    outcome = Simulation(costs=Constant(), limits=limits, traffic=traffic, num_lanes=lanes).run()
    asked = traffic.arrivals()
    assert outcome.output_tokens == sum(one.num_output for one in asked)
    assert outcome.input_tokens == sum(one.num_prompt for one in asked)
    assert len(outcome.first) == count
    assert all(wait >= 1.0 for wait in outcome.first), "a token takes a step"
    assert outcome.busy <= 1.0 + 1e-9


def test_one_request_takes_as_many_steps_as_it_has_chunks_and_tokens():
    costs = Constant()
    limits = Limits(cache_tokens=4096, max_rows=8, max_tokens=32, **FREE_ENGINE)
    traffic = Traffic(num_requests=1, input_len=80, output_len=5)
    outcome = Simulation(costs=costs, limits=limits, traffic=traffic).run()
    assert outcome.seconds == outcome.num_steps == 3 + 4
    assert outcome.first == [3.0]
    assert outcome.between == [1.0]
    assert [lanes[0].tokens for lanes in costs.seen] == [32, 32, 16, 1, 1, 1, 1]
    assert [lanes[0].cached for lanes in costs.seen] == [32, 64, 80, 81, 82, 83, 84]
    assert costs.seen[1][0].pairs == sum(range(33, 65)), "each token of a chunk sees those before it and itself"


def test_a_lane_without_work_takes_part_with_an_empty_step():
    costs = Constant()
    limits = Limits(cache_tokens=4096, max_rows=8, max_tokens=32, **FREE_ENGINE)
    traffic = Traffic(num_requests=1, input_len=8, output_len=3)
    Simulation(costs=costs, limits=limits, traffic=traffic, num_lanes=2).run()
    assert all(lanes[1] == LaneWork() for lanes in costs.seen)
    assert len(costs.seen) == 3


def test_prompts_that_were_computed_elsewhere_cost_nothing():
    costs = Constant()
    limits = Limits(cache_tokens=4096, max_rows=8, max_tokens=32, **FREE_ENGINE)
    traffic = Traffic(num_requests=1, input_len=64, output_len=4, phase="decode")
    Simulation(costs=costs, limits=limits, traffic=traffic).run()
    assert [lanes[0].tokens for lanes in costs.seen] == [0, 0, 1, 1, 1]


def test_measured_steps_take_the_roofline_s_place():
    costs = MeasuredCosts([(1, 0.010), (64, 0.020)])
    limits = Limits(cache_tokens=4096, max_rows=64, max_tokens=64, **FREE_ENGINE)
    traffic = Traffic(num_requests=1, input_len=64, output_len=5)
    outcome = Simulation(costs=costs, limits=limits, traffic=traffic).run()
    assert outcome.seconds == pytest.approx(0.020 + 4 * 0.010)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer_types": ["linear_attention"] * 32}, "linear_attention"),
        ({"layers_block_type": ["mamba"] * 32}, "mamba"),
        (
            {"architectures": ["FalconH1ForCausalLM"], "mamba_d_state": 16},
            "mamba, whose cost is not modelled; simulate",
        ),
    ],
)
def test_layers_whose_costs_nobody_knows_are_refused(tmp_path, change, says):
    with pytest.raises(ConfigError, match=says):
        shape_of(tmp_path, {**DENSE, **change})


def test_layouts_that_cannot_be_are_refused(tmp_path):
    dense, mixture = shape_of(tmp_path, DENSE), shape_of(tmp_path, MIXTURE, "fp8")
    for layout, shape, says in (
        (Layout(pp=33), dense, "pipeline_parallel_size is 33, and the model has 32 layers; give as many or fewer"),
        (Layout(dp=2, spread_experts=True), dense, "no experts"),
        (Layout(dp=512, spread_experts=True), mixture, "256 devices at most"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_layout(layout, shape)
    with pytest.raises(ConfigError, match="data_parallel_size is 0; expected 1 or more"):
        Layout(dp=0)
    with pytest.raises(ConfigError, match=r"imbalance is 0.5; expected 1 or more"):
        RooflineCosts(mixture, Layout(), ON, 0.5)
    with pytest.raises(ConfigError, match="divide them over more devices"):
        cache_tokens(Layout(), mixture, ON)


def test_the_command_prints_and_writes_its_figures(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    accelerator = tmp_path / "device.json"
    accelerator.write_bytes(msgspec.json.encode(ON))
    options = ["--accelerator", str(accelerator), "--num-requests", "4", "--output", str(tmp_path / "result.json")]
    assert main(["simulate", str(tmp_path), *options]) == 0
    assert "simulated on 1 x a device" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["simulation"] is True
    assert result["output_tokens_per_s"] > 0
    for broken, says in (("{}", "describes no accelerator"), (None, "cannot be read")):
        accelerator.write_text(broken) if broken else accelerator.unlink()
        assert main(["simulate", str(tmp_path), *options]) == 2
        assert says in capsys.readouterr().err
