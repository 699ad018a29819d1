"""A small Hugging Face hub on this computer: the files of some models and data sets, and the part of the
hub's HTTP API that `huggingface_hub`, `transformers` and `datasets` use.

    with serving(make_hub(Path("/tmp/hub"))) as server:   # server.endpoint: http://127.0.0.1:PORT
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
MOVED = {"gpt2": "openai-community/gpt2"}  # the hub redirects the old name
LARGE_FILES = (".parquet", ".safetensors", ".gz", ".txt", ".model")  # sent by another host, as LFS does

# -----------------------------------------------------------------------------
# Data sets


def make_hub(folder: Path) -> Path:
    """Writes all repositories under `folder`; returns it."""
    for make in (make_sst2, make_samsum, make_gsm8k, make_stories):
        make(folder / "datasets")
    make_gpt2(folder / "models/openai-community/gpt2")
    make_flan_t5(folder / "models/google/flan-t5-small")
    return folder


def make_sst2(datasets: Path) -> None:
    """SST-2 of GLUE: sentences end in a space, and the labels of the test split are hidden."""
    from tasks.sentiment import sentiment

    folder = datasets / "nyu-mll/glue"
    for split, n in (("train", 160), ("validation", 40), ("test", 16)):
        rows = []
        for i, row in enumerate(sentiment(split, n)):
            label = -1 if split == "test" else int(row["label"])
            rows.append({"sentence": row["sentence"].strip() + " ", "label": label, "idx": i})
        write_rows(folder / f"sst2/{split}-00000-of-00001.parquet", rows)
    label = {"class_label": {"names": {"0": "negative", "1": "positive"}}}
    features = {"sentence": "string", "label": label, "idx": "int32"}
    write_card(folder, {"sst2": ("sst2", ("train", "validation", "test"))}, features)


def make_samsum(datasets: Path) -> None:
    """Three CSV files; in one training row the dialogue is empty, which `datasets` reads as None."""
    from tasks.dialogue import dialogue

    for split, n in (("train", 80), ("validation", 16), ("test", 16)):
        rows = []
        for i, row in enumerate(dialogue(split, n)):
            words = row["dialogue"].replace("\r\n", "\n").replace("\n", "\r\n")
            rows.append({"id": str(13818513 + i), "dialogue": words, "summary": row["summary"]})
        if split == "train":
            rows[40] |= {"dialogue": "", "summary": "problem with visualization of the content"}
        write_rows(datasets / f"knkarthick/samsum/{split}.csv", rows)
    write_card(datasets / "knkarthick/samsum")


def make_gsm8k(datasets: Path) -> None:
    """There is no validation split: data.py takes the last 500 rows of train."""
    from tasks.arithmetic import arithmetic

    folder = datasets / "openai/gsm8k"
    configs = {name: (name, ("train", "test")) for name in ("main", "socratic")}
    for split, n in (("train", 560), ("test", 12)):
        rows = [{"question": r["question"], "answer": r["answer"]} for r in arithmetic(split, n)]
        for name in configs:
            write_rows(folder / f"{name}/{split}-00000-of-00001.parquet", rows)
    write_card(folder, configs, {"question": "string", "answer": "string"})


def make_stories(datasets: Path) -> None:
    """TinyStories: between lines of <|endoftext|>, in files of two editions. FineWeb-Edu: in three parts."""
    from tasks.stories import storyworld

    folder = datasets / "roneneldan/TinyStories"
    write_card(folder)
    for part, split, n in (("train", "train", 400), ("valid", "validation", 40)):
        text = "".join(f"{story}\n<|endoftext|>\n" for story in storyworld(split, n))
        for edition in ("TinyStoriesV2-GPT4", "TinyStories"):
            (folder / f"{edition}-{part}.txt").write_text(text, encoding="utf-8")
    rows = []
    for i, text in enumerate(storyworld("train", 400)):
        about = {"id": f"<urn:uuid:{i:08}>", "url": f"http://example.org/{i}", "language": "en"}
        rows.append({"text": text} | about | {"token_count": len(text) // 4, "score": 2.9, "int_score": 3})
    folder = datasets / "HuggingFaceFW/fineweb-edu"
    for part in range(3):
        write_rows(folder / f"sample/10BT/{part:03}_00000.parquet", rows[part::3])
    write_card(folder)


def write_rows(file: Path, rows: list[dict]) -> None:
    """As .parquet or .csv."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        import pyarrow
        from pyarrow.parquet import write_table

        return write_table(pyarrow.Table.from_pylist(rows), file)
    with open(file, "w", encoding="utf-8", newline="") as text:
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_card(folder: Path, configs: dict | None = None, features: dict | None = None) -> None:
    """README.md, whose header says which files are which split of which configuration. (JSON is YAML.)"""
    header = {"license": "other"}
    for name, (path, splits) in (configs or {}).items():
        files = [{"split": split, "path": f"{path}/{split}-*"} for split in splits]
        header.setdefault("configs", []).append({"config_name": name, "data_files": files})
        if features:
            types = [{"name": column, "dtype": dtype} for column, dtype in features.items()]
            header.setdefault("dataset_info", []).append({"config_name": name, "features": types})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n", encoding="utf-8")


# -----------------------------------------------------------------------------
# Models: the layout of the real ones, small, with random weights


def make_gpt2(folder: Path) -> None:
    """GPT-2: files and names of weights as on the hub, with a vocabulary of 1,000 tokens."""
    import torch
    import transformers
    from safetensors.torch import save_file
    from tokenizers import ByteLevelBPETokenizer

    from tasks.arithmetic import arithmetic
    from tasks.stories import storyworld

    folder.mkdir(parents=True)
    bpe = ByteLevelBPETokenizer()
    texts = [*storyworld("train", 200), *(row["question"] for row in arithmetic("train", 200))]
    bpe.train_from_iterator(texts, vocab_size=1_000, show_progress=False)
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save_model(str(folder))
    bpe.save(str(folder / "tokenizer.json"))
    vocab = bpe.get_vocab()
    write_json(folder / "vocab.json", dict(sorted(vocab.items(), key=lambda item: item[1])))
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1024})

    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), vocab["<|endoftext|>"])
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=len(vocab), **ends)
    config.architectures = ["GPT2LMHeadModel"]
    torch.manual_seed(0)
    weights = transformers.GPT2LMHeadModel(config).transformer.state_dict()
    for layer in range(config.n_layer):  # the checkpoint holds the causal masks, too
        weights[f"h.{layer}.attn.bias"] = torch.ones(1024, 1024).tril().view(1, 1, 1024, 1024)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = config.to_dict()
    config.pop("transformers_version")
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True} | ends)


def make_flan_t5(folder: Path) -> None:
    """FLAN-T5: a Unigram vocabulary behind </s> and <extra_id_..>; the model has some rows more than it."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    from tasks.dialogue import dialogue

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" {2,}", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = dict(special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    trainer = trainers.UnigramTrainer(vocab_size=600, show_progress=False, **special)
    chats = [f"{row['dialogue']} {row['summary']}" for row in dialogue("train", 200)]
    tokenizer.train_from_iterator(chats, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    extra = [f"<extra_id_{i}>" for i in range(100)]
    tokenizer.add_special_tokens(extra[::-1])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names["additional_special_tokens"] = extra
    about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512}
    write_json(folder / "tokenizer_config.json", names | about)
    write_json(folder / "special_tokens_map.json", names)

    size = dict(vocab_size=tokenizer.get_vocab_size() + 28, d_model=32, d_kv=8, d_ff=64, num_layers=2)
    size |= dict(num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    torch.manual_seed(0)
    config = transformers.T5Config(**size, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


# -----------------------------------------------------------------------------
# The server


class Hub(BaseHTTPRequestHandler):
    """Answers what `huggingface_hub` asks about repositories, and sends their files.

    Small files are sent at once; a large one is announced with its sha256 and sent from another address, as
    the hub does it.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        asked = json.loads(body) if body.startswith("{") else urllib.parse.parse_qs(body)
        self.answer(asked.get("paths", []))

    def answer(self, wanted: list[str] | str = ()) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        words = path.strip("/").split("/")
        if words[0] == "cdn":
            return self.send_file(self.server.folder.joinpath(*words[1:]))
        if words[0] == "api":
            words.pop(0)
        kind = words.pop(0) if words[0] in ("models", "datasets") else "models"
        if words[0] in MOVED:
            return self.send(307, Location=path.replace(words[0], MOVED[words[0]], 1))
        name, what, rest = "/".join(words[:2]), words[2:3], words[3:]
        repository = self.server.folder / kind / name
        if not repository.is_dir():
            return self.refuse(404, "RepoNotFound", f"{name} does not exist")
        if what == ["resolve"]:
            return self.resolve(kind, name, "/".join(rest[1:]))
        if what == ["tree"]:
            deep = "recursive=true" in self.path.lower()
            return self.send_json(entries(repository, "/".join(rest[1:]), deep))
        every = {entry["path"]: entry for entry in entries(repository)}
        if what == ["paths-info"]:
            wanted = [wanted] if isinstance(wanted, str) else wanted
            return self.send_json([every[path] for path in wanted if path in every])
        if what in ([], ["revision"]):
            files = [{"rfilename": path} for path, entry in every.items() if entry["type"] == "file"]
            about = {"id": name, "sha": COMMIT, "private": False, "disabled": False, "tags": []}
            return self.send_json(about | {"gated": False, "downloads": 0, "likes": 0, "siblings": files})
        return self.refuse(404, "EntryNotFound", f"no {path} here")

    def resolve(self, kind: str, name: str, file: str) -> None:
        path = self.server.folder / kind / name / file
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if not file.endswith(LARGE_FILES):
            return self.send_file(path)
        linked = {"X-Linked-Size": str(path.stat().st_size), "X-Linked-Etag": f'"{sha256(path)}"'}
        return self.send(302, Location=f"{self.server.endpoint}/cdn/{kind}/{name}/{file}", **linked)

    def send_file(self, path: Path) -> None:
        self.send(200, path.read_bytes(), ETag=f'"{sha256(path)}"')

    def send_json(self, content) -> None:
        self.send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, why: str) -> None:
        self.send(status, why.encode(), **{"X-Error-Code": code, "X-Error-Message": why})

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Nothing on stderr."""


def entries(repository: Path, below: str = "", recursive: bool = True) -> list[dict]:
    """Files and folders of a repository as /tree lists them."""
    found = []
    for path in sorted((repository / below).glob("**/*" if recursive else "*")):
        name = path.relative_to(repository).as_posix()
        entry = {"path": name, "size": 0, "type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest()}
        if path.is_file():
            entry |= {"type": "file", "size": path.stat().st_size}
            if name.endswith(LARGE_FILES):
                entry["lfs"] = {"oid": sha256(path), "size": entry["size"], "pointerSize": 134}
        found.append(entry)
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """The hub of `folder` on a free port, while the block runs; .endpoint is its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.daemon_threads = True
        server.folder = folder
        server.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def offline_but_for(server: ThreadingHTTPServer, home: Path) -> dict[str, str]:
    """Environment of a process that reaches this hub and no other address."""
    env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}  # whatever other tests have set
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        env |= dict.fromkeys((name, name.upper()), "http://127.0.0.1:9")
    return env | dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1")
