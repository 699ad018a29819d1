"""A small Hugging Face hub on this computer: the files of some models and data sets, and the part of the
hub's HTTP API that `huggingface_hub`, `transformers` and `datasets` use.

    with serving(make_hub(Path("/tmp/hub"))) as server:   # http://127.0.0.1:PORT, for HF_ENDPOINT
        ...

The repositories have their real ids, file names, columns and oddities, with a few rows each. The models have
random weights, and the text comes from the embedded generators.
"""

import contextlib
import csv
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + 34 * "0"  # the revision that every repository is at
MOVED = {"gpt2": "openai-community/gpt2"}  # the hub knows the old name
GATED = {"GAIR/lima"}  # files are refused to whoever has not accepted the terms

# -----------------------------------------------------------------------------
# Data sets: rows, then files


def make_hub(folder: Path) -> Path:
    """Writes all repositories under `folder`; returns it."""
    datasets = folder / "datasets"
    make_glue(datasets / "nyu-mll/glue")
    make_samsum(datasets / "knkarthick/samsum")
    make_gsm8k(datasets / "openai/gsm8k")
    make_stories(datasets / "roneneldan/TinyStories", datasets / "HuggingFaceFW/fineweb-edu")
    make_gpt2(folder / "models/openai-community/gpt2")
    make_flan_t5(folder / "models/google/flan-t5-small")
    return folder


def make_glue(folder: Path) -> None:
    """SST-2 of GLUE: sentences end in a space, and the labels of the test split are hidden."""
    from tasks.sentiment import sentiment

    sizes = {"train": 160, "validation": 40, "test": 16}
    for split, n in sizes.items():
        rows = []
        for i, row in enumerate(sentiment(split, n)):
            label = -1 if split == "test" else int(row["label"])
            rows.append({"sentence": row["sentence"].strip() + " ", "label": label, "idx": i})
        write_parquet(folder / f"sst2/{split}-00000-of-00001.parquet", rows)
    write_card(folder, sizes, "sst2")


def make_samsum(folder: Path) -> None:
    """Three CSV files; in one training row the dialogue is empty, which `datasets` reads as None."""
    from tasks.dialogue import dialogue

    folder.mkdir(parents=True)
    for split, n in (("train", 80), ("validation", 16), ("test", 16)):
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["id", "dialogue", "summary"])
            if split == "train":
                table.writerow(["13828807", "", "problem with visualization of the content"])
            for i, row in enumerate(dialogue(split, n)):
                lines = row["dialogue"].splitlines()
                table.writerow([13818513 + i, "\r\n".join(lines), row["summary"]])


def make_gsm8k(folder: Path) -> None:
    """There is no validation split: data.py takes the last 500 rows of train."""
    from tasks.arithmetic import arithmetic

    for split, n in (("train", 560), ("test", 12)):
        rows = [{"question": r["question"], "answer": r["answer"]} for r in arithmetic(split, n)]
        for config in ("main", "socratic"):
            write_parquet(folder / f"{config}/{split}-00000-of-00001.parquet", rows)
    write_card(folder, ("train", "test"), "main", "socratic")


def make_stories(tinystories: Path, fineweb: Path) -> None:
    """TinyStories between lines of <|endoftext|>; FineWeb-Edu in Parquet files."""
    from tasks.stories import storyworld

    tinystories.mkdir(parents=True)
    for part, n in (("train", 400), ("valid", 40)):
        texts = list(storyworld("train" if part == "train" else "validation", n))
        text = "".join(f"{story}\n<|endoftext|>\n" for story in texts)
        (tinystories / f"TinyStoriesV2-GPT4-{part}.txt").write_text(text, encoding="utf-8")
    rows = [{"text": text, "dump": "CC-MAIN-2024-10", "score": 2.9} for text in storyworld("train", 400)]
    for part in range(3):
        write_parquet(fineweb / f"sample/10BT/{part:03}_00000.parquet", rows[part::3])


def write_parquet(file: Path, rows: list[dict]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    file.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(rows), file)


def write_card(folder: Path, splits, *configs: str) -> None:
    """README.md with the header that says which files are which split of which configuration."""
    header = []
    for config in configs:
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        header.append({"config_name": config, "data_files": files})
    text = json.dumps({"configs": header})  # JSON is YAML, too
    (folder / "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8")


# -----------------------------------------------------------------------------
# Models: the layout of the real ones, small, with random weights


def make_gpt2(folder: Path) -> None:
    """GPT-2: files and names of weights as on the hub, with a vocabulary of 1,000 tokens."""
    import torch
    import transformers
    from safetensors.torch import save_file
    from tokenizers import ByteLevelBPETokenizer

    from tasks.stories import storyworld

    folder.mkdir(parents=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(storyworld("train", 300), vocab_size=1_000, show_progress=False)
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1024})
    end = bpe.token_to_id("<|endoftext|>")
    size = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": bpe.get_vocab_size()}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**size, bos_token_id=end, eos_token_id=end)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    weights = dict(model.transformer.state_dict())  # without the prefix "transformer.", and with the masks:
    for layer in range(config.n_layer):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1024, 1024).tril()[None, None].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def make_flan_t5(folder: Path) -> None:
    """FLAN-T5: a Unigram vocabulary behind </s> and <extra_id_..>; the model has some rows more than it."""
    import torch
    import transformers
    from tokenizers import SentencePieceUnigramTokenizer
    from tokenizers.processors import TemplateProcessing

    from tasks.dialogue import dialogue

    folder.mkdir(parents=True)
    texts = (f"{row['dialogue']} {row['summary']}" for row in dialogue("train", 300))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    extra = [f"<extra_id_{i}>" for i in range(100)]
    how = {"special_tokens": list(special.values()), "unk_token": "<unk>", "show_progress": False}
    tokenizer = SentencePieceUnigramTokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=600, **how)
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(extra)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512}
    write_json(folder / "tokenizer_config.json", special | about | {"additional_special_tokens": extra})

    config = transformers.T5Config(
        vocab_size=tokenizer.get_vocab_size() + 28, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


# -----------------------------------------------------------------------------
# The server


class Hub(BaseHTTPRequestHandler):
    """Answers what `huggingface_hub` asks about repositories, and sends their files."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        asked = json.loads(body) if body.startswith("{") else urllib.parse.parse_qs(body)
        self.answer(asked["paths"])

    def answer(self, wanted: list[str] | str = ()) -> None:
        """Addresses are [api/][datasets/]OWNER/NAME[/WHAT/REVISION/PATH]."""
        words = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        if words[0] == "api":
            words.pop(0)
        kind = words.pop(0) if words[0] in ("models", "datasets") else "models"
        words[:1] = MOVED.get(words[0], words[0]).split("/")
        name, what, path = "/".join(words[:2]), "".join(words[2:3]), "/".join(words[4:])
        repository = self.server.folder / kind / name
        if not repository.is_dir():
            self.refuse(401, "RepoNotFound", f"{name} does not exist")
        elif what == "resolve":
            self.resolve(name, repository / path)
        elif what == "tree":
            pattern = "**/*" if "recursive=true" in self.path.lower() else "*"
            self.send_json(entries(repository, repository / path, pattern))
        elif what == "paths-info":
            wanted = [wanted] if isinstance(wanted, str) else wanted
            self.send_json([e for e in entries(repository, repository, "**/*") if e["path"] in wanted])
        else:
            files = [e["path"] for e in entries(repository, repository, "**/*") if e["type"] == "file"]
            about = {"id": name, "sha": COMMIT, "private": False, "disabled": False, "tags": []}
            about |= {"gated": "auto" if name in GATED else False, "downloads": 0, "likes": 0}
            self.send_json(about | {"siblings": [{"rfilename": file} for file in files]})

    def resolve(self, name: str, file: Path) -> None:
        if name in GATED:
            self.refuse(401, "GatedRepo", f"Access to dataset {name} is restricted. Please log in.")
        elif file.is_file():
            content = file.read_bytes()
            self.send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        else:
            self.refuse(404, "EntryNotFound", "Entry not found")

    def send_json(self, content) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, why: str) -> None:
        self.send(status, why.encode(), {"X-Error-Code": code, "X-Error-Message": why})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Nothing on stderr."""


def entries(repository: Path, folder: Path, pattern: str) -> list[dict]:
    """Files and folders of a repository as /tree lists them."""
    found = []
    for path in sorted(folder.glob(pattern)):
        name = path.relative_to(repository).as_posix()
        entry = {"path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": path.stat().st_size}
        found.append(entry | {"type": "file" if path.is_file() else "directory"})
    return found


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """The hub of `folder` on a free port, while the block runs; .endpoint is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.folder = folder
    server.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def offline_but_for(server: ThreadingHTTPServer, home: Path) -> dict[str, str]:
    """Environment of a process that reaches this hub and no other address."""
    nowhere = "http://127.0.0.1:9"
    env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}  # whatever other tests have set
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        env |= {name: nowhere, name.upper(): nowhere}
    return env | {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
