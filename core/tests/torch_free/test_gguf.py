"""GGUF files' headers and metadata: what they say is read, and whatever is wrong with a file is said by its name."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf_metadata import VALUES, gguf_bytes, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anychip.errors import CheckpointError, ConfigError
from anychip.gguf.header import read_header
from anychip.gguf.model import only_model_in, read_model
from anychip.hub import resolve_folder
from anychip.model_config import load_model_config

METADATA = {"general.architecture": "llama", "a": [1, 2], "b": ["x", "yz"], "c": True, "d": 0.5, "e": [[1], [2, 3]]}
TENSORS = {"t": ("F32", (2, 3), struct.pack("<6f", *range(6))), "q": ("Q4_0", (2, 32), bytes(36))}
WHOLE = gguf_bytes(METADATA, TENSORS)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors_are_read(version, tmp_path):
    header = read_header(write_gguf(tmp_path / "m.gguf", METADATA, TENSORS, version=version))
    read = header.metadata
    nested = [list(each) for each in read["e"]]
    assert {**read, "a": list(read["a"]), "b": read["b"].read(), "e": nested} == METADATA
    assert {name: (t.type.name, t.shape) for name, t in header.tensors.items()} == {
        "t": ("F32", (2, 3)), "q": ("Q4_0", (2, 32)),
    }  # fmt: skip
    tensor = header.tensors["t"]
    assert tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes] == TENSORS["t"][2]


@given(st.integers(0, len(WHOLE) - 1))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, length):
    """But for the padding behind the last tensor."""
    path = written(tmp_path / "m.gguf", WHOLE[:length])
    if length >= len(WHOLE) - 28:
        read_header(path)
        return
    with pytest.raises(CheckpointError, match=r"m\.gguf is not a readable GGUF file: "):
        read_header(path)


@given(st.binary(min_size=0, max_size=64), st.integers(4, len(WHOLE) - 80))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_header_is_read_or_refused(tmp_path, noise, at):
    path = written(tmp_path / "m.gguf", WHOLE[:at] + noise + WHOLE[at + len(noise) :])
    try:
        load_model_config(str(path))
    except (CheckpointError, ConfigError) as error:
        assert "m.gguf" in str(error)


def changed(at: int, data: bytes) -> bytes:
    return WHOLE[:at] + data + WHOLE[at + len(data) :]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "its header goes on beyond byte 0, the file has 0: it is cut short"),
        (changed(0, b"GGML"), "it begins with b'GGML', and a GGUF file with b'GGUF'"),
        (changed(4, struct.pack("<I", 1)), "version 1, versions 2 and 3 are read; convert the model again"),
        (changed(4, struct.pack("<I", 4)), "version 4, versions 2 and 3 are read; a newer anychip may read it"),
        (changed(4, struct.pack(">I", 3)), "it is big-endian"),
        (changed(8, struct.pack("<Q", 1 << 60)), "announces 1152921504606846976 tensors and 6 settings in"),
        (changed(24, struct.pack("<Q", 1 << 62)), "its header goes on beyond byte 32, the file has .* cut short"),
        (gguf_bytes({"general.alignment": 7}, {}), "general.alignment is 7; it is a multiple of 8"),
        (gguf_bytes({}, {"t": ("F32", (2, 0), b"")}), r"tensor 't' has shape \[2, 0\]"),
        (gguf_bytes({}, {"t": ("F32", (1, 1, 1, 1, 1), b"")}), "tensor 't' has 5 dimensions; 1 to 4"),
        (gguf_bytes({}, {"t": (77, (2,), b"")}), "tensor 't' is of type 77, which is not known; known are F32, F16"),
        (gguf_bytes({}, {"t": ("Q4_K", (2, 96), b"")}), r"rows of 96 values, which blocks of 256 \(Q4_K\) do not"),
        (WHOLE[:-64], "tensor 'q' ends at byte .*, the file has .*: it is cut short; download it again"),
    ],
)  # fmt: skip
def test_a_broken_file_says_what_is_wrong(data, said, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        read_header(written(tmp_path / "m.gguf", data))


def test_pieces_that_do_not_belong_together_are_refused(tmp_path):
    tensors = {"t": TENSORS["t"]}
    for number in (1, 2):
        write_gguf(tmp_path / f"m-0000{number}-of-00002.gguf", METADATA, tensors)
    with pytest.raises(CheckpointError, match="both hold tensor 't'"):
        read_model(tmp_path / "m-00001-of-00002.gguf")
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {}, {"u": TENSORS["t"]})
    write_gguf(tmp_path / "m-00001-of-00002.gguf", {"split.count": 2, "split.tensors.count": 3}, tensors)
    with pytest.raises(CheckpointError, match="announces 3 tensors in 2 pieces, and they hold 2"):
        read_model(tmp_path / "m-00001-of-00002.gguf")
    write_gguf(tmp_path / "alone.gguf", {"split.count": 2}, tensors)
    with pytest.raises(CheckpointError, match="says that it is a piece of 2, and its name says 1; .*-00001-of-00002"):
        read_model(tmp_path / "alone.gguf")


def test_a_folder_stands_for_its_only_model(tmp_path):
    assert only_model_in(tmp_path) is None
    file = write_gguf(tmp_path / "m.gguf", METADATA, TENSORS)
    assert resolve_folder(str(tmp_path)) == resolve_folder(str(file)) == file
    write_gguf(tmp_path / "other.gguf", METADATA, TENSORS)
    with pytest.raises(ConfigError, match=r"holds 2 GGUF models; name one of them: m.gguf, other.gguf"):
        resolve_folder(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert resolve_folder(str(tmp_path)) == tmp_path


def test_a_file_of_a_cached_repository_is_found_without_the_network(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    (snapshot / "q4").mkdir(parents=True)
    names = [f"q4/m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for name in names:
        write_gguf(snapshot / name, METADATA, {})
    assert resolve_folder(f"acme/tiny:{names[1]}") == snapshot / names[0]
    with pytest.raises(ConfigError, match="'absent.gguf' of 'acme/tiny' is not in the hub's cache, and could not"):
        resolve_folder("acme/tiny:absent.gguf")


def test_ends_of_texts_are_the_files_and_those_that_are_written_so(tmp_path):
    tokens = ["<s>", "</s>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|im_end|>x"]
    vocabulary = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 1}
    kinds = {"tokenizer.ggml.token_type": [3, 3, 3, 3, 1, 3, 3]}
    sampling = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    tensors = {"token_embd.weight": ("F16", (7, 4), bytes(56))}
    file = write_gguf(tmp_path / "m.gguf", {**VALUES, **vocabulary, **kinds, **sampling}, tensors)
    model = load_model_config(str(file))
    assert model.eos_token_ids == (1, 2, 3, 5)
    assert model.sampling_defaults == {"temperature": 0.5, "top_k": 20}
    assert (model.vocab_size, model.dtype, model.tie_word_embeddings) == (7, "float16", True)
    harmony = {"tokenizer.ggml.token_type": [3] * 7}
    write_gguf(file, {**VALUES, **vocabulary, **harmony}, tensors)
    assert load_model_config(str(file)).eos_token_ids == (1, 2, 4, 5)
