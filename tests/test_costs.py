"""Parameters, FLOPs and bytes worked out from a config, against those of the real model."""

import pytest
import torch
from small_models import GPT, MOE, VOCAB, tiny, tokens, variants

from model import KVCache, ModelConfig, ModernDecoderLM
from support import kernels
from support.costs import count_parameters, estimate_flops, estimate_memory, kv_cache_bytes

pytestmark = pytest.mark.usefixtures("one_thread", "fast_functions")


@pytest.fixture(scope="module")
def fast_functions():
    kernels.install()


@variants
def test_count_parameters_counts_the_real_model(changes):
    ours = ModernDecoderLM(tiny(**changes))
    counts = count_parameters(ours.config)
    assert counts["total"] == sum(p.numel() for p in ours.parameters())
    assert sum(n for kind, n in counts.items() if kind not in ("total", "active")) == counts["total"]


def test_kv_cache_bytes_are_those_of_the_cache():
    config = tiny(n_kv_heads=2, head_dim=12)
    assert KVCache(config, 3, 20, dtype=torch.bfloat16).nbytes() == kv_cache_bytes(config, 20, 3)


def test_flops_of_a_token_are_the_sum_worked_out_by_hand():
    config = ModelConfig(n_layers=6, d_model=288, n_heads=6, context_length=256, vocab_size=4096, d_ff=768)
    layer = 4 * 288 * 288 + 3 * 288 * 768
    by_hand = 6 * (6 * layer + 4096 * 288) + 12 * 6 * 288 * 256
    assert estimate_flops(config) == by_hand and round(by_hand / 1e6, 1) == 48.2
    assert estimate_flops(config, 512) == by_hand + 12 * 6 * 288 * 256
    linear = tiny(attention_kind="linear")
    assert estimate_flops(linear, 4096) == estimate_flops(linear, 512) < estimate_flops(tiny(), 512)


def test_a_moe_costs_the_experts_that_a_token_visits_and_every_second_block_half_of_it():
    router = 6 * 2 * 32 * 4
    assert estimate_flops(tiny(**MOE)) == estimate_flops(tiny(d_ff=48)) + router  # 2 experts of 24 each
    counts = count_parameters(tiny(**MOE))
    assert counts["total"] - counts["active"] == 2 * 2 * 3 * 32 * 24
    shapes = tiny(n_layers=4, d_ff=24), tiny(n_layers=4, moe_every=2, **MOE), tiny(n_layers=4, **MOE)
    for cost in (estimate_flops, lambda c: estimate_memory(c, 8)["activations"]):
        dense, half, all_blocks = map(cost, shapes)
        assert dense < half < all_blocks and half == pytest.approx((dense + all_blocks) / 2, abs=2)


def bytes_saved_for_backward(config: ModelConfig, batch: int) -> int:
    """What autograd really keeps of a float32 forward pass up to the head, parameters excluded."""
    ours, storages = ModernDecoderLM(config).train(), {}
    own = {p.untyped_storage().data_ptr() for p in ours.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = ours.hidden(tokens(batch, config.context_length))
    assert kept.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("changes", [
    {"n_kv_heads": 1, "d_ff": 512}, GPT, {"qk_norm": True, "head_dim": 64, "n_kv_heads": 2},
    {"norm": "none", "sliding_window": 16}, {"n_sinks": 2}, {"context_length": 300, "n_kv_heads": 2},
    {"context_length": 300, "sparse_stride": 16},
    {"context_length": 300, "attention_kind": "linear", "n_kv_heads": 2},
], ids=str)  # fmt: skip
def test_estimated_activations_are_what_autograd_keeps(changes):
    shape = {"vocab_size": VOCAB, "d_model": 128, "n_heads": 4, "context_length": 64}
    config = ModelConfig(**shape | changes)
    found = bytes_saved_for_backward(config, 4)
    estimate = estimate_memory(config, 4, bytes_per_activation=4)["activations"]
    assert abs(estimate / found - 1) < 0.1, (estimate, found)


def test_estimated_memory_of_weights_optimizer_and_checkpointing():
    config = tiny(n_layers=6)
    plain, saved = estimate_memory(config, 8), estimate_memory(config, 8, gradient_checkpointing=True)
    n = count_parameters(config)["total"]
    assert (plain["weights"], plain["gradients"], plain["optimizer"]) == (4 * n, 4 * n, 8 * n)
    assert saved["activations"] < 0.5 * plain["activations"]
    assert plain["peak"] == sum(v for k, v in plain.items() if k != "peak")
    assert estimate_memory(config, 16)["activations"] > 1.9 * (plain["activations"] - 2 * n)
