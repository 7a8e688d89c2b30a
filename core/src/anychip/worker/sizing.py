"""How large things are: a step's limits, what a maximal step holds, and what is left for the KV cache."""

from __future__ import annotations

import numpy as np

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.messages import LateInputs, MemoryPlan, NewRow, StepDecision
from anychip.model_config import ModelConfig
from anychip.plugin_api import KVPlan, PeakMemory, Platform, ShapeKey, ShapePolicy, StepLimits, StepProgram
from anychip.types import cdiv
from anychip.worker.input_batch import InputBatch
from anychip.worker.model_runner import ModelRunner

_GRAPHS_SHARE = 0.1
"""Of the memory that is free before weights are loaded, what graphs may take at most."""


def step_limits(config: EngineConfig, model: ModelConfig, platform: Platform, kv: KVPlan) -> StepLimits:
    """The configuration's limits within the device's."""
    rules = platform.step_rules
    length = config.max_model_len or model.max_positions
    rows = min(config.most_rows, rules.max_rows or config.most_rows)
    return StepLimits(
        max_num_tokens=min(config.most_tokens, rules.max_tokens or config.most_tokens),
        max_num_reqs=rows,
        max_model_len=length,
        max_slots=config.most_rows,
        max_pages=tuple(cdiv(length, size) for size in kv.block_sizes),
    )


def maximal_shape(policy: ShapePolicy, limits: StepLimits) -> ShapeKey:
    """The shape of the largest step."""
    return policy.bucket(
        num_tokens=limits.max_num_tokens,
        num_reqs=limits.max_num_reqs,
        max_query_len=limits.max_num_tokens,
        num_pages=max(limits.max_pages),
        features=(),
    )


def affordable_graphs(platform: Platform, policy: ShapePolicy) -> list[ShapeKey]:
    """The policy's shapes, as far as graphs of them fit into their share of the free memory."""
    free = platform.memory(platform.context.device_indexes[0]).free
    keys = policy.keys()
    return list(keys if free is None else platform.graph_capture().affordable(keys, int(free * _GRAPHS_SHARE)))


def memory_plan(
    kv: KVPlan, num_blocks: int, limits: StepLimits, weights: int, activations: PeakMemory, graphs: int, edits: int
) -> MemoryPlan:
    """What is printed at the start, and what operators plan with. `edits`: bytes of the penalties' and biases' state."""
    per_request = sum(limits.max_pages)
    return MemoryPlan(
        weights=weights,
        activations=activations.nbytes + edits,
        graphs=graphs,
        kv_cache=num_blocks * kv.block_bytes,
        num_blocks=num_blocks,
        kv_tokens=(num_blocks - 1) * min(kv.block_sizes) // len(kv.block_sizes),
        max_concurrency=(num_blocks - 1) / per_request,
    )


def kv_budget(
    platform: Platform, config: EngineConfig, activations: PeakMemory, graphs: int, *, pending: int = 0
) -> int | None:
    """Bytes for the KV cache; None when nobody can say. `pending` bytes are free still and will not be."""
    own = platform.kv_budget(PeakMemory(nbytes=activations.nbytes + pending, exact=activations.exact))
    if own is not None:
        return own
    memory = platform.memory(platform.context.device_indexes[0])
    if memory.free is None or memory.total is None:
        return None
    in_use = memory.total - memory.free
    return int(memory.total * config.memory_fraction) - in_use - activations.nbytes - graphs - pending


def check_weights_fit(platform: Platform, nbytes: int, free: int | None) -> None:
    """Raises ConfigError when weights of so many bytes do not fit into a device's free memory, where that is known."""
    if free is not None and nbytes > free:
        raise ConfigError(
            f"the weights take {nbytes / 2**30:.1f} GiB on each of {platform.name}'s devices and "
            f"{free / 2**30:.1f} GiB are free: {(nbytes - free) / 2**30:.1f} GiB are missing; use more devices with "
            "--tensor-parallel-size, or --quantization int4"
        )


def measure_maximal_step(
    platform: Platform, program: StepProgram, batch: InputBatch, kv: KVPlan, limits: StepLimits
) -> PeakMemory:
    """The peak of a step that fills the token budget with whole prompts, on a KV pool just large enough; of a smaller
    one, scaled up, where the platform asks for that."""
    tokens = min(limits.max_num_tokens, platform.profiled_tokens or limits.max_num_tokens)
    lengths = maximal_rows(limits, tokens)
    per_request = [[cdiv(length, size) for size in kv.block_sizes] for length in lengths]
    num_blocks = 1 + sum(map(sum, per_request))
    # Written to before the measurement: the pool's pages are the KV cache's, not the step's.
    state = program.edit(program.initial_state(num_blocks), [], range(num_blocks))
    runner = ModelRunner(program, batch, state)
    next_block, rows = 1, []
    for slot, (length, counts) in enumerate(zip(lengths, per_request, strict=True)):
        tables = []
        for count in counts:
            tables.append(list(range(next_block, next_block + count)))
            next_block += count
        rows.append(_profile_row(slot, length, tables))
    decision = StepDecision(
        step_id=0,
        slots=np.arange(len(rows), dtype=np.int32).tobytes(),
        num_tokens=np.array(lengths, dtype=np.int32).tobytes(),
        new_rows=rows,
        new_blocks=b"",
        finished_slots=[],
        copies=[],
        zeros=[],
    )

    def run() -> None:
        runner.launch(decision)
        runner.sample(LateInputs(0, {})).fetch()

    peak = platform.measure(run)
    return PeakMemory(nbytes=peak.nbytes * limits.max_num_tokens // tokens, exact=peak.exact)


def maximal_rows(limits: StepLimits, tokens: int) -> list[int]:
    """Prompt lengths that make up so many tokens, as long as the model allows."""
    left, lengths = tokens, list[int]()
    while left and len(lengths) < limits.max_num_reqs:
        lengths.append(min(left, limits.max_model_len - 1))
        left -= lengths[-1]
    return lengths


def _profile_row(slot: int, length: int, tables: list[list[int]]) -> NewRow:
    return NewRow(
        slot=slot,
        token_ids=np.zeros(length, dtype=np.int32).tobytes(),
        num_prompt=length,
        num_computed=0,
        block_ids=tables,
        temperature=1.0,
        top_k=0,
        top_p=0.9,
        min_p=0.0,
        seed=0,
        sample_index=0,
        logprobs=0,
        score_from=length,
        score_top=0,
    )
