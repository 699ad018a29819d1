"""Converts rows of instruction and preference data sets, in the common formats, to messages.

A message is {"role": "system", "user" or "assistant", "content": text}. A row without text gives [], and
is left out; a row in an unknown format is a DataError.

    {"messages": [{"role": "user", "content": "Hi"}, ...]}        OpenAI, TRL; content may be a list of parts
    {"conversations": [{"from": "human", "value": "Hi"}, ...]}    ShareGPT
    {"conversations": ["Hi", "Hello!"]}                           LIMA: user and assistant in turn
    {"instruction": ..., "input": ..., "output": ...}             Alpaca
    {"prompt": text or messages, "completion": text or messages}  TRL
    {"prompt": ..., "chosen": ..., "rejected": ...}               TRL: sides are texts or messages
    {"chosen": "\\n\\nHuman: ...", "rejected": ...}                 hh-rlhf: transcripts; also as prompt
"""

import re
from dataclasses import dataclass

from support.tables import DataError, shortened, text_of

ROLES = {"system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant")
TURNS = ("messages", "conversations", "conversation")  # names of a column with messages


@dataclass(frozen=True)
class Preference:
    """A conversation that ends with the user's turn, and two answers to it."""

    messages: list[dict]  # [{"role": "system", "user" or "assistant", "content": ...}, ...]
    chosen: str
    rejected: str


def talk(question: str, answer: str = "") -> list[dict]:
    """A question, and an answer if there is one, as messages."""
    turns = [{"role": "user", "content": question}]
    return turns + [{"role": "assistant", "content": answer}] if answer else turns


def first_question(messages: list[dict]) -> str:
    """The first user message. Rows with the same one go into the same split (system prompts do not count)."""
    asked = next((m for m in messages if m["role"] == "user"), messages[0])
    return asked["content"]


def messages_of(row: dict) -> list[dict]:
    """A row as a conversation; [] if it has no text or no assistant turn."""
    turns = first_of(row, TURNS)
    if turns is not None:
        messages = as_messages(turns)
        return messages if any(m["role"] == "assistant" for m in messages) else []
    instances = row.get("instances")  # self-instruct's seed tasks
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        row = instances[0] | row
    asked = question_of(row)
    answer = as_answer(first_of(row, ("output", "response", "completion", "answer")))
    return asked + answer if asked and answer else []


def preference_of(row: dict) -> Preference | None:
    """A row as a Preference; None if it lacks a side, or if its sides answer different questions."""
    asked = question_of(row) or as_messages(first_of(row, TURNS) or [])
    if asked and asked[-1]["role"] != "user":
        asked = []
    sides = []
    for name in ("chosen", "rejected"):
        side = as_answer(row.get(name))
        if isinstance(row.get(name), str) and side and side[0]["content"].startswith("Human:"):
            side = transcript(side[0]["content"])
        if asked and (not side or side[0]["role"] == "assistant"):  # else it holds the whole conversation
            side = asked + side
        if len(side) < 2 or side[-1]["role"] != "assistant":
            return None
        sides.append(side)
    (*messages, chosen), (*others, rejected) = sides
    if messages != others:
        return None
    return Preference(messages, chosen["content"], rejected["content"])


def question_of(row: dict) -> list[dict]:
    """The prompt of a row, as messages."""
    asked = first_of(row, ("instruction", "prompt", "question"))
    if isinstance(asked, list):
        return as_messages(asked)
    asked = text_of(asked)
    if asked is None:
        return []
    if asked.startswith("Human:") and asked.endswith("\n\nAssistant:"):
        return transcript(asked.removesuffix("Assistant:"))
    more = text_of(first_of(row, ("input", "context")))
    if more:
        asked += f"\n\n{more}"
    return talk(asked)


def as_answer(value) -> list[dict]:
    """A cell that holds an answer, or messages that end in one, as messages; [] if it has no text."""
    if isinstance(value, list):
        return as_messages(value)
    turn = value if isinstance(value, dict) else {"content": value}
    return as_messages([{"role": "assistant"} | turn])


def as_messages(turns) -> list[dict]:
    """Turns (in any known format) as messages; [] if one of them has no text."""
    if not isinstance(turns, list):
        raise DataError(f"should be a list of messages, but is {shortened(turns)}")
    messages = []
    for number, turn in enumerate(turns):
        if isinstance(turn, str):
            turn = {"role": ("user", "assistant")[number % 2], "content": turn}
        known = turn if isinstance(turn, dict) else {}
        role = known.get("role") or known.get("from")
        if not isinstance(role, str):
            raise DataError(f'a message needs "role" and "content", but is {shortened(turn)}')
        if role.lower() not in ROLES:
            raise DataError(f"unknown role {role!r}: use system, user, assistant")
        content = content_text(turn.get("content", turn.get("value")))
        if content is None:
            return []
        messages.append({"role": ROLES[role.lower()], "content": content})
    return messages


def content_text(content) -> str | None:
    """The text of a message's content: a string, or a list of parts that must all be text."""
    if not isinstance(content, list):
        return text_of(content)
    texts = []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text"):
            raise DataError(f"only text is supported, but a message has a part {shortened(part)}")
        texts.append(text_of(part.get("text")) or "")
    return text_of("\n".join(texts))


def first_of(row: dict, names: tuple[str, ...]):
    """The first of these columns that is there and not empty: None, NaN, [] or a text without a word."""
    for name in names:
        value = row.get(name)
        if isinstance(value, (str, float)):
            if text_of(value) is not None:
                return value
        elif value not in (None, []):
            return value
    return None


def transcript(text: str) -> list[dict]:
    """hh-rlhf: each turn begins with "Human:" or "Assistant:" after an empty line; [] if one has no text."""
    _, *pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + text)
    turns = []
    for name, content in zip(pieces[::2], pieces[1::2], strict=True):
        turns.append({"role": name, "content": content})
    return as_messages(turns)
