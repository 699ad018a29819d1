"""Request schemas of OpenAI's API, and its responses, whole or streamed.

Fields and errors are those of vLLM and llama.cpp, with extras: see serve.py.
"""

import asyncio
import contextlib
import secrets
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, ClassVar, Literal

from fastapi import Request
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from support.guard import Refused, error_body, to_json
from support.serving import Piece, Row, characters, generate, prompt_entries, rank_answers
from support.tables import valid
from support.text_model import TextModel

MOST_ROWS = 64  # texts that one request generates

# -----------------------------------------------------------------------------
# Requests


def as_list(given: object) -> object:
    return [given] if isinstance(given, str) else given


def as_valid(given: object) -> object:
    """A text without lone surrogates: JSON allows them, UTF-8 does not."""
    return valid(given) if isinstance(given, str) else given


AnyText = Annotated[str, BeforeValidator(as_valid)]
StopString = Annotated[str, Field(min_length=1, max_length=1000), BeforeValidator(as_valid)]


class Question(BaseModel):
    """What both kinds of requests have in common. A null counts as absent."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str
    stream: bool = False
    stream_options: dict = {}
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=10**9), AfterValidator(lambda k: max(0, k))] = 0
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)  # taken from the logit of a token that was generated
    frequency_penalty: float = Field(0.0, ge=-2, le=2)  # the same, times how often it was
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    n: int = Field(1, ge=1, le=MOST_ROWS)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(lambda seed: seed % 2**31)] = Field(
        default_factory=lambda: secrets.randbelow(2**31)
    )
    # A text ends before the first of these.
    stop: Annotated[list[StopString], Field(max_length=16), BeforeValidator(as_list)] = []
    calculator: bool = False  # what follows `<<9*3=` is computed
    verifier: str = ""  # a run that ranks the n answers
    heads_off: list[tuple[int, int]] = []  # (layer, head) that contribute nothing

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given):
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None}


def as_prompts(given: object) -> object:
    """One prompt, as a text or as ids, becomes a list of one."""
    if isinstance(given, list) and given and isinstance(given[0], int):
        return [given]
    return as_list(given)


Prompt = AnyText | Annotated[list[int], Field(min_length=1)]


class Completion(Question):
    id_prefix: ClassVar = "cmpl-"
    objects: ClassVar = ("text_completion", "text_completion")  # whole, streamed

    prompt: Annotated[list[Prompt], BeforeValidator(as_prompts), Field(min_length=1, max_length=MOST_ROWS)]
    echo: bool = False
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    # What we cannot do is refused, not ignored.
    suffix: str = Field("", max_length=0)
    best_of: int = Field(1, le=1)

    @property
    def alternatives(self) -> int | None:
        """Log-probabilities are wanted, of each token and of so many likeliest ones; None: they are not."""
        return self.logprobs

    def prompts(self, model: TextModel) -> list[list[int]]:
        """The ids of each prompt. A text gets the token that begins a document, ids are left as they are."""
        return [p if isinstance(p, list) else model.start + model.encode(p) for p in self.prompt]

    def begin(self, model: TextModel, i: int, ids: list[int]) -> tuple[str, list[dict]]:
        """The text with which the answers to prompt i begin, by echo the prompt; its log-probabilities."""
        if not self.echo:
            return "", []
        entries = [] if self.logprobs is None else prompt_entries(model, ids, self.logprobs)
        if isinstance(self.prompt[i], str):
            return self.prompt[i], entries[len(model.start) :]
        return model.tokenizer.decode(ids), entries

    def problem(self) -> tuple[str, str]:
        """(problem, beginning of the answer), for the verifier."""
        if self.echo or len(self.prompt) != 1 or not isinstance(self.prompt[0], str):
            raise ValueError("verifier: give one prompt as a text, without echo")
        return self.prompt[0], ""

    def form(self, piece: Piece, streaming: bool) -> dict:
        return {
            "text": piece.text,
            "logprobs": None if self.logprobs is None else text_logprobs(piece.tokens, piece.offset),
        }


def text_logprobs(entries: list[dict], offset: int) -> dict:
    """offset: characters of the text before the first token."""
    found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        top = entry["top_logprobs"]
        found["tokens"].append(entry["token"])
        found["text_offset"].append(offset)
        offset += characters(entry)
        found["token_logprobs"].append(entry["logprob"])
        found["top_logprobs"].append(top if top is None else {x["token"]: x["logprob"] for x in top})
    return found


class Part(BaseModel):
    type: Literal["text"]
    text: AnyText


def as_parts(content: object) -> object:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    role: str
    content: Annotated[list[Part], BeforeValidator(as_parts)] = []
    tool_calls: list | None = Field(None, max_length=0)

    def turn(self) -> dict:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class Chat(Question):
    id_prefix: ClassVar = "chatcmpl-"
    objects: ClassVar = ("chat.completion", "chat.completion.chunk")

    # As turns, in the form that a chat template expects.
    messages: list[Annotated[Message, AfterValidator(Message.turn)]] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(
        None, ge=0, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    continue_final_message: bool = False
    # What we cannot do is refused, not ignored.
    tools: list = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    functions: list = Field([], max_length=0)
    modalities: list[Literal["text"]] = []
    response_format: dict[Literal["type"], Literal["text"]] = {}

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def prompts(self, model: TextModel) -> list[list[int]]:
        """The conversation as ids, up to where the assistant goes on."""
        if not model.chat:
            raise ValueError(f"{self.model} is not a chat model: use /v1/completions, or a run of sft.py")
        *before, last = self.messages
        if self.continue_final_message != (last["role"] == "assistant"):
            raise ValueError(
                "set continue_final_message if, and only if, the last message is the assistant's"
            )
        if self.continue_final_message:
            return [model.conversation(before)[0] + model.encode(last["content"])]
        return [model.conversation(self.messages)[0]]

    def begin(self, *_) -> tuple[str, list[dict]]:
        return "", []

    def problem(self) -> tuple[str, str]:
        asked = [turn["content"] for turn in self.messages if turn["role"] == "user"]
        if not asked:
            raise ValueError("verifier: no user message has a problem")
        return asked[-1], self.messages[-1]["content"] if self.continue_final_message else ""

    def form(self, piece: Piece, streaming: bool) -> dict:
        logprobs = {"content": piece.tokens} if self.logprobs else None
        if streaming:
            return {"delta": {"content": piece.text}, "logprobs": logprobs}
        return {"message": {"role": "assistant", "content": piece.text}, "logprobs": logprobs}


# -----------------------------------------------------------------------------
# Responses


def check_ids(model: TextModel, ids: Iterable[int]) -> None:
    known = model.model.config.vocab_size
    if not all(0 <= i < known for i in ids):
        raise ValueError(f"token ids must be from 0 to {known - 1}")


class Job:
    """A request whose model, prompts and limits have been checked: computes the answer, and sends it."""

    def __init__(self, lab, question: Completion | Chat):
        model = lab.pool.get(question.model)
        if model.kind != "causal":
            raise ValueError(f"{question.model} is not a decoder (kind: {model.kind})")
        prompts = question.prompts(model)
        for ids in [*prompts, question.logit_bias]:
            check_ids(model, ids)
        if len(prompts) * question.n > MOST_ROWS:
            raise ValueError(f"at most {MOST_ROWS} texts at a time: prompts times n")
        most = model.context_length
        longest = max(map(len, prompts))
        new = max(1, most - longest) if question.max_tokens is None else question.max_tokens
        if longest + new > most:
            words = f"this model's context length is {most} tokens; you asked for {longest + new}"
            words += f" ({longest} in the prompt, {new} to be generated)"
            raise Refused(400, words, "context_length_exceeded")
        self.lab = lab
        self.model = model
        self.prompts = prompts
        self.question = question.model_copy(update={"max_tokens": new})
        self.verifier = None
        if question.verifier:
            self.verifier = lab.pool.verifier(question.verifier)
            self.problem = question.problem()
        self.rows: list[Row] = []
        self.gone = threading.Event()  # the client is
        self.head = {
            "id": question.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": question.model,
        }
        self.usage = self.verdict = None  # known when the answer is complete

    # ---- computing, in a thread

    def compute(self) -> None:
        turns = self.lab.pool.turns
        rows = []
        for i, ids in enumerate(self.prompts):
            if self.gone.is_set():
                return
            with turns:
                begin = self.question.begin(self.model, i, ids)
            rows += [Row(self.question.stop, *begin) for _ in range(self.question.n)]
        self.rows = rows
        generate(self.model, self.prompts, self.question, rows, self.gone, turns)
        asked = sum(map(len, self.prompts))
        new = sum(len(row.ids) for row in rows)
        self.usage = {"prompt_tokens": asked, "completion_tokens": new, "total_tokens": asked + new}
        if self.verifier is None or self.gone.is_set():
            return
        greedy = Row(self.question.stop)
        how = self.question.model_copy(update={"n": 1, "temperature": 0.0, "logprobs": None})
        generate(self.model, self.prompts, how, [greedy], self.gone, turns)
        problem, begun = self.problem
        answers = [begun + row.text for row in rows]
        with turns:
            self.verdict = rank_answers(self.verifier, problem, answers, begun + greedy.text)

    async def ticks(self) -> AsyncIterator[None]:
        """Computes; yields every hundredth of a second. Leaving the loop stops the computation."""
        with self.lab.stream():
            done = asyncio.get_running_loop().run_in_executor(self.lab.threads, self.compute)
            try:
                while not done.done():
                    await asyncio.wait([done], timeout=0.01)
                    yield
                yield  # it may have ended while the reader was busy
                await done  # raises what it raised
            finally:
                self.gone.set()

    # ---- sending

    def choice(self, index: int, piece: Piece, streaming: bool) -> dict:
        found = {"index": index, "finish_reason": piece.finish, "calculator": piece.calculator}
        return found | self.question.form(piece, streaming)

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = self.head | {"object": self.question.objects[1], "choices": []}
        if isinstance(self.question, Chat):
            for index in range(self.question.n):
                delta = {"role": "assistant", "content": ""}
                yield event(head | {"choices": [{"index": index, "delta": delta, "finish_reason": None}]})
        try:
            async with contextlib.aclosing(self.ticks()) as ticks:
                async for _ in ticks:
                    for index, row in enumerate(self.rows):
                        for piece in row.take():
                            yield event(head | {"choices": [self.choice(index, piece, True)]})
            if self.verdict:
                yield event(head | {"verdict": self.verdict})
            if self.question.stream_options.get("include_usage"):
                yield event(head | {"usage": self.usage})
        except Exception as error:  # the response has begun, so the error is sent as an event
            yield event(error_body(error)[1])
        yield "data: [DONE]\n\n"

    async def whole(self, request: Request) -> dict:
        """The answer in one piece; with a verifier, the best choice first."""
        async with contextlib.aclosing(self.ticks()) as ticks:
            async for _ in ticks:
                if await request.is_disconnected():
                    break
        choices = []
        for index, row in enumerate(self.rows):
            piece = Piece(row.text, tokens=row.tokens, finish=row.finish)
            choices.append(self.choice(index, piece, False))
        found = self.head | {"object": self.question.objects[0], "usage": self.usage}
        if self.verdict:
            found["verdict"] = self.verdict
            choices = [choices[answer["index"]] for answer in self.verdict["answers"]]
        return found | {"choices": choices}


def event(data, name: str = "") -> str:
    """A server-sent event."""
    begin = f"event: {name}\n" if name else ""
    return f"{begin}data: {to_json(data)}\n\n"
