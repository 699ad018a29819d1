"""Request schemas of OpenAI's API, and its responses, whole or streamed.

Fields and errors are those of vLLM and llama.cpp, with extras: see serve.py.
"""

import asyncio
import contextlib
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Annotated, ClassVar, Literal

from fastapi import Request
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, model_validator

from support.guard import Refused, error_body, to_json
from support.serving import MOST_ROWS, Generation, Piece, Sampling, as_list, prompt_entries, rank_answers
from support.tables import valid
from support.text_model import TextModel

# -----------------------------------------------------------------------------
# Requests


class Question(Sampling):
    """What /v1/completions and /v1/chat/completions have in common. A null counts as absent."""

    model: str
    stream: bool = False
    stream_options: dict = {}
    verifier: str = ""

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given):
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None}

    def echoed(self, model: TextModel, prompts: list[list[int]]) -> Iterable[Piece]:
        """Pieces with the prompts, if they belong to the answer."""
        return ()


def as_prompts(given: object) -> object:
    """One prompt, as a text or as ids, becomes a list of one."""
    if isinstance(given, list) and given and isinstance(given[0], int):
        return [given]
    return as_list(given)


Prompt = str | Annotated[list[int], Field(min_length=1)]


class Completion(Question):
    id_prefix: ClassVar = "cmpl-"
    objects: ClassVar = ("text_completion", "text_completion")  # whole, streamed

    prompt: Annotated[list[Prompt], BeforeValidator(as_prompts), Field(min_length=1, max_length=MOST_ROWS)]
    echo: bool = False
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: str = Field("", max_length=0)

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def prompts(self, model: TextModel) -> list[list[int]]:
        """The ids of each prompt. A text gets the token that begins a document, ids are left as they are."""
        found = []
        for prompt in self.prompt:
            if isinstance(prompt, str):
                prompt = [*(model.bos or [model.eos]), *model.encode(valid(prompt))]
            found.append(prompt)
        return found

    def echoed(self, model: TextModel, prompts: list[list[int]]) -> Iterable[Piece]:
        """Each prompt is the first piece of each of its n rows, without what `prompts` added."""
        for i, ids in enumerate(prompts if self.echo else []):
            added = 0
            if isinstance(self.prompt[i], str):
                added = len(model.bos or [model.eos])
            entries = [] if self.logprobs is None else prompt_entries(model, ids, self.logprobs)
            for row in range(i * self.n, (i + 1) * self.n):
                yield Piece(row, model.tokenizer.decode(ids[added:]), tokens=entries[added:])

    def problem(self) -> tuple[str, str]:
        """(problem, beginning of the answer), for the verifier."""
        if self.echo or len(self.prompt) != 1 or not isinstance(self.prompt[0], str):
            raise ValueError("verifier: give one prompt as a text, without echo")
        return self.prompt[0], ""

    def choice(self, piece: Piece, sent: str | None, streaming: bool) -> dict:
        """The form of a piece; `sent`: the text of its row that was sent before, None if nothing was."""
        found = {"text": piece.text, "logprobs": None}
        if self.logprobs is not None:
            found["logprobs"] = text_logprobs(piece.tokens, len(sent or ""))
        return found


class Part(BaseModel):
    type: Literal["text"]
    text: str


def as_parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


class Message(BaseModel):
    role: str
    content: Annotated[list[Part], BeforeValidator(as_parts)] = []

    def turn(self) -> dict:
        """As a chat template expects it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": valid("".join(part.text for part in self.content))}


class Chat(Question):
    id_prefix: ClassVar = "chatcmpl-"
    objects: ClassVar = ("chat.completion", "chat.completion.chunk")

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(
        None, ge=0, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    continue_final_message: bool = False
    tools: list = Field([], max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] = {}

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def prompts(self, model: TextModel) -> list[list[int]]:
        """The conversation as ids, up to where the assistant goes on."""
        if not model.chat:
            raise ValueError(
                f"{self.model} is not a chat model: use /v1/completions, or a model that sft.py made"
            )
        turns = [message.turn() for message in self.messages]
        if self.continue_final_message != (turns[-1]["role"] == "assistant"):
            raise ValueError(
                "continue_final_message: set it if, and only if, the last message is the assistant's"
            )
        if not self.continue_final_message:
            return [model.conversation(turns)[0]]
        *before, last = turns
        return [model.conversation(before)[0] + model.encode(last["content"])]

    def problem(self) -> tuple[str, str]:
        turns = [message.turn() for message in self.messages]
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        if not asked:
            raise ValueError("verifier: no user message has a problem")
        begun = turns[-1]["content"] if self.continue_final_message else ""
        return asked[-1], begun

    def choice(self, piece: Piece, sent: str | None, streaming: bool) -> dict:
        message = {"content": piece.text}
        if sent is None:
            message["role"] = "assistant"
        logprobs = {"content": piece.tokens} if self.logprobs else None
        return {"delta" if streaming else "message": message, "logprobs": logprobs}


# -----------------------------------------------------------------------------
# Responses


class Job:
    """A request whose model, prompts and limits have been checked: computes the answer, and sends it."""

    def __init__(self, lab, question: Completion | Chat):
        self.lab = lab
        self.model = lab.pool.get(question.model)
        if self.model.kind != "causal":
            raise ValueError(f"{question.model} is not a decoder (kind: {self.model.kind})")
        if question.heads_off and not self.model.ours:
            raise ValueError("heads_off is for models that model.py computes")
        self.prompts = question.prompts(self.model)
        known = self.model.model.config.vocab_size
        for ids in [*self.prompts, question.logit_bias]:
            if not all(0 <= i < known for i in ids):
                raise ValueError(f"token ids must be from 0 to {known - 1}")
        self.n_rows = len(self.prompts) * question.n
        if self.n_rows > MOST_ROWS:
            raise ValueError(f"at most {MOST_ROWS} texts at a time: prompts times n")
        most = self.model.context_length
        longest = max(map(len, self.prompts))
        new = max(1, most - longest) if question.max_tokens is None else question.max_tokens
        if longest + new > most:
            words = f"this model's context length is {most} tokens; you asked for {longest + new}"
            words += f" ({longest} in the prompt, {new} to be generated)"
            raise Refused(400, words, "context_length_exceeded")
        self.question = question.model_copy(update={"max_tokens": new})
        self.verifier = self.problem = None
        if question.verifier:
            self.verifier = lab.pool.verifier(question.verifier, self.model)
            self.problem = question.problem()
        name = question.id_prefix + uuid.uuid4().hex
        self.head = {"id": name, "created": int(time.time()), "model": question.model}
        self.usage = self.verdict = None  # known when the answer is complete

    # ---- computing, in a thread

    def compute(self, emit: Callable[[Piece], None], gone: threading.Event) -> None:
        turns = self.lab.pool.turns
        with turns:
            for piece in self.question.echoed(self.model, self.prompts):
                emit(piece)
                turns.hand_on()
                if gone.is_set():
                    return
        rows = Generation(self.model, self.prompts, self.question, emit, gone, turns).run()
        asked = sum(map(len, self.prompts))
        new = sum(len(row.ids) for row in rows)
        self.usage = {"prompt_tokens": asked, "completion_tokens": new, "total_tokens": asked + new}
        if self.verifier is None or gone.is_set():
            return
        how = self.question.model_copy(update={"n": 1, "temperature": 0.0, "logprobs": None})
        rows += Generation(self.model, self.prompts, how, lambda _: None, gone, turns).run()
        problem, begun = self.problem
        *answers, greedy = (begun + row.text for row in rows)
        with turns:
            self.verdict = rank_answers(self.verifier, problem, answers, greedy)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What is new, every hundredth of a second. Leaving the loop stops the computation."""
        news: deque[Piece] = deque()
        gone = threading.Event()
        with self.lab.stream():
            loop = asyncio.get_running_loop()
            done = loop.run_in_executor(self.lab.threads, self.compute, news.append, gone)
            try:
                while not done.done() or news:
                    yield merged(news)
                    await asyncio.wait([done], timeout=0.01)
                await done
            finally:
                gone.set()

    # ---- sending

    def choice(self, piece: Piece, sent: str | None, streaming: bool) -> dict:
        found = {"index": piece.row, "finish_reason": piece.finish, "calculator": piece.calculator}
        return found | self.question.choice(piece, sent, streaming)

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = self.head | {"object": self.question.objects[1], "choices": []}
        sent: list[str | None] = [None] * self.n_rows
        try:
            async with contextlib.aclosing(self.pieces()) as news:
                async for pieces in news:
                    for piece in pieces:
                        before = sent[piece.row]
                        sent[piece.row] = (before or "") + piece.text
                        yield event(head | {"choices": [self.choice(piece, before, True)]})
            if self.verdict:
                yield event(head | {"verdict": self.verdict})
            if self.question.stream_options.get("include_usage"):
                yield event(head | {"usage": self.usage})
        except Exception as error:  # the response has begun, so the error is sent as an event
            yield event(error_body(error)[1])
        yield "data: [DONE]\n\n"

    async def whole(self, request: Request) -> dict:
        """The answer in one piece; with a verifier, the best choice first."""
        rows = [Piece(r) for r in range(self.n_rows)]
        async with contextlib.aclosing(self.pieces()) as news:
            async for pieces in news:
                for piece in pieces:
                    rows[piece.row].add(piece)
                if await request.is_disconnected():
                    break
        choices = [self.choice(row, None, False) for row in rows]
        found = self.head | {"object": self.question.objects[0], "usage": self.usage}
        if self.verdict:
            found["verdict"] = self.verdict
            choices = [choices[answer["index"]] for answer in self.verdict["answers"]]
        return found | {"choices": choices}


def merged(news: deque[Piece]) -> list[Piece]:
    """Takes the pieces that are there; those of one row and one author become one."""
    found: list[Piece] = []
    newest: dict[int, Piece] = {}
    while news:
        piece = news.popleft()
        before = newest.get(piece.row)
        if before and before.calculator == piece.calculator:
            before.add(piece)
        else:
            found.append(piece)
            newest[piece.row] = piece
    return found


def event(data, name: str = "") -> str:
    """A server-sent event."""
    begin = f"event: {name}\n" if name else ""
    return f"{begin}data: {to_json(data)}\n\n"


def text_logprobs(entries: list[dict], offset: int) -> dict:
    """As in /v1/completions; offset: characters of the text before."""
    found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        name, top = entry["token"], entry["top_logprobs"]
        if top is not None:
            top = {one["token"]: one["logprob"] for one in top}
        found["tokens"].append(name)
        found["token_logprobs"].append(entry["logprob"])
        found["top_logprobs"].append(top)
        found["text_offset"].append(offset)
        offset += 0 if name.startswith("bytes:") else len(name)
    return found
