"""The components that Stanford's CS336 asks for in assignment 1, found here and held against references.

The adapters have the names and arguments of that assignment's adapters.py. Two conventions differ: the course
rotates neighbours (2i, 2i + 1) in RoPE and we rotate halves (i, i + D/2), as Hugging Face does; and it names
weights in its own way. The adapters translate, and that is all they do.
"""

import io
import math
import pickle

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
from torch import Tensor

from model import (
    Attention,
    Block,
    Embedding,
    Linear,
    ModelConfig,
    ModernDecoderLM,
    RMSNorm,
    SwiGLU,
    apply_rope,
    attention,
    cross_entropy,
    softmax,
)
from tokenizer import GPT2_PATTERN, Tokenizer, train_bpe
from train import AdamW, clip_gradients, get_batch, get_lr, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, D_MODEL, HEADS, D_FF, VOCAB, LAYERS, THETA = 3, 11, 32, 4, 56, 61, 2, 10000.0
HEAD_DIM = D_MODEL // HEADS


# -----------------------------------------------------------------------------
# The adapters


run_silu = F.silu  # what SwiGLU calls
run_scaled_dot_product_attention, run_softmax, run_cross_entropy = attention, softmax, cross_entropy
run_get_batch, run_gradient_clipping, run_get_lr_cosine_schedule = get_batch, clip_gradients, get_lr
run_save_checkpoint, run_load_checkpoint = save_checkpoint, load_checkpoint
get_tokenizer, run_train_bpe = Tokenizer, train_bpe


def loaded(layer: torch.nn.Module, **weights: Tensor) -> torch.nn.Module:
    layer.load_state_dict(weights)
    return layer


def run_linear(d_in, d_out, weights, in_features):
    return loaded(Linear(d_in, d_out), weight=weights)(in_features)


def run_embedding(vocab_size, d_model, weights, token_ids):
    return loaded(Embedding(vocab_size, d_model), weight=weights)(token_ids)


def run_swiglu(d_model, d_ff, w1_weight, w2_weight, w3_weight, in_features):
    names = {"gate_proj.weight": w1_weight, "down_proj.weight": w2_weight, "up_proj.weight": w3_weight}
    return loaded(SwiGLU(d_model, d_ff), **names)(in_features)


def run_multihead_self_attention(d_model, num_heads, q, k, v, o, in_features):
    config = ModelConfig(d_model=d_model, n_heads=num_heads, positions="none")
    names = dict(zip([f"{x}_proj.weight" for x in "qkvo"], [q, k, v, o], strict=True))
    return loaded(Attention(config), **names)(in_features)


def run_multihead_self_attention_with_rope(
    d_model, num_heads, max_seq_len, theta, q, k, v, o, in_features, token_positions=None
):
    config = ModelConfig(d_model=d_model, n_heads=num_heads, context_length=max_seq_len, rope_theta=theta)
    weights = [halves_first(q, num_heads), halves_first(k, num_heads), v, o]
    names = dict(zip([f"{x}_proj.weight" for x in "qkvo"], weights, strict=True))
    return loaded(Attention(config), **names)(in_features, token_positions)


def run_rope(d_k, theta, max_seq_len, in_query_or_key, token_positions):
    neighbours_to_halves = torch.arange(d_k).view(-1, 2).T.flatten()  # 0, 2, 4, ..., 1, 3, 5, ...
    rotated = apply_rope(in_query_or_key[..., neighbours_to_halves], token_positions, theta)
    return rotated[..., neighbours_to_halves.argsort()]


def run_transformer_block(d_model, num_heads, d_ff, max_seq_len, theta, weights, in_features):
    config = ModelConfig(
        d_model=d_model, n_heads=num_heads, d_ff=d_ff, context_length=max_seq_len, rope_theta=theta
    )
    return loaded(Block(config), **our_block(weights, num_heads))(in_features)


def run_transformer_lm(
    vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta, weights, in_indices
):
    sizes = {"vocab_size": vocab_size, "context_length": context_length, "d_model": d_model, "d_ff": d_ff}
    sizes |= {"n_layers": num_layers, "n_heads": num_heads, "rope_theta": rope_theta}
    config = ModelConfig(**sizes, tie_embeddings=False)
    names = {
        "model.embed_tokens.weight": weights["token_embeddings.weight"],
        "model.norm.weight": weights["ln_final.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for i in range(num_layers):
        theirs = f"layers.{i}."
        block = {k.removeprefix(theirs): w for k, w in weights.items() if k.startswith(theirs)}
        for name, weight in our_block(block, num_heads).items():
            names[f"model.layers.{i}.{name}"] = weight
    return loaded(ModernDecoderLM(config), **names)(in_indices)


def run_rmsnorm(d_model, eps, weights, in_features):
    return loaded(RMSNorm(d_model, eps), weight=weights)(in_features)


def halves_first(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a q or k projection of the course in our order: of each head first the even ones."""
    return weight.view(n_heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def our_block(weights: dict[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """A block's weights under our names."""
    return {
        "input_layernorm.weight": weights["ln1.weight"],
        "self_attn.q_proj.weight": halves_first(weights["attn.q_proj.weight"], n_heads),
        "self_attn.k_proj.weight": halves_first(weights["attn.k_proj.weight"], n_heads),
        "self_attn.v_proj.weight": weights["attn.v_proj.weight"],
        "self_attn.o_proj.weight": weights["attn.output_proj.weight"],
        "post_attention_layernorm.weight": weights["ln2.weight"],
        "mlp.gate_proj.weight": weights["ffn.w1.weight"],
        "mlp.down_proj.weight": weights["ffn.w2.weight"],
        "mlp.up_proj.weight": weights["ffn.w3.weight"],
    }


# -----------------------------------------------------------------------------
# References: the course's equations in plain torch


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=atol)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rope_reference(x: Tensor, positions: Tensor) -> Tensor:
    """Neighbours (x[2i], x[2i + 1]) as complex numbers, turned by position * theta^(-2i / D)."""
    frequencies = THETA ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = positions.unsqueeze(-1) * frequencies
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, o: Tensor, x: Tensor, positions=None) -> Tensor:
    q, k, v = ((x @ w.T).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (q, k, v))
    if positions is not None:
        q, k = rope_reference(q, positions), rope_reference(k, positions)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2) @ o.T


def swiglu_reference(w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor) -> Tensor:
    gate = x @ w1.T
    return (gate * torch.sigmoid(gate) * (x @ w3.T)) @ w2.T


def block_reference(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    normed = F.rms_norm(x, (D_MODEL,), weights["ln1.weight"], 1e-5)
    projections = [weights[f"attn.{name}_proj.weight"] for name in ("q", "k", "v", "output")]
    x = x + attention_reference(*projections, normed, torch.arange(x.shape[1]))
    normed = F.rms_norm(x, (D_MODEL,), weights["ln2.weight"], 1e-5)
    return x + swiglu_reference(*[weights[f"ffn.w{i}.weight"] for i in (1, 2, 3)], normed)


def block_weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    shapes = dict.fromkeys(
        [f"attn.{name}_proj.weight" for name in ("q", "k", "v", "output")], (D_MODEL, D_MODEL)
    )
    shapes |= {
        "ffn.w1.weight": (D_FF, D_MODEL),
        "ffn.w2.weight": (D_MODEL, D_FF),
        "ffn.w3.weight": (D_FF, D_MODEL),
    }
    weights = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    return weights | {f"ln{i}.weight": 1 + 0.1 * torch.randn(D_MODEL) for i in (1, 2)}


# -----------------------------------------------------------------------------
# The model


def test_layers_are_their_equations():
    x, w, ids = random(B, T, D_MODEL), random(D_FF, D_MODEL), torch.randint(VOCAB, (B, T))
    assert close(run_linear(D_MODEL, D_FF, w, x), F.linear(x, w))
    table, weight = random(VOCAB, D_MODEL), random(D_MODEL)
    assert torch.equal(run_embedding(VOCAB, D_MODEL, table, ids), F.embedding(ids, table))
    ws = random(D_FF, D_MODEL), random(D_MODEL, D_FF), random(D_FF, D_MODEL, scale=0.5)
    assert close(run_swiglu(D_MODEL, D_FF, *ws, x), swiglu_reference(*ws, x), 1e-3)
    assert close(run_silu(x), x * torch.sigmoid(x))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert close(run_rmsnorm(D_MODEL, 1e-5, weight, x), expected)


@pytest.mark.parametrize(
    "layer, shape, std", [(Linear, (200, 300), math.sqrt(2 / 500)), (Embedding, (300, 200), 1)]
)
def test_linear_and_embedding_start_as_normals_cut_at_three_standard_deviations(layer, shape, std):
    torch.manual_seed(0)
    z = layer(300, 200).weight.detach() / std
    assert z.shape == shape and 2.9 < z.abs().max() <= 3.0 + 1e-5
    assert abs(z.mean()) < 0.02 and abs(z.std() - 0.9866) < 0.01  # of a normal that is cut at 3
    meta = layer(2, 3, device="meta", dtype=torch.bfloat16).weight
    assert meta.is_meta and meta.dtype == torch.bfloat16


def test_functions_are_torchs_and_do_not_overflow():
    q, k, v = random(B, 2, T, HEAD_DIM), random(B, 2, 7, HEAD_DIM), random(B, 2, 7, 5)
    mask = torch.rand(T, 7) < 0.6
    mask[:, 0] = True
    for m in (None, mask):
        expected = F.scaled_dot_product_attention(q, k, v, m)
        assert close(run_scaled_dot_product_attention(q, k, v, m), expected)
        assert close(run_scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0], m), expected[0, 0])
    x, targets = random(B, VOCAB), torch.tensor([1, 0, 60])
    for shift in (1.0, 1000.0):
        assert close(run_softmax(x * shift, -1), F.softmax(x * shift, -1))
        assert close(run_cross_entropy(x * shift, targets), F.cross_entropy(x * shift, targets), 1e-3)


def test_multihead_attention_and_rope_are_the_courses():
    x, w = random(B, T, D_MODEL), list(block_weights().values())[:4]
    found = run_multihead_self_attention(D_MODEL, HEADS, *w, x)
    assert close(found, attention_reference(*w, x))
    for positions in (torch.arange(T), torch.arange(T) ** 2 // 3):
        found = run_multihead_self_attention_with_rope(D_MODEL, HEADS, 64, THETA, *w, x, positions)
        assert close(found, attention_reference(*w, x, positions))
        heads = random(B, T, HEAD_DIM)
        assert close(run_rope(HEAD_DIM, THETA, 100, heads, positions), rope_reference(heads, positions))


def test_the_transformer_block_and_model_are_the_courses():
    x, ids = random(B, T, D_MODEL), torch.randint(VOCAB, (B, T))
    found = run_transformer_block(D_MODEL, HEADS, D_FF, 64, THETA, block_weights(), x)
    assert close(found, block_reference(block_weights(), x), 1e-4)
    weights = {"token_embeddings.weight": random(VOCAB, D_MODEL), "lm_head.weight": random(VOCAB, D_MODEL)}
    weights["ln_final.weight"] = random(D_MODEL)
    x = F.embedding(ids, weights["token_embeddings.weight"])
    for i in range(LAYERS):
        weights |= {f"layers.{i}.{name}": w for name, w in block_weights(i).items()}
        x = block_reference(block_weights(i), x)
    expected = F.rms_norm(x, (D_MODEL,), weights["ln_final.weight"], 1e-5) @ weights["lm_head.weight"].T
    sizes = (VOCAB, 64, D_MODEL, LAYERS, HEADS, D_FF, THETA)
    assert close(run_transformer_lm(*sizes, weights, ids), expected, 1e-3)
    assert close(run_transformer_lm(*sizes, weights, ids[:, :5]), expected[:, :5], 1e-3)


# -----------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("max_norm", [1e-2, 1e3])
def test_clipped_gradients_are_torchs_and_changed_in_place(max_norm):
    ours, theirs = ([torch.nn.Parameter(random(5, n)) for n in (3, 4, 5)] for _ in range(2))
    for p in (*ours[:2], *theirs[:2]):  # the third has no gradient
        p.grad = random(*p.shape, scale=3.0)
    before = ours[0].grad
    run_gradient_clipping(iter(ours), max_norm)
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert ours[0].grad is before and ours[2].grad is None
    assert all(close(p.grad, q.grad) for p, q in zip(ours[:2], theirs[:2], strict=True))
    run_gradient_clipping(ours[2:], max_norm)  # none has a gradient


def trained(optimizer_class, steps: int) -> tuple:
    torch.manual_seed(2)
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = optimizer_class(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.3, 2.0]])
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - torch.tensor([[1.0, 0.0], [0.0, 2.0]])).square().sum().backward()
        optimizer.step()


def test_adamw_is_torchs():
    assert close(trained(AdamW, 100)[0].weight, trained(torch.optim.AdamW, 100)[0].weight, 1e-6)


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    for it in range(30):
        cosine = 0.1 + 0.5 * (1 + math.cos(math.pi * (it - 7) / (21 - 7))) * 0.9
        expected = it / 7 if it < 7 else cosine if it <= 21 else 0.1
        assert run_get_lr_cosine_schedule(it, 1.0, 0.1, 7, 21) == pytest.approx(expected)


def test_batches_are_windows_from_everywhere():
    data, starts = np.arange(100), set()
    for _ in range(200):
        x, y = run_get_batch(data, 32, 7, "cpu")
        assert x.shape == y.shape == (32, 7) and x.dtype == y.dtype == torch.long
        assert torch.equal(x + 1, y) and torch.equal(x, x[:, :1] + torch.arange(7))
        starts |= set(x[:, 0].tolist())
    assert starts == set(range(93))  # the last target is the last token
    with pytest.raises((RuntimeError, AssertionError)):
        run_get_batch(data, 32, 7, "cuda:99")


@pytest.mark.parametrize("kind", ["path", "text", "file"])
@pytest.mark.parametrize("optimizer_class", [AdamW, torch.optim.AdamW])
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(kind, optimizer_class, tmp_path):
    model, optimizer = trained(optimizer_class, 5)
    place = {"path": tmp_path / "x.pt", "text": str(tmp_path / "x.pt"), "file": io.BytesIO()}[kind]
    run_save_checkpoint(model, optimizer, 5, place)
    if kind == "file":
        place.seek(0)
    again, optimizer_again = trained(optimizer_class, 1)
    assert run_load_checkpoint(place, again, optimizer_again) == 5
    train(model, optimizer, 3)
    train(again, optimizer_again, 3)
    assert torch.equal(model.weight, again.weight)
    assert not list(tmp_path.glob(".*.tmp"))


class Code:
    def __reduce__(self):
        return print, ("code has run",)


def test_a_save_that_fails_leaves_the_checkpoint_before_it_and_code_in_one_is_refused(
    tmp_path, monkeypatch, capsys
):
    model, optimizer = trained(AdamW, 1)
    run_save_checkpoint(model, optimizer, 1, tmp_path / "x.pt")

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space"):
            run_save_checkpoint(model, optimizer, 2, tmp_path / "x.pt")
    assert run_load_checkpoint(tmp_path / "x.pt", model, optimizer) == 1
    torch.save({"model": Code(), "optimizer": {}, "iteration": 1}, tmp_path / "x.pt")
    with pytest.raises(pickle.UnpicklingError):
        run_load_checkpoint(tmp_path / "x.pt", model, optimizer)
    assert "code has run" not in capsys.readouterr().out


# -----------------------------------------------------------------------------
# The tokenizer

TEXT = """low low low lower lowest newer newer newer wider 12 don't
<|endoftext|>the low newer lowest wide <3 é 東京
"""


def merged(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i : i + 2] = [word[i] + word[i + 1]]
        i += 1
    return word


def test_bpe_is_learnt_from_a_file_and_applied_in_the_order_of_its_merges(tmp_path):
    """That the merges are the most frequent pairs is in test_tokenizer.py."""
    file, special = tmp_path / "corpus.txt", "<|endoftext|>"
    file.write_text(TEXT, encoding="utf-8")
    vocab, merges = run_train_bpe(file, 285, [special])
    assert len(vocab) == 285 and len(merges) == 28 and merges[0] == (b"w", b"e")
    tokenizer, ids_of = get_tokenizer(vocab, merges, [special]), {t: i for i, t in vocab.items()}
    expected = []
    for n, part in enumerate(TEXT.split(special)):
        expected += [ids_of[special.encode()]] if n else []
        for text in regex.findall(GPT2_PATTERN, part):
            word = [bytes([b]) for b in text.encode()]
            for pair in merges:
                word = merged(word, pair)
            expected += [ids_of[token] for token in word]
    assert tokenizer.encode(TEXT) == expected and tokenizer.decode(expected) == TEXT
    assert list(tokenizer.encode_iterable(io.StringIO(TEXT))) == expected
