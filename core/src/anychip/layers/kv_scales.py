"""Scales of a quantized KV cache, from the checkpoint where it has them."""

from __future__ import annotations

from anychip.errors import CheckpointError
from anychip.layers.build import Builder
from anychip.plugin_api import AttentionLayer, AttentionSpec, WeightView
from anychip.weights.matrix import read_one


def want_kv_scales(builder: Builder, name: str, spec: AttentionSpec, num_kv_heads: int, layer: AttentionLayer) -> None:
    """Gives `layer` the scales `name`.k_scale and .v_scale: one, or one for each of this rank's heads.

    fp8 without them has scale 1, its range being wide enough for what models were seen to produce; int8 without
    them is refused, since no one scale suits every model.
    """
    heads = builder.kv_heads(spec, num_kv_heads)
    given: set[str] = set()

    def take(which: str, view: WeightView) -> None:
        if view.shape in ((), (1,)):
            scale = read_one(view)
        elif view.shape == (num_kv_heads,):
            scale = view.read(heads.bounds)
        else:
            raise CheckpointError(
                f"{view.source} has shape {list(view.shape)}, expected one scale or one for each of "
                f"{num_kv_heads} key-value heads"
            )
        held = builder.platform.empty(tuple(scale.shape), "float32", "weights").copy_(scale)
        setattr(layer, which, held)
        given.add(which)

    def take_k(view: WeightView) -> None:
        take("k_scale", view)

    def take_v(view: WeightView) -> None:
        take("v_scale", view)

    def check() -> None:
        if spec.kv_dtype == "int8" and len(given) < 2:
            raise CheckpointError(
                f"an int8 KV cache needs the scales {name}.k_scale and .v_scale, which the checkpoint lacks; "
                "use --kv-cache-dtype fp8"
            )

    for which, taker in (("k_scale", take_k), ("v_scale", take_v)):
        builder.weights.want(f"{name}.{which}", None, taker)
        builder.weights.optional.add(f"{name}.{which}")
    builder.weights.finishers.append(check)
