"""The worker's steps at the sizes of real models (reach.REACH): a vocabulary of 152,064 ids, many steps, many rows."""

from __future__ import annotations

from anychip_conformance.case import kind
from anychip_conformance.choices import widest
from anychip_conformance.device import Device
from anychip_conformance.engines import WIDE_VOCAB_SIZE, Checkpoint, bound_in, checkpoint, wide_checkpoint
from anychip_conformance.equality import VOCAB_SIZE
from anychip_conformance.reach import dimension
from anychip_conformance.step_driver import RowEdits, StepDriver, tokens_of
from anychip_conformance.visits import VisitCase

_DEADLINE_S = 240.0
_PROMPT = [17, 152_063, 65_536, 9, 131_072, 32_768, 65_535]
_LAST = WIDE_VOCAB_SIZE - 1
_AGAIN = 3
"""Draws of a token whose bias is 1000 where each takes 400 off."""


def judge_greedy(device: Device, model: Checkpoint, ids: list[int], num_prompt: int) -> None:
    """Every token behind the prompt is the likeliest after those before it, or as likely as two evaluations may
    differ."""
    dtype = widest(device.capabilities)
    logits, bound = model.logits_by_token(ids[:-1], dtype), 2 * bound_in(dtype, model, ids[:-1])
    for place in range(num_prompt, len(ids)):
        after = logits[place - 1]
        short = float(after.max() - after[ids[place]])
        assert short <= bound, (
            f"token {place}: drew {ids[place]}, expected {int(after.argmax())}; its logit is {short:.3g} less, "
            f"bound {bound:.3g}"
        )


@kind(
    "step.reach_vocabulary",
    corpus=[VisitCase(visit="step", dimension="vocabulary", sizes=(WIDE_VOCAB_SIZE,))],
    quick=0,
    deadline_s=_DEADLINE_S,
)
def vocabulary(device: Device, case: VisitCase) -> None:
    """Ids behind the 65,536th are embedded, masked, biased, penalized, drawn, reported and fed back as others are."""
    device.reaches(case.dimension, WIDE_VOCAB_SIZE)
    model = wide_checkpoint(device)
    driver = StepDriver(device, model.path, vocab_size=WIDE_VOCAB_SIZE, max_num_seqs=5)
    try:
        _check_vocabulary(device, driver, model)
    finally:
        driver.close()


def _check_vocabulary(device: Device, driver: StepDriver, model: Checkpoint) -> None:
    biased, penalized = 131_073, 70_001
    edits = {1: RowEdits(biases={biased: 1000.0}), 2: RowEdits(frequency=400.0, biases={penalized: 1000.0})}
    new = {slot: (_PROMPT, [slot + 1]) for slot in range(4)}
    first = driver.step(new=new, tokens=dict.fromkeys(range(4), len(_PROMPT)), edits=edits, masks={0: {_LAST}})
    found = tokens_of(first)
    assert found[:3] == [_LAST, biased, penalized], f"drew {found[:3]}, expected {[_LAST, biased, penalized]}"
    likeliest = int(first.logprobs[0].top_ids[0])
    judge_greedy(device, model, [*_PROMPT, found[3]], len(_PROMPT))
    judge_greedy(device, model, [*_PROMPT, likeliest], len(_PROMPT))
    # What was drawn goes in again, by its own id: a second token that a mask decides, and one that nothing does.
    kept = 65_537
    second = tokens_of(driver.step(tokens={0: 1, 1: 1, 2: 1, 3: 1}, masks={3: {kept}}))
    assert second[1:] == [biased, penalized, kept], f"drew {second[1:]}, expected {[biased, penalized, kept]}"
    judge_greedy(device, model, [*_PROMPT, _LAST, second[0]], len(_PROMPT) + 1)
    third = tokens_of(driver.step(tokens={2: 1, 0: 1, 3: 1}))
    assert third[0] == penalized, f"drew {third[0]}, expected {penalized}"
    judge_greedy(device, model, [*_PROMPT, found[3], kept, third[2]], len(_PROMPT) + 2)
    fourth = tokens_of(driver.step(tokens={2: 1}))
    assert fourth[0] != penalized, f"{penalized} was drawn {_AGAIN} times, and its penalty does not count"


@kind(
    "step.reach_steps",
    corpus=[VisitCase(visit="step", dimension="steps", sizes=dimension("steps").sizes)],
    quick=0,
    deadline_s=_DEADLINE_S,
)
def steps(device: Device, case: VisitCase) -> None:
    """Hundreds of steps after the start, a request draws what its own tokens lead to, and those that come and go beside
    it do too."""
    last = max(case.sizes)
    device.reaches(case.dimension, last)
    model, length = checkpoint(device, "llama"), len(_TEXT) + last
    num_kv_blocks = 4 + length // min(device.capabilities.block_sizes)
    driver = StepDriver(device, model.path, max_model_len=length, num_kv_blocks=num_kv_blocks, max_num_seqs=4)
    try:
        judged = _many_steps(driver, last, visitors=device.platform.step_rules.mix_prefill_decode)
    finally:
        driver.close()
    for ids, num_prompt in judged:
        judge_greedy(device, model, ids, num_prompt)


_TEXT = [17, 301, 44, 9]
_EVERY = 61
"""Steps between visitors."""


def _many_steps(driver: StepDriver, last: int, *, visitors: bool) -> list[tuple[list[int], int]]:
    """Each request's tokens, and how many of them are its prompt."""
    mine = list(range(1, 2 + (len(_TEXT) + last) // driver.block_size))
    long = [*_TEXT, *tokens_of(driver.step(new={0: (_TEXT, mine)}, tokens={0: len(_TEXT)}))]
    judged, present = [], list[int]()
    for step in range(2, last + 1):
        if step % _EVERY or not visitors:
            long += tokens_of(driver.step(tokens={0: 1}))
            continue
        slot, begin = 1 + step % 3, [step % VOCAB_SIZE, 5, 7]
        new = {slot: (begin, [mine[-1] + 1])}
        drawn = tokens_of(driver.step(tokens={0: 1, slot: len(begin)}, new=new, finished=present))
        present = [slot]
        long.append(drawn[0])
        judged.append(([*begin, drawn[1]], len(begin)))
    return [(long, len(_TEXT)), *judged]


@kind(
    "step.reach_rows",
    corpus=[VisitCase(visit="step", dimension="rows", sizes=(sizes,)) for sizes in (65, 129)],
    quick=0,
    deadline_s=_DEADLINE_S,
)
def rows(device: Device, case: VisitCase) -> None:
    """Many requests side by side, each in a slot of its own, draw what their own tokens lead to; on devices of fewer
    rows or tokens a step, as many as those."""
    device.reaches(case.dimension, max(case.sizes))
    rules, model, length = device.platform.step_rules, checkpoint(device, "llama"), 3
    count = min(limit for limit in (max(case.sizes), rules.max_rows, rules.max_tokens) if limit is not None)
    prefills = min(rules.max_prefills or count, (rules.max_tokens or 300) // length, count)
    texts = {slot: [slot % VOCAB_SIZE, 3 * slot % VOCAB_SIZE, 7 * slot % 500] for slot in range(count)}
    driver = StepDriver(device, model.path, max_num_seqs=count, num_kv_blocks=count + 2)
    try:
        slots = list(texts)
        for first in range(0, count, prefills):
            part = slots[first : first + prefills]
            new = {slot: (texts[slot][:length], [slot + 1]) for slot in part}
            _take(texts, part, tokens_of(driver.step(new=new, tokens=dict.fromkeys(part, length))))
        for order in (slots, slots[::-1]):
            _take(texts, order, tokens_of(driver.step(tokens=dict.fromkeys(order, 1))))
    finally:
        driver.close()
    for ids in texts.values():
        judge_greedy(device, model, ids, length)


def _take(texts: dict[int, list[int]], slots: list[int], drawn: list[int]) -> None:
    assert len(drawn) == len(slots), f"{len(drawn)} tokens of {len(slots)} rows"
    for slot, token in zip(slots, drawn, strict=True):
        texts[slot].append(token)
