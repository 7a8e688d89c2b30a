"""Row calls of products, experts and draws."""

from __future__ import annotations

from torch import Tensor

from anychip.plugin_api import Routing
from anychip_conformance.cases import test_linear, test_moe, test_sampling
from anychip_conformance.cases.test_linear import LinearCase
from anychip_conformance.cases.test_moe import MoECase
from anychip_conformance.cases.test_sampling import SampleCase
from anychip_conformance.device import Device
from anychip_conformance.row_calls import Given, RowCall, each


def linear_call(device: Device, case: LinearCase) -> RowCall:
    loaded = test_linear.Loaded(device, case)
    return RowCall(
        {"x": loaded.inputs(case.tokens)},
        lambda g: {"product": loaded.kernel.apply(g["x"], loaded.packed)},
        each(case.tokens),
    )


def experts_call(device: Device, case: MoECase) -> RowCall:
    """Who goes to which expert is fixed: inputs are activations, and what shared experts gave."""
    loaded = test_moe.Loaded(device, case)
    x, logits, bias = loaded.inputs()
    inputs = {"x": x}
    if case.shared:
        inputs["shared"] = x.flip(0).contiguous()

    def run(g: Given) -> dict[str, Tensor]:
        found = loaded.kernel.apply(
            g["x"], logits, loaded.packed, router_bias=bias, shared=g.get("shared"), expert_map=loaded.expert_map
        )
        return {"output": found}

    return RowCall(inputs, run, each(case.tokens))


def routing_call(device: Device, case: MoECase) -> RowCall:
    kernel = test_moe.kernel_for(device, case)
    logits, bias = test_moe.router_inputs(device, case)

    def run(g: Given) -> dict[str, Tensor]:
        routing: Routing = kernel.route(g["logits"], bias)
        return {"weights": routing.weights, "experts": routing.expert_ids}

    return RowCall({"logits": logits}, run, each(case.tokens), ids={"experts": case.experts})


def draw_call(device: Device, case: SampleCase, *, all_greedy: bool = False) -> RowCall:
    given, logits = test_sampling.arguments(device, case), test_sampling.logits_of(device, case)

    def run(g: Given) -> dict[str, Tensor]:
        return {"ids": device.ops.ops.sample(logits=g["logits"], all_greedy=all_greedy, **given)}

    return RowCall({"logits": logits}, run, each(case.rows), ids={"ids": case.vocab})
