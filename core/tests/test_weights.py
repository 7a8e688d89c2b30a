"""Files are read by rows, in any dtype, and a broken one says where it is broken."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anychip.errors import CheckpointError
from anychip.weights.checkpoint import Checkpoint
from anychip.weights.dummy import DummyView, NoisePool
from anychip.weights.files import SafetensorsFile
from anychip.weights.matrix import CHUNK_BYTES, ROW_MULTIPLE, Span, row_chunks, stream
from anychip.weights.register import WeightRegister, load_weights
from anychip.weights.spare_threads import num_spare, spare_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_part_of_a_tensor_reads_as_it_was_saved(dtype, tmp_path):
    saved = {"matrix": torch.arange(60).view(12, 5).to(dtype), "vector": torch.arange(7).to(dtype)}
    saved |= {"scalar": torch.tensor(3).to(dtype), "cube": torch.arange(24).view(2, 3, 4).to(dtype)}
    save_file(saved, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    views = dict(file.views())
    for name, tensor in saved.items():
        assert (views[name].shape, views[name].dtype, views[name].nbytes) == (tuple(tensor.shape), dtype, tensor.nbytes)
        assert same(views[name].read(), tensor)
    assert same(views["matrix"].read((3, 9)), saved["matrix"][3:9])
    assert same(views["matrix"].read((3, 9), (1, 4)), saved["matrix"][3:9, 1:4])
    assert same(views["cube"].read((1, 2)), saved["cube"][1:2])
    assert same(views["vector"].read((2, 6)), saved["vector"][2:6])
    file.close()


@settings(max_examples=25, deadline=None)
@given(places=st.dictionaries(st.sampled_from("uvwxyz"), st.sampled_from("ab"), min_size=1), data=st.data())
def test_a_tensor_is_read_from_the_shard_that_the_index_assigns_it_to(places, data):
    """Other shards may hold it too, and tensors that the index leaves out."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file in set(places.values()):
            extra = data.draw(st.sets(st.sampled_from("uvwxyz")))
            tensors = {t: torch.full((2,), float(places.get(t) == file)) for t in extra}
            save_file(
                tensors | {t: torch.ones(2) for t, f in places.items() if f == file}, folder / f"{file}.safetensors"
            )
        index = {tensor: f"{file}.safetensors" for tensor, file in places.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        checkpoint = Checkpoint(folder)
        read = [(tensor, view.read().tolist()) for tensor, view in checkpoint.views()]
        assert sorted(read) == [(tensor, [1.0, 1.0]) for tensor in sorted(places)]
        assert checkpoint.names == set(places)


def test_a_shard_without_a_tensor_that_is_assigned_to_it_is_named(tmp_path):
    save_file({"v": torch.zeros(2)}, tmp_path / "a.safetensors")
    index = {"weight_map": dict.fromkeys(("u", "v", "w"), "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (lambda: Checkpoint(tmp_path).names, lambda: list(Checkpoint(tmp_path).views())):
        with pytest.raises(
            CheckpointError, match=r"a.safetensors lacks tensor 'u' and 1 more, which .*index.json assigns"
        ):
            read()


def test_a_tensor_that_two_pieces_hold_is_refused_without_an_index(tmp_path):
    for index in (1, 2):
        save_file({"v": torch.zeros(2)}, tmp_path / f"model-0000{index}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="both hold tensor 'v', and there is no model.safetensors.index.json"):
        list(Checkpoint(tmp_path).views())


@given(first=st.binary(min_size=1, max_size=20), second=st.binary(min_size=1, max_size=20))
def test_tensors_are_the_same_if_all_their_bytes_are(first, second):
    with TemporaryDirectory() as name:
        tensors = {n: torch.frombuffer(bytearray(b), dtype=torch.uint8) for n, b in (("a", first), ("b", second))}
        save_file(
            tensors | {"c": tensors["a"].clone(), "d": tensors["a"].view(torch.int8).clone()},
            Path(name) / "model.safetensors",
        )
        checkpoint = Checkpoint(Path(name))
        assert checkpoint.same("a", "c")
        assert not checkpoint.same("a", "d"), "another dtype"
        assert checkpoint.same("a", "b") == (first == second)


def test_a_tensor_under_two_names_is_refused_with_both(tmp_path):
    save_file({"norm.weight": torch.zeros(2), "model.norm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    register = WeightRegister()
    register.want("model.norm.weight", (2,), lambda view: None)
    with pytest.raises(CheckpointError, match="is another 'model.norm.weight': the checkpoint holds it under two"):
        load_weights(register, Checkpoint(tmp_path).views(), "folder")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)) if a.dim() else bool(a == b)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    save_file({name: torch.zeros(3) for name in "cab"}, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    offsets = [view._offset for _, view in file.views()]
    file.close()
    assert offsets == sorted(offsets)


def spoiled(tmp_path, change) -> SafetensorsFile:
    save_file({"weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header, data = change(header, content[8 + length :])
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return SafetensorsFile(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda h, d: (h, d[:-5]), "'weight' ends at byte .*, the file has .*: it is cut short"),
        (lambda h, d: (b"{", d), "its header cannot be read"),
        (lambda h, d: (b"[]", d), "its header cannot be read: Expected `object`"),
        (lambda h, d: ({"weight": {"dtype": "F32"}}, d), "its header cannot be read: .*missing required field `shape`"),
        (lambda h, d: ({**h, "weight": {**h["weight"], "dtype": "F4"}}, d), "'weight' has dtype F4; known are"),
        (lambda h, d: ({**h, "weight": {**h["weight"], "shape": [4, 5]}}, d), "takes 64 bytes, its shape 80"),
        (lambda h, d: ({**h, "weight": {**h["weight"], "data_offsets": [-64, 0]}}, d), "takes 64 bytes"),
    ],
)
def test_a_broken_file_says_where(change, expected, tmp_path):
    with pytest.raises(CheckpointError, match=f"model.safetensors is not a readable safetensors file: .*{expected}"):
        spoiled(tmp_path, change)


def test_a_file_shorter_than_its_header_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((10**9).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header would take 1000000000 of 10 bytes"):
        SafetensorsFile(tmp_path / "model.safetensors")


@given(start=st.integers(0, 500), count=st.integers(0, 3000), row_bytes=st.integers(1, 2 * CHUNK_BYTES))
def test_chunks_cover_the_rows_once_and_begin_at_whole_groups(start, count, row_bytes):
    chunks = list(row_chunks(Span(start, count), row_bytes))
    assert [row for a, b in chunks for row in range(a, b)] == list(range(start, start + count))
    assert all((a - start) % ROW_MULTIPLE == 0 for a, _ in chunks)
    assert all((b - a) * row_bytes <= max(CHUNK_BYTES, ROW_MULTIPLE * row_bytes) for a, b in chunks)


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 2500), count=st.integers(1, 1500), columns=st.tuples(st.integers(0, 3), st.integers(4, 7)))
def test_made_up_weights_are_the_same_in_every_slice(start, count, columns):
    view, same = (DummyView("model.weight", (4000, 7), NoisePool(torch.float32, longest=9000)) for _ in range(2))
    whole = same.read((0, 4000), (0, 7))
    got = torch.zeros(count, columns[1] - columns[0])
    stream(
        view,
        Span(start, count),
        Span(columns[0], columns[1] - columns[0]),
        lambda rows, at: got[at : at + len(rows)].copy_(rows),
    )
    assert got.equal(whole[start : start + count, columns[0] : columns[1]])


def test_a_made_up_row_may_be_longer_than_the_pool():
    row = DummyView("w", (2, 5, 1000), NoisePool(torch.float32, longest=2048)).read((1, 2))
    assert row.shape == (1, 5, 1000) and row.count_nonzero() > 4990


def test_made_up_matrices_differ_and_have_the_usual_spread():
    pool = NoisePool(torch.bfloat16, longest=2048)
    first, second = (DummyView(name, (64, 64), pool).read() for name in ("a.weight", "b.weight"))
    assert not first.equal(second) and not first[:32].equal(first[32:])
    assert abs(float(first.float().std()) - 0.02) < 0.002


@given(cores=st.integers(1, 64), load=st.floats(0, 200), most=st.integers(1, 64))
def test_weights_are_turned_by_threads_that_have_a_core(cores, load, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        patch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
        count = num_spare(most)
    assert 1 <= count <= most
    assert count == 1 or count + round(load) <= cores


def test_torchs_threads_are_as_before_whatever_happens():
    before = torch.get_num_threads()
    with pytest.raises(OSError, match="gone"), spare_threads():
        raise OSError("gone")
    assert torch.get_num_threads() == before
