"""What commands cost before they run: minutes, memory and disk space.

    bash run_all.sh speedrun --plan --vram=12                  # a profile; run_all.sh also begins with it
    python -m lab.plan sft.py configs/sft.py --batch_size=16   # one stage, with the flags it would get
    python -m lab.plan finetune.py configs/sst2.py --vram=12   # ... on a GPU that is not in this machine

A stage is counted in tokens of three kinds: those it trains on, those it samples one by one, and those whose
likelihood it reads. The seconds of a token of each kind are measured on this machine with the models' own
shapes, some seconds each. For another GPU they follow from its data sheet, with the constants below. Nothing
is downloaded: the sizes of real tasks are known.

"GiB to train" is the peak of a training step by `estimate_memory`; "GiB to answer" the peak of generation and
of the likelihoods of answers, in batches as large as there is room for (both: support/costs.py). On a CPU
both include 0.4 GiB of libraries. If what will be downloaded and written does not fit on the disk, that is an
error.
"""

from support.terminal import run_script

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from configs import ROOT, ConfigError, parse_config
from data import CORPORA, EMBEDDED, TASKS
from dpo import DPOConfig
from eval import EvalConfig, read_words
from finetune import AdaptConfig, FinetuneConfig
from model import ModelConfig, ModernDecoderLM
from sft import SFTConfig, mixture
from support.costs import (
    CUDA_CONTEXT,
    FRAGMENTATION,
    GIB,
    Shape,
    count_parameters,
    estimate_flops,
    estimate_memory,
    generation_bytes,
    likelihood_bytes,
    shape_of,
)
from support.files import write_atomically
from support.hf_format import from_hf_config
from support.kernels import fastest_products, float32_products
from support.machine import cpu_name, peak_flops, pick_device, pick_dtype
from support.memory import room, rows_that_fit
from support.plan import Step, planned_for, usable
from support.runs import read_json
from support.text_model import on_all_cores
from support.timing import medians, seconds_of
from tokenizer import TokenizerStageConfig
from train import TrainConfig
from verifier import VerifierConfig


class Size(NamedTuple):
    """Rows of a task's splits; tokens of a question and of its answer: of the embedded tasks by a tokenizer
    of ours with 1,024 tokens, of the others by GPT-2's.
    """

    train: int
    validation: int
    test: int
    question: int
    answer: int

    @property
    def tokens(self) -> int:
        return self.question + self.answer


SIZES = {
    "arithmetic": Size(4_000, 500, 1_000, 51, 51),
    "sentiment": Size(4_000, 500, 1_000, 22, 2),
    "dialogue": Size(4_000, 500, 1_000, 83, 24),
    "instructions": Size(4_000, 500, 1_000, 23, 18),
    "gsm8k": Size(6_973, 500, 1_319, 65, 140),
    "sst2": Size(67_349, 872, 872, 16, 1),
    "samsum": Size(14_731, 818, 819, 150, 28),
    "alpaca": Size(46_800, 2_600, 2_600, 25, 65),
    "dolly": Size(13_500, 750, 750, 100, 90),
    "lima": Size(930, 50, 50, 90, 500),
}
STORIES = Size(4_000, 300, 300, 226, 4)  # documents of a corpus, of which SFT takes some
MEGABYTES = {"tinystories": 2_230, "wikitext2": 11, "wikitext103": 540, "fineweb_edu": 5_500,
             "storyworld": 21.6, "arithmetic": 6.3, "numbers": 6.6}  # fmt: skip
MADE, ENCODED = (
    5.0,
    7.0,
)  # MB/s: text made up on the spot by one core; files that a core encodes (report/speed.md)
LONGEST = 3  # the longest question of a task has so many times its mean tokens
# Seconds of a stage over those of bare steps, as runs on two CPUs and an H100 had them: the Trainer and its
# data; then also masks between packed conversations; then answers padded to their rivals' length.
TRAINING = 1.1
PACKED = 1.22
RIVALS = 1.25
TEXTS = 1.3  # the same for sampling and likelihoods: texts made of tokens, judged and kept
# A measurement on a CPU takes at most so many FLOPs at a time and so many seconds: GPT-2's own steps take
# minutes.
CPU_FLOPS = 3e10
CPU_SECONDS = 2.0
# Of a GPU that is not here: the share of its peak that pretraining reaches, and that the short texts of other
# stages do; seconds of a decoding step besides arithmetic, a layer. (An H100's: 0.31 and 0.40 for speedrun.py
# and max3060.py, 0.01, 0.0001.)
PRETRAINING = 0.40
TUNING = 0.12
STEP_OF_A_LAYER = 0.00015


@dataclass
class PlanConfig:
    """For which machine, and where commands put what they make."""

    plan: bool = False  # nothing else: run_all.sh's flag for the plan alone
    vram: float = 0.0  # plan for a GPU with this many GB instead of the machine here
    card: str = ""  # plan for a GPU of this name, such as "RTX 3090"; with --vram alone an RTX 3060
    device: str = "auto"  # cuda, cpu, ...
    out: str = "out"  # folder that holds everything the project makes


@dataclass(frozen=True)
class Model:
    """A model that a command reads or makes."""

    config: ModelConfig
    kind: str = "causal"  # "causal", "seq2seq" or "head"
    ours: bool = True  # True: computed by model.py; False: by transformers
    taught: bool = True  # a task or conversations: it ends its answers

    @property
    def parameters(self) -> int:
        return count_parameters(self.config)["total"]


def on_hub(kind: str = "causal", **config) -> Model:
    return Model(ModelConfig(**config), kind, ours=kind == "causal", taught=False)


ON_HUB = {  # models that the configs and the README name
    "gpt2": on_hub(vocab_size=50_257, context_length=1024, n_layers=12, d_model=768, n_heads=12, d_ff=3072,
                   norm="layer", ffn="gelu", positions="learned", bias=True),
    "google/flan-t5-small": on_hub("seq2seq", vocab_size=32_128, context_length=512, n_layers=16, d_model=512,
                                   n_heads=6, head_dim=64, d_ff=1024),  # encoder and decoder together
    "TinyLlama/TinyLlama_v1.1": on_hub(vocab_size=32_000, context_length=2048, n_layers=22, d_model=2048,
                                       n_heads=32, n_kv_heads=4, d_ff=5632, tie_embeddings=False),
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """The largest batch that a model gets: prompts of `length` tokens continued by `new`, n times each; or
    (new = 0) texts of `length` tokens whose likelihood is read.
    """

    shape: Shape
    parameters: int
    length: int
    new: int = 0
    n: int = 1
    sampled: bool = False
    beside: float = 0.0  # bytes that training has left: weights, gradients and moments of its model

    def weights(self, on_cpu: bool) -> float:
        """Bytes: ours are float32, on a GPU with a copy in bfloat16; transformers' are bfloat16 there."""
        each = 4 if on_cpu else 6 if self.shape.ours else 2
        return self.beside + each * self.parameters

    def rows(self, space: float, on_cpu: bool) -> int:
        """As many as TextModel takes where there are `space` bytes."""
        most = 256 if on_cpu else 1024
        if not self.new:
            tokens = min(4096 if on_cpu else 32_768, 2**28 // self.shape.vocab_size)
            most = min(256, tokens // self.length)
        return max(self.n, rows_that_fit(partial(self.bytes, on_cpu=on_cpu), most, space))

    def bytes(self, rows: int, on_cpu: bool) -> int:
        how = dict(size=4 if on_cpu else 2, on_cpu=on_cpu)
        if not self.new:
            return likelihood_bytes(self.shape, rows, self.length, self.length, **how)
        return generation_bytes(self.shape, rows, self.length, self.new, self.n, sampled=self.sampled, **how)


@dataclass
class Work:
    """What a command does, in tokens, and the model that does it."""

    shape: ModelConfig | None = None
    trains: float = 0.0
    samples: float = 0.0
    reads: float = 0.0
    seconds: float = 0.0  # besides; at last all
    megabytes: float = 0.0  # downloaded or written
    rows: int = 0  # of a training step's micro-batch, and their length
    length: int = 0
    pretraining: bool = False
    overhead: float = TRAINING  # seconds over those of bare steps
    options: dict = field(default_factory=dict)  # of estimate_memory
    note: str = ""
    asks: list[Batch] = field(default_factory=list)
    stage: str = ""
    train_gib: float = 0.0  # peak of a training step, and of generation and likelihoods
    answer_gib: float = 0.0

    @property
    def full(self) -> bool:
        """True if all weights are trained; False for an adapter."""
        return not self.options.get("trained")


# -----------------------------------------------------------------------------
# The work of each script


class Plan:
    """Counts the work of one command after the other. A command may use what an earlier one makes."""

    def __init__(self):
        self.models = dict(ON_HUB)
        self.kept: set[tuple] = set()  # sampled answers, and judgements of them, that a later stage finds

    def count(self, words: list[str]) -> Work:
        """The work of `python SCRIPT FLAGS...`: by the method of the script's name, from its config."""
        script = Path(words[0]).stem
        flags = [w for w in words[1:] if w != "--batch_size=auto"]
        counter = getattr(self, script, None)
        if counter is None:  # chat.py
            return Work()
        Config = counter.__annotations__["cfg"]
        return counter(parse_config(Config, "", read_words(flags) if Config is EvalConfig else flags))

    def model(self, name: str) -> Model:
        """Of an earlier command, of a run folder, or of the hub."""
        if name in self.models:
            return self.models[name]
        folder = Path(name)
        run = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
        taught = run.get("stage") != "train"
        if (folder / "config.json").exists():
            with contextlib.suppress(ValueError):  # model.py cannot compute it: a tuned T5
                return Model(from_hf_config(read_json(folder / "config.json")), taught=taught)
        if run.get("parent"):  # an adapter, or such a model
            return replace(self.model(run["parent"]), taught=taught)
        raise ConfigError(f"the shape of {name} is not known: no folder, no earlier stage, not among "
                          f"{', '.join(ON_HUB)}")  # fmt: skip

    def ask(self, model: Model, task: str, shots: int = 0, context: int = 0, **more) -> Batch:
        """The batch in which `model` answers `task` after `shots` worked examples."""
        size = SIZES[task]
        context = min(context or model.config.context_length, model.config.context_length)
        new = min(TASKS[task].max_new_tokens, context // 2)
        most = context if model.kind == "seq2seq" else context - max(new, size.answer)
        length = min(LONGEST * size.question + shots * size.tokens, most)
        if TASKS[task].labels:
            length = length + size.answer
            new = 0
        return Batch(shape_of(model.config, model.kind, model.ours), model.parameters, length, new, **more)

    def read(self, model: Model, length: int) -> Batch:
        """The batch in which the likelihood of texts of `length` tokens is read."""
        shape = shape_of(model.config, model.kind, model.ours)
        return Batch(shape, model.parameters, min(length, model.config.context_length))

    def once(self, tokens: float, *key) -> float:
        """`tokens`; 0 if an earlier stage has kept the answers (or judgements) of this key."""
        first = key not in self.kept
        self.kept.add(key)
        return tokens if first else 0.0

    def draw(self, model: str, task: str, split: str, answers: float) -> float:
        """Tokens of so many sampled answers."""
        return self.once(answers * SIZES[task].answer, model, task, split, answers)

    def judge(self, verifier: str, model: str, task: str, split: str, answers: float) -> float:
        """Tokens of those that differ, read by the generator and by the channel."""
        return self.once(2 * 0.6 * answers * SIZES[task].tokens, verifier, model, split, answers)

    def tokenizer(self, cfg: TokenizerStageConfig) -> Work:
        """The text is read twice: to learn merges, and to be encoded."""
        names = [part.partition(":")[0] for part in cfg.corpus.split(",")]
        size = sum(MEGABYTES.get(name, 0) for name in names)
        learnt, encoded = (min(most or size, size) for most in (cfg.learn_megabytes, cfg.train_megabytes))
        home = Path(os.environ.get("DATA_DIR") or "data")
        rate = MADE
        downloads = 0
        for name in CORPORA.keys() & names:
            rate = ENCODED * (os.cpu_count() or 1)
            if not (home / CORPORA[name].folder).exists():
                downloads += MEGABYTES.get(name, 0)
        note = "" if size else f"the size of {cfg.corpus} is not known"
        tokens = 2 * encoded / 3.5  # MB, two bytes each
        return Work(seconds=(learnt + encoded) / rate, megabytes=downloads + tokens, note=note)

    def train(self, cfg: TrainConfig) -> Work:
        shape = planned_for(cfg)[0]
        self.models[f"{cfg.out}/{cfg.name}"] = model = Model(shape, taught=False)
        tokens = cfg.max_steps * cfg.batch_size * cfg.grad_accum_steps * shape.context_length
        before = (cfg.max_steps - 1) // cfg.eval_every if cfg.eval_every else 0
        reads = before * (cfg.eval_tokens or 600_000) + (cfg.final_eval_tokens or 600_000)
        work = Work(shape, tokens, 400 * (before + 1), reads, rows=cfg.batch_size, pretraining=True)
        work.options = options_of(cfg, compiled=bool(cfg.compile))
        return replace(work, length=shape.context_length, megabytes=written(model.parameters, cfg))

    def adapt(
        self, cfg: AdaptConfig, start: str, tokens: float, length: int, overhead: float = TRAINING
    ) -> Work:
        """A stage that trains so many tokens an epoch from the weights of `start`."""
        model = self.model(start)
        self.models[f"{cfg.out}/{cfg.name}"] = replace(model, taught=True)
        c = model.config
        trained = None
        if cfg.lora_r:
            widths = (
                c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads) + 4 * c.d_model + 3 * (c.d_model + c.d_ff)
            )
            trained = c.n_layers * cfg.lora_r * widths
        trains = tokens * cfg.epochs
        if cfg.max_steps:
            trains = min(trains, cfg.max_steps * cfg.batch_size * cfg.grad_accum_steps * length)
        work = Work(c, trains, rows=cfg.batch_size, length=length, overhead=overhead)
        work.options = options_of(cfg, trained=trained, four_bit=cfg.load_in_4bit)
        work.seconds = 6.0 if cfg.lora_r else 0.0  # importing PEFT
        work.megabytes = written(trained or model.parameters, cfg)
        if start in ON_HUB:
            work.megabytes += 4 * model.parameters / 1e6
        return work

    def finetune(self, cfg: FinetuneConfig) -> Work:
        size = SIZES[cfg.task]
        labels = TASKS[cfg.task].labels
        rows = cfg.max_train_examples or size.train
        work = self.adapt(cfg, cfg.model, rows * size.tokens, 3 * size.tokens)
        held_out = checks(cfg, rows) * min(size.validation, cfg.eval_examples or size.validation)
        head = cfg.method == "head"
        work.reads = (held_out + size.validation) * size.tokens * (1 if head else max(1, len(labels)))
        work.samples = 0 if labels else size.validation * size.answer
        model = self.models[f"{cfg.out}/{cfg.name}"]
        if head:
            model = self.models[f"{cfg.out}/{cfg.name}"] = replace(model, kind="head", ours=False)
        # The trained model and its optimizer are still there when its copy in the folder is evaluated.
        trained = work.options["trained"] or model.parameters
        beside = 16 * trained + (0.6 if cfg.load_in_4bit else 2) * (model.parameters - trained)
        work.asks = [self.ask(model, cfg.task, context=cfg.context_length, beside=beside)]
        return work

    def sft(self, cfg: SFTConfig) -> Work:
        tokens = held_out = 0
        for source, count, _ in mixture(cfg.data):
            size = SIZES.get(source, STORIES)
            rows = min(count or size.train, cfg.max_train_examples or size.train, size.train)
            tokens += rows * (size.tokens + 4)
            held_out += min(cfg.eval_examples or size.validation, size.validation) * (size.tokens + 4)
        length = cfg.context_length or min(1024, self.model(cfg.model).config.context_length)
        work = self.adapt(cfg, cfg.model, tokens, length, PACKED)
        work.reads = held_out * max(1, checks(cfg, tokens / length))
        return work

    def dpo(self, cfg: DPOConfig) -> Work:
        if cfg.data not in SIZES:
            note = f"{cfg.data}: 40,000 pairs of 200 tokens"
            return replace(self.adapt(cfg, cfg.model, 2 * 40_000 * 200, 512), note=note)
        model = self.model(cfg.model)
        task = cfg.data
        size = SIZES[cfg.data]
        answers = 1 if cfg.first_difference or cfg.method in ("rft", "sft") else 2  # of a pair
        rows = 0.85 * cfg.problems  # some problems have no right answer
        work = self.adapt(cfg, cfg.model, rows * size.tokens * answers, 2 * size.tokens, RIVALS)
        work.samples = self.draw(cfg.model, task, "train", cfg.problems * cfg.n)
        work.samples += self.draw(
            cfg.model, task, "held out", cfg.eval_examples * (cfg.n + 1)
        )  # and greedily
        evaluated = (checks(cfg, rows) + 1) * 4 * 0.4 * cfg.eval_examples
        work.reads = (rows * answers + evaluated) * size.tokens
        work.asks = [self.read(model, LONGEST * size.tokens)]
        if task in TASKS:
            work.asks.append(self.ask(model, task, n=cfg.n, sampled=True))
        return work

    def verifier(self, cfg: VerifierConfig) -> Work:
        size = SIZES[cfg.task]
        task = cfg.task
        teacher = cfg.answers_of or cfg.model
        answers = cfg.problems * cfg.n
        length = 2 * size.tokens
        if cfg.kind == "head":
            work = self.adapt(cfg, cfg.model, answers * size.tokens, length)
        else:  # a third of the answers are right and differ; a third of these have a rival
            right, paired = (0.12 * cfg.repeats,) * 2 if cfg.repeats and cfg.contrast else (0.32, 0.12)
            rows = cfg.gold + answers * (right + paired * bool(cfg.contrast))
            work = self.adapt(cfg, cfg.start, rows * size.tokens, length, RIVALS)
        work.samples = self.draw(teacher, task, "train", answers)
        splits = {"validation": cfg.validation_problems, "test": cfg.test_problems}
        for split, problems in splits.items():
            answers = (problems or getattr(size, split)) * cfg.held_n
            work.samples += self.draw(cfg.model, task, split, answers)
            work.reads += self.judge(f"{cfg.out}/{cfg.name}", cfg.model, task, split, answers)
        model = self.model(cfg.model)
        work.asks = [
            self.ask(self.model(teacher), task, n=cfg.n, sampled=True),
            self.ask(model, task, n=cfg.held_n, sampled=cfg.held_temperature > 0),
            self.read(model, LONGEST * size.tokens),
        ]
        return work

    def eval(self, cfg: EvalConfig) -> Work:
        work = Work()
        for name in [] if cfg.attention else cfg.models.split(","):
            model = self.model(name)
            model = replace(model, ours=model.ours and cfg.backend != "transformers")
            work.shape = model.config
            work.samples += min(cfg.battery, 1000) * 8
            for task in cfg.tasks.split(","):
                if task not in TASKS:
                    work.asks.append(self.read(model, cfg.context_length or model.config.context_length))
                    work.reads += 2 * (230_000 if task in EMBEDDED else 300_000)
                    continue
                for shots in cfg.shots.split(","):
                    self.eval_task(cfg, work, name, model, task, int(shots))
        return work

    def eval_task(self, cfg: EvalConfig, work: Work, name: str, model: Model, task: str, shots: int) -> None:
        """Adds one model's work on one task with `shots` worked examples in the prompt."""
        size = SIZES[task]
        about = TASKS[task]
        rows = size.test if about.test == "test" else size.validation
        rows = min(cfg.limit or rows, rows)
        read = rows * min((1 + shots) * size.tokens, model.config.context_length)
        work.asks.append(self.ask(model, task, shots, cfg.context_length))
        if about.labels:
            work.reads += read * len(about.labels)
        elif cfg.samples and model.taught and about.metric == "exact_match":
            answers = rows * cfg.samples
            work.samples += self.draw(name, task, "test", answers)
            work.samples += 2 * rows * size.answer  # greedily, without a calculator and with one
            work.asks.append(self.ask(model, task, n=cfg.samples, sampled=True))
            for verifier in filter(None, cfg.verifier.split(",")):
                work.reads += self.judge(verifier, name, task, "test", answers)
        else:  # a base model goes on until it has no room: it was never taught to end
            work.samples += rows * (size.answer if model.taught else about.max_new_tokens)
            work.reads += read


def options_of(cfg: TrainConfig | AdaptConfig, **more) -> dict:
    """Options of estimate_memory."""
    return more | {"muon": cfg.optimizer == "muon", "gradient_checkpointing": cfg.gradient_checkpointing}


def checks(cfg: AdaptConfig, rows: float) -> float:
    """Evaluations while a stage trains."""
    return rows * cfg.epochs / (cfg.batch_size * cfg.grad_accum_steps * max(1, cfg.eval_every))


def written(trained: int, cfg: TrainConfig | AdaptConfig) -> float:
    """Megabytes of a run folder: weights and AdamW's moments of the best checkpoint, those that are kept, and
    the next one before an old one is removed.
    """
    return trained * (12 * (2 + cfg.keep_last) if cfg.save_every else 4) / 1e6


# -----------------------------------------------------------------------------
# Seconds of a token: measured here, or by the data sheet of another GPU


class Measured:
    """Seconds of a token on this machine, measured once for each shape."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_cpu = device.type == "cpu"
        self.known = {}
        # On a CPU, answers are sampled and read by one process for each thread.
        self.processes = torch.get_num_threads() if self.on_cpu else 1

    def start(self) -> float:
        """Seconds until a script has loaded its libraries."""
        command = [sys.executable, "-c", "import verifier, transformers"]
        return seconds_of(partial(subprocess.run, command, cwd=ROOT, check=True))

    def training(self, work: Work) -> float:
        """Of pretraining the own steps. Batches of other stages are of ever new shapes, for which float32 and
        torch's own choice of matrix products are used.
        """
        if not work.pretraining:
            return work.overhead * self.step(
                work.shape, 16, 256, TrainConfig(dtype="float32" if self.on_cpu else "auto")
            )
        cfg = TrainConfig(
            optimizer="muon" if work.options["muon"] else "adamw", compile=work.options["compiled"]
        )
        with float32_products(fastest_products(self.device)):
            return work.overhead * self.step(work.shape, work.rows, work.length, cfg)

    def step(self, c: ModelConfig, rows: int, T: int, cfg: TrainConfig) -> float:
        T = min(T, c.context_length)
        if self.on_cpu:
            tokens = max(64, min(4096, self.affordable(c, 6)))
            T = min(T, tokens)
            rows = max(1, min(rows, tokens // T))
        cfg = replace(cfg, batch_size=rows)

        def measure() -> float:
            step = Step(
                replace(c, context_length=T), cfg, self.device, cfg.compile is True and not self.on_cpu
            )
            return medians({"step": step}, rounds=7, warmup=1, limit=CPU_SECONDS)["step"] / (rows * T)

        return self.remembered((c, T, cfg), measure)

    def sampling(self, work: Work) -> float:
        """Sixteen prompts are continued n times each; by GPT-2 on a CPU once, and by less."""
        n = 64
        new = 48
        if self.on_cpu:
            n = max(1, min(16, self.affordable(work.shape, 2) // (16 * new)))
        if n == 1:
            new = 8
        prompts = [[1] * (64 if n > 1 else 8)] * 16

        def measure() -> float:
            model = ModernDecoderLM(work.shape).to(self.device).eval()

            def draw(_=None) -> float:
                with torch.autocast("cuda", pick_dtype("auto", self.device), enabled=not self.on_cpu):
                    return seconds_of(partial(model.generate, prompts, new, temperature=1.0, n=n, seed=1))

            draw()
            # All processes at the same time: then each is slower than one alone.
            seconds = on_all_cores(draw, range(2 * self.processes), self.device)
            return TEXTS * fmean(seconds) / self.processes / (16 * n * new)

        return self.remembered(("sampling", work.shape), measure)

    def reading(self, work: Work) -> float:
        """The forward pass is a third of a step."""
        return TEXTS / 3 * self.training(replace(work, pretraining=False, overhead=1.0))

    def affordable(self, c: ModelConfig, flops: int) -> int:
        """Tokens of CPU_FLOPS, at so many FLOPs a parameter: 6 in training, 2 in reading and sampling."""
        return int(CPU_FLOPS / (flops * count_parameters(c)["total"]))

    def remembered(self, key: tuple, measure: Callable):
        key = str(key)
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]


class DataSheet:
    """Seconds of a token on a GPU that is not here."""

    def __init__(self, card: str):
        self.peak = peak_flops(card)
        if not self.peak:
            raise ConfigError(f"--card={card}: its peak rate is not known")

    def start(self) -> float:
        return 6.0

    def training(self, work: Work) -> float:
        share = PRETRAINING if work.full and work.length >= 512 else TUNING
        return estimate_flops(work.shape, work.length) / (share * self.peak)

    def sampling(self, work: Work) -> float:
        rows = 512  # finished ones make room for others
        return STEP_OF_A_LAYER * work.shape.n_layers / rows + self.reading(work)

    def reading(self, work: Work) -> float:
        return estimate_flops(work.shape, 256) / 3 / (TUNING * self.peak)


def answering_memory(work: Work, space: float, on_cpu: bool) -> float:
    """Peak GiB of generation and likelihoods, where a process has `space` bytes.

    On a CPU as many processes as torch has threads work at the same time (`on_all_cores`) and share the
    weights. On a GPU there are its context and what the allocator loses, as in `estimate_memory`.
    """
    peak = 0.0
    processes = torch.get_num_threads() if on_cpu else 1
    context, lost = (0.4 * GIB, 1.0) if on_cpu else (CUDA_CONTEXT, 1 + FRAGMENTATION)
    for batch in work.asks:
        fixed = context + batch.weights(on_cpu)
        rows = batch.rows((space - fixed) / lost / processes, on_cpu)
        peak = max(peak, fixed + lost * processes * batch.bytes(rows, on_cpu))
    return peak / GIB


def training_memory(work: Work, on_cpu: bool) -> float:
    """Peak GiB of a training step; 0 where nothing is trained."""
    if not work.trains:
        return 0.0
    options = work.options | {"bytes_per_activation": 4, "compiled": False} if on_cpu else work.options
    libraries = 0.4 if on_cpu else 0.0
    return libraries + estimate_memory(work.shape, work.rows, work.length, **options)["peak"] / GIB


# -----------------------------------------------------------------------------
# The table


def estimate(commands: list[tuple[str, list[str]]], cfg: PlanConfig) -> list[Work]:
    """The work of each command (name, words behind `python`), with its seconds and GiB."""
    if cfg.vram or cfg.card:  # a GPU of which nothing but its name is known is taken to have 12 GB
        rates = DataSheet(cfg.card or "RTX 3060")
        space = usable(cfg.vram or 12.0) * GIB
        on_cpu = False
    else:
        device = pick_device(cfg.device)
        rates = Measured(device)
        space = room(device)
        on_cpu = device.type == "cpu"
    plan = Plan()
    rows = []
    start = rates.start()
    for name, words in commands:
        work = plan.count(words)
        work.stage = name
        work.seconds = work.seconds + start
        if work.trains:  # frozen weights want no gradients: 4 of 6 FLOPs
            work.seconds += work.trains * rates.training(work) * (1 if work.full else 4 / 6)
        if work.samples:
            work.seconds += work.samples * rates.sampling(work)
        if work.reads:
            work.seconds += work.reads * rates.reading(work)
        work.train_gib = training_memory(work, on_cpu)
        work.answer_gib = answering_memory(work, space, on_cpu)
        rows.append(work)
    return rows


def table(rows: list[Work]) -> list[str]:
    lines = [
        " " * 27 + "GiB to  GiB to      tokens",
        " " * 18 + " minutes  train  answer   trains on   samples     reads",
    ]
    total = Work(stage="all", seconds=sum(row.seconds for row in rows))
    total.train_gib = max(row.train_gib for row in rows)
    total.answer_gib = max(row.answer_gib for row in rows)
    for row in [*rows, total]:
        line = f"{row.stage:18}{row.seconds / 60:8.1f}"
        for gib, width in ((row.train_gib, 7), (row.answer_gib, 8)):
            line += f"{gib:{width}.1f}" if gib else " " * width
        for tokens, width in ((row.trains, 12), (row.samples, 10), (row.reads, 10)):
            line += f"{tokens / 1e6:{width - 1},.2f}M" if tokens >= 5000 else " " * width
        lines.append(f"{line}  {row.note}".rstrip())
    return [*lines, f"{'disk':18}{gigabytes(rows):8.1f} GB"]


def gigabytes(rows: list[Work]) -> float:
    return sum(row.megabytes for row in rows) / 1000


class FullDisk(OSError):
    """There is no room for what would be made."""


def refuse_full_disk(rows: list[Work], out: str) -> None:
    """Downloads may go elsewhere, but mostly go to the same disk."""
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    wanted = gigabytes(rows)
    free = shutil.disk_usage(folder).free / 1e9
    if wanted > free:
        raise FullDisk(
            f"{wanted:.1f} GB will be downloaded and written, and {folder} has {free:.1f} GB free: make "
            "room, or choose another disk by OUT=/big/disk/out (and DATA_DIR and HF_HOME for downloads)"
        )


def keep(rows: list[Work], out: str) -> None:
    """Writes {out}/plan.tsv: stage, seconds, GiB. run_all.sh and the report compare it with what happened."""
    file = Path(out) / "plan.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    lines += [f"{row.stage}\t{row.seconds:.1f}\t{row.train_gib:.2f}" for row in rows]
    newest = {line.split("\t")[0]: line for line in lines}
    write_atomically(file, lambda path: path.write_text("\n".join(newest.values()) + "\n"))


def read_commands(words: list[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Commands (name, words behind `python`) and the plan's own flags: from the command line, or else, a name
    and a command a line, from run_all.sh.
    """
    for i, word in enumerate(words):
        if "/" not in word and (ROOT / word).is_file():
            own = [w for w in words[i:] if w.startswith(("--vram=", "--card="))]
            command = [w for w in words[i:] if w not in own]
            return [(Path(word).stem, command)], words[:i] + own
    lines = [line.rstrip("\n").split("\t") for line in sys.stdin]
    return [(name, shlex.split(command)[1:]) for name, command in lines], words


def main() -> None:
    commands, words = read_commands(sys.argv[1:])
    cfg = parse_config(PlanConfig, __doc__, words)
    begun = time.perf_counter()
    if not commands:
        return print("the plan: nothing is left to do")
    try:
        rows = estimate(commands, cfg)
        elsewhere = f"{cfg.card or 'RTX 3060'}, by its data sheet" if cfg.vram or cfg.card else ""
        where = elsewhere or f"{cpu_name()}, measured in {time.perf_counter() - begun:.0f} s"
        print("\n".join([f"the plan, for {where}:", *table(rows)]))
        if cfg.vram and max(max(row.train_gib, row.answer_gib) for row in rows) > usable(cfg.vram):
            print(f"WARNING: more than the {usable(cfg.vram):.1f} GiB that a {cfg.vram:.0f} GB card leaves")
        if not elsewhere and words == sys.argv[1:]:  # run_all.sh's
            keep(rows, cfg.out)
            refuse_full_disk(rows, cfg.out)
    except FullDisk as error:
        print(f"lab.plan: {error}", file=sys.stderr)
        raise SystemExit(3) from None
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"lab.plan: {error}") from None


if __name__ == "__main__":
    run_script(main)
