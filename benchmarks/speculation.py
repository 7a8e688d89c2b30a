"""Tokens a second with drafts and without, on texts that repeat their prompts and on texts that do not.

Two engines of one process take turns with the same requests; what is reported is the median of the rounds' ratios. As
rounds repeat their requests, drafts come from a request's own text alone (`own-text`) unless another proposer is given.
`load` is how many processes wanted a core in the last minute: where it is above the number of cores, others disturbed.
Then `--processor-time` with OMP_NUM_THREADS=1 compares the work that is done, by the process's own time on a core, and
counts what overlap hides as well.
The answers are the same where the model computes in float32; in narrower dtypes a near-tie may fall otherwise, and the
share of equal tokens is reported.

    python benchmarks/speculation.py MODEL [--device cpu] [--speculate own-text] [--output FILE.json]
    OMP_NUM_THREADS=1 python benchmarks/speculation.py MODEL --processor-time
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
from cpu.repeating import TOKENS, prompts

from anychip import LLM, SamplingParams
from anychip.bench.report import write
from anychip.drafts import Drafter
from anychip.speculation.proposer import PROPOSERS
from anychip.speculation.speculator import Speculator
from anychip.speculation.text_index import OwnText
from anychip.worker import step_costs


class OwnTextLookup:
    """Proposer "suffix" without what was answered before."""

    def begin(self, owner: str) -> Drafter:
        return OwnText(most_places=8)

    def end(self, drafter: Drafter) -> None:
        """Nothing is kept."""


PROPOSERS["own-text"] = f"{__name__}:OwnTextLookup"


def timed(
    llm: LLM, texts: list[str], sampling: SamplingParams, clock: Callable[[], float]
) -> tuple[float, list[list[int]]]:
    began = clock()
    outputs = llm.generate(texts, sampling)
    return clock() - began, [list(output.outputs[0].token_ids) for output in outputs]


def measure(
    plain: LLM, drafting: LLM, work: str, streams: int, rounds: int, clock: Callable[[], float]
) -> dict[str, object]:
    """How many times faster the drafting engine is: over whole requests, and over their tokens behind the first ones,
    which leaves out the prompts. Who goes first changes with each round."""
    greedy = work != "chat"
    sampling = SamplingParams(temperature=0.0 if greedy else 0.8, seed=1, max_tokens=TOKENS, ignore_eos=True)
    first_one = msgspec.structs.replace(sampling, max_tokens=1)
    texts, whole, behind_first, answers = prompts(work, streams), [], [], {}
    before = drafting.engine.scheduler.stats.speculation
    for number in range(rounds + 1):
        seconds = {}
        for llm in (plain, drafting) if number % 2 else (drafting, plain):
            first_s, _ = timed(llm, texts, first_one, clock)
            seconds[llm], answers[llm] = timed(llm, texts, sampling, clock)
            seconds[llm, "behind"] = seconds[llm] - first_s
        if number:  # the first round warms up
            whole.append(seconds[plain] / seconds[drafting])
            behind_first.append(seconds[plain, "behind"] / seconds[drafting, "behind"])
    after = drafting.engine.scheduler.stats.speculation
    pairs = [pair for one, other in zip(*answers.values(), strict=True) for pair in zip(one, other, strict=True)]
    return {
        "work": work,
        "streams": streams,
        "times_faster": round(statistics.median(whole), 3),
        "times_faster_behind_first": round(statistics.median(behind_first), 3),
        "rounds": [round(ratio, 3) for ratio in whole],
        "rounds_behind_first": [round(ratio, 3) for ratio in behind_first],
        "tokens_a_second": round(streams * TOKENS / seconds[drafting], 1),
        "drafted": after.drafted - before.drafted,
        "accepted": after.accepted - before.accepted,
        "equal_tokens": round(sum(one == other for one, other in pairs) / len(pairs), 4),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--speculate", default="own-text")
    parser.add_argument("--max-drafts", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--work", default="edit,extract,chat")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings = {"device": arguments.device, "dtype": arguments.dtype, "max_num_seqs": 32, "max_model_len": 2048,
                "kv_cache_bytes": 2 << 30, "prefix_caching": False}  # fmt: skip
    rows, clock = [], time.perf_counter
    if arguments.processor_time:
        clock = time.process_time
        step_costs.time = SimpleNamespace(perf_counter=clock)
        Speculator.__init__.__kwdefaults__["clock"] = clock
    with (
        LLM(arguments.model, **settings) as plain,
        LLM(arguments.model, **settings, speculate=arguments.speculate, max_drafts=arguments.max_drafts) as drafting,
    ):
        costs = {str(tokens): round(1e3 * seconds, 3) for tokens, seconds in drafting.engine.executor.ready.step_costs}
        print("milliseconds of a step by tokens:", costs)
        for work in arguments.work.split(","):
            for streams in map(int, arguments.streams.split(",")):
                rows.append(measure(plain, drafting, work, streams, arguments.rounds, clock))
                print(rows[-1])
    if arguments.output is not None:
        settings = vars(arguments) | {"output": "", "model": ""}
        write(
            arguments.output,
            {"model": Path(arguments.model).name, "settings": settings, "step_ms": costs, "rows": rows},
        )


if __name__ == "__main__":
    main()
