"""What a request leaves out is what the model's makers recommend; what it gives is never overruled."""

from __future__ import annotations

import json
import shutil

import pytest

from anychip.config import EngineConfig
from anychip.entrypoints.cli.options import engine_arguments
from anychip.entrypoints.openai.protocol import CompletionBody
from anychip.errors import InvalidRequest
from anychip.hub import resolve_folder
from anychip.model_config import load_model_config

RECOMMENDED = {"temperature": 0.7, "top_p": 0.9}


def sampling(**body):
    return CompletionBody(prompt="x", **body).sampling(RECOMMENDED, max_tokens=4, logprobs=None)


def test_the_embedded_model_recommends_its_own():
    assert load_model_config("quickstart").sampling_defaults == RECOMMENDED | {"repetition_penalty": 1.05}


def test_what_is_no_number_is_no_recommendation(tmp_path):
    shutil.copytree(resolve_folder("quickstart"), tmp_path / "model")
    generation = {"temperature": None, "top_k": 20, "top_p": "high", "do_sample": True, "min_p": 0.05}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    assert load_model_config(str(tmp_path / "model")).sampling_defaults == {"top_k": 20, "min_p": 0.05}


def test_a_request_takes_what_it_leaves_out_from_the_model():
    assert (sampling().temperature, sampling().top_p, sampling().top_k) == (0.7, 0.9, 0)
    assert (sampling(temperature=0).temperature, sampling(temperature=0).top_p) == (0, 0.9)
    assert sampling(top_p=1.0).top_p == 1.0


def test_no_limit_on_top_k_overrules_the_models():
    assert CompletionBody(prompt="x", top_k=-1).sampling({"top_k": 20}, max_tokens=4, logprobs=None).top_k == 0
    with pytest.raises(InvalidRequest, match="top_k is -2"):
        sampling(top_k=-2)


def test_a_command_line_says_what_a_configuration_holds():
    config = EngineConfig(
        model="m", prefix_caching=False, trust_remote_code=True, num_kv_blocks=7, device_options={"threads": "2"}
    )
    assert engine_arguments(config) == [
        "m", "--device-opt=threads=2", "--trust-remote-code", "--num-kv-blocks=7", "--no-prefix-caching",
    ]  # fmt: skip
    assert engine_arguments(EngineConfig()) == ["quickstart"]
