"""Which blocks prompts share: those before the first token, medium or root in which they differ, and no other."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import combinations

import msgspec
import pytest
from engine_kit import TOKEN, add_message, load_adapters, make_core, make_request, make_scheduler, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.engine.input_processor import InputProcessor, RequestOptions
from anychip.errors import InvalidRequest
from anychip.kv_cache.hashing import HASH_BYTES, extend_hashes, media_marks, prompt_hashes, root_hash
from anychip.messages import ToEngine
from anychip.prefix import MediaSpan, PrefixRoot
from anychip.request import Request, RequestStatus
from anychip.sampling_params import SamplingParams
from anychip.types import RequestId
from anychip.worker_report import KVGroup

IMAGE, OTHER = bytes([1]) * 32, bytes([2]) * 32
PLACEHOLDER = 9


@dataclass(frozen=True)
class Prompt:
    """What a request is made of."""

    ids: list[int]
    media: tuple[MediaSpan, ...]
    root: PrefixRoot

    def request(self, name: str, block_size: int, **more: object) -> Request:
        marks = media_marks(self.media, block_size)
        return make_request(name, self.ids, prefix_root=self.root, media_marks=marks, **more)

    def identities(self) -> list[tuple]:
        """For each token all that tells it from others: the oracle of what may be shared."""
        media: list[object] = [None] * len(self.ids)
        for span in self.media:
            for offset in range(span.length):
                media[span.start + offset] = (span.digest, span.length, offset)
        return [(self.root, *pair) for pair in zip(self.ids, media, strict=True)]


def common(one: list[tuple], other: list[tuple]) -> int:
    """Leading tokens on which both agree."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


ROOTS = st.builds(
    PrefixRoot,
    adapter=st.sampled_from([None, None, None, IMAGE]),
    weights_version=st.sampled_from([0, 0, 0, 1]),
    salt=st.sampled_from(["", "", "", "x"]),
)


@st.composite
def prompts(draw, versions: bool = True) -> Prompt:
    """Few ids, few digests and few roots, so that many prompts begin alike: text and spans by turns."""
    ids: list[int] = []
    media = []
    for is_media, length in draw(st.lists(st.tuples(st.booleans(), st.integers(1, 14)), min_size=1, max_size=6)):
        if is_media:
            media.append(MediaSpan(len(ids), length, draw(st.sampled_from([IMAGE, OTHER]))))
            ids += [PLACEHOLDER] * length
        else:  # placeholders that a user typed are text
            ids += [draw(st.sampled_from([5, 5, 5, PLACEHOLDER]))] * length
    root = draw(ROOTS)
    return Prompt(ids, tuple(media), root if versions else msgspec.structs.replace(root, weights_version=0))


# -- the root ---------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.builds(
            PrefixRoot,
            adapter=st.one_of(st.none(), st.binary(max_size=3)),
            weights_version=st.integers(0, 300),
            salt=st.text("abc\0\1", max_size=3),
        ),
        max_size=30,
    )
)
def test_only_equal_roots_have_the_same_hash(roots):
    assert len({root_hash(root) for root in roots}) == len(set(roots))


def test_no_part_of_a_root_passes_for_another():
    roots = [
        PrefixRoot(adapter=b"a", salt="bc"), PrefixRoot(adapter=b"ab", salt="c"), PrefixRoot(adapter=b"abc"),
        PrefixRoot(salt="abc"), PrefixRoot(), PrefixRoot(adapter=b""), PrefixRoot(weights_version=1),
        PrefixRoot(salt="\1"), PrefixRoot(adapter=b"\1"),
    ]  # fmt: skip
    assert len({root_hash(root) for root in roots}) == len(roots)


# -- hashes -----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(prompts(), min_size=2, max_size=5), st.sampled_from([1, 2, 4, 8]))
def test_prompts_share_the_full_blocks_on_which_they_agree(several, block_size):
    hashes = []
    for prompt in several:
        made = prompt_hashes(array("i", prompt.ids).tobytes(), block_size, prompt.root, prompt.media)
        assert made == b"".join(extend_hashes(prompt.request("a", block_size), block_size))
        hashes.append([made[at : at + HASH_BYTES] for at in range(0, len(made), HASH_BYTES)])
    for (one, its), (other, theirs) in combinations(zip(several, hashes, strict=True), 2):
        agree = common(one.identities(), other.identities()) // block_size
        shared = sum(a == b for a, b in zip(its, theirs, strict=False))
        assert shared == agree and its[:agree] == theirs[:agree]
        assert not set(its[agree:]) & set(theirs[agree:])


@pytest.mark.parametrize("start", [3, 4, 5, 7, 8])
@pytest.mark.parametrize("length", [1, 4, 17])
def test_other_media_under_the_same_ids_share_what_is_before_the_spans_first_block(start, length):
    ids = [5] * start + [PLACEHOLDER] * length + [6] * 11
    first, second = (Prompt(ids, (MediaSpan(start, length, digest),), PrefixRoot()) for digest in (IMAGE, OTHER))
    one, other = (extend_hashes(prompt.request("a", 4), 4) for prompt in (first, second))
    assert [a == b for a, b in zip(one, other, strict=True)] == [at < start // 4 for at in range(len(ids) // 4)]


def test_two_spans_in_one_block_are_told_from_each_other_and_from_one():
    ids = [PLACEHOLDER] * 4
    spans = [
        (), (MediaSpan(0, 2, IMAGE), MediaSpan(2, 2, OTHER)), (MediaSpan(0, 2, OTHER), MediaSpan(2, 2, IMAGE)),
        (MediaSpan(0, 4, IMAGE),), (MediaSpan(0, 2, IMAGE),), (MediaSpan(1, 2, IMAGE),), (MediaSpan(2, 2, IMAGE),),
    ]  # fmt: skip
    hashes = {prompt_hashes(array("i", ids).tobytes(), 4, PrefixRoot(), media) for media in spans}
    assert len(hashes) == len(spans)


def test_a_block_that_the_output_fills_takes_the_span_that_begins_in_it():
    ends = []
    for digest in (IMAGE, OTHER):
        request = Prompt([5, 5, PLACEHOLDER], (MediaSpan(2, 1, digest),), PrefixRoot()).request("a", 4)
        request.output_token_ids = [7]
        ends += extend_hashes(request, 4)
    assert len(set(ends)) == 2


# -- the cache --------------------------------------------------------------------------------------------


GROUPS = st.sampled_from([(KVGroup(4),), (KVGroup(4), KVGroup(8)), (KVGroup(8), KVGroup(2)), (KVGroup(2), KVGroup(4))])


@settings(max_examples=100, deadline=None)
@given(several=st.lists(prompts(versions=False), min_size=2, max_size=6), groups=GROUPS)
def test_a_request_finds_the_longest_prefix_that_one_before_it_computed(several, groups):
    scheduler = make_scheduler(num_blocks=1024, groups=groups, budget=256, max_adapters=1)
    finest, coarsest = min(g.block_size for g in groups), max(g.block_size for g in groups)
    computed: list[list[tuple]] = []
    for number, prompt in enumerate(several):
        request = prompt.request(str(number), finest, arrival=number, max_output=3)
        scheduler.add(request)
        run_to_end(scheduler)
        mine = prompt.identities()
        longest = max([0, *(common(mine, other) for other in computed)])
        assert request.cached_tokens == min(longest, len(mine) - 1) // coarsest * coarsest
        computed.append(mine + [(prompt.root, TOKEN, None)] * 2)  # the last token is never computed


# -- weights ----------------------------------------------------------------------------------------------


class Device:
    """Writes into each block what a model would: a value over the weights, the tokens before and the token."""

    def __init__(self, groups: tuple[KVGroup, ...]) -> None:
        self.groups = groups
        self.version = 0
        self.prompts: dict[str, Prompt] = {}
        self._tables: dict[int, list[list[int]]] = {}
        self._values: dict[tuple[int, int], int] = {}

    def run(self, step) -> None:
        decision = step.decision
        slots, counts = (array("i", one) for one in (decision.slots, decision.num_tokens))
        changes = array("i", decision.new_blocks)
        begins = {}
        for row in decision.new_rows:
            self._tables[row.slot] = [list(table) for table in row.block_ids]
            begins[row.slot] = row.num_computed
        for at in range(0, len(changes), 4):
            slot, group, index, block = changes[at : at + 4]
            table = self._tables[slot][group]
            table[index:] = [block, *table[index + 1 :]]
        for source, target in decision.copies:
            for offset in range(max(group.block_size for group in self.groups)):
                if (source, offset) in self._values:
                    self._values[target, offset] = self._values[source, offset]
        for request, slot, count in zip(step.requests, slots, counts, strict=True):
            start = request.num_computed - count
            if begins.get(slot):
                self._check_shared(request, slot, begins[slot])
            for group in range(len(self.groups)):
                for position in range(start, start + count):
                    self._values[self._place(slot, group, position)] = self._next(request, slot, group, position)

    def _check_shared(self, request: Request, slot: int, shared: int) -> None:
        """A request that enters reads what these weights would compute of its own tokens."""
        value = hash(self._root(request))
        for position in range(shared):
            value = hash((self.version, value, self._identity(request, position)))
        for group in range(len(self.groups)):
            assert self._values[self._place(slot, group, shared - 1)] == value, f"{request} reads another's tokens"

    def _next(self, request: Request, slot: int, group: int, position: int) -> int:
        before = self._values[self._place(slot, group, position - 1)] if position else hash(self._root(request))
        return hash((self.version, before, self._identity(request, position)))

    def _place(self, slot: int, group: int, position: int) -> tuple[int, int]:
        size = self.groups[group].block_size
        return self._tables[slot][group][position // size], position % size

    def _root(self, request: Request) -> tuple:
        root = self.prompts[request.request_id].root
        return root.adapter, root.salt

    def _identity(self, request: Request, position: int) -> tuple:
        identities = self.prompts[request.request_id].identities()
        return identities[position][1:] if position < len(identities) else (TOKEN, None)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), groups=GROUPS, num_blocks=st.sampled_from([80, 400]))  # the longest request fits
def test_no_request_ever_reads_what_other_weights_or_other_media_computed(data, groups, num_blocks):
    scheduler = make_scheduler(num_blocks=num_blocks, groups=groups, budget=24, max_adapters=1)
    core, device = make_core(scheduler, max_in_flight=data.draw(st.integers(1, 2))), Device(groups)
    load_adapters(core, IMAGE)
    inputs = InputProcessor(
        tokenizer=None, vocab_size=1000, max_model_len=120, eos_token_ids=(2,), hash_block_size=core.hash_block_size
    )
    schedule = scheduler.schedule

    def scheduled():
        step = schedule()
        if step is not None:
            device.run(step)
        return step

    scheduler.schedule = scheduled
    pool = data.draw(st.lists(prompts(versions=False), min_size=1, max_size=3))
    moves = st.sampled_from(["add", "add", "step", "step", "step", "weights", "preempt", "inputs", "leave"])
    for number, move in enumerate(data.draw(st.lists(moves, max_size=40))):
        if move == "add" and len(scheduler.requests) < 8:
            prompt, name = data.draw(st.sampled_from(pool)), str(number)
            device.prompts[name] = prompt
            sampling = SamplingParams(max_tokens=data.draw(st.integers(1, 12)), n=data.draw(st.integers(1, 2)))
            options = RequestOptions(cache_salt=prompt.root.salt, adapter=prompt.root.adapter, media=prompt.media)
            core.add(inputs.process(name, prompt.ids, sampling, options))
        elif move == "step" and core.has_work:
            core.step()
        elif move == "weights":
            core.weights_changed()
            device.version += 1
        elif move == "inputs":  # they learn of it when they learn of it
            inputs.weights_version = core.scheduler.stats.weights_version
        elif move == "preempt" and scheduler.running:
            scheduler.preempt(data.draw(st.sampled_from(scheduler.running)))
        elif move == "leave" and scheduler.requests:
            core.abort(data.draw(st.sampled_from(sorted(scheduler.requests))))
        sequences = [one for group in scheduler.requests.values() for one in group.values()]
        scheduler.kv.check_integrity(sequences)
    for _ in range(2000):
        if not core.has_work:
            break
        core.step()
    assert not core.has_work


def test_after_a_change_of_weights_prompts_share_again_what_the_new_ones_compute():
    scheduler = make_scheduler()
    prompt = list(range(10, 30))
    for number, cached in enumerate([0, 16, 0, 16]):
        if number == 2:
            scheduler.weights_changed()
        request = make_request(str(number), prompt, arrival=number)
        request.prefix_root = PrefixRoot(weights_version=scheduler.kv.weights_version)
        scheduler.add(request)
        run_to_end(scheduler)
        assert request.cached_tokens == cached


def test_a_request_that_runs_while_weights_change_offers_nothing_until_it_has_computed_all_anew():
    core = make_core(make_scheduler())
    scheduler, prompt = core.scheduler, list(range(10, 30))

    def enter(name: str) -> Request:
        core.add(add_message(name, prompt, max_output=30))
        (request,) = scheduler.sequences(RequestId(name))
        while request.status is not RequestStatus.RUNNING:
            core.step()
        return request

    runs = enter("runs")
    assert scheduler.kv.pool.find(runs.block_hashes[0]) is not None
    core.weights_changed()
    for _ in range(20):
        core.step()
    hashes = extend_hashes(runs, scheduler.kv.hash_block_size)
    assert len(hashes) > 6 and not any(map(scheduler.kv.pool.find, hashes))
    assert enter("late").cached_tokens == 0
    core.abort("late")
    core.weights_changed()
    scheduler.preempt(runs)
    for _ in range(4):
        core.step()
    assert enter("later").cached_tokens == 16  # what it computed when it came back


def test_a_beam_that_takes_over_blocks_takes_their_weights_version():
    scheduler = make_scheduler()
    stale, fresh = (make_request(name, list(range(10, 20)), arrival=at) for at, name in enumerate("ab"))
    scheduler.add(stale)
    scheduler.schedule()
    scheduler.weights_changed()
    fresh.prefix_root = PrefixRoot(weights_version=1)
    scheduler.add(fresh)
    scheduler.schedule()
    kv = scheduler.kv
    kv.adopt([(stale, fresh), (fresh, stale)])
    assert (stale.prefix_root, fresh.prefix_root) == (PrefixRoot(weights_version=1), PrefixRoot())
    assert fresh.num_cached_blocks > stale.num_cached_blocks == [2]
    kv.check_integrity([stale, fresh])


def test_hashes_that_were_made_under_other_weights_are_made_again():
    core = make_core(make_scheduler(max_adapters=1))
    load_adapters(core, OTHER)
    inputs = InputProcessor(tokenizer=None, vocab_size=1000, max_model_len=99, eos_token_ids=(2,), hash_block_size=4)
    options = RequestOptions(cache_salt="x", adapter=OTHER, media=(MediaSpan(6, 9, IMAGE),))

    def enter(name: str) -> Request:
        core.add(inputs.process(name, list(range(10, 30)), SamplingParams(max_tokens=9), options))
        return core.scheduler.requests[RequestId(name)][0]

    assert len(enter("known").block_hashes) == 5
    core.weights_changed()
    late = enter("late")
    assert (late.prefix_root.weights_version, late.block_hashes) == (1, [])
    inputs.weights_version = core.weights_version
    assert enter("known again").block_hashes == extend_hashes(late, 4)


# -- admission --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("media", "says"),
    [
        ((MediaSpan(0, 0, IMAGE),), "span 0 has 0 tokens"),
        ((MediaSpan(-1, 2, IMAGE),), "span 0 begins at token -1; the prompt begins at 0"),
        ((MediaSpan(18, 3, IMAGE),), "span 0 ends at token 21; the prompt has 20 tokens"),
        ((MediaSpan(0, 2**62, IMAGE),), f"span 0 ends at token {2**62}; the prompt has 20 tokens"),
        ((MediaSpan(4, 3, IMAGE), MediaSpan(6, 2, IMAGE)), "span 1 begins at token 6; the one before it ends at 7"),
        ((MediaSpan(9, 3, IMAGE), MediaSpan(1, 2, IMAGE)), "span 1 begins at token 1; the one before it ends at 12"),
        ((MediaSpan(0, 2, b"short"),), "digest of media span 0 has 5 bytes, not 32"),
    ],
)
def test_spans_that_cannot_be_are_refused_with_their_numbers(media, says):
    core = make_core(make_scheduler())
    message = msgspec.structs.replace(add_message("a", list(range(10, 30))), media=media)
    with pytest.raises(InvalidRequest, match=says) as refused:
        core.add(message)
    assert refused.value.param == "media"
    assert not core.scheduler.requests


def test_an_adapters_digest_of_the_wrong_size_is_refused():
    core = make_core(make_scheduler())
    with pytest.raises(InvalidRequest, match="adapter's digest has 0 bytes, not 32"):
        core.add(msgspec.structs.replace(add_message("a", [5]), adapter=b""))


def test_a_prompt_with_media_is_not_cut():
    inputs = InputProcessor(tokenizer=None, vocab_size=1000, max_model_len=99, eos_token_ids=(2,))
    options = RequestOptions(media=(MediaSpan(1, 2, IMAGE),), truncate_prompt_tokens=4)
    with pytest.raises(InvalidRequest, match="1 media spans") as refused:
        inputs.process("a", [5] * 9, SamplingParams(), options)
    assert refused.value.param == "truncate_prompt_tokens"


def test_digests_survive_the_wire_and_cost_five_bytes_where_there_are_none():
    plain = add_message("a", [5, 6, 7])
    encode = msgspec.msgpack.encode
    full = msgspec.structs.replace(plain, adapter=OTHER, media=(MediaSpan(1, 2, IMAGE),), weights_version=3)
    assert msgspec.msgpack.decode(encode(full), type=ToEngine) == full
    older = msgspec.msgpack.decode(encode(plain))[:-3]  # as an API process sends it that knows of no digests
    assert len(encode(plain)) == len(encode(older)) + 5  # three values, and the count of fields is beyond 15
    assert msgspec.msgpack.decode(encode(older), type=ToEngine) == plain
