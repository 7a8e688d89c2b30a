"""LLM on the embedded model and on the test platforms: prefix cache, several sequences, sampling, compiled shapes."""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from anychip import LLM, SamplingParams
from anychip.errors import ContextTooLong, DeviceFault, DeviceUnavailable, EngineDead, InvalidRequest, StepFailed
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.equality.workload import DEVICES
from anychip_conformance.fakes import hostlen
from anychip_conformance.fakes.hostlen import HostlenGraphs

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def quickstart():
    with LLM(device="cpu", num_kv_blocks=512, max_num_seqs=16) as shared:
        yield shared


@pytest.fixture
def llm(quickstart):
    """The step that was launched ahead when the last request ended may be under way still."""
    quickstart.engine.drain()
    return quickstart


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint("qwen3", folder)
    return str(folder)


def pool(llm: LLM):
    return llm.engine.scheduler.kv.pool


def test_what_a_caller_leaves_out_is_what_the_model_recommends(llm):
    assert (llm.default_sampling().temperature, llm.default_sampling(temperature=0).top_p) == (0.7, 0.9)


def test_a_batch_streams_under_its_prompts_numbers(llm):
    prompts = ["import numpy as", [5, 6, 7], "def"]
    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    whole = [output.outputs[0].token_ids for output in llm.generate(prompts, sampling)]
    streamed: dict[str, list[int]] = {}
    for output in llm.stream_batch(prompts, sampling):
        streamed.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
    assert [streamed[str(number)] for number in range(3)] == whole


def test_a_batch_of_conversations_answers_each_as_alone(llm):
    questions = [[{"role": "user", "content": text}] for text in ("What is a list?", "What is a tuple?")]
    sampling = SamplingParams(temperature=0, max_tokens=6)
    together = [output.outputs[0].text for output in llm.chat_batch(questions, sampling)]
    assert together == [llm.chat(question, sampling).outputs[0].text for question in questions]


def test_the_embedded_model_writes_python(llm):
    (output,) = llm.generate("import numpy as", SamplingParams(temperature=0, max_tokens=2))
    assert output.outputs[0].text.strip().startswith("np")
    assert output.outputs[0].finish_reason == "length"


def test_chat_ends_its_turn(llm):
    output = llm.chat(
        [{"role": "user", "content": "What does len return?"}], SamplingParams(temperature=0, max_tokens=200)
    )
    assert output.outputs[0].finish_reason == "stop"
    assert "<|im_end|>" not in output.outputs[0].text


def test_a_second_identical_prompt_of_512_tokens_computes_one_block(llm):
    prompt = [3 + (7 * i) % 8000 for i in range(512)]
    (first,) = llm.generate([prompt], GREEDY)
    (second,) = llm.generate([prompt], GREEDY)
    assert (first.cached_tokens, second.cached_tokens) == (0, 496)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_four_sequences_share_the_prompts_blocks_and_differ(llm):
    prompt = [3 + (11 * i) % 8000 for i in range(320)]
    lowest = pool(llm).num_usable
    pieces = []
    for piece in llm.stream(prompt, SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=12)):
        lowest = min(lowest, pool(llm).num_free)
        pieces.append(piece)
    texts = {}
    for piece in pieces:
        for output in piece.outputs:
            texts.setdefault(output.index, []).extend(output.token_ids)
    assert len({tuple(ids) for ids in texts.values()}) == 4
    held = pool(llm).num_usable - lowest
    # The prompt's 20 blocks once, and for each sequence the copy that it writes and a block of its own.
    assert held <= 20 + 4 * 2
    assert pool(llm).num_free == pool(llm).num_usable


def test_a_seed_gives_the_same_tokens_whoever_shares_the_batch():
    """In float32: a product's last bit may depend on how many rows it has, and in bfloat16 that bit is wide enough to
    turn a draw."""
    seeded = SamplingParams(temperature=0.9, top_p=0.95, seed=42, max_tokens=10)
    others = SamplingParams(temperature=1.0, max_tokens=10)
    with LLM(dtype="float32", num_kv_blocks=256) as llm:
        alone = llm.generate("def f(", seeded)[0].outputs[0].token_ids
        among = llm.generate(["x", "def f(", "class A"], [others, seeded, others])[1].outputs[0].token_ids
    assert among == alone


def test_logprobs_come_with_every_token(llm):
    (output,) = llm.generate("import", SamplingParams(temperature=0, max_tokens=4, logprobs=3))
    found = output.outputs[0].logprobs
    assert len(found) == 4
    for token, entry in zip(output.outputs[0].token_ids, found, strict=True):
        assert entry.top_ids[0] == token
        assert entry.chosen == pytest.approx(entry.top[0])
        assert len(entry.top) == 3


def test_a_stop_string_ends_the_request_in_the_engine_too(llm):
    (output,) = llm.generate("import numpy as np\n", SamplingParams(temperature=0, max_tokens=50, stop=("\n",)))
    assert "\n" not in output.outputs[0].text
    assert output.outputs[0].stop_reason == "\n"
    assert not llm.engine.scheduler.has_work


def test_min_tokens_outlives_the_end_token(llm):
    turn = [{"role": "user", "content": "What does len return?"}]
    short = llm.chat(turn, SamplingParams(temperature=0, max_tokens=100))
    length = len(short.outputs[0].token_ids)
    longer = llm.chat(turn, SamplingParams(temperature=0, max_tokens=100, min_tokens=length + 5))
    assert len(longer.outputs[0].token_ids) > length + 5


def test_leaving_a_stream_early_frees_its_blocks(llm):
    for _ in llm.stream("import os\n", SamplingParams(max_tokens=100, ignore_eos=True)):
        break
    assert not llm.engine.has_work
    assert pool(llm).num_free == pool(llm).num_usable


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "expected"),
    [
        ("", GREEDY, InvalidRequest, "the prompt is empty"),
        ([], GREEDY, InvalidRequest, "the prompt is empty"),
        ([9000], GREEDY, InvalidRequest, "token id 9000; the vocabulary has 8192"),
        ([5] * 2048, GREEDY, ContextTooLong, "shorten the prompt"),
        ([5] * 2000, SamplingParams(max_tokens=100), ContextTooLong, "max_tokens may be 48 at most"),
        ([5], SamplingParams(stop_token_ids=(9000,)), InvalidRequest, "stop_token_ids holds 9000"),
    ],
)
def test_a_bad_request_is_refused_and_nothing_allocated(llm, prompt, sampling, error, expected):
    with pytest.raises(error, match=expected):
        llm.generate([prompt], sampling)
    assert not llm.engine.has_work
    assert pool(llm).num_free == pool(llm).num_usable


def test_one_bad_prompt_of_several_keeps_the_others_from_starting(llm):
    with pytest.raises(InvalidRequest):
        llm.generate(["fine", ""], GREEDY)
    assert not llm.engine.has_work


@pytest.mark.parametrize("device", ["cpu-tp2", "fake-static", "fake-hostlen", "fake-spmd"])
def test_mixed_requests_give_the_same_answers_on_every_device(tiny, device):
    def answers(where):
        common = {"skip_tokenizer": True, "dtype": "float32", "max_model_len": 128, "max_num_seqs": 8}
        with LLM(tiny, **common, **DEVICES[where]) as llm:
            outputs = llm.generate(PROMPTS, MIX)
            return [output.outputs[0].token_ids for output in outputs]

    assert answers(device) == answers("cpu")


PROMPTS = [[3 + i, 4, 5 + i] * (i + 1) for i in range(8)]
MIX = [
    SamplingParams(temperature=0, max_tokens=9),
    SamplingParams(temperature=1.0, seed=5, max_tokens=9),
    SamplingParams(temperature=0.7, top_p=0.8, seed=6, max_tokens=9),
    SamplingParams(temperature=1.2, top_k=5, seed=7, max_tokens=9, logprobs=5),
    SamplingParams(temperature=0, max_tokens=9, logprobs=0),
    SamplingParams(temperature=1.0, min_p=0.2, seed=8, max_tokens=9, stop_token_ids=(9, 10, 11)),
    SamplingParams(temperature=0, min_tokens=4, max_tokens=9, stop_token_ids=tuple(range(100))),
    SamplingParams(temperature=1.0, seed=-1, max_tokens=9),
]


def test_a_compiled_platform_compiles_nothing_after_warm_up(llm):
    with LLM(device="fake-static", max_model_len=128, max_num_seqs=12, dtype="float32") as static:
        program = static.engine.executor.worker.program
        compiled = program.num_compilations
        texts = ["import os", "def f(x):", "class A:\n", "x"]
        static.generate(texts, GREEDY)
        static.generate(texts, SamplingParams(temperature=1.0, seed=3, max_tokens=9, logprobs=4))
        static.generate(texts, SamplingParams(temperature=0.5, max_tokens=9, stop=("\n", "import"), min_tokens=3))
        static.generate("x" * 200, SamplingParams(n=3, max_tokens=5, logprobs=0, min_tokens=2))
        assert compiled == 2 * 2 + 2 * 2 * 2  # steps with and without scores; draws with any logprobs, masks and edits
        assert program.num_compilations == compiled


def test_recorded_graphs_are_replayed_with_renewed_lengths(tiny):
    with LLM(
        tiny, skip_tokenizer=True, device="fake-hostlen", dtype="float32", max_model_len=256, max_num_seqs=4
    ) as one:
        one.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        captured = one.engine.executor.worker.program._steps.made
        assert sorted(key.num_reqs for key in captured) == [1, 2, 4]
        assert sum(step.handle.num_replays for step in captured.values()) >= 19


def test_a_lazy_platform_captures_a_shape_when_a_step_first_has_it(tiny, monkeypatch):
    settings = {"skip_tokenizer": True, "device": "fake-hostlen", "dtype": "float32", "max_model_len": 256}
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [[5, 6, 7], [8, 9], [10]]
    with LLM(tiny, max_num_seqs=4, **settings) as early:
        expected = [output.outputs[0].token_ids for output in early.generate(prompts, sampling)]
    monkeypatch.setattr(HostlenGraphs, "lazy", True)
    with LLM(tiny, max_num_seqs=4, **settings) as late:
        captured = late.engine.executor.worker.program._steps.made
        assert [key.num_reqs for key in captured] == [1]  # the smallest, which shows that capturing works
        assert [output.outputs[0].token_ids for output in late.generate(prompts, sampling)] == expected
        assert sorted(key.num_reqs for key in captured) == [1, 4]  # three rows share four's; nobody had two
        assert sum(step.handle.num_replays for step in captured.values()) >= 18


def test_steps_with_prompts_run_in_pieces_up_to_a_few_tokens(tiny, monkeypatch):
    settings = {"skip_tokenizer": True, "device": "fake-hostlen", "dtype": "float32", "max_model_len": 256}
    settings |= {"max_num_seqs": 4, "max_num_batched_tokens": 64}
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=0)
    prompts = [list(range(5, 12)), list(range(40, 90)), [3], list(range(100, 121))]

    def told(llm):
        return [(output.outputs[0].token_ids, output.prompt_logprobs) for output in llm.generate(prompts, sampling)]

    with LLM(tiny, **settings) as llm:
        in_pieces = told(llm)
        made = llm.engine.executor.worker.program._pieces.made
        assert sorted(made) == [(8, False), (32, False)] and sum(step.handle.num_replays for step in made.values()) > 0
    monkeypatch.setattr(hostlen, "_PIECE_TOKENS", ())
    with LLM(tiny, **settings) as llm:
        assert not llm.engine.executor.worker.program._pieces.made
        assert told(llm) == in_pieces


@pytest.mark.parametrize("stage", ["forward", "sample"])
def test_an_engine_outlives_a_step_that_found_no_memory(tiny, monkeypatch, stage):
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = [[5, 6, 7] * 8, [8, 9, 10] * 9]
    with LLM(tiny, skip_tokenizer=True, device="cpu", dtype="float32", num_kv_blocks=64) as one:
        expected = [output.outputs[0].token_ids for output in one.generate(prompts, sampling)]
        worker = one.engine.executor.worker
        real, calls = getattr(worker.program, stage), []

        def short_of_memory(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise MemoryError("planted")
            return real(*arguments)

        fault = DeviceFault("cpu is out of memory", kind="out_of_memory", fatal=False)
        monkeypatch.setattr(worker.platform, "explain", lambda error: fault)
        monkeypatch.setattr(worker.program, stage, short_of_memory)
        with pytest.raises(StepFailed, match="cpu is out of memory"):
            one.generate(prompts, sampling)
        assert pool(one).num_free == pool(one).num_usable
        assert [output.outputs[0].token_ids for output in one.generate(prompts, sampling)] == expected


class NoIndexedWrites(TorchDispatchMode):
    """Refuses what fake-hostlen's device does not have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in {"index_put_", "_index_put_impl_", "index_copy_", "index_add_", "scatter_", "index_fill_"}
        return func(*args, **(kwargs or {}))


def test_a_device_without_indexed_writes_in_place_is_never_asked_for_one(tiny):
    with LLM(tiny, skip_tokenizer=True, device="fake-hostlen", dtype="float32", max_model_len=256) as llm:
        with NoIndexedWrites():
            for sampling in MIX[:3]:
                llm.generate([[5, 6, 7] * 50, [8, 9]], sampling)
            llm.generate([[5, 6, 7] * 45], SamplingParams(n=3, max_tokens=4))
        assert llm.engine.scheduler.kv.pool.num_free == llm.engine.scheduler.kv.pool.num_usable


def test_every_device_of_an_spmd_program_holds_its_share(tiny):
    with LLM(tiny, skip_tokenizer=True, device="fake-spmd", dtype="float32", max_model_len=64, num_kv_blocks=32) as llm:
        worker = llm.engine.executor.worker
        for model, caches in zip(worker.program.models, worker.runner._state.caches, strict=True):
            attention, mlp = model.layers[0].attention, model.layers[0].mlp
            # 4 query heads and 2 KV heads of 16 over 4 devices: one query head each, KV heads held twice.
            assert attention.qkv.packed.weight.shape == (3 * 16, 64)
            assert attention.output.packed.weight.shape == (64, 16)
            assert mlp.gate_up.packed.weight.shape == (2 * 128 // 4, 64)
            assert model.embedding.weight.shape == (512 // 4, 64)
            assert caches[0].shape == (32, 2, 16, 1, 16)


def caches_of(state) -> list:
    """Every layer's cache on every device of a program's state."""
    by_layer = state._held.caches if hasattr(state, "_held") else state.caches
    return [cache for item in by_layer for cache in (item if isinstance(item, list) else [item])]


@pytest.mark.parametrize("device", ["cpu", "fake-static", "fake-spmd", "fake-hostlen"])
def test_a_block_is_copied_before_its_source_is_zeroed(tiny, device):
    with LLM(tiny, skip_tokenizer=True, device=device, dtype="float32", max_model_len=128, max_num_seqs=4) as llm:
        program = llm.engine.executor.worker.program
        state = program.initial_state(4)
        for cache in caches_of(state):
            cache.zero_()
            cache[1] = 5
        for cache in caches_of(program.edit(state, [(1, 2), (2, 3)], [1])):
            assert cache[1].eq(0).all()
            assert cache[2].eq(5).all()
            assert cache[3].eq(5).all()


def test_the_worker_process_answers_as_the_inline_one(tiny):
    settings = {"skip_tokenizer": True, "device": "cpu", "dtype": "float32", "num_kv_blocks": 64}
    sampling = SamplingParams(temperature=1.0, seed=4, max_tokens=8, logprobs=1, min_tokens=2)
    answers = []
    for executor in ("inline", "multiprocess"):
        with LLM(tiny, executor=executor, **settings) as llm:
            answers.append([o.outputs[0].token_ids for o in llm.generate(PROMPTS, sampling)])
    assert answers[0] == answers[1]


def test_a_dead_worker_process_is_reported_with_its_cause(tiny):
    llm = LLM(tiny, executor="multiprocess", skip_tokenizer=True, device="cpu", num_kv_blocks=64)
    try:
        llm.engine.executor._children[0]._process.kill()
        with pytest.raises(EngineDead, match="worker 0 exited with status -9"):
            llm.generate([[5, 6]], GREEDY)
        llm.engine.in_flight.clear()
        llm.engine.scheduler.abort("0", 0)
    finally:
        llm.close()


@pytest.mark.parametrize("device", ["cuda", "rocm", "tpu", "ascend"])
def test_a_named_device_that_is_not_here_aborts(device):
    with pytest.raises(DeviceUnavailable, match=f"device '{device}' cannot start: .*; "):
        LLM(device=device)
