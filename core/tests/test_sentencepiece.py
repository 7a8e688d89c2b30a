"""A checkpoint with a SentencePiece model and no tokenizer.json."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece

from anychip.errors import CheckpointError
from anychip.tokenizer.detokenizer import Detokenizer
from anychip.tokenizer.tokenizer import Tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "how vexingly quick"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Llama 2's kind: byte-pair encoding with bytes to fall back on."""
    made = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (made / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    (made / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 330}))
    return made


def test_it_encodes_as_sentencepiece_does(folder):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = Tokenizer.load(str(folder), 330)
    for text in ("the lazy fox", "quick  quick", "naïve 你好"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)).strip() == text


def test_characters_in_several_tokens_stream_whole(folder):
    tokenizer = Tokenizer.load(str(folder))
    ids = tokenizer.encode("fox 你好", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, [1], skip_special_tokens=True)
    pieces = [detokenizer.add([token]) for token in ids]
    assert "".join(pieces).strip() == "fox 你好"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_broken_model_says_what_it_takes(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match="tokenizer.model could not be converted: .*sentencepiece"):
        Tokenizer.load(str(tmp_path))
