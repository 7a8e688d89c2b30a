"""plugin_api.ModelSource over a checkpoint folder: builds any rank's shard of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.layers.build import Builder, WeightRegister
from anychip.model_config import ModelConfig
from anychip.models.registry import find_family
from anychip.ops.table import OpTable
from anychip.plugin_api import AttentionSpec, Platform, Shard, StepModel
from anychip.types import DTYPES, DType
from anychip.worker.checkpoint import checkpoint_views, dummy_views, load_weights


class CheckpointSource:
    """`weight_bytes` counts what `build` read so far."""

    def __init__(
        self,
        *,
        config: EngineConfig,
        model: ModelConfig,
        platform: Platform,
        ops: OpTable,
        contributed: dict[str, str],
    ) -> None:
        self.config = config
        self.model = model
        self.platform = platform
        self.ops = ops.ops
        self.architecture = model.architecture
        self.vocab_size = model.vocab_size
        self.dtype = resolve_dtype(config.dtype, model.dtype, platform)
        self.family = find_family(model.architecture, contributed)
        self.weight_bytes = 0

    def attention_specs(self, size: int) -> Sequence[AttentionSpec]:
        if self.model.num_heads % size:
            raise ConfigError(f"{self.model.num_heads} attention heads do not split evenly over {size} ranks")
        return self.family.attention_specs(self.model, size, self.dtype)

    def build(self, shard: Shard) -> StepModel:
        register = WeightRegister()
        builder = Builder(platform=self.platform, ops=self.ops, shard=shard, dtype=self.dtype, weights=register)
        model = self.family(self.model, builder, self.attention_specs(shard.size))
        if self.config.load_format == "dummy":
            views = dummy_views(register, self.dtype)
        else:
            views = checkpoint_views(Path(self.model.folder))
        self.weight_bytes += load_weights(register, views, self.model.folder)
        return model


def resolve_dtype(asked: str, checkpoint: str, platform: Platform) -> DType:
    """The model's dtype: the one asked for, or the checkpoint's. Raises ConfigError when the device lacks it."""
    wanted = checkpoint if asked == "auto" else asked
    able = platform.capabilities.dtypes
    for dtype in able:
        if dtype == wanted and wanted in DTYPES:
            return dtype
    raise ConfigError(
        f"dtype {wanted} ({'of the checkpoint' if asked == 'auto' else 'asked for'}) is not among those of "
        f"{platform.name}: {', '.join(sorted(able))}; choose one with --dtype"
    )
