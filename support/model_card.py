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
from support.results import read_json

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


# -----------------------------------------------------------------------------
# What the run records


def parent_folder(folder: Path, run: dict) -> Path | None:
    """The folder of the run that this one started from; None if there is none, or a hub model."""
    parent = run.get("parent")
    for candidate in (Path(parent), folder.parent / Path(parent).name) if parent else ():
        if (candidate / "config.json").exists():
            return candidate
    return None


def family(folder: Path, run: dict) -> list[dict]:
    """run.json of this run, of its parent, of its parent's parent, and so on."""
    runs, seen = [run], {folder.resolve()}
    parent = parent_folder(folder, run)
    while parent is not None and parent.resolve() not in seen:
        seen.add(parent.resolve())
        runs.append(read_json(parent / "run.json"))
        parent = parent_folder(parent, runs[-1])
    return runs


def hub_base(runs: list[dict]) -> str | None:
    """The hub model that the first run of a family started from."""
    parent = str(runs[-1].get("parent") or "")
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", parent) and not parent.startswith((".", "out/"))
    return parent if is_id and not Path(parent).exists() else None


def values_of(data: object, key: str) -> list[str]:
    """All values of `key` in nested dicts, as texts."""
    found = []
    if isinstance(data, dict):
        for name, value in data.items():
            if name == key and value:
                found.append(str(value))
            else:
                found += values_of(value, key)
    return list(dict.fromkeys(found))


def licenses_of(runs: list[dict]) -> list[str]:
    """Licences of all data; a mix says "storyworld: MIT; numbers: MIT"."""
    found = []
    for run in runs:
        for text in values_of(run.get("data"), "licence"):
            found += [part.split(": ")[-1].strip() for part in text.split(";")]
    return list(dict.fromkeys(found))


def sources_of(runs: list[dict]) -> list[str]:
    found = []
    for run in runs:
        found += values_of(run.get("data"), "source")
    return list(dict.fromkeys(found))


def tokens_seen(folder: Path, run: dict) -> int | None:
    """Training tokens, from the last line of metrics.jsonl that holds them."""
    if run.get("stage") not in ("train", "sft", "finetune"):
        return None  # the other stages count answers
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if '"tokens": ' in line:
            return json.loads(line)["tokens"]
    return None


def measurements(folder: Path, run: dict) -> list[dict]:
    """Entries {"task", "split", "shots", "metrics"} of eval.py and of the evaluation in finetune.py."""
    found = []
    if "evaluation" in run:
        found.append({"task": run.get("task"), "shots": 0, **run["evaluation"]})
    for entry in read_json(folder / "results.json").get("results", {}).values():
        if "metrics" in entry:
            found.append(entry)
    return found


# -----------------------------------------------------------------------------
# The metadata


def metadata(folder: Path, run: dict, config: dict, adapter: dict) -> str:
    """The YAML block, written by huggingface_hub."""
    from huggingface_hub import EvalResult, ModelCardData

    runs = family(folder, run)
    licenses = licenses_of(runs)
    names = {re.sub(r"[\s_]+", "-", name.lower()) for name in licenses} - {"yours"}
    card = {"language": None if "yours" in licenses else "en", "base_model": hub_base(runs)}
    if len(names) == 1 and names <= set(LICENSES):
        card["license"] = names.pop()
    elif names:
        card |= {"license": "other", "license_name": "of-the-data-see-below"}
    hub_ids = re.findall(r"([\w.-]+/[\w.-]+) on Hugging Face", " ".join(sources_of(runs)))
    card["datasets"] = sorted(set(hub_ids)) or None
    card["library_name"] = "peft" if adapter else "transformers"
    if config.get("model_type") == "modern_llm":
        card["library_name"] = None  # transformers cannot load it
    card["pipeline_tag"] = pipeline_tag(run)
    card["tags"] = ["modern-llm", run.get("stage", "train")]
    if run.get("chat") and not run.get("verifier"):
        card["tags"].append("conversational")
    if adapter:
        card["tags"].append("lora")
    results = []
    for entry in [] if run.get("smoke") else measurements(folder, run):
        for name, metric in entry["metrics"].items():
            interval = {key: metric[key] for key in ("low", "high", "n") if key in metric}
            results.append(
                EvalResult(
                    task_type=card["pipeline_tag"] or "text-generation",
                    dataset_type=str(entry["task"]),
                    dataset_name=f"{entry['task']}, {entry['shots']} examples in the prompt",
                    dataset_split=entry["split"],
                    metric_type=METRIC_TYPES.get(name, name),
                    metric_name=name,
                    metric_value=metric["value"],
                    metric_args=interval or None,
                )
            )
    if results:
        card |= {"model_name": folder.resolve().name, "eval_results": results}
    known = {key: value for key, value in card.items() if value is not None}
    return ModelCardData(**known).to_yaml()


def pipeline_tag(run: dict) -> str | None:
    if run.get("verifier"):
        return None
    return {"head": "text-classification", "seq2seq": "text2text-generation"}.get(
        run.get("kind"), "text-generation"
    )


# -----------------------------------------------------------------------------
# The text


def how_made(folder: Path, run: dict) -> list[str]:
    hardware = run.get("hardware", {})
    lines = [f"- command: `{run.get('command')}`"]
    if run.get("parent"):
        lines.append(f"- started from: `{run['parent']}`")
    settings = run.get("settings", {})
    names = settings.get("data") or settings.get("task") or settings.get("corpus")
    lines.append(f"- data: {names} ({'; '.join(sources_of([run]))})")
    licenses = ", ".join(licenses_of(family(folder, run)))
    if licenses:
        lines.append(f"- licences of the data, also of the runs before: {licenses}")
    tokens = tokens_seen(folder, run)
    if tokens:
        lines.append(f"- tokens: {tokens:,} in {run.get('step', 0):,} steps")
    else:
        lines.append(f"- steps: {run.get('step', 0):,}")
    lines.append(
        f"- hardware: {hardware.get('device')}, {run.get('processes', 1)} process(es), {run.get('dtype')}; "
        f"{run.get('seconds', 0) / 60:.1f} minutes of training"
    )
    commit, torch = run.get("git"), run.get("versions", {}).get("torch")
    return [*lines, f"- code: commit {commit}, torch {torch}"]


def shown(name: str, metric: dict) -> str:
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
    figures = ", ".join(
        f"{name} {value:.4g}" for name, value in best.items() if name not in ("step", "val_tokens")
    )
    if figures:
        lines += [f"On held-out data while training: {figures}.", ""]
    rows = []
    for entry in measurements(folder, run):
        for name, metric in entry["metrics"].items():
            rows.append(
                f"| {entry['task']} | {entry['split']} | {entry['shots']} | {name} | {shown(name, metric)} |"
            )
    if rows:
        lines += ["| task | split | examples in the prompt | metric | value [95 % interval] |"]
        lines += ["|---|---|---|---|---|", *rows]
    return lines or ["Not measured yet: `python eval.py` adds results here."]


def usage(folder: Path, run: dict, config: dict, adapter: dict) -> list[str]:
    """Example code that loads the folder."""
    if run.get("verifier"):
        code = ["from verifier import Verifier  # of this project", f'verifier = Verifier.load("{folder}")']
        return ["```python", *code, "verifier.score(problem, answer)", "```"]
    if config.get("model_type") == "modern_llm":
        why = "transformers has no architecture for this combination of settings; this project runs it:"
        return [why, "", f"    python chat.py {folder}"]
    if adapter:
        return adapter_usage(folder, run, adapter)
    head = run.get("kind") == "head"
    lines = ["```python", "from transformers import pipeline", ""]
    if head:
        lines += [f'pipe = pipeline("text-classification", model="{folder}")', 'pipe("A wonderful film.")']
    elif run.get("kind") == "seq2seq":
        lines = ["```python", "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer", ""]
        lines += [f'model = AutoModelForSeq2SeqLM.from_pretrained("{folder}")']
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{folder}")']
    else:
        lines.append(f'pipe = pipeline("text-generation", model="{folder}")')
        if run.get("chat"):
            lines.append('pipe([{"role": "user", "content": "Hello!"}])  # uses the chat template')
        else:
            lines.append('pipe("<|endoftext|>Once upon a time")  # as in training')
    lines.append("```")
    if not head and run.get("kind") != "seq2seq":
        lines += ["", *other_programs(folder, run)]
    return lines


def other_programs(folder: Path, run: dict) -> list[str]:
    if run.get("chat"):
        options = f"pretrained={folder} --apply_chat_template"
        lines = ["lm-evaluation-harness, with the chat template:"]
    else:
        options = f"pretrained={folder},add_bos_token=True"
        lines = [
            "lm-evaluation-harness must put `<|endoftext|>` before a text, as in training (leave "
            "`add_bos_token` out for perplexity tasks, which already do this):"
        ]
    lines += ["", f"    lm_eval --model hf --model_args {options} --tasks ...", ""]
    return [*lines, f"llama.cpp and Ollama: `python -m support.gguf {folder}` makes a GGUF file."]


def adapter_usage(folder: Path, run: dict, adapter: dict) -> list[str]:
    """An adapter has no config: class names and the padding token must be passed to its base model."""
    base, folder = adapter.get("base_model_name_or_path"), os.path.abspath(folder)
    kinds = {"head": "SequenceClassification", "seq2seq": "Seq2SeqLM"}
    cls = "AutoPeftModelFor" + kinds.get(run.get("kind"), "CausalLM")
    lines = ["```python", f"from peft import {cls}", "from transformers import AutoTokenizer", ""]
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{folder}")')
    if run.get("labels"):
        ids = {name: i for i, name in enumerate(run["labels"])}
        lines.append("names = dict(pad_token_id=tokenizer.pad_token_id)")
        lines.append(f"names |= dict(id2label={dict(enumerate(run['labels']))}, label2id={ids})")
        lines.append(f'model = {cls}.from_pretrained("{folder}", **names)')
    else:
        lines.append(f'model = {cls}.from_pretrained("{folder}")')
    lines += ["```", "", f"The adapter needs its base model, `{base}`."]
    return lines


def limits(run: dict, config: dict) -> list[str]:
    context = config.get("max_position_embeddings") or config.get("n_positions")
    lines = []
    if context:
        lines.append(f"- Its context is {context:,} tokens.")
    if run.get("chat"):
        lines.append("- It was not trained to be safe or truthful; it invents facts and numbers.")
    else:
        lines.append("- It was not trained to hold conversations or to refuse requests.")
    lines.append("- It reproduces its training data, with their language, errors and biases.")
    return lines


def model_card(folder: Path, run: dict | None = None) -> str:
    """The text of README.md. `run`: the content of run.json, which may not be written yet."""
    run = run or read_json(folder / "run.json")
    adapter = read_json(folder / "adapter_config.json")
    config = read_json(folder / "config.json")
    size = f"{run.get('parameters', 0) / 1e6:.1f}M parameters"
    if adapter:
        size += f", {run.get('trained_parameters', 0) / 1e6:.2f}M of them trained (LoRA)"
    what = STAGES.get(run.get("stage"), "a language model")
    if run.get("task"):
        what += f", {run['task']}"
    return "\n".join(
        [
            "---",
            metadata(folder, run, config, adapter).strip(),
            "---",
            "",
            f"# {folder.resolve().name}",
            "",
            f"{what[0].upper()}{what[1:]}: {size}. Made with Modern LLM, the whole life of a small language "
            "model in plain Python.",
            "",
            "## How it was made",
            "",
            *how_made(folder, run),
            "",
            "## Results",
            "",
            *results(folder, run),
            "",
            "## How to use it",
            "",
            *usage(folder, run, config, adapter),
            "",
            "## Limits",
            "",
            *limits(run, config),
            "",
        ]
    )


def write_model_card(folder: str | Path, run: dict | None = None) -> None:
    """Writes README.md of a run folder, atomically; `run` is read from run.json if it is not given."""
    folder = Path(folder)
    if run or (folder / "run.json").exists():
        text = model_card(folder, run)
        write_atomically(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))
