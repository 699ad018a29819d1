"""The model card of a run folder: README.md, with the metadata that the Hugging Face hub reads.

`write_model_card(folder)` rewrites it from the files of the folder: run.json, results.json, config.json or
adapter_config.json, metrics.jsonl; its text is support/model_card.jinja. The Trainer calls it at the end of
a run, eval.py after each measurement. A number is shown with its interval; a smoke run shows none.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from support.files import write_json, write_text
from support.pages import Table, count, fill, lines_of, markdown_block, rendered, row
from support.results import Run, measurements_of, read_json_or_empty
from support.tables import read_jsonl

LICENSES = """
    mit apache-2.0 cc0-1.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-nd-4.0 cdla-sharing-1.0
    cdla-permissive-2.0 odc-by
""".split()  # the licences of our data sets, as the hub names them
STAGES = {
    "train": "A language model pretrained from scratch",
    "finetune": "A model fine-tuned on one task",
    "sft": "A model tuned on conversations (SFT)",
    "dpo": "A model tuned on preferences",
    "verifier": "A verifier, which estimates how likely an answer to a problem is right",
}
METRIC_TYPES = {"macro_f1": "f1", "rouge1": "rouge", "rouge2": "rouge", "rougeL": "rouge"}
PIPELINES = {"head": "text-classification", "seq2seq": "text2text-generation"}
CLASSES = {"head": "SequenceClassification", "seq2seq": "Seq2SeqLM"}

HOW_MADE = """
- command: `{command}`
- started from: `{parent}`
- data: {names} ({sources})
- licences of the data, also of the runs before: {licences}
- tokens: {tokens:,}
- steps: {step:,}
- LoRA: {lora[trained_parameters]:count} parameters trained
- hardware: {hardware[device]}, {processes} process(es), {dtype}; {seconds:minutes} minutes of training
- code: commit {git}, torch {versions[torch]}
"""
ROW = """
task: {m.task} | split: {m.split} | examples in the prompt: {m.shots} | metric: {metric}
value [95 % interval]: {value}
"""

# -----------------------------------------------------------------------------
# What the run records


def values_of(data: object, key: str) -> list[str]:
    """All values of `key` in nested dicts, as texts."""
    found = []
    for name, value in data.items() if isinstance(data, dict) else ():
        found += [str(value)] if name == key and value else values_of(value, key)
    return list(dict.fromkeys(found))


def licenses_of(runs: list[dict]) -> list[str]:
    """Licences of all data; a mix says "storyworld: MIT; numbers: MIT"."""
    found = {}
    for run in runs:
        for part in "; ".join(values_of(run.get("data"), "licence")).split(";"):
            found[part.split(": ")[-1].strip()] = True
    return [name for name in found if name]


# -----------------------------------------------------------------------------
# The parts of a card


def metadata(run: Run, config: dict, adapter: dict) -> str:
    """The YAML block, written by huggingface_hub."""
    from huggingface_hub import ModelCardData

    record = run.record
    licences = licenses_of(run.records)
    names = {re.sub(r"[\s_]+", "-", name.lower()) for name in licences} - {"yours"}
    known = len(names) == 1 and names <= set(LICENSES)
    sources = " ".join(source for r in run.records for source in values_of(r.get("data"), "source"))
    pipeline = PIPELINES.get(record.get("kind"), "text-generation")
    base = str(run.records[-1].get("parent") or "")  # what the first run of the family started from
    hub_id = re.fullmatch(r"(?!out/)\w[\w.-]*(/[\w.-]+)?", base) and not Path(base).exists()
    tags = ["modern-llm", record.get("stage", "train")]
    if record.get("chat") and not record.get("verifier"):
        tags.append("conversational")
    if adapter:
        tags.append("lora")
    library = "peft" if adapter else "transformers"
    results = [] if record.get("smoke") else list(eval_results(run, pipeline))
    card = ModelCardData(
        language=None if "yours" in licences else "en",
        license=names.pop() if known else "other" if names else None,
        license_name="of-the-data-see-below" if names and not known else None,
        base_model=base if hub_id else None,
        datasets=sorted(set(re.findall(r"([\w.-]+/[\w.-]+) on Hugging Face", sources))) or None,
        library_name=None if config.get("model_type") == "modern_llm" else library,  # it cannot load ours
        pipeline_tag=None if record.get("verifier") else pipeline,
        tags=tags,
        model_name=run.folder.resolve().name if results else None,
        eval_results=results or None,
    )
    return card.to_yaml().strip()


def eval_results(run: Run, pipeline: str) -> Iterator:
    """What was measured, as huggingface_hub's EvalResult."""
    from huggingface_hub import EvalResult

    for m in measurements_of(run):
        for name, metric in m.entry["metrics"].items():
            yield EvalResult(
                task_type=pipeline,
                dataset_type=m.task,
                dataset_name=f"{m.task}, {m.shots} examples in the prompt",
                dataset_split=m.split,
                metric_type=METRIC_TYPES.get(name, name),
                metric_name=name,
                metric_value=metric["value"],
                metric_args={key: metric[key] for key in ("low", "high", "n") if key in metric} or None,
            )


def how_made(run: Run, adapter: dict) -> list[str]:
    record, settings = run.record, run.settings
    values = record | {
        "names": settings.get("data") or settings.get("task") or settings.get("corpus"),
        "sources": "; ".join(values_of(record.get("data"), "source")),
        "licences": ", ".join(licenses_of(run.records)) or None,
        "lora": record if adapter else None,
    }
    for line in read_jsonl(run.folder / "metrics.jsonl"):
        values["tokens"] = line.get("tokens", values.get("tokens"))
    return lines_of(HOW_MADE, **values)


def results(run: Run) -> str:
    """What was measured while training and afterwards; "" if nothing was."""
    rows = []
    for m in measurements_of(run):
        for name, metric in m.entry["metrics"].items():
            rows.append(row(ROW, m=m, metric=name, value=m.values[name] + fill(", n={n:,}", **metric)))
    losses = {name: value for name, value in run.best.items() if name not in ("step", "val_tokens")}
    figures = [f"{name} {value:.4g}" for name, value in losses.items()]
    words = [f"On held-out data while training: {', '.join(figures)}."] if figures else []
    words += [markdown_block(Table("results", rows))] if rows else []
    return "\n\n".join(words)


# -----------------------------------------------------------------------------
# The card


def model_card(folder: Path, record: dict | None = None) -> str:
    """The text of README.md. `record`: the content of run.json, which may not be written yet."""
    run = Run(folder, folder.parent, record=record)
    record = run.record
    adapter = read_json_or_empty(folder / "adapter_config.json")
    config = read_json_or_empty(folder / "config.json")
    labels = record.get("labels") or []
    return rendered(
        "model_card.jinja",
        run=record,
        config=config,
        adapter=adapter,
        metadata=metadata(run, config, adapter),
        folder=folder,
        absolute=folder.absolute(),
        name=folder.resolve().name,
        what=STAGES.get(record.get("stage"), "A language model"),
        size=count(record.get("parameters", 0)),
        how_made="\n".join(how_made(run, adapter)),
        results=results(run),
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        peft="AutoPeftModelFor" + CLASSES.get(record.get("kind"), "CausalLM"),
        context=config.get("max_position_embeddings") or config.get("n_positions"),
    )


def write_model_card(folder: Path, record: dict | None = None) -> None:
    """Writes README.md of a run folder, atomically; `record` is read from run.json if it is not given."""
    if record or (folder / "run.json").exists():
        write_text(folder / "README.md", model_card(folder, record))


def write_run(folder: Path, record: dict) -> None:
    """run.json, and before it the card: if a process is killed between the two, the next one writes both."""
    write_model_card(folder, record)
    write_json(folder / "run.json", record)
