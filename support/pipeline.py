"""The same held-out instructions given to every model: pipeline.json, which report.py sets side by side."""

from pathlib import Path

from data import load_conversations
from support.files import write_json
from support.metrics import proportion
from support.pages import percent
from support.results import read_json_or_empty
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
        said, meant = text.strip(), assistant["content"]
        rows.append({"asked": user["content"], "meant": meant, "said": said, "correct": said == meant})
    return rows


def write_pipeline(file: Path, answered: dict[str, list[dict]]) -> None:
    """Adds the answers {model: answers} to the file, where those of other models stay; prints some."""
    battery = read_json_or_empty(file).get("battery")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"battery": (battery if isinstance(battery, dict) else {}) | answered})
    for name, answers in answered.items():
        right = proportion(sum(answer["correct"] for answer in answers), len(answers))
        print(f"{name}: {percent(right)} % of {len(answers)} instructions followed to the letter")
        for answer in answers[:6]:
            print(f"  {answer['asked']} -> {answer['said'][:100]!r}")
