"""Which files are a checkpoint: the model's own, whatever else lies beside them."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anychip.errors import CheckpointError
from anychip.weight_files import INDEX, WHOLE, weight_files

STRANGERS = ("consolidated.safetensors", "adapter_model.safetensors", "optimizer.safetensors", "weights.safetensors")
INDEXED = ("a.safetensors", "b.safetensors", "model-1.safetensors")
SERIES = tuple(f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3))


def fill(folder: Path, *names: str, index: dict[str, str] | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return folder


def read(folder: Path) -> list[str]:
    return [file.path.name for file in weight_files(folder)]


@given(
    whole=st.booleans(),
    assigned=st.dictionaries(st.text("xyz.", min_size=1, max_size=4), st.sampled_from(INDEXED), min_size=1) | st.none(),
    strangers=st.sets(st.sampled_from((*STRANGERS, "original/model.safetensors", "pytorch_model.bin"))),
)
def test_the_models_own_files_are_read_and_no_other(whole, assigned, strangers):
    with TemporaryDirectory() as name:
        folder = fill(
            Path(name), *strangers, *([WHOLE] if whole else []), *(INDEXED if assigned else []), index=assigned
        )
        if whole:
            assert read(folder) == [WHOLE]
        elif assigned:
            files = weight_files(folder)
            tensors = {tensor: file.path.name for file in files for tensor in file.tensors or ()}
            assert tensors == assigned
            assert read(folder) == sorted(set(assigned.values()))
        else:
            with pytest.raises(CheckpointError):
                weight_files(folder)


def test_pieces_without_an_index_are_one_checkpoint(tmp_path):
    assert read(fill(tmp_path, *SERIES, *STRANGERS)) == list(SERIES)


def test_the_only_variant_is_the_model(tmp_path):
    assert read(fill(tmp_path, "model.fp16.safetensors", *STRANGERS)) == ["model.fp16.safetensors"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (SERIES[::2], "and not piece 2 of 3; download"),
        ((*SERIES, "model-00004-of-00004.safetensors"), "and not one series of 4"),
        (("model.fp16.safetensors", "model.bf16.safetensors"), f"nothing says which to read; name one of them {WHOLE}"),
        (("consolidated.safetensors",), f"holds consolidated.safetensors, and no {WHOLE}: .* give the folder"),
        (("original/model.safetensors",), f"holds original/model.safetensors, and no {WHOLE}"),
        (("pytorch_model.bin", "adapter_model.safetensors"), "pytorch_model.bin, a pickle, .*: convert it"),
        ((), "holds no .*.safetensors file; --load-format dummy"),
    ],
)
def test_files_that_are_no_whole_model_are_refused_with_what_to_do(names, expected, tmp_path):
    with pytest.raises(CheckpointError, match=expected):
        weight_files(fill(tmp_path, *names))


def test_a_shard_that_is_not_there_is_named_with_what_it_should_hold(tmp_path):
    index = {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"}
    with pytest.raises(CheckpointError, match=r"names y.safetensors, which is not in .* \(2 tensors are to be in it\)"):
        weight_files(fill(tmp_path, "x.safetensors", index=index))


def test_an_index_of_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="assigns no tensor to any file"):
        weight_files(fill(tmp_path, "a.safetensors", index={}))
