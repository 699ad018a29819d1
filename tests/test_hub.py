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
from support.hub import hub_file
from tasks.grammar import SPLITS

STORIES = "TinyStoriesV2-GPT4-valid.txt"
SAMSUM = 'id,dialogue,summary\r\n13818513,"A: hi\r\nB: yo",They greet.\r\n13828807,,Nobody says anything.\r\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path / "hub"


def put(cache: Path, repo: str, file: str, content: str) -> None:
    """A file as a download leaves it in the hub's cache."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    for path, text in ((folder / "snapshots/abc" / file, content), (folder / "refs/main", "abc")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, newline="")


def test_a_corpus_is_read_from_a_file_else_from_the_hubs_cache(cache, tmp_path, capsys):
    docs = [f"story {i}" for i in range(50)]
    put(cache, "roneneldan/TinyStories", STORIES, "\n<|endoftext|>\n".join(docs))
    assert list(data.documents("tinystories", "validation", str(tmp_path))) == docs
    about = data.corpus_info("tinystories", "validation", str(tmp_path))
    assert about["source"] == f"roneneldan/TinyStories on Hugging Face, {STORIES}"
    assert about["source"] in capsys.readouterr().err
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories" / STORIES).write_text("own")
    assert list(data.documents("tinystories", "validation", str(tmp_path))) == ["own"]


def test_samsum_as_the_hub_has_it_loses_the_row_without_a_dialogue(tmp_path):
    """Three CSV files, of which one row's dialogue comes as None; by the public command."""
    for split in SPLITS:
        put(tmp_path / "hub", "knkarthick/samsum", f"{split}.csv", SAMSUM)
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "DATA_DIR": str(tmp_path / "data")}
    env = {name: value for name, value in env.items() if name not in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")}
    command = [sys.executable, "data.py", "--task=samsum", "--split=train"]
    done = subprocess.run(command, cwd=Path(data.__file__).parent, env=env, capture_output=True, text=True)
    assert "1 examples, knkarthick/samsum on Hugging Face, train (1 without text left out)" in done.stdout
    assert "Conversation:\nA: hi\nB: yo\nSummary:[ They greet.]" in done.stdout


NOWHERE = {
    "knkarthick/samsum samsum/test.jsonl dialogue summary": lambda d: data.load_task("samsum", "test", d),
    "tatsu-lab/alpaca alpaca/train.jsonl": lambda d: data.load_conversations("alpaca", "train", d),
    "Anthropic/hh-rlhf hh-rlhf/train.jsonl": lambda d: data.load_preferences("hh-rlhf", "train", d),
    "GAIR/lima gated `hf auth login` dolly": lambda d: data.load_conversations("lima", "train", d),
}


@pytest.mark.parametrize("words", NOWHERE)
def test_what_is_nowhere_is_named_with_what_would_serve(cache, tmp_path, words):
    with pytest.raises(data.DataError) as error:
        NOWHERE[words](str(tmp_path / "data"))
    assert all(word in str(error.value) for word in [*words.split(), "HF_HUB_OFFLINE is set"])
    assert "\n" not in str(error.value)


def test_lima_is_read_from_its_file_though_its_repository_is_a_script(cache, tmp_path):
    rows = [{"conversations": [f"question {i}", f"answer {i}"], "source": "wiki"} for i in range(60)]
    put(cache, "GAIR/lima", "train.jsonl", "\n".join(map(json.dumps, rows)))
    chats, about = data.load_conversations("lima", "train", str(tmp_path))
    assert len(chats) > 40 and chats[0][0]["role"] == "user"
    assert about["source"].startswith("GAIR/lima on Hugging Face")


# -----------------------------------------------------------------------------
# A hub of one file, on this machine


class Handler(http.server.BaseHTTPRequestHandler):
    content = b"one\n<|endoftext|>\ntwo\n<|endoftext|>\n"

    def do_HEAD(self):
        me = self.server
        me.asked.append(f"{self.command} {self.path}")
        self.send_response(me.status)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("X-Error-Code", me.code)
        self.send_header("Content-Length", str(len(self.content) if me.status == 200 else 0))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        if self.server.status == 200:
            self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(cache, monkeypatch):
    """HF_ENDPOINT is a server on this machine; `.status` and `.code` (of an error) can be changed."""
    from huggingface_hub import constants

    me = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    me.status, me.code, me.asked = 200, "", []
    address = f"http://127.0.0.1:{me.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    url = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    threading.Thread(target=me.serve_forever, daemon=True).start()
    yield me
    me.shutdown()
    me.server_close()


def test_a_corpus_is_downloaded_once_from_the_endpoint(server, tmp_path):
    for _ in range(2):
        assert list(data.documents("tinystories", "validation", str(tmp_path))) == ["one", "two"]
    path = f"/datasets/roneneldan/TinyStories/resolve/main/{STORIES}"
    assert {line.split()[1] for line in server.asked} == {path}
    assert sum(line.startswith("GET") for line in server.asked) == 1


@pytest.mark.parametrize("status, code, why", [
    (403, "GatedRepo", "GAIR/lima is gated: .*`hf auth login`"),
    (401, "RepoNotFound", "not on the hub, or private"),
    (404, "EntryNotFound", "404"),
])  # fmt: skip
def test_a_refusal_of_the_hub_is_one_line_that_says_what_to_do(server, status, code, why):
    server.status, server.code = status, code
    with pytest.raises(data.DataError, match=why) as error:
        hub_file("GAIR/lima", "train.jsonl")
    assert "\n" not in str(error.value)
