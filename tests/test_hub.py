"""Data sets of the hub: from its cache without a network, from a server, or an error that says what to do."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import data
from support import hub
from support.hub import hub_file
from tasks.grammar import SPLITS

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


def test_a_corpus_is_read_from_the_hubs_cache_without_a_network(cache, tmp_path, data_dir, capsys):
    data_dir(tmp_path / "data")
    docs = [f"story {i}" for i in range(50)]
    put(cache, "roneneldan/TinyStories", "TinyStoriesV2-GPT4-valid.txt", "\n<|endoftext|>\n".join(docs))
    assert list(data.documents("tinystories", "validation")) == docs
    about = data.corpus_info("tinystories", "validation")
    assert about["source"] == "roneneldan/TinyStories on Hugging Face, TinyStoriesV2-GPT4-valid.txt"
    assert about["source"] in capsys.readouterr().err


def test_a_plain_file_comes_before_the_hubs_cache(cache, tmp_path, data_dir):
    data_dir(tmp_path)
    put(cache, "roneneldan/TinyStories", "TinyStoriesV2-GPT4-valid.txt", "of the cache")
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories" / "TinyStoriesV2-GPT4-valid.txt").write_text("own")
    assert list(data.documents("tinystories", "validation")) == ["own"]


def test_samsum_as_the_hub_has_it_loses_the_row_without_a_dialogue(tmp_path):
    """Three CSV files, of which one row's dialogue comes as None; by the public command."""
    for split in SPLITS:
        put(tmp_path / "hub", "knkarthick/samsum", f"{split}.csv", SAMSUM)
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "DATA_DIR": str(tmp_path / "data")}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        env.pop(name, None)
    command = [sys.executable, "data.py", "--task=samsum", "--split=train"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "1 examples, knkarthick/samsum on Hugging Face, train (1 without text left out)" in done.stdout
    assert "Conversation:\nA: hi\nB: yo\nSummary:[ They greet.]" in done.stdout


@pytest.mark.parametrize(
    "load, words",
    [
        (lambda: data.load_task("samsum", "test"), "knkarthick/samsum samsum/test.jsonl"),
        (lambda: data.load_conversations("alpaca", "train"), "tatsu-lab/alpaca alpaca/train.jsonl"),
        (lambda: data.load_preferences("hh-rlhf", "train"), "Anthropic/hh-rlhf hh-rlhf/train.jsonl"),
        (lambda: data.load_conversations("lima", "train"), "GAIR/lima lima/train.jsonl"),
    ],
)
def test_what_is_nowhere_is_named_with_what_would_serve(cache, tmp_path, data_dir, load, words):
    data_dir(tmp_path / "data")
    with pytest.raises(data.DataError) as error:
        load()
    for word in [*words.split(), "HF_HUB_OFFLINE is set"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_lima_is_read_from_its_file_though_its_repository_is_a_script(cache, tmp_path, data_dir):
    data_dir(tmp_path)
    rows = [{"conversations": [f"question {i}", f"answer {i}"], "source": "wiki"} for i in range(60)]
    put(cache, "GAIR/lima", "train.jsonl", "\n".join(map(json.dumps, rows)))
    chats, about = data.load_conversations("lima", "train")
    assert len(chats) > 40 and chats[0][0]["role"] == "user"
    assert about["source"].startswith("GAIR/lima on Hugging Face")


# -----------------------------------------------------------------------------
# A hub of one file, on this machine


@pytest.fixture
def server(tmp_path, monkeypatch):
    """HF_ENDPOINT is a server on this machine; `.status` and `.headers` can be changed."""
    from huggingface_hub import constants

    content = b"one\n<|endoftext|>\ntwo\n<|endoftext|>\n"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            me = self.server
            me.asked.append(f"{self.command} {self.path}")
            self.send_response(me.status)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            for name, value in me.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) if me.status == 200 else 0))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            if self.server.status == 200:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    me = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    me.status, me.headers, me.asked = 200, {}, []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{me.server_port}")
    url = f"http://127.0.0.1:{me.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    threading.Thread(target=me.serve_forever, daemon=True).start()
    yield me
    me.shutdown()
    me.server_close()


def test_a_corpus_is_downloaded_once_from_the_endpoint(server, tmp_path, data_dir):
    data_dir(tmp_path)
    for _ in range(2):
        assert list(data.documents("tinystories", "validation")) == ["one", "two"]
    path = "/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt"
    assert [line.split()[1] for line in server.asked] == [path] * len(server.asked)
    assert sum(line.startswith("GET") for line in server.asked) == 1


@pytest.mark.parametrize(
    "status, code, why",
    [
        (403, "GatedRepo", "GAIR/lima is gated: accept its terms on its page, then run `hf auth login`"),
        (401, "RepoNotFound", "not on the hub, or private"),
        (404, "EntryNotFound", "404"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_that_says_what_to_do(server, status, code, why):
    server.status, server.headers = status, {"X-Error-Code": code}
    with pytest.raises(data.DataError, match=why) as error:
        hub_file("GAIR/lima", "train.jsonl")
    assert "\n" not in str(error.value)
