"""What cannot be had of a model's folder: its tokenizer, or its number of embeddings."""

import json
from pathlib import Path

import pytest
from conftest import pipeline
from transformers import AutoTokenizer

from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.tokenizer import embedding_rows, load_whole_tokenizer

MODEL = ModelConfig(name="assets/tiny-llama")
FOLDER = Path("assets/tiny-llama")


def test_a_damaged_tokenizer_is_named(fresh_folder):
    path = FOLDER / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"model\.name: 'assets/tiny-llama': no tokenizer can be loaded from it: \w"):
        load_whole_tokenizer(MODEL, None, offline=True)


def test_the_disks_own_error_is_no_damage_of_the_tokenizer(monkeypatch):
    def failing(*_arguments, **_more):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", failing)
    with pytest.raises(OSError, match="Input/output error"):
        load_whole_tokenizer(MODEL, None, offline=True)


def test_a_tokenizer_of_another_kind_is_refused(fresh_folder):
    for path in FOLDER.glob("*token*"):
        path.unlink()
    (FOLDER / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    says = "model.name: 'assets/tiny-llama': its tokenizer has no tokenizer.json, which is needed"
    with pytest.raises(UserError, match=says):
        load_whole_tokenizer(MODEL, None, offline=True)
    ran = pipeline("sample")
    assert ran.status == 1 and says in ran.out


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "no such"}', "["])
def test_a_model_that_does_not_say_how_many_embeddings_it_has(fresh_folder, config):
    path = FOLDER / "config.json"
    assert embedding_rows(MODEL, None, offline=True) == json.loads(path.read_text())["vocab_size"]
    path.unlink() if config is None else path.write_text(config)
    assert embedding_rows(MODEL, None, offline=True) is None
