"""Builds an engine from a configuration: chooses the device, starts its workers, sizes what depends on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import msgspec

from anychip.config import EngineConfig
from anychip.engine.engine_core import EngineCore
from anychip.engine.extras import ServedExtras
from anychip.engine.grammars import PendingGrammars
from anychip.errors import ConfigError
from anychip.executor.inline import InlineExecutor
from anychip.executor.links import FolderLinks
from anychip.executor.multiprocess import MultiprocessExecutor
from anychip.executor.progress import Progress
from anychip.executor.protocol import Executor, StepWorker
from anychip.kv_cache.manager import KVCacheManager
from anychip.launch.child import Child
from anychip.launch.draft_model import check_speculation
from anychip.launch.hosts.workers import open_hosted
from anychip.launch.kv_fit import check_fits, longest_that_fits
from anychip.launch.worker_spec import worker_spec
from anychip.model_config import ModelConfig, rope_parameters
from anychip.plugin_api.manifest import Decision, Placement
from anychip.process_specs import WorkerLink, WorkerSpec
from anychip.registry.blame import calling
from anychip.registry.devices import ChosenDevice, choose_device
from anychip.registry.plugins import Plugins
from anychip.scheduler.lanes import LaneScheduler
from anychip.scheduler.policy import SchedulingPolicy, make_policy
from anychip.scheduler.protocol import StepScheduler
from anychip.scheduler.scheduler import Scheduler
from anychip.speculation.lengths import StepCosts
from anychip.speculation.proposer import Proposer, make_proposer
from anychip.speculation.speculator import Speculator
from anychip.structured_output.processor import GrammarCompiler
from anychip.tokenizer.tokenizer import Tokenizer
from anychip.worker_report import WorkerReady

WORKER = "anychip.worker.worker:Worker"
"""Loaded by name, in the process that will run it: nothing that imports this module reaches torch."""


def build_engine(
    config: EngineConfig, model: ModelConfig, plugins: Plugins, folder: Path, progress: Progress | None = None
) -> EngineCore:
    """`folder` is private to this engine and holds its sockets; `progress` is told how start and steps get on. Raises
    UserError for what the user can mend."""
    check_length(config, model)
    check_speculation(config, model, lambda: load_tokenizer(config, model))
    progress = progress or progress_of(config)
    # What orders requests keeps books of its own in each lane.
    policies = [make_policy(config.policy, plugins.policies) for _ in range(config.data_parallel_size)]
    proposer = None if config.speculate is None else make_proposer(config.speculate, plugins.proposers)
    hosted = open_hosted(config, plugins, progress)
    chosen = choose_device(config, plugins) if hosted is None else hosted.chosen
    config = fill_unset(config, chosen.decision)
    executor = _start_executor(config, chosen, folder, progress) if hosted is None else hosted.start(config, folder)
    notes = (f"device {chosen.manifest.name}: {chosen.reason}", *chosen.decision.notes, *executor.ready.notes)
    executor.ready = msgspec.structs.replace(executor.ready, notes=notes)
    try:
        max_model_len = resolve_max_model_len(config, model, executor.ready)
        check_fits(executor.ready, max_model_len, config.resolved_max_num_batched_tokens)
        speculator = None if proposer is None else _speculator(config, model, proposer, executor.ready)
        scheduler = _scheduler(config, executor.ready, policies, speculator)
    except BaseException:
        executor.close("refused")
        raise
    progress.started()
    return EngineCore(
        scheduler=scheduler,
        executor=executor,
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        max_in_flight=config.max_in_flight,
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        seed=config.seed,
        served=ServedExtras(
            pooling=config.pooling,
            max_embeddings=config.max_embeddings,
            hidden_size=model.hidden_size,
            max_position=max_model_len if "mrope_section" in rope_parameters(model) else 0,
        ),
        grammars=None if config.skip_tokenizer else pending_grammars(config, model),
    )


def _scheduler(
    config: EngineConfig, ready: WorkerReady, policies: Sequence[SchedulingPolicy], speculator: Speculator | None
) -> StepScheduler:
    """One for each policy, which is one for each lane."""
    lanes = [
        Scheduler(
            kv=KVCacheManager(ready.kv, prefix_caching=config.prefix_caching),
            policy=policy,
            rules=ready.rules,
            max_num_seqs=config.resolved_max_num_seqs,
            max_num_batched_tokens=config.resolved_max_num_batched_tokens,
            max_embeddings=config.max_embeddings,
            max_adapters=config.resolved_max_adapters,
            num_stages=config.pipeline_parallel_size,
            speculator=speculator,
        )
        for policy in policies
    ]
    return lanes[0] if len(lanes) == 1 else LaneScheduler(lanes, meeting=config.lanes_meet)


def _speculator(config: EngineConfig, model: ModelConfig, proposer: Proposer, ready: WorkerReady) -> Speculator:
    costs, passes = (StepCosts(each) if each else None for each in (ready.step_costs, ready.draft_costs))
    return Speculator(
        proposer,
        max_drafts=config.max_drafts,
        vocab_size=model.vocab_size,
        costs=costs,
        draft_costs=passes,
        drafts_in_workers=config.drafts_in_workers,
    )


def progress_of(config: EngineConfig) -> Progress:
    """The limits of an engine's start and steps."""
    return Progress(start_timeout_s=config.start_timeout_s, step_timeout_s=config.step_timeout_s)


def load_tokenizer(config: EngineConfig, model: ModelConfig) -> Tokenizer:
    """The configuration's tokenizer, with its chat template."""
    folder = config.tokenizer or config.model
    return Tokenizer.load(folder, model.vocab_size, chat_template=config.chat_template)


def pending_grammars(config: EngineConfig, model: ModelConfig) -> PendingGrammars:
    """The tokenizer is read when the first grammar comes."""

    def tokenizer_json() -> str:
        text: str = load_tokenizer(config, model).raw.to_str()
        return text

    compiler = GrammarCompiler(tokenizer_json, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
    return PendingGrammars(compiler)


def check_length(config: EngineConfig, model: ModelConfig) -> None:
    """Raises ConfigError for a length beyond the model's."""
    if config.max_model_len is not None and config.max_model_len > model.most_positions:
        raise ConfigError(f"max_model_len is {config.max_model_len}; the model has {model.most_positions} positions")


def resolve_max_model_len(config: EngineConfig, model: ModelConfig, ready: WorkerReady) -> int:
    """The given length; or, where none is given, the model's own, as far as the KV cache holds it."""
    if config.max_model_len is not None:
        return config.max_model_len
    fits = longest_that_fits(ready.kv, config.resolved_max_num_batched_tokens)
    return max(2, min(model.max_positions, fits))


def fill_unset(config: EngineConfig, decision: Decision) -> EngineConfig:
    """The configuration with what the platform's negotiation fills, in fields that have their default only: what
    the user set stays. Raises ConfigError for a field that does not exist."""
    defaults = EngineConfig()
    if unknown := sorted(set(decision.fill) - set(config.__struct_fields__)):
        raise ConfigError(f"the platform fills {unknown[0]!r}, which is no setting")
    unset = {key: value for key, value in decision.fill.items() if getattr(config, key) == getattr(defaults, key)}
    return msgspec.structs.replace(config, **unset)


def _start_executor(config: EngineConfig, chosen: ChosenDevice, folder: Path, progress: Progress) -> Executor:
    world_size = 1 if chosen.per_host else len(chosen.indexes)
    specs = [worker_spec(config, chosen, folder, rank) for rank in range(world_size)]
    with calling(chosen.manifest.package, "PlatformManifest.worker_env"):
        environments = [
            dict(
                chosen.manifest.worker_env(
                    config, Placement(rank=spec.rank, world_size=world_size, device_indexes=spec.device_indexes)
                )
            )
            for spec in specs
        ]
    # Variables must be set before the device's runtime is imported, so a worker that has any gets a process.
    needs_processes = world_size > 1 or any(environments)
    if config.executor == "inline" and needs_processes:
        raise ConfigError(
            f"executor inline runs the worker in this process, and {chosen.manifest.name} needs processes of its own; "
            "use executor auto"
        )
    if not needs_processes and config.executor != "multiprocess":
        return InlineExecutor(load_worker(specs[0], progress.start_got_on), progress)

    def start(rank: int, link: WorkerLink) -> Child:
        spec = msgspec.structs.replace(specs[rank], link=link)
        return Child("anychip.launch.worker_main", spec, environments[rank])

    return MultiprocessExecutor(
        links=FolderLinks(folder),
        world_size=world_size,
        start=start,
        progress=progress,
        peers_timeout_s=config.timeout_s,
        num_lanes=config.data_parallel_size,
    )


def load_worker(spec: WorkerSpec, got_on: Callable[[str], None]) -> StepWorker:
    """Loads the worker class by name and starts it in this process; `got_on` hears how the start gets on."""
    module, _, name = WORKER.partition(":")
    worker: StepWorker = getattr(import_module(module), name)(spec, got_on)
    return worker
