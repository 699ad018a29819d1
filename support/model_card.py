"""The model card of a run folder: README.md, with the metadata that the Hugging Face hub reads.

`write_model_card(folder)` rewrites it from the files of the folder: run.json, results.json, config.json or
adapter_config.json, metrics.jsonl. The Trainer calls it at the end of a run, eval.py after each measurement.
A number is shown with its interval; a smoke run shows none.
"""

import json
import os
import re
from pathlib import Path

from support.files import write_atomically
from support.results import Run, parent_of, read_json
from support.tables import read_jsonl

LICENSES = """
    mit apache-2.0 cc0-1.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-nd-4.0 cdla-sharing-1.0
    cdla-permissive-2.0 odc-by
""".split()  # the licences of our data sets, as the hub names them
STAGES = {
    "train": "a language model pretrained from scratch",
    "finetune": "a model fine-tuned on one task",
    "sft": "a model tuned on conversations (SFT)",
    "dpo": "a model tuned on preferences",
    "verifier": "a verifier, which estimates how likely an answer to a problem is right",
}
METRIC_TYPES = {"macro_f1": "f1", "rouge1": "rouge", "rouge2": "rouge", "rougeL": "rouge"}
SHARES = ("accuracy", "macro_f1", "exact_match", "rouge1", "rouge2", "rougeL", "answered")  # shown in percent
PIPELINES = {"head": "text-classification", "seq2seq": "text2text-generation"}
CLASSES = {"head": "SequenceClassification", "seq2seq": "Seq2SeqLM"}

CARD = """---
{metadata}
---

# {name}

{what}: {size}. Made with Modern LLM, the whole life of a small language model in plain Python.

## How it was made

{how_made}

## Results

{results}

## How to use it

{usage}

## Limits

{limits}
"""


# -----------------------------------------------------------------------------
# What the run records


def family(folder: Path, run: dict) -> list[dict]:
    """run.json of this run, of its parent, of its parent's parent, and so on."""
    parent = parent_of(run, folder.parent)
    return [run, *(Run(parent, folder.parent).records if parent else [])]


def hub_base(runs: list[dict]) -> str | None:
    """The hub model that the first run of a family started from."""
    parent = str(runs[-1].get("parent") or "")
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", parent) and not parent.startswith((".", "out/"))
    return parent if is_id and not Path(parent).exists() else None


def values_of(data: object, key: str) -> list[str]:
    """All values of `key` in nested dicts, as texts."""
    found = []
    for name, value in data.items() if isinstance(data, dict) else ():
        found += [str(value)] if name == key and value else values_of(value, key)
    return list(dict.fromkeys(found))


def licenses_of(runs: list[dict]) -> list[str]:
    """Licences of all data; a mix says "storyworld: MIT; numbers: MIT"."""
    parts = "; ".join(text for run in runs for text in values_of(run.get("data"), "licence")).split(";")
    return [name for name in dict.fromkeys(part.split(": ")[-1].strip() for part in parts) if name]


def measurements(folder: Path, run: dict) -> list[dict]:
    """Entries {"task", "split", "shots", "metrics"} of eval.py and of the evaluation in finetune.py."""
    found = [{"task": run.get("task"), "shots": 0, **run["evaluation"]}] if "evaluation" in run else []
    measured = read_json(folder / "results.json").get("results", {}).values()
    return found + [entry for entry in measured if "metrics" in entry]


# -----------------------------------------------------------------------------
# The parts of a card


def metadata(folder: Path, run: dict, config: dict, adapter: dict) -> str:
    """The YAML block, written by huggingface_hub."""
    from huggingface_hub import EvalResult, ModelCardData

    runs = family(folder, run)
    licenses = licenses_of(runs)
    names = {re.sub(r"[\s_]+", "-", name.lower()) for name in licenses} - {"yours"}
    sources = " ".join(source for run in runs for source in values_of(run.get("data"), "source"))
    pipeline = None if run.get("verifier") else PIPELINES.get(run.get("kind"), "text-generation")
    tags = ["modern-llm", run.get("stage", "train")]
    tags += ["conversational"] if run.get("chat") and not run.get("verifier") else []
    tags += ["lora"] if adapter else []
    library = "peft" if adapter else "transformers"
    card = {
        "language": None if "yours" in licenses else "en",
        "base_model": hub_base(runs),
        "datasets": sorted(set(re.findall(r"([\w.-]+/[\w.-]+) on Hugging Face", sources))) or None,
        "library_name": None if config.get("model_type") == "modern_llm" else library,  # it cannot load ours
        "pipeline_tag": pipeline,
        "tags": tags,
    }
    if len(names) == 1 and names <= set(LICENSES):
        card["license"] = names.pop()
    elif names:
        card |= {"license": "other", "license_name": "of-the-data-see-below"}
    results = []
    for entry in [] if run.get("smoke") else measurements(folder, run):
        for name, metric in entry["metrics"].items():
            result = EvalResult(
                task_type=pipeline or "text-generation",
                dataset_type=str(entry["task"]),
                dataset_name=f"{entry['task']}, {entry['shots']} examples in the prompt",
                dataset_split=entry["split"],
                metric_type=METRIC_TYPES.get(name, name),
                metric_name=name,
                metric_value=metric["value"],
                metric_args={key: metric[key] for key in ("low", "high", "n") if key in metric} or None,
            )
            results.append(result)
    if results:
        card |= {"model_name": folder.resolve().name, "eval_results": results}
    return ModelCardData(**{key: value for key, value in card.items() if value is not None}).to_yaml().strip()


def how_made(folder: Path, run: dict) -> list[str]:
    hardware, settings = run.get("hardware", {}), run.get("settings", {})
    names = settings.get("data") or settings.get("task") or settings.get("corpus")
    licenses = ", ".join(licenses_of(family(folder, run)))
    tokens = None
    if run.get("stage") in ("train", "sft", "finetune"):  # the other stages count answers
        counts = [line["tokens"] for line in read_jsonl(folder / "metrics.jsonl") if "tokens" in line]
        tokens = counts[-1] if counts else None
    lines = [f"- command: `{run.get('command')}`"]
    lines += [f"- started from: `{run['parent']}`"] if run.get("parent") else []
    lines += [f"- data: {names} ({'; '.join(values_of(run.get('data'), 'source'))})"]
    lines += [f"- licences of the data, also of the runs before: {licenses}"] if licenses else []
    steps = f"{run.get('step', 0):,}"
    lines += [f"- tokens: {tokens:,} in {steps} steps" if tokens else f"- steps: {steps}"]
    lines += [
        f"- hardware: {hardware.get('device')}, {run.get('processes', 1)} process(es), {run.get('dtype')}; "
        f"{run.get('seconds', 0) / 60:.1f} minutes of training"
    ]
    return [*lines, f"- code: commit {run.get('git')}, torch {run.get('versions', {}).get('torch')}"]


def format_metric(name: str, metric: dict) -> str:
    """88.1 [85.0, 90.7], n=500"""
    scale = 100 if name in SHARES else 1
    text = f"{scale * metric['value']:.2f}"
    if "low" in metric:
        text += f" [{scale * metric['low']:.2f}, {scale * metric['high']:.2f}]"
    return text + (f", n={metric['n']:,}" if "n" in metric else "")


def results(folder: Path, run: dict) -> list[str]:
    if run.get("smoke"):
        return ["This was a smoke run, cut short to see whether the program works: **no result**."]
    best, lines = (run.get("results") or {}).get("best") or {}, []
    figures = [f"{name} {value:.4g}" for name, value in best.items() if name not in ("step", "val_tokens")]
    if figures:
        lines += [f"On held-out data while training: {', '.join(figures)}.", ""]
    rows = []
    for entry in measurements(folder, run):
        where = f"{entry['task']} | {entry['split']} | {entry['shots']}"
        for name, metric in entry["metrics"].items():
            rows.append(f"| {where} | {name} | {format_metric(name, metric)} |")
    if rows:
        lines += ["| task | split | examples in the prompt | metric | value [95 % interval] |"]
        lines += ["|---|---|---|---|---|", *rows]
    return lines or ["Not measured yet: `python eval.py` adds results here."]


def usage(folder: Path, run: dict, config: dict, adapter: dict) -> list[str]:
    """Example code that loads the folder."""
    kind = run.get("kind")
    if run.get("verifier"):
        code = ["from verifier import Verifier  # of this project", f'verifier = Verifier.load("{folder}")']
        code += ["verifier.score(problem, answer)"]
    elif config.get("model_type") == "modern_llm":
        why = "transformers has no architecture for this combination of settings; this project runs it:"
        return [why, "", f"    python chat.py {folder}"]
    elif adapter:
        return adapter_usage(folder, run, adapter)
    elif kind == "seq2seq":
        code = ["from transformers import AutoModelForSeq2SeqLM, AutoTokenizer", ""]
        code += [f'model = AutoModelForSeq2SeqLM.from_pretrained("{folder}")']
        code += [f'tokenizer = AutoTokenizer.from_pretrained("{folder}")']
    else:
        task, call = "text-generation", 'pipe("<|endoftext|>Once upon a time")  # as in training'
        if run.get("chat"):
            call = 'pipe([{"role": "user", "content": "Hello!"}])  # uses the chat template'
        if kind == "head":
            task, call = "text-classification", 'pipe("A wonderful film.")'
        code = ["from transformers import pipeline", "", f'pipe = pipeline("{task}", model="{folder}")', call]
    lines = ["```python", *code, "```"]
    decoder = kind not in ("head", "seq2seq") and not run.get("verifier")
    return lines + (["", *other_programs(folder, run)] if decoder else [])


def other_programs(folder: Path, run: dict) -> list[str]:
    options = f"pretrained={folder},add_bos_token=True"
    how = (
        "lm-evaluation-harness must put `<|endoftext|>` before a text, as in training (leave `add_bos_token` "
        "out for perplexity tasks, which already do this):"
    )
    if run.get("chat"):
        how, options = (
            "lm-evaluation-harness, with the chat template:",
            f"pretrained={folder} --apply_chat_template",
        )
    command = f"    lm_eval --model hf --model_args {options} --tasks ..."
    gguf = f"llama.cpp and Ollama: `python -m support.gguf {folder}` makes a GGUF file."
    return [how, "", command, "", gguf]


def adapter_usage(folder: Path, run: dict, adapter: dict) -> list[str]:
    """An adapter has no config: class names and the padding token must be passed to its base model."""
    base, folder = adapter.get("base_model_name_or_path"), os.path.abspath(folder)
    cls = "AutoPeftModelFor" + CLASSES.get(run.get("kind"), "CausalLM")
    code = [f"from peft import {cls}", "from transformers import AutoTokenizer", ""]
    code += [f'tokenizer = AutoTokenizer.from_pretrained("{folder}")']
    names = ""
    if run.get("labels"):
        labels = dict(enumerate(run["labels"]))
        ids = {name: i for i, name in labels.items()}
        code += [f"names = dict(id2label={labels}, label2id={ids}, pad_token_id=tokenizer.pad_token_id)"]
        names = ", **names"
    code += [f'model = {cls}.from_pretrained("{folder}"{names})']
    return ["```python", *code, "```", "", f"The adapter needs its base model, `{base}`."]


def limits(run: dict, config: dict) -> list[str]:
    context = config.get("max_position_embeddings") or config.get("n_positions")
    lines = [f"- Its context is {context:,} tokens."] if context else []
    if run.get("chat"):
        lines.append("- It was not trained to be safe or truthful; it invents facts and numbers.")
    else:
        lines.append("- It was not trained to hold conversations or to refuse requests.")
    return [*lines, "- It reproduces its training data, with their language, errors and biases."]


# -----------------------------------------------------------------------------
# The card


def model_card(folder: Path, run: dict | None = None) -> str:
    """The text of README.md. `run`: the content of run.json, which may not be written yet."""
    run = run or read_json(folder / "run.json")
    adapter, config = (read_json(folder / f"{name}.json") for name in ("adapter_config", "config"))
    size = f"{run.get('parameters', 0) / 1e6:.1f}M parameters"
    if adapter:
        size += f", {run.get('trained_parameters', 0) / 1e6:.2f}M of them trained (LoRA)"
    what = STAGES.get(run.get("stage"), "a language model")
    what += f", {run['task']}" if run.get("task") else ""
    return CARD.format(
        metadata=metadata(folder, run, config, adapter),
        name=folder.resolve().name,
        what=what[0].upper() + what[1:],
        size=size,
        how_made="\n".join(how_made(folder, run)),
        results="\n".join(results(folder, run)),
        usage="\n".join(usage(folder, run, config, adapter)),
        limits="\n".join(limits(run, config)),
    )


def write_model_card(folder: str | Path, run: dict | None = None) -> None:
    """Writes README.md of a run folder, atomically; `run` is read from run.json if it is not given."""
    folder = Path(folder)
    if run or (folder / "run.json").exists():
        text = model_card(folder, run)
        write_atomically(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def write_run(folder: Path, run: dict) -> None:
    """run.json, and before it the card: if a process is killed between the two, the next one writes both."""
    text = json.dumps(run, indent=2) + "\n"
    write_model_card(folder, run)
    write_atomically(folder / "run.json", lambda path: path.write_text(text))
