"""Stage 5: preference optimisation (DPO). A model learns from pairs of answers which one is better.

    python dpo.py configs/dpo.py                                  # pairs made on policy: minutes on a laptop
    python dpo.py configs/dpo.py --method=rft --name=rft          # control: its own right answers, no pairs
    python dpo.py configs/dpo.py --method=sft --name=extra-gold   # control: as many true solutions instead
    python dpo.py --model=out/sft --data=hh-rlhf --first_difference=False --beta=0.1 --nll=0
    python dpo.py --data=my/pairs.jsonl                           # {"prompt", "chosen", "rejected"} a line

On policy (--data names a task whose answers can be checked): the model answers every problem --n times at
--temperature, answers are judged, and a right one is paired with a wrong one; --rounds repeats that with the
new model and fresh problems. A problem without a wrong answer still teaches by its right one (--nll).

The loss of a pair is -log sigmoid(beta (margin - margin_ref)), margin = log p(chosen) - log p(rejected).
By default log p is that of one token, the first in which the two answers differ: tokens before it are equal
and cancel, and tokens after it depend on the first mistake. With --first_difference=False it is the sum over
all tokens of an answer, as in the paper (Rafailov et al., 2023). The loss also has --nll times the mean
log-loss of the chosen answer's tokens: without it the likelihood of both answers sinks (Pang et al., 2024).

The reference is the model at the start. The program loads its weights, computes two log-probabilities for
each pair and keeps them in an array; only then it trains, or loads a checkpoint and trains on. So no second
model is in memory, and a resumed run computes the array again.

It reads a run, a model of the hub or an adapter (which is trained further) and writes out/NAME: the best
model by validation loss; pairs.jsonl, the pairs it learned from, which --data and TRL read; answers.jsonl,
right answers without a wrong one; violations.jsonl, held-out pairs whose margin is not larger after the last
step than under the reference. With rounds, the earlier ones are in out/NAME/round-1, ...
"""

from support.terminal import run_script

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import parse_config
from data import TASKS, Example, checkable, judge, load_task, refuse_overlap, talk
from finetune import (
    AdaptConfig,
    FineTuner,
    TrainingSet,
    best_evaluation,
    chat_model,
    subsample,
    train_and_merge,
)
from support.pairs import Pair, from_collection, write_answers, write_pairs
from support.processes import RANK
from support.runs import TrainError, run_folder, run_stage
from support.samples import draw
from support.text_model import TextModel, answer_task, collate, target_logits
from train import rows_per_step


@dataclass
class DPOConfig(AdaptConfig):
    """Where pairs come from, and what is made of them."""

    name: str = "dpo"  # the run's folder is {out}/{name}
    model: str = "out/sft"  # the instruction-tuned run that is the start and the reference
    data: str = "arithmetic"  # a task, for pairs on policy; or hh-rlhf, ultrafeedback, a file of pairs
    method: Literal["dpo", "ipo", "rft", "sft"] = "dpo"  # rft, sft: controls without pairs
    beta: float = 0.5  # DPO's beta; a smaller one lets the policy move further from the reference
    label_smoothing: float = 0.0  # cDPO: the share of pairs that are taken to be the wrong way round
    mean_log_probs: bool = False  # compare means over an answer's tokens, as TRL's IPO does, and not sums
    nll: float = 10.0  # weight of the log-loss of the chosen answer, in nats a token
    first_difference: bool = True  # compare one token, the first where the answers differ
    rounds: int = 1  # of sampling and training
    problems: int = 4000  # a round: problems that are answered
    first_problem: int = 4000  # of the train split: behind those that SFT has seen
    n: int = 8  # answers a problem
    temperature: float = 0.8  # of the answers
    seed_samples: int = 1  # of the answers; verifier.py's, so that both can learn from the same ones
    max_train_examples: int = 0  # pairs of a data set at most, drawn from all of it by seed; 0: all
    eval_examples: int = 300  # validation problems, or pairs
    collapse: float = 0.5  # stop if the chosen answers lose this many nats per token; 0: never
    epochs: float = 2.0  # times through the pairs
    learning_rate: float = 2e-4  # the highest

    @property
    def is_control(self) -> bool:
        """A control learns the chosen answers alone: no pairs, no reference."""
        return self.method in ("rft", "sft")

    @property
    def nll_weight(self) -> float:
        return 1.0 if self.is_control else self.nll


# -----------------------------------------------------------------------------
# The loss


def preference_loss(cfg: DPOConfig, chosen: Tensor, rejected: Tensor, reference: Tensor) -> Tensor:
    """(B) losses of pairs from log-probabilities (B) under the policy, and (B, 2) under the reference.

    DPO is equation 7 of Rafailov et al. (2023), ln 2 where policy and reference agree; label smoothing makes
    it cDPO (Mitchell, 2023); IPO is equation 17 of Azar et al. (2023): a margin of 1 / (2 beta), no more.
    """
    margin = (chosen - rejected) - (reference[:, 0] - reference[:, 1])
    if cfg.method == "ipo":
        return (margin - 1 / (2 * cfg.beta)) ** 2
    right = F.logsigmoid(cfg.beta * margin)
    wrong = F.logsigmoid(-cfg.beta * margin)
    return -(1 - cfg.label_smoothing) * right - cfg.label_smoothing * wrong


def token_log_probs(model: nn.Module, ids: Tensor, *targets: Tensor) -> list[Tensor]:
    """log p of one or more tensors of targets (B, K), as `collate` makes them for ids (B, T), from one
    forward pass; 0 where a target is -100. All are 0 where the first tensor is -100, too.
    """
    asked = targets[0] != -100
    logits = target_logits(model, "causal", ids, None, targets[0])[asked].float()  # (asked, V)
    found = []
    for tokens in targets:
        log_p = torch.zeros(tokens.shape, device=ids.device)
        log_p[asked] = -F.cross_entropy(logits, tokens[asked], reduction="none")
        found.append(log_p)
    return found


def collate_pairs(pairs: list[Pair], pad: int, whole: bool) -> tuple[Tensor, ...]:
    """ids (B, T) and targets (B, K) of prompts and chosen answers; then what the loss compares them with.

    `whole`: ids (B, T') and targets (B, K') of prompts and rejected answers. Else no ids (B, 0), and as
    targets (B, K) the token that the rejected answer has at the first difference. Targets are -100 elsewhere,
    and all over a row that has no rejected answer.
    """

    def rows(answers: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids, _, targets = collate([(p.prompt, a) for p, a in zip(pairs, answers, strict=True)], "causal", pad)
        return ids, targets

    ids, targets = rows([pair.chosen for pair in pairs])
    if whole:
        return ids, targets, *rows([pair.rejected or [] for pair in pairs])
    differing = torch.full_like(targets, -100)
    first = (targets != -100).int().argmax(1)  # the column where each answer begins
    for row, pair in enumerate(pairs):
        if pair.rejected is not None:
            at = pair.first_difference()
            differing[row, first[row] + at] = pair.rejected[at]
    return ids, targets, ids[:, :0], differing


def compare(model: nn.Module, ids, targets, rejected_ids, rejected_targets, mean=False) -> tuple[Tensor, ...]:
    """The batch of `collate_pairs` -> (B) log p(chosen), (B) log p(rejected), and (B) the mean log p of a
    token of the chosen answer. `mean`: of whole answers the means over tokens and not the sums.
    """
    n_chosen, n_rejected = ((t != -100).sum(1).clamp(min=1) for t in (targets, rejected_targets))
    if rejected_ids.shape[1]:
        chosen = token_log_probs(model, ids, targets)[0].sum(1)
        rejected = token_log_probs(model, rejected_ids, rejected_targets)[0].sum(1)
        of_a_token = chosen / n_chosen
        if mean:
            chosen, rejected = of_a_token, rejected / n_rejected
    else:  # one token of each, after what both share
        tokens, differing = token_log_probs(model, ids, targets, rejected_targets)
        chosen = (tokens * (rejected_targets != -100)).sum(1)
        rejected = differing.sum(1)
        of_a_token = tokens.sum(1) / n_chosen
    return chosen, rejected, of_a_token


def dpo_loss(cfg: DPOConfig, model: nn.Module, *batch: Tensor) -> tuple[Tensor, int]:
    """(sum of losses, number of pairs) of a batch of `PairSet`."""
    *tensors, reference = batch
    chosen, rejected, of_a_token = compare(model, *tensors, mean=cfg.mean_log_probs)
    loss = -cfg.nll_weight * of_a_token
    if not cfg.is_control:
        paired = (tensors[3] != -100).any(1)
        loss = loss + paired * preference_loss(cfg, chosen, rejected, reference)
    return loss.sum(), len(loss)


@torch.no_grad()
def log_probs(model: TextModel, pairs: list[Pair], whole: bool, mean: bool = False) -> np.ndarray:
    """(n, 2) log p(chosen), log p(rejected) under the model as it is now, without dropout.

    Before the first step the model is the reference: `train_round` calls this then and keeps the result.
    """
    found = np.zeros((len(pairs), 2), np.float32)
    model.model.eval()
    for index in model.batch_indices([pair.length for pair in pairs], "log-probabilities"):
        tensors = collate_pairs([pairs[i] for i in index], model.pad, whole)
        chosen, rejected, _ = compare(model.model, *(t.to(model.device) for t in tensors), mean=mean)
        found[index] = torch.stack([chosen, rejected], dim=1).cpu().numpy()
    return found


# -----------------------------------------------------------------------------
# Pairs


def make_pairs(model: TextModel, cfg: DPOConfig) -> tuple[list[Pair], list[Pair], list[Example], dict]:
    """Training pairs, validation pairs, validation problems (on policy), and the sources for run.json."""
    problems = []
    if cfg.data in TASKS:
        if not checkable(cfg.data):
            raise TrainError(
                f"answers to {cfg.data} cannot be checked: take arithmetic, gsm8k, or a data set of pairs"
            )
        train, source = load_task(cfg.data, "train", first=cfg.first_problem, count=cfg.problems)
        problems = subsample(load_task(cfg.data, "validation")[0], cfg.eval_examples, 0)
        test, _ = load_task(cfg.data, "test")
        refuse_overlap((e.text for e in train), (e.text for e in test), cfg.data)
        pairs, counts = on_policy(model, cfg, "train", train)
        val_pairs, val_counts = on_policy(model, cfg, "validation", problems)
        val_pairs = [pair for pair in val_pairs if pair.rejected is not None]
    else:
        pairs, counts = from_collection(model, cfg, "train")
        val_pairs, val_counts = from_collection(model, cfg, "validation")
        source = counts
    if not pairs or not val_pairs or not (cfg.is_control or counts["pairs"]):
        raise TrainError(
            f"there is no pair to learn from or none to validate on, of {counts} and {val_counts}: raise "
            "--problems, --eval_examples or --n"
        )
    if not cfg.is_control and not cfg.nll:
        pairs = [pair for pair in pairs if pair.rejected is not None]  # the others would teach nothing
    return pairs, val_pairs, problems, {"train": source, "pairs": counts, "validation": val_counts}


def on_policy(model: TextModel, cfg: DPOConfig, split: str, examples: list[Example]):
    """A pair for each problem that the model solves in one of its answers; and counts: problems, right
    answers, pairs, problems with only right or only wrong answers, pairs left out (too long, or twice the
    same).

    Controls train on answers alone: rft on right ones of the model, sft on the true solutions of the same
    problems. Their validation pairs are DPO's.
    """
    method = cfg.method if split == "train" else "dpo"
    rng = np.random.default_rng([cfg.seed, split == "train"])
    samples = draw(model, cfg.data, split, examples, cfg.n, cfg.temperature, cfg.seed_samples)
    solved = samples.right.any(1)
    pairs = []
    for i in np.flatnonzero(solved):
        example = examples[i]
        right, wrong = samples.distinct(i, right=True), samples.distinct(i, right=False)
        if method == "sft":
            right = [example.target.strip()]
        right, wrong = ([some[j] for j in rng.permutation(len(some))] for some in (right, wrong))
        texts = (right[0],) if method in ("rft", "sft") else (right[0], *wrong[:1])
        prompt, _ = model.prompt(TASKS[cfg.data], example.text)
        ids = [model.reply_ids(text) for text in texts]
        pairs.append(Pair(prompt, *ids, messages=tuple(talk(example.text)), texts=texts))
    kept = [pair for pair in pairs if pair.length <= model.context_length and pair.chosen != pair.rejected]
    return kept, {
        "problems": len(examples),
        "right": int(samples.right.sum()),
        "pairs": sum(pair.rejected is not None for pair in kept),
        "only_right": int(samples.right.all(1).sum()),
        "only_wrong": int((~solved).sum()),
        "left_out": len(pairs) - len(kept),
    }


# -----------------------------------------------------------------------------
# Training


class PairSet(TrainingSet):
    """Training pairs in batches of similar lengths; `reference` (n, 2) holds what the loss compares, under
    the reference model: log-probabilities of the first tokens that differ, or of whole answers.
    """

    def __init__(self, pairs: list[Pair], reference: np.ndarray, whole: bool, batch: int, seed: int, pad):
        self.pairs, self.reference, self.whole = pairs, reference, whole
        super().__init__([(p.prompt, p.chosen) for p in pairs], batch, seed, "causal", pad)

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, ...]:
        index = self.members(step, first, count)
        tensors = collate_pairs([self.pairs[i] for i in index], self.pad, self.whole)
        return *tensors, torch.from_numpy(self.reference[index])


def validation(cfg: DPOConfig, model: TextModel, pairs: list[Pair], problems: list[Example]) -> Callable:
    """The Trainer's evaluation on held-out pairs and problems. No step was taken yet, so the model is still
    the reference, whose log-probabilities are kept.
    """
    tokens = np.array([len(pair.chosen) for pair in pairs])
    in_loss = partial(log_probs, model, pairs, not cfg.first_difference, cfg.mean_log_probs)
    reference_in_loss = torch.from_numpy(in_loss())  # (n, 2), of what the loss compares
    reference = log_probs(model, pairs, whole=True)  # (n, 2), of whole answers
    sums = not cfg.first_difference and not cfg.mean_log_probs  # these are what the loss compares

    def evaluate(_net, final: bool) -> dict:
        """The loss of training; margins of whole answers in nats times beta, and how many are above 0."""
        now = log_probs(model, pairs, whole=True)
        lost = (reference - now)[:, 0].mean() / tokens.mean()
        if cfg.collapse and lost > cfg.collapse:
            raise TrainError(
                f"the chosen answers lost {lost:.2f} nats per token: the model unlearns both sides of the "
                "pairs. Lower --learning_rate, or raise --nll"
            )
        losses = -cfg.nll_weight * torch.from_numpy(now[:, 0] / tokens)
        if not cfg.is_control:
            chosen, rejected = torch.from_numpy(now if sums else in_loss()).T
            losses += preference_loss(cfg, chosen, rejected, reference_in_loss)
        margins = cfg.beta * ((now - reference) @ [1, -1])
        found = {
            "val_loss": losses.mean(),
            "reward_margin": margins.mean(),
            "reward_accuracy": (margins > 0).mean(),
            "chosen": now[:, 0].mean(),
            "rejected": now[:, 1].mean(),
        }
        if final and RANK == 0:
            wrong = [i for i in margins.argsort(kind="stable") if margins[i] <= 0]  # the worst first
            file = run_folder(cfg) / "violations.jsonl"
            write_pairs(file, [pairs[i] for i in wrong], margin=margins[wrong].tolist())
        if final and problems:
            outputs, _ = answer_task(model, cfg.data, problems)
            found["exact_match"] = judge(cfg.data, problems, outputs)[1]["exact_match"]["value"]
        return found

    return evaluate


def train_round(cfg: DPOConfig) -> dict:
    """Makes pairs with the model of cfg.model, trains it on them, and returns run.json."""
    folder = run_folder(cfg)
    model = chat_model(cfg)
    pairs, val_pairs, problems, sources = make_pairs(model, cfg)
    whole = not (cfg.first_difference or cfg.is_control)
    reference = np.zeros((len(pairs), 2), np.float32)
    with model.autocast():  # as the steps compute
        if not cfg.is_control:  # no step was taken, so the model is still the reference
            reference = log_probs(model, pairs, whole, cfg.mean_log_probs)
        evaluate = validation(cfg, model, val_pairs, problems)
    data = PairSet(pairs, reference, whole, rows_per_step(cfg), cfg.seed, model.pad)
    ids = json.dumps([[p.prompt, p.chosen, p.rejected] for p in pairs])
    about = {"data": sources, "pairs_hash": hashlib.sha256(ids.encode()).hexdigest()}

    def write_files() -> None:
        write_pairs(folder / "pairs.jsonl", pairs)
        write_answers(folder / "answers.jsonl", pairs)

    tokens = np.mean([pair.length for pair in pairs]) * (1 + whole)  # whole: both answers are read
    trainer = FineTuner(
        cfg, model, data, tokens, about, loss=partial(dpo_loss, cfg), evaluate=evaluate,
        tokenizer=model.tokenizer, counts_rows=True, on_begin=write_files,
    )  # fmt: skip
    both = sources["pairs"]["pairs"]
    trainer.say(
        f"{trainer.folder}: {cfg.model}, {cfg.method} on {both:,} pairs and {len(pairs) - both:,} answers "
        f"alone; {cfg.max_steps} steps of {data.per_step}"
    )
    return train_and_merge(cfg, trainer)


def dpo(cfg: DPOConfig) -> dict:
    """All rounds, each a run of its own that starts from the one before; returns the last one's run.json."""
    if cfg.rounds < 1 or (cfg.rounds > 1 and cfg.data not in TASKS):
        raise TrainError("--rounds counts rounds of sampling, from 1; pairs of a data set have one round")
    start = cfg.model
    for i in range(cfg.rounds):
        folder = cfg.name if i == cfg.rounds - 1 else f"{cfg.name}/round-{i + 1}"
        first = cfg.first_problem + i * cfg.problems
        run = train_round(replace(cfg, name=folder, model=start, first_problem=first, seed=cfg.seed + i))
        start = str(Path(cfg.out) / folder)
    return run


def main() -> None:
    run_stage(dpo, parse_config(DPOConfig, __doc__), best_evaluation)


if __name__ == "__main__":
    run_script(main)
