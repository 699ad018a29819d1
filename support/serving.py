"""Models in memory, and generation for several clients at once, behind serve.py's API.

Each request generates in its own thread, but only one thread computes at a time: `Turns` passes the lock on
after every token, first come, first served. So streams interleave, and a client that disconnects costs at
most one more token.
"""

import codecs
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch

from support.guard import NotFound
from support.inside import logits_of, token_text, without_heads
from support.loading import is_adapter, load_model, load_tokenizer, resolve
from support.machine import SMALL
from support.memory import free_bytes, free_cached_memory
from support.metrics import majority
from support.results import run_of
from support.runs import TrainError, checkpoints
from support.text_model import TextModel
from support.watching import named_runs
from tasks.calculator import extract_number
from verifier import Verifier, generator_of


class Turns:
    """A lock that is granted in the order in which it was asked for."""

    def __init__(self):
        self.changed = threading.Condition()
        self.queue = deque()  # the first one holds the lock

    def __enter__(self) -> None:
        mine = object()
        with self.changed:
            self.queue.append(mine)
            self.changed.wait_for(lambda: self.queue[0] is mine)

    def __exit__(self, *_) -> None:
        with self.changed:
            self.queue.popleft()
            self.changed.notify_all()

    def hand_on(self) -> None:
        """Lets waiting threads compute first. The caller must hold the lock."""
        if len(self.queue) > 1:
            self.__exit__()
            self.__enter__()


# -----------------------------------------------------------------------------
# Models

CORES = torch.get_num_threads()


def use_cores(model: TextModel) -> None:
    """Sets the number of this thread's (and of later threads') cores; a second slows down a small model."""
    if model.device.type == "cpu":
        torch.set_num_threads(1 if model.n_parameters < SMALL else CORES)


class Pool:
    """The models in a folder of runs, and others by name; those used last stay in memory.

    home: folder of runs; others: folders or hub ids; gib: memory for all models, 0: half of what is free.
    `turns` is the lock of all computation with them.
    """

    def __init__(self, home: Path, device: torch.device, others: list[str], gib: float):
        self.home = home
        self.device = device
        self.others = others
        self.budget = int(gib * 2**30) or free_bytes(device) // 2
        self.loaded: dict[tuple, tuple] = {}  # folders: (state of the files, model, bytes); last used, last
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

        def load() -> tuple:
            model = load_model(folder, self.device)
            if model.ours and self.device.type == "cuda":
                model.model.to(model.dtype)
            return model, model.model

        return self.cached(name, load, folder)

    def verifier(self, name: str) -> Verifier:
        folder = named_runs(self.home).get(name)
        if folder is None or "verifier" not in run_of(folder):
            raise NotFound(f"there is no verifier {name!r}: verifier.py trains one")

        def load() -> tuple:
            found = Verifier.load(folder, str(self.device), keep=False)
            return found, torch.nn.ModuleList([found.model.model, found.generator.model])

        return self.cached(name, load, folder, generator_of(folder))

    def cached(self, name: str, load: Callable[[], tuple], *folders: str | Path):
        """load() gives (object, module); called again when the weights in `folders` have changed."""
        state = [weights_of(folder) for folder in folders]
        if state[0][1] > self.budget:
            raise TrainError(f"the weights of {name} need more memory than models may take (--memory)")
        with self.guard:
            entry = self.loaded.pop(folders, None)
            if entry is None or entry[0] != state:
                found, module = load()
                tensors = [*module.parameters(), *module.buffers()]
                entry = state, found, sum(t.nbytes for t in tensors)
            self.loaded[folders] = entry
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
    source = resolve(folder)
    run = source.run
    chat = run.get("chat") if run else source.is_chat(load_tokenizer(folder, ours=False))
    config = source.config
    return {
        "id": name,
        "object": "model",
        "created": int(written),
        "owned_by": "modern-llm",
        "meta": {
            "kind": source.kind,
            "chat": bool(chat),
            "checkpoint": Path(folder).parent.name == "checkpoints",
            "context_length": config.get("max_position_embeddings") or config.get("n_positions"),
            "stage": run.get("stage"),
        },
    }


# -----------------------------------------------------------------------------
# Generation


@dataclass
class Piece:
    """News of a row."""

    text: str
    calculator: bool = False  # written by the calculator, not by the model
    tokens: list[dict] = ()  # log-probabilities, if they were asked for
    offset: int = 0  # characters of the text before the first of `tokens`
    finish: str | None = None  # "stop" or "length"


class Row:
    """One text while it is written. `ready` characters of it can no longer change: the last `held` ones could
    be the beginning of a stop string. One thread calls `add`, another one `take`.
    """

    def __init__(self, stop: list[str], text: str = "", tokens: list[dict] = ()):
        self.stop = stop
        self.held = max(map(len, stop), default=1) - 1
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # tokens may be parts of characters
        self.ids: list[int] = []
        self.computed = 0  # so many of the next tokens are the calculator's
        self.text = text
        self.authors = [False] * len(text)  # of each character: is it the calculator's?
        self.ready = len(text)
        self.tokens = list(tokens)
        self.finish: str | None = None
        self.taken = (0, 0, None)  # characters, tokens, finish: what was given out
        self.offset = 0  # characters of the tokens that were given out

    def add(self, new: bytes, tokens: list[dict], finish: str | None = None) -> None:
        """The bytes of the next token, its log-probabilities, and why the row ends with it, if it does."""
        by_calculator = self.computed > 0
        self.computed -= by_calculator
        self.tokens += tokens
        text = self.text + self.decoder.decode(new, final=finish is not None)
        self.authors += [by_calculator] * (len(text) - len(self.authors))
        ends = [text.find(stop, self.ready) for stop in self.stop]
        ends = [end for end in ends if end >= 0]
        if ends:
            text = text[: min(ends)]
            finish = "stop"
        self.text = text
        self.ready = len(text) if finish else max(self.ready, len(text) - self.held)
        self.finish = finish  # the last: `take` reads it first

    def take(self) -> list[Piece]:
        """What is new since the last call, a piece for each author."""
        finish = self.finish
        now = (self.ready, len(self.tokens), finish)
        if now == self.taken:
            return []
        begin, seen, _ = self.taken
        self.taken = now
        pieces = []
        for author, group in groupby(self.authors[begin : now[0]]):
            end = begin + len(list(group))
            pieces.append(Piece(self.text[begin:end], author))
            begin = end
        pieces = pieces or [Piece("")]
        last = pieces[-1]
        last.tokens, last.offset, last.finish = self.tokens[seen : now[1]], self.offset, finish
        self.offset += sum(map(characters, last.tokens))
        return pieces


class Stopped(Exception):
    """The client is gone, or every row has ended."""


# Fields of a request that ModernDecoderLM.generate knows by the same name.
SAMPLING = {"n", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}


def generate(model: TextModel, prompts: list[list[int]], how, rows: list[Row], gone, turns: Turns) -> None:
    """Continues prompts and adds each token to its row, until `gone` (an Event) is set. how: a Question."""
    if how.heads_off:
        net = without_heads(model.model, how.heads_off)
        model = TextModel(net, model.tokenizer, model.kind, model.name, chat=model.chat)
    stops = {model.eos, model.end}
    special = set(model.tokenizer.special_ids.values())
    log_p: dict[int, torch.Tensor] = {}  # of the next token of each row, (V)

    def adjust(alive: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Called once a token with logits (B, V): passes the lock on, stops, or biases them."""
        turns.hand_on()
        if gone.is_set() or all(row.finish for row in rows):
            raise Stopped
        if how.alternatives is not None:
            log_p.update(zip(alive, logits.float().log_softmax(-1), strict=True))
        return biased(logits, [rows[r].ids for r in alive], how)

    def force(r: int, new: list[int]) -> list[int]:
        """Ids that must come next: the end of a finished row, or the calculator's result."""
        if rows[r].finish:
            return [model.eos]
        if not how.calculator:
            return []
        known = prompts[r // how.n][-100:]  # a prompt may end in an open sum
        result = model.calculator(r, [*known, *new])
        rows[r].computed = len(result)
        return result

    def token(r: int, new: int) -> None:
        """Called with every new token of row r."""
        if rows[r].finish:
            return
        rows[r].ids.append(new)
        entries = []
        if how.alternatives is not None:
            entries = [token_entry(model, log_p[r], new, how.alternatives)]
        text = model.tokenizer.token_bytes(new)
        if new in special:  # it adds nothing to the text
            text = b""
            entries = [entry | {"bytes": []} for entry in entries]
        rows[r].add(text, entries, "stop" if new in stops else None)

    options = how.model_dump(include=SAMPLING)
    if how.calculator or how.stop:
        options["force"] = force
    use_cores(model)
    options |= {"stop_tokens": sorted(stops), "stream": token, "adjust": adjust}
    with contextlib.suppress(Stopped), turns:
        if not gone.is_set():  # the client may have left while it waited
            model.continuations(prompts, how.max_tokens, **options)
    for row in rows:
        if not row.finish:
            row.add(b"", [], "length")


def biased(logits: torch.Tensor, written: list[list[int]], how) -> torch.Tensor:
    """logits (B, V) of rows that have written these ids, plus biases, minus penalties: an id loses the more,
    the more often it was written.
    """
    if not (how.logit_bias or how.presence_penalty or how.frequency_penalty):
        return logits
    logits = logits.float().clone()
    logits[:, list(how.logit_bias)] += torch.tensor(list(how.logit_bias.values())).to(logits)
    for row, ids in zip(logits, written, strict=True):
        seen, times = torch.tensor(ids, dtype=torch.long, device=row.device).unique(return_counts=True)
        row[seen] -= how.presence_penalty + how.frequency_penalty * times
    return logits


def token_entry(model: TextModel, log_p: torch.Tensor, token: int, most: int) -> dict:
    """{"token", "bytes", "logprob", "top_logprobs": [the same of the likeliest]}, from log_p (V)."""

    def named(i: int, value: float) -> dict:
        raw = model.tokenizer.token_bytes(i)
        return {"token": token_text(raw), "bytes": list(raw), "logprob": value}

    values, ids = log_p.topk(most)
    top = map(named, ids.tolist(), values.tolist())
    return named(token, float(log_p[token])) | {"top_logprobs": list(top)}


def characters(entry: dict) -> int:
    """Of a token in the text; one that is special or a part of a character has none."""
    return 0 if entry["token"].startswith("bytes:") or not entry["bytes"] else len(entry["token"])


def prompt_entries(model: TextModel, ids: list[int], most: int) -> list[dict]:
    """`token_entry` of every token of a prompt given those before it; the first one's logprob is None."""
    log_p = logits_of(model.model, ids).log_softmax(-1)
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
    for i in (-scores).argsort(kind="stable").tolist():
        about = {
            "index": i,
            "number": numbers[i],
            "text": answers[i],
            "probability": round(float(probabilities[i]), 4),
            "score": round(max(float(scores[i]), -1e6), 4),
        }
        ranked.append(about)
    winner = majority(numbers)
    return {
        "answers": ranked,
        "majority": {"number": winner, "votes": numbers.count(winner) if winner else 0},
        "greedy": {"number": extract_number(greedy), "text": greedy},
    }
