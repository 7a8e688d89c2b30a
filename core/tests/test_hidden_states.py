"""Vectors of prompts, embeddings in place of tokens, and taps, from LLM down to the worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip import LLM, EmbeddedPrompt, EmbeddedSpan, SamplingParams
from anychip.config import EngineConfig
from anychip.engine.input_processor import RequestOptions
from anychip.errors import ConfigError, InvalidRequest, Unsupported
from anychip.launch.async_llm import AsyncLLM
from anychip.layers.rotary import make_rope
from anychip.model_config import load_model_config
from anychip.plugin_api import TAPS, StepLimits, StepProgram
from anychip.prompt_extras import Pooling, PoolingKind, PromptExtras
from anychip.worker.torch_program import TorchStepProgram
from anychip.worker.worker import Worker
from anychip_conformance.device import open_device
from anychip_conformance.engines import preempt_often
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.step_driver import StepDriver

KINDS: tuple[PoolingKind, ...] = ("last", "mean", "cls")
TEXT = [3 + at * 37 % 500 for at in range(40)]
PROMPTS = [TEXT, TEXT[:17], TEXT[20:23], [7], TEXT[:33] + [5] * 6]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("llama")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return make_checkpoint("llama", folder).float()


def opened(folder: Path, **more: object) -> LLM:
    given: dict[str, object] = {
        "device": "cpu", "dtype": "float32", "skip_tokenizer": True, "max_model_len": 96, "max_num_seqs": 8,
    }  # fmt: skip
    return LLM(str(folder), **{**given, **more})


@torch.inference_mode()
def vectors(model: torch.nn.Module, kind: str) -> list[np.ndarray]:
    """What transformers' model gives, of length 1."""
    found = []
    for ids in PROMPTS:
        states = model.model(torch.tensor([ids])).last_hidden_state[0]  # type: ignore[operator, union-attr]
        vector = {"last": states[-1], "mean": states.mean(dim=0), "cls": states[0]}[kind]
        found.append((vector / vector.norm()).numpy())
    return found


# -- vectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [{}, {"max_num_batched_tokens": 9}, {"tensor_parallel_size": 2}, {"model_impl": "transformers"}],
    ids=str,
)
def test_vectors_are_those_of_transformers_model(folder: Path, model: torch.nn.Module, more: dict[str, int]) -> None:
    with opened(folder, pooling=True, **more) as llm:
        for kind in (*KINDS, *KINDS):  # the second time, prompts are in the prefix cache
            found = llm.embed(PROMPTS, pooling=kind)
            np.testing.assert_allclose(found, vectors(model, kind), atol=2e-5)
        (longer,) = llm.embed([TEXT], pooling="mean", normalize=False)
        assert np.linalg.norm(longer) > 2
        assert llm.embed([[5] * 96])[0].shape == (64,), "a prompt may be as long as the model's context"


def test_vectors_come_beside_text_whoever_is_preempted(folder: Path, model: torch.nn.Module) -> None:
    with opened(folder) as llm:
        alone = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
    with opened(folder, pooling=True, max_num_batched_tokens=16, num_kv_blocks=32) as llm:
        preempt_often(llm.engine.scheduler)
        texts = llm._run(PROMPTS, [GREEDY] * len(PROMPTS))
        begun = [next(texts)]
        found = llm.embed(PROMPTS, pooling="mean")
        pieces: dict[int, list[int]] = {}
        for number, output in [*begun, *texts]:
            pieces.setdefault(number, []).extend(output.outputs[0].token_ids)
        assert llm.engine.scheduler.num_preemptions > 0
    np.testing.assert_allclose(found, vectors(model, "mean"), atol=2e-5)
    assert [pieces[number] for number in range(len(PROMPTS))] == alone


def test_a_vector_comes_from_an_engine_in_a_process_of_its_own(folder: Path, model: torch.nn.Module) -> None:
    async def vector() -> bytes | None:
        config = EngineConfig(
            model=str(folder), device="cpu", dtype="float32", skip_tokenizer=True, max_model_len=96, pooling=True
        )
        llm = AsyncLLM(config)
        await llm.start()
        try:
            options = RequestOptions(extras=PromptExtras(pooling=Pooling("mean")))
            (output,) = [each async for each in await llm.accept("a", TEXT, SamplingParams(), options)]
            assert output.finished
            return output.vector
        finally:
            await llm.close()

    found = np.frombuffer(asyncio.run(vector()) or b"", dtype=np.float32)
    np.testing.assert_allclose(found, vectors(model, "mean")[0], atol=2e-5)


def test_an_engine_without_vectors_says_how_to_start_one(folder: Path, model: torch.nn.Module) -> None:
    with opened(folder) as llm:
        with pytest.raises(InvalidRequest, match="--pooling"):
            llm.embed([TEXT])
        assert llm.generate([TEXT], GREEDY)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def driver(folder: Path, model: torch.nn.Module) -> Iterator[StepDriver]:
    device = open_device("cpu", {})
    made = StepDriver(device, folder, pooling=True)
    yield made
    made.close()
    device.close()


def vector_of(driver: StepDriver, kind: PoolingKind, counts: list[int]) -> np.ndarray:
    """TEXT's, computed in steps of so many tokens."""
    extras = {0: PromptExtras(pooling=Pooling(kind, normalize=False))}
    blocks = list(range(1, 1 + -(-len(TEXT) // driver.block_size)))
    result = driver.step(new={0: (TEXT, blocks)}, tokens={0: counts[0]}, extras=extras)
    for count in counts[1:]:
        assert not result.vectors
        result = driver.step(tokens={0: count})
    return np.frombuffer(result.vectors[0], dtype=np.float32)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.sets(st.integers(1, len(TEXT) - 1), max_size=12))
def test_any_chunking_gives_the_same_vector(driver: StepDriver, kind: PoolingKind, cuts: set[int]) -> None:
    places = [0, *sorted(cuts), len(TEXT)]
    found = vector_of(driver, kind, [end - start for start, end in pairwise(places)])
    np.testing.assert_allclose(found, vector_of(driver, kind, [len(TEXT)]), rtol=2e-5, atol=2e-5)


# -- embeddings ---------------------------------------------------------------------------------------------------


def embedded(model: torch.nn.Module, ids: list[int], *spans: tuple[int, int]) -> EmbeddedPrompt:
    """The prompt with the embeddings of its own tokens in its spans, where other tokens stand."""
    table = model.get_input_embeddings().weight.detach().numpy()  # type: ignore[operator]
    given = list(ids)
    for start, end in spans:
        given[start:end] = [4] * (end - start)
    return EmbeddedPrompt(given, [EmbeddedSpan(start, table[ids[start:end]]) for start, end in spans])


@pytest.mark.parametrize("more", [{}, {"max_num_batched_tokens": 9}, {"model_impl": "transformers"}], ids=str)
def test_a_tokens_own_embedding_gives_what_the_token_gives(
    folder: Path, model: torch.nn.Module, more: dict[str, int]
) -> None:
    with opened(folder, max_embeddings=40, **more) as llm:
        plain = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
        prompts = [
            embedded(model, TEXT, (3, 21), (30, 32)), embedded(model, PROMPTS[1], (0, 17)), PROMPTS[2],
            embedded(model, [7], (0, 1)), embedded(model, PROMPTS[4], (16, 33)),
        ]  # fmt: skip
        for _ in range(2):
            before = llm.engine.scheduler.prefix_hits
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)] == plain
        assert llm.engine.scheduler.prefix_hits - before >= 32 + 16 + 32, "the same embeddings are found again"
        assert llm.engine.scheduler.waiting.free_embeddings == 40


def test_other_embeddings_are_another_prompt(folder: Path, model: torch.nn.Module) -> None:
    with opened(folder, max_embeddings=64) as llm:
        texts = [TEXT, TEXT[:16] + TEXT[20:] + TEXT[16:20]]
        plain = [output.outputs[0].token_ids for output in llm.generate(texts, GREEDY)]
        assert plain[0] != plain[1]
        prompts = [embedded(model, ids, (16, 40)) for ids in texts]
        assert list(prompts[0].token_ids) == list(prompts[1].token_ids)
        for prompt, wanted in zip(prompts, plain, strict=True):  # the second would hit the first one's blocks
            assert llm.generate([prompt], GREEDY)[0].outputs[0].token_ids == wanted
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)] == plain


def test_embeddings_that_cannot_be_are_refused(folder: Path, model: torch.nn.Module) -> None:
    with opened(folder, max_embeddings=8) as llm:
        with pytest.raises(InvalidRequest, match="20 tokens bring embeddings at once; the engine takes 8"):
            llm.generate([embedded(model, TEXT, (0, 20))], GREEDY)
        with pytest.raises(InvalidRequest, match="float32 numbers"):
            llm.generate([EmbeddedPrompt([1, 2], [EmbeddedSpan(0, np.zeros((1, 5), np.float32))])], GREEDY)
        with pytest.raises(InvalidRequest, match="ends at token 3"):
            llm.generate([EmbeddedPrompt([1, 2], [EmbeddedSpan(1, np.zeros((2, 64), np.float32))])], GREEDY)
        with pytest.raises(InvalidRequest, match="have no axes"):
            llm.generate([EmbeddedPrompt([1], [], np.zeros((3, 1), np.int32))], GREEDY)


@pytest.mark.full
def test_a_compiled_step_may_have_several_features_at_once(folder: Path, model: torch.nn.Module) -> None:
    """fake-static refuses a step for which nothing was compiled at the start."""
    with opened(folder, device="fake-static", pooling=True, max_embeddings=64, max_num_seqs=4) as llm:
        table = vectors(model, "mean")
        prompts = [embedded(model, TEXT, (3, 21)), embedded(model, PROMPTS[1], (2, 9))]
        plain = llm.generate([TEXT, PROMPTS[1]], GREEDY)
        texts = llm._run(prompts, [SamplingParams(temperature=0.0, max_tokens=6, prompt_logprobs=1), GREEDY])
        begun = [next(texts)]
        np.testing.assert_allclose(llm.embed(prompts, pooling="mean"), table[:2], atol=2e-5)
        pieces: dict[int, list[int]] = {0: [], 1: []}
        for number, output in [*begun, *texts]:
            pieces[number] += output.outputs[0].token_ids
        assert [pieces[0], pieces[1]] == [output.outputs[0].token_ids for output in plain]


# -- taps ---------------------------------------------------------------------------------------------------------


def test_taps_come_out_of_graphs_that_are_replayed(folder: Path, model: torch.nn.Module) -> None:
    """What they hold is the suite's to judge (step.taps)."""
    device = open_device("fake-hostlen", {})
    driver = StepDriver(device, folder, taps=(1,))
    try:
        seen: list[tuple[int, ...]] = []
        driver.worker.runner.read_taps = lambda inputs, taps: seen.append(tuple(taps[0].shape))
        driver.step(new={0: (TEXT[:8], [1])}, tokens={0: 8}, extras={0: PromptExtras(tap_from=0)})
        driver.step(tokens={0: 1})
        program = driver.worker.program
        assert isinstance(program, TorchStepProgram)
        steps = [made.handle.num_replays for key, made in program._steps.made.items() if TAPS in key.features]
        pieces = [made.handle.num_replays for (_, tapped), made in program._pieces.made.items() if tapped]
        assert sum(steps) == 1 and sum(pieces) == 1, "taps run eagerly"
        assert seen == [(8, 64), (1, 64)]
    finally:
        driver.close()
        device.close()


def test_taps_are_the_same_through_transformers_own_code(folder: Path, model: torch.nn.Module) -> None:
    device, shown = open_device("cpu", {}), dict[str, list[np.ndarray]]()
    for code in ("native", "transformers"):
        driver = StepDriver(device, folder, taps=(2, -1, 0), model_impl=code)
        driver.worker.runner.read_taps = lambda inputs, taps, code=code: shown.update(
            {code: [states[: inputs.num_tapped].float().numpy().copy() for states in taps]}
        )
        driver.step(new={0: (TEXT[:20], [1, 2])}, tokens={0: 20}, extras={0: PromptExtras(tap_from=7)})
        driver.close()
    device.close()
    assert [states.shape for states in shown["native"]] == [(13, 64)] * 3
    for ours, theirs in zip(*shown.values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_taps_name_layers_that_there_are(folder: Path, model: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match="taps names layer 4; the model has 0 to 3, and -1"):
        opened(folder, taps=(0, 4))


def test_a_program_that_has_no_taps_is_refused_at_the_start() -> None:
    sizes = {"max_num_tokens": 1, "max_num_reqs": 1, "max_model_len": 1, "max_slots": 1}
    Worker._check_features(StepProgram(), StepLimits(**sizes))
    with pytest.raises(Unsupported, match="taps is not implemented"):
        Worker._check_features(StepProgram(), StepLimits(**sizes, taps=(0,)))


# -- positions of three axes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interleaved", "sections"), [(False, [4, 2, 2]), (True, [4, 2, 2]), (True, [2, 3, 3])])
def test_frequencies_turn_by_the_axes_of_transformers(
    folder: Path, model: torch.nn.Module, interleaved: bool, sections: list[int]
) -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    config = load_model_config(str(folder))
    rope = make_rope(config, {"mrope_section": sections, "mrope_interleaved": interleaved}, "cpu")
    angles = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 1, sum(sections)).clone()
    if interleaved:
        library = SimpleNamespace(mrope_section=sections)
        wanted = Qwen3VLTextRotaryEmbedding.recomposition_frequencies(library, angles)[0, 0, : sum(sections)]
    else:
        wanted = torch.cat([part[axis] for axis, part in enumerate(angles.split(sections, dim=-1))], dim=-1)[0, 0]
    assert rope.axes is not None and rope.axes.tolist() == wanted.tolist()
