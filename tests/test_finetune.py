"""Fine-tuning: every architecture and method from end to end, on small checkpoints that are made here."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import transformers

import finetune
import train
from data import TASKS, Example, few_shot, load_task
from finetune import FinetuneConfig, TrainingSet, answer_loss, build, tokenise
from model import ModelConfig, ModernDecoderLM
from support import loading, machine
from support.hf_format import load_tensors
from support.loading import load_model
from support.runs import AlreadyFinished, TrainError, read_json, read_jsonl
from support.text_model import ask, collate
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

ROOT = Path(finetune.__file__).parent
SMALL = dict(device="cpu", dtype="float32", max_steps=4, batch_size=4, max_train_examples=40, eval_every=0)
SMALL |= dict(eval_examples=8, max_eval_examples=6, save_every=2, log_every=1, warmup_steps=1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text() -> list[str]:
    names = ("sentiment", "dialogue", "arithmetic")
    return [f"{TASKS[n].prompt(e.text)}{e.target}" for n in names for e in load_task(n, "train")[0][:300]]


def pretrained(model: ModernDecoderLM, ids: list[int], steps: int = 150) -> ModernDecoderLM:
    """A little language modelling, so that LoRA has something to correct."""
    optimizer, rng = torch.optim.AdamW(model.parameters(), 3e-3), np.random.default_rng(0)
    for _ in range(steps):
        rows = torch.tensor([ids[at : at + 65] for at in rng.integers(0, len(ids) - 65, 16)])
        loss, n = model(rows[:, :-1], rows[:, 1:])
        (loss / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, text) -> dict[str, str]:
    """Folders as the hub would give them, GPT-2, T5 and BERT with random weights, and a run of ours."""
    folder = tmp_path_factory.mktemp("checkpoints")
    vocab, merges = train_bpe(text, 500, SPECIAL_TOKENS)
    tokenizer = Tokenizer(vocab, merges, SPECIAL_TOKENS)
    torch.manual_seed(0)

    config = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, context_length=160, vocab_size=512)
    ours = pretrained(ModernDecoderLM(config), tokenizer.encode(tokenizer.special_tokens[0].join(text)))
    ours.save_pretrained(folder / "ours", bos_token_id=tokenizer.eot_id, eos_token_id=tokenizer.eot_id)
    tokenizer.save(folder / "ours")

    eot = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    gpt2 = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=160, vocab_size=500, **eot)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    tokenizer.save(folder / "gpt2")
    settings = json.loads((folder / "gpt2/tokenizer_config.json").read_text())
    del settings["pad_token"]  # as on the hub
    (folder / "gpt2/tokenizer_config.json").write_text(json.dumps(settings))

    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    unigram = Library(models.Unigram())  # SentencePiece's kind, as T5 has it
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.train_from_iterator(text, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    ))  # fmt: skip
    unigram.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    from tokenizers import decoders

    unigram.decoder = decoders.Metaspace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=unigram, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "t5")
    size = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=448)
    t5 = transformers.T5Config(
        **size, decoder_start_token_id=0, pad_token_id=0, feed_forward_proj="gated-gelu"
    )
    transformers.T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")

    pieces = Library(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.train_from_iterator(text, trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    ))  # fmt: skip
    pieces.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(folder / "bert")
    size = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=400
    )
    transformers.BertModel(transformers.BertConfig(**size)).save_pretrained(folder / "bert")
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def settings(checkpoints, tmp_path):
    """settings(model="gpt2") is a FinetuneConfig for a tiny run in this test's own folder."""

    def make(model: str = "ours", **more) -> FinetuneConfig:
        return FinetuneConfig(
            **SMALL | dict(model=checkpoints.get(model, model), out=str(tmp_path), name="run") | more
        )

    return make


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    from safetensors.torch import load_file

    return load_file(adapter) if adapter.exists() else load_tensors(folder)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def command_line(monkeypatch, cfg: FinetuneConfig) -> int | str:
    """Runs finetune.py's main in this process; its exit code or last message."""
    default = asdict(FinetuneConfig())
    words = [f"--{k}={v}" for k, v in asdict(cfg).items() if v != default[k]]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    with pytest.raises(SystemExit) as exit:
        finetune.main()
        raise SystemExit(0)
    return exit.value.code


# -----------------------------------------------------------------------------
# From end to end

PATHS = [
    ("ours", "sentiment", "lm"),
    ("ours", "sentiment", "head"),
    ("ours", "dialogue", "lm"),
    ("gpt2", "sentiment", "head"),
    ("gpt2", "arithmetic", "lm"),
    ("t5", "dialogue", "lm"),
    ("t5", "sentiment", "lm"),
    ("bert", "sentiment", "head"),
]


@pytest.mark.parametrize("lora_r", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("model, task, method", PATHS)
def test_every_path_trains_saves_loads_and_answers(settings, tmp_path, model, task, method, lora_r):
    more = {"lora_targets": "query,value"} if model == "bert" and lora_r else {}
    cfg = settings(model, task=task, method=method, lora_r=lora_r, merge=bool(lora_r), **more)
    run = finetune.finetune(cfg)
    folder = tmp_path / "run"
    assert run["smoke"] and run["status"] == "finished" and run["task"] == task
    assert (run["trained_parameters"] < run["parameters"]) == bool(lora_r)
    assert {"val_loss", "loss"} <= {k for line in read_jsonl(folder / "metrics.jsonl") for k in line}
    answers = read_jsonl(folder / "predictions.jsonl")
    metric = run["evaluation"]["metrics"][{"rouge": "rouge1"}.get(TASKS[task].metric, TASKS[task].metric)]
    assert len(answers) == metric["n"] == 6 and 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
    parent = weights(Path(cfg.model))
    if lora_r:
        assert not (folder / "model.safetensors").exists()
        assert any(t.abs().sum() > 0 for k, t in weights(folder).items() if "lora_B" in k)
        assert (folder / "merged" / "model.safetensors").exists()
    else:
        tuned = {k.removeprefix("bert."): t for k, t in weights(folder).items()}
        assert any(not torch.equal(t, parent[k]) for k, t in tuned.items() if k in parent)
    examples = load_task(task, "validation")[0][:5]
    device = torch.device("cpu")
    outputs = ask(load_model(str(folder), device), task, examples)[0]
    if lora_r:  # base plus adapter and the merged model say the same
        assert ask(load_model(str(folder / "merged"), device), task, examples)[0] == outputs


@pytest.mark.parametrize("method, lora_r", [("lm", 0), ("head", 0), ("head", 8)])
def test_a_small_model_learns_the_task(settings, method, lora_r):
    more = dict(max_steps=120, max_train_examples=0, batch_size=16, learning_rate=4e-3, save_every=0)
    run = finetune.finetune(settings(method=method, lora_r=lora_r, max_eval_examples=200, **more))
    assert run["evaluation"]["metrics"]["accuracy"]["low"] > 0.6


@pytest.mark.parametrize("method, lora_r", [("lm", 0), ("lm", 4), ("head", 0), ("head", 4)])
def test_interrupted_and_resumed_gives_the_same_bits(settings, tmp_path, monkeypatch, method, lora_r):
    cfg = dict(method=method, lora_r=lora_r, max_steps=7, model="gpt2")  # GPT-2 has dropout
    finetune.finetune(settings(name="whole", **cfg))

    def interrupting(step, *more, do=train.get_lr):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return do(step, *more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "get_lr", interrupting)
        finetune.finetune(settings(name="stopped", **cfg))
    assert read_json(tmp_path / "stopped/run.json")["status"] == "interrupted"
    run = finetune.finetune(settings(name="stopped", **cfg))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    whole = read_json(tmp_path / "whole/run.json")
    assert run["evaluation"] == whole["evaluation"] and run["results"] == whole["results"]
    lines = [[line["loss"] for line in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in line]
             for name in ("whole", "stopped")]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == 7


def test_killed_and_resumed_gives_the_same_bits(settings, tmp_path):
    cfg = dict(max_steps=40, save_every=5, task="dialogue", lora_r=4)
    finetune.finetune(settings(name="whole", **cfg))
    stopped = settings(name="stopped", **cfg)
    default = asdict(FinetuneConfig())
    words = [f"--{k}={v}" for k, v in asdict(stopped).items() if v != default[k]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "finetune.py", *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    log = tmp_path / "stopped/metrics.jsonl"
    while not (log.exists() and '"step": 13,' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    finetune.finetune(stopped)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


def test_a_finished_run_says_so_and_one_that_lost_its_evaluation_makes_it_up(settings, tmp_path, monkeypatch):
    run = finetune.finetune(settings())
    with pytest.raises(AlreadyFinished):
        finetune.finetune(settings())
    assert command_line(monkeypatch, settings()) == 0
    file = tmp_path / "run/run.json"
    before = read_json(file)
    file.write_text(json.dumps({k: v for k, v in before.items() if k != "evaluation"}))
    assert finetune.finetune(settings())["evaluation"] == run["evaluation"]
    message = command_line(monkeypatch, settings(learning_rate=1e-3))
    assert "begun with other settings (learning_rate" in message


def test_two_adapters_of_one_base_leave_it_alone(settings, tmp_path, checkpoints):
    before = weights(Path(checkpoints["ours"]))
    for seed in (1, 2):
        finetune.finetune(settings(lora_r=2, seed=seed, name=f"run{seed}"))
    assert same(before, weights(Path(checkpoints["ours"])))
    assert not same(weights(tmp_path / "run1"), weights(tmp_path / "run2"))


# -----------------------------------------------------------------------------
# LoRA


@pytest.mark.parametrize("model, task, method", [p for p in PATHS if p[0] in ("ours", "gpt2")])
def test_lora_starts_with_no_change(settings, model, task, method):
    ids = torch.randint(5, 400, (3, 20))
    plain = build(settings(model, task=task, method=method))
    tuned = build(settings(model, task=task, method=method, lora_r=4))
    assert torch.equal(logits(plain.model, ids), logits(tuned.model, ids))


@pytest.mark.parametrize("model, task, method", [("ours", "dialogue", "lm"), ("gpt2", "sentiment", "head")])
def test_a_merged_adapter_gives_the_adapters_logits(settings, tmp_path, model, task, method):
    finetune.finetune(settings(model, task=task, method=method, lora_r=4, learning_rate=1e-1, merge=True))
    ids = torch.randint(5, 400, (3, 20))
    load = lambda name: load_model(str(tmp_path / name), torch.device("cpu"), "transformers").model  # noqa: E731
    apart, together = logits(load("run"), ids), logits(load("run/merged"), ids)
    assert torch.allclose(apart, together, atol=1e-4)
    assert not torch.allclose(
        apart, logits(build(settings(model, task=task, method=method)).model, ids), atol=1e-2
    )


def test_lora_adapts_all_linear_layers_of_the_blocks_and_nothing_else(settings):
    for name, leaves in (("ours", 7), ("gpt2", 4), ("t5", None)):
        model = build(settings(name, task="dialogue", lora_r=4)).model
        adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
        linear = {n for n, m in model.named_modules() if hasattr(m, "base_layer")}
        assert adapted == linear and not any("lm_head" in n or "embed" in n for n in adapted)
        if leaves:
            assert len(adapted) == 2 * leaves
        assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())


def test_lora_equals_its_equation(settings):
    cfg = settings("ours", lora_r=4, lora_alpha=12, lora_targets="q_proj", lora_dropout=0.0)
    model = build(cfg).model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(B)
    x = torch.randn(5, 64)
    expected = x @ (layer.base_layer.weight + 12 / 4 * B @ A).T
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["ours", "gpt2", "t5", "bert"])
def test_dropout_reaches_every_architecture_while_training_and_only_then(settings, name):
    task, method = ("sentiment", "head") if name == "bert" else ("dialogue", "lm")
    text_model = build(settings(name, task=task, method=method, dropout=0.5))
    rows, _ = tokenise(text_model, task, load_task(task, "train")[0][:3])
    tensors = collate(rows, text_model.kind, text_model.pad)
    ask_twice = lambda: [text_model.target_logits(*tensors) for _ in range(2)]  # noqa: E731
    text_model.model.train()
    assert not torch.allclose(*ask_twice())
    text_model.model.eval()
    assert torch.equal(*ask_twice())
    calm = build(settings(name, task=task, method=method, dropout=0.0))
    calm.model.train()
    text_model.model = calm.model
    assert torch.equal(*ask_twice())


def test_gradient_checkpointing_changes_no_gradient(settings):
    grads = []
    for checkpointing in (False, True):
        model = build(settings(task="dialogue", lora_r=4, gradient_checkpointing=checkpointing))
        rows, _ = tokenise(model, "dialogue", load_task("dialogue", "train")[0][:4])
        model.model.train()
        for module in model.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        answer_loss(model.kind)(model.model, *collate(rows, model.kind, model.pad))[0].backward()
        grads.append({n: p.grad for n, p in model.model.named_parameters() if p.grad is not None})
    assert grads[0] and grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


def test_qlora_trains_in_four_bits_and_comes_back(settings, tmp_path):
    pytest.importorskip("bitsandbytes")
    run = finetune.finetune(settings(task="dialogue", lora_r=4, load_in_4bit=True, merge=True, max_steps=30,
                                     learning_rate=1e-2))  # fmt: skip
    losses = [line["loss"] for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.2
    assert run["trained_parameters"] == sum(t.numel() for t in weights(tmp_path / "run").values())
    model = build(settings(task="dialogue", lora_r=4, load_in_4bit=True)).model
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() * 2 == 64 * layer.out_features
    answers = ask(load_model(str(tmp_path / "run/merged"), torch.device("cpu")), "dialogue",
                  load_task("dialogue", "validation")[0][:3])[0]  # fmt: skip
    assert len(answers) == 3


def test_qlora_on_a_cpu_refuses_widths_that_bitsandbytes_cannot_compute_there(settings, monkeypatch):
    pytest.importorskip("bitsandbytes")
    assert "multiples of 64, not 32" in command_line(
        monkeypatch, settings("gpt2", lora_r=4, load_in_4bit=True)
    )


def test_qlora_without_bitsandbytes_says_what_to_install(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert '".[qlora]"' in command_line(monkeypatch, settings(lora_r=4, load_in_4bit=True))


# -----------------------------------------------------------------------------
# What the loss sees


@pytest.mark.parametrize("model, task", [("ours", "dialogue"), ("gpt2", "arithmetic"), ("t5", "dialogue")])
def test_the_loss_is_on_the_answer_and_its_end_and_on_nothing_else(settings, model, task):
    text_model = build(settings(model, task=task))
    examples = sorted(load_task(task, "train")[0][:40], key=lambda e: len(e.text + e.target))[:8]  # these fit
    rows, lost = tokenise(text_model, task, examples)
    assert not any(lost.values()) and len({len(prompt) for prompt, _ in rows}) > 1
    ids, mask, targets = collate(rows, text_model.kind, text_model.pad)
    for row, example in enumerate(examples):
        asked = targets[row][targets[row] != -100].tolist()
        assert asked[-1] == text_model.eos
        assert text_model.decode(asked[:-1]).strip() == example.target.strip()
    # Second opinion: transformers' own loss, one unpadded example after another, labels -100 on the prompt.
    total = 0.0
    for prompt, answer in rows:
        if text_model.kind == "seq2seq":
            out = text_model.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer]))
        else:
            whole, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
            out = text_model.model(input_ids=whole, labels=labels)
        total += out.loss.item() * len(answer)
    text_model.model.eval()
    loss, count = answer_loss(text_model.kind)(text_model.model, ids, mask, targets)
    assert count == sum(len(answer) for _, answer in rows)
    text_model.model.eval()
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_a_head_reads_each_text_to_its_end_however_it_is_padded(settings):
    for name in ("ours", "gpt2", "bert"):
        text_model = build(settings(name, method="head"))
        text_model.model.eval()
        rows, _ = tokenise(text_model, "sentiment", load_task("sentiment", "train")[0][:6])
        tensors = collate(rows, "head", text_model.pad)
        together = text_model.target_logits(*tensors)
        apart = [text_model.target_logits(*collate([row], "head", text_model.pad)) for row in rows]
        assert torch.allclose(together, torch.cat(apart), atol=1e-5)
        assert together.std(0).min() > 0


def test_each_architecture_gets_the_special_tokens_it_expects(settings):
    ends = {}
    for name, method in (("ours", "lm"), ("gpt2", "lm"), ("t5", "lm"), ("bert", "head"), ("gpt2", "head")):
        text_model = build(settings(name, method=method))
        ids, _ = text_model.prompt(TASKS["sentiment"], "A fresh film.")
        plain = text_model.encode("A fresh film.\nIt was")
        at = next(i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
        names = loading.load_tokenizer(text_model.name, ours=False).inner.convert_ids_to_tokens(ids)
        ends[name, method] = names[:at], names[at + len(plain) :]
    eot = (["<|endoftext|>"], [])
    assert ends["ours", "lm"] == ends["gpt2", "lm"] == ends["gpt2", "head"] == eot
    assert ends["t5", "lm"] == ([], ["</s>"]) and ends["bert", "head"] == (["[CLS]"], ["[SEP]"])


def test_an_adapter_whose_base_was_trained_anew_is_refused(settings, tmp_path, checkpoints):
    import shutil

    shutil.copytree(checkpoints["ours"], tmp_path / "base")
    finetune.finetune(settings(str(tmp_path / "base"), lora_r=2))
    load_model(str(tmp_path / "run"), torch.device("cpu"))
    torch.manual_seed(5)
    config = ModernDecoderLM.from_pretrained(tmp_path / "base").config
    ModernDecoderLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(TrainError, match="was trained on other weights than"):
        load_model(str(tmp_path / "run"), torch.device("cpu"))
    with pytest.raises(TrainError, match="begun on other data .parent_hash"):
        finetune.finetune(settings(str(tmp_path / "base"), lora_r=2))


def test_a_model_without_a_pad_token_gets_one(settings, tmp_path):
    text_model = build(settings("gpt2", method="head"))
    assert text_model.model.config.pad_token_id == text_model.eos
    finetune.finetune(settings("gpt2", method="head"))
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "run")
    assert saved.pad_token_id == config.pad_token_id == text_model.eos


def test_our_tokenizer_stands_in_for_the_librarys_where_it_can(checkpoints, text):
    for name in ("ours", "gpt2"):
        fast, theirs = (loading.load_tokenizer(checkpoints[name], ours) for ours in (True, False))
        assert isinstance(fast, Tokenizer) and not isinstance(theirs, Tokenizer)
        for t in text[::50]:
            assert fast.encode(t, ()) == theirs.encode(t) == theirs.inner.encode(t, add_special_tokens=False)
    assert not isinstance(loading.load_tokenizer(checkpoints["t5"]), Tokenizer)


def test_a_text_that_is_too_long_loses_its_end_and_never_the_question_or_the_answer(settings):
    task = TASKS["dialogue"]
    chat = "Tom: It is raining again and again.\n" * 30
    example = Example(chat, " Tom says that it rains.")
    smiling = Example("Tom: 😀😀😀" * 60, example.target)  # a token may be a part of a character
    for name, long in ((n, e) for n in ("ours", "gpt2", "t5") for e in (example, smiling)):
        text_model = build(settings(name, task="dialogue", context_length=64))
        (row,), lost = tokenise(text_model, "dialogue", [long])
        prompt, answer = row
        size = len(prompt) + (len(answer) if text_model.kind == "causal" else 0)
        assert lost == {"cut": 1, "left_out": 0} and 56 <= size <= 64
        asked = text_model.decode(prompt)
        assert asked.startswith("Conversation:") and asked.rstrip().endswith("Summary:")
        assert text_model.decode(answer).strip() == example.target.strip()
    few = build(settings(context_length=24, task="dialogue"))
    with pytest.raises(TrainError, match="raise --context_length"):
        few.prompt(task, chat, room=3)
    with pytest.raises(TrainError, match="no example of dialogue fits into 24 tokens"):
        tokenise(few, "dialogue", [Example(chat, example.target * 4)])
    rows, lost = tokenise(few, "dialogue", [Example("Hi", example.target * 4), Example("Hi", " Hi.")])
    assert len(rows) == 1 and lost["left_out"] == 1  # an answer is never cut


def test_examples_in_a_prompt_go_first_when_there_is_no_room(settings):
    text_model = build(settings())
    task, shots = TASKS["sentiment"], few_shot("sentiment", 4)
    ids, lost = text_model.prompt(task, "A fresh film.", shots, 150)
    whole = text_model.decode(ids)
    assert not lost and whole.count("It was") == 5 and whole.endswith("A fresh film.\nIt was")
    ids, lost = text_model.prompt(task, "A fresh film.", shots, 50)
    shorter = text_model.decode(ids)
    assert lost == "shots" and len(ids) <= 50 and whole.endswith(shorter) and shorter.count("It was") > 1


# -----------------------------------------------------------------------------
# Batches


def make_set(n=203, batch=8, seed=1) -> TrainingSet:
    rng = np.random.default_rng(0)
    rows = [([i] * int(rng.integers(5, 60)), [1]) for i in range(n)]
    return TrainingSet(rows, batch, seed, "causal", 0)


def test_batches_are_a_pure_function_of_seed_and_step_and_an_epoch_sees_everything_once():
    a, b = make_set(), make_set()
    steps = list(range(60))
    first = [a.tensors(s, 0, 8)[0] for s in steps]
    again = {s: b.tensors(s, 0, 8)[0] for s in reversed(steps)}
    assert all(torch.equal(first[s], again[s]) for s in steps)
    assert not torch.equal(make_set(seed=2).tensors(0, 0, 8)[0], first[0])
    seen = Counter(int(row[0]) for ids in first[: a.batches] for row in ids)
    assert len(seen) == 200 and set(seen.values()) == {1}
    assert (a.order(0) != a.order(1)).any()
    pieces = [a.tensors(3, i, 2)[0] for i in range(0, 8, 2)]  # micro-batches
    assert [int(r[0]) for p in pieces for r in p] == [int(r[0]) for r in first[3]]


def test_batches_of_similar_lengths_are_little_padded():
    grouped = make_set(2000)
    padding = np.mean(
        [(ids == 0).float().mean() for ids in (grouped.tensors(s, 0, 8)[0] for s in range(100))]
    )
    plain = [collate(grouped.rows[i : i + 8], "causal", 0)[0] for i in range(8, 800, 8)]
    assert padding < 0.1 < 0.3 < np.mean([(ids == 0).float().mean() for ids in plain])


def test_fewer_examples_than_a_batch_are_repeated():
    small = make_set(3)
    assert small.batches == 1 and small.tensors(5, 0, 8)[0].shape[0] == 8


# -----------------------------------------------------------------------------
# One protocol


def test_model_py_and_transformers_give_the_same_numbers(checkpoints):
    for name in ("ours", "gpt2"):
        ours, theirs = (
            load_model(checkpoints[name], torch.device("cpu"), b) for b in ("ours", "transformers")
        )
        assert ours.ours and not theirs.ours
        for task in ("sentiment", "dialogue"):
            examples = load_task(task, "test")[0][:20]
            prompts = [[m.prompt(TASKS[task], e.text)[0] for e in examples] for m in (ours, theirs)]
            assert prompts[0] == prompts[1]
            rows = [(p, ours.encode(e.target)) for p, e in zip(prompts[0], examples, strict=True)]
            assert np.allclose(ours.log_likelihoods(rows), theirs.log_likelihoods(rows), atol=1e-3)
            assert ask(ours, task, examples)[0] == ask(theirs, task, examples)[0]


def test_log_likelihoods_do_not_depend_on_the_batch_and_are_sums_of_log_probabilities(checkpoints):
    for name in ("ours", "gpt2", "t5"):
        model = load_model(checkpoints[name], torch.device("cpu"))
        rows = [([*model.bos, 7, 8, 9][: n + 1], [10 + n, 12, 5][: 3 - n % 3]) for n in range(1, 4)]
        together = model.log_likelihoods(rows)
        assert np.allclose(together, [model.log_likelihoods([row])[0] for row in rows], atol=1e-4)
        if model.kind == "causal":
            prompt, answer = rows[0]
            ids = torch.tensor([prompt + answer])
            net = load_model(checkpoints[name], torch.device("cpu"), "transformers").model
            log_p = logits(net, ids).log_softmax(-1)[0]
            by_hand = sum(log_p[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer))
            assert together[0] == pytest.approx(by_hand, abs=1e-4)


def test_transformers_models_answer_in_bfloat16_if_asked_to_and_t5_never_in_float16(
    checkpoints, settings, tmp_path
):
    finetune.finetune(settings("gpt2", method="head", lora_r=2, name="head"))
    folders = checkpoints | {"head": str(tmp_path / "head")}
    rows = [([7, 8, 9], [10, 12]), ([7, 8], [5])]
    for name, dtype in (("gpt2", torch.bfloat16), ("t5", torch.bfloat16), ("t5", torch.float16)):
        full, half = (
            load_model(folders[name], torch.device("cpu"), "transformers", dtype=d)
            for d in (torch.float32, dtype)
        )
        assert half.weight_dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert np.allclose(full.log_likelihoods(rows), half.log_likelihoods(rows), atol=0.3)
        assert len(half.generate([[7, 8, 9], [7]], 4, "")) == 2
    full, half = (
        load_model(folders["head"], torch.device("cpu"), dtype=d) for d in (torch.float32, torch.bfloat16)
    )
    scores = [m.class_scores(TASKS["sentiment"], [[7, 8, 9], [7]]) for m in (full, half)]
    assert np.allclose(*scores, atol=0.1) and half.weight_dtype == torch.bfloat16


def test_classes_are_compared_by_the_likelihood_of_their_names(checkpoints):
    model = load_model(checkpoints["ours"], torch.device("cpu"))
    task, examples = TASKS["sentiment"], load_task("sentiment", "test")[0][:10]
    prompts = [model.prompt(task, e.text)[0] for e in examples]
    scores = model.class_scores(task, prompts)
    for column, label in enumerate(task.labels):
        rows = [(p, model.encode(label)) for p in prompts]
        assert np.allclose(scores[:, column], model.log_likelihoods(rows), atol=1e-5)
    plain, calibrated = (ask(model, "sentiment", examples, calibrate=c)[0] for c in (False, True))
    empty = model.class_scores(task, [model.prompt(task, "N/A")[0]])
    assert plain == scores.argmax(-1).tolist() and calibrated == (scores - empty).argmax(-1).tolist()


def test_generation_stops_at_the_end_token_or_the_stop_text(checkpoints):
    model = load_model(checkpoints["ours"], torch.device("cpu"))
    stops = model.tokens_with("\n")
    assert stops and all("\n" in model.decode([i]) for i in stops)
    texts = model.generate([model.bos + model.encode("Tom: Hello")] * 2, 20, "\n")
    assert len(texts) == 2 and not any("\n" in text for text in texts)


# -----------------------------------------------------------------------------
# What can go wrong


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(task="sst3"), 'no task "sst3"'),
        (dict(task="dialogue", method="head"), "--method=head is for classes"),
        (dict(load_in_4bit=True), "needs --lora_r"),
        (dict(merge=True), "without --lora_r there is none"),
        (dict(model="t5", dtype="float16"), "T5 overflows in float16"),
        (dict(lora_r=4, lora_targets="nothing_like_it"), "--lora_targets=nothing_like_it"),
        (dict(model="out/nowhere"), "there is no folder out/nowhere"),
        (dict(model="somebody/model"), "hf download somebody/model --local-dir models/model"),
        (dict(device="cuda"), "sees no CUDA card"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name_before_anything_is_written(
    settings, tmp_path, monkeypatch, more, message
):
    if more.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a card")
    assert message in command_line(monkeypatch, settings(**more))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(settings, tmp_path, checkpoints, monkeypatch, text):
    import shutil

    shutil.copytree(checkpoints["gpt2"], tmp_path / "mixed")
    vocab, merges = train_bpe(text, 600, SPECIAL_TOKENS)
    Tokenizer(vocab, merges, SPECIAL_TOKENS).save(tmp_path / "mixed")
    message = command_line(monkeypatch, settings(str(tmp_path / "mixed")))
    assert "has 500 tokens, but its tokenizer has 600" in message


def test_a_run_that_transformers_cannot_compute_is_refused_by_name(
    settings, tmp_path, checkpoints, monkeypatch
):
    config = ModelConfig(n_layers=1, d_model=32, n_heads=4, context_length=64, vocab_size=512, n_sinks=1)
    ModernDecoderLM(config).save_pretrained(tmp_path / "sinks")
    Tokenizer.load(checkpoints["ours"]).save(tmp_path / "sinks")
    assert "no architecture" in command_line(monkeypatch, settings(str(tmp_path / "sinks")))
    assert ask(load_model(str(tmp_path / "sinks"), torch.device("cpu")), "sentiment",
               load_task("sentiment", "test")[0][:4])[0]  # fmt: skip


def test_an_adapter_is_trained_further(settings, tmp_path, monkeypatch, checkpoints):
    finetune.finetune(settings(lora_r=2, name="adapter"))
    adapter = str(tmp_path / "adapter")
    run = finetune.finetune(settings(adapter, name="further"))
    assert run["parent"] == adapter and run["base_hash"] == finetune.weights_hash(checkpoints["ours"])
    before, after = (load_tensors_of_adapter(tmp_path / name) for name in ("adapter", "further"))
    assert before.keys() == after.keys() and any((before[k] != after[k]).any() for k in before)
    load_model(str(tmp_path / "further"), torch.device("cpu"))
    assert "of rank 2" in command_line(monkeypatch, settings(adapter, lora_r=4))
    assert "of kind causal" in command_line(monkeypatch, settings(adapter, method="head"))


def load_tensors_of_adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_a_head_answers_its_own_task_only(settings, tmp_path, monkeypatch):
    finetune.finetune(settings(method="head", name="head"))
    model = load_model(str(tmp_path / "head"), torch.device("cpu"))
    assert ask(model, "sentiment", load_task("sentiment", "test")[0][:4])[0]
    with pytest.raises(TrainError, match="has a head for classes: it cannot be asked dialogue"):
        ask(model, "dialogue", load_task("dialogue", "test")[0][:4])
    assert "--method=head" in command_line(monkeypatch, settings(str(tmp_path / "head")))


def test_a_checkpoint_that_lacks_weights_is_never_filled_up_with_random_ones(tmp_path, checkpoints):
    import shutil

    from safetensors.torch import save_file

    for name, victim in (
        ("ours", "model.layers.1.mlp.up_proj.weight"),
        ("t5", "decoder.final_layer_norm.weight"),
    ):
        folder = tmp_path / name
        shutil.copytree(checkpoints[name], folder)
        tensors = load_tensors(folder)
        del tensors[victim]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for backend in ("auto", "transformers"):
            refused = "not a complete model|does not hold|cannot be loaded"
            with pytest.raises((TrainError, ValueError), match=refused):
                load_model(str(folder), torch.device("cpu"), backend)


def test_the_model_that_is_kept_is_the_last_whatever_the_validation_split_says(settings, tmp_path):
    run = finetune.finetune(settings(max_steps=6, eval_every=2, learning_rate=1.0))  # it gets worse and worse
    assert run["results"]["last"]["step"] == 6
    assert same(weights(tmp_path / "run"), weights(tmp_path / "run/checkpoints/step-6"))


def test_names_tell_task_model_and_method():
    cfg = FinetuneConfig(model="out/laptop", task="sst2")
    assert finetune.default_name(cfg) == "sst2-laptop"
    cfg.lora_r, cfg.method = 8, "head"
    assert finetune.default_name(cfg) == "sst2-laptop-head-lora"


@pytest.mark.parametrize("name", ["sentiment", "sst2", "samsum", "gsm8k"])
def test_the_configs_are_valid(name):
    from configs import parse_config

    cfg = parse_config(FinetuneConfig, "", [f"configs/{name}.py"])
    assert cfg.task == name


def test_help_answers():
    done = subprocess.run([sys.executable, "finetune.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--lora_r" in done.stdout
    code = "import sys, finetune; assert not {'transformers', 'peft', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_small_models_are_tuned_in_float32_on_a_cpu_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "pick_dtype", lambda dtype, device: torch.bfloat16)  # a CPU with AMX
    for dtype, width, want in (
        ("auto", 8, "float32"),
        ("bfloat16", 8, "bfloat16"),
        ("auto", 5000, "bfloat16"),
    ):
        cfg = finetune.AdaptConfig(device="cpu", dtype=dtype, max_steps=1, out=str(tmp_path))
        chosen = finetune.dtype_for(cfg, torch.nn.Linear(width, width))
        assert (chosen or machine.pick_dtype(dtype, "cpu")) == getattr(torch, want) and cfg.dtype == dtype
