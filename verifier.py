"""Stage 6: a verifier. It says how likely an answer to a problem is right, without knowing the right one.

    python verifier.py configs/verifier.py                            # minutes on a laptop
    python verifier.py configs/verifier.py --kind=head --name=head    # the published baseline
    python verifier.py --model=out/sft-gsm8k --start=out/sft-gsm8k --task=gsm8k --solutions=FILE.jsonl
    python verifier.py --verifier=out/verifier --problem="Anna has 3 nuts. She buys 4 more nuts. How many nuts
        does she have now?" --answer="She has <<3+4=7>>7 nuts. #### 7"

From Python, `Verifier.load("out/verifier").score(problem, answer)`.

A `channel` is an ordinary language model that reads an answer and predicts the problem, left to right. The
score of an answer is log p(answer | problem) + lambda log p(problem | answer), the noisy channel of machine
translation. The first term, the generator's, checks the calculation. The second, the channel's, checks that
the answer is about this problem: a sentence that the answer ignores is hard to predict from it. The channel
learns from true solutions, from the generator's right answers (or those of --answers_of another model, such
as the generator before DPO), and from wrong ones, which have to score less (--contrast). A `head` (Cobbe et
al., 2021) is the generator with a linear layer that predicts at every token of an answer whether it will be
right: it learns one bit an answer, a channel learns from every word of the problem.

lambda is chosen, and scores become probabilities (Platt, 1999), on answers to the validation split; the test
split is looked at once, at the end. It reads a generator and writes a run folder out/NAME; run.json says how
well it verifies, beside the generator's own log-probability and the channel alone. The log-probabilities of
judged answers are kept in judged/.
"""

from support.terminal import run_script

import hashlib
import json
import math
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import parse_config
from data import TASKS, DataError, Example, load_task, read_rows, refuse_overlap, talk
from finetune import TrainingSet, is_smoke, rows_per_step, weights_hash, write_run
from model import ModernDecoderLM
from sft import AdaptConfig, aligned_model, parents, trainer_for
from support.files import write_atomically
from support.loading import load_model
from support.machine import pick_device
from support.metrics import auc, auc_within, calibration, proportion
from support.runs import AlreadyFinished, TrainError, read_json, run_folder
from support.samples import Samples, draw
from support.text_model import TextModel, collate, length, pad_rows, target_logits

Row = tuple[list[int], list[int]]  # ids of what is read, ids of what is predicted


@dataclass
class VerifierConfig(AdaptConfig):
    """Whose answers are judged, and by what."""

    name: str = "verifier"  # the run's folder is {out}/{name}
    model: str = "out/dpo"  # the generator
    kind: Literal["channel", "head"] = "channel"  # a model run backwards, or a number read off the generator
    start: str = "out/sft"  # channel: the weights it starts from
    task: str = "arithmetic"  # whose answers can be checked
    gold: int = 2000  # channel: true solutions that are turned around, the first of the train split
    problems: int = 4000  # problems that the generator answers, to learn from
    first_problem: int = 12_000  # of the train split: behind those that SFT and DPO have seen
    solutions: str = ""  # a file of labelled solutions to learn from and be tested on, instead of sampling
    answers_of: str = ""  # whose answers it learns from; default: the generator's
    n: int = 8  # answers a problem, to learn from
    held_n: int = 8  # answers to each problem that it is fitted and reported on
    temperature: float = 0.8  # of the answers it learns from
    held_temperature: float = 1.0  # of those it is fitted and reported on, as in eval.py
    seed_samples: int = 1  # of the answers; eval.py's, so that those to the test problems are drawn once
    validation_problems: int = 500  # on which lambda and the probabilities are fitted; 0: all
    test_problems: int = 0  # on which the verifier is reported; 0: all
    lm_weight: float = 0.1  # head: weight of the language-model loss on right answers
    contrast: float = 1.0  # weight of the comparison of right and wrong answers to one problem
    repeats: int = (
        0  # channel: above 0: only right answers to problems that also got wrong ones, so often; 0: all, once
    )
    group: int = 4  # head: answers to one problem that are seen together
    epochs: float = 2.0  # times through the examples
    learning_rate: float = 1e-3  # the highest
    verifier: str = ""  # judge with this one, and stop
    problem: str = ""  # of which --verifier judges
    answer: str = ""  # this answer


# -----------------------------------------------------------------------------
# The public part: score an answer


@dataclass
class Verifier:
    """A trained verifier, ready to judge answers."""

    kind: str
    generator: TextModel
    core: "TextModel | ValueHead"  # the channel, or the generator's twin with a value head
    combine: dict  # fitted on validation: lambda, the sharpness of a vote, the coefficients of a probability
    name: str = ""  # the run folder in whose judged/ log-likelihoods are kept; "": they are not

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "auto", generator: TextModel | None = None, keep: bool = True
    ) -> "Verifier":
        """From a run folder, for the generator it was trained for or another one with the same tokenizer.

        Raises TrainError if that does not fit, or if its own generator has been trained anew since.
        """
        record = Path(folder) / "run.json"
        run = read_json(record) if record.exists() else {}
        if "verification" not in run:
            raise TrainError(f"{folder} holds no finished verifier of this version: run verifier.py again")
        if generator is None:
            generator = load_model(run["parent"], pick_device(device))
            if run["parent_hash"] != weights_hash(run["parent"]):
                raise TrainError(
                    f"{folder} judges another model than {run['parent']} now holds: train it anew"
                )
        if run["data"]["tokenizer"] != generator.tokenizer.hash:
            raise TrainError(f"{folder} was trained with another tokenizer than {generator.name} has")
        core = load_core(run["verifier"], str(folder), device)
        return cls(run["verifier"], generator, core, run["combine"], str(folder) if keep else "")

    def score(self, problem: str, answer: str) -> float:
        """The probability, 0 to 1, that the answer is right."""
        return float(self.judge([problem], [answer])[1][0])

    def judge(
        self, problems: list[str], answers: list[str], progress: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """(n) scores, which rank answers to one problem, and (n) probabilities that the answers are right.

        The final number is put on a line of its own, where it stands in the answers of training.
        """
        answers = [re.sub(r"\s*####\s*", "\n#### ", answer) for answer in answers]
        return self.verdict(problems, answers, self.parts(problems, answers, progress))

    def verdict(
        self, problems: list[str], answers: list[str], parts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`judge`, from `parts` that are known."""
        score = combined(self.kind, parts, self.combine["lambda"])
        logit = self.evidence(problems, parts) @ self.combine["logistic"]
        probability = 1 / (1 + np.exp(-np.clip(logit, -50, 50)))
        empty = np.array([not answer.strip() for answer in answers])
        return np.where(empty, -1e9, score), np.where(empty, 0.0, probability)

    def evidence(self, problems: list[str], parts: np.ndarray) -> np.ndarray:
        """(n, 4) what a probability depends on: the two columns of `parts`, 1, and the problem's tokens.

        Each log-likelihood has a weight of its own: their sum ranks the answers to one problem, but between
        problems it differs most by their lengths.
        """
        lengths = [len(self.generator.encode(problem)) for problem in problems]
        return np.stack([*parts.T, np.ones(len(parts)), lengths], axis=1)

    def parts(self, problems: list[str], answers: list[str], progress: str = "") -> np.ndarray:
        """(n, 2) log p(answer | problem) under the generator, and what the verifier adds: log p(problem |
        answer), or the head's logit. Kept on disk, by weights and texts.
        """
        pairs = list(zip(problems, answers, strict=True))
        index = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}  # the same answer is judged once
        file = self.kept(list(index)) if len(index) > 1 else None
        if file and file.exists():
            return np.fromfile(file).reshape(-1, 2)[[index[pair] for pair in pairs]]
        forward = [forward_row(self.generator, *pair) for pair in index]
        rows = forward if self.kind == "head" else [backward_row(self.core, *pair) for pair in index]
        added = self.core.log_likelihoods(rows, progress)
        parts = np.stack([self.generator.log_likelihoods(forward, progress), added], axis=1)
        if file:
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, parts.tofile)
        return parts[[index[pair] for pair in pairs]]

    def kept(self, pairs: list[tuple[str, str]]) -> Path | None:
        """Where the parts of these pairs are kept; None if nowhere, as for weights that are in no folder."""
        weights = [weights_hash(name) for name in (self.generator.name, self.name) if name]
        if len(weights) < 2 or None in weights:
            return None
        key = [weights, self.generator.context_length, self.core.context_length, pairs]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        return Path(self.name) / "judged" / f"{digest}.float64"


def load_core(kind: str, folder: str, device: str) -> "TextModel | ValueHead":
    model = load_model(folder, pick_device(device))
    if kind == "channel":
        return model
    head = ValueHead(model)
    head.read_value(Path(folder))
    return head


def combined(kind: str, parts: np.ndarray, weight: float) -> np.ndarray:
    """(n) scores: log p(answer | problem) + lambda log p(problem | answer); of a head its logit."""
    return parts[:, 1] if kind == "head" else parts[:, 0] + weight * parts[:, 1]


def forward_row(model: TextModel, problem: str, answer: str) -> Row:
    """What the generator reads and predicts: the problem, then the answer. A long problem loses its end."""
    predicted = model.reply_ids(answer)[: model.context_length // 2]
    room = model.context_length - len(predicted)
    return model.prompt(TASKS["arithmetic"], problem, room=room)[0], predicted


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
# The channel


class Channel:
    """Trains a language model to predict problems from answers.

    It learns from true solutions and from the generator's right answers. Where the generator also gave wrong
    answers to the problem, one of them is drawn at each step, and the problem has to be likelier after the
    right answer (`channel_loss`): a language model that reads only right answers never learns that "sells 4
    stamps" does not fit 4 nuts that were sold. Two thirds of the right answers have no wrong one beside them;
    `repeats` uses only the others, so often, each time beside another wrong one.
    """

    def __init__(self, cfg: VerifierConfig, generator: TextModel, learn: Samples, held: Samples):
        self.cfg, self.model = cfg, aligned_model(replace(cfg, model=cfg.start))
        if self.model.tokenizer.hash != generator.tokenizer.hash:
            raise TrainError(
                f"{cfg.start} has another tokenizer than {cfg.model}: --start must be of its family"
            )
        gold = load_task(cfg.task, "train", count=cfg.gold)[0] if cfg.gold else []
        answers = self.answers(learn)
        contrasted = [answer for answer in answers if answer[1]]
        used = contrasted * cfg.repeats or answers
        self.rows = [(self.row(e.text, e.target), []) for e in gold] + used  # (right, [wrong, ...])
        right = [row for row, _ in self.rows]
        self.val_rows = [self.row(e.text, e.target) for e in held.examples if e.target]
        self.val_rows = self.val_rows or [row for row, _ in self.answers(held)]
        batch = rows_per_step(cfg)
        self.order = TrainingSet(right, batch, cfg.seed, "causal", self.model.pad)
        self.batches, self.tokens = self.order.batches, float(self.order.lengths.mean())
        self.data = {"answers": len(right), "gold": len(gold)}
        self.summary = (
            f"a channel from {cfg.start}, on {len(gold):,} true solutions and {len(used):,} right answers, "
            f"{len(contrasted):,} of them beside wrong ones, such as {self.model.decode(sum(right[0], []))!r}"
        )

    def row(self, problem: str, answer: str) -> Row:
        return backward_row(self.model, problem, answer.strip())

    def answers(self, samples: Samples) -> list[tuple[Row, list[Row]]]:
        """Every right answer, once, beside the wrong ones to its problem."""
        found = []
        for i, example in enumerate(samples.examples):
            wrong = samples.distinct(i, right=False) if self.cfg.contrast else []
            wrong = [self.row(example.text, answer) for answer in wrong]
            found += [(self.row(example.text, answer), wrong) for answer in samples.distinct(i, right=True)]
        return found

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, ...]:
        """`collate` of right answers, then of wrong ones; and (wrong ones) the row of the right answer."""
        rng, rows, drawn = np.random.default_rng([self.cfg.seed, step, 0]), [], []
        for at, i in enumerate(self.order.members(step, 0, first + count)):
            right, wrong = self.rows[i]
            chosen = wrong[rng.integers(len(wrong))] if wrong else None  # drawn for earlier rows, too
            if at < first:
                continue
            rows.append(right)
            if chosen:
                drawn.append((at - first, chosen))
        rows += [row for _, row in drawn]
        places = torch.tensor([at for at, _ in drawn], dtype=torch.long)
        return *collate(rows, "causal", self.model.pad), places

    def loss(self, net: nn.Module, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return channel_loss(net, *tensors, self.cfg.contrast)

    def evaluate(self, net: nn.Module, final: bool) -> dict:
        tokens = sum(len(predicted) for _, predicted in self.val_rows)
        return {"val_loss": -self.model.log_likelihoods(self.val_rows).sum() / tokens}


def channel_loss(
    model: nn.Module, ids: Tensor, mask: Tensor, targets: Tensor, right: Tensor, contrast: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the problems given right answers, plus `contrast` times -log sigmoid of how much
    likelier a problem is after a right answer than after a wrong one: (sum, tokens).

    The last rows are the wrong answers, one for each place in `right`.
    """
    logits = target_logits(model, "causal", ids, mask, targets).float().transpose(1, 2)
    nats = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none").sum(1)
    n = len(ids) - len(right)
    loss = nats[:n].sum() - contrast * F.logsigmoid(nats[n:] - nats[right]).sum()
    return loss, (targets[:n] != -100).sum()


# -----------------------------------------------------------------------------
# The value head: Cobbe et al.'s verifier


class ValueModel(nn.Module):
    """A decoder and a linear layer that gives a logit at every token: will this become a right answer?"""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.ours = isinstance(lm, ModernDecoderLM)
        self.lm = lm
        self.value = nn.Linear(lm.config.d_model if self.ours else lm.config.hidden_size, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T) -> logits of the next token (B, T, V), values (B, T)."""
        if self.ours:
            x = self.lm.hidden(ids)
            return F.linear(x, self.lm.head), self.value(x).squeeze(-1)
        out = self.lm(input_ids=ids, output_hidden_states=True, use_cache=False)
        return out.logits, self.value(out.hidden_states[-1].float()).squeeze(-1)


class ValueHead:
    """A TextModel's decoder with a value head, as the Trainer needs it, and as a verifier asks it."""

    def __init__(self, text_model: TextModel):
        self.text_model, self.tokenizer = text_model, text_model.tokenizer
        self.model = ValueModel(text_model.model).to(text_model.device)
        self.context_length = text_model.context_length

    def rows(self, samples: Samples) -> list[Row]:
        return [forward_row(self.text_model, *pair) for pair in zip(*samples.flat(), strict=True)]

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        self.text_model.save(folder)
        save_file(self.model.value.state_dict(), folder / "value.safetensors")

    def read_weights(self, folder: Path) -> None:
        self.text_model.read_weights(folder)
        self.read_value(folder)

    def read_value(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.model.value.load_state_dict(load_file(folder / "value.safetensors"))

    @torch.no_grad()
    def log_likelihoods(self, rows: list[Row], progress: str = "") -> np.ndarray:
        """(n) logits at the end of each answer."""
        found = np.zeros(len(rows))
        for index in self.text_model.batch_indices([length(row) for row in rows], progress):
            ids, last, _ = value_rows([rows[i] for i in index], self.text_model.pad)
            _, values = self.model(ids.to(self.text_model.device))
            found[index] = values.cpu().float().gather(1, last.unsqueeze(1)).squeeze(1).double()
        return found


class Head:
    """Trains the generator with a value head on its answers, right and wrong, `group` of them a problem."""

    def __init__(self, cfg: VerifierConfig, generator: TextModel, learn: Samples, held: Samples):
        if rows_per_step(cfg) > cfg.batch_size:
            raise TrainError("--kind=head trains in one process without accumulation")
        self.cfg, self.right, self.held = cfg, learn.right, held
        self.model = ValueHead(aligned_model(cfg))
        self.rows, self.val_rows = self.model.rows(learn), self.model.rows(held)  # (P n)
        self.problems = max(1, cfg.batch_size // cfg.group)  # a step
        cfg.batch_size = self.problems * cfg.group
        self.batches = max(1, len(self.right) // self.problems)
        self.tokens, self.data = float(np.mean([length(row) for row in self.rows])), {}
        self.summary = f"a head on {cfg.model}, {self.right.size:,} answers, {self.right.mean():.0%} right"

    def members(self, step: int) -> np.ndarray:
        """Indices of a step's rows: of each problem right and wrong answers by turns."""
        epoch, at = divmod(step, self.batches)
        order = np.random.default_rng([self.cfg.seed, epoch]).permutation(len(self.right))
        order = np.resize(order, self.batches * self.problems)
        found = []
        for p in order[at * self.problems : (at + 1) * self.problems]:
            drawn = np.random.default_rng([self.cfg.seed, step, int(p)]).permutation(self.right.shape[1])
            right = self.right[p, drawn]
            rank = np.where(right, right.cumsum(), (~right).cumsum())  # among the answers of its kind
            turns = drawn[
                np.lexsort((~right, rank))
            ]  # the first right one, the first wrong one, the second ...
            found.append(p * self.right.shape[1] + np.resize(turns, self.cfg.group))
        return np.concatenate(found)

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, ...]:
        members = self.members(step)[first : first + count]
        labels = torch.tensor(self.right.ravel()[members]).float()
        return *value_rows([self.rows[i] for i in members], self.model.text_model.pad), labels

    def loss(self, net: nn.Module, *tensors: Tensor) -> tuple[Tensor, int]:
        return head_loss(net, *tensors, self.cfg)

    def evaluate(self, net: nn.Module, final: bool) -> dict:
        values, right = self.model.log_likelihoods(self.val_rows), self.held.right
        loss = F.binary_cross_entropy_with_logits(torch.tensor(values), torch.tensor(right.ravel()).double())
        return {
            "val_loss": loss.item(),
            "auc_within": auc_within(right, values.reshape(right.shape))["value"],
        }


def value_rows(rows: list[Row], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, T), index of each row's last token (B), and which tokens belong to an answer (B, T)."""
    ids = pad_rows([prompt + answer for prompt, answer in rows], pad)
    inside = pad_rows([[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows], 0)
    return ids, torch.tensor([length(row) - 1 for row in rows]), inside.bool()


def head_loss(
    model: nn.Module, ids: Tensor, last: Tensor, inside: Tensor, labels: Tensor, cfg: VerifierConfig
) -> tuple[Tensor, int]:
    """Binary cross-entropy at every token of an answer, the language-model loss on right answers, and a
    comparison of right and wrong answers to one problem, `cfg.group` rows each: (sum, answers).
    """
    logits, values = model(ids)
    values, right, tokens = values.float(), labels.bool(), inside.sum(1)
    wanted = labels.unsqueeze(1).expand_as(values)
    each = F.binary_cross_entropy_with_logits(values, wanted, reduction="none")
    loss = ((each * inside).sum(1) / tokens).sum()
    if cfg.contrast:
        final = values.gather(1, last.unsqueeze(1)).view(-1, cfg.group)  # (problems, group)
        is_right = right.view(-1, cfg.group)
        pairs = is_right.unsqueeze(2) & ~is_right.unsqueeze(1)  # (problems, right, wrong)
        apart = -F.logsigmoid(final.unsqueeze(2) - final.unsqueeze(1))
        loss = loss + cfg.contrast * (apart * pairs).sum() / pairs.sum().clamp(min=1) * len(ids)
    if cfg.lm_weight:
        nats = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        loss = loss + cfg.lm_weight * ((nats * inside[:, 1:]).sum(1) / tokens)[right].sum()
    return loss, len(ids)


# -----------------------------------------------------------------------------
# Fitting and examining: how scores become choices and probabilities


LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 30.0, 100.0)
SHARPNESSES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def fit(kind: str, parts: np.ndarray, evidence: np.ndarray, right: np.ndarray) -> dict:
    """lambda, the sharpness of a vote, and a logistic regression of `right` (P, n) on `evidence` (P n, 4).

    lambda maximises the share of (right, wrong) answers to one problem that are in the right order. The
    accuracy of the best answer would be a noisier criterion: a few problems decide it. The likelihood of
    right answers would depend too much on a few wrong ones of which the generator is sure. The sharpness of
    `vote_weights` maximises the mean log of the weight that right answers get within their problem.
    """

    def scores(weight: float) -> np.ndarray:
        return combined(kind, parts, weight).reshape(right.shape)

    def ordered(weight: float) -> float:
        return auc_within(right, scores(weight))["value"]

    best = 0.0 if kind == "head" else max(LAMBDAS, key=ordered)
    mixed = right.any(1) & ~right.all(1)  # the others say nothing of a vote

    def likelihood(sharpness: float) -> float:
        weights = vote_weights(scores(best), sharpness)[mixed]
        return np.log((weights * right[mixed]).sum(1) / weights.sum(1) + 1e-9).mean()

    sharpness = max(SHARPNESSES, key=likelihood) if mixed.any() else 1.0
    return {"lambda": best, "sharpness": sharpness, "logistic": logistic(evidence, right.ravel())}


def vote_weights(scores: np.ndarray, sharpness: float) -> np.ndarray:
    """(P, n) scores -> weights in a vote: softmax(sharpness x score), up to a factor for each problem."""
    return np.exp(sharpness * (scores - scores.max(1, keepdims=True)))


def logistic(x: np.ndarray, y: np.ndarray, ridge: float = 1e-3) -> list[float]:
    """Coefficients (k) of a logistic regression of y (n) on x (n, k), almost without a penalty."""
    scale = np.abs(x).mean(0) + 1e-9
    inputs, labels = torch.tensor(x / scale), torch.tensor(y).double()
    weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(inputs @ weights, labels, reduction="sum")
        loss = loss + ridge / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (weights.detach().numpy() / scale).tolist()


def examine(verifier: Verifier, samples: Samples) -> dict:
    """How well a verifier orders right and wrong answers, beside what each of its parts alone does."""
    problems, answers = samples.flat()
    parts = verifier.parts(problems, answers, "test")
    score, probability = verifier.verdict(problems, answers, parts)
    right, rows = samples.right, np.arange(len(samples.right))
    found = {"problems": len(right), "answers": right.size, "right": float(right.mean())}
    found["right_by_source"] = right.mean(0).tolist()  # of labelled solutions: each model's accuracy
    found["oracle"] = proportion(int(right.any(1).sum()), len(right))
    for name, overall, within in (
        ("verifier", probability, score),
        ("generator alone", parts[:, 0], parts[:, 0]),
        (f"{verifier.kind} alone", parts[:, 1], parts[:, 1]),
    ):
        within = within.reshape(right.shape)
        best = right[rows, within.argmax(1)]
        found[name] = {"auc": auc(right.ravel(), overall), "auc_within": auc_within(right, within)}
        found[name]["best_of_n"] = proportion(int(best.sum()), len(best))
    agreed = (probability > 0.5) == right.ravel()
    found["accuracy"] = proportion(int(agreed.sum()), right.size)
    return found | {"calibration": calibration(right.ravel(), probability)}


# -----------------------------------------------------------------------------
# Training


def labelled(file: str) -> list[Samples]:
    """Solutions that come with labels, as training, validation and test parts, split by question.

    A row has a question and, for each of its sources, {"solution", "is_correct"}: the form of GSM8K's
    example_model_solutions.jsonl. A final "A: 18" becomes "#### 18", as in everything else here.
    """
    parts = [([], [], []) for _ in range(3)]  # examples, answers, right
    for row in read_rows(file):
        if not isinstance(row.get("question"), str):
            raise DataError(f"{file}: a row has no question, only {', '.join(row)}")
        examples, answers, right = parts[(0, 0, 1, 2)[zlib.crc32(row["question"].encode()) % 4]]
        solutions = [value for value in row.values() if isinstance(value, dict) and "is_correct" in value]
        examples.append(Example(row["question"], ""))
        answers.append([re.sub(r"\nA: ", "\n#### ", solution["solution"]) for solution in solutions])
        right.append([bool(solution["is_correct"]) for solution in solutions])
    for _, _, right in parts:
        if len({len(row) for row in right}) != 1:
            raise DataError(
                f"{file}: every question needs the same number of labelled solutions, and more rows"
            )
    return [Samples(examples, answers, np.array(right)) for examples, answers, right in parts]


def sample(cfg: VerifierConfig, generator: TextModel) -> tuple[Samples, Samples, Samples, dict]:
    """Answers to learn from, to fit on and to report on, and the source of the first ones."""
    if cfg.solutions:
        learn, held, test = labelled(cfg.solutions)
        return learn, held, test, {"source": cfg.solutions, "examples": len(learn.examples)}
    teacher = load_model(cfg.answers_of, generator.device) if cfg.answers_of else generator
    if not teacher.chat:
        raise TrainError(f"--answers_of={cfg.answers_of} must be an instruction-tuned model")
    problems, about = load_task(cfg.task, "train", first=cfg.first_problem, count=cfg.problems)
    learn = draw(teacher, cfg.task, "train", problems, cfg.n, cfg.temperature, cfg.seed_samples)
    held = []
    for split, count in (("validation", cfg.validation_problems), ("test", cfg.test_problems)):
        some = load_task(cfg.task, split)[0][: count or None]
        held.append(
            draw(generator, cfg.task, split, some, cfg.held_n, cfg.held_temperature, cfg.seed_samples)
        )
    return learn, *held, about


def train_verifier(cfg: VerifierConfig) -> dict:
    """Trains, fits lambda and probabilities on validation, reports on test; returns run.json."""
    folder = run_folder(cfg)
    if cfg.task not in TASKS or TASKS[cfg.task].metric != "exact_match":
        raise TrainError(f"answers to {cfg.task} cannot be checked: arithmetic, gsm8k")
    generator = load_model(cfg.model, pick_device(cfg.device))
    if generator.kind != "causal" or not generator.chat:
        raise TrainError(f"{cfg.model} was not instruction-tuned, so there are no answers to judge")
    learn, held, test, about = sample(cfg, generator)
    known = (e.text for e in [*learn.examples, *held.examples])
    refuse_overlap(known, (e.text for e in test.examples), cfg.task)
    if learn.right.all() or not learn.right.any():
        kind = "right" if learn.right.all() else "wrong"
        raise TrainError(f"all of {learn.right.size:,} answers are {kind}: there is nothing to tell apart")
    try:
        run = train_core(cfg, generator, learn, held, about)
    except AlreadyFinished as finished:
        run = finished.run
        if "verification" in run:
            raise
    core = load_core(cfg.kind, str(folder), cfg.device)
    verifier = Verifier(cfg.kind, generator, core, {}, str(folder))
    problems, answers = held.flat()
    parts = verifier.parts(problems, answers, "validation")
    verifier.combine |= fit(cfg.kind, parts, verifier.evidence(problems, parts), held.right)
    run |= {"combine": verifier.combine, "verification": {"split": "test", **examine(verifier, test)}}
    write_run(folder, run)
    return run


def train_core(cfg: VerifierConfig, generator: TextModel, learn: Samples, held: Samples, about: dict) -> dict:
    """Trains the channel or the head; returns run.json."""
    lesson = (Head if cfg.kind == "head" else Channel)(cfg, generator, learn, held)
    record = {"verifier": cfg.kind, "smoke": bool(cfg.max_steps) or is_smoke(cfg.model)}
    if cfg.kind == "channel":
        record |= {"start_hash": weights_hash(cfg.start), "smoke": record["smoke"] or is_smoke(cfg.start)}
    cfg.max_steps = cfg.max_steps or math.ceil(lesson.batches * cfg.epochs)
    parameters = sum(p.numel() for p in lesson.model.model.parameters())
    trainer = trainer_for(
        cfg, lesson.model, lesson.batch, loss=lesson.loss, evaluate=lesson.evaluate,
        flops_per_row=6 * parameters * lesson.tokens,
        tokens_per_row=1 if cfg.kind == "head" else max(1, round(lesson.tokens)),  # the head's loss is a mean
        epoch=lambda step: step / lesson.batches,
        about=parents(cfg, generator, train=about | lesson.data) | record,
        keeps_best=cfg.kind == "head",  # the val_loss of a channel does not say how it orders answers
    )  # fmt: skip
    trainer.say(f"{trainer.folder}: {lesson.summary}; {cfg.max_steps} steps of {trainer.rows} rows")
    return trainer.run_all_steps()


def describe(run: dict) -> str:
    found, combine = run["verification"], run["combine"]
    lines = [
        f"{found['answers']:,} answers to {found['problems']:,} test problems; lambda {combine['lambda']}"
    ]
    for name in ("verifier", "generator alone", f"{run['verifier']} alone"):
        m = found[name]
        best, areas = m["best_of_n"]["value"], []
        for area in (
            m["auc"],
            m["auc_within"]["value"],
        ):  # there is none if all answers are right or all wrong
            areas.append("n/a" if math.isnan(area) else f"{area:.3f}")
        lines.append(f"{name:16} AUC {areas[0]}, within a problem {areas[1]}, best of n {best:.1%}")
    accuracy, error = found["accuracy"]["value"], found["calibration"]["ece"]
    lines.append(f"accuracy {accuracy:.1%}, calibration error {error:.1%}; {found['right']:.1%} are right")
    return "\n  ".join(lines)


def main() -> None:
    cfg = parse_config(VerifierConfig, __doc__)
    try:
        if cfg.verifier:
            print(f"{Verifier.load(cfg.verifier, cfg.device).score(cfg.problem, cfg.answer):.4f}")
            return
        print(describe(train_verifier(cfg)))
    except AlreadyFinished as finished:
        print(describe(finished.run))
        print("nothing to do: --overwrite trains it anew, --name trains another")
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"verifier.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
