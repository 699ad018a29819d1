"""Verifiers: the public score, both kinds, their training, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo
import verifier as script
from data import TASKS, Example, load_task
from support.loading import load_model
from support.metrics import auc, auc_within, calibration
from support.runs import TrainError, read_json
from support.text_model import collate
from verifier import (
    Samples,
    Verifier,
    VerifierConfig,
    backward_row,
    channel_loss,
    combined,
    contrasted,
    fit,
    forward_row,
    logistic,
    right_answers,
    wrong_answers,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tuned, tiny, tmp_path_factory):
    """trained("channel") is the folder of a small verifier; each kind is made once."""
    made = {}

    def make(kind: str, **more) -> str:
        if kind not in made:
            cfg = VerifierConfig(name=f"verifier-{kind}", kind=kind, model=tuned, start=tiny["base"])
            cfg.out, cfg.device, cfg.dtype = str(tmp_path_factory.mktemp("verifier")), "cpu", "float32"
            cfg.max_steps, cfg.batch_size, cfg.eval_every, cfg.learning_rate = 20, 16, 10, 3e-3
            cfg.problems, cfg.n, cfg.held_n, cfg.gold = 60, 4, 6, 100
            cfg.validation_problems = cfg.test_problems = 40
            script.train_verifier(cfg)
            made[kind] = f"{cfg.out}/{cfg.name}"
        return made[kind]

    return make


@pytest.mark.parametrize("kind", ["channel", "head"])
def test_a_verifier_scores_alone_as_in_a_batch(trained, kind):
    verifier = Verifier.load(trained(kind), "cpu")
    examples = load_task("arithmetic", "test")[0][:6]
    problems, answers = [e.text for e in examples], [e.target.strip() for e in examples]
    together = verifier.probabilities(problems, answers)
    alone = [verifier.score(p, a) for p, a in zip(problems, answers, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert all(0 <= p <= 1 for p in alone)
    assert verifier.score(problems[0], "") == 0.0 == verifier.score(problems[0], "  ")
    assert 0 <= verifier.score("why? " * 400, "because " * 400) <= 1  # longer than the context


@pytest.mark.parametrize("kind", ["channel", "head"])
def test_what_was_judged_is_not_judged_again(trained, kind, monkeypatch):
    verifier = Verifier.load(trained(kind), "cpu")
    examples = load_task("arithmetic", "test")[0][10:14]
    problems, answers = (
        [e.text for e in examples] * 2,
        [e.target.strip() for e in examples] + ["1", "2", "3", ""],
    )
    first = verifier.judge(problems, answers)
    again = Verifier.load(trained(kind), "cpu")
    monkeypatch.setattr(again.generator, "log_likelihoods", None)
    np.testing.assert_array_equal(first, again.judge(problems, answers))
    with pytest.raises(TypeError):
        again.judge(problems, answers[::-1])  # other pairs
    again.generator.name = trained("head" if kind == "channel" else "channel")  # another generator's weights
    with pytest.raises(TypeError):
        again.judge(problems, answers)


@pytest.mark.parametrize("kind", ["channel", "head"])
def test_the_record_says_how_well_it_verifies_beside_its_parts(trained, kind):
    run = read_json(Path(trained(kind)) / "run.json")
    found = run["verification"]
    for name in ("verifier", "generator alone", f"{kind} alone"):
        assert {"auc", "auc_within", "best_of_n"} <= set(found[name])
    assert found["problems"] == 40 and found["answers"] == 240 and found["calibration"]["bins"]
    assert len(run["combine"]["logistic"]) == 4


def test_a_channel_reads_the_answer_and_tells_the_problem(tuned):
    model = load_model(tuned, torch.device("cpu"))
    given, told = backward_row(model, "How many?", "3 #### 3")
    decode = model.tokenizer.decode
    assert (decode(given), decode(told)) == ("<|assistant|>3 #### 3<|end|><|user|>", "How many?<|end|>")
    asked, said = forward_row(model, "How many?", "3 #### 3")
    assert (decode(asked), decode(said)) == ("<|user|>How many?<|end|><|assistant|>", "3 #### 3<|end|>")


def test_a_right_answer_has_to_score_above_a_wrong_one(tuned):
    """The loss of one pair, from likelihoods that are computed elsewhere; and which answers are paired."""
    model = load_model(tuned, torch.device("cpu"))
    problem = "Anna has 3 nuts. She buys 4 nuts. How many nuts does she have now?"
    good, bad = "3+4=<<3+4=7>>7\n#### 7", "4-3=<<4-3=1>>1\n#### 1"
    samples = Samples(
        [Example(problem, "")], [[good, bad, "#### 2", good, bad]], np.array([[1, 0, 0, 1, 0]], bool)
    )
    assert right_answers(samples) == [(problem, good)]
    assert wrong_answers(samples) == {problem: [bad, "#### 2"]}
    right, wrong = [("a", "1"), ("a", "2"), ("b", "3")], {"a": ["4"], "b": []}
    assert contrasted(right, wrong, 2) == 2 * [("a", "1"), ("a", "2")]
    assert contrasted(right, wrong, 0) == contrasted(right, {}, 2) == right
    rows = [backward_row(model, problem, a) for a in (good, bad)]
    told = model.log_likelihoods(rows)
    loss, tokens = channel_loss(model.model, *collate(rows, "causal", model.pad), torch.tensor([0]), 2.0)
    assert tokens == len(rows[0][1])
    assert loss.item() == pytest.approx(-told[0] + 2.0 * np.log1p(np.exp(told[1] - told[0])), rel=1e-4)
    alone = *collate(rows[:1], "causal", model.pad), torch.tensor([], dtype=torch.long)
    assert channel_loss(model.model, *alone, 2.0)[0].item() == pytest.approx(-told[0], rel=1e-4)


def test_the_score_is_the_generator_plus_lambda_times_the_channel(trained):
    verifier = Verifier.load(trained("channel"), "cpu")
    p, a = "Anna has 3 nuts. How many nuts does Anna have now?", "She has 3 nuts.\n#### 3"
    own = verifier.generator.log_likelihoods([forward_row(verifier.generator, p, a)])[0]
    back = verifier.core.log_likelihoods([backward_row(verifier.core, p, a)])[0]
    score, _ = verifier.judge([p], [a])
    assert score[0] == pytest.approx(own + verifier.combine["lambda"] * back, abs=1e-4)


def test_lambda_is_the_one_that_chooses_best():
    rng = np.random.default_rng(0)
    right = rng.random((400, 4)) < 0.5
    told = right.ravel()
    parts = np.stack([told * 0.7 + rng.normal(size=1600), told * 2.0 + rng.normal(size=1600)], axis=1)
    found = fit("channel", parts, right, np.full(1600, 10))
    assert 2.0 <= found["lambda"] <= 4.0 and found["logistic"][0] > 0  # 2 / 0.7 is best
    assert fit("channel", parts[:, ::-1], right, np.full(1600, 10))["lambda"] <= 0.5
    sure = fit("channel", parts * 4, right, np.full(1600, 10))  # scores that are too sure of themselves
    assert sure["sharpness"] < found["sharpness"]
    np.testing.assert_array_equal(combined("channel", np.array([[1.0, 2.0]]), 3.0), [7.0])


def test_logistic_regression_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    x = np.stack([rng.normal(size=500) * 20, np.ones(500), rng.integers(20, 60, 500)], axis=1)
    y = rng.random(500) < 1 / (1 + np.exp(-(x[:, 0] * 0.1 - 1 + 0.02 * x[:, 2])))
    theirs = LogisticRegression(C=1e6, tol=1e-8, max_iter=10_000).fit(x[:, [0, 2]], y)
    a, b, c = logistic(x, y)
    np.testing.assert_allclose(
        [a, b, c], [theirs.coef_[0, 0], theirs.intercept_[0], theirs.coef_[0, 1]], rtol=0.02
    )


def test_auc_and_calibration_agree_with_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(2)
    labels, scores = rng.random(300) < 0.4, rng.integers(0, 20, 300) / 20  # with ties
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    assert np.isnan(auc([True, True], [1, 2]))
    p = np.array([0.1] * 10 + [0.9] * 10)
    truth = np.array([1] + [0] * 9 + [1] * 5 + [0] * 5)
    assert calibration(truth, p)["ece"] == pytest.approx(0.2)


def test_auc_within_problems_does_not_see_how_hard_they_are():
    """Scores that know only the problem are perfect over all and worthless within."""
    labels = np.array([[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
    by_problem = labels.mean(1, keepdims=True) + np.zeros((3, 4))
    assert auc(labels.ravel(), by_problem.ravel()) > 0.8
    assert auc_within(labels, by_problem)["value"] == 0.5
    assert auc_within(labels, labels.astype(float))["value"] == 1.0
    assert auc_within(labels, labels.astype(float))["n"] == 2  # the third says nothing


def test_the_head_sees_groups_with_right_and_wrong_answers(trained, tuned):
    from sft import aligned_model
    from verifier import ValueModel, head_loss, value_rows

    cfg = VerifierConfig(model=tuned, device="cpu", group=2, lm_weight=0.0)
    model = aligned_model(cfg)
    net = ValueModel(model.model)
    rows = [([1, 2], [3, 4]), ([1, 2], [5])]
    ids, last, inside = value_rows(rows, 0)
    assert last.tolist() == [3, 2] and inside.tolist() == [
        [False, False, True, True],
        [False, False, True, False],
    ]
    loss, n = head_loss(net, ids, last, inside, torch.tensor([1.0, 0.0]), cfg)
    assert n == 2 and loss.item() == pytest.approx(
        2 * np.log(2) + 2 * np.log(2), rel=1e-5
    )  # values start at 0


def test_a_verifier_of_another_tokenizer_or_generator_is_refused(trained, tmp_path, tiny):
    import shutil

    folder = shutil.copytree(trained("channel"), tmp_path / "v")
    run = read_json(folder / "run.json")
    (folder / "run.json").write_text(json.dumps(run | {"data": run["data"] | {"tokenizer": "x"}}))
    with pytest.raises(TrainError, match="another tokenizer"):
        Verifier.load(folder, "cpu")
    (folder / "run.json").write_text(json.dumps(run | {"parent_hash": "x"}))
    with pytest.raises(TrainError, match="another model"):
        Verifier.load(folder, "cpu")
    with pytest.raises(TrainError, match="no finished verifier"):
        Verifier.load(run["parent"], "cpu")


def test_dpo_and_the_verifier_learn_from_the_same_answers(tuned, tiny, tmp_path):
    """Those of the SFT model, sampled once, whatever the seed of training."""
    same = {
        "model": tuned,
        "out": str(tmp_path),
        "problems": 30,
        "first_problem": 5000,
        "n": 8,
        "max_steps": 2,
    }
    same |= {"device": "cpu", "dtype": "float32", "learning_rate": 1e-4, "eval_every": 0}
    dpo.dpo(dpo.DPOConfig(**same, name="dpo", seed=7, eval_examples=60))
    before = set(Path(tuned, "samples").glob("*-train-*"))
    cfg = VerifierConfig(
        **same | {"model": f"{tmp_path}/dpo"}, answers_of=tuned, start=tuned, gold=10, seed=8
    )
    cfg.validation_problems = cfg.test_problems = 20
    script.train_verifier(cfg)
    assert set(Path(tuned, "samples").glob("*-train-*")) == before
    assert not list(Path(f"{tmp_path}/dpo/samples").glob("*-train-*"))
    cfg.answers_of, cfg.name = tiny["base"], "other"
    with pytest.raises(TrainError, match="answers_of"):
        script.train_verifier(cfg)


def test_samples_of_one_kind_are_refused(tuned, tiny, monkeypatch, tmp_path):
    def only_wrong(model, task, split, examples, *rest):
        return Samples(examples, [["#### 0"] * 2 for _ in examples], np.zeros((len(examples), 2), bool))

    monkeypatch.setattr(script, "judged", only_wrong)
    cfg = VerifierConfig(model=tuned, start=tiny["base"], out=str(tmp_path), device="cpu", problems=5)
    with pytest.raises(TrainError, match="nothing to tell apart"):
        script.train_verifier(cfg)
    with pytest.raises(TrainError, match="not instruction-tuned"):
        script.train_verifier(VerifierConfig(model=tiny["base"], out=str(tmp_path), device="cpu"))
    assert TASKS["arithmetic"].metric == "exact_match"
