"""What an engine would hold, worked out in this process before anything is loaded. Loads torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from anychip.config import EngineConfig
from anychip.hub import located
from anychip.launch.build import check_length, fill_unset, load_tokenizer, resolve_max_model_len
from anychip.launch.draft_model import check_speculation
from anychip.launch.kv_fit import check_fits, longest_that_fits
from anychip.launch.vectors import with_task
from anychip.launch.worker_spec import worker_spec
from anychip.model_config import ModelConfig, load_model_config
from anychip.registry.devices import ChosenDevice, choose_device, for_one_host
from anychip.registry.plugins import Plugins, load_plugins
from anychip.tasks.served import ServedTask
from anychip.worker_report import WorkerReady

PLANNER = "anychip.worker.planning"
"""Loaded by name: what imports this module does not reach torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """`stages` are what a rank of each stage of the pipeline would report, of which there is one as a rule; all ranks
    together are `num_devices`, in `num_lanes` groups with a KV cache each."""

    model: ModelConfig
    stages: tuple[WorkerReady, ...]
    max_model_len: int
    longest: int
    """Tokens of the longest request whose keys the KV cache holds; sys.maxsize: it keeps nothing by token."""
    num_devices: int
    num_lanes: int
    quantization: str
    served: ServedTask
    total: int | None
    """Bytes of memory of the first device, where its probe says."""

    @property
    def worker(self) -> WorkerReady:
        """The one whose KV cache limits the others'."""
        return min(self.stages, key=lambda worker: worker.kv.num_blocks)


def plan_engine(config: EngineConfig) -> EnginePlan:
    """Raises what would keep an engine of this configuration from starting."""
    config = located(config)
    model = load_model_config(config.model)
    config, served = with_task(config, model)
    check_length(config, model)
    check_speculation(config, model, lambda: load_tokenizer(config, model))
    chosen = _chosen(config, load_plugins())
    config = fill_unset(config, chosen.decision)
    num_stages, plan_worker = config.pipeline_parallel_size, import_module(PLANNER).plan_worker
    firsts = range(0, len(chosen.indexes), len(chosen.indexes) // num_stages) if num_stages > 1 else (0,)
    stages = tuple(plan_worker(worker_spec(config, chosen, Path("."), rank=rank)) for rank in firsts)
    worker: WorkerReady = min(stages, key=lambda each: each.kv.num_blocks)
    max_model_len = resolve_max_model_len(config, model, worker)
    check_fits(worker, max_model_len, config.resolved_max_num_batched_tokens)
    own = (model.raw.get("quantization_config") or {}).get("quant_method")
    devices = chosen.candidate.probe.devices
    return EnginePlan(
        model=model,
        served=served,
        stages=stages,
        max_model_len=max_model_len,
        longest=longest_that_fits(worker.kv, config.resolved_max_num_batched_tokens),
        num_devices=len(chosen.indexes),
        num_lanes=config.data_parallel_size,
        quantization=own or config.quantization or "none",
        total=next((device.total_memory for device in devices if device.index == chosen.indexes[0]), None),
    )


def _chosen(config: EngineConfig, plugins: Plugins) -> ChosenDevice:
    """With several hosts, as if each had what this one has: nobody is asked."""
    num_ranks = config.parallel_sizes.num_ranks
    num_hosts = len(config.nodes) or (num_ranks if config.executor == "ray" else 1)
    if num_hosts == 1:
        return choose_device(config, plugins)
    here = choose_device(for_one_host(config, num_ranks // num_hosts), plugins)
    return dataclasses.replace(here, indexes=here.indexes * num_hosts)
