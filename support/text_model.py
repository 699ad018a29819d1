"""TextModel: a model with its tokenizer, asked for prompts, likelihoods, classes and texts."""

import bisect
import contextlib
import math
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import compress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Example, Task, find_task, talk
from model import ModernDecoderLM, n_parameters
from support.chat_template import (
    WORDS_TEMPLATE,
    TemplateError,
    conversation_ids,
    is_ours,
    marked_ids,
    with_generation_marks,
)
from support.costs import generation_bytes, likelihood_bytes, shape_of
from support.hf_format import write_generation_config
from support.hub_models import HubTokenizer, hf_context, pad_rows, save_hub_model
from support.hub_models import generate as hub_generate
from support.machine import autocast, dtype_for
from support.memory import halving, leave_memory_to_others, room, rows_that_fit
from support.processes import map_ahead, worker_pool
from support.runs import TrainError
from support.sharding import unwrapped
from support.tokenizer_json import CHAT_TEMPLATE, ROLES
from tasks.calculator import calculator_answer
from tokenizer import Tokenizer

Ids = list[int]  # token ids
Row = tuple[Ids, Ids | int]  # a prompt, and its answer or class
RowsOf = Callable[[int], int]  # from the length of the longest row of a batch to its number of rows


class TextModel:
    """A model and its tokenizer with three operations: likelihoods of answers, class scores, generation.

    `kind`: "causal" (decoder), "seq2seq" (encoder-decoder) or "head" (classifier). `model` is a
    ModernDecoderLM or a transformers model; a test asserts that both give the same numbers. `chat`: prompts
    are turns of a conversation, for instruction-tuned models. `adapter`: the LoRA layers in `model`
    (finetune.Adapter), which save, load and merge themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | HubTokenizer,
        kind: str,
        name: str = "",
        context_length: int = 0,
        chat: bool = False,
        adapter=None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.kind = kind
        self.name = name
        self.chat = chat
        self.adapter = adapter
        self.ours = isinstance(model, ModernDecoderLM)
        self.n_parameters = n_parameters(model)
        self.longest = model.config.context_length if self.ours else hf_context(model.config)
        self.context_length = min(self.longest, context_length or self.longest)
        self.bos = tokenizer.bos
        self.eos = tokenizer.eot_id
        self.start = self.bos or [self.eos]  # what a document begins with
        self.pad = tokenizer.pad_id
        if not self.ours and model.config.pad_token_id is None:  # GPT-2; a head finds the end of a text by it
            model.config.pad_token_id = self.pad
        self.before, self.behind = self.bos, []  # special tokens before and after a prompt
        if kind != "causal" and isinstance(tokenizer, HubTokenizer):
            self.before, self.behind = tokenizer.frame()
        known = model.config.vocab_size
        named = tokenizer.vocab_size
        # GPT-2 lacks only the chat tokens that our copy of its vocabulary adds.
        if named > known and not (self.ours and known == 50257):
            raise TrainError(
                f"{name} has {known:,} tokens, but its tokenizer has {named:,}: they do not belong together"
            )
        # Chat template: the model's own; else ours; else words ("User: ..."), if the model lacks the special
        # tokens of ours. `marks`: it is ours, which is rendered without Jinja.
        self.template = tokenizer.chat_template
        self.marks = False
        if self.template is None or is_ours(self.template):
            self.marks = tokenizer.special_ids.get("<|end|>", known) < known
            self.template = CHAT_TEMPLATE if self.marks else WORDS_TEMPLATE
        self.end = self.reply_ids("a")[-1] if chat else self.eos  # the token that ends an answer
        # On a CPU a large model computes in bfloat16: twice as fast, and the log-likelihood of 128 tokens,
        # SmolLM2's of answers to GSM8K, is then 0.6 nats off.
        self.dtype = dtype_for("auto", model, self.device)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self):
        """A context in which the model computes in its dtype; T5's activations exceed float16's 65,504."""
        overflows = self.kind == "seq2seq" and self.dtype == torch.float16
        return autocast(self.device, torch.float32 if overflows else self.dtype)

    # ---- text and tokens

    def encode(self, text: str) -> Ids:
        """The ids of a text. A special token spelled in it stays plain text."""
        return self.tokenizer.encode(text, allowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, task: Task, text: str, shots: Iterable[Example] = (), room: int = 0) -> tuple[Ids, str]:
        """The prompt of `task` about `text`: at most `room` ids, and what was cut: "", "shots" or "text".

        Examples (`shots`) stand before the question. If they do not fit, the first ones are removed; if the
        rest is still too long, the end of `text` is cut, but never the question.
        """
        room = room or self.context_length
        shots = list(shots)[-room:]  # each has at least one token
        cut = ""

        def prompt_ids(text: str, shots: list[Example]) -> Ids:
            if self.chat and task.asks:
                turns = []
                for shot in shots:
                    turns += talk(task.question.replace("{}", shot.text), shot.target)
                return self.conversation(turns + talk(task.question.replace("{}", text)))[0]
            before = [f"{task.prompt(shot.text)}{shot.target}\n\n" for shot in shots]
            return self.before + self.encode("".join(before) + task.prompt(text)) + self.behind

        ids = prompt_ids(text, shots)
        if len(ids) > room and shots:
            # The fewest examples to remove: the key, minus the length, rises with them.
            n = bisect.bisect_left(range(len(shots)), -room, key=lambda n: -len(prompt_ids(text, shots[n:])))
            ids = prompt_ids(text, shots[n:])
            cut = "shots"
        if len(ids) > room:
            # Bisection over characters: a truncated list of tokens need not decode and encode to itself.
            size = bisect.bisect(range(len(text)), room, key=lambda n: len(prompt_ids(text[:n].rstrip(), [])))
            if size < 2:
                raise TrainError(f"{room} tokens are too few for a prompt: raise --context_length")
            ids = prompt_ids(text[: size - 1].rstrip(), [])
            cut = "text"
        return ids, cut

    def conversation(self, messages: list[dict]) -> tuple[Ids, list[bool]]:
        """The ids of a conversation, and whether each is the assistant's (its end-of-turn token is).

        If the last turn is not the assistant's, the beginning of an assistant turn is appended.
        """
        if unknown := {message["role"] for message in messages}.difference(ROLES):
            raise TrainError(f"unknown role {unknown.pop()!r} in a conversation: use {', '.join(ROLES)}")
        if self.marks:
            return marked_ids(self.tokenizer, messages)
        return conversation_ids(self.tokenizer, self.template, messages)

    def reply_ids(self, answer: str) -> Ids:
        """The ids of an answer in a conversation, with the token that ends it."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        try:
            ids = list(compress(*self.conversation(turns)))  # the assistant's
        except TemplateError:  # one that opens every answer with a thought
            ids = self.encode(answer.strip())
        ends = (self.eos, *self.tokenizer.special_ids.values())
        return ids if ids and ids[-1] in ends else [*ids, self.eos]

    def answer_ids(self, task: Task, answer: str) -> Ids:
        """The ids of an answer without its end token, encoded in context: SentencePiece depends on it."""
        if self.chat:
            return self.reply_ids(answer)[:-1]
        if self.kind == "seq2seq":
            return self.encode(answer.strip())
        anchor = task.template.split("{}")[1]
        before = self.encode(anchor)
        joined = self.encode(anchor + answer)
        if joined[: len(before)] == before:
            return joined[len(before) :]
        return self.encode(answer)

    def stop_of(self, task: Task) -> str:
        """The text that ends an answer at the latest. A chat model has a token for that, and its answer may
        have paragraphs.
        """
        return "" if self.chat and task.asks else task.stop

    # ---- likelihoods, class scores, generation

    @torch.no_grad()
    def log_probs(self, rows: list[Row]) -> list:
        """log p(answer | prompt) of each row of a batch, in nats; of a head those of all classes."""
        ids, mask, targets = self.collate(rows)
        logits = target_logits(self.model, self.kind, ids, mask, targets).float()
        if self.kind == "head":
            return logits.log_softmax(-1).tolist()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # 0 where -100
        return (-loss.view_as(targets).double().sum(-1)).tolist()

    def log_likelihoods(self, rows: list[Row], progress: str = "") -> np.ndarray:
        """log p(answer | prompt) in nats, (n), for n pairs of ids (prompt, answer)."""

        def log_probs(index: Ids) -> list:
            return self.log_probs([rows[i] for i in index])

        return np.array(self.in_batches(log_probs, row_lengths(rows), progress))

    def class_scores(self, task: Task, prompts: list[Ids], progress: str = "") -> np.ndarray:
        """Log-probabilities (n, classes): of the head, or of each class name as a continuation."""
        if self.kind == "head":
            return self.log_likelihoods([(prompt, 0) for prompt in prompts], progress)
        answers = [self.answer_ids(task, label) for label in task.labels]
        rows = [(prompt, answer) for prompt in prompts for answer in answers]
        return self.log_likelihoods(rows, progress).reshape(len(prompts), len(answers))

    def generate(
        self,
        prompts: list[Ids],
        max_new_tokens: int,
        stop: str,
        progress: str = "",
        n: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        calculator: bool = False,
    ) -> list[str]:
        """Continuations, n of prompt 0, n of prompt 1, ..., each up to the model's end token or `stop`.

        Temperature 0 is greedy. Sample j of prompt i depends only on seed, i and j, so a larger n keeps the
        first samples. With `calculator`, the result after an open `<<9*3=` is computed, not generated.
        """
        ends = partial(self.spelled, stop) if stop else None
        rows = self.rows_of_generation(max_new_tokens, n, temperature > 0)
        force = self.calculator if calculator else None

        def draw(index: Ids, samples: Iterable[int]) -> list[Ids]:
            streams = [np.random.SeedSequence([seed, i, j]) for i in index for j in samples]
            seeds = [int(stream.generate_state(1)[0]) for stream in streams]  # torch takes 32 bits
            return self.continuations(
                [prompts[i] for i in index],
                max_new_tokens,
                n=len(samples),
                seed=seeds,
                temperature=temperature,
                stop_tokens=[self.eos, self.end],
                ends=ends,
                force=force,
            )

        def samples_of(index: Ids) -> list[list[Ids]]:
            """The n samples of each prompt; those of a single prompt may be divided, too."""
            if len(index) == 1:
                new = halving(partial(draw, index), range(n), rows(len(prompts[index[0]])))
            else:
                new = draw(index, range(n))
            return [new[i : i + n] for i in range(0, len(new), n)]

        lengths = [len(prompt) for prompt in prompts]
        share = len(prompts)
        if self.device.type == "cpu" and n * share >= 64:  # a batch for each core
            share = math.ceil(share / torch.get_num_threads())
        found = self.in_batches(samples_of, lengths, progress, lambda longest: min(share, rows(longest) // n))
        texts = [self.decode(ids) for samples in found for ids in samples]
        return [text.split(stop)[0] for text in texts] if stop else texts

    def continuations(self, prompts: list[Ids], max_new_tokens: int, **how) -> list[Ids]:
        """Generated ids; see ModernDecoderLM.generate for the arguments."""
        with self.autocast():
            if self.ours:
                with self.adapter.merged() if self.adapter else contextlib.nullcontext():
                    return self.model.generate(prompts, max_new_tokens, **how)
            return hub_generate(self.model, prompts, max_new_tokens, pad=self.pad, **how)

    def calculator(self, _row: int, new: Ids) -> Ids:
        """Ids to force next: the result, if the new tokens end in an open annotation (see `calculate`)."""
        if not new or not self._pieces[new[-1]].endswith("="):
            return []
        result = calculator_answer(self.decode(new))
        return self.encode(result) if result else []

    @cached_property
    def _pieces(self) -> list[str]:
        """The text of every id; "" of those that the model has beyond its tokenizer's, as Qwen's have."""
        known = self.tokenizer.vocab_size
        return [self.decode([i]) if i < known else "" for i in range(self.model.config.vocab_size)]

    def spelled(self, stop: str, new: Ids) -> bool:
        """Whether the last of these ids ends the text `stop`, which several of them may spell."""
        last = self._pieces[new[-1]]
        return stop[-1] in last and stop in "".join(self._pieces[i] for i in new[-len(stop) :])

    # ---- files

    def save(self, folder: Path) -> None:
        """Writes the model (of an adapted one only the adapter), the tokenizer and the chat template."""
        ids = self.generation_ids()
        if self.adapter:
            self.adapter.save(folder)
            write_generation_config(folder, ids)
        elif self.ours:
            self.model.save_pretrained(folder, **ids)
        else:
            save_hub_model(self.model, folder, ids)
        about = {"context_length": self.longest}
        if self.chat:
            about["chat_template"] = with_generation_marks(self.template)
            about["end_token"] = self.tokenizer.decode([self.end])
        self.tokenizer.save(folder, **about)

    def read_weights(self, folder: Path) -> None:
        """The inverse of `save`: loads the weights into the existing model."""
        adapter = folder / "adapter_model.safetensors"
        if self.adapter:
            self.adapter.load(folder)
        elif adapter.exists():
            import peft
            from safetensors.torch import load_file

            peft.set_peft_model_state_dict(self.model, load_file(adapter))
        else:
            how = {} if self.ours else {"dtype": torch.float32}
            saved = type(self.model).from_pretrained(folder, **how)
            self.model.load_state_dict(saved.state_dict())

    def generation_ids(self) -> dict:
        """The ids of bos, eos and pad, for config.json and generation_config.json.

        eos: the token that ends an answer, and those at which the model stopped before. A head does not
        generate; it needs pad to find the end of a text.
        """
        ids = {"pad_token_id": self.pad}
        if self.kind == "head":
            return ids
        before = getattr(self.model, "generation_config", None)
        before = before.eos_token_id if before else None
        ends = dict.fromkeys([self.end, self.eos, *(before if isinstance(before, list) else [before])])
        ends.pop(None, None)
        ids["eos_token_id"] = list(ends) if len(ends) > 1 else self.end
        if self.bos:
            ids["bos_token_id"] = self.bos[0]
        return ids

    # ---- batches

    def collate(self, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(t.to(self.device) for t in collate(rows, self.kind, self.pad))

    def in_batches(
        self, function: Callable[[Ids], list], lengths: list[int], progress: str, rows: RowsOf | None = None
    ) -> list:
        """function(indices) on batches of rows of similar lengths; its results, one per row, in their order.

        Out of memory: half as many rows at a time. On a CPU every core computes batches of its own.
        """
        found = {}
        with self.autocast():
            batches = list(self.batch_indices(lengths, rows=rows))
            results = on_all_cores(partial(halving, function), batches, self.device, progress)
            for index, some in zip(batches, results, strict=True):
                found |= zip(index, some, strict=True)
        return [found[i] for i in range(len(lengths))]

    def batch_indices(
        self, lengths: list[int], progress: str = "", rows: RowsOf | None = None
    ) -> Iterator[Ids]:
        """Batches of indices, from the longest row to the shortest.

        A batch has rows(length of its first row) rows; by default as many as their logits fit into memory.
        """
        rows = rows or self.rows_of_likelihoods()
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        with progress_bar(len(order), progress) as bar:
            while order:
                size = max(1, rows(lengths[order[0]]))
                index = order[:size]
                order = order[size:]
                yield index
                bar.update(len(index))

    def rows_of_generation(self, new: int, n: int, sampled: bool) -> RowsOf:
        """From the length of the longest prompt to the rows of a batch, n per prompt: 1,024, or 256 on a CPU,
        where more are not faster; less if keys and values do not fit.
        """
        most = 256 if self.device.type == "cpu" else 1024
        dtype = self.dtype if self.ours else self.model.dtype
        need = partial(generation_bytes, new=new, n=n, sampled=sampled)
        return self.rows_that_fit(need, lambda _: most, dtype)

    def rows_of_likelihoods(self) -> RowsOf:
        """From the length of the longest row to the rows of a batch: at most 32,768 tokens (4,096 on a CPU,
        where more are not faster) and 1 GiB of float32 logits; less if they do not fit.
        """
        tokens = 32_768 if self.device.type == "cuda" else 4096
        tokens = min(tokens, 2**28 // self.model.config.vocab_size)
        return self.rows_that_fit(
            likelihood_bytes, lambda longest: min(256, tokens // longest), self.model.dtype
        )

    def rows_that_fit(self, need: Callable, most: RowsOf, dtype: torch.dtype) -> RowsOf:
        """A function from the longest row to a number of rows: at most most(longest), and no more than fit
        into the memory that is free now.

        A share of the free memory counts, minus the copy of the weights that autocast or `generate` makes. On
        a CPU several processes share it (`on_all_cores`).
        """
        on_cpu = self.device.type == "cpu"
        processes = torch.get_num_threads() if on_cpu and sys.platform == "linux" else 1
        free = room(self.device, processes)
        if self.dtype != next(self.model.parameters()).dtype:
            free -= self.dtype.itemsize * self.n_parameters
        shape = shape_of(self.model.config, self.kind)
        need = partial(need, shape, size=dtype.itemsize, on_cpu=on_cpu)
        return lambda longest: rows_that_fit(lambda rows: need(rows, longest), most(max(1, longest)), free)


# -----------------------------------------------------------------------------
# Batches


def progress_bar(total: int, text: str):
    """A bar that says what it counts; none without a text."""
    return tqdm(total=total, desc=text, disable=None if text else True, leave=False)


_work: Callable  # the function of the processes of `on_all_cores`, inherited when they are forked


def call_work(item):
    torch.set_num_threads(1)  # the other cores have processes of their own
    leave_memory_to_others()
    return _work(item)


def on_all_cores(work: Callable, items: list, device: torch.device, progress: str = "") -> Iterator:
    """work(item) for each item, in order; on a CPU in one process for each of torch's threads.

    Sampling from a small model consists of small matrix products, which a second thread hardly speeds up.
    """
    global _work
    workers = min(torch.get_num_threads(), len(items)) if device.type == "cpu" else 1
    with progress_bar(len(items), progress) as bar:
        alone = threading.current_thread() is threading.main_thread()  # not in a server
        if workers < 2 or sys.platform != "linux" or not alone:  # forking would not be safe
            for item in items:
                yield work(item)
                bar.update()
            return
        _work = work
        context = multiprocessing.get_context("fork")
        with worker_pool(workers, "OMP_NUM_THREADS=1", context) as pool:
            for result in map_ahead(pool, call_work, items, ahead=2 * workers):
                yield result
                bar.update()


def row_lengths(rows: list[Row]) -> list[int]:
    """Numbers of tokens of (prompt, answer) pairs for `collate`; a class has none."""
    return [len(prompt) + (len(answer) if isinstance(answer, list) else 0) for prompt, answer in rows]


def collate(rows: list[Row], kind: str, pad: int) -> tuple[Tensor, ...]:
    """Pairs (prompt ids, answer ids or class) as padded tensors: ids (B, T), mask (B, T), targets.

    Decoder: ids are prompt and answer. The targets (B, K) belong to the last K columns only, as many as the
    earliest answer needs, with -100 at prompt and padding positions; no other logits are computed.
    Encoder-decoder: ids are the prompt, targets (B, K) the output of the decoder. Head: targets (B) are
    classes. Padding is on the right, where causal attention of the text never sees it.
    """
    inputs = [prompt for prompt, _ in rows]
    if kind == "head":
        targets = torch.tensor([answer for _, answer in rows])
    elif kind == "seq2seq":
        targets = pad_rows([answer for _, answer in rows], -100)
    else:
        skip = min(map(len, inputs)) - 1
        targets = [[-100] * (len(prompt) - 1 - skip) + answer for prompt, answer in rows]
        targets = pad_rows(targets, -100)
        inputs = [(prompt + answer)[:-1] for prompt, answer in rows]
    ids = pad_rows(inputs, pad)
    lengths = torch.tensor([len(row) for row in inputs])
    mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
    return ids, mask, targets


def target_logits(model: nn.Module, kind: str, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """Logits for the targets of `collate`: (B, K, V), for a head (B, C)."""
    if kind == "head":
        return model(input_ids=ids, attention_mask=mask).logits
    core = unwrapped(model)
    if kind == "seq2seq":  # teacher forcing: a start token, then the targets so far
        start = torch.full_like(targets[:, :1], core.config.decoder_start_token_id)
        shifted = torch.cat([start, targets[:, :-1].clamp(min=0)], dim=1)
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, use_cache=False).logits
    skip = ids.shape[1] - targets.shape[1]
    if not isinstance(core, ModernDecoderLM):
        last = torch.arange(skip, ids.shape[1], device=ids.device)
        return model(input_ids=ids, logits_to_keep=last, use_cache=False).logits  # padding needs no mask
    if model is core:
        # A slice would not be contiguous, and torch would copy the head for every row: 1.8 GB for 32 rows of
        # SmolLM2. So it is copied, as transformers does where it gets indices.
        return model.logits(model.hidden(ids)[:, skip:].contiguous())
    return model(ids)[:, skip:]  # gradients are averaged only if the forward pass goes through the wrapper


# -----------------------------------------------------------------------------
# Tasks: the one protocol for prompted and for fine-tuned models


def answer_task(
    model: TextModel,
    name: str,
    examples: list[Example],
    shots: Iterable[Example] = (),
    calibrate: bool = False,
    progress: str = "",
) -> tuple[list, dict]:
    """A model's outputs on a task, for `data.judge`, and how many prompts had to be cut: {"cut": ...}.

    Classes are compared by the log-likelihood of their names; "sure" has the probability of each winner.
    `calibrate` subtracts the scores of an empty text, N/A, which removes the model's preference for one of
    the names (Zhao et al., 2021). Answers are generated greedily.
    """
    task = find_task(name)
    if model.kind == "head" and not task.labels:
        raise TrainError(f"{model.name} has a head for classes: it cannot be asked {name}")
    # An encoder-decoder's answer has a context of its own; everybody else's shares it with the question.
    new_tokens = min(task.max_new_tokens, model.context_length // 2)
    longest = max((len(model.answer_ids(task, label)) for label in task.labels), default=new_tokens)
    room = model.context_length - (longest if model.kind == "causal" else 0)
    asked = [model.prompt(task, example.text, shots, room) for example in examples]
    prompts = [ids for ids, _ in asked]
    cuts = [cut for _, cut in asked]
    notes = {"cut": cuts.count("text"), "shots_dropped": cuts.count("shots")}
    if not task.labels:
        return model.generate(prompts, new_tokens, model.stop_of(task), progress), notes
    scores = model.class_scores(task, prompts, progress)
    if calibrate:
        scores = scores - model.class_scores(task, [model.prompt(task, "N/A", shots, room)[0]])
    if model.kind == "head":
        scores = scores[:, label_order(model.model.config.id2label, task.labels)]
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    notes["sure"] = (odds.max(-1) / odds.sum(-1)).tolist()
    return scores.argmax(-1).tolist(), notes


SAME_LABEL = {"negative": "bad", "neg": "bad", "positive": "good", "pos": "good"}  # names on the hub: ours


def class_name(label: object) -> str:
    """A normalised class name: checkpoints spell the same class differently."""
    name = str(label).strip().lower()
    return SAME_LABEL.get(name, name)


def label_order(id2label: dict | None, labels: Iterable[str]) -> list[int]:
    """For each label of a task, the index of its output in a classification head.

    A classifier from the hub may order its classes differently; id2label in its config names them. Without
    names (LABEL_0, LABEL_1, ...) the task's order is assumed. Raises TrainError if the names do not match.
    """
    numbers = sorted(id2label or {}, key=int)
    names = [class_name(id2label[number]) for number in numbers]
    wanted = [class_name(label) for label in labels]
    order = range(len(wanted))
    if names in ([], [f"label_{i}" for i in order], [str(i) for i in order]):
        return list(order)
    if sorted(names) != sorted(wanted):
        raise TrainError(
            f"the classification head knows {', '.join(names)}; the task asks for {', '.join(wanted)}"
        )
    return [names.index(label) for label in wanted]
