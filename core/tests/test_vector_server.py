"""A served embedder and its clients, and a batch file of embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders_kit import describe_modules, hidden_states, ids_of, make_encoder, text_of
from served import Server

from anychip.entrypoints.cli.main import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TEXTS = [text_of(length, seed) for seed, length in enumerate((3, 40, 9, 1))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("embedder")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    made = make_encoder("Bert", folder)
    describe_modules(folder)
    return made


@pytest.fixture(scope="module")
def expected(model: torch.nn.Module) -> list[np.ndarray]:
    states = [hidden_states(model, ids_of(text)).mean(dim=0) for text in TEXTS]
    return [(state / state.norm()).numpy() for state in states]


@pytest.fixture(scope="module")
def server(folder: Path, model: torch.nn.Module) -> Iterator[Server]:
    running = Server(
        str(folder), "--device", "cpu", "--dtype", "float32", "--served-model-name", "tiny", "--api-key", "secret"
    )
    yield running
    assert running.stop() == 0


def test_openais_client_gets_vectors_as_floats_and_as_bytes(server: Server, expected: list[np.ndarray]) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret")
    answer = client.embeddings.create(model="tiny", input=TEXTS)  # base64, as the client asks by itself
    np.testing.assert_allclose([each.embedding for each in answer.data], expected, atol=1e-5)
    assert answer.usage.prompt_tokens == sum(len(ids_of(text)) for text in TEXTS)
    answer = client.embeddings.create(model="tiny", input=ids_of(TEXTS[0]), encoding_format="float")
    np.testing.assert_allclose(answer.data[0].embedding, expected[0], atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="this server's task is embed"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "w1"}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").embeddings.create(model="tiny", input="w1")


def test_langchains_client_embeds_documents(server: Server, expected: list[np.ndarray]) -> None:
    langchain = pytest.importorskip("langchain_openai")
    client = langchain.OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="secret", model="tiny", check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(client.embed_documents(TEXTS), expected, atol=1e-5)


def test_many_callers_get_their_own_vectors(server: Server, expected: list[np.ndarray]) -> None:
    headers = {"Authorization": "Bearer secret"}

    def ask(number: int) -> list[float]:
        texts = TEXTS[number % len(TEXTS) :] + TEXTS[: number % len(TEXTS)]
        return server.post("/embed", {"inputs": texts * 5}, headers=headers).json()

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(ask, range(16))):
            at = number % len(TEXTS)
            np.testing.assert_allclose(found, (expected[at:] + expected[:at]) * 5, atol=1e-5)
    assert server.metric("anychip_prompt_tokens_total") >= 16 * 5 * sum(len(ids_of(text)) for text in TEXTS)


def test_a_batch_file_of_embeddings_is_answered(
    folder: Path, model: torch.nn.Module, expected: list[np.ndarray], tmp_path: Path
) -> None:
    lines = [
        {"custom_id": str(at), "url": "/v1/embeddings", "body": {"input": text}} for at, text in enumerate([*TEXTS, ""])
    ]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    status = main(
        [
            "run-batch",
            str(folder),
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "-i",
            f"{tmp_path}/in",
            "-o",
            f"{tmp_path}/out",
        ]
    )
    assert status == 1, "the empty text is refused"
    answers = {line["custom_id"]: line for line in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    for at, vector in enumerate(expected):
        (entry,) = answers[str(at)]["response"]["body"]["data"]
        np.testing.assert_allclose(entry["embedding"], vector, atol=1e-5)
    assert answers[str(len(TEXTS))]["error"]["message"] == "the text is empty"


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium; apt-get install chromium")
def test_the_page_compares_texts_where_the_model_embeds_them(server: Server, expected: list[np.ndarray]) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.fill("#try-query", TEXTS[0], timeout=30_000)
        assert page.locator("#chat").is_hidden() and page.locator("#tab-chat").is_hidden()
        page.fill("#try-texts", "\n".join(TEXTS[1:]))
        page.click("#try-form button")
        page.wait_for_selector("#try-table tr:nth-child(4)")
        rows = page.locator("#try-table tr").all_inner_texts()
        browser.close()
    similarities = {text: float(vector @ expected[0]) for text, vector in zip(TEXTS[1:], expected[1:], strict=True)}
    ordered = sorted(similarities, key=lambda text: -similarities[text])
    assert [row.split("\t") for row in rows[1:4]] == [[text, f"{similarities[text]:.4f}"] for text in ordered]
