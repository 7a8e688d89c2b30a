"""Every setting of an engine, validated when it is made and frozen afterwards. Reads no environment variable.

"auto" values are resolved once, into a new object, where what they depend on is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from anychip.errors import ConfigError
from anychip.parallel_sizes import ParallelSizes, check_contexts, check_lanes, check_nodes, check_stages
from anychip.types import DTYPES, QUICKSTART

_HOST_ROWS, _HOST_TOKENS = 128, 2048
"""Limits of a step where nobody gives any: what a host's cores are busy with for long enough."""

_MOST_DRAFTS = 64
"""Behind one sequence in one step: longer runs are hardly ever drawn, and each row's logits are set aside for them."""

_DRAFT, _HEAD, _MEDUSA, _MTP = "draft:", "eagle:", "medusa:", "mtp"

_MOST_ADAPTERS = 16
"""Slots for adapters where nobody says how many."""
ADAPTER_TARGETS = ("products", "experts", "embeddings", "head", "magnitudes")
"""What adapters may change: products of attention and feed-forward blocks, experts, the token embedding, the output
head, and the magnitudes of products' rows (DoRA)."""
LEAST_ADAPTER_RANK = 16
"""What a slot has room for where nobody says, and no adapter has more."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine runs and how. Sizes are in tokens, sequences or bytes; None means that anychip chooses.

    Raises ConfigError at construction when a value, or a pair of values, cannot be.
    """

    model: str = QUICKSTART
    served_model_name: str | None = None
    tokenizer: str | None = None
    skip_tokenizer: bool = False
    chat_template: str | None = None
    device: str = "auto"
    device_options: dict[str, str] = {}
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    model_impl: Literal["auto", "native", "transformers"] = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    generation_config: Literal["auto", "none"] = "auto"
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    num_kv_blocks: int | None = None
    kv_cache_bytes: int | None = None
    memory_fraction: float = 0.9
    prefix_caching: bool = True
    overlap: bool = True
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    """Stages of whole layers, each on ranks of its own."""
    pipeline_layers: tuple[int, ...] = ()
    """Layers of each stage, the first stage's first; (): what balances the stages."""
    data_parallel_size: int = 1
    """Lanes: groups of tensor_parallel_size ranks with requests and a KV cache of their own, to which sizes apply."""
    context_parallel_size: int = 1
    """Ranks over which the keys and values of each sequence lie, block by block."""
    expert_parallel: bool = False
    """Whether ranks hold whole experts, instead of a share of every expert's features."""
    eplb_interval: int | None = None
    """Steps between looks at the load of the experts, after which some move to other ranks; None: they stay."""
    num_redundant_experts: int = 0
    """Slots for experts beyond one for each, over all ranks: a busy expert is held by several."""
    executor: Literal["auto", "inline", "multiprocess", "ray"] = "auto"
    nodes: tuple[str, ...] = ()
    """Hosts that share the ranks, this one first: its name or address is where the others find it."""
    node_port: int = 7345
    cluster_key: str | None = None
    """A file with the secret that all hosts have."""
    speculate: str | None = None
    """What drafts tokens: ngram, suffix, auto, draft:MODEL, eagle:HEAD, medusa:HEADS, mtp, a plugin's; None: none."""
    max_drafts: int = 8
    """Most tokens that are drafted behind a sequence in one step."""
    task: Literal["auto", "generate", "embed", "classify", "score", "reward"] = "auto"
    """What the model serves; "auto": as its files say."""
    vector_pooling: Literal["last", "mean", "cls"] | None = None
    """How vectors are made of hidden states, where the files do not say."""
    vector_dimensions: tuple[int, ...] = ()
    """Sizes to which vectors may be cut, where the files do not say."""
    pooling: bool = False
    """Whether requests for vectors are served beside those for text."""
    max_embeddings: int = 0
    """Prompt tokens that may bring embeddings of their own at once, over all requests that run."""
    taps: tuple[int, ...] = ()
    """Layers whose hidden states the workers can show: 0 is the first, -1 is behind the final norm."""
    adapters: dict[str, str] = {}
    """Folders of adapters in PEFT's form, by the name that requests give as their model."""
    max_adapters: int | None = None
    """Adapters that the requests of one step may have between them; None: as many as `adapters`, up to 16."""
    max_adapter_rank: int | None = None
    """The largest rank that an adapter may have; None: that of `adapters`, and 16 at least."""
    adapter_targets: tuple[str, ...] | None = None
    """What adapters may change, of ADAPTER_TARGETS; None: products, and what `adapters` change."""
    policy: str = "fcfs"
    max_waiting: int = 4096
    max_waiting_tokens: int = 4_000_000
    max_queue_s: float | None = None
    """Refuse a request whose wait, at the rate of the last seconds, would be longer."""
    grammar_timeout_s: float = 1.0
    seed: int = 0
    require_native: bool = False
    timeout_s: float = 120.0
    """The longest that ranks wait for one another."""
    start_timeout_s: float = 600.0
    """The longest that a start may go without progress, such as weights that are read."""
    step_timeout_s: float | None = None
    """The longest that a step may take; None: by the times of steps of similar size, 30 s or more."""

    def __post_init__(self) -> None:
        at_least = {
            "max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 2, "block_size": 1, "num_kv_blocks": 2,
            "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1,
            "context_parallel_size": 1, "kv_cache_bytes": 1,
            "max_waiting": 1, "max_waiting_tokens": 1, "max_drafts": 1, "max_adapters": 0, "max_adapter_rank": 1,
            "eplb_interval": 1, "num_redundant_experts": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; expected {least} or more")
        if self.max_drafts > _MOST_DRAFTS:
            raise ConfigError(f"max_drafts is {self.max_drafts}; expected {_MOST_DRAFTS} or less")
        if self.adapters and self.max_adapters == 0:
            raise ConfigError("max_adapters is 0 and adapters are given; leave max_adapters out, or the adapters")
        for target in self.adapter_targets or ():
            if target not in ADAPTER_TARGETS:
                raise ConfigError(f"adapter_targets has {target!r}; known are {', '.join(ADAPTER_TARGETS)}")
        if self.max_embeddings < 0:
            raise ConfigError(f"max_embeddings is {self.max_embeddings}; expected 0 or more")
        for name in ("timeout_s", "start_timeout_s", "step_timeout_s"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise ConfigError(f"{name} is {seconds}; expected seconds above 0")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction is {self.memory_fraction}; expected above 0, up to 1")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; expected auto or one of {', '.join(DTYPES)}")
        if self.num_kv_blocks is not None and self.kv_cache_bytes is not None:
            raise ConfigError("num_kv_blocks and kv_cache_bytes both size the KV cache; give one")
        self._check_ranks()
        self._check_experts()
        self._check_alone()

    def _check_ranks(self) -> None:
        """Raises ConfigError for ranks that no engine can have, or that its hosts cannot share."""
        sizes = self.parallel_sizes
        if self.executor == "inline" and sizes.num_ranks > 1:
            raise ConfigError(f"executor inline drives one worker, and {sizes} are several; use executor multiprocess")
        check_stages(sizes, self.pipeline_layers, {"speculate": self.speculate is not None, "taps": bool(self.taps)})
        check_lanes(sizes, {"speculate": self.speculate is not None})
        check_contexts(sizes, self.speculate if self.drafts_in_workers else None)
        if not self.nodes:
            return
        if self.executor in ("inline", "ray"):
            raise ConfigError(f"executor {self.executor} has no use for nodes; leave one of them out")
        if self.cluster_key is None:
            raise ConfigError("nodes takes a cluster_key: whoever reaches the port could join; `openssl rand -hex 32`")
        check_nodes(sizes, self.nodes)

    def _check_experts(self) -> None:
        """Raises ConfigError for experts that are to be spread or to move, and cannot."""
        if self.expert_parallel and self.pipeline_parallel_size > 1:
            raise ConfigError(
                f"expert_parallel with pipeline_parallel_size {self.pipeline_parallel_size}: experts lie over the "
                "ranks of a model in one stage; leave one of them out"
            )
        if self.eplb_interval is not None and not self.expert_parallel:
            raise ConfigError("eplb_interval moves experts between ranks, which takes expert_parallel; give both")
        if self.num_redundant_experts and self.eplb_interval is None:
            raise ConfigError(
                "num_redundant_experts are slots that the balance of load fills; give an eplb_interval, such as 3000"
            )

    def _check_alone(self) -> None:
        """Raises ConfigError for a setting that does nothing, as what it is a setting of is not asked for."""
        without_slots = not self.resolved_max_adapters
        without = {
            "max_adapter_rank": (self.max_adapter_rank is not None and without_slots, "adapters, or max_adapters"),
            "adapter_targets": (self.adapter_targets is not None and without_slots, "adapters, or max_adapters"),
            "cluster_key": (self.cluster_key is not None and not self.nodes, "nodes"),
        }
        for name, (useless, needed) in without.items():
            if useless:
                raise ConfigError(f"{name} does nothing alone; give {needed} beside it, or leave it out")

    @property
    def parallel_sizes(self) -> ParallelSizes:
        """How many ranks share the model, and along which axes."""
        return ParallelSizes(
            pp=self.pipeline_parallel_size,
            dp=self.data_parallel_size,
            cp=self.context_parallel_size,
            tp=self.tensor_parallel_size,
        )

    @property
    def lanes_meet(self) -> bool:
        """Whether ranks of all lanes meet in every step: experts are spread over them."""
        return self.expert_parallel and self.data_parallel_size > 1

    @property
    def tokens_travel(self) -> bool:
        """Whether tokens are sent to the ranks of their experts."""
        return self.lanes_meet or self.eplb_interval is not None

    @property
    def public_name(self) -> str:
        """What clients call the model: of a folder or a file, its name, and never where it lies."""
        if self.served_model_name is not None:
            return self.served_model_name
        path = Path(self.model).expanduser()
        return path.resolve().name or self.model if path.exists() else self.model

    @property
    def resolved_max_num_seqs(self) -> int:
        """Rows that a step may have: max_num_seqs, or a host's default if neither the user nor the plugin sets it."""
        return self.max_num_seqs or _HOST_ROWS

    @property
    def resolved_max_num_batched_tokens(self) -> int:
        """Tokens that a step may compute: max_num_batched_tokens, or the default for a host if nobody sets it."""
        return self.max_num_batched_tokens or _HOST_TOKENS

    @property
    def resolved_max_adapters(self) -> int:
        """Slots for adapters on the device."""
        return min(len(self.adapters), _MOST_ADAPTERS) if self.max_adapters is None else self.max_adapters

    @property
    def resolved_max_adapter_rank(self) -> int:
        """The rank that a slot has room for. Where adapters are given, `adapter_files.with_room` has filled it."""
        return self.max_adapter_rank or LEAST_ADAPTER_RANK

    @property
    def resolved_adapter_targets(self) -> frozenset[str]:
        """What slots have room for; products always. Empty: there are no slots."""
        return frozenset(("products", *(self.adapter_targets or ()))) if self.resolved_max_adapters else frozenset()

    @property
    def draft_model(self) -> str | None:
        """The model that drafts, where one does: folder, repository or the embedded one."""
        return _named(self.speculate, _DRAFT)

    @property
    def draft_head(self) -> str | None:
        """The head that drafts from the model's hidden states, where one does: folder or repository."""
        return _named(self.speculate, _HEAD)

    @property
    def medusa_heads(self) -> str | None:
        """The Medusa heads that draft, where some do: folder or repository."""
        return _named(self.speculate, _MEDUSA)

    @property
    def own_head(self) -> bool:
        """Whether the head drafts that the checkpoint has for itself."""
        return self.speculate == _MTP

    @property
    def drafts_in_workers(self) -> bool:
        """Whether what drafts runs on the device."""
        return self.own_head or any(each is not None for each in (self.draft_model, self.draft_head, self.medusa_heads))

    @property
    def max_in_flight(self) -> int:
        """Steps between launch and result: one for each stage of the pipeline, and one more that lets scheduling run
        under the devices' work."""
        return self.pipeline_parallel_size + (1 if self.overlap else 0)


def _named(speculate: str | None, kind: str) -> str | None:
    return speculate.removeprefix(kind) if speculate and speculate.startswith(kind) else None
