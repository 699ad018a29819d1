"""Request schemas of OpenAI's API, and its responses, whole or streamed.

Fields and errors are those of vLLM and llama.cpp, with extras: see serve.py.
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
from typing import Annotated

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, model_validator

from support.guard import explained
from support.serving import Generation, Piece, Sampling, check_context, prompt_entries, rank_answers
from support.tables import valid

MOST_ROWS = 64  # texts that one request generates


class Question(BaseModel):
    """Fields of /v1/completions and /v1/chat/completions. A null counts as absent."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)  # below 1e-5: greedy
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=10**9)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    n: int = Field(1, ge=1, le=MOST_ROWS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
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
        given["temperature"] = 0.0 if self.temperature < 1e-5 else self.temperature
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
        """As a chat template expects it. Raises ValueError for content that is no text."""
        parts = self.content
        if not isinstance(parts, list):
            parts = [{"type": "text", "text": parts or ""}]
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
            raise ValueError("messages: only text content is supported")
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
    """One validated request: prompt ids, sampling settings, the form of the response."""

    def __init__(self, lab, question: Completion | Chat):
        self.lab, self.question, self.chat = lab, question, isinstance(question, Chat)
        self.model = model = lab.pool.get(question.model)
        if model.kind != "causal":
            raise ValueError(f"{question.model} is not a decoder (kind: {model.kind})")
        # The first `hidden` ids of a prompt are ours: they are not echoed.
        self.prompts, self.hidden = ([self.chat_ids()], [0]) if self.chat else self.prompt_ids()
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
        self.problem, self.begun = self.judged_texts() if self.verifier else ("", "")
        kind = "chatcmpl" if self.chat else "cmpl"
        self.head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": question.model}
        self.new_tokens = 0

    def judged_texts(self) -> tuple[str, str]:
        """(problem, beginning of the answer) for the verifier."""
        question = self.question
        if not self.chat:
            texts = [question.prompt] if isinstance(question.prompt, str) else question.prompt
            if question.echo or len(texts) != 1 or not isinstance(texts[0], str):
                raise ValueError("verifier: give one prompt as a text, without echo")
            return texts[0], ""
        turns = [message.turn() for message in question.messages]
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        if not asked:
            raise ValueError("verifier: no user message has a problem")
        return asked[-1], turns[-1]["content"] if question.continue_final_message else ""

    def chat_ids(self) -> list[int]:
        """The conversation as ids, up to where the assistant goes on."""
        question, model = self.question, self.model
        if not model.chat:
            raise ValueError(
                f"{question.model} is not a chat model: use /v1/completions, or a model that sft.py made"
            )
        if question.response_format.get("type", "text") != "text":
            raise ValueError("response_format: only text")
        turns = [message.turn() for message in question.messages]
        if not question.continue_final_message:
            if turns[-1]["role"] == "assistant":
                raise ValueError(
                    "the last message is the assistant's: set continue_final_message to continue it"
                )
            return model.conversation(turns)[0]
        if turns[-1]["role"] != "assistant":
            raise ValueError("continue_final_message: the last message must be the assistant's")
        return [*model.conversation(turns[:-1])[0], *model.encode(turns[-1]["content"])]

    def prompt_ids(self) -> tuple[list[list[int]], list[int]]:
        """(ids, hidden) of each prompt. A text gets the token that begins a document, ids are left as is."""
        given, model = self.question.prompt, self.model
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given or len(given) > MOST_ROWS:
            raise ValueError(f"prompt: give 1 to {MOST_ROWS} prompts")
        begin = model.bos or [model.eos]
        prompts = [ids if isinstance(ids, list) else [*begin, *model.encode(valid(ids))] for ids in given]
        if not all(prompts):
            raise ValueError("prompt: a list of ids must hold at least one")
        return prompts, [0 if isinstance(ids, list) else len(begin) for ids in given]

    # ---- computing

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What is new, every hundredth of a second. Leaving the loop stops the computation."""
        loop, news, wake, gone = asyncio.get_running_loop(), deque(), asyncio.Event(), threading.Event()

        def emit(piece: Piece) -> None:
            news.append(piece)
            if len(news) == 1:  # the reader takes all that is there: no need to wake it for each token
                loop.call_soon_threadsafe(wake.set)

        with self.lab.stream(gone):
            if getattr(self.question, "echo", False):
                for index in range(len(self.prompts)):
                    yield await run_in_threadpool(self.echoed, index)
            turns = self.lab.pool.turns
            generation = Generation(self.model, self.prompts, self.how, emit, gone, turns)
            done = loop.run_in_executor(self.lab.threads, generation.run)
            done.add_done_callback(lambda _: wake.set())
            try:
                while not done.done() or news:
                    await wake.wait()
                    await asyncio.sleep(0.01)
                    wake.clear()
                    found = []
                    while news:  # until it is empty: `emit` wakes the reader for the first piece alone
                        found.append(news.popleft())
                    if found:
                        yield joined(found)
                    if done.done():
                        wake.set()
                self.new_tokens = await done
            finally:
                gone.set()

    def echoed(self, index: int) -> list[Piece]:
        """A prompt as the first piece of each of its n rows, with log-probabilities if asked for."""
        ids, hidden, n, entries = self.prompts[index], self.hidden[index], self.how.n, []
        if self.how.logprobs is not None:
            with self.lab.pool.turns:
                entries = prompt_entries(self.model, ids, self.how.logprobs)
        text = self.model.tokenizer.decode(ids[hidden:])
        return [Piece(row, text, tokens=entries[hidden:]) for row in range(index * n, index * n + n)]

    async def judged(self, texts: list[str]) -> dict:
        """The verifier's verdict on the answers to the last question; the client may leave meanwhile."""
        gone = threading.Event()
        loop = asyncio.get_running_loop()
        with self.lab.stream(gone):
            try:
                return await loop.run_in_executor(self.lab.threads, self.judge, texts, gone)
            finally:
                gone.set()

    def judge(self, texts: list[str], gone: threading.Event) -> dict:
        greedy: list[Piece] = []
        how = replace(self.how, n=1, temperature=0.0, logprobs=None)
        turns = self.lab.pool.turns
        Generation(self.model, self.prompts, how, greedy.append, gone, turns).run()
        with turns:
            plain = "".join(piece.text for piece in greedy)
            answers = [self.begun + text for text in (*texts, plain)]
            return rank_answers(self.verifier, self.problem, answers[:-1], answers[-1])

    # ---- the form of the answer

    def usage(self) -> dict:
        n = sum(map(len, self.prompts))
        return {"prompt_tokens": n, "completion_tokens": self.new_tokens, "total_tokens": n + self.new_tokens}

    def choice(self, piece: Piece, streaming: bool, before: str | None = None) -> dict:
        """One choice; `before`: the text that was sent of it, None if nothing was."""
        found = {"index": piece.row, "finish_reason": piece.finish, "logprobs": None}
        if piece.calculator:
            found["calculator"] = True
        if self.how.logprobs is not None:
            found["logprobs"] = chat_logprobs(piece) if self.chat else text_logprobs(piece, len(before or ""))
        if not self.chat:
            return found | {"text": piece.text}
        said = {"content": piece.text}
        if before is None:
            said["role"] = "assistant"
        return found | {"delta" if streaming else "message": said}

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = self.head | {"object": "chat.completion.chunk" if self.chat else "text_completion"}
        texts: list[str | None] = [None] * (len(self.prompts) * self.how.n)
        try:
            async with contextlib.aclosing(self.pieces()) as news:
                async for pieces in news:
                    for piece in pieces:
                        before = texts[piece.row]
                        texts[piece.row] = (before or "") + piece.text
                        yield event(head | {"choices": [self.choice(piece, True, before)]})
            if self.verifier:
                yield event(head | {"choices": [], "verdict": await self.judged(texts)})
            if self.question.stream_options.get("include_usage"):
                yield event(head | {"choices": [], "usage": self.usage()})
        except Exception as error:  # the response has begun, so the error is sent as an event
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
        left = leaving.done()
        leaving.cancel()
        found = self.head | {"object": "chat.completion" if self.chat else "text_completion"}
        choices = [self.choice(row, False) for row in rows]
        if self.verifier and not left:
            found["verdict"] = await self.judged([row.text for row in rows])
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


def text_logprobs(piece: Piece, offset: int) -> dict:
    """As in /v1/completions; offset: characters of the text before this piece."""
    names = [entry["token"] for entry in piece.tokens]
    tops = [
        None if entry["top"] is None else {top["token"]: top["logprob"] for top in entry["top"]}
        for entry in piece.tokens
    ]
    lengths = [0 if name.startswith("bytes:") else len(name) for name in names]
    offsets = list(accumulate(lengths, initial=offset))[: len(names)]
    values = [entry["logprob"] for entry in piece.tokens]
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(piece: Piece) -> dict:
    """As in /v1/chat/completions."""
    content = []
    for entry in piece.tokens:
        token = {"token": entry["token"], "bytes": entry["bytes"], "logprob": entry["logprob"]}
        content.append(token | {"top_logprobs": entry["top"]})
    return {"content": content}
