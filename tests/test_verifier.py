"""Verifiers: the public score, both kinds, their training, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dpo
import verifier as script
from data import DataError, Example, load_task
from finetune import chat_model
from support.loading import load_model
from support.metrics import auc, auc_within, calibration
from support.runs import TrainError, read_json
from support.samples import Samples
from support.text_model import collate
from verifier import (
    ChannelTraining,
    HeadTraining,
    ValueHead,
    Verifier,
    VerifierConfig,
    backward_row,
    forward_row,
)

pytestmark = pytest.mark.usefixtures("one_thread")
PROBLEM = "Anna has 3 nuts. She buys 4 nuts. How many nuts does she have now?"
GOOD, BAD = "3+4=<<3+4=7>>7\n#### 7", "4-3=<<4-3=1>>1\n#### 1"
KINDS = pytest.mark.parametrize("kind", ["channel", "head"])


@pytest.fixture(scope="module")
def trained(tuned, tiny, tmp_path_factory):
    """trained("channel") is the folder of a small verifier; each kind is made once."""
    made = {}

    def make(kind: str) -> str:
        if kind not in made:
            small = dict(device="cpu", dtype="float32", max_steps=20, batch_size=16, eval_every=10)
            small |= dict(problems=60, n=4, held_n=6, gold=100, validation_problems=20, test_problems=20)
            small |= dict(model=tuned, start=tiny["base"], kind=kind, learning_rate=3e-3)
            made[kind] = str(tmp_path_factory.mktemp("out") / kind)
            script.train_verifier(VerifierConfig(name=kind, out=str(Path(made[kind]).parent), **small))
        return made[kind]

    return make


@pytest.fixture
def model(tuned):
    return load_model(tuned, torch.device("cpu"))


# -----------------------------------------------------------------------------
# The score


@KINDS
def test_a_verifier_scores_alone_as_in_a_batch_and_once(trained, kind, monkeypatch):
    verifier = Verifier.load(trained(kind), "cpu")
    examples = load_task("arithmetic", "test")[0][:6]
    problems, answers = [e.text for e in examples] * 2, [e.target.strip() for e in examples] * 2
    alone = [verifier.score(p, a) for p, a in zip(problems[:6], answers[:6], strict=True)]
    found = verifier.score_all(problems, answers)
    np.testing.assert_allclose(found[1], alone * 2, atol=1e-5)
    assert verifier.score(problems[0], "") == 0.0 == verifier.score(problems[0], "  ")
    assert 0 <= verifier.score("why? " * 400, "because " * 400) <= 1  # longer than the context
    again = Verifier.load(trained(kind), "cpu")
    monkeypatch.setattr(again.generator, "log_likelihoods", None)
    np.testing.assert_array_equal(found, again.score_all(problems, answers))
    with pytest.raises(TypeError):
        again.score_all(problems, answers[::-1])  # other pairs
    again.generator.name = trained("head" if kind == "channel" else "channel")  # another generator's weights
    with pytest.raises(TypeError):
        again.score_all(problems, answers)
    run = read_json(Path(trained(kind)) / "run.json")
    assert {"verifier", "generator alone", f"{kind} alone"} <= run["verification"].keys()
    assert "AUC" in script.describe(Path("out"), run)


def test_the_channel_reads_the_answer_and_predicts_the_problem(model, trained):
    decode = model.tokenizer.decode
    read, predicted = backward_row(model, "How many?", "3 #### 3")
    assert (decode(read), decode(predicted)) == ("<|assistant|>3 #### 3<|end|><|user|>", "How many?<|end|>")
    read, predicted = forward_row(model, "arithmetic", "How many?", "3 #### 3")
    assert (decode(read), decode(predicted)) == ("<|user|>How many?<|end|><|assistant|>", "3 #### 3<|end|>")
    verifier = Verifier.load(trained("channel"), "cpu")
    generator, channel = verifier.generator, verifier.model
    forward = generator.log_likelihoods([forward_row(generator, "arithmetic", PROBLEM, GOOD)])[0]
    backward = channel.log_likelihoods([backward_row(channel, PROBLEM, GOOD)])[0]
    scores, _ = verifier.score_all([PROBLEM], [GOOD])
    assert scores[0] == pytest.approx(forward + verifier.fitted["lambda"] * backward, abs=1e-4)


def test_a_verifier_finds_its_generator_where_both_were_moved_and_takes_no_other(trained, tmp_path):
    folder = shutil.copytree(trained("channel"), tmp_path / "v")
    run = read_json(folder / "run.json")

    def load(**changed) -> Verifier:
        (folder / "run.json").write_text(json.dumps(run | changed))
        return Verifier.load(folder, "cpu")

    for changed, why in (
        ({"parent_hash": "x"}, "trained anew"),
        ({"parent": "out/gone"}, "out/gone, which is gone"),
        ({"combine": {}}, "no finished verifier"),
    ):
        with pytest.raises(TrainError, match=why):
            load(**changed)
    moved = shutil.copytree(run["parent"], tmp_path / "generator")
    found = load(parent="out/generator", settings=run["settings"] | {"out": "out"})
    assert found.generator.name == str(moved)
    assert found.score(PROBLEM, GOOD) == Verifier.load(trained("channel"), "cpu").score(PROBLEM, GOOD)
    shutil.copytree(folder, tmp_path / Path(run["parent"]).name)  # another model of the recorded one's name
    assert load().generator.name == run["parent"]


# -----------------------------------------------------------------------------
# The losses


def test_a_right_answer_has_to_score_above_a_wrong_one(model):
    """The loss of one pair, from likelihoods that are computed elsewhere."""
    rows = [backward_row(model, PROBLEM, a) for a in (GOOD, BAD)]
    good, bad = model.log_likelihoods(rows)
    loss, tokens = script.channel_loss(
        model.model, *collate(rows, "causal", model.pad), torch.tensor([0]), 2.0
    )
    assert tokens == len(rows[0][1])
    assert loss.item() == pytest.approx(-good + 2.0 * np.log1p(np.exp(bad - good)), rel=1e-4)
    alone = *collate(rows[:1], "causal", model.pad), torch.tensor([], dtype=torch.long)
    assert script.channel_loss(model.model, *alone, 2.0)[0].item() == pytest.approx(-good, rel=1e-4)


def test_a_channel_learns_each_right_answer_beside_the_wrong_ones_to_its_problem(tuned, model):
    right = np.array([[1, 0, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
    answers = [[GOOD, BAD, "#### 2", GOOD, BAD], ["#### 5"] * 5]
    samples = Samples([Example(PROBLEM, ""), Example("Two and three?", "")], answers, right)
    cfg = VerifierConfig(model=tuned, start=tuned, device="cpu", gold=2, repeats=0, batch_size=2)
    good, bad, two = (backward_row(model, PROBLEM, a) for a in (GOOD, BAD, "#### 2"))
    channel = ChannelTraining(cfg, model, samples, samples)
    assert [len(wrong) for _, wrong in channel.examples] == [0, 0, 2, 0]  # two of them are gold
    assert channel.examples[2] == (good, [bad, two])
    ids, _, _, places = channel.batch(0, 0, 2)
    members = channel.members(0, 0, 2)
    assert places.tolist() == [at for at, i in enumerate(members) if i == 2] and len(ids) == 2 + len(places)
    cfg.repeats = 3
    assert [len(w) for _, w in ChannelTraining(cfg, model, samples, samples).examples] == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("of_the_hub", [False, True])
@pytest.mark.parametrize("more", [{"contrast": 0, "lm_weight": 0}, {"contrast": 2, "lm_weight": 0.5}])
def test_the_loss_of_the_head_is_a_plain_loop(tuned, tiny, more, of_the_hub):
    cfg = VerifierConfig(model=tiny["gpt2"] if of_the_hub else tuned, device="cpu", group=2, **more)
    torch.manual_seed(0)
    net = ValueHead(chat_model(cfg)).eval()
    torch.nn.init.normal_(net.value.weight)
    rows = [([1, 2], [3, 4]), ([1, 2], [5])]  # the right and the wrong answer to one problem
    ids, inside = script.value_rows(rows, 0)
    assert inside.tolist() == [[False, False, True, True], [False, False, True, False]]
    right, weight = torch.tensor([True, False]), torch.tensor(2.0)  # two answers, one comparison
    loss, n = script.head_loss(net, ids, inside, right, weight, cfg)
    logits, values = net(ids, torch.ones_like(inside))
    expected = -F.logsigmoid(values[0, 2:4]).mean() - F.logsigmoid(-values[1, 2])
    expected += 2 * cfg.contrast * -F.logsigmoid(values[0, 3] - values[1, 2])  # times the answers
    log_p = logits.view(*ids.shape, -1)[0].log_softmax(-1)
    expected -= cfg.lm_weight * (log_p[1, 3] + log_p[2, 4]) / 2
    assert n == 2 and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_step_of_the_head_may_be_cut_into_micro_batches_of_whole_problems(tuned):
    rng = np.random.default_rng(0)
    right = rng.random((9, 5)) < 0.4
    examples = load_task("arithmetic", "test")[0][:9]
    samples = Samples(examples, [[f"#### {n}" for n in row] for row in rng.integers(9, size=(9, 5))], right)
    cfg = VerifierConfig(model=tuned, device="cpu", batch_size=7, grad_accum_steps=3, group=2)
    cfg.gradient_checkpointing = True
    head = HeadTraining(cfg, None, samples, samples)
    assert head.model.lm.gradient_checkpointing and cfg.batch_size == 6
    torch.nn.init.normal_(head.model.value.weight)
    parts = [head.batch(1, first, 6) for first in (0, 6, 12)]
    whole, *pieces = (head.loss(head.model, *tensors) for tensors in [head.batch(1, 0, 18), *parts])
    assert whole[0].item() == pytest.approx(sum(loss.item() for loss, _ in pieces), rel=1e-5)
    assert whole[1] == sum(n for _, n in pieces) == 18


# -----------------------------------------------------------------------------
# Fitting, and how well it verifies


def test_lambda_is_the_one_that_chooses_best():
    rng = np.random.default_rng(0)
    right = rng.random((400, 4)) < 0.5
    parts = np.stack([right.ravel() * w + rng.normal(size=1600) for w in (0.7, 2.0)], axis=1)

    def fitted(parts: np.ndarray) -> dict:
        return script.fit("channel", parts, np.stack([*parts.T, np.ones(1600)], axis=1), right)

    found = fitted(parts)
    assert 2.0 <= found["lambda"] <= 4.0 and found["logistic"][0] > 0  # 2 / 0.7 is best
    assert fitted(parts[:, ::-1])["lambda"] <= 0.5
    assert fitted(parts * 4)["sharpness"] < found["sharpness"]  # scores that are too sure of themselves


def test_logistic_regression_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    x = np.stack([rng.normal(size=500) * 20, np.ones(500), rng.integers(20, 60, 500)], axis=1)
    y = rng.random(500) < 1 / (1 + np.exp(-(x[:, 0] * 0.1 - 1 + 0.02 * x[:, 2])))
    theirs = LogisticRegression(C=1e6, tol=1e-8, max_iter=10_000).fit(x[:, [0, 2]], y)
    expected = [theirs.coef_[0, 0], theirs.intercept_[0], theirs.coef_[0, 1]]
    np.testing.assert_allclose(script.logistic(x, y), expected, rtol=0.02)


def test_auc_agrees_with_scikit_learn_and_within_problems_does_not_see_how_hard_they_are():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(2)
    labels, scores = rng.random(300) < 0.4, rng.integers(0, 20, 300) / 20  # with ties
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    assert np.isnan(auc([True, True], [1, 2]))
    labels = np.array([[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
    by_problem = labels.mean(1, keepdims=True) + np.zeros((3, 4))
    assert auc(labels.ravel(), by_problem.ravel()) > 0.8 and auc_within(labels, by_problem)["value"] == 0.5
    found = auc_within(labels, labels.astype(float))
    assert found["value"] == 1.0 and found["n"] == 2  # the third says nothing
    truth = np.array([1] + [0] * 9 + [1] * 5 + [0] * 5)
    assert calibration(truth, np.repeat([0.1, 0.9], 10))["ece"] == pytest.approx(0.2)


# -----------------------------------------------------------------------------
# Training


def test_dpo_and_the_verifier_learn_from_the_same_answers(tuned, tiny, tmp_path):
    """Those of the SFT model, sampled once, whatever the seed of training."""
    same = dict(out=str(tmp_path), problems=30, first_problem=5000, n=8, max_steps=2, device="cpu")
    same |= dict(dtype="float32", learning_rate=1e-4, eval_every=0)
    dpo.dpo(dpo.DPOConfig(**same, model=tuned, name="dpo", seed=7, eval_examples=60))
    before = set(Path(tuned, "samples").glob("*-train-*"))
    same |= dict(
        model=f"{tmp_path}/dpo", start=tuned, gold=10, seed=8, validation_problems=20, test_problems=20
    )
    script.train_verifier(VerifierConfig(**same, answers_of=tuned))
    assert set(Path(tuned, "samples").glob("*-train-*")) == before
    assert not list(Path(f"{tmp_path}/dpo/samples").glob("*-train-*"))
    with pytest.raises(TrainError, match="answers_of"):
        script.train_verifier(VerifierConfig(**same, answers_of=tiny["base"], name="other"))


def test_labelled_solutions_are_learnt_without_sampling(tuned, tiny, tmp_path):
    wrong = {"solution": "No.\nA: 0", "is_correct": False}
    rows = []
    for i in range(60):
        right = {"solution": f"It is {i + 1}.\nA: {i + 1}", "is_correct": True}
        rows.append({"question": f"What is {i} + 1?", "a": right, "b": wrong})
    file = tmp_path / "solutions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    cfg = VerifierConfig(model=tuned, start=tiny["base"], solutions=str(file), out=str(tmp_path))
    cfg.device, cfg.dtype, cfg.max_steps, cfg.batch_size, cfg.gold = "cpu", "float32", 2, 4, 4
    run = script.train_verifier(cfg)
    assert run["verification"]["right_by_source"] == [1.0, 0.0]
    assert run["data"]["train"]["source"] == str(file)
    for damage, message in (
        ({"b": 0}, "as many labelled solutions"),
        ({"question": math.nan}, 'solutions.jsonl, row 61: "question" should be text'),
        ({"a": wrong | {"is_correct": "false"}}, 'row 61: "solution" should be text'),
        ({"a": wrong | {"solution": None}}, 'row 61: "solution" should be text'),
    ):
        file.write_text("\n".join(map(json.dumps, [*rows, rows[0] | damage])))
        with pytest.raises(DataError, match=message):
            script.labelled(str(file))


def test_samples_of_one_kind_are_refused(tuned, tiny, monkeypatch, tmp_path):
    def only_wrong(model, task, split, examples, *rest):
        return Samples(examples, [["#### 0"] * 2 for _ in examples], np.zeros((len(examples), 2), bool))

    monkeypatch.setattr(script, "draw", only_wrong)
    for model, why in ((tuned, "nothing to tell apart"), (tiny["base"], "not instruction-tuned")):
        cfg = VerifierConfig(model=model, start=tiny["base"], out=str(tmp_path), device="cpu", problems=5)
        with pytest.raises(TrainError, match=why):
            script.train_verifier(cfg)
