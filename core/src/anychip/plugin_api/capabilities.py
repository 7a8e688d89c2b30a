"""What a device can do, declared once and typed. Core asks these and never a name.

A declared capability that fails a conformance case is a failure; an undeclared one is refused by its factory.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from anychip.plugin_api.quantization import SCHEMES
from anychip.types import DType
from anychip.worker_report import DeviceRules


class GraphLevel(enum.IntEnum):
    """NONE: eager. PIECEWISE: what lies between attention calls is captured. FULL: a whole step."""

    NONE = 0
    PIECEWISE = 1
    FULL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Defaults describe the reference ops on a host CPU, which every platform starts from."""

    dtypes: frozenset[DType] = frozenset({"float32", "bfloat16"})
    slot_dtype: Literal["int32", "int64"] = "int64"
    max_slots: int | None = None
    """Most token slots (blocks x block size) that one cache may address; None: as many as memory holds."""
    head_dims: frozenset[int] | None = None
    """None: any."""
    block_sizes: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Block sizes the attention kernels take, the preferred one first."""
    kv_dtypes: frozenset[DType] = frozenset({"float32", "bfloat16", "float8_e4m3fn", "int8"})
    """Of the KV cache; one byte wide, with the scales that AttentionLayer carries."""
    quantization: frozenset[str] = SCHEMES
    """Names of QuantSchemes that the linear and MoE kernels take; what is not among them is refused at the start. A
    name says what happens to activations too: "int8" and "int8-w8a8", "fp8-w8a16" and "fp8" are declared apart."""
    epilogues: frozenset[str] = frozenset()
    """Activations that dense products apply themselves, where asked: LinearSpec.epilogue."""
    sliding_window: bool = True
    softcap: bool = True
    alibi: bool = True
    sinks: bool = True
    attention_lse: bool = False
    """Whether AttentionSpec.lse is served: attention over some of the keys, to be merged with attention over others."""
    mla: bool = False
    """Whether LatentSpec is served: attention over one row per token that all heads share."""
    latent_kv_dtypes: frozenset[DType] = frozenset()
    """Of kv_dtypes, those one byte wide that latent rows may have: without scales, and without index keys."""
    sparse_latent: bool = False
    """Whether LatentSpec is served with index keys, by which queries choose the tokens that they attend to."""
    ungated_experts: bool = False
    """Whether MoESpec is served with an activation that has no gate."""
    recurrences: frozenset[str] = frozenset()
    """Names of RECURRENCES that state layers may have."""
    encoders: bool = False
    """Whether EncoderSpec is served: attention of all tokens of a sequence over each other."""
    kv_write: Literal["in_place", "functional"] = "in_place"
    """functional: writing keys and values gives a new cache, and far block ids are not judged."""
    host_lengths: Literal["none", "upper_bound", "exact"] = "none"
    """What the attention plan needs of sequence lengths on the host."""
    padding: Literal["zero_rows", "dummy_request"] = "zero_rows"
    """Whether a padded row has no query, or one query token of its own on the null block."""
    stale_kv: Literal["any", "must_be_finite"] = "any"
    """must_be_finite: blocks are zeroed before reuse, since masked values still enter products."""
    seeded_sampling: bool = True
    reload: Literal["inplace", "repack", "none"] = "inplace"
    """Whether LinearKernel.update and FusedMoE.update write new weights where the old ones lie."""
    graph_level: GraphLevel = GraphLevel.NONE
    collectives: Literal["runtime", "compiler", "none"] = "none"
    streams: bool = False
    batch_invariant: bool = False
    lora: bool = False
    """Whether steps may have adapters: the op add_low_rank is right here, and a step program implements `adapt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRules:
    """Limits of one step that no policy may break. None: no limit beyond the configuration's.

    `mix_prefill_decode` False: either every row of a step computes one token, or every row computes more. The kind goes
    by the tokens, not by the request's history: where a prefix hit or a fork leaves one token of a prompt, that row
    runs with those that decode. A step of one-token rows runs when no row of more tokens can.
    `chunk_multiple`: a prefill chunk that is not the prompt's last has a multiple of this many tokens.
    `max_padded_tokens`: num_rows x longest row, for devices that compute a rectangle.
    """

    mix_prefill_decode: bool = True
    max_prefills: int | None = None
    chunk_multiple: int = 1
    max_tokens: int | None = None
    max_rows: int | None = None
    max_padded_tokens: int | None = None

    @property
    def takes_drafts(self) -> bool:
        """Whether a step may hold rows with drafted tokens beside others: such a row computes several tokens, and the
        next one a single token."""
        return self.mix_prefill_decode and self.max_prefills != 0

    def broken_by(self, counts: Sequence[int]) -> str:
        """The rule that a step of so many tokens by row breaks; "": none. `chunk_multiple` depends on what is left of a
        prompt, and is not looked at."""
        prefills = sum(count > 1 for count in counts)
        if not self.mix_prefill_decode and 0 < prefills < len(counts):
            return f"mix_prefill_decode is False, and {prefills} of {len(counts)} rows have more than one token"
        padded = len(counts) * max(counts)
        for name, value, most in (
            ("max_tokens", sum(counts), self.max_tokens),
            ("max_rows", len(counts), self.max_rows),
            ("max_padded_tokens", padded, self.max_padded_tokens),
            ("max_prefills", prefills, self.max_prefills),
        ):
            if most is not None and value > most:
                return f"{name} is {most}, and the step has {value}"
        return ""

    def for_device(self, capabilities: Capabilities) -> DeviceRules:
        """The same limits in the form that crosses processes."""
        return DeviceRules(
            mix_prefill_decode=self.mix_prefill_decode,
            max_prefills=self.max_prefills,
            chunk_multiple=self.chunk_multiple,
            max_tokens=self.max_tokens,
            max_rows=self.max_rows,
            max_padded_tokens=self.max_padded_tokens,
            zero_new_blocks=capabilities.stale_kv == "must_be_finite",
            max_slots=capabilities.max_slots,
            takes_drafts=self.takes_drafts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """What the configuration asks of a step program or a shape policy."""

    max_num_tokens: int
    max_num_reqs: int
    max_model_len: int
    max_slots: int
    """Rows of the persistent batch: the highest slot id is max_slots - 1."""
    max_drafts: int = 0
    """Most tokens that are drafted behind a row's last one: a row has one sample more at most. 0: none ever are."""
    max_pages: tuple[int, ...] = field(default=())
    """By KV group: blocks of the longest request."""
    taps: tuple[int, ...] = ()
    """Layers behind which a step with the feature TAPS shows hidden states: 0 is the first, and -1 stands for the final
    norm. (): no step ever does."""
    pools: bool = False
    """Whether steps may have the feature POOLED."""
    max_embeddings: int = 0
    """Rows of the buffer of embeddings. 0: no step has the feature EMBEDDINGS."""
    mrope: bool = False
    """Whether steps may have the feature MROPE: the model's rotary embedding has sections."""
    max_adapters: int = 0
    """Slots for adapters. 0: no step has the feature ADAPTERS."""
    max_adapter_rank: int = 0
    """The largest rank that an adapter may have."""
    segments: bool = False
    """Whether steps may have the feature SEGMENTS: the model embeds which text of a pair a token belongs to."""
