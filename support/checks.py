"""Settings of a model and of sampling that mean nothing are refused by name."""

import math
from dataclasses import asdict, fields

from configs import check_numbers, checked


def refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)


def check_config(c) -> None:
    """ValueError if a ModelConfig describes no model; zeros that mean "work it out" are still zeros here."""
    for field in fields(c):
        checked(getattr(c, field.name), field.type, field.name)
    check_numbers(asdict(c), {})
    kv_heads = c.n_kv_heads or c.n_heads
    head_dim = c.head_dim or c.d_model / c.n_heads
    moe = c.ffn == "moe"
    linear = c.attention_kind == "linear"
    refuse(head_dim % 1, f"d_model={c.d_model} is not a multiple of n_heads={c.n_heads}")
    refuse(c.n_heads % kv_heads, f"n_heads={c.n_heads} is not a multiple of n_kv_heads={kv_heads}")
    refuse(c.positions == "rope" and head_dim % 2, f"RoPE rotates pairs: {head_dim=} must be even")
    too_many = c.experts_per_token > c.n_experts
    refuse(moe and too_many, f"experts_per_token={c.experts_per_token} of n_experts={c.n_experts}")
    refuse(moe and c.moe_every > c.n_layers, f"moe_every={c.moe_every}, but n_layers={c.n_layers}")
    refuse(c.n_sinks and linear, "n_sinks belong to a softmax: attention_kind='linear' has none")


def check_sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0) -> None:
    """ValueError for options that describe no distribution."""
    refuse(not 0 <= temperature < math.inf, f"{temperature=} must be 0 (greedy) or above")
    refuse(top_k < 0, f"{top_k=} must be 0 (all tokens) or above")
    refuse(not 0 < top_p <= 1, f"{top_p=} must be above 0 and at most 1")
    refuse(not 0 <= min_p <= 1, f"{min_p=} must be from 0 to 1")
    refuse(not 0 < repetition_penalty < math.inf, f"{repetition_penalty=} must be above 0")
