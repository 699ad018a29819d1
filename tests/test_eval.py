"""Evaluation: every token once, the same numbers from every backend and every time, honest comparisons."""

import json
import math
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import transformers

import eval as evaluation
import support.contamination
from data import load_task
from eval import EvalConfig, best, evaluate, evaluate_samples, evaluate_text, vote, windows
from finetune import FinetuneConfig, finetune
from support.contamination import contamination, trained_on, training_texts
from support.evaluations import Result, compare, describe
from support.loading import load_model
from support.metrics import majority
from support.results import read_json_or_empty
from support.runs import TrainError
from support.samples import Samples, draw
from support.tables import read_jsonl
from support.text_model import answer_task, on_all_cores
from tasks.calculator import calculates
from tasks.mistakes import review_kinds
from tasks.stories import storyworld

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> str:
    """A run folder as train.py leaves it, with random weights."""
    folder = tmp_path_factory.mktemp("out") / "base"
    shutil.copytree(tiny["base"], folder, ignore=shutil.ignore_patterns("samples"))
    (folder / "run.json").write_text(json.dumps({"settings": {"corpus": "storyworld"}, "parent": None}))
    return str(folder)


@pytest.fixture(scope="module")
def head(base) -> str:
    """A classification head on it, after a smoke run."""
    short = dict(max_steps=2, max_train_examples=20, max_eval_examples=4, eval_examples=4)
    cfg = FinetuneConfig(model=base, task="sentiment", method="head", out=str(Path(base).parent), name="head")
    finetune(replace(cfg, device="cpu", dtype="float32", **short))
    return str(Path(base).parent / "head")


@pytest.fixture
def command_line(monkeypatch, capsys):
    """command_line(*words) runs eval.py's main: its exit code or last message, and its output."""

    def run(*words: str) -> tuple[int | str, str]:
        monkeypatch.setattr(sys, "argv", ["eval.py", "--device=cpu", *words])
        with pytest.raises(SystemExit) as stop:
            evaluation.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return stop.value.code, captured.out + captured.err

    return run


def results_of(folder: str) -> dict:
    return read_json_or_empty(Path(folder) / "results.json")["results"]


def answers_of(folder: str, stem: str) -> list[dict]:
    return read_jsonl(Path(folder) / "answers" / f"{stem}.jsonl")


# -----------------------------------------------------------------------------
# Perplexity


@pytest.mark.parametrize("stride", [1, 7, 96])
def test_windows_predict_every_token_once_with_the_context_they_promise(stride):
    ids, at = list(range(500)), 1
    for known, new in windows(ids, 96, stride):
        assert new == ids[at : at + len(new)] and known == ids[at - len(known) : at]
        assert at == 1 or len(new) <= stride and len(known) + len(new) == 97
        at += len(new)
    assert at == len(ids)


@pytest.mark.parametrize("stride", [30, 160])
def test_perplexity_and_bits_per_byte_are_those_of_a_plain_loop(base, stride):
    """Second opinion: transformers, one window after another, as its documentation shows."""
    texts, T = list(storyworld("test", 2)), 160
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
    n_bytes, words = len("".join(texts).encode()), sum(len(t.split()) + t.count("\n") for t in texts)
    for backend in ("ours", "transformers"):
        found = evaluate_text(load_model(base, CPU, backend), texts, stride)["metrics"]
        assert found["loss"]["value"] == pytest.approx(nats / tokens, rel=1e-4)
        assert found["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
        assert found["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)
        assert math.log(found["word_perplexity"]["value"]) == pytest.approx(nats / words, rel=1e-3)
        for metric in found.values():
            assert metric["low"] <= metric["value"] <= metric["high"] and metric["n"] == tokens


def test_documents_are_scored_one_by_one_and_the_pieces_of_a_running_text_together(base):
    model, short = load_model(base, CPU), ["The fox slept.", "It was a long way home."]
    found = evaluate_text(model, [*short, *storyworld("test", 2)], 48)
    assert (found["stride"], found["documents_alone"], found["documents_in_windows"]) == (48, 2, 2)
    joined = evaluate_text(model, short, running_text=True)
    assert (joined["documents_alone"], joined["documents_in_windows"]) == (0, 2)
    assert joined["metrics"]["loss"]["value"] != evaluate_text(model, short)["metrics"]["loss"]["value"]
    model.context_length = 1  # half of it is no stride
    assert evaluate_text(model, short)["stride"] == 1


def test_a_file_is_measured_and_its_rows_without_text_are_counted(base, tmp_path, command_line):
    rows = [{"text": f"The goat {i} ate a pear. \ud83d"} for i in range(60)] + [{"text": None}, {"text": " "}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = shutil.copytree(base, tmp_path / "base")
    code, printed = command_line(str(model), f"--tasks={tmp_path}/a.jsonl")
    assert code == 0 and "documents alone: 3, in windows: 0" in printed and "2 rows without text" in printed


# -----------------------------------------------------------------------------
# The same numbers


def test_a_second_evaluation_and_another_backend_give_the_same_results(base, command_line):
    words = (base, "--tasks=sentiment,arithmetic,storyworld", "--shots=0,2", "--limit=12")
    found = []
    for backend in ("ours", "ours", "transformers"):
        assert command_line(*words, f"--backend={backend}")[0] == 0
        results = results_of(base)
        assert {result["backend"] for result in results.values()} == {backend}
        answers = {p.name: p.read_text() for p in sorted((Path(base) / "answers").iterdir())}
        found.append(({k: r["metrics"] for k, r in results.items()}, answers))
    assert found[0] == found[1] and found[0][1] == found[2][1]
    tasks = [f"{task} test {n}-shot" for task in ("sentiment", "arithmetic") for n in (0, 2)]
    assert list(found[0][0]) == [*tasks, "storyworld test 0-shot"]
    for name, metrics in found[0][0].items():
        for metric, value in metrics.items():
            assert found[2][0][name][metric]["value"] == pytest.approx(value["value"], rel=1e-4), name


def test_results_of_other_tasks_stay_every_answer_is_written_and_a_limit_draws_by_seed(base, command_line):
    picked = []
    for seed in (2, 1):
        command_line(base, "--tasks=sentiment", "--limit=30", f"--seed={seed}")
        picked.append([a["text"] for a in answers_of(base, "sentiment-test-0-shot")])
    assert picked[0] != picked[1]
    command_line(base, "--tasks=sentiment", "--limit=8", "--calibrate")
    command_line(base, "--tasks=dialogue", "--limit=5", "--split=validation")
    results, name = results_of(base), "sentiment test 0-shot"
    assert {name, "dialogue validation 0-shot", f"{name} calibrated"} <= results.keys()
    entry = results[name]
    assert entry["items"] == 30 and entry["of"] == 1000 and entry["data"]["fingerprint"]
    answers, wrong = (answers_of(base, f"sentiment-test-0-shot{end}") for end in ("", "-wrong"))
    assert len(answers) == 30 and wrong == [a for a in answers if not a["correct"]]
    assert entry["metrics"]["accuracy"]["value"] == pytest.approx(1 - len(wrong) / 30)
    assert all(a["kinds"] == review_kinds(a["text"]) and 0.5 <= a["sure"] <= 1 for a in answers)


def test_a_checkpoint_of_an_adapter_is_measured_as_its_run_is(head, command_line):
    """Its folder holds no record: what it was tuned on, and that it is no chat model, the run's says."""
    checkpoint = f"{head}/checkpoints/step-9"
    shutil.copytree(head, checkpoint, ignore=lambda *_: ["checkpoints", "run.json"])
    command_line(head, checkpoint, "--tasks=sentiment", "--limit=40")
    one, other = (results_of(folder)["sentiment test 0-shot"]["metrics"] for folder in (head, checkpoint))
    assert one == other
    shutil.rmtree(checkpoint)


def test_a_head_is_asked_its_own_task_without_examples_and_a_smoke_run_is_called_one(
    base, head, command_line
):
    words = "--tasks=sentiment,arithmetic,storyworld", "--limit=8", "--shots=0,1"
    code, printed = command_line(base, head, *words)
    before, after = printed.split(f"{head}:")
    assert code == 0 and "SMOKE RUN, no result" in after and "SMOKE" not in before
    for message in ("takes no examples", "cannot be asked arithmetic", "for decoders", "minus"):
        assert message in after
    assert results_of(head)["sentiment test 0-shot"]["smoke"] is True
    with pytest.raises(TrainError, match="--method=head"):
        finetune(FinetuneConfig(model=head, device="cpu"))


def test_prompts_that_are_too_long_are_counted(base):
    result = evaluate(
        load_model(base, CPU), "arithmetic", 3, EvalConfig(limit=6)
    )  # half of the context: the answer's
    assert result.entry["shots_dropped"] + result.entry["cut"] == 6
    assert "too long" in describe(result.entry) or "room" in describe(result.entry)


def test_models_are_compared_on_the_items_that_both_answered():
    def made_up(task: str, correct: list[bool]) -> list[Result]:
        return [Result({"task": task, "split": "test", "shots": 0}, [{"correct": c} for c in correct])]

    a, b = [True] * 10 + [False] * 30, [True] * 35 + [False] * 5
    lines = compare({name: made_up("sst2", x) for name, x in (("base", a), ("sft", b), ("dpo", a))})
    pairs = ["sft minus base", "dpo minus base", "dpo minus sft"]
    assert len(lines) == 3 and all(pair in line for pair, line in zip(pairs, lines, strict=True))
    assert "+62.5 [" in lines[0] and "+0.0 [+0.0, +0.0] (no difference found)" in lines[1]
    for other in (made_up("gsm8k", b), made_up("sst2", b[:-1])):
        assert compare({"base": made_up("sst2", a), "other": other}) == []


# -----------------------------------------------------------------------------
# Contamination


def test_items_that_share_words_in_a_row_with_a_text_are_found(base, monkeypatch):
    items = ["The quick brown fox jumps over the lazy dog.", "a b c d", "one two three four five six"]
    texts = ["", "... The QUICK, brown fox jumps over the... One two three; four five."]
    found = contamination(items, texts, 5)
    assert (found["items"], found["checked"], found["too_short"]) == (2, 2, 1)
    assert found["share"] == pytest.approx((3 + 1) / (5 + 2))
    assert contamination(items, ["quick brown fox the lazy dog"], 5)["items"] == 0
    review = load_task("sentiment", "test")[0][0].text
    monkeypatch.setattr(support.contamination, "documents", lambda name, split: [review])
    entry = evaluate(load_model(base, CPU), "sentiment", 0, EvalConfig(contamination=4)).entry
    assert entry["contamination"]["items"] and entry["contamination"]["sources"] == ["corpus storyworld"]


def test_what_a_run_and_its_parents_were_trained_on(base, head, tuned, tmp_path):
    def sources(**record) -> list[tuple]:
        (tmp_path / "run.json").write_text(json.dumps(record))
        return trained_on(str(tmp_path))

    stories, arithmetic = ("corpus", "storyworld"), ("task", "arithmetic")
    assert trained_on("gpt2") == [] and trained_on(head) == [("task", "sentiment"), stories]
    settings, data = {"data": "arithmetic@20:3,storyworld:1"}, {"arithmetic": {}, "storyworld": {}}
    mixed = sources(stage="sft", settings=settings, parent=base, data=data | {"tokenizer": "x"})
    assert mixed == [arithmetic, stories, stories]
    settings = {"data": "arithmetic", "first_problem": 4000, "problems": 3}
    on_policy = sources(stage="dpo", settings=settings, parent=tuned)
    assert on_policy == [(*arithmetic, 4000, 3), arithmetic]
    problems = load_task("arithmetic", "train", first=4000, count=3)[0]
    assert [*training_texts(on_policy[:1])] == [f"{example.text} {example.target}" for example in problems]
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q {i}", "chosen": "good", "rejected": "bad"} for i in range(9)]
    file.write_text("\n".join(map(json.dumps, rows)))
    pairs = sources(stage="dpo", settings={"data": str(file)})
    assert pairs == [("pairs", str(file))] and "q 3 good bad" in [*training_texts(pairs)]


# -----------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("words, message", [
    (["--tasks=sst3"], '"sst3" is no task, corpus or file; there are sst2'),
    (["out/nowhere"], "there is no folder out/nowhere"), (["out/base,"], "out/base, has an empty name"),
    (["--stride=161", "--tasks=storyworld", "--limit=2"], "--stride=161 must be from 1 to"),
    (["--split=dev"], "no split"), (["--limit=-1"], "--limit"), (["--shots=0,-1"], "--shots"),
    (["--temperature=nan"], "--temperature"), (["--streams", "--context_length=2"], "too short for streams"),
    (["--tasks=gsm8k,arithmetic", "--solutions=nowhere.jsonl"], "of one task"),
    (["--tasks=gsm8k", "--solutions=nowhere.jsonl"], "nowhere.jsonl"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(base, command_line, words, message, tmp_path):
    models = [] if any(word.startswith("out/") for word in words) else [base]
    code, printed = command_line(*models, *words)
    assert code and message in f"{code}{printed}"
    assert "neither config.json nor" in command_line(str(tmp_path))[0]  # a folder that is no model


# -----------------------------------------------------------------------------
# Test-time compute


def test_a_vote_adds_up_weights_and_takes_the_first_of_equals():
    answers = np.array([["b", "a", "a", "b"], ["a", "b", "", ""], ["", "3", "4", "4"], ["", "", "", ""]])
    weights = np.array([[0.3, 0.4, 0.1, 0.3], [0.3, 0.5, 9.0, 9.0], [1, 0, 0, 0], [1, 1, 1, 1.0]])
    assert vote(answers, weights).tolist() == [0, 1, 1, 0]  # no number has no vote
    assert vote(answers, 0 * weights).tolist() == [0, 0, 2, 0]  # without weights: the majority
    assert best(answers[:1], np.array([[0.1, 0.9, 0.9, 0.2]])).tolist() == [1]
    rng = np.random.default_rng(0)
    drawn = rng.choice(["", "1", "2", "3"], (200, 7))
    for row, index in zip(drawn.tolist(), vote(drawn, np.ones(drawn.shape)), strict=True):
        assert (row[index] or None) == majority(answer or None for answer in row)


@pytest.mark.parametrize("text, fine", [
    ("3*4=<<3*4=12>>12\n#### 12", True), ("<<5/2=2.5>>2.5\n#### 2.5", True), ("", False),
    ("<<3*4=13>>13\n#### 13", False), ("<<3*4=12>>12\n#### 13", False), ("#### 12", False),
    ("<<3*(=12>>\n#### 12", False), ("<<3-3=>>\n#### 0", False), ("<<3*4=>>", False),
])  # fmt: skip
def test_a_calculator_confirms_a_solution(text, fine):
    assert calculates(text) is fine


@pytest.fixture
def by_hand(monkeypatch):
    """Four problems and four answers to each, of which 3, 1, 0 and 4 are right, whatever the model."""
    examples = load_task("arithmetic", "test")[0][:4]
    gold = [e.target.strip() for e in examples]
    wrong = "#### 0"
    drawn = [[gold[0], wrong, gold[0], gold[0]], [wrong, wrong, wrong, gold[1]], [wrong] * 4, [gold[3]] * 4]

    def draw(model, name, split, some, n, temperature, seed, calculator=False):
        answers = [row[:n] for row in drawn]
        right = [[a == g for a in row] for row, g in zip(answers, gold, strict=True)]
        return Samples(examples, answers, np.array(right))

    monkeypatch.setattr(evaluation, "draw", draw)
    monkeypatch.setattr(evaluation, "load_task", lambda name, split: (examples, {}))
    monkeypatch.setattr(evaluation, "labelled", lambda file: [draw(None, "", "", [], 4, 1.0, 1)])
    return examples


class Judge:
    """Gives right answers 0.9, to its `weak` problem 0.2; wrong ones get 0.1, to its weak problem 0.3."""

    fitted = {"sharpness": 1.0}

    def __init__(self, name: str, examples: list, weak: int | None = None):
        self.name = name
        self.truth = {e.text: e.target.strip() for e in examples}
        self.weak = None if weak is None else examples[weak].text

    def score_all(self, problems, answers, progress=""):
        found = []
        for problem, answer in zip(problems, answers, strict=True):
            right, weak = self.truth[problem] == answer, problem == self.weak
            found.append({True: (0.9, 0.2), False: (0.1, 0.3)}[right][weak])
        return np.log(found), np.array(found)


def test_test_time_compute_on_answers_made_by_hand(tiny, by_hand):
    """So that every figure of the table is known."""
    ask = partial(evaluate_samples, load_model(tiny["base"], CPU), "arithmetic", EvalConfig(samples=4))
    result = ask([Judge("out/oracle", by_hand)])
    entry = result.entry
    curves = {way: {k: v["value"] for k, v in curve.items()} for way, curve in entry["curves"].items()}
    assert curves["majority"] == {1: 0.5, 2: 0.5, 4: 0.5}
    assert curves["oracle, best"] == {1: 0.5, 2: 0.5, 4: 0.75} == curves["oracle, vote"]
    assert curves["calculator vote"][4] == 0.75  # the wrong answers show no calculation
    assert curves["pass"][4] == 0.75 and curves["pass"][1] == pytest.approx((3 / 4 + 1 / 4 + 0 + 1) / 4)
    assert entry["metrics"]["exact_match"]["value"] == 0.5 and entry["verifiers"] == {"oracle": "out/oracle"}
    assert entry["differences"]["oracle, best - majority"]["value"] == 0.25
    gates = {g["threshold"]: g for g in entry["gating"]["oracle"]}
    assert gates[0.5]["right"]["value"] == 0.75 and gates[0.5]["samples"] == (1 + 4 + 4 + 1) / 4
    assert gates[1.01]["samples"] == 4 and sum(entry["errors"].values()) == 2
    assert [len(r["kinds"]) for r in result.records] == [0, 1, 1, 0]  # of the greedy answers
    assert [r["oracle sure"] for r in result.records] == [0.9, 0.9, 0.1, 0.9]
    assert "oracle, best" in describe(entry)

    entry = ask([Judge("out/one", by_hand, weak=0), Judge("out/two", by_hand, weak=1)]).entry
    best = {way: curve[4]["value"] for way, curve in entry["curves"].items() if way.endswith("best")}
    assert best == {"one, best": 0.5, "two, best": 0.5, "together, best": 0.75}
    assert entry["differences"]["two, best - together, best"]["value"] == -0.25


def test_solutions_of_others_are_chosen_among(tiny, by_hand):
    cfg = EvalConfig(solutions="others.jsonl", models=tiny["base"])
    result = evaluation.evaluate_solutions("arithmetic", cfg, [Judge("out/oracle", by_hand)])
    entry, gaps = result.entry, result.entry["differences"]
    assert result.name == "arithmetic solutions 4 samples" and "exact_match" not in entry["metrics"]
    assert gaps["oracle, best - a random one"]["value"] == 0.75 - (3 / 4 + 1 / 4 + 0 + 1) / 4
    assert gaps["oracle, best - majority"]["value"] == 0.25 and not any("greedy" in gap for gap in gaps)
    assert [r["oracle correct"] for r in result.records] == [True, True, False, True]
    assert compare({"one": [result], "two": [result]}) == []  # they did not answer


def test_greedy_answers_are_counted_as_the_one_that_was_drawn(tiny):
    cfg = EvalConfig(samples=4, temperature=0.0, limit=2)
    result = evaluate_samples(load_model(tiny["base"], CPU), "arithmetic", cfg, [])
    assert result.name == "arithmetic test 1 samples" and result.entry["samples"] == 1


# -----------------------------------------------------------------------------
# Samples


def test_samples_are_cached_and_more_of_them_begin_with_the_same(tiny, monkeypatch):
    model, examples = load_model(tiny["base"], CPU), load_task("arithmetic", "test")[0][:5]

    def ask(examples: list, n: int, seed: int) -> list[list[str]]:
        return draw(model, "arithmetic", "test", examples, n, 0.8, seed).answers

    four, two, other = (ask(examples, n, seed) for n, seed in ((4, 3), (2, 3), (2, 4)))
    assert [some[:2] for some in four] == two != other and len({a for some in four for a in some}) > 5
    monkeypatch.setattr(model, "generate", lambda *a: pytest.fail("sampled again"))
    assert ask(examples, 4, seed=3) == four
    with pytest.raises(pytest.fail.Exception):
        ask(examples[:3], 4, seed=3)


@pytest.mark.parametrize("chat", [True, False])
def test_an_empty_line_ends_the_answer_of_a_base_and_not_that_of_a_chat_model(tiny, monkeypatch, chat):
    model, examples = load_model(tiny["base"], CPU), load_task("arithmetic", "test")[0][:1]
    model.chat = chat
    text = "First add:\n\n3+4=7\n#### 7"
    monkeypatch.setattr(model, "continuations", lambda prompts, *a, **how: [model.encode(text)])
    expected = text if chat else "First add:"
    assert answer_task(model, "arithmetic", examples)[0] == [expected]
    assert draw(model, "arithmetic", "test", examples, 1, 0.8, 9 + chat).answers == [[expected]]


def test_a_cache_that_does_not_hold_these_questions_is_made_anew(tiny, tmp_path):
    shutil.copytree(tiny["base"], tmp_path / "base", ignore=shutil.ignore_patterns("samples"))
    model, examples = load_model(str(tmp_path / "base"), CPU), load_task("arithmetic", "test")[0][:3]
    # str.splitlines() would cut this row in two
    examples[1] = replace(examples[1], text=examples[1].text + "\u2028How many\x85?")
    first = draw(model, "arithmetic", "test", examples, 2, 0.8, 1).answers
    (file,) = (tmp_path / "base" / "samples").iterdir()
    complete = file.read_bytes()
    lines = complete.split(b"\n")[:-1]
    fewer_samples = [json.dumps(json.loads(line) | {"samples": ["1"]}).encode() for line in lines]
    for damaged in (lines[:2], lines[::-1], fewer_samples, [b"\xff"]):
        file.write_bytes(b"\n".join(damaged))
        assert draw(model, "arithmetic", "test", examples, 2, 0.8, 1).answers == first
        assert file.read_bytes() == complete


def test_a_model_in_a_folder_that_cannot_be_written_is_measured_all_the_same(
    base, tmp_path, monkeypatch, capsys, command_line
):
    folder = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("samples"))
    (folder / "samples").touch()  # no folder can be made there
    (folder / "run.json").write_text('{"smoke": true}')
    model, examples = load_model(str(folder), CPU), load_task("arithmetic", "test")[0][:3]
    assert len(draw(model, "arithmetic", "test", examples, 2, 0.8, 1).answers) == 3
    assert "is not kept: " in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != folder)
    before = sorted(folder.rglob("*"))
    out = tmp_path / "out"
    code, _ = command_line(str(folder), f"--out={out}", "--tasks=arithmetic", "--limit=2", "--shots=0")
    (found,) = (out / "eval").iterdir()
    (entry,) = results_of(found).values()
    assert code == 0 and sorted(folder.rglob("*")) == before and entry["smoke"]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_many_processes_give_the_same_in_the_same_order(tiny):
    model, prompts = load_model(tiny["base"], CPU), [[1 + i % 7] * (1 + i % 5) for i in range(300)]
    alone = model.generate(prompts, 5, "", n=4, temperature=1.0, seed=1)
    torch.set_num_threads(2)
    try:
        assert os.getpid() not in set(on_all_cores(lambda _: os.getpid(), list(range(8)), CPU))
        assert model.generate(prompts, 5, "", n=4, temperature=1.0, seed=1) == alone
    finally:
        torch.set_num_threads(1)


def test_a_calculator_gives_the_tokens_of_a_result(tiny):
    model = load_model(tiny["base"], CPU)
    encode = model.tokenizer.encode
    for text, forced in (("words before <<12+30=", "42>>"), ("nothing", ""), ("<<3*(=", "")):
        assert model.calculator(0, encode(text)) == encode(forced)
