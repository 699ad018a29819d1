"""The lab in the browser, and an OpenAI-compatible API: watch runs learn, talk to them, look inside them.

    python serve.py                       # prints the address; runs appear by themselves
    python serve.py --models=gpt2         # beside the runs: models of the hub, or folders, joined by commas
    python serve.py --host=0.0.0.0        # for other machines: prints the token that clients must send
    curl http://127.0.0.1:8000/v1/chat/completions -H "content-type: application/json" \\
        -d '{"model": "sft", "messages": [{"role": "user", "content":
             "Anna has 3 nuts. She buys 4 more nuts. How many nuts does she have now?"}]}'

Other programs use a run by base_url="http://127.0.0.1:8000/v1" and any key. Beyond OpenAI's API there are
top_k, min_p and repetition_penalty; calculator (computes the result after `<<9*3=`); verifier (the name of a
verifier run that ranks the n answers); heads_off ([[layer, head], ...] contribute nothing). echo with
logprobs returns exact log-probabilities of the prompt.

The page (web/) uses the same API, and /lab for runs: it reads their folders and keeps nothing itself.
Training is a process of its own and outlives the server. If a client disconnects, its generation stops at
the next token. Requests from pages of other sites are refused.
"""

from support.terminal import run_script

import asyncio
import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from configs import ROOT, check_texts, parse_config

try:
    import uvicorn
    from fastapi import APIRouter, Depends, FastAPI, Query, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import Response, StreamingResponse
    from fastapi.staticfiles import StaticFiles
    from pydantic import BaseModel, Field
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise SystemExit(f'serve.py needs {error.name}: pip install ".[serve]"') from None

import torch

from support.attention import attention_of_text
from support.formats import talk
from support.forms import CONFIGS, configured, form, settings_of
from support.guard import LOOPBACK, Guard, Json, NotFound, Refused, error_response
from support.inside import look_inside
from support.machine import pick_device
from support.openai_api import AnyText, Chat, Completion, Job, check_ids, event
from support.serving import Pool, use_cores
from support.watching import STAGES, compare, describe, named_runs, pause, resume, start, summaries, tail

MOST_STREAMS = 32  # open at a time
FOLDERS = ("tokens", "logs", "stamps", "report", "experiments", "eval")  # in out/, that are no runs


@dataclass
class ServeConfig:
    out: str = "out"  # folder with the runs
    models: str = ""  # more models, joined by commas: folders, or ids on the hub
    host: str = "127.0.0.1"  # address to listen at; any other than this computer's own needs a token
    port: int = 8000  # 0: any that is free
    token: str = ""  # that clients must send; by default none on this computer, else a random one
    allow_training: bool = False  # with another --host: clients with the token may start and pause runs
    device: str = "auto"  # cuda, cpu, ...
    memory: float = 0.0  # GiB for models; 0: half of what is free

    def __post_init__(self):
        if not re.fullmatch("[!-~]*", self.token):  # a header may hold no others
            raise ValueError(f"--token={self.token} must be ASCII letters, digits and signs, without spaces")


class Lab:
    """What the requests share: the folder of runs, models in memory, and the number of open streams."""

    def __init__(self, cfg: ServeConfig):
        self.home = Path(cfg.out)
        self.pool = Pool(self.home, pick_device(cfg.device), cfg.models.replace(",", " ").split(), cfg.memory)
        self.may_train = cfg.host in LOOPBACK or cfg.allow_training
        self.streams = 0
        self.threads = ThreadPoolExecutor(MOST_STREAMS, "generation")
        self.planning = asyncio.Lock()

    def folder(self, name: str) -> Path:
        """The folder of a run; one that failed early has none yet."""
        if name in [run["name"] for run in summaries(self.home)]:
            return self.home / name
        raise NotFound(f"there is no run {name!r} in {self.home}")

    def leave_gpu(self) -> None:
        """Frees its memory for a run."""
        if self.pool.device.type != "cpu":
            self.pool.clear()

    def refuse_if_full(self) -> None:
        if self.streams >= MOST_STREAMS:
            raise Refused(429, f"{MOST_STREAMS} streams are open: close one, or try again later")

    @contextlib.contextmanager
    def stream(self):
        """Counts an open stream."""
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1


def lab_of(request: Request) -> Lab:
    return request.app.state.lab


AnyLab = Annotated[Lab, Depends(lab_of)]


def lab_that_trains(lab: AnyLab) -> Lab:
    if not lab.may_train:
        raise Refused(403, "training from the page is off: start serve.py with --allow_training")
    return lab


TrainingLab = Annotated[Lab, Depends(lab_that_trains)]
router = APIRouter()


# -----------------------------------------------------------------------------
# OpenAI's API


@router.get("/health")
def health(lab: AnyLab):
    return {"status": "ok", "streams": lab.streams}


@router.get("/v1/models")
def list_models(lab: AnyLab):
    verifiers = [run["name"] for run in summaries(lab.home) if run.get("verifier")]
    return {"object": "list", "data": lab.pool.listing(), "verifiers": verifiers}


@router.get("/v1/models/{name:path}")
def one_model(lab: AnyLab, name: str):
    for found in lab.pool.listing():
        if found["id"] == name:
            return found
    raise NotFound(f"there is no model {name!r}: /v1/models lists those that are here")


@router.post("/v1/completions")
async def completions(lab: AnyLab, request: Request, question: Completion):
    return await answer(lab, request, question)


@router.post("/v1/chat/completions")
async def chat_completions(lab: AnyLab, request: Request, question: Chat):
    return await answer(lab, request, question)


async def answer(lab: Lab, request: Request, question: Completion | Chat):
    lab.refuse_if_full()
    job = await run_in_threadpool(Job, lab, question)
    if question.stream:
        return StreamingResponse(job.stream(), media_type="text/event-stream")
    return await job.whole(request)


class TokenizeRequest(BaseModel):
    model: str
    prompt: AnyText


@router.post("/tokenize")
def tokenize(lab: AnyLab, words: TokenizeRequest):
    model = lab.pool.get(words.model)
    ids = model.encode(words.prompt)
    return {"tokens": ids, "count": len(ids), "max_model_len": model.context_length}


class DetokenizeRequest(BaseModel):
    model: str
    tokens: list[int] = Field(max_length=100_000)


@router.post("/detokenize")
def detokenize(lab: AnyLab, words: DetokenizeRequest):
    model = lab.pool.get(words.model)
    check_ids(model, words.tokens)
    return {"prompt": model.tokenizer.decode(words.tokens)}


@router.post("/v1/{rest:path}")
def unknown(rest: str):
    raise Refused(404, f"there is no /v1/{rest} here")


# -----------------------------------------------------------------------------
# The lab: runs

Names = Annotated[list[str], Query()]  # ?runs=base&runs=sft


@router.get("/lab/watch")
async def watch(lab: AnyLab, runs: Names = ()):
    """Server-sent events: "runs" (all summaries); new lines of the chosen runs as "curve" and "samples"."""
    lab.refuse_if_full()
    known = await run_in_threadpool(named_runs, lab.home)
    names = [name for name in runs if name in known][:50]
    return StreamingResponse(watch_events(lab, names), media_type="text/event-stream")


async def watch_events(lab: Lab, names: list[str]) -> AsyncIterator[str]:
    logs = []
    for name in names:
        logs.append((name, "curve", tail(lab.home / name / "metrics.jsonl")))
        logs.append((name, "samples", tail(lab.home / name / "samples.jsonl", 60)))
    known = ""
    with lab.stream():
        while True:
            newest = event(await run_in_threadpool(summaries, lab.home), "runs")
            if newest != known:
                yield newest
            known = newest
            for name, kind, log in logs:
                if news := await run_in_threadpool(next, log):
                    yield event({"run": name, "reset": news[0], "lines": news[1]}, kind)
            await asyncio.sleep(0.5)


@router.get("/lab/run")
def run(lab: AnyLab, name: str):
    return describe(name, lab.folder(name), lab.home)


@router.get("/lab/compare")
def compare_runs(lab: AnyLab, runs: Names):
    return compare({name: lab.folder(name) for name in runs[:50]})


class RunRequest(BaseModel):
    """Body of /lab/plan and /lab/start."""

    stage: Literal[STAGES]
    config: Literal[("", *CONFIGS)] = ""
    name: str = Field("", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$|^$")
    changes: dict[str, bool | int | float | str] = {}

    def argv(self, out: Path) -> list[str]:
        """The command line. Raises ValueError for settings that cannot be changed here."""
        if unknown := self.changes.keys() - settings_of(self.stage):
            raise ValueError(f"{self.stage}.py has no setting {unknown.pop()!r} that can be changed here")
        changes = {"name": self.name} if self.name else {}
        for name, value in configured(self.stage, self.config).items():
            if str(value).startswith("out/"):  # a path in the folder that is served
                changes[name] = out / value.removeprefix("out/")
        check_texts(self.changes, {})
        changes |= self.changes | {"out": out}
        files = [f"configs/{self.config}.py"] if self.config else []
        return files + [f"--{name}={value}" for name, value in changes.items()]


# What reads configs is `async`, to run in one thread: Python 3.11's ast.parse is not safe in several.


@router.get("/lab/forms")
async def show_forms(lab: AnyLab):
    return {"stages": {stage: form(stage) for stage in STAGES}, "allow_training": lab.may_train}


@router.post("/lab/plan")
async def plan(lab: AnyLab, wish: RunRequest):
    """What a run would cost, by lab/plan.py; one at a time."""
    command = [sys.executable, "-m", "lab.plan", f"{wish.stage}.py", *wish.argv(lab.home.resolve())]
    if lab.planning.locked():
        raise Refused(429, "another plan is being computed: try again when it is done")
    async with lab.planning:
        done = await run_in_threadpool(
            subprocess.run,
            command,
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=180,
        )
    return {"ok": done.returncode == 0, "text": done.stdout or done.stderr}


@router.post("/lab/start")
async def start_run(lab: TrainingLab, wish: RunRequest):
    name = wish.name or configured(wish.stage, wish.config)["name"]
    if not name or name in FOLDERS:
        raise ValueError(f"name: give the run a name, and not that of a folder with other things ({name})")
    if name in named_runs(lab.home):
        raise ValueError(f"there is already a run {name!r}: choose another name, or resume that run")
    command = wish.argv(lab.home)
    lab.leave_gpu()
    start(lab.home, name, wish.stage, command)
    return {"name": name}


class RunName(BaseModel):
    name: str


@router.post("/lab/pause")
def pause_run(lab: TrainingLab, run: RunName):
    pause(lab.folder(run.name))
    return {}


@router.post("/lab/resume")
async def resume_run(lab: TrainingLab, run: RunName):
    lab.leave_gpu()
    resume(lab.home, run.name, lab.folder(run.name))
    return {}


# -----------------------------------------------------------------------------
# The lab: look inside


class InspectRequest(BaseModel):
    model: str
    text: AnyText = Field(max_length=100_000)
    chat: bool = False  # the text is a user's turn
    position: int = Field(-1, ge=-1)
    target: int | None = None
    heads_off: list[tuple[int, int]] = []
    layer: int = Field(0, ge=0)

    def ids(self, model) -> list[int]:
        if self.chat:
            return model.conversation(talk(self.text))[0]
        begin = model.start if model.kind == "causal" else model.before
        return [*begin, *model.encode(self.text), *model.behind]


@router.post("/lab/inside")
def inside(lab: AnyLab, look: InspectRequest):
    model = lab.pool.get(look.model)
    if model.kind != "causal":
        raise ValueError(f"{look.model} is not a decoder: only its attention can be shown")
    use_cores(model)
    with lab.pool.turns:
        ids = look.ids(model)
        return look_inside(model, ids, look.position, look.target, look.heads_off, alternatives=50)


@router.post("/lab/attention")
def attention(lab: AnyLab, look: InspectRequest):
    """The weights of one layer on a text, heads x T x T bytes: 255 is a weight of 1."""
    model = lab.pool.get(look.model)
    use_cores(model)
    with lab.pool.turns:
        ids = look.ids(model)
        layers = attention_of_text(model, ids, lambda w: (w * 255).round().to(torch.uint8))
    if look.layer >= len(layers):
        raise ValueError(f"the model has {len(layers)} layers")
    headers = {"X-Tokens": str(len(ids))}
    return Response(layers[look.layer].numpy().tobytes(), 200, headers, "application/octet-stream")


# -----------------------------------------------------------------------------
# The server


def make_app(cfg: ServeConfig) -> FastAPI:
    if cfg.host not in LOOPBACK and not cfg.token:
        cfg.token = secrets.token_urlsafe(24)
    app = FastAPI(title="Modern LLM", docs_url=None, redoc_url=None, default_response_class=Json)
    app.state.lab = Lab(cfg)
    app.include_router(router)
    app.mount("/", StaticFiles(directory=ROOT / "web", html=True))
    app.add_middleware(Guard, host=cfg.host, token=cfg.token)
    for kind in (HTTPException, RequestValidationError, ValueError, OSError, RuntimeError, Exception):
        app.add_exception_handler(kind, error_response)
    return app


def main() -> None:
    cfg = parse_config(ServeConfig, __doc__)
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    try:
        app = make_app(cfg)
        listener = socket.create_server((cfg.host, cfg.port), family=family, backlog=128)
    except (ValueError, OSError, OverflowError) as error:
        raise SystemExit(f"serve.py: cannot serve at {cfg.host}, port {cfg.port}: {error}") from None
    # A connection inherits it. Otherwise a request takes 45 ms instead of 1: asyncio does not set it here.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    print(f"http://{host}:{listener.getsockname()[1]}/" + f"#token={cfg.token}" * bool(cfg.token))
    print(f"shows the runs in {cfg.out}; the API is at /v1. Ctrl-C ends it; training goes on.", flush=True)
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, ws="none")
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        os._exit(130)  # a thread may still load or judge; nothing is lost with it


if __name__ == "__main__":
    run_script(main)
