"""Stage 6: a verifier. It says how likely an answer to a problem is right, without knowing the right one.

    python verifier.py configs/verifier.py                            # minutes on a laptop
    python verifier.py configs/verifier.py --kind=head --name=head    # the published baseline
    python verifier.py --model=out/sft-gsm8k --start=out/sft-gsm8k --task=gsm8k --solutions=FILE.jsonl
    python verifier.py --verifier=out/verifier --problem="Anna has 3 nuts. She buys 4 more nuts. How many nuts
        does she have now?" --answer="She has <<3+4=7>>7 nuts. #### 7"

From Python, `Verifier.load("out/verifier").score(problem, answer)`.

A `channel` is a language model that is trained backwards, to tell the problem when it is given the answer.
The score of an answer is log p(answer | problem) + lambda log p(problem | answer): the noisy channel of
machine translation. The generator sees to the sums; the channel sees whether the answer tells the story of
this problem, as a sentence that was forgotten is unlikely to be told again. It learns from true solutions
turned around, from the generator's own right answers (or from --answers_of another model, such as the one it
was before DPO), and from the wrong ones, which have to score less (--contrast). A `head` (Cobbe et al., 2021)
is the generator with a number read off at every token of an answer, trained to tell right from wrong: one bit
an answer, where a channel learns from every word.

lambda is chosen, and scores become probabilities (Platt, 1999), on answers to the validation split; the test
split is looked at once, at the end. It reads a generator and writes a run folder out/NAME; run.json says how
well it verifies, beside the generator's own log-probability and the channel alone. What was judged is kept in
judged/.
"""

from support.terminal import run_script

import hashlib
import io
import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import parse_config
from data import TASKS, DataError, Example, judge, load_task, read_rows, refuse_overlap, talk
from finetune import FineTuner, TrainingSet, is_smoke, rows_per_step, weights_hash, write_run
from model import ModernDecoderLM
from sft import AdaptConfig, aligned_model, parents, trainer_for
from support.files import write_atomically
from support.loading import load_model
from support.machine import pick_device
from support.metrics import auc, auc_within, calibration, proportion
from support.runs import AlreadyFinished, TrainError, read_json, run_folder
from support.text_model import TextModel, collate, length, sample_answers, target_logits


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
    repeats: int = 0  # channel: a right answer with wrong ones beside it so often, no others; 0: all once
    group: int = 4  # head: answers to one problem that are seen together
    epochs: float = 2.0  # times through the examples
    learning_rate: float = 1e-3  # the highest
    verifier: str = ""  # judge with this one, and stop
    problem: str = ""  # of which --verifier judges
    answer: str = ""  # this answer


LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 30.0, 100.0)


# -----------------------------------------------------------------------------
# The public part: score an answer


class Verifier:
    """A trained verifier, ready to judge answers.

    `combine` is what was fitted on validation: lambda, and the logistic regression that makes a probability
    of the log-likelihoods and the problem's length (its log-likelihood falls with its words, however good the
    answer).
    """

    def __init__(
        self, kind: str, generator: TextModel, core: "TextModel | HeadModel", combine: dict, name: str = ""
    ):
        self.kind, self.generator, self.core, self.combine, self.name = kind, generator, core, combine, name

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "auto", generator: TextModel | None = None, keep: bool = True
    ) -> "Verifier":
        """From a run folder, for the generator it was trained for or another one with the same tokenizer.

        keep: whether what it judges is kept in the folder's judged/.

        Raises TrainError if that does not fit, or if its own generator has been trained anew since.
        """
        record = Path(folder) / "run.json"
        run = read_json(record) if record.exists() else {}
        whole = run.get("parent") and {"parent_hash", "verifier", "data"} <= run.keys()
        if not whole or "logistic" not in run.get("combine", {}):
            raise TrainError(f"{folder} holds no finished verifier of this version: run verifier.py again")
        if generator is None:
            generator = load_model(run["parent"], pick_device(device))
            if run["parent_hash"] != weights_hash(run["parent"]):
                raise TrainError(
                    f"{folder} judges another model than {run['parent']} now holds: train it anew"
                )
        if run["data"]["tokenizer"] != generator.tokenizer.hash:
            raise TrainError(f"{folder} was trained with another tokenizer than {generator.name} has")
        core = read_core(run["verifier"], Path(folder), device)
        return cls(run["verifier"], generator, core, run["combine"], str(folder) if keep else "")

    def score(self, problem: str, answer: str) -> float:
        """The probability, 0 to 1, that the answer is right."""
        return float(self.probabilities([problem], [answer])[0])

    def probabilities(self, problems: list[str], answers: list[str], progress: str = "") -> np.ndarray:
        """(n) of pairs of problem and answer."""
        return self.judge(problems, answers, progress)[1]

    def judge(
        self, problems: list[str], answers: list[str], progress: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """(n) scores, which rank answers to one problem, and (n) probabilities.

        The final number stands on a line of its own in the answers that it learnt from; so it is put there.
        """
        answers = [re.sub(r"\s*####\s*", "\n#### ", answer) for answer in answers]
        return self.verdict(problems, answers, self.parts(problems, answers, progress))

    def verdict(
        self, problems: list[str], answers: list[str], parts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`judge`, from parts that are known."""
        score = combined(self.kind, parts, self.combine["lambda"])
        lengths = np.array([len(self.generator.encode(p)) for p in problems])
        logit = evidence(parts, lengths) @ np.array(self.combine["logistic"])
        probability = 1 / (1 + np.exp(-np.clip(logit, -50, 50)))
        empty = np.array([not answer.strip() for answer in answers])
        return np.where(empty, -1e9, score), np.where(empty, 0.0, probability)

    def parts(self, problems: list[str], answers: list[str], progress: str = "") -> np.ndarray:
        """(n, 2) log p(answer | problem) under the generator, and what the verifier adds: log p(problem |
        answer), or the head's logit. They are kept in the verifier's folder, in judged/, and read from there
        when the same answers are judged again.
        """
        pairs = list(zip(problems, answers, strict=True))
        index = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        file = self.kept(list(index)) if len(index) > 1 else None
        if file and file.exists():
            return np.load(file)[[index[pair] for pair in pairs]]
        forwards = [forward_row(self.generator, *pair) for pair in index]
        own = self.generator.log_likelihoods(forwards, progress)
        if self.kind == "head":
            added = self.core.values(forwards)
        else:
            added = self.core.log_likelihoods([backward_row(self.core, *pair) for pair in index], progress)
        parts = np.stack([own, added], axis=1)
        if file:
            file.parent.mkdir(exist_ok=True)
            buffer = io.BytesIO()
            np.save(buffer, parts)
            write_atomically(file, lambda path: path.write_bytes(buffer.getvalue()))
        return parts[[index[pair] for pair in pairs]]

    def kept(self, pairs: list[tuple[str, str]]) -> Path | None:
        """Where the parts of these pairs are kept; None if the weights are not in folders of this disk, or
        the verifier has no name.
        """
        if not self.name:
            return None
        who = [weights_hash(self.generator.name), weights_hash(self.name)]
        if None in who:
            return None
        core = self.core.text_model if self.kind == "head" else self.core
        how = [who, self.generator.context_length, core.context_length, pairs]
        what = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:12]
        return Path(self.name) / "judged" / f"{what}.npy"


def read_core(kind: str, folder: Path, device: str) -> "TextModel | HeadModel":
    """What a verifier has beside its generator: the channel, or the generator's twin with a head."""
    core = load_model(str(folder), pick_device(device))
    return HeadModel.load(core, folder) if kind == "head" else core


def combined(kind: str, parts: np.ndarray, weight: float) -> np.ndarray:
    """(n) scores: f + lambda channel; of a head its logit + lambda f."""
    return parts[:, 1] + weight * parts[:, 0] if kind == "head" else parts[:, 0] + weight * parts[:, 1]


def forward_row(model: TextModel, problem: str, answer: str) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids): the problem, then the answer. A long problem loses its end."""
    said = model.reply_ids(answer)[: model.context_length // 2]
    return model.prompt(TASKS["arithmetic"], problem, room=model.context_length - len(said))[0], said


def backward_row(model: TextModel, problem: str, answer: str) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of the channel: the answer, then the problem.

    A template that is not ours need not allow that the assistant begins: there the turns change their roles.
    """
    told = model.reply_ids(problem)[: model.context_length // 2]
    if model.marks:
        given, _ = model.conversation([{"role": "assistant", "content": answer}])
        given = [*given, model.tokenizer.special_id("<|user|>")]
    else:
        given, _ = model.conversation(talk(answer or "-"))
    return given[-(model.context_length - len(told)) :], told


# -----------------------------------------------------------------------------
# The head: Cobbe et al.'s verifier


class ValueModel(nn.Module):
    """A decoder and a linear layer that reads a logit off every token: will this become a right answer?"""

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


class HeadModel:
    """A ValueModel with the tokenizer of its generator."""

    def __init__(self, text_model: TextModel, net: ValueModel):
        self.text_model, self.net = text_model, net

    @classmethod
    def load(cls, text_model: TextModel, folder: Path) -> "HeadModel":
        from safetensors.torch import load_file

        net = ValueModel(text_model.model)
        net.value.load_state_dict(load_file(folder / "value.safetensors"))
        return cls(text_model, net.to(text_model.device).eval())

    @torch.no_grad()
    def values(self, rows: list[tuple[list[int], list[int]]]) -> np.ndarray:
        """(n) logits at the end of each answer."""
        found = np.zeros(len(rows))
        for index in self.text_model.batch_indices([length(r) for r in rows], ""):
            ids, ends, _ = value_rows([rows[i] for i in index], self.text_model.pad)
            _, values = self.net(ids.to(self.text_model.device))
            found[index] = values.float().cpu()[torch.arange(len(index)), ends].double()
        return found


def value_rows(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, T), index of each row's last token (B), and which tokens belong to an answer (B, T)."""
    ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(p + a) for p, a in rows], batch_first=True, padding_value=pad
    )
    at = torch.arange(ids.shape[1])
    first, last = (
        torch.tensor([f(p, a) for p, a in rows]) for f in (lambda p, a: len(p), lambda p, a: len(p + a) - 1)
    )
    return ids, last, (at >= first.unsqueeze(1)) & (at <= last.unsqueeze(1))


class HeadTrainer(FineTuner):
    """Saves the decoder as a model, and the linear layer beside it."""

    def __init__(self, cfg: AdaptConfig, text_model: TextModel, net: ValueModel, *args, **kwargs):
        super().__init__(cfg, text_model, *args, model=net, **kwargs)

    def write_model(self, folder: Path) -> None:
        from safetensors.torch import save_file

        super().write_model(folder)
        value = {k: v.cpu().contiguous() for k, v in self.model.value.state_dict().items()}
        write_atomically(folder / "value.safetensors", lambda path: save_file(value, path))

    def read_model(self, folder: Path) -> None:
        from safetensors.torch import load_file

        super().read_model(folder)
        self.model.value.load_state_dict(load_file(folder / "value.safetensors"))


def head_loss(
    model: nn.Module, ids: Tensor, last: Tensor, inside: Tensor, labels: Tensor, cfg: VerifierConfig
):
    """Binary cross-entropy at every token of an answer, the language-model loss on right answers, and a
    comparison of right and wrong answers to one problem, `cfg.group` rows each: (sum, answers).
    """
    logits, values = model(ids)
    n, right = len(ids), labels.bool()
    each = F.binary_cross_entropy_with_logits(
        values.float(), labels.unsqueeze(1).expand_as(values), reduction="none"
    )
    loss = ((each * inside).sum(1) / inside.sum(1)).sum()
    if cfg.contrast:
        final = values.float()[torch.arange(n, device=ids.device), last].view(-1, cfg.group)
        good = right.view(-1, cfg.group)
        pairs = good.unsqueeze(2) & ~good.unsqueeze(1)  # (problems, right, wrong)
        apart = -F.logsigmoid(final.unsqueeze(2) - final.unsqueeze(1))
        loss = loss + cfg.contrast * (apart * pairs).sum() / pairs.sum().clamp(min=1) * n
    if cfg.lm_weight:
        told = (
            F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
            * inside[:, 1:]
        )
        loss = loss + cfg.lm_weight * (told.sum(1) / inside.sum(1))[right].sum()
    return loss, n


# -----------------------------------------------------------------------------
# Training


@dataclass
class Samples:
    """Problems, n answers each, and which of them are right."""

    examples: list[Example]
    answers: list[list[str]]
    right: np.ndarray  # (problems, n) bool

    def flat(self) -> tuple[list[str], list[str]]:
        n = self.right.shape[1]
        return [e.text for e in self.examples for _ in range(n)], [a for some in self.answers for a in some]


def right_answers(samples: Samples) -> list[tuple[str, str]]:
    """(problem, answer) of all right answers, each once."""
    found = []
    for example, answers, right in zip(samples.examples, samples.answers, samples.right, strict=True):
        found += [
            (example.text, a) for a in dict.fromkeys(a for a, r in zip(answers, right, strict=True) if r)
        ]
    return found


def wrong_answers(samples: Samples) -> dict[str, list[str]]:
    """{problem: its wrong answers, each once}."""
    found = {}
    for example, answers, right in zip(samples.examples, samples.answers, samples.right, strict=True):
        found[example.text] = list(dict.fromkeys(a for a, r in zip(answers, right, strict=True) if not r))
    return found


def contrasted(right: list[tuple], wrong: dict[str, list[str]], repeats: int) -> list[tuple]:
    """Those of the right answers that have a wrong one beside them, `repeats` times; all of them once if that
    is 0, or if there are none.
    """
    return [pair for pair in right if wrong.get(pair[0])] * repeats or right


def judged(
    model: TextModel, task: str, split: str, examples: list[Example], n: int, temperature: float, seed: int
) -> Samples:
    answers = sample_answers(model, task, split, examples, n, temperature, seed)
    records, _ = judge(task, [e for e in examples for _ in answers[0]], [a for some in answers for a in some])
    return Samples(examples, answers, np.array([r["correct"] for r in records]).reshape(len(examples), -1))


def labelled(file: str) -> list[Samples]:
    """Solutions that come with labels, as training, validation and test parts, split by question.

    A row has a question and, for each of its sources, {"solution", "is_correct"}: the form of GSM8K's
    example_model_solutions.jsonl. A final "A: 18" becomes "#### 18", as in everything else here.
    """
    parts: list[list[dict]] = [[], [], []]
    for row in read_rows(file):
        if not isinstance(row.get("question"), str):
            raise DataError(f"{file}: a row has no question, only {', '.join(row)}")
        parts[(0, 0, 1, 2)[zlib.crc32(row["question"].encode()) % 4]].append(row)
    found = []
    for rows in parts:
        sides = [[v for v in row.values() if isinstance(v, dict) and "is_correct" in v] for row in rows]
        if not rows or len({len(some) for some in sides}) != 1 or not sides[0]:
            raise DataError(
                f"{file}: every question needs the same number of labelled solutions, and more rows"
            )
        answers = [[re.sub(r"\nA: ", "\n#### ", side["solution"]) for side in some] for some in sides]
        right = np.array([[bool(side["is_correct"]) for side in some] for some in sides])
        found.append(Samples([Example(row["question"], "") for row in rows], answers, right))
    return found


def train_verifier(cfg: VerifierConfig) -> dict:
    """Trains, fits lambda and probabilities on validation, reports on test; returns run.json."""
    folder = run_folder(cfg)
    if cfg.task not in TASKS or TASKS[cfg.task].metric != "exact_match":
        raise TrainError(f"answers to {cfg.task} cannot be checked: arithmetic, gsm8k")
    generator = load_model(cfg.model, pick_device(cfg.device))
    if generator.kind != "causal" or not generator.chat:
        raise TrainError(f"{cfg.model} was not instruction-tuned, so there are no answers to judge")
    if cfg.solutions:
        learnt, held, examined = labelled(cfg.solutions)
        about = {"source": cfg.solutions, "examples": len(learnt.examples)}
    else:
        teacher = load_model(cfg.answers_of, generator.device) if cfg.answers_of else generator
        if not teacher.chat:
            raise TrainError(f"--answers_of={cfg.answers_of} must be an instruction-tuned model")
        problems, about = load_task(cfg.task, "train", first=cfg.first_problem, count=cfg.problems)
        validation = load_task(cfg.task, "validation")[0][: cfg.validation_problems or None]
        test = load_task(cfg.task, "test")[0][: cfg.test_problems or None]
        learnt = judged(teacher, cfg.task, "train", problems, cfg.n, cfg.temperature, cfg.seed_samples)
        held, examined = (
            judged(generator, cfg.task, split, some, cfg.held_n, cfg.held_temperature, cfg.seed_samples)
            for split, some in (("validation", validation), ("test", test))
        )
    known = (e.text for e in [*learnt.examples, *held.examples])
    refuse_overlap(known, (e.text for e in examined.examples), cfg.task)
    if learnt.right.all() or not learnt.right.any():
        raise TrainError(
            f"all of {learnt.right.size:,} answers are {'right' if learnt.right.all() else 'wrong'}: "
            "there is nothing to tell apart"
        )
    train = train_head if cfg.kind == "head" else train_channel
    try:
        run = train(cfg, generator, learnt, held, about)
    except AlreadyFinished as finished:
        run = finished.run
        if "verification" in run:
            raise
    core = read_core(cfg.kind, folder, cfg.device)
    verifier = Verifier(cfg.kind, generator, core, {}, str(folder))
    parts = verifier.parts(*held.flat(), "validation")
    lengths = np.array([len(generator.encode(p)) for p in held.flat()[0]])
    run["combine"] = verifier.combine = fit(cfg.kind, parts, held.right, lengths)
    run["verification"] = {"split": "test", **examine(verifier, examined)}
    write_run(folder, run)
    return run


def fit(kind: str, parts: np.ndarray, right: np.ndarray, lengths: np.ndarray) -> dict:
    """lambda, sharpness, and the logistic regression of right on the log-likelihoods and the length.

    lambda orders the most pairs of a right and a wrong answer to one problem rightly. That changes smoothly,
    where how often the best answer is right is decided by a few problems; and unlike the likelihood of the
    right answers, it is not bent by the few wrong ones of which the generator is sure. The sharpness gives
    each answer a share of its problem, softmax(sharpness x score), to vote with, and is chosen for the
    likelihood of the right ones.
    """
    weights = (0.0,) if kind == "head" else LAMBDAS
    scores = {w: combined(kind, parts, w).reshape(right.shape) for w in weights}
    ordered = {w: auc_within(right, score)["value"] for w, score in scores.items()}
    weight = max(weights, key=ordered.get)
    mixed, score = right.any(1) & ~right.all(1), scores[weight]

    def likelihood(sharpness: float) -> float:
        share = np.exp(sharpness * (score - score.max(1, keepdims=True)))
        return np.log((share * right).sum(1) / share.sum(1) + 1e-9)[mixed].mean()

    choices = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    sharpness = max(choices, key=likelihood) if mixed.any() else 1.0
    coefficients = logistic(evidence(parts, lengths), right.ravel())
    best_of = {str(w): float(right[np.arange(len(right)), s.argmax(1)].mean()) for w, s in scores.items()}
    return {"lambda": weight, "sharpness": sharpness, "logistic": coefficients, "validation": best_of}


def evidence(parts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n, 4) what the probability of an answer depends on: the two log-likelihoods, 1, the problem's tokens.

    Each log-likelihood has a weight of its own. Their sum, which ranks the answers to one problem, differs
    most between problems: fitted on it alone, a wrong sum (some nats in log p(answer | problem)) hardly
    counted.
    """
    return np.stack([parts[:, 0], parts[:, 1], np.ones(len(parts)), lengths], axis=1)


def logistic(x: np.ndarray, y: np.ndarray, rounds: int = 50, ridge: float = 1e-3) -> list[float]:
    """Coefficients of a logistic regression of y (n) on x (n, k), by Newton's method."""
    scale = np.abs(x).mean(0) + 1e-9
    x, w = x / scale, np.zeros(x.shape[1])
    for _ in range(rounds):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        gradient = x.T @ (p - y) + ridge * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + (ridge + 1e-6) * np.eye(len(w))
        change = np.linalg.solve(hessian, gradient)
        w -= change
        if np.abs(change).max() < 1e-8:
            break
    return [float(v) for v in w / scale]


def examine(verifier: Verifier, samples: Samples) -> dict:
    """How well a verifier tells right answers from wrong ones, beside what each of its parts alone does."""
    problems, answers = samples.flat()
    parts = verifier.parts(problems, answers, "test")
    score, probability = verifier.verdict(problems, answers, parts)
    right, shape = samples.right.ravel(), samples.right.shape
    scores = {"verifier": probability, "generator alone": parts[:, 0], f"{verifier.kind} alone": parts[:, 1]}
    found = {"problems": shape[0], "answers": len(right), "right": float(right.mean())}
    found["right_by_source"] = samples.right.mean(0).tolist()  # of labelled solutions: each model's accuracy
    found["oracle"] = proportion(int(samples.right.any(1).sum()), shape[0])
    for name, values in scores.items():
        ranked = score if name == "verifier" else values
        best = samples.right[np.arange(shape[0]), ranked.reshape(shape).argmax(1)]
        found[name] = {
            "auc": auc(right, values),
            "auc_within": auc_within(samples.right, ranked.reshape(shape)),
        }
        found[name] |= {"best_of_n": proportion(int(best.sum()), len(best))}
    found["accuracy"] = proportion(int(((probability > 0.5) == right).sum()), len(right))
    return found | {"calibration": calibration(right, probability)}


def train_channel(
    cfg: VerifierConfig, generator: TextModel, learnt: Samples, held: Samples, about: dict
) -> dict:
    """A language model that tells problems from answers: from true solutions, and the generator's right ones.

    Where the generator also gave wrong answers, one is drawn at each step, and the problem has to be likelier
    after the right one: a logistic loss on the difference, weighted by `contrast`. A language model alone
    learns from what is right; it would never see that "sells 4 stamps" is no way to tell of 4 nuts that were
    sold. Two thirds of the right answers have no wrong one beside them: with `repeats` the time goes to the
    others, each beside another wrong one every time, and the language is learnt from true solutions.
    """
    channel = aligned_model(VerifierConfig(**{**cfg.__dict__, "model": cfg.start}))
    if channel.tokenizer.hash != generator.tokenizer.hash:
        raise TrainError(f"{cfg.start} has another tokenizer than {cfg.model}: --start must be of its family")
    gold = load_task(cfg.task, "train", count=cfg.gold)[0] if cfg.gold else []
    wrong = wrong_answers(learnt) if cfg.contrast else {}
    told = [(e.text, e.target.strip()) for e in gold] + contrasted(right_answers(learnt), wrong, cfg.repeats)
    rows = [backward_row(channel, *pair) for pair in told]
    rivals = [[backward_row(channel, problem, a) for a in wrong.get(problem, ())] for problem, _ in told]
    val_told = [(e.text, e.target.strip()) for e in held.examples if e.target] or right_answers(held)
    val_rows = [backward_row(channel, p, a) for p, a in val_told]
    order = TrainingSet(rows, rows_per_step(cfg), cfg.seed, "causal", channel.pad)
    smoke = bool(cfg.max_steps) or is_smoke(cfg.model) or is_smoke(cfg.start)
    cfg.max_steps = cfg.max_steps or math.ceil(order.batches * cfg.epochs)

    def batch_of(step: int, first: int, count: int) -> tuple[Tensor, ...]:
        members, rng = order.members(step, first, count), np.random.default_rng([cfg.seed, step, first])
        drawn = [(at, rivals[i][rng.integers(len(rivals[i]))]) for at, i in enumerate(members) if rivals[i]]
        tensors = collate([rows[i] for i in members] + [row for _, row in drawn], "causal", channel.pad)
        return *tensors, torch.tensor([at for at, _ in drawn], dtype=torch.long)

    def evaluate(core, final):
        return {"val_loss": -channel.log_likelihoods(val_rows).sum() / sum(len(a) for _, a in val_rows)}

    tokens, parameters = float(order.lengths.mean()), sum(p.numel() for p in channel.model.parameters())
    trainer = trainer_for(
        cfg, channel, batch_of, loss=lambda core, *t: channel_loss(core, *t, cfg.contrast),
        evaluate=evaluate, flops_per_row=6 * parameters * tokens,
        tokens_per_row=max(1, round(tokens)), epoch=lambda step: step / order.batches,
        about=parents(cfg, generator, train=about | {"answers": len(rows), "gold": len(gold)})
        | {"verifier": "channel", "start_hash": weights_hash(cfg.start), "smoke": smoke},
        free_to_change=["verifier", "problem", "answer"],
        keeps_best=False,  # val_loss says how well it tells stories; what counts is the order of answers
    )  # fmt: skip
    trainer.say(
        f"{trainer.folder}: a channel from {cfg.start}, on {len(gold):,} true solutions and "
        f"{len(rows) - len(gold):,} right answers of {cfg.solutions or cfg.answers_of or cfg.model}, "
        f"{sum(map(bool, rivals)):,} with wrong ones beside them; {cfg.max_steps} steps of {order.batch_size}"
    )
    trainer.say(f"one of them: {channel.decode(rows[0][0])!r} -> {channel.decode(rows[0][1])!r}")
    return trainer.run_all_steps()


def channel_loss(
    model: nn.Module, ids: Tensor, mask: Tensor, targets: Tensor, right: Tensor, contrast: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the problems given right answers, and -log sigmoid of how much likelier a problem is
    after a right answer than after a wrong one: (sum, tokens).

    The last rows are the wrong answers, one for each place in `right`.
    """
    logits = target_logits(model, "causal", ids, mask, targets)
    nats = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none").sum(
        1
    )
    n = len(ids) - len(right)
    loss = nats[:n].sum() - contrast * F.logsigmoid(nats[n:] - nats[right]).sum()
    return loss, (targets[:n] != -100).sum()


def train_head(
    cfg: VerifierConfig, generator: TextModel, learnt: Samples, held: Samples, about: dict
) -> dict:
    """The generator with a head, on all its answers, right and wrong: `group` of them a problem at a time."""
    text_model = aligned_model(cfg)
    net = ValueModel(text_model.model)
    head = HeadModel(text_model, net)
    rows = [
        [forward_row(text_model, e.text, a) for a in some]
        for e, some in zip(learnt.examples, learnt.answers, strict=True)
    ]
    batch = max(1, cfg.batch_size // cfg.group)  # problems
    cfg.batch_size = batch * cfg.group
    if rows_per_step(cfg) > cfg.batch_size:
        raise TrainError("--kind=head trains in one process without accumulation")
    batches = max(1, len(rows) // batch)
    smoke = bool(cfg.max_steps) or is_smoke(cfg.model)
    cfg.max_steps = cfg.max_steps or math.ceil(batches * cfg.epochs)

    def members(step: int) -> list[tuple[int, int]]:
        """(problem, answer) of a step: of each problem, right and wrong answers by turns while there are."""
        epoch, at = divmod(step, batches)
        order = np.random.default_rng([cfg.seed, epoch]).permutation(len(rows))
        chosen = []
        for p in np.resize(order, batches * batch)[at * batch : (at + 1) * batch]:
            drawn = np.random.default_rng([cfg.seed, step, int(p)]).permutation(learnt.right.shape[1])
            right, wrong = ([j for j in drawn if learnt.right[p, j] == c] for c in (True, False))
            turns = [j for pair in zip(right, wrong, strict=False) for j in pair]
            turns = np.resize(turns + [j for j in drawn if j not in turns], cfg.group)
            chosen += [(int(p), int(j)) for j in turns]
        return chosen

    def batch_of(step: int, first: int, count: int) -> tuple[Tensor, ...]:
        some = members(step)[first : first + count]
        labels = torch.tensor([float(learnt.right[p, j]) for p, j in some])
        return *value_rows([rows[p][j] for p, j in some], text_model.pad), labels

    val_rows = [forward_row(text_model, p, a) for p, a in zip(*held.flat(), strict=True)]
    labels = torch.tensor(held.right.ravel()).double()

    def evaluate(core, final):
        values = torch.tensor(head.values(val_rows))
        found = {"val_loss": F.binary_cross_entropy_with_logits(values, labels).item()}
        return found | {
            "auc_within": auc_within(held.right, values.numpy().reshape(held.right.shape))["value"]
        }

    tokens = float(np.mean([length(r) for some in rows for r in some]))
    trainer = HeadTrainer(
        cfg, text_model, net, batch_of, loss=lambda core, *t: head_loss(core, *t, cfg), evaluate=evaluate,
        tokenizer=text_model.tokenizer,
        flops_per_row=6 * tokens * sum(p.numel() for p in net.parameters()), tokens_per_row=1,
        epoch=lambda step: step / batches,
        about=parents(cfg, generator, train=about) | {"verifier": "head", "smoke": smoke},
    )  # fmt: skip
    trainer.say(
        f"{trainer.folder}: a head on {cfg.model}, {learnt.right.size:,} answers, "
        f"{100 * learnt.right.mean():.0f} % right; {cfg.max_steps} steps"
    )
    return trainer.run_all_steps()


def area(auc: float) -> str:
    """An AUC as text; there is none if all answers are right or all wrong."""
    return "n/a" if math.isnan(auc) else f"{auc:.3f}"


def describe(run: dict) -> list[str]:
    found = run["verification"]
    lines = [
        f"{found['answers']:,} answers to {found['problems']:,} test problems, "
        f"{100 * found['right']:.1f} % right; lambda {run['combine']['lambda']}"
    ]
    for name in ("verifier", "generator alone", f"{run['verifier']} alone"):
        m = found[name]
        lines.append(
            f"  {name:16} AUC {area(m['auc'])}, within a problem {area(m['auc_within']['value'])}, "
            f"best of n {100 * m['best_of_n']['value']:.1f}"
        )
    return [
        *lines,
        f"  accuracy {100 * found['accuracy']['value']:.1f}, "
        f"calibration error {100 * found['calibration']['ece']:.1f} %",
    ]


def main() -> None:
    cfg = parse_config(VerifierConfig, __doc__)
    try:
        if cfg.verifier:
            print(f"{Verifier.load(cfg.verifier, cfg.device).score(cfg.problem, cfg.answer):.4f}")
            return
        print("\n".join(describe(train_verifier(cfg))))
    except AlreadyFinished as finished:
        print("\n".join(describe(finished.run)))
        print("nothing to do: --overwrite trains it anew, --name trains another")
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"verifier.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
