"""Adapters in requests: tokens are those of transformers' model with the adapter merged in float32."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from anychip import LLM, SamplingParams
from anychip.adapter_files import AdapterFolder
from anychip.config import EngineConfig
from anychip.entrypoints.cli.main import main
from anychip.entrypoints.http.admin import make_admin_app
from anychip.entrypoints.http.app import make_app
from anychip.errors import AdapterRefused, ConfigError, UnknownModel, Unsupported
from anychip.launch.async_llm import AsyncLLM
from anychip.server_config import ServerConfig
from anychip_conformance.equality.tiny_adapters import EVERY, FIVE, TinyAdapter
from anychip_conformance.equality.tiny_models import make_checkpoint
from anychip_conformance.fakes.spmd import SpmdPlatform

NAMES = [f"a{number}" for number in range(len(FIVE))]
TEXT = [3 + at * 37 % 500 for at in range(40)]
PROMPTS = [TEXT, TEXT[:17], TEXT[20:23], [7], TEXT[:33] + [5] * 6, TEXT[5:30]]
NUM_TOKENS = 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
DEVICES = {
    "cpu": {"device": "cpu"},
    "cpu-tp2": {"device": "cpu", "tensor_parallel_size": 2},
    "fake-static": {"device": "fake-static", "max_num_batched_tokens": 16},  # one shape is traced
    "fake-hostlen": {"device": "fake-hostlen"},
    "fake-spmd": {"device": "fake-spmd", "num_kv_blocks": 64},
}


class Base:
    """A tiny model's folder, its five adapters' folders, and what each draws for each prompt."""

    def __init__(self, family: str, folder: Path, tiny: dict[str, TinyAdapter], *, untied: bool = False) -> None:
        self.folder = folder / "model"
        self.model = make_checkpoint(family, self.folder).float()
        if untied:
            untie(self.model, 1.1).save_pretrained(self.folder)
        self.adapters = {name: str(each.save(self.model, folder / name)) for name, each in tiny.items()}
        models = {None: self.model} | {name: each.merged(self.model) for name, each in tiny.items()}
        self.expected = {name: [greedy(model, ids) for ids in PROMPTS] for name, model in models.items()}

    def opened(self, **more: object) -> LLM:
        given: dict[str, object] = {
            "dtype": "float32", "skip_tokenizer": True, "max_model_len": 96, "max_num_seqs": 8,
            "adapters": self.adapters,
        }  # fmt: skip
        return LLM(str(self.folder), **{**given, **more})


def untie(model: torch.nn.Module, factor: float = 1.0) -> torch.nn.Module:
    """Gives the head a matrix of its own: the embedding's times `factor`."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * factor)
    model.config.tie_word_embeddings = False
    return model


@torch.inference_mode()
def greedy(model: torch.nn.Module, ids: Sequence[int]) -> list[int]:
    """What transformers' model draws."""
    known = list(ids)
    for _ in range(NUM_TOKENS):
        known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(ids) :]


def drawn(llm: LLM, adapter: str | Sequence[str | None] | None) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, adapter=adapter)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base("llama", tmp_path_factory.mktemp("adapters"), dict(zip(NAMES, FIVE, strict=True)))


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_five_adapters_and_none_draws_what_each_draws_alone(base: Base, device: str) -> None:
    names = [*NAMES, None]
    assert len({tuple(map(tuple, tokens)) for tokens in base.expected.values()}) == 6, "adapters that change nothing"
    with base.opened(**DEVICES[device]) as llm:
        for turn in range(2):  # the second time around, prompts are in the prefix cache under other adapters
            each = names[turn:] + names[:turn]
            wanted = [base.expected[name][number] for number, name in enumerate(each)]
            assert drawn(llm, each) == wanted
        assert drawn(llm, None) == base.expected[None]
        assert drawn(llm, "a2") == base.expected["a2"]


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),  # fused in the checkpoint
        ("gemma2", EVERY),
        ("granite", ("o_proj", "up_proj")),
        ("qwen3-moe", ("q_proj", "v_proj", "o_proj")),
    ],
)
def test_adapters_of_other_families(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    tiny = {"a": TinyAdapter(seed=7, rank=8, targets=targets), "b": TinyAdapter(seed=8, rank=3, targets=targets[:1])}
    base = Base(family, tmp_path, tiny)
    with base.opened(device="cpu") as llm:
        each = ["a", "b", None] * 2
        wanted = [base.expected[name][number] for number, name in enumerate(each)]
        assert base.expected["a"] != base.expected[None] != base.expected["b"]
        assert drawn(llm, each) == wanted


# -- slots, names and contents ----------------------------------------------------------------------------------------


def test_five_adapters_take_turns_in_two_slots(base: Base) -> None:
    with base.opened(device="cpu", max_adapters=2, max_num_batched_tokens=24) as llm:
        each = [*NAMES, None]
        wanted = [base.expected[name][number] for number, name in enumerate(each)]
        assert drawn(llm, each) == wanted
        assert drawn(llm, each) == wanted
        assert llm.engine.scheduler.adapters.num_loads >= 8


def test_an_adapter_that_is_loaded_again_with_other_bytes_answers_anew(base: Base, tmp_path: Path) -> None:
    first, second = FIVE[0], TinyAdapter(seed=11, rank=8)
    folder = first.save(base.model, tmp_path / "changing")
    wanted = [greedy(second.merged(base.model), ids) for ids in PROMPTS]
    with base.opened(device="cpu", adapters={}, max_adapters=2) as llm:
        llm.load_adapter("changing", str(folder))
        assert drawn(llm, "changing") == base.expected["a0"]
        second.save(base.model, folder)
        assert drawn(llm, "changing") == base.expected["a0"], "what was loaded does not change by itself"
        with pytest.raises(AdapterRefused, match="loaded with other contents.*load_inplace"):
            llm.load_adapter("changing", str(folder))
        llm.load_adapter("changing", str(folder), replace=True)
        assert drawn(llm, "changing") == wanted, "the prompts were in the prefix cache"
        llm.load_adapter("alias", str(folder))
        llm.unload_adapter("changing")
        with pytest.raises(UnknownModel, match="'changing' is not loaded; loaded are: alias"):
            drawn(llm, "changing")
        assert drawn(llm, "alias") == wanted
        llm.unload_adapter("alias")
        assert not list(llm.engine.adapters.digests) and len(llm.engine.executor.worker.adapters._held) <= 1


def test_an_adapter_that_is_unloaded_while_it_runs_finishes_first(base: Base) -> None:
    with base.opened(device="cpu") as llm:
        stream = llm._run(PROMPTS[:1], [GREEDY], llm._with_adapters("a2", 1))
        number, begun = next(stream)
        llm.unload_adapter("a2")
        with pytest.raises(UnknownModel):
            drawn(llm, "a2")
        tokens = [token for _, output in [(number, begun), *stream] for token in output.outputs[0].token_ids]
        assert tokens == base.expected["a2"][0]
        assert drawn(llm, None) == base.expected[None]


def test_samples_drafts_and_quantized_bases_go_with_adapters(base: Base) -> None:
    several = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, n=2)
    with base.opened(device="cpu", speculate="ngram") as llm:
        assert drawn(llm, [*NAMES, None]) == [base.expected[name][number] for number, name in enumerate([*NAMES, None])]
        (output,) = llm.generate([TEXT], several, adapter="a1")
        assert [each.token_ids for each in output.outputs] == [base.expected["a1"][0]] * 2
    with base.opened(device="cpu", quantization="int8") as llm:
        alone = {name: drawn(llm, name) for name in [*NAMES, None]}
        assert drawn(llm, [*NAMES, None]) == [alone[name][number] for number, name in enumerate([*NAMES, None])]
        assert alone["a2"] != alone[None] != alone["a1"]


def test_many_loads_leave_nothing_behind(base: Base) -> None:
    with base.opened(device="cpu", adapters={}, max_adapters=1) as llm:
        for _ in range(40):
            llm.load_adapter("a", base.adapters["a0"])
            llm.generate([[7]], SamplingParams(max_tokens=1), adapter="a")
            llm.unload_adapter("a")
        llm.generate([[7]], SamplingParams(max_tokens=1))
        worker, slots = llm.engine.executor.worker, llm.engine.scheduler.adapters
        worker.adapters._thread.submit(int).result()  # behind what it was asked to drop
        assert len(worker.adapters) == 0 and not slots._slots and len(slots._free) == 1


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_ten_thousand_loads_leave_memory_flat(base: Base, tmp_path: Path) -> None:
    """Of five contents in turns; a request in every fiftieth fills a slot."""
    tiny = [TinyAdapter(seed=seed, rank=8, targets=("q_proj",)) for seed in range(5)]
    folders = [str(each.save(base.model, tmp_path / str(each.seed))) for each in tiny]
    one = SamplingParams(max_tokens=1)
    with base.opened(device="cpu", adapters={}, max_adapters=2) as llm:

        def turn(number: int) -> None:
            llm.load_adapter("a", folders[number % len(folders)])
            if number % 50 == 0:
                llm.generate([[7]], one, adapter="a")
            llm.unload_adapter("a")

        for number in range(1000):
            turn(number)
        before = resident_bytes()
        for number in range(9000):
            turn(number)
        grown = resident_bytes() - before
        llm.generate([[7]], one)
        worker = llm.engine.executor.worker
        worker.adapters._thread.submit(int).result()  # behind what it was asked to drop
        assert len(worker.adapters) == 0 and not llm.engine.scheduler.adapters._slots
    assert grown < 8 << 20, f"{grown / 2**20:.1f} MiB more after 9,000 loads and unloads"


# -- what is refused --------------------------------------------------------------------------------------------------


Tensors = dict[str, torch.Tensor]


def tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """Changes what the folder's weights are."""

    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return spoil


def with_one(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return tensors(lambda held: held | {name: tensor})


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return tensors(lambda held: {name.replace(old, new): tensor for name, tensor in held.items()})


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
CHANGES: dict[str, tuple[dict[str, Any], Callable[[Path], object] | None, str]] = {
    "DoRA without magnitudes": ({"use_dora": True}, None, "use_dora True, adapter_model.safetensors says otherwise"),
    "DoRA without room": (
        {"use_dora": True}, with_one(Q + "magnitude_vector", torch.ones(64)),
        "no room for DoRA's magnitudes.*--adapter-targets magnitudes",
    ),
    "KaSA": ({"kasa_config": {"beta": 1}}, None, r"KaSA \(kasa_config\); that is not served"),
    "biases": ({"bias": "lora_only"}, None, "biases that were trained with the adapter"),
    "modules": ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, None, "changed base weights"),
    "another method": ({"peft_type": "IA3"}, None, "peft_type 'IA3'; LORA is served"),
    "a pickle": ({}, pickled, "adapter_model.bin is a pickle, .*safe_serialization"),
    "no config": ({}, lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "a rank of the config": ({"r": 4}, None, "adapter_config.json says rank 4"),
    "the head": (
        {}, renamed("model.layers.0.self_attn.q_proj", "lm_head"),
        "lm_head: slots have no room for adapters of head, .*--adapter-targets head.* o_proj, q_proj",
    ),
    "an expert": (
        {}, renamed("self_attn.q_proj", "mlp.experts.0.up_proj"), "no room for adapters of experts, .*targets experts"
    ),
    "an embedding": (
        {}, with_one("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(2, 2)),
        "no matrix B of model.embed_tokens",
    ),
    "a saved module": (
        {}, with_one("base_model.model.lm_head.weight", torch.ones(2, 2)), "lm_head.weight', no matrix A or B"
    ),
    "half of a pair": (
        {}, tensors(lambda held: {name: tensor for name, tensor in held.items() if name != Q + "B.weight"}),
        "no matrix B",
    ),
    "another base": (
        {}, with_one(Q + "A.weight", torch.ones(8, 48)),
        "64 rows and 48 columns, the model's has 64 and 64; it was trained on another base",
    ),
    "no numbers": ({}, with_one(Q + "A.weight", torch.full((8, 64), float("nan"))), "no finite numbers"),
}  # fmt: skip


@pytest.fixture(scope="module")
def small(base: Base):
    with base.opened(device="cpu", adapters={}, max_adapters=1, max_adapter_rank=8) as llm:
        yield llm


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_not_served_or_does_not_fit_is_named(base: Base, small: LLM, what: str, tmp_path: Path) -> None:
    changes, spoil, says = CHANGES[what]
    folder = TinyAdapter(seed=1, rank=8, targets=("q_proj",)).save(base.model, tmp_path / "a", **changes)
    if spoil is not None:
        spoil(folder)
    with pytest.raises(AdapterRefused, match=says):
        small.load_adapter("a", str(folder))
    assert not list(small.adapters) and not list(small.engine.adapters.digests)
    assert small.generate([TEXT], GREEDY)[0].outputs[0].token_ids == base.expected[None][0]


def test_a_rank_above_the_limit_and_an_engine_without_slots(
    base: Base, small: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AdapterRefused, match="rank 64, at most 8 may be; raise --max-adapter-rank"):
        small.load_adapter("a", base.adapters["a2"])
    with pytest.raises(AdapterRefused, match="is the model's own name"):
        small.load_adapter(small.config.public_name, base.adapters["a0"])
    with base.opened(device="cpu", adapters={}) as llm, pytest.raises(AdapterRefused, match="--max-adapters"):
        llm.load_adapter("a", base.adapters["a0"])
    with pytest.raises(ConfigError, match="max_adapters is 0"):
        EngineConfig(adapters={"a": "b"}, max_adapters=0)
    monkeypatch.setattr(SpmdPlatform, "capabilities", replace(SpmdPlatform.capabilities, lora=False))
    with pytest.raises(Unsupported, match="adapters"):
        base.opened(device="fake-spmd")


def test_the_digest_is_of_the_content(base: Base, tmp_path: Path) -> None:
    one = FIVE[0].save(base.model, tmp_path / "one")
    other = FIVE[0].save(base.model, tmp_path / "other")
    assert AdapterFolder(one).digest() == AdapterFolder(other).digest()
    config = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps(config, indent=3, sort_keys=True))
    assert AdapterFolder(one).digest() == AdapterFolder(other).digest(), "spelling is no content"
    (one / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 17}))
    assert AdapterFolder(one).digest() != AdapterFolder(other).digest()


def test_a_merged_checkpoint_draws_what_the_adapter_draws(base: Base, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert main(["merge-adapter", str(base.folder), base.adapters["a4"], "--output", str(merged)]) == 0
    with LLM(str(merged), device="cpu", dtype="float32", skip_tokenizer=True, max_model_len=96) as llm:
        assert drawn(llm, None) == base.expected["a4"]
    assert main(["merge-adapter", str(base.folder), base.adapters["a4"], "--output", str(merged)]) == 2, "it is there"
    other = tmp_path / "other"
    TinyAdapter(seed=1, rank=2, targets=("q_proj",)).save(base.model, other)
    renamed("self_attn.q_proj", "self_attn.nothing")(other)
    assert main(["merge-adapter", str(base.folder), str(other), "--output", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


# -- over HTTP --------------------------------------------------------------------------------------------------------


def test_a_server_lists_answers_loads_and_unloads_adapters(base: Base, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    later = FIVE[2].save(base.model, allowed / "later")
    FIVE[0].save(base.model, tmp_path / "outside")
    (allowed / "link").symlink_to(tmp_path / "outside")

    async def talk() -> None:
        config = EngineConfig(
            model=str(base.folder), served_model_name="base", device="cpu", dtype="float32", skip_tokenizer=True,
            max_model_len=96, adapters={"a1": base.adapters["a1"]}, max_adapters=3, max_adapter_rank=64,
        )  # fmt: skip
        server = ServerConfig(adapter_folder=str(allowed), admin_port=1, admin_key="secret")
        llm = AsyncLLM(config)
        await llm.start()
        try:
            headers = {"authorization": "Bearer secret"}
            public = httpx.AsyncClient(transport=httpx.ASGITransport(make_app(llm, server)), base_url="http://test")
            admin = httpx.AsyncClient(
                transport=httpx.ASGITransport(make_admin_app(llm, server, lambda: None)),
                base_url="http://test",
                headers=headers,
            )
            async with public, admin:
                await check(public, admin)
                llm.kill_engine("a test")
                while llm.dead is not None:
                    await asyncio.sleep(0.05)
                assert await ids(public, "a1") == (200, "a1", base.expected["a1"][0]), "a new engine has it too"
        finally:
            await llm.close()

    async def ids(client: httpx.AsyncClient, model: str) -> tuple[int, Any, Any]:
        body = {"model": model, "prompt": TEXT, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
        answer = await client.post("/v1/completions", json={**body, "ignore_eos": True})
        told = answer.json()
        return answer.status_code, told.get("model"), told["choices"][0]["token_ids"] if "choices" in told else told

    async def check(public: httpx.AsyncClient, admin: httpx.AsyncClient) -> None:
        loaded_first = AdapterFolder(Path(base.adapters["a1"])).digest().hex()
        cards = (await public.get("/v1/models")).json()["data"]
        assert [(card["id"], card.get("parent")) for card in cards] == [("base", None), ("a1", "base")]
        assert (await public.get("/v1/models/a1")).json()["parent"] == "base"
        assert await ids(public, "base") == (200, "base", base.expected[None][0])
        assert await ids(public, "a1") == (200, "a1", base.expected["a1"][0])
        assert (await ids(public, "later"))[0] == 404
        assert (await public.post("/v1/load_lora_adapter", json={})).status_code == 404, "the admin port alone"
        for path in ("../outside", str(tmp_path / "outside"), "link", ".", "missing"):
            refused = await admin.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
            assert refused.status_code == 400, path
        loaded = await admin.post("/v1/load_lora_adapter", json={"lora_name": "later", "lora_path": "later"})
        assert loaded.status_code == 200, loaded.text
        assert loaded.json()["digest"] == AdapterFolder(later).digest().hex()
        assert await ids(public, "later") == (200, "later", base.expected["a2"][0])
        FIVE[0].save(base.model, later)
        again = {"lora_name": "later", "lora_path": "later"}
        assert (await admin.post("/v1/load_lora_adapter", json=again)).status_code == 400
        assert (await admin.post("/v1/load_lora_adapter", json={**again, "load_inplace": True})).status_code == 200
        assert await ids(public, "later") == (200, "later", base.expected["a0"][0])
        names = [each["lora_name"] for each in (await admin.get("/admin/adapters")).json()["adapters"]]
        assert names == ["a1", "later"]
        assert (await admin.post("/v1/unload_lora_adapter", json={"lora_name": "later"})).status_code == 200
        assert (await admin.post("/v1/unload_lora_adapter", json={"lora_name": "later"})).status_code == 404
        assert (await ids(public, "later"))[0] == 404
        told = [line for line in (await admin.get("/metrics")).text.splitlines() if "adapter_info{" in line]
        assert told == [f'anychip_adapter_info{{adapter="a1",digest="{loaded_first}"}} 1.0']
        assert await ids(public, "a1") == (200, "a1", base.expected["a1"][0])

    asyncio.run(talk())
