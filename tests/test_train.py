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
import weakref
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from small_models import GPT, MOE, tiny
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import train
from model import ModernDecoderLM
from support import runs
from support.hf_format import load_tensors
from support.runs import TrainError
from tasks.stories import storyworld
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe, write_tokens
from train import TrainConfig, Trainer, Windows, evaluate_lm, get_lr

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
def pretrain(settings):
    """pretrain(max_steps=3) trains such a run; its run.json."""
    return lambda **more: train.pretrain(settings(**more))


@pytest.fixture
def main(monkeypatch, settings):
    """main(*flags, max_steps=3) runs train.py in this process; its exit code or last message."""

    def main(*words: str, **more) -> int | str:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags(settings(**more)), *words])
        with pytest.raises(SystemExit) as exit:
            train.main()
            raise SystemExit(0)
        return exit.value.code

    return main


@pytest.fixture
def interrupt(monkeypatch, main):
    """interrupt(step, max_steps=3): signals arrive at the beginning of a step; main's exit code."""

    def interrupt(step: int, *signals: int, **more) -> int | str:
        def interrupting(now, *more, do=get_lr):
            if now == step:
                for number in signals or [signal.SIGINT]:
                    os.kill(os.getpid(), number)
            return do(now, *more)

        with monkeypatch.context() as patch:
            patch.setattr(train, "get_lr", interrupting)
            return main(**more)

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


def start(cfg: TrainConfig, n: int = 1) -> list[subprocess.Popen]:
    """Processes that train together, as torchrun would start them."""
    with socket.socket() as free:  # a port below those that systems give away
        free.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 30_000)))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "train.py", *flags(cfg)]
    how = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    return [subprocess.Popen(command, env=ENVIRONMENT | group | rank, **how) for rank in ranks]


def finish(*processes: subprocess.Popen) -> str:
    """Waits for the processes, which must succeed; what the first one said."""
    said = [p.communicate(timeout=100)[0] for p in processes]
    assert not any(p.returncode for p in processes), said
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


def test_two_processes_killed_and_resumed_give_the_same_bits(settings, run, tmp_path):
    cfg = dict(dropout=0.1, by_document=True, batch_size=2, max_steps=90, eval_every=15, save_every=7)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    command = [sys.executable, *torchrun, *flags(settings(name="whole", **cfg))]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=200)
    for step in (9, 31):
        both = start(settings(**cfg), 2)
        wait_for_step(run, step, both[0])
        kill(*both)
        assert read_run(run)["status"] == "running"
    assert "resuming at step" in finish(*start(settings(**cfg), 2))
    assert_same_run(tmp_path / "whole", run)


def test_what_exchanges_gradients_is_gone_before_the_processes_part(settings):
    """In the other order a process may never end: torch's thread and ours wait for each other."""
    gone = []
    trainer = Trainer(settings(), small_model(), uneven_rows)
    trainer.net = nn.Sequential(trainer.model)
    weakref.finalize(trainer.net, gone.append, "DDP")
    trainer.at_end.callback(gone.append, "group")
    trainer.end()
    assert gone == ["DDP", "group"]


@pytest.mark.parametrize("more, tolerance", [
    ({}, 1e-5),
    (dict(parallel="fsdp", optimizer="normuon", ffn="moe", n_experts=2, experts_per_token=1), 1e-3),
])  # fmt: skip
def test_two_processes_equal_one_with_twice_the_accumulation(settings, pretrain, tmp_path, more, tolerance):
    cfg = dict(max_steps=8, batch_size=2, grad_accum_steps=2, **more)
    finish(*start(settings(name="two", **cfg), 2))
    pretrain(name="one", **cfg | dict(grad_accum_steps=4))
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for line in (a, b):  # the router's figures are of the last rows of the first process
            line.pop("router_load", None), line.pop("dropped", None)
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    assert close(load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two"), tolerance)


def test_a_run_goes_on_in_another_number_of_processes(settings, pretrain, run, tmp_path):
    """Four with shards, then two with copies, then one: the run of one process that nobody stopped."""
    cfg = dict(max_steps=50, eval_every=20, save_every=5, context_length=32, sample_tokens=0)
    pretrain(name="whole", batch_size=4, **cfg)
    for n, parallel, step in ((4, "fsdp", 8), (2, "ddp", 25)):
        together = start(settings(batch_size=4 // n, parallel=parallel, **cfg), n)
        wait_for_step(run, step, together[0])
        kill(*together)
    pretrain(batch_size=4, **cfg)
    for a, b in zip(metrics(run), metrics(tmp_path / "whole"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
    assert close(load_tensors(tmp_path / "whole"), load_tensors(run), 1e-3)


@pytest.mark.parametrize("number, more", [
    (signal.SIGINT, dict(optimizer="normuon")), (signal.SIGTERM, dict(save_every=0)),
])  # fmt: skip
def test_a_signal_saves_and_the_same_command_goes_on(pretrain, run, tmp_path, interrupt, number, more):
    cfg = dict(dropout=0.1, **more)
    pretrain(name="whole", **cfg)
    assert interrupt(5, number, **cfg) == 128 + number
    assert (read_run(run)["status"], read_run(run)["step"]) == ("interrupted", 6)
    pretrain(**cfg)
    assert same_weights(tmp_path / "whole", run) and metrics(tmp_path / "whole") == metrics(run)
    assert (run / "checkpoints").exists() == ("save_every" not in more)


def test_a_signal_while_the_run_begins_saves_after_the_first_step(pretrain, run, main, monkeypatch):
    def begin(*about, do=train.first_record) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)  # run.json, by which the page finds the process, follows
        return do(*about)

    with monkeypatch.context() as patch:
        patch.setattr(train, "first_record", begin)
        assert main() == 128 + signal.SIGTERM
    assert (read_run(run)["status"], read_run(run)["step"]) == ("interrupted", 1)
    assert pretrain()["status"] == "finished"


def test_the_copy_of_a_ctrl_c_that_torchrun_passes_on_is_not_a_second_one(run, interrupt, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("gave up without saving"))
    assert interrupt(5, signal.SIGINT, signal.SIGINT) == 130
    assert runs.newest(run).name == "step-6"


def test_a_log_file_gets_lines_as_they_happen_and_a_second_ctrl_c_ends_at_once(settings, run):
    (process,) = start(settings(**ENDLESS))
    assert "parameters" in process.stdout.readline()  # would wait for ever if lines stayed in a buffer
    wait_for_step(run, 2, process)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(number)  # both arrive before the step can end
    said = process.communicate(timeout=20)[0]
    assert process.returncode in (130, 143) and "\r" not in said and "\x1b" not in said
    assert read_run(run)["status"] == "running"


def test_a_second_process_may_not_train_in_the_same_folder(settings, run, main):
    (process,) = start(settings(**ENDLESS))
    wait_for_step(run, 1, process)
    before = read_run(run)
    for more in ([], ["--overwrite"]):
        assert "another process is training in" in main(*more)
    assert read_run(run) == before
    kill(process)
    assert main("--overwrite") == 0


# -----------------------------------------------------------------------------
# One step


def small_model(**more) -> ModernDecoderLM:
    torch.manual_seed(0)
    return ModernDecoderLM(tiny(**more))


def uneven_rows(step: int, first: int, count: int):
    """Rows whose number of targets differs from one to the next, and is 0 now and then."""
    rng = np.random.default_rng(step)
    ids, lengths = rng.integers(0, 61, (12, 17)), rng.integers(0, 17, 12)
    targets = np.where(np.arange(16) < lengths[:, None], ids[:, 1:], -100)
    return tuple(torch.from_numpy(x[first : first + count].copy()) for x in (ids[:, :-1], targets))


def trained(settings, loss=train.next_token_loss, rows_together=1, **more) -> Trainer:
    """After a few steps on uneven rows, 12 a step."""
    cfg = settings(name=f"run{random.random()}", save_every=0, max_steps=6, learning_rate=1e-2, **more)
    how = dict(tokens_per_row=16, rows_together=rows_together)
    trainer = Trainer(cfg, small_model(), uneven_rows, loss, **how)
    trainer.run_all_steps()
    return trainer


def close_models(a: Trainer, b: Trainer, tolerance: float = 1e-5) -> bool:
    return close(a.model.state_dict(), b.model.state_dict(), tolerance)


def test_accumulation_and_gradient_checkpointing_equal_the_big_batch_with_unequal_counts(settings):
    whole = trained(settings, batch_size=12)
    assert close_models(whole, trained(settings, batch_size=4, grad_accum_steps=3))
    assert close_models(whole, trained(settings, batch_size=12, gradient_checkpointing=True))
    other = trained(settings, batch_size=12, seed=2, grad_clip=0.1)
    assert not close_models(whole, other, 1e-3)  # the comparison can fail


def starving(room: int, error: Exception):
    """A loss that runs out of memory with more than `room` rows at a time."""

    def loss(model, ids, targets):
        result = model(ids, targets)
        if len(ids) > room:
            raise error
        return result

    return loss


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


@pytest.mark.parametrize("batch_size, rows_together, fitting, error", [
    (12, 1, 3, OUT_OF_MEMORY), (5, 1, 2, MemoryError()), (12, 2, 2, OUT_OF_MEMORY),
])  # fmt: skip
def test_out_of_memory_halves_the_micro_batch_and_changes_no_result(
    settings, batch_size, rows_together, fitting, error
):
    plenty = trained(settings, batch_size=batch_size)
    little = trained(settings, starving(3, error), rows_together, batch_size=batch_size)
    assert little.micro_batch == fitting and close_models(plenty, little)


def test_what_halving_cannot_help_ends_the_run(settings):
    with pytest.raises(TrainError, match="4 sequences at a time"):
        trained(settings, starving(3, OUT_OF_MEMORY), rows_together=4)
    starved = starving(0, OUT_OF_MEMORY)
    with pytest.raises(TrainError, match="out of memory"):  # outside of a step
        evaluate = lambda model, final: starved(model, *uneven_rows(0, 0, 1))  # noqa: E731
        Trainer(settings(), small_model(), uneven_rows, evaluate=evaluate).run_all_steps()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        trained(settings, starving(3, RuntimeError("mat1 and mat2 shapes")))


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


def test_a_step_without_a_finite_loss_is_skipped_and_counted(settings, run):
    seen = []

    def loss(model, *rows):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        total, count = model(*rows)
        return total * (math.nan if len(seen) == 3 else 1), count

    cfg = settings(max_steps=5, batch_size=12, eval_every=0)
    assert Trainer(cfg, small_model(), uneven_rows, loss).run_all_steps()["status"] == "finished"
    assert same(seen[2], seen[3]) and not same(seen[1], seen[2]) and not same(seen[3], seen[4])
    assert metrics(run, "skipped") == [0, 0, 1, 1, 1]
    assert [line["step"] for line in metrics(run) if "loss" not in line] == [3]


def test_five_bad_steps_in_a_row_also_after_an_interruption_end_the_run(
    pretrain, run, main, interrupt, monkeypatch
):
    def forward(self, ids, targets=None, do=ModernDecoderLM.forward, **rest):
        result = do(self, ids, targets, **rest)
        if targets is not None and self.training:
            result[0].register_hook(lambda gradient: gradient * math.inf)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(ModernDecoderLM, "forward", forward)
        assert interrupt(2, eval_every=0) == 130  # after three bad steps
        message = main(eval_every=0)
    assert "five steps" in message and "--learning_rate" in message and "step-4" in message
    record = read_run(run)
    assert record["status"] == "failed" and record["step"] == 4  # the fifth ended it
    assert pretrain(eval_every=0)["status"] == "finished"  # whatever was wrong is mended


def test_the_loss_falls_in_bfloat16_and_the_weights_stay_in_full_precision(pretrain, run):
    cfg = dict(dtype="bfloat16", max_steps=60, learning_rate=1e-2, log_every=20, eval_every=30, save_every=0)
    pretrain(**cfg)
    losses = metrics(run, "loss")
    assert losses[-1] < losses[0] - 0.5
    assert all(w.dtype == torch.float32 for w in load_tensors(run).values())


@pytest.mark.parametrize("fails", [False, True])
def test_a_compiled_model_learns_the_same_and_a_compiler_that_fails_is_done_without(
    pretrain, run, tmp_path, monkeypatch, capsys, fails
):
    """The compiler "eager" leaves out only the generated code, which takes a minute."""

    def broken(*args):
        raise RuntimeError("no C++ compiler found\nand many more lines")

    pretrain(name="eager", max_steps=4)
    compiler = (lambda net: broken) if fails else partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiler)
    pretrain(compile=True, max_steps=4)
    out = capsys.readouterr().out
    assert out.count("torch.compile failed") == fails and "many more lines" not in out
    assert close(load_tensors(tmp_path / "eager"), load_tensors(run))


# -----------------------------------------------------------------------------
# Optimizers and learning rates


@pytest.mark.parametrize("optimizer, shape", [
    ("adamw", GPT), ("adamw_plain", {}), ("normuon", MOE | dict(qk_norm=True, n_sinks=1)),
    ("muon", GPT | dict(tie_embeddings=False)),
])  # fmt: skip
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
        hidden = {id(p) for p in optimizers[1].param_groups[0]["params"]}
        assert id(model.model["layers"][0].self_attn.q_proj.weight) in hidden
        assert id(model.model["embed_tokens"].weight) not in hidden


def test_the_embedding_has_a_learning_rate_of_its_own(settings):
    trainer = Trainer(settings(embedding_rate=4.0), small_model(), uneven_rows)
    trainer.set_learning_rate(0.5)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates.pop(id(trainer.model.model["embed_tokens"].weight)) == 2.0
    assert set(rates.values()) == {0.5}


def test_the_embeddings_of_a_hub_model_are_found_by_what_they_are_not_by_name(settings):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16, n_positions=8))
    adamw = train.make_optimizers(model, settings(embedding_rate=4.0))[0]
    fast = [p for group in adamw.param_groups for p in group["params"] if group.get("rate") == 4]
    assert {id(p) for p in fast} == {id(model.transformer.wte.weight), id(model.transformer.wpe.weight)}


def matrices() -> list[torch.Tensor]:
    """Square, wide and tall ones, and a stack of three."""
    torch.manual_seed(1)
    return [torch.randn(shape) for shape in ((8, 8), (8, 20), (20, 8), (3, 8, 20))]


def one_by_one(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The matrices, those of the stack each by itself."""
    return [*tensors[:3], *tensors[3]]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_our_muon_equals_torchs_and_moves_a_stack_of_experts_as_its_experts(monkeypatch):
    """On the same matrices, tall, wide and square, when torch's is made to work in float32 as ours does."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours = matrices()
    theirs = [p.clone() for p in one_by_one(ours)]
    how = dict(lr=1e-2, weight_decay=0.1)
    muon, reference = train.Muon(ours, **how), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **how)
    for _ in range(5):
        older = muon.state_dict()
        older["param_groups"][0].pop("beta2", None)  # as checkpoints had none
        muon.load_state_dict(older)
        for p in ours:
            p.grad = torch.randn_like(p)
        for p, grad in zip(theirs, one_by_one([p.grad for p in ours]), strict=True):
            p.grad = grad.clone()
        muon.step()
        reference.step()
    for mine, other in zip(one_by_one(ours), theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def test_normuon_is_muon_whose_rows_are_divided_by_the_size_of_their_steps():
    """Columns in wide matrices; the size of the whole step is Muon's (Li et al., 2025)."""
    how = dict(lr=1.0, weight_decay=0.0)
    ours, theirs, squares = matrices(), matrices(), {}
    normuon, muon = train.Muon(ours, beta2=0.95, **how), train.Muon(theirs, **how)
    for _ in range(3):
        before = [p.clone() for p in one_by_one(ours) + one_by_one(theirs)]
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.randn_like(p)
        normuon.step()
        muon.step()
        after = one_by_one(ours) + one_by_one(theirs)
        moves = [new - old for new, old in zip(after, before, strict=True)]
        for i, (found, move) in enumerate(zip(moves[:6], moves[6:], strict=True)):
            across = 1 if move.shape[0] >= move.shape[1] else 0
            squares[i] = 0.95 * squares.get(i, 0) + 0.05 * move.square().mean(across, keepdim=True)
            expected = move / squares[i].sqrt()
            expected *= move.norm() / expected.norm()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    idle = torch.zeros(8, 8)
    idle.grad = torch.zeros(8, 8)
    train.Muon([idle], beta2=0.95).step()
    assert (idle == 0).all()


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


def test_windows_predict_every_token_once_an_epoch_in_an_order_of_its_own():
    orders = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        windows = Windows(np.arange(1000, dtype=np.uint16), 16, 7, seed)
        batches = [windows.batch(step, 0, 7) for step in range(9 * epoch, 9 * epoch + 9)]  # 63 windows
        ids, targets = map(torch.cat, zip(*batches, strict=True))
        assert sorted(targets[targets != -100].tolist()) == list(range(1, 1000))
        orders.append(ids[:, 0].tolist())
    for other in (orders[1], orders[2], sorted(orders[0])):
        assert orders[0] != other
    assert windows.epoch(9) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("how", [{"sliding_window": 5}, {"positions": "learned"}])
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
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / 400, rel=1e-5)


def test_a_run_that_did_not_know_a_setting_yet_goes_on_only_without_it(settings, pretrain, run, killed_at):
    killed_at(5, train.pretrain, settings(save_every=2))
    record = json.loads((run / "run.json").read_text())
    del record["settings"]["by_document"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(TrainError, match="by_document: False -> True"):
        pretrain(save_every=2, by_document=True)
    assert pretrain(save_every=2)["status"] == "finished"


def test_evaluating_and_sampling_do_not_disturb_training(pretrain, tmp_path):
    pretrain(name="often", dropout=0.1, eval_every=1, save_every=0)
    pretrain(name="never", dropout=0.1, eval_every=0, save_every=0, sample_tokens=0)
    assert same_weights(tmp_path / "often", tmp_path / "never")


def test_eval_tokens_limits_all_evaluations_but_the_last(pretrain, run, tmp_path, tokens):
    whole = json.loads((tokens / "validation.json").read_text())["tokens"] - 1
    pretrain(eval_tokens=100)
    assert metrics(run, "val_tokens") == [100, 100, whole]
    pretrain(name="short", final_eval_tokens=200)
    assert metrics(tmp_path / "short", "val_tokens") == [whole, whole, 200]


# -----------------------------------------------------------------------------
# Checkpoints and the run folder


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(pretrain, run, tmp_path, interrupt, capsys, file):
    cfg = dict(dropout=0.1, eval_every=6, keep_last=3)
    pretrain(name="whole", **cfg)
    interrupt(9, **cfg)
    tear(run / "checkpoints/step-10" / file)
    pretrain(**cfg)
    out = capsys.readouterr().out
    assert "cannot read" in out and "resuming at step 8" in out
    assert_same_run(tmp_path / "whole", run)


def test_after_a_torn_checkpoint_new_ones_are_kept(run, interrupt):
    cfg = dict(eval_every=0, keep_last=1, max_steps=20)
    interrupt(9, **cfg | dict(keep_last=2))
    tear(run / "checkpoints/step-10/state.pt")
    interrupt(8, **cfg)  # resumes at 8, ends at 9: before the torn one
    assert [path.name for path in runs.checkpoints(run)] == ["step-8", "step-9"]
    assert same_weights(run, run / "checkpoints/step-9")


class Payload:
    def __reduce__(self):
        return (print, ("PICKLED CODE RAN",))


def test_checkpoints_that_cannot_be_read_are_kept_and_run_no_code(run, main, interrupt, capsys):
    interrupt(9)
    older, newer = runs.checkpoints(run)
    tear(newer / "state.pt")
    torch.save({"step": 6, "best": Payload()}, older / "state.pt")
    message = main()
    assert "none of the checkpoints" in message and "--overwrite" in message
    assert "PICKLED CODE RAN" not in capsys.readouterr().out
    assert runs.checkpoints(run) == [older, newer]  # nothing is thrown away unasked
    assert main("--overwrite") == 0


def test_other_settings_or_data_that_change_the_result_are_refused(run, tmp_path, tokens, main, interrupt):
    interrupt(5)
    before = last_state(run)
    message = main(learning_rate=0.5, d_model=64)
    for word in ("learning_rate: 0.001 -> 0.5", "d_model: 32 -> 64", "--name", "--overwrite"):
        assert word in message
    assert "warmup" not in message and "must stay the same" in main(batch_size=5)
    other = shutil.copytree(tokens, tmp_path / "tokens")
    info = json.loads((other / "train.json").read_text())
    (other / "train.json").write_text(json.dumps(info | {"fingerprint": "changed"}))
    assert "other data" in main(tokens=str(other))
    write_all_tokens(other, 299)  # another tokenizer; the model has the same number of rows
    assert "other data" in main(tokens=str(other))
    assert same(before, last_state(run)) and read_run(run)["status"] == "interrupted"


def test_settings_that_do_not_change_the_result_may_change(pretrain, run, tmp_path, interrupt):
    pretrain(name="whole")
    interrupt(5)
    free = dict(log_every=3, eval_every=5, save_every=5, keep_last=2, sample_tokens=0, hypothesis="more")
    pretrain(**free, batch_size=2, grad_accum_steps=2)
    assert close(load_tensors(tmp_path / "whole"), load_tensors(run), 1e-6)


@pytest.mark.parametrize("name", [" ", ".", "a/../b", "/tmp/run", "a,b", "name.py"])
def test_a_name_that_leads_out_of_the_output_folder_or_means_something_else_is_refused(tmp_path, main, name):
    for more in ([], ["--overwrite"]):
        assert "--name=" in main(f"--name={name}", *more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save_every", [4, 0])
def test_a_finished_run_says_so_and_does_nothing(pretrain, run, main, capsys, save_every):
    def files() -> dict:
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.rglob("*")}

    pretrain(save_every=save_every)
    before = files()
    assert main(save_every=save_every) == 0
    assert "was trained before" in capsys.readouterr().out and before == files()
    assert "max_steps: 12 -> 13" in main(save_every=save_every, max_steps=13)
    assert main("--overwrite", save_every=save_every, max_steps=13) == 0 and read_run(run)["step"] == 13


def test_overwrite_removes_this_run_and_nothing_else(pretrain, tmp_path, main, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("42")
    pretrain(max_steps=1, name="run/round-1")
    for name in ("thesis", "run", "run"):
        assert main("--overwrite", max_steps=1, name=name) == 0
    assert (tmp_path / "thesis" / "chapter.tex").exists()
    assert (tmp_path / "run/round-1/model.safetensors").exists()
    order = []  # without run.json the next --overwrite would not take what is left for a run: it goes last
    monkeypatch.setattr(Path, "unlink", lambda path, **_: order.append(path.name))
    runs.remove_run(tmp_path / "run")
    assert order[-1] == "run.json" and len(order) > 3 and not (tmp_path / "run/checkpoints").exists()


def test_a_run_goes_on_that_was_renamed_or_whose_parent_was(pretrain, tmp_path, main, interrupt):
    def cfg(name: str, parent: str) -> dict:
        return dict(name=name, init_from=str(tmp_path / parent), dropout=0.2)

    for steps, name in ((2, "parent"), (3, "other")):
        pretrain(name=name, max_steps=steps)
    pretrain(**cfg("whole", "parent"))
    interrupt(5, **cfg("before", "parent"))
    (tmp_path / "before").rename(tmp_path / "after")
    (tmp_path / "parent").rename(tmp_path / "moved")
    assert "init_from" in main(**cfg("after", "other"))
    pretrain(**cfg("after", "moved"))
    assert same_weights(tmp_path / "whole", tmp_path / "after")


def test_a_copy_among_the_checkpoints_is_left_alone(pretrain, run, interrupt):
    interrupt(6)
    checkpoints, copies = run / "checkpoints", {"step-4 (copy)", "step-004", "step-x"}
    for name in copies:
        shutil.copytree(checkpoints / "step-4", checkpoints / name)
    pretrain(save_every=0)
    assert {path.name for path in checkpoints.iterdir()} == copies


@pytest.mark.parametrize("rubbish", [b"\n", b"\xff\xfe{\n", b'{"step": "four"}\n'])
def test_a_damaged_line_of_a_log_takes_no_other_with_it(pretrain, run, interrupt, capsys, rubbish):
    interrupt(6)
    lines, file = metrics(run), run / "metrics.jsonl"
    first, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(first + b"\n" + rubbish + rest + b'{"step": 5, "lo\xe2')
    pretrain()
    assert ("1 damaged lines" in capsys.readouterr().out) == bool(rubbish.strip())
    assert metrics(run)[: len(lines)] == lines and metrics(run, "step")[-1] == 12


@pytest.mark.parametrize(
    "limit", [200_000, 100_000, 100], ids=["state.pt", "model.safetensors", "metrics.jsonl"]
)
def test_a_full_disk_leaves_the_last_checkpoint_and_no_rubbish(
    pretrain, run, tmp_path, main, interrupt, monkeypatch, limit
):
    interrupt(5, eval_every=0)  # a checkpoint is about 170 KB of weights and 340 KB of state
    before = last_state(run)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(runs.RunLog, "say", lambda *_: None)  # what pytest captures is a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))  # the kernel refuses longer files
        try:
            message = main(eval_every=0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert isinstance(message, str) and str(run) in message and "File too large" in message
    assert not list(run.rglob("*tmp*")) and same(before, last_state(run))
    pretrain(name="whole", eval_every=0)
    pretrain(eval_every=0)
    assert_same_run(tmp_path / "whole", run)


def test_a_folder_that_cannot_be_written_is_a_clear_message(tmp_path, main):
    (tmp_path / "file").write_text("in the way")
    message = main(out=str(tmp_path / "file" / "x"))
    assert "cannot read or write" in message and str(tmp_path / "file") in message


def test_save_every_0_leaves_only_the_model_with_the_mode_that_the_umask_asks_for(pretrain, run):
    before = os.umask(0o027)
    try:
        pretrain(save_every=0)
    finally:
        os.umask(before)
    assert {path.name for path in run.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "README.md", "run.json", "metrics.jsonl", "samples.jsonl",
    }  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in run.iterdir()} == {0o640}


def test_the_best_and_the_last_checkpoints_are_kept_and_the_best_is_published(settings, run):
    losses = iter((3.0, 2.0, 2.5, 2.6, 2.7, 2.8))
    cfg = settings(eval_every=2, save_every=2, keep_last=2)
    Trainer(cfg, small_model(), uneven_rows, evaluate=lambda *_: {"val_loss": next(losses)}).run_all_steps()
    assert [path.name for path in runs.checkpoints(run)] == ["step-4", "step-10", "step-12"]
    assert same_weights(run, run / "checkpoints/step-4")
    assert read_run(run)["results"]["best"] == {"step": 4, "val_loss": 2.0}
    (run / "checkpoints/step-4/samples").mkdir()  # it was asked as a model of its own
    runs.publish(run / "checkpoints/step-4")


def test_without_checkpoints_the_results_are_those_of_the_last_model(settings, run):
    losses = iter((1.0, 3.0, 2.0))
    cfg = settings(save_every=0)
    Trainer(cfg, small_model(), uneven_rows, evaluate=lambda *_: {"val_loss": next(losses)}).run_all_steps()
    results = read_run(run)["results"]
    assert results["best"] == results["last"] == {"step": 12, "val_loss": 2.0}


def test_run_json_records_settings_data_and_results(pretrain, run, tokens):
    pretrain(max_steps=4)
    record = read_run(run)
    assert record["status"] == "finished" and record["step"] == 4 and record["seconds"] > 0
    assert record["settings"]["d_model"] == 32 and "d_model" in record["changed"]
    assert not {"beta1", "d_ff"} & {*record["changed"]}  # d_ff follows from what was chosen
    assert record["versions"]["torch"] == torch.__version__ and record["hardware"]["device"]
    assert record["data"]["fingerprint"] == "train-1"
    assert record["data"]["validation"]["fingerprint"] == "validation-1"
    assert record["tokenizer"] == Tokenizer.load(tokens).hash
    assert record["parameters"] == sum(p.numel() for p in ModernDecoderLM.from_pretrained(run).parameters())


def test_the_list_names_runs_and_checkpoints_also_beside_damaged_ones(pretrain, tmp_path, main, capsys):
    pretrain(max_steps=4)
    for name, file, text in (("a", "run.json", "[]"), ("b", "metrics.jsonl", '{"step": [4], "val_loss": 2}')):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        (tmp_path / name / file).write_text(text)
    capsys.readouterr()
    assert main("--list") == 0
    a, b, run, checkpoint = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/a" in a and f"{tmp_path}/b" in b and "damaged" in a and "damaged" in b
    assert "run  finished  step 4" in run and "val_loss" in run
    assert "step-4" in checkpoint and "val_loss" in checkpoint


def test_the_command_of_the_next_step_is_quoted_for_the_shell():
    assert train.describe(Path("my run"), {"step": 1, "seconds": 1}).endswith("python chat.py 'my run'")


# -----------------------------------------------------------------------------
# Weights & Biases


def test_a_resumed_run_is_one_run_of_wandb_also_if_it_was_killed_while_that_was_made(
    pretrain, interrupt, monkeypatch
):
    wandb, opened = MagicMock(), MagicMock(url="https://wandb.test")
    wandb.__spec__ = "by which Python finds it"
    wandb.init.side_effect = [KeyboardInterrupt, opened, opened, opened]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(KeyboardInterrupt):
        pretrain(wandb="project")
    interrupt(2, wandb="project")
    about = pretrain(wandb="project")["wandb"]
    assert about["url"] == opened.url and opened.log.called
    another = pretrain(wandb="project", overwrite=True)["wandb"]
    ids = [call.kwargs["id"] for call in wandb.init.call_args_list]
    assert ids == 3 * [about["id"]] + [another["id"]] and about["id"] != another["id"]
    assert wandb.init.call_args.kwargs["resume"] == "allow"


def test_wandb_that_is_not_installed_is_a_clear_message_before_anything_starts(run, main, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "[wandb]" in main(wandb="project") and not run.exists()


# -----------------------------------------------------------------------------
# Parents, other programs, plans, the command line


def test_init_from_starts_from_another_runs_weights(pretrain, run, tmp_path):
    pretrain(name="parent", max_steps=20, learning_rate=1e-2)
    cfg = dict(init_from=str(tmp_path / "parent"), dropout=0.2, context_length=24)
    record = pretrain(d_model=96, n_heads=3, **cfg)  # the shape is the parent's
    fresh = pretrain(name="fresh", context_length=24)
    assert metrics(run, "val_loss")[0] < fresh["results"]["last"]["val_loss"]
    assert record["parent"] == cfg["init_from"]
    assert record["settings"]["d_model"] == 32 and record["settings"]["dropout"] == 0.2
    assert ModernDecoderLM.from_pretrained(run).config.context_length == 24


def test_init_from_a_run_with_another_vocabulary_is_refused(pretrain, tmp_path, main):
    pretrain(name="parent", max_steps=2)
    write_all_tokens(tmp_path / "parent", 299)
    (tmp_path / "parent/run.json").unlink()  # it holds the hash of the right one
    assert "another vocabulary" in main(init_from=str(tmp_path / "parent"))
    assert "there is no folder" in main(init_from=str(tmp_path / "nowhere"))


def test_a_run_is_a_hugging_face_model_that_writes_the_same_tokens(pretrain, run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pretrain(max_steps=40, learning_rate=1e-2, eval_every=40, context_length=48)
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ours, tokenizer = ModernDecoderLM.from_pretrained(run), Tokenizer.load(run)
    ids = [tokenizer.eot_id, *tokenizer.encode("Once there was")]
    assert their_tokenizer("<|endoftext|>Once there was")["input_ids"] == ids
    (mine,) = ours.generate([ids], 30, temperature=0, stop_tokens=[tokenizer.eot_id])
    out = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30)[0, len(ids) :].tolist()
    assert mine == out and tokenizer.decode(mine) == their_tokenizer.decode(out)


@pytest.fixture
def plan(monkeypatch, capsys):
    """plan(*words): what train.py prints about such a run."""

    def plan(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *words, "--plan"])
        train.main()
        return capsys.readouterr().out

    return plan


@pytest.mark.parametrize("more, rows, times", [(["--vram=6"], 4, 32), (["--vram=80"], 128, 1), ([], 16, 8)])
def test_auto_takes_the_largest_micro_batch_that_fits_and_keeps_the_batch(plan, more, rows, times):
    out = plan("configs/max3060.py", "--batch_size=auto", "--device=cpu", *more)
    assert f"--batch_size=auto: {rows} sequences at a time, {times} times a step" in out
    assert "131,072 tokens a step" in out and "DOES NOT FIT" not in out


@pytest.mark.parametrize("name", ["speedrun", "max3060", "max3060_180m", "max3060_489m"])
def test_configs_for_a_12_gb_card_fit_it_by_the_plan(plan, tmp_path, name):
    out = plan(f"configs/{name}.py", "--vram=12", f"--out={tmp_path}")
    for word in ("verdict     fits into 12 GB", "largest micro-batch", "parameters", "FLOP", "hours"):
        assert word in out
    assert not list(tmp_path.iterdir())


def test_a_plan_refuses_what_the_run_would_refuse(plan):
    with pytest.raises(SystemExit) as stop:
        plan("--look_back=True", "--norm_position=post")
    assert "look_back needs" in str(stop.value)


def test_a_measured_plan_is_by_steps_of_this_machine(tmp_path, main, capsys):
    assert main("--measure") == 0
    rate = re.search(r"measured .* ([\d,]+) tokens/s", capsys.readouterr().out)[1]
    assert 100 < float(rate.replace(",", "")) < 1e8 and not list(tmp_path.iterdir())
    assert "--vram" in main("--measure", "--vram=12")


def test_settings_that_cannot_be_are_refused_by_name_and_nothing_is_written(pretrain, tmp_path, main):
    assert "--device=banana" in main("--device=banana")
    with pytest.raises(ValueError, match="grad_clip"):  # from Python, too
        pretrain(grad_clip=-1.0)
    assert not list(tmp_path.iterdir())
    assert torch.cuda.is_available() or "no CUDA" in main("--device=cuda")


def test_chats_help_needs_no_torch():
    code = "import sys, chat; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
