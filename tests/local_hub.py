"""A small Hugging Face hub on this computer: the files of some models and data sets, and the part of the
hub's HTTP API that `huggingface_hub`, `transformers` and `datasets` use.

    with serving(make_hub(Path("/tmp/hub"))) as endpoint:   # http://127.0.0.1:PORT, for HF_ENDPOINT
        ...

The repositories have their real ids, file names, columns and oddities, with a few rows each. The models have
random weights, and the text comes from the embedded generators.
"""

import contextlib
import gzip
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + 34 * "0"  # the revision that every repository is at
MOVED = {"gpt2": "openai-community/gpt2"}  # the hub redirects the old name
GATED = {"GAIR/lima"}  # files are refused to whoever has not accepted the terms
LARGE_FILES = (".parquet", ".safetensors", ".gz", ".txt", ".model")  # sent by another host, as LFS does

# -----------------------------------------------------------------------------
# Data sets: rows, then files


def make_hub(folder: Path) -> Path:
    """Writes all repositories under `folder`; returns it."""
    datasets = folder / "datasets"
    make_glue(datasets / "nyu-mll/glue")
    make_samsum(datasets / "knkarthick/samsum")
    make_gsm8k(datasets / "openai/gsm8k")
    make_tinystories(datasets / "roneneldan/TinyStories")
    make_fineweb(datasets / "HuggingFaceFW/fineweb-edu")
    make_alpaca(datasets / "tatsu-lab/alpaca")
    make_dolly(datasets / "databricks/databricks-dolly-15k")
    make_hh(datasets / "Anthropic/hh-rlhf")
    make_ultrafeedback(datasets / "HuggingFaceH4/ultrafeedback_binarized")
    make_lima(datasets / "GAIR/lima")
    make_gpt2(folder / "models/openai-community/gpt2")
    make_flan_t5(folder / "models/google/flan-t5-small")
    return folder


def make_glue(folder: Path) -> None:
    """SST-2 of GLUE: sentences end in a space, and the labels of the test split are hidden."""
    from tasks.sentiment import sentiment

    for split, n in (("train", 160), ("validation", 40), ("test", 16)):
        rows = [{"sentence": row["sentence"], "label": row["label"]} for row in sentiment(split, n)]
        for i, row in enumerate(rows):
            row["sentence"] = row["sentence"].strip() + " "
            row["label"] = -1 if split == "test" else int(row["label"])
            row["idx"] = i
        write_parquet(folder / f"sst2/{split}-00000-of-00001.parquet", rows)
    features = (("sentence", "string"), ("label", "label"), ("idx", "int32"))
    write_card(folder, {"sst2": ("sst2", ("train", "validation", "test"))}, features)


def make_samsum(folder: Path) -> None:
    """Three CSV files; in one training row the dialogue is empty, which `datasets` reads as None."""
    import csv

    from tasks.dialogue import dialogue

    for split, n in (("train", 80), ("validation", 16), ("test", 16)):
        rows = [{"dialogue": row["dialogue"], "summary": row["summary"]} for row in dialogue(split, n)]
        for row in rows:
            row["dialogue"] = row["dialogue"].replace("\r\n", "\n").replace("\n", "\r\n")
        if split == "train":
            rows.insert(40, {"dialogue": "", "summary": "problem with visualization of the content"})
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ("id", "dialogue", "summary"))
            table.writeheader()
            for i, row in enumerate(rows):
                table.writerow({"id": str(13818513 + i), **row})
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n", encoding="utf-8")


def make_gsm8k(folder: Path) -> None:
    """There is no validation split: data.py takes the last 500 rows of train."""
    from tasks.arithmetic import arithmetic

    for split, n in (("train", 560), ("test", 12)):
        rows = [{"question": r["question"], "answer": r["answer"]} for r in arithmetic(split, n)]
        write_parquet(folder / f"main/{split}-00000-of-00001.parquet", rows)
        write_parquet(folder / f"socratic/{split}-00000-of-00001.parquet", rows)
    configs = {name: (name, ("train", "test")) for name in ("main", "socratic")}
    write_card(folder, configs, (("question", "string"), ("answer", "string")))


def make_tinystories(folder: Path) -> None:
    """Stories between lines of <|endoftext|>, in files of two editions."""
    from tasks.stories import storyworld

    stories = list(storyworld("train", 400))
    held_out = list(storyworld("validation", 40))
    folder.mkdir(parents=True, exist_ok=True)
    for edition in ("TinyStoriesV2-GPT4", "TinyStories"):
        for part, some in (("train", stories), ("valid", held_out)):
            text = "".join(f"{story}\n<|endoftext|>\n" for story in some)
            (folder / f"{edition}-{part}.txt").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: cdla-sharing-1.0\n---\n", encoding="utf-8")


def make_fineweb(folder: Path) -> None:
    from tasks.stories import storyworld

    texts = list(storyworld("train", 400))
    rows = []
    for i, text in enumerate(texts):
        about = {"id": f"<urn:uuid:{i:08}>", "dump": "CC-MAIN-2024-10", "url": f"http://example.org/{i}"}
        about |= {"file_path": "s3://commoncrawl/x.warc.gz", "language": "en", "language_score": 0.97}
        rows.append({"text": text} | about | {"token_count": len(text) // 4, "score": 2.9, "int_score": 3})
    for part in range(3):
        write_parquet(folder / f"sample/10BT/{part:03}_00000.parquet", rows[part::3])
    (folder / "README.md").write_text("---\nlicense: odc-by\n---\n", encoding="utf-8")


def make_alpaca(folder: Path) -> None:
    """Columns instruction, input, output and text; some outputs are empty."""
    rows = [{"instruction": q, "input": "", "output": a} for q, a in questions("train", 60)]
    rows[7]["output"] = ""
    for row in rows:
        row["text"] = f"### Instruction:\n{row['instruction']}\n\n### Response:\n{row['output']}"
    write_parquet(folder / "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", rows)
    features = tuple((name, "string") for name in ("instruction", "input", "output", "text"))
    write_card(folder, {"default": ("data", ("train",))}, features)


def make_dolly(folder: Path) -> None:
    rows = []
    for question, answer in questions("train", 60):
        rows.append({"instruction": question, "context": "", "response": answer, "category": "open_qa"})
    write_jsonl(folder / "databricks-dolly-15k.jsonl", rows)
    (folder / "README.md").write_text("---\nlicense: cc-by-sa-3.0\n---\n", encoding="utf-8")


def make_hh(folder: Path) -> None:
    """Transcripts in four folders, each with train and test, beside one that is no preference data."""
    rows = []
    for question, answer in questions("train", 60):
        asked = f"\n\nHuman: {question}\n\nAssistant:"
        rows.append({"chosen": f"{asked} {answer}", "rejected": f"{asked} I do not know."})
    rows[3]["rejected"] = rows[3]["chosen"]
    parts = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
    for i, part in enumerate(parts):
        write_jsonl(folder / part / "train.jsonl.gz", rows[i::4])
        write_jsonl(folder / part / "test.jsonl.gz", rows[i::4][:3])
    write_jsonl(folder / "red-team-attempts/red_team_attempts.jsonl.gz", [{"transcript": "\n\nHuman: hi"}])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")


def make_ultrafeedback(folder: Path) -> None:
    """Both answers as whole conversations, in six splits of which two hold pairs."""
    rows = []
    for i, (question, answer) in enumerate(questions("train", 60)):
        asked = {"content": question, "role": "user"}
        chosen = [asked, {"content": answer, "role": "assistant"}]
        rejected = [asked, {"content": "" if i == 5 else "I do not know.", "role": "assistant"}]
        row = {"prompt": question, "prompt_id": f"{i:064x}", "chosen": chosen, "rejected": rejected}
        rows.append(row | {"messages": chosen, "score_chosen": 8.5, "score_rejected": 4.0})
    splits = [f"{split}_{kind}" for split in ("train", "test") for kind in ("prefs", "sft", "gen")]
    for split in splits:
        write_parquet(folder / f"data/{split}-00000-of-00001.parquet", rows)
    write_card(folder, {"default": ("data", tuple(splits))})


def make_lima(folder: Path) -> None:
    """Gated, and read by a script, which `datasets` no longer runs."""
    rows = [{"conversations": list(pair), "source": "x"} for pair in questions("train", 20)]
    write_jsonl(folder / "train.jsonl", rows)
    (folder / "lima.py").write_text("import datasets\n", encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: other\n---\n", encoding="utf-8")


def questions(split: str, n: int) -> Iterator[tuple[str, str]]:
    from tasks.instructions import instructions

    for row in instructions(split, n):
        yield row["messages"][0]["content"], row["messages"][1]["content"]


def write_parquet(file: Path, rows: list[dict]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    file.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(rows), file)


def write_jsonl(file: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)


def write_card(folder: Path, configs: dict[str, tuple], features: tuple = ()) -> None:
    """README.md with the header that says which files are which split of which configuration."""
    lines = ["---"]
    if features:
        lines.append("dataset_info:")
    for config in configs if features else ():
        lines += [f"- config_name: {config}", "  features:"]
        for name, dtype in features:
            lines.append(f"  - name: {name}")
            if dtype == "label":
                lines += ["    dtype:", "      class_label:", "        names:"]
                lines += ["          '0': negative", "          '1': positive"]
            else:
                lines.append(f"    dtype: {dtype}")
    lines.append("configs:")
    for config, (path, splits) in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {path}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


# -----------------------------------------------------------------------------
# Models: the layout of the real ones, small, with random weights


def make_gpt2(folder: Path) -> None:
    """GPT-2: files and names of weights as on the hub, with a vocabulary of 1,000 tokens."""
    import torch
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    small_bpe(folder)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    write_byte_level_tokenizer(folder / "tokenizer.json", vocab, merges)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1024})

    end = vocab["<|endoftext|>"]
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=len(vocab), bos_token_id=end, eos_token_id=end
    )
    config.architectures = ["GPT2LMHeadModel"]
    torch.manual_seed(0)
    weights = transformers.GPT2LMHeadModel(config).transformer.state_dict()
    causal = torch.ones(1024, 1024).tril().view(1, 1, 1024, 1024)
    for layer in range(config.n_layer):
        weights[f"h.{layer}.attn.bias"] = causal.clone()  # the checkpoint holds the causal masks, too
    save_file(
        {name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    write_json(folder / "config.json", hub_config(config))
    generation = {"_from_model_config": True, "bos_token_id": end, "eos_token_id": end}
    write_json(folder / "generation_config.json", generation)


def small_bpe(folder: Path) -> None:
    """vocab.json and merges.txt of a vocabulary of 1,000 tokens."""
    from tokenizers import ByteLevelBPETokenizer

    from tasks.stories import storyworld

    texts = [*storyworld("train", 200), *(" ".join(pair) for pair in questions("train", 200))]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1_000, show_progress=False)
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save_model(str(folder))
    vocab = bpe.get_vocab()
    write_json(folder / "vocab.json", dict(sorted(vocab.items(), key=lambda item: item[1])))


def write_byte_level_tokenizer(file: Path, vocab: dict[str, int], merges: list[str]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    pairs = [tuple(line.split(" ")) for line in merges if line]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=True)])
    tokenizer.save(str(file))


def make_flan_t5(folder: Path) -> None:
    """FLAN-T5: a Unigram vocabulary behind </s> and <extra_id_..>; the model has some rows more than it."""
    import torch
    import transformers
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    from tasks.dialogue import dialogue
    from tasks.stories import storyworld

    folder.mkdir(parents=True)
    chats = (f"{row['dialogue']} {row['summary']}" for row in dialogue("train", 200))
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" {2,}", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*chats, *storyworld("train", 100)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    extra = [f"<extra_id_{i}>" for i in range(100)]
    tokenizer.add_special_tokens([AddedToken(token) for token in reversed(extra)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512}
    write_json(folder / "tokenizer_config.json", names | about | {"additional_special_tokens": extra})
    write_json(folder / "special_tokens_map.json", names | {"additional_special_tokens": extra})

    config = transformers.T5Config(
        vocab_size=tokenizer.get_vocab_size() + 28, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def hub_config(config) -> dict:
    return {k: v for k, v in config.to_dict().items() if k != "transformers_version"}


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

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

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
            return self.redirect(path.replace(words[0], MOVED[words[0]], 1))
        name, what, rest = "/".join(words[:2]), words[2:3], words[3:]
        repository = self.server.folder / kind / name
        if not repository.is_dir():
            return self.refuse(404, "RepoNotFound", f"{name} does not exist")
        if what == ["resolve"]:
            return self.resolve(kind, name, "/".join(rest[1:]))
        if what == ["tree"]:
            return self.send_json(
                entries(repository, "/".join(rest[1:]), "recursive=true" in self.path.lower())
            )
        if what == ["paths-info"]:
            every = {entry["path"]: entry for entry in entries(repository, "", recursive=True)}
            wanted = [wanted] if isinstance(wanted, str) else wanted
            return self.send_json([every[path] for path in wanted if path in every])
        if what in ([], ["revision"]):
            files = [e["path"] for e in entries(repository, "", recursive=True) if e["type"] == "file"]
            about = {"id": name, "sha": COMMIT, "private": False, "disabled": False, "tags": []}
            about |= {"gated": "auto" if name in GATED else False, "downloads": 0, "likes": 0}
            return self.send_json(about | {"siblings": [{"rfilename": file} for file in files]})
        return self.refuse(404, "EntryNotFound", f"no {path} here")

    def resolve(self, kind: str, name: str, file: str) -> None:
        path = self.server.folder / kind / name / file
        if name in GATED:
            why = f"Access to dataset {name} is restricted. You must have access to it and be authenticated"
            return self.refuse(401, "GatedRepo", f"{why} to access it. Please log in.")
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if not file.endswith(LARGE_FILES):
            return self.send_file(path)
        linked = {"X-Linked-Size": str(path.stat().st_size), "X-Linked-Etag": f'"{sha256(path)}"'}
        return self.redirect(f"{self.server.endpoint}/cdn/{kind}/{name}/{file}", linked)

    def send_file(self, path: Path) -> None:
        self.send(200, path.read_bytes(), {"ETag": f'"{sha256(path)}"'})

    def send_json(self, content) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def redirect(self, address: str, headers: dict | None = None) -> None:
        self.send(302 if headers else 307, b"", {"Location": address} | (headers or {}))

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


def entries(repository: Path, below: str, recursive: bool) -> list[dict]:
    """Files and folders of a repository as /tree lists them."""
    found = []
    for path in sorted((repository / below).rglob("*") if recursive else (repository / below).glob("*")):
        entry = {"path": path.relative_to(repository).as_posix(), "size": 0, "type": "directory"}
        entry["oid"] = hashlib.sha1(entry["path"].encode()).hexdigest()
        if path.is_file():
            entry |= {"type": "file", "size": path.stat().st_size}
            if path.name.endswith(LARGE_FILES):
                entry["lfs"] = {"oid": sha256(path), "size": entry["size"], "pointerSize": 134}
        found.append(entry)
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
