"""Training: what is killed, starved or mistreated comes back with the same bits, or says what to do."""

import importlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import weakref
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import train
from model import ModelConfig, ModernDecoderLM
from support import machine, plan, runs
from support.hf_format import load_tensors
from support.runs import TrainError
from tasks.stories import storyworld
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe, write_tokens
from train import AdamW, TrainConfig, Trainer, Windows, evaluate_lm, get_lr

ROOT = Path(train.__file__).parent
TINY = dict(n_layers=2, d_model=32, n_heads=2, context_length=16, batch_size=4, device="cpu", dtype="float32")
TINY |= dict(max_steps=12, warmup_steps=3, log_every=1, eval_every=4, save_every=4, sample_tokens=6)
# What depends on the clock or on the machine; everything else in a log must come out the same again.
MEASURED = {"seconds", "tokens_per_second", "step_seconds", "eval_seconds", "peak_memory_gib", "mfu"}
ENDLESS = dict(max_steps=100_000, eval_every=0, save_every=0)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """A folder with a tokenizer of 300 tokens and token files."""
    folder = tmp_path_factory.mktemp("tokens")
    write_all_tokens(folder, 300)
    return folder


def write_all_tokens(folder: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer(*train_bpe(storyworld("train", 40), vocab_size, SPECIAL_TOKENS), SPECIAL_TOKENS)
    tokenizer.save(folder)
    for split, n in (("train", 20), ("validation", 2)):
        info = {"source": "a test", "licence": "none", "fingerprint": f"{split}-1"}
        write_tokens(tokenizer, storyworld(split, n), folder, split, info)


@pytest.fixture
def settings(tokens, tmp_path):
    """settings(max_steps=3) is a TrainConfig for a tiny run in this test's own folder."""
    mine = TINY | dict(tokens=str(tokens), out=str(tmp_path), name="run")
    return lambda **more: TrainConfig(**mine | more)


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of the run, unless it has another name."""
    return tmp_path / "run"


@pytest.fixture
def main(monkeypatch):
    """main(cfg, *flags) runs train.py in this process; its exit code or last message."""

    def main(cfg: TrainConfig, *more: str) -> int | str:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags(cfg), *more])
        with pytest.raises(SystemExit) as exit:
            train.main()
            raise SystemExit(0)
        return exit.value.code

    return main


@pytest.fixture
def interrupt(monkeypatch, main):
    """interrupt(step, cfg): a signal arrives at the beginning of a step; main's exit code."""

    def interrupt(step: int, cfg: TrainConfig, number=signal.SIGINT, times=1) -> int | str:
        def interrupting(now, *more, do=get_lr):
            if now == step:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return do(now, *more)

        with monkeypatch.context() as patch:
            patch.setattr(train, "get_lr", interrupting)
            return main(cfg)

    return interrupt


def read_run(folder: Path) -> dict:
    return runs.read_json(folder / "run.json")


def metrics(folder: Path, name: str = "") -> list:
    """The lines of metrics.jsonl without times; with a name, this value of all lines that have it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if name:
        return [line[name] for line in lines if name in line]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def last_state(folder: Path) -> dict:
    state = torch.load(runs.newest(folder) / "state.pt", weights_only=True)
    del state["seconds"]
    return state


def same(a, b) -> bool:
    """Whether two nests of dicts, lists, tensors and numbers are identical to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_weights(a: Path, b: Path) -> bool:
    return same(load_tensors(a), load_tensors(b))


def assert_same_run(a: Path, b: Path) -> None:
    assert same_weights(a, b) and same_weights(runs.newest(a), runs.newest(b))
    assert same(last_state(a), last_state(b))
    assert metrics(a) == metrics(b)
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    assert not list(a.rglob("*.tmp")) + list(b.rglob("*.tmp"))


def close(a: dict, b: dict, tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(a[k], b[k], atol=tolerance) for k in a)


def flags(cfg: TrainConfig) -> list[str]:
    default = asdict(TrainConfig())
    return [f"--{k}={v}" for k, v in asdict(cfg).items() if v != default[k]]


def start(cfg: TrainConfig, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train.py", *flags(cfg)], cwd=ROOT, env=ENVIRONMENT | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start_together(cfg: TrainConfig, n: int = 2) -> list[subprocess.Popen]:
    """Processes that train together, as torchrun would start them."""
    with socket.socket() as free:  # a port below those that systems give away
        free.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 30_000)))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(cfg, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(n)]


def finish(*processes: subprocess.Popen) -> str:
    """Waits for the processes, which must succeed; what the first one said."""
    said = [p.communicate(timeout=100)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), said
    return said[0]


def kill(*processes: subprocess.Popen) -> None:
    for process in processes:
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.001)
    raise AssertionError(f"ended before step {step}: {process.communicate()[0]}")


# -----------------------------------------------------------------------------
# Killed and resumed


def test_killed_at_random_steps_and_resumed_gives_the_same_bits(settings, run, tmp_path):
    cfg = dict(dropout=0.1, max_steps=90, eval_every=15, save_every=7, keep_last=2, context_length=32)
    train.pretrain(settings(name="whole", **cfg))
    where = random.Random(7)
    for step in (where.randrange(1, 25), where.randrange(30, 45)):
        process = start(settings(**cfg))
        wait_for_step(run, step, process)
        time.sleep(where.random() * 0.01)
        kill(process)
        assert read_run(run)["status"] == "running"
    assert "resuming at step" in finish(start(settings(**cfg)))
    assert_same_run(tmp_path / "whole", run)


def test_two_processes_killed_and_resumed_give_the_same_bits(settings, run, tmp_path):
    cfg = dict(dropout=0.1, max_steps=30, eval_every=10, save_every=6, context_length=32, batch_size=2)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [sys.executable, *torchrun, "train.py", *flags(settings(name="whole", **cfg))]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=200)
    both = start_together(settings(**cfg))
    wait_for_step(run, random.Random(3).randrange(8, 20), both[0])
    kill(*both)
    assert "resuming at step" in finish(*start_together(settings(**cfg)))
    assert_same_run(tmp_path / "whole", run)


def test_what_exchanges_gradients_is_gone_before_the_processes_part(settings):
    """In the other order a process may never end: torch's thread and ours wait for each other."""
    gone = []
    trainer = Trainer(settings(), small_model(), uneven_rows, lambda *_: None)
    trainer.net = nn.Sequential(trainer.model)
    weakref.finalize(trainer.net, gone.append, "DDP")
    trainer.at_end.callback(gone.append, "group")
    trainer.end()
    assert gone == ["DDP", "group"]


@pytest.mark.parametrize("more, tolerance", [
    ({}, 1e-5), (dict(parallel="fsdp"), 1e-5),
    (dict(parallel="fsdp", optimizer="normuon", ffn="moe", n_experts=2, experts_per_token=1), 1e-3),
])  # fmt: skip
def test_two_processes_equal_one_with_twice_the_accumulation(settings, tmp_path, more, tolerance):
    cfg = dict(max_steps=8, batch_size=2, grad_accum_steps=2, **more)
    finish(*start_together(settings(name="two", **cfg)))
    train.pretrain(settings(name="one", **cfg | dict(grad_accum_steps=4)))
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for line in (a, b):  # the router's figures are of the last rows of the first process
            line.pop("router_load", None), line.pop("dropped", None)
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    assert close(load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two"), tolerance)


def test_a_run_goes_on_in_another_number_of_processes(settings, run, tmp_path):
    """Four with shards, then two with copies, then one: the run of one process that nobody stopped."""
    cfg = dict(max_steps=50, eval_every=20, save_every=5, context_length=32, sample_tokens=0)
    train.pretrain(settings(name="whole", batch_size=4, **cfg))
    for n, parallel, step in ((4, "fsdp", 8), (2, "ddp", 25)):
        together = start_together(settings(batch_size=4 // n, parallel=parallel, **cfg), n)
        wait_for_step(run, step, together[0])
        kill(*together)
    train.pretrain(settings(batch_size=4, **cfg))
    for a, b in zip(metrics(run), metrics(tmp_path / "whole"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
    assert close(load_tensors(tmp_path / "whole"), load_tensors(run), 1e-3)


@pytest.mark.parametrize("number, more", [
    (signal.SIGINT, {}), (signal.SIGTERM, dict(save_every=0)), (signal.SIGINT, dict(optimizer="normuon")),
])  # fmt: skip
def test_a_signal_saves_and_the_same_command_goes_on(settings, run, tmp_path, interrupt, number, more):
    cfg = dict(dropout=0.1, **more)
    train.pretrain(settings(name="whole", **cfg))
    assert interrupt(5, settings(**cfg), number) == 128 + number
    assert (read_run(run)["status"], read_run(run)["step"]) == ("interrupted", 6)
    train.pretrain(settings(**cfg))
    if "save_every" in more:
        assert same_weights(tmp_path / "whole", run) and not (run / "checkpoints").exists()
    else:
        assert_same_run(tmp_path / "whole", run)


def test_a_signal_while_the_run_begins_saves_after_the_first_step(settings, run, tmp_path):
    def begin():
        os.kill(os.getpid(), signal.SIGTERM)  # run.json, by which the page finds the process, follows

    def trained(name: str, **more) -> dict:
        return Trainer(settings(name=name, eval_every=0), small_model(), rows, loss, **more).run_all_steps()

    def rows(step, first, count):
        return (torch.arange(first, first + count)[:, None] + torch.arange(16)[None] + step,)

    def loss(model, ids):
        return model(ids[:, :-1], ids[:, 1:])

    trained("whole")
    with pytest.raises(SystemExit) as exit:
        trained(run.name, on_begin=begin)
    assert exit.value.code == 128 + signal.SIGTERM
    assert (read_run(run)["status"], read_run(run)["step"]) == ("interrupted", 1)
    assert trained(run.name)["status"] == "finished" and same_weights(tmp_path / "whole", run)


def test_the_copy_of_a_ctrl_c_that_torchrun_passes_on_is_not_a_second_one(
    settings, run, interrupt, monkeypatch
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("gave up without saving"))
    assert interrupt(5, settings(), times=2) == 130
    assert runs.newest(run).name == "step-6"


def test_a_log_file_gets_lines_as_they_happen_and_a_second_ctrl_c_ends_at_once(settings, run):
    process = start(settings(**ENDLESS))
    assert "parameters" in process.stdout.readline()  # would wait for ever if lines stayed in a buffer
    wait_for_step(run, 2, process)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(number)  # both arrive before the step can end
    said = process.communicate(timeout=20)[0]
    assert process.returncode in (130, 143) and "\r" not in said and "\x1b" not in said
    assert read_run(run)["status"] == "running"


def test_a_second_process_may_not_train_in_the_same_folder(settings, run, main):
    process = start(settings(**ENDLESS))
    wait_for_step(run, 1, process)
    before = read_run(run)
    for more in ([], ["--overwrite"]):
        assert "another process is training in" in main(settings(), *more)
    assert read_run(run) == before
    kill(process)
    assert main(settings(), "--overwrite") == 0


# -----------------------------------------------------------------------------
# One step


def small_model(**more) -> ModernDecoderLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=61, context_length=16, n_layers=2, d_model=32, n_heads=2)
    return ModernDecoderLM(ModelConfig(**shape | more))


def uneven_rows(step: int, first: int, count: int):
    """Rows whose number of targets differs from one to the next, and is 0 now and then."""
    rng = np.random.default_rng(step)
    ids, lengths = rng.integers(0, 61, (12, 17)), rng.integers(0, 17, 12)
    targets = np.where(np.arange(16) < lengths[:, None], ids[:, 1:], -100)
    return tuple(torch.from_numpy(x[first : first + count].copy()) for x in (ids[:, :-1], targets))


def trained(settings, loss=train.next_token_loss, evaluate=None, **more) -> dict:
    """Weights after a few steps on uneven rows, 12 a step."""
    model = small_model()
    cfg = settings(name=f"run{random.random()}", save_every=0, max_steps=6, learning_rate=1e-2, **more)
    Trainer(cfg, model, uneven_rows, loss, evaluate, tokens_per_row=16).run_all_steps()
    return model.state_dict()


def test_accumulation_and_gradient_checkpointing_equal_the_big_batch_with_unequal_counts(settings):
    whole = trained(settings, batch_size=12)
    assert close(whole, trained(settings, batch_size=1, grad_accum_steps=12))
    assert close(whole, trained(settings, batch_size=4, grad_accum_steps=3))
    assert close(whole, trained(settings, batch_size=12, gradient_checkpointing=True))
    other = trained(settings, batch_size=12, seed=2, grad_clip=0.1)
    assert not close(whole, other, 1e-3)  # the comparison can fail


def starving(room: int, error: Exception):
    """A loss that runs out of memory with more than `room` rows at a time."""

    def loss(model, ids, targets):
        result = model(ids, targets)
        if len(ids) > room:
            raise error
        return result

    return loss


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("batch_size, halvings, error", [
    (12, 2, OUT_OF_MEMORY), (5, 1, ALLOCATOR), (4, 1, MemoryError()),
    (4, 1, RuntimeError("could not create a primitive")),
])  # fmt: skip
def test_out_of_memory_halves_the_micro_batch_and_changes_no_result(
    settings, capsys, batch_size, halvings, error
):
    plenty = trained(settings, batch_size=batch_size)
    capsys.readouterr()
    assert close(plenty, trained(settings, starving(3, error), batch_size=batch_size))
    assert capsys.readouterr().out.count("out of memory") == halvings
    with pytest.raises(TrainError, match="1 sequences at a time"):
        trained(settings, starving(0, error), batch_size=batch_size)
    with pytest.raises(TrainError, match="out of memory"):  # outside of a step
        starved = starving(0, error)
        trained(settings, evaluate=lambda model, final: starved(model, *uneven_rows(0, 0, 1)))


def test_a_failed_pass_leaves_no_tensors_to_the_next_one(settings):
    """What it computed is held by variables of the functions that failed, and by the losses of experts."""
    left = []

    def loss(model, ids, targets):
        assert [tensor() for tensor in left] == [None] * len(left)
        left.clear()
        result, count = model(ids, targets)
        if len(ids) > 3:
            left.extend([weakref.ref(result), weakref.ref(experts.stats["aux_loss"])])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result, count

    model = small_model(ffn="moe", n_experts=2)
    experts = model.model["layers"][0].mlp
    Trainer(settings(batch_size=12, max_steps=1, eval_every=0), model, uneven_rows, loss).run_all_steps()


def test_rows_that_belong_together_stay_together_when_memory_runs_out(settings):
    seen = set()

    def loss(model, ids, targets):
        seen.add(len(ids))
        return starving(4, OUT_OF_MEMORY)(model, ids, targets)

    cfg = settings(batch_size=12, max_steps=1, eval_every=0)
    Trainer(cfg, small_model(), uneven_rows, loss, rows_together=4).run_all_steps()
    assert seen == {12, 4}
    cfg = settings(batch_size=12, max_steps=1, eval_every=0, overwrite=True)
    with pytest.raises(TrainError, match="4 sequences at a time"):
        starved = starving(3, OUT_OF_MEMORY)
        Trainer(cfg, small_model(), uneven_rows, starved, rows_together=4).run_all_steps()


def test_without_checkpoints_the_results_are_those_of_the_last_model(settings, run):
    losses = iter((1.0, 3.0, 2.0))
    cfg = settings(max_steps=3, eval_every=1, save_every=0)
    Trainer(cfg, small_model(), uneven_rows, evaluate=lambda *_: {"val_loss": next(losses)}).run_all_steps()
    results = read_run(run)["results"]
    assert results["best"] == results["last"] == {"step": 3, "val_loss": 2.0}


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("not enough memory")])
def test_other_errors_are_not_taken_for_a_lack_of_memory(settings, error):
    with pytest.raises(type(error), match=str(error)):
        trained(settings, starving(3, error), batch_size=4)


@pytest.mark.parametrize("how", [math.nan, math.inf])
def test_a_step_without_a_finite_loss_is_skipped_and_counted(settings, run, how):
    seen = []

    def loss(model, *rows):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        total, count = model(*rows)
        return total * (how if len(seen) == 3 else 1), count

    cfg = settings(max_steps=5, batch_size=12, eval_every=0)
    assert Trainer(cfg, small_model(), uneven_rows, loss).run_all_steps()["status"] == "finished"
    assert same(seen[2], seen[3]) and not same(seen[1], seen[2]) and not same(seen[3], seen[4])
    lines = metrics(run)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert "loss" not in lines[2] and lines[3]["loss"] > 1  # no figure is better than a made-up one


def test_bad_steps_count_on_after_an_interruption(settings, run, main, interrupt, monkeypatch):
    def forward(self, ids, targets=None, do=ModernDecoderLM.forward, **rest):
        result = do(self, ids, targets, **rest)
        return (result[0] * math.nan, result[1]) if targets is not None and self.training else result

    monkeypatch.setattr(ModernDecoderLM, "forward", forward)
    assert interrupt(2, settings(eval_every=0)) == 130  # after three bad steps
    assert "five steps" in main(settings(eval_every=0))
    assert read_run(run)["step"] == 4  # the fifth ended it


@pytest.mark.parametrize("gradient_only", [False, True])
def test_five_bad_steps_in_a_row_stop_and_leave_the_last_checkpoint(
    settings, run, tmp_path, main, monkeypatch, gradient_only
):
    def forward(self, ids, targets=None, do=ModernDecoderLM.forward, **rest):
        result = do(self, ids, targets, **rest)
        if targets is not None and self.training and next(calls) >= 8:
            if not gradient_only:
                return result[0] * math.nan, result[1]
            result[0].register_hook(lambda gradient: gradient * math.inf)
        return result

    calls, cfg = itertools.count(), dict(max_steps=14, eval_every=8, save_every=8)
    with monkeypatch.context() as patch:
        patch.setattr(ModernDecoderLM, "forward", forward)
        message = main(settings(**cfg))
    assert "--learning_rate" in message and "step-8" in message
    assert read_run(run)["status"] == "failed" and "five steps" in read_run(run)["error"]
    train.pretrain(settings(name="whole", **cfg))
    train.pretrain(settings(**cfg))  # whatever was wrong is mended: the checkpoint is as good as ever
    assert_same_run(tmp_path / "whole", run)


def test_the_loss_falls_in_bfloat16_and_the_weights_stay_in_full_precision(settings, run):
    cfg = dict(dtype="bfloat16", max_steps=60, learning_rate=1e-2, log_every=20, eval_every=30, save_every=0)
    train.pretrain(settings(**cfg))
    losses = metrics(run, "loss")
    assert losses[-1] < losses[0] - 0.5
    assert all(w.dtype == torch.float32 for w in load_tensors(run).values())


def test_a_compiled_model_learns_the_same(settings, monkeypatch, capsys):
    """With the compiler's own front end; "eager" leaves out only the generated code, which takes a minute."""
    compiler, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda net: calls.append(net) or compiler(net, backend="eager"))
    found = [train.pretrain(settings(name=f"c{c}", compile=c, max_steps=4)) for c in (False, True)]
    assert len(calls) == 1 and "failed" not in capsys.readouterr().out
    losses = [each["results"]["last"]["val_loss"] for each in found]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_compiler_that_fails_is_done_without_and_says_why(settings, run, tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no C++ compiler found\nand many more lines")

    train.pretrain(settings(name="eager", max_steps=4))
    monkeypatch.setattr(torch, "compile", lambda model: broken)
    train.pretrain(settings(compile=True, max_steps=4))
    out = capsys.readouterr().out
    assert out.count("no C++ compiler found") == 1 and "many more lines" not in out
    assert same_weights(tmp_path / "eager", run)


def test_dropout_is_on_from_the_first_step_whatever_the_model_came_from(settings, tmp_path):
    losses = []
    for dropout in (0.0, 0.3):
        cfg = settings(name=f"run{dropout}", max_steps=2, eval_every=0, save_every=0)
        Trainer(cfg, small_model(dropout=dropout).eval(), uneven_rows).run_all_steps()
        losses.append(metrics(tmp_path / cfg.name, "loss")[0])
    assert losses[0] != losses[1]


# -----------------------------------------------------------------------------
# Optimizers and learning rates


def test_our_adamw_equals_torchs():
    ours, theirs = small_model(), small_model()
    kwargs = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizers = AdamW(ours.parameters(), **kwargs), torch.optim.AdamW(theirs.parameters(), **kwargs)
    for step in range(20):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            total, count = model(*uneven_rows(step, 0, 12))
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert close(ours.state_dict(), theirs.state_dict(), 1e-6)


GPT = dict(norm="layer", positions="learned", ffn="gelu", bias=True)
SHAPES = [{}, GPT, dict(ffn="moe", n_experts=4, qk_norm=True, n_sinks=1), dict(tie_embeddings=False)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "normuon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_is_optimised_once_and_only_matrices_decay(settings, optimizer, shape):
    model = small_model(**shape)
    optimizers = train.make_optimizers(model, settings(optimizer=optimizer, embedding_rate=4))
    groups = [group for one in optimizers for group in one.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
    for name, p in model.named_parameters():
        one_dimensional = p.dim() < 2 or "norm" in name or "bias" in name or "sinks" in name
        assert decay[id(p)] == (0.0 if one_dimensional else 0.025 if "embed" in name else 0.1), name
    if "muon" in optimizer:
        hidden = {id(p) for group in optimizers[1].param_groups for p in group["params"]}
        assert id(model.model["embed_tokens"].weight) not in hidden
        assert id(model.model["layers"][0].self_attn.q_proj.weight) in hidden


def test_the_embedding_has_a_learning_rate_of_its_own_and_its_old_decay(settings):
    """Without gradients a step only decays: by lr * rate * decay / rate for the embedding, too."""
    model = small_model(tie_embeddings=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(settings(embedding_rate=4.0), model, uneven_rows)
    trainer.set_learning_rate(0.5)
    rates = {id(p): g["lr"] for one in trainer.optimizers for g in one.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert rates[id(p)] == (2.0 if "embed" in name else 0.5), name
        p.grad = torch.zeros_like(p)
    for optimizer in trainer.optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if p.dim() == 2 else 1), msg=name)


def test_the_embeddings_of_a_hub_model_are_found_by_what_they_are_not_by_name(settings):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16, n_positions=8))
    adamw = train.make_optimizers(model, settings(embedding_rate=4.0))[0]
    fast = [p for group in adamw.param_groups for p in group["params"] if group.get("rate") == 4]
    assert {id(p) for p in fast} == {id(model.transformer.wte.weight), id(model.transformer.wpe.weight)}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_our_muon_equals_torchs_and_moves_a_stack_of_experts_as_its_experts(monkeypatch):
    """On the same matrices, tall, wide and square, when torch's is made to work in float32 as ours does."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(1)
    ours = [torch.randn(shape) for shape in ((8, 8), (8, 20), (20, 8), (8, 8), (3, 8, 20))]
    theirs = [p.clone() for p in ours[:4]] + list(ours[4].clone().unbind())
    kwargs = dict(lr=1e-2, weight_decay=0.1)
    muon, reference = train.Muon(ours, **kwargs), torch.optim.Muon(
        theirs, adjust_lr_fn="match_rms_adamw", **kwargs
    )  # fmt: skip
    for _ in range(5):
        older = muon.state_dict()
        older["param_groups"][0].pop("beta2", None)  # as checkpoints had none
        muon.load_state_dict(older)
        for p in ours:
            p.grad = torch.randn_like(p)
        for p, grad in zip(theirs, [p.grad for p in ours[:4]] + list(ours[4].grad), strict=True):
            p.grad = grad.clone()
        muon.step(), reference.step()
    assert close(dict(enumerate([*ours[:4], *ours[4]])), dict(enumerate(theirs)), 1e-5)


def test_normuon_gives_rows_equal_steps_of_muons_size_also_in_a_stack_and_without_gradient():
    torch.manual_seed(1)
    tall, wide, stack, idle = [torch.randn(shape) for shape in ((20, 8), (8, 20), (3, 20, 8), (8, 8))]
    plain = [p.clone() for p in (tall, wide)]
    alone = [p.clone() for p in stack]
    params = [tall, wide, stack, idle]
    before = [p.clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p) if p is not idle else torch.zeros_like(p)
    for p, grad in zip(plain + alone, [tall.grad, wide.grad, *stack.grad], strict=True):
        p.grad = grad.clone()
    muon, normuon, one_by_one = (
        train.Muon(plain),
        train.Muon(params, beta2=0.95),
        train.Muon(alone, beta2=0.95),
    )
    for optimizer in (muon, normuon, one_by_one):
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        optimizer.step()
    moves = [p - old for p, old in zip(params, before, strict=True)]
    for move, old, theirs, across in zip(moves, before, plain, (1, 0), strict=False):
        sizes = move.norm(dim=across)
        torch.testing.assert_close(sizes, sizes.mean().expand_as(sizes))
        torch.testing.assert_close(move.norm(), (theirs - old).norm())
        assert (theirs - old).norm(dim=across).std() > 0.1 * sizes.mean()  # which Muon's rows are not
    torch.testing.assert_close(stack, torch.stack(alone))
    assert (idle == before[3]).all()
    steps = torch.randn(2, 20, 8)
    memory = {}
    normuon.level(steps[0], memory, 0.75)
    squares = 0.25 * (0.75 * steps[0].square() + steps[1].square()).mean(-1, keepdim=True)
    level = steps[1] / squares.sqrt()
    expected = level * (steps[1].norm() / level.norm())
    torch.testing.assert_close(normuon.level(steps[1], memory, 0.75), expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_the_learning_rate_rises_to_its_maximum_and_falls_to_its_minimum(schedule):
    lr = [get_lr(step, 1e-3, 1e-4, 10, 100, schedule) for step in range(140)]
    assert lr[0] == 0 and lr[10] == max(lr) == 1e-3
    assert np.allclose(np.diff(lr[:11]), 1e-4)
    assert all(a >= b for a, b in itertools.pairwise(lr[10:]))
    assert all(x == (1e-3 if schedule == "constant" else 1e-4) for x in lr[100:])
    if schedule == "wsd":
        assert set(lr[10:81]) == {1e-3} and lr[81] < 1e-3
    assert get_lr(0, 1e-3, 1e-4, 0, 100, schedule) == 1e-3  # no warmup


# -----------------------------------------------------------------------------
# Data and evaluation


def test_windows_predict_every_token_once_an_epoch_as_a_pure_function_of_seed_and_step():
    orders = []
    for seed, epoch in itertools.product((1, 2), (0, 1)):
        windows, again = (Windows(np.arange(1000, dtype=np.uint16), 16, 7, seed) for _ in range(2))
        steps = range(9 * epoch, 9 * epoch + 9)  # 63 windows
        batches = [windows.batch(step, 0, 7) for step in steps]
        assert same(batches, [again.batch(step, 0, 7) for step in reversed(steps)][::-1])
        cut = [again.batch(steps[3], first, count) for first, count in ((0, 2), (2, 4), (6, 1))]
        assert same([torch.cat(rows) for rows in zip(*cut, strict=True)], list(batches[3]))
        targets = torch.cat([targets.flatten() for _, targets in batches])
        assert sorted(targets[targets != -100].tolist()) == list(range(1, 1000))
        orders.append(torch.cat([ids[:, 0] for ids, _ in batches]).tolist())
    orders.append(sorted(orders[0]))
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert windows.epoch(9) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_predicts_every_token_once(batch_size):
    model, tokens = small_model().eval().requires_grad_(False), np.random.default_rng(0).integers(0, 61, 100)
    total = 0.0
    for start in range(0, 99, 16):  # the last window has 3 targets
        piece = torch.from_numpy(tokens[start : start + 17])
        logits = model(piece[None, :-1])
        total += float(nn.functional.cross_entropy(logits[0].double(), piece[1:], reduction="sum"))
    expected = {"val_loss": total / 99, "perplexity": math.exp(total / 99), "val_tokens": 99}
    expected["bits_per_byte"] = total / math.log(2) / 400
    windows = Windows(tokens, 16, batch_size, seed=0)
    assert evaluate_lm(model, windows, batch_size, n_bytes=400) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", [
    {}, {"sliding_window": 5}, {"sparse_stride": 3}, {"attention_kind": "linear"}, {"positions": "learned"},
])  # fmt: skip
def test_by_document_every_token_is_predicted_once_from_its_own_document_alone(how):
    rng, eot, T = np.random.default_rng(0), 60, 16
    documents = [[eot, *rng.integers(1, 60, n).tolist()] for n in (3, 20, 0, 9, 15, 5, 50, 1, 7)]
    tokens = np.array([*itertools.chain(*documents), eot], np.uint16)
    model = small_model(**how).eval().requires_grad_(False)
    total = 0.0
    for document in documents:
        text = [*document, eot]
        for start in range(0, len(document), T):  # a long one is cut
            piece = torch.tensor([text[start : start + T + 1]])
            total += model(piece[:, :-1], piece[:, 1:])[0].item()
    windows = Windows(tokens, T, 2, seed=0, eot=eot)
    found = evaluate_lm(model, windows, 3, n_bytes=400)
    assert found["val_tokens"] == len(tokens) - 1 and windows.count < len(tokens) / T + 3
    assert found["val_loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    some = Windows(tokens, T, 2, seed=1, eot=eot)
    epoch = [some.batch(step, 0, 2) for step in range(some.count)]  # two epochs
    targets = torch.cat([targets.flatten() for _, targets, _ in epoch])
    assert sorted(targets[targets != -100].tolist()) == sorted([*tokens[1:].tolist()] * 2)


def test_training_by_document_is_the_same_when_resumed_or_cut_in_micro_batches(settings, killed_at, tmp_path):
    more = dict(by_document=True, save_every=2)
    train.pretrain(settings(name="whole", **more))
    killed_at(5, train.pretrain, settings(name="killed", **more))
    train.pretrain(settings(name="killed", **more))
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


def test_a_run_that_did_not_know_a_setting_yet_goes_on_only_without_it(settings, killed_at, run):
    killed_at(5, train.pretrain, settings(save_every=2))
    record = json.loads((run / "run.json").read_text())
    del record["settings"]["by_document"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(TrainError, match="by_document: False -> True"):
        train.pretrain(settings(save_every=2, by_document=True))
    assert train.pretrain(settings(save_every=2))["status"] == "finished"


def test_evaluating_and_sampling_do_not_disturb_training(settings, tmp_path):
    train.pretrain(settings(name="often", dropout=0.1, eval_every=1, save_every=0))
    train.pretrain(settings(name="never", dropout=0.1, eval_every=0, save_every=0, sample_tokens=0))
    assert same_weights(tmp_path / "often", tmp_path / "never")


def test_eval_tokens_limits_all_evaluations_but_the_last(settings, run, tmp_path, tokens):
    whole = json.loads((tokens / "validation.json").read_text())["tokens"] - 1
    train.pretrain(settings(eval_tokens=100))
    assert metrics(run, "val_tokens") == [100, 100, whole]
    train.pretrain(settings(name="short", final_eval_tokens=200))
    assert metrics(tmp_path / "short", "val_tokens") == [whole, whole, 200]


# -----------------------------------------------------------------------------
# Checkpoints and the run folder


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors", "config.json"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(settings, run, tmp_path, interrupt, capsys, file):
    cfg = dict(dropout=0.1, eval_every=6, keep_last=3)
    train.pretrain(settings(name="whole", **cfg))
    interrupt(9, settings(**cfg))
    tear(run / "checkpoints/step-10" / file)
    train.pretrain(settings(**cfg))
    out = capsys.readouterr().out
    assert "cannot read" in out and "resuming at step 8" in out
    assert_same_run(tmp_path / "whole", run)


def test_after_a_torn_checkpoint_new_ones_are_kept(settings, run, interrupt):
    cfg = dict(eval_every=0, keep_last=1, max_steps=20)
    interrupt(9, settings(**cfg | dict(keep_last=2)))
    tear(run / "checkpoints/step-10/state.pt")
    interrupt(8, settings(**cfg))  # resumes at 8, ends at 9: before the torn one
    assert [path.name for path in runs.checkpoints(run)] == ["step-8", "step-9"]
    assert same_weights(run, run / "checkpoints/step-9")


class Payload:
    def __reduce__(self):
        return (print, ("PICKLED CODE RAN",))


@pytest.mark.parametrize("harm", ["torn", "pickled code"])
def test_checkpoints_that_cannot_be_read_are_kept_and_run_no_code(
    settings, run, main, interrupt, capsys, harm
):
    interrupt(9, settings())
    for path in runs.checkpoints(run):
        if harm == "torn":
            tear(path / "state.pt")
        else:
            torch.save({"step": 6, "best": Payload()}, path / "state.pt")
    message = main(settings())
    assert "none of the checkpoints" in message and "--overwrite" in message
    assert "PICKLED CODE RAN" not in capsys.readouterr().out
    assert len(runs.checkpoints(run)) == 2  # nothing is thrown away unasked
    assert main(settings(), "--overwrite") == 0


def test_settings_that_change_the_result_are_refused_by_name(settings, run, main, interrupt):
    interrupt(5, settings())
    before = last_state(run)
    message = main(settings(learning_rate=0.5, d_model=64))
    for word in ("learning_rate: 0.001 -> 0.5", "d_model: 32 -> 64", "--name", "--overwrite"):
        assert word in message
    assert "warmup" not in message and "must stay the same" in main(settings(batch_size=5))
    assert same(before, last_state(run)) and read_run(run)["status"] == "interrupted"


def test_settings_that_do_not_change_the_result_may_change(settings, run, tmp_path, interrupt):
    train.pretrain(settings(name="whole"))
    interrupt(5, settings())
    free = dict(log_every=3, eval_every=5, save_every=5, keep_last=2, sample_tokens=0, hypothesis="more")
    train.pretrain(settings(**free, batch_size=2, grad_accum_steps=2))
    assert close(load_tensors(tmp_path / "whole"), load_tensors(run), 1e-6)


@pytest.mark.parametrize("stop", [True, False])
def test_other_data_or_another_tokenizer_is_refused(settings, tmp_path, tokens, main, interrupt, stop):
    interrupt(5, settings()) if stop else train.pretrain(settings())
    other = shutil.copytree(tokens, tmp_path / "tokens")
    info = json.loads((other / "train.json").read_text())
    (other / "train.json").write_text(json.dumps(info | {"fingerprint": "changed"}))
    assert "other data" in main(settings(tokens=str(other)))
    write_all_tokens(other, 299)  # pads to the same number of rows
    assert "other data" in main(settings(tokens=str(other)))


def test_missing_truncated_and_foreign_token_files_say_what_to_run(settings, run, tmp_path, tokens, main):
    def foreign(folder):
        meta = json.loads((folder / "train.json").read_text())
        (folder / "train.json").write_text(json.dumps(meta | {"tokenizer": "0" * 64}))

    harms = [lambda folder: tear(folder / "train.bin"), foreign, lambda x: (x / "validation.bin").unlink()]
    for i, spoil in enumerate([shutil.rmtree, *harms]):
        folder = shutil.copytree(tokens, tmp_path / f"tokens-{i}")
        spoil(folder)
        message = main(settings(tokens=str(folder)))
        assert "python tokenizer.py" in message and str(folder) in message
    assert not run.exists()


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/../b", "../run", "/tmp/run", "./"])
def test_a_name_that_leads_out_of_the_output_folder_is_refused(settings, tmp_path, main, name):
    (tmp_path / "thesis").mkdir()
    for more in ([], ["--overwrite"]):
        assert f"--name={name!r}" in main(settings(), f"--name={name}", *more)
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis"]


@pytest.mark.parametrize("save_every", [4, 0])
def test_a_finished_run_says_so_and_does_nothing(settings, run, main, capsys, save_every):
    def files() -> dict:
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.rglob("*")}

    cfg = settings(save_every=save_every)
    train.pretrain(cfg)
    before = files()
    assert main(cfg) == 0
    assert "nothing to do" in capsys.readouterr().out and before == files()
    assert "max_steps: 12 -> 13" in main(cfg, "--max_steps=13")
    assert main(cfg, "--max_steps=13", "--overwrite") == 0 and read_run(run)["step"] == 13


def test_overwrite_removes_this_run_and_nothing_else(settings, tmp_path, main, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("42")
    for name in ("run/round-1", "run"):
        train.pretrain(settings(max_steps=1, name=name))
    for name in ("thesis", "run"):
        assert main(settings(max_steps=1, name=name), "--overwrite") == 0
    assert (tmp_path / "thesis" / "chapter.tex").exists()
    assert (tmp_path / "run/round-1/model.safetensors").exists()
    order = []  # without run.json the next --overwrite would not take what is left for a run: it goes last
    monkeypatch.setattr(Path, "unlink", lambda path, **_: order.append(path.name))
    runs.remove_run(tmp_path / "run")
    assert order[-1] == "run.json" and len(order) > 3 and not (tmp_path / "run/checkpoints").exists()


def test_a_run_goes_on_that_was_renamed_or_whose_parent_was(settings, tmp_path, main, interrupt):
    train.pretrain(settings(name="parent", max_steps=2))
    train.pretrain(settings(name="other", max_steps=3))
    train.pretrain(settings(name="whole", init_from=str(tmp_path / "parent")))
    interrupt(6, settings(name="before", init_from=str(tmp_path / "parent")))
    (tmp_path / "before").rename(tmp_path / "after")
    (tmp_path / "parent").rename(tmp_path / "moved")
    assert "init_from" in main(settings(name="after", init_from=str(tmp_path / "other")))
    train.pretrain(settings(name="after", init_from=str(tmp_path / "moved")))
    assert same_weights(tmp_path / "whole", tmp_path / "after")


def test_a_copy_among_the_checkpoints_is_left_alone(settings, run, main, interrupt):
    interrupt(6, settings())
    checkpoints, copies = run / "checkpoints", {"step-4 (copy)", "step-4.bak", "step-004", "step-x"}
    for name in copies:
        shutil.copytree(checkpoints / "step-4", checkpoints / name)
    (checkpoints / "step-77").touch()  # a file
    train.pretrain(settings(save_every=0))
    assert main(settings(), "--list") == 0
    assert {path.name for path in checkpoints.iterdir()} == copies | {"step-77"}


@pytest.mark.parametrize("rubbish", [b"\n", b"\xff\xfe{\n", b"[1, 2]\n", b'{"step": "four"}\n', b"null\n"])
def test_a_damaged_line_of_a_log_takes_no_other_with_it(settings, run, interrupt, capsys, rubbish):
    interrupt(6, settings())
    lines, file = metrics(run), run / "metrics.jsonl"
    first, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(first + b"\n" + rubbish + rest + b'{"step": 5, "lo\xe2')
    train.pretrain(settings())
    assert ("1 damaged lines" in capsys.readouterr().out) == bool(rubbish.strip())
    assert metrics(run)[: len(lines)] == lines and metrics(run, "step")[-1] == 12


@pytest.mark.parametrize("where, limit", [
    ("state.pt", 200_000), ("model.safetensors", 100_000), ("metrics.jsonl", 100)
])  # fmt: skip
def test_a_full_disk_leaves_the_last_checkpoint_and_no_rubbish(
    settings, run, tmp_path, main, interrupt, monkeypatch, where, limit
):
    cfg = settings(eval_every=0)  # a checkpoint is about 170 KB of weights and 340 KB of state
    interrupt(5, cfg)
    before = last_state(run)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(runs.RunLog, "say", lambda *_: None)  # what pytest captures is a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))  # the kernel refuses longer files
        try:
            message = main(cfg)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert isinstance(message, str) and str(run) in message and "File too large" in message
    assert not list(run.rglob("*tmp*")) and same(before, last_state(run))
    train.pretrain(settings(name="whole", eval_every=0))
    train.pretrain(cfg)
    assert_same_run(tmp_path / "whole", run)


def test_a_folder_that_cannot_be_written_is_a_clear_message(settings, tmp_path, main):
    (tmp_path / "file").write_text("in the way")
    message = main(settings(out=str(tmp_path / "file" / "x")))
    assert "cannot read or write" in message and str(tmp_path / "file") in message


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_save_every_0_leaves_only_the_model_with_the_mode_that_the_umask_asks_for(settings, run, umask):
    before = os.umask(umask)
    try:
        train.pretrain(settings(save_every=0))
    finally:
        os.umask(before)
    assert {path.name for path in run.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "README.md", "run.json", "metrics.jsonl", "samples.jsonl",
    }  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in run.iterdir()} == {0o666 & ~umask}


def test_the_best_and_the_last_checkpoints_are_kept_and_the_best_is_published(settings, run, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])  # at steps 2, 4, ...
    monkeypatch.setattr(train, "evaluate_lm", lambda *_: {"val_loss": next(losses), "bits_per_byte": 1.0})
    train.pretrain(settings(eval_every=2, save_every=2, keep_last=2))
    assert [path.name for path in runs.checkpoints(run)] == ["step-4", "step-10", "step-12"]
    assert same_weights(run, run / "checkpoints/step-4")
    assert not same_weights(run, run / "checkpoints/step-12")
    best = read_run(run)["results"]["best"]
    assert (best["step"], best["val_loss"]) == (4, 2.0)
    (run / "checkpoints/step-4/samples").mkdir()  # it was asked as a model of its own
    runs.publish(run / "checkpoints/step-4")


def test_run_json_records_settings_data_and_results_and_list_names_them(settings, run, tokens, main, capsys):
    train.pretrain(settings(max_steps=4))
    record = read_run(run)
    assert record["status"] == "finished" and record["step"] == 4 and record["seconds"] > 0
    assert record["settings"]["learning_rate"] == 1e-3 and record["settings"]["d_model"] == 32
    # d_ff and head_dim follow from what was chosen
    assert {"max_steps", "d_model"} <= {*record["changed"]} and not {"beta1", "d_ff"} & {*record["changed"]}
    assert record["versions"]["torch"] == torch.__version__ and "python" in record["versions"]
    assert record["hardware"]["device"] and record["hardware"]["threads"] == 1
    assert record["data"]["fingerprint"] == "train-1"
    assert record["data"]["validation"]["fingerprint"] == "validation-1"
    assert record["tokenizer"] == Tokenizer.load(tokens).hash
    model = ModernDecoderLM.from_pretrained(run)
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["results"]["last"]["val_loss"] > 0 and record["dtype"] == "float32"
    assert record["git"] and record["started"]
    capsys.readouterr()
    assert main(settings(), "--list") == 0
    out = capsys.readouterr().out
    assert "run  finished  step 4" in out and "step-4" in out and out.count("val_loss") == 2
    assert main(settings(out=str(run / "empty")), "--list") == 0
    assert "no runs" in capsys.readouterr().out


@pytest.mark.parametrize("line", [
    {"val_loss": 2.0}, {"step": 4, "val_loss": None}, {"step": [4], "val_loss": 2.0},
    {"step": 4, "val_loss": "low"}, {"results": {"best": [4]}}, None,
])  # fmt: skip
def test_one_damaged_run_does_not_hide_the_others_from_the_list(tmp_path, capsys, line):
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"status": "finished"}')
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 4, "val_loss": 2.0}\n')
    if line is None:
        (tmp_path / "b/run.json").unlink()
        (tmp_path / "b/run.json").mkdir()
    else:
        file = "run.json" if "results" in line else "metrics.jsonl"
        (tmp_path / "b" / file).write_text(json.dumps(line))
    runs.list_runs(str(tmp_path))
    a, b, c = capsys.readouterr().out.splitlines()
    assert "finished" in a and "finished" in c and f"{tmp_path}/b: its files are damaged" in b


@pytest.mark.parametrize("name", ["a,b", "name.py"])
def test_a_name_that_cannot_be_used_again_is_refused(settings, name):
    with pytest.raises(TrainError, match="--name="):
        runs.run_folder(settings(name=name))


def test_the_command_of_the_next_step_is_quoted_for_the_shell():
    assert train.describe(Path("my run"), {"step": 1, "seconds": 1}).endswith("python chat.py 'my run'")


# -----------------------------------------------------------------------------
# Weights & Biases


def test_a_resumed_run_is_one_run_of_wandb_also_if_it_was_killed_while_that_was_made(
    settings, run, interrupt, monkeypatch
):
    calls = []

    class Wandb(types.ModuleType):
        url = "https://wandb.test"
        log = finish = lambda self, *_, **__: None

        def init(self, **about):
            calls.append({name: about[name] for name in ("id", "resume", "project")})
            if len(calls) == 1:
                raise KeyboardInterrupt
            return self

    wandb = Wandb("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(KeyboardInterrupt):
        train.pretrain(settings(wandb="project"))
    known = read_run(run)["wandb"]["id"]
    for step in (2, 6):  # before the first checkpoint, and behind it
        interrupt(step, settings(wandb="project"))
    about = train.pretrain(settings(wandb="project"))["wandb"]
    assert calls == 4 * [{"id": known, "resume": "allow", "project": "project"}]
    assert about == read_run(run)["wandb"] == {"id": known, "url": Wandb.url}
    assert train.pretrain(settings(wandb="project", overwrite=True))["wandb"]["id"] != known


def test_wandb_that_is_not_installed_is_a_clear_message_before_anything_starts(
    settings, run, main, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "[wandb]" in main(settings(wandb="project")) and not run.exists()


# -----------------------------------------------------------------------------
# Parents, other programs, plans, the command line


def test_init_from_starts_from_another_runs_weights(settings, run, tmp_path, interrupt):
    parent = str(tmp_path / "parent")
    train.pretrain(settings(name="parent", max_steps=20, learning_rate=1e-2))
    cfg = dict(init_from=parent, dropout=0.2, context_length=24)
    record = train.pretrain(settings(d_model=96, n_heads=3, **cfg))
    fresh = train.pretrain(settings(name="fresh", context_length=24))
    assert metrics(run, "val_loss")[0] < fresh["results"]["last"]["val_loss"]
    assert record["parent"] == parent
    assert record["settings"]["d_model"] == 32 and record["settings"]["dropout"] == 0.2
    config = ModernDecoderLM.from_pretrained(run).config
    assert config.context_length == 24  # what it was trained on last
    interrupt(5, settings(name="stopped", **cfg))
    train.pretrain(settings(name="stopped", **cfg))
    assert same_weights(run, tmp_path / "stopped")


def test_init_from_a_run_with_another_vocabulary_is_refused(settings, tmp_path, main):
    train.pretrain(settings(name="parent", max_steps=2))
    write_all_tokens(tmp_path / "parent", 299)
    (tmp_path / "parent/run.json").unlink()  # it holds the hash of the right one
    assert "another vocabulary" in main(settings(init_from=str(tmp_path / "parent")))
    assert "there is no folder" in main(settings(init_from=str(tmp_path / "nowhere")))


def test_a_run_is_a_hugging_face_model_that_writes_the_same_tokens(settings, run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train.pretrain(settings(max_steps=40, learning_rate=1e-2, eval_every=40, context_length=48))
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ours, tokenizer = ModernDecoderLM.from_pretrained(run), Tokenizer.load(run)
    ids = [tokenizer.eot_id, *tokenizer.encode("Once there was")]
    assert their_tokenizer("<|endoftext|>Once there was")["input_ids"] == ids
    (mine,) = ours.generate([ids], 30, temperature=0, stop_tokens=[tokenizer.eot_id])
    out = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30)[0, len(ids) :].tolist()
    assert mine == out and tokenizer.decode(mine) == their_tokenizer.decode(out)


@pytest.fixture
def script(monkeypatch, capsys):
    """script(*words) runs train.py with these words; what it prints."""

    def script(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        train.main()
        return capsys.readouterr().out

    return script


@pytest.mark.parametrize("more, wanted", [
    (["--vram=12"], (16, 8)), (["--vram=6"], (4, 32)), (["--vram=80"], (128, 1)), ([], (16, 8)),
])  # fmt: skip
def test_auto_takes_the_largest_micro_batch_that_fits_and_keeps_the_batch(monkeypatch, script, more, wanted):
    monkeypatch.setattr(plan, "matmul_flops", lambda dtype: 1e11)
    out = script("configs/max3060.py", "--batch_size=auto", "--plan", "--device=cpu", *more)
    assert f"--batch_size=auto: {wanted[0]} sequences at a time, {wanted[1]} times a step" in out
    assert "131,072 tokens a step" in out and "DOES NOT FIT" not in out


@pytest.mark.parametrize("name", ["speedrun", "max3060", "max3060_180m", "max3060_489m"])
def test_configs_for_a_12_gb_card_fit_it_by_the_plan(script, tmp_path, name):
    out = script(f"configs/{name}.py", "--plan", "--vram=12", f"--out={tmp_path}")
    for word in ("verdict     fits into 12 GB", "largest micro-batch", "parameters", "FLOP", "hours"):
        assert word in out
    assert not list(tmp_path.iterdir())


def test_a_measured_plan_is_by_steps_of_this_machine(tmp_path, script):
    shape = ["--n_layers=1", "--d_model=32", "--n_heads=2", "--batch_size=2", "--max_steps=9"]
    words = ["configs/cpu.py", f"--out={tmp_path}", *shape, "--measure"]
    rate = float(re.search(r"measured .* ([\d,]+) tokens/s", script(*words))[1].replace(",", ""))
    assert 100 < rate < 1e8 and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="--vram"):
        script(*words, "--vram=12")


NONSENSE = """max_steps=0 seed=-1 batch_size=0 grad_accum_steps=-1 log_every=0 grad_clip=-1.0 min_lr=nan
    weight_decay=nan rope_theta=0.0 learning_rate=inf warmup_steps=-1 decay_fraction=-1.0 save_every=-1
    eval_tokens=-1 dropout=1.0 beta2=1.0 head_dim=-2 capacity_factor=-1.0 n_sinks=-1 keep_last=-1""".split()


def test_settings_that_cannot_be_are_refused_by_name_and_nothing_is_written(settings, tmp_path, main, capsys):
    for wrong in NONSENSE:
        assert main(settings(), f"--{wrong}") == 2
        assert f"--{wrong.split('=')[0]}" in capsys.readouterr().err
    assert "--device=banana" in main(settings(), "--device=banana")
    with pytest.raises(ValueError, match="grad_clip"):  # from Python, too
        train.pretrain(settings(grad_clip=-1.0))
    assert not list(tmp_path.iterdir())
    assert torch.cuda.is_available() or "no CUDA" in main(settings(), "--device=cuda")


def test_the_tokenizer_the_config_loader_and_chats_help_need_no_torch():
    heavy = "[m for m in ('torch', 'transformers', 'datasets', 'peft', 'matplotlib') if m in sys.modules]"
    for file, wanted in (
        ("tokenizer", []),
        ("configs", []),
        ("data", []),
        ("chat", []),
        ("train", ["torch"]),
    ):
        code = f"import sys; sys.argv = ['x', '--help']; import {file}; assert {heavy} == {wanted}, {heavy}"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -----------------------------------------------------------------------------
# The machine


@pytest.mark.parametrize("amx, avx, amd, able", [
    (False, False, True, False), (True, True, False, True), (False, True, True, True),
    (False, True, False, False),  # Intel's AVX512-BF16 without AMX is slower than float32
])  # fmt: skip
def test_auto_takes_bfloat16_where_a_cpu_multiplies_it_faster(monkeypatch, amx, avx, amd, able):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(machine.kernels, "is_amd", lambda: amd)
    cpu, fast = torch.device("cpu"), torch.bfloat16 if able else torch.float32
    assert machine.pick_dtype("auto", cpu) == fast
    with torch.device("meta"):
        small, large = torch.nn.Linear(100, 100), torch.nn.Linear(5000, 5000)
    assert machine.dtype_for("auto", small, cpu) == torch.float32
    assert machine.dtype_for("auto", large, cpu) == fast
    assert machine.dtype_for("bfloat16", small, cpu) == torch.bfloat16


@pytest.mark.parametrize("name, teraflops", [
    ("GeForce RTX 3060", 25.5), ("GeForce RTX 4060 Ti", 44.1), ("A100-SXM4-80GB", 312.0), ("T4", None),
    ("GeForce RTX 3060 Ti", None), ("GH200 480GB", None), ("GeForce RTX 4060 Ti Laptop GPU", None),
    ("GeForce RTX 4070 SUPER", None), ("GeForce RTX 5090 D", None), ("H100 PCIe", None),
])  # fmt: skip
def test_only_gpus_whose_peak_is_known_get_one(name, teraflops):
    assert machine.peak_flops(f"NVIDIA {name}") == (teraflops and teraflops * 1e12)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says it so")
def test_peak_memory_is_that_of_this_process_and_not_of_its_parent():
    ballast = np.ones(100_000_000)  # 800 MB
    program = "from support.machine import peak_resident_bytes; print(peak_resident_bytes())"
    child = int(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True))
    assert 50e6 < child < 700e6 < ballast.nbytes <= machine.peak_resident_bytes()
