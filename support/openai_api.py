"""OpenAI's API: what a request may hold, and the form of its answer, whole or as a stream.

The fields and errors are those that vLLM and llama.cpp have, with extras that are ours: see serve.py.
"""

import asyncio
import contextlib
import json
import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import accumulate

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, model_validator

from support.guard import explained
from support.serving import Generation, Piece, Sampling, check_context, prompt_entries, verdict
from support.tables import valid

MOST_ROWS = 64  # texts that one request generates


class Question(BaseModel):
    """What /v1/completions and /v1/chat/completions have in common; null is the same as nothing."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=10**9)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, float] = {}
    n: int = Field(1, ge=1, le=MOST_ROWS)
    seed: int | None = Field(None, ge=-(2**31), lt=2**31)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: dict = {}
    calculator: bool = False
    verifier: str = ""
    heads_off: list[tuple[int, int]] = []

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given):
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given

    def sampling(self, new: int, logprobs: int | None) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stop) > 16 or not all(0 < len(text) <= 1000 for text in stop):
            raise ValueError("stop: at most 16 texts, none of them empty")
        names = "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty n calculator"
        given = {name: getattr(self, name) for name in names.split()}
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed % 2**31
        return Sampling(
            new, **given, top_k=max(0, self.top_k), logit_bias=self.logit_bias, seed=seed, stop=tuple(stop),
            logprobs=logprobs, heads_off=tuple(self.heads_off),
        )  # fmt: skip


class Completion(Question):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: str = Field("", max_length=0)


class Message(BaseModel):
    role: str
    content: str | list[dict] | None = None

    def turn(self) -> dict:
        """As a template wants it. Raises ValueError for content that is no text."""
        parts = (
            [{"type": "text", "text": self.content or ""}]
            if not isinstance(self.content, list)
            else self.content
        )
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
            raise ValueError("messages: only text can be read")
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": valid("".join(part["text"] for part in parts))}


class Chat(Question):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    continue_final_message: bool = False
    tools: list = Field([], max_length=0)
    response_format: dict = {}


class Job:
    """A request that was understood: its prompts as ids, how to go on, and the form of its answer."""

    def __init__(self, lab, question: Completion | Chat):
        self.lab, self.question, self.chat = lab, question, isinstance(question, Chat)
        self.model = model = lab.pool.get(question.model)
        if model.kind != "causal":
            raise ValueError(f"{question.model} does not continue texts: it is of kind {model.kind}")
        self.prompts = [self.chat_ids()] if self.chat else [*self.prompt_ids()]
        known = model.model.config.vocab_size
        if not all(0 <= i < known for ids in [*self.prompts, [*question.logit_bias]] for i in ids):
            raise ValueError(f"token ids must be from 0 to {known - 1}")
        if len(self.prompts) * question.n > MOST_ROWS:
            raise ValueError(f"at most {MOST_ROWS} texts at a time: prompts times n")
        new = question.max_tokens
        if self.chat:
            new = question.max_completion_tokens or new
            new = max(1, model.context_length - len(self.prompts[0])) if new is None else new
        new = 16 if new is None else new
        check_context(model, self.prompts, new)
        logprobs = question.logprobs
        if self.chat:
            logprobs = question.top_logprobs if question.logprobs else None
        self.how = question.sampling(new, logprobs)
        self.verifier = lab.pool.verifier(question.verifier, model) if question.verifier else None
        if self.verifier and len(self.prompts) > 1:
            raise ValueError("verifier: one prompt at a time")
        kind = "chatcmpl" if self.chat else "cmpl"
        self.head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": question.model}
        self.new_tokens = 0

    def chat_ids(self) -> list[int]:
        """The conversation as ids, up to where the assistant goes on."""
        question, model = self.question, self.model
        if not model.chat:
            raise ValueError(
                f"{question.model} was not taught to hold a conversation: use /v1/completions, or a model "
                "that sft.py made"
            )
        if question.response_format.get("type", "text") != "text":
            raise ValueError("response_format: only text")
        turns = [message.turn() for message in question.messages]
        if not question.continue_final_message:
            if turns[-1]["role"] == "assistant":
                raise ValueError(
                    "the last message is the assistant's: continue_final_message goes on with it"
                )
            return model.conversation(turns)[0]
        if turns[-1]["role"] != "assistant":
            raise ValueError("continue_final_message: the last message must be the assistant's")
        return [*model.conversation(turns[:-1])[0], *model.encode(turns[-1]["content"])]

    def prompt_ids(self) -> list[list[int]]:
        """Texts begin with the token that begins a document; ids are taken as they are."""
        given, model = self.question.prompt, self.model
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given or len(given) > MOST_ROWS:
            raise ValueError(f"prompt: 1 to {MOST_ROWS} of them")
        begin = model.bos or [model.eos]
        prompts = [ids if isinstance(ids, list) else [*begin, *model.encode(valid(ids))] for ids in given]
        if not all(prompts):
            raise ValueError("prompt: a list of ids must hold at least one")
        self.hidden = [
            0 if isinstance(ids, list) else len(begin) for ids in given
        ]  # not part of what is echoed
        return prompts

    # ---- computing

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What is new, every hundredth of a second. Leaving the loop stops the computation."""
        loop, news, wake, gone = asyncio.get_running_loop(), deque(), asyncio.Event(), threading.Event()

        def emit(piece: Piece) -> None:
            news.append(piece)
            if len(news) == 1:  # the reader takes all that is there: no need to wake it for each token
                loop.call_soon_threadsafe(wake.set)

        for r, ids in enumerate(self.prompts if getattr(self.question, "echo", False) else ()):
            for sample in range(self.how.n):
                news.append(
                    await run_in_threadpool(self.echoed, r * self.how.n + sample, ids, self.hidden[r])
                )
        with self.lab.stream(gone):
            generation = Generation(self.model, self.prompts, self.how, emit, gone)
            done = loop.run_in_executor(self.lab.threads, generation.run, self.lab.pool.turns)
            done.add_done_callback(lambda _: wake.set())
            try:
                while not done.done() or news:
                    await wake.wait()
                    await asyncio.sleep(0.01)
                    wake.clear()
                    found = [news.popleft() for _ in range(len(news))]
                    if found:
                        yield joined(found)
                    if done.done():
                        wake.set()
                self.new_tokens = await done
            finally:
                gone.set()

    def echoed(self, row: int, ids: list[int], hidden: int) -> Piece:
        """The prompt itself, with its log-probabilities if those were asked for."""
        with self.lab.pool.turns:
            wanted = self.how.logprobs is not None
            entries = prompt_entries(self.model, ids, self.how.logprobs) if wanted else []
        return Piece(row, self.model.tokenizer.decode(ids[hidden:]), tokens=entries[hidden:])

    def judged(self, texts: list[str]) -> dict:
        """The verifier's verdict on the answers to the last question."""
        problem = self.question.messages[-1].turn()["content"] if self.chat else self.question.prompt
        greedy = []
        how = replace(self.how, n=1, temperature=0.0, logprobs=None)
        Generation(self.model, self.prompts, how, greedy.append, threading.Event()).run(self.lab.pool.turns)
        with self.lab.pool.turns:
            return verdict(self.verifier, problem, texts, "".join(piece.text for piece in greedy))

    # ---- the form of the answer

    def usage(self) -> dict:
        n = sum(map(len, self.prompts))
        return {"prompt_tokens": n, "completion_tokens": self.new_tokens, "total_tokens": n + self.new_tokens}

    def choice(self, piece: Piece, streaming: bool) -> dict:
        found = {"index": piece.row, "finish_reason": piece.finish, "logprobs": None}
        if piece.calculator:
            found["calculator"] = True
        if self.how.logprobs is not None:
            found["logprobs"] = chat_logprobs(piece) if self.chat else text_logprobs(piece)
        if not self.chat:
            return found | {"text": piece.text}
        said = {"role": "assistant", "content": piece.text}
        return found | {"delta" if streaming else "message": said}

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = self.head | {"object": "chat.completion.chunk" if self.chat else "text_completion"}
        texts = [""] * (len(self.prompts) * self.how.n)
        try:
            async for pieces in self.pieces():
                for piece in pieces:
                    texts[piece.row] += piece.text
                    yield event(head | {"choices": [self.choice(piece, True)]})
            if self.verifier:
                found = await asyncio.get_running_loop().run_in_executor(self.lab.threads, self.judged, texts)
                yield event(head | {"choices": [], "verdict": found})
            if self.question.stream_options.get("include_usage"):
                yield event(head | {"choices": [], "usage": self.usage()})
        except Exception as error:  # the head of the answer has been sent: all that is left is to say it
            yield event(json.loads(explained(error).body))
        yield "data: [DONE]\n\n"

    async def whole(self, request: Request) -> dict:
        """The answer in one piece; with a verifier, the best choice first."""
        rows = [Piece(r) for r in range(len(self.prompts) * self.how.n)]
        leaving = asyncio.ensure_future(until_gone(request))
        async with contextlib.aclosing(self.pieces()) as news:
            async for pieces in news:
                for piece in pieces:
                    add(rows[piece.row], piece)
                if leaving.done():
                    break
        leaving.cancel()
        found = self.head | {"object": "chat.completion" if self.chat else "text_completion"}
        choices = [self.choice(row, False) for row in rows]
        if self.verifier:
            found["verdict"] = await run_in_threadpool(self.judged, [row.text for row in rows])
            choices = [choices[answer["index"]] for answer in found["verdict"]["answers"]]
        return found | {"choices": choices, "usage": self.usage()}


async def until_gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def add(row: Piece, piece: Piece) -> None:
    row.text, row.tokens, row.finish = row.text + piece.text, row.tokens + piece.tokens, piece.finish


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one row as one piece, except for what the calculator wrote."""
    found: list[Piece] = []
    for piece in pieces:
        same = found and (found[-1].row, found[-1].calculator) == (piece.row, piece.calculator)
        if same:
            add(found[-1], piece)
        else:
            found.append(piece)
    return found


def event(data, name: str = "") -> str:
    """A server-sent event."""
    return f"event: {name}\n" * bool(name) + f"data: {json.dumps(data)}\n\n"


def text_logprobs(piece: Piece) -> dict:
    """As in /v1/completions."""
    names = [entry["token"] for entry in piece.tokens]
    tops = [
        None if entry["top"] is None else {top["token"]: top["logprob"] for top in entry["top"]}
        for entry in piece.tokens
    ]
    offsets = [0, *accumulate(map(len, names))][: len(names)]
    values = [entry["logprob"] for entry in piece.tokens]
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(piece: Piece) -> dict:
    """As in /v1/chat/completions."""
    return {
        "content": [
            {k: v for k, v in e.items() if k != "top"} | {"top_logprobs": e["top"]} for e in piece.tokens
        ]
    }
