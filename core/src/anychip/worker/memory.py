"""Where a device's memory goes: what a largest step needs, and how many blocks the KV cache gets of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anychip.errors import ConfigError, KVCacheTooSmall
from anychip.plugin_api import NO_ADAPTER, AttentionSpec, KVPlan, LatentSpec, PagedSpec, PeakMemory, StepProgram
from anychip.prompt_extras import Pooling, PromptExtras
from anychip.types import cdiv
from anychip.worker.kv_plan import fresh_state
from anychip.worker.largest_steps import largest_drafts, largest_prompts
from anychip.worker.made_up_step import blocks_taken, made_up_step, run_step
from anychip.worker.model_runner import ModelRunner
from anychip.worker.preparation import Preparation
from anychip.worker_report import MemoryPlan


def measure_largest_step(prepared: Preparation, program: StepProgram) -> PeakMemory:
    """The peak of a step that fills the token budget with whole prompts, or with rows that have as many drafts as they
    may, on a KV pool just large enough. Where the platform asks for that, smaller steps are measured, and their peaks
    scaled up."""
    rules, limits = prepared.platform.step_rules, prepared.limits
    largest, drafts = limits.max_num_tokens, limits.max_drafts
    profiled = prepared.platform.profiled_tokens or largest
    prompts, most = (largest_prompts(rules, limits, tokens) for tokens in (profiled, largest))
    peaks = [_peak(prepared, program, prompts, drafts=0, scale_to=sum(most))]
    if drafts:
        drafted, most = (largest_drafts(rules, limits, tokens) for tokens in (profiled, largest))
        peaks.append(_peak(prepared, program, drafted, drafts=drafted[0] - 1, scale_to=sum(most)))
    fresh_state(program, prepared.kv, 1, 1)  # what the measured steps wrote to is the KV cache's again
    return max(peaks, key=lambda peak: peak.nbytes)


def _peak(
    prepared: Preparation, program: StepProgram, lengths: Sequence[int], *, drafts: int, scale_to: int
) -> PeakMemory:
    """Of a step of new rows with so many tokens, of which the last `drafts` are drafted, as if it had `scale_to`
    tokens."""
    sizes = prepared.kv.block_sizes
    pool = 1 + blocks_taken(lengths, sizes)
    # Written to before the measurement: the pool's pages are the KV cache's, not the step's.
    state = program.edit(fresh_state(program, prepared.kv, pool, 1 + len(lengths)), [], range(pool))
    runner = ModelRunner(program, prepared.new_batch(), state)
    extras = PromptExtras(tap_from=0) if prepared.limits.taps else None
    if not prepared.draws:
        extras = PromptExtras(pooling=Pooling("mean"))
    decision = made_up_step(
        lengths,
        num_drafts=[drafts] * len(lengths),
        block_sizes=sizes,
        states=bool(prepared.kv.states),
        temperature=1.0,
        top_p=0.9,
        logprobs=0,
        extras=extras,
        adapter_slot=0 if prepared.limits.max_adapters else NO_ADAPTER,
    )
    peak = prepared.platform.measure(lambda: run_step(runner, decision))
    return PeakMemory(nbytes=peak.nbytes * scale_to // sum(lengths), exact=peak.exact)


def count_blocks(prepared: Preparation, activations: PeakMemory, graphs: int, *, pending: int = 0) -> int:
    """How many blocks the pool of tokens gets, block 0 included: what the states leave of the KV cache's bytes.
    `graphs` are the bytes that captures need; `pending` bytes are still free and will be taken by something else.

    Raises ConfigError when nothing says how large the pool may be, KVCacheTooSmall when not even one block fits.
    """
    config, kv, limits = prepared.config, prepared.kv, prepared.limits
    states = prepared.num_states * kv.state_bytes
    if kv.encoders:
        return 1
    if config.num_kv_blocks is not None and kv.block_sizes:
        count = config.num_kv_blocks
    else:
        nbytes = config.kv_cache_bytes
        if nbytes is None:
            nbytes = _kv_budget(prepared, activations, graphs, pending)
        if nbytes is None:
            raise ConfigError("the device does not say how much memory is free; give --kv-cache-bytes")
        if states > nbytes:
            raise KVCacheTooSmall(
                f"the states of {limits.max_slots} sequences take {states} bytes, and the KV cache has {nbytes}; lower "
                "--max-num-seqs, or raise --kv-cache-bytes or --memory-fraction"
            )
        if not kv.block_sizes:
            return 1
        # More than every slot filled to the model's length can hold is never used.
        useful = 1 + config.resolved_max_num_seqs * sum(cdiv(limits.max_model_len, size) for size in kv.block_sizes)
        # A stage of states alone has blocks of tokens in the count, and no byte of them.
        count = min((nbytes - states) // prepared.block_bytes, useful) if prepared.block_bytes else useful
    max_slots = prepared.platform.capabilities.max_slots
    if max_slots is not None:
        count = min(count, max_slots // max(kv.block_sizes))
    if count < 2:
        raise KVCacheTooSmall(
            f"a KV block takes {prepared.block_bytes} bytes and fewer than 2 fit; raise --kv-cache-bytes or "
            "--memory-fraction, or free memory on the device"
        )
    return count


def _kv_budget(prepared: Preparation, activations: PeakMemory, graphs: int, pending: int) -> int | None:
    """Bytes for the KV cache; None when nobody can say."""
    platform = prepared.platform
    own = platform.kv_budget(PeakMemory(nbytes=activations.nbytes + pending, exact=activations.exact))
    if own is not None:
        return own
    memory = platform.memory(platform.context.device_indexes[0])
    if memory.free is None or memory.total is None:
        return None
    in_use = memory.total - memory.free
    return int(memory.total * prepared.config.memory_fraction) - in_use - activations.nbytes - graphs - pending


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """How MemoryPlan has it, before there is a KV cache."""

    usable: int
    elsewhere: int

    @classmethod
    def beside(cls, prepared: Preparation, held: int) -> DeviceUse:
        """Beside `held` bytes of the engine's own."""
        platform = prepared.platform
        memory = platform.memory(platform.context.device_indexes[0])
        if memory.free is None or memory.total is None:
            return cls(0, 0)
        elsewhere = max(0, memory.total - memory.free - held)
        return cls(int(memory.total * prepared.config.memory_fraction), elsewhere)


def memory_plan(
    prepared: Preparation,
    num_blocks: int,
    *,
    weights: int,
    activations: PeakMemory,
    graphs: int,
    use: DeviceUse = DeviceUse(0, 0),
) -> MemoryPlan:
    """What is printed at the start, and what operators plan with; all in bytes."""
    kv, pages = prepared.kv, sum(prepared.limits.max_pages)
    slots = float(prepared.limits.max_slots)
    return MemoryPlan(
        weights=weights,
        activations=activations.nbytes + prepared.kept_bytes,
        graphs=graphs,
        kv_cache=num_blocks * prepared.block_bytes + prepared.num_states * kv.state_bytes,
        num_blocks=num_blocks,
        kv_tokens=(num_blocks - 1) * min(kv.block_sizes, default=0) // max(1, len(kv.block_sizes)),
        max_concurrency=(num_blocks - 1) / pages if pages else slots,
        num_states=prepared.num_states,
        kv_token=_token_bytes(kv, AttentionSpec),
        latent_token=_token_bytes(kv, LatentSpec),
        state_sequence=kv.state_bytes,
        usable=use.usable,
        elsewhere=use.elsewhere,
    )


def _token_bytes(kv: KVPlan, kind: type[PagedSpec]) -> int:
    """Of a token in all layers of a kind: its share of a page, where no window has passed it."""
    groups = [group for group in kv.layer_groups if 0 <= group < len(kv.specs) and isinstance(kv.specs[group], kind)]
    return sum(kv.page_bytes // kv.block_sizes[group] for group in groups)
