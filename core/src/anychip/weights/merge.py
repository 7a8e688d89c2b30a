"""Writes a checkpoint whose weights have an adapter merged in: W + scale * B A, worked out in float32."""

from __future__ import annotations

from pathlib import Path

import msgspec
from safetensors.torch import save_file
from torch import Tensor

from anychip.errors import AdapterRefused
from anychip.plugin_api import LowRank, WeightView
from anychip.weights.adapter import LoadedAdapter, load_adapter
from anychip.weights.adapter_base import check_base, gain_of
from anychip.weights.adapter_experts import by_expert, stacks_of_names
from anychip.weights.checkpoint import Checkpoint
from anychip.weights.files import SafetensorsFile
from anychip.weights.new_checkpoint import copy_beside_weights, new_checkpoint

_WEIGHT = ".weight"
_TIED = ("lm_head", "model.embed_tokens")


def merge_adapter(model: str, adapter: str, output: str) -> int:
    """Returns how many matrices were changed. Raises AdapterRefused for an adapter that does not fit, ConfigError for
    an output that is there already; nothing is written then."""
    base = Checkpoint(Path(model))
    with new_checkpoint(Path(output)) as target:
        loaded = load_adapter(Path(adapter))
        loaded = by_expert(loaded, stacks_of_names(loaded, base), f"{model} has no experts of such names")
        _check(base, loaded)
        for listed in base.files:
            file = SafetensorsFile(listed.path)
            try:
                tensors = {name: _merged(name, view, loaded) for name, view in file.views()}
                save_file(tensors, target / listed.path.name, metadata={"format": "pt"})
            finally:
                file.close()
        copy_beside_weights(base.folder, target)  # the index too, whose names stay
    return len(loaded.modules)


def _check(base: Checkpoint, loaded: LoadedAdapter) -> None:
    """Before anything is written."""
    config = msgspec.json.decode((base.folder / "config.json").read_bytes())
    if config.get("quantization_config"):
        raise AdapterRefused(
            f"{base.folder} is quantized, and an adapter is merged into plain weights; serve it beside the quantized "
            "base with --adapter, or merge it into the checkpoint that the base was made from"
        )
    if config.get("tie_word_embeddings") and not loaded.modules.keys().isdisjoint(_TIED):
        raise AdapterRefused(
            f"{base.folder} has one matrix for the embedding and the head, and the adapter changes one of the two; "
            "serve it beside the base with --adapter"
        )
    check_base(loaded, base)
    left = dict(loaded.modules)
    for name, view in base.views():
        module = name.removesuffix(_WEIGHT)
        matrices = left.pop(module, None) if name.endswith(_WEIGHT) else None
        if matrices is None:
            continue
        wanted = (matrices.up.shape[0], matrices.down.shape[1])
        wanted = wanted[::-1] if module in loaded.embeddings else wanted
        if view.shape != wanted or not view.dtype.is_floating_point:
            raise AdapterRefused(
                f"{name} is {list(view.shape)} of {view.dtype}; the adapter is for a matrix of {list(wanted)}, and was "
                "trained on another base"
            )
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise AdapterRefused(f"{base.folder} has no {next(iter(left))}{_WEIGHT}{more}, which the adapter changes")


def _merged(name: str, view: WeightView, loaded: LoadedAdapter) -> Tensor:
    weight = view.read()
    module: LowRank | None = loaded.modules.get(name.removesuffix(_WEIGHT)) if name.endswith(_WEIGHT) else None
    if module is None:
        return weight
    change = module.scale * (module.up.float() @ module.down.float())
    if (key := name.removesuffix(_WEIGHT)) in loaded.embeddings:
        change = change.T
    merged = weight.float() + change
    if (magnitude := loaded.magnitudes.get(key)) is not None:
        merged *= gain_of(weight, module, magnitude, key).unsqueeze(1)
    return merged.to(weight.dtype)
