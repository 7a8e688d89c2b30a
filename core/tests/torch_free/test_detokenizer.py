"""Ids become text piece by piece: no ids raise, and the pieces are what decoding all at once gives."""

from __future__ import annotations

import codecs

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from anychip.tokenizer.detokenizer import Detokenizer
from anychip.tokenizer.tokenizer import Tokenizer

_BYTES = [f"<0x{byte:02X}>" for byte in (0x0A, 0x20, 0x41, 0x80, 0x98, 0x9F, 0xC3, 0xE2, 0xF0, 0xFF)]
_WORDS = ["x", "▁hello", "▁", "▁▁", "lo▁", "é", "🦙", "##s", "##.", ".", "'", "n't", "do", "not", "b</w>", "</w>", "|"]
_BYTE_LEVEL = ["Ġ", "Ġw", "Ċ", "ð", "Ł", "ð\u0141", "ĺ", "Ģ", "Ã", "©", "â", "Ĥ", "¬", "ÿ", "x", "日"]
_SPECIAL = ["<s>", "<｜end▁of｜>"]

_LLAMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
_LLAMA_STRIP = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
_FUSED_FIRST = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
KINDS = {
    "byte-level": (decoders.ByteLevel(), _BYTE_LEVEL),
    "byte-level in a sequence": (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), _BYTE_LEVEL),
    "byte fallback": (_LLAMA, _BYTES + _WORDS),
    "byte fallback, first space stripped": (_LLAMA_STRIP, _BYTES + _WORDS),
    "metaspace": (decoders.Metaspace(), _WORDS),
    "metaspace, nothing prepended": (decoders.Metaspace(prepend_scheme="never"), _WORDS),
    "wordpiece": (decoders.WordPiece(), _WORDS),
    "wordpiece as it is": (decoders.WordPiece(cleanup=False), _WORDS),
    "none": (None, _WORDS),
    "word ends": (decoders.BPEDecoder(), _WORDS),
    "ctc": (decoders.CTC(pad_token="x"), _WORDS),
    "spaces after fusing": (_FUSED_FIRST, _BYTES + _WORDS),
}  # fmt: skip


def tokenizer(kind: str) -> Tokenizer:
    decoder, words = KINDS[kind]
    raw = tokenizers.Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="x"))
    if decoder is not None:
        raw.decoder = decoder
    raw.add_tokens([AddedToken(text, special=True) for text in _SPECIAL] + [AddedToken("<tool>")])
    return Tokenizer(raw, None)


TOKENIZERS = {kind: tokenizer(kind) for kind in KINDS}


def in_pieces(tokenizer: Tokenizer, prompt, pieces, skip: bool) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return "".join(detokenizer.add(piece) for piece in pieces) + detokenizer.rest()


ids = st.lists(st.one_of(st.integers(0, 32), st.sampled_from([-1, 33, 10**6, 2**32, 2**70])), max_size=12)


@settings(max_examples=600, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), prompt=ids, output=ids, skip=st.booleans(), cut=st.integers(0, 12))
@example(kind="byte fallback", prompt=[10], output=[0, 8, 5, 10], skip=True, cut=1)
def test_pieces_are_the_whole_text_of_any_ids(kind, prompt, output, skip, cut):
    tokenizer = TOKENIZERS[kind]
    text = in_pieces(tokenizer, [], [[i] for i in output], skip)
    if tokenizer.known_bytes is not None:
        assert text == in_pieces(tokenizer, [], [output[:cut], output[cut:]], skip)
    known = [i for i in output if tokenizer.name(i) is not None]
    whole = tokenizer.decode(known, skip_special_tokens=skip)
    if "\ufffd" not in whole:
        assert text == whole
    in_pieces(tokenizer, prompt, [output], skip)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), prompt=ids, output=ids, skip=st.booleans())
def test_output_reads_as_what_follows_the_prompt(kind, prompt, output, skip):
    tokenizer = TOKENIZERS[kind]
    before, both = ([i for i in part if tokenizer.name(i) is not None] for part in (prompt, prompt + output))
    start = tokenizer.decode(before, skip_special_tokens=skip)
    whole = tokenizer.decode(both, skip_special_tokens=skip)
    if "\ufffd" not in whole + start and tokenizer.known_bytes is not None:
        assert start + in_pieces(tokenizer, prompt, [output], skip) == whole


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(["byte-level", "byte fallback"]), output=ids)
def test_invalid_bytes_read_as_the_unicode_standard_recommends(kind, output):
    tokenizer = TOKENIZERS[kind]
    prompt = [0, 3, 8, 5]  # ends within a character
    start, joined = (b"".join(map(tokenizer.token_bytes, part)) for part in (prompt, prompt + output))
    settled = codecs.getincrementaldecoder("utf-8")("replace").decode(start)
    expected = joined.decode("utf-8", "replace")[len(settled) :].removeprefix("\ufffd")
    assert in_pieces(tokenizer, prompt, [[i] for i in output], False) == expected


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("byte-level", "Ġw", b" w"),
        ("byte-level", "ð", b"\xf0"),
        ("byte-level", "日", "日".encode()),
        ("byte-level", "<｜end▁of｜>", "<｜end▁of｜>".encode()),
        ("byte fallback", "<0x9F>", b"\x9f"),
        ("byte fallback", "▁hello", b" hello"),
        ("metaspace", "▁hello", b" hello"),
        ("metaspace", "🦙", "🦙".encode()),
        ("wordpiece", "##s", b"s"),
        ("wordpiece", "do", b" do"),
        ("none", "do", b" do"),
    ],
)
def test_a_token_has_exact_bytes(kind, name, expected):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.token_bytes(tokenizer.raw.token_to_id(name)) == expected
    assert tokenizer.token_bytes(10**9) == tokenizer.token_bytes(-1) == b""


def test_a_character_of_several_tokens_has_its_bytes_in_parts():
    tokenizer = Tokenizer.load("quickstart")
    parts = [list(tokenizer.token_bytes(i)) for i in tokenizer.encode("🦙")]
    assert parts == [[240, 159], [166], [153]]


def test_bytes_that_never_become_a_character_are_not_held_for_ever():
    tokenizer = TOKENIZERS["spaces after fusing"]
    detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=True)
    assert "\ufffd" in "".join(detokenizer.add([8]) for _ in range(64))
