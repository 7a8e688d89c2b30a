"""How large things are: a step's limits, what a maximal step holds, and what is left for the KV cache."""

from __future__ import annotations

import numpy as np

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.messages import LateInputs, MemoryPlan, NewRow, StepDecision
from anychip.model_config import ModelConfig
from anychip.plugin_api import KVPlan, PeakMemory, Platform, ShapeKey, ShapePolicy, StepLimits, StepProgram, StepRules
from anychip.types import cdiv
from anychip.worker.input_batch import InputBatch
from anychip.worker.model_runner import ModelRunner

_GRAPHS_SHARE = 0.1
"""Of the memory that is free before weights are loaded, what graphs may take at most."""


def step_limits(config: EngineConfig, model: ModelConfig, platform: Platform, kv: KVPlan) -> StepLimits:
    """The configuration's limits within the device's. No step has more tokens than its rows may be long."""
    rules = platform.step_rules
    length = config.max_model_len or model.max_positions
    rows = min(config.resolved_max_num_seqs, rules.max_rows or config.resolved_max_num_seqs)
    bounds = (config.resolved_max_num_batched_tokens, rules.max_tokens, rules.max_padded_tokens, rows * length)
    return StepLimits(
        max_num_tokens=min(bound for bound in bounds if bound is not None),
        max_num_reqs=rows,
        max_model_len=length,
        max_slots=config.resolved_max_num_seqs,
        max_pages=tuple(cdiv(length, size) for size in kv.block_sizes),
    )


def largest_steps(rules: StepRules, limits: StepLimits) -> list[list[int]]:
    """Steps, as numbers of tokens by row, that obey rules and limits and are the largest in rows, in the longest row,
    and in tokens for so many rows."""
    rows = min(limits.max_num_reqs, limits.max_num_tokens, rules.max_padded_tokens or limits.max_num_reqs)
    steps = [[1] * rows]
    if rules.mix_prefill_decode and rules.max_prefills != 0:
        left = limits.max_num_tokens - rows + 1
        longest = min(left, limits.max_model_len, (rules.max_padded_tokens or left * rows) // rows)
        steps.append([longest] + [1] * (rows - 1))
    prompts = min(rows, rows if rules.max_prefills is None else rules.max_prefills)
    counts = {1 << power for power in range(prompts.bit_length())} | {prompts}
    steps += [_equal_rows(rules, limits, limits.max_num_tokens, count) for count in sorted(counts) if count]
    return steps


def largest_prompts(rules: StepRules, limits: StepLimits, tokens: int) -> list[int]:
    """Of the steps of whole prompts, the one with most tokens, and of such the one with fewest rows: tokens by row.
    It has `tokens` at most."""
    prompts = limits.max_num_reqs if rules.max_prefills is None else min(limits.max_num_reqs, rules.max_prefills)
    counts, longest = range(1, 1 + max(1, min(prompts, tokens))), limits.max_model_len - 1
    return max((_equal_rows(rules, limits, tokens, count, longest=longest) for count in counts), key=sum)


def _equal_rows(
    rules: StepRules, limits: StepLimits, tokens: int, count: int, *, longest: int | None = None
) -> list[int]:
    """`count` rows at most, as long as rules, limits and `tokens` allow, the last one shorter where tokens end."""
    width = min(limits.max_model_len if longest is None else longest, tokens, limits.max_num_tokens)
    if rules.max_padded_tokens is not None:
        count = min(count, rules.max_padded_tokens)
        width = min(width, rules.max_padded_tokens // count)
    width = max(1, width)
    total = min(tokens, limits.max_num_tokens, width * count)
    if total % width == 1 and not rules.mix_prefill_decode and total > width:
        total -= 1
    return [width] * (total // width) + ([total % width] if total % width else [])


def step_memory(program: StepProgram, policy: ShapePolicy, rules: StepRules, limits: StepLimits) -> int:
    """Bytes of the step that needs most, as the program says."""
    pages = max(limits.max_pages)
    keys = {
        policy.bucket(
            num_tokens=sum(step), num_reqs=len(step), max_query_len=max(step), num_pages=pages, features=()
        )
        for step in largest_steps(rules, limits)
    }  # fmt: skip
    return max(program.memory(key) for key in keys)


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
    rules = platform.step_rules
    largest = largest_prompts(rules, limits, limits.max_num_tokens)
    lengths = largest_prompts(rules, limits, platform.profiled_tokens or limits.max_num_tokens)
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
    return PeakMemory(nbytes=peak.nbytes * sum(largest) // sum(lengths), exact=peak.exact)


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
