"""Model cards: the metadata that the hub parses, and what the text says."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from support.model_card import model_card, write_model_card

SHARE = {"value": 0.881, "low": 0.857, "high": 0.901, "n": 872}
RUN = {
    "stage": "finetune", "command": "python finetune.py", "settings": {"task": "sst2"}, "git": "d76ef08",
    "parent": "openai-community/gpt2", "task": "sst2", "kind": "head", "labels": ["bad", "good"], "step": 100,
    "data": {"train": {"source": "nyu-mll/glue on Hugging Face", "licence": "MIT"}, "tokenizer": "3fa2"},
    "parameters": 124_000_000, "dtype": "float32", "processes": 1, "seconds": 90.0,
    "hardware": {"device": "RTX 3060", "threads": 8}, "versions": {"torch": "2.13.0"},
    "evaluation": {"split": "validation", "metrics": {"accuracy": SHARE}},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "metrics.jsonl").write_text('{"step": 100, "loss": 0.1, "tokens": 12345}\n')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_positions": 1024}')
    return tmp_path


def written(folder: Path, **changes) -> ModelCard:
    (folder / "run.json").write_text(json.dumps(RUN | changes))
    write_model_card(folder)
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_the_metadata_and_results_of_eval_py_are_added(folder):
    metric = {"value": 3.2, "low": 3.1, "high": 3.3, "n": 50}
    entry = {"task": "wikitext2", "split": "test", "shots": 0, "metrics": {"perplexity": metric}}
    entries = {"wikitext2 test 0-shot": entry, "damaged": {"task": "x", "metrics": [1]}}
    (folder / "results.json").write_text(json.dumps({"results": entries}))
    card = written(folder)
    data = card.data
    assert (data.base_model, data.datasets) == ("openai-community/gpt2", ["nyu-mll/glue"])
    assert (data.license, data.language, data.pipeline_tag) == ("mit", "en", "text-classification")
    own, perplexity = data.eval_results
    assert (own.dataset_type, own.dataset_split, own.metric_type) == ("sst2", "validation", "accuracy")
    assert own.metric_value == 0.881 and own.metric_args["n"] == 872 and perplexity.metric_value == 3.2
    for text in ("RTX 3060", "1.5 minutes", "12,345", "88.1 [85.7, 90.1], n=872", "3.20 [3.10, 3.30], n=50"):
        assert text in card.text, text


def test_a_smoke_run_shows_no_result(folder):
    card = written(folder, smoke=True)
    assert not card.data.eval_results and "88.1" not in card.text


def test_a_path_on_this_disk_is_no_base_model_of_the_hub(folder):
    base = folder.parent / "base"
    base.mkdir(exist_ok=True)
    (base / "run.json").write_text(json.dumps(RUN | {"parent": None, "data": {"licence": "yours"}}))
    card = written(folder, parent=str(base), kind="causal", stage="sft", chat=True)
    assert card.data.base_model is None and card.data.language is None
    assert "conversational" in card.data.tags


@pytest.mark.parametrize("licence, name", [
    ("storyworld: MIT; wikitext2: CC BY-SA 3.0", "other"), ("CC BY-NC 4.0", "cc-by-nc-4.0"),
])  # fmt: skip
def test_licences_of_one_set_and_of_a_mix(folder, licence, name):
    assert written(folder, data={"licence": licence}).data.license == name


def test_a_run_that_has_just_begun_and_a_folder_without_a_run(tmp_path):
    write_model_card(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "run.json").write_text('{"status": "running"}')
    assert ModelCard(model_card(tmp_path)).data.tags == ["modern-llm", "train"]


def test_every_stage_leaves_a_card(tuned):
    assert ModelCard.load(Path(tuned) / "README.md").data.pipeline_tag == "text-generation"
