"""What commands will cost before they run: minutes, memory, and the work they are made of.

    bash run_all.sh speedrun --plan --vram=12            # a whole profile; run_all.sh also begins with it
    python -m lab.plan sft.py configs/sft.py --batch_size=16   # one stage, with the flags it would get
    python -m lab.plan finetune.py configs/sst2.py --vram=12 # ... on a card that is not here

A stage is counted in tokens of three kinds: those it trains on, those it samples one by one, and those it
reads to know their likelihood. What a token of each kind takes is measured on this machine with the models'
own shapes, some seconds each. For a card that is not here it is worked out from the data sheet, with the
shares that stand below as constants. Nothing is downloaded: of real tasks the sizes are known.

Memory is the most that a training step holds, by `estimate_memory`, and the most that generation and the
likelihoods of answers hold, by support/memory.py, in batches as large as there is room for; on a CPU 0.4 GiB
of libraries come to both.
What will be downloaded and written has to fit on the disk, or there is an error before anything has begun.
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
from itertools import islice
from pathlib import Path
from statistics import fmean, median

import torch

from configs import ROOT, ConfigError, parse_config
from data import CORPORA, EMBEDDED, TASKS, documents
from dpo import DPOConfig
from eval import EvalConfig, read_words
from finetune import AdaptConfig, FinetuneConfig
from lab.hardware import GIB, timed
from model import ModelConfig, ModernDecoderLM
from sft import SFTConfig, conversation_loss, mixture
from support.costs import count_parameters, estimate_flops, estimate_memory
from support.files import write_atomically
from support.hf_format import from_hf_config
from support.kernels import fastest_products, float32_products
from support.machine import cpu_name, peak_flops, pick_device, pick_dtype
from support.memory import Shape, generation_bytes, likelihood_bytes, room, rows_that_fit, shape_of
from support.plan import Step, planned_for, usable
from support.runs import read_json
from support.text_model import on_all_cores
from tokenizer import TokenizerStageConfig
from train import TrainConfig
from verifier import VerifierConfig, channel_loss

# Rows of the training, validation and test splits, and tokens of a question and of its answer: of the
# embedded tasks under our 1,024 tokens, of the others under GPT-2's.
SIZES = {
    "arithmetic": (4_000, 500, 1_000, 51, 51),
    "sentiment": (4_000, 500, 1_000, 22, 2),
    "dialogue": (4_000, 500, 1_000, 83, 24),
    "instructions": (4_000, 500, 1_000, 23, 18),
    "gsm8k": (6_973, 500, 1_319, 65, 140),
    "sst2": (67_349, 872, 872, 16, 1),
    "samsum": (14_731, 818, 819, 150, 28),
    "alpaca": (46_800, 2_600, 2_600, 25, 65),
    "dolly": (13_500, 750, 750, 100, 90),
    "lima": (930, 50, 50, 90, 500),
}
TEXT = {"tinystories": 2_230, "wikitext2": 11, "wikitext103": 540, "fineweb_edu": 5_500}  # megabytes
ENCODES = 7.0  # MB/s a core (report/speed.md)
STORY = 230  # tokens of a document of an embedded corpus
ON_HUB = {  # shapes of models that the configs and the README name: as GPT-2's parts, or Llama's
    "gpt2": dict(vocab_size=50_257, context_length=1024, n_layers=12, d_model=768, n_heads=12, d_ff=3072,
                 norm="layer", ffn="gelu", positions="learned", bias=True),
    "google/flan-t5-small": dict(vocab_size=32_128, context_length=512, n_layers=16, d_model=512, n_heads=6,
                                 head_dim=64, d_ff=1024),  # its encoder and decoder, one upon the other
    "TinyLlama/TinyLlama_v1.1": dict(vocab_size=32_000, context_length=2048, n_layers=22, d_model=2048,
                                     n_heads=32, n_kv_heads=4, d_ff=5632, tie_embeddings=False),
}  # fmt: skip
ENCODER_DECODERS = {"google/flan-t5-small"}
LONGEST = 3  # the longest question of a task has so many times its mean tokens
# What a run takes beyond its bare steps, as runs on two CPUs and an H100 did: the Trainer and its data;
# padding, where answers are set beside rivals of another length; and texts made of tokens, judged and kept.
TRAINER, RIVALS, TEXTS = 1.1, 1.1, 1.3
# A measurement on a CPU computes at most so many FLOPs at a time, and no more than so many seconds: GPT-2's
# steps as the configs have them took minutes each.
CPU_FLOPS, CPU_SECONDS = 3e10, 2.0
# Of a card that is not here: the share of its peak that training reaches, in pretraining and on the short
# texts of other stages, and what one step of decoding takes besides arithmetic, a layer. (An H100's: 0.31 and
# 0.40 of its data sheet for speedrun.py and max3060.py, 0.01, 0.0001.)
PRETRAINING, TUNING, STEP_OF_A_LAYER = 0.40, 0.12, 0.00015


@dataclass
class PlanConfig:
    """For which machine, and where commands put what they make."""

    plan: bool = False  # nothing else: run_all.sh's flag for the plan alone
    vram: float = 0.0  # plan for a card with this many GB instead of the machine here
    card: str = ""  # plan for a card of this name, such as "RTX 3090"; with --vram alone an RTX 3060
    device: str = "auto"  # cuda, cpu, ...
    out: str = "out"  # folder that holds everything the project makes


@dataclass
class Batch:
    """The largest batch in which a model is asked: prompts of `length` tokens that are continued by `new`, n
    times each, or (new = 0) texts of `length` tokens whose likelihood is read.
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
        if self.new:
            most = 256 if on_cpu else 1024
        else:
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
    """What a stage does, in tokens, and the shape of the model that does it."""

    shape: ModelConfig | None = None
    trains: float = 0.0
    samples: float = 0.0
    reads: float = 0.0
    seconds: float = 0.0  # of what is no model's work
    megabytes: float = 0.0  # that are downloaded or written
    rows: int = 0  # of a training step's micro-batch, and their length
    length: int = 0
    trained: int = -1  # parameters that learn; -1: all
    four_bit: bool = False
    checkpointing: bool = False
    compiled: bool = False  # where there is a card
    loss: str = "text"  # of every token; of "packed" conversations; of "answers" alone, beside rivals
    optimizer: str = "adamw"
    flops: float = 1.0  # of a trained token, relative to training all weights
    notes: list[str] = field(default_factory=list)
    asks: list[Batch] = field(default_factory=list)  # the batches in which models are asked


# -----------------------------------------------------------------------------
# What each script does with its settings


class Plan:
    """Counts the work of one command after the other; what one makes, the next ones may use."""

    def __init__(self, cfg: PlanConfig):
        self.cfg = cfg
        self.shapes: dict[str, ModelConfig] = {}  # run folder -> its model
        self.bases = {*ON_HUB}  # models that were taught no task
        # Model -> its kind, and whether model.py computes it; others are ("causal", True).
        self.kinds = dict.fromkeys(ENCODER_DECODERS, ("seq2seq", False))
        self.drawn: set[tuple] = set()  # (model, task, split, rows, n, temperature): answers that are kept
        self.judged: set[tuple] = set()  # (verifier, model, split, rows, n): what was said of them

    def count(self, words: list[str]) -> Work:
        """The work of `python SCRIPT FLAGS...`."""
        script, flags = Path(words[0]).name, words[1:]
        counters = {
            "tokenizer.py": (TokenizerStageConfig, self.tokenizer), "train.py": (TrainConfig, self.train),
            "finetune.py": (FinetuneConfig, self.finetune), "sft.py": (SFTConfig, self.sft),
            "dpo.py": (DPOConfig, self.dpo), "verifier.py": (VerifierConfig, self.verifier),
            "eval.py": (EvalConfig, self.eval),
        }  # fmt: skip
        if script not in counters:
            return Work()
        Config, counter = counters[script]
        if Config is EvalConfig:
            flags = read_words(flags)
        return counter(parse_config(Config, "", [w for w in flags if w != "--batch_size=auto"]))

    def shape(self, name: str) -> ModelConfig:
        if name in self.shapes:
            return self.shapes[name]
        if (Path(name) / "config.json").exists():
            with contextlib.suppress(ValueError):  # one that model.py cannot compute, such as a tuned T5
                return from_hf_config(read_json(Path(name) / "config.json"))
        if (Path(name) / "run.json").exists():  # an adapter, or such a model: as its parent
            return self.shape(read_json(Path(name) / "run.json").get("parent") or "nothing")
        if name in ON_HUB:
            return ModelConfig(**ON_HUB[name])
        raise ConfigError(f"the shape of {name} is not known: no folder, no earlier stage, not among "
                          f"{', '.join(ON_HUB)}")  # fmt: skip

    def asked(self, model: str, task: str, shots: int = 0, context: int = 0, **more) -> Batch:
        """The batch in which `model` answers `task` after so many worked examples."""
        c, (kind, ours) = self.shape(model), self.kinds.get(model, ("causal", True))
        context = min(context or c.context_length, c.context_length)
        question, answer = SIZES[task][3:]
        new = min(TASKS[task].max_new_tokens, context // 2)
        length = LONGEST * question + shots * (question + answer)
        length = min(length, context if kind == "seq2seq" else context - max(new, answer))
        if TASKS[task].labels:
            length, new = length + answer, 0
        total = count_parameters(c)["total"]
        return Batch(shape_of(c, kind, ours), total, length, new, **more)

    def read(self, model: str, length: int) -> Batch:
        """The batch in which the likelihood of texts of so many tokens is read."""
        c, (kind, ours) = self.shape(model), self.kinds.get(model, ("causal", True))
        total = count_parameters(c)["total"]
        return Batch(shape_of(c, kind, ours), total, min(length, c.context_length))

    def tokenizer(self, cfg: TokenizerStageConfig) -> Work:
        """Its text is read twice, to learn merges and to be encoded. What is made up on the spot is made up
        as fast as a sample of it; what is read from files, encoded at ENCODES.
        """
        parts = [part.partition(":") for part in cfg.corpus.split(",")]
        shares = {name: float(share or 1) for name, _, share in parts}
        leader = max(shares, key=shares.get)
        begun, size, count = time.perf_counter(), 0, 2000
        if set(shares) <= set(EMBEDDED):
            with contextlib.redirect_stderr(None):
                size = sum(len(text.encode()) for text in islice(documents(cfg.corpus, "train"), count)) / 1e6
            rate = size / (time.perf_counter() - begun)
            whole = EMBEDDED[leader][1] * (size / count) / shares[leader]
        elif leader in TEXT:
            rate, whole = ENCODES * (os.cpu_count() or 1), TEXT[leader] / shares[leader]
        else:
            return Work(notes=[f"the size of {leader} is not known"])
        learnt, encoded = (min(most or whole, whole) for most in (cfg.learn_megabytes, cfg.train_megabytes))
        wanted = sum(TEXT[name] for name in shares if name in TEXT and not is_here(CORPORA[name].folder))
        return Work(seconds=(learnt + encoded) / rate, megabytes=wanted + 2 * encoded / 3.5)  # uint16 tokens

    def train(self, cfg: TrainConfig) -> Work:
        shape = planned_for(replace(cfg, vram=self.cfg.vram, card=self.cfg.card))[0]
        self.shapes[f"{cfg.out}/{cfg.name}"] = shape
        self.bases.add(f"{cfg.out}/{cfg.name}")
        tokens = cfg.max_steps * cfg.batch_size * cfg.grad_accum_steps * shape.context_length
        before = (cfg.max_steps - 1) // cfg.eval_every if cfg.eval_every else 0
        reads = before * (cfg.eval_tokens or 600_000) + (cfg.final_eval_tokens or 600_000)
        return Work(shape, tokens, 400 * (before + 1), reads, rows=cfg.batch_size, compiled=bool(cfg.compile),
                    length=shape.context_length, checkpointing=cfg.gradient_checkpointing,
                    optimizer=cfg.optimizer,
                    megabytes=checkpoints(count_parameters(shape)["total"], cfg))  # fmt: skip

    def adapted(self, cfg: AdaptConfig, tokens: float, length: int, **more) -> Work:
        """A stage that trains so many tokens a pass on `cfg.model`."""
        shape = self.shape(cfg.model)
        self.shapes[f"{cfg.out}/{cfg.name}"] = shape
        trained, flops = -1, 1.0
        if cfg.lora_r:
            wide = shape.head_dim * (2 * shape.n_heads + 2 * shape.n_kv_heads) + 4 * shape.d_model
            trained = shape.n_layers * cfg.lora_r * (wide + 3 * (shape.d_model + shape.d_ff))
            flops = 4 / 6  # the frozen weights want no gradient
            more["seconds"] = 6.0  # that importing PEFT takes
        all_tokens, total = tokens * cfg.epochs, count_parameters(shape)["total"]
        more["optimizer"] = cfg.optimizer
        more["megabytes"] = checkpoints(trained if trained >= 0 else total, cfg)
        if cfg.model in ON_HUB:
            more["megabytes"] += 4 * total / 1e6
        return Work(shape, all_tokens, rows=cfg.batch_size, length=length, trained=trained, flops=flops,
                    four_bit=cfg.load_in_4bit, checkpointing=cfg.gradient_checkpointing, **more)  # fmt: skip

    def finetune(self, cfg: FinetuneConfig) -> Work:
        rows, held, _, asked, said = SIZES[cfg.task]
        rows = cfg.max_train_examples or rows
        work = self.adapted(cfg, rows * (asked + said), 3 * (asked + said))
        times = rows * cfg.epochs / (cfg.batch_size * cfg.grad_accum_steps * max(1, cfg.eval_every))
        watched = min(held, cfg.eval_examples or held)
        labels = max(1, len(TASKS[cfg.task].labels)) if cfg.method == "lm" else 1
        work.reads = (times * watched + held) * (asked + said) * labels
        if not TASKS[cfg.task].labels:
            work.samples = held * said
        kind = "head" if cfg.method == "head" else self.kinds.get(cfg.model, ("causal", True))[0]
        self.kinds[name := f"{cfg.out}/{cfg.name}"] = (kind, kind == "causal")
        # The trained model and its optimizer are still there when its copy in the folder is evaluated.
        total = count_parameters(work.shape)["total"]
        trained = total if work.trained < 0 else work.trained
        frozen = 0.6 if cfg.load_in_4bit else 2  # bytes a weight
        beside = 16 * trained + frozen * (total - trained)
        work.asks = [self.asked(name, cfg.task, context=cfg.context_length, beside=beside)]
        return work

    def sft(self, cfg: SFTConfig) -> Work:
        tokens = held = 0
        for source, count, _ in mixture(cfg.data):
            rows, validation, _, asked, said = SIZES.get(source, (4_000, 300, 300, STORY - 4, 4))
            tokens += min(filter(None, (count, cfg.max_train_examples, rows))) * (asked + said + 4)
            held += min(cfg.eval_examples or validation, validation) * (asked + said + 4)
        length = cfg.context_length or min(1024, self.shape(cfg.model).context_length)
        work = self.adapted(cfg, tokens, length, loss="packed")
        work.reads = held * max(1, tokens * cfg.epochs / (cfg.batch_size * length * max(1, cfg.eval_every)))
        return work

    def draw(self, model: str, task: str, split: str, rows: int, n: int, temperature: float) -> float:
        """Tokens of n answers to so many problems; none if they have been drawn before."""
        key = (model, task, split, rows, n, temperature)
        if key in self.drawn:
            return 0.0
        self.drawn.add(key)
        return rows * (n if temperature else 1) * SIZES[task][4]

    def dpo(self, cfg: DPOConfig) -> Work:
        if cfg.data not in SIZES:
            return self.adapted(cfg, 2 * 40_000 * 200, 512, notes=[f"{cfg.data}: 40,000 pairs of 200 tokens"])
        asked, said = SIZES[cfg.data][3:]
        both = not cfg.first_difference and cfg.method in ("dpo", "ipo")
        rows = 0.85 * cfg.problems  # some problems have no right answer
        work = self.adapted(cfg, rows * (asked + said) * (1 + both), 2 * (asked + said), loss="answers")
        work.samples = self.draw(cfg.model, cfg.data, "train", cfg.problems, cfg.n, cfg.temperature)
        work.samples += self.draw(cfg.model, cfg.data, "held", cfg.eval_examples, cfg.n, cfg.temperature)
        work.samples += self.draw(cfg.model, cfg.data, "held", cfg.eval_examples, 1, 0.0)
        work.asks = [self.read(cfg.model, LONGEST * (asked + said))]
        if cfg.data in TASKS:
            work.asks.append(self.asked(cfg.model, cfg.data, n=cfg.n, sampled=True))
        checks = rows * cfg.epochs / (cfg.batch_size * max(1, cfg.eval_every)) + 1
        work.reads = (rows * (1 + both) + checks * 4 * 0.4 * cfg.eval_examples) * (asked + said)
        return work

    def verifier(self, cfg: VerifierConfig) -> Work:
        asked, said = SIZES[cfg.task][3:]
        answers = cfg.problems * cfg.n
        if cfg.kind == "head":
            work = self.adapted(cfg, answers * (asked + said), 2 * (asked + said))
        else:  # a third of the answers are right and differ; a third of these have a wrong one beside them
            right, paired = (0.12 * cfg.repeats,) * 2 if cfg.repeats and cfg.contrast else (0.32, 0.12)
            told = cfg.gold + (right + paired * bool(cfg.contrast)) * answers
            start = replace(cfg, model=cfg.start)
            work = self.adapted(start, told * (asked + said), 2 * (asked + said), loss="answers")
        teacher = cfg.answers_of or cfg.model
        work.samples = self.draw(teacher, cfg.task, "train", cfg.problems, cfg.n, cfg.temperature)
        tests = cfg.test_problems or SIZES[cfg.task][2]
        validation = cfg.validation_problems or SIZES[cfg.task][1]
        for split, rows in (("validation", validation), ("test", tests)):
            work.samples += self.draw(cfg.model, cfg.task, split, rows, cfg.held_n, cfg.held_temperature)
            self.judged.add((f"{cfg.out}/{cfg.name}", cfg.model, split, rows, cfg.held_n))
        work.asks = [self.asked(teacher, cfg.task, n=cfg.n, sampled=True)]
        work.asks += [self.asked(cfg.model, cfg.task, n=cfg.held_n, sampled=cfg.held_temperature > 0)]
        work.asks += [self.read(cfg.model, LONGEST * (asked + said))]
        # Answers that differ, under the generator and under the channel.
        work.reads = 2 * 0.6 * (tests + validation) * cfg.held_n * (asked + said)
        return work

    def eval(self, cfg: EvalConfig) -> Work:
        total = Work()
        if cfg.attention:
            return total
        for name in cfg.models.split(","):
            total.shape = shape = self.shape(name)
            if cfg.backend == "transformers":
                self.kinds[name] = (self.kinds.get(name, ("causal", True))[0], False)
            run = Path(name) / "run.json"
            taught = read_json(run).get("stage") != "train" if run.exists() else name not in self.bases
            for task in cfg.tasks.split(","):
                for shots in cfg.shots.split(",") if task in TASKS else ["0"]:
                    self.measured(cfg, total, shape, name, task, int(shots), taught)
            total.samples += min(cfg.battery, 1000) * 8
        return total

    def measured(self, cfg, total: Work, shape, name: str, task: str, shots: int, taught: bool) -> None:
        """Adds one model's work on one task with so many examples in the prompt."""
        if task not in TASKS:
            total.asks.append(self.read(name, cfg.context_length or shape.context_length))
            total.reads += 2 * (1_000 * STORY if task in ("storyworld", "numbers") else 300_000)
            return
        _, held, test, asked, said = SIZES[task]
        rows = min(cfg.limit or 10**9, test if TASKS[task].test == "test" else held)
        total.asks.append(self.asked(name, task, shots, cfg.context_length))
        told = asked + said + shots * (asked + said)
        if TASKS[task].labels:
            total.reads += rows * min(told, shape.context_length) * len(TASKS[task].labels)
        elif cfg.samples and taught and TASKS[task].metric == "exact_match":
            total.samples += self.draw(name, task, "test", rows, cfg.samples, cfg.temperature)
            total.samples += 2 * rows * said  # greedily, without a calculator and with one
            total.asks.append(self.asked(name, task, n=cfg.samples, sampled=True))
            for verifier in filter(None, cfg.verifier.split(",")):
                kept = (verifier, name, "test", rows, cfg.samples) in self.judged
                total.reads += 0 if kept else 2 * 0.6 * rows * cfg.samples * (asked + said)
        else:  # a base goes on until it has no room: it was never taught to end
            total.samples += rows * (said if taught else TASKS[task].max_new_tokens)
            total.reads += rows * min(told, shape.context_length)


def is_here(folder: str) -> bool:
    return (Path(os.environ.get("DATA_DIR") or "data") / folder).exists()


def checkpoints(trained: int, cfg: TrainConfig | AdaptConfig) -> float:
    """Megabytes of a run folder: weights and AdamW's moments of the best checkpoint, those that are kept, and
    the next one before an old one goes.
    """
    return trained * (12 * (2 + cfg.keep_last) if cfg.save_every else 4) / 1e6


# -----------------------------------------------------------------------------
# What a token takes: measured here, or worked out for a card that is elsewhere


class Here:
    """Seconds of a token on this machine, measured in the shape at hand and remembered."""

    def __init__(self, device: torch.device):
        self.device, self.known = device, {}
        # On a CPU, answers are sampled and read by one process for each thread.
        self.processes = torch.get_num_threads() if device.type == "cpu" else 1

    def start(self) -> float:
        """Seconds until a script has loaded its libraries."""
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import verifier, transformers"], cwd=ROOT, check=True)
        return time.perf_counter() - begun

    def training(self, work: Work) -> float:
        rows, length = work.rows, min(work.length, work.shape.context_length)
        if self.device.type == "cpu":
            tokens = min(4096, self.affordable(work.shape, 6))
            length = min(length, max(64, tokens))
            rows = max(1, min(rows, tokens // length))
        c = replace(work.shape, context_length=length)
        how = (c, rows, work.loss, work.optimizer, work.compiled and self.device.type == "cuda")
        more = TRAINER * (RIVALS if work.loss == "answers" else 1)
        return more * self.remembered(("training", *how), lambda: self.step(*how))

    def step(self, c: ModelConfig, rows: int, loss: str, optimizer: str, compiled: bool) -> float:
        cfg, T = TrainConfig(batch_size=rows, optimizer=optimizer), c.context_length
        if loss != "text" and self.device.type == "cpu":  # see dtype_for; large models' bfloat16 aside
            cfg.dtype = "float32"
        if loss == "answers":  # a row of the plan is an answer and its rival
            rows, T = 2 * rows, T // 2
        ids = torch.randint(c.vocab_size, (rows, T), device=self.device)
        if loss == "packed":  # three conversations a row, of whose tokens half are the assistant's
            at = torch.arange(T, device=self.device).expand(rows, T)
            batch = ids, ids.where(at % 2 == 0, -100), at % (T // 3 + 1), at // (T // 3 + 1)
            step = Step(c, cfg, self.device, compiled, conversation_loss, batch)
        elif loss == "answers":  # the second half of each row
            right = torch.arange(rows // 2, device=self.device)
            batch = ids, torch.ones_like(ids), ids[:, T // 2 :], right
            step = Step(c, cfg, self.device, compiled, partial(channel_loss, contrast=1.0), batch)
        else:
            step = Step(c, cfg, self.device, compiled)
        alike = loss == "text"  # batches of the other losses are of ever new shapes
        with float32_products(
            fastest_products(self.device) if alike else torch.get_float32_matmul_precision()
        ):
            step()
            times = [timed(step, self.device)]
            while len(times) < 7 and (self.device.type != "cpu" or sum(times) < CPU_SECONDS):
                times.append(timed(step, self.device))
            return median(times) / ids.numel()

    def sampling(self, work: Work) -> float:
        model, new = self.model(work.shape), 48
        asked, n = 64, 64
        if self.device.type == "cpu":
            tokens = self.affordable(work.shape, 2) // 16  # for each of 16 prompts
            new = max(8, min(new, tokens // 2))
            asked, n = min(asked, max(8, tokens - new)), max(1, min(16, tokens // new))
        prompts = [[1] * asked] * 16

        def draw():
            with torch.autocast("cuda", pick_dtype("auto", self.device), enabled=self.device.type == "cuda"):
                model.generate(prompts, new, temperature=1.0, n=n, seed=1)

        bare = self.remembered(("sampling", work.shape), lambda: self.shared(draw) / (16 * n * new))
        return TEXTS * bare

    def reading(self, work: Work) -> float:
        rows, times = 32, 8
        if self.device.type == "cpu":
            rows = max(1, min(rows, self.affordable(work.shape, 2) // (times * 128)))
            times = max(1, min(times, self.affordable(work.shape, 2) // (rows * 128)))
        ids = torch.ones(rows, 128, dtype=torch.long, device=self.device)

        @torch.inference_mode()
        def read():
            for _ in range(times):
                self.model(work.shape)(ids).float().log_softmax(-1)

        bare = self.remembered(("reading", work.shape), lambda: self.shared(read) / (times * ids.numel()))
        return TEXTS * bare

    def affordable(self, c: ModelConfig, flops: int) -> int:
        """Tokens of CPU_FLOPS, at so many FLOPs a parameter: 6 in training, 2 in reading and sampling."""
        return int(CPU_FLOPS / (flops * count_parameters(c)["total"]))

    def model(self, c: ModelConfig) -> ModernDecoderLM:
        return self.remembered(("model", c), lambda: ModernDecoderLM(c).to(self.device).eval())

    def shared(self, run: Callable) -> float:
        """Seconds of `run`, done twice by each of the processes that would do it, side by side: together they
        are slower than one of them alone.
        """
        run()
        each = lambda _: timed(run, self.device)  # noqa: E731
        return fmean(on_all_cores(each, range(2 * self.processes), self.device)) / self.processes

    def remembered(self, key: tuple, measure: Callable):
        key = tuple(str(part) for part in key)
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]


class Elsewhere:
    """The same of a card by its data sheet, with the shares that stand above as constants."""

    def __init__(self, card: str):
        self.peak = peak_flops(card)
        if not self.peak:
            raise ConfigError(f"--card={card}: its peak rate is not known")

    def start(self) -> float:
        return 6.0

    def training(self, work: Work) -> float:
        share = PRETRAINING if work.trained < 0 and work.length >= 512 else TUNING
        return estimate_flops(work.shape, work.length) / (share * self.peak)

    def sampling(self, work: Work) -> float:
        rows = 512  # finished ones make room for others
        return STEP_OF_A_LAYER * work.shape.n_layers / rows + self.reading(work)

    def reading(self, work: Work) -> float:
        return estimate_flops(work.shape, 256) / 3 / (TUNING * self.peak)


def answering_memory(work: Work, space: float, on_cpu: bool) -> float:
    """GiB at most of generation and likelihoods, where a process has `space` bytes.

    On a CPU as many processes as torch has threads work at the same time (`on_all_cores`) and share the
    weights. On a GPU there are its context and the 6 % that the allocator loses, as in `estimate_memory`.
    """
    peak, processes = 0.0, torch.get_num_threads() if on_cpu else 1
    context, lost = (0.4 * GIB, 1.0) if on_cpu else (0.55 * GIB, 1.06)
    for batch in work.asks:
        weights = batch.weights(on_cpu)
        left = (space - weights - context) / lost / processes
        need = batch.bytes(batch.rows(left, on_cpu), on_cpu)
        peak = max(peak, context + weights + lost * processes * need)
    return peak / GIB


def memory(work: Work, on_cpu: bool) -> float:
    """GiB at most of a training step; 0 where nothing is trained."""
    if work.shape is None or not work.trains:
        return 0.0
    libraries, total = 0.4 if on_cpu else 0.0, count_parameters(work.shape)["total"]
    parts = estimate_memory(
        work.shape, work.rows, work.length, gradient_checkpointing=work.checkpointing,
        bytes_per_activation=4 if on_cpu else 2, compiled=work.compiled and not on_cpu,
    )  # fmt: skip
    if work.trained >= 0:  # frozen weights have no gradients and no moments
        embedding = work.shape.vocab_size * work.shape.d_model
        frozen = 4 * embedding + 0.6 * (total - embedding) if work.four_bit else 4 * total
        parts |= {"weights": frozen + 4 * work.trained, "gradients": 4 * work.trained}
        parts["optimizer"] = 8 * work.trained
        parts["peak"] = sum(size for kind, size in parts.items() if kind != "peak")
    return libraries + parts["peak"] / GIB


# -----------------------------------------------------------------------------
# The plan


def estimate(commands: list[tuple[str, list[str]]], cfg: PlanConfig) -> list[dict]:
    """A row for each command (name, words behind `python`): seconds, GiB and tokens by kind."""
    elsewhere = bool(cfg.vram or cfg.card)
    device = torch.device("cpu") if elsewhere else pick_device(cfg.device)
    rates = Elsewhere(cfg.card or "RTX 3060") if elsewhere else Here(device)
    plan, rows, start, space = Plan(cfg), [], rates.start(), space_for(cfg, device)
    for name, words in commands:
        work = plan.count(words)
        row = {"stage": name, "seconds": start + work.seconds, "notes": work.notes}
        row["megabytes"] = work.megabytes
        for kind, rate in (("trains", rates.training), ("samples", rates.sampling), ("reads", rates.reading)):
            row[kind] = getattr(work, kind)
            if row[kind]:
                row["seconds"] += row[kind] * rate(work) * (work.flops if kind == "trains" else 1)
        on_cpu = device.type == "cpu" and not elsewhere
        row["gib"] = memory(work, on_cpu)
        rows.append(row | {"answering_gib": answering_memory(work, space, on_cpu)})
    return rows


def space_for(cfg: PlanConfig, device: torch.device) -> float:
    """Bytes that a batch may take with the weights: of the card that is planned for, or free here. A card of
    which nothing but its name is known is taken to have 12 GB.
    """
    if cfg.vram or cfg.card:
        return usable(cfg.vram or 12.0) * GIB
    return room(device)


def table(rows: list[dict]) -> list[str]:
    def tokens(n: float) -> str:
        return f"{n / 1e6:,.2f}M" if n >= 5000 else ""

    lines = [
        f"{'':18}{'':8}{'GiB to':>7}{'GiB to':>8}{'tokens':>12}",
        f"{'':18}{'minutes':>8}{'train':>7}{'answer':>8}{'trains on':>12}{'samples':>10}{'reads':>10}",
    ]
    for row in rows:
        counts = f"{tokens(row['trains']):>12}{tokens(row['samples']):>10}{tokens(row['reads']):>10}"
        notes = "; ".join(row["notes"])
        sizes = [f"{row[kind]:.1f}" if row[kind] else "" for kind in ("gib", "answering_gib")]
        size = f"{sizes[0]:>7}{sizes[1]:>8}"
        lines.append(f"{row['stage']:18}{row['seconds'] / 60:8.1f}{size}{counts}  {notes}".rstrip())
    total = sum(row["seconds"] for row in rows)
    train, answer = (max(row[kind] for row in rows) for kind in ("gib", "answering_gib"))
    disk = sum(row["megabytes"] for row in rows) / 1000
    lines.append(f"{'all':18}{total / 60:8.1f}{train:7.1f}{answer:8.1f}")
    return [*lines, f"{'disk':18}{disk:8.1f} GB"]


def refuse_full_disk(rows: list[dict], out: str) -> None:
    """What is downloaded goes elsewhere, perhaps, but mostly to the same disk."""
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    wanted, free = sum(row["megabytes"] for row in rows) / 1000, shutil.disk_usage(folder).free / 1e9
    if wanted > free:
        raise FullDisk(
            f"{wanted:.1f} GB will be downloaded and written, and {folder} has {free:.1f} GB free: make "
            "room, or choose another disk by OUT=/big/disk/out (and DATA_DIR and HF_HOME for downloads)"
        )


class FullDisk(OSError):
    """There is no room for what would be made."""


def keep(rows: list[dict], out: str) -> None:
    """{out}/plan.tsv: stage, seconds, GiB; run_all.sh and the report hold what happened against it."""
    file = Path(out) / "plan.tsv"
    lines = file.read_text().splitlines() if file.exists() else []
    kept = {line.split("\t")[0]: line for line in lines}
    kept |= {row["stage"]: f"{row['stage']}\t{row['seconds']:.1f}\t{row['gib']:.2f}" for row in rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: path.write_text("\n".join(kept.values()) + "\n"))


def main() -> None:
    words, commands = sys.argv[1:], []
    script = next((i for i, word in enumerate(words) if (ROOT / word).is_file() and "/" not in word), None)
    if script is not None:  # `plan.py sft.py ...`: what is left of it is one command's, but for the card
        mine = [w for w in words if w.split("=")[0] in ("--vram", "--card")]
        commands = [(Path(words[script]).stem, [w for w in words[script:] if w not in mine])]
        words = [*words[:script], *mine]
    cfg = parse_config(PlanConfig, __doc__, words)
    try:
        if not commands:  # from run_all.sh: a name and a command a line
            lines = (line.rstrip("\n").split("\t") for line in sys.stdin)
            commands = [(name, shlex.split(command)[1:]) for name, command in lines]
        if not commands:
            return print("the plan: nothing is left to do")
        begun = time.perf_counter()
        rows = estimate(commands, cfg)
        where = f"for {cfg.card or 'RTX 3060'}, by its data sheet" if cfg.vram or cfg.card else (
            f"for {cpu_name()}, measured in {time.perf_counter() - begun:.0f} s")  # fmt: skip
        print("\n".join([f"the plan, {where}:", *table(rows)]))
        most = max(max(row["gib"], row["answering_gib"]) for row in rows)
        if cfg.vram and most > cfg.vram * 10 / 12:
            print(f"WARNING: more than the {cfg.vram * 10 / 12:.1f} GiB that a {cfg.vram:.0f} GB card leaves")
        if script is None and not (cfg.vram or cfg.card):
            keep(rows, cfg.out)
            refuse_full_disk(rows, cfg.out)
    except FullDisk as error:
        print(f"lab.plan: {error}", file=sys.stderr)
        raise SystemExit(3) from None
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"lab.plan: {error}") from None


if __name__ == "__main__":
    run_script(main)
