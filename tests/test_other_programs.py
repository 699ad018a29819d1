"""Run folders in other programs: where they stop, what they name, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import dpo
from data import Example, load_preferences
from finetune import FinetuneConfig, finetune
from support.adapters import merge
from support.loading import load_model, resolve
from support.runs import TrainError, read_json, read_jsonl
from support.text_model import answer_task, label_order
from support.tokenizer_json import ForeignTokenizer
from tokenizer import EOT, SPECIAL_TOKENS, Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def ids_of(folder) -> tuple[int, int]:
    tokenizer = Tokenizer.load(folder)
    return tokenizer.special_id("<|end|>"), tokenizer.eot_id


def change(file: Path, **settings) -> None:
    content = read_json(file)
    content.update(settings)
    file.write_text(json.dumps(content))


# -----------------------------------------------------------------------------
# Where to stop


def test_a_chat_run_says_where_its_turns_end(tuned):
    end, eot = ids_of(tuned)
    expected = {"bos_token_id": eot, "eos_token_id": [end, eot], "pad_token_id": eot}
    assert read_json(Path(tuned, "config.json")).items() >= expected.items()
    assert read_json(Path(tuned, "generation_config.json")) == expected
    generation = transformers.GenerationConfig.from_pretrained(tuned)
    assert generation.eos_token_id == [end, eot] and generation.pad_token_id == eot
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|end|>", EOT, EOT)
    context = read_json(Path(tuned, "config.json"))["max_position_embeddings"]
    assert tokenizer.model_max_length == context


def test_a_base_stops_at_the_end_of_a_document(tiny, tmp_path):
    load_model(tiny["base"], CPU).save(tmp_path)
    eot = ids_of(tmp_path)[1]
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == eot
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token == EOT


def test_transformers_pipeline_ends_with_the_turn(tuned):
    pipe = transformers.pipeline("text-generation", model=tuned, device="cpu")
    question = [
        {"role": "user", "content": "Anna has 3 nuts. She buys 4 more nuts. How many nuts has she now?"}
    ]
    new = pipe(question, max_new_tokens=90, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    end, _ = ids_of(tuned)
    prompt = Tokenizer.load(tuned).chat(question)
    answer = new[len(prompt) :]
    assert new[: len(prompt)] == prompt and answer.index(end) == len(answer) - 1 < 89
    ours = load_model(tuned, CPU).model.generate([prompt], 90, temperature=0, stop_tokens=[end])[0]
    assert answer == ours


def test_folders_of_before_still_load(tuned, tmp_path):
    old = shutil.copytree(tuned, tmp_path / "old")
    (old / "generation_config.json").unlink()
    change(old / "config.json", eos_token_id=ids_of(old)[1])
    change(old / "tokenizer_config.json", eos_token=EOT)
    model = load_model(str(old), CPU)
    assert model.chat and model.end == ids_of(old)[0]


# -----------------------------------------------------------------------------
# Refused: another vocabulary, pickled code


def test_the_tokenizer_of_another_vocabulary_is_refused_everywhere(tuned, tiny, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    tokenizer = Tokenizer.load(run)
    other = Tokenizer({i: bytes([i]) for i in range(256)}, [], SPECIAL_TOKENS, tokenizer.pattern)
    other.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", run)
    for backend in ("auto", "transformers"):
        with pytest.raises(ForeignTokenizer, match="not the tokenizer of this run"):
            load_model(str(run), CPU, backend)
    shutil.copy(tmp_path / "other" / "tokenizer_config.json", run)  # then run.json still knows
    with pytest.raises(ForeignTokenizer):
        load_model(str(run), CPU)


def test_a_tokenizer_that_gained_tokens_elsewhere_is_no_foreign_one(tiny, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny["base"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path)  # with our hash of the smaller one in tokenizer_config.json
    assert "<|tool|>" in Tokenizer.load(tmp_path).special_ids


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("backend", ["auto", "transformers"])
def test_pickled_code_is_never_run(tiny, tmp_path, backend, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(tiny["base"], tmp_path / "run")
    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises((TrainError, FileNotFoundError), match="pickle") as error:
        load_model(str(folder), CPU, backend)
    assert "\n" not in str(error.value) and not Path("pwned").exists()


def test_pickled_code_in_an_adapter_is_never_run(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(adapter, tmp_path / "run")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(TrainError, match="pickle"):
        load_model(str(folder), CPU)
    assert not Path("pwned").exists()


# -----------------------------------------------------------------------------
# Adapters and heads


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """A head for sentiment with LoRA on a run of ours, trained from a relative path."""
    home = tmp_path_factory.mktemp("adapter")
    (home / "out").mkdir()
    load_model(tiny["base"], CPU).save(home / "out" / "base")
    before = os.getcwd()
    os.chdir(home)
    try:
        small = dict(max_steps=2, batch_size=4, max_train_examples=16, max_eval_examples=8, eval_examples=8)
        cfg = FinetuneConfig(
            model="out/base", out="out", name="head", method="head", task="sentiment", **small
        )
        cfg.lora_r, cfg.device, cfg.dtype, cfg.merge, cfg.context_length = 2, "cpu", "float32", True, 96
        finetune(cfg)
    finally:
        os.chdir(before)
    return home / "out" / "head"


def test_peft_opens_an_adapter_from_any_folder(adapter, tmp_path, monkeypatch):
    import peft

    monkeypatch.chdir(tmp_path)
    base = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    assert Path(base).is_absolute() and base in (adapter / "README.md").read_text()
    card = (adapter / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]  # the model card's own lines
    found: dict = {}
    exec(code, found)
    pipe = transformers.pipeline("text-classification", model=found["model"], tokenizer=found["tokenizer"])
    assert {answer["label"] for answer in pipe("It was fun.", top_k=None)} == {"bad", "good"}
    plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(adapter)
    texts = found["tokenizer"](["A film.", "A long and boring film."], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = [model(**texts).logits for model in (plain.eval(), found["model"].eval())]
    torch.testing.assert_close(*logits)


def test_a_merged_head_has_names_for_its_classes(adapter):
    pipe = transformers.pipeline("text-classification", model=str(adapter / "merged"))
    assert {answer["label"] for answer in pipe(["It was fun.", "No."], top_k=None)[0]} == {"bad", "good"}


def test_the_base_of_an_adapter_is_found_where_the_runs_were_moved(adapter, tmp_path, monkeypatch):
    moved = shutil.copytree(adapter.parent, tmp_path / "elsewhere" / "out")
    file, base = moved / "head" / "adapter_config.json", str(moved / "base")
    change(file, base_model_name_or_path="/nowhere/out/base")
    assert resolve(str(moved / "head")).base == base
    for relative in ("out/base", "../base"):  # as older runs, or PEFT elsewhere, wrote it down
        change(file, base_model_name_or_path=relative)
        assert Path(resolve(str(moved / "head")).base).resolve() == Path(base)
    monkeypatch.chdir(moved)
    assert Path(resolve("head").base).resolve() == Path(base)
    change(file, base_model_name_or_path="someone/model")
    with pytest.raises(TrainError, match="^someone/model is not a folder"):
        resolve("head")
    model = load_model(str(adapter), CPU)
    assert model.kind == "head"


def test_an_adapter_without_a_base_or_a_task_type(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "head")
    change(folder / "run.json", parent=str(adapter.parent / "base"))
    change(folder / "adapter_config.json", base_model_name_or_path=None, task_type=None)
    assert resolve(str(folder)).base == str(adapter.parent / "base")
    assert resolve(str(folder)).kind == "head"
    (folder / "run.json").unlink()
    with pytest.raises(TrainError, match="names no base model"):
        load_model(str(folder), CPU)
    change(
        folder / "adapter_config.json",
        base_model_name_or_path=str(adapter.parent / "base"),
        task_type="TOKEN_CLS",
    )
    with pytest.raises(TrainError, match="TOKEN_CLS"):
        resolve(str(folder))


def test_labels_are_matched_by_name():
    task = (" bad", " good")
    assert label_order({0: "bad", 1: "good"}, task) == [0, 1]
    assert label_order({"0": "Good", "1": "bad"}, task) == [1, 0]
    assert label_order({0: "POSITIVE", 1: "NEGATIVE"}, task) == [1, 0]
    assert label_order({0: "LABEL_0", 1: "LABEL_1"}, task) == [0, 1]
    assert label_order(None, task) == [0, 1]
    for names in ({0: "cat", 1: "dog"}, {0: "bad", 1: "good", 2: "neutral"}, {0: "good", 1: "good"}):
        with pytest.raises(TrainError, match="head knows"):
            label_order(names, task)


def test_a_classifier_that_numbers_its_classes_otherwise_answers_the_same(adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapter / "merged", tmp_path / "turned")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = tensors["score.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", id2label={"0": "good", "1": "bad"}, label2id={"good": 0, "bad": 1})
    examples = [Example(text, "", 0) for text in ("The food was cold.", "I liked it.", "Never again!", "Ok.")]
    outputs = [
        answer_task(load_model(str(f), CPU), "sentiment", examples)[0] for f in (adapter / "merged", folder)
    ]
    assert outputs[0] == outputs[1]
    cfg = FinetuneConfig(model=str(folder), out=str(tmp_path), name="on", method="head", task="sentiment")
    cfg.max_steps, cfg.batch_size, cfg.max_train_examples, cfg.max_eval_examples = 1, 4, 8, 4
    cfg.device, cfg.eval_examples, cfg.context_length, cfg.warmup_steps = "cpu", 4, 96, 1
    finetune(cfg)
    assert read_json(tmp_path / "on" / "config.json")["id2label"] == {"0": "good", "1": "bad"}
    assert read_json(tmp_path / "on" / "run.json")["labels"] == ["good", "bad"]


def test_a_chat_adapter_and_its_merged_model_stop_with_the_turn(tiny, tmp_path):
    import sft

    cfg = sft.SFTConfig(model=tiny["base"], out=str(tmp_path), name="lora", data="arithmetic", lora_r=2)
    cfg.max_steps, cfg.batch_size, cfg.max_train_examples, cfg.eval_examples = 1, 4, 16, 4
    cfg.device, cfg.dtype, cfg.warmup_steps = "cpu", "float32", 1
    sft.sft(cfg)
    end, eot = ids_of(tmp_path / "lora")
    merge(tmp_path / "lora")
    for folder in (tmp_path / "lora", tmp_path / "lora" / "merged"):
        generation = transformers.GenerationConfig.from_pretrained(folder)
        assert generation.eos_token_id == [end, eot] and generation.pad_token_id == eot
        assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == "<|end|>"
    assert read_json(tmp_path / "lora" / "merged" / "config.json")["eos_token_id"] == [end, eot]


# -----------------------------------------------------------------------------
# Preferences


@pytest.fixture
def pairs() -> list[dpo.Pair]:
    found = []
    for i in range(60):
        question = ({"role": "user", "content": f"How many apples are {i} apples?"},)
        answers = (f"#### {i}", f"#### {i + 1}")
        found.append(dpo.Pair([1], [2], [3], question, answers))
    return [*found, dpo.Pair([1], [2], None, ({"role": "user", "content": "Alone?"},), ("#### 1",))]


def test_pairs_are_messages_and_lone_answers_are_elsewhere(pairs, tmp_path):
    dpo.write_pairs(tmp_path / "pairs.jsonl", pairs)
    dpo.write_answers(tmp_path / "answers.jsonl", pairs)
    rows = read_jsonl(tmp_path / "pairs.jsonl")
    assert len(rows) == 60 and all(row.keys() == {"prompt", "chosen", "rejected"} for row in rows)
    assert rows[3] == {
        "prompt": [{"role": "user", "content": "How many apples are 3 apples?"}],
        "chosen": [{"role": "assistant", "content": "#### 3"}],
        "rejected": [{"role": "assistant", "content": "#### 4"}],
    }
    (alone,) = read_jsonl(tmp_path / "answers.jsonl")
    assert alone["completion"] == [{"role": "assistant", "content": "#### 1"}]
    dpo.write_answers(tmp_path / "answers.jsonl", pairs[:60])
    assert not (tmp_path / "answers.jsonl").exists()


def test_pairs_are_read_back_as_they_were(pairs, tmp_path):
    dpo.write_pairs(tmp_path / "pairs.jsonl", pairs)
    file = str(tmp_path / "pairs.jsonl")
    read = load_preferences(file, "train")[0] + load_preferences(file, "validation")[0]
    known = {(json.dumps(p.messages), p.chosen, p.rejected) for p in read}
    assert 50 < len(known) <= 60
    assert known <= {(json.dumps(list(p.messages)), *p.texts) for p in pairs[:60]}
