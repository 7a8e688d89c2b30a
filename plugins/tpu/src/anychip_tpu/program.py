"""The step program: core's model compiled once for each shape, and run over donated state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import EditState
from anychip.plugin_api import (
    DRAFTS,
    LOGPROBS,
    MASKS,
    MAX_BIASES,
    SCORES,
    CompileReport,
    EmbeddingRows,
    EnteringRow,
    HostOutputs,
    KVPlan,
    Mesh,
    ModelSource,
    SamplingInputs,
    Scores,
    ShapeKey,
    StepInputs,
    StepLimits,
    StepProgram,
)
from anychip.plugin_api.step_layout import arena_size, array_views, mask_words, sampling_layout
from anychip_tpu.attention import PagedAttention
from anychip_tpu.compiled import EMBEDDINGS_AT_ONCE, FULL, Compiler, Draw, State, draws
from anychip_tpu.edits import turns
from anychip_tpu.progress import compiling
from anychip_tpu.runtimes import Program, Runtime
from anychip_tpu.shapes import BucketedShapes


@dataclass(frozen=True, slots=True)
class Hidden:
    logits: Tensor  # [num_samples, vocab_size] float32
    slots: np.ndarray  # [num_samples], of the host
    scores: tuple[Tensor, ...]
    pooled: list[Tensor]
    taps: tuple[Tensor, ...]
    targets: np.ndarray | None


@dataclass(frozen=True, slots=True)
class TpuOutputs:
    """plugin_api.StepOutputs of buffers that are being computed: `drawn` by field of HostOutputs."""

    runtime: Runtime
    drawn: dict[str, Tensor]
    num_samples: int
    hidden: Hidden

    def fetch(self) -> HostOutputs:
        hidden = self.hidden
        fetched = self.runtime.fetch([*self.drawn.values(), *hidden.scores, *hidden.pooled])
        arrays = iter([tensor.numpy() for tensor in fetched])
        found = {name: next(arrays)[: self.num_samples] for name in self.drawn}
        scores = None
        if hidden.scores and hidden.targets is not None:
            logprobs, top_ids, top = (next(arrays)[hidden.targets >= 0] for _ in hidden.scores)
            scores = Scores(logprobs=logprobs, top_ids=top_ids, top_logprobs=top)
        return HostOutputs(**found, scores=scores, pooled=next(arrays) if hidden.pooled else None)


class TpuStepProgram(StepProgram):
    def __init__(
        self, source: ModelSource, kv: KVPlan, limits: StepLimits, runtime: Runtime, shapes: BucketedShapes
    ) -> None:
        self.kv, self.limits, self.runtime, self.shapes = kv, limits, runtime, shapes
        self.vocab_size = source.vocab_size
        self.model = source.build(Mesh.alone())
        for held in source.tensors(self.model):
            if held.tensor.device.type == "cpu":  # kernels have moved theirs
                torch.utils.swap_tensors(held.tensor, runtime.upload(held.tensor, held.placed))
        self._compiler = Compiler(runtime, self.model, source.ops, kv, limits)
        self._forwards: dict[ShapeKey, Program] = {}
        self._draws: dict[Draw, tuple[Program, list[str]]] = {}
        self._between: dict[str, Program] = {}
        self._fresh: State | None = None

    def initial_state(self, num_blocks: int, num_states: int = 0) -> State:
        zeros, limits = self.runtime.zeros, self.limits
        caches = []
        for layer, backend in enumerate(self.model.attention):
            assert isinstance(backend, PagedAttention)
            shape = backend.cache_shape(num_blocks, self.kv.block_sizes[self.kv.layer_groups[layer]])
            caches.append(zeros(shape, backend.cache_dtype, backend.cache_placement()))
        blank = EditState.blank(limits.max_slots, self.vocab_size, "meta")
        edits = [zeros(table.shape, table.dtype) for table in (blank.counts, blank.bias_ids, blank.biases)]
        rows = limits.max_embeddings + 1  # one more, for padding
        embeddings = [zeros((rows, self.model.hidden_size), torch.float32)] if limits.max_embeddings else []
        self._fresh = State(caches, zeros((limits.max_slots + 1,), torch.int32), edits, embeddings)
        return self._fresh

    def memory(self, key: ShapeKey) -> int:
        """An estimate: what the widest layers and the logits of a step hold at once."""
        hidden = 16 * key.num_tokens * self.model.hidden_size * 4
        return hidden + 3 * key.num_samples * self.vocab_size * 8

    @torch.no_grad()
    def warm_up(self, keys: Sequence[ShapeKey]) -> CompileReport:
        """The report counts every program so far, those of earlier calls too."""
        start = time.perf_counter()
        if self._fresh is not None:
            self._compile(keys, self._fresh)
            self._fresh = None  # its buffers are donated from now on
        return CompileReport(num_programs=self.runtime.num_compilations, seconds=time.perf_counter() - start)

    def _compile(self, keys: Sequence[ShapeKey], state: State) -> None:
        compiler, with_drafts = self._compiler, self.limits.max_drafts > 0
        shapes = list(dict.fromkeys([*keys, *self.shapes.with_features(self.limits)]))
        ways = [draw for count in sorted({key.num_samples for key in shapes}) for draw in draws(count, with_drafts)]
        between = {"edit": compiler.edit, "enter": compiler.enter} | (
            {"embed": compiler.embed} if state.embeddings else {}
        )
        with compiling(len(shapes) + len(ways) + len(between)) as done:
            for key in shapes:
                done(f"a step of {key.num_tokens} tokens in {key.num_reqs} rows, {' '.join(key.features)}".rstrip(", "))
                self._forwards[key] = compiler.forward(state, key)
            for draw in ways:
                done(f"{draw.num_samples} draws, {' '.join(draw.features)}".rstrip(", "))
                self._draws[draw] = compiler.draw(state, draw)
            for name, compile_ in between.items():
                done(f"{name} of a state")
                self._between[name] = compile_(state)

    # -- steps --------------------------------------------------------------------------------------------

    def edit(self, state: State, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> State:
        for turn in turns(copies, zeros):
            blocks = self.runtime.upload(torch.tensor(turn, dtype=torch.int32))
            state = replace(state, caches=self._between["edit"](*state.caches, blocks))
        return state

    def enter(self, state: State, rows: Sequence[EnteringRow]) -> State:
        for row in rows:
            ids, biases = np.zeros((1, MAX_BIASES), np.int32), np.zeros((1, MAX_BIASES), np.float32)
            ids[0, : len(row.bias_ids)], biases[0, : len(row.biases)] = row.bias_ids, row.biases
            arrays = (np.array([row.slot], np.int32), row.row_of_counts(self.vocab_size)[None], ids, biases)
            given = [self.runtime.upload(torch.from_numpy(array)) for array in arrays]
            state = replace(state, edits=self._between["enter"](*state.edits, *given))
        return state

    def embed(self, state: State, rows: Sequence[EmbeddingRows]) -> State:
        buffer = state.embeddings[0]
        for each in rows:
            for start in range(0, len(each.rows), EMBEDDINGS_AT_ONCE):
                part = slice(start, start + EMBEDDINGS_AT_ONCE)
                count = len(each.rows[part])
                ids = np.full(EMBEDDINGS_AT_ONCE, len(buffer) - 1, np.int32)  # padding goes to the last row
                values = np.zeros((EMBEDDINGS_AT_ONCE, self.model.hidden_size), np.float32)
                ids[:count], values[:count] = each.rows[part], each.values[part]
                given = [self.runtime.upload(torch.from_numpy(array)) for array in (ids, values)]
                (buffer,) = self._between["embed"](buffer, *given)
        return replace(state, embeddings=[buffer])

    def forward(self, state: State, inputs: StepInputs) -> tuple[State, Hidden]:
        arrays = self._compiler.uploaded(inputs.arena, inputs.sections)
        made = self._forwards[inputs.key](*state.caches, state.last_ids, *state.embeddings, *arrays)
        caches, rest = made[: len(state.caches)], iter(made[len(state.caches) :])
        hidden = Hidden(
            logits=next(rest),
            slots=inputs.sample_slots.copy(),
            scores=tuple(next(rest) for _ in range(3)) if SCORES in inputs.key.features else (),
            pooled=[] if inputs.pool_rows is None else [next(rest)],
            taps=tuple(rest),
            targets=None if inputs.score_targets is None else inputs.score_targets.copy(),
        )
        return replace(state, caches=caches), hidden

    def taps(self, hidden: Hidden) -> Sequence[Tensor]:
        return hidden.taps

    def sample(self, state: State, hidden: Hidden, late: SamplingInputs) -> tuple[State, TpuOutputs]:
        features = late.key.features
        full, drafts = bool({*features} & {*FULL}), DRAFTS in features
        draw = Draw(
            num_samples=late.key.num_samples,
            greedy=late.all_greedy and not full and not drafts,
            full=full or drafts,
            drafts=drafts,
        )
        program, names = self._draws[draw]
        arrays = self._sampling_arrays(late, draw)
        slots = self.runtime.upload(torch.from_numpy(hidden.slots))
        last_ids, *made = program(state.last_ids, *state.edits, hidden.logits, slots, *arrays)
        if draw.full:
            state = replace(state, edits=[made.pop(0), *state.edits[1:]])
        drawn = dict(zip(names, made, strict=True))
        if LOGPROBS not in features:
            drawn = {name: drawn[name] for name in ("token_ids", "kept") if name in drawn}
        return replace(state, last_ids=last_ids), TpuOutputs(self.runtime, drawn, late.num_samples, hidden)

    def _sampling_arrays(self, late: SamplingInputs, draw: Draw) -> list[Tensor]:
        """The arrays of a sampling; of one that has fewer features than its program, with masks of ones."""
        if not draw.full or MASKS in late.key.features:
            return self._compiler.uploaded(late.arena, late.sections)
        layout = sampling_layout(draw.num_samples, mask_words(self.vocab_size), drafts=draw.drafts)
        arena = np.zeros(arena_size(layout), dtype=np.uint8)
        views, given = array_views(arena, layout), array_views(late.arena, late.sections)
        for name, view in views.items():
            view[...] = given.get(name, -1)
        return self._compiler.uploaded(arena, layout)

    def close(self) -> None:
        for programs in (self._forwards, self._draws, self._between):
            programs.clear()
