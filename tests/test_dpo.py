"""Preference optimisation: the loss against numbers worked by hand, pairs, controls, runs cut off."""

import json
import math
import os

import numpy as np
import pytest
import torch

import dpo
from data import DataError, load_preferences, load_task
from dpo import DPOConfig, Pair, collate_pairs, compare, log_probs, preference_loss
from support import runs
from support.loading import load_model
from support.runs import TrainError, read_json
from support.samples import Samples
from support.tables import read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(tuned, tmp_path):
    def make(**more) -> DPOConfig:
        small = dict(model=tuned, out=str(tmp_path), name="run", device="cpu", dtype="float32", max_steps=6)
        small |= dict(batch_size=4, problems=80, n=8, eval_examples=100, eval_every=3, save_every=2)
        return DPOConfig(**small | dict(log_every=1, warmup_steps=1, learning_rate=1e-3) | more)

    return make


@pytest.fixture
def model(tuned):
    return load_model(tuned, torch.device("cpu"))


# -----------------------------------------------------------------------------
# The loss


def test_the_loss_on_numbers_worked_by_hand():
    chosen, rejected = torch.tensor([-3.0, -5.0], requires_grad=True), torch.tensor([-4.0, -4.0])
    reference = torch.tensor([[-3.5, -4.0], [-5.0, -4.5]])  # margins: 1 - 0.5 = 0.5, and -1 - -0.5 = -0.5
    right, wrong = (math.log(1 + math.exp(-0.1 * margin)) for margin in (0.5, -0.5))
    for more, expected in (
        ({}, [right, wrong]),
        ({"label_smoothing": 0.2}, [0.8 * right + 0.2 * wrong, 0.8 * wrong + 0.2 * right]),
        ({"method": "ipo"}, [20.25, 30.25]),
    ):
        loss = preference_loss(DPOConfig(beta=0.1, **more), chosen, rejected, reference)
        torch.testing.assert_close(loss, torch.tensor(expected))
    preference_loss(DPOConfig(beta=0.1), chosen, rejected, reference).sum().backward()
    assert chosen.grad[0].item() == pytest.approx(-0.1 / (1 + math.exp(0.1 * 0.5)))


def test_log_probabilities_are_those_of_log_likelihoods(model):
    pairs = [Pair([5, 6, 7], [8, 9, 2], [8, 4, 1, 2]), Pair([5], [3, 2], [4, 2])]
    found, means = (log_probs(model, pairs, whole=True, mean=mean) for mean in (False, True))
    for side, answers in enumerate([[pair.chosen for pair in pairs], [pair.rejected for pair in pairs]]):
        expected = model.log_likelihoods([(p.prompt, a) for p, a in zip(pairs, answers, strict=True)])
        np.testing.assert_allclose(found[:, side], expected, atol=1e-4)
        np.testing.assert_allclose(means[:, side], expected / [len(a) for a in answers], atol=1e-4)
    first = log_probs(model, pairs, whole=False)  # of the first token that differs
    expected = model.log_likelihoods([([5, 6, 7, 8], [9]), ([5, 6, 7, 8], [4]), ([5], [3]), ([5], [4])])
    np.testing.assert_allclose(first.ravel(), expected, atol=1e-4)


def test_a_batch_of_answers_without_a_worse_one_has_nothing_to_compare(model):
    pairs = [Pair([5, 6, 7], [8, 9]), Pair([5], [8, 9])]
    expected = model.log_likelihoods([(pair.prompt, pair.chosen) for pair in pairs])
    for n in (2, 1):
        chosen, rejected, _ = compare(model.model, *collate_pairs(pairs[:n], model.pad, whole=True))
        np.testing.assert_allclose(chosen.detach(), expected[:n], atol=1e-4)
        assert rejected.tolist() == [0] * n


@pytest.mark.parametrize("first_difference", [True, False])
def test_the_loss_begins_at_ln_2_and_training_lowers_it(settings, tmp_path, first_difference):
    more = dict(first_difference=first_difference, nll=0.0, max_steps=60, eval_every=0, collapse=0.0)
    dpo.dpo(settings(**more, learning_rate=3e-4))
    lines = [x for x in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in x]
    losses = [x["loss"] for x in lines]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and sum(losses[-10:]) / 10 < losses[0] - 0.05
    assert lines[0]["tokens"] > 4 * 20  # of the four pairs, not the pairs


# -----------------------------------------------------------------------------
# Pairs


def test_pairs_are_right_against_wrong_and_problems_of_one_kind_are_counted(settings, model, monkeypatch):
    some = load_task("arithmetic", "train", first=4000, count=40)[0]
    examples = sorted(some, key=lambda e: len(e.text) + len(e.target))[:4]  # they fit into 160 tokens
    gold = [e.target.strip() for e in examples]
    answers = [[gold[0], "#### 0"], [gold[1], gold[1]], ["", "#### 0"], [gold[3], ""]]
    right = np.array([[True, False], [True, True], [False, False], [True, False]])
    monkeypatch.setattr(dpo, "draw", lambda *_: Samples(examples, answers, right))
    pairs, counts = dpo.on_policy(model, settings(n=2), "train", examples)
    assert (counts["pairs"], counts["only_right"], counts["only_wrong"], counts["right"]) == (2, 1, 1, 4)
    decode = model.tokenizer.decode
    assert [decode(p.chosen) for p in pairs] == [f"{gold[i]}<|end|>" for i in (0, 1, 3)]
    assert [p.rejected and decode(p.rejected) for p in pairs] == ["#### 0<|end|>", None, "<|end|>"]
    rft, _ = dpo.on_policy(model, settings(n=2, method="rft"), "train", examples)
    assert [(p.chosen, p.rejected) for p in rft] == [(p.chosen, None) for p in pairs]


def test_a_file_of_pairs_trains_and_identical_sides_are_left_out(settings, tmp_path):
    rows = [(f"Say hello to {i}.", f"Hello, {i}!", f"No {i}") for i in range(150)]
    rows += [("b", "same", "same"), ("c", "", "x"), ("long " * 300, "a", "b")]
    file = tmp_path / "pairs.jsonl"
    columns = "prompt", "chosen", "rejected"
    file.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    assert sum(len(load_preferences(str(file), split)[0]) for split in ("train", "validation")) < 152
    run = dpo.dpo(settings(data=str(file), first_difference=False, max_steps=20, nll=1.0))
    assert run["data"]["train"]["pairs"] > 100
    wrong = [x["margin"] for x in read_jsonl(tmp_path / "run/violations.jsonl")]
    pairs = run["data"]["validation"]["pairs"]
    assert len(wrong) == round((1 - run["results"]["last"]["reward_accuracy"]) * pairs)
    assert wrong == sorted(margin for margin in wrong if margin <= 0)
    file.write_text(json.dumps({"prompt": "a", "better": "b"}))
    with pytest.raises(DataError, match="two answers"):
        load_preferences(str(file), "train")


# -----------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("more", [
    {"method": "ipo", "mean_log_probs": True}, {"method": "rft"}, {"method": "sft"}, {"lora_r": 4}
])  # fmt: skip
def test_every_method_trains(settings, more):
    run = dpo.dpo(settings(**more))
    assert run["status"] == "finished" and run["chat"] and run["data"]["pairs"]["problems"] == 80
    found = {"reward_margin", "reward_accuracy", "chosen", "rejected", "exact_match"}
    assert found <= set(run["results"]["last"])


def test_the_reference_has_the_precision_of_training(settings, monkeypatch):
    half = []

    def noted(*args, log_probs=log_probs, **more):
        half.append(torch.is_autocast_enabled("cpu"))
        return log_probs(*args, **more)

    monkeypatch.setattr(dpo, "log_probs", noted)
    dpo.dpo(settings(dtype="bfloat16", max_steps=1))
    assert len(half) >= 3 and all(half)


def test_rounds_are_runs_that_follow_each_other_and_overwriting_the_last_leaves_the_first(settings, tmp_path):
    # Enough tries that a model that is seldom right is right somewhere, in both rounds.
    more = dict(rounds=2, max_steps=1, problems=50, eval_examples=60, n=8)
    dpo.dpo(settings(**more))
    first, last = (read_json(tmp_path / name / "run.json") for name in ("run/round-1", "run"))
    assert last["parent"] == str(tmp_path / "run/round-1")
    assert last["settings"]["first_problem"] == first["settings"]["first_problem"] + 50
    dpo.dpo(settings(**more, overwrite=True))
    assert (tmp_path / "run/round-1/model.safetensors").exists()


def test_a_refused_command_changes_nothing_on_disk(settings, tmp_path):
    def files() -> dict:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    run = dpo.dpo(settings(max_steps=2))
    (tmp_path / "run/run.json").write_text(json.dumps(run | {"status": "interrupted"}))
    before = files()
    with pytest.raises(TrainError, match="other settings"):
        dpo.dpo(settings(max_steps=2, method="rft"))
    lock = runs.lock(tmp_path / "run")
    with pytest.raises(TrainError, match="another process"):
        dpo.dpo(settings(max_steps=2))
    os.close(lock)
    assert files() == before


def test_a_killed_run_goes_on_to_the_same_bits(settings, tmp_path, killed_at):
    """The reference is computed again from the weights of the start, not from those of the checkpoint."""
    dpo.dpo(settings(name="complete"))
    killed_at(5, dpo.dpo, settings(name="cut"))
    dpo.dpo(settings(name="cut"))
    complete, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("complete", "cut"))
    assert complete == cut


@pytest.mark.parametrize("more, why", [
    ({"model": "base"}, "no pair to learn from"), ({"data": "sst2"}, "cannot be checked"),
    ({"rounds": 0}, "rounds"),
    ({"first_difference": False, "nll": 0, "learning_rate": 0.05, "max_steps": 30, "collapse": 0.2},
     "unlearns both sides"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(settings, tiny, more, why):
    more = more | ({"model": tiny["base"]} if "model" in more else {})
    with pytest.raises(TrainError, match=why):
        dpo.dpo(settings(**more))
