"""Stage 6: a verifier. It estimates how likely an answer to a problem is right, without the ground truth.

    python verifier.py configs/verifier.py                            # minutes on a laptop
    python verifier.py configs/verifier.py --kind=head --name=head    # the published baseline
    python verifier.py --model=out/sft-gsm8k --start=out/sft-gsm8k --task=gsm8k --solutions=FILE.jsonl

From Python, `Verifier.load("out/verifier").score(problem, answer)`.

A verifier belongs to a chat model, its generator. It scores the answers of any model. There are two kinds:

channel     A language model of the other direction: it reads an answer and predicts the problem (the tokens
            keep their order). By Bayes, p(answer | problem) is proportional to p(answer) p(problem | answer).
            The score of an answer is that of the noisy channel in machine translation (Brown et al., 1993),

                log p(answer | problem)  +  lambda log p(problem | answer)
                      generator                     channel

            The generator checks the calculation. The channel checks that the answer is about this problem: a
            sentence that the answer ignores is hard to predict from it. The channel learns from true
            solutions, from right answers of the generator (or of --answers_of another model, such as the
            generator before DPO), and from wrong ones, which have to score less (--contrast).
head        The generator with a linear layer that predicts at every token of an answer whether it will be
            right (Cobbe et al., 2021). It learns one bit an answer, a channel learns from every word of the
            problem.

The score ranks the answers to one problem. eval.py chooses by it: the answer with the highest score, or a
vote in which an answer weighs exp(sharpness x score). The probability can be compared between problems, and
stops sampling when an answer is sure enough.

Calibration, on answers to the validation split: lambda and sharpness are chosen, and a logistic regression
predicts right or wrong from both terms and the length of the problem; the checkpoint of a head is the best
one there, too. Nothing is fitted on the test split.

It reads a generator and writes a run folder out/NAME; run.json says how well it verifies, beside the
generator's own log-probability and the channel alone. judged/ of both folders keeps log-probabilities.
"""

from support.terminal import run_script

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import parse_config
from data import TASKS, Example, checkable, load_task, refuse_overlap, talk
from finetune import AdaptConfig, Epochs, FineTuner, TrainingSet, chat_model
from support.files import keep_if_possible, write_atomically
from support.loading import is_smoke, load_model, read_run
from support.machine import pick_device
from support.metrics import auc, auc_within, calibration, proportion
from support.model_card import write_run
from support.results import parent_of
from support.runs import TrainError, run_folder, run_stage, weights_hash
from support.samples import Samples, draw, labelled
from support.text_model import Row, TextModel, collate, pad_rows, row_lengths, target_logits
from train import rows_per_step


@dataclass
class VerifierConfig(AdaptConfig):
    """Whose answers are scored, and by what."""

    name: str = "verifier"  # the run's folder is {out}/{name}
    model: str = "out/dpo"  # the generator
    kind: Literal["channel", "head"] = "channel"  # from answer to problem, or a number from the generator
    start: str = "out/sft"  # channel: the weights it starts from
    task: str = "arithmetic"  # whose answers can be checked
    gold: int = 2000  # channel: true solutions that are turned around, the first of the train split
    problems: int = 4000  # problems that the generator answers, to learn from
    first_problem: int = 12_000  # of the train split: behind those that SFT and DPO have seen
    solutions: str = ""  # a file of labelled solutions to learn from and be tested on, instead of sampling
    answers_of: str = ""  # whose answers it learns from; default: the generator's
    n: int = 8  # answers a problem, to learn from
    held_n: int = 8  # answers to a problem of validation or test
    temperature: float = 0.8  # at which the answers to learn from are sampled
    held_temperature: float = 1.0  # the same for validation and test, as in eval.py
    seed_samples: int = 1  # of sampling; eval.py's, so that the answers to the test problems are drawn once
    validation_problems: int = 500  # on which lambda and the probabilities are fitted; 0: all
    test_problems: int = 0  # on which the verifier is reported; 0: all
    lm_weight: float = 0.1  # head: weight of the language-model loss on right answers
    contrast: float = 1.0  # weight of the comparison of right and wrong answers to one problem
    repeats: int = 0  # channel: 0: all right answers once; n: those beside wrong ones, n times
    group: int = 4  # head: answers to one problem that are seen together
    epochs: float = 2.0  # times through the examples
    learning_rate: float = 1e-3  # the highest


# -----------------------------------------------------------------------------
# The public part: score an answer


@dataclass
class Verifier:
    """A trained verifier, ready to score answers."""

    kind: str
    generator: TextModel
    model: "TextModel | ValueHead"  # the channel, or a copy of the generator with a value head
    task: str  # whose question is asked
    fitted: dict  # on validation, see `fit`: "lambda", "sharpness" of a vote, "logistic" coefficients
    keep: bool = True  # log-probabilities of many answers stay on the disk

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", keep: bool = True) -> "Verifier":
        """From a run folder, with its generator. Raises TrainError if that is gone or was trained anew."""
        run = read_run(str(folder))
        fitted = run.get("combine", {}).keys()
        if "verification" not in run or not {"lambda", "logistic", "sharpness"} <= fitted:
            raise TrainError(f"{folder} holds no finished verifier of this version: run verifier.py again")
        generator = load_model(generator_of(folder), pick_device(device))
        model = load_trained(run["verifier"], folder, device)
        return cls(run["verifier"], generator, model, run["settings"]["task"], run["combine"], keep)

    @property
    def name(self) -> str:
        """Its run folder."""
        return self.model.name

    def score(self, problem: str, answer: str) -> float:
        """The probability, 0 to 1, that the answer is right."""
        return float(self.score_all([problem], [answer])[1][0])

    def score_all(self, problems: list[str], answers: list[str], progress: str = "") -> np.ndarray:
        """(2, n): scores, which rank answers to one problem; and probabilities that the answers are right.

        The final number is put on a line of its own, where it stands in the answers of training.
        """
        answers = [re.sub(r"\s*####\s*", "\n#### ", answer) for answer in answers]
        return self.calibrated(problems, answers, self.terms(problems, answers, progress))

    def calibrated(self, problems: list[str], answers: list[str], terms: np.ndarray) -> np.ndarray:
        """(2, n) scores and probabilities from (n, 2) terms; an empty answer is certainly wrong."""
        scores = combined(self.kind, terms, self.fitted["lambda"])
        logits = self.features(problems, terms) @ self.fitted["logistic"]
        probabilities = 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
        empty = np.array([not answer.strip() for answer in answers])
        return np.where(empty, [[-1e9], [0.0]], [scores, probabilities])

    def features(self, problems: list[str], terms: np.ndarray) -> np.ndarray:
        """(n, 4) what a probability depends on: both terms, 1, and the number of tokens of the problem.

        The score would not do: it ranks the answers to one problem, but between problems it differs most by
        their lengths.
        """
        lengths = [len(self.generator.encode(problem)) for problem in problems]
        return np.stack([*terms.T, np.ones(len(terms)), lengths], axis=1)

    def terms(self, problems: list[str], answers: list[str], progress: str) -> np.ndarray:
        """(n, 2) log p(answer | problem) under the generator, and what the verifier adds: log p(problem |
        answer), or the head's logit. The same answer is read once; `keep`: what was read stays on disk.
        """
        pairs = list(zip(problems, answers, strict=True))
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        forward = [forward_row(self.generator, self.task, *pair) for pair in place]
        if self.kind == "head":
            added = self.read(self.model.text_model, self.model.logits, forward, progress)
        else:
            backward = [backward_row(self.model, *pair) for pair in place]
            added = self.read(self.model, self.model.log_likelihoods, backward, progress)
        said = self.read(self.generator, self.generator.log_likelihoods, forward, progress)
        return np.stack([said, added], axis=1)[[place[pair] for pair in pairs]]

    def read(self, model: TextModel, score: Callable, rows: list[Row], progress: str) -> np.ndarray:
        """score(rows, progress), kept in the model's folder: several verifiers judge the same answers.

        Not of a single row, and not of a model of the hub, which has no folder.
        """
        weights = weights_hash(model.name) if self.keep and len(rows) > 1 else None
        key = json.dumps([weights, str(model.dtype), model is self.generator, rows])
        file = Path(model.name, "judged", hashlib.sha256(key.encode()).hexdigest()[:12] + ".float64")
        if weights and file.exists():
            return np.fromfile(file)
        found = score(rows, progress)
        if weights:
            keep_if_possible(write_atomically, file, found.tofile)
        return found


def generator_of(folder: str | Path) -> str:
    """Where a verifier's generator is, also if both were moved. Raises TrainError if it is nowhere."""
    run = read_run(str(folder))
    for place in (run["parent"], parent_of(run, Path(folder).parent)):
        if place and weights_hash(str(place)) == run["parent_hash"]:
            return str(place)
    raise TrainError(f"{folder} needs {run['parent']}, which is gone or was trained anew: train it anew, too")


def load_trained(kind: str, folder: str | Path, device: str) -> "TextModel | ValueHead":
    model = load_model(str(folder), pick_device(device))
    if kind == "head":
        model = ValueHead(model)
        model.read_value(Path(folder))
    return model


def combined(kind: str, terms: np.ndarray, weight: float) -> np.ndarray:
    """(n) scores: log p(answer | problem) + lambda log p(problem | answer); of a head its logit."""
    return terms[:, 1] if kind == "head" else terms[:, 0] + weight * terms[:, 1]


def forward_row(model: TextModel, task: str, problem: str, answer: str) -> Row:
    """What the generator reads and predicts: the problem, then the answer. A long problem loses its end."""
    predicted = model.reply_ids(answer)[: model.context_length // 2]
    room = model.context_length - len(predicted)
    return model.prompt(TASKS[task], problem, room=room)[0], predicted


def backward_row(model: TextModel, problem: str, answer: str) -> Row:
    """What the channel reads and predicts: the answer, then the problem. A long answer loses its beginning.

    A template that is not ours need not allow that the assistant begins: there the turns change their roles.
    """
    predicted = model.reply_ids(problem)[: model.context_length // 2]
    if model.marks:
        read, _ = model.conversation([{"role": "assistant", "content": answer}])
        read = [*read, model.tokenizer.special_id("<|user|>")]
    else:
        read, _ = model.conversation(talk(answer or "-"))
    return read[-(model.context_length - len(predicted)) :], predicted


# -----------------------------------------------------------------------------
# The channel: a language model learns to predict problems from answers


class ChannelTraining(TrainingSet):
    """The channel, and what it learns from: true solutions and the generator's right answers.

    Where the generator also gave wrong answers to the problem, one of them is drawn at each step, and the
    problem has to be likelier after the right answer (`channel_loss`): a language model that reads only right
    answers never learns that "sells 4 stamps" does not fit 4 nuts that were sold. Two thirds of the right
    answers have no wrong one beside them; `repeats` n uses only the others, n times, each time beside another
    wrong one.
    """

    options = {"keeps_best": False}  # the loss of a channel does not say how it orders answers

    def __init__(self, cfg: VerifierConfig, generator: TextModel, learn: Samples, held_out: Samples):
        self.cfg = cfg
        self.loss = partial(channel_loss, contrast=cfg.contrast)
        self.model = chat_model(replace(cfg, model=cfg.start))
        if self.model.tokenizer.hash != generator.tokenizer.hash:
            raise TrainError(
                f"{cfg.start} has another tokenizer than {cfg.model}: --start must be of its family"
            )
        gold = gold_examples(cfg)
        answers = self.answers(learn)
        contrasted = [answer for answer in answers if answer[1]]
        solutions = [(row, []) for row in self.solutions(gold)]
        self.examples = solutions + (contrasted * cfg.repeats or answers)  # (right, [wrong, ...])
        right = [row for row, _ in self.examples]
        super().__init__(right, rows_per_step(cfg), cfg.seed, "causal", self.model.pad)
        self.tokens = self.lengths.mean()
        self.held_out = self.solutions(held_out.examples)
        self.counts = {"answers": len(right), "gold": len(gold), "contrasted": len(contrasted)}
        self.about = {"start_hash": weights_hash(cfg.start)}
        if is_smoke(cfg.start):
            self.about["smoke"] = True

    def solutions(self, examples: list[Example]) -> list[Row]:
        return [backward_row(self.model, e.text, e.target.strip()) for e in examples if e.target]

    def answers(self, samples: Samples) -> list[tuple[Row, list[Row]]]:
        """Every right answer, once, beside the wrong ones to its problem."""
        found = []
        for i, example in enumerate(samples.examples):
            row = partial(backward_row, self.model, example.text)
            wrong = samples.distinct(i, right=False) if self.cfg.contrast else []
            wrong = [row(answer) for answer in wrong]
            found += [(row(answer), wrong) for answer in samples.distinct(i, right=True)]
        return found

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, ...]:
        """`collate` of right answers, then of wrong ones; and, for each of these, its right one's row."""
        rng = np.random.default_rng([self.seed, step, 0])
        rows, contrast, places = [], [], []
        for at, i in enumerate(self.members(step, 0, first + count), -first):
            right, wrong = self.examples[i]
            drawn = wrong[rng.integers(len(wrong))] if wrong else None  # drawn for earlier rows, too
            if at < 0:
                continue
            rows.append(right)
            if drawn:
                contrast.append(drawn)
                places.append(at)
        return *collate(rows + contrast, "causal", self.pad), torch.tensor(places, dtype=torch.long)

    def evaluate(self, _net, _final) -> dict:
        tokens = sum(len(predicted) for _, predicted in self.held_out)
        return {"val_loss": -self.model.log_likelihoods(self.held_out).sum() / tokens}


def gold_examples(cfg: VerifierConfig) -> list[Example]:
    """Problems of the train split with their true solutions, from which a channel learns."""
    if cfg.kind == "head" or not cfg.gold:
        return []
    return load_task(cfg.task, "train", count=cfg.gold)[0]


def channel_loss(model: nn.Module, ids, mask, targets, places, contrast: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the problems given right answers, plus `contrast` times -log sigmoid of how much
    likelier a problem is after a right answer than after a wrong one: (sum, tokens).

    The last rows are the wrong answers, one for each right answer in `places`.
    """
    logits = target_logits(model, "causal", ids, mask, targets).float().flatten(0, 1)
    nats = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets).sum(1)
    n = len(ids) - len(places)
    loss = nats[:n].sum() - contrast * F.logsigmoid(nats[n:] - nats[places]).sum()
    return loss, (targets[:n] != -100).sum()


# -----------------------------------------------------------------------------
# The value head: Cobbe et al.'s verifier


class ValueHead(nn.Module):
    """A decoder and a linear layer that gives a logit at every token: will this become a right answer?

    For the Trainer it looks like a TextModel.
    """

    def __init__(self, text_model: TextModel):
        super().__init__()
        self.text_model = text_model
        self.tokenizer = text_model.tokenizer
        self.chat = text_model.chat
        self.name = text_model.name
        self.lm = text_model.model
        self.value = nn.Linear(self.lm.config.d_model if text_model.ours else self.lm.config.hidden_size, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        self.to(text_model.device)

    @property
    def model(self) -> nn.Module:
        return self

    def forward(self, ids: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
        """ids, learned (B, T) -> logits of the next token where it is learned (N, V), values (B, T)."""
        if self.text_model.ours:
            x = self.lm.hidden(ids)
            return self.lm.logits(x[learned]), self.value(x).squeeze(-1)
        kept = learned.any(0).nonzero().squeeze(1)  # logits of all columns would fill the memory
        out = self.lm(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=kept)
        return out.logits[learned[:, kept]], self.value(out.hidden_states[-1].float()).squeeze(-1)

    @torch.no_grad()
    def logits(self, rows: list[Row], progress: str = "") -> np.ndarray:
        """(n) values at the end of each answer."""
        model = self.text_model

        def values_of(index: list[int]) -> list[float]:
            ids, inside = value_rows([rows[i] for i in index], model.pad)
            ids = ids.to(model.device)
            _, values = self(ids, torch.zeros_like(ids, dtype=torch.bool))
            return last_value(values.cpu().float(), inside).tolist()

        return np.array(model.in_batches(values_of, row_lengths(rows), progress))

    def save(self, folder: Path) -> None:
        self.text_model.save(folder)
        save_file(self.value.state_dict(), folder / "value.safetensors")

    def read_weights(self, folder: Path) -> None:
        self.text_model.read_weights(folder)
        self.read_value(folder)

    def read_value(self, folder: Path) -> None:
        self.value.load_state_dict(load_file(folder / "value.safetensors"))


class HeadTraining(Epochs):
    """The generator with a value head, and its answers, right and wrong, `group` of them a problem."""

    about = {}

    def __init__(self, cfg: VerifierConfig, _generator: TextModel, learn: Samples, held_out: Samples):
        if rows_per_step(cfg) > cfg.batch_size * cfg.grad_accum_steps:
            raise TrainError("--kind=head trains in one process")
        self.options = {"counts_rows": True, "rows_together": cfg.group}
        self.loss = partial(head_loss, cfg=cfg)
        self.cfg, self.right, self.held_out_right = cfg, learn.right, held_out.right  # (P, n)
        self.model = ValueHead(chat_model(cfg))
        self.rows, self.held_out = self.rows_of(learn), self.rows_of(held_out)  # (P n)
        cfg.batch_size = max(1, cfg.batch_size // cfg.group) * cfg.group  # the answers to whole problems
        super().__init__(rows_per_step(cfg) // cfg.group)
        self.tokens = np.mean(row_lengths(self.rows))
        self.counts = {"answers": self.right.size, "right": int(self.right.sum())}

    def rows_of(self, samples: Samples) -> list[Row]:
        model, task = self.model.text_model, self.cfg.task
        return [forward_row(model, task, *pair) for pair in zip(*samples.flat(), strict=True)]

    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.cfg.seed, epoch]).permutation(len(self.right))

    def answers(self, step: int) -> np.ndarray:
        """Indices of a step's rows: of each problem right and wrong answers by turns."""
        n = self.right.shape[1]
        found = []
        for p in self.members(step, 0, self.per_step):
            drawn = np.random.default_rng([self.cfg.seed, step, p]).permutation(n)
            right = self.right[p, drawn]
            rank = np.where(right, right.cumsum(), (~right).cumsum())  # among the answers of its kind
            turns = drawn[np.lexsort((~right, rank))]  # the first right one, the first wrong one, ...
            found.append(p * n + np.resize(turns, self.cfg.group))
        return np.concatenate(found)

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, ...]:
        answers = self.answers(step)
        labels = torch.tensor(self.right.ravel()[answers])
        pairs = pairs_of(labels, self.cfg.group).sum().clamp(min=1)  # of the whole step
        some = slice(first, first + count)
        rows = [self.rows[i] for i in answers[some]]
        return *value_rows(rows, self.model.text_model.pad), labels[some], len(answers) / pairs

    def evaluate(self, _net, _final) -> dict:
        right = self.held_out_right
        logits = self.model.logits(self.held_out)
        loss = F.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(right.ravel()).double())
        return {"val_loss": loss, "auc_within": auc_within(right, logits.reshape(right.shape))["value"]}


def value_rows(rows: list[Row], pad: int) -> tuple[Tensor, Tensor]:
    """ids, and which of them belong to an answer: (B, T) each."""
    ids = pad_rows([prompt + answer for prompt, answer in rows], pad)
    inside = pad_rows([[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows], 0)
    return ids, inside.bool()


def last_value(values: Tensor, inside: Tensor) -> Tensor:
    """(B) the value at the last token of each answer, of values (B, T)."""
    last = inside.cumsum(1).argmax(1, keepdim=True)
    return values.gather(1, last).squeeze(1)


def pairs_of(right: Tensor, group: int) -> Tensor:
    """(problems, group, group) True for a right and a wrong answer to one problem; right (B) bool."""
    right = right.view(-1, group)
    return right.unsqueeze(2) & ~right.unsqueeze(1)


def head_loss(model: nn.Module, ids, inside, right, weight, cfg: VerifierConfig) -> tuple[Tensor, int]:
    """Binary cross-entropy at every token of an answer, the language-model loss on right answers, and a
    comparison of right and wrong answers to one problem, `cfg.group` rows each: (sum, answers).

    `weight`: the answers of the step over its comparisons. It makes the comparisons count as their mean over
    the whole step, however that is cut.
    """
    learned = torch.zeros_like(inside)  # the positions whose next token is of a right answer
    if cfg.lm_weight:
        learned[:, :-1] = inside[:, 1:] & right.unsqueeze(1)
    logits, values = model(ids, learned)
    values, tokens = values.float(), inside.sum(1)
    wanted = right.float().unsqueeze(1).expand_as(values)
    each = F.binary_cross_entropy_with_logits(values, wanted, reduction="none")
    loss = ((each * inside).sum(1) / tokens).sum()
    if cfg.contrast:
        final = last_value(values, inside).view(-1, cfg.group)  # (problems, group)
        apart = -F.logsigmoid(final.unsqueeze(2) - final.unsqueeze(1))
        loss = loss + cfg.contrast * weight * (apart * pairs_of(right, cfg.group)).sum()
    nats = F.cross_entropy(logits.float(), ids.roll(-1, 1)[learned], reduction="none")
    loss = loss + cfg.lm_weight * (nats / tokens.repeat_interleave(learned.sum(1))).sum()
    return loss, len(ids)


# -----------------------------------------------------------------------------
# Calibration: how scores become choices and probabilities


LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 30.0, 100.0)
SHARPNESSES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def fit(kind: str, terms: np.ndarray, features: np.ndarray, right: np.ndarray) -> dict:
    """lambda, the sharpness of a vote, and a logistic regression of `right` (P, n) on `features` (P n, 4).

    lambda maximises the share of pairs, a right and a wrong answer to one problem, that are in the right
    order. (The accuracy of the best answer is a noisier criterion: a few problems decide it.) The sharpness
    of `vote_weights` maximises the mean log of the weight that right answers get within their problem.
    """

    def scores(weight: float) -> np.ndarray:
        return combined(kind, terms, weight).reshape(right.shape)

    lambdas = (0.0,) if kind == "head" else LAMBDAS
    best = max(lambdas, key=lambda weight: auc_within(right, scores(weight))["value"])
    mixed = right.any(1) & ~right.all(1)  # the others say nothing of a vote

    def likelihood(sharpness: float) -> float:
        weights = vote_weights(scores(best), sharpness)[mixed]
        return np.log((weights * right[mixed]).sum(1) / weights.sum(1) + 1e-9).mean()

    sharpness = max(SHARPNESSES, key=likelihood) if mixed.any() else 1.0
    return {"lambda": best, "sharpness": sharpness, "logistic": logistic(features, right.ravel())}


def vote_weights(scores: np.ndarray, sharpness: float) -> np.ndarray:
    """(P, n) scores -> weights in a vote: softmax(sharpness x score), up to a factor for each problem."""
    return np.exp(sharpness * (scores - scores.max(1, keepdims=True)))


def logistic(x: np.ndarray, y: np.ndarray) -> list[float]:
    """Coefficients (k) of a logistic regression of y (n) on x (n, k), with a very small L2 penalty."""
    scale = np.abs(x).mean(0) + 1e-9
    inputs, labels = torch.tensor(x / scale), torch.tensor(y).double()
    weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(inputs @ weights, labels, reduction="sum")
        loss = loss + 5e-4 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (weights.detach().numpy() / scale).tolist()


def examine(verifier: Verifier, samples: Samples) -> dict:
    """How well a verifier orders right and wrong answers, beside what each of its terms alone does."""
    problems, answers = samples.flat()
    terms = verifier.terms(problems, answers, "test")
    scores, probabilities = verifier.calibrated(problems, answers, terms)
    right = samples.right
    found = {
        "problems": len(right),
        "answers": right.size,
        "right": float(right.mean()),
        "right_by_source": right.mean(0).tolist(),  # of labelled solutions: of each model
        "oracle": accuracy(right.any(1)),
        "accuracy": accuracy((probabilities > 0.5) == right.ravel()),
        "calibration": calibration(right.ravel(), probabilities),
    }
    for name, overall, within in (
        ("verifier", probabilities, scores),
        ("generator alone", terms[:, 0], terms[:, 0]),
        (f"{verifier.kind} alone", terms[:, 1], terms[:, 1]),
    ):
        within = within.reshape(right.shape)
        found[name] = {
            "auc": auc(right.ravel(), overall),
            "auc_within": auc_within(right, within),
            "best_of_n": accuracy(right[np.arange(len(right)), within.argmax(1)]),
        }
    return found


def accuracy(hits: np.ndarray) -> dict:
    return proportion(int(hits.sum()), len(hits))


# -----------------------------------------------------------------------------
# Training


def sample(cfg: VerifierConfig, generator: TextModel) -> tuple[list[Samples], dict]:
    """Answers to learn from, to fit on and to report on; and the source of the first ones."""
    if cfg.solutions:
        return labelled(cfg.solutions), {"source": cfg.solutions}
    teacher = load_model(cfg.answers_of, generator.device) if cfg.answers_of else generator
    if not teacher.chat:
        raise TrainError(f"--answers_of={cfg.answers_of} must be an instruction-tuned model")
    problems, about = load_task(cfg.task, "train", first=cfg.first_problem, count=cfg.problems)
    parts = [draw(teacher, cfg.task, "train", problems, cfg.n, cfg.temperature, cfg.seed_samples)]
    how = cfg.held_n, cfg.held_temperature, cfg.seed_samples
    for split, count in (("validation", cfg.validation_problems), ("test", cfg.test_problems)):
        problems = load_task(cfg.task, split)[0][: count or None]
        parts.append(draw(generator, cfg.task, split, problems, *how))
    return parts, about


def train_verifier(cfg: VerifierConfig) -> dict:
    """Trains, fits lambda and probabilities on validation, reports on test; returns run.json."""
    folder = run_folder(cfg)
    if not checkable(cfg.task):
        raise TrainError(f"answers to {cfg.task} cannot be checked: arithmetic, gsm8k")
    if cfg.solutions:
        labelled(cfg.solutions)  # refuses a file that cannot be, before a model is loaded
    generator = load_model(cfg.model, pick_device(cfg.device))
    if generator.kind != "causal" or not generator.chat:
        raise TrainError(f"{cfg.model} was not instruction-tuned, so there are no answers to judge")
    (learn, held_out, test), about = sample(cfg, generator)
    known = (e.text for e in [*gold_examples(cfg), *learn.examples, *held_out.examples])
    refuse_overlap(known, (e.text for e in test.examples), cfg.task)
    if learn.right.all() or not learn.right.any():
        raise TrainError(f"{learn.right.mean():.0%} of the answers are right: there is nothing to tell apart")
    run = train_model(cfg, generator, learn, held_out, about)
    if "verification" in run:  # the run was finished before
        return run
    model = load_trained(cfg.kind, folder, cfg.device)
    verifier = Verifier(cfg.kind, generator, model, cfg.task, {})
    problems, answers = held_out.flat()
    terms = verifier.terms(problems, answers, "validation")
    verifier.fitted |= fit(cfg.kind, terms, verifier.features(problems, terms), held_out.right)
    run |= {"combine": verifier.fitted, "verification": {"split": "test", **examine(verifier, test)}}
    write_run(folder, run)
    return run


def train_model(cfg: VerifierConfig, generator: TextModel, learn: Samples, held_out: Samples, about) -> dict:
    """Trains the channel or the head; returns run.json."""
    data = (HeadTraining if cfg.kind == "head" else ChannelTraining)(cfg, generator, learn, held_out)
    about = {"verifier": cfg.kind, "data": {"train": about | data.counts}} | data.about
    trainer = FineTuner(
        cfg, data.model, data, data.tokens, about,
        loss=data.loss, evaluate=data.evaluate, tokenizer=data.model.tokenizer, **data.options,
    )  # fmt: skip
    trainer.say(f"{trainer.folder}: {cfg.kind}, {data.counts}; {cfg.max_steps} steps of {trainer.rows} rows")
    return trainer.run_all_steps()


def describe(folder: Path, run: dict) -> str:
    found = run["verification"]
    lines = [f"{folder}: {found['answers']:,} answers to test problems, {found['right']:.1%} right"]
    for name in ("verifier", "generator alone", f"{run['verifier']} alone"):
        x = found[name]
        figures = f"AUC {x['auc']:.3f}, within a problem {x['auc_within']['value']:.3f}"
        lines.append(f"{name:16} {figures}, best of n {x['best_of_n']['value']:.1%}")
    lines.append(f"lambda {run['combine']['lambda']}, calibration error {found['calibration']['ece']:.1%}")
    return "\n  ".join(lines).replace("nan", "n/a")  # without right and wrong answers there is no AUC


def main() -> None:
    run_stage(train_verifier, parse_config(VerifierConfig, __doc__), describe)


if __name__ == "__main__":
    run_script(main)
