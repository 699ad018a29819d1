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
    storyworld, wikitext2, ...  any corpus of data.py, or a file: perplexity a token, bits a byte, perplexity
                                a word. Each document is read alone; running text (WikiText, a .txt without
                                <|endoftext|>) is one document. Over what is longer than --context_length a
                                window moves by --stride tokens (half of it by default) and predicts those
                                that are new: every token once, with at least the rest of a window before it.
                                Perplexities a token compare only under one tokenizer, bits a byte always. The
                                interval is a bootstrap over documents and windows.

--battery=200 gives every model so many instructions of the embedded collection's test split, counts answers
that are exactly right and shows some side by side. With it or --samples, a table of all models goes to
out/pipeline.json.

--shots=0,4 puts so many worked examples, drawn from the train split by --seed, before each question; a model
that was tuned on the task wants none. --limit=N takes N items by --seed, and the interval widens as it
should. A prompt that is too long loses examples first, then the end of its text, never the question; how many
did is reported. --contamination=8 tells how many test items share 8 words in a row with what the model was
trained on, where a run's record says what that was.

--samples=16 --verifier=out/verifier, for tasks with a checkable answer: test-time compute. So many answers to
each problem are sampled (and kept in the run folder); from the first 1, 2, 4, ... of them one is chosen by
majority (self-consistency), by a verifier (the best one, or a vote weighted by its scores), or by a vote of
those whose sums a calculator confirms, beside the oracle, pass@n, which knows the true answer; with paired
differences. Also: sampling on until the verifier is sure, greedy answers whose `<<...=` a calculator fills
in, and what is wrong with the wrong ones. A base, which was taught no task, is asked greedily only.

--attention asks no task: it scores every head on random tokens told twice (does it look at the token before,
at the first one, at what followed the same token last time?) and writes maps to attention.json, which
report.py draws: of the foremost heads, or by --layer and --head of any, over two texts or --text. It takes
encoders too, and those of encoder-decoders:

    python eval.py bert-base-uncased --attention --text="The cat sat on the mat" --layer=3
    python eval.py out/base --attention --text="Lucy had a red ball." --layer=2 --head=1

--streams asks no task either: it reads texts sixteen times as long as the context (of the corpus in --tasks,
by default the model's own) under full attention, stretched RoPE, and a rolling cache with and without the
first tokens, the attention sinks; the results go to streams.json and into the report.

It prints a table and, where several models answered the same items, the paired differences to the first one
and to the one before. Into each run folder (out/eval/MODEL for a model from the hub) it writes results.json,
one entry for each task, split and number of shots, and answers/: every answer, and the wrong ones apart, a
line each.
"""

from support.terminal import run_script

import json
import re
import sys
import time
from dataclasses import dataclass, fields
from itertools import chain
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
    corpus_info,
    documents,
    few_shot,
    judge,
    load_conversations,
    load_task,
)
from finetune import format_metric, subsample
from sft import mixture
from support.attention import attention, foremost
from support.files import write_atomically
from support.loading import explained, is_adapter, load_model, load_tokenizer, read_run, resolve
from support.long_context import STREAM, endless, streams
from support.machine import git_commit, hardware, pick_device, pick_dtype, versions
from support.metrics import (
    best_of,
    bits_per_byte,
    bootstrap,
    gate,
    majority,
    paired_bootstrap,
    pass_at,
    perplexity,
    proportion,
    weighted_vote,
)
from support.model_card import write_model_card
from support.results import METRICS
from support.runs import TrainError, read_json
from support.text_model import TextModel, answer_task, sample_answers
from tasks.calculator import calculates, extract_number
from tasks.mistakes import KINDS, kinds_of, solution_kind
from verifier import Verifier


@dataclass
class EvalConfig:
    """What is measured, and how."""

    models: str = "out/base"  # models, joined by commas; bare words do as well
    tasks: str = "sentiment,dialogue,arithmetic"  # tasks and corpora, joined by commas
    shots: str = "0"  # worked examples before a question; 0,4 measures without and with four of them
    split: str = ""  # train, validation or test; default: the one each task is reported on
    limit: int = 0  # items (or documents) a task, drawn by seed; 0: all
    seed: int = 1  # of the examples in prompts and of --limit
    calibrate: bool = False  # classification: subtract the log-likelihood that each class has for "N/A"
    context_length: int = 0  # tokens that a model may look at; 0: as many as it can
    stride: int = 0  # corpora: tokens from one window to the next; 0: half a window
    contamination: int = 0  # look for so many words in a row of each item in the training text; 0: don't
    samples: int = 0  # answers a problem, for test-time compute on tasks with a checkable answer; 0: none
    temperature: float = 1.0  # of these samples
    attention: bool = False  # what the heads look at, instead of tasks
    text: str = ""  # attention: the text whose maps are made; nothing: two of ours
    layer: int = -1  # attention: maps of this layer, from 0; -1: top-scoring heads, or with --head all layers
    head: int = -1  # attention: maps of this head, from 0; -1: top-scoring heads, or with --layer all heads
    streams: bool = False  # texts longer than the context, instead of tasks
    battery: int = 0  # so many held-out instructions are given to every model, some shown side by side
    verifier: str = ""  # verifiers that choose among the samples, run folders joined by commas
    backend: Literal["auto", "ours", "transformers"] = "auto"  # what computes the models
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on a CPU, bfloat16 on a card
    device: str = "auto"  # cuda, cpu, ...
    out: str = "out"  # folder that holds everything the project makes


# -----------------------------------------------------------------------------
# Text: perplexity


def windows(ids: list[int], T: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """Ids as questions to `log_likelihoods`, (known ids, new ids): a window of T ids moves by `stride`, and
    every id but the first is new once.
    """
    found, known, last = [], 0, len(ids) - 1  # known: index of the last id that was predicted
    while known < last:
        end = min(known + stride if known else T, last)
        found.append((ids[max(0, end - T) : known + 1], ids[known + 1 : end + 1]))
        known = end
    return found


def evaluate_text(
    model: TextModel, texts: list[str], stride: int = 0, progress: str = "", running_text: bool = False,
    about: dict | None = None,
) -> dict[str, dict]:  # fmt: skip
    """Perplexity a token and a word and bits a byte of documents, as metrics with bootstrap intervals over
    their windows. `about` gets the stride, and how many documents fit into one window.

    Each document is read by itself, as SFT and lm-eval do: a start token, its own tokens, an end-of-text
    token. Joined into windows, as pretraining reads them, stories after SFT look 3.5 times as forgotten. Only
    the pieces of a running text are joined.
    """
    T = model.context_length
    stride = stride or T // 2
    if not 0 < stride <= T:
        raise TrainError(f"--stride={stride} must be from 1 to the context of {T} tokens")
    start = [model.bos[0] if model.bos else model.eos]
    sequences = [[*model.encode(text), model.eos] for text in texts]
    alone = 0 if running_text else sum(len(ids) <= T for ids in sequences)
    if running_text:
        sequences = [list(chain.from_iterable(sequences))]
    rows = [window for ids in sequences for window in windows(start + ids, T, stride)]
    nats = -model.log_likelihoods(rows, progress)
    n_bytes = sum(len(text.encode()) for text in texts)
    n_words = sum(len(text.split()) + text.count("\n") for text in texts)  # WikiText counts a line's end
    counts = np.array([len(new) for _, new in rows])
    units = np.stack([nats, counts], axis=1)  # resampled together; bytes and words go with the tokens

    def per_token(scale: float):
        return bootstrap(units, lambda u: u[:, 0].sum() / u[:, 1].sum() * scale, rounds=500)

    def exponential(metric: dict) -> dict:
        return {k: perplexity(v, 1) if k != "n" else v for k, v in metric.items()}

    n = int(counts.sum())
    found = {
        "loss": per_token(1.0),
        "perplexity": exponential(per_token(1.0)),
        "bits_per_byte": per_token(bits_per_byte(n, n_bytes)),
        "word_perplexity": exponential(per_token(n / n_words)),
    }
    for metric in found.values():
        metric["n"] = n
    if about is not None:
        about |= {"stride": stride, "documents_alone": alone, "documents_in_windows": len(texts) - alone}
    return found


# -----------------------------------------------------------------------------
# Contamination: does the training text hold the test items?


def ngrams(text: str, n: int) -> set[str]:
    """The runs of n words of a text, without case and punctuation."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


def contamination(items: list[str], training_texts, n: int) -> dict:
    """How many items share n words in a row with the training texts (GPT-3, appendix C, used 13).

    Items of fewer than n words cannot be checked and are counted apart. One pass over the training texts;
    only the items' runs of words are held in memory.
    """
    runs = [ngrams(item, n) for item in items]
    wanted = set().union(*runs)
    seen: set[str] = set()
    for text in training_texts:
        seen |= wanted & ngrams(text, n)
    hit = [i for i, grams in enumerate(runs) if grams & seen]
    checked = sum(bool(grams) for grams in runs)
    return {
        "words": n,
        "items": len(hit),
        "checked": checked,
        "too_short": len(items) - checked,
        "share": len(seen) / max(1, len(wanted)),
        "examples": [items[i][:200] for i in hit[:5]],
    }


def trained_on(name: str) -> list[tuple[str, str]]:
    """What a run and its parents were trained on, [("corpus" or "task", its name)], as their records tell.

    A task here is also a set of conversations.
    """
    found, corpora = [], (EMBEDDED.keys() | CORPORA.keys()) - TASKS.keys()
    while name and (file := Path(name) / "run.json").exists():
        run = read_json(file)
        settings = run.get("settings", {})
        found += [(kind, settings[kind]) for kind in ("task", "corpus") if settings.get(kind)]
        if run.get("stage") == "sft" or settings.get("data") in TASKS:
            sources = [source for source, _, _ in mixture(settings["data"])]
            found += [("corpus" if source in corpora else "task", source) for source in sources]
        name = run.get("parent")
    return found


def training_texts(sources: list[tuple[str, str]]):
    for kind, name in sources:
        if kind == "task":
            chats, _ = load_conversations(name, "train")
            yield from (" ".join(message["content"] for message in chat) for chat in chats)
        else:
            yield from documents(name, "train")


# -----------------------------------------------------------------------------
# One model on one task


@dataclass
class Result:
    """An entry of results.json, and what was answered."""

    entry: dict
    records: list[dict]  # an item each, for tasks
    skipped: str = ""  # why there is nothing


def reported_split(corpus: str) -> str:
    """test; for a corpus without one, such as TinyStories, validation."""
    try:
        corpus_info(corpus, "test")
    except DataError:
        return "validation"
    return "test"


def evaluate(model: TextModel, name: str, shots: int, cfg: EvalConfig) -> Result:
    """`name`: a task, or a corpus."""
    task = TASKS.get(name)
    split = cfg.split or (task.test if task else reported_split(name))
    begun = time.perf_counter()
    entry = {"task": name, "split": split, "shots": shots}
    if task:
        if model.kind == "head" and shots:
            return Result(entry, [], "a classification head takes no examples")
        everything, about = load_task(name, split)
        examples = subsample(everything, cfg.limit, cfg.seed)
        try:
            shown = few_shot(name, shots, cfg.seed)
            outputs, notes = answer_task(
                model, name, examples, shown, cfg.calibrate, progress=f"{model.name} {name}"
            )
        except TrainError as error:
            if model.kind != "head":
                raise
            return Result(entry, [], str(error))
        records, metrics = judge(name, examples, outputs)
        for record, sure in zip(records, notes.pop("sure", [None] * len(records)), strict=True):
            record["kinds"] = kinds_of(name, record)
            if sure is not None:
                record["sure"] = round(sure, 3)
        if task.labels:
            entry["calibrated"] = cfg.calibrate
            entry["majority_class"] = max(
                sum(e.label == c for e in examples) for c in range(len(task.labels))
            )
            entry["majority_class"] /= len(examples)
        texts, total = [e.text for e in examples], len(everything)
    else:
        if model.kind != "causal" or shots:
            return Result(entry, [], "perplexity of a text is for decoders, without examples")
        about = corpus_info(name, split)
        everything = list(documents(name, split, about=about))
        texts, notes, records = subsample(everything, cfg.limit, cfg.seed), {}, []
        running_text = about.get("running_text", False)
        metrics = evaluate_text(model, texts, cfg.stride, f"{model.name} {name}", running_text, about=notes)
        total = len(everything)
    entry |= {"metrics": metrics, "items": len(texts), "of": total, "seed": cfg.seed, **notes, "data": about}
    entry |= {"context_length": model.context_length, "backend": "ours" if model.ours else "transformers"}
    if cfg.contamination:
        sources = trained_on(model.name)
        if sources:
            found = contamination(texts, training_texts(sources), cfg.contamination)
            entry["contamination"] = found | {"sources": [f"{kind} {source}" for kind, source in sources]}
    entry["seconds"] = round(time.perf_counter() - begun, 2)
    return Result(entry, records)


def key(entry: dict) -> str:
    if entry.get("samples"):
        return f"{entry['task']} {entry['split']} {entry['samples']} samples"
    return f"{entry['task']} {entry['split']} {entry['shots']}-shot" + " calibrated" * entry.get(
        "calibrated", 0
    )


# -----------------------------------------------------------------------------
# Test-time compute: many answers to a problem, and ways to choose one of them


def budgets(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({2**i for i in range(n.bit_length())} | {n}) if n > 0 else []


def reason(model: TextModel, name: str, cfg: EvalConfig, verifiers: dict[str, Verifier]) -> Result:
    """What a model makes of `cfg.samples` answers to each problem, by every way to choose among them.

    The first k of the samples are what a budget of k would have drawn, so the curves share their samples,
    and differences are paired. Nothing here looks at the true answer but `pass`, the oracle.
    """
    begun, task, n = time.perf_counter(), TASKS[name], cfg.samples
    split = cfg.split or task.test
    everything, about = load_task(name, split)
    examples = subsample(everything, cfg.limit, cfg.seed)
    drawn = sample_answers(model, name, split, examples, n, cfg.temperature, cfg.seed)
    seconds = time.perf_counter() - begun
    greedy = [a[0] for a in sample_answers(model, name, split, examples, 1, 0.0, cfg.seed)]
    tool = [a[0] for a in sample_answers(model, name, split, examples, 1, 0.0, cfg.seed, calculator=True)]
    truth = [extract_number(e.target) for e in examples]
    numbers = [[extract_number(a) for a in some] for some in drawn]
    right = np.array(
        [[a is not None and a == t for a in some] for some, t in zip(numbers, truth, strict=True)]
    )
    fine = [[calculates(a) for a in some] for some in drawn]
    problems, flat = [e.text for e in examples for _ in range(n)], [a for some in drawn for a in some]

    def hits(chosen) -> np.ndarray:
        return np.array([a is not None and a == t for a, t in zip(chosen, truth, strict=True)], float)

    # Every way to choose, as a function of the budget k that returns one number a problem.
    ways = {"majority": lambda k: [majority(some[:k]) for some in numbers]}
    ways["calculator vote"] = lambda k: [
        majority(a for a, ok in zip(some[:k], oks[:k], strict=True) if ok) or majority(some[:k])
        for some, oks in zip(numbers, fine, strict=True)
    ]
    gates, scores, sure = {}, {}, {}
    for label, verifier in verifiers.items():
        score, p = (x.reshape(len(examples), n) for x in verifier.judge(problems, flat, f"{label} judges"))
        scores[label], sure[label] = score, p
        ways[f"{label}, best"] = lambda k, s=score: [
            some[best_of(r[:k])] for some, r in zip(numbers, s, strict=True)
        ]
        weights = np.exp(verifier.combine["sharpness"] * (score - score.max(1, keepdims=True)))
        ways[f"{label}, vote"] = lambda k, w=weights: [
            weighted_vote(some[:k], r[:k]) for some, r in zip(numbers, w, strict=True)
        ]
        gates[label] = gating(p, numbers, hits)
    right_alone = {"greedy": greedy, "greedy, calculator": tool}
    right_alone = {way: hits([extract_number(a) for a in some]) for way, some in right_alone.items()}
    curves = {way: {k: hits(choose(k)) for k in budgets(n)} for way, choose in ways.items()}
    last = {way: curve[n] for way, curve in curves.items()}
    metrics = {
        "exact_match": share(right_alone["greedy"]),
        "calculator": share(right_alone["greedy, calculator"]),
    }
    metrics["mean_sample"] = bootstrap(right.mean(1))
    metrics |= {f"{way} of {n}": share(h) for way, h in last.items()}
    metrics[f"pass@{n}"] = share(right.any(1).astype(float))
    differences = {}
    for way, h in {**last, "greedy, calculator": right_alone["greedy, calculator"]}.items():
        differences[f"{way} - greedy"] = paired_bootstrap(h, right_alone["greedy"])
        if way != "majority":
            differences[f"{way} - majority"] = paired_bootstrap(h, last["majority"])
    oracle = {k: float(np.mean([pass_at(k, n, int(c)) for c in right.sum(1)])) for k in budgets(n)}
    errors = [
        solution_kind(g, e.target, e.text)
        for g, e, ok in zip(greedy, examples, right_alone["greedy"], strict=True)
        if not ok
    ]
    entry = {"task": name, "split": split, "shots": 0, "samples": n, "temperature": cfg.temperature}
    entry |= {
        "metrics": metrics,
        "items": len(examples),
        "of": len(everything),
        "seed": cfg.seed,
        "data": about,
    }
    entry["curves"] = {way: {k: share(h) for k, h in curve.items()} for way, curve in curves.items()}
    entry["curves"]["pass"] = {k: {"value": v, "n": len(examples)} for k, v in oracle.items()}
    entry |= {
        "differences": differences,
        "gating": gates,
        "verifiers": {k: v.name for k, v in verifiers.items()},
    }
    entry["errors"] = {kind: errors.count(kind) for kind in KINDS if kind in errors}
    entry |= {"sampling_seconds": round(seconds, 2), "seconds": round(time.perf_counter() - begun, 2)}
    records = []
    for i, example in enumerate(examples):
        record = {
            "text": example.text,
            "target": example.target.strip(),
            "answer": truth[i],
            "output": greedy[i],
        }
        record |= {"prediction": extract_number(greedy[i]), "correct": bool(right_alone["greedy"][i])}
        record["kinds"] = kinds_of(name, record)
        record |= {"right_samples": int(right[i].sum()), "majority": majority(numbers[i])}
        for label, score in scores.items():
            record[label] = drawn[i][best_of(score[i])]
            record[f"{label} correct"] = bool(last[f"{label}, best"][i])
            record[f"{label} sure"] = round(float(sure[label][i][best_of(score[i])]), 4)
        records.append(record)
    return Result(entry, records)


def share(hits: np.ndarray) -> dict:
    return proportion(int(hits.sum()), len(hits))


def gating(p: np.ndarray, numbers: list[list], hits) -> list[dict]:
    """Sampling until an answer is probable enough: for each threshold, samples spent and problems right."""
    found = []
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01):
        stops = [gate(row, threshold) for row in p]
        chosen = hits([some[best] for some, (best, _) in zip(numbers, stops, strict=True)])
        spent = float(np.mean([spent for _, spent in stops]))
        found.append({"threshold": threshold, "samples": spent, "right": share(chosen)})
    return found


def tell(entry: dict) -> list[str]:
    """The lines of a table for one entry of test-time compute."""
    n, columns = entry["samples"], budgets(entry["samples"])
    lines = [f"{'answers a problem':32}" + "".join(f"{k:>7}" for k in columns)]
    for way, curve in entry["curves"].items():
        name = "pass (oracle)" if way == "pass" else way + " (a tool)" * way.startswith("calculator")
        lines.append(f"{name:32}" + "".join(f"{100 * curve[k]['value']:7.1f}" for k in columns))
    for name in ("exact_match", "calculator", "mean_sample"):
        label = {"exact_match": "greedy", "calculator": "greedy, calculator (a tool)"}.get(
            name, "mean single sample"
        )
        lines.append(f"{label:32}{format_metric(entry['metrics'][name])}")
    for name, d in entry["differences"].items():
        d = {k: 100 * v for k, v in d.items()}
        lines.append(f"{name:48} {d['value']:+5.1f} [{d['low']:+.1f}, {d['high']:+.1f}]")
    for label, gates in entry["gating"].items():
        points = ", ".join(f"{100 * g['right']['value']:.1f} at {g['samples']:.1f}" for g in gates)
        lines.append(f"{label}, sampling until sure: {points} samples")
    wrong = sum(entry["errors"].values())
    parts = ", ".join(f"{KINDS[k]} {v}" for k, v in entry["errors"].items() if v)
    lines.append(f"{wrong} greedy answers are wrong: {parts or 'none'}")
    lines.append(
        f"{entry['items']:,} items; {n} samples each took {entry['sampling_seconds']:.1f} s; "
        f"{entry['seconds']:.1f} s in all"
    )
    return lines


# -----------------------------------------------------------------------------
# Files and tables


def results_folder(name: str, out: str) -> Path:
    folder = Path(name)
    return folder if folder.is_dir() else Path(out) / "eval" / name.replace("/", "--")


def write_results(folder: Path, results: list[Result], cfg: EvalConfig, device: torch.device) -> None:
    """Adds to the folder's results.json; what was measured before stays, unless it was measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    before = read_json(file)["results"] if file.exists() else {}
    run = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    how = {"git": git_commit(), "versions": versions(), "hardware": hardware(device)}
    how |= {"dtype": cfg.dtype, "smoke": run.get("smoke", False), "model_step": run.get("step")}
    new = {key(r.entry): r.entry | how for r in results}
    text = json.dumps({"results": before | new}, indent=2) + "\n"
    write_atomically(file, lambda path: path.write_text(text))
    for result in results:
        if not result.records:
            continue
        (folder / "answers").mkdir(exist_ok=True)
        wrong = [r for r in result.records if not r.get("correct", True)]
        stem = key(result.entry).replace(" ", "-")
        for ending, records in (("", result.records), ("-wrong", wrong)):
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            path = folder / "answers" / f"{stem}{ending}.jsonl"
            write_atomically(path, lambda p, lines=lines: p.write_text(lines, encoding="utf-8"))
    write_model_card(folder)


def describe(entry: dict) -> list[str]:
    """The lines of a table for one entry: metrics, then what one has to know about them."""
    parts = []
    for name, label in METRICS.items():
        if name in entry["metrics"]:
            metric = entry["metrics"][name]
            if "perplexity" in name or "byte" in name:
                digits = 3 if "byte" in name else 2
                value, low, high = (f"{metric[k]:.{digits}f}" for k in ("value", "low", "high"))
                parts.append(f"{label} {value} [{low}, {high}]")
            else:
                parts.append(f"{label} {format_metric(metric).split(' (n=')[0]}")
    notes = [f"{entry['items']:,} items"]
    if "documents_alone" in entry:
        alone, in_windows = entry["documents_alone"], entry["documents_in_windows"]
        notes.append(f"documents alone: {alone:,}, in windows: {in_windows:,}")
    if entry["data"].get("left_out"):
        notes.append(f"{entry['data']['left_out']:,} rows without text left out")
    if entry["items"] < entry["of"]:
        notes.append(f"a sample of {entry['of']:,}, seed {entry['seed']}")
    if entry.get("majority_class"):
        notes.append(f"always the most frequent class: {100 * entry['majority_class']:.1f}")
    if entry.get("cut"):
        notes.append(f"{entry['cut']} texts were too long and lost their end")
    if entry.get("shots_dropped"):
        notes.append(f"{entry['shots_dropped']} prompts had room for fewer examples")
    if found := entry.get("contamination"):
        notes.append(
            f"{found['items']} of {found['checked']} items share {found['words']} words in a row with the "
            f"training text ({100 * found['share']:.1f} % of such runs)"
        )
    return [", ".join(parts), f"{'; '.join(notes)}; {entry['seconds']:.1f} s"]


def compare(all_results: list[tuple[str, list[Result]]]) -> list[str]:
    """Paired differences of every model to the first and to the one before it, on what both answered."""
    lines = []
    for i, (name, results) in enumerate(all_results):
        for other, before in [all_results[j] for j in sorted({0, i - 1}) if 0 <= j < i]:
            lines += paired(name, results, other, before)
    return lines


def paired(name: str, results: list[Result], other: str, before: list[Result]) -> list[str]:
    lines, by_key = [], {key(r.entry): r for r in before if r.records}
    tuned = {r.entry["task"]: r for r in reversed(before) if r.records}  # compared at any number of shots
    for result in results:
        twin = by_key.get(key(result.entry)) or tuned.get(result.entry["task"])
        if not result.records or not twin or len(twin.records) != len(result.records):
            continue
        if result.entry["split"] != twin.entry["split"]:
            continue
        measure = "correct" if "correct" in result.records[0] else "rougeL"
        a, b = ([float(r[measure]) for r in side.records] for side in (result, twin))
        d = {k: 100 * v for k, v in paired_bootstrap(a, b).items()}
        verdict = "" if d["low"] > 0 or d["high"] < 0 else " (no difference found)"
        lines.append(
            f"{key(result.entry)}: {name} minus {other} ({twin.entry['shots']}-shot) "
            f"{d['value']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]{verdict}"
        )
    return lines


def battery(models: list[str], cfg: EvalConfig, device: torch.device) -> dict[str, list[dict]]:
    """What every model says to held-out instructions, greedily: {model: [{"asked", "said", "meant", ...}]}.

    A base that knows no turns is given the instruction as a line to continue.
    """
    chats = load_conversations("instructions", "test")[0]
    singles = [c for c in chats if len(c) == 2][: cfg.battery]
    found = {}
    for name in models:
        model = load_model(name, device, cfg.backend, cfg.context_length, pick_eval_dtype(cfg, device))
        if model.kind != "causal":
            continue
        prompts = [
            model.conversation(c[:1])[0] if model.chat else model.bos + model.encode(c[0]["content"] + "\n")
            for c in singles
        ]
        said = model.generate(
            prompts, min(40, model.context_length // 2), "\n", f"{name} follows instructions"
        )
        rows = []
        for chat, text in zip(singles, said, strict=True):
            row = {"asked": chat[0]["content"], "said": text.strip(), "meant": chat[1]["content"]}
            rows.append(row | {"correct": row["said"] == row["meant"]})
        found[name] = rows
    return found


def pipeline_table(done: list[tuple[str, list[Result]]], answered: dict, cfg: EvalConfig) -> list[str]:
    """The life of a model in one table, a line a stage and task; also added to {out}/pipeline.json."""
    rows = []
    for name, results in done:
        run = read_json(Path(name) / "run.json") if (Path(name) / "run.json").exists() else {}
        row: dict = {"model": name, "stage": run.get("stage")}
        row["minutes"] = round(run.get("seconds", 0) / 60, 2)
        if name in answered:
            row["instructions"] = share(np.array([r["correct"] for r in answered[name]], float))
        tasks: dict[str, dict] = {}
        for entry in (result.entry for result in results):
            if entry.get("samples"):
                chosen = {way: m for way, m in entry["metrics"].items() if way != "answered"}
                tasks.setdefault(entry["task"], {}).update(chosen)
            elif "exact_match" in entry["metrics"]:
                tasks.setdefault(entry["task"], {})["exact_match"] = entry["metrics"]["exact_match"]
            elif "bits_per_byte" in entry["metrics"]:
                row[f"{entry['task']}, bits/byte"] = entry["metrics"]["bits_per_byte"]
        rows += [row | {"task": task} | columns for task, columns in tasks.items()] or [row]
    file = Path(cfg.out) / "pipeline.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    before = read_json(file) if file.exists() else {}
    of = {(row["model"], row.get("task")): row for row in before.get("rows", [])}
    for row in rows:  # what was measured before stays, unless it was measured again
        of[row["model"], row.get("task")] = of.get((row["model"], row.get("task")), {}) | row
    everything = {"rows": list(of.values()), "battery": before.get("battery", {}) | answered}
    text = json.dumps(everything | {"samples": cfg.samples}, indent=2) + "\n"
    write_atomically(file, lambda path: path.write_text(text))
    columns = list(dict.fromkeys(k for row in rows for k in row if isinstance(row[k], dict)))
    lines = ["", "| model | " + " | ".join(columns) + " | minutes |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column, {}).get("value")
            small = "bits" in column
            cells.append("" if value is None else f"{value:.3f}" if small else f"{100 * value:.1f}")
        lines.append(f"| {row['model']} | " + " | ".join(cells) + f" | {row['minutes']:.1f} |")
    shown = min(6, *(len(rows) for rows in answered.values())) if answered else 0
    for i in range(shown):
        first = next(iter(answered.values()))[i]
        lines.append(f"\n{first['asked']} -> {first['meant']}")
        lines += [f"  {name}: {said[i]['said'][:100]!r}" for name, said in answered.items()]
    return lines


# -----------------------------------------------------------------------------
# Attention, and texts longer than the context


def show_attention(name: str, cfg: EvalConfig, device: torch.device) -> None:
    """Scores of all heads and maps of some, to attention.json in the model's folder."""
    model = load_for_attention(name, cfg, device)
    folder = results_folder(name, cfg.out)
    file = folder / "attention.json"
    folder.mkdir(parents=True, exist_ok=True)
    found = attention(model, cfg.seed, cfg.text, cfg.layer, cfg.head)
    before = read_json(file) if cfg.text and file.exists() else {}
    if before.get("scores") == found["scores"]:  # the same weights: what is known of them stays
        found["maps"] = with_maps(before["maps"], found["maps"])
        found |= {"copies": before["copies"]} if "copies" in before else {}
    write_atomically(file, lambda path: path.write_text(json.dumps(found) + "\n"))
    for score, (layer, head) in foremost(found["scores"]).items():
        print(f"  most {score}: layer {layer}, head {head}: {found['scores'][score][layer][head]:.3f}")
    if copies := found.get("copies"):
        shares = ", ".join(f"of {kind} {share:.0%}" for kind, share in copies.items())
        print(f"  copy accuracy on repeated digits: {shares}")
    print(f"  attention maps of {len(found['maps'])} text(s) in {file}; python report.py draws them")


def with_maps(before: list[dict], new: list[dict]) -> list[dict]:
    """Maps of attention.json, the newest last; a text and its heads once."""

    def of(example: dict) -> tuple:
        return example["tokens"], [(head["layer"], head["head"]) for head in example["heads"]]

    return [old for old in before if of(old) not in map(of, new)] + new


def load_for_attention(name: str, cfg: EvalConfig, device: torch.device) -> TextModel:
    """A model whose attention can be read: also an encoder without a head, such as BERT."""
    architecture = "".join(resolve(name).config.get("architectures") or ())
    if is_adapter(name) or not re.search("MaskedLM|PreTraining|(?<!LMHead)Model$", architecture):
        return load_model(name, device, cfg.backend, cfg.context_length, pick_eval_dtype(cfg, device))
    import transformers

    transformers.logging.set_verbosity_error()  # an encoder needs none of the weights of its head
    with explained(name):
        encoder = transformers.AutoModel.from_pretrained(name, attn_implementation="eager")
    return TextModel(encoder.to(device).eval(), load_tokenizer(name), "head", name)


ENDLESS = 5_000  # tokens that are streamed through a rolling cache


def show_streams(name: str, tasks: list[str], cfg: EvalConfig, device: torch.device) -> None:
    """Perplexity and continuations beyond the context, to streams.json in the model's folder."""
    model = load_model(name, device, "ours", cfg.context_length)
    run = Path(name) / "run.json"
    corpus = (read_json(run).get("settings", {}).get("corpus") if run.exists() else None) or "storyworld"
    corpus = next((task for task in tasks if task not in TASKS), re.split("[:,]", corpus)[0])
    split, T, wanted = cfg.split or "test", model.context_length, cfg.limit or 4
    ids: list[int] = []
    for text in documents(corpus, split):
        ids += [model.eos, *model.encode(text)]
        if len(ids) > wanted * (STREAM * T + 1):
            break
    rows = min(wanted, len(ids) // (STREAM * T + 1))
    if not rows:
        raise TrainError(f"{corpus}, {split} has {len(ids):,} tokens, a stream {STREAM} contexts of {T}: "
                         "take another corpus by --tasks, or a shorter --context_length")  # fmt: skip
    stream = torch.tensor(ids[: rows * (STREAM * T + 1)], device=device).view(rows, -1)
    found = {
        "model": name,
        "source": f"{rows} streams of {STREAM} contexts of {T} tokens of {corpus}, {split}",
    }
    found |= streams(model.model, stream, model.tokenizer, model.model, T)
    found["endless"] = endless(model.model, ENDLESS, T)
    folder = results_folder(name, cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    write_atomically(folder / "streams.json", lambda path: path.write_text(text))
    print(f"  {found['source']}; perplexity by position, in contexts:")
    for way, values in found["perplexity"].items():
        print(f"    {way:24}" + "  ".join(f"{at} {value:.2f}" for at, value in values.items()))
    shares = ", ".join(f"{x:.0%}" for x in found["attention to the first token"])
    print(f"  attention to the first token, by layer: {shares}\n  {folder}/streams.json; report.py draws it")


def read_words(argv: list[str]) -> list[str]:
    """Bare words are models: `out/base gpt2` becomes --models=out/base,gpt2."""
    takes_value = {f"--{field.name}" for field in fields(EvalConfig) if field.type is not bool}
    rest, models = [], []
    for before, word in zip(["", *argv], argv, strict=False):
        bare = not word.startswith("-") and not word.endswith(".py") and before not in takes_value
        (models if bare else rest).append(word)
    return rest + ([f"--models={','.join(models)}"] if models else [])


def checked(cfg: EvalConfig) -> tuple[list[str], list[str], list[int]]:
    """Models, tasks and shots, before anything is loaded."""
    models, tasks = cfg.models.split(","), cfg.tasks.split(",")
    try:
        shots = [int(word) for word in cfg.shots.split(",")]
    except ValueError:
        raise ConfigError(f"--shots={cfg.shots} must be whole numbers, joined by commas: 0,4") from None
    if min(shots) < 0:
        raise ConfigError(f"--shots={cfg.shots} must be 0 or more")
    for task in tasks:
        known = task in TASKS or task in CORPORA or task in EMBEDDED or Path(task).exists()
        if not known and not re.search(r"[*?[:]", task):
            names = ", ".join([*TASKS, *(c for c in (*EMBEDDED, *CORPORA) if c not in TASKS)])
            raise ConfigError(f'"{task}" is no task, corpus or file; there are {names}')
    return models, tasks, shots


def pick_eval_dtype(cfg: EvalConfig, device: torch.device) -> torch.dtype:
    return torch.float32 if (cfg.dtype, device.type) == ("auto", "cpu") else pick_dtype(cfg.dtype, device)


def main() -> None:
    cfg = parse_config(EvalConfig, __doc__, read_words(sys.argv[1:]))
    try:
        models, tasks, shots = checked(cfg)
        device = pick_device(cfg.device)
        dtype = pick_eval_dtype(cfg, device)
        done: list[tuple[str, list[Result]]] = []
        if cfg.attention or cfg.streams:
            for name in models:
                print(f"{name}:")
                if cfg.attention:
                    show_attention(name, cfg, device)
                if cfg.streams:
                    show_streams(name, tasks, cfg, device)
            return
        for name in models:
            model, results = load_model(name, device, cfg.backend, cfg.context_length, dtype), []
            model.dtype = dtype
            size = sum(p.numel() for p in model.model.parameters()) / 1e6
            smoke = (Path(name) / "run.json").exists() and read_json(Path(name) / "run.json").get("smoke")
            print(f"{name}: {size:.1f}M parameters, {model.kind}" + "; SMOKE RUN, no result" * bool(smoke))
            taught = model.chat or read_run(name).get("settings", {}).get(
                "task"
            )  # a base's samples hold no answers to choose among
            for task in tasks:
                checkable = task in TASKS and TASKS[task].metric == "exact_match"
                if cfg.samples and checkable and not taught:
                    print(f"  {task}: {name} was taught no task, so it is asked greedily and not sampled")
                if cfg.samples and taught and checkable:
                    judges = {
                        Path(v).name: Verifier.load(v, cfg.device, model)
                        for v in cfg.verifier.split(",")
                        if v
                    }
                    results.append(reason(model, task, cfg, judges))
                    print(f"  {key(results[-1].entry)}:")
                    print("".join(f"    {line}\n" for line in tell(results[-1].entry)), end="", flush=True)
                    write_results(results_folder(name, cfg.out), results, cfg, device)
                    continue
                for n in shots if task in TASKS else [0]:
                    half = dtype != torch.float32 and not (model.kind == "seq2seq" and dtype == torch.float16)
                    with torch.autocast(device.type, dtype, enabled=half):  # T5 overflows in float16
                        result = evaluate(model, task, n, cfg)
                    heading = f"  {key(result.entry)}"
                    if result.skipped:
                        print(f"{heading}: skipped: {result.skipped}")
                        continue
                    results.append(result)
                    figures, notes = describe(result.entry)
                    print(f"{heading}: {figures}\n      {notes}", flush=True)
                    folder = results_folder(name, cfg.out)
                    write_results(folder, results, cfg, device)
            done.append((name, results))
        for line in compare(done):
            print(line)
        answered = battery(models, cfg, device) if cfg.battery else {}
        if cfg.samples or cfg.battery:
            print("\n".join(pipeline_table(done, answered, cfg)))
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"eval.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
