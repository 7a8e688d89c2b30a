"""Routes of vectors, labels and scores, in every API's form, over an engine that is a script."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import numpy as np
import pytest
from served_kit import ScriptedLLM, with_client

from anychip.engine.input_processor import InputProcessor
from anychip.engine.outputs import RequestOutput, SequenceOutput
from anychip.engine.vector_inputs import VectorInputs
from anychip.entrypoints.vectors.protocol import MAX_INPUTS
from anychip.tasks.served import ServedTask

EMBEDS = ServedTask(
    task="embed", why="modules.json", pooling="mean", normalize=True, size=4, dimensions=(2,), prompts={"query": "q: "}
)
SCORES = ServedTask(task="score", why="one label", pooling="cls", size=1, labels=("fit",), activation="sigmoid")
LABELS = ServedTask(task="classify", why="labels", pooling="cls", size=2, labels=("bad", "good"), activation="softmax")


class ScriptedVectors(ScriptedLLM):
    """A text's vector begins with its length in tokens over 100, and with -1 for a classifier of two labels."""

    def __init__(self, served: ServedTask, max_length: int = 64) -> None:
        super().__init__()
        self.served = served
        self.vectors = VectorInputs(served, self.tokenizer, max_length=max_length)
        self.inputs = InputProcessor(
            tokenizer=self.tokenizer, vocab_size=256, max_model_len=max_length, eos_token_ids=(), served=served
        )

    async def _run(self, request_id: str, prompt: Any, sampling: Any) -> AsyncGenerator[RequestOutput]:
        size = {"embed": 4, "score": 1, "classify": 2}[self.served.task]
        vector = np.resize(np.array([len(prompt) / 100, -1], dtype=np.float32), size)
        yield RequestOutput(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            outputs=[SequenceOutput(index=0, finish_reason="stop")],
            finished=True,
            vector=vector.tobytes(),
        )


@pytest.fixture(scope="module")
def embedder() -> ScriptedVectors:
    return ScriptedVectors(EMBEDS)


@pytest.fixture(scope="module")
def scorer() -> ScriptedVectors:
    return ScriptedVectors(SCORES)


@pytest.fixture(scope="module")
def classifier() -> ScriptedVectors:
    return ScriptedVectors(LABELS)


def post(llm: ScriptedLLM, path: str, body: Any) -> httpx.Response:
    async def use(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(path, json=body)

    response: httpx.Response = with_client(llm, use)
    return response


def refused(llm: ScriptedLLM, path: str, body: Any) -> str:
    response = post(llm, path, body)
    assert response.status_code == 400, response.text
    message: str = response.json()["error"]["message"]
    return message


def logistic(number: float) -> float:
    return float(1 / (1 + np.exp(-number)))


@pytest.mark.parametrize(
    ("given", "lengths"),
    [("abc", [3]), (["abc", "ab"], [3, 2]), ([1, 2, 3], [3]), ([[1, 2], [3]], [2, 1])],
)
def test_embeddings_take_texts_and_ids(embedder, given, lengths):
    answer = post(embedder, "/v1/embeddings", {"input": given, "model": "m"}).json()
    assert answer["object"] == "list" and answer["model"] == "m"
    assert [each["index"] for each in answer["data"]] == list(range(len(lengths)))
    assert [each["embedding"][0] for each in answer["data"]] == pytest.approx([length / 100 for length in lengths])
    assert answer["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}


def test_base64_holds_the_same_floats(embedder):
    plain, packed = (
        post(embedder, "/v1/embeddings", {"input": "abc", "encoding_format": form}).json()["data"][0]["embedding"]
        for form in ("float", "base64")
    )
    assert np.frombuffer(base64.b64decode(packed), dtype="<f4").tolist() == plain


def test_fewer_dimensions_have_length_1_where_all_had(embedder):
    (entry,) = post(embedder, "/v1/embeddings", {"input": "abc", "dimensions": 2}).json()["data"]
    assert len(entry["embedding"]) == 2 and np.linalg.norm(entry["embedding"]) == pytest.approx(1)


def test_a_named_prompt_stands_before_the_text(embedder):
    answer = post(embedder, "/v1/embeddings", {"input": "abc", "prompt_name": "query"}).json()
    assert answer["usage"]["prompt_tokens"] == 6


def test_a_long_list_of_ids_is_read_like_a_short_one(embedder):
    ids = [[7] * 30] * 1500
    answer = post(embedder, "/v1/embeddings", {"input": ids}).json()
    assert len(answer["data"]) == 1500 and answer["usage"]["prompt_tokens"] == 45_000


def test_cutting_is_asked_for(embedder):
    long = "x" * 100
    for more in ({"truncate": True}, {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 64}):
        answer = post(embedder, "/v1/embeddings", {"input": long, **more}).json()
        assert answer["usage"]["prompt_tokens"] == 64
    assert post(embedder, "/embed", {"inputs": [long, "a"], "truncate": True}).json()[0][0] == pytest.approx(0.64)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": ""}, "the text is empty"),
        ({"input": []}, "input is empty"),
        ({"input": ["a", ""]}, "text 1: the text is empty"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [300]}, "token id 300"),
        ({"input": "x" * 65}, "the text has 65 tokens, and the model takes 64"),
        ({"input": "x" * 10_000}, "10000 characters"),
        ({"input": "a", "truncate_prompt_tokens": 65}, "expected 1 to 64"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "expected 1 to 64"),
        ({"input": "a", "dimensions": 3}, "dimensions is 3; the model's vectors have 2, 4"),
        ({"input": "a", "prompt_name": "x"}, "known are 'query'"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, f"at most {MAX_INPUTS} may be in one request"),
        ({"input": ["a"] * 100_000}, "send it in parts"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "size": 3}, "unknown parameter 'size'"),
        ({"input": "a", "priority": 2**40}, "priority"),
    ],
)
def test_what_cannot_be_embedded_is_refused(embedder, body, said):
    assert said in refused(embedder, "/v1/embeddings", body)


def test_reranks_have_each_apis_form(scorer):
    body = {"query": "q", "documents": ["a", {"text": "abcd"}, "abc"], "top_n": 2}
    scores = [logistic(length / 100) for length in (5, 4)]
    jina = post(scorer, "/rerank", body).json()
    assert [each["index"] for each in jina["results"]] == [1, 2] and jina["usage"]["total_tokens"] == 11
    assert [each["relevance_score"] for each in jina["results"]] == pytest.approx(scores)
    assert jina["results"][0]["document"] == {"text": "abcd"}
    plain = post(scorer, "/v1/rerank", {**body, "return_documents": False}).json()
    assert set(plain["results"][0]) == {"index", "relevance_score"}
    cohere = post(scorer, "/v2/rerank", {**body, "max_tokens_per_doc": 4096}).json()
    assert [set(each) for each in cohere["results"]] == [{"index", "relevance_score"}] * 2
    assert cohere["meta"]["api_version"] == {"version": "2"}
    tei = post(scorer, "/rerank", {"query": "q", "texts": ["a", "abc"], "raw_scores": True, "return_text": True})
    assert tei.json() == [
        {"index": 1, "score": pytest.approx(0.04), "text": "abc"},
        {"index": 0, "score": pytest.approx(0.02), "text": "a"},
    ]


def test_equal_scores_keep_the_order_of_the_documents(scorer):
    answer = post(scorer, "/rerank", {"query": "q", "documents": ["ab", "cd", "a", "ef"]}).json()
    assert [each["index"] for each in answer["results"]] == [0, 1, 3, 2]


def test_scores_go_by_pairs(scorer):
    one = post(scorer, "/score", {"text_1": "q", "text_2": ["a", "abc"]}).json()
    assert [each["score"] for each in one["data"]] == pytest.approx([logistic(0.02), logistic(0.04)])
    both = post(scorer, "/v1/score", {"text_1": ["q", "qq"], "text_2": ["a", "abc"], "activation": False}).json()
    assert [each["score"] for each in both["data"]] == pytest.approx([0.02, 0.05])
    assert "2 texts in text_1 and 3 in text_2" in refused(scorer, "/score", {"text_1": ["a"] * 2, "text_2": ["b"] * 3})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"query": "q"}, "give documents"),
        ({"query": "q", "documents": []}, "documents is empty"),
        ({"query": "q", "documents": ["a"], "texts": ["a"]}, "give documents"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ({"query": "q", "documents": ["x" * 64]}, "the text has 65 tokens"),
        ({"documents": ["a"]}, "query"),
    ],
)
def test_what_cannot_be_ranked_is_refused(scorer, body, said):
    assert said in refused(scorer, "/rerank", body)


def test_labels_have_each_apis_form(classifier):
    powers = np.exp([0.03, -1])
    bad, good = (powers / powers.sum()).tolist()
    answer = post(classifier, "/classify", {"input": ["abc"]}).json()
    assert answer["data"][0] == {"index": 0, "label": "bad", "probs": pytest.approx([bad, good]), "num_classes": 2}
    raw = post(classifier, "/classify", {"input": ["abc"], "activation": False}).json()
    assert raw["data"][0]["probs"] == pytest.approx([0.03, -1])
    labels = [{"score": pytest.approx(bad), "label": "bad"}, {"score": pytest.approx(good), "label": "good"}]
    assert post(classifier, "/predict", {"inputs": "abc"}).json() == labels
    assert post(classifier, "/predict", {"inputs": ["ab", "c"]}).json() == labels  # a pair
    assert post(classifier, "/predict", {"inputs": [["abc"], ["ab", "c"]]}).json() == [labels, labels]
    pooled = post(classifier, "/pooling", {"input": "abc", "task": "classify"}).json()
    assert pooled["data"][0]["data"] == pytest.approx([bad, good])
    assert "dimensions are of vectors" in refused(classifier, "/pooling", {"input": "abc", "dimensions": 2})


BODIES = {
    "/v1/embeddings": {"input": "a"},
    "/embed": {"inputs": "a"},
    "/rerank": {"query": "q", "documents": ["a"]},
    "/v2/rerank": {"query": "q", "documents": ["a"]},
    "/score": {"text_1": "a", "text_2": "b"},
    "/classify": {"input": "a"},
    "/predict": {"inputs": "a"},
    "/pooling": {"input": "a"},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"input": "a"},
}
SERVED_AT = {
    "embed": {"/v1/embeddings", "/embed", "/pooling"},
    "score": {"/rerank", "/v2/rerank", "/score", "/classify", "/predict", "/pooling"},
    "classify": {"/classify", "/predict", "/pooling"},
    "generate": {"/v1/completions", "/v1/chat/completions", "/v1/responses"},
}


@pytest.mark.parametrize("task", SERVED_AT)
def test_whoever_asks_for_another_task_learns_which_is_served(embedder, scorer, classifier, task):
    llm = {"embed": embedder, "score": scorer, "classify": classifier, "generate": ScriptedLLM()}[task]
    for path, body in BODIES.items():
        if path in SERVED_AT[task]:
            assert post(llm, path, body).status_code == 200, path
        else:
            assert f"this server's task is {task} (" in refused(llm, path, body), path


def test_another_task_of_pooling_is_refused_by_name(embedder):
    for name in ("classify", "token_embed"):
        assert f"the request asks for {name}" in refused(embedder, "/pooling", {"input": "a", "task": name})


def test_the_document_lists_the_routes(embedder):
    async def use(client: httpx.AsyncClient) -> Any:
        return (await client.get("/openapi.json")).json()

    paths = with_client(embedder, use)["paths"]
    assert {"/v1/embeddings", "/rerank", "/v2/rerank", "/score", "/classify", "/pooling", "/embed"} <= set(paths)
