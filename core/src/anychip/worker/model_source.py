"""plugin_api.ModelSource over a checkpoint: builds any rank's share of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from torch._subclasses.fake_tensor import FakeTensorMode

from anychip.config import EngineConfig
from anychip.errors import ConfigError, Unsupported
from anychip.layers.build import Builder
from anychip.layers.stage import WHOLE
from anychip.model_config import ModelConfig
from anychip.models.decoder import Decoder
from anychip.models.registry import ModelFamily, find_family
from anychip.ops.table import OpTable
from anychip.plugin_api import (
    AXES,
    CacheSpec,
    HeldTensor,
    Mesh,
    MeshShape,
    Platform,
    StepModel,
    WeightsKey,
    WeightView,
)
from anychip.plugin_api.refusals import among
from anychip.quantization.detect import CheckedFormat, weight_format
from anychip.types import DTYPES, DType
from anychip.weights.dummy import dummy_views
from anychip.weights.fingerprint import fingerprint
from anychip.weights.gguf_checkpoint import open_checkpoint
from anychip.weights.progress import LoadProgress
from anychip.weights.register import WeightRegister, load_weights
from anychip.weights.spare_threads import spare_threads
from anychip.weights.stored import StoredTensors
from anychip.worker.expert_ranks import check_spread
from anychip.worker.held import check_weights_fit, held_bytes, held_storages, held_tensors
from anychip.worker.stages import StageCosts, balanced, cache_places, check_layers, stage_of

_KV_DTYPES: dict[str, DType] = {"fp8": "float8_e4m3fn"}
"""Short names of --kv-cache-dtype."""


class CheckpointSource:
    """`progress` says what the last `build` read, `held_bytes` what the weights of the models built so far take, on the
    host or, once released, on their program's device. `got_on` hears of every tensor that is read. `contributed` are
    packages' model families by architecture, `quant_formats` their containers by method, both as dotted classes.
    `family` None: the architecture's."""

    def __init__(
        self,
        *,
        config: EngineConfig,
        model: ModelConfig,
        platform: Platform,
        ops: OpTable,
        contributed: dict[str, str],
        quant_formats: Mapping[str, str] | None = None,
        family: ModelFamily | None = None,
    ) -> None:
        self.config = config
        # Rotary tables, and which of a model's rotary factors apply, follow the length that is served.
        served = min(model.most_positions, config.max_model_len or model.max_positions)
        self.model = msgspec.structs.replace(model, max_positions=served)
        self.platform = platform
        self.ops = ops.ops
        self.architecture = model.architecture
        self.vocab_size = model.vocab_size
        self.dtype = resolve_dtype(config.dtype, model.dtype, platform)
        self.kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, self.dtype, platform)
        self.family = family or find_family(model, config, contributed)
        self.quant_formats = quant_formats or {}
        self.checkpoint = open_checkpoint(Path(model.folder))
        self.got_on: Callable[[str], None] = lambda doing: None
        self.progress = LoadProgress(0, shown=False)
        self.held_bytes = 0
        self.stage = WHOLE
        """What `build` builds of the model."""
        self._own = slice(None)  # of attention_specs, those of the stage's layers
        self.notes: tuple[str, ...] = ()
        """What of the checkpoint the last built layers leave out."""

    @property
    def held_elsewhere(self) -> tuple[str, ...]:
        """Beginnings of the names of what other stages hold; () where one holds all."""
        whole = self.stage.count == 1
        return () if whole else self.stage.held_elsewhere(self.model.num_layers, embedding=True)

    @property
    def config_json(self) -> Mapping[str, Any]:
        return self.model.raw

    def attention_specs(self, shape: MeshShape) -> Sequence[CacheSpec]:
        heads = self.model.num_heads
        if heads % shape.tp:
            would = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise ConfigError(f"{heads} attention heads do not split evenly over {shape.tp} ranks; {would} would")
        return self.family.attention_specs(self.model, shape, self.dtype, self.kv_dtype)

    def build(self, mesh: Mesh) -> StepModel:
        register = WeightRegister()
        free = self.platform.memory(self.platform.context.device_indexes[0]).free
        model = self.build_layers(mesh, register)
        check_spread(model, self.architecture, self.config)
        # Memory that comes as it is written lets every allocation pass: this says so before anything is read.
        check_weights_fit(self.platform, held_bytes(model), free)
        if self.config.load_format == "dummy":
            self.progress = LoadProgress(0, shown=False, got_on=self.got_on)
            views = dummy_views(register, self.dtype, self.platform.pinned)
            load_weights(register, self.progress.track(views), self.model.folder)
        else:
            self._fill(model, mesh, register)
        register.finish()
        self.held_bytes += held_bytes(model)
        return model

    def weights(self) -> Iterator[tuple[str, WeightView]]:
        if self.config.load_format != "dummy":
            yield from self.checkpoint.views()
            return
        register = WeightRegister()
        with FakeTensorMode():  # only names and shapes are wanted
            self.build_layers(Mesh.alone(), register)
        yield from dummy_views(register, self.dtype, self.platform.pinned)

    def take_stage(self, shape: MeshShape, rank: int) -> Sequence[range]:
        """From now on `build` builds the layers of this rank's stage. Returns, by stage, where the specs of its layers
        are among attention_specs. Raises ConfigError for stages that do not go with the model, and Unsupported for a
        family whose layers are not those of the frame."""
        if not (isinstance(self.family, type) and issubclass(self.family, Decoder)):
            raise Unsupported(
                f"{self.architecture} over {shape.pp} stages",
                ["native decoders alone are cut into stages; leave pipeline_parallel_size at 1"],
            )
        check_layers(self.config, self.model.num_layers)
        layers_each = self.config.pipeline_layers or balanced(self._stage_costs(), shape.pp)
        places = cache_places(layers_each, self.family.caches_by_layer(self.model))
        self.stage = stage_of(layers_each, shape.place("pp", rank))
        self._own = slice(places[self.stage.index].start, places[self.stage.index].stop)
        return places

    def _stage_costs(self) -> StageCosts:
        """Of the whole model, whose layers are built without memory."""
        with FakeTensorMode():
            model = self.build_layers(Mesh.alone(), WeightRegister())
        assert isinstance(model, Decoder), "its family is one"
        head = 0 if model.head is None else held_bytes(model.head)
        tied = model.head is not None and model.head.adopted is not None
        layers = [held_bytes(layer) for layer in model.layers]
        return StageCosts(layers=layers, embedding=held_bytes(model.embedding), head=head, tied=tied)

    def tensors(self, model: StepModel) -> Sequence[HeldTensor]:
        return held_tensors(model)

    def release(self, model: StepModel) -> int:
        freed = 0
        for storage in held_storages(model):
            if storage.resizable():  # memory that is another's is left to it
                freed += storage.nbytes()
                storage.resize_(0)
        return freed

    def _fill(self, model: StepModel, mesh: Mesh, register: WeightRegister) -> None:
        """From what the platform kept of an earlier start, or from the checkpoint."""
        files = [file.path for file in self.checkpoint.files]
        total_bytes = sum(path.stat().st_size for path in files)
        self.progress = LoadProgress(total_bytes, shown=mesh.rank == 0, got_on=self.got_on)
        key = self._key(mesh, files)
        weights = held_storages(model)
        total = sum(storage.nbytes() for storage in weights)
        if self.progress.restore(total, lambda: self.platform.restore_weights(key, weights)):
            return
        with spare_threads():
            load_weights(register, self.progress.track(self.checkpoint.views()), self.model.folder)
        self.platform.keep_weights(key, weights)

    def _key(self, mesh: Mesh, files: Sequence[Path]) -> WeightsKey:
        form = (
            str(self.checkpoint.folder.resolve()),
            self.model.num_layers,  # a head within the same files counts itself
            self.dtype,
            self.kv_dtype,
            self.config.quantization,
            mesh.rank,
            [(axis, mesh.shape.size_of(axis)) for axis in AXES],
            (self.stage.first_layer, self.stage.end_layer),
            sorted(mesh.shape.joined.items()),
            self.config.num_redundant_experts,
        )
        contents = (self.model.raw, self.model.max_positions, [(path.name, fingerprint(path)) for path in files])
        name, digest = (hashlib.sha256(msgspec.json.encode(part)).hexdigest() for part in (form, contents))
        return WeightsKey(name=name, contents=digest)

    def build_layers(self, mesh: Mesh, register: WeightRegister) -> StepModel:
        """The model with its weights allocated and not loaded."""
        made_up = self.config.load_format == "dummy"
        inner = weight_format(
            self.model.raw,
            self.config.quantization,
            lambda: frozenset() if made_up else self.checkpoint.names,
            self.quant_formats,
        )
        builder = Builder(
            platform=self.platform,
            ops=self.ops,
            mesh=mesh,
            dtype=self.dtype,
            weights=register,
            formats=CheckedFormat(inner, self.platform),
            stored=StoredTensors(None if made_up else self.checkpoint, register, head_drafts=self.config.own_head),
            stage=self.stage,
            draws=self.config.task in ("auto", "generate"),
            kv_scales=self.kv_dtype != self.dtype,
            adapter_targets=self.config.resolved_adapter_targets,
            moves_experts=self.config.eplb_interval is not None,
            num_redundant_experts=self.config.num_redundant_experts,
        )
        model = self.family(self.model, builder, self.attention_specs(mesh.shape)[self._own])
        self.notes = register.notes
        return model


def resolve_dtype(asked: str, checkpoint: str, platform: Platform) -> DType:
    """The model's dtype: the one asked for, or the checkpoint's; float16 checkpoints run in bfloat16 on devices that
    have only that. Raises ConfigError when the device lacks it."""
    wanted = checkpoint if asked == "auto" else asked
    able = platform.capabilities.dtypes
    if asked == "auto" and wanted == "float16" and wanted not in able:
        wanted = "bfloat16"
    for dtype in able:
        if dtype == wanted and wanted in DTYPES:
            return dtype
    raise ConfigError(
        f"dtype {wanted} ({'of the checkpoint' if asked == 'auto' else 'asked for'}) is not among those of "
        f"{platform.name}: {among(wanted, able)}; choose one with --dtype"
    )


def resolve_kv_dtype(asked: str, dtype: DType, platform: Platform) -> DType:
    """The KV cache's dtype: the model's own, or a narrower one. Raises ConfigError when the device lacks it."""
    if asked == "auto":
        return dtype
    wanted = _KV_DTYPES.get(asked, asked)
    for able in platform.capabilities.kv_dtypes:
        if able == wanted:
            return able
    raise ConfigError(
        f"--kv-cache-dtype {asked} is not among those of {platform.name}: "
        f"{among(wanted, platform.capabilities.kv_dtypes)}"
    )
