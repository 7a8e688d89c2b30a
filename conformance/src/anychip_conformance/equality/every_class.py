"""Serves a tiny checkpoint of a class of transformers on the CPU in float32, and compares greedy tokens with the
library's own generate."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from anychip import LLM, SamplingParams
from anychip.errors import AnychipError
from anychip.models.registry import NATIVE
from anychip_conformance.equality import VOCAB_SIZE
from anychip_conformance.equality.causal_classes import CausalClass, save_tiny, tiny_config
from anychip_conformance.equality.oracle import UNIT_ROUNDOFF, Answer, judge

LENGTHS = (5, 19, 40)
"""Of prompts; the last is longer than the windows."""
NUM_TOKENS = 8
_SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "skip_tokenizer": True,
    "max_model_len": 64,
    "kv_cache_bytes": 16 << 20,
}
_MOST_PARAMETERS = 100_000_000
"""A class that is larger in spite of its tiny sizes has parts of other kinds."""
_NOT_ALONE = ("gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody")
"""Drafts over another model's cache, and decoders of several streams of sound."""
_MEDIA = ("vision", "audio", "image", "video")
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

Kind = Literal["attention", "more state", "other"]
"""attention: layers keep keys and values, and nothing else. other: not a language model by itself."""
Result = Literal["equal", "differs", "refused", "fails", "not tried"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`result` "fails": an exception that is none of anychip's. `why` of one that is not equal."""

    each: CausalClass
    kind: Kind
    native: bool
    result: Result
    why: str = ""


def walk(each: CausalClass, folder: Path) -> Outcome:
    native = each.name in NATIVE
    try:
        config = tiny_config(each)
        kind = kind_of(each, config)
        if any(name.startswith(_MEDIA) for name in config.sub_configs):
            why = "it is made of several models"
            return Outcome(each=each, kind="other", native=native, result="not tried", why=why)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in each.cls(config).parameters())
        if count > _MOST_PARAMETERS:
            why = "it is made of several models"
            return Outcome(each=each, kind="other", native=native, result="not tried", why=why)
        model = save_tiny(each, folder)
    except Exception as error:  # noqa: BLE001 - whatever the library raises for its own class is what is told
        why = f"no tiny checkpoint: {type(error).__name__}: {_first_line(error)}"
        return Outcome(each=each, kind=_kind_by_class(each), native=native, result="not tried", why=why)
    try:
        served = _served(folder)
    except AnychipError as error:
        why = _first_line(error).replace(f"{folder}/", "")
        return Outcome(each=each, kind=kind, native=native, result="refused", why=why)
    except Exception as error:  # noqa: BLE001 - that none leaves loading is what is looked for
        why = f"{type(error).__name__}: {_first_line(error)}"
        return Outcome(each=each, kind=kind, native=native, result="fails", why=why)
    for answer, tokens in zip((_generated(model, prompt) for prompt in prompts()), served, strict=True):
        verdict = judge(answer, tokens)
        if verdict.divergence is not None and not verdict.excused:
            why = f"{tokens} in place of {answer.tokens}"
            return Outcome(each=each, kind=kind, native=native, result="differs", why=why)
    return Outcome(each=each, kind=kind, native=native, result="equal")


def kind_of(each: CausalClass, config: Any) -> Kind:
    if {*(getattr(config, "layer_types", None) or ())} - _ATTENTION:
        return "more state"
    return _kind_by_class(each)


def _kind_by_class(each: CausalClass) -> Kind:
    if getattr(each.cls, "_is_stateful", False):
        return "more state"
    return "other" if each.name.endswith("ForConditionalGeneration") or each.model_type in _NOT_ALONE else "attention"


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def _served(folder: Path) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(str(folder), **_SETTINGS) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(prompts(), sampling)]


@torch.inference_mode()
def _generated(model: PreTrainedModel, prompt: list[int]) -> Answer:
    """Without a cache: the library's caches cut what they keep by other rules than some classes' masks."""
    ids = torch.tensor([prompt])
    made: Any = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        use_cache=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answer = Answer(made.sequences[0, len(prompt) :].tolist(), [], [])
    config = model.config
    growth = 2 * getattr(config, "num_hidden_layers", 4) * getattr(config, "hidden_size", 64) * UNIT_ROUNDOFF
    for logits in made.logits:
        best = logits[0].float().topk(2).values
        answer.margins.append(float(best[0] - best[1]))
        answer.bounds.append(growth * float(logits.abs().max()))
    return answer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
