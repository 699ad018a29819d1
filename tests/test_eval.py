"""Evaluation: every token once, the same numbers from every backend and every time, honest comparisons."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import transformers

import eval as evaluation
import support.attention as attending
from data import TASKS, load_task
from eval import EvalConfig, Result, compare, contamination, evaluate, evaluate_text, ngrams, trained_on
from finetune import FinetuneConfig, finetune
from model import ModelConfig, ModernDecoderLM
from support.loading import load_model
from support.runs import read_json, read_jsonl
from support.text_model import TextModel
from tasks.mistakes import review_kinds
from tasks.stories import storyworld
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

ROOT = Path(evaluation.__file__).parent
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A run folder as train.py leaves it, with random weights."""
    folder = tmp_path_factory.mktemp("out") / "base"
    texts = [*storyworld("train", 60), *(e.text + e.target for e in load_task("arithmetic", "train")[0][:60])]
    vocab, merges = train_bpe(texts, 400, SPECIAL_TOKENS)
    tokenizer = Tokenizer(vocab, merges, SPECIAL_TOKENS)
    torch.manual_seed(0)
    model = ModernDecoderLM(ModelConfig(n_layers=2, d_model=32, n_heads=4, context_length=96, vocab_size=448))
    model.save_pretrained(folder, bos_token_id=tokenizer.eot_id, eos_token_id=tokenizer.eot_id)
    tokenizer.save(folder)
    (folder / "run.json").write_text(json.dumps({"settings": {"corpus": "storyworld"}, "parent": None}))
    return str(folder)


@pytest.fixture(scope="module")
def tuned(base) -> str:
    """A classification head on it, after a smoke run."""
    cfg = FinetuneConfig(model=base, task="sentiment", method="head", out=str(Path(base).parent), name="head")
    cfg.device, cfg.max_steps, cfg.max_train_examples, cfg.max_eval_examples = "cpu", 2, 20, 4
    cfg.eval_examples, cfg.dtype = 4, "float32"
    finetune(cfg)
    return str(Path(base).parent / "head")


def test_a_checkpoint_of_an_adapter_is_measured_as_its_run_is(tuned, monkeypatch, capsys):
    """Its folder holds no record: what it was tuned on, and that it is no chat model, the run's says."""
    shutil.copytree(
        tuned, Path(tuned) / "checkpoints" / "step-9", ignore=lambda *_: ["checkpoints", "run.json"]
    )
    checkpoint = f"{tuned}/checkpoints/step-9"
    command_line(monkeypatch, capsys, tuned, checkpoint, "--tasks=sentiment", "--limit=40")
    one, other = (read_json(Path(f) / "results.json")["results"]["sentiment test 0-shot"]["metrics"]
                  for f in (tuned, checkpoint))  # fmt: skip
    assert one == other
    shutil.rmtree(Path(tuned) / "checkpoints" / "step-9")


def command_line(monkeypatch, capsys, *words: str) -> tuple[int | str, str]:
    """Runs eval.py's main in this process; its exit code or last message, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device=cpu", *words])
    with pytest.raises(SystemExit) as exit:
        evaluation.main()
        raise SystemExit(0)
    return exit.value.code, capsys.readouterr().out


# -----------------------------------------------------------------------------
# Perplexity


class Rows(TextModel):
    """Notes which windows are asked for."""

    def log_likelihoods(self, rows, progress=""):
        self.rows = rows
        return super().log_likelihoods(rows, progress)


@pytest.mark.parametrize("stride", [0, 1, 7, 96])
@pytest.mark.parametrize("n_texts", [1, 3])
def test_windows_predict_every_token_once_with_the_context_they_promise(base, stride, n_texts):
    tokenizer = Tokenizer.load(base)
    model = Rows(ModernDecoderLM.from_pretrained(base), tokenizer, "causal")
    texts = list(storyworld("test", n_texts))
    evaluate_text(model, texts, stride, running_text=True)
    ids = [tokenizer.eot_id]
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.eot_id]
    at = 1
    for i, (prompt, new) in enumerate(model.rows):
        assert new == ids[at : at + len(new)] and prompt == ids[at - len(prompt) : at]
        assert len(prompt) + len(new) - 1 <= 96
        if i:
            assert len(new) <= (stride or 48) and len(prompt) + len(new) - 1 == 96
        at += len(new)
    assert at == len(ids)


def test_perplexity_and_bits_per_byte_are_those_of_a_plain_loop(base):
    """Second opinion: transformers, one window after another, as its documentation shows."""
    texts, stride, T = list(storyworld("test", 2)), 30, 96
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    nats, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(f"<|endoftext|>{text}<|endoftext|>", return_tensors="pt")["input_ids"]
        known, end = 1, 0
        while known < ids.shape[1]:
            end = min(T, ids.shape[1] - 1) if known == 1 else min(end + stride, ids.shape[1] - 1)
            window = ids[:, max(0, end - T) : end + 1]
            labels = window.clone()
            labels[:, : -(end + 1 - known)] = -100
            with torch.no_grad():
                nats += model(window, labels=labels).loss.item() * (end + 1 - known)
            known = end + 1
        tokens += ids.shape[1] - 1
    for backend in ("ours", "transformers"):
        found = evaluate_text(load_model(base, CPU, backend), texts, stride)
        assert found["loss"]["value"] == pytest.approx(nats / tokens, rel=1e-4)
        assert found["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
        n_bytes = len("".join(texts).encode())
        assert found["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)
        words = sum(len(t.split()) + t.count("\n") for t in texts)
        assert math.log(found["word_perplexity"]["value"]) == pytest.approx(nats / words, rel=1e-3)
        for metric in found.values():
            assert metric["low"] <= metric["value"] <= metric["high"] and metric["n"] == tokens


def test_one_window_equals_what_training_reports(base):
    """With stride = context and a text that fits, train.py's validation loss is the same number."""
    from train import evaluate_lm

    text = next(storyworld("test", 1))[:120]
    tokenizer = Tokenizer.load(base)
    ids = np.array([tokenizer.eot_id, *tokenizer.encode(text), tokenizer.eot_id])
    assert len(ids) < 96
    theirs = evaluate_lm(ModernDecoderLM.from_pretrained(base), ids, 96, 4, len(text.encode()))
    ours = evaluate_text(load_model(base, CPU), [text], 96)
    assert ours["loss"]["value"] == pytest.approx(theirs["val_loss"], rel=1e-5)
    assert ours["bits_per_byte"]["value"] == pytest.approx(theirs["bits_per_byte"], rel=1e-5)


def test_every_document_is_scored_by_itself_and_a_long_one_in_windows(base):
    model = Rows(ModernDecoderLM.from_pretrained(base), Tokenizer.load(base), "causal")
    short = ["The fox slept.", "It was a long way home."]
    long, longer = storyworld("test", 2)
    about = {}
    evaluate_text(model, [short[0], long, longer, short[1]], 48, about=about)
    assert about == {"stride": 48, "documents_alone": 2, "documents_in_windows": 2}
    first, *_, last = model.rows
    assert first == (model.bos, [*model.encode(short[0]), model.eos])
    assert last == (model.bos, [*model.encode(short[1]), model.eos])
    starts = [prompt + new for prompt, new in model.rows if prompt == model.bos]
    assert [ids[:97] for ids in starts[1:3]] == [(model.bos + model.encode(t))[:97] for t in (long, longer)]
    assert not any(model.eos in new[:-1] or model.eos in prompt[1:] for prompt, new in model.rows)


def test_a_document_costs_the_same_whatever_it_is_measured_with(base):
    model, texts = load_model(base, CPU), ["The fox slept.", *storyworld("test", 2), "Then it rained."]
    nats = 0.0
    for text in texts:
        loss = evaluate_text(model, [text])["loss"]
        nats += loss["value"] * loss["n"]
    together = evaluate_text(model, texts)["loss"]
    assert together["value"] * together["n"] == pytest.approx(nats, rel=1e-5)


def test_pieces_of_a_running_text_are_joined(base):
    model = Rows(ModernDecoderLM.from_pretrained(base), Tokenizer.load(base), "causal")
    about = {}
    evaluate_text(model, ["The fox slept.", "Then it rained."], running_text=True, about=about)
    assert len(model.rows) == 1 and about["documents_in_windows"] == 2 and about["documents_alone"] == 0


def test_a_file_is_measured_and_its_rows_without_text_are_counted(base, tmp_path, monkeypatch, capsys):
    rows = [{"text": f"The goat {i} ate a pear. \ud83d"} for i in range(60)] + [{"text": None}, {"text": " "}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    model = shutil.copytree(base, tmp_path / "base")
    code, printed = command_line(monkeypatch, capsys, str(model), f"--tasks={file}")
    assert code == 0 and "documents alone: 3, in windows: 0" in printed and "2 rows without text" in printed


# -----------------------------------------------------------------------------
# The same numbers


def test_a_second_evaluation_and_another_backend_give_the_same_results(base, monkeypatch, capsys):
    words = (base, "--tasks=sentiment,arithmetic,storyworld", "--shots=0,2", "--limit=12")
    found = []
    for backend in ("ours", "ours", "transformers"):
        code, _ = command_line(monkeypatch, capsys, *words, f"--backend={backend}")
        assert code == 0
        results = read_json(Path(base) / "results.json")["results"]
        answers = {p.name: p.read_text() for p in sorted((Path(base) / "answers").iterdir())}
        found.append(({k: r["metrics"] for k, r in results.items()}, answers))
        assert {r["backend"] for r in results.values()} == {backend}
    assert found[0] == found[1]
    assert list(found[0][0]) == [
        "sentiment test 0-shot", "sentiment test 2-shot", "arithmetic test 0-shot",
        "arithmetic test 2-shot", "storyworld test 0-shot",
    ]  # fmt: skip
    for name, metrics in found[0][0].items():
        for metric, value in metrics.items():
            assert found[2][0][name][metric]["value"] == pytest.approx(value["value"], rel=1e-4), (
                name,
                metric,
            )
    assert found[0][1] == found[2][1]


def test_results_of_other_tasks_stay_and_every_answer_is_written(base, monkeypatch, capsys):
    command_line(monkeypatch, capsys, base, "--tasks=sentiment", "--limit=30")
    command_line(monkeypatch, capsys, base, "--tasks=dialogue", "--limit=5", "--split=validation")
    results = read_json(Path(base) / "results.json")["results"]
    assert {"sentiment test 0-shot", "dialogue validation 0-shot"} <= results.keys()
    entry = results["sentiment test 0-shot"]
    assert entry["items"] == 30 and entry["of"] == 1000 and entry["data"]["fingerprint"]
    assert {
        "git",
        "versions",
        "hardware",
        "backend",
        "context_length",
        "seed",
        "majority_class",
    } <= entry.keys()
    answers = read_jsonl(Path(base) / "answers" / "sentiment-test-0-shot.jsonl")
    wrong = read_jsonl(Path(base) / "answers" / "sentiment-test-0-shot-wrong.jsonl")
    assert len(answers) == 30 and wrong == [a for a in answers if not a["correct"]]
    assert entry["metrics"]["accuracy"]["value"] == pytest.approx(1 - len(wrong) / 30)
    assert all(
        a["kinds"] == review_kinds(a["text"]) and 0.5 <= a["sure"] <= 1 for a in answers
    )  # of two classes


def test_a_limit_takes_items_by_seed_says_so_and_widens_the_interval(base, monkeypatch, capsys):
    widths, picked = [], []
    for more in (["--limit=20"], ["--limit=20", "--seed=2"], ["--limit=300"]):
        _, said = command_line(monkeypatch, capsys, base, "--tasks=sentiment", *more)
        assert "a sample of 1,000, seed" in said
        metric = read_json(Path(base) / "results.json")["results"]["sentiment test 0-shot"]["metrics"][
            "accuracy"
        ]
        widths.append(metric["high"] - metric["low"])
        picked.append([a["text"] for a in read_jsonl(Path(base) / "answers/sentiment-test-0-shot.jsonl")])
    assert picked[0] != picked[1] and len(picked[0]) == 20
    assert widths[2] < widths[0]


# -----------------------------------------------------------------------------
# Comparisons


def made_up(task: str, correct: list[bool], shots=0) -> Result:
    return Result({"task": task, "split": "test", "shots": shots}, [{"correct": c} for c in correct])


def test_models_are_compared_on_the_items_that_both_answered():
    a, b = [True] * 10 + [False] * 30, [True] * 35 + [False] * 5
    (line,) = compare([("base", [made_up("sst2", a)]), ("tuned", [made_up("sst2", b)])])
    assert (
        line.startswith("sst2 test 0-shot: tuned minus base (0-shot) +62.5 [") and "no difference" not in line
    )
    (line,) = compare([("base", [made_up("sst2", a)]), ("twin", [made_up("sst2", a)])])
    assert "+0.0 [+0.0, +0.0] (no difference found)" in line
    three = compare([(name, [made_up("sst2", x)]) for name, x in (("base", a), ("sft", b), ("dpo", a))])
    assert [line.split(": ")[1].split(" (")[0] for line in three] == [
        "sft minus base", "dpo minus base", "dpo minus sft",
    ]  # fmt: skip
    assert compare([("base", [made_up("sst2", a)]), ("other", [made_up("gsm8k", b)])]) == []
    assert compare([("base", [made_up("sst2", a)]), ("other", [made_up("sst2", b[:-1])])]) == []


def test_a_head_is_asked_its_own_task_without_examples_and_a_smoke_run_is_called_one(
    base, tuned, monkeypatch, capsys
):
    code, said = command_line(
        monkeypatch,
        capsys,
        base,
        tuned,
        "--tasks=sentiment,arithmetic,storyworld",
        "--limit=8",
        "--shots=0,1",
    )
    assert code == 0
    head = said[said.index(f"{tuned}:") :]
    assert "SMOKE RUN, no result" in head and "SMOKE" not in said[: said.index(f"{tuned}:")]
    assert "takes no examples" in head and "cannot be asked arithmetic" in head
    assert "perplexity of a text is for decoders" in head
    assert "minus" in head
    assert read_json(Path(tuned) / "results.json")["results"]["sentiment test 0-shot"]["smoke"] is True


def test_calibration_is_recorded_apart(base, monkeypatch, capsys):
    command_line(monkeypatch, capsys, base, "--tasks=sentiment", "--limit=8", "--calibrate")
    results = read_json(Path(base) / "results.json")["results"]
    assert results["sentiment test 0-shot calibrated"]["calibrated"]


def test_prompts_that_are_too_long_are_counted(base):
    cfg = EvalConfig(limit=6)
    result = evaluate(load_model(base, CPU), "arithmetic", 3, cfg)  # half of its 96 tokens are the answer's
    assert result.entry["shots_dropped"] + result.entry["cut"] == 6
    assert any("long" in line or "room" in line for line in evaluation.describe(result.entry))


# -----------------------------------------------------------------------------
# Contamination


def test_items_that_stand_in_the_training_text_are_found():
    items = ["The quick brown fox jumps over the lazy dog.", "a b c d", "one two three four five six"]
    found = contamination(
        items, ["", "... The QUICK, brown fox jumps over the... One two three; four five."], 5
    )
    assert found["items"] == 2 and found["checked"] == 2 and found["too_short"] == 1
    assert found["share"] == pytest.approx((3 + 1) / (5 + 2))
    assert contamination(items, ["quick brown fox the lazy dog"], 5)["items"] == 0
    assert ngrams("It's 3 o'clock", 3) == {"it s 3", "s 3 o", "3 o clock"}


def test_what_a_run_was_trained_on_is_followed_to_its_first_parent(base, tuned, monkeypatch, tmp_path):
    assert trained_on(base) == [("corpus", "storyworld")]
    assert trained_on(tuned) == [("task", "sentiment"), ("corpus", "storyworld")]
    assert trained_on("gpt2") == []
    record = {"stage": "sft", "settings": {"data": "arithmetic@20:3,storyworld:1"}, "parent": base}
    (tmp_path / "run.json").write_text(json.dumps(record))
    stories = ("corpus", "storyworld")
    assert trained_on(str(tmp_path)) == [("task", "arithmetic"), stories, stories]
    monkeypatch.setattr(
        evaluation, "documents", lambda name, split: [load_task("sentiment", "test")[0][0].text]
    )
    cfg = EvalConfig(contamination=4, limit=0)
    found = evaluate(load_model(base, CPU), "sentiment", 0, cfg).entry["contamination"]
    assert found["items"] >= 1 and found["sources"] == ["corpus storyworld"]


# -----------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tasks=sst3"], '"sst3" is no task, corpus or file; there are sst2'),
        (["--shots=many"], "--shots=many must be whole numbers"),
        (["out/nowhere"], "there is no folder out/nowhere"),
        (["--stride=97", "--tasks=storyworld", "--limit=2"], "--stride=97 must be from 1 to"),
        (["--split=dev"], 'no split "dev"'),
        (["--shots=0,-1"], "--shots=0,-1 must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_by_name(base, monkeypatch, capsys, words, message):
    models = [] if any(w.startswith("out/") for w in words) else [base]
    assert message in str(command_line(monkeypatch, capsys, *models, *words)[0])


@pytest.mark.parametrize(
    "word", "limit=-1 samples=-1 battery=-5 contamination=-8 seed=-1 temperature=nan".split()
)
def test_numbers_that_mean_nothing_are_refused_by_name(base, monkeypatch, capsys, word):
    monkeypatch.setattr(sys, "argv", ["eval.py", base, f"--{word}"])
    with pytest.raises(SystemExit) as stop:
        evaluation.main()
    assert stop.value.code == 2 and f"--{word.split('=')[0]}" in capsys.readouterr().err


def test_a_folder_that_is_no_model_says_so(tmp_path, monkeypatch, capsys):
    assert "neither config.json nor" in command_line(monkeypatch, capsys, str(tmp_path))[0]


def test_every_task_is_explained_in_help():
    done = subprocess.run([sys.executable, "eval.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in TASKS)


# -----------------------------------------------------------------------------
# test-time compute


def test_votes_and_choices_on_samples_made_by_hand():
    from support.metrics import best_of, gate, majority, weighted_vote

    assert best_of([0.1, 0.9, 0.9]) == 1 and best_of([]) is None
    assert weighted_vote(["a", "b", "a"], [0.3, 0.5, 0.3]) == "a" != majority(["b", "b", "a"])
    assert weighted_vote(["a", "b", None], [0.3, 0.5, 9.0]) == "b"
    assert weighted_vote([None, None], [1, 1]) is None
    assert gate([0.2, 0.6, 0.9], 0.5) == (1, 2)
    assert gate([0.2, 0.6, 0.4], 0.99) == (1, 3)
    assert gate([0.9], 0.5) == (0, 1)


@pytest.mark.parametrize("text, fine", [
    ("3*4=<<3*4=12>>12\n#### 12", True), ("<<3*4=13>>13\n#### 13", False), ("<<3*4=12>>12\n#### 13", False),
    ("#### 12", False), ("<<3*(=12>>\n#### 12", False), ("<<5/2=2.5>>2.5\n#### 2.5", True),
    ("<<3-3=>>\n#### 0", False), ("<<3*4=>>", False), ("<<=12>>\n#### 12", False), ("", False),
])  # fmt: skip
def test_a_calculator_confirms_a_solution(text, fine):
    from tasks.calculator import calculates

    assert calculates(text) is fine


def test_samples_are_cached_and_more_of_them_begin_with_the_same(tiny, monkeypatch):
    from data import load_task
    from support.loading import load_model
    from support.text_model import sample_answers

    model = load_model(tiny["base"], torch.device("cpu"))
    examples = load_task("arithmetic", "test")[0][:5]
    four = sample_answers(model, "arithmetic", "test", examples, 4, seed=3)
    two = sample_answers(model, "arithmetic", "test", examples, 2, seed=3)
    assert [some[:2] for some in four] == two and len({a for some in four for a in some}) > 5
    other = sample_answers(model, "arithmetic", "test", examples, 2, seed=4)
    assert other != two
    monkeypatch.setattr(model, "generate", lambda *a: pytest.fail("sampled again"))
    assert sample_answers(model, "arithmetic", "test", examples, 4, seed=3) == four
    with pytest.raises(pytest.fail.Exception):
        sample_answers(model, "arithmetic", "test", examples[:3], 4, seed=3)


@pytest.mark.parametrize("damage", ["a row is missing", "another order", "fewer samples", "not UTF-8"])
def test_a_cache_that_does_not_hold_these_questions_is_made_anew(tiny, tmp_path, damage):
    from support.text_model import sample_answers

    shutil.copytree(tiny["base"], tmp_path / "base", ignore=shutil.ignore_patterns("samples"))
    model = load_model(str(tmp_path / "base"), CPU)
    examples = load_task("arithmetic", "test")[0][:3]
    # str.splitlines() would cut this row in two
    examples[1] = replace(examples[1], text=examples[1].text + "\u2028How many\x85?")
    first = sample_answers(model, "arithmetic", "test", examples, 2)
    (file,) = (tmp_path / "base" / "samples").iterdir()
    complete = file.read_bytes()
    lines = complete.split(b"\n")[:-1]
    damaged = {"a row is missing": lines[:2], "another order": lines[::-1], "not UTF-8": [b"\xff"]}
    damaged["fewer samples"] = [json.dumps(json.loads(x) | {"samples": ["1"]}).encode() for x in lines]
    file.write_bytes(b"\n".join(damaged[damage]))
    assert sample_answers(model, "arithmetic", "test", examples, 2) == first
    assert file.read_bytes() == complete


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_many_processes_give_the_same_in_the_same_order(tiny):
    from support.loading import load_model
    from support.text_model import on_all_cores

    model, cpu, before = (
        load_model(tiny["base"], torch.device("cpu")),
        torch.device("cpu"),
        torch.get_num_threads(),
    )
    prompts = [[1 + i % 7] * (1 + i % 5) for i in range(300)]
    try:
        torch.set_num_threads(2)
        pids = set(on_all_cores(lambda _: os.getpid(), list(range(8)), cpu))
        assert os.getpid() not in pids and len(pids) <= 2
        assert list(on_all_cores(lambda x: x * x, list(range(9)), cpu)) == [x * x for x in range(9)]
        with pytest.raises(ZeroDivisionError):
            list(on_all_cores(lambda x: 1 // (5 - x), list(range(9)), cpu))
        many = model.generate(prompts, 5, "", n=4, temperature=1.0, seed=1)
    finally:
        torch.set_num_threads(before)
    torch.set_num_threads(1)
    assert model.generate(prompts, 5, "", n=4, temperature=1.0, seed=1) == many


def test_a_calculator_forces_its_tokens_in_ragged_rows(tiny, monkeypatch):
    """A model that wants to say something else is made to say the result, each row its own."""
    from support.loading import load_model

    model = load_model(tiny["base"], torch.device("cpu"))
    encode = model.tokenizer.encode
    asked = [encode("<<3*4="), encode("some words before <<12+30="), encode("nothing to calculate")]
    assert model.calculator(0, asked[0]) == encode("12>>")
    assert model.calculator(0, asked[1]) == encode("42>>") and model.calculator(0, asked[2]) == []
    assert model.calculator(0, []) == [] and model.calculator(0, encode("<<3*(=")) == []
    # In a batch: rows whose first forced tokens open an annotation must go on with its result.
    openings = [encode("<<3*4="), encode("a <<7*8="), encode("no")]

    def force(row: int, new: list[int]) -> list[int]:
        return openings[row] if not new else model.calculator(row, new)

    new = model.model.generate([[1, 2], [3] * 9, [4]], 24, temperature=0, force=force)
    texts = [model.tokenizer.decode(ids) for ids in new]
    assert (
        texts[0].startswith("<<3*4=12>>")
        and texts[1].startswith("a <<7*8=56>>")
        and texts[2].startswith("no")
    )


def test_reasoning_writes_curves_that_agree_with_the_samples(tiny, tmp_path, monkeypatch):
    """Answers made by hand, so that every figure of the table is known."""
    import eval as script
    from data import load_task
    from support.loading import load_model

    examples = load_task("arithmetic", "test")[0][:4]
    gold = [e.target.strip() for e in examples]
    wrong = "#### 0"
    drawn = [[gold[0], wrong, gold[0], gold[0]], [wrong, wrong, wrong, gold[1]], [wrong] * 4, [gold[3]] * 4]

    def sample_answers(model, name, split, some, n, temperature=0.8, seed=1, calculator=False):
        return drawn if n == 4 else [[a[0]] for a in drawn]

    class Oracle:
        name, combine = "oracle", {"sharpness": 1.0}

        def judge(self, problems, answers, progress=""):
            truth = {e.text: e.target.strip() for e in examples}
            p = np.array([0.9 if truth[q] == a else 0.1 for q, a in zip(problems, answers, strict=True)])
            return np.log(p), p

    monkeypatch.setattr(script, "sample_answers", sample_answers)
    cfg = script.EvalConfig(samples=4, limit=0)
    monkeypatch.setattr(script, "load_task", lambda name, split: (examples, {}))
    result = script.reason(
        load_model(tiny["base"], torch.device("cpu")), "arithmetic", cfg, {"oracle": Oracle()}
    )
    curves = {way: {k: v["value"] for k, v in curve.items()} for way, curve in result.entry["curves"].items()}
    assert curves["majority"] == {1: 0.5, 2: 0.5, 4: 0.5}
    assert curves["oracle, best"] == {1: 0.5, 2: 0.5, 4: 0.75} == curves["oracle, vote"]
    assert curves["calculator vote"][4] == 0.75  # the wrong answers show no calculation
    assert curves["pass"][4] == 0.75 and curves["pass"][1] == pytest.approx((3 / 4 + 1 / 4 + 0 + 1) / 4)
    assert result.entry["metrics"]["exact_match"]["value"] == 0.5
    gates = {g["threshold"]: g for g in result.entry["gating"]["oracle"]}
    assert gates[0.5]["right"]["value"] == 0.75 and gates[0.5]["samples"] == (1 + 4 + 4 + 1) / 4
    assert gates[1.01]["samples"] == 4 and sum(result.entry["errors"].values()) == 2
    assert [len(r["kinds"]) for r in result.records] == [0, 1, 1, 0]  # of the greedy answers
    assert [r["oracle sure"] for r in result.records] == [0.9, 0.9, 0.1, 0.9]


# -----------------------------------------------------------------------------
# attention


def test_heads_are_scored_by_what_they_look_at(monkeypatch):
    T, pattern = 8, torch.zeros(4, 8, 8)
    t = torch.arange(1, T)
    pattern[:, 0, 0] = 1
    pattern[0, t, t - 1] = 1
    pattern[1, t, 0] = 1
    pattern[2, t, (t - 3).clamp(min=0)] = 1  # four tokens told twice: what followed last time lies three back
    pattern[3] = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    monkeypatch.setattr(
        attending, "attention_weights", lambda model, ids: pattern[None, None].expand(1, 2, 4, T, T)
    )
    config = ModelConfig(vocab_size=20, context_length=16, n_layers=1, d_model=16, n_heads=4, d_ff=16)
    scores = attending.head_scores(ModernDecoderLM(config), rows=2, length=4)
    assert [int(scores[name].argmax()) for name in ("previous", "first", "induction", "entropy")] == [
        0,
        1,
        2,
        3,
    ]
    for name, head in (("previous", 0), ("first", 1), ("induction", 2), ("entropy", 3)):
        assert scores[name][0, head] == pytest.approx(1, abs=1e-5)
    assert scores["entropy"][0, :3].max() < 1e-6


def test_copied_digits_are_counted_where_they_are_told_again():
    class Echo(torch.nn.Module):  # says what followed the same byte before; else a newline
        def forward(self, ids):
            logits, told = torch.zeros(1, ids.shape[1], 300), ids[0].tolist()
            for t, i in enumerate(told):
                logits[0, t, told[told.index(i) + 1] if i in told[:t] else 10] = 1
            return logits

    encode, decode = lambda text: list(text.encode()), lambda ids: chr(ids[0])  # noqa: E731
    model = SimpleNamespace(model=Echo(), eos=299, device="cpu", encode=encode, decode=decode)
    assert attending.copied_digits(model, [("a1 b2", "a1 b2"), ("a1", "a1")]) == 1
    assert attending.copied_digits(model, [("a1 b2", "b1 a2 x3"), ("a4", "a4")]) == 0.25
    shares = attending.copying(model, seed=1, n=20)
    assert set(shares) == {"facts", "lists"} and 0 < shares["facts"] < 1 and 0 < shares["lists"] < 1


@pytest.mark.parametrize("sinks", [0, 1])
def test_attention_weights_are_shares_of_what_may_be_seen(sinks):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=20, context_length=16, n_layers=2, d_model=16, n_heads=2, d_ff=16, n_sinks=sinks
    )
    model = ModernDecoderLM(config).eval()
    w = attending.attention_weights(model, torch.randint(20, (3, 9)))
    assert w.shape == (2, 3, 2, 9, 9) and (w.triu(1) == 0).all()
    total = w.sum(-1)
    assert (total < 1).all() if sinks else torch.allclose(total, torch.ones_like(total), atol=1e-5)
