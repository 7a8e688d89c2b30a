"""Tokenizers of GGUF files make the ids that the tokenizers make which the files were written from."""

from __future__ import annotations

import io
import json
from itertools import pairwise

import pytest
import sentencepiece
from gguf_metadata import VALUES, write_gguf

from anychip.errors import CheckpointError, InvalidRequest
from anychip.hub import resolve_folder
from anychip.tokenizer.pre_tokenizers import WORDS
from anychip.tokenizer.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
TEXTS = (
    "The capital of France is Paris.", "don't stop 'till 12345 o'clock", "  two  spaces\n\n\tand tabs ",
    "naïve 你好 🙂", "<|im_start|>user\nhi<|im_end|>\n", "def f(x):\n    return x**2", "",
)  # fmt: skip


def byte_level() -> dict:
    """The embedded model's tokenizer as a file's metadata."""
    held = json.loads((resolve_folder("quickstart") / "tokenizer.json").read_text())
    tokens = dict(held["model"]["vocab"])
    added = {token["content"]: token["id"] for token in held["added_tokens"]}
    listed = sorted((tokens | added).items(), key=lambda item: item[1])
    assert [id for _, id in listed] == list(range(len(listed)))
    return {
        **VALUES,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [token for token, _ in listed],
        "tokenizer.ggml.token_type": [CONTROL if token in added else NORMAL for token, _ in listed],
        "tokenizer.ggml.merges": [" ".join([m] if isinstance(m, str) else m) for m in held["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": added["<|im_start|>"],
        "tokenizer.ggml.eos_token_id": added["<|im_end|>"],
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip


def loaded(tmp_path, metadata, **options) -> Tokenizer:
    return Tokenizer.load(str(write_gguf(tmp_path / "m.gguf", metadata, {})), **options)


def test_a_byte_level_vocabulary_encodes_as_its_tokenizer_json(tmp_path):
    ours, theirs = loaded(tmp_path, byte_level()), Tokenizer.load("quickstart")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert b"".join(map(ours.token_bytes, ids)).decode() == text
    assert ours.special_ids == theirs.special_ids


def test_a_text_begins_and_ends_as_the_file_says(tmp_path):
    given = byte_level()
    plain = loaded(tmp_path, given).encode("hi")
    both = loaded(tmp_path, {**given, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})
    bos, eos = (given[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos"))
    assert both.encode("hi") == [bos, *plain, eos]
    assert both.encode("hi", add_special_tokens=False) == plain
    del given["tokenizer.ggml.add_bos_token"]
    assert loaded(tmp_path, given).encode("hi") == [bos, *plain], "Llama 3's kind begins so unless it is told not to"
    assert loaded(tmp_path, {**given, "tokenizer.ggml.pre": "qwen2"}).encode("hi") == plain


@pytest.mark.parametrize("name", WORDS)
def test_no_way_to_cut_loses_a_character(name):
    text = "Hello World's  HTTPServer 12345 don't!!\r\n\n  x=1;\tnaïve 你好a 🙂 Ünï"
    cut = WORDS[name].pre_tokenizer().pre_tokenize_str(text)
    assert [span for _, span in cut] == [(a, b) for a, b in pairwise([0, *(end for _, (_, end) in cut)])]
    assert cut[-1][1][1] == len(text)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["camelCase", " don", "'t", " 1234", "!!", "\n", "\n", "DON", "'", "T"]),
        ("smollm", ["camelCase", " don", "'t", " ", "1", "2", "3", "4", "!!", "\n", "\n", "DON", "'", "T"]),
        ("llama-bpe", ["camelCase", " don", "'t", " ", "123", "4", "!!\n\n", "DON", "'T"]),
        ("qwen2", ["camelCase", " don", "'t", " ", "1", "2", "3", "4", "!!\n\n", "DON", "'T"]),
        ("gpt-4o", ["camel", "Case", " don't", " ", "123", "4", "!!\n\n", "DON'T"]),
        ("tekken", ["camel", "Case", " don", "'t", " ", "1", "2", "3", "4", "!!\n\n", "DON", "'T"]),
    ],
)
def test_texts_are_cut_as_the_models_tokenizers_do(name, words):
    text = "camelCase don't 1234!!\n\nDON'T"
    assert [text[a:b] for _, (a, b) in WORDS[name].pre_tokenizer().pre_tokenize_str(text)] == words


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece model of Llama 2's kind, as its library made it: byte pairs, with bytes to fall back on."""
    text = [
        "the quick brown fox jumps over the lazy dog",
        "pack my box with five dozen jugs",
        "how vexingly quick",
    ] * 20
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=made, vocab_size=330, model_type="bpe", byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2, user_defined_symbols=["<x>"],
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())


def of_pieces(pieces) -> dict:
    def kind(id: int) -> int:
        if pieces.is_unknown(id):
            return UNKNOWN
        return CONTROL if pieces.is_control(id) else BYTE if pieces.is_byte(id) else USER if id == 3 else NORMAL

    ids = range(pieces.get_piece_size())
    return {
        **VALUES,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(id) for id in ids],
        "tokenizer.ggml.scores": [float(pieces.get_score(id)) for id in ids],
        "tokenizer.ggml.token_type": [kind(id) for id in ids],
        "tokenizer.ggml.bos_token_id": pieces.bos_id(),
        "tokenizer.ggml.eos_token_id": pieces.eos_id(),
        "tokenizer.ggml.unknown_token_id": pieces.unk_id(),
    }


def test_a_vocabulary_of_scores_encodes_as_sentencepiece_does(pieces, tmp_path):
    ours = loaded(tmp_path, of_pieces(pieces))
    assert pieces.id_to_piece(3) == "<x>"
    for text in ("the lazy fox", "quick  quick", "naïve 你好", "dozen vexing jugs over my  box", "zzz"):
        ids = ours.encode(text)
        assert ids == [pieces.bos_id(), *pieces.encode(text)], text
        assert ours.decode(ids) == text
    assert ours.encode("<x>", add_special_tokens=False) == [3]


def test_a_file_may_put_no_space_before_a_text(pieces, tmp_path):
    ours = loaded(tmp_path, {**of_pieces(pieces), "tokenizer.ggml.add_space_prefix": False})
    ids = ours.encode("fox", add_special_tokens=False)
    assert ours.decode(ids) == "fox"
    assert ours.encode(" fox", add_special_tokens=False) == pieces.encode("fox")


def test_the_chat_template_sees_the_files_special_tokens(tmp_path):
    given = byte_level()
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    asked = {"tokenizer.chat_template": template, "tokenizer.chat_template.tool_use": "tools"}
    ours = loaded(tmp_path, {**given, **asked})
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages) == "<|im_start|>hi<|im_end|>"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert ours.apply_chat_template(messages, tools=[tool]) == "tools"
    broken = loaded(tmp_path, {**given, "tokenizer.chat_template": "{% for %}"})
    with pytest.raises(InvalidRequest, match="the chat template refused"):
        broken.apply_chat_template(messages)
    assert loaded(tmp_path, given).chat_template is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer in its metadata; give one with --tokenizer"),
        ({"tokenizer.ggml.model": "t5"}, "a tokenizer of the kind 't5'; gpt2 and llama are read"),
        ({"tokenizer.ggml.pre": "new"}, "cuts texts as 'new' .*known are default, gpt-2"),
        ({"tokenizer.ggml.merges": None}, "has no 'tokenizer.ggml.merges'"),
        ({"tokenizer.ggml.merges": ["ab"]}, "merge 'ab' is not two pieces with a space between them"),
        ({"tokenizer.ggml.merges": ["q\u0120q zz\u0120z"]}, "the tokenizer of .* cannot be built: "),
        ({"tokenizer.ggml.token_type": [1, 2]}, "tokens and 2 types of tokens"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, "tokens and 1 scores of tokens"),
        ({"tokenizer.ggml.eos_token_id": 1 << 20}, "eos_token_id is 1048576, and there are"),
    ],
)
def test_a_broken_tokenizer_says_what_is_wrong(changes, said, tmp_path):
    given = {name: value for name, value in {**byte_level(), **changes}.items() if value is not None}
    with pytest.raises(CheckpointError, match=said):
        loaded(tmp_path, given)


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="the model's vocabulary has 100: they do not belong together"):
        loaded(tmp_path, byte_level(), vocab_size=100)
