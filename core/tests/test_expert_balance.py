"""Which rank gets which experts, how they get there, and that nothing else shows it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_in_threads import on_ranks

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.layers.expert_slots import ExpertSlots
from anychip.model_config import load_model_config
from anychip.ops.table import resolve_platform_ops
from anychip.plugin_api import Mesh, MeshShape, Routing
from anychip.worker.expert_balancer import MOVES_A_STEP, ExpertBalancer
from anychip.worker.expert_moves import EMPTY, aligned, exchanges
from anychip.worker.expert_packing import Places, balanced, imbalance, pack, rank_loads, replicate
from anychip.worker.model_source import CheckpointSource
from anychip_conformance.device import open_device
from anychip_conformance.equality.tiny_models import make_checkpoint

# -- packing ------------------------------------------------------------------------------------------------


@st.composite
def small(draw):
    """Loads of few experts, and ranks with room for each and some copies."""
    ranks, count = draw(st.integers(2, 3)), draw(st.integers(2, 6))
    each = draw(st.integers(-(-count // ranks), min(count, 9 // ranks)).filter(lambda n: n * ranks >= count))
    loads = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    return np.array(loads, float), ranks, each


def fits(draw_small):
    loads, ranks, each = draw_small
    return ranks * each >= len(loads)


def least_for_a_copy(loads, slots, most):
    """By trying every number of copies."""
    best = np.inf

    def go(index, left, worst):
        nonlocal best
        if index == len(loads):
            best = min(best, worst) if left == 0 else best
            return
        for copies in range(1, min(most, left) + 1):
            go(index + 1, left - copies, max(worst, loads[index] / copies))

    go(0, slots, 0.0)
    return best


def lightest_packing(weights, copies, ranks, each):
    """The least that the heaviest of any packing weighs, by trying all."""
    items = [item for item, count in enumerate(copies) for _ in range(count)]
    packs, totals, best = [set() for _ in range(ranks)], [0.0] * ranks, np.inf

    def go(index):
        nonlocal best
        if index == len(items):
            best = min(best, max(totals))
            return
        item, tried = items[index], set()
        for place in range(ranks):
            state = (totals[place], frozenset(packs[place]))
            if len(packs[place]) == each or item in packs[place] or state in tried:
                continue
            tried.add(state)
            packs[place].add(item)
            totals[place] += weights[item]
            if totals[place] < best:
                go(index + 1)
            packs[place].remove(item)
            totals[place] -= weights[item]

    go(0)
    return best


@settings(max_examples=60, deadline=None)
@given(small().filter(fits))
def test_no_other_numbers_of_copies_have_a_smaller_greatest_load(case):
    loads, ranks, each = case
    copies = replicate(loads, ranks * each, most=ranks)
    assert copies.sum() == ranks * each and copies.min() >= 1 and copies.max() <= ranks
    assert (loads / copies).max() == pytest.approx(least_for_a_copy(loads, ranks * each, ranks))


@settings(max_examples=60, deadline=None)
@given(small().filter(fits))
def test_packs_are_full_hold_nothing_twice_and_are_nearly_as_even_as_can_be(case):
    loads, ranks, each = case
    copies = replicate(loads, ranks * each, most=ranks)
    packs = pack(loads / copies, copies, ranks, each)
    assert packs.shape == (ranks, each)
    assert all(len(set(one)) == each for one in packs.tolist())
    assert (np.bincount(packs.ravel(), minlength=len(loads)) == copies).all()
    heaviest = (loads / copies)[packs].sum(axis=1).max()
    assert heaviest <= 4 / 3 * lightest_packing(loads / copies, copies, ranks, each) + 1e-9


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant"), [(32, 4, 8), (64, 8, 16), (128, 8, 16), (256, 32, 32), (256, 64, 64)]
)
def test_the_busiest_rank_of_a_zipf_router_falls_to_little_more_than_the_mean(experts, ranks, redundant):
    chances = np.arange(1, experts + 1) ** -1.2
    rng = np.random.default_rng(0)
    loads, later = (rng.multinomial(200_000, chances / chances.sum()).astype(float) for _ in range(2))
    before = np.arange(experts)
    assert imbalance(before, later, ranks) >= 2
    after = balanced(loads, Places(num_ranks=ranks, slots_each=(experts + redundant) // ranks))
    assert imbalance(after, later, ranks) <= 1.15, "judged by other tokens than those that it was worked out from"


def test_groups_of_experts_stay_on_one_host():
    rng = np.random.default_rng(4)
    loads = rng.pareto(1.0, 32)
    slots = balanced(loads, Places(num_ranks=4, slots_each=10, num_groups=8, num_hosts=2))
    hosts = [{int(expert) // 4 for expert in half} for half in slots.reshape(2, -1)]
    assert len(hosts[0]) == len(hosts[1]) == 4 and not hosts[0] & hosts[1]
    assert set(slots.tolist()) == set(range(32))


def test_an_experts_copies_share_its_load():
    assert rank_loads(np.array([0, 1, 0, EMPTY]), np.array([8.0, 2.0]), 2).tolist() == [6.0, 4.0]
    assert imbalance(np.array([0, 1]), np.zeros(2), 2) == 1.0


# -- moves --------------------------------------------------------------------------------------------------


@st.composite
def placements(draw):
    """Where experts lie, some slots empty, and where they should."""
    ranks, experts = draw(st.integers(2, 4)), draw(st.integers(4, 10))
    each = draw(st.integers(-(-experts // ranks), experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))

    def packed():
        loads = rng.pareto(1.0, experts)
        return balanced(loads, Places(num_ranks=ranks, slots_each=each))

    current, target = packed(), packed()
    kept = np.unique(current, return_index=True)[1]
    spare = np.setdiff1d(np.arange(len(current)), kept)
    current[spare[rng.random(len(spare)) < 0.5]] = EMPTY
    return current, target, ranks


@settings(max_examples=100, deadline=None)
@given(placements())
def test_experts_get_where_they_should_and_every_one_lies_somewhere_all_the_while(case):
    current, target, ranks = case
    wanted = aligned(current, target, ranks)
    packs = [sorted(map(tuple, np.sort(each.reshape(ranks, -1), axis=1).tolist())) for each in (wanted, target)]
    assert packs[0] == packs[1], "the same packs, on other ranks and in other slots"
    slots, right, every = current.copy(), current == wanted, set(range(int(target.max()) + 1))
    found = list(exchanges(current, wanted))
    assert len(found) <= (~right).sum(), "each puts one slot right at least"
    for exchange in found:
        assert not right[[move.to for move in exchange]].any(), "what is right stays"
        before = slots.copy()
        for move in exchange:
            slots[move.to] = before[move.source]
        assert every <= set(slots.tolist())
        right = slots == wanted
    assert (slots == wanted).all()


def test_an_expert_that_stays_on_its_rank_keeps_its_slot():
    current, target = np.array([0, 1, 2, 3, 4, 5]), np.array([5, 2, 4, 1, 3, 0])
    wanted = aligned(current, target, 2)
    assert wanted.tolist() == [0, 1, 3, 2, 4, 5]
    assert len(list(exchanges(current, wanted))) == 1


# -- slots --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device():
    device = open_device("cpu", {})
    yield device
    device.close()


def test_copies_take_turns_and_padded_tokens_go_nowhere_and_do_not_count(device):
    slots = ExpertSlots(device.platform, num_experts=4, num_ranks=2, num_spare=1)
    assert slots.experts == [0, 1, -1, 2, 3, -1]
    slots.assign([0, 1, 2, 2, 3, 0])
    ids = torch.tensor([[0, 1], [0, 2], [0, 2], [3, 0]])
    picked = slots.pick(Routing(torch.ones(4, 2), ids), torch.tensor([True, True, True, False]))
    assert picked.expert_ids.tolist() == [[0, 1], [5, 3], [0, 2], [-1, -1]]
    assert slots.load.tolist() == [3, 1, 2, 0, 2]


def test_more_redundant_experts_than_ranks_could_use_are_refused(device):
    with pytest.raises(ConfigError, match="6 redundant experts are 3 on each of 2 ranks, beside 2 of 4 experts; 4 or"):
        ExpertSlots(device.platform, num_experts=4, num_ranks=2, num_spare=3)


# -- a model whose experts move -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3-moe")
    make_checkpoint("qwen3-moe", path)
    return path


def run(checkpoint, device, *, moving, ranks, redundant, dtype="float32", num_steps=14):
    """By rank, the outputs of the first layer of experts for the same tokens after every step, and where its experts
    lie then."""
    config = EngineConfig(
        model=str(checkpoint),
        device="cpu",
        dtype=dtype,
        tensor_parallel_size=ranks,
        expert_parallel=True,
        eplb_interval=2,
        num_redundant_experts=redundant,
    )
    model_config = load_model_config(str(checkpoint))
    ops = resolve_platform_ops(device.platform)
    shape = MeshShape(tp=ranks, joined={"ep": ("tp",)})

    def one(communicator, rank):
        source = CheckpointSource(config=config, model=model_config, platform=device.platform, ops=ops, contributed={})
        model = source.build(Mesh(shape, rank, communicator))
        balancer = ExpertBalancer.of(model, config)
        x = torch.randn(13, model_config.hidden_size, generator=torch.Generator().manual_seed(5)).to(
            getattr(torch, dtype)
        )
        found, where = [], []
        for _ in range(num_steps):
            if moving:
                balancer.step()
            with torch.inference_mode():
                found.append([layer(x, None) for layer in model.expert_layers])
            where.append([list(layer.slots.experts) for layer in model.expert_layers])
        return found, where, balancer.news()

    return on_ranks(ranks, one)


@pytest.mark.parametrize(("ranks", "redundant", "dtype"), [(2, 0, "float32"), (4, 0, "float32"), (4, 4, "bfloat16")])
def test_outputs_are_the_same_to_the_bit_while_experts_move(checkpoint, device, ranks, redundant, dtype):
    """With copies in bfloat16: in float32, this device's rows depend on how many share a product."""
    settings = {"ranks": ranks, "redundant": redundant, "dtype": dtype}
    still = run(checkpoint, device, moving=False, num_steps=1, **settings)
    moved = run(checkpoint, device, moving=True, **settings)
    wanted = still[0][0][0]
    for found, where, news in moved:
        assert where == moved[0][1], "ranks know alike where experts lie"
        for outputs in found:
            assert all(torch.equal(*pair) for pair in zip(outputs, wanted, strict=True))
        changes = [
            sum(a != b for x, y in zip(*pair, strict=True) for a, b in zip(x, y, strict=True))
            for pair in pairwise(where)
        ]
        assert sum(changes) > 0 and max(changes) <= MOVES_A_STEP
        assert news is not None and news.planned < news.imbalance and news.moved == sum(changes)


def test_travelled_tokens_give_what_the_sum_over_ranks_gives(checkpoint, device):
    """As far as rounding goes, which differs with the order of the sum."""
    travelled = run(checkpoint, device, moving=False, ranks=2, redundant=0, num_steps=1)[0][0][0]
    alone = CheckpointSource(
        config=EngineConfig(model=str(checkpoint), device="cpu", dtype="float32"),
        model=load_model_config(str(checkpoint)),
        platform=device.platform,
        ops=resolve_platform_ops(device.platform),
        contributed={},
    ).build(Mesh.alone())
    x = torch.randn(13, alone.hidden_size, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        for layer, found in zip(alone.expert_layers, travelled, strict=True):
            torch.testing.assert_close(found, layer(x, None))
