"""Kills a stage at each of its file operations, runs the same command again, and compares the finished folder
with that of a run that was not disturbed. Every file must be the same: weights to the bit, logs and results
without their times; and no temporary file may be left.

    python tests/kill_schedule.py --stage=train                    # all points of one stage: minutes
    python tests/kill_schedule.py --stage=all --every=5            # every fifth point of all stages
    python tests/kill_schedule.py --stage=dpo --only=57,58         # two points

A point is a rename, link, removal, new folder or opening of a file for writing in the output folder. Python's
audit hooks see them. Each run is a fork of this process, which has already imported torch.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# What differs between two runs of the same command.
TIMES = "seconds tokens_per_second step_seconds eval_seconds peak_memory_gib started minutes git".split()

SHORT = "--device=cpu --dtype=float32 --warmup_steps=1 --log_every=1 --eval_every=3 --save_every=2".split()
TUNE = [*SHORT, "--max_steps=5", "--batch_size=4"]
PAIRS = "--problems=24 --n=6".split()
FEW = "--max_train_examples=40 --max_eval_examples=12 --eval_examples=8".split()
JUDGED = [*PAIRS, "--held_n=6", "--validation_problems=16", "--test_problems=16", "--gold=20"]
MODEL = "--n_layers=1 --d_model=64 --n_heads=2 --context_length=160 --batch_size=4".split()
MODEL += ["--learning_rate=1e-2"]

# stage: (script, flags); {out} is the output folder, where the runs base and sft are already
STAGES = {
    "train": ("train", [*SHORT, *MODEL, "--max_steps=6", "--tokens={out}/tokens", "--sample_tokens=6"]),
    "sft": ("sft", [*TUNE, "--model={out}/base", "--data=arithmetic@60", "--eval_examples=12"]),
    "dpo": ("dpo", [*TUNE, *PAIRS, "--model={out}/sft", "--eval_examples=16", "--collapse=0"]),
    "finetune": ("finetune", [*TUNE, *FEW, "--model={out}/base"]),
    "channel": ("verifier", [*TUNE, *JUDGED, "--model={out}/sft", "--start={out}/base"]),
}
STAGES["lora"] = ("finetune", [*STAGES["finetune"][1], "--lora_r=2", "--merge"])
STAGES["sft_lora"] = ("sft", [*STAGES["sft"][1], "--lora_r=2", "--merge"])
STAGES["head"] = ("verifier", [*STAGES["channel"][1], "--kind=head"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", default="train", choices=[*STAGES, "all"])
    parser.add_argument("--every", type=int, default=1, help="of the points, every so many")
    parser.add_argument("--only", default="", help="points, joined by commas")
    args = parser.parse_args()
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    import_before_forking(stages)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        make_inputs(Path(folder) / "inputs", stages)
        for stage in stages:
            schedule = Schedule(stage, Path(folder))
            points = range(0, len(schedule.points), args.every)
            if args.only:
                points = [int(word) for word in args.only.split(",")]
            for i in points:
                differences = schedule.killed_at(i)
                bad += bool(differences)
                for line in differences:
                    print(f"{stage} {i} {schedule.points[i]}: {line}", flush=True)
            print(f"{stage}: {len(points)} of {len(schedule.points)} points", flush=True)
    print(f"{bad} points differ" if bad else "all the same")
    raise SystemExit(bool(bad))


class Schedule:
    """One stage: the points at which it can be killed, and what it makes if it is not."""

    def __init__(self, stage: str, folder: Path):
        self.script, self.folder = STAGES[stage][0], folder
        self.out = folder / "out"  # the same path for all runs: run.json holds it
        self.flags = [flag.format(out=self.out) for flag in STAGES[stage][1]]
        self.flags += [f"--out={self.out}", "--name=run"]
        self.events = folder / "events"
        self.begin_anew()
        status = self.run()
        assert status == 0, (folder / "log").read_text()
        self.points = self.events.read_text().splitlines()
        self.undisturbed = snapshot(self.out)

    def begin_anew(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.folder / "inputs", self.out)

    def run(self, kill_at: int = -1) -> int:
        """The exit status of the stage, killed at this file operation of the output folder; -1: at none."""
        points = []

        def watch(event: str, path: str | None) -> None:
            if path is None or not path.startswith(f"{self.out}/"):
                return
            if len(points) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            points.append(f"{event} {path.removeprefix(f'{self.out}/')}")

        def stage() -> None:
            call(self.script, self.flags, watch)
            self.events.write_text("\n".join(points))

        return in_a_fork(stage, self.folder / "log")

    def killed_at(self, point: int) -> list[str]:
        """Differences between what is there after a kill and the same command, and what should be."""
        self.begin_anew()
        status = self.run(kill_at=point)
        if status != -signal.SIGKILL:
            return [f"the process was not killed: status {status}"]
        status = self.run()
        if status != 0:
            return [f"the same command ended with {status}: {(self.folder / 'log').read_text()[-300:]}"]
        return compare(self.undisturbed, snapshot(self.out))


def import_before_forking(stages: list[str]) -> None:
    """So that the forks need not. One thread: a fork has only the thread that called it."""
    import torch
    import torch._dynamo  # torch's optimizers import it

    import data

    for stage in ["sft", *stages]:
        importlib.import_module(STAGES[stage][0])
    torch.set_num_threads(1)
    counts = {"train": 12_100, "validation": 1_000, "test": 1_000}  # as many as the stages ask for
    made = {split: [*data.TASKS["arithmetic"].generator(split, n)] for split, n in counts.items()}
    again = replace(data.TASKS["arithmetic"], generator=lambda split, n: made[split][:n])
    data.TASKS["arithmetic"] = again  # making the problems took most of a run's time
    os.fsync = lambda file: None  # a killed process loses nothing that it has written; only a power cut does


def make_inputs(folder: Path, stages: list[str]) -> None:
    """Token files, a base model and, for stages that need it, one that is tuned on word problems."""
    folder.mkdir(parents=True)
    base = [*MODEL, "--max_steps=2", "--warmup_steps=0", "--sample_tokens=0", f"--tokens={folder}/tokens"]
    sft = [f"--model={folder}/base", "--data=arithmetic", "--max_steps=100", "--batch_size=8"]
    sft += ["--learning_rate=1e-2", "--warmup_steps=10", "--eval_every=0", "--eval_examples=8"]
    how = ["--device=cpu", "--save_every=0", f"--out={folder}"]
    steps = [lambda: make_tokens(folder / "tokens")]
    if stages != ["train"]:
        steps.append(lambda: call("train", [*base, *how, "--name=base"]))
    if {"dpo", "channel", "head"} & {*stages}:
        steps.append(lambda: call("sft", [*sft, *how, "--name=sft"]))
    for step in steps:
        log = folder.parent / "log"
        assert in_a_fork(step, log) == 0, log.read_text()


def make_tokens(folder: Path) -> None:
    from data import load_conversations
    from tasks.stories import storyworld
    from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe, write_tokens

    chats = load_conversations("arithmetic", "train")[0][:200]
    texts = [message["content"] for chat in chats for message in chat]
    tokenizer = Tokenizer(*train_bpe(texts, 400, SPECIAL_TOKENS, split_digits=True), SPECIAL_TOKENS)
    tokenizer.save(folder)
    for split, count in (("train", 20), ("validation", 2)):
        info = {"source": "kill_schedule.py", "licence": "none", "fingerprint": split}
        write_tokens(tokenizer, storyworld(split, count), folder, split, info)


# -----------------------------------------------------------------------------
# A run in a fork, and the hook that kills it


def in_a_fork(function, log: Path) -> int:
    """The exit status of a fork that calls `function`; minus the signal that killed it."""

    def logged() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        function()

    fork = multiprocessing.get_context("fork").Process(target=logged)
    fork.start()
    fork.join()
    return fork.exitcode


def call(script: str, flags: list[str], watch=None) -> None:
    """`python SCRIPT.py FLAGS`. watch(event, path) is called before each file operation."""
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *flags]
    if watch:
        sys.addaudithook(lambda event, args: watch(event, changed_path(event, args)))
    module.main()


def changed_path(event: str, args: tuple) -> str | None:
    """The path that a file operation is about to change; None if it is another event."""
    if event == "open":
        path, mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return os.fsdecode(path) if writes and isinstance(path, str | bytes | os.PathLike) else None
    if event in ("os.rename", "os.link"):
        return os.path.abspath(os.fsdecode(args[1]))
    if event in ("os.remove", "os.mkdir", "os.rmdir"):
        path, folder = os.fsdecode(args[0]), args[-1]
        if folder != -1:  # relative to an open folder, as shutil.rmtree does it
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return os.path.abspath(path)
    return None


# -----------------------------------------------------------------------------
# Comparing


def snapshot(folder: Path) -> dict[str, object]:
    """{path: what is in it, without times} of all files."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def content(path: Path):
    if path.is_dir():
        return "folder"
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().split("\n") if line]
    if path.name == "README.md":
        return re.sub(r"[\d.]+ minutes of training|[0-9a-f]{7,40}-dirty|[0-9a-f]{7,40}", "", path.read_text())
    if path.suffix == ".pt":
        import torch

        return without_times(torch.load(path, weights_only=True))
    return path.read_bytes()


def without_times(x):
    """JSON or a checkpoint's state as plain values that == compares: no times, tensors as bytes."""
    if isinstance(x, dict):
        return {str(k): without_times(v) for k, v in x.items() if k not in TIMES}
    if isinstance(x, list | tuple):
        return [without_times(v) for v in x]
    if isinstance(x, float) and x != x:
        return "nan"  # which equals itself
    return x.numpy().tobytes() if hasattr(x, "numpy") else x


def compare(wanted: dict, found: dict) -> list[str]:
    lines = [f"missing {path}" for path in sorted(wanted.keys() - found.keys())]
    lines += [f"left behind {path}" for path in sorted(found.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & found.keys()):
        if wanted[path] != found[path]:
            lines.append(f"{path} differs: {str(wanted[path])[:200]} and {str(found[path])[:200]}")
    return lines


if __name__ == "__main__":
    main()
