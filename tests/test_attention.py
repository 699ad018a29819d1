"""Attention analysis: the weights are those of transformers for every kind of model."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import torch
import transformers

import eval as evaluation
import support.attention as attending
from model import ModelConfig, ModernDecoderLM
from support import long_context
from support.attention import attention_weights, chosen_heads, head_scores

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def weights_of(model, ids, **inputs) -> torch.Tensor:
    """transformers' own answer."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(model(input_ids=ids, output_attentions=True, **inputs).attentions)


@pytest.mark.parametrize("which", ["base", "gpt2"])
def test_our_weights_are_those_of_transformers(which, tiny):
    """A Llama with grouped keys, and a GPT-2, computed by model.py; then with an adapter."""
    ids = torch.randint(400, (2, 12))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny[which]).eval()
    ours = attention_weights(ModernDecoderLM.from_pretrained(tiny[which]).eval(), ids)
    torch.testing.assert_close(ours, weights_of(theirs, ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(attention_weights(theirs, ids), ours, atol=1e-5, rtol=0)
    where = "q_proj" if which == "base" else "c_attn"
    settings = peft.LoraConfig(target_modules=[where], init_lora_weights=False)
    assert (attention_weights(peft.get_peft_model(theirs, settings).eval(), ids) - ours).abs().max() > 1e-3


@pytest.mark.parametrize("changes, seen", [
    ({}, 9), ({"n_sinks": 1}, 9), ({"sliding_window": 4}, 4), ({"attention_kind": "linear"}, 9),
])  # fmt: skip
def test_attention_weights_are_shares_of_what_may_be_seen(changes, seen):
    shape = dict(vocab_size=20, context_length=16, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16)
    model = ModernDecoderLM(ModelConfig(**shape | changes)).eval()
    w = attention_weights(model, torch.randint(20, (3, 9)))
    assert w.shape == (2, 3, 2, 9, 9) and (w.triu(1) == 0).all() and (w.tril(-seen) == 0).all()
    total = w.sum(-1)
    assert (total < 1).all() if "n_sinks" in changes else torch.allclose(total, torch.ones(9), atol=1e-5)


def test_encoders_look_both_ways():
    ids = torch.randint(400, (2, 10))
    bert = transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=32)).eval()
    torch.testing.assert_close(attention_weights(bert, ids), weights_of(bert, ids))
    assert (head_scores(bert, length=8)["entropy"] <= 1).all()
    shape = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2, "d_ff": 32}
    config = transformers.T5Config(vocab_size=400, decoder_start_token_id=0, **shape)
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    torch.testing.assert_close(attention_weights(t5, ids), weights_of(t5.get_encoder(), ids))


def test_heads_are_scored_by_what_they_look_at(monkeypatch):
    T, pattern = 8, torch.zeros(4, 8, 8)
    t = torch.arange(1, T)
    pattern[:, 0, 0] = 1
    pattern[0, t, t - 1] = 1
    pattern[1, t, 0] = 1
    pattern[2, t, (t - 3).clamp(min=0)] = 1  # four tokens, twice: what followed last time lies three back
    pattern[3] = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    weights = pattern[None, None].expand(1, 2, 4, T, T)
    monkeypatch.setattr(attending, "attention_weights", lambda model, ids: weights)
    config = ModelConfig(vocab_size=20, n_layers=1, d_model=16, n_heads=4)
    scores = head_scores(ModernDecoderLM(config), rows=2, length=4)
    for head, name in enumerate(("previous", "first", "induction", "entropy")):
        assert scores[name].argmax() == head and scores[name][0, head] == pytest.approx(1, abs=1e-5)
    assert chosen_heads(scores, -1, -1)[2:] == [("induction", 0, 2), ("entropy", 0, 3)]
    assert chosen_heads(scores, 0, -1) == [("", 0, head) for head in range(4)]
    with pytest.raises(ValueError, match="--layer=1"):
        chosen_heads(scores, 1, -1)


@pytest.mark.parametrize("changes, weight", [
    ({}, 0.9), ({"n_heads": 8, "n_kv_heads": 1}, 0.8), ({"rope_theta": 5e5}, 0.9), ({"qk_norm": True}, 0.2),
])  # fmt: skip
def test_a_model_can_begin_with_a_head_that_looks_back(changes, weight):
    config = ModelConfig(**{"vocab_size": 512, "n_layers": 2, "d_model": 256, "n_heads": 4} | changes)
    previous = head_scores(look_back(config), length=256)["previous"]  # of 512 tokens
    assert previous[0, 0] > weight and previous.flatten()[1:].max() < 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "learned"},
        {"norm": "none"},
        {"norm_position": "post"},
        {"attention_kind": "linear"},
        {"head_dim": 8},
    ],
)
def test_a_model_that_cannot_look_back_says_so(changes):
    with pytest.raises(ValueError, match="look_back needs"):
        look_back(ModelConfig(vocab_size=64, n_layers=1, d_model=64, n_heads=4, **changes))


def look_back(config: ModelConfig) -> ModernDecoderLM:
    torch.manual_seed(1)
    model = ModernDecoderLM(config)
    model.look_back()
    return model


def test_copied_digits_are_counted_where_they_are_repeated():
    class Echo(torch.nn.Module):  # says what followed the same byte before; else a newline
        device = "cpu"

        def forward(self, ids):
            logits, seen = torch.zeros(1, ids.shape[1], 300), ids[0].tolist()
            for t, i in enumerate(seen):
                logits[0, t, seen[seen.index(i) + 1] if i in seen[:t] else 10] = 1
            return logits

    model = SimpleNamespace(model=Echo(), eos=299, context_length=999)
    model.encode, model.decode = lambda text: list(text.encode()), lambda ids: chr(ids[0])
    assert attending.copied_digits(model, ["a1 b2", "a1"], ["a1 b2", "a1"]) == 1
    assert attending.copied_digits(model, ["a1 b2", "a4"], ["b1 a2 x3", "a4"]) == 0.25


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["eval.py", "--device=cpu", f"--out={tmp_path}", *words])
        evaluation.main()

    return run


def test_maps_of_any_text_and_head(tiny, tmp_path, command_line):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] ben sings .".split()
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path / "bert")
    config = transformers.BertConfig(**SMALL | {"vocab_size": len(words)}, intermediate_size=32)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")  # an encoder without its head
    for model, begin in ((tiny["base"], "<|endoftext|>"), (str(tmp_path / "bert"), "[CLS]")):
        command_line(model, "--attention", "--text=Ben sings.", "--layer=1", "--head=2")
        (example,) = json.loads(Path(model, "attention.json").read_text())["maps"]
        (head,) = example["heads"]
        assert (head["layer"], head["head"], example["tokens"][0]) == (1, 2, begin)
        assert sum(head["weights"][-1]) == pytest.approx(1, abs=0.01)
        assert "".join(example["tokens"][1:]).lower().startswith("ben")
    with pytest.raises(SystemExit, match="is 160"):
        command_line(tiny["base"], "--attention", "--text=" + "nuts " * 200)


def test_streams_of_a_text_of_ones_own(tiny, tmp_path, monkeypatch, command_line):
    (tmp_path / "text.txt").write_text("Anna has 3 nuts. She buys 4 more.<|endoftext|>\n" * 600)
    monkeypatch.setattr(long_context, "ENDLESS", 50)
    words = "--streams", f"--tasks={tmp_path}/text.txt", "--context_length=16", "--limit=2"
    command_line(tiny["base"], *words)
    found = json.loads(Path(tiny["base"], "streams.json").read_text())
    assert len(found["perplexity"]) == 4 and found["endless"]["tokens"] == 50
    with pytest.raises(SystemExit, match="learned positions"):
        command_line(tiny["gpt2"], *words)
