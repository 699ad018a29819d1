"""Attention analysis: the weights are those of transformers for every kind of model."""

import json
import os
import sys
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
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def weights_of(model, ids, **inputs) -> torch.Tensor:
    """transformers' own answer."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(model(input_ids=ids, output_attentions=True, **inputs).attentions)


@pytest.mark.parametrize("which", ["base", "gpt2"])
def test_our_weights_are_those_of_transformers(which, tiny):
    """A Llama with grouped keys, and a GPT-2, computed by model.py."""
    ids = torch.randint(400, (2, 12))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny[which]).eval()
    ours = attention_weights(ModernDecoderLM.from_pretrained(tiny[which]).eval(), ids)
    torch.testing.assert_close(ours, weights_of(theirs, ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(attention_weights(theirs, ids), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sinks", [0, 1])
def test_attention_weights_are_shares_of_what_may_be_seen(sinks):
    torch.manual_seed(0)
    shape = dict(vocab_size=20, context_length=16, n_layers=2, d_model=16, n_heads=2, d_ff=16)
    model = ModernDecoderLM(ModelConfig(**shape, n_sinks=sinks)).eval()
    w = attention_weights(model, torch.randint(20, (3, 9)))
    assert w.shape == (2, 3, 2, 9, 9) and (w.triu(1) == 0).all()
    total = w.sum(-1)
    assert (total < 1).all() if sinks else torch.allclose(total, torch.ones_like(total), atol=1e-5)


def test_encoders_look_both_ways_and_adapters_count(tiny):
    ids = torch.randint(400, (2, 10))
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=32)).eval()
    w = attention_weights(bert, ids)
    assert w.shape == (2, 2, 4, 10, 10) and (w.triu(1) > 0).any()
    torch.testing.assert_close(w, weights_of(bert, ids))
    assert (head_scores(bert, length=8)["entropy"] <= 1).all()
    shape = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2, "d_ff": 32}
    config = transformers.T5Config(vocab_size=400, decoder_start_token_id=0, **shape)
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    torch.testing.assert_close(attention_weights(t5, ids), weights_of(t5.get_encoder(), ids))
    gpt2 = transformers.AutoModelForCausalLM.from_pretrained(tiny["gpt2"]).eval()
    before = attention_weights(gpt2, ids)
    settings = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
    tuned = peft.get_peft_model(gpt2, settings).eval()
    assert (attention_weights(tuned, ids) - before).abs().max() > 1e-3


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
    config = ModelConfig(vocab_size=20, context_length=16, n_layers=1, d_model=16, n_heads=4, d_ff=16)
    scores = head_scores(ModernDecoderLM(config), rows=2, length=4)
    for head, name in enumerate(("previous", "first", "induction", "entropy")):
        assert scores[name].argmax() == head and scores[name][0, head] == pytest.approx(1, abs=1e-5)
    assert scores["entropy"][0, :3].max() < 1e-6


def test_copied_digits_are_counted_where_they_are_repeated():
    class Echo(torch.nn.Module):  # says what followed the same byte before; else a newline
        def forward(self, ids):
            logits, seen = torch.zeros(1, ids.shape[1], 300), ids[0].tolist()
            for t, i in enumerate(seen):
                logits[0, t, seen[seen.index(i) + 1] if i in seen[:t] else 10] = 1
            return logits

    encode, decode = lambda text: list(text.encode()), lambda ids: chr(ids[0])  # noqa: E731
    model = SimpleNamespace(
        model=Echo(), eos=299, device="cpu", context_length=999, encode=encode, decode=decode
    )
    assert attending.copied_digits(model, [("a1 b2", "a1 b2"), ("a1", "a1")]) == 1
    assert attending.copied_digits(model, [("a1 b2", "b1 a2 x3"), ("a4", "a4")]) == 0.25
    found = attending.copying(model, seed=1, n=20)
    assert set(found) == {"facts", "lists"} and all(0 < accuracy < 1 for accuracy in found.values())


def test_flags_choose_heads():
    scores = {"previous": [[0.1, 0.9], [0.2, 0.3]], "first": [[0.5, 0.5], [0.5, 0.5]]}
    assert chosen_heads(scores, -1, -1) == [("previous", 0, 1), ("first", 0, 0)]
    assert chosen_heads(scores, 1, -1) == [("", 1, 0), ("", 1, 1)]
    assert chosen_heads(scores, -1, 1) == [("", 0, 1), ("", 1, 1)]
    assert chosen_heads(scores, 1, 0) == [("", 1, 0)]
    with pytest.raises(ValueError, match="--layer=2: the model has 2, from 0 to 1"):
        chosen_heads(scores, 2, -1)


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["eval.py", "--device=cpu", f"--out={tmp_path}", *words])
        evaluation.main()

    return run


@pytest.fixture
def run(tiny, tmp_path):
    """A folder with the tiny base, and the base itself."""
    model = ModernDecoderLM.from_pretrained(tiny["base"])
    model.save_pretrained(tmp_path / "run")
    Tokenizer.load(tiny["base"]).save(tmp_path / "run")
    return tmp_path / "run", model


def test_maps_of_any_text_are_added_and_those_of_other_weights_go(run, command_line):
    folder, model = run
    words = str(folder), "--attention"
    for text, flags in (("Anna has 3 nuts.", ["--layer=1"]), ("Ben sings.", ["--layer=0", "--head=2"])):
        for _ in range(2):  # the same again: once
            command_line(*words, f"--text={text}", *flags)
    found = json.loads((folder / "attention.json").read_text())["maps"]
    heads = [[(head["layer"], head["head"]) for head in example["heads"]] for example in found]
    assert heads == [[(1, 0), (1, 1), (1, 2), (1, 3)], [(0, 2)]]
    assert "".join(found[1]["tokens"]) == "<|endoftext|>Ben sings."
    with torch.no_grad():
        model.model["layers"][0].self_attn.q_proj.weight.mul_(5)
    model.save_pretrained(folder)
    command_line(*words, "--text=Ben sings.", "--layer=0")
    assert len(json.loads((folder / "attention.json").read_text())["maps"]) == 1
    with pytest.raises(SystemExit, match="is 160"):
        command_line(*words, "--text=" + "nuts " * 200)


def test_an_encoder_without_a_head_is_read(tmp_path, command_line):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    config = transformers.BertConfig(**SMALL | {"vocab_size": len(tokens)}, intermediate_size=32)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    command_line(str(tmp_path / "bert"), "--attention", "--text=the cat sat", "--layer=1", "--head=3")
    (example,) = json.loads((tmp_path / "bert" / "attention.json").read_text())["maps"]
    assert example["tokens"] == ["[CLS]", "the", "cat", "sat", "[SEP]"]
    (head,) = example["heads"]
    assert (head["layer"], head["head"]) == (1, 3) and sum(head["weights"][0]) == pytest.approx(1, abs=0.01)


def test_streams_of_a_run_of_ones_own(tiny, run, tmp_path, monkeypatch, command_line):
    (tmp_path / "text.txt").write_text("Anna has 3 nuts. She buys 4 more.<|endoftext|>\n" * 600)
    monkeypatch.setattr(long_context, "ENDLESS", 50)
    words = "--streams", f"--tasks={tmp_path}/text.txt", "--context_length=16", "--limit=2"
    command_line(str(run[0]), *words)
    found = json.loads((run[0] / "streams.json").read_text())
    assert set(found["perplexity"]) == {"full", *(f"window, first {keep} kept" for keep in (0, 1, 4))}
    assert list(found["perplexity"]["full"]) == ["0-1", "1-2", "2-4", "4-8", "8-16"]
    assert len(found["attention to the first token"]) == 2 and found["endless"]["tokens"] == 50
    with pytest.raises(SystemExit, match="learned positions"):
        command_line(tiny["gpt2"], *words)
