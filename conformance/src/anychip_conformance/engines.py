"""Tiny models, and engines over them on the judged device, beside what transformers answers."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import msgspec
import numpy as np
import torch

from anychip import LLM
from anychip.config import EngineConfig
from anychip.process_specs import WorkerSpec
from anychip.scheduler.scheduler import ScheduledStep, Scheduler
from anychip.step_messages import StepDecision
from anychip.worker.worker import Worker
from anychip_conformance.choices import widest
from anychip_conformance.device import Device
from anychip_conformance.equality import NUM_LAYERS, VOCAB_SIZE
from anychip_conformance.equality.tiny_adapters import TinyAdapter
from anychip_conformance.oracle.streams import stream_bound

MAX_MODEL_LEN = 96
LENGTHS = (1, 2, 15, 16, 17, 33, 50, 70)
_HEAD_DIM = 16
_STEPS_BETWEEN_PREEMPTIONS = 4

NEEDS = {
    "llama": (),
    "qwen3-moe": (),
    "gemma2": ("softcap", "sliding_window"),
    "gpt-oss": ("sinks", "sliding_window"),
}
"""Families of the end-to-end section, and the capabilities that each relies on."""
_PICKING = ("qwen3-moe", "gpt-oss")
"""Families whose routers pick experts: in a narrow dtype two honest evaluations may pick differently."""


class Checkpoint:
    """A family's weights on disk, and transformers' model of them."""

    _held: tuple[str, torch.dtype] | None = None
    """The dtype through which the model's weights went last, and the one in which they are."""

    def __init__(self, family: str, head_dim: int, **settings: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="anychip-tiny-")
        # transformers takes seconds to import: only processes that run a model pay for it.
        from transformers.utils.logging import disable_progress_bar

        from anychip_conformance.equality.tiny_models import make_checkpoint

        disable_progress_bar()
        self.model = make_checkpoint(family, self.path, head_dim=head_dim, **settings)

    @property
    def path(self) -> Path:
        return Path(self._folder.name)

    def close(self) -> None:
        self._folder.cleanup()

    @torch.inference_mode()
    def logits(self, ids: list[int], dtype: str) -> np.ndarray:
        """Of the token after `ids`, from weights as `dtype` holds them, in float32 arithmetic."""
        return self._evaluated(ids, dtype, torch.float32)

    @torch.inference_mode()
    def logits_by_token(self, ids: list[int], dtype: str) -> np.ndarray:
        """Of the token after each of `ids`, [num_tokens, vocab_size], as `logits`."""
        model = self.model.to(getattr(torch, dtype)).to(torch.float32)
        return np.asarray(model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy())

    @torch.inference_mode()
    def hidden_states(self, ids: list[int], dtype: str) -> list[np.ndarray]:
        """Of all tokens [num_tokens, hidden_size], from weights as `dtype` holds them, in float32 arithmetic: behind
        each layer but the last, and behind the final norm."""
        model = self._model(dtype, torch.float32)
        found = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
        return [state[0].numpy() for state in found[1:]]

    @torch.inference_mode()
    def turned_logits(
        self, ids: list[int], dtype: str, positions: np.ndarray, sections: Sequence[int], theta: float
    ) -> np.ndarray:
        """Of the token after `ids` [vocab_size], with rotary positions [3, num_tokens] of which each axis turns so many
        frequencies; as the definition says, in place of the library's own rotary module."""
        model = self._model(dtype, torch.float32)
        rotary = model.model.rotary_emb
        axis_of = np.repeat(np.arange(3), sections)
        places = torch.from_numpy(positions[axis_of].T.astype(np.float32))  # [num_tokens, frequencies]
        angles = places * theta ** (-torch.arange(sum(sections)) / sum(sections))
        turned = torch.cat((angles, angles), dim=-1)[None]
        with patch.object(type(rotary), "forward", lambda *_, **__: (turned.cos(), turned.sin())):
            return np.asarray(model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy())

    @torch.inference_mode()
    def spread(self, ids: list[int], dtype: str) -> float:
        """How far transformers' own evaluation in `dtype` is from its evaluation in float32."""
        if dtype == "float32":
            return 0.0
        narrow = self._evaluated(ids, dtype, getattr(torch, dtype))
        return float(np.abs(narrow - self._evaluated(ids, dtype, torch.float32)).max())

    def _evaluated(self, ids: list[int], weights: str, compute: torch.dtype) -> np.ndarray:
        model = self._model(weights, compute)
        return np.asarray(model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy())

    def _model(self, weights: str, compute: torch.dtype) -> Any:
        """With weights as the dtype `weights` holds them, computing in `compute`."""
        if self._held != (weights, compute):
            self.model.to(getattr(torch, weights)).to(compute)
            self._held = (weights, compute)
        return self.model


class Merged(Checkpoint):
    """A checkpoint's weights with an adapter merged in, in float32; nothing on disk."""

    def __init__(self, base: Checkpoint, adapter: TinyAdapter) -> None:
        self.model = adapter.merged(base.model)

    def close(self) -> None:
        return None


def checkpoint(device: Device, family: str) -> Checkpoint:
    """Made once per judged process, with a head_dim that the device has."""
    for name in NEEDS[family]:
        device.need(name, bool(getattr(device.capabilities, name)))
    dtype = widest(device.capabilities)
    device.need(f"kv dtype {dtype}", dtype in device.capabilities.kv_dtypes)
    if family in _PICKING:
        device.need_dtype("float32")
    key = f"checkpoint {family}"
    if key not in device.resources:
        device.resources[key] = Checkpoint(family, _head_dim(device))
    found: Checkpoint = device.resources[key]
    return found


WIDE_VOCAB_SIZE = 152_064


def wide_checkpoint(device: Device) -> Checkpoint:
    """A model of one layer with the vocabulary of a large one; made once per judged process."""
    dtype = widest(device.capabilities)
    device.need(f"kv dtype {dtype}", dtype in device.capabilities.kv_dtypes)
    if "wide checkpoint" not in device.resources:
        sizes = {"vocab_size": WIDE_VOCAB_SIZE, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
        device.resources["wide checkpoint"] = Checkpoint("qwen3", _head_dim(device), **sizes)
    found: Checkpoint = device.resources["wide checkpoint"]
    return found


def _head_dim(device: Device) -> int:
    dims = device.capabilities.head_dims
    return _HEAD_DIM if dims is None or _HEAD_DIM in dims else min(dims)


def logits_bound(device: Device, model: Checkpoint, ids: list[int], hidden: int = 64) -> float:
    """How far two evaluations of the logits after `ids` may lie apart, in the device's widest dtype."""
    return bound_in(widest(device.capabilities), model, ids, hidden)


def bound_in(dtype: str, model: Checkpoint, ids: list[int], hidden: int = 64) -> float:
    """The same in any dtype; in a narrow one, several times what transformers' own evaluation in it shows."""
    size = float(np.abs(model.logits(ids, dtype)).max())
    return size * stream_bound(NUM_LAYERS, hidden, dtype) + 4 * model.spread(ids, dtype)


def prompts() -> list[list[int]]:
    """Half of them begin one text, so that a prefix cache has something to share."""
    rng = random.Random(7)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(max(LENGTHS))]
    return [
        shared[:n] if index % 2 else [rng.randrange(3, VOCAB_SIZE) for _ in range(n)] for index, n in enumerate(LENGTHS)
    ]


def engine_settings(device: Device) -> dict[str, Any]:
    return {
        "device": device.name,
        "device_options": dict(device.options),
        "dtype": widest(device.capabilities),
        "skip_tokenizer": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": len(LENGTHS),
    }


def open_llm(device: Device, folder: Path, **settings: Any) -> LLM:
    """An engine in this process, whose every step is held against the device's rules."""
    llm = LLM(str(folder), **{**engine_settings(device), **settings})
    executor, rules = llm.engine.executor, device.platform.step_rules
    launch = executor.launch

    def checked(decision: StepDecision) -> None:
        broken = rules.broken_by(np.frombuffer(decision.num_tokens, dtype=np.int32).tolist())
        assert not broken, f"step {decision.step_id} breaks a rule of {device.name}: {broken}"
        launch(decision)

    executor.launch = checked  # type: ignore[method-assign]
    return llm


def preempt_often(scheduler: Scheduler) -> None:
    """Takes the youngest request's blocks every few steps, whatever is in flight for it."""
    schedule, calls = scheduler.schedule, iter(range(1, 200))

    def schedule_after_preemption() -> ScheduledStep | None:
        call = next(calls, 1)
        if call % _STEPS_BETWEEN_PREEMPTIONS == 0 and scheduler.running:
            scheduler.preempt(scheduler.running[-1])
        return schedule()

    scheduler.schedule = schedule_after_preemption  # type: ignore[method-assign]


def open_worker(device: Device, folder: Path, **settings: Any) -> Worker:
    """One worker in this process, to be driven step by step."""
    config = EngineConfig(model=str(folder), **{"num_kv_blocks": 16, **engine_settings(device), **settings})
    return Worker(
        WorkerSpec(
            config=config,
            device=device.name,
            device_indexes=device.platform.context.device_indexes,
            rank=0,
            world_size=1,
            store="",
            folder=str(folder),
            probe=cast("dict[str, Any]", msgspec.to_builtins(device.probe)),
        )
    )
