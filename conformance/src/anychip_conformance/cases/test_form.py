"""Form: every op and kernel over views that the interface allows (plugin_api/ops.py), with other values around them."""

from __future__ import annotations

from anychip_conformance.case import kind
from anychip_conformance.cases import (
    test_adapters,
    test_attention,
    test_attention_lse,
    test_attention_scores,
    test_attention_storage,
    test_encoder,
    test_kv,
    test_latent,
    test_linear,
    test_moe,
    test_ops,
    test_ops_drafts,
    test_recurrences,
    test_sampling,
    test_states,
)
from anychip_conformance.device import Device
from anychip_conformance.form_checks import FormCase, check_formed, every_form, formed, kinds_of

OPS = formed([*kinds_of(test_ops, test_ops_drafts), test_adapters.low_rank], most=9)
SAMPLING = formed(kinds_of(test_sampling))
ATTENTION = formed(
    kinds_of(
        test_attention,
        test_attention_scores,
        test_attention_storage,
        besides=[test_attention.refused, test_attention_scores.long],
    )
)
LINEAR = formed([test_linear.dense, test_linear.epilogue, test_linear.adopt], most=4)
QUANTIZED = formed([test_linear.quantized, test_linear.formats], most=40)
EXPERTS = formed([test_moe.route, test_moe.experts, test_moe.expert_map, test_moe.local_experts], most=7)


@kind("op.form", corpus=every_form(), quick=6)
def op_form(device: Device, case: FormCase) -> None:
    """Every op over views of activations, logits and arrays by row: what lies between and around takes no part."""
    check_formed(device, OPS, case)


@kind("sample.form", corpus=every_form("any"), quick=6)
def sample_form(device: Device, case: FormCase) -> None:
    """Draws over logits whose rows lie apart, and parameters by row at any offset."""
    check_formed(device, SAMPLING, case)


@kind("attn.form", corpus=every_form(), quick=1)
def attention_form(device: Device, case: FormCase) -> None:
    """Every feature of attention over views: queries, keys and values, block tables, slots, lengths, positions."""
    check_formed(device, ATTENTION, case)


@kind("attn.form_lse", corpus=every_form("any"), quick=0)
def attention_lse_form(device: Device, case: FormCase) -> None:
    """The same with the log-sum-exp."""
    check_formed(device, formed([test_attention_lse.log_sum_exp]), case)


@kind("latent.form", corpus=every_form("any"), quick=1)
def latent_form(device: Device, case: FormCase) -> None:
    """Latent attention over views of what its projections gave."""
    check_formed(device, formed([test_latent.attend], most=7), case)


@kind("state.form", corpus=every_form("any"), quick=1)
def state_form(device: Device, case: FormCase) -> None:
    """Every recurrence over views of its inputs."""
    check_formed(device, formed([test_states.advance, test_recurrences.recurrence], most=40), case)


@kind("encoder.form", corpus=every_form("any"), quick=1)
def encoder_form(device: Device, case: FormCase) -> None:
    """Attention of encoders over views."""
    check_formed(device, formed([test_encoder.attend], most=5), case)


@kind("kv.form", corpus=every_form(), quick=1)
def kv_form(device: Device, case: FormCase) -> None:
    """Writes to the cache from views, padding and long runs among them."""
    check_formed(device, formed([test_kv.padding_slot, test_kv.write_order]), case)


@kind("linear.form", corpus=every_form(), quick=1)
def linear_form(device: Device, case: FormCase) -> None:
    """Dense products of views, with and without an epilogue, into views."""
    check_formed(device, LINEAR, case)


@kind("linear.form_quantized", profile="quantization", corpus=every_form())
def quantized_form(device: Device, case: FormCase) -> None:
    """Products of views in every quantization scheme."""
    check_formed(device, QUANTIZED, case)


@kind("moe.form", corpus=every_form(), quick=1)
def moe_form(device: Device, case: FormCase) -> None:
    """Routing and experts over views of activations and of router logits, into views."""
    check_formed(device, EXPERTS, case)
