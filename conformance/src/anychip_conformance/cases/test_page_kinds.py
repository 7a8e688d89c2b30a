"""Models whose layers keep something other than keys and values, through the whole engine on the device."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import msgspec

from anychip import SamplingParams
from anychip_conformance.case import kind
from anychip_conformance.device import Device
from anychip_conformance.engines import open_llm, preempt_often, prompts
from anychip_conformance.toys import TOYS

_NUM_TOKENS = 8
_HEAD_DIM = 16


class KindsCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`mode` as in e2e.greedy. `slots`: how many requests run at once."""

    toy: Literal["toy-state", "toy-latent"]
    mode: Literal["plain", "chunked", "preempted"] = "plain"
    slots: int = 8


class _Toy:
    """A toy's checkpoint, and its greedy tokens after every prompt."""

    def __init__(self, name: str) -> None:
        from anychip_conformance.equality.oracle import greedy
        from anychip_conformance.toys.checkpoint import make_toy

        self._folder = tempfile.TemporaryDirectory(prefix="anychip-toy-")
        self.path = Path(self._folder.name)
        oracle = make_toy(name, self.path)
        self.answers = [greedy(oracle, prompt, _NUM_TOKENS) for prompt in prompts()]

    def close(self) -> None:
        self._folder.cleanup()


@kind(
    "e2e.page_kinds",
    corpus=[
        KindsCase(toy="toy-state"),
        KindsCase(toy="toy-latent"),
        KindsCase(toy="toy-state", slots=2),
        KindsCase(toy="toy-state", mode="preempted"),
        KindsCase(toy="toy-state", mode="chunked"),
        KindsCase(toy="toy-latent", mode="preempted"),
        KindsCase(toy="toy-latent", mode="chunked"),
    ],
    deadline_s=180.0,
    quick=2,
)
def page_kinds(device: Device, case: KindsCase) -> None:
    """Greedy tokens are those of a plain evaluation of whole sequences, however prompts are cut and whoever shares the
    batch, and when a sequence takes the slot and the blocks of one before it."""
    from anychip_conformance.equality.oracle import judge

    caps, kinds = device.capabilities, TOYS[case.toy]
    if "state" in kinds:
        device.need("recurrence gated_sum", "gated_sum" in caps.recurrences)
    if "latent" in kinds:
        device.need("mla", caps.mla)
    if "window" in kinds:
        device.need("sliding_window", caps.sliding_window)
    device.need_dtype("float32")
    device.need("kv dtype float32", "float32" in caps.kv_dtypes)
    device.limit(f"no heads of {_HEAD_DIM} values", caps.head_dims is None or _HEAD_DIM in caps.head_dims)
    toy: _Toy = device.resources.setdefault(case.toy, None) or _Toy(case.toy)
    device.resources[case.toy] = toy
    settings = {"max_num_batched_tokens": 16} if case.mode == "chunked" else {}
    sampling = SamplingParams(temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True)
    with open_llm(device, toy.path, dtype="float32", max_num_seqs=case.slots, **settings) as llm:
        if case.mode == "preempted":
            preempt_often(llm.engine.scheduler)
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts(), sampling)]
    for prompt, answer, got in zip(prompts(), toy.answers, tokens, strict=True):
        verdict = judge(answer, got)
        assert verdict.divergence is None or verdict.excused, (
            f"prompt of {len(prompt)} tokens: got {got}, expected {answer.tokens}"
        )
