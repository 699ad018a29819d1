"""Instruction tuning: masks, packing, mixes, and runs that are cut off."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import make

import sft
from data import DataError, corpus_info, documents, load_conversations, messages_of, talk
from dpo import token_log_probs
from finetune import chat_model
from sft import PackedSet, SFTConfig, collate_bins, conversation_loss, mixture, tokenised
from support.loading import load_model
from support.runs import TrainError
from support.tables import read_jsonl
from tasks.grammar import split_of
from train import pack

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
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
        return SFTConfig(**small | dict(model=tiny[model], out=str(tmp_path), name="run") | more)

    return make


def test_the_losses_of_all_stages_know_our_model_behind_the_compiler(tiny):
    model = load_model(tiny["base"], CPU).model
    ids = torch.randint(1, 60, (2, 6))
    found = []
    for net in (model, torch.compile(model, backend="eager")):
        loss, _ = conversation_loss(net, ids, ids, ids[:, :0], ids[:, :0])
        found.append([loss.detach(), token_log_probs(net, ids, ids)[0].detach()])
    torch.testing.assert_close(*found)


# -----------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("model, lora_r", [("base", 0), ("base", 4), ("gpt2", 4)])
def test_packed_loss_and_gradient_equal_those_of_conversations_one_by_one(settings, model, lora_r):
    text_model = chat_model(settings(model, lora_r=lora_r, lora_dropout=0.0))
    net, rows = text_model.model.eval(), tokenised(text_model, CHATS)

    def loss_of(bins):
        total, count = conversation_loss(net, *collate_bins(bins, text_model.pad))
        net.zero_grad()
        total.backward()
        return total.item(), count.item(), [p.grad.clone() for p in net.parameters() if p.grad is not None]

    alone = [loss_of([[row]]) for row in rows]
    assert len(alone) == 3
    for total, count, grads in (loss_of([rows]), loss_of([[row] for row in rows])):
        assert count == sum(n for _, n, _ in alone)
        assert total == pytest.approx(sum(nats for nats, _, _ in alone), rel=1e-5)
        for i, grad in enumerate(grads):
            torch.testing.assert_close(grad, sum(g[i] for _, _, g in alone), rtol=1e-3, atol=1e-4)
    ids, targets, positions, numbers = collate_bins([rows], text_model.pad)
    leaking, _ = conversation_loss(net, ids, targets, positions, numbers[:, :0])
    assert abs(leaking.item() - sum(nats for nats, _, _ in alone)) > 1e-3, "without the mask it would differ"


@pytest.mark.parametrize("more", [{"sliding_window": 4}, {"sparse_stride": 3}, {"attention_kind": "linear"}])
def test_packing_keeps_the_models_own_window_stride_and_kind_of_attention(more):
    model = make(**more)
    rows = [(list(range(start, start + n)), [True] * n) for start, n in ((1, 15), (9, 20), (3, 4))]
    alone = sum(conversation_loss(model, *collate_bins([[row]], 0))[0].item() for row in rows)
    assert conversation_loss(model, *collate_bins([rows], 0))[0].item() == pytest.approx(alone, rel=1e-5)


def test_packing_takes_every_conversation_once_into_rows_that_are_nearly_full():
    lengths = [5 + 37 * i % 95 for i in range(500)]
    packed = pack(lengths, np.random.default_rng(0).permutation(500), room=128)
    assert sorted(sum(packed, [])) == list(range(500))
    filled = [sum(lengths[i] for i in row) for row in packed]
    assert max(filled) <= 128 and np.mean(filled) > 0.9 * 128


def test_weights_are_the_shares_of_an_epoch():
    row = ([1] * 10, [True] * 10)
    drawn = PackedSet([([row] * 80, 1.0), ([row] * 20, 3.0)], 4, 10, seed=0, pad=0).items
    assert sum(members[0] >= 80 for members in drawn) == 75 and len(drawn) == 100


# -----------------------------------------------------------------------------
# Conversations as rows


def test_only_what_the_assistant_says_is_trained_on(settings):
    model = chat_model(settings())
    targets = collate_bins([[model.conversation(CHATS[1])]], model.pad)[1][0]
    assert model.tokenizer.decode(targets[targets != -100].tolist()) == "FOX<|end|>NUT<|end|>"


def test_a_long_conversation_loses_its_last_turns(settings):
    model = chat_model(settings(context_length=40))
    long = [*CHATS[0], *talk("Say it again " * 30, "no")]
    rows = tokenised(model, [long, talk("word " * 60, "yes"), talk("no answer")])
    assert rows == [model.conversation(CHATS[0])]


def test_texts_of_a_corpus_are_learnt_as_in_pretraining(settings):
    model = chat_model(settings())
    rows, _, about = sft.source_rows(model, "storyworld", "train", 5)
    text = next(documents("storyworld", "train"))
    assert rows[0][0] == [model.eos, *model.encode(text), model.eos][: model.context_length]
    assert len(rows) == 5 and all(rows[0][1]) and about == corpus_info("storyworld", "train")


@pytest.mark.parametrize("text, found", [
    ("arithmetic@2000, my/chats.jsonl", [("arithmetic", 2000, 0.0), ("my/chats.jsonl", 0, 0.0)]),
    ("a@5:0.5,b\n.jsonl:2", [("a", 5, 0.5), ("b\n.jsonl", 0, 2.0)]),
    ("", None), ("a:1,b", None), ("a:0,b:2", None), ("a@0", None),
])  # fmt: skip
def test_mixtures_are_read_or_refused(text, found):
    if found:
        assert mixture(text) == found
    else:
        with pytest.raises(TrainError, match="--data"):
            mixture(text)


def test_conversations_in_sharegpts_form_become_messages():
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert messages_of(row) == talk("a", "b")


def test_instructions_of_one_split_are_not_in_another():
    shared = ("opposite", "say", "sound", "comes after", "day after", "hello", "Greet")  # of a few words each
    asked = []
    for split in ("train", "validation", "test"):
        chats = load_conversations("instructions", split)[0]
        turns = {m["content"] for chat in chats for m in chat if m["role"] == "user"}
        asked.append({turn for turn in turns if not any(words in turn for words in shared)})
    train, validation, test = asked
    assert len(test) > 100 and not train & test and not train & validation and not validation & test


# -----------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("model, lora_r, packing", [("base", 0, True), ("gpt2", 4, False)])
def test_a_run_learns_and_can_be_asked(settings, model, lora_r, packing):
    cfg = settings(model, lora_r=lora_r, packing=packing, max_steps=12, learning_rate=1e-2)
    run, folder = sft.sft(cfg), Path(cfg.out) / "run"
    losses = [line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] and run["chat"] and run["smoke"]
    assert 30 <= run["data"]["arithmetic"]["train"]["examples"] <= 60  # a few are too long for 160 tokens
    asked = load_model(str(folder), CPU)
    assert asked.chat and asked.end == asked.tokenizer.special_id("<|end|>")
    assert sft.sft(cfg) == run  # it is finished


def test_killed_and_resumed_gives_the_same_bits(settings, tmp_path, killed_at):
    whole, cut = (settings(name=name, max_steps=12) for name in ("whole", "cut"))
    sft.sft(whole)
    killed_at(7, sft.sft, cut)
    sft.sft(cut)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b


@pytest.mark.parametrize("more, why", [
    (dict(merge=True), "lora_r"), (dict(context_length=5), "no conversation"),
    (dict(data="sst3"), "neither a file nor a collection"),
    (dict(data="chats.jsonl"), "no validation conversation of .*chats.jsonl fits into"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(settings, tmp_path, monkeypatch, more, why):
    rows = []
    for question in map("What is {}?".format, range(100)):
        times = 1 if split_of(question) == "train" else 500
        rows.append(json.dumps({"messages": talk(question, "yes " * times)}))
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TrainError, DataError), match=why):
        sft.sft(settings(**more))
