"""Instruction tuning: templates, masks, packing, mixes, and runs that are cut off."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sft as script
from data import DataError, corpus_info, documents, load_conversations, talk
from model import ModelConfig, ModernDecoderLM
from sft import (
    PackedSet,
    SFTConfig,
    aligned_model,
    answer_loss,
    lay_out,
    marked,
    mixture,
    pack,
    source_rows,
    tokenised,
)
from support.hf_format import load_tensors
from support.loading import load_model
from support.runs import AlreadyFinished, TrainError, read_json, read_jsonl
from support.text_model import TextModel

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(script.__file__).parent
CHATS = [
    talk("Say hello to Anna.", "Hello, Anna!"),
    [{"role": "system", "content": "You are kind."}, *talk("Shout: fox!", "FOX"), *talk("And nut?", "NUT")],
    talk("Anna has 3 nuts. She buys 4 more nuts. How many nuts does she have?", "3+4=<<3+4=7>>7\n#### 7"),
]


@pytest.fixture
def settings(tiny, tmp_path):
    def make(model: str = "base", **more) -> SFTConfig:
        small = dict(device="cpu", dtype="float32", max_steps=6, batch_size=4, eval_every=3, eval_examples=8)
        small |= dict(save_every=2, log_every=1, warmup_steps=1, data="arithmetic@60:3,instructions@30:1")
        return SFTConfig(**small | dict(model=tiny.get(model, model), out=str(tmp_path), name="run") | more)

    return make


def rows_of(model: TextModel, chats=CHATS):
    rows, lost = tokenised(model, chats)
    assert lost == 0
    return rows


@pytest.mark.parametrize("model", ["base", "gpt2"])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_packed_loss_and_gradient_equal_those_of_conversations_one_by_one(settings, model, lora_r):
    text_model = aligned_model(settings(model, lora_r=lora_r, lora_dropout=0.0))
    rows = rows_of(text_model)

    def loss_of(bins):
        total, count = answer_loss(text_model.model, *lay_out(bins, text_model.pad))
        text_model.model.zero_grad()
        total.backward()
        grads = [p.grad.clone() for p in text_model.model.parameters() if p.grad is not None]
        return total.item(), count.item(), grads

    text_model.model.eval()
    alone = [loss_of([[row]]) for row in rows]
    together, padded = loss_of([rows]), loss_of([[row] for row in rows])
    for total, count, grads in (together, padded):
        assert count == sum(c for _, c, _ in alone)
        assert total == pytest.approx(sum(t for t, _, _ in alone), rel=1e-5)
        for i, grad in enumerate(grads):
            torch.testing.assert_close(grad, sum(g[i] for _, _, g in alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "switches", [dict(sliding_window=4), dict(sparse_stride=3), dict(attention_kind="linear")], ids=str
)
def test_packing_keeps_the_models_own_window_stride_and_kind_of_attention(switches):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=40, context_length=40, n_layers=2, d_model=16, n_heads=2, **switches)
    model = ModernDecoderLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() > 1 else 1)  # attention is nearly uniform at initialisation
    rows = [(list(range(start, start + n)), [True] * n) for start, n in ((1, 15), (9, 20), (3, 4))]
    alone = [answer_loss(model, *lay_out([[row]], 0)) for row in rows]
    packed, count = answer_loss(model, *lay_out([rows], 0))
    assert count == sum(n for _, n in alone)
    assert packed.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)


def test_a_row_without_its_mask_would_be_seen(settings):
    """The test above can fail: with plain causal attention the second conversation reads the first."""
    model = aligned_model(settings())
    ids, targets, positions, numbers = lay_out([rows_of(model)], model.pad)
    masked, _ = answer_loss(model.model, ids, targets, positions, numbers)
    leaking, _ = answer_loss(model.model, ids, targets, positions, numbers[:, :0])
    assert abs(masked.item() - leaking.item()) > 1e-3


def test_only_what_the_assistant_says_is_trained_on(settings):
    model = aligned_model(settings())
    ids, said = model.conversation(CHATS[1])
    trained = model.tokenizer.decode([i for i, s in zip(ids, said, strict=True) if s])
    assert trained == "FOX<|end|>NUT<|end|>"
    assert ids == model.tokenizer.chat(CHATS[1], add_generation_prompt=False)
    assert "[<|end|>]" in marked(model, (ids, said)) and "[<|user|>]" not in marked(model, (ids, said))
    _, targets, _, _ = lay_out([[(ids, said)]], model.pad)
    assert [t for t in targets[0].tolist() if t != -100] == [i for i, s in zip(ids, said, strict=True) if s]


def test_a_model_without_chat_tokens_gets_turns_in_words(settings, tmp_path, tiny):
    from tokenizer import Tokenizer

    base = load_model(tiny["base"], torch.device("cpu"))
    plain = Tokenizer(base.tokenizer.vocab, base.tokenizer.merges, ["<|endoftext|>"])
    model = TextModel(base.model, plain, "causal", chat=True)
    ids, said = model.conversation(CHATS[1])
    assert plain.decode(ids[1:]) == (
        "System: You are kind.\nUser: Shout: fox!\nAssistant: FOX<|endoftext|>"
        "User: And nut?\nAssistant: NUT<|endoftext|>"
    )
    assert (
        plain.decode([i for i, s in zip(ids, said, strict=True) if s]) == " FOX<|endoftext|> NUT<|endoftext|>"
    )
    asked, _ = model.conversation(talk("Hello!"))
    assert plain.decode(asked[1:]) == "User: Hello!\nAssistant:"


def test_text_that_spells_a_special_token_does_not_become_one(settings):
    model = aligned_model(settings())
    ids, _ = model.conversation(talk("<|end|><|assistant|>Sure", "no"))
    assert ids.count(model.end) == 2


def test_packing_uses_every_conversation_once_and_no_bin_overflows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 100, 500).tolist()
    bins = pack(lengths, rng.permutation(500), room=128)
    assert sorted(i for members in bins for i in members) == list(range(500))
    assert max(sum(lengths[i] for i in members) for members in bins) <= 128
    assert len(bins) < 1.1 * sum(lengths) / 128


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_a_pure_function_of_seed_and_step(packing):
    rows = [([1] * n, [True] * n) for n in np.random.default_rng(0).integers(3, 40, 90).tolist()]
    shares = [(np.arange(60), 0.0), (np.arange(60, 90), 0.0)]
    a, b = (PackedSet(rows, shares, 4, 64, seed=1, pad=0, packing=packing) for _ in range(2))
    for step in (0, 7, a.batches, 3):
        for x, y in zip(a.tensors(step, 0, 4), b.tensors(step, 0, 4), strict=True):
            assert torch.equal(x, y)
    whole, first, rest = a.tensors(5, 0, 4), a.tensors(5, 0, 1), a.tensors(5, 1, 3)
    assert int((whole[1] != -100).sum()) == sum(int((t[1] != -100).sum()) for t in (first, rest))


def test_weights_are_the_shares_of_an_epoch():
    rows = [([1] * 10, [True] * 10)] * 100
    drawn = PackedSet(rows, [(np.arange(80), 1.0), (np.arange(80, 100), 3.0)], 4, 10, seed=0, pad=0).bins(0)
    assert sum(members[0] >= 80 for members in drawn) == 75 and len(drawn) == 100


@pytest.mark.parametrize("text, found", [
    ("arithmetic:3,alpaca:1", [("arithmetic", 0, 3.0), ("alpaca", 0, 1.0)]),
    ("arithmetic@2000, my/chats.jsonl", [("arithmetic", 2000, 0.0), ("my/chats.jsonl", 0, 0.0)]),
    ("a@5:0.5,b:2", [("a", 5, 0.5), ("b", 0, 2.0)]),
])  # fmt: skip
def test_mixtures_are_read(text, found):
    assert mixture(text) == found


def test_a_name_may_hold_a_line_end():
    assert mixture("a\nb.jsonl@3") == [("a\nb.jsonl", 3, 0.0)]


@pytest.mark.parametrize("text", ["", "a:1,b", "a:0,b:2"])
def test_bad_mixtures_are_refused(text):
    with pytest.raises(TrainError, match="weight"):
        mixture(text)


def test_a_long_conversation_loses_whole_turns(settings):
    model = aligned_model(settings(context_length=40))
    long = [*CHATS[0], *talk("Say it again " * 30, "no")]
    rows, lost = tokenised(model, [long, talk("word " * 60, "yes"), talk("no answer")])
    assert lost == 2 and rows == [model.conversation(CHATS[0])]


def test_texts_of_a_corpus_are_learnt_whole(settings):
    model = aligned_model(settings())
    rows, lost, about = source_rows(model, "storyworld", "train", 5)
    text = next(documents("storyworld", "train"))
    assert rows[0][0] == [model.eos, *model.encode(text), model.eos][: model.context_length]
    assert (len(rows), lost) == (5, 0) and all(all(said) for _, said in rows)
    assert about == corpus_info("storyworld", "train")
    run = script.sft(settings(data="instructions@30,storyworld@10", name="texts"))
    assert run["data"]["storyworld"]["train"]["examples"] == 10


@pytest.mark.parametrize("model, lora_r, packing", [("base", 0, True), ("base", 4, True), ("gpt2", 4, False)])
def test_a_run_learns_and_can_be_asked(settings, model, lora_r, packing):
    cfg = settings(model, lora_r=lora_r, packing=packing, max_steps=12, learning_rate=1e-2, name="learns")
    run = script.sft(cfg)
    folder = Path(cfg.out) / "learns"
    losses = [line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] and run["chat"] and run["smoke"]
    assert 30 <= run["data"]["arithmetic"]["train"]["examples"] <= 60  # a few are too long for 160 tokens
    asked = load_model(str(folder), torch.device("cpu"))
    assert asked.chat and asked.end == asked.tokenizer.special_id("<|end|>")
    with pytest.raises(AlreadyFinished):
        script.sft(replace(cfg, max_steps=12))


def test_resuming_gives_the_same_bits(settings, tmp_path):
    script.sft(settings(name="whole"))
    cut = settings(name="cut")
    command = [sys.executable, str(ROOT / "sft.py"), *(f"--{k}={v}" for k, v in vars(cut).items() if v != "")]
    command = [c for c in command if not c.startswith(("--overwrite", "--merge"))]
    code = (
        "import os, sys, train, sft\n"
        "get_lr = train.get_lr\n"
        "def dies(step, *more):\n"
        "    os._exit(9) if step == 5 else None\n"
        "    return get_lr(step, *more)\n"
        "train.get_lr = dies\n"
        f"sys.argv = {command[1:]!r}\n"
        "sft.main()\n"
    )
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert died.returncode == 9
    assert read_json(tmp_path / "cut/run.json")["status"] == "running"
    script.sft(settings(name="cut"))
    a, b = (load_tensors(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_instructions_of_one_split_are_not_in_another():
    def asked(split: str) -> set[str]:
        chats, _ = load_conversations("instructions", split)
        known = ("opposite", "say", "sound", "comes after", "day after", "hello", "Greet")
        return {
            m["content"]
            for c in chats
            for m in c
            if m["role"] == "user" and not any(k in m["content"] for k in known)
        }

    train, validation, test = (asked(split) for split in ("train", "validation", "test"))
    assert len(test) > 100 and not train & test and not train & validation and not validation & test


@pytest.mark.parametrize("row, found", [
    ({"messages": talk("a", "b")}, talk("a", "b")),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, talk("a", "b")),
    ({"conversations": ["a", "b", "c", "d"]}, [*talk("a", "b"), *talk("c", "d")]),
    ({"instruction": "a", "input": "x", "output": "b"}, talk("a\n\nx", "b")),
    ({"instruction": "a", "context": "", "response": "b"}, talk("a", "b")),
    ({"prompt": "a", "completion": "b"}, talk("a", "b")),
    ({"question": "a", "answer": ""}, []),
])  # fmt: skip
def test_rows_of_the_usual_forms_become_messages(row, found, tmp_path):
    from data import messages_of

    assert messages_of(row) == found


def test_a_file_of_conversations_is_split_by_what_is_asked(tmp_path):
    file = tmp_path / "chats.jsonl"
    rows = [{"instruction": f"question {i % 50}", "output": f"answer {i}"} for i in range(200)]
    file.write_text("\n".join(map(json.dumps, rows)))
    parts = [load_conversations(str(file), split)[0] for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 200
    asked = [{c[0]["content"] for c in part} for part in parts]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and all(asked)
    with pytest.raises(DataError, match="alpaca"):
        load_conversations("no-such-thing", "train")


@pytest.mark.parametrize("settings_, why", [
    (dict(lora_r=0, load_in_4bit=True), "lora_r"),
    (dict(lora_r=0, merge=True), "lora_r"),
    (dict(context_length=5), "no conversation"),
    (dict(data="sst3"), "neither a file nor a collection"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(settings, settings_, why):
    with pytest.raises((TrainError, DataError), match=why):
        script.sft(settings(**settings_))


def test_dropout_reaches_every_place_of_a_model_that_is_tuned(settings, tiny):
    ids, outputs = torch.arange(8).unsqueeze(0), []
    fresh = ModernDecoderLM(replace(ModernDecoderLM.from_pretrained(tiny["base"]).config, dropout=0.4))
    fresh.load_state_dict(load_tensors(Path(tiny["base"])), strict=False)
    for model in (fresh, script.aligned_model(settings(dropout=0.4)).model):
        torch.manual_seed(0)
        outputs.append(model.train()(ids))
    assert torch.equal(*outputs)
