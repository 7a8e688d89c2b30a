"""A model is found by its path, in the hub's cache, or not at all, with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.hub import located, resolve_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def cached_model(cache: Path, *, weights: bool = True) -> Path:
    """The embedded model as a repository that was downloaded."""
    repository = cache / "models--acme--tiny"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(resolve_folder("quickstart"), snapshot)
    if not weights:
        (snapshot / "model.safetensors").unlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_folder_is_itself(tmp_path):
    assert resolve_folder(str(tmp_path)) == tmp_path


def test_a_cached_repository_is_found_without_the_network(hub_cache):
    snapshot = cached_model(hub_cache)
    assert resolve_folder("acme/tiny") == snapshot
    assert resolve_folder("acme/tiny", COMMIT) == snapshot


def test_a_configuration_is_located_once_and_keeps_its_public_name(hub_cache):
    snapshot = cached_model(hub_cache)
    config = located(EngineConfig(model="acme/tiny"))
    assert (config.model, config.public_name) == (str(snapshot), "acme/tiny")
    assert located(config) == config


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            "acme/absent",
            "'acme/absent' is neither a folder nor complete in the hub's cache, and could not be downloaded",
        ),
        ("nowhere", "'nowhere' is not a folder; give the path of a Hugging Face checkpoint, the name of a repository"),
        ("/not/there", "'/not/there' is not a folder"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(hub_cache, model, expected):
    with pytest.raises(ConfigError, match=expected):
        resolve_folder(model)


def test_a_download_that_was_cut_short_is_not_taken_for_the_model(hub_cache):
    cached_model(hub_cache, weights=False)
    with pytest.raises(ConfigError, match="nor complete"):
        resolve_folder("acme/tiny")


def test_an_index_must_have_all_its_files(hub_cache):
    snapshot = cached_model(hub_cache)
    (snapshot / "model.safetensors").rename(snapshot / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="nor complete"):
        resolve_folder("acme/tiny")
