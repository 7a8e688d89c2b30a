"""How byte-level vocabularies of GGUF files cut a text into words, by tokenizer.ggml.pre. A file names the way; the
expressions are those of each model's own tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _of_digits(digits: str) -> str:
    """Words with the character before them, so many digits, other characters with the line ends after them."""
    return (
        rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _of_cases(digits: str, suffixes: str) -> str:
    """Words end where a capital letter follows a small one."""
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}{_UPPER}*{_LOWER}+{suffixes}|{first}{_UPPER}+{_LOWER}*{suffixes}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True, slots=True)
class Words:
    """`expressions` cut a text one after the other. `whole_words`: a word that is a token needs no merges. `add_bos`
    is what a file means that does not say whether texts begin with a token of their own."""

    expressions: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        cuts = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in self.expressions]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_OF_GPT2 = Words((_GPT2,))
_SINGLE_DIGITS = Words((r"\p{N}", _GPT2))
_LLAMA3 = Words((_of_digits(r"\p{N}{1,3}"),))
_LLAMA3_BOS = Words(_LLAMA3.expressions, whole_words=True, add_bos=True)
_QWEN2 = Words((_of_digits(r"\p{N}"),))
_GPT4O = Words((_of_cases(r"\p{N}{1,3}", f"{_SUFFIXES}?"),))
_OLD = Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
"""Of files made before they named one."""

_EAST_ASIAN = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

WORDS: dict[str, Words] = {
    "default": _OLD,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), _OF_GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _SINGLE_DIGITS),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3_BOS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": Words((_of_cases(r"\p{N}", ""),), whole_words=True, add_bos=True),
    "deepseek-llm": Words((r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", _DEEPSEEK_MARKS, r"\s+$", _EAST_ASIAN, r"\p{N}+")),
    "deepseek-v3": Words((r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3)),
    "deepseek-coder": Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
}
"""By tokenizer.ggml.pre."""
