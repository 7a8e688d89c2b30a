"""What workers say when they are ready: the KV cache, memory, limits of a step, kernels. The engine must know it before
it can schedule, and a plan predicts it.
"""

from __future__ import annotations

import msgspec


class MemoryPlan(msgspec.Struct, frozen=True):
    """How one device's memory is divided, in bytes, and what its KV cache holds."""

    weights: int
    """Bytes of the packed weights."""
    activations: int
    """Bytes that the largest step needs, and those of the state for penalties and biases."""
    graphs: int
    """Bytes reserved for captured graphs."""
    kv_cache: int
    """Bytes of all blocks, of tokens and of states."""
    num_blocks: int
    """Blocks of tokens, block 0 included."""
    kv_tokens: int
    """Tokens that the KV cache holds."""
    max_concurrency: float
    """How many requests of the maximum length fit at once."""
    num_states: int = 0
    """Blocks of the states' pool, block 0 included; 0: the model keeps no states."""
    kv_token: int = 0
    """Bytes that a token takes in all layers that keep its keys and values."""
    latent_token: int = 0
    """Bytes that a token takes in all layers that keep a latent row of it."""
    state_sequence: int = 0
    """Bytes that a sequence takes in all layers that keep a state of it, whatever its length."""
    usable: int = 0
    """Bytes of the device that the memory fraction allows; 0: the device does not say how many it has."""
    elsewhere: int = 0
    """Of those, what was in use and not the engine's when the KV cache was sized: other processes', the driver's and
    its libraries'."""


class KVGroup(msgspec.Struct, frozen=True, tag="tokens"):
    """Layers that get their blocks of tokens together. `window` counts tokens; None keeps every earlier token."""

    block_size: int
    window: int | None = None
    layers: tuple[int, ...] = ()


class StateGroup(msgspec.Struct, frozen=True, tag="state"):
    """Layers that keep a state of each sequence: one block of the states' pool holds those of all of them."""

    layers: tuple[int, ...] = ()


CacheGroup = KVGroup | StateGroup


class KVCacheConfig(msgspec.Struct, frozen=True):
    """`num_blocks` is the size of the tokens' pool, `num_states` that of the states' pool. Both count block 0, which no
    request owns."""

    num_blocks: int
    groups: tuple[CacheGroup, ...]
    num_states: int = 0


class DeviceRules(msgspec.Struct, frozen=True):
    """A device's limits on one step, which every policy obeys (plugin_api.StepRules, as it crosses processes)."""

    mix_prefill_decode: bool = True
    max_prefills: int | None = None
    chunk_multiple: int = 1
    max_tokens: int | None = None
    max_rows: int | None = None
    max_padded_tokens: int | None = None
    zero_new_blocks: bool = False
    max_slots: int | None = None
    takes_drafts: bool = True


class WorkerReady(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What the engine must know of the workers before it can schedule."""

    kv: KVCacheConfig
    rules: DeviceRules
    memory: MemoryPlan
    device: str
    notes: tuple[str, ...] = ()
    kernels: dict[str, str] = {}
    """For each op, which implementation serves it, and why."""
    capabilities: dict[str, str] = {}
    """What the device declares, as text."""
    step_costs: tuple[tuple[int, float], ...] = ()
    """(tokens, seconds) of steps by growing tokens, measured where drafts are wanted."""
    draft_costs: tuple[tuple[int, float], ...] = ()
    """The same of the draft model's passes; (): there is no draft model."""
