"""The interface of Stanford's CS336, assignment 1, called as its tests do and held against references.

Two conventions differ: the course rotates neighbours (2i, 2i + 1) in RoPE and we rotate halves (i, i + D/2),
as Hugging Face does: `halves_first` translates. And it names weights in its own way.
"""

import io
import math
import pickle

import numpy as np
import pytest
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
    rms_norm,
    softmax,
)
from tokenizer import Tokenizer, train_bpe
from train import AdamW, clip_gradients, get_batch, get_lr, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, D_MODEL, HEADS, D_FF, VOCAB, THETA = 3, 11, 32, 4, 56, 61, 10000.0
HEAD_DIM = D_MODEL // HEADS
CONFIG = dict(d_model=D_MODEL, n_heads=HEADS, d_ff=D_FF, context_length=64, rope_theta=THETA)


# -----------------------------------------------------------------------------
# References: the course's equations in plain torch


def loaded(layer: torch.nn.Module, **weights: Tensor) -> torch.nn.Module:
    layer.load_state_dict(weights)
    return layer


def halves_first(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a q or k projection of the course in our order: of each head first the even ones."""
    return weight.view(n_heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


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


# -----------------------------------------------------------------------------
# The model


def test_layers_are_their_equations():
    x, w, ids = random(B, T, D_MODEL), random(D_FF, D_MODEL), torch.randint(VOCAB, (B, T))
    assert close(loaded(Linear(D_MODEL, D_FF), weight=w)(x), F.linear(x, w))
    table, scale = random(VOCAB, D_MODEL), random(D_MODEL)
    assert torch.equal(loaded(Embedding(VOCAB, D_MODEL), weight=table)(ids), F.embedding(ids, table))
    w1, w2, w3 = random(D_FF, D_MODEL), random(D_MODEL, D_FF), random(D_FF, D_MODEL, scale=0.5)
    names, gate = {"gate_proj.weight": w1, "down_proj.weight": w2, "up_proj.weight": w3}, x @ w1.T
    expected = (gate * torch.sigmoid(gate) * (x @ w3.T)) @ w2.T
    assert close(loaded(SwiGLU(D_MODEL, D_FF), **names)(x), expected, 1e-3)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale
    assert close(loaded(RMSNorm(D_MODEL, 1e-5), weight=scale)(x), expected)
    assert close(rms_norm(x, scale, 1e-5), expected)


@pytest.mark.parametrize(
    "layer, shape, std", [(Linear, (200, 300), math.sqrt(2 / 500)), (Embedding, (300, 200), 1)]
)
def test_linear_and_embedding_start_as_normals_cut_at_three_standard_deviations(layer, shape, std):
    z = layer(300, 200).weight.detach() / std
    assert z.shape == shape and 2.9 < z.abs().max() <= 3.0 + 1e-5
    assert abs(z.mean()) < 0.02 and abs(z.std() - 0.9866) < 0.01  # of a normal that is cut at 3
    meta = layer(2, 3, device="meta", dtype=torch.bfloat16).weight
    assert meta.is_meta and meta.dtype == torch.bfloat16


def test_functions_are_torchs_and_do_not_overflow():
    q, k, v = random(B, 2, T, HEAD_DIM), random(B, 2, 7, HEAD_DIM), random(B, 2, 7, 5)
    mask = torch.rand(T, 7) < 0.6
    mask[2] = False  # what sees nothing gets zeros
    for m in (None, mask):
        expected = F.scaled_dot_product_attention(q, k, v, m).nan_to_num()
        assert close(attention(q, k, v, m), expected)
        assert close(attention(q[0, 0], k[0, 0], v[0, 0], m), expected[0, 0])
    x, targets = random(B, VOCAB), torch.tensor([1, 0, 60])
    for scale in (1.0, 1000.0):
        assert close(softmax(x * scale, -1), F.softmax(x * scale, -1))
        assert close(cross_entropy(x * scale, targets), F.cross_entropy(x * scale, targets), 1e-3)


def test_attention_and_rope_are_the_courses():
    x, (q, k, v, o) = random(B, T, D_MODEL), random(4, D_MODEL, D_MODEL, scale=0.2)
    names = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": o}
    no_positions = loaded(Attention(ModelConfig(**CONFIG, positions="none")), **names)
    assert close(no_positions(x), attention_reference(q, k, v, o, x))
    names |= {"q_proj.weight": halves_first(q, HEADS), "k_proj.weight": halves_first(k, HEADS)}
    layer, heads = loaded(Attention(ModelConfig(**CONFIG)), **names), random(B, T, HEAD_DIM)
    order = torch.arange(HEAD_DIM).view(-1, 2).T.flatten()  # 0, 2, 4, ..., 1, 3, 5, ...
    for positions in (torch.arange(T), torch.arange(T) ** 2 // 3):
        assert close(layer(x, positions), attention_reference(q, k, v, o, x, positions))
        rotated = apply_rope(heads[..., order], positions, THETA)
        assert close(rotated, rope_reference(heads, positions)[..., order])


def test_a_model_is_an_embedding_blocks_a_norm_and_a_head():
    """That their numbers are those of Llama is in tests/test_model.py."""
    config = ModelConfig(**CONFIG, vocab_size=VOCAB, n_layers=2, tie_embeddings=False)
    model, ids = ModernDecoderLM(config), torch.randint(VOCAB, (B, T))
    weights = model.state_dict()
    x = F.embedding(ids, weights["model.embed_tokens.weight"])
    for i in range(2):
        block = Block(config)
        x = loaded(block, **{name: weights[f"model.layers.{i}.{name}"] for name in block.state_dict()})(x)
    expected = rms_norm(x, weights["model.norm.weight"], 1e-5) @ weights["lm_head.weight"].T
    assert close(model(ids), expected)


# -----------------------------------------------------------------------------
# Training; that AdamW is torch's is in tests/test_train.py


@pytest.mark.parametrize("max_norm", [1e-2, 1e3])
def test_clipped_gradients_are_torchs_and_changed_in_place(max_norm):
    ours, theirs = ([torch.nn.Parameter(random(5, n)) for n in (3, 4, 5)] for _ in range(2))
    for p in (*ours[:2], *theirs[:2]):  # the third has no gradient
        p.grad = random(*p.shape, scale=3.0)
    before = ours[0].grad
    clip_gradients(iter(ours), max_norm)
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert ours[0].grad is before and ours[2].grad is None
    assert all(close(p.grad, q.grad) for p, q in zip(ours[:2], theirs[:2], strict=True))


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    for it in range(30):
        cosine = 0.1 + 0.5 * (1 + math.cos(math.pi * (it - 7) / (21 - 7))) * 0.9
        expected = it / 7 if it < 7 else cosine if it <= 21 else 0.1
        assert get_lr(it, 1.0, 0.1, 7, 21) == pytest.approx(expected)


def test_batches_are_windows_from_everywhere():
    data, starts = np.arange(100), set()
    for _ in range(200):
        x, y = get_batch(data, 32, 7, "cpu")
        assert x.shape == y.shape == (32, 7) and x.dtype == y.dtype == torch.long
        assert torch.equal(x + 1, y) and torch.equal(x, x[:, :1] + torch.arange(7))
        starts |= set(x[:, 0].tolist())
    assert starts == set(range(93))  # the last target is the last token
    with pytest.raises((RuntimeError, AssertionError)):
        get_batch(data, 32, 7, "cuda:99")


def trained(steps: int) -> tuple:
    torch.manual_seed(2)
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.3, 2.0]])
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - torch.eye(2)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["path", "text", "file"])
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(kind, tmp_path):
    model, optimizer = trained(5)
    place = {"path": tmp_path / "x.pt", "text": str(tmp_path / "x.pt"), "file": io.BytesIO()}[kind]
    save_checkpoint(model, optimizer, 5, place)
    if kind == "file":
        place.seek(0)
    again, optimizer_again = trained(1)
    assert load_checkpoint(place, again, optimizer_again) == 5
    train(model, optimizer, 3)
    train(again, optimizer_again, 3)
    assert torch.equal(model.weight, again.weight)


class Code:
    def __reduce__(self):
        return print, ("code has run",)


def test_code_in_a_checkpoint_is_refused(tmp_path, capsys):
    torch.save({"model": Code(), "optimizer": {}, "iteration": 1}, tmp_path / "x.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path / "x.pt", *trained(1))
    assert "code has run" not in capsys.readouterr().out


# -----------------------------------------------------------------------------
# The tokenizer: tests/test_tokenizer.py has more of it

TEXT = """low low low lower lowest newer newer newer wider 12 don't
<|endoftext|>the low newer lowest wide <3 é 東京
"""


def test_bpe_is_learnt_from_a_file_and_applied(tmp_path):
    file, special = tmp_path / "corpus.txt", "<|endoftext|>"
    file.write_text(TEXT, encoding="utf-8")
    vocab, merges = train_bpe(file, 285, [special])
    assert len(vocab) == 285 and len(merges) == 28 and merges[0] == (b"w", b"e")
    tokenizer = Tokenizer(vocab, merges, [special])
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and tokenizer.special_ids[special] in ids
    assert list(tokenizer.encode_iterable(io.StringIO(TEXT))) == ids
