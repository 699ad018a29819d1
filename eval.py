"""Evaluation: any number of models, on any tasks and texts, by one protocol, with an interval beside every
figure.

    python eval.py out/base                                            # the embedded tasks, prompted
    python eval.py out/base out/sentiment --tasks=sentiment            # before and after fine-tuning
    python eval.py out/base gpt2 --tasks=wikitext2,sst2,gsm8k --shots=0,4
    python eval.py out/sst2-gpt2-lora --tasks=sst2 --contamination=8

A model is a run folder of ours, a folder or an id on the hub with a Hugging Face model, or a PEFT adapter.
Runs of ours, and the other checkpoints that model.py can compute, are computed by it; --backend=transformers
has transformers do it, with the same result.

--tasks names, joined by commas, what is measured:

    sst2, sentiment             classification: the class whose name the model finds likelier as the next
                                words (--calibrate: relative to an empty text), or which its head says.
                                Accuracy (Wilson's interval) and macro F1 (bootstrap).
    gsm8k, arithmetic           a worked solution is generated greedily, its number compared: exact match;
    samsum, dialogue            or a summary: ROUGE-1, -2, -L with stemming (bootstrap), and its length.
    story                       the model continues the first paragraph of a story: in how many do people,
                                pronouns and things agree (tasks/stories.py)?
    storyworld, wikitext2, ...  any corpus of data.py, or a file: perplexity a token, bits a byte, perplexity
                                a word. Each document is read alone; running text (WikiText, a .txt without
                                <|endoftext|>) is one document. Over what is longer than --context_length a
                                window moves by --stride tokens (half of it by default) and predicts those
                                that are new: every token once, with at least the rest of a window before it.
                                Perplexities a token compare only under one tokenizer, bits a byte always. The
                                interval is a bootstrap over documents and windows.

--battery=200 gives every model 200 instructions of the embedded collection's test split, counts answers
that are exactly right and shows some. The answers go to out/pipeline.json, and report.py sets them side by
side.

--shots=4 puts four worked examples, drawn from the train split by --seed, before each question; a model
that was tuned on the task wants none. --limit=N takes N items by --seed, and the interval widens as it
should. A prompt that is too long loses examples first, then the end of its text, never the question; how many
did is reported. --contamination=8 tells how many test items share 8 words in a row with what the model was
trained on, where a run's record says what that was.

--samples=16 --verifier=out/verifier, for tasks with a checkable answer: test-time compute. So many answers to
each problem are sampled (and kept in the run folder); from the first 1, 2, 4, ... of them one is chosen by
majority (self-consistency), by a verifier (the best one, or a vote weighted by its scores), by several
verifiers together (--verifier=out/verifier,out/head: their log-odds added), or by a vote of those whose
calculations are right, beside the oracle, pass@n, which knows the true answer; with paired differences. Also:
sampling on until the verifier is sure, greedy answers whose `<<...=` a calculator fills in, and what is wrong
with the wrong ones. A base, which was taught no task, is asked greedily only.

--solutions=FILE chooses among answers that others wrote and labelled (the format of verifier.py's file), on
the last quarter of its questions. Every way is compared with a random choice:

    python eval.py out/sft --tasks=gsm8k --solutions=labelled.jsonl --verifier=out/verifier,out/head

--attention asks no task: it scores every head on a repeated sequence of random tokens (does it look at the
token before, at the first one, at what followed the same token last time?) and writes maps to attention.json,
which report.py draws: of the foremost heads, or by --layer and --head of any, over two texts or --text. It
takes encoders too, and those of encoder-decoders:

    python eval.py bert-base-uncased --attention --text="The cat sat on the mat" --layer=3
    python eval.py out/base --attention --text="Lucy had a red ball." --layer=2 --head=1

--streams asks no task either: it reads texts sixteen times as long as the context (of the corpus in --tasks,
by default the model's own) under full attention, stretched RoPE, and a rolling cache with and without the
first tokens, the attention sinks; the results go to streams.json and into the report.

It prints a table and, where several models answered the same items, the paired differences to the first one
and to the one before. Into each run folder (out/eval/MODEL for a model of the hub, or a read-only folder) it
writes results.json, one entry for each task, split and number of shots, and answers/: every answer, and the
wrong ones apart, a line each.
"""

from support.terminal import bare_words, run_script

import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from configs import ConfigError, parse_config
from data import (
    CORPORA,
    EMBEDDED,
    TASKS,
    DataError,
    Example,
    checkable,
    corpus_info,
    documents,
    few_shot,
    judge,
    load_task,
)
from finetune import subsample
from support.attention import load_for_attention, show_attention
from support.contamination import contamination, trained_on, training_texts
from support.evaluations import Result, compare, describe, results_folder, write_result
from support.loading import load_model, read_run
from support.long_context import show_streams
from support.machine import pick_device, pick_dtype
from support.metrics import bits_per_byte, bootstrap, paired_bootstrap, pass_at, perplexity
from support.pipeline import follow_instructions, write_pipeline
from support.results import SMOKE
from support.runs import TrainError, errors_for_users
from support.samples import Samples, draw, labelled
from support.text_model import TextModel, answer_task
from tasks.calculator import calculates
from tasks.mistakes import KINDS, kinds_of
from verifier import Verifier, accuracy, vote_weights


@dataclass
class EvalConfig:
    """What is measured, and how."""

    models: str = "out/base"  # models, joined by commas; bare words do as well
    tasks: str = "sentiment,dialogue,arithmetic"  # tasks and corpora, joined by commas
    shots: str = "0"  # worked examples before a question; 0,4 measures without and with four of them
    split: str = ""  # train, validation or test; default: the one each task is reported on
    limit: int = 0  # items (or documents) a task, drawn by seed; 0: all
    seed: int = 1  # of the examples in prompts, of --limit and of the samples
    calibrate: bool = False  # classification: subtract the log-likelihood that each class has for "N/A"
    context_length: int = 0  # tokens that a model may look at; 0: as many as it can
    stride: int = 0  # corpora: tokens from one window to the next; 0: half a window
    contamination: int = 0  # N: look for N words in a row of each item in the training text; 0: don't
    samples: int = 0  # answers a problem, for test-time compute on tasks with a checkable answer; 0: none
    temperature: float = 1.0  # of these samples
    solutions: str = ""  # a file of labelled solutions of others, to choose among instead of samples
    attention: bool = False  # what the heads look at, instead of tasks
    text: str = ""  # attention: the text whose maps are made; nothing: two of ours
    layer: int = -1  # attention: maps of this layer, from 0; -1: top-scoring heads, or with --head all layers
    head: int = -1  # attention: maps of this head, from 0; -1: top-scoring heads, or with --layer all heads
    streams: bool = False  # texts longer than the context, instead of tasks
    battery: int = 0  # held-out instructions that are given to every model, some shown side by side
    verifier: str = ""  # verifiers that choose among the samples, run folders joined by commas
    backend: Literal["auto", "ours", "transformers"] = "auto"  # what computes the models
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: on a CPU float32, on a GPU bfloat16
    device: str = "auto"  # cuda, cpu, ...
    out: str = "out"  # folder that holds everything the project makes


# -----------------------------------------------------------------------------
# Text: perplexity


def windows(ids: list[int], T: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """Ids as rows of `log_likelihoods`, (known ids, new ids): a window of T ids moves by `stride`, and every
    id but the first is new once.
    """
    found = []
    known = 0  # index of the last id that was predicted
    last = len(ids) - 1
    while known < last:
        end = min(known + stride if known else T, last)
        found.append((ids[max(0, end - T) : known + 1], ids[known + 1 : end + 1]))
        known = end
    return found


def evaluate_text(
    model: TextModel, texts: list[str], stride: int = 0, progress: str = "", running_text: bool = False
) -> dict:
    """{"metrics": perplexity a token and a word, bits a byte, with bootstrap intervals over windows, ...}.

    Each document is read by itself, as SFT and lm-eval do: a start token, its own tokens, an end-of-text
    token. Joined into windows, as pretraining reads them, stories after SFT look 3.5 times as forgotten. Only
    the pieces of a running text are joined.
    """
    T = model.context_length
    stride = stride or max(1, T // 2)
    if not 0 < stride <= T:
        raise TrainError(f"--stride={stride} must be from 1 to the context of {T} tokens")
    sequences = [[*model.encode(text), model.eos] for text in texts]
    alone = 0 if running_text else sum(len(ids) <= T for ids in sequences)
    if running_text:
        sequences = [list(chain(*sequences))]
    rows = [window for ids in sequences for window in windows(model.start + ids, T, stride)]
    counts = np.array([len(new) for _, new in rows])
    nats_and_tokens = np.stack([-model.log_likelihoods(rows, progress), counts], axis=1)  # resampled together
    loss = bootstrap(nats_and_tokens, lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum(), rounds=500)
    loss["n"] = tokens = int(counts.sum())
    n_bytes = sum(len(text.encode()) for text in texts)
    n_words = sum(len(text.split()) + text.count("\n") for text in texts)  # WikiText counts a line's end
    units = {
        "perplexity": (perplexity, 1),
        "bits_per_byte": (bits_per_byte, n_bytes / tokens),
        "word_perplexity": (perplexity, n_words / tokens),
    }
    metrics = {"loss": loss}
    for name, (convert, per_token) in units.items():
        converted = {end: convert(loss[end], per_token) for end in ("value", "low", "high")}
        metrics[name] = converted | {"n": tokens}
    return {
        "metrics": metrics,
        "stride": stride,
        "documents_alone": alone,
        "documents_in_windows": len(texts) - alone,
    }


# -----------------------------------------------------------------------------
# One model on one task or corpus


def load_items(name: str, cfg: EvalConfig) -> tuple[list, dict]:
    """Examples of a task, or documents of a corpus; and the beginning of an entry of results.json."""
    if name in TASKS:
        split = cfg.split or TASKS[name].test
        everything, about = load_task(name, split)
    else:
        split = cfg.split or "test"
        try:
            about = corpus_info(name, split)
        except DataError:
            if cfg.split:
                raise
            split = "validation"  # of a corpus without a test split, such as TinyStories
            about = corpus_info(name, split)
        everything = list(documents(name, split, about=about))
    items = subsample(everything, cfg.limit, cfg.seed)
    return items, {
        "task": name,
        "split": split,
        "shots": 0,
        "items": len(items),
        "of": len(everything),
        "seed": cfg.seed,
        "data": about,
    }


def evaluate(model: TextModel, name: str, shots: int, cfg: EvalConfig) -> Result:
    """One model on a task or a corpus. Raises TrainError if the model cannot do it."""
    if name not in TASKS and model.kind != "causal":
        raise TrainError("perplexity of a text is for decoders")
    items, entry = load_items(name, cfg)
    backend = "ours" if model.ours else "transformers"
    entry |= {"shots": shots, "context_length": model.context_length, "backend": backend}
    if name in TASKS:
        found, records = evaluate_task(model, name, items, shots, cfg)
        texts = [example.text for example in items]
    else:
        running = entry["data"].get("running_text", False)
        found = evaluate_text(model, items, cfg.stride, f"{model.name} {name}", running)
        records = []
        texts = items
    if cfg.contamination and (sources := trained_on(model.name)):
        found["contamination"] = contamination(texts, training_texts(sources), cfg.contamination)
        found["contamination"]["sources"] = [f"{kind} {source}" for kind, source, *_ in sources]
    return Result(entry | found, records)


def evaluate_task(model: TextModel, name: str, examples: list[Example], shots: int, cfg: EvalConfig):
    """{"metrics", ...} and a record of each answer."""
    if model.kind == "head" and shots:
        raise TrainError("a classification head takes no examples")
    shown = few_shot(name, shots, cfg.seed)
    outputs, found = answer_task(model, name, examples, shown, cfg.calibrate, progress=f"{model.name} {name}")
    probabilities = found.pop("sure", ())  # of the class that was chosen
    records, found["metrics"] = judge_with_kinds(name, examples, outputs)
    for record, probability in zip(records, probabilities, strict=False):
        record["sure"] = round(probability, 3)
    if TASKS[name].labels:
        most_frequent = max(Counter(example.label for example in examples).values())
        found |= {"calibrated": cfg.calibrate, "majority_class": most_frequent / len(examples)}
    return found, records


def judge_with_kinds(name: str, examples: list[Example], outputs: list) -> tuple[list[dict], dict]:
    """`data.judge`, and in each record the kinds of its mistakes."""
    records, metrics = judge(name, examples, outputs)
    for record in records:
        record["kinds"] = kinds_of(TASKS[name].metric, record)
    return records, metrics


# -----------------------------------------------------------------------------
# Test-time compute: n answers to each of P problems, and ways to choose one of them. A way is a function of
# two arrays, answers (P, k) and weights (P, k), that returns the index of the chosen answer (P).


def vote(answers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The answer whose weights add up to most (Li et al., 2023), the first of several such; with weights of 1
    the majority (self-consistency, Wang et al., 2022). Where no weight is above 0, all count as 1.
    """
    weights = np.where((weights > 0).any(1, keepdims=True), weights, 1.0)
    same = answers[:, :, None] == answers[:, None, :]  # (P, k, k)
    totals = (same * weights[:, None, :]).sum(2)
    return np.where(answers == "", -1.0, totals).argmax(1)  # no number, no vote


def best(answers: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return scores.argmax(1)


THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)  # of a probability; 1.01: never sure


def budgets(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def sample_until_sure(probabilities: np.ndarray, right: np.ndarray, threshold: float) -> dict:
    """Samples (P, n) are drawn until the probability of one reaches the threshold; else the best is taken."""
    reached = probabilities >= threshold
    stopped = reached.any(1)
    chosen = np.where(stopped, reached.argmax(1), probabilities.argmax(1))
    spent = np.where(stopped, chosen + 1, right.shape[1])
    hits = right[np.arange(len(right)), chosen]
    return {"threshold": threshold, "samples": float(spent.mean()), "right": accuracy(hits)}


def evaluate_samples(model: TextModel, name: str, cfg: EvalConfig, verifiers: list[Verifier]) -> Result:
    """Every way to choose among `cfg.samples` answers to each problem of a task, at every budget.

    The first k samples are what a budget of k would have drawn, so all curves share their samples and all
    differences are paired. Only `pass`, the oracle, looks at the true answer.
    """
    examples, entry = load_items(name, cfg)
    draw_from = partial(draw, model, name, entry["split"], examples)
    samples = draw_from(cfg.samples, cfg.temperature, cfg.seed)
    greedy, calculator = (draw_from(1, 0.0, cfg.seed, calculator=tool) for tool in (False, True))
    records, _ = judge_with_kinds(name, examples, [row[0] for row in greedy.answers])
    errors = Counter(kind for record in records for kind in record["kinds"])
    entry |= choose(samples, verifiers, records, greedy.right[:, 0], calculator.right[:, 0])
    entry["temperature"] = cfg.temperature
    entry["errors"] = {kind: errors[kind] for kind in KINDS if errors[kind]}
    return Result(entry, records)


def evaluate_solutions(name: str, cfg: EvalConfig, verifiers: list[Verifier]) -> Result:
    """Every way to choose among the labelled solutions of others to each problem."""
    samples = labelled(cfg.solutions)[-1]
    count = len(samples.examples)
    records = [{"text": e.text, "target": e.target} for e in samples.examples]
    entry = {"task": name, "split": "solutions", "shots": 0, "items": count, "of": count}
    entry |= {"data": {"source": cfg.solutions}} | choose(samples, verifiers, records)
    return Result(entry, records)


def choose(samples: Samples, verifiers: list[Verifier], records: list[dict], *greedy: np.ndarray) -> dict:
    """Metrics, curves, differences and gating of all ways to choose. Each verifier adds its choice to the
    records. `greedy` (P): whether greedy answers, without and with a calculator, are right.
    """
    right = samples.right
    calculated = np.array([[calculates(answer) for answer in row] for row in samples.answers], float)
    ways = {"majority": (vote, np.ones(right.shape)), "calculator vote": (vote, calculated)}
    gating, together = {}, np.zeros(right.shape)  # together: the sum of their log-odds
    for verifier in verifiers:
        label = Path(verifier.name).name
        scored = verifier.score_all(*samples.flat(), f"{verifier.name} judges")
        scores, probabilities = (values.reshape(right.shape) for values in scored)
        ways[f"{label}, best"] = best, scores
        ways[f"{label}, vote"] = vote, vote_weights(scores, verifier.fitted["sharpness"])
        together += np.log(probabilities + 1e-12) - np.log(1 - probabilities + 1e-12)
        gating[label] = [sample_until_sure(probabilities, right, threshold) for threshold in THRESHOLDS]
        for i, j in enumerate(scores.argmax(1)):
            records[i] |= {
                label: samples.answers[i][j],
                f"{label} correct": bool(right[i, j]),
                f"{label} sure": round(float(probabilities[i, j]), 4),
            }
    if len(verifiers) > 1:
        ways["together, best"] = best, together
    return {
        **figures(ways, samples.numbers, right, *greedy),
        "samples": right.shape[1],
        "gating": gating,
        "verifiers": {Path(verifier.name).name: verifier.name for verifier in verifiers},
    }


def figures(ways: dict, numbers: np.ndarray, right: np.ndarray, *greedy: np.ndarray) -> dict:
    """Metrics, curves over budgets and paired differences.

    ways: {name: (rule, weights (P, n))}; numbers (P, n); right (P, n), and greedy answers (P) without and
    with a calculator: bool. Without greedy answers the ways are compared with a random choice.
    """
    n = right.shape[1]
    curves = {}
    final = {}  # {way: (P) whether its choice among all n is right}
    for way, (rule, weights) in ways.items():
        curves[way] = {}
        for k in budgets(n):  # the last one is n
            chosen = rule(numbers[:, :k], weights[:, :k])
            final[way] = right[np.arange(len(right)), chosen]
            curves[way][k] = accuracy(final[way])
    metrics = {
        name: accuracy(hits) for name, hits in zip(("exact_match", "calculator"), greedy, strict=False)
    }
    metrics |= {"mean_sample": bootstrap(right.mean(1)), f"pass@{n}": accuracy(right.any(1))}
    metrics |= {f"{way} of {n}": curve[n] for way, curve in curves.items()}
    curves["pass"] = {}
    for k in budgets(n):
        mean = float(np.mean([pass_at(k, n, correct) for correct in right.sum(1)]))
        curves["pass"][k] = {"value": mean, "n": len(right)}
    differences = {}
    if greedy:
        final["greedy, calculator"] = greedy[1]
    plain, hits_of_plain = ("greedy", greedy[0]) if greedy else ("a random one", right.mean(1))
    for way, hits in final.items():
        differences[f"{way} - {plain}"] = paired_bootstrap(hits, hits_of_plain)
        if way != "majority":
            differences[f"{way} - majority"] = paired_bootstrap(hits, final["majority"])
    for one, other in combinations([way for way in final if way.endswith(", best")], 2):
        differences[f"{one} - {other}"] = paired_bootstrap(final[one], final[other])
    return {"metrics": metrics, "curves": curves, "differences": differences}


# -----------------------------------------------------------------------------
# The command line


def read_words(argv: list[str]) -> list[str]:
    """Bare words are models: `out/base gpt2` becomes --models=out/base,gpt2."""
    rest, models = bare_words(argv, EvalConfig)
    return rest + ([f"--models={','.join(models)}"] if models else [])


def checked(cfg: EvalConfig) -> tuple[list[str], list[int]]:
    """Tasks and shots; a ConfigError where a name or number cannot be."""
    if not re.fullmatch(r"\d+(,\d+)*", cfg.shots):
        raise ConfigError(f"--shots={cfg.shots} must be whole numbers, joined by commas: 0,4")
    if not all(cfg.models.split(",")):
        raise ConfigError(f"--models={cfg.models} has an empty name: join models by single commas")
    known = dict.fromkeys([*TASKS, *EMBEDDED, *CORPORA])
    tasks = cfg.tasks.split(",")
    for task in tasks:
        if not (task in known or Path(task).exists() or re.search(r"[*?[:]", task)):
            raise ConfigError(f'"{task}" is no task, corpus or file; there are {", ".join(known)}')
    if cfg.solutions and not checkable(cfg.tasks):
        raise ConfigError("--solutions are of one task, whose answers can be checked: --tasks=gsm8k")
    if cfg.solutions and (cfg.samples or cfg.limit):
        raise ConfigError("--solutions takes neither --samples nor --limit: the file has all answers")
    return tasks, [int(shots) for shots in cfg.shots.split(",")]


def evaluate_model(model: TextModel, cfg: EvalConfig, device: torch.device) -> list[Result]:
    """One model on all tasks; results are printed and written as they come."""
    name = model.name
    run = read_run(name)
    smoke = f"; {SMOKE}" if run.get("smoke") else ""
    print(f"{name}: {model.n_parameters / 1e6:.1f}M parameters, {model.kind}{smoke}")
    results = []

    def keep(measure: Callable[..., Result], *arguments) -> None:
        begun = time.perf_counter()
        result = measure(*arguments)
        result.entry["seconds"] = round(time.perf_counter() - begun, 2)
        result.entry["smoke"] = bool(run.get("smoke"))
        results.append(result)
        print(f"  {result.name}: {describe(result.entry)}", flush=True)
        write_result(results_folder(name, cfg.out), result, cfg.dtype, device)

    tasks, shots = checked(cfg)
    for task in tasks:
        sampled = cfg.samples and checkable(task)
        taught = model.chat or run.get("settings", {}).get("task")
        if cfg.solutions or (sampled and taught):
            paths = filter(None, cfg.verifier.split(","))
            verifiers = [Verifier.load(path, cfg.device) for path in paths]
            if cfg.solutions:
                keep(evaluate_solutions, task, cfg, verifiers)
            else:
                keep(evaluate_samples, model, task, cfg, verifiers)
            continue
        if sampled:  # a base's samples hold no answers to choose among
            print(f"  {task}: {name} was taught no task, so it is asked greedily and not sampled")
        for n in shots if task in TASKS and TASKS[task].asks else [0]:
            try:
                keep(evaluate, model, task, n, cfg)
            except TrainError as error:
                if model.kind == "causal":
                    raise
                print(f"  {task}, {n}-shot: skipped: {error}")
    return results


def evaluate_all(cfg: EvalConfig) -> None:
    """All models, their differences, and the table of all; or their heads, or texts beyond their contexts."""
    tasks, _ = checked(cfg)  # before anything is loaded
    if cfg.solutions:
        labelled(cfg.solutions)  # refuses a file that cannot be
    device = pick_device(cfg.device)
    dtype = None if cfg.dtype == "auto" else pick_dtype(cfg.dtype, device)
    results, answers = {}, {}  # by model
    for name in cfg.models.split(","):
        if cfg.attention:
            model = load_for_attention(name, device, cfg.backend, cfg.context_length, dtype)
            show_attention(model, results_folder(name, cfg.out), cfg.seed, cfg.text, cfg.layer, cfg.head)
        if cfg.streams:
            model = load_model(name, device, "ours", cfg.context_length)
            show_streams(model, results_folder(name, cfg.out), tasks, cfg.split or "test", cfg.limit or 4)
        if cfg.attention or cfg.streams:
            continue
        model = load_model(name, device, cfg.backend, cfg.context_length, dtype)
        if dtype:
            model.dtype = dtype
        results[name] = evaluate_model(model, cfg, device)
        if cfg.battery and model.kind == "causal":
            answers[name] = follow_instructions(model, cfg.battery)
    for line in compare(results):
        print(line)
    if answers:
        write_pipeline(Path(cfg.out) / "pipeline.json", answers)


def main() -> None:
    cfg = parse_config(EvalConfig, __doc__, read_words(sys.argv[1:]))
    with errors_for_users():
        evaluate_all(cfg)


if __name__ == "__main__":
    run_script(main)
