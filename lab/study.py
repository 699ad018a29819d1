"""A study: many trainings side by side, each a run folder of its own, and their comparison over seeds.

A run that is finished is not run again; one that was begun goes on, also after Ctrl-C or kill -9. A seed
fixes the order of the data and the initialisation, so runs of one seed are compared in pairs.
"""

import math
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from configs import ROOT, parse_config
from finetune import FinetuneConfig
from support import results
from support.checkpoints import refuse_another_run
from support.costs import estimate_flops
from support.hf_format import from_hf_config
from support.runs import TrainError, read_json, weights_hash
from tokenizer import Tokenizer, TokenizerStageConfig, open_tokens, tokens_folder
from tokenizer import prepare_tokens as make_tokens
from train import FREE_TO_CHANGE, TrainConfig

FOLDER = Path("configs/experiments")


@dataclass
class ExperimentConfig:
    """Which experiments, how often, on what."""

    only: str = ""  # experiments or families, joined by commas; nothing: all
    seeds: int = 3  # runs of each experiment, with seeds 1, 2, ...
    quick: bool = False  # one seed and a twentieth of the steps: to see that everything works
    corpus: str = "storyworld"  # what is read
    tasks: str = "sentiment,arithmetic"  # of the family `transfer`
    jobs: int = 0  # runs at a time, each with one thread; 0: one a core, and one on a CUDA card
    device: str = "auto"  # cuda, cpu, ...
    wandb: str = ""  # also log the runs to this Weights & Biases project
    out: str = "out"  # folder that holds everything the project makes

    @property
    def home(self) -> Path:
        text = re.sub(r"\W+", "_", self.corpus)
        return Path(self.out) / "experiments" / (text + "-quick" * self.quick)

    @property
    def all_seeds(self) -> range:
        return range(1, 2 if self.quick else self.seeds + 1)


@dataclass
class Run:
    """A training run of a study: `python {script} {words}` makes `folder`."""

    name: str
    seed: int
    folder: Path
    words: list[str]  # a config file, flags and the seed
    script: str = "train.py"

    @property
    def log(self) -> Path:
        """What the run printed: beside its folder, since --overwrite empties that."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def made(self) -> results.Run:
        """What it has written so far."""
        return results.Run(self.folder, self.folder.parent)


def run_of(
    cfg: ExperimentConfig, name: str, config: str, flags: list[str], seed: int, script: str = "train.py"
) -> Run:
    """The run {home}/{name}-s{seed}; `config` is a file in configs/experiments."""
    folder = cfg.home / f"{name}-s{seed}"
    words = [
        str(FOLDER / config),
        *flags,
        f"--device={cfg.device}",
        f"--out={cfg.out}",
        f"--name={folder.relative_to(cfg.out)}",
        f"--seed={seed}",
    ]
    if cfg.wandb:
        words.append(f"--wandb={cfg.wandb}")
    return Run(name, seed, folder, words, script)


def settings_of(words: list[str]) -> TrainConfig:
    return parse_config(TrainConfig, "", words)


# -----------------------------------------------------------------------------
# Training what is missing


# What a run may change when it is resumed, and an experiment may not: it makes the results differ.
STRICT = set("final_eval_tokens eval_examples max_eval_examples batch_size grad_accum_steps".split())


def finished(run: Run) -> bool:
    """True if the folder holds what this very command would make, with the same settings."""
    record = run.made.record
    if record.get("status") != "finished":
        return False
    free = {*FREE_TO_CHANGE, "vocab_size"} - STRICT
    about = {}
    if run.script == "train.py":
        wanted = settings_of(run.words)
    else:
        wanted = parse_config(FinetuneConfig, "", run.words)
        free |= {"max_steps", "context_length"}  # worked out by the run
        about["parent_hash"] = weights_hash(wanted.model)
        if "evaluation" not in record:
            return False
    try:
        refuse_another_run(run.folder, record, wanted, about, free)
    except TrainError:
        return False
    return True


class Trainings:
    """Runs commands, some at a time. Ctrl-C is passed on to all of them; each ends as if started by hand."""

    def __init__(self, jobs: int, todo: int):
        self.todo = todo
        self.done = 0
        self.stopped = False
        self.running: set[subprocess.Popen] = set()
        self.env = os.environ | {"END_WITH_PARENT": str(os.getpid())}
        if jobs > 1:
            self.env["OMP_NUM_THREADS"] = "1"

    def execute(self, run: Run, *more: str) -> tuple[int, str]:
        """The status of the command, and the last line that it printed: its result, or why it failed."""
        run.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / run.script), *run.words, *more]
        with open(run.log, "a", encoding="utf-8") as log:
            print("$", shlex.join(command), file=log, flush=True)
            # A session of its own: Ctrl-C in the terminal is passed on once, by us.
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.env, start_new_session=True)
        self.running.add(process)
        if self.stopped:  # just now
            process.send_signal(signal.SIGINT)
        status = process.wait()
        self.running.discard(process)
        if status < 0:
            return status, f"ended by signal {-status} (9: most likely out of memory; fewer --jobs need less)"
        return status, run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]

    def train(self, run: Run) -> str:
        """Why the run failed, or "". One that was begun goes on; if it cannot, it starts anew."""
        if self.stopped:
            return ""
        begun = (run.folder / "run.json").exists()
        other = run.made.record.get("status") == "finished"
        status, last = self.execute(run, *["--overwrite"] * other)
        if status > 0 and begun and not other and not self.stopped:
            print(f"{run.name}, seed {run.seed}, cannot go on ({last}); it starts anew", flush=True)
            status, last = self.execute(run, "--overwrite")
        self.done += 1
        print(f"[{self.done}/{self.todo}] {run.name}, seed {run.seed}: {last}", flush=True)
        return last if status else ""

    def stop(self) -> None:
        self.stopped = True
        for process in [*self.running]:
            process.send_signal(signal.SIGINT)


def train_all(runs: list[Run], jobs: int) -> dict[str, str]:
    """Trains those that are not finished, `jobs` at a time; {folder: why it failed}."""
    missing = [run for run in runs if not finished(run)]
    if missing:
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished; {jobs} at a time", flush=True)
    trainings = Trainings(jobs, len(missing))
    with ThreadPoolExecutor(jobs) as pool:
        try:
            failures = list(pool.map(trainings.train, missing))
        except BaseException:
            trainings.stop()
            raise
    return {str(run.folder): why for run, why in zip(missing, failures, strict=True) if why}


def prepare_tokens(runs: list[Run]) -> None:
    """A tokenizer and token files for each vocabulary, before runs need them side by side."""
    for run in runs:
        c = settings_of(run.words)
        if not has_tokens(tokens_folder(c)):
            flags = [f"--{key}={getattr(c, key)}" for key in ("corpus", "vocab_size", "out")]
            make_tokens(parse_config(TokenizerStageConfig, "", [run.words[0], *flags]))


def has_tokens(folder: Path) -> bool:
    """True if a run can read them. If not, `make_tokens` makes what is missing."""
    try:
        tokenizer = Tokenizer.load(folder)
        for split in ("train", "validation"):
            open_tokens(folder, split, tokenizer)
    except (OSError, ValueError):
        return False
    return True


# -----------------------------------------------------------------------------
# Results, over seeds


def read_run(run: Run) -> dict | None:
    """The figures of a finished training run; None if it did not get there."""
    made = run.made
    record = made.record
    if record.get("status") != "finished":
        return None
    config = from_hf_config(read_json(run.folder / "config.json"))
    tokens = made.metrics[-1]["tokens"]
    return {
        "parameters": record["parameters"],
        "tokens": tokens,
        "flops": estimate_flops(config) * tokens,
        "train_loss": made.typical("loss", 5),
        "val_loss": made.last["val_loss"],
        "bits_per_byte": made.last["bits_per_byte"],
        "steps": record["step"],
        "tokens_per_second": made.typical("tokens_per_second"),
        "peak_memory_gib": max(x.get("peak_memory_gib", 0) for x in made.metrics),
        "seconds": record["seconds"],
    }


def by_seed(runs: list[Run], name: str) -> dict[int, dict]:
    """{seed: figures} of the finished runs of an experiment."""
    return {run.seed: figures for run in runs if run.name == name and (figures := read_run(run))}


STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # by n - 1


def spread(values: list[float]) -> dict:
    """Mean, standard deviation and, from two values on, the 95 % interval of the mean (Student's t)."""
    n = len(values)
    mean = fmean(values)
    if n == 1:
        return {"mean": mean, "n": n}
    sd = stdev(values)
    half = STUDENT.get(n - 1, 1.96) * sd / math.sqrt(n)
    return {"mean": mean, "n": n, "sd": sd, "low": mean - half, "high": mean + half}


def verdict(difference: dict) -> str:
    """What a difference of losses lets one conclude."""
    if "low" not in difference:
        return "one seed: no finding"
    if difference["low"] > 0:
        return "worse"
    return "better" if difference["high"] < 0 else "no difference found"


def compared(name: str, runs: list[Run], failed: dict[str, str]) -> dict:
    """One experiment: its figures over the seeds, and its difference from the baseline, in bits a byte."""
    mine = [r for r in runs if r.name == name]
    seeds = by_seed(runs, name)
    base = by_seed(runs, "baseline")
    entry = {
        "hypothesis": settings_of(mine[0].words).hypothesis,
        "command": " ".join(["python train.py", *mine[0].words]),
        "seeds": seeds,
        "failed": {run.seed: failed[str(run.folder)] for run in mine if str(run.folder) in failed},
    }
    if seeds:
        keys = "train_loss val_loss bits_per_byte tokens_per_second peak_memory_gib seconds"
        for key in keys.split():
            entry[key] = spread([figures[key] for figures in seeds.values()])
    pairs = [seed for seed in seeds if seed in base]
    if pairs and name != "baseline":
        gaps = [seeds[seed]["bits_per_byte"] - base[seed]["bits_per_byte"] for seed in pairs]
        entry["difference"] = spread(gaps)
        entry["verdict"] = verdict(entry["difference"])
    return entry
