"""Models of the hub that are built in another way than ours: tokenizers, templates, windows, heads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from data import TASKS, Example, talk
from dpo import DPOConfig
from finetune import AdaptConfig, FinetuneConfig, build_for_task, build_model
from sft import SFTConfig, can_pack, sft
from support.adapters import add_peft_lora, head_layers
from support.costs import shape_of
from support.hub_models import HubTokenizer, hf_context
from support.loading import load_model, load_tokenizer, resolve
from support.pairs import from_collection, without_first_exchange
from support.runs import TrainError, read_json
from support.text_model import answer_task
from support.tokenizer_json import ForeignTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CHATML = (
    "{% for message in messages %}{{'<|user|>' + message['role'] + '\n' + message['content'] + '<|end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def llama(folder: Path, tokenizer, config=transformers.LlamaConfig, **more) -> str:
    """A decoder of transformers with random weights, beside a tokenizer of its own."""
    torch.manual_seed(0)
    sizes = SIZE | dict(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=160)
    model = transformers.AutoModelForCausalLM.from_config(config(**sizes | more))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def renamed(tiny, special: str = "<|endoftext|>", **more):
    """The tokenizer of `tiny`, whose token between documents has another name, as Llama 3's has."""
    from tokenizers import Tokenizer as Library

    text = transformers.AutoTokenizer.from_pretrained(tiny["gpt2"]).backend_tokenizer.to_str()
    names = {"eos_token": special, "pad_token": special} | more
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Library.from_str(text.replace("<|endoftext|>", special)),
        **{name: token for name, token in names.items() if token},
    )


def templated(tiny, chat_template: str):
    tokenizer = renamed(tiny, "<|end_of_text|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def written(tmp_path, rows: list[dict]) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(read_json(file) | settings))


def tuned(model: str, tmp_path) -> str:
    rows = [{"prompt": f"Is {i} above {i % 7}?", "completion": "yes"} for i in range(80)]
    how = dict(model=model, out=str(tmp_path), name="sft", data=written(tmp_path, rows))
    how |= dict(batch_size=4, max_steps=1, warmup_steps=1, eval_every=0, save_every=0, eval_examples=4)
    sft(SFTConfig(device="cpu", dtype="float32", **how))
    return f"{tmp_path}/sft"


# ---- tokenizers


def test_a_run_is_read_back_by_the_tokenizer_that_it_was_trained_with(tiny, tmp_path):
    """Our Tokenizer could read the file, but only <|endoftext|> makes it one of ours: their hashes differ."""
    inner = templated(tiny, CHATML)
    run = tuned(llama(tmp_path / "m", inner), tmp_path)
    tokenizer = load_tokenizer(run)
    assert isinstance(tokenizer, HubTokenizer)
    assert tokenizer.hash == read_json(Path(run) / "run.json")["tokenizer"]
    inner.add_tokens(["another"])
    inner.save_pretrained(run)
    with pytest.raises(ForeignTokenizer, match="is not the tokenizer of this run"):
        load_tokenizer(run)


def test_a_tokenizer_without_an_end_of_text_is_refused_by_name(tiny, tmp_path):
    folder = llama(tmp_path / "m", renamed(tiny, "<|x|>", eos_token=None, pad_token=None))
    with pytest.raises(ValueError, match="has no token that ends a text"):
        load_model(folder, CPU)


def test_tokens_beyond_the_tokenizers_may_be_generated(tiny, tmp_path):
    """Qwen's and Pythia's embeddings have more rows than their tokenizers have tokens."""
    model = load_model(llama(tmp_path, renamed(tiny), vocab_size=480), CPU, "transformers")
    assert model.calculator(0, [479]) == []


def test_added_tokens_that_are_not_special_stay_text(tiny, tmp_path):
    """As the runs of spaces of CodeGen and Phi: transformers finds and decodes them."""
    inner = renamed(tiny)
    inner.add_tokens(["        ", "Gretel"])
    inner.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    text = "Gretel ran.\n        x = 1"
    ids = tokenizer.encode(text, allowed_special=())
    assert ids == inner(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    with pytest.raises(ValueError, match="no special token Gretel"):
        tokenizer.special_id("Gretel")


# ---- generation


@pytest.mark.parametrize("config, more", [
    (transformers.OPTConfig, dict(ffn_dim=32, word_embed_proj_dim=32)),
    (transformers.GPTNeoConfig, dict(attention_types=[[["global"], 2]])),
])  # fmt: skip
def test_learned_positions_end_a_text_at_the_context(config, more, tiny, tmp_path):
    model = load_model(llama(tmp_path, renamed(tiny), config, **more, max_position_embeddings=24), CPU)
    assert [len(new) for new in model.continuations([[5] * 4, [5]], 200)] == [20, 20]
    with pytest.raises(ValueError, match="leaves no room in context 24"):
        model.continuations([[5] * 24], 1)


def test_a_model_that_states_no_context_gets_1024_tokens():
    assert hf_context(transformers.MambaConfig()) == 1024


# ---- templates and rows


def test_of_several_chat_templates_the_default_one_is_used(tiny, tmp_path):
    """As a list with names, the older form on the hub."""
    folder = shutil.copytree(tiny["base"], tmp_path / "m")
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert load_model(str(folder), CPU).template == CHATML
    change(folder / "tokenizer_config.json", chat_template=5)
    with pytest.raises(TrainError, match="chat_template in its tokenizer_config.json must be a text"):
        load_model(str(folder), CPU)


def test_pairs_that_a_template_refuses_are_left_out(tiny, tmp_path):
    model = load_model(llama(tmp_path / "m", templated(tiny, NO_SYSTEM + CHATML)), CPU)
    rows = []
    for i in range(60):
        system = [{"role": "system", "content": "Be brief."}] * (i % 2)
        rows.append({"prompt": system + talk(f"Is {i} above {i % 7}?"), "chosen": "yes", "rejected": "no"})
    pairs, counts = from_collection(model, DPOConfig(data=written(tmp_path, rows)), "train")
    assert pairs and all(pair.messages[0]["role"] == "user" for pair in pairs)
    assert counts["left_out"] > 0


def test_a_conversation_that_is_cut_keeps_its_system_turn_and_begins_with_the_user():
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    assert without_first_exchange(turns) == [turns[0], turns[3]]
    assert without_first_exchange(turns[1:]) == [turns[3]]
    assert without_first_exchange(turns[:2]) == []


def test_a_template_that_opens_every_answer_with_a_thought_can_be_asked(tiny, tmp_path):
    """As DeepSeek-R1's: the prompt ends in <think>, which is not in the conversations that it renders."""
    thought = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
    model = load_model(llama(tmp_path / "m", templated(tiny, thought)), CPU)
    assert model.end == model.eos
    assert model.decode(model.reply_ids("yes")) == "yes"


# ---- packing


@pytest.mark.parametrize("config, more, expected", [
    (transformers.MistralConfig, dict(sliding_window=32), False),
    (transformers.MistralConfig, dict(sliding_window=4096), True),
    (transformers.Gemma2Config, dict(sliding_window=32, head_dim=8), False),  # in every other layer
    (transformers.LlamaConfig, {}, True),
    (transformers.BloomConfig, dict(n_layer=2, n_head=4), False),  # it knows no such mask
    (transformers.MambaConfig, dict(state_size=4), False),
])  # fmt: skip
def test_conversations_are_packed_only_where_the_model_keeps_them_apart(
    config, more, expected, tiny, tmp_path
):
    model = load_model(llama(tmp_path, renamed(tiny), config, **more), CPU, "transformers")
    assert can_pack(model) is expected
    assert shape_of(model.model.config).c.n_heads > 0


# ---- LoRA


HEADS = {
    "two layers": transformers.DistilBertConfig(vocab_size=400, dim=32, n_layers=1, n_heads=4, hidden_dim=48),
    "a pooler": transformers.DebertaV2Config(vocab_size=400, **SIZE),
    "classification_head": transformers.T5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_an_adapter_of_a_classifier_holds_all_of_its_new_layers(name, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_config(HEADS[name])
    head = tuple(f"{part}." for part in head_layers(model))
    new = {name for name, _ in model.named_parameters() if name.startswith(head)}
    assert new
    adapted = add_peft_lora(model, AdaptConfig(lora_r=2), "head")
    trained = " ".join(n for n, p in adapted.named_parameters() if p.requires_grad)
    assert "lora_A" in trained and all(name.split(".")[-2] in trained for name in new)
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert new <= {key.removeprefix("base_model.model.") for key in saved}


def test_lora_on_a_mixture_of_experts_trains_and_is_read_back(tiny, tmp_path):
    more = dict(num_local_experts=4, sliding_window=None)
    base = llama(tmp_path / "m", renamed(tiny), transformers.MixtralConfig, **more)
    model = build_model(SFTConfig(model=base, lora_r=2, device="cpu"), resolve(base))  # with lora_dropout
    model.save(tmp_path / "adapter")
    again, ids = load_model(str(tmp_path / "adapter"), CPU), torch.tensor([[1, 2, 3, 4]])
    found, want = (m.model.eval()(input_ids=ids).logits for m in (again, model))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_new_head_on_a_run_of_another_task_is_asked_its_own(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('{"settings": {"task": "dialogue"}}')
    folder = llama(tmp_path / "run", renamed(tiny))
    cfg = FinetuneConfig(model=folder, device="cpu", method="head")
    model = build_for_task(cfg, TASKS["sentiment"])
    assert len(answer_task(model, "sentiment", [Example("fine", " good", 1)])[0]) == 1


# ---- heads


def test_label2id_alone_names_the_classes(tiny, tmp_path):
    sizes = SIZE | dict(vocab_size=400, num_key_value_heads=2, num_labels=2, pad_token_id=0)
    head = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes))
    head.save_pretrained(tmp_path)
    renamed(tiny).save_pretrained(tmp_path)
    change(tmp_path / "config.json", label2id={"good": 0, "bad": 1}, id2label=None)
    assert load_model(str(tmp_path), CPU).model.config.id2label == {0: "good", 1: "bad"}
    change(tmp_path / "config.json", id2label=["bad", "good"])
    with pytest.raises(TrainError, match="config.json must have id2label as an object"):
        load_model(str(tmp_path), CPU)


# ---- damaged files


@pytest.mark.parametrize("text", ["null", "[" * 100_000, "", '{"settings": []}'])
def test_a_damaged_record_is_named(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TrainError, match="run.json is damaged"):
        read_json(tmp_path / "run.json")


def test_a_damaged_config_is_one_line(tiny, tmp_path):
    base = llama(tmp_path / "m", renamed(tiny))
    build_model(SFTConfig(model=base, lora_r=2, device="cpu"), resolve(base)).save(tmp_path / "a")
    damages = [("a/adapter_config.json", "alpha_pattern", None)]
    damages += [("a/adapter_config.json", "base_model_name_or_path", {})]
    for key in ("num_attention_heads", "vocab_size", "model_type"):
        damages += [("m/config.json", key, value) for value in ("x", [], 1e308)]
    for name, key, value in damages:
        file = tmp_path / name
        intact = file.read_text()
        change(file, **{key: value})
        with pytest.raises((ValueError, OSError)) as error:
            load_model(str(file.parent), CPU)
        assert "\n" not in str(error.value), (key, value)
        file.write_text(intact)
