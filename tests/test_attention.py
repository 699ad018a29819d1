"""Attention analysis: the weights are those of transformers for every kind of model."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import torch
import transformers

import eval as evaluation
from model import ModernDecoderLM
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


def test_flags_choose_heads():
    scores = {"previous": [[0.1, 0.9], [0.2, 0.3]], "first": [[0.5, 0.5], [0.5, 0.5]]}
    assert chosen_heads(scores, -1, -1) == [("previous", 0, 1), ("first", 0, 0)]
    assert chosen_heads(scores, 1, -1) == [("", 1, 0), ("", 1, 1)]
    assert chosen_heads(scores, -1, 1) == [("", 0, 1), ("", 1, 1)]
    assert chosen_heads(scores, 1, 0) == [("", 1, 0)]
    with pytest.raises(ValueError, match="--layer=2: the model has 2, from 0 to 1"):
        chosen_heads(scores, 2, -1)


def attended(monkeypatch, out: Path, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device=cpu", f"--out={out}", "--attention", *words])
    evaluation.main()


def test_maps_of_any_text_are_added_and_those_of_other_weights_go(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    model = ModernDecoderLM.from_pretrained(tiny["base"])
    model.save_pretrained(folder)
    Tokenizer.load(tiny["base"]).save(folder)
    for text, flags in (("Anna has 3 nuts.", ["--layer=1"]), ("Ben sings.", ["--layer=0", "--head=2"])):
        for _ in range(2):  # the same again: once
            attended(monkeypatch, tmp_path, str(folder), f"--text={text}", *flags)
    found = json.loads((folder / "attention.json").read_text())
    assert [[(h["layer"], h["head"]) for h in m["heads"]] for m in found["maps"]] == [
        [(1, 0), (1, 1), (1, 2), (1, 3)], [(0, 2)]
    ]  # fmt: skip
    assert "".join(found["maps"][1]["tokens"]) == "<|endoftext|>Ben sings."
    with torch.no_grad():
        model.model["layers"][0].self_attn.q_proj.weight.mul_(5)
    model.save_pretrained(folder)
    attended(monkeypatch, tmp_path, str(folder), "--text=Ben sings.", "--layer=0")
    assert len(json.loads((folder / "attention.json").read_text())["maps"]) == 1
    with pytest.raises(SystemExit, match="is 160 tokens, but the text has"):
        attended(monkeypatch, tmp_path, str(folder), "--text=" + "nuts " * 200)


def test_an_encoder_without_a_head_is_read(tiny, tmp_path, monkeypatch):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    config = transformers.BertConfig(**SMALL | {"vocab_size": len(tokens)}, intermediate_size=32)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    attended(monkeypatch, tmp_path, str(tmp_path / "bert"), "--text=the cat sat", "--layer=1", "--head=3")
    (example,) = json.loads((tmp_path / "bert" / "attention.json").read_text())["maps"]
    assert example["tokens"] == ["[CLS]", "the", "cat", "sat", "[SEP]"]
    (head,) = example["heads"]
    assert (head["layer"], head["head"]) == (1, 3) and sum(head["weights"][0]) == pytest.approx(1, abs=0.01)


def test_streams_of_a_run_of_ones_own(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("Anna has 3 nuts. She buys 4 more.<|endoftext|>\n" * 600)
    folder = tmp_path / "run"
    ModernDecoderLM.from_pretrained(tiny["base"]).save_pretrained(folder)
    Tokenizer.load(tiny["base"]).save(folder)
    monkeypatch.setattr(evaluation, "ENDLESS", 50)
    words = [str(folder), "--streams", f"--tasks={tmp_path}/text.txt", "--context_length=16", "--limit=2"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device=cpu", *words])
    evaluation.main()
    found = json.loads((folder / "streams.json").read_text())
    assert set(found["perplexity"]) == {"full", *(f"window, first {keep} kept" for keep in (0, 1, 4))}
    assert list(found["perplexity"]["full"]) == ["0-1", "1-2", "2-4", "4-8", "8-16"]
    assert len(found["attention to the first token"]) == 2 and found["endless"]["tokens"] == 50
    with pytest.raises(SystemExit, match="learned positions"):
        monkeypatch.setattr(sys, "argv", ["eval.py", tiny["gpt2"], *sys.argv[1:3], *words[1:]])
        evaluation.main()
