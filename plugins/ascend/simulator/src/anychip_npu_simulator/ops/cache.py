"""npu_scatter_pa_kv_cache: keys and values into their slots of a paged cache. Source: _op_plugin_docs.py, of that name;
its scenes one (PA_NZ) and two (Norm)."""

from __future__ import annotations

import torch

from anychip_npu_simulator.calls import Arguments, simulates

_DTYPES = (torch.float16, torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32)
_TILE_BYTES = 32


def _check(a: Arguments) -> None:
    a.absent("compress_lens", "compress_seq_offsets", "seq_lens")
    a.dtype("key", *_DTYPES)
    for name in ("value", "key_cache", "value_cache"):
        a.dtype(name, a.key.dtype)
    a.dims("key", 3)
    a.dims("value", 3)
    a.check(
        a.key.shape[:2] == a.value.shape[:2],
        "value",
        f"of shape {tuple(a.value.shape)}",
        f"tokens and heads of key, {tuple(a.key.shape[:2])}",
    )
    a.dtype("slot_mapping", torch.int32, torch.int64)
    a.shape("slot_mapping", (a.key.shape[0],))
    a.contiguous("key", "value", "key_cache", "value_cache", "slot_mapping")
    a.dims("key_cache", 4)
    a.dims("value_cache", 4)
    a.only("cache_mode", None, "Norm", "PA_NZ")
    tiled = a.cache_mode == "PA_NZ"
    for name, values in (("key_cache", a.key), ("value_cache", a.value)):
        cache, (_, heads, size) = getattr(a, name), values.shape
        a.check(
            a.nz(name) == tiled,
            name,
            "FRACTAL_NZ" if a.nz(name) else "ND",
            "FRACTAL_NZ with cache_mode PA_NZ, ND with Norm",
        )
        if tiled:
            last = _TILE_BYTES // cache.element_size()
            allowed = (cache.shape[0], heads * size // last, cache.shape[2], last)
        else:
            allowed = (cache.shape[0], cache.shape[1], heads, size)
        a.shape(name, allowed)


@simulates("npu_scatter_pa_kv_cache", _check, "npu_scatter_pa_kv_cache", nz=("key_cache", "value_cache"))
def scatter_pa_kv_cache(a: Arguments) -> None:
    """slot_mapping must be within the cache: the document knows no slot that is left out."""
    tiled = a.cache_mode == "PA_NZ"
    block_size = a.key_cache.shape[2 if tiled else 1]
    slots = a.slot_mapping.long()
    most = a.key_cache.shape[0] * block_size - 1
    if slots.numel():
        low, high = int(slots.min()), int(slots.max())
        a.check(low >= 0 and high <= most, "slot_mapping", f"from {low} to {high}", f"0 to {most}")
    for values, cache in ((a.key, a.key_cache), (a.value, a.value_cache)):
        if tiled:  # heads and their dimensions lie in tiles, between the block and its tokens
            cache[slots // block_size, :, slots % block_size] = values.reshape(len(values), -1, cache.shape[3])
        else:
            cache[slots // block_size, slots % block_size] = values
