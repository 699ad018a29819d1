"""What commands cost before they run: minutes, memory and disk space.

    bash run_all.sh speedrun --plan --vram=12                  # a profile; run_all.sh also begins with it
    python -m lab.plan sft.py configs/sft.py --batch_size=16   # one stage, with the flags it would get
    python -m lab.plan finetune.py configs/sst2.py --vram=12   # ... on a GPU that is not in this machine

A stage is counted in tokens of three kinds: those it trains on, those it samples one by one, and those whose
likelihood it reads. The seconds of a token of each kind are measured on this machine with the models' own
shapes, some seconds each. For another GPU they follow from its data sheet, with the constants below. Nothing
is downloaded: the sizes of real tasks are known.

GiB are what a stage needs at least (support/costs.py): the peak of a training step, or of answering one
question at a time if that is more; on a CPU with 0.4 GiB of libraries. Answers are sampled and read in
batches as large as there is room for. If what will be downloaded and written does not fit on the disk, that
is an error.
"""

from support.terminal import run_script

import contextlib
import math
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import psutil
import torch

from configs import ConfigError, parse_config
from data import CORPORA, EMBEDDED, TASKS
from dpo import DPOConfig
from eval import EvalConfig, read_words
from finetune import AdaptConfig, FinetuneConfig
from model import ModelConfig, ModernDecoderLM
from sft import SFTConfig, mixture
from support.costs import GIB, count_parameters, estimate_flops, estimate_memory, generation_bytes, shape_of
from support.finding import data_folder
from support.hf_format import from_hf_config
from support.kernels import fastest_products, float32_products
from support.machine import SMALL, autocast, dtype_for, hardware, peak_flops, pick_device
from support.plan import Step, gpu_elsewhere, memory_options, planned_model, usable
from support.processes import CORES
from support.runs import errors_for_users, read_json, read_json_if_there
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
    "story": Size(4_000, 500, 1_000, 95, 110),
    "instructions": Size(4_000, 500, 1_000, 23, 18),
    "gsm8k": Size(6_973, 500, 1_319, 65, 140),
    "sst2": Size(67_349, 872, 872, 16, 1),
    "samsum": Size(14_731, 818, 819, 150, 28),
    "alpaca": Size(46_800, 2_600, 2_600, 25, 65),
    "dolly": Size(13_500, 750, 750, 100, 90),
    "lima": Size(930, 50, 50, 90, 500),
}
STORIES = Size(4_000, 300, 300, 226, 4)  # documents of a corpus, of which SFT takes some
PAIRS = Size(40_000, 500, 500, 100, 100)  # of a preference data set on the hub
MEGABYTES = {
    "tinystories": 2_230,
    "wikitext2": 11,
    "wikitext103": 540,
    "fineweb_edu": 5_500,
    "storyworld": 21.6,
    "arithmetic": 6.3,
    "numbers": 6.6,
}
MADE = 5.0  # MB/s of text made up on the spot by one core
ENCODED = 7.0  # MB/s of a file that one core encodes (report/speed.md)

# Seconds of a stage divided by those of bare steps, measured on two CPUs and an H100: the Trainer and its
# data; the same with masks between packed conversations; with answers padded to their rivals' length.
TRAINING = 1.1
PACKED = 1.22
RIVALS = 1.25
TEXTS = 1.3  # the same for sampling and likelihoods: texts made of tokens, judged and kept
# The most FLOPs of one call, and the most seconds, that a measurement on a CPU takes: GPT-2's own steps take
# minutes. A model of 135M parameters then gets 250 tokens. With 64 a token took five times as long as in
# training, because weights are cast and gradients written once for all tokens.
CPU_FLOPS = 2e11
CPU_SECONDS = 2.0
# A GPU that is not here: the share of its peak that pretraining reaches, and that the short texts of other
# stages reach; seconds per layer that a decoding step takes besides arithmetic. (Measured on an H100: 0.31
# for speedrun.py and 0.40 for max3060.py, 0.01, 0.0001.)
PRETRAINING = 0.40
TUNING = 0.12
STEP_OF_A_LAYER = 0.00015


@dataclass
class PlanConfig:
    """Which machine the plan is for, and where commands write."""

    plan: bool = False  # nothing else: run_all.sh's flag for the plan alone
    vram: float = 0.0  # plan for a GPU with this many GB instead of the machine here
    card: str = ""  # plan for a GPU of this name, such as "RTX 3090"; with --vram alone an RTX 3060
    device: str = "auto"  # cuda, cpu, ...
    out: str = "out"  # folder that holds everything the project makes


# -----------------------------------------------------------------------------
# Models of the hub, and what a stage is

ON_HUB = {  # models that the configs and the README name
    "gpt2": ModelConfig(
        vocab_size=50_257,
        context_length=1024,
        n_layers=12,
        d_model=768,
        n_heads=12,
        d_ff=3072,
        norm="layer",
        ffn="gelu",
        positions="learned",
        bias=True,
    ),
    "google/flan-t5-small": ModelConfig(  # encoder and decoder together
        vocab_size=32_128, context_length=512, n_layers=16, d_model=512, n_heads=6, head_dim=64, d_ff=1024
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelConfig(
        vocab_size=49_152, context_length=8192, n_layers=30, d_model=576, n_heads=9, n_kv_heads=3, d_ff=1536
    ),
    "TinyLlama/TinyLlama_v1.1": ModelConfig(
        vocab_size=32_000,
        context_length=2048,
        n_layers=22,
        d_model=2048,
        n_heads=32,
        n_kv_heads=4,
        d_ff=5632,
        tie_embeddings=False,
    ),
}


@dataclass(frozen=True)
class Stage:
    """The work of a command: its model's shape and tokens; and, in the table, what they cost."""

    name: str = "all"
    model: ModelConfig | None = None
    trains: float = 0.0  # tokens
    samples: float = 0.0
    reads: float = 0.0
    per_step: float = 0.0  # tokens of an optimizer step
    length: int = 0  # of a row
    cfg: TrainConfig | AdaptConfig | None = None  # of a stage that trains
    adapter: int | None = None  # its parameters; None: all weights are trained
    overhead: float = TRAINING  # seconds over those of bare steps
    seconds: float = 0.0  # besides those of tokens; in the table all
    megabytes: float = 0.0  # downloaded or written
    gib: float = 0.0
    note: str = ""


# -----------------------------------------------------------------------------
# The work of each script


class Plan:
    """Counts the work of one command after the other. A command may use what an earlier one makes."""

    def __init__(self):
        self.models = dict(ON_HUB)
        self.bases = set(ON_HUB)  # models that were taught no task: they do not end their answers
        self.ranks: dict[str, int] = {}  # of the adapters that earlier commands make
        self.generators: dict[str, str] = {}  # of the verifiers that earlier commands make
        self.kept: set[tuple] = set()  # sampled answers, and judgements of them, that a later stage finds

    def count(self, words: list[str]) -> Stage:
        """The work of `python SCRIPT FLAGS...`: by the method of the script's name, from its config."""
        script = Path(words[0]).stem
        if script not in CONFIGS:  # chat.py
            return Stage()
        flags = [w for w in words[1:] if w != "--batch_size=auto"]
        if script == "eval":
            flags = read_words(flags)
        return getattr(self, script)(parse_config(CONFIGS[script], "", flags))

    def model(self, name: str) -> ModelConfig:
        """The shape of a model that an earlier command makes, of one on the hub, or of a run folder."""
        if name in self.models:
            return self.models[name]
        folder = Path(name)
        run = read_json_if_there(folder / "run.json")
        if run.get("stage") == "train":
            self.bases.add(name)
        with contextlib.suppress(OSError, ValueError):  # an adapter; one for transformers, a tuned T5
            return from_hf_config(read_json(folder / "config.json"))
        if "parent" in run:
            return self.model(run["parent"])
        known = ", ".join(ON_HUB)
        raise ConfigError(f"the shape of {name} is not known: no folder, no earlier stage, not among {known}")

    def rank(self, name: str) -> int:
        """The rank of an adapter, 0 of a model; whoever trains it further trains the adapter."""
        if name in self.ranks:
            return self.ranks[name]
        return read_json_if_there(Path(name, "adapter_config.json")).get("r", 0)

    def once(self, tokens: float, *key) -> float:
        """`tokens`; 0 if an earlier stage has kept the answers (or judgements) of this key."""
        first = key not in self.kept
        self.kept.add(key)
        return tokens * first

    def draw(self, model: str, task: str, split: str, answers: float) -> float:
        """Tokens of `answers` sampled answers."""
        return self.once(answers * SIZES[task].answer, model, task, split, answers)

    def judge(self, verifier: str, model: str, task: str, split: str, answers: float) -> float:
        """Tokens of the sampled answers that differ, read once by this verifier and once by its generator."""
        tokens = 0.6 * answers * SIZES[task].tokens
        readers = verifier, self.generators.get(verifier, f"the generator of {verifier}")
        return sum(self.once(tokens, "read", reader, model, task, split, answers) for reader in readers)

    def tokenizer(self, cfg: TokenizerStageConfig) -> Stage:
        """The text is read twice: to learn merges, and to be encoded."""
        size = downloads = 0
        rate = MADE
        for part in cfg.corpus.split(","):
            name = part.partition(":")[0]
            megabytes = MEGABYTES.get(name, 0)
            size += megabytes
            if name in CORPORA:
                rate = ENCODED * CORES
                if not Path(data_folder(), CORPORA[name].folder).exists():
                    downloads += megabytes
        learnt = min(cfg.learn_megabytes or size, size)
        encoded = min(cfg.train_megabytes or size, size)
        return Stage(
            seconds=(learnt + encoded) / rate,
            megabytes=downloads + 2 * encoded / 3.5,  # tokens of two bytes
            note="" if size else f"the size of {cfg.corpus} is not known",
        )

    def train(self, cfg: TrainConfig) -> Stage:
        c = planned_model(cfg)
        name = f"{cfg.out}/{cfg.name}"
        self.models[name] = c
        self.bases.add(name)
        before = (cfg.max_steps - 1) // cfg.eval_every if cfg.eval_every else 0
        per_step = cfg.batch_size * cfg.grad_accum_steps * c.context_length
        return Stage(
            model=c,
            trains=cfg.max_steps * per_step,
            per_step=per_step,
            samples=400 * (before + 1),
            reads=before * (cfg.eval_tokens or 600_000) + (cfg.final_eval_tokens or 600_000),
            length=c.context_length,
            cfg=cfg,
            megabytes=written(count_parameters(c)["total"], cfg),
        )

    def adapt(
        self,
        cfg: AdaptConfig,
        start: str,
        rows: float,
        tokens: float,
        length: int,
        held_out: float = 0.0,
        **more,
    ) -> Stage:
        """A stage that trains on so many rows and tokens an epoch from the weights of `start`, and reads
        `held_out` tokens in each evaluation. `more`: other fields of the Stage.
        """
        c = self.model(start)
        rank = cfg.lora_r or self.rank(start)
        name = f"{cfg.out}/{cfg.name}"
        self.models[name], self.ranks[name] = c, rank
        if cfg.merge:
            self.models[f"{name}/merged"] = c
        total = count_parameters(c)["total"]
        adapter = None
        if rank:  # A and B of q, k, v, o, gate, up and down
            attention = 2 * c.head_dim * (c.n_heads + c.n_kv_heads) + 4 * c.d_model
            adapter = c.n_layers * rank * (attention + 3 * (c.d_model + c.d_ff))
        batch = cfg.batch_size * cfg.grad_accum_steps
        evaluations = 1 + rows * cfg.epochs / (batch * max(1, cfg.eval_every))
        return Stage(
            model=c,
            trains=min(tokens * cfg.epochs, cfg.max_steps * batch * length or math.inf),
            per_step=batch * tokens / rows,
            reads=held_out * evaluations,
            length=length,
            cfg=cfg,
            adapter=adapter,
            seconds=6.0 if rank else 0.0,  # importing PEFT
            megabytes=written(adapter or total, cfg) + 4e-6 * total * (start in ON_HUB),
            **more,
        )

    def finetune(self, cfg: FinetuneConfig) -> Stage:
        size = SIZES[cfg.task]
        classes = len(TASKS[cfg.task].labels)
        rows = cfg.max_train_examples or size.train
        held_out = held_out_rows(cfg, size) * size.tokens
        if classes and cfg.method == "lm":
            held_out *= classes
        samples = 0.0 if classes else size.validation * size.answer
        return self.adapt(
            cfg, cfg.model, rows, rows * size.tokens, 3 * size.tokens, held_out, samples=samples
        )

    def sft(self, cfg: SFTConfig) -> Stage:
        tokens = held_out = 0
        for source, count, _ in mixture(cfg.data):
            size = SIZES.get(source, STORIES)
            rows = min(count or size.train, cfg.max_train_examples or size.train, size.train)
            tokens += rows * (size.tokens + 4)
            held_out += held_out_rows(cfg, size) * (size.tokens + 4)
        length = cfg.context_length or min(1024, self.model(cfg.model).context_length)
        return self.adapt(cfg, cfg.model, tokens / length, tokens, length, held_out, overhead=PACKED)

    def dpo(self, cfg: DPOConfig) -> Stage:
        task = cfg.data
        if task not in SIZES:
            note = f"{task}: {PAIRS.train:,} pairs of {PAIRS.tokens} tokens"
            return self.adapt(cfg, cfg.model, PAIRS.train, 2 * PAIRS.train * PAIRS.tokens, 512, note=note)
        size = SIZES[task]
        answers = 1 if cfg.first_difference or cfg.is_control else 2  # of a pair
        rows = 0.85 * cfg.problems  # some problems have no right answer
        tokens = answers * rows * size.tokens
        held_out = 4 * 0.4 * cfg.eval_examples * size.tokens
        stage = self.adapt(cfg, cfg.model, rows, tokens, 2 * size.tokens, held_out, overhead=RIVALS)
        samples = self.draw(cfg.model, task, "train", cfg.problems * cfg.n)
        samples += self.draw(cfg.model, task, "held out", cfg.eval_examples * (cfg.n + 1))  # and greedily
        return replace(stage, samples=samples, reads=stage.reads + tokens)

    def verifier(self, cfg: VerifierConfig) -> Stage:
        task = cfg.task
        size = SIZES[task]
        answers = cfg.problems * cfg.n
        length = 2 * size.tokens
        if cfg.kind == "head":
            stage = self.adapt(cfg, cfg.model, answers, answers * size.tokens, length)
        else:  # a third of the answers are right and differ; a third of these have a rival
            learns = 0.32 + 0.12 * bool(cfg.contrast)
            if cfg.repeats and cfg.contrast:
                learns = 0.1 * cfg.repeats  # a tenth: right and wrong answers to one problem
            rows = cfg.gold + answers * learns
            stage = self.adapt(cfg, cfg.start, rows, rows * size.tokens, length, overhead=RIVALS)
        samples = self.draw(cfg.answers_of or cfg.model, task, "train", answers)
        reads = 0.0
        self.generators[f"{cfg.out}/{cfg.name}"] = cfg.model
        for split, problems in (("validation", cfg.validation_problems), ("test", cfg.test_problems)):
            answers = (problems or getattr(size, split)) * cfg.held_n
            samples += self.draw(cfg.model, task, split, answers)
            reads += self.judge(f"{cfg.out}/{cfg.name}", cfg.model, task, split, answers)
        return replace(stage, samples=samples, reads=reads)

    def eval(self, cfg: EvalConfig) -> Stage:
        names = [] if cfg.attention else cfg.models.split(",")
        sizes = [(count_parameters(self.model(name))["total"], name) for name in names]
        samples = reads = 0.0
        for name in names:
            samples += min(cfg.battery, 1000) * 8
            for task in cfg.tasks.split(","):
                if task not in TASKS:
                    reads += 2 * (230_000 if task in EMBEDDED else 300_000)
                    continue
                for shots in cfg.shots.split(",") if TASKS[task].asks else "0":
                    sampled, read = self.eval_task(cfg, name, task, int(shots))
                    samples += sampled
                    reads += read
        largest = self.model(max(sizes)[1]) if sizes else None
        return Stage(model=largest, samples=samples, reads=reads)

    def eval_task(self, cfg: EvalConfig, name: str, task: str, shots: int) -> tuple[float, float]:
        """Tokens that one model samples and reads in one task with `shots` worked examples in the prompt."""
        size = SIZES[task]
        about = TASKS[task]
        rows = min(cfg.limit or math.inf, getattr(size, about.test))
        samples = rows * size.answer
        reads = rows * min((1 + shots) * size.tokens, self.model(name).context_length)
        if about.labels:
            return 0.0, reads * len(about.labels)
        if name in self.bases:  # it goes on until it has no room: it was never taught to end
            samples = rows * about.max_new_tokens
        elif cfg.samples and about.metric == "exact_match" and not cfg.solutions:
            answers = rows * cfg.samples
            samples *= 2  # greedily, without a calculator and with one
            samples += self.draw(name, task, "test", answers)
            reads = 0.0
            for verifier in filter(None, cfg.verifier.split(",")):
                reads += self.judge(verifier, name, task, "test", answers)
        return samples, reads


CONFIGS = {
    "tokenizer": TokenizerStageConfig,
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "verifier": VerifierConfig,
    "eval": EvalConfig,
}


def held_out_rows(cfg: FinetuneConfig | SFTConfig, size: Size) -> int:
    return min(cfg.eval_examples or size.validation, size.validation)


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

    def start(self) -> float:
        """Seconds until a script has loaded its libraries: this one just has, but for one."""
        import transformers  # noqa: F401

        return time.time() - psutil.Process().create_time()

    def training(self, stage: Stage) -> float:
        """Times the own steps of pretraining. Batches of other stages keep changing their shapes; those use
        float32 and torch's own choice of matrix products.
        """
        if isinstance(stage.cfg, TrainConfig):
            cfg = replace(stage.cfg, grad_accum_steps=1, compile=stage.cfg.compile and not self.on_cpu)
            with float32_products(fastest_products(self.device)):
                passes, update = self.step(stage.model, stage.length, cfg)
        else:
            passes, update = self.step(stage.model)
        if stage.adapter:
            update = 0.0  # of so few weights
        return stage.overhead * (passes + update / stage.per_step)

    def reading(self, c: ModelConfig) -> float:
        """The forward pass is a third of forward and backward."""
        return TEXTS / 3 * self.step(c)[0]

    def step(self, c: ModelConfig, T: int = 256, cfg: TrainConfig | None = None) -> tuple[float, float]:
        """Seconds of a token forward and backward, and of the optimizer's update."""
        small = self.on_cpu and count_parameters(c)["total"] < SMALL  # as in `dtype_for`
        cfg = cfg or TrainConfig(batch_size=16, compile=False, dtype="float32" if small else "auto")
        rows = cfg.batch_size
        T = min(T, c.context_length)
        if self.on_cpu:
            tokens = max(64, min(4096, affordable(c, 6)))
            T = min(T, tokens)
            rows = max(1, min(rows, tokens // T))
        key = f"{c}, {T} tokens, {cfg}"
        if key not in self.known:
            step = Step(replace(c, context_length=T), replace(cfg, batch_size=rows), self.device)
            parts = {"step": step, "passes": step.backward}
            seconds = medians(parts, rounds=7, warmup=1, limit=CPU_SECONDS)
            passes = min(seconds["passes"], seconds["step"])
            self.known[key] = passes / (rows * T), seconds["step"] - passes
        return self.known[key]

    def sampling(self, c: ModelConfig) -> float:
        """Continues 16 prompts n times each. On a CPU a large model generates fewer tokens, and one process
        per thread samples at the same time, which makes each slower than one alone.
        """
        key = str(c)
        if key in self.known:
            return self.known[key]
        n, new, processes = 64, 48, 1
        if self.on_cpu:
            n = 16
            new = max(8, min(48, affordable(c, 2) // (16 * n)))
            processes = torch.get_num_threads()
        model = ModernDecoderLM(c).to(self.device).eval()
        dtype = dtype_for("auto", model, self.device)
        draw = partial(model.generate, [[1] * 64] * 16, new, temperature=1.0, n=n, seed=1)

        def seconds(_=None) -> float:
            with autocast(self.device, dtype):
                return seconds_of(draw)

        seconds()
        mean = fmean(on_all_cores(seconds, range(2 * processes), self.device))
        self.known[key] = TEXTS * mean / processes / (16 * n * new)
        return self.known[key]


def affordable(c: ModelConfig, flops: int) -> int:
    """Tokens that CPU_FLOPS suffice for. `flops` per parameter: 6 in training, 2 in reading and sampling."""
    return int(CPU_FLOPS / (flops * count_parameters(c)["total"]))


class DataSheet:
    """Seconds of a token on a GPU that is not here."""

    on_cpu = False

    def __init__(self, card: str):
        self.peak = peak_flops(card)
        if not self.peak:
            raise ConfigError(f"--card={card}: its peak rate is not known")

    def start(self) -> float:
        return 6.0

    def training(self, stage: Stage) -> float:
        share = TUNING if stage.adapter or stage.length < 512 else PRETRAINING
        return estimate_flops(stage.model, stage.length) / (share * self.peak)

    def sampling(self, c: ModelConfig) -> float:
        rows = 512  # finished ones make room for others
        return STEP_OF_A_LAYER * c.n_layers / rows + self.reading(c)

    def reading(self, c: ModelConfig) -> float:
        return estimate_flops(c, 256) / 3 / (TUNING * self.peak)


# -----------------------------------------------------------------------------
# The table


def estimate(commands: list[tuple[str, list[str]]], cfg: PlanConfig) -> list[Stage]:
    """What each command (name, words behind `python`) costs."""
    gpu = gpu_elsewhere(cfg)
    rates = DataSheet(gpu) if gpu else Measured(pick_device(cfg.device))
    start = rates.start()
    on_cpu = rates.on_cpu
    plan = Plan()
    stages = []
    for name, words in commands:
        stage = plan.count(words)
        seconds = start + stage.seconds
        peak = answering(stage.model, on_cpu) if stage.samples or stage.reads else 0
        if stage.trains:
            options = memory_options(stage.cfg, not on_cpu) | {"trained": stage.adapter}
            step = estimate_memory(stage.model, stage.cfg.batch_size, stage.length, **options)
            peak = max(peak, step["peak"])
            # Frozen weights want no gradients: 4 of 6 FLOPs.
            seconds += stage.trains * rates.training(stage) * (4 / 6 if stage.adapter else 1)
        if stage.samples:
            seconds += stage.samples * rates.sampling(stage.model)
        if stage.reads:
            seconds += stage.reads * rates.reading(stage.model)
        gib = peak / GIB + 0.4 * on_cpu if peak else 0.0
        stages.append(replace(stage, name=name, seconds=seconds, gib=gib))
    return stages


def answering(c: ModelConfig, on_cpu: bool) -> int:
    """Peak bytes of continuing one prompt that fills half of the context to its end."""
    half = c.context_length // 2
    cache = generation_bytes(shape_of(c), 1, half, half, size=4 if on_cpu else 2, sampled=True, on_cpu=on_cpu)
    weights = count_parameters(c)["total"] * (4 if on_cpu else 6)  # on a GPU in bfloat16 beside float32
    return weights + cache


def table(stages: list[Stage]) -> list[str]:
    lines = [" " * 33 + "tokens", " " * 18 + " minutes    GiB   trains on   samples     reads"]
    total = Stage(seconds=sum(stage.seconds for stage in stages), gib=max(stage.gib for stage in stages))
    for stage in [*stages, total]:
        line = f"{stage.name:18}{stage.seconds / 60:8.1f}"
        line += f"{stage.gib:7.1f}" if stage.gib else " " * 7
        for tokens, width in ((stage.trains, 12), (stage.samples, 10), (stage.reads, 10)):
            line += f"{tokens / 1e6:{width - 1},.2f}M" if tokens >= 5000 else " " * width
        lines.append(f"{line}  {stage.note}".rstrip())
    return [*lines, f"{'disk':18}{gigabytes(stages):8.1f} GB"]


def gigabytes(stages: list[Stage]) -> float:
    return sum(stage.megabytes for stage in stages) / 1000


def keep(stages: list[Stage], out: str) -> None:
    """Adds stage, seconds, GiB to {out}/plan.tsv, of which run_all.sh and the report compare the last line of
    a stage with what happened. Ends with status 3 if the disk is too small; downloads may go elsewhere, but
    mostly go to the same one.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "plan.tsv", "a") as file:
        for stage in stages:
            file.write(f"{stage.name}\t{stage.seconds:.1f}\t{stage.gib:.2f}\n")
    wanted = gigabytes(stages)
    free = shutil.disk_usage(folder).free / 1e9
    if wanted > free:
        print(
            f"lab.plan: {wanted:.1f} GB will be downloaded and written, and {out} has {free:.1f} GB free: "
            "make room, or choose another disk by OUT=/big/disk/out (and DATA_DIR and HF_HOME for downloads)",
            file=sys.stderr,
        )
        raise SystemExit(3)


def main() -> None:
    words = sys.argv[1:]
    # From the first script on it is the command to plan, but for the GPU that it is planned for.
    command = list(dropwhile(lambda word: "/" in word or not word.endswith(".py"), words))
    command = [word for word in command if not word.startswith(("--vram=", "--card="))]
    cfg = parse_config(PlanConfig, __doc__, [word for word in words if word not in command])
    commands = []
    if command:
        commands = [(Path(command[0]).stem, command)]
    else:  # run_all.sh's: a name and a command a line
        for line in sys.stdin:
            name, text = line.split("\t")
            commands.append((name, shlex.split(text)[1:]))
    if not commands:
        return print("the plan: nothing is left to do")
    begun = time.perf_counter()
    gpu = gpu_elsewhere(cfg)
    with errors_for_users():
        stages = estimate(commands, cfg)
        if gpu:
            where = f"{gpu}, by its data sheet"
        else:
            here = hardware(pick_device(cfg.device))
            where = f"{here['device']}, measured in {time.perf_counter() - begun:.0f} s"
        print(f"the plan, for {where}:", *table(stages), sep="\n")
        if cfg.vram and max(stage.gib for stage in stages) > usable(cfg.vram):
            print(f"WARNING: more than the {usable(cfg.vram):.1f} GiB that a {cfg.vram:.0f} GB card leaves")
        if not (gpu or command):
            keep(stages, cfg.out)


if __name__ == "__main__":
    run_script(main)
