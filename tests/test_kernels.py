"""The faster functions and caches of support/ against the plain ones of model.py."""

import contextlib
import itertools
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from small_models import PROMPTS, VARIANTS, close, feed, make, needs_card, tiny, tokens, variants
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model import KVCache, ModernDecoderLM, apply_rope, attention, attention_mask, linear_attention
from support import kernels
from support.caches import RollingCache, SharedPromptCache
from support.kernels import (
    AttentionInBlocks,
    ChunkedCrossEntropy,
    causal_linear_attention,
    fastest_products,
    float32_products,
    one_query,
    one_row_linear,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fast():
    """Installed, as in all scripts; what a test wants from the plain functions it gets within `plainly()`."""
    kernels.install()
    yield
    kernels.install(False)


@contextlib.contextmanager
def plainly():
    kernels.install(False)
    try:
        yield
    finally:
        kernels.install()


def some(*names: str):
    return pytest.mark.parametrize("changes", [VARIANTS[name] for name in names], ids=names)


def loss_and_gradients(net, model, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    targets = ids.roll(-1, 1).masked_fill(ids % 5 == 0, -100)
    model.zero_grad()
    loss, count = net(ids, targets)
    (loss / count).backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_nearly(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6, name


# -----------------------------------------------------------------------------
# The whole model: fast equals plain


@variants
def test_loss_gradients_and_logits_are_the_plain_ones(changes):
    ours, ids = make(**changes | {"dropout": 0.0}).train(), tokens(3, 40 if "positions" in changes else 70)
    loss, gradients = loss_and_gradients(ours, ours, ids)
    logits = ours(ids)
    with plainly():
        plain_loss, plain_gradients = loss_and_gradients(ours, ours, ids)
        assert close(logits, ours(ids), 1e-3)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert_nearly(gradients, plain_gradients, 1e-3)


@pytest.mark.gpu
@needs_card
def test_a_card_computes_the_same_loss_and_gradients_compiled_and_not():
    ours, ids = make(n_kv_heads=2).cuda(), tokens(4, 12).cuda()
    loss, gradients = loss_and_gradients(ours, ours, ids)
    compiled_loss, compiled_gradients = loss_and_gradients(torch.compile(ours), ours, ids)
    assert compiled_loss == pytest.approx(loss, rel=1e-3)
    assert_nearly(compiled_gradients, gradients, 3e-3)


@pytest.mark.parametrize("dtype, masked, grouped", [
    (torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False),
])  # fmt: skip
def test_on_a_card_key_heads_are_shared_only_by_kernels_that_keep_no_scores(
    dtype, masked, grouped, monkeypatch
):
    """Flash attention shares them, and takes no mask and no float32; efficient attention takes both."""
    asked = []

    def remember(q, k, v, mask, *_, enable_gqa):
        asked.append((q.shape[1] != k.shape[1], enable_gqa))
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", remember)
    with FakeTensorMode():
        q, k = (torch.empty(2, heads, 8, 16, dtype=dtype, device="cuda") for heads in (4, 2))
        mask = torch.empty(2, 1, 8, 8, dtype=torch.bool, device="cuda") if masked else None
        assert kernels.attend(q, k, k, mask).shape == q.shape
    assert asked == [(grouped, grouped)]


def test_a_recorded_function_is_not_kept():
    """It is a method of the decoder that owns it, and would keep the decoder's cache on the card."""

    def function(x):
        return x + 1

    assert kernels.Recorded()(function, torch.ones(1)) == 2
    kept = weakref.ref(function)
    del function
    assert kept() is None


GENERATION = [
    {"temperature": 0},
    {"seed": 3, "n": 3, "top_p": 0.9},
    {"seed": 1, "n": 20, "stop_tokens": list(range(0, 61, 4))},
    {"repetition_penalty": 1.5, "temperature": 0, "n": 2},
    {"window": 4, "keep": 1, "seed": 2},
]


@pytest.mark.parametrize("record", [False, True])
@some("gqa", "mistral", "qwen3", "mixtral", "sinks", "sparse", "linear", "gpt2")
def test_generated_tokens_are_the_plain_ones(changes, record, monkeypatch):
    """With `record`: steps of fixed shapes, as a GPU records them."""
    ours = make(**changes)
    monkeypatch.setattr(kernels, "can_record", lambda device: record)
    for options in GENERATION:
        found = ours.generate(PROMPTS, 9, **options)
        with plainly():
            assert found == ours.generate(PROMPTS, 9, **options), options


@pytest.mark.gpu
@needs_card
@some("gqa", "mistral", "learned")
def test_a_gpu_decodes_the_tokens_of_a_cpu_recorded_and_not(changes):
    ours = make(**changes).cuda()
    for options in GENERATION[:3]:
        found = ours.generate(PROMPTS, 7, **options)
        with plainly():
            assert found == ours.generate(PROMPTS, 7, **options)
    assert make(**changes).generate(PROMPTS, 7, temperature=0) == ours.generate(PROMPTS, 7, temperature=0)


@pytest.mark.skipif(not os.environ.get("RUN_SLOW"), reason="compiles for about a minute; RUN_SLOW=1 runs it")
@some("gqa", "mistral", "learned", "mixtral", "linear")
def test_compiled_decoding_gives_the_same_tokens(changes):
    ours = make(**changes)
    for options in GENERATION:
        assert ours.generate(PROMPTS, 9, compile=True, **options) == ours.generate(PROMPTS, 9, **options)


@some("biases", "mixtral")
def test_a_decoding_copy_is_cast_once_and_leaves_the_model_alone(changes):
    ours, ids = make(**changes), tokens(2, 9)
    saved = {name: p.clone() for name, p in ours.state_dict().items()}
    with torch.no_grad():
        assert close(kernels.decoding_copy(ours, compiled=True)(ids), ours(ids), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        twin = kernels.decoding_copy(ours, compiled=True)
    for key, p in twin.state_dict().items():  # but for the router
        assert p.dtype == (torch.float32 if ".gate." in key else torch.bfloat16)
        assert torch.allclose(p.float(), saved[key], rtol=1e-2)
    assert all(torch.equal(p, saved[name]) for name, p in ours.state_dict().items())


def rounded(weight: Tensor) -> Tensor:
    """Each row in whole numbers from -127 to 127 times a scale that bfloat16 can hold."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().double()
    return ((weight / scale).round().clip(-127, 127) * scale).float()


@some("biases", "gpt2, untied", "mixtral")
def test_8_bit_weights_compute_what_rounded_weights_do(changes):
    ours, reference = make(**changes), make(**changes)
    embedding = reference.model["embed_tokens"].weight.clone()
    with torch.no_grad():
        for name, layer in reference.named_modules():
            suits = isinstance(layer, torch.nn.Linear) and layer.in_features % 16 == 0
            if suits and not name.endswith(".gate"):
                layer.weight.copy_(rounded(layer.weight))
        reference.lm_head = torch.nn.Linear(1, 1, bias=False)
        reference.lm_head.weight = torch.nn.Parameter(rounded(make(**changes).head))
    kernels.to_int8(ours)
    assert torch.equal(ours.model["embed_tokens"].weight, embedding)
    many, few = tokens(3, 9), tokens(1, 7)
    with torch.no_grad():
        assert close(ours(many), reference(many), 1e-3)  # more than 16 rows: converted weights
        apart = ours(few) - reference(few)  # activations are rounded to bfloat16 here
        if not ours.config.moe_layers:  # which may choose other experts
            assert 0 < apart.std() < 0.03 * reference(few).std()
    assert len(ours.generate(PROMPTS, 9)[0]) == 9


def test_layers_that_torch_cannot_read_in_8_bits_stay_as_they_are():
    ours = make(d_model=36, n_heads=2, head_dim=16)
    kernels.to_int8(ours)
    assert len(ours.generate(PROMPTS, 5)[0]) == 5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_card])])
@some("llama", "gpt2, untied", "sinks", "mixtral")
def test_autocast_keeps_the_residual_stream_in_bfloat16_on_a_card_and_nearly_the_loss(changes, device):
    ids, kept = tokens(4, 24).to(device), torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    ours, stream = ModernDecoderLM(tiny(**changes)).to(device).train(), []
    with torch.no_grad():
        ours.model["embed_tokens"].weight.mul_(20)
    exact, _ = ours(ids[:, :-1], ids[:, 1:])
    for block in ours.model["layers"]:
        block.register_forward_hook(lambda _m, _i, out: stream.append(out.dtype))
    with torch.autocast(device, torch.bfloat16):
        rounded, _ = ours(ids[:, :-1], ids[:, 1:])
    assert set(stream) == {kept} and rounded.dtype == torch.float32
    assert abs(rounded.item() / exact.item() - 1) < 0.01
    rounded.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


# -----------------------------------------------------------------------------
# Attention and matrix products


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("shape", [None, (11, 11), (2, 1, 11, 11)])
def test_attention_in_blocks_equals_the_plain_path_with_its_gradients(heads, kv_heads, shape):
    q, k, v = (torch.randn(2, n, 11, 8, dtype=torch.double) for n in (heads, kv_heads, kv_heads))
    mask = (torch.rand(shape) < 0.5).tril() if shape else None
    if shape:
        mask[..., 4, :] = False  # a query that may see nothing
    repeated = [t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v)]
    plain = attention(q, *repeated, mask if shape else torch.ones(11, 11).tril().bool())
    given = [t.mT.contiguous().mT.requires_grad_() for t in (q, k, v)]  # not contiguous, as in layers
    for block in (1, 4, 64):
        assert close(AttentionInBlocks.apply(*given, mask, block), plain, 1e-6)
    assert torch.autograd.gradcheck(lambda *qkv: AttentionInBlocks.apply(*qkv, mask, 4), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_in_few_passes_equals_the_plain_one_with_its_gradients(dtype):
    x, grad = torch.randn(2, 2, 3, 16).to(dtype)
    weight, found = torch.rand(16).to(dtype), []
    for norm in (kernels.rms_norm, kernels.PLAIN["rms_norm"]):
        given = [t.clone().requires_grad_() for t in (x, weight)]
        y = norm(*given, 1e-3)
        y.backward(grad)
        found.append([y, *(t.grad for t in given)])
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype == dtype
        assert close(ours, plain, 1e-6 if dtype == torch.float32 else 3e-2)
    with torch.autocast("cpu", torch.bfloat16):  # the dtype that a layer behind it wants
        assert torch.equal(kernels.rms_norm(*given, 1e-3), y.bfloat16())


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: torch.compile(f, backend="eager")])
def test_one_query_and_one_row_equal_torchs_compiled_or_not(wrap):
    """Compiled: the branches that compilers take."""
    for G, mask in itertools.product((1, 3), (None, torch.tensor([[True, False, True, True]]))):
        q, k, v = torch.randn(2, 5, G, 8), torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4, 8)
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        assert close(wrap(one_query)(q, k, v, mask), expected, 1e-6)
    weight = torch.randn(7, 16)
    for x in (torch.randn(16), torch.randn(1, 1, 16), torch.randn(2, 1, 16)):
        for w in (weight, weight.T.contiguous().T):
            assert close(wrap(one_row_linear)(x, w), F.linear(x, w), 1e-5)


def test_the_fastest_products_of_this_cpu_are_those_of_float32_and_set_for_a_while():
    a, b = torch.randn(300, 400), torch.randn(400, 300)
    exact, before = a.double() @ b.double(), torch.get_float32_matmul_precision()
    with float32_products(fastest_products(torch.device("cpu"))):
        assert (a @ b - exact).abs().max() < 2e-4  # bfloat16 would be off by 0.2
    assert torch.get_float32_matmul_precision() == before


def linear_attention_by_recurrence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Katharopoulos et al., 2020, eq. 16 to 20: a state of D x D numbers that each token adds to."""
    state, total, out = torch.zeros(k.shape[-1], v.shape[-1]), torch.zeros(k.shape[-1]), []
    for query, key, value in zip(F.elu(q) + 1, F.elu(k) + 1, v, strict=True):
        state = state + torch.outer(key, value)
        total = total + key
        out.append(query @ state / (query @ total))
    return torch.stack(out)


@pytest.mark.parametrize("T", [1, 64, 150])
def test_linear_attention_in_chunks_behind_a_mask_and_by_recurrence_is_the_same(T):
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(T, 8, generator=generator).requires_grad_() for _ in range(3))
    causal = attention_mask(torch.arange(T), torch.arange(T))
    expected = linear_attention_by_recurrence(q, k, v)
    masked, weights = linear_attention(q, k, v, causal, weights=True)
    assert close(weights.sum(-1), torch.ones(T), 1e-5) and (weights[~causal] == 0).all()
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for found in (causal_linear_attention(q, k, v), masked):
        assert close(found, expected, 1e-5)
        for a, b in zip(torch.autograd.grad(found.square().sum(), (q, k, v)), gradients, strict=True):
            assert close(a, b, 1e-4)
    q = torch.full((1, T, 8), -100.0)  # features that round to zero
    assert not causal_linear_attention(q, k[None], v[None]).any() and not linear_attention(q, k, v).any()


# -----------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("chunk", [5, 12, 100])
@pytest.mark.parametrize("ignored", [[], [0, 3, 4, 11], slice(None)], ids=str)
def test_chunked_cross_entropy_and_its_gradients_equal_torchs(chunk, ignored):
    given = torch.randn(12, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    targets = torch.randint(31, (12,))
    targets[ignored] = -100
    ours = ChunkedCrossEntropy.apply(*given, targets, chunk)
    torchs = F.cross_entropy(given[0] @ given[1].T, targets, reduction="sum")
    assert torch.allclose(ours, torchs, rtol=1e-5)
    gradients = [torch.autograd.grad(0.3 * loss, given) for loss in (ours, torchs)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_evaluation_computes_no_gradients_of_the_head(monkeypatch):
    ours, ids, needed = make(), tokens(2, 12), []

    def spy(ctx, *args, forward=ChunkedCrossEntropy.forward):
        needed.append(ctx.needs_input_grad[:2])
        return forward(ctx, *args)

    monkeypatch.setattr(ChunkedCrossEntropy, "forward", staticmethod(spy))
    with torch.no_grad():
        ours(ids[:, :-1], ids[:, 1:])
    assert needed == [(False, False)]


# -----------------------------------------------------------------------------
# Caches


@some("gqa", "learned")
def test_rows_that_share_a_prompt_see_what_they_would_see_alone(changes):
    """Prompts of 5 and 3 tokens, two rows each; then one row of the first, and two of the second."""
    ours, ids = make(**changes), tokens(4, 9)
    ids[1, :5], ids[3, :3] = ids[0, :5], ids[2, :3]
    full = ours(ids)
    cache = KVCache(ours.config, 2, 5)
    feed(ours, cache, ids[[0, 2], :5], [5], torch.tensor([5, 3]))
    fork, begins = SharedPromptCache(cache, 2), torch.tensor([5, 5, 3, 3])
    for t in range(4):
        rows, at = torch.arange(len(ids)), begins + t
        logits = feed(ours, fork, ids[rows, at].unsqueeze(1), [1])[:, 0]
        assert close(logits, full[rows, at], 2e-5)
        if t in (1, 2):
            order = torch.tensor([1, 2, 3] if t == 1 else [2])
            fork.select(order)
            ids, full, begins = ids[order], full[order], begins[order]


@torch.no_grad()
def rolled_reference(model, text: list[int], slots: int, keep: int) -> Tensor:
    """StreamingLLM: logits (T, V) of a pre-norm model that reads token by token and forgets all but `slots`
    of them. It keeps a list of unrotated keys, and counts positions inside the list.
    """
    c, logits = model.config, []
    linear = c.attention_kind == "linear"
    kept = [[] for _ in range(c.n_layers)]  # per layer: (key (K, 1, D), value (K, 1, D)), oldest first
    for token in text:
        x = model.model["embed_tokens"].weight[token]
        for block, memory in zip(model.model["layers"], kept, strict=True):
            a = block.self_attn
            h = block.input_layernorm(x)
            q, k, v = (f(h).view(-1, 1, c.head_dim) for f in (a.q_proj, a.k_proj, a.v_proj))
            if c.qk_norm:
                q, k = a.q_norm(q), a.k_norm(k)
            memory.append((k, v))
            if len(memory) > slots:
                del memory[keep]
            keys, values = (torch.cat(some, dim=1) for some in zip(*memory, strict=True))
            places = torch.arange(len(memory))
            if c.positions == "rope":
                q, keys = apply_rope(q, places[-1:], c.rope_theta), apply_rope(keys, places, c.rope_theta)
            mask = attention_mask(places[-1:], places, 0, c.sparse_stride)
            sinks = a.sinks.unsqueeze(1) if c.n_sinks else None
            given = q[None], keys[None], values[None]
            x = x + a.o_proj(kernels.PLAIN["attend"](*given, mask, sinks, linear=linear).flatten())
            x = x + block.mlp(block.post_attention_layernorm(x))
        logits.append(model.head @ model.model["norm"](x))
    return torch.stack(logits)


@pytest.mark.parametrize("keep", [0, 4])
@some("gqa", "qwen3", "no positions", "sinks", "top-1", "sparse", "linear")
def test_a_rolled_cache_equals_the_list_of_kept_tokens(changes, keep):
    ours, ids, slots = make(**changes), tokens(2, 30), 9
    expected = torch.stack([rolled_reference(ours, row.tolist(), slots, keep) for row in ids])
    assert close(ours(ids[:, :slots]), expected[:, :slots], 5e-5), "not rolled yet: full attention"
    assert not close(ours(ids)[:, slots:], expected[:, slots:], 1e-2)
    for chunks in ([9] + [1] * 21, [5] + [1] * 25):
        cache = RollingCache(ours.config, 2, slots, keep=keep)
        assert close(feed(ours, cache, ids, chunks), expected, 5e-5), chunks


@pytest.mark.parametrize("window, keep, slots", [(6, 2, 8), (0, 4, 16)])
def test_generation_rolls_when_asked_and_when_the_context_ends(window, keep, slots):
    """Each row at its own time: prompts shorter than, as long as and longer than the cache."""
    ours = make(context_length=16, n_kv_heads=2)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, slots, 21)]
    texts = ours.generate(prompts, 25, temperature=0, window=window, keep=keep)
    for prompt, new in zip(prompts, texts, strict=True):
        expected = rolled_reference(ours, prompt + new, slots, keep).argmax(-1)
        assert new == expected[len(prompt) - 1 : -1].tolist()


def test_impossible_rolling_caches_are_refused():
    for config, keep in ((tiny(), 5), (tiny(positions="learned"), 1)):
        with pytest.raises(ValueError, match="must remain|cannot roll"):
            RollingCache(config, 1, 5, keep=keep)
    rolling = RollingCache(tiny(), 1, 5, keep=1)
    rolling.begin(3)
    with pytest.raises(ValueError, match="one token at a time"):
        rolling.begin(2)
