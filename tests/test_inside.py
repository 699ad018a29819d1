"""Look inside: sums are exact, probabilities are the model's, and a head that is switched off is off."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import ModelConfig, ModernDecoderLM
from support.inside import contributions, logit_lens, look_inside, trace, without_heads
from support.loading import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "llama": {},
    "gpt2": dict(norm="layer", positions="learned", ffn="gelu", bias=True),
    "qwen3": dict(qk_norm=True, head_dim=24, tie_embeddings=False),
    "experts": dict(ffn="moe", n_experts=4, moe_every=2),
    "sinks": dict(n_sinks=2, sliding_window=5),
    "linear": dict(attention_kind="linear"),
    "no norm": dict(norm="none"),
}


def small(**more) -> ModernDecoderLM:
    torch.manual_seed(3)
    c = ModelConfig(vocab_size=96, context_length=24, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, **more)
    model = ModernDecoderLM(c).eval()
    with torch.no_grad():  # far from the small values of a fresh model
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_the_parts_of_a_logit_sum_to_it_and_the_last_lens_is_the_model(shape):
    model = small(**SHAPES[shape])
    ids = torch.randint(96, (12,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids[None])[0]
    for position, target in ((0, 5), (11, 90)):
        found = trace(model, ids.tolist(), position)
        assert torch.allclose(found.logits, expected, atol=1e-4)
        assert torch.allclose(logit_lens(model, found)[-1], expected[position], atol=1e-4)
        parts = contributions(model, found, target)
        total = math.fsum(p["value"] for p in parts)
        assert total == pytest.approx(float(expected[position, target]), abs=2e-4)


def test_post_norm_is_no_sum_and_says_so():
    model = small(norm_position="post")
    with pytest.raises(ValueError, match="post-norm"):
        contributions(model, trace(model, [0, 1, 2, 3, 4], 2), 1)


def test_a_head_that_is_off_adds_nothing_and_the_model_itself_stays():
    model, ids = small(), torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids)
        off = without_heads(model, [(1, 2)])
        parts = contributions(off, trace(off, ids[0].tolist(), 8), 3)
        assert [part["name"] for part in parts if part["value"] == 0] == ["L1 H2"]
        assert not torch.equal(off(ids), before) and torch.equal(model(ids), before)
        off = without_heads(model, [(layer, head) for layer in range(2) for head in range(4)])(ids)
        for block in model.model["layers"]:
            block.self_attn.o_proj.weight.zero_()
        assert torch.allclose(off, model(ids), atol=1e-6)


def test_surprise_is_the_cross_entropy_of_each_token_also_by_transformers(tiny):
    model = load_model(tiny["gpt2"], torch.device("cpu"))
    theirs = load_model(tiny["gpt2"], torch.device("cpu"), backend="transformers")
    ids = [model.eos, *model.encode("Anna has 3 nuts. She buys 4 more nuts.")]
    logits = model.model(torch.tensor([ids]))[0].detach()
    nats = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    for one in (model, theirs):
        found = look_inside(one, ids, position=5)
        assert found["surprise"][0] is None
        for said, true in zip(found["surprise"][1:], nats.tolist(), strict=True):
            assert said["bits"] * math.log(2) == pytest.approx(true, abs=1e-3)
            assert (said["rank"] == 1) == (said["top"][0][1] <= said["p"] + 1e-7)
        assert found["next"][0]["p"] == pytest.approx(float(logits[5].softmax(-1).max()), abs=1e-4)
    assert found["lens"] is found["parts"] is None
    with pytest.raises(ValueError, match="model.py"):
        look_inside(theirs, ids, off=[(0, 0)])


@pytest.mark.parametrize("wrong", [{"position": 99}, {"position": -2}, {"target": 400}, {"off": [(9, 0)]}])
def test_what_does_not_exist_is_refused(tiny, wrong):
    with pytest.raises(ValueError):
        look_inside(load_model(tiny["base"], torch.device("cpu")), [1, 2, 3], **wrong)
