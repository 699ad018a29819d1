"""What several test files share."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    """The rehearsal takes longest: of several processes one begins with it."""
    items.sort(key=lambda item: item.path.name != "test_rehearsal.py")


def wait_until(done, seconds: float = 120):
    """What done() returns, as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def one_thread():
    """For models too small to be worth waking a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(step, stage, cfg): the stage ends before that step and writes nothing more, as by kill -9."""

    def run(last: int, stage: Callable, cfg) -> None:
        import train

        class Killed(BaseException):
            pass

        def get_lr(step: int, *settings) -> float:
            if step == last:
                raise Killed
            return schedule(step, *settings)

        schedule = train.get_lr
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train, "get_lr", get_lr)
            stage(cfg)

    return run


@pytest.fixture
def data_dir(monkeypatch):
    """data_dir(folder): data sets are looked for in this folder."""
    from data import load_task

    def choose(folder) -> None:
        monkeypatch.setenv("DATA_DIR", str(folder))
        load_task.cache_clear()

    yield choose
    load_task.cache_clear()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, str]:
    """A small run of ours with chat tokens, and a GPT-2 of transformers that shares its vocabulary."""
    import torch
    import transformers

    from data import load_conversations
    from model import ModelConfig, ModernDecoderLM
    from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

    folder = tmp_path_factory.mktemp("tiny")
    names = ("arithmetic", "instructions")
    texts = [m["content"] for n in names for chat in load_conversations(n, "train")[0][:300] for m in chat]
    tokenizer = Tokenizer(*train_bpe(texts, 400, SPECIAL_TOKENS, split_digits=True), SPECIAL_TOKENS)
    torch.manual_seed(0)
    config = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, context_length=160, vocab_size=400)
    eot = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    ModernDecoderLM(config).save_pretrained(folder / "base", **eot)
    gpt2 = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=160, vocab_size=400, **eot)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    for name in ("base", "gpt2"):
        tokenizer.save(folder / name)
    return {name: str(folder / name) for name in ("base", "gpt2")}


def made_once(factory: pytest.TempPathFactory, name: str, make) -> Path:
    """A folder that make(folder) fills once, also where several processes run the tests: each gets a copy."""
    import fcntl

    mine = factory.getbasetemp()
    session = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine
    folder, done = session / f"once-{name}", session / f"once-{name}.done"
    with open(session / f"once-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not done.exists():
            make(folder)
            done.touch()
    return folder if session == mine else shutil.copytree(folder, mine / f"once-{name}")


@pytest.fixture(scope="session")
def tuned(tiny, tmp_path_factory) -> str:
    """A run that was taught word problems: it knows the form of an answer, and rarely the right one."""
    import torch

    torch.set_num_threads(1)
    return str(made_once(tmp_path_factory, "tuned", partial(train_tuned, tiny["base"])) / "sft")


def train_tuned(base: str, out: Path) -> None:
    import sft

    how = dict(device="cpu", dtype="float32", batch_size=8, max_steps=150, learning_rate=1e-2)
    how |= dict(warmup_steps=10, eval_examples=20, eval_every=0)
    sft.sft(sft.SFTConfig(model=base, out=str(out), name="sft", data="arithmetic", **how))


@pytest.fixture(scope="session")
def lab_home(tiny, tuned, tmp_path_factory):
    """A folder as `out`: tokens, a base that was trained for some steps, sft, its verifier, and a GPT-2."""
    return made_once(tmp_path_factory, "lab", partial(train_lab, tiny, tuned))


def train_lab(tiny: dict[str, str], tuned: str, home: Path) -> None:
    from tasks.stories import storyworld
    from tokenizer import Tokenizer, write_tokens
    from train import TrainConfig, pretrain
    from verifier import VerifierConfig, train_verifier

    shutil.copytree(tuned, home / "sft")
    shutil.copytree(tiny["gpt2"], home / "models" / "gpt2")
    tokenizer, tokens = Tokenizer.load(tiny["base"]), home / "tokens"
    tokenizer.save(tokens)
    for split, n in (("train", 60), ("validation", 4)):
        info = {"source": "a test", "licence": "none", "fingerprint": f"{split}-1"}
        write_tokens(tokenizer, storyworld(split, n), tokens, split, info)
    where = dict(out=str(home), device="cpu", dtype="float32")
    shape = dict(n_layers=2, d_model=64, n_heads=4, context_length=160, batch_size=4)
    how = dict(max_steps=40, warmup_steps=5, eval_every=10, save_every=10, keep_last=3, log_every=2)
    pretrain(TrainConfig(tokens=str(tokens), sample_tokens=20, **where, **shape, **how))
    how = dict(max_steps=10, batch_size=16, learning_rate=3e-3, eval_every=0, problems=30, n=4, held_n=4)
    how |= dict(gold=50, validation_problems=20, test_problems=20)
    train_verifier(VerifierConfig(model=str(home / "sft"), start=str(home / "sft"), **where, **how))


def start_server(out: Path, *words: str) -> tuple[str, subprocess.Popen]:
    """(address, process) of a serve.py on one core, when it listens."""
    script = str(Path(__file__).parents[1] / "serve.py")
    process = subprocess.Popen(
        [sys.executable, script, f"--out={out}", "--port=0", "--device=cpu", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return process.stdout.readline().strip(), process


@pytest.fixture(scope="session")
def lab_server(lab_home):
    url, process = start_server(lab_home, f"--models={lab_home}/models/gpt2")
    yield url, process
    process.terminate()
    assert process.wait(60) in (0, -15, 143)


@pytest.fixture(scope="session")
def lab_url(lab_server) -> str:
    return lab_server[0]
