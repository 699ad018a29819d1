"""The faster functions and caches of support/ against the plain ones of model.py."""

import contextlib
import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    GPT,
    MOE,
    PROMPTS,
    VARIANTS,
    close,
    feed,
    greedy,
    make,
    needs_card,
    tiny,
    tokens,
    until,
    variants,
)
from torch import Tensor

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


# -----------------------------------------------------------------------------
# The whole model: fast equals plain


@variants
def test_loss_gradients_and_logits_are_the_plain_ones(changes):
    ours, ids = (
        make(**changes | {"dropout": 0.0}).train(),
        tokens(3, 70 if "positions" not in changes else 40),
    )
    targets = ids.roll(-1, 1).masked_fill(ids % 5 == 0, -100)
    found = []
    for context in (contextlib.nullcontext, plainly):
        ours.zero_grad()
        with context():
            loss, count = ours(ids, targets)
            (loss / count).backward()
            found.append(
                (loss.item(), ours(ids).detach(), {k: p.grad.clone() for k, p in ours.named_parameters()})
            )
    (loss, logits, gradients), (plain_loss, plain_logits, plain_gradients) = found
    assert loss == pytest.approx(plain_loss, rel=1e-5) and close(logits, plain_logits, 1e-3)
    for name, gradient in plain_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


GENERATION = [
    {"temperature": 0},
    {"seed": 3, "n": 3, "top_p": 0.9},
    {"seed": 1, "n": 20, "stop_tokens": list(range(0, 61, 4))},
    {"repetition_penalty": 1.5, "temperature": 0, "n": 2},
    {"window": 4, "keep": 1, "seed": 2},
]


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(
    "name", ["gqa", "mistral", "learned", "qwen3", "mixtral", "sinks", "sparse", "linear", "gpt2"]
)
def test_generated_tokens_are_the_plain_ones(name, record, monkeypatch):
    """With `record`: steps of fixed shapes, as a GPU records them."""
    ours = make(**VARIANTS[name])
    monkeypatch.setattr(kernels, "can_record", lambda device: record)
    for options in GENERATION:
        if "window" in options and ours.config.positions == "learned":
            continue
        found = ours.generate(PROMPTS, 9, **options)
        with plainly():
            assert found == ours.generate(PROMPTS, 9, **options), options


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("name", ["gqa", "mistral", "learned"])
def test_a_gpu_decodes_the_tokens_of_a_cpu_recorded_and_not(name, monkeypatch):
    ours = make(**VARIANTS[name]).cuda()
    for options in GENERATION[:3]:
        found = ours.generate(PROMPTS, 7, **options)
        with plainly():
            assert found == ours.generate(PROMPTS, 7, **options)
    assert make(**VARIANTS[name]).generate(PROMPTS, 7, temperature=0) == ours.generate(
        PROMPTS, 7, temperature=0
    )


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 2, "bias": True}, {"norm": "layer", "ffn": "gelu"}, MOE]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_decoding_copy_computes_the_same_and_leaves_the_model_alone(changes, compiled):
    ours, ids = make(**changes), tokens(2, 9)
    saved = {name: p.clone() for name, p in ours.state_dict().items()}
    with torch.no_grad():
        assert close(kernels.decoding_copy(ours, compiled)(ids), ours(ids), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        twin = kernels.decoding_copy(ours, compiled)
    for key, p in twin.state_dict().items():  # cast once, but for the router
        assert p.dtype == (torch.float32 if ".gate." in key else torch.bfloat16)
        assert torch.allclose(p.float(), saved[key], rtol=1e-2)
    assert all(torch.equal(p, saved[name]) for name, p in ours.state_dict().items())


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_no_gradients_of_the_head(no_gradients, monkeypatch):
    ours, ids, asked = make(), tokens(2, 12), []
    forward = ChunkedCrossEntropy.forward

    def spy(ctx, *args):
        asked.append(ctx.needs_input_grad[:2])
        return forward(ctx, *args)

    monkeypatch.setattr(ChunkedCrossEntropy, "forward", staticmethod(spy))
    with no_gradients():
        ours(ids[:, :-1], ids[:, 1:])
    assert asked == [(False, False)]


def test_as_many_rows_of_each_prompt_go_on():
    prompts = KVCache(make().config, 3, 4)
    prompts.begin(2)
    cache = SharedPromptCache(prompts, 2, 4)
    assert cache.as_many_of_each([1, 4, 5]) == [1, 0, 4, 5]
    assert cache.as_many_of_each([2]) == [2]


def test_impossible_rolling_caches_are_refused():
    ours = make()
    with pytest.raises(ValueError, match="a window must remain"):
        RollingCache(ours.config, 1, 5, keep=5)
    with pytest.raises(ValueError, match="learned positions cannot roll"):
        RollingCache(make(positions="learned").config, 1, 5, keep=1)
    rolling = RollingCache(ours.config, 1, 5, keep=1)
    feed(ours, rolling, tokens(1, 6), [3])
    with pytest.raises(ValueError, match="one token at a time"):
        rolling.begin(2)


# -----------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_card])])
def test_autocast_keeps_the_residual_stream_in_bfloat16_on_a_card_and_nearly_the_loss(device):
    ids, kept = tokens(4, 24).to(device), torch.bfloat16 if device == "cuda" else torch.float32
    for changes in ({}, {"norm": "layer"}, {"qk_norm": True, "n_kv_heads": 2}, {"n_sinks": 1}, GPT, MOE):
        torch.manual_seed(0)
        ours, stream = ModernDecoderLM(tiny(**changes)).to(device).train(), []
        with torch.no_grad():
            ours.model["embed_tokens"].weight.mul_(20)
        for block in ours.model["layers"]:
            block.register_forward_hook(lambda _m, _i, out, seen=stream: seen.append(out.dtype))
        exact, n = ours(ids[:, :-1], ids[:, 1:])
        stream.clear()
        with torch.autocast(device, torch.bfloat16):
            rounded, _ = ours(ids[:, :-1], ids[:, 1:])
            assert ours.hidden(ids).dtype == kept
        assert set(stream) == {kept} and rounded.dtype == torch.float32
        assert abs(rounded.item() / exact.item() - 1) < 0.01, changes
        rounded.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("masked", [None, "one for all", "per row"])
def test_attention_in_blocks_equals_the_plain_path_with_its_gradients(heads, kv_heads, masked):
    T, shape = 11, {None: None, "one for all": (11, 11), "per row": (2, 1, 11, 11)}[masked]
    q, k, v = (torch.randn(2, n, T, 8, dtype=torch.double) for n in (heads, kv_heads, kv_heads))
    mask = torch.rand(shape) < 0.5 if shape else None
    if mask is not None:
        mask[..., 4, :] = False  # a query that may see nothing
    repeated = [t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v)]
    plain = attention(q, *repeated, torch.ones(T, T).tril().bool() if mask is None else mask)
    given = [
        t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k, v)
    ]  # as layers do
    for block in (1, 4, 11, 64):
        assert close(AttentionInBlocks.apply(*given, mask, block), plain, 1e-6)
    assert torch.autograd.gradcheck(lambda *qkv: AttentionInBlocks.apply(*qkv, mask, 4), given)


def test_one_query_equals_torchs_compiled_or_not():
    for G, mask in itertools.product((1, 3), (None, torch.tensor([[True, False, True, True]]))):
        q, k, v = torch.randn(2, 5, G, 8), torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4, 8)
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        assert close(one_query(q, k, v, mask), expected, 1e-6)
        compiled = torch.compile(one_query, backend="eager")  # the branch that compilers take
        assert close(compiled(q, k, v, mask), expected, 1e-6)


def test_one_row_times_weights_equals_torchs_compiled_or_not():
    weight, compiled = torch.randn(7, 16), torch.compile(one_row_linear, backend="eager")
    for x in (torch.randn(16), torch.randn(1, 16), torch.randn(1, 1, 16), torch.randn(2, 1, 16)):
        for w in (weight, weight.T.contiguous().T):
            assert close(compiled(x, w), F.linear(x, w), 1e-5) and compiled(x, w).shape == (*x.shape[:-1], 7)


@pytest.mark.parametrize(
    "vendor, capability, amx, slow",
    [("AuthenticAMD", "AVX512", False, True), ("AuthenticAMD", "AVX2", False, False),
     ("GenuineIntel", "AVX512", False, False), ("AuthenticAMD", "AVX512", True, False)],
)  # fmt: skip
def test_mkl_is_slow_on_amd_and_onednn_exact_without_amx(monkeypatch, vendor, capability, amx, slow):
    monkeypatch.setattr(kernels.Path, "read_text", lambda self: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert kernels.mkl_is_slow.__wrapped__() is slow


def test_the_fastest_products_of_this_cpu_are_those_of_float32():
    a, b = torch.randn(300, 400), torch.randn(400, 300)
    exact = a.double() @ b.double()
    with float32_products(fastest_products(torch.device("cpu"))):
        assert (a @ b - exact).abs().max() < 2e-4  # bfloat16 would be off by 0.2
    assert (a.bfloat16().float() @ b.bfloat16().float() - exact).abs().max() > 2e-2


def test_float32_products_are_set_for_a_while():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), float32_products("highest" if before != "highest" else "high"):
        assert torch.get_float32_matmul_precision() != before
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == before


def linear_attention_by_recurrence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Katharopoulos et al., 2020, eq. 16 to 20: a state of D x D numbers that each token adds to."""
    state, total, out = torch.zeros(k.shape[-1], v.shape[-1]), torch.zeros(k.shape[-1]), []
    for query, key, value in zip(F.elu(q) + 1, F.elu(k) + 1, v, strict=True):
        state = state + torch.outer(key, value)
        total = total + key
        out.append(query @ state / (query @ total))
    return torch.stack(out)


@pytest.mark.parametrize("T", [1, 5, 64, 65, 150])
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


def test_linear_attention_survives_features_that_round_to_zero():
    q, k, v = torch.full((1, 70, 4), -100.0), torch.randn(1, 70, 4), torch.randn(1, 70, 4)
    assert torch.equal(causal_linear_attention(q, k, v), torch.zeros(1, 70, 4))
    assert torch.equal(linear_attention(q, k, v), torch.zeros(1, 70, 4))


def test_the_time_of_linear_attention_grows_with_the_length_and_not_its_square():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(T: int) -> int:
        with FlopCounterMode(display=False) as counter:
            causal_linear_attention(*torch.randn(3, 1, 2, T, 16))
        return counter.get_total_flops()

    assert flops(2048) == 4 * flops(512)


def chunked(hidden, weight, targets, chunk, scale=1.0):
    """Loss and gradients of hidden and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


def reference(hidden, weight, targets, scale=1.0, function=None):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if function:
        loss = function(hidden, weight, targets, reduction="sum")
    else:
        loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 100])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_chunked_cross_entropy_and_its_gradients_equal_torchs(chunk, ignored):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(12, 8), torch.randn(31, 8), torch.randint(31, (12,))
    targets[{"none": [], "some": [0, 3, 4, 11], "all": slice(None)}[ignored]] = -100
    references = [None, getattr(F, "linear_cross_entropy", None)]
    for function in references[: 1 + (references[1] is not None)]:
        expected = reference(hidden, weight, targets, 0.3, function)
        for a, b in zip(chunked(hidden, weight, targets, chunk, 0.3), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_chunked_cross_entropy_has_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    targets = torch.tensor([3, -100, 8, 0, 3])
    _, grad_hidden, grad_weight = chunked(hidden, weight, targets, 2)
    loss = lambda: F.cross_entropy(hidden @ weight.T, targets, reduction="sum")  # noqa: E731
    for x, grad in ((hidden, grad_hidden), (weight, grad_weight)):
        for i in itertools.product(*map(range, x.shape)):
            x[i] += 1e-5
            above = loss()
            x[i] -= 2e-5
            slope = (above - loss()) / 2e-5
            x[i] += 1e-5
            assert abs(grad[i] - slope) < 1e-5  # logits pass through float32


@pytest.mark.parametrize("name", ["llama", "gqa", "learned", "qwen3"])
def test_rows_that_share_a_prompt_see_what_they_would_see_alone(name):
    """Prompts of 5 and 3 tokens, two rows each; then, of the second prompt first, one of each."""
    ours, ids = make(**VARIANTS[name]), tokens(4, 9)
    ids[1, :5], ids[3, :3] = ids[0, :5], ids[2, :3]
    with torch.no_grad():
        full = ours(ids)
    cache = KVCache(ours.config, 2, 5)
    feed(ours, cache, ids[[0, 2], :5], [5], torch.tensor([5, 3]))
    fork = SharedPromptCache(cache, 2, 4)
    begins = torch.tensor([5, 5, 3, 3])
    for t in range(4):
        rows, at = torch.arange(len(ids)), begins + t
        logits = feed(ours, fork, ids[rows, at].unsqueeze(1), [1])[:, 0]
        assert close(logits, full[rows, at], 2e-5)
        if t == 1:
            order = torch.tensor([3, 0])
            fork.select(order)
            ids, full, begins = ids[order], full[order], begins[order]


@torch.no_grad()
def rolled_reference(model, text: list[int], slots: int, keep: int) -> Tensor:
    """Logits (T, V) of a pre-norm model that reads token by token and forgets all but `slots` of them."""
    c, logits = model.config, []
    kept = [[] for _ in range(c.n_layers)]  # per layer: (key (K, D), value (K, D)), oldest first
    for token in text:
        x = model.model["embed_tokens"].weight[token]
        for block, memory in zip(model.model["layers"], kept, strict=True):
            a = block.self_attn
            h = block.input_layernorm(x)
            q, k, v = (f(h).view(-1, c.head_dim) for f in (a.q_proj, a.k_proj, a.v_proj))
            if c.qk_norm:
                q, k = a.q_norm(q), a.k_norm(k)
            memory.append((k, v))
            if len(memory) > slots:
                del memory[keep]
            here, heads = len(memory) - 1, []
            for i in range(c.n_heads):
                group = i * c.n_kv_heads // c.n_heads
                keys = torch.stack([k[group] for k, _ in memory])
                values = torch.stack([v[group] for _, v in memory])
                query = q[i : i + 1]
                if c.positions == "rope":
                    keys = apply_rope(keys, torch.arange(here + 1), c.rope_theta)
                    query = apply_rope(query, torch.tensor([here]), c.rope_theta)
                scores = (query @ keys.T / math.sqrt(c.head_dim))[0]
                if c.n_sinks:
                    scores = torch.cat([scores, a.sinks[i]])
                if c.sparse_stride:
                    seen = attention_mask(torch.tensor([here]), torch.arange(here + 1), 0, c.sparse_stride)[0]
                    scores = scores.masked_fill(~seen, -torch.inf)
                w = scores.softmax(-1)[: here + 1]
                if c.attention_kind == "linear":
                    w = (F.elu(query) + 1) @ (F.elu(keys) + 1).T
                    w = (w / w.sum())[0]
                heads.append(w @ values)
            x = x + a.o_proj(torch.cat(heads))
            x = x + block.mlp(block.post_attention_layernorm(x))
        logits.append(model.head @ model.model["norm"](x))
    return torch.stack(logits)


@pytest.mark.parametrize("keep", [0, 1, 4])
@pytest.mark.parametrize("name", ["gqa", "qwen3", "no positions", "sinks", "top-1", "sparse", "linear"])
def test_a_rolled_cache_equals_the_list_of_kept_tokens(name, keep):
    ours, ids, slots = make(**VARIANTS[name]), tokens(2, 30), 9
    expected = torch.stack([rolled_reference(ours, row.tolist(), slots, keep) for row in ids])
    with torch.no_grad():
        assert close(ours(ids[:, :slots]), expected[:, :slots], 5e-5), "not rolled yet: full attention"
        assert not close(ours(ids)[:, slots:], expected[:, slots:], 1e-2)
    for chunks in ([1] * 30, [9] + [1] * 21, [5] + [1] * 25):
        cache = RollingCache(ours.config, 2, slots, keep=keep)
        assert close(feed(ours, cache, ids, chunks), expected, 5e-5), chunks


@pytest.mark.parametrize("lengths", [(3, 9, 14), (20, 9, 2), (12, 15, 10), (4, 6, 5), (25, 25, 25)])
def test_ragged_rows_roll_each_at_its_own_time(lengths):
    """Prompts shorter than, as long as and longer than the cache of 9 slots, then 12 tokens one by one."""
    ours, slots, keep = make(n_kv_heads=2), 9, 2
    texts = [tokens(1, n + 12, seed=n + i)[0] for i, n in enumerate(lengths)]
    expected = [rolled_reference(ours, text.tolist(), slots, keep) for text in texts]
    cache = RollingCache(ours.config, 3, slots, keep=keep)
    with torch.no_grad():
        logits = ours.prefill([text[:n].tolist() for text, n in zip(texts, lengths, strict=True)], cache)
        for step in range(13):
            for row, n in enumerate(lengths):
                assert close(logits[row], expected[row][n - 1 + step], 5e-5), (row, step)
            if step < 12:
                cache.begin(1)
                new = [text[n + step] for text, n in zip(texts, lengths, strict=True)]
                logits = ours.step(torch.stack(new).unsqueeze(1), cache)


def test_generation_rolls_when_asked_and_when_the_context_ends():
    ours, prompt = make(context_length=16), tokens(1, 5)[0].tolist()
    text = list(prompt)
    for window, keep, slots in ((6, 2, 8), (0, 4, 16)):
        text = list(prompt)
        for _ in range(25):
            text.append(rolled_reference(ours, text, slots, keep)[-1].argmax().item())
        assert ours.generate([prompt], 25, temperature=0, window=window, keep=keep) == [text[5:]]
    assert ours.generate([prompt], 2, temperature=0, window=6, keep=2) == [greedy(ours, prompt, 2)]


def test_rows_of_a_prompt_that_end_at_different_times_leave_the_others_as_they_were():
    ours = make(n_kv_heads=2)
    free = ours.generate(PROMPTS, 24, n=8, seed=3)
    stops = {text[t] for t, text in zip((2, 5, 9, 14), free[::9], strict=False)}
    stopped = ours.generate(PROMPTS, 24, n=8, seed=3, stop_tokens=stops)
    assert stopped == [until(text, stops) for text in free]
    assert len({len(text) for text in stopped}) > 8


@pytest.mark.skipif(not os.environ.get("RUN_SLOW"), reason="compiles for about a minute; RUN_SLOW=1 runs it")
@pytest.mark.parametrize("name", ["gqa", "mistral", "learned", "mixtral", "linear"])
def test_compiled_decoding_gives_the_same_tokens(name):
    ours = make(**VARIANTS[name])
    for options in ({"temperature": 0}, {"seed": 3, "n": 2}, {"stop_tokens": [4, 5]}):
        assert ours.generate(PROMPTS, 10, compile=True, **options) == ours.generate(PROMPTS, 10, **options)
    if ours.config.positions == "rope":
        options = {"window": 6, "keep": 2, "temperature": 0}
        assert ours.generate(PROMPTS, 10, compile=True, **options) == ours.generate(PROMPTS, 10, **options)


@pytest.mark.gpu
@needs_card
def test_a_card_computes_the_same_loss_and_gradients_compiled_and_not():
    ours = make(n_kv_heads=2, n_layers=2).cuda()
    ids = tokens(4, 12).cuda()
    targets = ids.roll(-1, 1).masked_fill(ids % 5 == 0, -100)
    found = []
    for net in (ours, torch.compile(ours)):
        ours.zero_grad()
        loss, count = net(ids, targets)
        (loss / count).backward()
        found.append((loss.item(), {k: p.grad.clone() for k, p in ours.named_parameters()}))
    (plain, before), (compiled, after) = found
    assert compiled == pytest.approx(plain, rel=1e-3)
    for name, gradient in before.items():
        assert (after[name] - gradient).norm() < 3e-3 * gradient.norm(), name
