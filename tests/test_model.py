"""The model against second opinions: Hugging Face's models, torch's functions, slow references."""

import dataclasses
import itertools
import json
import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from small_models import MOE, PROMPTS, VARIANTS, VOCAB, close, feed, greedy, loud, make, tiny, tokens, until
from small_models import variants as every_variant
from torch import Tensor

from model import (
    Attention,
    KVCache,
    ModelConfig,
    ModernDecoderLM,
    MoE,
    SwiGLU,
    attention,
    attention_mask,
    sample,
)
from support import kernels
from support.costs import count_parameters
from support.hf_format import architecture

pytestmark = pytest.mark.usefixtures("one_thread", "plain_functions")


@pytest.fixture(scope="module")
def plain_functions():
    """Those of model.py itself; tests/test_kernels.py compares the fast ones with them."""
    kernels.install(False)


def named(table: dict):
    return pytest.mark.parametrize("changes", table.values(), ids=table)


def some(*names: str):
    return named({name: VARIANTS[name] for name in names})


# -----------------------------------------------------------------------------
# Hugging Face: the same weights give the same logits, in both directions through the folder on disk


@pytest.mark.parametrize(
    "name, kind",
    [("llama", "llama"), ("untied", "llama"), ("gqa", "llama"), ("mqa, wide heads", "llama"),
     ("biases", "llama"), ("mistral", "mistral"), ("qwen3", "qwen3"), ("gpt2", "gpt2"),
     ("mixtral", "mixtral"), ("mixtral, window", "mixtral")],
)  # fmt: skip
def test_transformers_computes_our_logits_and_gradients_from_our_folder(name, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    ours, ids = make(**VARIANTS[name]), tokens(2, 20)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == kind and theirs.dtype == torch.float32
    logits, expected = ours(ids), theirs(ids).logits
    assert logits.std() > 0.3, "logits must differ enough for a comparison to mean something"
    assert close(logits, expected)
    assert sum(p.numel() for p in theirs.parameters()) == count_parameters(ours.config)["total"]
    if kind == "llama":
        loss, n = ours(ids, tokens(2, 20, seed=5))
        (loss / n).backward()
        F.cross_entropy(expected.flatten(0, 1), tokens(2, 20, seed=5).flatten()).backward()
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        for name, p in ours.named_parameters():
            assert (p.grad - gradients[name]).norm() < 1e-4 * gradients[name].norm(), name


def hub_model(kind: str, **changes):
    """A small model of transformers."""
    import transformers

    small = {"vocab_size": VOCAB, "max_position_embeddings": 48, "hidden_size": 32, "intermediate_size": 40}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "GPT2":
        small = {"vocab_size": VOCAB, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
    if kind == "Mixtral":
        small["num_local_experts"] = 4
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    return loud(model(getattr(transformers, f"{kind}Config")(**small | changes)))


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("Mistral", {"sliding_window": 5}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen3", {"head_dim": 16, "rms_norm_eps": 1e-6}),
        ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
        ("Mixtral", {"sliding_window": 6}),
        ("Mixtral", {"num_experts_per_tok": 3}),
        ("GPT2", {}),
        ("GPT2", {"activation_function": "gelu_pytorch_tanh", "n_inner": 40}),
    ],
    ids=str,
)
def test_we_load_transformers_folder_and_compute_its_logits(kind, changes, tmp_path):
    theirs, ids = hub_model(kind, **changes), tokens(2, 20)
    theirs.save_pretrained(tmp_path)
    ours = ModernDecoderLM.from_pretrained(tmp_path)
    assert all(p.is_contiguous() and p.requires_grad for p in ours.parameters())
    ours.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert close(ours(ids), theirs(ids).logits)
        assert torch.equal(ModernDecoderLM.from_pretrained(tmp_path / "again")(ids), ours(ids))


def test_sharded_safetensors_load_and_are_replaced_by_a_save(tmp_path):
    theirs, ids = hub_model("Llama"), tokens(1, 9)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = ModernDecoderLM.from_pretrained(tmp_path)
    assert close(ours(ids), theirs(ids).logits)
    second = next(iter(tmp_path.glob("*-00002-*")))
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="00002.* is missing"):
        ModernDecoderLM.from_pretrained(tmp_path)
    (tmp_path / "elsewhere").rename(second)
    loud(ours, seed=5).save_pretrained(tmp_path)
    assert torch.equal(ModernDecoderLM.from_pretrained(tmp_path).head, ours.head)


def rewrite(folder, change):
    """Applies `change` to the dict of tensors in the folder."""
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in safetensors.torch.load_file(path).items()}
    tensors = change(tensors) or tensors
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def test_gpt2_loads_without_prefix_and_with_mask_buffers(tmp_path):
    theirs, ids = hub_model("GPT2"), tokens(1, 9)
    theirs.save_pretrained(tmp_path)

    def as_first_uploaded(tensors):
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(48, 48).tril().view(1, 1, 48, 48)
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors | {"lm_head.weight": tensors["wte.weight"].clone()}

    rewrite(tmp_path, as_first_uploaded)
    assert close(ModernDecoderLM.from_pretrained(tmp_path)(ids), theirs(ids).logits)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "kind, change, word",
    [
        ("Llama", {"rope_parameters": LLAMA3}, "llama3"),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear"),
        ("Llama", {"hidden_act": "gelu"}, "gelu"),
        ("Llama", {"attention_bias": True}, "attention_bias"),
        ("Llama", {"model_type": "bert"}, "bert"),
        ("Llama", {"model_type": None}, "model_type"),
        ("GPT2", {"activation_function": "relu"}, "relu"),
        ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "attention"),
        ("GPT2", {"tie_word_embeddings": False}, "untied"),
        ("Qwen3", {"use_sliding_window": True}, "attention"),
        ("Mixtral", {"num_experts_per_tok": 1}, "one expert"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(kind, change, word, tmp_path):
    config = hub_model(kind).config.to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(ValueError, match=word):
        ModernDecoderLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_missing_unexpected_and_misshapen_tensors_are_named(name, tmp_path):
    norm = "transformer.h.1.ln_1.weight" if name == "gpt2" else "model.layers.1.input_layernorm.weight"
    for change, message in [
        (lambda t: {name: x for name, x in t.items() if name != norm}, "missing .*input_layernorm"),
        (lambda t: t.update(surplus=torch.ones(2)), "unexpected .*surplus"),
        (lambda t: t.update({norm: torch.ones(7)}), "another shape .*input_layernorm"),
    ]:
        make(**VARIANTS[name]).save_pretrained(tmp_path)
        rewrite(tmp_path, change)
        with pytest.raises(ValueError, match=message):
            ModernDecoderLM.from_pretrained(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    def refused(error, word, folder=tmp_path):
        with pytest.raises(error, match=word):
            ModernDecoderLM.from_pretrained(folder)

    refused(FileNotFoundError, "nowhere", tmp_path / "nowhere")
    refused(FileNotFoundError, "config.json")
    make().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, whole = config.read_text(), weights.read_bytes()
    foreign = '{"model_type": "modern_llm", "modern_llm": {"x": 1}}'
    for damaged in ("", "[]", text[:-9], '{"model_type": "gpt2"}', foreign):
        config.write_text(damaged)
        refused(ValueError, "config.json is damaged")
    config.write_text(text)
    for damaged in (whole[:-100], whole[:20], b"", b"\xff" * 200):
        weights.write_bytes(damaged)
        refused(ValueError, "model.safetensors is damaged")
    weights.unlink()
    torch.save(make().state_dict(), tmp_path / "pytorch_model.bin")  # a pickle can run code: never read
    refused(FileNotFoundError, "model.safetensors is missing")


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    make(seed=1).save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def disk_full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError):
        make(seed=2).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@every_variant
def test_every_variant_survives_saving_and_loading(changes, tmp_path):
    ours, ids = make(**changes), tokens(2, 20)
    ours.save_pretrained(tmp_path, eos_token_id=7)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7
    again = ModernDecoderLM.from_pretrained(tmp_path)
    assert again.config == ours.config and torch.equal(again(ids), ours(ids))
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(ours.config)))) == ours.config
    ours.bfloat16().save_pretrained(tmp_path)
    assert len(ours.generate([[1, 2, 3]], 2)[0]) == 2  # so does chat.py on a GPU
    assert {p.dtype for p in ModernDecoderLM.from_pretrained(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "changes, kind",
    [(MOE | {"moe_every": 2}, "modern_llm"), ({"sparse_stride": 3}, "modern_llm"),
     ({"attention_kind": "linear"}, "modern_llm"), ({"moe_every": 2}, "llama"), (MOE, "mixtral")],
)  # fmt: skip
def test_the_architecture_is_our_own_where_transformers_does_not_compute_it(changes, kind, tmp_path):
    make(**changes).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == architecture(tiny(**changes)) == kind
    assert saved["max_position_embeddings"] == tiny(**changes).context_length  # the card and the API state it


# -----------------------------------------------------------------------------
# What must hold for every variant


@named({name: changes for name, changes in VARIANTS.items() if name != "capacity"})
def test_a_token_changes_no_logits_before_it(changes):
    """With a capacity it may: a later token's first choice can evict a second one."""
    ours, ids, t = make(**changes), tokens(1, 16), 9
    changed = ids.clone()
    changed[0, t] = (ids[0, t] + 1) % VOCAB
    a, b = ours(ids), ours(changed)
    assert close(a[:, :t], b[:, :t], 1e-5) and not close(a[:, t:], b[:, t:], 1e-3)
    if changes == VARIANTS["mistral"]:  # 2 layers of window 5: token t sees back to t - 2 * (5 - 1)
        differs = (a - b).abs().amax(-1)[0] > 1e-4
        longer = make(**changes)(torch.cat([ids, ids], 1)) - make(**changes)(torch.cat([changed, ids], 1))
        assert differs.nonzero().flatten().tolist() == list(range(9, 16))
        assert (longer.abs().amax(-1)[0] > 1e-4).nonzero().max() == 9 + 8


@every_variant
def test_gradient_checkpointing_changes_neither_loss_nor_gradients_nor_dropout(changes):
    plain, again = (make(**changes).train() for _ in range(2))
    again.gradient_checkpointing = True
    ids, losses = tokens(2, 12), []
    for model in (plain, again):
        torch.manual_seed(3)
        losses.append(model(ids[:, :-1], ids[:, 1:])[0])
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, p), q in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        assert p.grad is not None and torch.allclose(p.grad, q[1].grad, atol=1e-6), name


@some("llama", "post-norm", "sinks", "learned")
def test_a_loaded_model_drops_out_wherever_a_new_one_does(changes, tmp_path):
    calm, fresh = make(**changes), make(**changes, dropout=0.3)
    calm.save_pretrained(tmp_path)
    loaded = ModernDecoderLM.from_pretrained(tmp_path)
    loaded.set_dropout(0.3)
    ids, found = tokens(1, 8), []
    for model in (fresh, loaded, calm):
        torch.manual_seed(0)
        found.append(model.train()(ids))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])
    assert torch.equal(loaded.eval()(ids), calm.eval()(ids))
    for p in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="dropout"):
            loaded.set_dropout(p)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"n_heads": 5}, "d_model=32"),
        ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"ffn": "moe", "n_experts": 2, "experts_per_token": 3}, "experts_per_token=3"),
        ({"ffn": "moe", "moe_every": 3}, "moe_every=3"),
        ({"attention_kind": "linear", "n_sinks": 1}, "n_sinks"),
        *(({name: value}, name) for name, value in [
            ("norm", "rmsnorm"), ("positions", "alibi"), ("attention_kind", "cosine"), ("n_heads", 0),
            ("vocab_size", 0), ("rope_theta", 0), ("norm_eps", math.nan), ("dropout", 1), ("n_kv_heads", -1),
            ("d_ff", -1), ("n_layers", 2.5), ("d_model", "32"),
        ]),
    ],
)  # fmt: skip
def test_an_impossible_config_is_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        tiny(**changes)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_and_its_gradients_are_those_of_whole_logits_and_of_accumulated_micro_batches(tied):
    ours, ids = make(n_kv_heads=2, tie_embeddings=tied).train(), tokens(4, 12)
    targets = ids.roll(-1, 1)
    targets[0, 2:], targets[2] = -100, -100  # 2, 12, 0 and 12 targets: a mean of means would differ
    losses = [ours(ids[i : i + 1], targets[i : i + 1]) for i in range(4)]
    assert [int(count) for _, count in losses] == [2, 12, 0, 12]
    total = sum(count for _, count in losses)
    pieces = sum(loss for loss, _ in losses) / total
    loss, n = ours(ids, targets)
    whole = F.cross_entropy(ours(ids).flatten(0, 1), targets.flatten())
    gradients = []
    for mean in (loss / n, pieces, whole):
        ours.zero_grad()
        mean.backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
        assert torch.allclose(mean, whole, rtol=1e-5)
    for a, b, c in zip(*gradients, strict=True):
        assert torch.allclose(a, c, rtol=1e-4, atol=1e-6) and torch.allclose(b, c, rtol=1e-4, atol=1e-6)


def test_a_new_model_predicts_nearly_uniformly_and_is_seeded():
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(ModernDecoderLM(tiny()))
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))
    loss, n = models[0](tokens(8, 20), tokens(8, 20, seed=1))
    assert abs(loss.item() / n.item() - math.log(VOCAB)) < 0.05


# -----------------------------------------------------------------------------
# Equations and layers alone; tests/test_course.py has more of them


def test_attention_equals_torchs_and_a_query_that_sees_nothing_gets_zeros():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7) < 0.5
    mask[0, 0, 2] = False
    y, w = attention(q, k, v, mask, weights=True)
    assert close(y, F.scaled_dot_product_attention(q, k, v, mask).nan_to_num(), 1e-6)
    assert not y[0, :, 2].any() and (w.masked_select(~mask) == 0).all()
    assert close(w.sum(-1), mask.any(-1).expand(2, 3, 5).float(), 1e-6)


def test_sinks_take_part_of_the_attention_and_none_at_minus_infinity():
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask, sinks = torch.ones(5, 5).tril().bool(), torch.randn(3, 1, 2)
    y, w = attention(q, k, v, mask, sinks, weights=True)
    assert (w.sum(-1) < 1).all()
    for b, h, t in itertools.product(range(2), range(3), range(5)):  # the slow reference
        scores = [math.exp(q[b, h, t] @ k[b, h, s] / math.sqrt(8)) for s in range(t + 1)]
        total = sum(scores) + sinks[h, 0].exp().sum()
        assert close(y[b, h, t], sum(s / total * v[b, h, i] for i, s in enumerate(scores)), 1e-5)
    none = attention(q, k, v, mask, torch.full((3, 1, 2), -torch.inf))
    assert close(none, attention(q, k, v, mask), 1e-6)


def test_attention_masks_are_causal_with_a_window_or_a_band_and_every_nth_token():
    at = torch.arange(9)
    seen = lambda *how: attention_mask(at, at, *how)[8].nonzero().flatten().tolist()  # noqa: E731
    assert torch.equal(attention_mask(at, at), torch.ones(9, 9).tril().bool())
    assert attention_mask(at, at, 2).sum(-1).tolist() == [1] + [2] * 8
    assert seen(0, 3) == seen(7, 3) == [2, 5, 6, 7, 8] and seen(6, 3) == [5, 6, 7, 8]
    assert torch.equal(attention_mask(at, at, 0, 1), attention_mask(at, at))
    two_layers = attention_mask(at, at, 0, 3).float().matrix_power(2) > 0
    assert torch.equal(two_layers, attention_mask(at, at)), "two layers reach every token"


@some("llama", "gqa", "mistral", "qk_norm, window", "sparse", "linear", "linear, sparse")
@pytest.mark.parametrize("given", [None, (7, 7), (2, 1, 7, 7)])
def test_a_layer_returns_its_weights_too(changes, given):
    layer, x = loud(Attention(tiny(**changes))), torch.randn(2, 7, 32)
    mask = (torch.rand(given) < 0.5) | torch.eye(7).bool() if given else None
    y, w = layer(x, mask=mask, weights=True)
    assert close(layer(x, mask=mask), y, 1e-5)
    assert w.shape == (2, 4, 7, 7) and close(w.sum(-1), torch.ones(2, 4, 7), 1e-5)
    if mask is None:
        mask = attention_mask(*[torch.arange(7)] * 2, layer.config.sliding_window, layer.config.sparse_stride)
    assert (w[~mask.expand_as(w)] == 0).all()


# -----------------------------------------------------------------------------
# Mixture of experts


def expert_output(layer: MoE, e: int, x: Tensor) -> Tensor:
    return (F.silu(x @ layer.w1[e].T) * (x @ layer.w3[e].T)) @ layer.w2[e].T


@pytest.mark.parametrize("k", [1, 2, 3])
def test_moe_without_capacity_is_the_mixture_token_by_token(k):
    layer, x = loud(MoE(tiny(**MOE | {"experts_per_token": k}))), torch.randn(2, 9, 32)
    y = layer(x)
    for row, t in itertools.product(range(2), range(9)):
        probs = (layer.gate.weight @ x[row, t]).softmax(-1)
        best = probs.topk(k).indices.tolist()
        total = sum(probs[e] for e in best) if k > 1 else 1.0
        expected = sum(probs[e] / total * expert_output(layer, e, x[row, t]) for e in best)
        assert close(y[row, t], expected, 1e-5)
    assert layer.stats["dropped"] == 0 and torch.allclose(layer.stats["load"].sum(), torch.tensor(1.0))
    y.square().sum().backward()
    assert layer.gate.weight.grad.abs().max() > 1e-4, "the router learns from the task, also with top-1"


def route_by_hand(**changes) -> tuple[MoE, Tensor]:
    """A layer of 3 experts whose router reads off the token which expert it wants first and second."""
    layer = loud(MoE(tiny(d_model=4, n_heads=1, ffn="moe", n_experts=3, d_ff=8, **changes)))
    with torch.no_grad():
        layer.gate.weight.copy_(9 * torch.eye(3, 4))
    wishes = [(0, 1), (0, 1), (0, 2), (0, 2), (1, 0), (2, 1)]
    x = torch.zeros(1, 6, 4)
    for t, (first, second) in enumerate(wishes):
        x[0, t, first], x[0, t, second], x[0, t, 3] = 1.0, 0.5, t
    return layer, x


def test_what_exceeds_an_experts_capacity_is_dropped_and_leaves_no_gradient():
    # Top-1, 6 tokens, 3 experts, factor 1: room for 2 each. Tokens 2 and 3 find expert 0 full.
    off = {"load_balance_coef": 0.0, "router_z_coef": 0.0}
    layer, x = route_by_hand(experts_per_token=1, capacity_factor=1.0, **off)
    y = layer(x.requires_grad_())[0]
    assert layer.stats["dropped"] == 2
    assert layer.stats["load"].tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert not y[2].any() and not y[3].any()
    alone, _ = route_by_hand(experts_per_token=1)
    kept = alone(x.detach()[:, [0, 1, 4, 5]])
    assert close(y[[0, 1, 4, 5]], kept[0], 1e-5)
    y.sum().backward(), kept.sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).tolist() == [True, True, False, False, True, True]
    for p, q in zip(layer.parameters(), alone.parameters(), strict=True):
        assert close(p.grad, q.grad, 1e-5)
    # Top-2, room for 4 each. Expert 0 is wanted first by tokens 0-3, then second by 4: dropped there.
    # Expert 1: first by 4, second by 0, 1, 5. Expert 2: first by 5, second by 2, 3. Nothing else is dropped.
    layer, x = route_by_hand(experts_per_token=2, capacity_factor=1.0)
    y = layer(x)[0]
    p = (layer.gate.weight @ x[0, 4]).softmax(-1)
    assert layer.stats["dropped"] == 1
    assert close(y[4], p[1] / (p[0] + p[1]) * expert_output(layer, 1, x[0, 4]), 1e-5)
    # Room for all: nothing is dropped, and the result is that of no capacity at all.
    roomy, x = route_by_hand(experts_per_token=2, capacity_factor=3.0)
    assert close(roomy(x), route_by_hand(experts_per_token=2)[0](x), 1e-6) and roomy.stats["dropped"] == 0


def test_auxiliary_losses_are_their_formulas():
    layer, x = loud(MoE(tiny(**MOE | {"load_balance_coef": 0.3, "router_z_coef": 0.2}))), torch.randn(9, 32)
    layer(x)
    logits = x @ layer.gate.weight.T
    probs, share = logits.softmax(-1), torch.zeros(4)
    for t in range(9):
        share[probs[t].topk(2).indices] += 1 / 18
    balance = 4 * sum(share[e] * probs[:, e].mean() for e in range(4))  # 1 if both are even
    z = logits.exp().sum(-1).log().square().mean()
    assert torch.allclose(layer.stats["aux_loss"], 0.3 * balance + 0.2 * z, rtol=1e-5)


@pytest.mark.parametrize("every, experts", [(1, [0, 1, 2, 3, 4]), (2, [1, 3])])
def test_auxiliary_losses_of_the_blocks_with_experts_count_in_training_alone_and_per_target(every, experts):
    ours, ids = make(**MOE | {"moe_every": every, "n_layers": 5}), tokens(2, 12)
    layers = ours.model["layers"]
    assert list(ours.config.moe_layers) == experts
    assert all(isinstance(block.mlp, MoE if i in experts else SwiGLU) for i, block in enumerate(layers))
    plain, n = ours(ids[:, :-1], ids[:, 1:])
    aux = sum(layers[i].mlp.stats["aux_loss"] for i in experts)
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
    assert close(moe(tokens(2, 20)), dense(tokens(2, 20)), 1e-4)
    assert moe.generate([[1, 2, 3]], 9, temperature=0) == dense.generate([[1, 2, 3]], 9, temperature=0)


# -----------------------------------------------------------------------------
# The key-value cache; the other caches are in tests/test_kernels.py

decoding = named({name: VARIANTS[name] for name in VARIANTS if name not in ("capacity", "dropout", "untied")})


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
    for chunks in ([14], [5] + [1] * 9, [1] * 14, [3, 4, 1, 6]):
        cache = KVCache(ours.config, 2, 14 if chunks == [14] else 20)
        assert close(feed(ours, cache, ids, chunks), ours(ids), 2e-5), chunks


@some("gqa", "mistral", "learned", "sinks, window", "sparse", "linear")
def test_chunks_of_unequal_length_append_to_ragged_rows(changes):
    ours, texts = make(**changes), [tokens(1, n, seed=n)[0] for n in (11, 6, 9)]
    cache, at, seen = KVCache(ours.config, 3, 20), [0, 0, 0], [[], [], []]
    for counts in ([4, 2, 1], [3, 1, 5], [1, 0, 1], [1, 1, 1], [2, 2, 1]):
        rows = [text[a : a + n] for text, a, n in zip(texts, at, counts, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logits = feed(ours, cache, ids, [ids.shape[1]], torch.tensor(counts))
        for row, n in enumerate(counts):
            seen[row].append(logits[row, :n])
            at[row] += n
    for text, logits in zip(texts, seen, strict=True):
        assert close(torch.cat(logits), ours(text.unsqueeze(0))[0], 2e-5)


def test_selected_rows_go_on_as_they_would_have_and_a_full_cache_is_refused():
    ours, ids, order = make(n_kv_heads=2), tokens(3, 10), torch.tensor([2, 0, 0, 1])
    cache = KVCache(ours.config, 3, 10)
    feed(ours, cache, ids, [6])
    cache.select(order)
    assert close(feed(ours, cache, ids[order, 6:], [1] * 4), ours(ids)[order, 6:], 2e-5)
    for full, more in ((cache, 1), (KVCache(ours.config, 1, 5), 6)):
        with pytest.raises(ValueError, match="do not fit"):
            full.begin(more)


# -----------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 1}, {"top_k": 5}, {"top_k": 100},
     {"top_p": 0.9}, {"top_p": 0.5, "temperature": 1.5}, {"top_p": 0.01}, {"min_p": 0.1}, {"min_p": 1.0},
     {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6, "top_k": 7},
     {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2}],
    ids=str,
)  # fmt: skip
def test_sampling_has_the_probabilities_of_transformers_warpers(options):
    """How often `sample` gives each token when `uniform` runs evenly through [0, 1)."""
    from transformers.generation import logits_process as hf

    grid, logits = 4000, torch.randn(20, generator=torch.Generator().manual_seed(4)) * 2
    said, scores, ours = torch.tensor([[3, 7, 7, 11]]), logits.unsqueeze(0), dict(options)
    if "repetition_penalty" in options:
        scores = hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(said, scores)
        ours["seen"] = torch.zeros(1, 20, dtype=torch.bool).scatter(1, said, True).expand(grid, -1)
    for name, kind in [
        ("temperature", "Temperature"),
        ("top_k", "TopK"),
        ("top_p", "TopP"),
        ("min_p", "MinP"),
    ]:
        if name in options:
            scores = getattr(hf, f"{kind}LogitsWarper")(options[name])(said, scores)
    expected = scores.softmax(-1)[0]
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    found = torch.bincount(sample(logits.expand(grid, -1), uniform, **ours), minlength=20) / grid
    assert (found - expected).abs().max() <= 2 / grid
    assert not found[expected == 0].any() and found[expected > 1 / grid].all()


def test_sampling_at_the_ends_of_its_options():
    logits = torch.tensor([[0.0, 3.0, -torch.inf, 1.0]])
    for u in (0.0, 0.5, 1 - 2**-24):
        uniform = torch.tensor([u])
        assert sample(logits, uniform, temperature=0) == 1
        assert sample(logits, uniform, top_p=0.0) == 1, "the best token always stays"
        assert sample(logits, uniform) != 2, "what has no probability is never drawn"
        assert sample(logits.roll(2), uniform) != 0
    assert sample(logits, uniform, temperature=0, repetition_penalty=4.0, seen=logits == 3) == 3


# -----------------------------------------------------------------------------
# generate


def test_a_rows_text_does_not_depend_on_its_neighbours():
    ours = make(n_kv_heads=2)
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.95}
    together = ours.generate(PROMPTS, 12, seed=[1, 2, 3, 4], **options)
    assert together[0] != together[3], "the same prompt, another seed"
    for prompt, seed, text in zip(PROMPTS, [1, 2, 3, 4], together, strict=True):
        assert ours.generate([prompt], 12, seed=[seed], **options) == [text]
        assert ours.generate([prompt], 5, seed=seed, **options) == [text[:5]], "a shorter text is a prefix"
    assert ours.generate(PROMPTS[::-1], 12, seed=[4, 3, 2, 1], **options) == together[::-1]
    torch.manual_seed(99)
    assert ours.generate(PROMPTS, 12, seed=1, **options) == together, "row r has seed + r"
    samples = ours.generate(PROMPTS[:2], 10, n=3, seed=20)
    assert samples == [ours.generate([PROMPTS[r // 3]], 10, seed=20 + r)[0] for r in range(6)]
    with pytest.raises(ValueError, match="seed"):
        ours.generate([[1], [2], [3]], 4, seed=[5])


def test_prompts_may_be_lists_tensors_or_slices_of_a_token_file():
    ours, ids = make(), [[5, 6, 7], [8, 9, 10]]
    expected = ours.generate(ids, 5, repetition_penalty=1.2)
    for prompts in (torch.tensor(ids), np.array(ids, dtype=np.uint16), tuple(map(tuple, ids))):
        assert ours.generate(prompts, 5, repetition_penalty=1.2) == expected
    assert ours.generate(ids, 0) == [[], []] and [len(t) for t in ours.generate(ids, 1)] == [1, 1]
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match="at least one"):
            ours.generate(prompts, 4)


@pytest.mark.parametrize("window", [0, 6])
def test_stop_tokens_end_a_row_and_the_stream_tells_what_is_returned(window):
    """Rows end at different times, so the batch is compacted on the way; with a window it rolls too."""
    ours, streamed = make(n_kv_heads=2), [[] for _ in range(8)]
    options = {"max_new_tokens": 24, "n": 2, "seed": 3, "window": window, "repetition_penalty": 1.1}
    free = ours.generate(PROMPTS, **options)
    stops = {free[0][2], free[3][5], free[5][9]}
    options |= {"stop_tokens": stops, "stream": lambda row, token: streamed[row].append(token)}
    stopped = ours.generate(PROMPTS, **options)
    assert stopped == streamed == [until(text, stops) for text in free]
    assert len({len(text) for text in stopped}) > 3
    options |= {"stop_tokens": (), "ends": lambda new: new[-1] in stops, "stream": None}
    assert ours.generate(PROMPTS, **options) == stopped, "a function may say where a row ends"


def test_forced_tokens_take_the_place_of_drawn_ones_and_are_read():
    """Row 1 answers 3 tokens to whatever stands third; the others are left alone."""
    ours, prompts, calls = make(), PROMPTS[:3], []
    free = ours.generate(prompts, 10, temperature=0)

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


@torch.no_grad()
def test_repetition_penalty_counts_the_prompt_and_the_new_tokens():
    ours, text, new = make(), [3, 1, 4], []
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
    assert ours.generate([[1, 2]], 6, temperature=0) == expected
    assert all(module.training is training for module in ours.modules())


def test_with_learned_positions_a_text_ends_with_the_context():
    ours, prompt = make(positions="learned", context_length=12), tokens(1, 9)[0].tolist()
    for window in ({}, {"window": 3, "keep": 1}):
        assert ours.generate([prompt[:4]], 50, temperature=0, **window) == [greedy(ours, prompt[:4], 8)]
    together = ours.generate([prompt, prompt[:4]], 50, temperature=0)
    assert together == [greedy(ours, prompt, 3), greedy(ours, prompt[:4], 3)], "the longest row ends all"
    with pytest.raises(ValueError, match="leaves no room"):
        ours.generate([tokens(1, 12)[0].tolist()], 5)
    with pytest.raises(ValueError, match="13 tokens"):
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
    greedy_tokens = [31, 50, 11, 42, 1, 48, 42, 25, 23, 34, 28, 45, 25, 51, 42, 42]
    sampled_tokens = [49, 15, 31, 45, 4, 46, 25, 42, 42, 29, 38, 25, 48, 27, 33, 29]
    assert ours.generate([[1, 2, 3]], 16, temperature=0) == [greedy_tokens]
    assert ours.generate([[1, 2, 3]], 16, temperature=1.5, seed=1) == [sampled_tokens]
