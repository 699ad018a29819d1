"""Preference pairs as ids and as text: read from data sets, and written for `--data` and for TRL."""

from dataclasses import dataclass
from pathlib import Path

from data import load_preferences
from finetune import subsample
from support.chat_template import TemplateError
from support.files import write_jsonl
from support.text_model import TextModel


@dataclass
class Pair:
    """Ids of a prompt, a better and a worse answer; without a worse one only the better is learnt.

    `messages` and `texts` are the same as text, for the files that others read: the conversation before the
    answers, and the better and (if there is one) the worse answer.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None = None
    messages: tuple[dict, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected or ()))

    def first_difference(self) -> int:
        """Index in the answers of the first token that differs; both end in an end token, so there is one."""
        return next(i for i, (a, b) in enumerate(zip(self.chosen, self.rejected, strict=False)) if a != b)


def from_collection(model: TextModel, cfg, split: str) -> tuple[list[Pair], dict]:
    """Pairs of a data set, by the settings of dpo.py.

    A conversation that is too long loses its first turns; if that is not enough, it is left out. So is one
    that the model's chat template refuses; if it refuses all, that is an error.
    """
    train = split == "train"
    preferences, about = load_preferences(cfg.data, split)
    preferences = subsample(preferences, cfg.max_train_examples if train else cfg.eval_examples, cfg.seed)
    pairs = []
    refused = None
    for preference in preferences:
        messages = preference.messages
        texts = (preference.chosen, preference.rejected)
        chosen, rejected = map(model.reply_ids, texts)
        room = model.context_length - max(len(chosen), len(rejected))
        try:
            prompt = model.conversation(messages)[0]
            while len(prompt) > room and (shorter := without_first_exchange(messages)):
                messages = shorter
                prompt = model.conversation(messages)[0]
        except TemplateError as error:  # a system turn, say, which the model's template does not know
            refused = error
            continue
        if len(prompt) <= room and chosen != rejected:
            if cfg.is_control and train:
                rejected, texts = None, texts[:1]
            pairs.append(Pair(prompt, chosen, rejected, tuple(messages), texts))
    if refused and not pairs:
        raise refused
    both = sum(pair.rejected is not None for pair in pairs)
    return pairs, {"pairs": both, "left_out": len(preferences) - len(pairs), **about}


def without_first_exchange(messages: list[dict]) -> list[dict]:
    """A conversation from the user's second turn on, behind its system turn; [] if there is no second."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return system + messages[asked[1] :] if len(asked) > 1 else []


def write_pairs(file: Path, pairs: list[Pair], **columns: list) -> None:
    """Pairs as JSON lines of messages, which `--data=FILE` and TRL's DPOTrainer read."""
    rows = []
    for i, pair in enumerate(pairs):
        if pair.rejected is not None:
            chosen, rejected = map(turn, pair.texts)
            row = {"prompt": list(pair.messages), "chosen": chosen, "rejected": rejected}
            rows.append(row | {name: values[i] for name, values in columns.items()})
    write_jsonl(file, rows)


def write_answers(file: Path, pairs: list[Pair]) -> None:
    """Answers without a worse one, in the form of TRL's SFTTrainer, because its DPOTrainer fails on these."""
    alone = [pair for pair in pairs if pair.rejected is None]
    file.unlink(missing_ok=True)
    if alone:
        write_jsonl(file, [{"prompt": list(p.messages), "completion": turn(p.texts[0])} for p in alone])


def turn(answer: str) -> list[dict]:
    return [{"role": "assistant", "content": answer}]
