"""The model against second opinions: Hugging Face's models, torch's functions, slow references."""

import itertools
import json
import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file
from small_models import MOE, PROMPTS, VARIANTS, VOCAB, close, feed, greedy, loud, make, tiny, tokens, until
from small_models import variants as every_variant
from torch import Tensor

from model import KVCache, ModernDecoderLM, MoE, attention, attention_mask, sample
from support import kernels

pytestmark = pytest.mark.usefixtures("one_thread", "plain_functions")


@pytest.fixture(scope="module")
def plain_functions():
    """Those of model.py itself; tests/test_kernels.py compares the fast ones with them."""
    kernels.install(False)


def variants_but(*left_out: str):
    table = {name: changes for name, changes in VARIANTS.items() if name not in left_out}
    return pytest.mark.parametrize("changes", table.values(), ids=table)


# -----------------------------------------------------------------------------
# Hugging Face: the same weights give the same logits, in both directions through the folder on disk


@pytest.mark.parametrize("name, kind", [
    ("untied", "llama"), ("mqa, wide heads", "llama"), ("biases", "llama"), ("mistral", "mistral"),
    ("qwen3", "qwen3"), ("gpt2", "gpt2"), ("mixtral", "mixtral"), ("mixtral, window", "mixtral"),
])  # fmt: skip
def test_transformers_computes_our_logits_and_gradients_from_our_folder(name, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    ours, ids, targets = make(**VARIANTS[name]), tokens(2, 20), tokens(2, 20, seed=5)
    targets[0, 3:8] = -100
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == kind and theirs.dtype == torch.float32
    logits, expected = ours(ids), theirs(ids).logits
    assert logits.std() > 0.3, "logits must differ enough for a comparison to mean something"
    assert close(logits, expected)
    if kind == "llama":  # the names of the parameters are the same
        loss, n = ours(ids, targets)
        mean = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
        assert n == 35 and loss.item() / 35 == pytest.approx(mean.item())
        (loss / n).backward()
        mean.backward()
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
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("Mistral", {"sliding_window": 5}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen3", {"head_dim": 16, "rms_norm_eps": 1e-6}),
        ("Mixtral", {"sliding_window": 6, "num_experts_per_tok": 3}),
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
    assert close(ours(ids), theirs(ids).logits)


def test_sharded_safetensors_load_and_are_replaced_by_a_save(tmp_path):
    theirs, ids = hub_model("Llama"), tokens(1, 9)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = ModernDecoderLM.from_pretrained(tmp_path)
    assert close(ours(ids), theirs(ids).logits)
    next(tmp_path.glob("*-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match="00002.* is missing"):
        ModernDecoderLM.from_pretrained(tmp_path)
    loud(ours, seed=5).save_pretrained(tmp_path)
    assert torch.equal(ModernDecoderLM.from_pretrained(tmp_path).head, ours.head)


def test_gpt2_loads_without_prefix_and_with_mask_buffers(tmp_path):
    """As OpenAI's first upload on the hub."""
    theirs, ids = hub_model("GPT2"), tokens(1, 9)
    theirs.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): p.detach() for name, p in theirs.named_parameters()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(48, 48).tril().view(1, 1, 48, 48)
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert close(ModernDecoderLM.from_pretrained(tmp_path)(ids), theirs(ids).logits)


@pytest.mark.parametrize(
    "kind, change, word",
    [
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear"),
        ("Llama", {"hidden_act": "gelu"}, "gelu"),
        ("Llama", {"attention_bias": True}, "attention_bias"),
        ("Llama", {"model_type": "bert"}, "bert"),
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


@pytest.mark.parametrize("name, norm", [
    ("gpt2", "transformer.h.1.ln_1.weight"), ("mixtral", "model.layers.1.input_layernorm.weight"),
])  # fmt: skip
def test_missing_unexpected_and_misshapen_tensors_are_named(name, norm, tmp_path):
    make(**VARIANTS[name]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load(file.read_bytes())
    without_norm = {name: x for name, x in tensors.items() if name != norm}
    for damaged, message in [
        (without_norm, "missing .*input_layernorm"),
        (tensors | {"surplus": torch.ones(2)}, "unexpected .*surplus"),
        (tensors | {norm: torch.ones(7)}, "another shape .*input_layernorm"),
    ]:
        save_file(damaged, file)
        with pytest.raises(ValueError, match=message):
            ModernDecoderLM.from_pretrained(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    def refused(error, word):
        with pytest.raises(error, match=word):
            ModernDecoderLM.from_pretrained(tmp_path)

    refused(FileNotFoundError, "config.json")
    make().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, whole = config.read_text(), weights.read_bytes()
    for damaged in ("", "[]", text[:-9], '{"model_type": "modern_llm", "modern_llm": {"x": 1}}'):
        config.write_text(damaged)
        refused(ValueError, "config.json is damaged")
    config.write_text(text)
    for damaged in (whole[:-100], b"", b"\xff" * 200):
        weights.write_bytes(damaged)
        refused(ValueError, "model.safetensors is damaged")
    weights.unlink()
    refused(FileNotFoundError, "model.safetensors is missing")


@every_variant
def test_every_variant_survives_saving_and_loading(changes, tmp_path):
    ours, ids = make(**changes), tokens(2, 20)
    ours.save_pretrained(tmp_path, eos_token_id=7)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7
    again = ModernDecoderLM.from_pretrained(tmp_path)
    assert again.config == ours.config and torch.equal(again(ids), ours(ids))
    ours.bfloat16().save_pretrained(tmp_path)
    assert len(ours.generate([[1, 2, 3]], 2)[0]) == 2  # so does chat.py on a GPU
    assert {p.dtype for p in ModernDecoderLM.from_pretrained(tmp_path).parameters()} == {torch.float32}


# -----------------------------------------------------------------------------
# What must hold for every variant


@variants_but("capacity")
def test_a_token_changes_no_logits_before_it(changes):
    """With a capacity it may: a later token's first choice can evict a second one."""
    ours, ids = make(**changes), tokens(1, 16)
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % VOCAB
    a, b = ours(ids), ours(changed)
    assert close(a[:, :9], b[:, :9], 1e-5) and not close(a[:, 9:], b[:, 9:], 1e-3)
    if changes == VARIANTS["mistral"]:  # 2 layers of window 5: token 9 is seen up to token 9 + 2 * (5 - 1)
        a, b = (ours(torch.cat([text, ids], dim=1)) for text in (ids, changed))
        assert ((a - b).abs().amax(-1)[0] > 1e-4).nonzero().max() == 9 + 8


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


@pytest.mark.parametrize("changes, word", [
    ({"n_heads": 5}, "d_model=32"),
    ({"n_kv_heads": 3}, "n_kv_heads=3"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"ffn": "moe", "n_experts": 2, "experts_per_token": 3}, "experts_per_token=3"),
    ({"ffn": "moe", "moe_every": 3}, "moe_every=3"),
    ({"attention_kind": "linear", "n_sinks": 1}, "n_sinks"),
    ({"norm": "rmsnorm"}, "norm"),
    ({"n_heads": 0}, "n_heads"),
    ({"d_ff": -1}, "d_ff"),
    ({"norm_eps": math.nan}, "norm_eps"),
    ({"dropout": 1}, "dropout"),
    ({"n_layers": 2.5}, "n_layers"),
    ({"d_model": "32"}, "d_model"),
])  # fmt: skip
def test_an_impossible_config_is_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        tiny(**changes)


def test_a_new_model_predicts_nearly_uniformly():
    loss, n = ModernDecoderLM(tiny())(tokens(8, 20), tokens(8, 20, seed=1))
    assert abs(loss.item() / n.item() - math.log(VOCAB)) < 0.05


# -----------------------------------------------------------------------------
# Equations and layers alone; tests/test_course.py has more of them


def test_sinks_take_part_of_the_attention():
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask, sinks = torch.ones(5, 5).tril().bool(), torch.randn(3, 1, 2)
    y, w = attention(q, k, v, mask, sinks, weights=True)
    assert (w.sum(-1) < 1).all()
    for b, h, t in itertools.product(range(2), range(3), range(5)):  # the slow reference
        scores = [math.exp(q[b, h, t] @ k[b, h, s] / math.sqrt(8)) for s in range(t + 1)]
        total = sum(scores) + sinks[h, 0].exp().sum()
        assert close(y[b, h, t], sum(s / total * v[b, h, i] for i, s in enumerate(scores)), 1e-5)


def test_attention_masks_are_causal_with_a_window_or_a_band_and_every_nth_token():
    at = torch.arange(9)
    causal = torch.ones(9, 9).tril().bool()
    assert torch.equal(attention_mask(at, at), causal)
    for window, stride, seen in [(2, 0, [7, 8]), (0, 3, [2, 5, 6, 7, 8]), (6, 3, [5, 6, 7, 8])]:
        mask = attention_mask(at, at, window, stride)
        assert mask[8].nonzero().flatten().tolist() == seen and not (mask & ~causal).any()


# -----------------------------------------------------------------------------
# Mixture of experts; the Mixtral of transformers is above


def expert_output(layer: MoE, e: int, x: Tensor) -> Tensor:
    return (F.silu(x @ layer.w1[e].T) * (x @ layer.w3[e].T)) @ layer.w2[e].T


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
    layer, x = route_by_hand(experts_per_token=1, capacity_factor=1.0)
    y = layer(x)[0]
    p = (x[0] @ layer.gate.weight.T).softmax(-1)
    assert layer.stats["dropped"] == 2 and not y[[2, 3]].any()
    assert layer.stats["load"].tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    kept = [p[t, e] * expert_output(layer, e, x[0, t]) for t, e in ((0, 0), (1, 0), (4, 1), (5, 2))]
    assert close(y[[0, 1, 4, 5]], torch.stack(kept), 1e-5)
    gradients = [torch.autograd.grad(z.sum(), [*layer.parameters()]) for z in (y, torch.stack(kept))]
    assert all(close(a, b, 1e-5) for a, b in zip(*gradients, strict=True))
    assert gradients[0][0].abs().max() > 1e-4, "the router learns from the task, also with top-1"
    # Top-2, room for 4 each. Expert 0 is wanted first by tokens 0-3, then second by 4: dropped there.
    # Expert 1: first by 4, second by 0, 1, 5. Expert 2: first by 5, second by 2, 3. Nothing else is dropped.
    layer, x = route_by_hand(experts_per_token=2, capacity_factor=1.0)
    y = layer(x)[0]
    assert layer.stats["dropped"] == 1
    assert close(y[4], p[4, 1] / (p[4, 0] + p[4, 1]) * expert_output(layer, 1, x[0, 4]), 1e-5)


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


def test_auxiliary_losses_of_the_blocks_with_experts_count_in_training_alone_and_per_target():
    ours, ids = make(**MOE | {"moe_every": 2, "n_layers": 5}), tokens(2, 12)
    layers = ours.model["layers"]
    assert [i for i, block in enumerate(layers) if isinstance(block.mlp, MoE)] == [1, 3]
    plain, n = ours(ids[:, :-1], ids[:, 1:])
    aux = layers[1].mlp.stats["aux_loss"] + layers[3].mlp.stats["aux_loss"]
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


# -----------------------------------------------------------------------------
# The key-value cache; the other caches are in tests/test_kernels.py

decoding = variants_but("capacity", "dropout", "untied")


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
    for chunks in ([14], [5] + [1] * 9, [3, 4, 1, 6]):
        cache = KVCache(ours.config, 2, 14 if chunks == [14] else 20)
        assert close(feed(ours, cache, ids, chunks), ours(ids), 2e-5), chunks


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


@pytest.mark.parametrize("options", [
    {"temperature": 0.5}, {"top_k": 5}, {"top_k": 100}, {"top_p": 0.9}, {"top_p": 0.5, "temperature": 1.5},
    {"top_p": 0.01}, {"min_p": 0.1}, {"min_p": 1.0}, {"repetition_penalty": 0.6, "top_k": 7},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
], ids=str)  # fmt: skip
def test_sampling_has_the_probabilities_of_transformers_warpers(options):
    """How often `sample` gives each token when `uniform` runs evenly through [0, 1)."""
    from transformers.generation import logits_process as hf

    grid, logits = 4000, torch.randn(20, generator=torch.Generator().manual_seed(4)) * 2
    said, scores, ours = torch.tensor([[3, 7, 7, 11]]), logits.unsqueeze(0), dict(options)
    if "repetition_penalty" in options:
        scores = hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(said, scores)
        ours["seen"] = torch.zeros(1, 20, dtype=torch.bool).scatter(1, said, True).expand(grid, -1)
    warpers = {"temperature": hf.TemperatureLogitsWarper, "top_k": hf.TopKLogitsWarper}
    warpers |= {"top_p": hf.TopPLogitsWarper, "min_p": hf.MinPLogitsWarper}
    for name, warper in warpers.items():
        if name in options:
            scores = warper(options[name])(said, scores)
    expected = scores.softmax(-1)[0]
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    found = torch.bincount(sample(logits.expand(grid, -1), uniform, **ours), minlength=20) / grid
    assert (found - expected).abs().max() <= 2 / grid
    assert not found[expected == 0].any() and found[expected > 1 / grid].all()


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_what_has_no_probability_is_never_drawn(u):
    logits, uniform = torch.tensor([[-torch.inf, 0.0, 3.0, -torch.inf]]), torch.tensor([u])
    assert sample(logits, uniform) in (1, 2)
    assert sample(logits, uniform, top_p=0.0) == sample(logits, uniform, temperature=0) == 2


# -----------------------------------------------------------------------------
# generate


def test_a_rows_text_does_not_depend_on_its_neighbours():
    ours = make(n_kv_heads=2)
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.95}
    together = ours.generate(PROMPTS, 12, seed=[1, 2, 3, 4], **options)
    assert together[0] != together[3], "the same prompt, another seed"
    for seed, (prompt, text) in enumerate(zip(PROMPTS, together, strict=True), 1):
        assert ours.generate([prompt], 5, seed=seed, **options) == [text[:5]], "a shorter text is a prefix"
    torch.manual_seed(99)
    assert ours.generate(PROMPTS, 12, seed=1, **options) == together, "row r has seed + r"
    samples = ours.generate(PROMPTS[:2], 10, n=3, seed=20)
    assert samples == ours.generate([p for p in PROMPTS[:2] for _ in range(3)], 10, seed=20)
    with pytest.raises(ValueError, match="seed"):
        ours.generate([[1], [2], [3]], 4, seed=[5])


def test_prompts_may_be_lists_tensors_or_slices_of_a_token_file():
    ours, ids = make(), [[5, 6, 7], [8, 9, 10]]
    expected = ours.generate(ids, 5, repetition_penalty=1.2)
    for prompts in (torch.tensor(ids), np.array(ids, dtype=np.uint16)):
        assert ours.generate(prompts, 5, repetition_penalty=1.2) == expected
    assert ours.generate(ids, 0) == [[], []] and [len(t) for t in ours.generate(ids, 1)] == [1, 1]
    for prompts in ([], [[1], []]):
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
    ours, prompts = make(), PROMPTS[:3]
    free = ours.generate(prompts, 10, temperature=0)

    def force(row, new):
        assert not new[-1:] == [50], "not asked while tokens wait"
        return [50, 51, 52] if row == 1 and len(new) == 3 else []

    result = ours.generate(prompts, 10, temperature=0, force=force)
    answered = free[1][:3] + [50, 51, 52]
    assert result == [free[0], answered + greedy(ours, prompts[1] + answered, 4), free[2]]
    stopping = ours.generate(prompts, 10, temperature=0, force=force, stop_tokens=[51])
    assert stopping[1] == free[1][:3] + [50, 51], "a forced stop token ends the row"


@torch.no_grad()
def test_repetition_penalty_counts_the_prompt_and_the_new_tokens():
    ours, text, new = make(), [3, 1, 4], []
    for _ in range(10):
        logits = ours(torch.tensor([text + new]))[0, -1]
        for seen in {*text, *new}:
            logits[seen] *= 1.8 if logits[seen] < 0 else 1 / 1.8
        new.append(logits.argmax().item())
    assert new != greedy(ours, text, 10)
    assert ours.generate([[7, 8], text], 10, temperature=0, repetition_penalty=1.8)[1] == new


def test_generation_drops_nothing_out_and_restores_the_training_flag():
    ours = make(dropout=0.5)
    expected = ours.generate([[1, 2]], 6, temperature=0)
    assert not ours.training
    assert ours.train().generate([[1, 2]], 6, temperature=0) == expected
    assert all(module.training for module in ours.modules())


def test_with_learned_positions_a_text_ends_with_the_context():
    ours, prompt = make(positions="learned", context_length=12), tokens(1, 9)[0].tolist()
    assert ours.generate([prompt[:4]], 50, temperature=0) == [greedy(ours, prompt[:4], 8)]
    together = ours.generate([prompt, prompt[:4]], 50, temperature=0)
    assert together == [greedy(ours, prompt, 3), greedy(ours, prompt[:4], 3)], "the longest row ends all"
    with pytest.raises(ValueError, match="leaves no room"):
        ours.generate([tokens(1, 12)[0].tolist()], 5)
    with pytest.raises(ValueError, match="13 tokens"):
        ours(tokens(1, 13))


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
