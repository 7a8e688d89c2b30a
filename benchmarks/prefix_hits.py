"""Of prompts that share 1,000 tokens: what a request computes beyond its own tokens, by family.

    python benchmarks/prefix_hits.py                                  # a table
    python benchmarks/prefix_hits.py --json results/prefix_hits.json  # and a file

A request is a shared text and 50 tokens of its own. Three orders of requests:

- behind: the first request is the shared text alone, and the second goes on behind its end.
- inside: two requests part behind the shared text. Nobody knew before the second came that they would.
- inside, again: a third request parts from both there.

The tiny models are those of the equality tests. What is counted follows from the scheduler, the layers' kinds and the
block size, and not from sizes or weights, nor from the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from anychip import LLM, SamplingParams
from anychip_conformance.equality import VOCAB_SIZE
from anychip_conformance.equality.tiny_models import FAMILIES, make_checkpoint

SHARED, OWN, BLOCK = 1000, 50, 16
ORDERS = ("behind", "inside", "inside, again")
LIMIT = SHARED % BLOCK + BLOCK
"""Where a state was kept at the last full block that they share."""


def text(length: int, seed: int) -> list[int]:
    return [3 + (seed * 7919 + place * 104729) % (VOCAB_SIZE - 3) for place in range(length)]


def beyond(llm: LLM, prompt: list[int]) -> int:
    """Tokens that a prompt computes beyond its own."""
    before = llm.engine.scheduler.prefix_hits
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    return SHARED - (llm.engine.scheduler.prefix_hits - before)


def measured(checkpoint: Path) -> dict[str, int]:
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": 1100, "max_num_seqs": 4, "skip_tokenizer": True}
    with LLM(str(checkpoint), block_size=BLOCK, **settings) as llm:
        shared = text(SHARED, 1)
        beyond(llm, shared)
        found = {ORDERS[0]: beyond(llm, shared + text(OWN, 2))}
        parting = text(SHARED, 3)
        beyond(llm, parting + text(OWN, 4))
        return found | {order: beyond(llm, parting + text(OWN, seed)) for seed, order in enumerate(ORDERS[1:], 5)}


def report(families: list[str]) -> dict[str, dict[str, int]]:
    found = {}
    print(f"| family | {' | '.join(ORDERS)} |\n|---|{'---:|' * len(ORDERS)}")
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            make_checkpoint(family, Path(folder) / family, max_position_embeddings=2048)
            found[family] = measured(Path(folder) / family)
            print(f"| {family} | {' | '.join(str(found[family][order]) for order in ORDERS)} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "families", nargs="*", default=list(FAMILIES), help="those of the equality tests; all by default"
    )
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args()
    found = report(options.families)
    if options.json:
        made = {"benchmark": "prefix_hits", "command": f"python benchmarks/prefix_hits.py {' '.join(options.families)}"}
        made |= {"device": "cpu", "versions": {name: version(name) for name in ("torch", "transformers")}}
        sizes = {"shared": SHARED, "own": OWN, "block_size": BLOCK, "limit": LIMIT}
        options.json.write_text(json.dumps({**made, **sizes, "computed_beyond_own": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
