"""Models in memory, and generation for several clients at once, behind serve.py's API.

Each request generates in its own thread, but only one thread computes at a time: `Turns` passes the lock on
after every token, first come, first served. So streams interleave, and a client that disconnects costs at
most one more token.
"""

import codecs
import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from support.costs import weight_bytes
from support.guard import NotFound
from support.inside import logits_of, token_text, without_heads
from support.loading import is_adapter, load_model, load_tokenizer, resolve
from support.memory import free_bytes, free_cached_memory
from support.metrics import majority
from support.results import run_of
from support.runs import TrainError, checkpoints
from support.text_model import TextModel
from support.watching import named_runs
from tasks.calculator import extract_number
from verifier import Verifier


class Turns:
    """A lock that is granted in the order in which it was asked for."""

    def __init__(self):
        self.guard = threading.Lock()
        self.queue: deque[threading.Event] = deque()  # the first one holds the lock

    def __enter__(self) -> None:
        mine = threading.Event()
        with self.guard:
            self.queue.append(mine)
            if self.queue[0] is mine:
                return
        mine.wait()

    def __exit__(self, *_) -> None:
        with self.guard:
            self.queue.popleft()
            if self.queue:
                self.queue[0].set()

    def hand_on(self) -> None:
        """Lets waiting threads compute first. The caller must hold the lock."""
        if len(self.queue) > 1:
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

    home: folder of runs; others: folders or hub ids; gib: memory for all models, 0: half of what is free.
    `turns` is the lock of all computation with them.
    """

    def __init__(self, home: Path, device: torch.device, others: list[str], gib: float = 0.0):
        self.home = home
        self.device = device
        self.others = others
        self.budget = int(gib * 2**30) or free_bytes(device) // 2
        self.loaded: dict[tuple, tuple] = {}  # key: (state of the files, model, bytes); last used, last
        self.guard = threading.Lock()
        self.turns = Turns()
        for name in others:
            about(name, name, weights_of(name)[0])  # raises now what would be wrong later

    def folders(self) -> dict[str, str]:
        """{id: folder} of every run and checkpoint that holds a model, and of the others."""
        found = {}
        for folder in named_runs(self.home).values():
            for path in [folder, *checkpoints(folder)]:
                if (path / "config.json").exists() or is_adapter(str(path)):
                    found[path.relative_to(self.home).as_posix()] = str(path)
        return found | {name: name for name in self.others}

    def listing(self) -> list[dict]:
        """What /v1/models says of each model."""
        found = []
        for name, folder in self.folders().items():
            with contextlib.suppress(ValueError, OSError, AttributeError):  # half written; its base is gone
                found.append(about(name, folder, weights_of(folder)[0]))
        return found

    def get(self, name: str) -> TextModel:
        """Loads a listed model, or takes it from memory; loads it anew if its files have changed."""
        folder = self.folders().get(name)
        if folder is None:
            raise NotFound(f"there is no model {name!r}: /v1/models lists those that are here")

        def load() -> tuple[TextModel, int]:
            model = load_model(folder, self.device)
            if model.ours:
                model.model.to(model.dtype)
            return model, weight_bytes(model.model)

        return self.cached((name,), load, folder)

    def verifier(self, name: str, generator: TextModel) -> Verifier:
        folder = named_runs(self.home).get(name)
        if folder is None or "verifier" not in run_of(folder):
            raise NotFound(f"there is no verifier {name!r}: verifier.py trains one")

        def load() -> tuple[Verifier, int]:
            found = Verifier.load(folder, str(self.device), generator, keep=False)
            return found, weight_bytes(found.model.model)

        return self.cached((name, generator.name), load, folder, generator.name)

    def cached(self, key: tuple, load: Callable[[], tuple], *folders: str | Path):
        """load() gives (model, bytes); it is called again when the weights in `folders` have changed."""
        state = [weights_of(folder) for folder in folders]
        on_disk = state[0][1]
        if on_disk > self.budget:
            have, most = on_disk / 2**30, self.budget / 2**30
            raise TrainError(
                f"{key[0]} has {have:.1f} GiB of weights; models may take {most:.1f} GiB (--memory)"
            )
        with self.guard:
            entry = self.loaded.pop(key, None)
            if entry is None or entry[0] != state:
                entry = state, *load()
            self.loaded[key] = entry
            sizes = [size for *_, size in self.loaded.values()]
            while len(sizes) > 1 and sum(sizes) > self.budget:
                del self.loaded[next(iter(self.loaded))], sizes[0]
                free_cached_memory()
        return entry[1]

    def clear(self) -> None:
        """Forgets all models: training is going to need the memory."""
        with self.guard:
            self.loaded.clear()
        free_cached_memory()


def weights_of(folder: str | Path) -> tuple[float, int]:
    """(when they were written, bytes) of a folder's weights; (0.0, 0) for a model of the hub."""
    files = [file.stat() for file in Path(folder).glob("*.safetensors")]
    written = max((file.st_mtime for file in files), default=0.0)
    return written, sum(file.st_size for file in files)


@lru_cache(2048)
def about(name: str, folder: str, written: float) -> dict:
    """What /v1/models says of a model. Raises ValueError or OSError for one that cannot be read."""
    run, source = run_of(Path(folder)), resolve(folder)
    chat = run.get("chat") if run else source.is_chat(load_tokenizer(folder, ours=False))
    config = source.config
    meta = {
        "kind": source.kind,
        "chat": bool(chat),
        "checkpoint": Path(folder).parent.name == "checkpoints",
        "context_length": config.get("max_position_embeddings") or config.get("n_positions"),
    }
    for key in ("stage", "parameters", "smoke"):
        meta[key] = run.get(key)
    return {"id": name, "object": "model", "created": int(written), "owned_by": "modern-llm", "meta": meta}


# -----------------------------------------------------------------------------
# Generation

MOST_ROWS = 64  # texts that one request generates


def as_list(given: object) -> object:
    return [given] if isinstance(given, str) else given


# The fields that ModernDecoderLM.generate knows by the same name.
SAMPLING = {"n", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class Sampling(BaseModel):
    """How to continue prompts; the names are those of OpenAI's API and of ModernDecoderLM.generate."""

    model_config = ConfigDict(allow_inf_nan=False)

    max_tokens: int | None = Field(None, ge=0)
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(lambda t: t if t > 1e-5 else 0.0)] = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=10**9), AfterValidator(lambda k: max(0, k))] = 0
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)  # subtracted from the logit of a token that was there
    frequency_penalty: float = Field(0.0, ge=-2, le=2)  # the same, times how often
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    n: int = Field(1, ge=1, le=MOST_ROWS)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(lambda seed: seed % 2**31)] = Field(
        default_factory=lambda: secrets.randbelow(2**31)
    )
    # A text ends before the first of these.
    stop: Annotated[list[StopString], Field(max_length=16), BeforeValidator(as_list)] = []
    calculator: bool = False  # what follows `<<9*3=` is computed
    heads_off: list[tuple[int, int]] = []  # (layer, head) that contribute nothing

    @property
    def alternatives(self) -> int | None:
        """Log-probabilities are wanted, of each token and of so many likeliest ones; None: they are not."""
        raise NotImplementedError


@dataclass
class Piece:
    """News of one row."""

    row: int
    text: str = ""
    calculator: bool = False  # written by the calculator, not by the model
    tokens: list[dict] = field(default_factory=list)  # if log-probabilities were asked for
    finish: str | None = None  # "stop" or "length"

    def add(self, later: "Piece") -> None:
        self.text += later.text
        self.tokens = self.tokens + later.tokens
        self.finish = later.finish


class Row:
    """A row's text: gives to `emit` only what later tokens cannot change."""

    def __init__(self, index: int, stop: list[str], emit: Callable[[Piece], None]):
        self.index = index
        self.stop = stop
        self.emit = emit
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # tokens may be parts of characters
        self.ids: list[int] = []
        self.computed = 0  # so many of the next tokens are the calculator's
        self.text = ""  # given out
        self.held = ""  # not yet
        self.authors: list[bool] = []  # of each character held: is it the calculator's?
        self.finish: str | None = None

    def add(self, new: bytes, tokens: list[dict], finish: str | None = None) -> None:
        """The bytes of the next token, its log-probabilities, and why the row ends with it (None: it does
        not). Gives out the text that cannot be part of a stop string, a piece for each author.
        """
        by_calculator = self.computed > 0
        self.computed -= by_calculator
        self.held += self.decoder.decode(new, final=finish is not None)
        self.authors += [by_calculator] * (len(self.held) - len(self.authors))
        found = [at for at in map(self.held.find, self.stop) if at >= 0]
        size = len(self.held)
        if found:
            size, finish = min(found), "stop"
        elif finish is None:
            size -= max((overlap(self.held, stop) for stop in self.stop), default=0)
        self.finish = finish
        *before, last = self.pieces(size) or [Piece(self.index)]
        for piece in before:
            self.emit(piece)
        last.tokens, last.finish = tokens, finish
        self.emit(last)

    def pieces(self, size: int) -> list[Piece]:
        """Takes the first `size` characters from `held`."""
        found, begin = [], 0
        for author, characters in groupby(self.authors[:size]):
            end = begin + len(list(characters))
            found.append(Piece(self.index, self.held[begin:end], author))
            begin = end
        self.text += self.held[:size]
        self.held = self.held[size:]
        self.authors = self.authors[size:]
        return found


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Stopped(Exception):
    """The client is gone, or every row has ended."""


class Generation:
    """Continues prompts and gives `emit` a Piece for each token, until `gone` is set."""

    def __init__(self, model: TextModel, prompts: list[list[int]], how: Sampling, emit, gone, turns: Turns):
        self.model = model
        self.prompts = prompts
        self.how = how
        self.gone = gone
        self.turns = turns
        self.rows = [Row(r, how.stop, emit) for r in range(len(prompts) * how.n)]
        self.log_p: dict = {}  # row: log-probabilities of its next token, (V)

    def run(self) -> list[Row]:
        how, model = self.how, self.model
        if how.heads_off:
            net = without_heads(model.model, how.heads_off)
            model = TextModel(net, model.tokenizer, model.kind, model.name, chat=model.chat)
        use_cores(model)
        try:
            with self.turns:
                self.stop_if_done()  # the client may have left while it waited
                model.continuations(
                    self.prompts,
                    how.max_tokens,
                    **how.model_dump(include=SAMPLING),
                    stop_tokens=sorted({model.eos, model.end}),
                    stream=self.token,
                    adjust=self.adjust,
                    force=self.force if how.calculator or how.stop else None,
                )
        except Stopped:
            pass
        for row in self.rows:
            if not row.finish:
                row.add(b"", [], "length")
        return self.rows

    def stop_if_done(self) -> None:
        if self.gone.is_set() or all(row.finish for row in self.rows):
            raise Stopped

    def adjust(self, rows: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Called once a token with logits (B, V): passes the lock on, stops, applies biases and penalties."""
        self.turns.hand_on()
        self.stop_if_done()
        how = self.how
        if how.alternatives is not None:
            self.log_p = dict(zip(rows, logits.float().log_softmax(-1), strict=True))
        penalized = how.presence_penalty or how.frequency_penalty
        if how.logit_bias or penalized:
            logits = logits.float().clone()
        for token, bias in how.logit_bias.items():
            logits[:, token] += bias
        for i, r in enumerate(rows if penalized else ()):
            ids, times = torch.tensor(self.rows[r].ids, dtype=torch.long).unique(return_counts=True)
            penalty = how.presence_penalty + how.frequency_penalty * times
            logits[i, ids.to(logits.device)] -= penalty.to(logits)
        return logits

    def force(self, r: int, new: list[int]) -> list[int]:
        """Ids that must come next: the end of a finished row, or the calculator's result."""
        row = self.rows[r]
        if row.finish:
            return [self.model.eos]
        if not self.how.calculator:
            return []
        known = self.prompts[r // self.how.n][-100:]  # a prompt may end in an open sum
        result = self.model.calculator(r, [*known, *new])
        row.computed = len(result)
        return result

    def token(self, r: int, token: int) -> None:
        """Called with every new token of row r."""
        row, model = self.rows[r], self.model
        if row.finish:
            return
        row.ids.append(token)
        entries = []
        if self.how.alternatives is not None:
            entries.append(token_entry(model, self.log_p[r], token, self.how.alternatives))
        special = token in model.tokenizer.special_ids.values()
        text = b"" if special else model.tokenizer.token_bytes(token)
        row.add(text, entries, "stop" if token in (model.eos, model.end) else None)


def token_entry(model: TextModel, log_p: torch.Tensor, token: int, most: int) -> dict:
    """{"token", "bytes", "logprob", "top_logprobs": [the same of the likeliest]}, from log_p (V)."""

    def named(i: int, value: float) -> dict:
        raw = model.tokenizer.token_bytes(i)
        return {"token": token_text(raw), "bytes": list(raw), "logprob": value}

    values, ids = log_p.topk(most)
    top = map(named, ids.tolist(), values.tolist())
    return named(token, float(log_p[token])) | {"top_logprobs": list(top)}


@torch.no_grad()
def prompt_entries(model: TextModel, ids: list[int], most: int) -> list[dict]:
    """`token_entry` of every token of a prompt given those before it; the first one's logprob is None."""
    log_p = logits_of(model, ids).log_softmax(-1)
    entries = [token_entry(model, log_p[t - 1], i, most) for t, i in enumerate(ids)]
    entries[0] |= {"logprob": None, "top_logprobs": None}
    return entries


# -----------------------------------------------------------------------------
# Best of n


def rank_answers(verifier: Verifier, problem: str, answers: list[str], greedy: str) -> dict:
    """The answers from best to worst by the verifier, beside what the majority and the greedy answer say."""
    scores, probabilities = verifier.score_all([problem] * len(answers), answers)
    numbers = [extract_number(answer) for answer in answers]
    ranked = []
    for i in sorted(range(len(answers)), key=lambda i: -scores[i]):
        about = {
            "index": i,
            "number": numbers[i],
            "probability": round(float(probabilities[i]), 4),
            "score": round(max(float(scores[i]), -1e6), 4),
            "text": answers[i],
        }
        ranked.append(about)
    winner = majority(numbers)
    votes = 0 if winner is None else numbers.count(winner)
    return {
        "answers": ranked,
        "majority": {"number": winner, "votes": votes},
        "greedy": {"number": extract_number(greedy), "text": greedy},
    }
