"""Training: what is killed, starved or mistreated comes back with the same bits, or says what to do."""

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
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from torch import nn

import train
from model import ModelConfig, ModernDecoderLM
from support import machine, runs
from support.hf_format import load_tensors
from support.runs import TrainError
from tasks.stories import storyworld
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe, write_tokens
from train import AdamW, TrainConfig, Trainer, Windows, evaluate_lm, get_batch, get_lr

ROOT = Path(train.__file__).parent
TINY = dict(n_layers=2, d_model=32, n_heads=2, context_length=16, batch_size=4, device="cpu")
TINY |= dict(
    max_steps=12, warmup_steps=3, log_every=1, eval_every=4, save_every=4, sample_tokens=6, dtype="float32"
)
# What depends on the clock or on the machine; everything else in a log must come out the same again.
MEASURED = {"seconds", "tokens_per_second", "step_seconds", "eval_seconds", "peak_memory_gib", "mfu"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """A folder with a tokenizer of 300 tokens and token files."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text("\n".join(storyworld("train", 40)))
    vocab, merges = train_bpe(folder / "text.txt", 300, SPECIAL_TOKENS)
    tokenizer = Tokenizer(vocab, merges, SPECIAL_TOKENS)
    tokenizer.save(folder)
    for split, n in (("train", 20), ("validation", 2)):
        info = {"source": "a test", "licence": "none", "fingerprint": f"{split}-1"}
        write_tokens(tokenizer, storyworld(split, n), folder, split, info)
    return folder


@pytest.fixture
def settings(tokens, tmp_path):
    """settings(max_steps=3) is a TrainConfig for a tiny run in this test's own folder."""
    return lambda **more: TrainConfig(
        **(TINY | dict(tokens=str(tokens), out=str(tmp_path), name="run") | more)
    )


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def samples(folder: Path) -> list[str]:
    return (folder / "samples.jsonl").read_text().splitlines()


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


def assert_same_run(a: Path, b: Path) -> None:
    assert same(load_tensors(a), load_tensors(b))
    assert same(load_tensors(runs.newest(a)), load_tensors(runs.newest(b)))
    assert same(last_state(a), last_state(b))
    assert metrics(a) == metrics(b)
    assert samples(a) == samples(b)
    assert not list(a.rglob("*.tmp")) + list(b.rglob("*.tmp"))


def flags(cfg: TrainConfig) -> list[str]:
    default = asdict(TrainConfig())
    return [f"--{k}={v}" for k, v in asdict(cfg).items() if v != default[k]]


def command_line(monkeypatch, cfg: TrainConfig, *more: str) -> int | str:
    """Runs train.py's main in this process; its exit code or last message."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(cfg), *more])
    with pytest.raises(SystemExit) as exit:
        train.main()
        raise SystemExit(0)
    return exit.value.code


def start(cfg: TrainConfig, *more: str, **environment) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, "train.py", *flags(cfg), *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def start_together(cfg: TrainConfig, n: int = 2) -> list[subprocess.Popen]:
    """Processes that train together, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(cfg, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(n)]


def finish(*processes: subprocess.Popen) -> str:
    """Waits for the processes, which must succeed; what the first one said."""
    said = [p.communicate(timeout=100)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), said
    return said[0]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    wanted = f'"step": {step},'
    while process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and wanted in path.read_text():
            return
        time.sleep(0.001)
    raise AssertionError(f"ended before step {step}: {process.communicate()[0]}")


# -----------------------------------------------------------------------------
# Killed and resumed


def test_killed_at_random_steps_and_resumed_gives_the_same_bits(settings, tmp_path):
    cfg = dict(dropout=0.1, max_steps=90, eval_every=15, save_every=7, keep_last=2, context_length=32)
    train.pretrain(settings(name="whole", **cfg))
    where = random.Random(7)
    for step in (where.randrange(1, 25), where.randrange(30, 45)):
        process = start(settings(**cfg))
        wait_for_step(tmp_path / "run", step, process)
        time.sleep(where.random() * 0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert runs.read_json(tmp_path / "run" / "run.json")["status"] == "running"
    assert "resuming at step" in finish(start(settings(**cfg)))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_killed_inside_any_write_of_a_checkpoint_and_resumed_gives_the_same_bits(settings, tmp_path):
    cfg = dict(dropout=0.1, max_steps=4, eval_every=2, save_every=2, sample_tokens=2)
    train.pretrain(settings(name="whole", **cfg))
    for moment in itertools.count(1):
        name = f"killed-{moment}"
        child = os.fork()
        if child == 0:  # dies at its moment-th call of any of these, as a power cut would have it
            calls = itertools.count(1)

            def dies(do, calls=calls, moment=moment):
                return lambda *args, **kwargs: os._exit(9) if next(calls) == moment else do(*args, **kwargs)

            os.replace, os.fsync, os.link = dies(os.replace), dies(os.fsync), dies(os.link)
            shutil.rmtree = dies(shutil.rmtree)
            sys.stdout = sys.stderr = open(os.devnull, "w")
            try:
                train.pretrain(settings(name=name, **cfg))
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        if not killed:
            break
        train.pretrain(settings(name=name, **cfg))
        assert_same_run(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name)
    assert moment > 30


def test_two_processes_killed_and_resumed_give_the_same_bits_and_equal_one_process(settings, tmp_path):
    cfg = dict(max_steps=40, eval_every=10, save_every=6, context_length=32, batch_size=2)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole = settings(name="whole", dropout=0.1, **cfg)
    subprocess.run([sys.executable, *torchrun, "train.py", *flags(whole)], cwd=ROOT, env=env, check=True)

    both = start_together(settings(dropout=0.1, **cfg))
    wait_for_step(tmp_path / "run", random.Random(3).randrange(8, 20), both[0])
    for process in both:
        process.kill()
        process.communicate()
    assert "resuming at step" in finish(*start_together(settings(dropout=0.1, **cfg)))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("more", [
    {}, dict(parallel="fsdp"),
    dict(parallel="fsdp", optimizer="muon", ffn="moe", n_experts=2, experts_per_token=1),
])  # fmt: skip
def test_two_processes_equal_one_with_twice_the_accumulation(settings, tmp_path, more):
    cfg = dict(max_steps=8, batch_size=2, grad_accum_steps=2, **more)
    finish(*start_together(settings(name="two", **cfg)))
    train.pretrain(settings(name="one", **cfg | dict(grad_accum_steps=4)))
    close_enough = dict(rel=1e-3, abs=1e-3) if more.get("optimizer") else dict(rel=1e-5, abs=1e-5)
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for line in (a, b):  # the router's figures are of the last rows of the first process
            line.pop("router_load", None), line.pop("dropped", None)
        assert a == pytest.approx(b, **close_enough)
    one, two = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two")
    assert all(torch.allclose(one[k], two[k], atol=close_enough["abs"]) for k in one)


def test_a_run_goes_on_in_another_number_of_processes(settings, tmp_path):
    """Four with shards, then two with copies, then one: the run of one process that nobody stopped."""
    cfg = dict(max_steps=60, eval_every=20, save_every=5, context_length=32, sample_tokens=0)
    train.pretrain(settings(name="whole", batch_size=4, **cfg))
    for n, parallel, step in ((4, "fsdp", 8), (2, "ddp", 25), (2, "fsdp", 40)):
        together = start_together(settings(batch_size=4 // n, parallel=parallel, **cfg), n)
        wait_for_step(tmp_path / "run", step, together[0])
        for process in together:
            process.kill()
            process.communicate()
    train.pretrain(settings(batch_size=4, **cfg))
    for a, b in zip(metrics(tmp_path / "run"), metrics(tmp_path / "whole"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
    whole, run = load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "run")
    assert all(torch.allclose(whole[k], run[k], atol=1e-3) for k in whole)


def interrupt_after(step: int, monkeypatch, cfg: TrainConfig, number=signal.SIGINT, times=1) -> int | str:
    """A signal arrives at the beginning of a step; main's exit code."""

    def interrupting(now, *more, do=get_lr):
        if now == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return do(now, *more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "get_lr", interrupting)
        return command_line(patch, cfg)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("save_every", [4, 0])
def test_a_signal_saves_and_the_same_command_goes_on(
    settings, tmp_path, monkeypatch, number, code, save_every
):
    cfg = dict(dropout=0.1, save_every=save_every)
    train.pretrain(settings(name="whole", **cfg))
    assert interrupt_after(5, monkeypatch, settings(**cfg), number) == code
    run = runs.read_json(tmp_path / "run" / "run.json")
    assert (run["status"], run["step"]) == ("interrupted", 6)
    train.pretrain(settings(**cfg))
    if save_every:
        assert_same_run(tmp_path / "whole", tmp_path / "run")
    else:
        assert same(load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "run"))
        assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_copy_of_a_ctrl_c_that_torchrun_passes_on_is_not_a_second_one(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("gave up without saving"))
    assert interrupt_after(5, monkeypatch, settings(), times=2) == 130
    assert runs.newest(tmp_path / "run").name == "step-6"


def test_a_second_ctrl_c_ends_at_once(settings, tmp_path):
    process = start(settings(max_steps=100_000, eval_every=0, save_every=0))
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGSTOP)  # both arrive before the step can end
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=20)
    assert process.returncode in (130, 143)
    assert runs.read_json(tmp_path / "run" / "run.json")["status"] == "running"


# -----------------------------------------------------------------------------
# One step


def small_model(**more) -> ModernDecoderLM:
    torch.manual_seed(0)
    return ModernDecoderLM(
        ModelConfig(vocab_size=61, context_length=16, n_layers=2, d_model=32, n_heads=2, **more)
    )


def uneven_rows(step: int, first: int, count: int):
    """Rows whose number of targets differs from one to the next, and is 0 now and then."""
    rng = np.random.default_rng(step)
    ids, lengths = rng.integers(0, 61, (12, 17)), rng.integers(0, 17, 12)
    targets = np.where(np.arange(16) < lengths[:, None], ids[:, 1:], -100)
    return tuple(torch.from_numpy(x[first : first + count].copy()) for x in (ids[:, :-1], targets))


def trained(settings, loss=lambda model, *rows: model(*rows), evaluate=None, **more) -> dict:
    """Weights after a few steps on uneven rows, 12 a step."""
    model = small_model()
    cfg = settings(name=f"run{random.random()}", save_every=0, max_steps=6, learning_rate=1e-2, **more)
    Trainer(cfg, model, uneven_rows, loss, evaluate, tokens_per_row=16).run_all_steps()
    return model.state_dict()


def close(a: dict, b: dict, tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(a[k], b[k], atol=tolerance) for k in a)


def test_accumulation_equals_the_big_batch_with_unequal_counts(settings):
    whole = trained(settings, batch_size=12)
    assert close(whole, trained(settings, batch_size=1, grad_accum_steps=12))
    assert close(whole, trained(settings, batch_size=4, grad_accum_steps=3))
    other = trained(settings, batch_size=12, seed=2, grad_clip=0.1)
    assert not close(whole, other, 1e-3)  # the comparison can fail


def test_gradient_checkpointing_changes_nothing(settings):
    assert close(
        trained(settings, batch_size=12), trained(settings, batch_size=12, gradient_checkpointing=True)
    )


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def starving(room: int, error: Exception = OUT_OF_MEMORY):
    """A loss that runs out of memory with more than `room` rows at a time."""

    def loss(model, ids, targets):
        result = model(ids, targets)
        if len(ids) > room:
            raise error
        return result

    return loss


def test_out_of_memory_halves_the_micro_batch_and_changes_no_result(settings, capsys):
    for batch_size, halvings in [(12, 2), (5, 1)]:  # 5 rows do not halve evenly
        plenty = trained(settings, batch_size=batch_size)
        capsys.readouterr()
        assert close(plenty, trained(settings, starving(3), batch_size=batch_size))
        assert capsys.readouterr().out.count("out of memory") == halvings


ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [ALLOCATOR, MemoryError(), RuntimeError("could not create a primitive")])
def test_a_cpu_that_runs_out_of_memory_halves_the_micro_batch_too(settings, capsys, error):
    plenty = trained(settings, batch_size=4)
    assert close(plenty, trained(settings, starving(3, error), batch_size=4))
    assert "micro-batch 2" in capsys.readouterr().out
    with pytest.raises(TrainError, match="out of memory"):  # outside of a step
        trained(
            settings,
            batch_size=4,
            evaluate=lambda model, final: starving(0, error)(model, *uneven_rows(0, 0, 1)),
        )


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("not enough memory")])
def test_other_errors_are_not_taken_for_a_lack_of_memory(settings, error):
    with pytest.raises(type(error), match=str(error)):
        trained(settings, starving(3, error), batch_size=4)


def test_out_of_memory_with_one_row_says_what_to_try(settings):
    with pytest.raises(TrainError, match="1 sequences at a time: try a smaller --batch_size"):
        trained(settings, starving(0), batch_size=12)


def spoilt(steps, how=math.nan):
    """A loss that is not finite in the given forward passes."""
    calls = itertools.count()

    def loss(model, ids, targets):
        total, count = model(ids, targets)
        return total * (how if next(calls) in steps else 1), count

    return loss


@pytest.mark.parametrize("how", [math.nan, math.inf])
def test_a_step_without_a_finite_loss_is_skipped_and_counted(settings, tmp_path, capsys, how):
    torch.manual_seed(0)
    model, seen, spoil = small_model(), [], spoilt({2}, how)

    def loss(model, *rows):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return spoil(model, *rows)

    cfg = settings(max_steps=5, batch_size=12, log_every=1, eval_every=0)
    run = Trainer(cfg, model, uneven_rows, loss).run_all_steps()
    assert same(seen[2], seen[3]) and not same(seen[1], seen[2]) and not same(seen[3], seen[4])
    assert "step 3: loss or gradient is not finite; the update is skipped" in capsys.readouterr().out
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert "loss" not in lines[2] and lines[3]["loss"] > 1  # no figure is better than a made-up one
    assert run["status"] == "finished"


@pytest.mark.parametrize("gradient_only", [False, True])
def test_five_bad_steps_in_a_row_stop_and_leave_the_last_checkpoint(
    settings, tmp_path, monkeypatch, gradient_only
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
        message = command_line(patch, settings(**cfg))
    assert "lower --learning_rate" in message and "step-8" in message
    run = runs.read_json(tmp_path / "run" / "run.json")
    assert run["status"] == "failed" and "five steps" in run["error"]
    train.pretrain(settings(name="whole", **cfg))
    train.pretrain(settings(**cfg))  # whatever was wrong is mended: the checkpoint is as good as ever
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_tiny_model_memorises_one_batch(settings):
    model = small_model()
    ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(0))
    cfg = settings(
        max_steps=150, learning_rate=1e-2, warmup_steps=10, save_every=0, eval_every=0, log_every=50
    )
    Trainer(cfg, model, lambda step, first, count: (ids[:, :-1], ids[:, 1:])).run_all_steps()
    total, count = model(ids[:, :-1], ids[:, 1:])
    assert total / count < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls_in_either_precision(settings, tmp_path, dtype):
    train.pretrain(
        settings(dtype=dtype, max_steps=60, learning_rate=1e-2, log_every=20, eval_every=30, save_every=0)
    )
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    weights = load_tensors(tmp_path / "run")
    assert all(w.dtype == torch.float32 for w in weights.values())  # full precision whatever it computed in


def test_a_compiled_model_learns_the_same(settings, monkeypatch):
    """With the compiler's own front end; "eager" leaves out only the generated code, which takes a minute."""
    compiler, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda net: calls.append(net) or compiler(net, backend="eager"))
    runs = [train.pretrain(settings(name=f"c{c}", compile=c, max_steps=4)) for c in (False, True)]
    assert len(calls) == 1
    losses = [run["results"]["last"]["val_loss"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_compiler_that_fails_is_done_without_and_says_why(settings, tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no C++ compiler found\nand many more lines")

    train.pretrain(settings(name="eager", max_steps=4))
    monkeypatch.setattr(torch, "compile", lambda model: broken)
    train.pretrain(settings(compile=True, max_steps=4))
    out = capsys.readouterr().out
    assert out.count("torch.compile failed, going on without: no C++ compiler found") == 1
    assert "many more lines" not in out
    assert same(load_tensors(tmp_path / "eager"), load_tensors(tmp_path / "run"))


# -----------------------------------------------------------------------------
# Optimizers and schedules


def test_our_adamw_equals_torchs():
    ours, theirs = small_model(), small_model()
    kwargs = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    pairs = [
        (ours, AdamW(ours.parameters(), **kwargs)),
        (theirs, torch.optim.AdamW(theirs.parameters(), **kwargs)),
    ]
    for step in range(20):
        rows = uneven_rows(step, 0, 12)
        for model, optimizer in pairs:
            total, count = model(*rows)
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert close(ours.state_dict(), theirs.state_dict(), 1e-6)


GPT = dict(norm="layer", positions="learned", ffn="gelu", bias=True)
SHAPES = [{}, GPT, dict(ffn="moe", n_experts=4, qk_norm=True, n_sinks=1), dict(tie_embeddings=False)]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_plain", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_is_optimised_once_and_only_matrices_decay(settings, optimizer, shape):
    model = small_model(**shape)
    optimizers = train.make_optimizers(model, settings(optimizer=optimizer))
    groups = [group for one in optimizers for group in one.param_groups]
    seen = [p for group in groups for p in group["params"]]
    assert sorted(map(id, seen)) == sorted(map(id, model.parameters()))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        one_dimensional = p.dim() < 2 or "norm" in name or "bias" in name or "sinks" in name
        assert decay[id(p)] == (0.0 if one_dimensional else 0.1), name
    if optimizer == "muon":
        hidden = {id(p) for group in optimizers[1].param_groups for p in group["params"]}
        assert id(model.model["embed_tokens"].weight) not in hidden
        assert id(model.model["layers"][0].self_attn.q_proj.weight) in hidden


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_our_muon_equals_torchs(monkeypatch):
    """On the same matrices, tall, wide and square, when torch's is made to work in float32 as ours does."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(1)
    ours = [torch.randn(shape) for shape in ((8, 8), (8, 20), (20, 8), (8, 8))]
    theirs, kwargs = [p.clone() for p in ours], dict(lr=1e-2, weight_decay=0.1)
    pairs = (
        (ours, train.Muon(ours, **kwargs)),
        (theirs, torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **kwargs)),
    )
    for step in range(5):
        for parameters, optimizer in pairs:
            torch.manual_seed(step)
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()
    assert close(dict(enumerate(ours)), dict(enumerate(theirs)), 1e-5)


def test_a_stack_of_experts_moves_as_its_experts_would():
    torch.manual_seed(1)
    stack = torch.randn(3, 6, 10)
    alone = list(stack.clone().unbind())
    stack.grad = torch.randn_like(stack)
    for p, grad in zip(alone, stack.grad.clone(), strict=True):
        p.grad = grad
    train.Muon([stack]).step()
    train.Muon(alone).step()
    assert torch.allclose(stack, torch.stack(alone), atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (2, 40, 16)])
def test_orthogonal_makes_singular_values_about_equal_and_keeps_directions(shape):
    torch.manual_seed(1)
    G = torch.randn(shape)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    moved = train.orthogonal(G)
    values = (U.mT @ moved @ V.mT).diagonal(dim1=-2, dim2=-1)
    assert S.max() / S.min() > 2 and values.min() > 0.5 and values.max() < 1.3
    assert torch.allclose(U * values.unsqueeze(-2) @ V, moved, atol=1e-4), "nothing but the values changed"
    assert torch.equal(train.orthogonal(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("optimizer", ["muon", "adamw_plain"])
def test_every_optimizer_resumes_with_the_same_bits(settings, tmp_path, monkeypatch, optimizer):
    train.pretrain(settings(name="whole", optimizer=optimizer))
    interrupt_after(5, monkeypatch, settings(optimizer=optimizer))
    train.pretrain(settings(optimizer=optimizer))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_adamw_to_be_read_trains_like_torchs(settings):
    assert close(trained(settings, batch_size=12), trained(settings, batch_size=12, optimizer="adamw_plain"))


@pytest.mark.parametrize("more, wanted", [
    (["--vram=12"], (16, 8)), (["--vram=6"], (4, 32)), (["--vram=80"], (128, 1)), ([], (16, 8)),
])  # fmt: skip
def test_auto_takes_the_largest_micro_batch_that_fits_and_keeps_the_batch(monkeypatch, capsys, more, wanted):
    words = ["train.py", "configs/max3060.py", "--batch_size=auto", "--plan", "--device=cpu", *more]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(machine, "matmul_flops", lambda dtype: 1e11)
    train.main()
    out = capsys.readouterr().out
    assert f"--batch_size=auto: {wanted[0]} sequences at a time, {wanted[1]} times a step" in out
    assert "131,072 tokens a step" in out and "DOES NOT FIT" not in out


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


def test_cosine_and_linear_equal_transformers():
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for schedule, theirs in [
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
        scheduler = theirs(optimizer, num_warmup_steps=7, num_training_steps=50)
        for step in range(51):
            expected = get_lr(step, 3e-3, 0.0, 7, 50, schedule)
            assert scheduler.get_last_lr()[0] == pytest.approx(expected, abs=1e-9)
            optimizer.step()
            scheduler.step()


# -----------------------------------------------------------------------------
# Data and evaluation


def test_shuffled_windows_predict_every_token_once_an_epoch_in_ever_new_orders():
    orders = []
    for seed, epoch in itertools.product((1, 2), (0, 1)):
        windows = Windows(np.arange(1000, dtype=np.uint16), 16, 7, seed)  # 63 windows, 9 steps of 7
        batches = [windows.batch(9 * epoch + step, 0, 7) for step in range(9)]
        targets = torch.cat([targets.flatten() for _, targets in batches])
        assert sorted(targets[targets != -100].tolist()) == list(range(1, 1000))
        orders.append(torch.cat([ids[:, 0] for ids, _ in batches]).tolist())
        assert windows.epoch(9) == pytest.approx(1, abs=0.02)
    orders.append(sorted(orders[0]))
    assert all(a != b for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize("order", ["shuffled", "random"])
def test_a_batch_is_a_pure_function_of_seed_and_step(order):
    tokens = np.random.default_rng(0).integers(0, 60000, 1000).astype(np.uint16)
    windows, fresh = Windows(tokens, 16, 6, 3, order), Windows(tokens, 16, 6, 3, order)
    forwards = [windows.batch(step, 0, 6) for step in range(30)]
    backwards = [fresh.batch(step, 0, 6) for step in reversed(range(30))][::-1]
    assert same(forwards, backwards)
    assert not same(forwards[0], forwards[1])
    for step in (0, 17):  # however the batch is cut among processes and micro-batches
        parts = [fresh.batch(step, first, 2) for first in (0, 2, 4)]
        assert same([torch.cat(part) for part in zip(*parts, strict=True)], list(forwards[step]))


def test_random_windows_stay_inside_and_reach_both_ends():
    tokens = np.arange(40)
    windows = Windows(tokens, 16, 50, 1, "random")
    ids, targets = map(torch.cat, zip(*(windows.batch(step, 0, 50) for step in range(20)), strict=True))
    assert torch.equal(targets, ids + 1)
    assert ids.min() == 0 and targets.max() == 39


def test_get_batch_has_the_shape_asked_for_and_targets_shifted_by_one():
    data = np.arange(100, dtype=np.uint16)
    rng = np.random.default_rng(0)
    ids, targets = get_batch(data, 400, 8, "cpu", rng)
    assert ids.shape == targets.shape == (400, 8) and ids.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, ids + 1)
    assert ids.min() == 0 and targets.max() == 99
    assert get_batch(data, 2, 8, device="meta")[0].device.type == "meta"
    assert get_batch(data, 2, 99)[1].tolist() == [list(range(1, 100))] * 2


def test_evaluation_predicts_every_token_once():
    model, tokens = small_model().eval().requires_grad_(False), np.random.default_rng(0).integers(0, 61, 100)
    total = 0.0
    for start in range(0, 99, 16):  # the last window has 3 targets
        piece = torch.from_numpy(tokens[start : start + 17])
        logits = model(piece[None, :-1])
        total += float(nn.functional.cross_entropy(logits[0].double(), piece[1:], reduction="sum"))
    for batch_size in (1, 3, 100):
        found = evaluate_lm(model, tokens, 16, batch_size, n_bytes=400)
        assert found["val_tokens"] == 99
        assert found["val_loss"] == pytest.approx(total / 99, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(total / 99), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / 400, rel=1e-6)


def test_evaluating_and_sampling_do_not_disturb_training(settings, tmp_path):
    train.pretrain(settings(name="often", dropout=0.1, eval_every=1, save_every=0))
    train.pretrain(settings(name="never", dropout=0.1, eval_every=0, save_every=0, sample_tokens=0))
    assert same(load_tensors(tmp_path / "often"), load_tensors(tmp_path / "never"))


def test_eval_tokens_limits_all_evaluations_but_the_last(settings, tmp_path, tokens):
    train.pretrain(settings(eval_tokens=100))
    read = [line["val_tokens"] for line in metrics(tmp_path / "run") if "val_tokens" in line]
    whole = json.loads((tokens / "validation.json").read_text())["tokens"] - 1
    assert read == [100, 100, whole]
    train.pretrain(settings(name="short", final_eval_tokens=200))
    read = [line["val_tokens"] for line in metrics(tmp_path / "short") if "val_tokens" in line]
    assert read == [whole, whole, 200]


# -----------------------------------------------------------------------------
# The machine


def test_only_the_steps_of_pretraining_ask_for_the_fastest_products(settings, monkeypatch):
    seen = {"step": set(), "elsewhere": set()}

    def spy(owner, name, where):
        do = getattr(owner, name)

        def spied(*args, **more):
            seen[where].add(torch.get_float32_matmul_precision())
            return do(*args, **more)

        monkeypatch.setattr(owner, name, spied)

    spy(train, "get_lr", "step")
    spy(train, "evaluate_lm", "elsewhere")
    spy(Trainer, "save", "elsewhere")
    monkeypatch.setattr(train, "fastest_products", lambda device: "high")
    train.pretrain(settings(max_steps=4))
    assert seen == {"step": {"high"}, "elsewhere": {"highest"}}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("able", [None, "_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_auto_takes_bfloat16_where_a_cpu_multiplies_it(monkeypatch, able):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == able, raising=False)
    assert machine.pick_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if able else torch.float32)


# -----------------------------------------------------------------------------
# Checkpoints and the run folder


def tear(path: Path) -> None:
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors", "config.json"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(settings, tmp_path, monkeypatch, capsys, file):
    cfg = dict(dropout=0.1, eval_every=6, keep_last=3)
    train.pretrain(settings(name="whole", **cfg))
    interrupt_after(9, monkeypatch, settings(**cfg))
    tear(tmp_path / "run/checkpoints/step-10" / file)
    capsys.readouterr()
    train.pretrain(settings(**cfg))
    out = capsys.readouterr().out
    assert "cannot read" in out and "step-10" in out and "resuming at step 8" in out
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_dropout_is_on_from_the_first_step_whatever_the_model_came_from(settings):
    def losses(dropout):
        model = small_model(dropout=dropout).eval()
        cfg = settings(name=f"run{dropout}", max_steps=2, eval_every=0, save_every=0)
        trainer = Trainer(cfg, model, uneven_rows)
        trainer.run_all_steps()
        return [line["loss"] for line in metrics(trainer.folder)]

    assert losses(0.0)[0] != losses(0.3)[0]


def test_after_a_torn_checkpoint_new_ones_are_kept(settings, tmp_path, monkeypatch):
    cfg = dict(eval_every=0, keep_last=1, max_steps=20)
    interrupt_after(9, monkeypatch, settings(**cfg | dict(keep_last=2)))
    tear(tmp_path / "run/checkpoints/step-10/state.pt")
    interrupt_after(8, monkeypatch, settings(**cfg))  # resumes at 8, ends at 9: before the torn one
    assert [path.name for path in runs.checkpoints(tmp_path / "run")] == ["step-8", "step-9"]
    assert same(load_tensors(tmp_path / "run"), load_tensors(tmp_path / "run/checkpoints/step-9"))


def test_when_all_checkpoints_are_torn_the_message_says_how_to_start_anew(settings, tmp_path, monkeypatch):
    interrupt_after(9, monkeypatch, settings())
    for path in runs.checkpoints(tmp_path / "run"):
        tear(path / "state.pt")
    assert "none of the checkpoints" in (message := command_line(monkeypatch, settings()))
    assert "--overwrite" in message
    assert len(runs.checkpoints(tmp_path / "run")) == 2  # nothing is thrown away unasked
    assert command_line(monkeypatch, settings(), "--overwrite") == 0


class Payload:
    def __reduce__(self):
        return (print, ("PICKLED CODE RAN",))


def test_pickled_code_in_a_checkpoint_is_not_run(settings, tmp_path, monkeypatch, capsys):
    interrupt_after(5, monkeypatch, settings(keep_last=1, eval_every=0))
    for checkpoint in runs.checkpoints(tmp_path / "run"):
        torch.save({"step": 6, "best": Payload()}, checkpoint / "state.pt")
    assert "none of the checkpoints" in command_line(monkeypatch, settings(keep_last=1, eval_every=0))
    assert "PICKLED CODE RAN" not in capsys.readouterr().out


def test_settings_that_change_the_result_are_refused_by_name(settings, tmp_path, monkeypatch):
    interrupt_after(5, monkeypatch, settings())
    before = last_state(tmp_path / "run")
    message = command_line(monkeypatch, settings(learning_rate=0.5, d_model=64))
    assert "learning_rate: 0.001 -> 0.5" in message and "d_model: 32 -> 64" in message
    assert "--name" in message and "--overwrite" in message and "warmup" not in message
    assert "must stay the same" in command_line(monkeypatch, settings(batch_size=5))
    assert same(before, last_state(tmp_path / "run"))
    assert runs.read_json(tmp_path / "run/run.json")["status"] == "interrupted"


def test_settings_that_do_not_change_the_result_may_change(settings, tmp_path, monkeypatch):
    train.pretrain(settings(name="whole"))
    interrupt_after(5, monkeypatch, settings())
    free = dict(
        log_every=3, eval_every=5, save_every=5, keep_last=2, sample_tokens=0, hypothesis="more is more"
    )
    train.pretrain(settings(**free, batch_size=2, grad_accum_steps=2))
    assert close(load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "run"), 1e-6)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/../b", "../run", "/tmp/run", "./"])
def test_a_name_that_leads_out_of_the_output_folder_is_refused(settings, tmp_path, monkeypatch, name):
    train.pretrain(settings(max_steps=1))
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--overwrite"]):
        assert f"--name={name!r}" in command_line(monkeypatch, settings(), f"--name={name}", *more)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("save_every", [4, 0])
def test_a_finished_run_says_so_and_does_nothing(settings, tmp_path, monkeypatch, capsys, save_every):
    def files() -> dict:
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")}

    cfg = settings(save_every=save_every)
    train.pretrain(cfg)
    before = files()
    assert command_line(monkeypatch, cfg) == 0
    assert "nothing to do" in capsys.readouterr().out and before == files()
    assert "max_steps: 12 -> 13" in command_line(monkeypatch, cfg, "--max_steps=13")
    assert command_line(monkeypatch, cfg, "--max_steps=13", "--overwrite") == 0
    assert runs.read_json(tmp_path / "run/run.json")["step"] == 13


def test_overwrite_removes_this_run_and_nothing_else(settings, tmp_path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("42")
    train.pretrain(settings(max_steps=1, name="run/round-1"))
    train.pretrain(settings(max_steps=1))
    for name in ("thesis", "run"):
        assert command_line(monkeypatch, settings(max_steps=1, name=name), "--overwrite") == 0
    assert (tmp_path / "thesis" / "chapter.tex").exists()
    assert (tmp_path / "run/round-1/model.safetensors").exists()


def test_a_kill_within_overwrite_is_followed_by_the_rest_of_it(settings, tmp_path, monkeypatch):
    """Without run.json the next --overwrite would not take what is left for a run: it goes last."""
    train.pretrain(settings(max_steps=4))
    order = []
    monkeypatch.setattr(Path, "unlink", lambda path, **_: order.append(path.name))
    runs.remove_run(tmp_path / "run")
    assert order[-1] == "run.json" and len(order) > 3
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_renamed_run_goes_on(settings, tmp_path, monkeypatch):
    whole = settings(name="whole")
    train.pretrain(whole)
    interrupt_after(6, monkeypatch, settings(name="before"))
    (tmp_path / "before").rename(tmp_path / "after")
    train.pretrain(settings(name="after"))
    assert same(load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "after"))


def test_a_run_goes_on_whose_parent_was_renamed(settings, tmp_path, monkeypatch):
    train.pretrain(settings(name="parent", max_steps=2))
    interrupt_after(6, monkeypatch, settings(init_from=str(tmp_path / "parent")))
    (tmp_path / "parent").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train.pretrain(settings(init_from=str(tmp_path / "moved")))
    train.pretrain(settings(name="other", max_steps=3))
    message = command_line(monkeypatch, settings(name="copy", init_from=str(tmp_path / "other")))
    assert "init_from" in message or "parent_hash" in message


def test_a_copy_among_the_checkpoints_is_left_alone(settings, tmp_path, monkeypatch):
    interrupt_after(6, monkeypatch, settings())
    checkpoints = tmp_path / "run/checkpoints"
    for name in ("step-4 (copy)", "step-4.bak", "step-004", "step-x"):
        shutil.copytree(checkpoints / "step-4", checkpoints / name)
    (checkpoints / "step-77").touch()  # a file
    train.pretrain(settings(save_every=0))
    assert command_line(monkeypatch, settings(), "--list") == 0
    assert {path.name for path in checkpoints.iterdir()} == {
        "step-4 (copy)", "step-4.bak", "step-004", "step-x", "step-77",
    }  # fmt: skip


@pytest.mark.parametrize("rubbish", [b"\n", b"\xff\xfe{\n", b"[1, 2]\n", b'{"step": "four"}\n', b"null\n"])
def test_a_damaged_line_of_a_log_takes_no_other_with_it(settings, tmp_path, monkeypatch, capsys, rubbish):
    train.pretrain(settings(name="whole"))
    interrupt_after(6, monkeypatch, settings())
    file = tmp_path / "run/metrics.jsonl"
    first, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(first + b"\n" + rubbish + rest + b'{"step": 5, "lo\xe2')
    capsys.readouterr()
    train.pretrain(settings())
    assert ("1 damaged lines" in capsys.readouterr().out) == bool(rubbish.strip())
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_all_files_have_the_mode_that_the_umask_asks_for(settings, tmp_path, umask):
    before = os.umask(umask)
    try:
        train.pretrain(settings(max_steps=4))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask} and len(files) > 8


@pytest.mark.parametrize("stop", [True, False])
def test_other_data_or_another_tokenizer_is_refused(settings, tmp_path, tokens, monkeypatch, stop):
    interrupt_after(5, monkeypatch, settings()) if stop else train.pretrain(settings())
    other = tmp_path / "tokens"
    shutil.copytree(tokens, other)
    info = json.loads((other / "train.json").read_text())
    (other / "train.json").write_text(json.dumps(info | {"fingerprint": "changed"}))
    assert "begun on other data" in command_line(monkeypatch, settings(tokens=str(other)))

    vocab, merges = train_bpe(tokens / "text.txt", 299, SPECIAL_TOKENS)  # pads to the same number of rows
    tokenizer = Tokenizer(vocab, merges, SPECIAL_TOKENS)
    tokenizer.save(other)
    for split in ("train", "validation"):
        meta = json.loads((tokens / f"{split}.json").read_text())
        (other / f"{split}.json").write_text(json.dumps(meta | {"tokenizer": tokenizer.hash}))
    assert "begun on other data" in command_line(monkeypatch, settings(tokens=str(other)))


def test_missing_truncated_and_foreign_token_files_say_what_to_run(settings, tmp_path, tokens, monkeypatch):
    assert "python tokenizer.py" in command_line(monkeypatch, settings(tokens=str(tmp_path / "nowhere")))
    for spoil in ("truncated", "foreign", "no validation"):
        other = tmp_path / spoil
        shutil.copytree(tokens, other)
        if spoil == "truncated":
            tear(other / "train.bin")
        elif spoil == "foreign":
            meta = json.loads((other / "train.json").read_text())
            (other / "train.json").write_text(json.dumps(meta | {"tokenizer": "0" * 64}))
        else:
            (other / "validation.bin").unlink()
        message = command_line(monkeypatch, settings(tokens=str(other)))
        assert "python tokenizer.py" in message and str(other) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["state.pt", "model.safetensors", "metrics.jsonl"])
def test_a_full_disk_leaves_the_last_checkpoint_and_no_rubbish(settings, tmp_path, monkeypatch, where):
    limits = {"state.pt": 200_000, "model.safetensors": 100_000, "metrics.jsonl": 100}
    cfg = settings(eval_every=0)  # a checkpoint is about 170 KB of weights and 340 KB of state
    interrupt_after(5, monkeypatch, cfg)
    before = last_state(tmp_path / "run")
    monkeypatch.setattr(Trainer, "say", lambda *_: None)  # what pytest captures is a file, too
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[where], old[1]))  # the kernel refuses longer files
    try:
        message = command_line(monkeypatch, cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert isinstance(message, str) and str(tmp_path / "run") in message and "File too large" in message
    assert not [path for path in (tmp_path / "run").rglob("*tmp*")]
    assert same(before, last_state(tmp_path / "run"))
    train.pretrain(settings(name="whole", eval_every=0))
    train.pretrain(cfg)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_a_clear_message(settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    message = command_line(monkeypatch, settings(out=str(tmp_path / "file" / "x")))
    assert "cannot read or write" in message and str(tmp_path / "file") in message


def test_save_every_0_leaves_only_the_model(settings, tmp_path):
    train.pretrain(settings(save_every=0))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    model |= {"tokenizer.json", "tokenizer_config.json", "README.md"}
    assert left == model | {"run.json", "metrics.jsonl", "samples.jsonl"}


def test_the_best_and_the_last_checkpoints_are_kept_and_the_best_is_published(
    settings, tmp_path, monkeypatch
):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])  # at steps 2, 4, ...
    monkeypatch.setattr(train, "evaluate_lm", lambda *_: {"val_loss": next(losses), "bits_per_byte": 1.0})
    train.pretrain(settings(eval_every=2, save_every=2, keep_last=2))
    folder = tmp_path / "run"
    assert [path.name for path in runs.checkpoints(folder)] == ["step-4", "step-10", "step-12"]
    assert same(load_tensors(folder), load_tensors(folder / "checkpoints/step-4"))
    assert not same(load_tensors(folder), load_tensors(folder / "checkpoints/step-12"))
    best = runs.read_json(folder / "run.json")["results"]["best"]
    assert (best["step"], best["val_loss"]) == (4, 2.0)


def test_run_json_records_settings_data_and_results(settings, tmp_path, tokens):
    train.pretrain(settings(max_steps=4))
    run = runs.read_json(tmp_path / "run/run.json")
    assert run["status"] == "finished" and run["step"] == 4 and run["seconds"] > 0
    assert run["settings"]["learning_rate"] == 1e-3 and run["settings"]["d_model"] == 32
    # d_ff and head_dim follow from what was chosen
    assert {"max_steps", "d_model"} <= set(run["changed"]) and not {"beta1", "d_ff"} & set(run["changed"])
    assert run["versions"]["torch"] == torch.__version__ and "python" in run["versions"]
    assert run["hardware"]["device"] and run["hardware"]["threads"] == 1
    assert run["data"]["fingerprint"] == "train-1"
    assert run["data"]["validation"]["fingerprint"] == "validation-1"
    assert run["tokenizer"] == Tokenizer.load(tokens).hash
    model = ModernDecoderLM.from_pretrained(tmp_path / "run")
    assert run["parameters"] == sum(p.numel() for p in model.parameters())
    assert run["results"]["last"]["val_loss"] > 0 and run["dtype"] == "float32"
    assert run["git"] and run["started"]


def test_list_names_runs_and_checkpoints(settings, tmp_path, monkeypatch, capsys):
    train.pretrain(settings(max_steps=4))
    capsys.readouterr()
    assert command_line(monkeypatch, settings(), "--list") == 0
    out = capsys.readouterr().out
    assert "run  finished  step 4" in out and "step-4" in out and out.count("val_loss") == 2
    assert command_line(monkeypatch, settings(out=str(tmp_path / "empty")), "--list") == 0
    assert "no runs" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["speedrun", "max3060", "max3060_180m", "max3060_489m"])
def test_configs_for_a_12_gb_card_fit_it_by_the_plan(monkeypatch, capsys, tmp_path, name):
    words = [f"configs/{name}.py", "--plan", "--vram=12", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    train.main()
    out = capsys.readouterr().out
    assert "verdict     fits into 12 GB" in out and "largest micro-batch" in out
    for word in ("parameters", "GiB", "FLOP", "hours"):
        assert word in out
    assert not list(tmp_path.iterdir())


def test_a_measured_plan_is_by_steps_of_this_machine(tmp_path, monkeypatch, capsys):
    shape = ["--n_layers=1", "--d_model=32", "--n_heads=2", "--batch_size=2", "--max_steps=9"]
    argv = ["train.py", "configs/cpu.py", f"--out={tmp_path}", *shape, "--measure"]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    rate = float(re.search(r"measured .* ([\d,]+) tokens/s", capsys.readouterr().out)[1].replace(",", ""))
    assert 100 < rate < 1e8 and not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", [*argv, "--vram=12"])
    with pytest.raises(SystemExit, match="leave out --vram"):
        train.main()


@pytest.mark.parametrize("name, teraflops", [
    ("GeForce RTX 3060", 25.5), ("GeForce RTX 4060 Ti", 44.1), ("GeForce RTX 5090", 209.5), ("H200", 989.0),
    ("A100-SXM4-80GB", 312.0), ("H100 80GB HBM3", 989.0), ("GeForce RTX 3060 Ti", None),
    ("GH200 480GB", None),
    ("GeForce RTX 3060 Laptop GPU", None), ("GeForce RTX 4070 SUPER", None), ("GeForce RTX 5090 D", None),
    ("GeForce RTX 4060", None), ("GeForce RTX 4060 Ti Laptop GPU", None), ("H100 PCIe", None), ("T4", None),
])  # fmt: skip
def test_only_gpus_whose_peak_is_known_get_one(name, teraflops):
    assert machine.peak_flops(f"NVIDIA {name}") == (teraflops and teraflops * 1e12)


def test_wandb_that_is_not_installed_is_a_clear_message_before_anything_starts(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "[wandb]" in command_line(monkeypatch, settings(wandb="project"))
    assert not (tmp_path / "run").exists()


FAKE_WANDB = """
import json, pathlib
log = pathlib.Path(__file__).with_name("calls.jsonl")
def note(**call):
    with open(log, "a") as file: file.write(json.dumps(call) + "\\n")
class Run:
    def __init__(self, id): self.url = f"https://wandb.test/{id}"
    def log(self, line, step): note(step=step)
    def finish(self): note(finished=True)
def init(id=None, **more):
    note(id=id, resume=more.get("resume"), project=more["project"])
    return Run(id)
"""


@pytest.fixture
def wandb_calls(tmp_path, monkeypatch):
    """A wandb that writes down how it is called; the function reads that."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (site / "wandb.py").write_text(FAKE_WANDB)
    (site / "calls.jsonl").touch()
    return lambda: [json.loads(line) for line in (site / "calls.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_one_run_of_wandb(settings, tmp_path, monkeypatch, wandb_calls):
    for step in (2, 6):  # before the first checkpoint, and behind it
        interrupt_after(step, monkeypatch, settings(wandb="project"))
    about = train.pretrain(settings(wandb="project"))["wandb"]
    assert about == runs.read_json(tmp_path / "run/run.json")["wandb"]
    begun = [call for call in wandb_calls() if "id" in call]
    assert begun == 3 * [{"id": about["id"], "resume": "allow", "project": "project"}]
    assert about["url"] == f"https://wandb.test/{about['id']}"
    anew = train.pretrain(settings(wandb="project", overwrite=True))
    assert anew["wandb"]["id"] != about["id"]


def test_the_id_of_a_wandb_run_is_written_before_the_run_is_made(
    settings, tmp_path, monkeypatch, wandb_calls
):
    import wandb

    def dies(**more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(wandb, "init", dies)
        train.pretrain(settings(wandb="project"))
    known = runs.read_json(tmp_path / "run/run.json")["wandb"]["id"]
    assert train.pretrain(settings(wandb="project"))["wandb"]["id"] == known


def test_init_from_starts_from_another_runs_weights(settings, tmp_path, monkeypatch):
    train.pretrain(settings(name="parent", max_steps=20, learning_rate=1e-2))
    parent = str(tmp_path / "parent")
    child = settings(name="child", init_from=parent, d_model=96, n_heads=3, context_length=24, dropout=0.2)
    run = train.pretrain(child)
    first = next(line["val_loss"] for line in metrics(tmp_path / "child") if "val_loss" in line)
    fresh = train.pretrain(settings(context_length=24))
    assert first < fresh["results"]["last"]["val_loss"]
    assert run["parent"] == parent
    assert run["settings"]["d_model"] == 32 and run["settings"]["dropout"] == 0.2
    config = ModernDecoderLM.from_pretrained(tmp_path / "child").config
    assert config.context_length == 24  # what it was trained on last
    interrupt_after(
        5, monkeypatch, settings(name="stopped", init_from=parent, dropout=0.2, context_length=24)
    )
    train.pretrain(settings(name="stopped", init_from=parent, dropout=0.2, context_length=24))
    assert same(load_tensors(tmp_path / "child"), load_tensors(tmp_path / "stopped"))


def test_init_from_a_run_with_another_vocabulary_is_refused(settings, tmp_path, tokens, monkeypatch):
    train.pretrain(settings(name="parent", max_steps=2))
    vocab, merges = train_bpe(tokens / "text.txt", 299, SPECIAL_TOKENS)
    Tokenizer(vocab, merges, SPECIAL_TOKENS).save(tmp_path / "parent")
    (tmp_path / "parent/run.json").unlink()  # it holds the hash of the right one
    message = command_line(monkeypatch, settings(init_from=str(tmp_path / "parent")))
    assert "another vocabulary" in message
    assert "there is no folder" in command_line(monkeypatch, settings(init_from=str(tmp_path / "nowhere")))


def test_a_run_is_a_hugging_face_model_that_writes_the_same_tokens(settings, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train.pretrain(settings(max_steps=40, learning_rate=1e-2, eval_every=40, context_length=48))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ours, tokenizer = ModernDecoderLM.from_pretrained(tmp_path / "run"), Tokenizer.load(tmp_path / "run")
    ids = [tokenizer.eot_id, *tokenizer.encode("Once there was")]
    assert their_tokenizer("<|endoftext|>Once there was")["input_ids"] == ids
    (mine,) = ours.generate([ids], 30, temperature=0, stop_tokens=[tokenizer.eot_id])
    out = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30)[0, len(ids) :].tolist()
    assert mine == out
    assert tokenizer.decode(mine) == their_tokenizer.decode(out)


# -----------------------------------------------------------------------------
# The command line


NONSENSE = """max_steps=0 seed=-1 batch_size=0 grad_accum_steps=-1 log_every=0 grad_clip=-1.0 min_lr=nan
    weight_decay=nan rope_theta=0.0 norm_eps=nan learning_rate=inf warmup_steps=-1 decay_fraction=-1.0
    save_every=-1 eval_tokens=-1 n_kv_heads=-1 d_ff=-1 dropout=nan dropout=1.0 beta2=1.0 head_dim=-2
    capacity_factor=-1.0 sliding_window=-1 n_sinks=-1 keep_last=-1 sample_tokens=-1""".split()


def test_settings_that_cannot_be_are_refused_by_name_and_nothing_is_written(
    settings, tmp_path, monkeypatch, capsys
):
    for wrong in NONSENSE:
        assert command_line(monkeypatch, settings(), f"--{wrong}") == 2
        assert f"--{wrong.split('=')[0]}" in capsys.readouterr().err
    assert "--device=banana" in command_line(monkeypatch, settings(), "--device=banana")
    with pytest.raises(ValueError, match="grad_clip"):  # from Python, too
        train.pretrain(settings(grad_clip=-1.0))
    assert not list(tmp_path.iterdir())
    assert "no CUDA" in command_line(monkeypatch, settings(), "--device=cuda") or torch.cuda.is_available()


def test_a_log_file_gets_lines_as_they_happen_and_no_progress_bar(settings, tmp_path):
    process = start(settings(max_steps=100_000, eval_every=0, save_every=0))
    assert "parameters" in process.stdout.readline()  # would wait for ever if lines stayed in a buffer
    wait_for_step(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=20)[0]
    assert process.returncode == 143 and "the same command goes on from here" in rest
    assert "\r" not in rest and "\x1b" not in rest


def test_a_second_process_may_not_train_in_the_same_folder(settings, tmp_path, monkeypatch):
    process = start(settings(max_steps=100_000, eval_every=0, save_every=0))
    wait_for_step(tmp_path / "run", 1, process)
    before = runs.read_json(tmp_path / "run/run.json")
    for more in ([], ["--overwrite"]):
        assert "another process is training in" in command_line(monkeypatch, settings(), *more)
    assert runs.read_json(tmp_path / "run/run.json") == before
    process.kill()
    process.communicate()
    assert command_line(monkeypatch, settings(), "--overwrite") == 0


def test_the_tokenizer_the_config_loader_and_chats_help_need_no_torch():
    heavy = "[m for m in ('torch', 'transformers', 'datasets', 'peft', 'matplotlib') if m in sys.modules]"
    for import_ in ("tokenizer", "configs", "data", "chat"):
        code = f"import sys; sys.argv = ['x', '--help']; import {import_}; assert not {heavy}, {heavy}"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    code = f"import sys, train; heavy = {heavy}; assert heavy == ['torch'], heavy"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says it so")
def test_peak_memory_is_that_of_this_process_and_not_of_its_parent():
    ballast = np.ones(100_000_000)  # 800 MB
    program = "from support.machine import peak_resident_bytes; print(peak_resident_bytes())"
    child = int(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True))
    assert 50e6 < child < 700e6 < ballast.nbytes <= machine.peak_resident_bytes()
