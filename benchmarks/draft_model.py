"""How near a draft model comes to what arithmetic allows, at an acceptance that is made up.

A target and a draft model of made-up weights run for real. What the draft model guessed is then replaced by the answer
that was recorded without drafts: each token with the probability `--acceptance`, else by a wrong one. So tokens, passes
and steps are those of a draft model that is right so often. With acceptance p and k drafts a step brings
(1 - p^(k+1)) / (1 - p) tokens for the time of a step of k + 1 tokens and k passes of the draft model. Over what plain
steps bring in that time, that is how many times faster it can be at most. `reached` is the share of it that was
measured.

Engines with and without drafts take turns, and the costs of steps and passes are measured in between. On a machine that
others use, `--processor-time` with OMP_NUM_THREADS=1 compares the work that is done.

    OMP_NUM_THREADS=1 python benchmarks/draft_model.py --processor-time [--output FILE.json]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from anychip import LLM, SamplingParams
from anychip.bench.report import write
from anychip.engine_stats import SpeculationStats
from anychip.worker import step_costs
from anychip.worker.draft_runner import DraftRunner
from anychip.worker.model_runner import DrawnIds
from anychip.worker.step_costs import measure_steps

VOCAB = 16384
SHAPES = {
    "target": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12,
               "num_key_value_heads": 4},
    "draft": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2},
}  # fmt: skip
PROMPT, TOKENS = 32, 128


def make_model(folder: Path, shape: dict[str, int], dtype: str) -> str:
    folder.mkdir()
    common = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_bytes(msgspec.json.encode(common | shape))
    return str(folder)


class MadeUpAcceptance:
    """In place of what a drafter guesses: the recorded answers, by their first token, which no two share."""

    def __init__(self, drafter: DraftRunner, acceptance: float) -> None:
        self.drafter, self.acceptance = drafter, acceptance
        self.answers: dict[int, list[int]] = {}
        self.rng = random.Random(0)
        self._guess = drafter._drafts
        drafter._drafts = self  # type: ignore[method-assign,assignment]

    def __call__(self, drawn: DrawnIds, wanted: np.ndarray) -> np.ndarray:
        guesses, end, drafter = self._guess(drawn, wanted), 0, self.drafter
        batch = drafter.runner.batch
        for slot, count in zip(drawn.row_slots.tolist(), wanted.tolist(), strict=True):
            first, end = end, end + count
            if count == 0 or guesses[first] < 0:
                continue
            known = int(batch.num_known(np.array([slot]))[0])
            text = self.answers[int(batch.ids_at(np.array([slot]), np.array([0]))[0])]
            for at, right in enumerate(text[known : known + count]):
                guesses[first + at] = right if self.rng.random() < self.acceptance else (right + 1) % VOCAB
            drafter._guesses[slot, :count] = guesses[first:end]  # as if these had been fed to the passes
        return guesses


def prompts(streams: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[100 + at, *(rng.randrange(3, VOCAB) for _ in range(PROMPT - 1))] for at in range(streams)]


def costs(llm: LLM) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of the target's steps and of the draft model's passes, by tokens."""
    worker: Any = llm.engine.executor.worker  # type: ignore[attr-defined]
    pool = worker.ready.kv.num_blocks
    steps = measure_steps(worker.runner, worker.program.limits, worker.program.kv, pool, temperature=0.0)
    runner = worker.drafter.runner
    passes = measure_steps(runner, runner.program.limits, runner.program.kv, pool, temperature=0.0)
    return dict(steps), dict(passes)


def between(measured: dict[int, float], tokens: int) -> float:
    return float(np.interp(tokens, list(measured), list(measured.values())))


def timed(llm: LLM, texts: list[list[int]], sampling: SamplingParams, clock: Callable[[], float]) -> float:
    """Seconds of the tokens behind the first ones."""
    first_one = msgspec.structs.replace(sampling, max_tokens=1)
    began = clock()
    llm.generate(texts, first_one)
    between_both = clock()
    llm.generate(texts, sampling)
    return clock() - between_both - (between_both - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="in a narrower one, near-ties leave the recorded answers")
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--max-drafts", type=int, default=4)
    parser.add_argument("--streams", default="1,4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    step_costs.time = SimpleNamespace(perf_counter=clock)  # type: ignore[attr-defined]
    settings: dict[str, Any] = {
        "device": arguments.device,
        "load_format": "dummy",
        "skip_tokenizer": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "kv_cache_bytes": 1 << 28,
        "prefix_caching": False,
        "executor": "inline",
    }
    with tempfile.TemporaryDirectory() as folder:
        target, draft = (make_model(Path(folder) / name, shape, arguments.dtype) for name, shape in SHAPES.items())
        with (
            LLM(target, **settings) as plain,
            LLM(target, **settings, speculate=f"draft:{draft}", max_drafts=arguments.max_drafts) as drafting,
        ):
            drafting.engine.scheduler.drafting.measured_costs_are_ignored()
            made_up = MadeUpAcceptance(drafting.engine.executor.worker.drafter, arguments.acceptance)
            rows = [
                measure(plain, drafting, made_up, int(count), arguments.rounds, clock)
                for count in arguments.streams.split(",")
            ]
    if arguments.output is not None:
        given = vars(arguments) | {"output": ""}
        write(arguments.output, {"benchmark": "draft_model", "shapes": SHAPES, "settings": given, "rows": rows})


def measure(
    plain: LLM, drafting: LLM, made_up: MadeUpAcceptance, streams: int, rounds: int, clock: Callable[[], float]
) -> dict[str, object]:
    p, k = made_up.acceptance, drafting.config.max_drafts
    texts, sampling = prompts(streams), SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for text, output in zip(texts, plain.generate(texts, sampling), strict=True):
        made_up.answers[text[0]] = [*text, *output.outputs[0].token_ids]
    tokens = sum(p**at for at in range(k + 1))
    faster, allowed, before = [], [], drafting.engine.scheduler.stats.speculation
    for number in range(rounds + 1):
        engines = (plain, drafting) if number % 2 else (drafting, plain)
        seconds = {llm: timed(llm, texts, sampling, clock) for llm in engines}
        steps, passes = costs(drafting)
        cycle = between(steps, streams * (k + 1)) + k * between(passes, streams)
        if number:  # the first round warms up
            faster.append(seconds[plain] / seconds[drafting])
            allowed.append(tokens * between(steps, streams) / cycle)
    row = {
        "streams": streams,
        "times_faster": round(statistics.median(faster), 3),
        "allowed": round(statistics.median(allowed), 3),
        "reached": round(statistics.median(one / other for one, other in zip(faster, allowed, strict=True)), 3),
        "rounds": [round(ratio, 3) for ratio in faster],
        "rounds_allowed": [round(ratio, 3) for ratio in allowed],
        "acceptance": acceptance(before, drafting.engine.scheduler.stats.speculation),
        "step_ms": {str(size): round(1e3 * between(steps, size), 3) for size in (streams, streams * (k + 1))},
        "pass_ms": round(1e3 * between(passes, streams), 3),
        "load": round(os.getloadavg()[0], 1),
    }
    print(row, flush=True)
    return row


def acceptance(before: SpeculationStats, after: SpeculationStats) -> float:
    """How often a draft was drawn when all before it were."""
    drawn = np.array(after.accepted_at) - np.array(before.accepted_at)
    tried = np.concatenate(([(after.drafted - before.drafted) / len(drawn)], drawn[:-1]))
    return round(float(drawn.sum() / tried.sum()), 3)


if __name__ == "__main__":
    main()
