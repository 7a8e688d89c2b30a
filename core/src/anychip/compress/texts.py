"""Calibration texts and perplexity: a file's tokens, cut into pieces of one length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from anychip.errors import ConfigError
from anychip.launch.llm import LLM
from anychip.sampling_params import SamplingParams
from anychip.tokenizer.tokenizer import Tokenizer


class _Line(msgspec.Struct):
    text: str


def read_texts(path: Path) -> list[str]:
    """The texts of a file: of *.jsonl the "text" of each line, of any other file the whole. Raises ConfigError."""
    try:
        whole = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error
    if path.suffix != ".jsonl":
        return [whole]
    try:
        return [msgspec.json.decode(line, type=_Line).text for line in whole.split("\n") if line.strip()]
    except msgspec.MsgspecError as error:
        raise ConfigError(f'{path} is not JSON Lines of objects with "text": {error}') from error


def cut(texts: Sequence[str], tokenizer: Tokenizer, *, length: int, most: int) -> list[list[int]]:
    """At most `most` pieces of `length` tokens, spread over the texts, one after the other. A text that is shorter than
    a piece goes on in the next. Raises ConfigError where there is not one piece."""
    ids = [token for text in texts for token in tokenizer.encode(text)]
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not pieces:
        raise ConfigError(f"the texts have {len(ids)} tokens, fewer than one piece of {length}; give longer ones")
    step = max(1, len(pieces) // most)
    return pieces[::step][:most]


def perplexity(llm: LLM, pieces: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-probability of each piece's tokens behind its first."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    scored = [entry.chosen for output in llm.generate(list(pieces), sampling) for entry in output.prompt_logprobs or []]
    return math.exp(-sum(scored) / len(scored))
