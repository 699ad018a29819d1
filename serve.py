"""The lab in the browser, and an OpenAI-compatible API: watch runs learn, talk to them, look inside them.

    python serve.py                       # prints the address; runs appear by themselves
    python serve.py --models=gpt2         # beside the runs: models of the hub, or folders, joined by commas
    python serve.py --host=0.0.0.0        # for other machines: prints the token that clients must send
    curl http://127.0.0.1:8000/v1/chat/completions -H "content-type: application/json" \\
        -d '{"model": "sft", "messages": [{"role": "user", "content": "Tell me a story about a cat."}]}'

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
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from configs import ROOT, parse_config, read_file

try:
    import uvicorn
    from fastapi import APIRouter, FastAPI, Query, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from fastapi.staticfiles import StaticFiles
    from pydantic import BaseModel, Field
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise SystemExit(f'serve.py needs {error.name}: pip install ".[serve]"') from None

import torch

from support.attention import attention_weights
from support.forms import config_class, forms
from support.guard import LOOPBACK, Guard, explained
from support.inside import check_length, look_inside
from support.machine import pick_device
from support.openai_api import Chat, Completion, Job, event
from support.serving import Pool, use_cores
from support.tables import valid
from support.watching import (
    NotFound,
    Tail,
    Watch,
    compare,
    describe,
    finite,
    named_runs,
    pause,
    resume,
    start,
)

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


class Lab:
    """What the requests share: models in memory, the state of runs, and the streams that are open."""

    def __init__(self, cfg: ServeConfig):
        self.cfg, self.home = cfg, Path(cfg.out)
        others = tuple(name.strip() for name in cfg.models.split(",") if name.strip())
        self.pool = Pool(self.home, pick_device(cfg.device), others, cfg.memory)
        self.watch, self.guard, self.planning = Watch(self.home), threading.Lock(), threading.Lock()
        self.threads = ThreadPoolExecutor(MOST_STREAMS, "generation")
        self.plan: subprocess.Popen | None = None
        self.streams: set[threading.Event] = set()  # one each; set when its client has disconnected
        self.training = cfg.host in LOOPBACK or cfg.allow_training

    def folder(self, name: str) -> Path:
        found = named_runs(self.home).get(name)
        if found is None:
            raise NotFound(f"there is no run {name!r} in {self.home}")
        return found

    def summaries(self) -> list[dict]:
        with self.guard:
            return self.watch.summaries()

    def refuse_if_full(self) -> None:
        if len(self.streams) >= MOST_STREAMS:
            raise HTTPException(429, f"{MOST_STREAMS} streams are open: close one, or try again later")

    @contextlib.contextmanager
    def stream(self, gone: threading.Event):
        """Counts an open stream. Raises HTTPException 429 if there are too many."""
        self.refuse_if_full()
        self.streams.add(gone)
        try:
            yield
        finally:
            self.streams.discard(gone)

    def close(self) -> None:
        """Ends all streams and plans. Training goes on."""
        for gone in list(self.streams):
            gone.set()
        if self.plan:
            self.plan.kill()


# -----------------------------------------------------------------------------
# OpenAI's API

router = APIRouter()


@router.get("/health")
def health(request: Request) -> dict:
    return {"status": "ok", "streams": len(request.app.state.lab.streams)}


@router.get("/v1/models")
def list_models(request: Request) -> dict:
    pool = request.app.state.lab.pool
    found = []
    for about in pool.listing():
        meta = {k: v for k, v in about.items() if k not in ("id", "created", "folder")}
        one = {"id": about["id"], "object": "model", "created": about["created"], "owned_by": "modern-llm"}
        found.append(one | {"meta": meta})
    verifiers = [run["name"] for run in request.app.state.lab.summaries() if run.get("verifier")]
    return {"object": "list", "data": found, "verifiers": verifiers}


@router.get("/v1/models/{name:path}")
def one_model(request: Request, name: str) -> dict:
    for found in list_models(request)["data"]:
        if found["id"] == name:
            return found
    raise NotFound(f"there is no model {name!r}: /v1/models lists those that are here")


@router.post("/v1/completions")
async def completions(request: Request, question: Completion):
    return await answer(request, question)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, question: Chat):
    return await answer(request, question)


async def answer(request: Request, question: Completion | Chat):
    request.app.state.lab.refuse_if_full()
    job = await run_in_threadpool(Job, request.app.state.lab, question)
    if question.stream:
        return StreamingResponse(job.stream(), media_type="text/event-stream")
    return await job.whole(request)


@router.api_route("/v1/{path:path}", methods=["GET", "POST"])
def nowhere(path: str):
    raise NotFound(f"there is no /v1/{path}")


class TokenizeRequest(BaseModel):
    model: str
    prompt: str = ""
    content: str = ""  # as llama.cpp calls it
    tokens: list[int] = []


@router.post("/tokenize")
def tokenize(request: Request, words: TokenizeRequest) -> dict:
    model = request.app.state.lab.pool.get(words.model)
    ids = model.encode(valid(words.prompt or words.content))
    return {"tokens": ids, "count": len(ids), "max_model_len": model.context_length}


@router.post("/detokenize")
def detokenize(request: Request, words: TokenizeRequest) -> dict:
    text = request.app.state.lab.pool.get(words.model).tokenizer.decode(words.tokens)
    return {"prompt": text, "content": text}


# -----------------------------------------------------------------------------
# The lab: runs


Names = Annotated[list[str], Query()]  # ?runs=base&runs=sft


@router.get("/lab/watch")
async def watch(request: Request, runs: Names = ()):
    """Server-sent events: "runs" (all summaries); new lines of the chosen runs as "curve" and "samples"."""
    lab = request.app.state.lab
    lab.refuse_if_full()
    known = await run_in_threadpool(named_runs, lab.home)
    names = [name for name in runs if name in known][:50]
    return StreamingResponse(watch_events(lab, names), media_type="text/event-stream")


async def watch_events(lab: Lab, names: list[str]) -> AsyncIterator[str]:
    logs = []
    for name in names:
        logs.append((name, "curve", Tail(lab.home / name / "metrics.jsonl")))
        logs.append((name, "samples", Tail(lab.home / name / "samples.jsonl", 60)))
    before, idle, gone = None, 0, threading.Event()
    with lab.stream(gone):
        while not gone.is_set():
            summaries = await run_in_threadpool(lab.summaries)
            events = [event(summaries, "runs")] if summaries != before else []
            before = summaries
            for name, kind, log in logs:
                if news := await run_in_threadpool(log.news):
                    events.append(event({"run": name, "reset": news[0], "lines": news[1]}, kind))
            idle = 0 if events else idle + 1
            if idle == 30:  # 15 s without news: a comment keeps the connection open
                events, idle = [": nothing new\n\n"], 0
            for text in events:
                yield text
            await asyncio.sleep(0.5)


@router.get("/lab/run")
def run(request: Request, name: str) -> dict:
    lab = request.app.state.lab
    known = any(run["name"] == name for run in lab.summaries())  # one that failed early has no folder yet
    return describe(name, lab.home / name if known else lab.folder(name), lab.home)


@router.get("/lab/compare")
def compare_runs(request: Request, runs: Names) -> dict:
    return compare(runs, [request.app.state.lab.folder(name) for name in runs[:50]])


class RunRequest(BaseModel):
    """Body of /lab/plan and /lab/start."""

    stage: Literal["train", "finetune", "sft", "dpo", "verifier"]
    config: str = Field("", pattern=r"^[A-Za-z0-9_]*$")
    name: str = Field("", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$|^$")
    changes: dict[str, bool | int | float | str] = {}

    def settings(self) -> dict:
        """The stage's defaults, then the values of the config file."""
        defaults = {field.name: field.default for field in fields(config_class(self.stage))}
        return defaults | (show_config(self.stage, self.config) if self.config else {})

    def argv(self, out: Path) -> list[str]:
        """The command line. Raises ValueError for settings that the stage does not have."""
        unknown = [name for name in self.changes if name not in forms()[self.stage]["names"]]
        if unknown:
            raise ValueError(f"{self.stage}.py has no setting {unknown[0]!r} that can be changed here")
        files = [f"configs/{self.config}.py"] if self.config else []
        changes = in_folder(self.settings(), out) | self.changes
        flags = [f"--{name}={value}" for name, value in changes.items()]
        return [*files, *flags, *([f"--name={self.name}"] if self.name else []), f"--out={out}"]


def in_folder(settings: dict, out: Path) -> dict:
    """Settings whose value is a path in out/, rewritten to the folder that is served."""
    named = {name: value for name, value in settings.items() if str(value).startswith("out/")}
    return {name: str(out / value.removeprefix("out/")) for name, value in named.items() if str(out) != "out"}


class RunName(BaseModel):
    name: str


@router.get("/lab/forms")
def show_forms(request: Request) -> dict:
    lab = request.app.state.lab
    return {"stages": forms(), "allow_training": lab.training}


reading = threading.Lock()  # Python 3.11's ast.parse is not safe in several threads


@router.get("/lab/config")
def show_config(stage: Literal["train", "finetune", "sft", "dpo", "verifier"], config: str) -> dict:
    if config not in forms()[stage]["configs"]:
        raise NotFound(f"there is no config {config!r} of {stage}.py")
    Config = config_class(stage)
    defaults = {field.name: field.default for field in fields(Config)}
    with reading:
        found = read_file(ROOT / f"configs/{config}.py", defaults, Config)
    return {name: value for name, value in found.items() if name in defaults and value != defaults[name]}


@router.post("/lab/plan")
def plan(request: Request, wish: RunRequest) -> dict:
    """What a run would cost, by plan.py; one at a time."""
    lab = request.app.state.lab
    command = [sys.executable, str(ROOT / "plan.py"), f"{wish.stage}.py", *wish.argv(lab.home)]
    if not lab.planning.acquire(blocking=False):
        raise HTTPException(429, "another plan is being computed: try again when it is done")
    try:
        pipe = subprocess.PIPE
        lab.plan = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
        said, errors = lab.plan.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        lab.plan.kill()
        return {"ok": False, "text": "planning took longer than three minutes"}
    finally:
        lab.planning.release()
    return {"ok": lab.plan.returncode == 0, "text": said or errors}


@router.post("/lab/start")
def start_run(request: Request, wish: RunRequest) -> dict:
    lab = lab_with_training(request)
    name = wish.name or wish.settings()["name"]
    if not name:
        raise ValueError("name: give the run a name")
    if name in FOLDERS:
        raise ValueError(f"{name} is the name of a folder with other things: choose another name")
    if name in named_runs(lab.home):
        raise ValueError(f"there is already a run {name!r}: choose another name, or resume that run")
    if lab.pool.device.type != "cpu":
        lab.pool.clear()  # frees GPU memory for the run
    start(lab.home, name, wish.stage, wish.argv(lab.home))
    return {"name": name}


@router.post("/lab/pause")
def pause_run(request: Request, named: RunName) -> dict:
    pause(lab_with_training(request).folder(named.name))
    return {}


@router.post("/lab/resume")
def resume_run(request: Request, named: RunName) -> dict:
    lab = lab_with_training(request)
    resume(lab.home, named.name, lab.folder(named.name))
    return {}


def lab_with_training(request: Request) -> Lab:
    """The lab, if training may be started and stopped from here."""
    lab = request.app.state.lab
    if not lab.training:
        raise HTTPException(403, "training from the page is off: start serve.py with --allow_training")
    return lab


# -----------------------------------------------------------------------------
# The lab: look inside


class InspectRequest(BaseModel):
    model: str
    text: str = Field(max_length=100_000)
    chat: bool = False  # the text is a user's turn
    position: int = Field(-1, ge=-1)
    target: int | None = None
    heads_off: list[tuple[int, int]] = []
    alternatives: int = Field(10, ge=1, le=50)
    layer: int = Field(0, ge=0)

    def ids(self, model) -> list[int]:
        if self.chat:
            return model.conversation([{"role": "user", "content": valid(self.text)}])[0]
        begin = model.before or ([model.eos] if model.kind == "causal" else [])
        return [*begin, *model.encode(valid(self.text)), *model.behind]


@router.post("/lab/inside")
def inside(request: Request, look: InspectRequest) -> dict:
    pool = request.app.state.lab.pool
    model = pool.get(look.model)
    if model.kind != "causal":
        raise ValueError(f"{look.model} is not a decoder: only its attention can be shown")
    use_cores(model)
    with pool.turns:
        found = look_inside(
            model, look.ids(model), look.position, look.target, look.heads_off, look.alternatives
        )
    return finite(found)


@router.post("/lab/attention")
def attention(request: Request, look: InspectRequest) -> Response:
    """The weights of one layer on a text, heads x T x T bytes: 255 is a weight of 1."""
    pool = request.app.state.lab.pool
    model = pool.get(look.model)
    ids = look.ids(model)
    check_length(model, ids)
    use_cores(model)
    with pool.turns:
        given = torch.tensor([ids], device=model.device)
        layers = attention_weights(model.model, given, lambda w: (w * 255).round().to(torch.uint8))
    if look.layer >= len(layers):
        raise ValueError(f"the model has {len(layers)} layers")
    weights = layers[look.layer, 0]
    about = {"X-Heads": str(len(weights)), "X-Tokens": str(len(ids)), "X-Layers": str(len(layers))}
    return Response(weights.numpy().tobytes(), media_type="application/octet-stream", headers=about)


# -----------------------------------------------------------------------------
# The server


def make_app(cfg: ServeConfig) -> FastAPI:
    if cfg.host not in LOOPBACK and not cfg.token:
        cfg.token = secrets.token_urlsafe(24)
    lab = Lab(cfg)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        lab.close()

    app = FastAPI(
        title="Modern LLM", lifespan=lifespan, docs_url=None, redoc_url=None
    )  # they load from the web
    app.state.lab = lab
    app.include_router(router)
    app.mount("/", StaticFiles(directory=ROOT / "web", html=True))
    app.add_middleware(Guard, host=cfg.host, token=cfg.token)

    async def explain(_, error: Exception) -> JSONResponse:
        return explained(error)

    for kind in (HTTPException, RequestValidationError, ValueError, OSError, RuntimeError, Exception):
        app.add_exception_handler(kind, explain)
    return app


def main() -> None:
    cfg = parse_config(ServeConfig, __doc__)
    try:
        app = make_app(cfg)
        listener = listen(cfg.host, cfg.port)
    except (ValueError, OSError, OverflowError) as error:
        raise SystemExit(f"serve.py: cannot serve at {cfg.host}, port {cfg.port}: {error}") from None
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    address = f"http://{host}:{listener.getsockname()[1]}/" + f"#token={cfg.token}" * bool(cfg.token)
    print(
        f"{address}\nshows the runs in {cfg.out}; the API is at /v1. Ctrl-C ends it; training goes on.",
        flush=True,
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    handle_exit = server.handle_exit

    def close_first(number: int, frame) -> None:
        app.state.lab.close()
        handle_exit(number, frame)

    server.handle_exit = close_first
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        os._exit(130)  # a thread may still load or judge; nothing is lost with it


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Its protocol is named, or asyncio sets no TCP_NODELAY: 45 ms a request, not 1."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(128)
    return listener


if __name__ == "__main__":
    run_script(main)
