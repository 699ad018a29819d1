"""Run folders in other programs: where they stop, what they name, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dpo
from data import Example, load_preferences, talk
from finetune import FinetuneConfig, finetune
from sft import SFTConfig, sft
from support.adapters import merge
from support.loading import load_model, resolve
from support.runs import TrainError, read_json
from support.tables import read_jsonl
from support.text_model import answer_task, label_order
from support.tokenizer_json import ForeignTokenizer
from tokenizer import EOT, SPECIAL_TOKENS, Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SMALL = dict(max_steps=1, batch_size=4, max_train_examples=16, eval_examples=4, warmup_steps=0, device="cpu")
SMALL |= dict(dtype="float32")


def ids_of(folder) -> tuple[int, int]:
    tokenizer = Tokenizer.load(folder)
    return tokenizer.special_id("<|end|>"), tokenizer.eot_id


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(read_json(file) | settings))


# -----------------------------------------------------------------------------
# Where to stop


def test_a_chat_run_says_where_its_turns_end_and_a_base_where_documents_do(tuned, tiny, tmp_path):
    end, eot = ids_of(tuned)
    expected = {"bos_token_id": eot, "eos_token_id": [end, eot], "pad_token_id": eot}
    config = read_json(Path(tuned, "config.json"))
    assert config.items() >= expected.items()
    assert read_json(Path(tuned, "generation_config.json")) == expected
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|end|>", EOT, EOT)
    assert tokenizer.model_max_length == config["max_position_embeddings"]
    load_model(tiny["base"], CPU).save(tmp_path)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == ids_of(tmp_path)[1]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token == EOT


def test_folders_of_before_still_load(tuned, tmp_path):
    old = shutil.copytree(tuned, tmp_path / "old")
    (old / "generation_config.json").unlink()
    change(old / "config.json", eos_token_id=ids_of(old)[1])
    model = load_model(str(old), CPU)
    assert model.chat and model.end == ids_of(old)[0]


# -----------------------------------------------------------------------------
# Refused: another vocabulary, pickled code


def test_the_tokenizer_of_another_vocabulary_is_refused_everywhere(tuned, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    pattern = Tokenizer.load(run).pattern
    Tokenizer({i: bytes([i]) for i in range(256)}, [], SPECIAL_TOKENS, pattern).save(tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):  # without the second run.json still knows
        shutil.copy(tmp_path / "other" / file, run)
        for backend in ("auto", "transformers"):
            with pytest.raises(ForeignTokenizer):
                load_model(str(run), CPU, backend)


def test_a_tokenizer_that_gained_tokens_elsewhere_is_no_foreign_one(tiny, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny["base"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path)  # with our hash of the smaller one in tokenizer_config.json
    assert "<|tool|>" in Tokenizer.load(tmp_path).special_ids


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("backend", ["auto", "transformers", "adapter"])
def test_pickled_code_is_never_run(tiny, adapter, tmp_path, backend, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(adapter if backend == "adapter" else tiny["base"], tmp_path / "run")
    weights = "adapter_model" if backend == "adapter" else "model"
    (folder / f"{weights}.safetensors").unlink()
    torch.save({"a": Evil()}, folder / f"{weights.removeprefix('model') or 'pytorch_model'}.bin")
    with pytest.raises((TrainError, FileNotFoundError), match="pickle") as error:
        load_model(str(folder), CPU, "transformers" if backend == "transformers" else "auto")
    assert "\n" not in str(error.value) and not Path("pwned").exists()


# -----------------------------------------------------------------------------
# Adapters and heads


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """A head for sentiment with LoRA on a run of ours, trained from a relative path."""
    home = tmp_path_factory.mktemp("adapter")
    load_model(tiny["base"], CPU).save(home / "out" / "base")
    how = dict(method="head", task="sentiment", lora_r=2, merge=True, context_length=96)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        finetune(FinetuneConfig(model="out/base", out="out", name="head", **how, **SMALL))
    return home / "out" / "head"


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    """A copy of the adapter, to be damaged."""
    return shutil.copytree(adapter, tmp_path / "head")


def test_peft_opens_an_adapter_from_any_folder(adapter, tmp_path, monkeypatch):
    import peft

    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec((adapter / "README.md").read_text().split("```python\n")[1].split("```")[0], found)
    of_the_card = {"model": found["model"], "tokenizer": found["tokenizer"]}
    for how in (of_the_card, {"model": str(adapter / "merged")}):
        pipe = transformers.pipeline("text-classification", **how)
        assert {answer["label"] for answer in pipe("It was fun.", top_k=None)} == {"bad", "good"}
    plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(adapter)
    texts = found["tokenizer"](["A film.", "A long and boring film."], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = [model(**texts).logits for model in (plain.eval(), found["model"].eval())]
    torch.testing.assert_close(*logits)


def test_the_base_of_an_adapter_is_found_where_the_runs_were_moved(adapter, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "out" / "base").mkdir(parents=True)  # of the same name, but no model
    monkeypatch.chdir(here)
    moved = shutil.copytree(adapter.parent, tmp_path / "elsewhere" / "out")
    file, base = moved / "head" / "adapter_config.json", moved / "base"
    for written in ("/nowhere/out/base", "out/base", "../base"):  # the others: by older runs, or PEFT
        change(file, base_model_name_or_path=written)
        assert Path(resolve(str(moved / "head")).base).resolve() == base
    monkeypatch.chdir(moved)
    assert Path(resolve("head").base).resolve() == base
    change(file, base_model_name_or_path="someone/model")
    with pytest.raises(TrainError, match="^someone/model is not a folder"):
        resolve("head")


def test_an_adapter_without_a_base_or_a_task_type(adapter, copy):
    base = str(adapter.parent / "base")
    change(copy / "run.json", parent=base)
    change(copy / "adapter_config.json", base_model_name_or_path=None, task_type=None)
    assert (resolve(str(copy)).base, resolve(str(copy)).kind) == (base, "head")
    (copy / "run.json").unlink()
    with pytest.raises(TrainError, match="names no base model"):
        load_model(str(copy), CPU)
    change(copy / "adapter_config.json", base_model_name_or_path=base, task_type="TOKEN_CLS")
    with pytest.raises(TrainError, match="TOKEN_CLS"):
        resolve(str(copy))


@pytest.mark.parametrize("settings, old, new, message", [
    ({}, "layers.1", "layers.7", "14 tensors are missing, such as .*layers.1"),
    ({"target_modules": ["q_proj"]}, "", "", "24 tensors are surplus, such as .*k_proj"),
    ({"use_dora": True}, "", "", "14 tensors are missing, such as .*magnitude"),
    ({"r": 3}, "", "", "size mismatch for .*lora_A"),
    ({"lora_alpha": None}, "", "", "lacks something or holds a wrong value"),
])  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_and_never_the_bare_base(copy, settings, old, new, message):
    file = copy / "adapter_model.safetensors"
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    change(copy / "adapter_config.json", **settings)
    with pytest.raises(TrainError, match=message) as error:
        load_model(str(copy), CPU)
    assert "\n" not in str(error.value)


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(adapter, copy):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    assert load_model(str(copy), CPU).tokenizer.hash == Tokenizer.load(adapter).hash


@pytest.mark.parametrize("names, order", [
    ({"0": "Good", "1": "bad"}, [1, 0]), (None, [0, 1]), ({0: "POSITIVE", 1: "NEGATIVE"}, [1, 0]),
    ({0: "LABEL_0", 1: "LABEL_1"}, [0, 1]),
])  # fmt: skip
def test_labels_are_matched_by_name(names, order):
    assert label_order(names, (" bad", " good")) == order


@pytest.mark.parametrize("names", [["cat", "dog"], ["bad", "good", "neutral"], ["good", "good"]])
def test_labels_of_another_task_are_refused(names):
    with pytest.raises(TrainError, match="head knows"):
        label_order(dict(enumerate(names)), (" bad", " good"))


def test_a_classifier_that_numbers_its_classes_otherwise_answers_the_same(adapter, tmp_path):
    folder = shutil.copytree(adapter / "merged", tmp_path / "turned")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = tensors["score.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", id2label={"0": "good", "1": "bad"}, label2id={"good": 0, "bad": 1})
    examples = [Example(text, "", 0) for text in ("The food was cold.", "I liked it.", "Never again!", "Ok.")]
    models = [load_model(str(f), CPU) for f in (adapter / "merged", folder)]
    outputs = [answer_task(model, "sentiment", examples)[0] for model in models]
    assert outputs[0] == outputs[1]
    how = dict(method="head", task="sentiment", context_length=96)
    finetune(FinetuneConfig(model=str(folder), out=str(tmp_path), name="on", **how, **SMALL))
    assert read_json(tmp_path / "on" / "run.json")["labels"] == ["good", "bad"]


def test_a_chat_adapter_and_its_merged_model_stop_with_the_turn(tiny, tmp_path):
    how = dict(model=tiny["base"], out=str(tmp_path), name="lora", data="arithmetic", lora_r=2)
    sft(SFTConfig(**how, **SMALL))
    end, eot = ids_of(tmp_path / "lora")
    merge(tmp_path / "lora")
    for folder in (tmp_path / "lora", tmp_path / "lora" / "merged"):
        generation = transformers.GenerationConfig.from_pretrained(folder)
        assert generation.eos_token_id == [end, eot] and generation.pad_token_id == eot
        assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == "<|end|>"


# -----------------------------------------------------------------------------
# Preferences


def test_pairs_are_messages_lone_answers_are_elsewhere_and_both_are_read_back(tmp_path):
    pairs = []
    for i in range(60):
        question = tuple(talk(f"How many apples are {i} apples?"))
        pairs.append(dpo.Pair([1], [2], [3], question, (f"#### {i}", f"#### {i + 1}")))
    alone = dpo.Pair([1], [2], None, tuple(talk("Alone?")), ("#### 1",))
    file, answers = tmp_path / "pairs.jsonl", tmp_path / "answers.jsonl"
    dpo.write_pairs(file, [*pairs, alone])
    dpo.write_answers(answers, [*pairs, alone])
    assert [row["completion"] for row in read_jsonl(answers)] == [
        [{"role": "assistant", "content": "#### 1"}]
    ]
    dpo.write_answers(answers, pairs)
    assert not answers.exists()
    assert set(read_jsonl(file)[3]) == {"prompt", "chosen", "rejected"}  # as TRL reads them
    read = load_preferences(str(file), "train")[0] + load_preferences(str(file), "validation")[0]
    known = {(json.dumps(p.messages), p.chosen, p.rejected) for p in read}
    assert 50 < len(known) <= 60
    assert known <= {(json.dumps(list(p.messages)), *p.texts) for p in pairs}
