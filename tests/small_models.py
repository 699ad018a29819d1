"""Small models of every kind, and short texts, for the tests."""

import pytest
import torch
from torch import Tensor

from model import ModelConfig, ModernDecoderLM

VOCAB = 61
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7]]
GPT = {"norm": "layer", "positions": "learned", "ffn": "gelu", "bias": True}
MOE = {"ffn": "moe", "n_experts": 4, "d_ff": 24}
VARIANTS = {  # name -> what differs from a small Llama
    "llama": {},
    "untied": {"tie_embeddings": False},
    "gqa": {"n_kv_heads": 2},
    "mqa, wide heads": {"n_kv_heads": 1, "head_dim": 12, "tie_embeddings": False},
    "biases": {"bias": True, "n_kv_heads": 2},
    "mistral": {"sliding_window": 5, "n_kv_heads": 2},
    "qwen3": {"qk_norm": True, "n_kv_heads": 2, "head_dim": 10},
    "gpt2": GPT,
    "mixtral": MOE | {"n_kv_heads": 2},
    "mixtral, window": MOE | {"sliding_window": 6, "tie_embeddings": False},
    "top-1": MOE | {"experts_per_token": 1},
    "capacity": MOE | {"capacity_factor": 1.0},
    "moe, every second block": MOE | {"moe_every": 2, "bias": True, "n_layers": 3},
    "post-norm": {"norm_position": "post"},
    "no norm": {"norm": "none"},
    "post, none": {"norm": "none", "norm_position": "post"},
    "learned": {"positions": "learned"},
    "no positions": {"positions": "none", "n_kv_heads": 2},
    "sinks": {"n_sinks": 2, "n_kv_heads": 2},
    "sinks, window": {"n_sinks": 1, "sliding_window": 4},
    "sparse": {"sparse_stride": 3, "n_kv_heads": 2},
    "sparse, window, sinks": {"sparse_stride": 2, "sliding_window": 7, "n_sinks": 1},
    "linear": {"attention_kind": "linear", "n_kv_heads": 2},
    "linear, sparse": {"attention_kind": "linear", "sparse_stride": 3, "qk_norm": True},
    "linear, no positions": {"attention_kind": "linear", "positions": "none"},
    "silu": {"ffn": "silu"},
    "gelu, biases": {"ffn": "gelu", "bias": True, "norm": "layer"},
    "gpt2, untied": GPT | {"tie_embeddings": False},
    "qk_norm, window": {"qk_norm": True, "sliding_window": 4},
    "moe, biases": MOE | {"bias": True},
    "dropout": {"dropout": 0.1},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def tiny(**changes) -> ModelConfig:
    small = {
        "vocab_size": VOCAB,
        "context_length": 48,
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "d_ff": 40,
    }
    return ModelConfig(**small | changes)


def loud(model, seed: int = 0):
    """Weights so large that logits are far from uniform and every bias, norm and sink counts."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0  # norms
            p.copy_(centre + 0.3 * torch.randn_like(p))
    return model.eval()


def make(seed: int = 0, **changes) -> ModernDecoderLM:
    return loud(ModernDecoderLM(tiny(**changes)), seed)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, atol: float = 1e-4) -> bool:
    """Equal to `atol`, of the largest entry where that is more than 10 (without norms logits grow large)."""
    assert a.shape == b.shape
    return torch.allclose(a, b, rtol=0, atol=atol * max(1.0, b.abs().max().item() / 10))


needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def greedy(model, prompt: list[int], n: int) -> list[int]:
    """The reference: the whole text again for every token."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    return text[len(prompt) :]


def feed(model, cache, ids: Tensor, chunks, counts=None) -> Tensor:
    """Logits of ids (B, T), read in chunks of the given lengths."""
    logits, at = [], 0
    with torch.no_grad():
        for length in chunks:
            cache.begin(length, counts)
            logits.append(model.logits(model.hidden(ids[:, at : at + length], cache=cache)))
            at += length
    return torch.cat(logits, dim=1)


def until(text: list[int], stops) -> list[int]:
    """`text` up to and with its first stop token."""
    return text[: next((i + 1 for i, t in enumerate(text) if t in stops), len(text))]
