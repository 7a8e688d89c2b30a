"""Serves a tiny checkpoint of every causal language model of the installed transformers, and writes what came of it.

    python tools/walk_transformers.py                   # all, and docs/reference/transformers-classes.md
    python tools/walk_transformers.py gpt2 bloom olmoe  # these model types, to look at

Exit status 1 if a class gives other tokens than the library's own generate, fails with an exception that is none of
anychip's, or if fewer of those with attention alone are equal than `LEAST`.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

warnings.filterwarnings("ignore")

import transformers  # noqa: E402

from anychip_conformance.equality.causal_classes import causal_classes  # noqa: E402
from anychip_conformance.equality.every_class import Outcome, walk  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "transformers-classes.md"
LEAST = 0.9

_HEAD = """# Classes of transformers

<!-- Written by tools/walk_transformers.py; do not edit. -->

What became of each causal language model that transformers {version} registers. A tiny checkpoint with random weights,
made from the class's own defaults, was served on the CPU in float32, and {tokens} greedy tokens of {prompts} prompts
were compared with the library's own `generate`. [Models](models.md) says what the two ways to run a model are.

| classes | | equal | refused | not tried |
|---|---|---|---|---|
"""
_KINDS = {
    "attention": "layers keep keys and values alone",
    "more state": "layers keep something else too: recurrent states, convolutions, an index of keys",
    "other": "no language model by itself: parts for images or sound, or a draft of another model",
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="all where none is given")
    chosen = parser.parse_args(arguments).model_types
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    outcomes = []
    for outcome in walk_all(chosen):
        outcomes.append(outcome)
        print(f"{outcome.result:10}{outcome.each.name:40}{outcome.why}", flush=True)
    share, count = equal_share(outcomes)
    print(f"{share:.1%} of {count} classes whose layers keep keys and values alone are served with equal tokens")
    if not chosen:
        PAGE.write_text(page(outcomes))
    wrong = [outcome for outcome in outcomes if outcome.result in ("differs", "fails")]
    return 1 if wrong or (not chosen and share < LEAST) else 0


def walk_all(model_types: Sequence[str]) -> Iterator[Outcome]:
    for each in causal_classes():
        if model_types and each.model_type not in model_types:
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield walk(each, Path(folder))
        gc.collect()


def equal_share(outcomes: Sequence[Outcome]) -> tuple[float, int]:
    """Of the classes with attention alone: how many are equal, of how many that were tried."""
    tried = [outcome for outcome in outcomes if outcome.kind == "attention"]
    return sum(outcome.result == "equal" for outcome in tried) / max(1, len(tried)), len(tried)


def page(outcomes: Sequence[Outcome]) -> str:
    from anychip_conformance.equality.every_class import LENGTHS, NUM_TOKENS

    lines = [_HEAD.format(version=transformers.__version__, tokens=NUM_TOKENS, prompts=len(LENGTHS))]
    for kind, meaning in _KINDS.items():
        of_kind = [outcome.result for outcome in outcomes if outcome.kind == kind]
        counts = [str(of_kind.count(result)) for result in ("equal", "refused", "not tried")]
        lines.append(f"| {len(of_kind)} | {meaning} | {' | '.join(counts)} |\n")
    share, _ = equal_share(outcomes)
    lines.append(f"\nOf those whose layers keep keys and values alone, {share:.0%} are served, with equal tokens.\n\n")
    lines.append("| class | model_type | how | why not |\n|---|---|---|---|\n")
    for outcome in sorted(outcomes, key=lambda one: one.each.name):
        how = ("native" if outcome.native else "through transformers") if outcome.result == "equal" else outcome.result
        why = outcome.why.removeprefix(f"{outcome.each.name} through transformers: ").replace("|", "\\|")
        lines.append(f"| `{outcome.each.name}` | {outcome.each.model_type} | {how} | {why} |\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
