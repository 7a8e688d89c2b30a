"""Shapes of a step, graphs captured for them, and compilers that are asked for a region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anychip.errors import Unsupported
from anychip.plugin_api.capabilities import GraphLevel, StepLimits
from anychip.plugin_api.plan import Plan, Recorder

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.plugin_api.communicator import Communicator

SCORES = "scores"
"""Feature of a forward pass: some of its tokens ask for the log-probability of the token that follows them."""

TAPS, POOLED, EMBEDDINGS, MROPE, SEGMENTS = "taps", "pooled", "embeddings", "mrope", "segments"
"""More features of a forward pass: hidden states of some tokens behind some layers are wanted, the sum of final hidden
states by row, some tokens take rows of the buffer of embeddings, rotary positions have three axes, some rows are pairs
of texts whose tokens say which text is theirs."""

ADAPTERS = "adapters"
"""One more: some tokens have an adapter."""

LOGPROBS, MASKS, EDITS, DRAFTS = "logprobs", "masks", "edits", "drafts"
"""Features of a sampling: some of its samples ask for log-probabilities, have a mask, have penalties or biases, are
followed by a drafted token."""


def sampling_features(max_drafts: int = 0) -> list[tuple[str, ...]]:
    """Every combination that a sampling may need beyond the plain draw, in the order that ShapeKey.features has: what
    a device that compiles ahead must prepare for each number of samples. `max_drafts` as StepLimits has it."""
    return [
        tuple(feature for feature in (logprobs, masks, edits, drafts) if feature)
        for drafts in (("", DRAFTS) if max_drafts else ("",))
        for logprobs in ("", LOGPROBS)
        for masks in ("", MASKS)
        for edits in ("", EDITS)
    ]


def forward_features(limits: StepLimits) -> list[tuple[str, ...]]:
    """Every combination that a forward pass may need under these limits, in the order that ShapeKey.features has: what
    a device that compiles ahead must prepare for each shape."""
    possible = {
        SCORES: True, TAPS: bool(limits.taps), POOLED: limits.pools, EMBEDDINGS: limits.max_embeddings > 0,
        MROPE: limits.mrope, SEGMENTS: limits.segments, ADAPTERS: limits.max_adapters > 0,
    }  # fmt: skip
    found: list[tuple[str, ...]] = [()]
    for feature in (feature for feature, may_be in possible.items() if may_be):
        found += [(*others, feature) for others in found]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeKey:
    """The padded sizes of a step. Steps of one key run the same program. 0 pages or query length: unbounded.

    A row is a request. A sample is a token of a row behind which a token is drawn: a row has none while its prompt is
    computed in chunks, one when its last known token is computed, and one more for each token drafted behind that. A
    step without samples has room for one.
    """

    num_tokens: int
    num_reqs: int
    num_samples: int
    max_query_len: int
    num_pages: int
    features: tuple[str, ...] = ()


class ShapePolicy:
    """Which shapes a device runs. This one is `dynamic`: every step keeps its own sizes."""

    _keys: Sequence[ShapeKey] = ()
    _pieces: Sequence[int] = ()

    def keys(self) -> Sequence[ShapeKey]:
        """Shapes to prepare before the first request; empty: none."""
        return self._keys

    def pieces(self) -> Sequence[int]:
        """Numbers of tokens for which what lies between attention calls may be captured: `bucket` gives them to steps
        that no key of `keys` holds. Empty: such steps run eagerly."""
        return self._pieces

    def bucket(
        self,
        *,
        num_tokens: int,
        num_reqs: int,
        num_samples: int,
        max_query_len: int,
        num_pages: int,
        features: tuple[str, ...],
    ) -> ShapeKey:
        """The smallest shape that holds a step. Core asks for steps that obey StepRules and StepLimits: no more rows,
        tokens, samples in a row, padded tokens (rows times the longest) or tokens in a row than they allow. A policy
        has a shape for each of those, and may raise for others."""
        return ShapeKey(
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_samples=num_samples,
            max_query_len=max_query_len,
            num_pages=num_pages,
            features=features,
        )


class CapturedShapes(ShapePolicy):
    """Steps in which every row has one token come in a few shapes, `keys`, each with a graph: plain, with taps or with
    adapters. Others are filled up to a few numbers of tokens, `pieces`, as far as those go; larger ones keep their
    sizes. The keys are in order of size, and the numbers of tokens rise."""

    captured: tuple[tuple[str, ...], ...] = ((), (TAPS,), (ADAPTERS,))
    """Features of steps that have graphs."""

    def __init__(self, keys: Sequence[ShapeKey], pieces: Sequence[int]) -> None:
        self._keys, self._pieces = keys, pieces

    def bucket(
        self,
        *,
        num_tokens: int,
        num_reqs: int,
        num_samples: int,
        max_query_len: int,
        num_pages: int,
        features: tuple[str, ...],
    ) -> ShapeKey:
        if max_query_len == 1 and features in self.captured:
            for key in self._keys:
                if num_reqs <= key.num_reqs and num_pages <= key.num_pages:
                    return replace(key, features=features) if features else key
        return super().bucket(
            num_tokens=next((count for count in self._pieces if count >= num_tokens), num_tokens),
            num_reqs=num_reqs,
            num_samples=num_samples,
            max_query_len=max_query_len,
            num_pages=num_pages,
            features=features,
        )


PlannedCall = Callable[[Sequence[Any], "Tensor | None"], "Tensor"]
"""An attention call under a step's plans, by KV group, into a tensor or a new one."""

RunOutsideGraph = Callable[[PlannedCall], "Tensor"]
"""Takes a call out of a capture: the call runs now, and at every replay with that step's plans. Returns the tensor that
the next piece reads."""


@dataclass(slots=True)
class EagerCall:
    """A call that runs eagerly between two captured pieces, and the tensor that receives its result at every replay."""

    call: PlannedCall
    out: Tensor

    def __call__(self, plans: Sequence[Plan]) -> None:
        result = self.call(plans, self.out)
        if result.data_ptr() != self.out.data_ptr():  # a backend may ignore `out`
            self.out.copy_(result)


class GraphCapture:
    """Captures a callable over fixed storage and replays it. The base class captures nothing."""

    level = GraphLevel.NONE
    lazy = False
    """Whether a shape is captured when a step first has it, instead of at the start."""
    collectives = True
    """Whether what is captured may hold collectives; without, ranks that exchange values run eagerly."""
    draws = False
    """Whether what is drawn from a captured step's logits is captured as well."""

    def reserve(self, keys: Sequence[ShapeKey], pieces: Sequence[int] = ()) -> int:
        """Bytes that capturing `keys`, and so many tokens in pieces, will need."""
        return 0

    def affordable(self, keys: Sequence[ShapeKey], budget: int) -> Sequence[ShapeKey]:
        """The keys worth capturing within a budget of bytes, in order of use."""
        return keys

    def capture(
        self,
        fn: Callable[[], Any],
        key: ShapeKey,
        *,
        recorder: Recorder | None = None,
        communicators: Sequence[Communicator] = (),
    ) -> Any:
        """Records what fn does; returns a handle. fn reads and writes storage that outlives the call. Collectives of
        `communicators` in fn run again at every replay; fn reads no value on the host and brings none from there.
        Raises Unsupported for an fn that holds what cannot be recorded: such steps run eagerly."""
        raise Unsupported("graph capture", ["the platform captures no graphs"])

    def run(self, handle: Any, plans: Sequence[Plan]) -> Any:
        """Replays: owns order and streams, and renews the arguments that the recorder lists. Returns what fn
        returned at capture, rewritten in place."""
        raise Unsupported("graph capture", ["the platform captures no graphs"])

    def capture_pieces(
        self,
        fn: Callable[[RunOutsideGraph], Any],
        plans: Sequence[Plan],
        num_tokens: int,
        *,
        communicators: Sequence[Communicator] = (),
    ) -> Any:
        """Records what fn does in pieces; returns a handle. The calls that fn hands to its RunOutsideGraph are not
        recorded: they run under `plans`. What is recorded depends on the number of tokens alone. Raises as `capture`
        does."""
        raise Unsupported("graph capture", ["the platform captures no pieces"])

    def run_pieces(self, handle: Any, plans: Sequence[Plan]) -> Any:
        """Replays the pieces and makes the calls between them; returns what fn returned, rewritten in place."""
        raise Unsupported("graph capture", ["the platform captures no pieces"])


class RegionCompiler:
    """A compiler for a callable region, as an option; kept where it measures faster than hand-fused kernels."""

    def compile(self, fn: Callable[..., Any], *, name: str) -> Callable[..., Any]:
        return fn
