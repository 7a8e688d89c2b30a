"""Ranks as a mesh: who is whose peer, which communicators are opened, and what of a tensor each rank holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anychip.errors import ConfigError, Unsupported
from anychip.plugin_api import AXES, Communicator, Mesh, MeshShape, Sharded, Span, held

shapes = st.builds(MeshShape, **{axis: st.integers(1, 2) for axis in AXES})


class Named(Communicator):
    """A communicator of nobody, which knows its group."""

    name = "named"


@given(shape=shapes, data=st.data())
def test_groups_along_an_axis_share_the_world_out(shape, data):
    axis = data.draw(st.sampled_from(AXES))
    groups = {shape.peers(axis, rank) for rank in range(shape.size)}
    assert sorted(rank for group in groups for rank in group) == list(range(shape.size))
    for group in groups:
        assert [shape.coordinates(rank)[axis] for rank in group] == list(range(shape.size_of(axis)))


@given(shape=shapes)
def test_ranks_are_counted_with_the_last_axis_fastest(shape):
    places = [tuple(shape.coordinates(rank).values()) for rank in range(shape.size)]
    by_name = [tuple(shape.coordinates(rank)[axis] for axis in AXES) for rank in range(shape.size)]
    assert by_name == sorted(by_name) and len({*by_name}) == shape.size
    assert len(places[0]) == len(AXES)


def test_the_order_of_axes_is_the_documented_one():
    assert AXES == ("pp", "dp", "cp", "ep", "tp")
    shape = MeshShape(dp=2, tp=2)
    assert [shape.peers("tp", 0), shape.peers("tp", 3)] == [(0, 1), (2, 3)]
    assert [shape.peers("dp", 0), shape.peers("dp", 3)] == [(0, 2), (1, 3)]
    assert str(shape) == "dp 2 x tp 2" and str(MeshShape()) == "one rank"


@pytest.mark.parametrize("parts", [("dp", "tp"), ("tp", "dp")])
def test_a_joined_axis_is_in_the_order_of_axes_however_it_is_named(parts):
    shape = MeshShape(pp=2, dp=2, tp=2, joined={"ep": parts})
    assert shape.size_of("ep") == 4
    assert shape.peers("ep", 6) == (4, 5, 6, 7)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MeshShape().peers("sp", 0), "there is no axis 'sp'; axes are pp, dp, cp, ep, tp"),
        (lambda: Mesh.alone().axis("tensor"), "there is no axis 'tensor'; axes are pp, dp, cp, ep, tp"),
        (lambda: MeshShape(joined={"xp": ("dp",)}), "there is no axis 'xp'"),
        (lambda: MeshShape(tp=0), "axis tp has size 0"),
        (
            lambda: MeshShape(ep=2, joined={"ep": ("dp", "tp")}),
            "axis ep is joined from dp, tp and has a size of its own",
        ),
        (lambda: MeshShape(joined={"ep": ()}), "axis ep joins none"),
        (lambda: MeshShape(joined={"ep": ("dp", "dp")}), "axis ep joins dp, dp"),
        (lambda: MeshShape(joined={"ep": ("dp", "cp"), "cp": ("tp",)}), "axis ep joins dp, cp"),
    ],
)
def test_what_is_no_mesh_is_refused_with_its_reason(make, reason):
    with pytest.raises(Unsupported, match=reason):
        make()


def test_an_axis_is_opened_once_and_only_if_somebody_asks():
    asked = []

    def communicator(group):
        asked.append((group.purpose, group.ranks, group.rank, group.max_message_bytes, group.store, group.timeout_s))
        return Named(group)

    mesh = Mesh(MeshShape(dp=2, tp=2), 2, communicator, max_message_bytes=9, store="file:///s", timeout_s=3.0)
    assert mesh.opened == ()
    tp, again, pp = mesh.axis("tp"), mesh.axis("tp"), mesh.axis("pp")
    assert tp is again and (tp.rank, tp.size) == (0, 2)
    assert type(pp) is Communicator and (pp.rank, pp.size) == (0, 1), "an axis of one rank costs nothing"
    assert asked == [("tp", (2, 3), 2, 9, "file:///s", 3.0)]
    assert mesh.opened == (tp, pp)


def test_a_platform_refuses_an_axis_with_its_reason():
    def communicator(group):
        raise Unsupported("acme", ["no all-to-all between hosts"])

    with pytest.raises(Unsupported, match="^acme: axis ep of 4 ranks: no all-to-all between hosts$"):
        Mesh(MeshShape(ep=4), 1, communicator).axis("ep")


# -- what a rank holds ----------------------------------------------------------------------------------------


def spans(extent: int, sharded: Sharded, shape: MeshShape) -> list[Span]:
    return [sharded.share(extent, shape, rank) for rank in range(shape.size)]


@given(shape=shapes, axis=st.sampled_from(AXES), units=st.integers(1, 5), unit=st.integers(1, 4))
def test_equal_shares_cover_a_dimension_once_along_their_axis(shape, axis, units, unit):
    extent = units * unit * shape.size_of(axis)
    found = spans(extent, Sharded(dim=0, axis=axis, unit=unit), shape)
    for group in {shape.peers(axis, rank) for rank in range(shape.size)}:
        assert [i for rank in group for i in range(*found[rank].bounds)] == list(range(extent))


@given(extent=st.integers(1, 40), size=st.integers(1, 8))
def test_padded_shares_are_equal_and_their_tails_lie_past_the_end(extent, size):
    shape = MeshShape(tp=size)
    found = spans(extent, Sharded(dim=0, uneven="pad"), shape)
    assert len({span.count for span in found}) == 1
    assert [i for span in found for i in range(*span.within(extent).bounds)] == list(range(extent))


@pytest.mark.parametrize(
    ("heads", "size", "expected"), [(2, 4, [0, 0, 1, 1]), (1, 3, [0, 0, 0]), (3, 3, [0, 1, 2]), (2, 2, [0, 1])]
)
def test_neighbours_repeat_what_is_fewer_than_they_are(heads, size, expected):
    found = spans(heads * 8, Sharded(dim=0, unit=8, uneven="repeat"), MeshShape(tp=size))
    assert found == [Span(8 * head, 8) for head in expected]


@pytest.mark.parametrize(
    ("sharded", "extent", "reason"),
    [
        (Sharded(dim=0), 7, "7 rows do not split evenly 4 ways; choose another tensor_parallel_size"),
        (Sharded(dim=0, axis="ep"), 7, "7 rows do not split evenly 2 ways; choose another size of axis ep"),
        (Sharded(dim=0, unit=4), 8, "2 rows do not split evenly 4 ways"),
        (Sharded(dim=0, uneven="repeat"), 3, "4 ranks over rows do not split evenly 3 ways"),
        (Sharded(dim=0, uneven="repeat"), 6, "6 rows do not split evenly 4 ways"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(sharded, extent, reason):
    with pytest.raises(ConfigError, match=reason):
        sharded.count(extent, MeshShape(ep=2, tp=4), "rows")


def test_dimensions_are_divided_along_their_own_axes_and_others_are_whole():
    placed = (Sharded(dim=0, axis="ep"), Sharded(dim=2, axis="tp"))
    found = [held((4, 5, 6), placed, Mesh(MeshShape(ep=2, tp=2), rank, Named)) for rank in range(4)]
    assert found[1] == (Span(0, 2), Span(0, 5), Span(3, 3))
    assert found[2] == (Span(2, 2), Span(0, 5), Span(0, 3))
