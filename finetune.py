"""Stage 3: fine-tuning. A pretrained model, from the Hugging Face hub or a run of ours, learns one task.

    python finetune.py configs/sentiment.py           # our base, embedded data: a minute on a laptop
    python finetune.py configs/sst2.py --model=gpt2   # GPT-2 with LoRA: is a review good or bad?
    python finetune.py configs/samsum.py              # FLAN-T5 learns to summarise chats
    python finetune.py configs/gsm8k.py --model=TinyLlama/TinyLlama_v1.1 --load_in_4bit    # QLoRA
    python finetune.py configs/sst2.py --model=out/laptop --lora_r=0 --learning_rate=5e-4  # ours, all weights

A task is a question in words (data.py). `--method=lm` teaches the model to say the answer: the loss is on the
answer's tokens alone. `--method=head` puts a linear layer on top that reads off a class. Decoders (GPT-2,
Llama, ours), encoder-decoders (T5) and, with a head, encoders (BERT) will do. With `--lora_r` above 0 the
weights stay as they are and every matrix W gets a low-rank correction W + (alpha / r) B A (Hu et al., 2021),
the only thing that is trained and saved; with `--load_in_4bit` W itself shrinks to 4 bits a weight (QLoRA,
Dettmers et al., 2023).

It reads a model and a task, and writes a run folder out/NAME as training does: the model or the adapter as it
was at the end (nothing is chosen by the validation split), run.json with its results on that split,
predictions.jsonl with all it answered. Training, resuming and logging are train.py's Trainer.
"""

from support.terminal import run_script

import bisect
import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import parse_config
from data import TASKS, DataError, Example, Task, find_task, judge, load_task, talk
from model import ModernDecoderLM, from_hf_config, from_tensors, write_generation_config
from support.chat_template import (
    WORDS_TEMPLATE,
    TemplateError,
    conversation_ids,
    is_ours,
    reply_ids,
    with_generation_marks,
)
from support.files import write_atomically, write_folder_atomically
from support.hub import unreachable
from support.hub_models import HubTokenizer
from support.hub_models import generate as hub_generate
from support.memory import Shape, generation_bytes, halving, likelihood_bytes, room, rows_that_fit, shape_of
from support.model_card import write_model_card
from support.processes import become_worker, worker_pool
from support.tables import read_jsonl
from tasks.calculator import calculator_answer
from tokenizer import (
    CHAT_TEMPLATE,
    EOT,
    ROLES,
    SPECIAL_TOKENS,
    ForeignTokenizer,
    Tokenizer,
    check_tokenizer,
    map_ahead,
)
from train import (
    FREE_TO_CHANGE,
    AlreadyFinished,
    Trainer,
    TrainerConfig,
    TrainError,
    pick_device,
    pick_dtype,
    read_json,
    run_folder,
    tqdm,
    weights_hash,
)


@dataclass
class AdaptConfig(TrainerConfig):
    """What every stage after pretraining adds to the Trainer's settings."""

    model: str = "out/base"  # what is tuned: run folder, folder with a Hugging Face model, or id on the hub
    epochs: float = 3.0  # times through the training examples
    max_steps: int = 0  # optimizer steps; 0: as many as the epochs have
    context_length: int = 0  # tokens of a text at most; 0: the model's context, at most 1024
    dropout: float = -1.0  # while training, on embeddings and wherever the model has it; -1: the model's own
    lora_r: int = 0  # rank of LoRA's corrections; 0: train all weights
    lora_alpha: float = 0.0  # their scale is lora_alpha / lora_r; 0: 2 lora_r
    lora_dropout: float = 0.05  # on what the corrections read
    lora_targets: str = ""  # names of layers to correct, joined by commas; nothing: all linear layers
    load_in_4bit: bool = False  # QLoRA: keep the frozen weights in 4 bits (needs bitsandbytes)
    merge: bool = False  # afterwards also save base and adapter as one model, in {name}/merged
    learning_rate: float = 2e-4  # the highest
    min_lr: float = 0.0  # the lowest, reached at the end
    warmup_steps: int = 50  # steps from 0 up to learning_rate
    weight_decay: float = 0.01  # pulls matrices, not norms and biases, towards 0
    beta2: float = 0.999  # memory of the squared gradient: fine-tuning has few steps but calm ones
    compile: bool | Literal["auto"] = False  # torch.compile: batches differ in shape, so it seldom pays


@dataclass
class FinetuneConfig(AdaptConfig):
    """A task, and how it is learnt."""

    name: str = ""  # the run's folder is {out}/{name}; default TASK-MODEL, with -lora or -qlora
    task: str = "sentiment"  # sst2, samsum, gsm8k, or embedded: sentiment, dialogue, arithmetic
    method: Literal["lm", "head"] = "lm"  # say the answer, or read a class off a linear layer on top
    max_train_examples: int = 0  # for a smoke run: train on so many only; 0: all
    eval_examples: int = 500  # validation examples looked at while training; all at the end
    max_eval_examples: int = 0  # for a smoke run: validation examples at the end; 0: all
    save_every: int = 200  # steps between checkpoints; 0: none, only the model at the end


# -----------------------------------------------------------------------------
# TextModel: one interface to every library and architecture

KINDS = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
KINDS |= {"head": "AutoModelForSequenceClassification"}
LORA_KINDS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "head": "SEQ_CLS"}


class TextModel:
    """A model and its tokenizer with three operations: likelihoods of answers, class scores, generation.

    `kind`: "causal" (decoder), "seq2seq" (encoder-decoder) or "head" (classifier). `model` is a
    ModernDecoderLM or a transformers model, with or without a PEFT adapter; a test asserts that both give the
    same numbers. `chat`: prompts are turns of a conversation, for instruction-tuned models.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | HubTokenizer,
        kind: str,
        name: str = "",
        context_length: int = 0,
        chat: bool = False,
    ):
        self.chat = chat
        self.model, self.tokenizer, self.kind, self.name = model, tokenizer, kind, name
        self.ours = isinstance(model, ModernDecoderLM)
        own = model.config.context_length if self.ours else hf_context(model.config, tokenizer)
        self.context_length = min(own, context_length or own)
        self.bos, self.eos, self.pad = tokenizer.bos, tokenizer.eot_id, tokenizer.pad_id
        if not self.ours and model.config.pad_token_id is None:  # GPT-2; a head finds the end of a text by it
            model.config.pad_token_id = self.pad
        self.before, self.behind = self.bos, []  # special tokens before and after a prompt
        if kind != "causal" and isinstance(tokenizer, HubTokenizer):
            self.before, self.behind = tokenizer.frame()
        known, named = model.config.vocab_size, tokenizer.vocab_size
        # GPT-2 lacks only the chat tokens that our copy of its vocabulary adds.
        if named > known and not (self.ours and known == 50257):
            raise TrainError(
                f"{name} has {known:,} tokens, but its tokenizer has {named:,}: they do not belong together"
            )
        # Chat template: the model's own; else ours; else words ("User: ..."), if the model lacks the special
        # tokens of ours. `marks`: it is ours, which is rendered without Jinja.
        has_marks = tokenizer.special_ids.get("<|end|>", known) < known
        template = tokenizer.chat_template
        self.marks = has_marks and (template is None or is_ours(template))
        if template is None or (is_ours(template) and not has_marks):
            template = CHAT_TEMPLATE if has_marks else WORDS_TEMPLATE
        self.template = template
        self.end = self.reply_ids("a")[-1] if chat else self.eos  # the token that ends an answer
        self.dtype = pick_dtype("auto", self.device) if self.device.type == "cuda" else torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # ---- text and tokens

    def encode(self, text: str) -> list[int]:
        """The ids of a text. A special token spelled in it stays plain text."""
        return self.tokenizer.encode(text, allowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, task: Task, text: str, shots: list[Example] = (), room: int = 0) -> tuple[list, str]:
        """The prompt of `task` about `text`: at most `room` ids, and what was cut: "", "shots" or "text".

        Examples (`shots`) stand before the question. If they do not fit, the first ones are removed; if the
        rest is still too long, the end of `text` is cut, but never the question.
        """
        room, shown, lost = room or self.context_length, list(shots), ""

        def asked(text: str) -> list[int]:
            if self.chat:
                turns = [m for s in shown for m in talk(task.question.replace("{}", s.text), s.target)]
                return self.conversation(turns + talk(task.question.replace("{}", text)))[0]
            before = "".join(f"{task.prompt(shot.text)}{shot.target}\n\n" for shot in shown)
            return self.before + self.encode(before + task.prompt(text)) + self.behind

        ids = asked(text)
        while len(ids) > room and shown:
            shown, lost = shown[1:], "shots"
            ids = asked(text)
        if len(ids) > room:
            # Bisection over characters: a truncated list of tokens need not decode and encode to itself.
            size = bisect.bisect(range(len(text)), room, key=lambda n: len(asked(text[:n].rstrip()))) - 1
            if size < 1:
                raise TrainError(f"{room} tokens are too few for a prompt: raise --context_length")
            ids, lost = asked(text[:size].rstrip()), "text"
        return ids, lost

    def conversation(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and whether each is the assistant's (its end-of-turn token is).

        If the last turn is not the assistant's, the beginning of an assistant turn is appended.
        """
        for message in messages:
            if message["role"] not in ROLES:
                raise TrainError(
                    f"unknown role {message['role']!r} in a conversation: use {', '.join(ROLES)}"
                )
        if not self.marks:
            return conversation_ids(self.tokenizer, self.template, messages)
        ids, is_answer, special = [], [], self.tokenizer.special_id
        for message in messages:
            turn = [*self.encode(message["content"].strip()), special("<|end|>")]
            ids += [special(f"<|{message['role']}|>"), *turn]
            is_answer += [False] + [message["role"] == "assistant"] * len(turn)
        if not messages or messages[-1]["role"] != "assistant":
            ids, is_answer = [*ids, special("<|assistant|>")], [*is_answer, False]
        return ids, is_answer

    def reply_ids(self, answer: str) -> list[int]:
        """The ids of an answer in a conversation, with the token that ends it."""
        if self.marks:
            return [*self.encode(answer.strip()), self.tokenizer.special_id("<|end|>")]
        try:
            ids = reply_ids(self.tokenizer, self.template, answer)
        except TemplateError:  # one that opens every answer with a thought
            ids = self.encode(answer.strip())
        ends = (self.eos, *self.tokenizer.special_ids.values())
        return ids if ids and ids[-1] in ends else [*ids, self.eos]

    def answer_ids(self, task: Task, answer: str) -> list[int]:
        """The ids of an answer without its end token, encoded in context: SentencePiece depends on it."""
        if self.chat:
            return self.reply_ids(answer)[:-1]
        if self.kind == "seq2seq":
            return self.encode(answer.strip())
        anchor = task.template.split("{}")[1]
        before, whole = self.encode(anchor), self.encode(anchor + answer)
        return whole[len(before) :] if whole[: len(before)] == before else self.encode(answer)

    # ---- likelihoods, class scores, generation

    def target_logits(self, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, K, V) of the target positions, the last K (see `collate`); for a head (B, C)."""
        return target_logits(self.model, self.kind, ids, mask, targets)

    def log_likelihoods(self, rows: list[tuple[list[int], list[int]]], progress: str = "") -> np.ndarray:
        """log p(answer | prompt) in nats, (n), for n pairs of ids (prompt, answer)."""

        @torch.no_grad()
        def summed(index: list[int]) -> list[float]:
            ids, mask, targets = self.collated([rows[i] for i in index])
            logits = self.target_logits(ids, mask, targets).flatten(0, 1)
            loss = F.cross_entropy(logits.float(), targets.flatten(), reduction="none")  # 0 where -100
            return (-loss.view_as(targets).double().sum(-1)).tolist()

        found, batches = np.zeros(len(rows)), list(self.batch_indices([length(row) for row in rows], ""))
        sums = on_all_cores(partial(halving, summed), batches, self.device, progress)
        for index, some in zip(batches, sums, strict=True):
            found[index] = some
        return found

    @torch.no_grad()
    def class_scores(self, task: Task, prompts: list[list[int]], progress: str = "") -> np.ndarray:
        """Log-probabilities (n, classes): of the head, or of each class name as a continuation."""
        if self.kind == "head":
            found = np.zeros((len(prompts), len(task.labels)))

            def scores(index: list[int]) -> list[list[float]]:
                logits = self.target_logits(*self.collated([(prompts[i], 0) for i in index]))
                return logits.float().log_softmax(-1).tolist()

            for index in self.batch_indices([len(ids) for ids in prompts], progress):
                found[index] = halving(scores, index)
            return found
        answers = [self.answer_ids(task, label) for label in task.labels]
        rows = [(prompt, answer) for prompt in prompts for answer in answers]
        return self.log_likelihoods(rows, progress).reshape(len(prompts), len(answers))

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop: str, progress: str = "", n: int = 1,
        temperature: float = 0.0, seed: int = 0, calculator: bool = False,
    ) -> list[str]:  # fmt: skip
        """Continuations, n of prompt 0, n of prompt 1, ..., each up to the model's end token or `stop`.

        Temperature 0 is greedy. Sample j of prompt i depends only on seed, i and j, so a larger n keeps the
        first samples. With `calculator`, the result after an open `<<9*3=` is computed, not generated.
        """
        stops = sorted({self.eos, self.end, *self.tokens_with(stop)})
        texts = [""] * (len(prompts) * n)
        rows = self.rows_of_generation(max_new_tokens, n, temperature > 0)
        how = {"temperature": temperature, "stop_tokens": stops}
        how["force"] = self.calculator if calculator else None

        def drawn(index: list[int], samples: list[int]) -> list[list[int]]:
            draws = (np.random.SeedSequence([seed, i, j]) for i in index for j in samples)
            seeds = [int(s.generate_state(1)[0]) for s in draws]  # torch's generator takes 32 bits
            some = [prompts[i] for i in index]
            return self.continuations(some, max_new_tokens, n=len(samples), seed=seeds, **how)

        def continued(index: list[int]) -> list[list[int]]:
            if len(index) > 1 or n == 1:
                return drawn(index, list(range(n)))
            return halving(partial(drawn, index), list(range(n)), rows(len(prompts[index[0]])))

        batches = list(self.batch_indices([len(p) for p in prompts], "", lambda prompt: rows(prompt) // n))
        work = partial(halving, continued)
        for index, new in zip(batches, on_all_cores(work, batches, self.device, progress), strict=True):
            for row, ids in enumerate(new):
                text = self.decode(ids)
                texts[index[row // n] * n + row % n] = text.split(stop)[0] if stop else text
        return texts

    def continuations(self, prompts: list[list[int]], max_new_tokens: int, **how) -> list[list[int]]:
        """Generated ids; see ModernDecoderLM.generate for the arguments."""
        overflows = self.kind == "seq2seq" and self.dtype == torch.float16  # T5's activations exceed 65,504
        half = self.dtype != torch.float32 and not overflows
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            if self.ours:
                return self.model.generate(prompts, max_new_tokens, **how)
            decoder_only = self.kind == "causal"
            return hub_generate(
                self.model, prompts, max_new_tokens, pad=self.pad, decoder_only=decoder_only, **how
            )

    def calculator(self, _row: int, new: list[int]) -> list[int]:
        """Ids to force next: the result, if the new tokens end in an open annotation (see `calculate`)."""
        if not new or not self._pieces[new[-1]].endswith("="):
            return []
        result = calculator_answer(self.decode(new))
        return self.encode(result) if result else []

    # ---- files

    def save(self, folder: Path) -> None:
        """Writes the model (for a PEFT model only the adapter), the tokenizer and the chat template."""
        ids = generation_ids(self)
        if self.ours:
            self.model.save_pretrained(folder, **ids)
        else:
            set_ids(self.model, ids)
            for adapter in getattr(self.model, "peft_config", {}).values():
                base = adapter.base_model_name_or_path
                if base and Path(base).is_dir():  # PEFT would write a relative path
                    adapter.base_model_name_or_path = os.path.abspath(base)
            adapter = {"save_embedding_layers": False} if hasattr(self.model, "peft_config") else {}
            self.model.save_pretrained(folder, **adapter)  # new tokens are saved separately
            if not (folder / "generation_config.json").exists():  # PEFT writes none
                write_generation_config(folder, ids)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template of a model card
        own = self.model.config.context_length if self.ours else hf_context(self.model.config, self.tokenizer)
        about = {"context_length": own}
        if self.chat:
            about["chat_template"] = with_generation_marks(self.template)
            about["end_token"] = self.tokenizer.decode([self.end])
        self.tokenizer.save(folder, **about)

    def read_weights(self, folder: Path) -> None:
        """The inverse of `save`: loads the weights into the existing model."""
        from safetensors.torch import load_file

        if self.ours:
            weights = ModernDecoderLM.from_pretrained(folder, self.device).state_dict()
        elif (folder / "adapter_model.safetensors").exists():
            import peft

            peft.set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
            return
        else:
            weights = type(self.model).from_pretrained(folder, dtype=torch.float32).state_dict()
        self.model.load_state_dict(weights)

    @cached_property
    def _pieces(self) -> list[str]:
        """The text of every id; "" of those that the model has beyond its tokenizer's, as Qwen's have."""
        known = self.tokenizer.vocab_size
        pieces = [self.decode([i]) for i in range(known)]
        return pieces + [""] * (self.model.config.vocab_size - known)

    def tokens_with(self, stop: str) -> list[int]:
        return [i for i, piece in enumerate(self._pieces) if stop in piece] if stop else []

    # ---- batches

    def batches(self, rows: list[tuple], progress: str) -> Iterator[tuple[list[int], tuple]]:
        """Batches of rows of similar lengths, as (indices, tensors)."""
        for index in self.batch_indices([length(row) for row in rows], progress):
            yield index, self.collated([rows[i] for i in index])

    def collated(self, rows: list[tuple]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(t.to(self.device) for t in collate(rows, self.kind, self.pad))

    def rows_of_generation(self, new: int, n: int, sampled: bool) -> Callable[[int], int]:
        """A function from the length of the longest prompt to the number of rows of a batch (n per prompt).

        1,024, or 256 on a CPU, where more are not faster; less if keys and values do not fit.
        """
        most, on_cpu = (256, True) if self.device.type == "cpu" else (1024, False)
        dtype = self.dtype if self.ours else self.weight_dtype
        available, how = self.room(dtype), dict(size=dtype.itemsize, sampled=sampled, on_cpu=on_cpu)

        def fits(prompt: int) -> int:
            need = partial(generation_bytes, self.shape, prompt=prompt, new=new, n=n, **how)
            return rows_that_fit(need, most, available)

        return fits

    def rows_of_likelihoods(self) -> Callable[[int], int]:
        """A function from the length of the longest row to the number of rows of a batch.

        At most 32,768 tokens (4,096 on a CPU, where more are not faster) and 1 GiB of float32 logits; less if
        they do not fit.
        """
        budget = 32_768 if self.device.type == "cuda" else 4096
        budget = min(budget, 2**28 // self.model.config.vocab_size)
        dtype = self.model.dtype if self.ours else self.weight_dtype
        available, how = self.room(dtype), dict(size=dtype.itemsize, on_cpu=self.device.type == "cpu")

        def fits(length: int) -> int:
            need = partial(likelihood_bytes, self.shape, length=length, columns=length, **how)
            return rows_that_fit(need, min(256, budget // max(1, length)), available)

        return fits

    @cached_property
    def shape(self) -> Shape:
        return shape_of(self.model.config, self.kind, self.ours)

    @property
    def weight_dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def room(self, dtype: torch.dtype) -> int:
        """Bytes available for a batch in `dtype`.

        A share of the free memory, minus the copy of the weights that autocast or `generate` makes. On a CPU
        several processes share it (`on_all_cores`).
        """
        processes = torch.get_num_threads() if self.device.type == "cpu" and sys.platform == "linux" else 1
        copied = dtype.itemsize if self.ours and dtype != self.weight_dtype else 0
        return room(self.device, processes) - copied * sum(p.numel() for p in self.model.parameters())

    def batch_indices(
        self, lengths: list[int], progress: str, fits: Callable[[int], int] | None = None
    ) -> Iterator[list[int]]:
        """Batches of indices, from the longest row to the shortest.

        A batch has fits(length of its first row) rows; by default as many as their logits fit into memory.
        """
        fits = fits or self.rows_of_likelihoods()
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        with tqdm()(total=len(order), desc=progress, disable=None if progress else True, leave=False) as bar:
            while order:
                size = max(1, fits(lengths[order[0]]))
                index, order = order[:size], order[size:]
                yield index
                bar.update(len(index))


_work: Callable  # the function of the processes of `on_all_cores`, inherited when they are forked


def call_work(item):
    return _work(item)


def begin_work() -> None:
    become_worker()
    torch.set_num_threads(1)


def on_all_cores(work: Callable, items: list, device: torch.device, progress: str = "") -> Iterator:
    """work(item) for each item, in order; on a CPU in one process for each of torch's threads.

    Sampling from a small model consists of small matrix products, which a second thread hardly speeds up.
    """
    global _work
    workers = min(torch.get_num_threads(), len(items) // 2) if device.type == "cpu" else 1
    with tqdm()(total=len(items), desc=progress, disable=None if progress else True, leave=False) as bar:
        alone = threading.current_thread() is threading.main_thread()  # not in a server
        if workers < 2 or sys.platform != "linux" or not alone:  # forking would not be safe
            for item in items:
                yield work(item)
                bar.update()
            return
        _work = work
        context = multiprocessing.get_context("fork")
        with worker_pool(workers, "OMP_NUM_THREADS=1", context, begin_work) as pool:
            for result in map_ahead(pool, call_work, items, ahead=2 * workers):
                yield result
                bar.update()


def hf_context(config, tokenizer) -> int:
    """The context length of a transformers model."""
    for key in ("n_positions", "max_position_embeddings", "max_seq_len"):
        if getattr(config, key, None):
            return getattr(config, key)
    inner = getattr(tokenizer, "inner", None)  # ours states no limit
    return min(getattr(inner, "model_max_length", 1024), 1024)


def length(row: tuple[list[int], list[int] | int]) -> int:
    """Number of tokens of a (prompt, answer) pair for `collate`; a class has none."""
    prompt, answer = row
    return len(prompt) + (len(answer) if isinstance(answer, list) else 0)


def collate(
    rows: list[tuple[list[int], list[int] | int]], kind: str, pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (prompt ids, answer ids or class) as padded tensors: ids (B, T), mask (B, T), targets.

    Decoder: ids are prompt and answer. The targets (B, K) belong to the last K columns only, as many as the
    earliest answer needs, with -100 at prompt and padding positions; no other logits are computed.
    Encoder-decoder: ids are the prompt, targets (B, K) the output of the decoder. Head: targets (B) are
    classes. Padding is on the right, where causal attention of the text never sees it.
    """
    if kind == "head":
        targets = torch.tensor([answer for _, answer in rows])
    elif kind == "seq2seq":
        targets = padded([answer for _, answer in rows], -100)
    else:
        skip = min(len(prompt) for prompt, _ in rows) - 1
        wanted = [[-100] * (len(prompt) - 1 - skip) + answer for prompt, answer in rows]
        targets = padded(wanted, -100)
        rows = [((prompt + answer)[:-1], None) for prompt, answer in rows]
    ids = padded([prompt for prompt, _ in rows], pad)
    lengths = torch.tensor([len(prompt) for prompt, _ in rows])
    mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
    return ids, mask, targets


def padded(rows: list[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def target_logits(model: nn.Module, kind: str, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """Logits for the targets of `collate`: (B, K, V), for a head (B, C)."""
    if kind == "head":
        return model(input_ids=ids, attention_mask=mask).logits
    K = targets.shape[1]
    if kind == "seq2seq":  # teacher forcing: a start token, then the targets so far
        core = getattr(model, "module", model)  # unwraps DistributedDataParallel
        start = torch.full_like(targets[:, :1], core.config.decoder_start_token_id)
        shifted = torch.cat([start, targets[:, :-1].clamp(min=0)], dim=1)
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, use_cache=False).logits
    if isinstance(model, ModernDecoderLM):
        return F.linear(model.hidden(ids)[:, -K:], model.head)
    return model(input_ids=ids, logits_to_keep=K, use_cache=False).logits  # causal: padding needs no mask


# -----------------------------------------------------------------------------
# Loading


def load_model(
    name: str, device: torch.device, backend: str = "auto", context_length: int = 0,
    dtype: torch.dtype | None = None,
) -> TextModel:  # fmt: skip
    """Loads a run folder of ours, a Hugging Face folder or hub id, or a PEFT adapter, for inference.

    backend: "ours" computes with model.py, "transformers" with transformers; "auto" uses model.py where it
    can compute the model, after merging an adapter into its base in memory. dtype: of the weights and
    activations of transformers (default: the fast one of a GPU, float32 on a CPU); our weights stay float32
    and are cast when used. Raises TrainError, ValueError or OSError with a message for the user.
    """
    config = read_config(name)
    kind, adapter = kind_of(name, config), is_adapter(name)
    why_not = why_not_ours(kind, config)
    if adapter and config.get("num_local_experts"):  # transformers holds all experts as one matrix
        why_not = why_not or "an adapter on a mixture of experts"
    if backend == "ours" and why_not:
        raise TrainError(f"model.py cannot compute {name} ({why_not}): --backend=auto")
    tokenizer = load_tokenizer(name, ours=backend != "transformers")
    dtype = dtype or (pick_dtype("auto", device) if device.type == "cuda" else torch.float32)
    if (kind, dtype) == ("seq2seq", torch.float16):  # T5's activations exceed 65,504
        dtype = torch.float32
    if backend != "transformers" and not why_not:
        if adapter:
            merged = with_adapter(name, kind, merge=True)
            model = from_tensors(from_hf_config(merged.config.to_dict()), merged.state_dict(), name)
        else:
            model = ModernDecoderLM.from_pretrained(name)
        model = model.to(device).pack()  # moving it later would undo the packing
    else:
        load = with_adapter if adapter else from_hub
        model = load(name, kind, dtype=dtype).to(device).eval()
    return TextModel(model, tokenizer, kind, name, context_length, is_chat(name, tokenizer, config))


def why_not_ours(kind: str, config: dict) -> str:
    """Why model.py cannot compute a model; "" if it can."""
    if kind != "causal":
        return kind
    try:
        from_hf_config(config)
    except (ValueError, KeyError) as error:
        return str(error)
    except (TypeError, AttributeError) as error:
        return f"its config.json is damaged: {error}"
    return ""


def is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").exists()


def is_chat(name: str, tokenizer: Tokenizer | HubTokenizer, config: dict) -> bool:
    """Whether a model was instruction-tuned, so that prompts must be turns of a conversation.

    A run says so in run.json. Other models are chat models if they have a chat template. Exception: all our
    tokenizers have our template, so there the sign is a config with two end-of-text tokens.
    """
    run = record_of(name)
    if run.exists():
        return bool(read_json(run).get("chat"))
    if is_ours(tokenizer.chat_template):
        return isinstance(config.get("eos_token_id"), list)
    return tokenizer.chat_template is not None


def record_of(name: str) -> Path:
    """run.json of a run folder, or of the run that a checkpoint belongs to."""
    folder = Path(name)
    return (folder.parents[1] if folder.parent.name == "checkpoints" else folder) / "run.json"


def adapter_base(name: str) -> str:
    """The base model of an adapter: a folder or a hub id.

    PEFT records the path that was given in training. It is tried as it is, then relative to the adapter's
    folder and to each of its parents. If an absolute path no longer exists (all runs were moved), its last
    parts are tried in the same folders.
    """
    folder = Path(name).absolute()
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    run = folder / "run.json"
    if not base and run.exists():
        base = read_json(run).get("parent")
    if not base:
        raise TrainError(
            f"{name}/adapter_config.json names no base model: set "
            "base_model_name_or_path to its folder or hub id"
        )
    if not isinstance(base, str):
        raise TrainError(f"{name}/adapter_config.json: base_model_name_or_path must be a text, not {base!r}")
    if Path(base).is_dir():
        return base
    parts = [part for part in Path(base).parts if part not in ("/", ".")]
    for parent in (folder, *folder.parents):
        ends = range(len(parts)) if Path(base).is_absolute() else (0,)
        for first in ends:
            found = parent.joinpath(*parts[first:])
            if (found / "config.json").exists() and found != folder:
                return str(found)
    return base


def read_config(name: str) -> dict:
    """config.json of a model; for an adapter, that of its base."""
    folder = Path(name)
    if is_adapter(name):
        return read_config(adapter_base(name))
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise TrainError(
                f"{folder} holds neither config.json nor adapter_config.json: not a finished run"
            )
        return read_json(folder / "config.json")
    if folder.parts[0] in ("/", "..", "out") or name.count("/") > 1:  # no name on the hub looks like that
        raise TrainError(f"there is no folder {folder}; python train.py --list shows all runs")
    unreachable()  # one check; otherwise transformers would retry for minutes
    from transformers import AutoConfig

    with explained(name):
        return AutoConfig.from_pretrained(name).to_dict()


def kind_of(name: str, config: dict) -> str:
    """The kind of a TextModel: "causal", "seq2seq" or "head"."""
    adapter = Path(name) / "adapter_config.json"
    if adapter.exists() and (kind := adapter_kind(read_json(adapter), name)):
        return kind
    if "ForSequenceClassification" in str(config.get("architectures")):
        return "head"
    return "seq2seq" if config.get("is_encoder_decoder") else "causal"


def adapter_kind(settings: dict, name: str) -> str | None:
    """The kind of model in adapter_config.json; None if it has none: then it is the kind of the base."""
    task_type = str(settings.get("task_type") or "")
    kinds = {theirs: ours for ours, theirs in LORA_KINDS.items()}
    if task_type and task_type not in kinds:
        raise TrainError(f"{name} is an adapter for {task_type}; known are {', '.join(kinds)}")
    if task_type:
        return kinds[task_type]
    trained = map(str, settings.get("modules_to_save") or ())
    return "head" if {"classifier", "score", "classification_head"} & set(trained) else None


SAME_LABEL = {"negative": "bad", "neg": "bad", "positive": "good", "pos": "good"}  # names on the hub: ours


def class_name(label: object) -> str:
    """A normalised class name: checkpoints spell the same class differently."""
    name = str(label).strip().lower()
    return SAME_LABEL.get(name, name)


def label_order(id2label: dict | None, labels: Sequence[str]) -> list[int]:
    """For each label of a task, the index of its output in a classification head.

    A classifier from the hub may order its classes differently; id2label in its config names them. Without
    names (LABEL_0, LABEL_1, ...) the task's order is assumed. Raises TrainError if the names do not match.
    """
    names = {int(i): class_name(label) for i, label in (id2label or {}).items()}
    wanted = [class_name(label) for label in labels]
    nameless = all(name in (f"label_{i}", str(i)) for i, name in names.items())
    if nameless and len(names) in (0, len(wanted)):
        return list(range(len(wanted)))
    index = {name: i for i, name in names.items()}
    if sorted(names.values()) != sorted(wanted):
        known = ", ".join(names.values())
        raise TrainError(f"the classification head knows {known}; the task asks for {', '.join(wanted)}")
    return [index[label] for label in wanted]


@contextlib.contextmanager
def explained(name: str):
    """Turns errors of transformers and the hub into a TrainError: one line, with what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except pickle.UnpicklingError:  # raised by torch.load(weights_only=True)
        raise TrainError(
            f"{name} cannot be loaded: its weights are a pickle that holds more than tensors and could run "
            "code. Get them as model.safetensors"
        ) from None
    except Exception as error:  # whatever a library raises at a file that is not as it should be
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if Path(name).is_dir():
            raise TrainError(f"{name} cannot be loaded: {why}") from None
        raise TrainError(
            f"{name} is not a folder, and could not be loaded from the Hugging Face hub: {why}\n"
            f"  With a network: hf download {name} --local-dir models/{name.split('/')[-1]}, "
            "then --model=that folder"
        ) from None


def from_hub(name: str, kind: str, labels: tuple[str, ...] = (), **kwargs) -> nn.Module:
    """A transformers model, by default in float32; `labels`: with a classification head for them."""
    import transformers

    transformers.logging.set_verbosity_error()  # no warnings about a new head or a slow tokenizer
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is installed
    config = read_config(name)
    if config.get("model_type") == "modern_llm":
        raise TrainError(
            f"{name} was built with switches for which transformers has no architecture (`architecture` in "
            "model.py says which), so it cannot be tuned here; train.py --init_from and eval.py can use it"
        )
    if labels and not knows_labels(config, labels):
        names = dict(enumerate(label.strip() for label in labels))
        kwargs |= {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    with explained(name):
        load = getattr(transformers, KINDS[kind]).from_pretrained
        model, about = load(name, output_loading_info=True, **{"dtype": torch.float32} | kwargs)
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = None  # we pad with <|endoftext|>, which must be trained like any token
    # transformers initialises missing weights randomly; that is allowed only for a new head.
    inside = f"{model.base_model_prefix}."
    missing = [k for k in about["missing_keys"] if not labels or (k.startswith(inside) and "pooler" not in k)]
    if missing:
        raise TrainError(f"{name} is not a complete model: missing weights {', '.join(sorted(missing)[:4])}")
    return model


def knows_labels(config: dict, labels: Sequence[str]) -> bool:
    """Whether a checkpoint has a classification head for exactly these labels, in any order."""
    names = (config.get("id2label") or {}).values()
    return sorted(map(class_name, names)) == sorted(map(class_name, labels))


def with_adapter(name: str, kind: str, merge: bool = False, trainable: bool = False, **kwargs) -> nn.Module:
    """The base model with the PEFT adapter of a folder. `kwargs`: passed to from_hub."""
    base_name, run = adapter_base(name), Path(name) / "run.json"
    record = read_json(run) if run.exists() else {}
    tuned_on = record.get("base_hash", record.get("parent_hash"))
    if tuned_on and tuned_on != weights_hash(base_name):
        raise TrainError(
            f"{name} was trained on other weights than {base_name} now has: "
            "the base was trained again, so fine-tune again"
        )
    labels = tuple(TASKS[task].labels) if kind == "head" and (task := task_of(name)) else ()
    base = from_hub(base_name, kind, labels, **kwargs)
    n_tokens = load_tokenizer(name).vocab_size
    if n_tokens > base.config.vocab_size:  # training added chat tokens
        base.resize_token_embeddings(n_tokens)
    import peft  # after from_hub, which silences its imports

    with explained(name):
        model = peft.PeftModel.from_pretrained(base, name, is_trainable=trainable)
        if merge:
            return model.merge_and_unload()
    if not trainable and (dtype := kwargs.get("dtype")):
        model = model.to(dtype)
    return model


def task_of(name: str) -> str | None:
    """The task that a run folder, or one of its checkpoints, was tuned on."""
    run = record_of(name)
    return read_json(run).get("settings", {}).get("task") if run.exists() else None


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(name: str, ours: bool = True) -> Tokenizer | HubTokenizer:
    """Our Tokenizer, which is faster, if it can read the files; else, or if not `ours`, transformers'."""
    if Path(name).is_dir():
        try:
            tokenizer = Tokenizer.load(name)  # also if not `ours`: this checks the hash
            if ours and EOT in tokenizer.special_ids:
                return tokenizer
        except ForeignTokenizer:
            raise
        except (ValueError, OSError):  # of another kind, or there is no tokenizer.json
            if not any((Path(name) / file).exists() for file in TOKENIZER_FILES):
                raise TrainError(f"{name} holds no tokenizer.json and no other tokenizer file") from None
    from transformers import AutoTokenizer

    with explained(name):
        tokenizer = HubTokenizer(AutoTokenizer.from_pretrained(name))
    check_tokenizer(Path(name), tokenizer.hash)
    return tokenizer


# -----------------------------------------------------------------------------
# Asking a whole task: the one protocol for prompted and for fine-tuned models


def ask(
    model: TextModel, name: str, examples: list[Example], shots: list[Example] = (), calibrate: bool = False,
    progress: str = "", calculator: bool = False,
) -> tuple[list, dict]:  # fmt: skip
    """A model's outputs on a task, for `data.judge`, and how many prompts had to be cut: {"cut": ...}.

    Classes are compared by the log-likelihood of their names; "sure" has the probability of each winner.
    `calibrate` subtracts what the model says of an empty text, N/A, which takes away its liking for one of
    the names (Zhao et al., 2021). Answers are generated greedily, the sums in them by a `calculator` if
    wanted.
    """
    task = find_task(name)
    if model.kind == "head" and not task.labels:
        tuned = task_of(model.name) or "classes"
        raise TrainError(f"{model.name} has a head for {tuned}: it cannot be asked {name}")
    # An encoder-decoder's answer has a context of its own; everybody else's shares it with the question.
    new_tokens = min(task.max_new_tokens, model.context_length // 2)
    longest = max((len(model.answer_ids(task, label)) for label in task.labels), default=new_tokens)
    room = model.context_length - (0 if model.kind != "causal" else longest)
    asked = [model.prompt(task, example.text, shots, room) for example in examples]
    prompts = [ids for ids, _ in asked]
    about = {"cut": sum(lost == "text" for _, lost in asked)}
    about["shots_dropped"] = sum(lost == "shots" for _, lost in asked)
    if not task.labels:
        return model.generate(prompts, new_tokens, task.stop, progress, calculator=calculator), about
    order = label_order(model.model.config.id2label, task.labels) if model.kind == "head" else None
    scores = model.class_scores(task, prompts, progress)
    if calibrate:
        scores = scores - model.class_scores(task, [model.prompt(task, "N/A", shots, room)[0]])
    if order:
        scores = scores[:, order]
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    about["sure"] = (odds.max(-1) / odds.sum(-1)).tolist()
    return scores.argmax(-1).tolist(), about


def sampled(
    model: TextModel, name: str, split: str, examples: list[Example], n: int, temperature: float = 0.8,
    seed: int = 1, calculator: bool = False,
) -> list[list[str]]:  # fmt: skip
    """n answers to each of a task's examples; temperature 0 gives the greedy one.

    They are kept in the model's folder, in samples/, and read from there when the same model is asked the
    same questions in the same way; whatever differs (weights, seed, temperature, questions) makes new ones.
    So does a file that does not hold these questions in this order: it is only a cache.
    """
    task, folder = find_task(name), Path(model.name)
    new_tokens = min(task.max_new_tokens, model.context_length // 2)
    prompts = [model.prompt(task, e.text, room=model.context_length - new_tokens)[0] for e in examples]
    how = {"task": name, "split": split, "n": n, "temperature": temperature, "seed": seed}
    how |= {"calculator": calculator, "max_new_tokens": new_tokens, "model": weights_hash(model.name)}
    asked = hashlib.sha256(json.dumps([how, prompts]).encode()).hexdigest()[:12]
    file = folder / "samples" / f"{name}-{split}-{n}x-{asked}.jsonl"
    n = 1 if temperature == 0 else n
    known = read_jsonl(file)
    if [row.get("question") for row in known] == [e.text for e in examples]:
        answers = [row.get("samples") for row in known]
        if all(isinstance(some, list) and len(some) == n for some in answers):
            return answers
    texts = model.generate(
        prompts, new_tokens, task.stop, f"{model.name} answers {name} {n} x", n, temperature, seed, calculator
    )
    found = [[text.strip() for text in texts[i : i + n]] for i in range(0, len(texts), n)]
    if how["model"]:
        file.parent.mkdir(exist_ok=True)
        rows = [{"question": e.text, "samples": s} for e, s in zip(examples, found, strict=True)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(file, lambda path: path.write_text(lines, encoding="utf-8"))
    return found


# -----------------------------------------------------------------------------
# LoRA


LORA_TARGETS = {  # all linear layers of the blocks; other architectures leave the search to PEFT
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LORA_TARGETS |= dict.fromkeys(("mistral", "qwen2", "qwen3"), LORA_TARGETS["llama"])


def add_lora(model: nn.Module, cfg: AdaptConfig, kind: str, new_tokens: list[int] = ()) -> nn.Module:
    """Freezes the model and puts LoRA's corrections beside its linear layers. B = 0 at first: no change.

    The embeddings of `new_tokens` are trained and saved, too. TrainError for a target that no layer has.
    """
    import peft

    architecture = model.config.model_type
    targets = [name.strip() for name in cfg.lora_targets.split(",") if name.strip()]
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            layers = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            have = ", ".join(sorted(layers))
            raise TrainError(
                f"--lora_targets={cfg.lora_targets}: no layer is called {target!r}; there are {have}"
            )
    head = head_layers(model) if kind == "head" else []
    targets = targets or LORA_TARGETS.get(architecture) or all_linear(model, head)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    if embeddings[1] is None or embeddings[1].weight is embeddings[0].weight:  # tied: PEFT trains them as one
        embeddings.pop()
    where = [n.rpartition(".")[2] for n, m in model.named_modules() if any(m is e for e in embeddings)]
    settings = peft.LoraConfig(
        task_type=LORA_KINDS[kind],
        modules_to_save=head or None,
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha or 2 * cfg.lora_r,
        lora_dropout=cfg.lora_dropout,
        target_modules=targets,
        trainable_token_indices=dict.fromkeys(where, new_tokens) if new_tokens else None,
        fan_in_fan_out=architecture == "gpt2",  # its Conv1D stores (in, out) where Linear stores (out, in)
    )
    if cfg.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=cfg.gradient_checkpointing
        )
    try:
        model = peft.get_peft_model(model, settings)
    except ValueError as error:
        which = f"--lora_targets={cfg.lora_targets}" if cfg.lora_targets else "LoRA"
        raise TrainError(f"{which}: {str(error).splitlines()[0][:200]}") from None
    float32_where_trained(model)
    return model


def head_layers(model: nn.Module) -> list[str]:
    """The new layers of a classifier, which LoRA trains and saves as they are: all outside of the model that
    was trained before, and BERT's pooler, which it may not have had. PEFT by itself knows the last one only.
    """
    inside = model.base_model_prefix
    outside = [n for n, m in model.named_children() if n != inside and any(True for _ in m.parameters())]
    poolers = [n for n, _ in model.named_modules() if n.endswith(".pooler")]
    return outside + poolers


def all_linear(model: nn.Module, head: list[str]) -> str | list[str]:
    """The layers that LoRA corrects by default, without those of a head. PEFT would add experts that are one
    matrix of three dimensions, and it corrects these without dropout only: they stay as they are.
    """
    if not head and all(p.ndim < 3 for p in model.parameters()):
        return "all-linear"
    output = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output]
    return [name for name in linear if not any(f"{name}.".startswith(f"{part}.") for part in head)]


def float32_where_trained(model: nn.Module) -> None:
    """A frozen matrix may be bfloat16; what is trained may not."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def four_bit(device: torch.device) -> dict:
    """How transformers is told to load weights in 4 bits: NF4, whose scales are quantized as well."""
    if not importlib.util.find_spec("bitsandbytes"):
        raise TrainError('--load_in_4bit needs the package bitsandbytes: pip install ".[qlora]"')
    from transformers import BitsAndBytesConfig

    compute = pick_dtype("auto", device)
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **how), "device_map": {"": device}}


# -----------------------------------------------------------------------------
# Fine-tuning


def settle_dtype(trainer: Trainer) -> Trainer:
    """auto: float32 for a small model on a CPU, even one that multiplies bfloat16 faster. These stages'
    batches have ever new shapes, and for each one kernels in bfloat16 are made anew: with 0.9M parameters
    float32 was 1.1 (SFT) to 1.6 times (the verifier) as fast, in a third of the memory.
    """
    small = sum(p.numel() for p in trainer.model.parameters()) < 2e7
    if trainer.cfg.dtype == "auto" and trainer.device.type == "cpu" and small:
        trainer.dtype = torch.float32
    return trainer


def build_model(cfg: AdaptConfig, kind: str, labels: tuple[str, ...] = ()) -> TextModel:
    """The model that will be trained, as its settings want it: a new head for labels, LoRA or all weights,
    4 bits.
    """
    device = pick_device(cfg.device)
    if is_adapter(cfg.model):  # goes on with the adapter that is there
        if (other := kind_of(cfg.model, read_config(cfg.model))) != kind:
            raise TrainError(f"{cfg.model} is an adapter of kind {other}, not of kind {kind}: use its base")
        rank = read_json(Path(cfg.model) / "adapter_config.json").get("r")
        if cfg.lora_r not in (0, rank):
            raise TrainError(f"{cfg.model} is an adapter of rank {rank}: --lora_r={rank}, or leave it out")
        cfg.lora_r = rank
    if cfg.load_in_4bit and not cfg.lora_r:
        raise TrainError("--load_in_4bit freezes the weights: it needs --lora_r, the rank of what is trained")
    if cfg.merge and not cfg.lora_r:
        raise TrainError("--merge joins an adapter with its base; without --lora_r there is none")
    if kind == "seq2seq" and pick_dtype(cfg.dtype, device) == torch.float16:  # T5's activations exceed 65,504
        if cfg.dtype == "float16":
            raise TrainError("T5 overflows in float16: --dtype=bfloat16, or float32 on an older card")
        cfg.dtype = "float32"
    torch.manual_seed(cfg.seed)  # of the new head and LoRA's A
    kwargs = four_bit(device) if cfg.load_in_4bit else {}
    if cfg.lora_r and not kwargs and device.type == "cuda":
        kwargs["dtype"] = pick_dtype(cfg.dtype, device)  # frozen weights need no float32 copy
    tokenizer = load_tokenizer(cfg.model)
    if is_adapter(cfg.model):
        model = with_adapter(cfg.model, kind, trainable=True, **kwargs)
        float32_where_trained(model)
    else:
        model = from_hub(cfg.model, kind, labels, **kwargs)
    odd = [m.in_features for m in model.modules() if type(m).__name__ == "Linear4bit" and m.in_features % 64]
    if odd and device.type == "cpu":  # a block of bitsandbytes' 64 weights must not reach across rows there
        raise TrainError(f"on a CPU --load_in_4bit needs widths that are multiples of 64, not {odd[0]}")
    if cfg.dropout >= 0:
        set_dropout(model, cfg.dropout)
    new_tokens = []
    if getattr(cfg, "chat_tokens", False):
        tokenizer, new_tokens = add_chat_tokens(model, tokenizer)
    chat = is_chat(cfg.model, tokenizer, read_config(cfg.model))
    text_model = TextModel(model, tokenizer, kind, cfg.model, cfg.context_length or 1024, chat)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.lora_r and not is_adapter(cfg.model):
        text_model.model = add_lora(model, cfg, kind, new_tokens)
    return text_model


def add_chat_tokens(
    model: nn.Module, tokenizer: Tokenizer | HubTokenizer
) -> tuple[Tokenizer | HubTokenizer, list[int]]:
    """Gives a model without them the special tokens of our conversations: its new tokenizer, and their ids.

    Their embeddings begin as the mean of all others.
    """
    tokenizer = tokenizer.with_special_tokens(SPECIAL_TOKENS[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.vocab_size > model.config.vocab_size:
        model.resize_token_embeddings(tokenizer.vocab_size)
    return tokenizer, [tokenizer.special_ids[token] for token in SPECIAL_TOKENS[1:]]


def build(cfg: FinetuneConfig) -> TextModel:
    """`build_model` of the kind that task and method need; refused where they, or the model, do not fit."""
    task = find_task(cfg.task)
    if cfg.method == "head" and not task.labels:
        raise TrainError(f"--method=head is for classes; the answers of {cfg.task} are texts: --method=lm")
    kind = "head" if cfg.method == "head" else kind_of(cfg.model, read_config(cfg.model))
    if kind == "head" and cfg.method != "head":
        raise TrainError(f"{cfg.model} has a classification head: --method=head")
    return build_model(cfg, kind, task.labels if kind == "head" else ())


def set_dropout(model: nn.Module, p: float) -> None:
    """Dropout of `p` wherever the architecture has it, and for Llama, which has next to none, on embeddings.

    A small model that sees the same phrases again and again soon knows them by heart (report/real-text.md).
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for layer in layers:
        layer.p = p
    for module in model.modules():  # some attention layers keep a number instead
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, p)
    if not layers:
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, _, output: F.dropout(output, p, module.training))


@dataclass
class TrainingSet:
    """Tokenised examples, and which of them each step sees: a pure function of (seed, step).

    Every epoch is a new order in which batches hold texts of similar length, so that little of a batch is
    padding: the order is cut into pieces of 50 batches, each is sorted by length and cut into batches, and
    these are shuffled. What does not fill a batch is left out of that epoch.
    """

    rows: list[tuple[list[int], list[int] | int]]
    batch: int
    seed: int
    kind: str
    pad: int

    def __post_init__(self):
        self.lengths = np.array([length(row) for row in self.rows])
        self.batches = max(1, len(self.rows) // self.batch)  # an epoch
        self.cached: tuple[int, np.ndarray] = (-1, np.empty(0))

    def order(self, epoch: int) -> np.ndarray:
        """(batches, batch) indices of the examples."""
        if self.cached[0] != epoch:
            rng, size = np.random.default_rng([self.seed, epoch]), self.batches * self.batch
            order = np.resize(rng.permutation(len(self.rows)), size)
            pieces = np.split(order, range(50 * self.batch, size, 50 * self.batch))
            order = np.concatenate(
                [piece[np.argsort(self.lengths[piece], kind="stable")] for piece in pieces]
            )
            self.cached = (epoch, rng.permutation(order.reshape(self.batches, self.batch)))
        return self.cached[1]

    def members(self, step: int, first: int, count: int) -> np.ndarray:
        epoch, at = divmod(step, self.batches)
        return self.order(epoch)[at][first : first + count]

    def tensors(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return collate([self.rows[i] for i in self.members(step, first, count)], self.kind, self.pad)


def tokenise(model: TextModel, name: str, examples: list[Example]) -> tuple[list[tuple], dict[str, int]]:
    """Pairs (prompt ids, answer ids with their end) for `collate`, and what did not fit.

    A text that is too long is "cut"; an answer never is: an example whose answer leaves less than 16 tokens
    for the question is "left_out".
    """
    task, rows, lost = TASKS[name], [], {"cut": 0, "left_out": 0}
    answer_ids = cache(partial(model.answer_ids, task))  # a class' name is always the same
    order = label_order(model.model.config.id2label, task.labels) if model.kind == "head" else []
    for example in examples:
        answer = order[example.label] if order else [*answer_ids(example.target), model.end]
        taken = len(answer) if model.kind == "causal" else 0
        if taken > model.context_length - 16:
            lost["left_out"] += 1
            continue
        ids, gone = model.prompt(task, example.text, room=model.context_length - taken)
        lost["cut"] += bool(gone)
        rows.append((ids, answer))
    if not rows:
        raise TrainError(f"no example of {name} fits into {model.context_length} tokens: --context_length")
    return rows, lost


def answer_loss(kind: str):
    """The Trainer's loss: cross-entropy on the answer's tokens alone, or on the class, as (sum, count)."""

    def loss(model: nn.Module, ids: Tensor, mask: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = target_logits(model, kind, ids, mask, targets)
        asked = targets != -100
        return F.cross_entropy(logits[asked].float(), targets[asked], reduction="sum"), asked.sum()

    return loss


class FineTuner(Trainer):
    """The Trainer for a TextModel, whichever library computes it: it saves and reads as that one does."""

    free_to_change = [*FREE_TO_CHANGE, "eval_examples", "max_eval_examples", "merge"]
    keeps_best = False  # results are reported on the validation split: it must not choose the checkpoint

    def __init__(self, cfg: AdaptConfig, text_model: TextModel, *args, **kwargs):
        self.text_model = text_model
        super().__init__(cfg, text_model.model, *args, **kwargs)

    def write_model(self, folder: Path) -> None:
        self.text_model.save(folder)

    def read_model(self, folder: Path) -> None:
        self.text_model.read_weights(folder)


def generation_ids(text_model: TextModel) -> dict:
    """bos, eos and pad of a tuned model for config.json and generation_config.json: where an answer ends, and
    wherever the model stopped before. A head does not generate; it needs pad to find the end of a text.
    """
    ids = {"pad_token_id": text_model.pad}
    if text_model.kind == "head":
        return ids
    before = getattr(text_model.model, "generation_config", None)
    before = getattr(before, "eos_token_id", None)
    before = before if isinstance(before, list) else [before]
    ends = dict.fromkeys([text_model.end, text_model.eos, *before])
    ends = [i for i in ends if i is not None]
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if text_model.bos:
        ids["bos_token_id"] = text_model.bos[0]
    return ids


def set_ids(model: nn.Module, ids: dict) -> None:
    """Puts them where transformers keeps them; its save_pretrained writes both configs."""
    for config in (model.config, getattr(model, "generation_config", None)):
        for key, value in ids.items():
            if config is not None:
                setattr(config, key, value)


def finetune(cfg: FinetuneConfig) -> dict:
    """Trains, then evaluates the model on the whole validation split; returns run.json."""
    begun = time.perf_counter()
    task = find_task(cfg.task)
    train, train_about = load_task(cfg.task, "train")
    validation, validation_about = load_task(cfg.task, "validation")
    train = subsample(train, cfg.max_train_examples, cfg.seed)
    text_model = build(cfg)
    kind = text_model.kind
    cfg.name = cfg.name or default_name(cfg)
    run_folder(cfg)  # refuses a name that cannot be
    rows, lost = tokenise(text_model, cfg.task, train)
    watched = subsample(validation, cfg.eval_examples, cfg.seed)
    val_rows, val_lost = tokenise(text_model, cfg.task, watched)
    world = int(os.environ.get("WORLD_SIZE", 1))
    batch = cfg.batch_size * cfg.grad_accum_steps * world
    training_set = TrainingSet(rows, batch, cfg.seed, kind, text_model.pad)
    all_steps = math.ceil(training_set.batches * cfg.epochs)
    smoke = bool(cfg.max_train_examples or cfg.max_eval_examples or 0 < cfg.max_steps < all_steps)
    cfg.max_steps = cfg.max_steps or all_steps
    loss = answer_loss(kind)

    def evaluate(model, final):
        totals = np.zeros(2)
        with torch.no_grad():
            for _, tensors in text_model.batches(val_rows, ""):
                totals += [x.item() for x in loss(model, *tensors)]
        found = {"val_loss": totals[0] / totals[1]}
        if task.labels:
            outputs, _ = ask(text_model, cfg.task, watched)
            found["accuracy"] = judge(cfg.task, watched, outputs)[1]["accuracy"]["value"]
        return found

    def samples(model):
        if task.labels:
            return []
        texts, _ = ask(text_model, cfg.task, watched[:2])
        return [{"prompt": e.text, "text": t.strip()} for e, t in zip(watched, texts, strict=False)]

    sizes = [(p.numel(), p.requires_grad) for p in text_model.model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, needed in sizes if needed)
    mean_length = float(training_set.lengths.mean())
    about = origin(cfg.model) | {
        "chat": text_model.chat,
        "task": cfg.task,
        "kind": kind,
        "smoke": smoke or is_smoke(cfg.model),  # what was cut short, or came from it, is no result
        "trained_parameters": trained,
        "data": {"train": train_about | {"examples": len(train)} | lost},
    }
    if kind == "head":
        about["labels"] = [str(name) for _, name in sorted(text_model.model.config.id2label.items())]
    about["data"]["validation"] = validation_about | {"examples": len(validation)}
    about["data"]["tokenizer"] = text_model.tokenizer.hash
    trainer = FineTuner(
        cfg,
        text_model,
        training_set.tensors,
        loss=loss,
        evaluate=evaluate,
        sample=samples,
        flops_per_row=(4 if cfg.lora_r else 6) * total * mean_length,  # frozen weights need no gradient
        tokens_per_row=max(1, round(mean_length)),
        epoch=lambda step: step / training_set.batches,
        about=about,
    )
    settle_dtype(trainer)
    trainer.say(
        f"{trainer.folder}: {cfg.model} ({total / 1e6:.1f}M parameters, {trained / 1e6:.2f}M trained) on "
        f"{len(train):,} examples of {cfg.task} ({train_about['source']}), {mean_length:.0f} tokens each, "
        f"{cfg.max_steps} steps of {batch}"
    )
    for split, n in (("training", lost), ("validation", val_lost)):
        if any(n.values()):
            trainer.say(
                f"too long for {split}: {n['cut']} texts lost their end, {n['left_out']} examples left out"
            )
    trainer.say(f"an example, its answer in brackets: {shown(text_model, rows[0], task)}")
    try:
        run = trainer.run_all_steps()
    except AlreadyFinished as finished:
        run = finished.run
        if "evaluation" in run:
            raise
    if trainer.rank == 0:
        run |= finish(cfg, trainer.folder, validation)
        run["minutes"] = round((time.perf_counter() - begun) / 60, 2)
        write_run(trainer.folder, run)
    return run


def finish(cfg: FinetuneConfig, folder: Path, validation: list[Example]) -> dict:
    """Evaluates what the run folder now holds, as anybody would load it; and merges, if asked."""
    if cfg.merge:
        merge(folder)
    model = load_model(str(folder), pick_device(cfg.device), context_length=cfg.context_length)
    validation = subsample(validation, cfg.max_eval_examples, cfg.seed)
    outputs, about = ask(model, cfg.task, validation, progress=f"evaluating on {cfg.task}")
    about.pop("sure", None)  # of every item; eval.py keeps it
    records, metrics = judge(cfg.task, validation, outputs)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(folder / "predictions.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
    return {"evaluation": {"split": "validation", **about, "metrics": metrics}}


def is_smoke(name: str) -> bool:
    """Whether a model is a run that was cut short, or came from one."""
    run = Path(name) / "run.json"
    return run.exists() and bool(read_json(run).get("smoke"))


def origin(name: str) -> dict:
    """What run.json says of the model that a run started from."""
    about = {"parent": name, "parent_hash": weights_hash(name)}
    return about | {"base_hash": weights_hash(adapter_base(name))} if is_adapter(name) else about


def merge(folder: Path) -> None:
    """Base and adapter as one model, in {folder}/merged: W + (alpha / r) B A is a matrix like any other."""
    kind = kind_of(str(folder), read_config(str(folder)))
    model = with_adapter(str(folder), kind, merge=True)
    ids = folder / "generation_config.json"
    if ids.exists():  # a chat stops elsewhere than its base
        set_ids(model, {k: v for k, v in read_json(ids).items() if k.endswith("_token_id")})
    run = read_json(folder / "run.json")
    about = {key: run[key] for key in ("chat", "task", "smoke", "seconds", "results") if key in run}
    about |= {"status": "finished", "stage": "merge", "settings": {"task": run.get("task")}}

    def write(target: Path) -> None:
        model.save_pretrained(target)
        load_tokenizer(str(folder), ours=False).inner.save_pretrained(target)
        write_run(target, origin(str(folder)) | about)

    write_folder_atomically(folder / "merged", write)


def subsample(examples: list[Example], n: int, seed: int) -> list[Example]:
    """`n` of them by seed, in their order; 0: all."""
    if not n or n >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), n, replace=False)
    return [examples[i] for i in sorted(chosen)]


def default_name(cfg: FinetuneConfig) -> str:
    kind = "-qlora" if cfg.load_in_4bit else "-lora" if cfg.lora_r else ""
    return f"{cfg.task}-{Path(cfg.model).name}{'-head' if cfg.method == 'head' else ''}{kind}"


def shown(model: TextModel, row: tuple, task: Task) -> str:
    prompt, answer = row
    if model.kind == "head":
        answer = model.model.config.id2label[answer]
    else:
        answer = model.decode(answer)
    return f"{model.decode(prompt)[-300:]}[{answer[:200]}]".replace("\n", " / ")


def write_run(folder: Path, run: dict) -> None:
    """run.json, and before it the card: if a process is killed between the two, the next one writes both."""
    text = json.dumps(run, indent=2) + "\n"
    write_model_card(folder, run)
    write_atomically(folder / "run.json", lambda path: path.write_text(text))


def report(cfg: FinetuneConfig, run: dict) -> None:
    evaluation = run["evaluation"]
    figures = ", ".join(f"{name} {show(m)}" for name, m in evaluation["metrics"].items())
    what = "SMOKE RUN, no result: " if run["smoke"] else ""
    folder = Path(cfg.out) / cfg.name
    where = f"on {run['task']}'s {evaluation['split']} split"
    print(f"{folder}: {what}{figures} {where}; {run['seconds'] / 60:.1f} min of training")


def show(metric: dict) -> str:
    """A metric with its interval: shares and ROUGE as percentages."""
    if "low" not in metric:
        return f"{metric['value']:.1f}"
    value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}] (n={metric['n']})"


def main() -> None:
    cfg = parse_config(FinetuneConfig, __doc__)
    warnings.filterwarnings("ignore", category=FutureWarning)  # what the libraries tell each other
    try:
        if int(os.environ.get("RANK", 0)) == 0:
            report(cfg, finetune(cfg))
        else:
            finetune(cfg)
    except AlreadyFinished as finished:
        report(cfg, finished.run)
        print("nothing to do: --overwrite trains it anew, --name trains another")
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"finetune.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
