"""The model against second opinions: Hugging Face's models, torch's functions, slow references."""

import dataclasses
import itertools
import json
import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import (
    MOE,
    PROMPTS,
    VARIANTS,
    VOCAB,
    close,
    feed,
    greedy,
    loud,
    make,
    tiny,
    tokens,
    until,
    variants,
)
from torch import Tensor

import model as model_file
from model import (
    Attention,
    Block,
    KVCache,
    ModelConfig,
    ModernDecoderLM,
    MoE,
    RMSNorm,
    SwiGLU,
    apply_rope,
    attention,
    attention_mask,
    cross_entropy,
    rms_norm,
    sample,
    softmax,
)
from support import kernels
from support.costs import count_parameters
from support.hf_format import architecture

pytestmark = pytest.mark.usefixtures("one_thread", "plain_functions")


@pytest.fixture(scope="module")
def plain_functions():
    """Those of model.py itself; tests/test_kernels.py compares the fast ones with them."""
    kernels.install(False)


# -----------------------------------------------------------------------------
# Hugging Face: the same weights give the same logits, in both directions through the folder on disk


HUGGING_FACE = {
    "llama": "llama",
    "untied": "llama",
    "gqa": "llama",
    "mqa, wide heads": "llama",
    "biases": "llama",
    "mistral": "mistral",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
    "mixtral": "mixtral",
    "mixtral, window": "mixtral",
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers_loads_our_folder_and_computes_our_logits(name, tmp_path):
    from transformers import AutoModelForCausalLM

    ours = make(**VARIANTS[name])
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == HUGGING_FACE[name] and theirs.dtype == torch.float32
    ids = tokens(2, 20)
    with torch.no_grad():
        logits = ours(ids)
        assert logits.std() > 0.3, "logits must differ enough for a comparison to mean something"
        assert close(logits, theirs(ids).logits)
    assert sum(p.numel() for p in theirs.parameters()) == count_parameters(ours.config)["total"]


def hf_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**HF_SMALL | changes))


def hf_mistral(**changes):
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**HF_SMALL | changes))


def hf_qwen3(**changes):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**HF_SMALL | changes))


def hf_mixtral(**changes):
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**HF_SMALL | {"num_local_experts": 4} | changes))


def hf_gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"vocab_size": VOCAB, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**small | changes))


HF_SMALL = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FOREIGN = {
    "llama": (hf_llama, {}),
    "llama tied": (hf_llama, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama biases": (hf_llama, {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama theta": (hf_llama, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "mistral": (hf_mistral, {"sliding_window": 5}),
    "mistral no window": (hf_mistral, {"sliding_window": None}),
    "qwen3": (hf_qwen3, {"head_dim": 16, "rms_norm_eps": 1e-6}),
    "qwen3 tied": (hf_qwen3, {"head_dim": 8, "tie_word_embeddings": True}),
    "mixtral": (hf_mixtral, {"sliding_window": 6}),
    "mixtral 3 of 4": (hf_mixtral, {"num_experts_per_tok": 3}),
    "gpt2": (hf_gpt2, {}),
    "gpt2 tanh": (hf_gpt2, {"activation_function": "gelu_pytorch_tanh", "n_inner": 40}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_we_load_transformers_folder_and_compute_its_logits(name, tmp_path):
    build, changes = FOREIGN[name]
    theirs = loud(build(**changes))
    theirs.save_pretrained(tmp_path)
    ours, ids = ModernDecoderLM.from_pretrained(tmp_path).eval(), tokens(2, 20)
    with torch.no_grad():
        assert close(ours(ids), theirs(ids).logits)
    assert all(p.is_contiguous() and p.requires_grad for p in ours.parameters())
    (tmp_path / "again").mkdir()
    ours.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(ModernDecoderLM.from_pretrained(tmp_path / "again").eval()(ids), ours(ids))


def test_sharded_safetensors_load(tmp_path):
    theirs = loud(hf_llama())
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists() and len(
        list(tmp_path.glob("*.safetensors"))
    ) > 1
    ids = tokens(1, 9)
    with torch.no_grad():
        assert close(ModernDecoderLM.from_pretrained(tmp_path)(ids), theirs(ids).logits)
    next(iter(tmp_path.glob("*-00002-*"))).unlink()
    with pytest.raises(FileNotFoundError, match="00002.* is missing"):
        ModernDecoderLM.from_pretrained(tmp_path)


def test_saving_over_a_sharded_folder_replaces_what_is_loaded(tmp_path):
    loud(hf_llama()).save_pretrained(tmp_path, max_shard_size="20KB")
    ours = loud(ModernDecoderLM.from_pretrained(tmp_path), seed=5)
    ours.save_pretrained(tmp_path)
    assert torch.equal(ModernDecoderLM.from_pretrained(tmp_path).head, ours.head)


def rewrite(folder, change):
    """Applies `change` to the dict of tensors in the folder."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    tensors = change(tensors) or tensors
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def test_gpt2_loads_without_prefix_and_with_mask_buffers(tmp_path):
    theirs = loud(hf_gpt2())
    theirs.save_pretrained(tmp_path)

    def as_first_uploaded(tensors):
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(48, 48).tril().view(1, 1, 48, 48)
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors | {"lm_head.weight": tensors["wte.weight"].clone()}

    rewrite(tmp_path, as_first_uploaded)
    ids = tokens(1, 9)
    with torch.no_grad():
        assert close(ModernDecoderLM.from_pretrained(tmp_path)(ids), theirs(ids).logits)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "build, change, named",
    [
        (hf_llama, {"rope_parameters": LLAMA3}, "llama3"),
        (hf_llama, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear"),
        (hf_llama, {"hidden_act": "gelu"}, "'gelu'"),
        (hf_llama, {"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        (hf_llama, {"attention_bias": True}, "attention_bias"),
        (hf_llama, {"model_type": "bert"}, "bert"),
        (hf_llama, {"model_type": None}, "model_type"),
        (hf_gpt2, {"activation_function": "relu"}, "relu"),
        (hf_gpt2, {"activation_function": "silu"}, "silu"),
        (hf_gpt2, {"scale_attn_by_inverse_layer_idx": True}, "attention"),
        (hf_gpt2, {"tie_word_embeddings": False}, "an untied head"),
        (hf_qwen3, {"use_sliding_window": True}, "attention"),
        (hf_mixtral, {"num_experts_per_tok": 1}, "one expert a token"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(build, change, named, tmp_path):
    theirs = build()
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict() | change, default=str))
    with pytest.raises(ValueError, match=named):
        ModernDecoderLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "sinks"])
def test_missing_unexpected_and_misshapen_tensors_are_named(name, tmp_path):
    norm = "transformer.h.1.ln_1.weight" if name == "gpt2" else "model.layers.1.input_layernorm.weight"
    for change, message in [
        (
            lambda t: {name: x for name, x in t.items() if name != norm},
            "missing .*layers.1.input_layernorm.weight",
        ),
        (lambda t: t.update(surplus=torch.ones(2)), "unexpected .*surplus"),
        (lambda t: t.update({norm: torch.ones(7)}), "another shape .*layers.1.input_layernorm.weight"),
    ]:
        make(**VARIANTS[name]).save_pretrained(tmp_path)
        rewrite(tmp_path, change)
        with pytest.raises(ValueError, match=message):
            ModernDecoderLM.from_pretrained(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ModernDecoderLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        ModernDecoderLM.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for damaged in (
        "",
        "[]",
        config[:-9],
        '{"model_type": "gpt2"}',
        '{"model_type": "modern_llm", "modern_llm": {"x": 1}}',
    ):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match="config.json is damaged or incomplete"):
            ModernDecoderLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors is damaged"):
            ModernDecoderLM.from_pretrained(tmp_path)
    path.unlink()
    torch.save(make().state_dict(), tmp_path / "pytorch_model.bin")  # a pickle can run code: never read
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        ModernDecoderLM.from_pretrained(tmp_path)


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    import safetensors.torch

    make(seed=1).save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def disk_full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError):
        make(seed=2).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@variants
def test_every_variant_survives_saving_and_loading(changes, tmp_path):
    ours, ids = make(**changes), tokens(2, 20)
    ours.save_pretrained(tmp_path, eos_token_id=7)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7
    again = ModernDecoderLM.from_pretrained(tmp_path)
    assert again.config == ours.config
    with torch.no_grad():
        assert torch.equal(again.eval()(ids), ours(ids))


def test_loading_makes_float32_of_what_was_stored_in_bfloat16(tmp_path):
    make().bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in ModernDecoderLM.from_pretrained(tmp_path).parameters()} == {torch.float32}


# -----------------------------------------------------------------------------
# What must hold for every variant


@variants
def test_a_token_changes_no_logits_before_it(changes):
    if changes.get("capacity_factor"):
        pytest.skip(
            "tokens compete for an expert's room, so a later token's first choice can evict a second one"
        )
    ours, ids, t = make(**changes), tokens(1, 16), 9
    changed = ids.clone()
    changed[0, t] = (ids[0, t] + 1) % VOCAB
    with torch.no_grad():
        a, b = ours(ids), ours(changed)
    assert close(a[:, :t], b[:, :t], 1e-5) and not close(a[:, t:], b[:, t:], 1e-3)


def test_a_sliding_window_looks_as_far_back_as_layers_times_window():
    ours, ids = make(sliding_window=3), tokens(1, 16)  # 2 layers: token t sees back to t - 2 * (3 - 1)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % VOCAB
    with torch.no_grad():
        differs = (ours(ids) - ours(changed)).abs().amax(-1)[0] > 1e-4
    assert differs.nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


@variants
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(changes):
    plain = make(**changes | {"dropout": 0.0}).train()
    again = make(**changes | {"dropout": 0.0}).train()
    again.gradient_checkpointing = True
    ids = tokens(2, 12)
    losses = [m(ids[:, :-1], ids[:, 1:])[0] for m in (plain, again)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert p.grad is not None and torch.allclose(p.grad, q.grad, atol=1e-6), name


@pytest.mark.parametrize("shape", [{}, {"norm_position": "post"}, {"n_sinks": 1}, {"positions": "learned"}])
def test_a_loaded_model_drops_out_wherever_a_new_one_does(tmp_path, shape):
    calm = make(**shape, dropout=0.0)
    calm.save_pretrained(tmp_path)
    fresh = make(**shape, dropout=0.3)
    fresh.load_state_dict(calm.state_dict())
    loaded = ModernDecoderLM.from_pretrained(tmp_path)
    loaded.set_dropout(0.3)
    ids = torch.arange(8).unsqueeze(0)
    found = []
    for model in (fresh, loaded, calm):
        torch.manual_seed(0)
        found.append(model.train()(ids))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert torch.equal(loaded.eval()(ids), calm.eval()(ids))
    loaded.set_dropout(0.0)
    assert torch.equal(loaded.train()(ids), calm.eval()(ids))
    for p in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="dropout"):
            loaded.set_dropout(p)


@pytest.mark.parametrize("wrong", ["rope_theta=0", "norm_eps=nan", "dropout=1", "n_kv_heads=-1", "d_ff=-1"])
def test_a_config_with_a_number_that_means_nothing_is_refused_by_name(wrong):
    name, value = wrong.split("=")
    with pytest.raises(ValueError, match=f"{name}="):
        ModelConfig(**{name: float(value) if value == "nan" else int(value)})


def test_gradient_checkpointing_repeats_the_dropout_of_the_forward_pass():
    ids, grads = tokens(2, 12), []
    for recompute in (False, True):
        ours = make(dropout=0.3).train()
        ours.gradient_checkpointing = recompute
        torch.manual_seed(3)
        ours(ids[:, :-1], ids[:, 1:])[0].backward()
        grads.append(ours.head.grad)
    assert torch.allclose(*grads, atol=1e-6)


def test_accumulated_micro_batches_give_the_gradient_of_the_big_batch():
    ours, ids = make(n_kv_heads=2).train(), tokens(4, 12)
    targets = ids.roll(-1, 1)
    targets[0, 2:], targets[2] = -100, -100  # 2, 12, 0 and 12 targets: a mean of means would differ
    loss, n = ours(ids, targets)
    (loss / n).backward()
    big = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    parts = [ours(ids[i : i + 1], targets[i : i + 1]) for i in range(4)]
    assert [int(count) for _, count in parts] == [2, 12, 0, 12]
    total = sum(count for _, count in parts)
    for part, _ in parts:
        (part / total).backward()
    assert math.isclose(sum(part.item() for part, _ in parts), loss.item(), rel_tol=1e-6)
    for p, g in zip(ours.parameters(), big, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-6)


def test_the_loss_is_the_cross_entropy_of_the_logits():
    ours, ids = make(), tokens(2, 12)
    targets = ids.roll(-1, 1).masked_fill(torch.rand(2, 12) < 0.3, -100)
    loss, n = ours(ids, targets)
    mean = F.cross_entropy(ours(ids).flatten(0, 1), targets.flatten())
    assert int(n) == (targets != -100).sum() and torch.allclose(loss / n, mean, rtol=1e-5)


def test_a_new_model_predicts_nearly_uniformly_and_is_seeded():
    torch.manual_seed(1)
    a = ModernDecoderLM(tiny())
    torch.manual_seed(1)
    b = ModernDecoderLM(tiny())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    loss, n = a(tokens(8, 20), tokens(8, 20, seed=1))
    assert abs(loss.item() / n.item() - math.log(VOCAB)) < 0.05


def test_gqa_with_repeated_key_value_heads_equals_mha():
    gqa, mha = make(n_kv_heads=2), make()
    state = gqa.state_dict()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).view(32, 32)
    mha.load_state_dict(state)
    ids = tokens(2, 12)
    with torch.no_grad():
        assert close(gqa(ids), mha(ids), 1e-5)
        assert gqa.generate([[1, 2]], 8, temperature=0) == mha.generate([[1, 2]], 8, temperature=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_heads": 5}, "d_model=32 is not a multiple of n_heads=5"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"ffn": "moe", "n_experts": 2, "experts_per_token": 3}, "experts_per_token=3"),
        ({"norm": "rmsnorm"}, "norm"),
        ({"positions": "alibi"}, "positions"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"ffn": "moe", "moe_every": 0}, "moe_every=0"),
        ({"ffn": "moe", "moe_every": 3}, "moe_every=3"),
        ({"attention_kind": "linear", "n_sinks": 1}, "n_sinks"),
        ({"attention_kind": "cosine"}, "attention_kind"),
    ],
)
def test_an_impossible_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


# -----------------------------------------------------------------------------
# Equations


def test_softmax_and_cross_entropy_equal_torchs():
    x = torch.randn(3, 5, 7) * 50 + 1000
    assert close(softmax(x), x.softmax(-1), 1e-6) and close(softmax(x, 1), x.softmax(1), 1e-6)
    targets = torch.randint(7, (3, 5))
    targets[0, :3] = -100
    expected = F.cross_entropy(x.flatten(0, 1), targets.flatten())
    assert torch.allclose(cross_entropy(x, targets), expected, rtol=1e-5)
    assert cross_entropy(x.bfloat16(), targets).dtype == torch.float32
    assert cross_entropy(x, torch.full((3, 5), -100)).isnan(), "the mean of nothing, as torch has it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_hugging_faces(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs, ours = LlamaRMSNorm(16, eps=1e-3), RMSNorm(16, eps=1e-3)
    x, weight = torch.randn(2, 3, 16, dtype=dtype), torch.randn(16)
    with torch.no_grad():
        theirs.weight.copy_(weight), ours.weight.copy_(weight)
        theirs.to(dtype)
        assert ours(x).dtype == dtype and close(ours(x), theirs(x), 1e-6 if dtype == torch.float32 else 0.05)
    equation = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert close(rms_norm(x).float(), equation, 1e-6 if dtype == torch.float32 else 0.02)


def test_rope_is_hugging_faces():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k, positions = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), torch.tensor([0, 1, 5, 99, 1000])
    parameters = {"rope_type": "default", "rope_theta": 500.0}
    config = LlamaConfig(hidden_size=24, num_attention_heads=3, rope_parameters=parameters)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions.expand(2, -1))
    for ours, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert close(apply_rope(ours, positions, 500.0), theirs, 1e-4)
    per_row = torch.stack([positions, positions.flip(0)])
    rotated = apply_rope(q, per_row.unsqueeze(1), 500.0)
    assert close(rotated[1], apply_rope(q[1], positions.flip(0), 500.0), 1e-6)


def test_rope_depends_on_distance_alone_and_keeps_lengths():
    q, k = torch.randn(1, 16), torch.randn(1, 16)
    at = lambda x, position: apply_rope(x, torch.tensor([position]))  # noqa: E731
    assert close(at(q, 12) @ at(k, 5).T, at(q, 107) @ at(k, 100).T)
    assert not close(at(q, 12) @ at(k, 5).T, at(q, 12) @ at(k, 6).T, 1e-2)
    assert close(at(q, 77).norm(), q.norm()) and torch.equal(at(q, 0), q)


def test_attention_equals_torchs():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    assert close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), 1e-6)
    mask = torch.rand(2, 1, 5, 7) < 0.5
    mask[0, 0, 2] = False  # a query that may see nothing
    y, w = attention(q, k, v, mask, weights=True)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    assert close(y, expected.nan_to_num(), 1e-6) and not y[0, :, 2].any()
    assert (w.masked_select(~mask) == 0).all()
    rows = w.sum(-1)
    assert close(rows, mask.any(-1).expand(2, 3, 5).float(), 1e-6)


def test_sinks_take_part_of_the_attention_and_none_at_minus_infinity():
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask, sinks = torch.ones(5, 5).tril().bool(), torch.randn(3, 1, 2)
    y, w = attention(q, k, v, mask, sinks, weights=True)
    assert (w.sum(-1) < 1).all()
    for b, h, t in itertools.product(range(2), range(3), range(5)):  # the slow reference
        scores = [math.exp(q[b, h, t] @ k[b, h, s] / math.sqrt(8)) for s in range(t + 1)]
        total = sum(scores) + sum(math.exp(s) for s in sinks[h, 0])
        expected = sum(s / total * v[b, h, i] for i, s in enumerate(scores))
        assert close(y[b, h, t], expected, 1e-5)
    none = attention(q, k, v, mask, torch.full((3, 1, 2), -torch.inf))
    assert close(none, attention(q, k, v, mask), 1e-6)


def test_attention_mask_is_causal_and_as_wide_as_the_window():
    at = torch.arange(5)
    assert torch.equal(attention_mask(at, at), torch.ones(5, 5).tril().bool())
    assert attention_mask(at, at, 2).sum(-1).tolist() == [1, 2, 2, 2, 2]


def test_a_strided_mask_has_a_band_and_every_nth_token_before_it():
    at = torch.arange(9)
    assert attention_mask(at, at, stride=3)[8].nonzero().flatten().tolist() == [2, 5, 6, 7, 8]
    assert attention_mask(at, at, 7, stride=3)[8].nonzero().flatten().tolist() == [2, 5, 6, 7, 8]
    assert attention_mask(at, at, 6, stride=3)[8].nonzero().flatten().tolist() == [5, 6, 7, 8]
    for stride in (1, 8):  # every token, or a band as long as the text
        assert torch.equal(attention_mask(at, at, stride=stride)[:8, :8], attention_mask(at, at)[:8, :8])
    two_layers = attention_mask(at, at, stride=3).float().matrix_power(2) > 0
    assert torch.equal(two_layers, attention_mask(at, at)), "two layers reach every token"


def test_linear_attention_is_nearly_the_same_in_bfloat16():
    ours, ids = make(attention_kind="linear", n_kv_heads=2), tokens(2, 40)
    with torch.no_grad():
        expected = ours(ids)
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(ids).float()
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


# -----------------------------------------------------------------------------
# Layers alone


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"sliding_window": 3},
        {"qk_norm": True, "n_kv_heads": 1},
        {"sparse_stride": 2},
        {"attention_kind": "linear", "n_kv_heads": 2},
        {"attention_kind": "linear", "sparse_stride": 2},
    ],
)
@pytest.mark.parametrize("given", [None, "mask", "mask per row"])
def test_the_plain_attention_path_equals_the_fast_one(changes, given):
    layer, x = loud(Attention(tiny(**changes))), torch.randn(2, 7, 32)
    mask = {None: None, "mask": torch.rand(7, 7) < 0.5, "mask per row": torch.rand(2, 1, 7, 7) < 0.5}[given]
    if mask is not None:
        mask = mask | torch.eye(7).bool()
    with torch.no_grad():
        y, w = layer(x, mask=mask, weights=True)
        assert close(layer(x, mask=mask), y, 1e-5)
    assert w.shape == (2, 4, 7, 7) and close(w.sum(-1), torch.ones(2, 4, 7), 1e-5)
    if mask is None:
        mask = attention_mask(*[torch.arange(7)] * 2, layer.config.sliding_window, layer.config.sparse_stride)
    assert (w[~mask.expand_as(w)] == 0).all()


def test_sinks_at_minus_infinity_make_a_layer_without_sinks():
    with_sinks, without = loud(Attention(tiny(n_sinks=3, n_kv_heads=2))), loud(Attention(tiny(n_kv_heads=2)))
    without.load_state_dict({k: v for k, v in with_sinks.state_dict().items() if k != "sinks"})
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        assert not close(with_sinks(x), without(x), 1e-2)
        assert (with_sinks(x, weights=True)[1].sum(-1) < 1).all()
        with_sinks.sinks.fill_(-torch.inf)
        assert close(with_sinks(x), without(x), 1e-5)


def test_attention_and_block_stand_alone_with_explicit_positions():
    x, here, there = torch.randn(2, 7, 32), torch.arange(7), torch.arange(7) + 100
    for layer in (loud(Attention(tiny(n_kv_heads=2))), loud(Block(tiny(n_kv_heads=2)))):
        with torch.no_grad():
            assert close(layer(x), layer(x, here), 0)
            assert close(layer(x, here), layer(x, there), 1e-4), "RoPE knows distances alone"
            assert close(layer(x, torch.stack([here, there])), layer(x, here), 1e-4)
            assert not close(layer(x, here * 3), layer(x, here), 1e-2)


def test_the_model_takes_positions_and_a_mask():
    """Two texts packed into one row, with positions that start anew and a mask between them."""
    ours, a, b = make(positions="learned"), tokens(1, 5), tokens(1, 8, seed=1)
    text = torch.tensor([0] * 5 + [1] * 8)
    mask = attention_mask(*[torch.arange(13)] * 2) & (text.unsqueeze(1) == text)
    with torch.no_grad():
        packed = ours(
            torch.cat([a, b], 1), positions=torch.cat([torch.arange(5), torch.arange(8)]), mask=mask
        )
        assert close(packed, torch.cat([ours(a), ours(b)], 1), 1e-5)


def test_swiglu_is_its_equation():
    layer, x = loud(SwiGLU(8, 12)), torch.randn(3, 8)
    gate, up, down = (p.weight for p in (layer.gate_proj, layer.up_proj, layer.down_proj))
    assert gate.shape == up.shape == (12, 8) and down.shape == (8, 12)
    g = x @ gate.T
    assert close(layer(x), (g / (1 + (-g).exp()) * (x @ up.T)) @ down.T, 1e-5)


# -----------------------------------------------------------------------------
# Chunked cross-entropy


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_gradients_are_those_of_whole_logits(tied):
    ours, ids = make(tie_embeddings=tied).train(), tokens(2, 13)
    targets = ids[:, 1:].clone()
    targets[0, :4] = -100
    ours(ids[:, :-1], targets)[0].backward()
    grads = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    F.cross_entropy(ours(ids[:, :-1]).flatten(0, 1), targets.flatten(), reduction="sum").backward()
    for (name, p), g in zip(ours.named_parameters(), grads, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-4, atol=1e-5), name


# -----------------------------------------------------------------------------
# Mixture of experts


def expert_output(layer: MoE, e: int, x: Tensor) -> Tensor:
    return (F.silu(x @ layer.w1[e].T) * (x @ layer.w3[e].T)) @ layer.w2[e].T


def test_one_expert_is_the_dense_layer():
    moe, dense = loud(MoE(tiny(ffn="moe", n_experts=1, experts_per_token=1))), SwiGLU(32, 40)
    state = {"gate_proj.weight": moe.w1[0], "up_proj.weight": moe.w3[0], "down_proj.weight": moe.w2[0]}
    dense.load_state_dict(state)
    x = torch.randn(2, 7, 32)
    assert close(moe(x), dense(x), 1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_moe_without_capacity_is_the_mixture_token_by_token(k):
    layer, x = loud(MoE(tiny(**MOE | {"experts_per_token": k}))), torch.randn(2, 9, 32)
    y = layer(x)
    for row, t in itertools.product(range(2), range(9)):
        token = x[row, t]
        probs = (layer.gate.weight @ token).softmax(-1)
        best = probs.topk(k).indices.tolist()
        total = sum(probs[e] for e in best) if k > 1 else 1.0
        expected = sum(probs[e] / total * expert_output(layer, e, token) for e in best)
        assert close(y[row, t], expected, 1e-5)
    assert layer.stats["dropped"] == 0 and torch.allclose(layer.stats["load"].sum(), torch.tensor(1.0))


def route_by_hand(**changes) -> tuple[MoE, Tensor]:
    """A layer of 3 experts whose router reads off the token which expert it wants first and second."""
    layer = loud(MoE(tiny(d_model=4, n_heads=1, ffn="moe", n_experts=3, d_ff=8, **changes)))
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0]]))
    wishes = [(0, 1), (0, 1), (0, 2), (0, 2), (1, 0), (2, 1)]
    x = torch.zeros(1, 6, 4)
    for t, (first, second) in enumerate(wishes):
        x[0, t, first], x[0, t, second], x[0, t, 3] = 1.0, 0.5, t
    return layer, x


def test_what_exceeds_an_experts_capacity_is_dropped():
    # Top-1, 6 tokens, 3 experts, factor 1: room for 2 each. Tokens 2 and 3 find expert 0 full.
    layer, x = route_by_hand(experts_per_token=1, capacity_factor=1.0)
    y = layer(x)[0]
    assert layer.stats["dropped"] == 2 and layer.stats["load"].tolist() == pytest.approx(
        [4 / 6, 1 / 6, 1 / 6]
    )
    assert not y[2].any() and not y[3].any()
    for t, e in ((0, 0), (1, 0), (4, 1), (5, 2)):
        p = (layer.gate.weight @ x[0, t]).softmax(-1)[e]
        assert close(y[t], p * expert_output(layer, e, x[0, t]), 1e-5)
    # Top-2, room for 4 each. Expert 0 is wanted first by tokens 0-3, then second by 4: dropped there.
    # Expert 1: first by 4, second by 0, 1, 5. Expert 2: first by 5, second by 2, 3. Nothing else is dropped.
    layer, x = route_by_hand(experts_per_token=2, capacity_factor=1.0)
    y = layer(x)[0]
    assert layer.stats["dropped"] == 1
    p = (layer.gate.weight @ x[0, 4]).softmax(-1)
    assert close(y[4], p[1] / (p[0] + p[1]) * expert_output(layer, 1, x[0, 4]), 1e-5)
    # Room for all: nothing is dropped, and the result is that of no capacity at all.
    roomy, x = route_by_hand(experts_per_token=2, capacity_factor=3.0)
    free, _ = route_by_hand(experts_per_token=2)
    assert close(roomy(x), free(x), 1e-6) and roomy.stats["dropped"] == 0


def test_dropped_tokens_leave_no_trace_in_the_gradients():
    layer, x = route_by_hand(
        experts_per_token=1, capacity_factor=1.0, load_balance_coef=0.0, router_z_coef=0.0
    )
    x.requires_grad_()
    layer(x).sum().backward()
    touched = x.grad[0].abs().sum(-1) > 0
    assert touched.tolist() == [True, True, False, False, True, True]
    kept = x.detach()[:, [0, 1, 4, 5]]
    alone, _ = route_by_hand(experts_per_token=1)
    alone(kept).sum().backward()
    assert all(
        close(p.grad, q.grad, 1e-5) for p, q in zip(layer.parameters(), alone.parameters(), strict=True)
    )


def test_auxiliary_losses_are_their_formulas_and_1_at_an_even_router():
    even = MoE(tiny(d_model=4, n_heads=1, ffn="moe", n_experts=4, experts_per_token=1, router_z_coef=0.0))
    loud(even)
    with torch.no_grad():
        even.gate.weight.copy_(torch.eye(4) * 3)
    even(torch.eye(4).unsqueeze(0))  # each of four tokens wants another expert
    assert math.isclose(even.stats["aux_loss"].item(), 0.01, rel_tol=1e-5)
    layer, x = (
        loud(MoE(tiny(**MOE | {"load_balance_coef": 0.3, "router_z_coef": 0.2}))),
        torch.randn(1, 9, 32),
    )
    layer(x)
    logits = x[0] @ layer.gate.weight.T
    probs, share = logits.softmax(-1), torch.zeros(4)
    for t in range(9):
        share[probs[t].topk(2).indices] += 1 / 18
    balance = 4 * sum(share[e] * probs[:, e].mean() for e in range(4))
    z = torch.stack([logits[t].exp().sum().log() ** 2 for t in range(9)]).mean()
    assert torch.allclose(layer.stats["aux_loss"], 0.3 * balance + 0.2 * z, rtol=1e-5)


def test_the_router_learns_from_the_task_with_top_1():
    layer = loud(MoE(tiny(**MOE | {"experts_per_token": 1})))
    layer(torch.randn(1, 9, 32)).square().sum().backward()
    assert layer.gate.weight.grad.abs().max() > 1e-4


def test_auxiliary_losses_count_in_training_alone_and_per_target():
    ours, ids = make(**MOE), tokens(2, 12)
    plain, n = ours(ids[:, :-1], ids[:, 1:])
    aux = sum(block.mlp.stats["aux_loss"] for block in ours.model["layers"])
    trained, _ = ours.train()(ids[:, :-1], ids[:, 1:])
    assert aux > 0 and torch.allclose(trained, plain + n * aux)


def test_with_moe_every_2_every_second_block_has_experts_and_an_auxiliary_loss():
    ours, ids = make(**MOE | {"moe_every": 2, "n_layers": 5}), tokens(2, 12)
    kinds = [type(block.mlp) for block in ours.model["layers"]]
    assert kinds == [SwiGLU, MoE, SwiGLU, MoE, SwiGLU] and list(ours.config.moe_layers) == [1, 3]
    plain, n = ours(ids[:, :-1], ids[:, 1:])
    aux = sum(ours.model["layers"][layer].mlp.stats["aux_loss"] for layer in (1, 3))
    trained, _ = ours.train()(ids[:, :-1], ids[:, 1:])
    assert aux > 0 and torch.allclose(trained, plain + n * aux)


def test_a_model_with_one_expert_in_some_blocks_is_the_dense_model():
    dense = make(n_layers=3)
    moe = ModernDecoderLM(tiny(n_layers=3, ffn="moe", n_experts=1, experts_per_token=1, moe_every=2)).eval()
    state, mlp = dense.state_dict(), "model.layers.1.mlp."
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        state[mlp + ours] = state.pop(f"{mlp}{theirs}.weight").unsqueeze(0)
    state[f"{mlp}gate.weight"] = torch.randn(1, 32)
    moe.load_state_dict(state)
    ids = tokens(2, 20)
    with torch.no_grad():
        assert close(moe(ids), dense(ids), 1e-4)
    assert moe.generate([[1, 2, 3]], 9, temperature=0) == dense.generate([[1, 2, 3]], 9, temperature=0)


@pytest.mark.parametrize(
    "changes", [MOE | {"moe_every": 2}, {"sparse_stride": 3}, {"attention_kind": "linear"}], ids=str
)
def test_what_transformers_does_not_compute_is_saved_as_our_own_architecture(changes, tmp_path):
    make(**changes).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "modern_llm" and "modern_llm" in saved
    assert {name: saved["modern_llm"][name] for name in changes} == changes


def test_switches_that_have_no_effect_leave_the_architecture():
    assert architecture(tiny(moe_every=2)) == "llama" and architecture(tiny(**MOE)) == "mixtral"


# -----------------------------------------------------------------------------
# The key-value cache


DECODING = {name: VARIANTS[name] for name in VARIANTS if name not in ("capacity", "dropout", "untied")}
decoding = pytest.mark.parametrize("changes", DECODING.values(), ids=DECODING)


@decoding
def test_greedy_generation_equals_the_repeated_full_forward(changes):
    ours, prompts = make(**changes), [tokens(1, n, seed=n)[0].tolist() for n in (3, 1, 7)]
    expected = [greedy(ours, p, 9) for p in prompts]
    assert ours.generate(prompts, 9, temperature=0) == expected, "ragged"
    assert ours.generate(prompts[:1], 9, temperature=0) == expected[:1], "one"
    assert ours.generate([prompts[2]] * 2, 9, temperature=0, n=2) == [expected[2]] * 4, "even, n samples each"


@decoding
def test_kv_cache_gives_the_same_logits_as_the_full_forward(changes):
    ours, ids = make(**changes), tokens(2, 14)
    with torch.no_grad():
        full = ours(ids)
    for chunks in ([14], [5] + [1] * 9, [1] * 14, [3, 4, 1, 6]):
        cache = KVCache(ours.config, 2, 14 if chunks == [14] else 20)
        assert close(feed(ours, cache, ids, chunks), full, 2e-5), chunks


@pytest.mark.parametrize("name", ["gqa", "mistral", "learned", "sinks, window", "sparse", "linear"])
def test_chunks_of_unequal_length_append_to_ragged_rows(name):
    ours, texts = make(**VARIANTS[name]), [tokens(1, n, seed=n)[0] for n in (11, 6, 9)]
    cache, at, seen = KVCache(ours.config, 3, 20), [0, 0, 0], [[], [], []]
    for counts in ([4, 2, 1], [3, 1, 5], [1, 0, 1], [1, 1, 1], [2, 2, 1]):
        rows = [text[a : a + n] for text, a, n in zip(texts, at, counts, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logits = feed(ours, cache, ids, [ids.shape[1]], torch.tensor(counts))
        for row, n in enumerate(counts):
            seen[row].append(logits[row, :n])
            at[row] += n
    assert cache.length.tolist() == [11, 6, 9]
    with torch.no_grad():
        for text, logits in zip(texts, seen, strict=True):
            assert close(torch.cat(logits), ours(text.unsqueeze(0))[0], 2e-5)


def test_selected_rows_go_on_as_they_would_have():
    ours, ids = make(n_kv_heads=2), tokens(3, 10)
    with torch.no_grad():
        full = ours(ids)
    cache = KVCache(ours.config, 3, 12)
    feed(ours, cache, ids, [6])
    order = torch.tensor([2, 0, 0, 1])
    cache.select(order)
    assert close(feed(ours, cache, ids[order, 6:], [1] * 4), full[order, 6:], 2e-5)


def test_a_full_cache_is_refused():
    ours, ids = make(), tokens(1, 6)
    cache = KVCache(ours.config, 1, 5)
    feed(ours, cache, ids, [5])
    with pytest.raises(ValueError, match="6 tokens do not fit into a KV cache of 5 slots"):
        cache.begin(1)
    with pytest.raises(ValueError, match="do not fit"):
        KVCache(ours.config, 1, 5).begin(6)


# StreamingLLM: the reference keeps lists of unrotated keys and values and counts positions inside the list.


# -----------------------------------------------------------------------------
# Sampling


def probabilities(logits: Tensor, grid: int = 4000, **options) -> Tensor:
    """How often `sample` gives each token when `uniform` runs evenly through [0, 1): logits (V) -> (V)."""
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    if "seen" in options:
        options["seen"] = options["seen"].expand(grid, -1)
    drawn = sample(logits.expand(grid, -1), uniform, **options)
    return torch.bincount(drawn, minlength=len(logits)) / grid


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 100},
        {"top_p": 0.9},
        {"top_p": 0.5, "temperature": 1.5},
        {"top_p": 0.01},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "top_k": 7},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.7, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=str,
)
def test_sampling_has_the_probabilities_of_transformers_warpers(options):
    from transformers.generation import logits_process as hf

    grid, logits = 4000, torch.randn(20, generator=torch.Generator().manual_seed(4)) * 2
    told, scores = torch.tensor([[3, 7, 7, 11]]), logits.unsqueeze(0)
    mine = dict(options)
    if "repetition_penalty" in options:
        scores = hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(told, scores)
        mine["seen"] = torch.zeros(1, 20, dtype=torch.bool).scatter(1, told, True)
    for name, warper in [
        ("temperature", hf.TemperatureLogitsWarper),
        ("top_k", hf.TopKLogitsWarper),
        ("top_p", hf.TopPLogitsWarper),
        ("min_p", hf.MinPLogitsWarper),
    ]:
        if name in options:
            scores = warper(options[name])(told, scores)
    expected = scores.softmax(-1)[0]
    found = probabilities(logits, grid, **mine)
    assert (found - expected).abs().max() <= 2 / grid
    assert not found[expected == 0].any() and found[expected > 1 / grid].all()


def test_sampling_at_the_ends_of_its_options():
    logits = torch.tensor([[0.0, 3.0, -torch.inf, 1.0]])
    for u in (0.0, 0.5, 1 - 2**-24):
        uniform = torch.tensor([u])
        assert sample(logits, uniform, temperature=0) == 1
        assert sample(logits, uniform, top_p=0.0) == 1, "the best token always stays"
        assert sample(logits, uniform, top_k=1) == 1
        assert sample(logits, uniform) != 2, "what has no probability is never drawn"
        assert sample(logits.roll(2), uniform) != 0
    greedy_after_penalty = sample(logits, uniform, temperature=0, repetition_penalty=4.0, seen=logits == 3)
    assert greedy_after_penalty == 3


def test_frequencies_of_generated_tokens_are_those_of_softmax():
    ours, prompt = make(), [3, 1, 4]
    with torch.no_grad():
        logits = ours(torch.tensor([prompt]))[0, -1] / 3.0
    counts = torch.zeros(VOCAB)
    for (token,) in ours.generate([prompt], 1, temperature=3.0, n=4000, seed=7):
        counts[token] += 1
    expected = logits.softmax(-1) * 4000
    chi_squared = ((counts - expected).square() / expected).sum()
    assert chi_squared < 2 * VOCAB, "60 degrees of freedom: above 120 once in 100,000 times"


# -----------------------------------------------------------------------------
# generate


def test_a_rows_text_does_not_depend_on_its_neighbours():
    ours = make(n_kv_heads=2)
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.95}
    together = ours.generate(PROMPTS, 12, seed=[1, 2, 3, 4], **options)
    assert together[0] != together[3], "the same prompt, another seed"
    for prompt, seed, text in zip(PROMPTS, [1, 2, 3, 4], together, strict=True):
        assert ours.generate([prompt], 12, seed=[seed], **options) == [text]
        assert ours.generate([prompt], 12, seed=seed, **options) == [text]
        assert ours.generate([prompt], 5, seed=seed, **options) == [text[:5]], "a shorter text is a prefix"
    assert ours.generate(PROMPTS[::-1], 12, seed=[4, 3, 2, 1], **options) == together[::-1]
    torch.manual_seed(99)
    assert ours.generate(PROMPTS, 12, seed=1, **options) == together, "row r has seed + r"


def test_prompts_may_be_lists_tensors_or_slices_of_a_token_file():
    ours, ids = make(), [[5, 6, 7], [8, 9, 10]]
    expected = ours.generate(ids, 5)
    assert ours.generate(torch.tensor(ids), 5) == expected
    assert ours.generate(np.array(ids, dtype=np.uint16), 5) == expected
    assert ours.generate(tuple(map(tuple, ids)), 5, repetition_penalty=1.0) == expected


def test_n_samples_of_one_prefill_equal_n_calls():
    ours, prompts = make(), [[1, 2, 3], [4]]
    together = ours.generate(prompts, 10, n=3, seed=20)
    apart = [ours.generate([prompts[r // 3]], 10, seed=20 + r)[0] for r in range(6)]
    assert together == apart and len({tuple(t) for t in together}) > 4


def test_seeds_must_be_one_a_row():
    with pytest.raises(ValueError, match="seed"):
        make().generate([[1], [2], [3]], 4, seed=[5])


@pytest.mark.parametrize("window", [0, 6])
def test_stop_tokens_end_a_row_and_leave_the_others_as_they_were(window):
    """Rows end at different times, so the batch is compacted on the way; with a window it rolls too."""
    ours, n_rows = make(n_kv_heads=2), 8
    options = {"max_new_tokens": 24, "n": n_rows // 4, "seed": 3, "window": window, "repetition_penalty": 1.1}
    free = ours.generate(PROMPTS, **options)
    stops = {free[0][2], free[3][5], free[5][9]}
    stopped = ours.generate(PROMPTS, stop_tokens=stops, **options)
    assert stopped == [until(text, stops) for text in free]
    assert len({len(text) for text in stopped}) > 3


def test_streaming_tells_exactly_the_tokens_that_are_returned():
    ours, told = make(), [[] for _ in range(8)]
    free = ours.generate(PROMPTS, 12, n=2)
    stops = [free[1][3], free[4][6]]
    result = ours.generate(PROMPTS, 12, n=2, stop_tokens=stops, stream=lambda row, t: told[row].append(t))
    assert result == told == [until(text, stops) for text in free]


def test_forced_tokens_take_the_place_of_drawn_ones_and_are_read():
    """Row 1 answers 3 tokens to whatever stands third; the others are left alone."""
    ours, prompts = make(), PROMPTS[:3]
    free = ours.generate(prompts, 10, temperature=0)
    calls = []

    def force(row, new):
        calls.append((row, len(new)))
        return [50, 51, 52] if row == 1 and len(new) == 3 else []

    result = ours.generate(prompts, 10, temperature=0, force=force)
    assert result[0] == free[0] and result[2] == free[2]
    assert result[1][:6] == free[1][:3] + [50, 51, 52]
    assert result[1][6:] == greedy(ours, prompts[1] + result[1][:6], 4)
    assert (1, 4) not in calls and (1, 5) not in calls and (1, 6) in calls, "not asked while tokens wait"
    stopping = ours.generate(prompts, 10, temperature=0, force=force, stop_tokens=[51])
    assert stopping[1] == free[1][:3] + [50, 51], "a forced stop token ends the row"


def test_repetition_penalty_counts_the_prompt_and_the_new_tokens():
    ours, text, new = make(), [3, 1, 4], []
    with torch.no_grad():
        for _ in range(10):
            logits = ours(torch.tensor([text + new]))[0, -1]
            seen = torch.zeros(VOCAB, dtype=torch.bool)
            seen[text + new] = True
            logits = torch.where(seen, torch.where(logits > 0, logits / 1.8, logits * 1.8), logits)
            new.append(logits.argmax().item())
    assert new != greedy(ours, text, 10)
    assert ours.generate([[7, 8], text], 10, temperature=0, repetition_penalty=1.8)[1] == new


@pytest.mark.parametrize("training", [True, False])
def test_generation_drops_nothing_out_and_restores_the_training_flag(training):
    ours = make(dropout=0.5)
    expected = ours.generate([[1, 2]], 6, temperature=0)
    ours.train(training)
    assert ours.generate([[1, 2]], 6, temperature=0) == expected and ours.training is training
    assert all(module.training is training for module in ours.modules())


def test_generation_of_nothing_and_from_nothing():
    ours = make()
    assert ours.generate([[1], [2, 3]], 0) == [[], []]
    assert [len(t) for t in ours.generate([[1], [2, 3]], 1)] == [1, 1]
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="at least one"):
            ours.generate(prompts, 4)


def test_with_learned_positions_a_text_ends_with_the_context():
    ours, prompt = make(positions="learned", context_length=12), tokens(1, 9)[0].tolist()
    assert ours.generate([prompt], 50, temperature=0) == [greedy(ours, prompt, 3)]
    assert ours.generate([prompt[:4]], 2, temperature=0, window=3, keep=1) == [greedy(ours, prompt[:4], 2)]
    assert ours.generate([prompt[:4]], 8, temperature=0, window=3, keep=1) == [greedy(ours, prompt[:4], 8)]
    together = ours.generate([prompt, prompt[:4]], 50, temperature=0)
    assert together == [greedy(ours, prompt, 3), greedy(ours, prompt[:4], 3)], "the longest row ends all"
    for length in (12, 13):
        with pytest.raises(ValueError, match="leaves no room in context 12"):
            ours.generate([tokens(1, length)[0].tolist()], 5)
    with pytest.raises(ValueError, match="13 tokens, but the learned positions are 12"):
        ours(tokens(1, 13))


def test_under_autocast_the_cache_is_bfloat16_and_generation_works():
    ours = make(n_kv_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.dtype == torch.bfloat16
        assert [len(t) for t in ours.generate(PROMPTS, 6, window=4, keep=1)] == [6] * 4
    assert ours.dtype == torch.float32


def test_golden_tokens():
    """What the model computed when it was right. Weights from a sine depend on no random generator."""
    ours = ModernDecoderLM(tiny(n_kv_heads=2, tie_embeddings=False)).eval()
    with torch.no_grad():
        for i, p in enumerate(p for p in ours.parameters() if p.dim() > 1):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) ** 2 * (0.7 + i) + i)
            p.copy_((wave * 0.5).view_as(p))
    assert ours.generate([[1, 2, 3]], 16, temperature=0) == [GOLDEN_GREEDY]
    assert ours.generate([[1, 2, 3]], 16, temperature=1.5, seed=1) == [GOLDEN_SAMPLED]


GOLDEN_GREEDY = [31, 50, 11, 42, 1, 48, 42, 25, 23, 34, 28, 45, 25, 51, 42, 42]
GOLDEN_SAMPLED = [49, 15, 31, 45, 4, 46, 25, 42, 42, 29, 38, 25, 48, 27, 33, 29]


# -----------------------------------------------------------------------------
# Arithmetic


def test_the_config_is_plain_data():
    config = tiny(**MOE)
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert "transformers" not in vars(model_file)


def test_gradients_equal_those_of_hugging_faces_llama(tmp_path):
    from transformers import AutoModelForCausalLM

    ours, ids, targets = make(n_kv_heads=2, tie_embeddings=False), tokens(3, 20), tokens(3, 20, seed=5)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    loss, n = ours(ids, targets)
    (loss / n).backward()
    torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - expected[name].grad).norm() < 1e-4 * expected[name].grad.norm(), name
