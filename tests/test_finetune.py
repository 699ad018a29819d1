"""Fine-tuning: every architecture and method from end to end, on small checkpoints that are made here."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import transformers
from local_hub import make_flan_t5, make_gpt2
from safetensors.torch import load_file, save_file

import finetune
from data import TASKS, DataError, Example, few_shot, find_task, load_task
from finetune import FinetuneConfig, TrainingSet, build_for_task, task_loss, tokenise
from model import ModelConfig, ModernDecoderLM
from support import machine
from support.adapters import LORA_TARGETS
from support.hf_format import load_tensors
from support.loading import load_model, load_tokenizer, resolve
from support.runs import TrainError, read_json, weights_hash
from support.tables import read_jsonl
from support.text_model import TextModel, answer_task, collate, target_logits
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

ROOT, CPU = Path(finetune.__file__).parent, torch.device("cpu")
SMALL = dict(device="cpu", dtype="float32", max_steps=4, batch_size=4, max_train_examples=40, eval_every=0)
SMALL |= dict(eval_examples=8, max_eval_examples=6, save_every=2, log_every=1, warmup_steps=1)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """A pretrained run of ours; GPT-2, T5 and BERT with random weights, in folders as on the hub."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_ours(folder / "ours")
    make_gpt2(folder / "gpt2")
    make_flan_t5(folder / "t5")
    make_bert(folder / "bert")
    return {path.name: str(path) for path in folder.iterdir()}


def make_ours(folder: Path) -> None:
    """After a little language modelling, so that LoRA has something to correct."""
    texts = []
    for name in ("sentiment", "dialogue", "arithmetic"):
        texts += [f"{TASKS[name].prompt(e.text)}{e.target}" for e in load_task(name, "train")[0][:300]]
    tokenizer = Tokenizer(*train_bpe(texts, 500, SPECIAL_TOKENS), SPECIAL_TOKENS)
    torch.manual_seed(0)
    shape = dict(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, context_length=160, vocab_size=512)
    model = ModernDecoderLM(ModelConfig(**shape))
    ids = tokenizer.encode("<|endoftext|>".join(texts))
    optimizer, rng = torch.optim.AdamW(model.parameters(), 3e-3), np.random.default_rng(0)
    for _ in range(150):
        rows = torch.tensor([ids[at : at + 65] for at in rng.integers(0, len(ids) - 65, 16)])
        loss, n = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        (loss / n).backward()
        optimizer.step()
    model.save_pretrained(folder, bos_token_id=tokenizer.eot_id, eos_token_id=tokenizer.eot_id)
    tokenizer.save(folder)


def make_bert(folder: Path) -> None:
    from tokenizers import BertWordPieceTokenizer

    texts = [example.text for example in load_task("sentiment", "train")[0][:300]]
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(texts, vocab_size=400)
    transformers.BertTokenizerFast(vocab=pieces.get_vocab()).save_pretrained(folder)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    bert = transformers.BertModel(transformers.BertConfig(**size, vocab_size=400))
    bert.save_pretrained(folder)


@pytest.fixture
def settings(checkpoints, tmp_path):
    """settings(model="gpt2") is a FinetuneConfig for a tiny run in this test's own folder."""

    def make(model: str = "ours", **more) -> FinetuneConfig:
        paths = dict(model=checkpoints.get(model, model), out=str(tmp_path), name="run")
        return FinetuneConfig(**SMALL | paths | more)

    return make


@pytest.fixture
def built(settings):
    """built("gpt2", task="dialogue"): the model that a run with these settings would train."""

    def build(model: str = "ours", **more) -> TextModel:
        cfg = settings(model, **more)
        return build_for_task(cfg, find_task(cfg.task))

    return build


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(ids) if isinstance(model, ModernDecoderLM) else model(input_ids=ids).logits


def weights(folder) -> dict[str, torch.Tensor]:
    adapter = Path(folder) / "adapter_model.safetensors"
    return load_file(adapter) if adapter.exists() else load_tensors(Path(folder))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]


# -----------------------------------------------------------------------------
# From end to end


@pytest.mark.parametrize("lora_r", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("model, task, method", [
    ("ours", "sentiment", "lm"), ("ours", "sentiment", "head"), ("gpt2", "arithmetic", "lm"),
    ("gpt2", "sentiment", "head"), ("t5", "dialogue", "lm"), ("t5", "sentiment", "lm"),
    ("bert", "sentiment", "head"),
])  # fmt: skip
def test_every_path_trains_saves_loads_and_answers(settings, tmp_path, model, task, method, lora_r):
    more = {"lora_targets": "query,value"} if model == "bert" and lora_r else {}
    cfg = settings(model, task=task, method=method, lora_r=lora_r, merge=bool(lora_r), **more)
    run, folder = finetune.finetune(cfg), tmp_path / "run"
    assert run["smoke"] and run["status"] == "finished" and run["task"] == task
    assert (run["trained_parameters"] < run["parameters"]) == bool(lora_r)
    metric = run["evaluation"]["metrics"][{"rouge": "rouge1"}.get(TASKS[task].metric, TASKS[task].metric)]
    assert len(read_jsonl(folder / "predictions.jsonl")) == metric["n"] == 6
    examples = load_task(task, "validation")[0][:5]
    outputs = answer_task(load_model(str(folder), CPU), task, examples)[0]
    if lora_r:
        assert not (folder / "model.safetensors").exists()
        assert any(t.abs().sum() > 0 for k, t in weights(folder).items() if "lora_B" in k)
        assert answer_task(load_model(str(folder / "merged"), CPU), task, examples)[0] == outputs
    else:
        parent = weights(cfg.model)
        tuned = {k.removeprefix("bert.").removeprefix("transformer."): t for k, t in weights(folder).items()}
        assert any(not torch.equal(t, parent[k]) for k, t in tuned.items() if k in parent)


@pytest.mark.parametrize("method, lora_r", [("lm", 0), ("lm", 8), ("head", 8)])
def test_a_small_model_learns_the_task(settings, method, lora_r):
    more = dict(max_steps=120, max_train_examples=0, batch_size=16, learning_rate=4e-3, save_every=0)
    run = finetune.finetune(settings(method=method, lora_r=lora_r, max_eval_examples=200, **more))
    assert run["evaluation"]["metrics"]["accuracy"]["low"] > 0.6


@pytest.mark.parametrize("model, task, method", [("ours", "dialogue", "lm"), ("gpt2", "sentiment", "head")])
def test_killed_and_resumed_gives_the_same_bits(settings, tmp_path, killed_at, model, task, method):
    cfg = dict(max_steps=12, save_every=5, task=task, method=method, lora_r=4)  # GPT-2 has dropout
    runs = [finetune.finetune(settings(model, name="whole", **cfg))]
    killed_at(8, finetune.finetune, settings(model, name="stopped", **cfg))
    runs.append(finetune.finetune(settings(model, name="stopped", **cfg)))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    assert runs[0]["evaluation"] == runs[1]["evaluation"] and runs[0]["results"] == runs[1]["results"]
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "stopped")


def test_a_finished_run_says_so_and_one_that_lost_its_evaluation_makes_it_up(settings, tmp_path, capsys):
    run, file = finetune.finetune(settings()), tmp_path / "run/run.json"
    assert finetune.finetune(settings()) == run
    assert "was trained before" in capsys.readouterr().out
    file.write_text(json.dumps({k: v for k, v in read_json(file).items() if k != "evaluation"}))
    assert finetune.finetune(settings())["evaluation"] == run["evaluation"]
    with pytest.raises(TrainError, match="other settings .learning_rate"):
        finetune.finetune(settings(learning_rate=1e-3))


def test_the_model_that_is_kept_is_the_last_whatever_the_validation_split_says(settings, tmp_path):
    finetune.finetune(settings(max_steps=6, eval_every=2, learning_rate=1.0))  # it gets worse and worse
    assert same(weights(tmp_path / "run"), weights(tmp_path / "run/checkpoints/step-6"))


# -----------------------------------------------------------------------------
# LoRA


def build_further(cfg: FinetuneConfig) -> TextModel:
    return finetune.build_model(cfg, resolve(cfg.model))


def test_our_lora_equals_pefts_in_numbers_and_files(checkpoints, settings, built, tmp_path):
    """With one seed the same A; with one B the same logits, gradients and files, in both directions."""
    import peft

    options = dict(task="dialogue", lora_r=4, lora_alpha=12, lora_dropout=0.1)
    ours = built(**options)
    torch.manual_seed(settings().seed)
    net = transformers.AutoModelForCausalLM.from_pretrained(checkpoints["ours"])
    how = dict(r=4, lora_alpha=12, lora_dropout=0.1, target_modules=LORA_TARGETS["llama"])
    theirs = peft.get_peft_model(net, peft.LoraConfig(task_type="CAUSAL_LM", **how))
    assert same(ours.adapter.tensors(), peft.get_peft_model_state_dict(theirs))
    ids = torch.randint(5, 400, (3, 20))
    base = logits(ModernDecoderLM.from_pretrained(checkpoints["ours"]), ids)
    assert torch.equal(logits(ours.model, ids), base), "at the start nothing changes"

    for tensor in ours.adapter.tensors().values():
        tensor.normal_(std=0.05)  # larger ones amplify rounding
    peft.set_peft_model_state_dict(theirs, ours.adapter.tensors())
    gradients = []
    for model in (ours.model, theirs):
        model.train()
        torch.manual_seed(7)  # of the dropout
        out = model(ids) if model is ours.model else model(input_ids=ids).logits
        out.square().mean().backward()
        named = [(n.replace(".default", ""), p.grad) for n, p in model.named_parameters()]
        gradients.append({n.removeprefix("base_model.model."): g for n, g in named if g is not None})
    assert len(gradients[0]) == 2 * 7 * 2  # A and B of seven matrices in two blocks
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

    adapted = logits(ours.model, ids)
    assert (adapted - base).abs().max() > 0.1
    ours.save(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    Tokenizer.load(checkpoints["ours"]).save(tmp_path / "theirs")
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours")
    found = {"PEFT with PEFT's": logits(theirs, ids), "PEFT with ours": logits(opened, ids)}
    for name in ("ours", "theirs"):
        for backend in ("ours", "transformers"):
            model = load_model(str(tmp_path / name), CPU, backend).model
            found[f"{backend} with {name}"] = logits(model, ids)
    with ours.adapter.merged():
        found["merged"] = logits(ours.model, ids)
    for name, value in found.items():
        torch.testing.assert_close(value, adapted, rtol=1e-3, atol=1e-3, msg=name)
    assert torch.equal(logits(ours.model, ids), adapted), "merged only for a while"
    for name in ("ours", "theirs"):  # trained further
        further = build_further(settings(str(tmp_path / name)))
        assert further.adapter.config.lora_alpha == 12
        assert torch.equal(logits(further.model, ids), adapted)
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    assert build_further(settings(str(tmp_path / "theirs"))).adapter is None, "PEFT has to compute it"


@pytest.mark.parametrize("name, layers", [("ours", 14), ("gpt2", 8), ("t5", 36)])
def test_lora_adapts_all_linear_layers_of_the_blocks(built, name, layers):
    model = built(name, task="dialogue", lora_r=4).model
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert len(adapted) == layers and not any("lm_head" in n or "embed" in n for n in adapted)
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())


def test_an_adapter_is_trained_further_and_refuses_another_base(settings, tmp_path, checkpoints):
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    shutil.copytree(checkpoints["ours"], base)
    finetune.finetune(settings(base, lora_r=2, name="adapter"))
    run = finetune.finetune(settings(adapter, name="further"))
    assert run["parent"] == adapter and run["base_hash"] == weights_hash(base)
    before, after = weights(adapter), weights(tmp_path / "further")
    assert before.keys() == after.keys() and not same(before, after)
    assert same(weights(base), weights(checkpoints["ours"]))
    for more, message in (({"lora_r": 4}, "of rank 2"), ({"method": "head"}, "of kind causal")):
        with pytest.raises(TrainError, match=message):
            finetune.finetune(settings(adapter, **more))
    torch.manual_seed(5)
    ModernDecoderLM(ModernDecoderLM.from_pretrained(base).config).save_pretrained(base)
    with pytest.raises(TrainError, match="trained on other weights"):
        load_model(adapter, CPU)
    with pytest.raises(TrainError, match="parent_hash"):
        finetune.finetune(settings(base, lora_r=2, name="adapter"))


@pytest.mark.parametrize("name", ["ours", "gpt2", "t5", "bert"])
def test_dropout_reaches_every_architecture_while_training_and_only_then(built, name):
    task, method = ("sentiment", "head") if name == "bert" else ("dialogue", "lm")
    model = built(name, task=task, method=method, dropout=0.5)
    tensors = model.collate(tokenise(model, task, load_task(task, "train")[0][:3])[0])

    def twice(net) -> list[torch.Tensor]:
        return [target_logits(net, model.kind, *tensors) for _ in range(2)]

    assert not torch.allclose(*twice(model.model.train()))
    assert torch.equal(*twice(model.model.eval()))
    assert torch.equal(*twice(built(name, task=task, method=method, dropout=0.0).model.train()))


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(built, name):
    grads = []
    for checkpointing in (False, True):
        options = dict(lora_r=4, lora_dropout=0.0, dropout=0.0, gradient_checkpointing=checkpointing)
        model = built(name, task="dialogue", **options)
        rows, _ = tokenise(model, "dialogue", load_task("dialogue", "train")[0][:4])
        task_loss(model.model.train(), *model.collate(rows), model.kind)[0].backward()
        grads.append({n: p.grad for n, p in model.model.named_parameters() if p.grad is not None})
    assert grads[0]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_qlora_trains_in_four_bits_and_comes_back(settings, built, tmp_path):
    pytest.importorskip("bitsandbytes")
    four_bit = dict(task="dialogue", lora_r=4, load_in_4bit=True)
    run = finetune.finetune(settings(merge=True, max_steps=30, learning_rate=1e-2, **four_bit))
    losses = losses_of(tmp_path / "run")
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.2
    assert run["trained_parameters"] == sum(t.numel() for t in weights(tmp_path / "run").values())
    layer = built(**four_bit).model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() * 2 == 64 * layer.out_features
    examples = load_task("dialogue", "validation")[0][:3]
    assert len(answer_task(load_model(str(tmp_path / "run/merged"), CPU), "dialogue", examples)[0]) == 3
    assert "\n# merged\n" in (tmp_path / "run/merged/README.md").read_text()


# -----------------------------------------------------------------------------
# What the loss sees


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("name, task", [("ours", "dialogue"), ("gpt2", "arithmetic"), ("t5", "dialogue")])
def test_the_loss_is_on_the_answer_and_its_end_and_on_nothing_else(built, name, task, lora_r):
    model, reference = built(name, task=task, lora_r=lora_r), built(name, task=task).model.eval()
    examples = sorted(load_task(task, "train")[0][:40], key=lambda e: len(e.text + e.target))[:8]  # these fit
    rows, lost = tokenise(model, task, examples)
    assert not any(lost.values()) and len({len(prompt) for prompt, _ in rows}) > 1
    ids, mask, targets = model.collate(rows)
    for row, example in zip(targets, examples, strict=True):
        *answer, end = row[row != -100].tolist()
        assert end == model.eos and model.decode(answer).strip() == example.target.strip()
    total = 0.0  # transformers' own loss, one unpadded example after another, labels -100 on the prompt
    for prompt, answer in rows:
        inputs, labels = prompt + answer, [-100] * len(prompt) + answer
        if name == "t5":
            inputs, labels = prompt, answer
        out = reference(input_ids=torch.tensor([inputs]), labels=torch.tensor([labels]))
        total += out.loss.item() * len(answer)
    loss, count = task_loss(model.model.eval(), ids, mask, targets, model.kind)
    assert count == sum(len(answer) for _, answer in rows)
    assert loss.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", ["ours", "gpt2", "bert"])
def test_a_head_reads_each_text_to_its_end_however_it_is_padded(built, name):
    model = built(name, method="head")
    model.model.eval()
    rows, _ = tokenise(model, "sentiment", load_task("sentiment", "train")[0][:6])
    batched, *alone = (
        target_logits(model.model, "head", *model.collate(some)) for some in (rows, *zip(rows))
    )
    assert torch.allclose(batched, torch.cat(alone), atol=1e-5) and batched.std(0).min() > 0
    if name == "gpt2":  # it has no token for padding: the end-of-text token serves
        assert model.model.config.pad_token_id == model.eos


@pytest.mark.parametrize("name, before, behind", [
    ("ours", ["<|endoftext|>"], []), ("gpt2", ["<|endoftext|>"], []), ("t5", [], ["</s>"]),
    ("bert", ["[CLS]"], ["[SEP]"]),
])  # fmt: skip
def test_each_architecture_gets_the_special_tokens_it_expects(built, name, before, behind):
    model = built(name, method="lm" if name == "t5" else "head")
    ids, _ = model.prompt(TASKS["sentiment"], "A fresh film.")
    special = load_tokenizer(model.name, ours=False).inner.convert_tokens_to_ids
    assert ids == [*special(before), *model.encode("A fresh film.\nIt was"), *special(behind)]


@pytest.mark.parametrize("name", ["ours", "gpt2", "t5"])
@pytest.mark.parametrize("chat", ["Tom: It is raining again and again.\n" * 30, "Tom: 😀😀😀" * 60])
def test_a_text_that_is_too_long_loses_its_end_and_never_the_question_or_the_answer(built, name, chat):
    model = built(name, task="dialogue", context_length=64)
    target = " Tom says that it rains."
    ((prompt, answer),), lost = tokenise(model, "dialogue", [Example(chat, target)])
    size = len(prompt) + (len(answer) if model.kind == "causal" else 0)
    assert lost == {"cut": 1, "left_out": 0} and 56 <= size <= 64
    asked = model.decode(prompt)
    assert asked.startswith("Conversation:") and asked.rstrip().endswith("Summary:")
    assert model.decode(answer).strip() == target.strip()
    with pytest.raises(TrainError, match="raise --context_length"):
        model.prompt(TASKS["dialogue"], chat, room=3)


def test_an_answer_is_never_cut(built):
    model, long = built(context_length=24, task="dialogue"), " Tom says that it rains." * 4
    with pytest.raises(TrainError, match="no example of dialogue fits into 24 tokens"):
        tokenise(model, "dialogue", [Example("Hi", long)])
    rows, lost = tokenise(model, "dialogue", [Example("Hi", long), Example("Hi", " Hi.")])
    assert len(rows) == 1 and lost["left_out"] == 1


@pytest.mark.parametrize("shots", [4, 10**12])
def test_examples_in_a_prompt_go_first_when_there_is_no_room(built, monkeypatch, shots):
    model, task, texts = built(), TASKS["sentiment"], []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda text: texts.append(text) or encode(text))
    ids, cut = model.prompt(task, "A fresh film.", few_shot("sentiment", shots), 80)
    shorter = model.decode(ids)
    assert cut == "shots" and len(ids) <= 80
    assert shorter.endswith("A fresh film.\nIt was") and shorter.count("It was") > 1
    assert len(texts) < 12 and max(map(len, texts)) < 100 * 150, "of very many only a few prompts are encoded"


def make_set(n=203, batch=8, seed=1) -> TrainingSet:
    rng = np.random.default_rng(0)
    rows = [([i] * int(rng.integers(5, 60)), [1]) for i in range(n)]
    return TrainingSet(rows, batch, seed, "causal", 0)


def test_batches_are_a_pure_function_of_seed_and_step_and_an_epoch_sees_everything_once():
    a, b = make_set(), make_set()
    first = [a.batch(s, 0, 8)[0] for s in range(60)]
    assert all(torch.equal(first[s], b.batch(s, 0, 8)[0]) for s in reversed(range(60)))
    assert not torch.equal(make_set(seed=2).batch(0, 0, 8)[0], first[0])
    seen = Counter(int(row[0]) for ids in first[: a.batches] for row in ids)
    assert len(seen) == 200 and set(seen.values()) == {1}
    assert not torch.equal(first[0], first[a.batches])
    pieces = [a.batch(3, i, 2)[0] for i in range(0, 8, 2)]  # micro-batches
    assert [int(r[0]) for p in pieces for r in p] == [int(r[0]) for r in first[3]]
    assert make_set(3).batches == 1 and len(make_set(3).batch(5, 0, 8)[0]) == 8  # few examples are repeated
    in_order = [collate(a.rows[i : i + 8], "causal", 0)[0] for i in range(1, 200, 8)]
    padding = [np.mean([(ids == 0).float().mean() for ids in batches]) for batches in (first, in_order)]
    assert padding[0] < 0.1 < 0.3 < padding[1]  # batches are of similar lengths


# -----------------------------------------------------------------------------
# One protocol


@pytest.mark.parametrize("name", ["ours", "gpt2", "t5"])
def test_log_likelihoods_do_not_depend_on_the_batch_and_are_sums_of_log_probabilities(checkpoints, name):
    model = load_model(checkpoints[name], CPU)
    rows = [([*model.bos, 7, 8, 9][: n + 1], [10 + n, 12, 5][: 3 - n % 3]) for n in range(1, 4)]
    batched = model.log_likelihoods(rows)
    assert np.allclose(batched, [model.log_likelihoods([row])[0] for row in rows], atol=1e-4)
    if model.kind == "causal":
        prompt, answer = rows[0]
        net = load_model(checkpoints[name], CPU, "transformers").model
        log_p = logits(net, torch.tensor([prompt + answer])).log_softmax(-1)[0]
        by_hand = sum(log_p[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer))
        assert batched[0] == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("border, dtype", [(0, torch.bfloat16), (1e9, torch.float32)])
def test_a_large_model_writes_and_reads_in_the_fast_dtype(monkeypatch, checkpoints, border, dtype):
    """On a CPU; `small` is made large by moving the border."""
    seen = []

    def noted(self, *args, hidden=ModernDecoderLM.hidden, **how):
        seen.append(self.dtype)
        return hidden(self, *args, **how)

    monkeypatch.setattr(ModernDecoderLM, "hidden", noted)
    monkeypatch.setattr(machine, "SMALL", border)
    monkeypatch.setattr(machine, "pick_dtype", lambda dtype, device: torch.bfloat16)
    model = load_model(checkpoints["ours"], CPU)
    model.continuations([[5, 6, 7]], 3, temperature=0.0)
    model.log_likelihoods([([5, 6], [7])])
    assert set(seen) == {dtype}


@pytest.mark.parametrize("name, dtype", [("gpt2", "bfloat16"), ("t5", "bfloat16"), ("t5", "float16")])
def test_transformers_models_answer_in_bfloat16_if_asked_to_and_t5_never_in_float16(checkpoints, name, dtype):
    rows = [([7, 8, 9], [10, 12]), ([7, 8], [5])]
    wanted = [torch.float32, getattr(torch, dtype)]
    full, half = (load_model(checkpoints[name], CPU, "transformers", dtype=d) for d in wanted)
    assert half.model.dtype == (torch.float32 if dtype == "float16" else torch.bfloat16)
    assert np.allclose(full.log_likelihoods(rows), half.log_likelihoods(rows), atol=0.3)
    assert len(half.generate([[7, 8, 9], [7]], 4, "")) == 2


def test_classes_are_compared_by_the_likelihood_of_their_names(checkpoints):
    model = load_model(checkpoints["ours"], CPU)
    task, examples = TASKS["sentiment"], load_task("sentiment", "test")[0][:10]
    prompts = [model.prompt(task, e.text)[0] for e in examples]
    scores = model.class_scores(task, prompts)
    for column, label in enumerate(task.labels):
        rows = [(p, model.encode(label)) for p in prompts]
        assert np.allclose(scores[:, column], model.log_likelihoods(rows), atol=1e-5)
    plain, calibrated = (answer_task(model, "sentiment", examples, calibrate=c)[0] for c in (False, True))
    empty = model.class_scores(task, [model.prompt(task, "N/A")[0]])
    assert plain == scores.argmax(-1).tolist() and calibrated == (scores - empty).argmax(-1).tolist()


# -----------------------------------------------------------------------------
# What can go wrong


@pytest.mark.parametrize("more, message", [
    (dict(task="sst3"), 'no task "sst3"'),
    (dict(task="dialogue", method="head"), "--method=head is for classes"),
    (dict(load_in_4bit=True), "need --lora_r"),
    (dict(load_in_4bit=True, lora_r=4), "qlora"),
    (dict(model="t5", dtype="float16"), "T5 overflows in float16"),
    (dict(lora_r=4, lora_targets="layers"), "no layer is called 'layers'; there are down_proj"),
    (dict(model="out/nowhere"), "there is no folder out/nowhere"),
    (dict(model="somebody/model"), "hf download somebody/model --local-dir models/model"),
    (dict(model="mixed"), "has 400 tokens, but its tokenizer has 401"),
    (dict(model="sinks"), "no architecture"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name_before_anything_is_written(
    settings, tiny, tmp_path, monkeypatch, more, message
):
    if "qlora" in message:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg, folder = settings(**more), tmp_path / "model"
    if cfg.model in ("mixed", "sinks"):
        shape = dict(n_layers=1, d_model=32, n_heads=4, context_length=64, vocab_size=400)
        shape |= {"n_sinks": 1} if cfg.model == "sinks" else {}  # computed by model.py alone
        ModernDecoderLM(ModelConfig(**shape)).save_pretrained(folder)
        new = ["<|more|>"] if cfg.model == "mixed" else []  # the tokenizer of another model
        Tokenizer.load(tiny["base"]).with_special_tokens(new).save(folder)
        cfg.model = str(folder)
    with pytest.raises((ValueError, OSError, DataError), match=message):
        finetune.finetune(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, victim, backend", [
    ("ours", "model.layers.1.mlp.up_proj.weight", "ours"),
    ("ours", "model.layers.1.mlp.up_proj.weight", "transformers"),
    ("t5", "decoder.final_layer_norm.weight", "auto"),
])  # fmt: skip
def test_a_checkpoint_that_lacks_weights_is_never_filled_up_with_random_ones(
    tmp_path, checkpoints, name, victim, backend
):
    folder = shutil.copytree(checkpoints[name], tmp_path / name)
    tensors = load_tensors(folder)
    del tensors[victim]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a complete model|does not hold|cannot be loaded"):
        load_model(str(folder), CPU, backend)


def test_help_needs_no_large_library():
    code = "import sys, finetune; assert not {'transformers', 'peft', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
