"""Stage 5: preference optimisation (DPO). A model learns from pairs of answers which one is better.

    python dpo.py configs/dpo.py                                  # pairs made on policy: minutes on a laptop
    python dpo.py configs/dpo.py --method=rft --name=rft          # control: its own right answers, no pairs
    python dpo.py configs/dpo.py --method=sft --name=extra-gold   # control: as many true solutions instead
    python dpo.py --model=out/sft --data=hh-rlhf --first_difference=False --beta=0.1 --nll=0
    python dpo.py --data=my/pairs.jsonl                           # {"prompt", "chosen", "rejected"} a line

On policy (--data names a task whose answers can be checked): the model answers every problem --n times at
--temperature, answers are judged, and a right one is paired with a wrong one; --rounds repeats that with the
new model and fresh problems. A problem without a wrong answer still teaches by its right one (--nll).

The loss of a pair is -log sigmoid(beta ((log p(chosen) - log p(rejected)) - the same under the reference)),
the reference being the model at the start (Rafailov et al., 2023), whose log-probabilities are computed once
and cached, so no second model is in memory. To it comes --nll times the mean log-loss of the chosen answer's
tokens, without which the likelihood of both sides sinks (Pang et al., 2024). --first_difference compares only
the first token where the two part: what they share cancels anyway, and what follows a wrong step is not worth
unlearning.

It reads a run, a model of the hub or an adapter (which is trained further) and writes out/NAME: the best
model by validation loss; pairs.jsonl, the pairs it learned from, which --data and TRL read; answers.jsonl,
right answers without a wrong one; violations.jsonl, held-out pairs that the last step has moved the wrong
way; reference.npz. With rounds, the earlier ones are in out/NAME/round-1, ...
"""

from support.terminal import run_script

import hashlib
import io
import json
import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import parse_config
from data import TASKS, DataError, Example, judge, load_preferences, load_task, refuse_overlap, talk
from finetune import TrainingSet, is_smoke, rows_per_step, subsample, weights_hash
from model import ModernDecoderLM
from sft import AdaptConfig, aligned_model, parents, train_and_merge, trainer_for
from support.chat_template import TemplateError
from support.files import write_atomically
from support.runs import AlreadyFinished, TrainError, run_folder
from support.text_model import TextModel, answer_task, pad_rows, sample_answers


@dataclass
class DPOConfig(AdaptConfig):
    """Where pairs come from, and what is made of them."""

    name: str = "dpo"  # the run's folder is {out}/{name}
    model: str = "out/sft"  # the instruction-tuned run that is the start and the reference
    data: str = "arithmetic"  # a task, for pairs on policy; or hh-rlhf, ultrafeedback, a file of pairs
    method: Literal["dpo", "ipo", "rft", "sft"] = "dpo"  # rft, sft: controls without pairs
    beta: float = 0.5  # how far the policy may leave the reference: a small one, far
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
    pairs: int = 1  # at most so many a problem
    max_train_examples: int = 0  # pairs of a data set at most, drawn from all of it by seed; 0: all
    eval_examples: int = 300  # validation problems, or pairs
    collapse: float = 0.5  # stop if the chosen answers lose so many nats a token; 0: never
    epochs: float = 2.0  # times through the pairs
    learning_rate: float = 2e-4  # the highest


@dataclass
class Pair:
    """Ids of a prompt, a better and a worse answer; without a worse one only the better is learnt.

    `messages` and `answers` are the same as text, for the files that others read: the conversation before the
    answers, and the better and (if there is one) the worse answer.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None = None
    messages: tuple[dict, ...] = ()
    answers: tuple[str, ...] = ()

    def first_difference(self) -> int:
        """Index in the answers of the first token that differs; both end in an end token, so there is one."""
        return next(i for i, (a, b) in enumerate(zip(self.chosen, self.rejected, strict=False)) if a != b)


# -----------------------------------------------------------------------------
# The loss


def token_log_probs(model: nn.Module, ids: Tensor, targets: Tensor, others: Tensor | None = None):
    """(B, T) log p of targets, 0 where -100; and of `others` in the same places, from the same pass."""
    core = getattr(model, "module", model)
    ours = isinstance(core, ModernDecoderLM)
    logits = model(ids) if ours else model(input_ids=ids, use_cache=False).logits
    asked = targets != -100
    log_p = logits[asked].float().log_softmax(-1)  # (asked tokens, V)

    def of(tokens: Tensor) -> Tensor:
        found = torch.zeros(targets.shape, device=ids.device)
        found[asked] = log_p.gather(1, tokens[asked].unsqueeze(1)).squeeze(1)
        return found

    return of(targets), None if others is None else of(others)


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference: Tensor,
    beta: float,
    method: str = "dpo",
    label_smoothing: float = 0.0,
) -> Tensor:
    """(B) losses of pairs from log-probabilities (B) under the policy, and (B, 2) under the reference.

    DPO is equation 7 of Rafailov et al. (2023), ln 2 where policy and reference agree; label smoothing makes
    it cDPO (Mitchell, 2023); IPO is equation 17 of Azar et al. (2023): a margin of 1 / (2 beta), no more.
    """
    margin = (chosen - rejected) - (reference[:, 0] - reference[:, 1])
    if method == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def collate_pairs(pairs: list[Pair], pad: int, both: bool) -> tuple[Tensor, ...]:
    """ids and targets (B, T) of prompt and chosen answer, of the rejected one (T = 1 unless `both`), and
    (B, T) the token that the rejected answer has at the first difference, -100 elsewhere.
    """

    def laid_out(answers: list[list[int]]) -> tuple[Tensor, Tensor]:
        rows = [(p.prompt + a)[:-1] for p, a in zip(pairs, answers, strict=True)]
        wanted = [[-100] * (len(p.prompt) - 1) + a for p, a in zip(pairs, answers, strict=True)]
        return pad_rows(rows, pad), pad_rows(wanted, -100)

    ids, targets = laid_out([p.chosen for p in pairs])
    others = torch.full_like(targets, -100)
    for row, p in enumerate(pairs):
        if p.rejected is not None:
            at = p.first_difference()
            others[row, len(p.prompt) - 1 + at] = p.rejected[at]
    if not both:
        return ids, targets, ids[:, :1], torch.full_like(targets[:, :1], -100), others
    return ids, targets, *laid_out([p.rejected or p.chosen for p in pairs]), others


def pair_log_probs(
    model: nn.Module, ids: Tensor, targets: Tensor, bad_ids: Tensor, bad_targets: Tensor, others: Tensor,
    mean: bool = False,
):  # fmt: skip
    """What is compared: (B) log p(chosen), (B) log p(rejected), and (B, T) log p of the chosen tokens.

    Whole answers if the rejected ones are there (with `mean`, per token), else one token at their first
    difference.
    """
    good, other = token_log_probs(model, ids, targets, others.clamp(min=0))
    if bad_ids.shape[1] > 1:
        bad, _ = token_log_probs(model, bad_ids, bad_targets)
        if mean:
            n_good, n_bad = ((t != -100).sum(1) for t in (targets, bad_targets))
            return good.sum(1) / n_good, bad.sum(1) / n_bad, good
        return good.sum(1), bad.sum(1), good
    here = others != -100
    return (good * here).sum(1), (other * here).sum(1), good


# -----------------------------------------------------------------------------
# Pairs


def on_policy(
    model: TextModel, cfg: DPOConfig, split: str, examples: list[Example]
) -> tuple[list[Pair], dict]:
    """Pairs from the model's own answers, and what there was: problems, pairs, only right, only wrong."""
    task, rng = TASKS[cfg.data], np.random.default_rng([cfg.seed, split == "train"])
    answers = sample_answers(model, cfg.data, split, examples, cfg.n, cfg.temperature, cfg.seed_samples)
    repeated = [e for e in examples for _ in range(cfg.n)]
    records, _ = judge(cfg.data, repeated, [a for some in answers for a in some])
    pairs, counts = [], {"problems": len(examples), "right": sum(r["correct"] for r in records)}
    counts |= {"pairs": 0, "only_right": 0, "only_wrong": 0, "too_long": 0}
    for i, example in enumerate(examples):
        mine = records[i * cfg.n : (i + 1) * cfg.n]
        right, wrong = (
            list(dict.fromkeys(r["output"] for r in mine if r["correct"] is c)) for c in (True, False)
        )
        if not right:
            counts["only_wrong"] += 1
            continue
        if cfg.method == "sft":
            right = [example.target.strip()]
        right = [right[j] for j in rng.permutation(len(right))]
        wrong = [wrong[j] for j in rng.permutation(len(wrong))]
        counts["only_right"] += not wrong
        if cfg.method in ("rft", "sft"):
            wrong = []
        prompt, _ = model.prompt(task, example.text)
        for j in range(max(1, min(cfg.pairs, len(wrong)))):
            sides = [right[j % len(right)], *wrong[j : j + 1]]
            ids = [model.reply_ids(side) for side in sides]
            pair = Pair(prompt, *ids, messages=tuple(talk(example.text)), answers=tuple(sides))
            if length_of(pair) > model.context_length or pair.chosen == pair.rejected:
                counts["too_long"] += 1
                continue
            counts["pairs"] += pair.rejected is not None
            pairs.append(pair)
    return pairs, counts


def from_collection(model: TextModel, cfg: DPOConfig, split: str) -> tuple[list[Pair], dict]:
    """Pairs of a data set; a conversation that is too long loses its first turns, or is left out. So is one
    that the model's chat template refuses, unless it refuses all.
    """
    found, about = load_preferences(cfg.data, split)
    found = subsample(found, cfg.max_train_examples if split == "train" else cfg.eval_examples, cfg.seed)
    pairs, left_out, refused = [], 0, None
    for preference in found:
        messages = preference.messages
        chosen, rejected = (model.reply_ids(answer) for answer in (preference.chosen, preference.rejected))
        room = model.context_length - max(len(chosen), len(rejected))
        try:
            prompt = model.conversation(messages)[0]
            while len(prompt) > room and (shorter := without_first_exchange(messages)):
                messages = shorter
                prompt = model.conversation(messages)[0]
        except TemplateError as error:  # a system turn, say, which the model's template does not know
            left_out, refused = left_out + 1, error
            continue
        if len(prompt) > room or chosen == rejected:
            left_out += 1
            continue
        texts = (preference.chosen, preference.rejected)
        if cfg.method in ("rft", "sft"):
            rejected, texts = None, texts[:1]
        pairs.append(Pair(prompt, chosen, rejected, tuple(messages), texts))
    if refused and not pairs:
        raise refused
    return pairs, {"pairs": len(pairs), "too_long": left_out, **about}


def without_first_exchange(messages: list[dict]) -> list[dict]:
    """A conversation from the user's second turn on, behind its system turn; [] if there is no second."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return system + messages[asked[1] :] if len(asked) > 1 else []


def length_of(pair: Pair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected or ()))


def fingerprint(pairs: list[Pair]) -> str:
    return hashlib.sha256(json.dumps([[p.prompt, p.chosen, p.rejected] for p in pairs]).encode()).hexdigest()


@torch.no_grad()
def reference(model: TextModel, pairs: list[Pair], both: bool, mean: bool = False) -> np.ndarray:
    """(n, 2) log p(chosen), log p(rejected) under the model as it is now."""
    found, training = np.zeros((len(pairs), 2), np.float32), model.model.training
    model.model.eval()
    for index in model.batch_indices([length_of(p) for p in pairs], "reference"):
        tensors = collate_pairs([pairs[i] for i in index], model.pad, both)
        good, bad, _ = pair_log_probs(model.model, *(t.to(model.device) for t in tensors), mean)
        found[index] = torch.stack([good, bad], dim=1).cpu().numpy()
    model.model.train(training)
    return found


def read_reference(file: Path, key: str) -> np.ndarray | None:
    """What `write_reference` has written for the same key; None if that is not there."""
    try:
        with np.load(file) as kept:
            return kept["values"] if str(kept["key"]) == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write_reference(file: Path, key: str, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, key=key, values=values)
    write_atomically(file, lambda path: path.write_bytes(buffer.getvalue()))


# -----------------------------------------------------------------------------
# Training


def dpo(cfg: DPOConfig) -> dict:
    """All rounds, each a run of its own that starts from the one before; returns the last one's run.json."""
    if cfg.rounds < 1 or (cfg.rounds > 1 and cfg.data not in TASKS):
        raise TrainError("--rounds counts rounds of sampling, from 1; pairs of a data set have one round")
    name, start = cfg.name, cfg.model
    for i in range(1, cfg.rounds + 1):
        last = i == cfg.rounds
        folder = name if last else f"{name}/round-{i}"
        first = cfg.first_problem + (i - 1) * cfg.problems
        settings = {"name": folder, "model": start, "first_problem": first, "seed": cfg.seed + i - 1}
        try:
            run = one_round(replace(cfg, **settings))
        except AlreadyFinished:
            if last:
                raise
        start = str(Path(cfg.out) / folder)
    return run


def one_round(cfg: DPOConfig) -> dict:
    folder = run_folder(cfg)
    model = aligned_model(cfg)
    task = TASKS.get(cfg.data)
    if task and task.metric != "exact_match":
        raise TrainError(
            f"answers to {cfg.data} cannot be checked: take arithmetic, gsm8k, or a data set of pairs"
        )
    held = []
    if task:
        model.model.eval()
        problems, data = load_task(cfg.data, "train", first=cfg.first_problem, count=cfg.problems)
        held = subsample(load_task(cfg.data, "validation")[0], cfg.eval_examples, 0)
        refuse_overlap((e.text for e in problems), (e.text for e in load_task(cfg.data, "test")[0]), cfg.data)
        pairs, counts = on_policy(model, cfg, "train", problems)
        val_pairs, val_counts = on_policy(model, replace(cfg, method="dpo"), "validation", held)
        val_pairs = [p for p in val_pairs if p.rejected is not None]
    else:
        pairs, data = from_collection(model, cfg, "train")
        val_pairs, val_counts = from_collection(model, replace(cfg, method="dpo"), "validation")
        counts = data
    if not pairs or (cfg.method in ("dpo", "ipo") and not counts["pairs"]):
        raise TrainError(f"there is no pair to learn from: {counts}")
    if not val_pairs:
        raise TrainError(f"there is no validation pair: {val_counts}; raise --eval_examples or --n")
    only_nll = cfg.method in ("rft", "sft")
    both = not (cfg.first_difference or only_nll)
    weight = 1.0 if only_nll else cfg.nll
    if not only_nll and not cfg.nll:
        pairs = [p for p in pairs if p.rejected is not None]  # without the log-loss the others teach nothing
    known, key = np.zeros((len(pairs), 2), np.float32), ""
    if not only_nll:
        key = f"{weights_hash(cfg.model)} {fingerprint(pairs)} {both}" + " mean" * cfg.mean_log_probs
        known = read_reference(folder / "reference.npz", key)
        if known is None:
            known = reference(model, pairs, both, cfg.mean_log_probs)
    val_known = reference(model, val_pairs, both=True)
    before = val_known.mean(0)
    chosen_tokens = np.mean([len(p.chosen) for p in val_pairs])

    def loss(core, ids, targets, bad_ids, bad_targets, others, known):
        good, bad, tokens = pair_log_probs(
            core, ids, targets, bad_ids, bad_targets, others, cfg.mean_log_probs
        )
        paired = (others != -100).any(1) & (not only_nll)
        n_tokens = (targets != -100).sum(1)
        per_pair = preference_loss(good, bad, known, cfg.beta, cfg.method, cfg.label_smoothing)
        return (per_pair * paired - weight * tokens.sum(1) / n_tokens).sum(), len(ids)

    def evaluate(core, final):
        """On held-out pairs, whole answers: the loss of training, margins in nats times beta, accuracy."""
        with torch.no_grad():
            now, losses = reference(model, val_pairs, both=True), []
            for i in range(0, len(val_pairs), cfg.batch_size):
                some = val_pairs[i : i + cfg.batch_size]
                tensors = collate_pairs(some, model.pad, both)
                known = val_first[i : i + cfg.batch_size]
                total, _ = loss(core, *(t.to(model.device) for t in (*tensors, torch.from_numpy(known))))
                losses.append(total.item())
        margins = cfg.beta * ((now[:, 0] - now[:, 1]) - (val_known[:, 0] - val_known[:, 1]))
        lost = (before[0] - now[:, 0].mean()) / chosen_tokens
        if cfg.collapse and lost > cfg.collapse:
            raise TrainError(
                f"the chosen answers lost {lost:.2f} nats a token: the model unlearns both sides of the "
                "pairs. Lower --learning_rate, or raise --nll"
            )
        found = {"val_loss": sum(losses) / len(val_pairs), "reward_margin": float(margins.mean())}
        found |= {"reward_accuracy": float((margins > 0).mean())}
        found |= {"chosen": float(now[:, 0].mean()), "rejected": float(now[:, 1].mean())}
        if final and trainer.rank == 0:
            wrong = sorted((m, i) for i, m in enumerate(margins.tolist()) if m <= 0)
            worst = [val_pairs[i] for _, i in wrong]
            write_pairs(folder / "violations.jsonl", worst, margin=[m for m, _ in wrong])
        if held and final:
            core.eval()
            _, metrics = judge(cfg.data, held, answer_task(model, cfg.data, held)[0])
            found["exact_match"] = metrics["exact_match"]["value"]
        return found

    val_first = reference(model, val_pairs, both, mean=cfg.mean_log_probs)
    batch = rows_per_step(cfg)
    order = TrainingSet([(p.prompt, p.chosen) for p in pairs], batch, cfg.seed, "causal", model.pad)

    def rows(step: int, first: int, count: int) -> tuple[Tensor, ...]:
        index = order.members(step, first, count)
        return *collate_pairs([pairs[i] for i in index], model.pad, both), torch.from_numpy(known[index])

    all_steps = math.ceil(order.batches * cfg.epochs)
    smoke = bool(0 < cfg.max_steps < all_steps)
    cfg.max_steps = cfg.max_steps or all_steps
    tokens = float(np.mean([length_of(p) for p in pairs]))
    parameters = sum(p.numel() for p in model.model.parameters())
    both_sides = [p for p in pairs if p.rejected is not None]
    lengths = {"chosen": float(np.mean([len(p.chosen) for p in pairs]))}
    if both_sides:
        lengths["rejected"] = float(np.mean([len(p.rejected) for p in both_sides]))
        lengths["chosen_longer"] = float(np.mean([len(p.chosen) > len(p.rejected) for p in both_sides]))
    about = parents(cfg, model, train=data, pairs=counts, validation=val_counts, lengths=lengths)
    about |= {"smoke": smoke or is_smoke(cfg.model), "pairs_hash": fingerprint(pairs)}

    def write_files() -> None:
        write_pairs(folder / "pairs.jsonl", pairs)
        write_answers(folder / "answers.jsonl", pairs)
        if not only_nll:
            write_reference(folder / "reference.npz", key, known)

    trainer = trainer_for(
        cfg, model, rows, loss=loss, evaluate=evaluate, flops_per_row=6 * parameters * tokens * (1 + both),
        tokens_per_row=1, epoch=lambda step: step / order.batches, about=about, on_begin=write_files,
    )  # fmt: skip
    where = f"{cfg.n} answers to each of {counts['problems']:,} problems, " if task else ""
    longer = "" if not both_sides else f", {100 * lengths['chosen_longer']:.0f} % of the chosen are longer"
    trainer.say(
        f"{trainer.folder}: {cfg.model}, {cfg.method} on {where}{counts['pairs']:,} pairs and "
        f"{len(pairs) - len(both_sides):,} answers alone{longer}; {cfg.max_steps} steps of {batch}"
    )
    if data.get("left_out"):
        trainer.say(f"{cfg.data}: {data['left_out']:,} rows that are no pair of answers were left out")
    return train_and_merge(cfg, trainer)


def turn(answer: str) -> list[dict]:
    return [{"role": "assistant", "content": answer}]


def write_pairs(file: Path, pairs: list[Pair], **columns: list) -> None:
    """Pairs as JSON lines of messages, which `--data=FILE` and TRL's DPOTrainer read."""
    rows = []
    for i, pair in enumerate(pairs):
        if pair.rejected is not None:
            better, worse = pair.answers
            row = {"prompt": list(pair.messages), "chosen": turn(better), "rejected": turn(worse)}
            rows.append(row | {name: values[i] for name, values in columns.items()})
    write_rows(file, rows)


def write_answers(file: Path, pairs: list[Pair]) -> None:
    """Answers without a worse one, in the form of TRL's SFTTrainer, because its DPOTrainer fails on these."""
    alone = [pair for pair in pairs if pair.rejected is None]
    file.unlink(missing_ok=True)
    if alone:
        write_rows(file, [{"prompt": list(p.messages), "completion": turn(p.answers[0])} for p in alone])


def write_rows(file: Path, rows: list[dict]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(file, lambda path: path.write_text(lines, encoding="utf-8"))


def main() -> None:
    cfg = parse_config(DPOConfig, __doc__)
    try:
        run = dpo(cfg)
        found = ", ".join(f"{k} {v:.4g}" for k, v in run["results"]["best"].items())
        print(f"{Path(cfg.out) / cfg.name}: {run['seconds'] / 60:.1f} min; {found}")
    except AlreadyFinished:
        print(f"{Path(cfg.out) / cfg.name} is finished: --overwrite trains it anew, --name trains another")
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"dpo.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
