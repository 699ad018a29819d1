"""The life of a model in one table, pipeline.json: a row a stage and task, and answers to instructions."""

from pathlib import Path

from data import load_conversations
from support.evaluations import Result
from support.files import write_json
from support.metrics import proportion
from support.results import read_json
from support.text_model import TextModel


def follow_instructions(model: TextModel, n: int) -> list[dict]:
    """Greedy answers to the first n held-out instructions: [{"asked", "meant", "said", "correct"}].

    A base that knows no turns is given the instruction as a line to continue.
    """
    chats = [chat for chat in load_conversations("instructions", "test")[0] if len(chat) == 2][:n]
    prompts = []
    for user, _ in chats:
        ids = model.bos + model.encode(user["content"] + "\n")
        prompts.append(model.conversation([user])[0] if model.chat else ids)
    longest = min(40, model.context_length // 2)
    texts = model.generate(prompts, longest, "\n", f"{model.name} follows instructions")
    rows = []
    for (user, assistant), text in zip(chats, texts, strict=True):
        answer, wanted = text.strip(), assistant["content"]
        rows.append({"asked": user["content"], "meant": wanted, "said": answer, "correct": answer == wanted})
    return rows


def stages(name: str, entries: list[dict], answers: list[dict]) -> list[dict]:
    """The rows of one model: one for each task that was asked, or a single one."""
    run = read_json(Path(name) / "run.json")
    row = {"model": name, "stage": run.get("stage"), "minutes": round(run.get("seconds", 0) / 60, 2)}
    if answers:
        row["instructions"] = proportion(sum(answer["correct"] for answer in answers), len(answers))
    tasks: dict[str, dict] = {}
    for entry in entries:
        metrics, task = entry["metrics"], entry["task"]
        if "bits_per_byte" in metrics:
            row[f"{task}, bits/byte"] = metrics["bits_per_byte"]
        elif entry.get("samples") or "exact_match" in metrics:
            columns = metrics if entry.get("samples") else {"exact_match": metrics["exact_match"]}
            tasks[task] = tasks.get(task, {}) | columns
    return [row | {"task": task} | columns for task, columns in tasks.items()] or [row]


def write_pipeline(
    file: Path, results: dict[str, list[Result]], answered: dict[str, list[dict]], samples: int
) -> None:
    """Adds the models' rows to the file, where what was measured before stays, and prints them."""
    before = read_json(file)
    merged = {(row["model"], row.get("task")): row for row in before.get("rows", [])}
    for name, some in results.items():
        for row in stages(name, [result.entry for result in some], answered.get(name, [])):
            key = name, row.get("task")
            merged[key] = merged.get(key, {}) | row
            figures = [f"{column} {x['value']:.3f}" for column, x in row.items() if isinstance(x, dict)]
            print(f"{', '.join(filter(None, key))}: {', '.join(figures)}; {row['minutes']} minutes")
    battery = before.get("battery", {}) | answered
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"rows": list(merged.values()), "battery": battery, "samples": samples})
