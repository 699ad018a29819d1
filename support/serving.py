"""Models in memory, and generation for several clients at once, behind serve.py's API.

Each request generates in its own thread, but only one thread computes at a time: `Turns` passes the lock on
after every token, first come, first served. So streams interleave, and a client that disconnects costs at
most one more token.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from support.inside import logits_of, token_text, without_heads
from support.loading import (
    is_adapter,
    is_chat,
    kind_of,
    load_model,
    load_tokenizer,
    read_config,
    why_not_ours,
)
from support.memory import free_bytes, free_cached_memory, weight_bytes
from support.metrics import majority
from support.results import run_of
from support.runs import TrainError, checkpoints
from support.text_model import TextModel
from support.watching import ContextTooLong, NotFound, named_runs
from tasks.calculator import extract_number
from verifier import Verifier


class Turns:
    """A lock that is granted in the order in which it was asked for."""

    def __init__(self):
        self.guard, self.waiting, self.taken = threading.Lock(), deque(), False

    def __enter__(self) -> None:
        with self.guard:
            if not self.taken:
                self.taken = True
                return
            mine = threading.Event()
            self.waiting.append(mine)
        mine.wait()

    def __exit__(self, *_) -> None:
        with self.guard:
            if self.waiting:
                self.waiting.popleft().set()  # the lock passes on without being free
            else:
                self.taken = False

    def hand_on(self) -> None:
        """Lets waiting threads compute first. The caller must hold the lock."""
        if self.waiting:
            self.__exit__()
            self.__enter__()


# -----------------------------------------------------------------------------
# Models


SMALL = 20_000_000  # parameters; below this a second core slows decoding
CORES = torch.get_num_threads()


def use_cores(model: TextModel) -> None:
    """Sets the number of this thread's (and of later threads') cores to what suits the model."""
    if model.device.type == "cpu":
        small = sum(p.numel() for p in model.model.parameters()) < SMALL
        torch.set_num_threads(1 if small else CORES)


class Pool:
    """The models in a folder of runs, and others by name; those used last stay in memory.

    `turns`: the lock of all computation with them.

    home: folder of runs; others: folders or hub ids; gib: memory for all models, 0: half of what is free.
    """

    def __init__(self, home: Path, device: torch.device, others: tuple[str, ...] = (), gib: float = 0.0):
        self.home, self.device = home, device
        self.budget = int(gib * 2**30) or free_bytes(device) // 2
        self.loaded: OrderedDict[tuple, tuple[object, int]] = OrderedDict()  # key: (model, bytes)
        self.guard, self.turns = threading.Lock(), Turns()
        self.others = {name: self.describe_other(name) for name in others}

    def describe_other(self, name: str) -> dict:
        config = read_config(name)
        chat = is_chat(name, load_tokenizer(name, ours=False), config)
        kind = kind_of(name, config)
        return {"folder": name, "chat": chat, "kind": kind, "ours": not why_not_ours(kind, config)}

    def folders(self) -> dict[str, Path]:
        """{id: folder} of every run and checkpoint that holds a model."""
        found = {}
        for name, folder in named_runs(self.home).items():
            for path in [folder, *checkpoints(folder)]:
                if (path / "config.json").exists() or is_adapter(str(path)):
                    found[name if path == folder else f"{name}/checkpoints/{path.name}"] = path
        return found

    def listing(self) -> list[dict]:
        """What /v1/models says of each model."""
        found = []
        for name, folder in self.folders().items():
            record = folder.parents[1] if folder.parent.name == "checkpoints" else folder
            run = run_of(record)
            try:
                config = read_config(str(folder))
                kind, created = kind_of(str(folder), config), int(changed_at(folder))
            except (ValueError, OSError, AttributeError):  # half written, or its base is gone
                continue
            found.append(
                {
                    "id": name,
                    "chat": bool(run.get("chat")),
                    "kind": kind,
                    "ours": not why_not_ours(kind, config),
                    "stage": run.get("stage"),
                    "parameters": run.get("parameters"),
                    "smoke": bool(run.get("smoke")),
                    "checkpoint": record != folder,
                    "context_length": config.get("max_position_embeddings") or config.get("n_positions"),
                    "created": created,
                }
            )
        for name, about in self.others.items():
            found.append({"id": name, "checkpoint": False, "created": 0, **about})
        return found

    def get(self, name: str) -> TextModel:
        """Loads a listed model, or takes it from memory; loads it anew if its files have changed."""
        folder = self.folders().get(name) or (self.others[name]["folder"] if name in self.others else None)
        if folder is None:
            raise NotFound(f"there is no model {name!r}: /v1/models lists those that are here")
        folder, here = Path(folder), Path(folder).is_dir()

        def load() -> TextModel:
            on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if here else 0
            if on_disk > self.budget:
                raise TrainError(
                    f"{name} has {on_disk / 2**30:.1f} GiB of weights; models may take "
                    f"{self.budget / 2**30:.1f} GiB (--memory)"
                )
            model = load_model(str(folder), self.device)
            if model.ours:
                model.model.to(model.dtype)
            return model

        return self.cached((name, changed_at(folder)), load, lambda model: weight_bytes(model.model))

    def verifier(self, name: str, generator: TextModel) -> Verifier:
        folder = named_runs(self.home).get(name)
        if folder is None or "verifier" not in run_of(folder):
            raise NotFound(f"there is no verifier {name!r}: verifier.py trains one")
        key = ("verifier", name, generator.name, (changed_at(folder), changed_at(generator.name)))
        return self.cached(
            key,
            lambda: Verifier.load(folder, str(self.device), generator, keep=False),
            lambda found: weight_bytes(getattr(found.core, "text_model", found.core).model),
        )

    def cached(self, key: tuple, load: Callable, size: Callable):
        with self.guard:
            if key not in self.loaded:
                for old in [k for k in self.loaded if k[:-1] == key[:-1]]:
                    del self.loaded[old]  # an earlier state of the same files
                model = load()
                self.loaded[key] = (model, size(model))
                while len(self.loaded) > 1 and sum(n for _, n in self.loaded.values()) > self.budget:
                    self.loaded.popitem(last=False)
                free_cached_memory()
            self.loaded.move_to_end(key)
            return self.loaded[key][0]

    def clear(self) -> None:
        """Forgets all models: training is going to need the memory."""
        with self.guard:
            self.loaded.clear()
        free_cached_memory()


def changed_at(folder: str | Path) -> float:
    """When a model's weights were written; 0.0 for a model of the hub."""
    return max((file.stat().st_mtime for file in Path(folder).glob("*.safetensors")), default=0.0)


# -----------------------------------------------------------------------------
# Generation


class Stopped(Exception):
    """The client is gone, or every row has ended."""


@dataclass
class Sampling:
    """How to continue prompts; the names are those of ModernDecoderLM.generate and of OpenAI's API."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted from the logit of a token that was generated before
    frequency_penalty: float = 0.0  # the same, times how often
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    logprobs: int | None = None  # log-probabilities of the tokens, and of so many alternatives
    calculator: bool = False  # what follows `<<9*3=` is computed
    heads_off: tuple[tuple[int, int], ...] = ()  # (layer, head) that contribute nothing


@dataclass
class Piece:
    """News of one row."""

    row: int
    text: str = ""
    calculator: bool = False  # written by the calculator, not by the model
    tokens: list[dict] = field(default_factory=list)  # if log-probabilities were asked for
    finish: str | None = None  # "stop" or "length"


class Row:
    """Incremental decoding of one row: gives out only text that later tokens cannot change."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...]):
        self.decode, self.stop = decode, stop
        self.ids: list[int] = []
        self.start = self.read = 0  # the text of ids[:read] is known; decoding begins at ids[start]
        self.held, self.finish = "", None
        self.computed = 0  # so many of the next tokens are the calculator's

    def add(self, token: int) -> str:
        """One more token; the text that is certain now."""
        self.ids.append(token)
        known, text = self.decode(self.ids[self.start : self.read]), self.decode(self.ids[self.start :])
        if text.endswith("\ufffd"):  # a character may be spread over several tokens
            return ""
        self.held += text[len(known) :]
        self.start, self.read = self.read, len(self.ids)
        return self.certain()

    def certain(self) -> str:
        """Takes from `held` what cannot be part of a stop string."""
        found = [at for at in map(self.held.find, self.stop) if at >= 0]
        if found:
            text, self.held, self.finish = self.held[: min(found)], "", "stop"
            return text
        keep = max((overlap(self.held, stop) for stop in self.stop), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text

    def rest(self) -> str:
        """What is left when no token follows."""
        text = self.decode(self.ids[self.start :])[len(self.decode(self.ids[self.start : self.read])) :]
        self.held += text
        text, self.held = self.certain() + self.held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Generation:
    """Continues prompts and gives `emit` a Piece for each token, until `gone` is set."""

    def __init__(
        self,
        model: TextModel,
        prompts: list[list[int]],
        how: Sampling,
        emit: Callable[[Piece], None],
        gone: threading.Event,
        turns: Turns,
    ):
        self.model, self.prompts, self.how, self.emit = model, prompts, how, emit
        self.gone, self.turns = gone, turns
        self.ends = {model.eos, model.end}
        self.rows = [Row(model.decode, how.stop) for _ in range(len(prompts) * how.n)]
        self.log_p = self.order = None  # of the newest tokens: log-probabilities, and the row of each

    def run(self) -> int:
        """Generates; returns the number of new tokens."""
        how, model = self.how, self.model
        if how.heads_off and not model.ours:
            raise ValueError("heads_off is for models that model.py computes")
        if how.heads_off:
            net = without_heads(model.model, how.heads_off)
            model = TextModel(net, model.tokenizer, model.kind, model.name, chat=model.chat)
        use_cores(model)
        with self.turns:
            if self.gone.is_set():  # the client left while it waited
                return 0
            try:
                model.continuations(
                    self.prompts, how.max_new_tokens, n=how.n, seed=how.seed,
                    temperature=how.temperature, top_p=how.top_p, top_k=how.top_k, min_p=how.min_p,
                    repetition_penalty=how.repetition_penalty, stop_tokens=sorted(self.ends),
                    stream=self.token, adjust=self.step,
                    force=self.forced if how.calculator or how.stop else None,
                )  # fmt: skip
            except Stopped:
                pass
        for r, row in enumerate(self.rows):
            if not row.finish and not self.gone.is_set():
                text = row.rest()
                self.emit(Piece(r, text, finish=row.finish or "length"))
        return sum(len(row.ids) for row in self.rows)

    def step(self, rows: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Called once a token with logits (B, V): passes the lock on, stops, applies biases and penalties."""
        self.turns.hand_on()
        if self.gone.is_set() or all(row.finish for row in self.rows):
            raise Stopped
        how = self.how
        if how.logprobs is not None:
            self.log_p, self.order = logits.float().log_softmax(-1), {r: i for i, r in enumerate(rows)}
        if how.logit_bias or how.presence_penalty or how.frequency_penalty:
            logits = logits.float().clone()
            for token, bias in how.logit_bias.items():
                logits[:, token] += bias
            for i, r in enumerate(rows if how.presence_penalty or how.frequency_penalty else ()):
                ids, times = torch.tensor(self.rows[r].ids, dtype=torch.long).unique(return_counts=True)
                penalty = how.presence_penalty + how.frequency_penalty * times.float()
                logits[i, ids.to(logits.device)] -= penalty.to(logits.device)
        return logits

    def forced(self, r: int, new: list[int]) -> list[int]:
        """Ids that must come next: the end of a finished row, or the calculator's result."""
        if self.rows[r].finish:
            return [self.model.eos]
        known = self.prompts[r // self.how.n][-100:]  # a prompt may end in an open sum
        result = self.model.calculator(r, [*known, *new]) if self.how.calculator else []
        self.rows[r].computed = len(result)
        return result

    def token(self, r: int, token: int) -> None:
        row = self.rows[r]
        if row.finish:
            return
        computed = row.computed > 0
        row.computed -= computed
        entries = []
        if self.how.logprobs is not None:
            entries.append(self.entry(self.log_p[self.order[r]], token))
        if token in self.ends:
            text, row.finish = row.rest(), "stop"
            row.ids.append(token)
        else:
            text = row.add(token)
        self.emit(Piece(r, text, computed, entries, row.finish))

    def entry(self, log_p: torch.Tensor, token: int) -> dict:
        return token_entry(self.model, log_p, token, self.how.logprobs)


def token_entry(model: TextModel, log_p: torch.Tensor, token: int, most: int) -> dict:
    """{"token", "bytes", "logprob", "top": [the same for the likeliest]} from log-probabilities (V)."""

    def named(i: int, value: float) -> dict:
        raw = model.tokenizer.token_bytes(i)
        return {"token": token_text(raw), "bytes": list(raw), "logprob": value}

    top = log_p.topk(most) if most else None
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True) if most else ()
    return named(token, float(log_p[token])) | {"top": [named(i, value) for i, value in pairs]}


@torch.no_grad()
def prompt_entries(model: TextModel, ids: list[int], most: int) -> list[dict]:
    """`token_entry` of every token of a prompt given those before it; the first one's logprob is None."""
    logits = logits_of(model, ids)
    first = token_entry(model, logits[0].log_softmax(-1), ids[0], 0) | {"logprob": None, "top": None}
    later = (token_entry(model, logits[t].log_softmax(-1), i, most) for t, i in enumerate(ids[1:]))
    return [first, *later]


# -----------------------------------------------------------------------------
# Best of n


def rank_answers(verifier: Verifier, problem: str, answers: list[str], greedy: str) -> dict:
    """The answers from best to worst by the verifier, beside what the majority and the greedy answer say."""
    scores, probabilities = verifier.judge([problem] * len(answers), answers)
    numbers = [extract_number(answer) for answer in answers]
    order = sorted(range(len(answers)), key=lambda i: -scores[i])
    winner = majority(numbers)
    return {
        "answers": [
            {
                "index": i,
                "number": numbers[i],
                "probability": round(float(probabilities[i]), 4),
                "score": round(max(float(scores[i]), -1e6), 4),
                "text": answers[i],
            }
            for i in order
        ],
        "best": order[0],
        "majority": {
            "number": winner,
            "votes": numbers.count(winner) if winner is not None else 0,
            "index": numbers.index(winner) if winner is not None else None,
        },
        "greedy": {"number": extract_number(greedy), "text": greedy},
    }


def check_context(model: TextModel, prompts: list[list[int]], new: int) -> None:
    """Raises TrainError if a prompt and its answer are longer than the context."""
    longest = max(map(len, prompts))
    if longest + new > model.context_length:
        raise ContextTooLong(
            f"this model's context length is {model.context_length} tokens; you asked for {longest + new} "
            f"({longest} in the prompt, {new} to be generated)"
        )
