"""Tokenizers and generation of transformers, with the interface of ours.

`HubTokenizer` has the methods of tokenizer.Tokenizer; `generate` samples from a transformers model with the
arguments of ModernDecoderLM.generate. So every stage works on any decoder of the hub.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModernDecoderLM, Texts, in_eval_mode, refuse
from support.hf_format import write_generation_config
from support.tables import valid
from support.tokenizer_json import CHAT_TEMPLATE, HUB_MARK, LETTER_BYTES, default_template, unspell
from tokenizer import SPECIAL_TOKENS


class HubTokenizer:
    """A tokenizer of transformers with the methods of tokenizer.Tokenizer."""

    def __init__(self, inner):
        self.inner = inner
        self.vocab_size = len(inner)
        added = [token.content for token in inner.added_tokens_decoder.values() if token.special]
        special = [*inner.all_special_tokens, *added]
        self.special_ids = {token: inner.convert_tokens_to_ids(token) for token in special}
        self.special_tokens = tuple(self.special_ids)
        self.chat_template = default_template(inner.chat_template)

    def encode(self, text: str, allowed_special: str | Collection[str] = ()) -> list[int]:
        """The ids of a text. allowed_special="all": a special token spelled in it is encoded as one."""
        split = allowed_special != "all"
        found = self.inner(valid(text), add_special_tokens=False, verbose=False, split_special_tokens=split)
        return found["input_ids"]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one id, perhaps only part of a character: byte-level BPE, SentencePiece's <0xE2>."""
        token = self.inner.convert_ids_to_tokens(i) or ""
        text = self.inner.decode([i])
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        if "\ufffd" in text and set(token) <= LETTER_BYTES.keys():
            return unspell(token)
        return (" " * (token.startswith("\u2581") and not text.startswith(" ")) + text).encode()

    @property
    def template_tokens(self) -> dict[str, str]:
        """{"bos_token": ..., ...}: the special tokens that a chat template may use by name.

        BERT's texts end with its separator.
        """
        return {"eos_token": self.decode([self.eot_id])} | self.inner.special_tokens_map

    @property
    def bos(self) -> list[int]:
        """The ids that begin a text; none if that token opens a chat turn, as in SmolLM."""
        token = self.inner.bos_token
        return [] if token is None or token in (self.chat_template or "") else [self.inner.bos_token_id]

    @property
    def eot_id(self) -> int:
        """The end-of-text token; for an encoder, the separator token."""
        for i in (self.inner.eos_token_id, self.inner.sep_token_id):
            if i is not None:
                return i
        raise ValueError(
            f"the tokenizer of {self.inner.name_or_path} has no token that ends a text: name one as "
            '"eos_token" in its tokenizer_config.json'
        )

    @property
    def pad_id(self) -> int:
        return self.eot_id if self.inner.pad_token_id is None else self.inner.pad_token_id

    def special_id(self, token: str) -> int:
        if token not in self.special_ids:
            raise ValueError(f"this tokenizer has no special token {token}")
        return self.special_ids[token]

    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text, such as [CLS] and [SEP]."""
        framed = self.inner("a")["input_ids"]
        alone = self.encode("a")
        if framed == alone:
            return self.bos, []
        at = framed.index(alone[0])
        return framed[:at], framed[at + len(alone) :]

    def with_special_tokens(self, tokens: Sequence[str]) -> "HubTokenizer":
        """A copy with these special tokens appended to the vocabulary."""
        inner = copy.deepcopy(self.inner)
        inner.add_special_tokens({"additional_special_tokens": tokens})
        return HubTokenizer(inner)

    @cached_property
    def hash(self) -> str:
        """sha256 of the vocabulary, marked, since it is computed otherwise than tokenizer.Tokenizer.hash."""
        vocab = json.dumps(sorted(self.inner.get_vocab().items()))
        return HUB_MARK + hashlib.sha256(vocab.encode()).hexdigest()

    def save(
        self,
        folder: str | Path,
        end_token: str = "",
        context_length: int = 0,
        chat_template: str | None = None,
    ) -> None:
        """Writes the tokenizer's files; the arguments are those of tokenizer.Tokenizer.save."""
        inner = self.inner
        inner.chat_template = chat_template or inner.chat_template
        inner.pad_token = inner.pad_token or inner.eos_token
        inner.eos_token = end_token or inner.eos_token
        if context_length:
            inner.model_max_length = min(inner.model_max_length, context_length)
        inner.save_pretrained(folder)


def pad_rows(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Rows of ids as one tensor (B, T), with `value` on one side of the shorter ones."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, True, value, side)


@in_eval_mode
@torch.no_grad()
def generate(
    model, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, pad: int,
    stop_tokens: Sequence[int] = (), n: int = 1, **how,
) -> list[list[int]]:  # fmt: skip
    """ModernDecoderLM.generate for a transformers model; see there for the other arguments.

    We sample each token ourselves and mask all others, so transformers' greedy decoding has to choose it.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    rows = [prompt for prompt in prompts for _ in range(n)]
    decoder_only = not model.config.is_encoder_decoder
    side = "left" if decoder_only else "right"
    ids = pad_rows(rows, pad, side)
    mask = pad_rows([[1] * len(row) for row in rows], 0, side)
    start = ids.shape[1] if decoder_only else 1
    context = hf_context(model.config)
    if has_learned_positions(model):
        refuse(start >= context, f"a prompt of {start} tokens leaves no room in context {context}")
        max_new_tokens = min(max_new_tokens, context - start)
    vocab_size = model.config.get_text_config().vocab_size
    texts = Texts(prompts, n, max_new_tokens, model.device, vocab_size, stop_tokens=stop_tokens, **how)

    def draw(input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (rows, T), scores (rows, V) -> 0 at the chosen token and -inf elsewhere."""
        step = input_ids.shape[1] - start
        before = input_ids[:, -1] if step else None
        token = texts.take(texts.draw(scores, texts.uniforms[:, step], before), last=True)
        if texts.ended:  # transformers recognises an ended row by an end token alone
            token[list(texts.ended)] = (*stop_tokens, pad)[0]
        return torch.full_like(scores, -torch.inf).scatter(1, token.unsqueeze(1), 0.0)

    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad,
        eos_token_id=list(stop_tokens) or None,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )  # fmt: skip
    model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config,
        logits_processor=LogitsProcessorList([draw]),
    )  # fmt: skip
    return texts.rows


def has_learned_positions(model: nn.Module) -> bool:
    """True if the model looks positions up in a table, which ends with the context: GPT-2, OPT, BART."""
    tables = ("wpe", "embed_positions", "positions_embed")  # the names that transformers uses
    return any(isinstance(m, nn.Embedding) and name.endswith(tables) for name, m in model.named_modules())


def hf_context(config) -> int:
    """The context length of a transformers model; 1024 where its config states none."""
    for key in ("n_positions", "max_position_embeddings", "max_seq_len"):
        if found := getattr(config, key, None):
            return found
    return 1024


def save_hub_model(model: nn.Module, folder: Path, ids: dict) -> None:
    """save_pretrained with the token ids of `generation_ids`; of a PEFT model only the adapter."""
    set_token_ids(model, ids)
    if not hasattr(model, "peft_config"):
        model.save_pretrained(folder)
        return
    adapter = model.peft_config["default"]
    base = adapter.base_model_name_or_path
    if base and Path(base).is_dir():  # PEFT would write a relative path
        adapter.base_model_name_or_path = os.path.abspath(base)
    model.save_pretrained(folder, save_embedding_layers=False)  # those of new tokens are saved by themselves
    write_generation_config(folder, ids)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template of a model card


def set_token_ids(model: nn.Module, ids: dict) -> None:
    """Puts them where transformers keeps them; its save_pretrained writes both configs."""
    for config in (model.config, getattr(model, "generation_config", None)):
        for key, value in ids.items():
            if config is not None:
                setattr(config, key, value)


def add_chat_tokens(model: nn.Module, tokenizer) -> tuple:
    """Adds the special tokens of our conversations to a model; returns its new tokenizer, and their ids.

    Their embeddings begin as the mean of all others.
    """
    tokenizer = tokenizer.with_special_tokens(SPECIAL_TOKENS[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.vocab_size > model.config.vocab_size:
        model.resize_token_embeddings(tokenizer.vocab_size)
    return tokenizer, [tokenizer.special_ids[token] for token in SPECIAL_TOKENS[1:]]


def set_dropout(model: nn.Module, p: float) -> None:
    """Sets every dropout of a model to `p`. Transformers' Llama has next to none: there, on the embeddings.

    A small model that sees the same phrases again and again soon knows them by heart (report/real-text.md).
    """
    if isinstance(model, ModernDecoderLM):
        return model.set_dropout(p)
    layers = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
            layers += 1
        for name in ("attention_dropout", "dropout"):  # some attention layers keep a number instead
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, p)
    if not layers:
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, _, output: F.dropout(output, p, module.training))
