"""Low-rank adapters (LoRA): the op behind a product, the slots of a step program, and requests through the engine."""

from __future__ import annotations

import queue
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from hypothesis import strategies as st

from anychip import SamplingParams
from anychip.adapter_files import AdapterFolder
from anychip.messages import AdapterReport, LoadAdapter
from anychip.ops.reference import blank_stacks, write_adapters
from anychip.plugin_api import AdaptedPart, AdapterEntry, AdapterSite, LowRank, Span
from anychip.step_messages import AdapterSlot
from anychip_conformance.case import Nothing, kind
from anychip_conformance.cases.test_end_to_end import check_tokens, settings_of
from anychip_conformance.cases.test_linear import column_sizes
from anychip_conformance.cases.test_steps import TEXT
from anychip_conformance.choices import CaseDtype, each_dtype, widest
from anychip_conformance.device import Device, seen, unchanged
from anychip_conformance.engines import Checkpoint, Merged, checkpoint, open_llm, open_worker, prompts
from anychip_conformance.equality.tiny_adapters import FIVE, TinyAdapter
from anychip_conformance.oracle.rounding import gamma, rounded
from anychip_conformance.oracle.vectorised import Bounded
from anychip_conformance.step_driver import StepDriver, tokens_of

_DEADLINE_S = 240.0
_MAX_RANK = 64
_WIDE = 1000
"""Columns of which a few count, so that one that is left out shows."""

# -- the op -------------------------------------------------------------------------------------------------------


class LowRankCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`rows` are those of the product's parts, `ranks` those of the slots' adapters, by slot and then by part, over and
    over; 0: the adapter leaves a part as it is. One token in five has no adapter."""

    tokens: int = 9
    columns: int = 64
    rows: tuple[int, ...] = (32, 16, 16)
    max_rank: int = 16
    ranks: tuple[int, ...] = (16, 3, 0, 8)
    slots: int = 4
    dtype: CaseDtype = "any"
    seed: int = 0


def check_low_rank(device: Device, case: LowRankCase) -> None:
    device.need("lora", device.capabilities.lora)
    device.need_dtype(case.dtype)
    rng = np.random.default_rng(case.seed)
    starts = np.cumsum((0, *case.rows)).tolist()
    site = AdapterSite(
        index=0,
        in_features=case.columns,
        columns=Span(0, case.columns),
        out_features=starts[-1],
        parts=tuple(
            AdaptedPart(module=f"p{i}", rows=n, held=Span(0, n), offset=starts[i]) for i, n in enumerate(case.rows)
        ),
        dtype=case.dtype,  # type: ignore[arg-type]
    )
    ranks = np.resize(case.ranks, (case.slots, len(case.rows)))
    entries = [AdapterEntry(slot, _modules(rng, case, ranks[slot])) for slot in range(case.slots)]
    (stack,) = blank_stacks(
        [site], case.slots, case.max_rank, lambda shape, dtype: device.platform.empty(shape, dtype, "adapters")
    )
    write_adapters([stack], [site], entries)
    wide = rng.normal(size=(case.tokens, case.columns))
    if case.columns > _WIDE:
        wide *= column_sizes(case.columns)
    x = device.tensor(wide, case.dtype)
    y = device.tensor(rng.normal(size=(case.tokens, starts[-1])), case.dtype, written=True)
    chosen = np.where(rng.random(case.tokens) < 0.2, -1, rng.integers(0, case.slots, case.tokens))
    chosen[0], chosen[-1] = case.slots - 1, -1
    slots = device.tensor(chosen, "int32")
    before, same = y.clone(), unchanged(device, {"x": x, "slots": slots})
    result = device.ops.ops.add_low_rank(x=x, y=y, stack=stack, slots=slots)
    same()
    alone = np.flatnonzero(chosen < 0)
    device.same_bits("tokens without an adapter", result[alone], before[alone])
    expected = _expected(case, seen(x), seen(before), chosen, entries, starts)
    device.compare("product with adapters", result, expected, label=f"add_low_rank/{case.dtype}")


def _modules(rng: np.random.Generator, case: LowRankCase, ranks: np.ndarray) -> dict[str, LowRank]:
    found = {}
    for index, (rank, rows) in enumerate(zip(ranks.tolist(), case.rows, strict=True)):
        down, up = rng.normal(size=(rank, case.columns)), rng.normal(size=(rows, rank))
        scale = float(rng.uniform(0.3, 3.0))
        if rank:
            matrices = (torch.from_numpy(m).to(getattr(torch, case.dtype)) for m in (down, up))
            found[f"p{index}"] = LowRank(*matrices, scale)
    return found


def _expected(
    case: LowRankCase, x: np.ndarray, y: np.ndarray, slots: np.ndarray, entries: list[AdapterEntry], starts: list[int]
) -> Bounded:
    """In float64, token by token. Both products and the sum between them are in float32, the result in the dtype."""
    value, bound = y.copy(), np.zeros_like(y)
    for token, slot in enumerate(slots.tolist()):
        for index, (begin, end) in enumerate(pairwise(starts)):
            module = entries[slot].modules.get(f"p{index}") if slot >= 0 else None
            if module is None:
                continue
            down, up, place = seen(module.down), seen(module.up), slice(begin, end)
            value[token, place] += module.scale * (up @ (down @ x[token]))
            sizes = module.scale * (np.abs(up) @ (np.abs(down) @ np.abs(x[token])))
            bound[token, place] += sizes * gamma(case.columns + module.rank + 4)
        if slot >= 0:
            bound[token] += rounded(value[token], case.dtype, times=1)
    return Bounded(value, bound)


@kind(
    "op.add_low_rank",
    corpus=each_dtype(
        LowRankCase(),
        LowRankCase(tokens=1, columns=200, rows=(48,), max_rank=64, ranks=(64,), slots=2),
        LowRankCase(tokens=40, columns=31, rows=(65, 7), max_rank=8, ranks=(8, 5), slots=5),
    ),
    drawn=st.builds(
        LowRankCase,
        tokens=st.sampled_from([1, 2, 5, 16, 33]),
        columns=st.sampled_from([1, 7, 16, 31, 64, 96, 200]),
        rows=st.lists(st.sampled_from([1, 3, 16, 63, 64, 65, 100]), min_size=1, max_size=3).map(tuple),
        max_rank=st.sampled_from([9, 16, 17]),
        ranks=st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple),
        slots=st.integers(1, 6),
        dtype=st.sampled_from(["any", "narrow"]),
        seed=st.integers(0, 2**16),
    ),
)
def low_rank(device: Device, case: LowRankCase) -> None:
    """Every token gets its own slot's change, of that slot's rank and scale, part by part; a token without an adapter
    keeps its bits."""
    check_low_rank(device, case)


# -- steps --------------------------------------------------------------------------------------------------------

_OTHER = list(reversed(TEXT))


class Adapters:
    """Adapters of the llama on disk, and its weights with each merged in; made once per judged process."""

    def __init__(self, base: Checkpoint, adapters: tuple[TinyAdapter, ...]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="anychip-adapters-")
        self.models = [Merged(base, adapter) for adapter in adapters]
        self.folders = [
            adapter.save(base.model, Path(self._folder.name) / str(index)) for index, adapter in enumerate(adapters)
        ]
        self.digests = [AdapterFolder(folder).digest() for folder in self.folders]

    def close(self) -> None:
        self._folder.cleanup()

    @classmethod
    def of(cls, device: Device) -> Adapters:
        if "adapters" not in device.resources:
            device.resources["adapters"] = cls(checkpoint(device, "llama"), FIVE)
        found: Adapters = device.resources["adapters"]
        return found

    def load(self, driver: StepDriver) -> None:
        reports: queue.SimpleQueue[AdapterReport] = queue.SimpleQueue()
        for folder, digest in zip(self.folders, self.digests, strict=True):
            driver.worker.load_adapter(LoadAdapter(digest, str(folder)), reports.put)
            assert (report := reports.get(timeout=60)).error is None, report.error


def need_adapters(device: Device) -> None:
    path = checkpoint(device, "llama").path
    device.need("lora", device.capabilities.lora, lambda: open_worker(device, path, max_adapters=1))


@kind("step.adapters", deadline_s=_DEADLINE_S)
def adapters(device: Device, case: Nothing) -> None:
    """Rows of one step have adapters of their own, or none, in prompts and behind them; a slot that gets another
    adapter has nothing left of the one before, and rows beside it do not notice."""
    need_adapters(device)
    held = Adapters.of(device)
    plain, dtype = checkpoint(device, "llama"), widest(device.capabilities)

    def following(model: Checkpoint, ids: list[int], count: int) -> list[int]:
        known = list(ids)
        for _ in range(count):
            known.append(int(model.logits(known, dtype).argmax()))
        return known[len(ids) :]

    driver = StepDriver(device, plain.path, max_adapters=3, max_adapter_rank=_MAX_RANK)
    try:
        held.load(driver)
        new = {0: (TEXT, [1]), 1: (TEXT, [2]), 2: (TEXT, [3]), 3: (_OTHER, [4])}
        filled = [AdapterSlot(0, held.digests[2]), AdapterSlot(2, held.digests[1])]
        first = driver.step(
            new=new, tokens=dict.fromkeys((3, 0, 1, 2), len(TEXT)), adapters=filled, adapter_slots={0: 2, 2: 0, 3: 2}
        )
        second = driver.step(tokens={0: 1, 1: 1, 2: 1, 3: 1})
        wanted = {
            0: following(held.models[1], TEXT, 3),
            1: following(plain, TEXT, 3),
            2: following(held.models[2], TEXT, 3),
            3: following(held.models[1], _OTHER, 3),
        }
        assert tokens_of(first) == [wanted[slot][0] for slot in (3, 0, 1, 2)], f"prompts: drew {tokens_of(first)}"
        assert tokens_of(second) == [wanted[slot][1] for slot in range(4)], f"behind them: drew {tokens_of(second)}"
        # Slot 0 gets an adapter of one kind of product alone, in place of one of all of them.
        third = driver.step(
            new={4: (TEXT, [3])}, tokens={1: 1, 4: len(TEXT), 0: 1}, finished=[2],
            adapters=[AdapterSlot(0, held.digests[3])], adapter_slots={4: 0},
        )  # fmt: skip
        narrow = following(held.models[3], TEXT, 2)
        found = tokens_of(third)
        assert found == [wanted[1][2], narrow[0], wanted[0][2]], f"in a slot that was used: drew {found}"
        assert tokens_of(driver.step(tokens={4: 1})) == narrow[1:], "behind a prompt in a slot that was used"
        last = driver.step(new={5: (TEXT, [5])}, tokens={5: len(TEXT)})
        assert tokens_of(last) == wanted[1][:1], "without an adapter, behind steps with some"
    finally:
        driver.close()


# -- the engine ---------------------------------------------------------------------------------------------------


class AdapterCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`slots`: fewer than adapters, so that they take turns."""

    mode: Literal["plain", "chunked", "prefix", "tp2"] = "plain"
    slots: int = 5


def check_requests(device: Device, case: AdapterCase) -> None:
    need_adapters(device)
    held, plain = Adapters.of(device), checkpoint(device, "llama")
    names = [str(index) for index in range(len(held.folders))]
    each = [name for name, _ in zip([*names, None] * len(prompts()), prompts(), strict=False)]
    settings = settings_of(device, case.mode) | {
        "adapters": dict(zip(names, map(str, held.folders), strict=True)), "max_adapters": case.slots,
    }  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with open_llm(device, plain.path, **settings) as llm:
        outputs = [output.outputs[0].token_ids for output in llm.generate(prompts(), sampling, adapter=each)]
        if case.mode == "prefix":
            turned = each[1:] + each[:1]  # the same prompts under other adapters
            llm.generate(prompts(), sampling, adapter=turned)
            again = [output.outputs[0].token_ids for output in llm.generate(prompts(), sampling, adapter=each)]
            assert again == outputs, "tokens over prefixes that other adapters have cached"
    for index, (name, got) in enumerate(zip(each, outputs, strict=True)):
        model = plain if name is None else held.models[int(name)]
        check_tokens(device, model, f"llama with {name}", index, got)


@kind(
    "e2e.adapters",
    corpus=[AdapterCase(), AdapterCase(mode="prefix", slots=2), AdapterCase(mode="chunked", slots=1)],
    deadline_s=_DEADLINE_S,
    quick=1,
)
def requests(device: Device, case: AdapterCase) -> None:
    """Five adapters and none in one batch, of ranks 1 to 64: every request's tokens are those of transformers' model
    with its adapter merged in float32, also where adapters take turns in few slots, and over cached prefixes."""
    check_requests(device, case)


@kind("e2e.adapters_of_ranks", profile="distributed", corpus=[AdapterCase(mode="tp2")], deadline_s=_DEADLINE_S)
def requests_over_ranks(device: Device, case: AdapterCase) -> None:
    """The same on two devices: every rank adds its share of the matrices, and what is split over inputs once."""
    check_requests(device, case)
