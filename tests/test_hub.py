"""Data sets of the hub: from its cache without a network, from a server, or an error that says what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import serving

import data
from support import hub
from support.hub import hub_file

ROOT = Path(__file__).parents[1]
SAMSUM = 'id,dialogue,summary\r\n13818513,"A: hi\r\nB: yo",They greet.\r\n13828807,,Nobody says anything.\r\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    hub.unreachable.cache_clear()  # what earlier tests found out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path / "hub"


def put(cache: Path, repo: str, file: str, content: str) -> None:
    """A file as a download leaves it in the hub's cache."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    path = folder / "snapshots" / "abc" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, newline="")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("abc")


def test_a_corpus_is_read_from_a_plain_file_or_else_from_the_hubs_cache(cache, tmp_path, data_dir):
    data_dir(tmp_path)
    docs = [f"story {i}" for i in range(50)]
    name = "TinyStoriesV2-GPT4-valid.txt"
    put(cache, "roneneldan/TinyStories", name, "\n<|endoftext|>\n".join(docs))
    assert list(data.documents("tinystories", "validation")) == docs
    assert data.corpus_info("tinystories", "validation")["source"].startswith(
        "roneneldan/TinyStories on Hugg"
    )
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories" / name).write_text("own")
    assert list(data.documents("tinystories", "validation")) == ["own"]


def test_samsum_as_the_hub_has_it_loses_the_row_without_a_dialogue(tmp_path):
    """Three CSV files, of which one row's dialogue comes as None; by the public command."""
    for split in ("train", "validation", "test"):
        put(tmp_path / "hub", "knkarthick/samsum", f"{split}.csv", SAMSUM)
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "DATA_DIR": str(tmp_path / "data")}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        env.pop(name, None)
    command = [sys.executable, "data.py", "--task=samsum", "--split=train"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "1 examples, knkarthick/samsum on Hugging Face, train (1 without text left out)" in done.stdout
    assert "Conversation:\nA: hi\nB: yo\nSummary:[ They greet.]" in done.stdout


@pytest.mark.parametrize("load, name, words", [
    (data.load_task, "samsum", "knkarthick/samsum samsum/train.jsonl"),
    (data.load_conversations, "lima", "GAIR/lima lima/train.jsonl"),
    (data.load_preferences, "hh-rlhf", "Anthropic/hh-rlhf hh-rlhf/train.jsonl"),
])  # fmt: skip
def test_what_is_nowhere_is_named_with_what_would_serve(cache, tmp_path, data_dir, load, name, words):
    data_dir(tmp_path / "data")
    with pytest.raises(data.DataError) as error:
        load(name, "train")
    for word in [*words.split(), "HF_HUB_OFFLINE is set"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
ALPACA = {"instruction": "Why?", "input": "", "output": "So.", "text": "### Instruction:\nWhy?"}
DOLLY = {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"}
LIMA = {"conversations": ["Why?", "So."], "source": "wiki"}
HH = {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
ULTRA = {"prompt": "Why?", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "No."}]}


@pytest.mark.parametrize("name, repo, file, row", [
    ("alpaca", "tatsu-lab/alpaca", "data/train.jsonl", ALPACA),
    ("dolly", "databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl", DOLLY),
    ("lima", "GAIR/lima", "train.jsonl", LIMA),  # its repository is a script, which `datasets` refuses
    ("hh-rlhf", "Anthropic/hh-rlhf", "helpful-base/train.jsonl", HH),
    (
        "ultrafeedback", "HuggingFaceH4/ultrafeedback_binarized",
        "data/train_prefs-00000-of-00001.jsonl", ULTRA,
    ),
])  # fmt: skip
def test_collections_of_the_hub_are_read_as_they_are_there(cache, tmp_path, data_dir, name, repo, file, row):
    data_dir(tmp_path)
    lines = [json.dumps(row).replace("Why?", f"Why is it {i}?") for i in range(60)]
    put(cache, repo, file, "\n".join(lines))
    load = data.load_preferences if "chosen" in row else data.load_conversations
    rows, about = load(name, "train")
    assert len(rows) > 40 and about["source"].startswith(f"{repo} on Hugging Face")


# -----------------------------------------------------------------------------
# A hub on this machine


@pytest.fixture
def endpoint(cache, tmp_path, monkeypatch):
    """Data sets are downloaded from this machine: TinyStories, and LIMA, whose files are refused."""
    from huggingface_hub import constants

    for file in ("roneneldan/TinyStories/TinyStoriesV2-GPT4-valid.txt", "GAIR/lima/train.jsonl"):
        path = tmp_path / "served/datasets" / file
        path.parent.mkdir(parents=True)
        path.write_text("one\n<|endoftext|>\ntwo\n")
    with serving(tmp_path / "served") as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        yield


def test_a_corpus_is_downloaded_once_and_is_then_there_offline(endpoint, tmp_path, data_dir, monkeypatch):
    data_dir(tmp_path)
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert list(data.documents("tinystories", "validation")) == ["one", "two"]


@pytest.mark.parametrize("repo, file, why", [
    ("GAIR/lima", "train.jsonl", "is gated: accept its terms on its page, then run `hf auth login`"),
    ("nobody/nothing", "train.jsonl", "not on the hub, or private"),
    ("roneneldan/TinyStories", "train.jsonl", "404"),
])  # fmt: skip
def test_a_refusal_of_the_hub_is_one_line_that_says_what_to_do(endpoint, repo, file, why):
    with pytest.raises(data.DataError, match=why) as error:
        hub_file(repo, file)
    assert "\n" not in str(error.value)
