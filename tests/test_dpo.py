"""Preference optimisation: the loss against numbers worked by hand, pairs, controls, caches, runs cut off."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo as script
from data import DataError, load_preferences, load_task, preference_of, talk
from dpo import (
    DPOConfig,
    Pair,
    collate_pairs,
    on_policy,
    pair_log_probs,
    preference_loss,
    reference,
    token_log_probs,
)
from support import runs
from support.hf_format import load_tensors
from support.loading import load_model
from support.runs import TrainError, read_json, read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(script.__file__).parent


@pytest.fixture
def settings(tuned, tmp_path):
    def make(**more) -> DPOConfig:
        small = dict(model=tuned, out=str(tmp_path), name="run", device="cpu", dtype="float32", max_steps=6)
        small |= dict(
            batch_size=4, problems=80, n=8, eval_examples=100, eval_every=3, save_every=2, log_every=1
        )
        return DPOConfig(**small | dict(warmup_steps=1, learning_rate=1e-3) | more)

    return make


def test_the_loss_on_numbers_worked_by_hand():
    chosen, rejected = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -4.0])
    ref = torch.tensor([[-3.5, -4.0], [-5.0, -4.5]])
    # margins: (1) - (0.5) = 0.5, and (-1) - (-0.5) = -0.5
    expected = [math.log(1 + math.exp(-0.1 * m)) for m in (0.5, -0.5)]
    torch.testing.assert_close(preference_loss(chosen, rejected, ref, 0.1), torch.tensor(expected))
    smooth = [
        0.8 * math.log(1 + math.exp(-0.1 * m)) + 0.2 * math.log(1 + math.exp(0.1 * m)) for m in (0.5, -0.5)
    ]
    torch.testing.assert_close(
        preference_loss(chosen, rejected, ref, 0.1, label_smoothing=0.2), torch.tensor(smooth)
    )
    torch.testing.assert_close(
        preference_loss(chosen, rejected, ref, 0.1, "ipo"), torch.tensor([20.25, 30.25])
    )


def test_gradients_push_the_chosen_up_and_the_rejected_down():
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([-4.0], requires_grad=True)
    preference_loss(chosen, rejected, torch.tensor([[-3.5, -4.0]]), 0.1).sum().backward()
    assert chosen.grad.item() < 0 < rejected.grad.item()
    assert chosen.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.1 * 0.5)))


@pytest.mark.parametrize("both", [True, False])
def test_at_the_start_the_loss_is_ln_2(settings, both, tuned):
    model = load_model(tuned, torch.device("cpu"))
    pairs, _ = on_policy(
        model, settings(), "train", load_task("arithmetic", "train", first=4000, count=40)[0]
    )
    pairs = [p for p in pairs if p.rejected]
    known = torch.from_numpy(reference(model, pairs, both))
    with torch.no_grad():
        good, bad, _ = pair_log_probs(model.model, *collate_pairs(pairs, model.pad, both))
    loss = preference_loss(good, bad, known, 0.5)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=2e-4)


def test_log_probabilities_are_those_of_log_likelihoods(tuned):
    model = load_model(tuned, torch.device("cpu"))
    pairs = [Pair([5, 6, 7], [8, 9, 2], [8, 4, 1, 2]), Pair([5], [3, 2], [4, 2])]
    got = reference(model, pairs, both=True)
    for side, answers in enumerate([[p.chosen for p in pairs], [p.rejected for p in pairs]]):
        expected = model.log_likelihoods([(p.prompt, a) for p, a in zip(pairs, answers, strict=True)])
        np.testing.assert_allclose(got[:, side], expected, atol=1e-4)
    one = reference(model, pairs, both=False)
    expected = model.log_likelihoods([([5, 6, 7, 8], [9]), ([5, 6, 7, 8], [4]), ([5], [3]), ([5], [4])])
    np.testing.assert_allclose(one.ravel(), expected, atol=1e-4)


def test_the_prompt_is_not_trained_on(tuned):
    model = load_model(tuned, torch.device("cpu"))
    ids, targets, *_ = collate_pairs([Pair([5, 6, 7], [8, 9])], model.pad, both=False)
    assert ids.tolist() == [[5, 6, 7, 8]] and targets.tolist() == [[-100, -100, 8, 9]]
    log_p, _ = token_log_probs(model.model, ids, targets)
    assert (log_p[0, :2] == 0).all() and (log_p[0, 2:] < 0).all()


def test_pairs_are_right_against_wrong_and_problems_of_one_kind_are_counted(settings, tuned, monkeypatch):
    some = load_task("arithmetic", "train", first=4000, count=40)[0]
    examples = sorted(some, key=lambda e: len(e.text) + len(e.target))[:4]  # they fit into 160 tokens
    gold = [e.target.strip() for e in examples]
    answers = [[gold[0], "#### 0"], [gold[1], gold[1]], ["", "#### 0"], [gold[3], ""]]
    monkeypatch.setattr(script, "sample_answers", lambda *a: answers)
    model = load_model(tuned, torch.device("cpu"))
    pairs, counts = on_policy(model, settings(n=2), "train", examples)
    assert (counts["pairs"], counts["only_right"], counts["only_wrong"], counts["right"]) == (2, 1, 1, 4)
    decode = model.tokenizer.decode
    assert [decode(p.chosen) for p in pairs] == [f"{gold[i]}<|end|>" for i in (0, 1, 3)]
    assert [p.rejected and decode(p.rejected) for p in pairs] == ["#### 0<|end|>", None, "<|end|>"]
    rft, _ = on_policy(model, settings(n=2, method="rft"), "train", examples)
    assert [decode(p.chosen) for p in rft] == [decode(p.chosen) for p in pairs]
    assert all(p.rejected is None for p in rft)


@pytest.mark.parametrize("more", [
    {}, {"first_difference": False, "beta": 0.1, "nll": 0.0}, {"method": "ipo"}, {"method": "rft"},
    {"method": "sft"},
    {"label_smoothing": 0.1, "pairs": 2}, {"lora_r": 4},
])  # fmt: skip
def test_every_method_trains(settings, more):
    run = script.dpo(settings(**more))
    assert run["status"] == "finished" and run["chat"] and run["data"]["pairs"]["problems"] == 80
    assert {"reward_margin", "reward_accuracy", "chosen", "rejected", "exact_match"} <= set(
        run["results"]["last"]
    )


def test_training_widens_the_margin(settings):
    """Of the pairs that it sees: DPO's loss begins at ln 2, and so few pairs, seen again and again, bring it
    down.
    (What they do to a handful of held-out pairs is luck.)
    """
    run = script.dpo(
        settings(
            first_difference=False, nll=0.0, max_steps=60, eval_every=0, collapse=0.0, learning_rate=3e-4
        )
    )
    lines = read_jsonl(Path(run["settings"]["out"]) / "run/metrics.jsonl")
    losses = [x["loss"] for x in lines if "loss" in x]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and sum(losses[-10:]) / 10 < losses[0] - 0.05


def test_rounds_are_runs_that_follow_each_other(settings, tmp_path):
    # Enough tries that a model that is seldom right is right somewhere, in both rounds.
    script.dpo(settings(rounds=2, problems=100, eval_examples=200, n=8))
    first, last = (read_json(tmp_path / name / "run.json") for name in ("run/round-1", "run"))
    assert last["parent"] == str(tmp_path / "run/round-1")
    assert last["settings"]["first_problem"] == first["settings"]["first_problem"] + 100


def test_a_collapse_stops_the_run_and_says_why(settings):
    with pytest.raises(TrainError, match="unlearns both sides"):
        script.dpo(settings(first_difference=False, nll=0, learning_rate=0.05, max_steps=30, collapse=0.2))


@pytest.mark.parametrize("rubbish", [b"", b"PK\x03\x04 cut off", None])
def test_a_reference_cache_that_is_damaged_or_of_another_model_is_made_anew(settings, tmp_path, rubbish):
    script.dpo(settings(max_steps=1))
    file = tmp_path / "run/reference.npz"
    right = file.read_bytes()
    if rubbish is None:
        np.savez(file, key="another", values=np.zeros((3, 2), np.float32))
    else:
        file.write_bytes(rubbish)
    (tmp_path / "run/run.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    script.dpo(settings(max_steps=1))
    assert file.read_bytes() == right


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["finished", "interrupted", "in use"])
def test_a_refused_command_changes_nothing_on_disk(settings, tmp_path, kind):
    run = script.dpo(settings(max_steps=2))
    if kind != "finished":
        (tmp_path / "run/run.json").write_text(json.dumps(run | {"status": "interrupted"}))
    lock = runs.lock(tmp_path / "run") if kind == "in use" else None
    method, why = ("dpo", "another process") if lock else ("rft", "other settings")
    for name in ("pairs.jsonl", "reference.npz"):
        (tmp_path / "run" / name).write_text("this stays")
    before = everything_in(tmp_path)
    with pytest.raises(TrainError, match=why):
        script.dpo(settings(max_steps=2, method=method))
    assert everything_in(tmp_path) == before
    if lock:
        os.close(lock)


def test_overwriting_the_last_round_leaves_the_first(settings, tmp_path):
    more = dict(rounds=2, max_steps=1, problems=100, eval_examples=200)
    script.dpo(settings(**more))
    script.dpo(settings(**more, overwrite=True))
    assert (tmp_path / "run/round-1/model.safetensors").exists()


def test_resuming_gives_the_same_bits(settings, tmp_path):
    script.dpo(settings(name="whole"))
    cut = settings(name="cut")
    changed = {k: v for k, v in vars(cut).items() if v != getattr(DPOConfig(), k)}
    command = ["dpo.py", *(f"--{k}={v}" for k, v in changed.items())]
    code = (
        "import os, sys, train, dpo\n"
        "get_lr = train.get_lr\n"
        "def dies(step, *more):\n"
        "    os._exit(9) if step == 5 else None\n"
        "    return get_lr(step, *more)\n"
        "train.get_lr = dies\n"
        f"sys.argv = {command!r}\n"
        "dpo.main()\n"
    )
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert died.returncode == 9
    script.dpo(cut)
    a, b = (load_tensors(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("row, messages", [
    ({"prompt": "a", "chosen": "good", "rejected": "bad"}, talk("a")),
    ({"instruction": "a", "input": "x", "output": "?", "chosen": "good", "rejected": "bad"}, talk("a\n\nx")),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
      "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad"},
     [*talk("a", "b"), *talk("c")]),
    ({"prompt": "a", "chosen": talk("a", "good"), "rejected": talk("a", "bad")}, talk("a")),
    ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "good"},
      "rejected": {"from": "gpt", "value": "bad"}}, talk("a")),
])  # fmt: skip
def test_rows_of_the_usual_forms_become_pairs(row, messages):
    pair = preference_of(row)
    assert (pair.messages, pair.chosen, pair.rejected) == (messages, "good", "bad")


def test_a_file_of_pairs_trains_and_identical_sides_are_left_out(settings, tmp_path, tuned):
    rows = [
        {"prompt": f"Say hello to {i}.", "chosen": f"Hello, {i}!", "rejected": f"No {i}"} for i in range(150)
    ]
    rows += [
        {"prompt": "b", "chosen": "same", "rejected": "same"},
        {"prompt": "c", "chosen": "", "rejected": "x"},
    ]
    rows += [{"prompt": "long " * 300, "chosen": "a", "rejected": "b"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    kept = sum(len(load_preferences(str(file), split)[0]) for split in ("train", "validation"))
    assert kept < 152
    run = script.dpo(settings(data=str(file), first_difference=False, max_steps=20, nll=1.0))
    assert run["data"]["train"]["pairs"] > 100
    folder = Path(run["settings"]["out"]) / run["settings"]["name"]
    wrong = [json.loads(x) for x in (folder / "violations.jsonl").read_text().splitlines()]
    last, pairs = run["results"]["last"], run["data"]["validation"]["pairs"]
    assert len(wrong) == round((1 - last["reward_accuracy"]) * pairs)
    assert [x["margin"] for x in wrong] == sorted(x["margin"] for x in wrong if x["margin"] <= 0)
    file.write_text(json.dumps({"prompt": "a", "better": "b"}))
    with pytest.raises(DataError, match="no row has a question and two answers to it; the columns"):
        load_preferences(str(file), "train")


@pytest.mark.parametrize("more, why", [
    ({"model": "base"}, "no pair to learn from"), ({"data": "sst2"}, "cannot be checked"),
    ({"rounds": 0}, "rounds"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(settings, tiny, more, why):
    more = more | ({"model": tiny["base"]} if "model" in more else {})
    with pytest.raises(TrainError, match=why):
        script.dpo(settings(**more))
