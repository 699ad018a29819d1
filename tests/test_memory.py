"""Memory: predicted bytes against the bytes of tensors that are alive, and what happens when it runs out."""

import math
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from small_models import GPT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification

from configs import parse_config
from lab.plan import ON_HUB
from model import KVCache, ModelConfig, ModernDecoderLM, sample
from support import kernels, memory, text_model
from support.caches import FixedCache
from support.costs import GIB, generation_bytes, likelihood_bytes, shape_of
from support.loading import load_model
from support.memory import DoesNotFit, control_group_bytes, halving, is_out_of_memory, rows_that_fit
from support.plan import planned_model
from support.text_model import target_logits
from train import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


# -----------------------------------------------------------------------------
# Counting: bytes of all storages that are alive


class LiveBytes(TorchDispatchMode):
    """Sums the storages that operations make, while they are alive. Tensors may be on the device "meta",
    which has shapes but no numbers: then the largest models cost nothing.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.known, self.live, self.peak = {}, 0, 0
        for t in [*model.parameters(), *model.buffers()]:
            self.add(t)
        self.weights = self.peak = self.live

    def add(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.known and self.known[key]() is storage:
            return

        def freed(_):
            self.live -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("item", "_local_scalar_dense", "is_nonzero") and args[0].is_meta:
            return False  # "are all rows finished?"
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t)
        return out

    def agrees_with(self, predicted: int) -> bool:
        """Whether the peak beside the weights was predicted."""
        return 0.95 <= predicted / (self.peak - self.weights) <= 1.25


@pytest.fixture(autouse=True)
def fast_functions():
    kernels.install()


# -----------------------------------------------------------------------------
# On a GPU of 12 GB: the real shapes of the speedrun, on "meta"

SPACE = 8 * GIB  # beside weights, context and what the allocator loses
SPEEDRUN = planned_model(parse_config(TrainConfig, "", ["configs/speedrun.py"]))
GPT2 = transformers.GPT2Config(pad_token_id=0)


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What flash and memory-efficient attention allocate on a GPU: the output, a log-sum-exp for every query
    in float32, and a boolean mask in the queries' dtype. ("meta" has only the plain path with all scores.)
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    sums = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return torch.empty_like(q) if sums.numel() else q


@pytest.fixture
def on_meta(monkeypatch):
    """on_meta(make): a model as on a GPU, in bfloat16."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(ModernDecoderLM, "dtype", property(lambda self: self.head.dtype))

    def make(model, config):
        with torch.device("meta"):
            return model(config).eval().bfloat16()

    return make


@pytest.mark.parametrize("config", [SPEEDRUN, ON_HUB["gpt2"]], ids=["speedrun", "gpt2"])
@pytest.mark.parametrize(("prompt", "new", "n"), [(153, 160, 16), (768, 256, 1)])
@torch.no_grad()
def test_a_batch_of_generation_is_predicted(on_meta, config, prompt, new, n):
    """The moments of `generate` that need most: a loop that asks for tokens needs numbers."""
    need = partial(generation_bytes, shape_of(config), prompt=prompt, new=new, n=n, sampled=n > 1)
    rows = rows_that_fit(need, 1024, SPACE)
    prompts = rows // n
    model = on_meta(ModernDecoderLM, config)
    with LiveBytes(model) as live:
        cache = KVCache(config, prompts, prompt + new + -(prompt + new) % 8, model.device, model.dtype)
        logits = model.prefill([[1] * prompt] * prompts, cache)
        if n > 1:
            cache.select(torch.arange(prompts).repeat_interleave(n))
            logits = logits.repeat_interleave(n, dim=0)
        uniforms = torch.empty(rows, new, device="meta")
        token = sample(logits, uniforms[:, 0], float(n > 1))
        cache = FixedCache(cache)
        for alive in (rows, rows // 2):
            for _ in range(2):
                cache.begin(1)
                logits = model.step(token.unsqueeze(1), cache)
                token = sample(logits, uniforms[:alive, 1], float(n > 1))
            cache.select(torch.arange(alive // 2))
            token = token[: alive // 2]
    assert live.agrees_with(need(rows)) and need(rows) <= SPACE


@pytest.mark.parametrize("kind", ["ours", "causal", "head"])
@torch.no_grad()
def test_a_batch_of_likelihoods_is_predicted(on_meta, kind):
    rows, length = 65, 500
    if kind == "ours":
        model, shape = on_meta(ModernDecoderLM, ON_HUB["gpt2"]), shape_of(ON_HUB["gpt2"])
    else:
        auto = transformers.AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
        model, shape = on_meta(auto.from_config, GPT2), shape_of(GPT2, kind)
    ids = torch.ones(rows, length, dtype=torch.long, device="meta")
    with LiveBytes(model) as live:
        logits = target_logits(model, shape.kind, ids, ids, ids)
        if kind != "head":
            F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
    assert live.agrees_with(likelihood_bytes(shape, rows, length))


# -----------------------------------------------------------------------------
# On a CPU: whole loops with real numbers, in narrow models


@pytest.mark.parametrize("n, parts", [
    (1, GPT), (8, dict(n_kv_heads=2)), (8, dict(sparse_stride=16, n_kv_heads=2)),
    (1, dict(attention_kind="linear")), (8, dict(n_sinks=1, n_kv_heads=2)),
], ids=str)  # fmt: skip
def test_generation_on_a_cpu_is_predicted(n, parts):
    torch.manual_seed(0)
    c = ModelConfig(vocab_size=256, context_length=256, n_layers=4, d_model=64, n_heads=8, **parts)
    model, rows, prompt, new = ModernDecoderLM(c).eval(), 64, 180, 40
    with LiveBytes(model) as live:
        model.generate([[i, 7, 8] * 60 for i in range(rows // n)], new, n=n, stop_tokens=range(30))
    how = dict(size=4, sampled=True, on_cpu=True)
    assert live.agrees_with(generation_bytes(shape_of(c), rows, prompt, new, n, **how))


THEIRS = [
    transformers.GPT2Config(n_layer=4, n_embd=64, n_head=4, n_positions=256, vocab_size=512),
    transformers.LlamaConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=4,
                             num_attention_heads=8, num_key_value_heads=2, vocab_size=512),
    transformers.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=4, num_heads=4, vocab_size=512,
                          feed_forward_proj="gated-gelu", decoder_start_token_id=0),
]  # fmt: skip


@pytest.mark.parametrize("config", THEIRS, ids=lambda config: config.model_type)
def test_generation_by_transformers_is_predicted(config):
    rows, prompt, new = 32, 100, 20
    mask = torch.ones(rows, prompt, dtype=torch.long)
    mask[:, 0] = 0  # padding on the left
    kind = "seq2seq" if config.is_encoder_decoder else "causal"
    auto = transformers.AutoModelForSeq2SeqLM if kind == "seq2seq" else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with LiveBytes(model) as live:
        model.generate(input_ids=torch.ones_like(mask), attention_mask=mask, max_new_tokens=new,
                       min_new_tokens=new, do_sample=False, pad_token_id=0)  # fmt: skip
    assert live.agrees_with(generation_bytes(shape_of(config, kind), rows, prompt, new, size=4))


def test_likelihoods_on_a_cpu_are_predicted():
    c = ModelConfig(vocab_size=1024, context_length=128, n_layers=3, d_model=96, n_heads=4)
    ids = torch.ones(20, 90, dtype=torch.long)
    model = ModernDecoderLM(c).eval()
    with LiveBytes(model) as live, torch.no_grad():
        logits = target_logits(model, "causal", ids, None, ids).flatten(0, 1)
        F.cross_entropy(logits.float(), ids.flatten(), reduction="none")
    assert live.agrees_with(likelihood_bytes(shape_of(c), 20, 90, size=4, on_cpu=True))


# -----------------------------------------------------------------------------
# What is free


def test_free_memory_is_the_least_of_what_the_system_and_the_control_groups_leave(tmp_path, monkeypatch):
    own, job = tmp_path / "own", tmp_path / "groups/user/job"
    job.mkdir(parents=True)
    own.write_text("0::/user/job\n")
    for group, most, used, stat in (
        (job, "max", "100", "inactive_file 10"), (job.parent, "1000", "700", "anon 5\ninactive_file 50"),
    ):  # fmt: skip
        for name, text in (("max", most), ("current", used), ("stat", stat)):
            (group / f"memory.{name}").write_text(text)
    assert control_group_bytes(tmp_path / "groups", own) == 350  # the group around the own one is tighter
    assert control_group_bytes(tmp_path, tmp_path / "nowhere") == math.inf
    for limit in (800, math.inf):
        monkeypatch.setattr(memory, "control_group_bytes", partial(float, limit))
        monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
        assert memory.room(torch.device("cpu"), processes=4) == min(limit, 1000) * 0.6 / 4


@pytest.mark.parametrize(("fraction", "free"), [(1.0, 600 + 200), (0.5, 200 + 200)])
def test_what_torch_keeps_but_does_not_use_is_free_within_the_limit_of_the_process(
    fraction, free, monkeypatch
):
    values = {"mem_get_info": (600, 1000), "memory_reserved": 300, "memory_allocated": 100}
    for name, value in (values | {"get_per_process_memory_fraction": fraction}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value, raising=False)
    assert memory.free_bytes(torch.device("cuda")) == free


# -----------------------------------------------------------------------------
# As many rows as fit


def test_rows_are_halved_until_they_fit_and_are_at_least_one():
    for most, room, rows in ((256, 10**6, 256), (256, 700, 64), (256, 0, 1), (0, 700, 1)):
        assert rows_that_fit(lambda rows: 10 * rows + 5, most, room) == rows


def test_running_out_of_memory_is_recognised_and_nothing_else():
    errors = [OSError(12, "Cannot allocate memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
    for allocate in (torch.empty, np.empty, bytearray):
        with pytest.raises((RuntimeError, MemoryError)) as info:
            allocate(2**55)
        errors.append(info.value)
    assert all(map(is_out_of_memory, errors))
    others = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), FileNotFoundError(2, "No such file")]
    assert not any(map(is_out_of_memory, others))


def test_a_batch_that_does_not_fit_is_halved_and_goes_on():
    sizes = []

    def double(items: list[int], room: int = 3, error: type[Exception] = MemoryError) -> list[int]:
        sizes.append(len(items))
        if len(items) > room:
            raise error("something")
        return [2 * item for item in items]

    assert halving(double, list(range(11))) == list(range(0, 22, 2))
    assert sizes == [11, 6, 3, 3, 3, 2]
    assert halving(double, list(range(4)), most=2) == [0, 2, 4, 6] and halving(double, []) == []
    with pytest.raises(RuntimeError, match="something"):
        halving(partial(double, error=RuntimeError), [1] * 4)
    with pytest.raises(DoesNotFit, match="use a smaller model"):
        halving(partial(double, room=0), [1, 2])


def test_fewer_rows_where_memory_is_scarce_or_runs_out_give_the_same(tiny, monkeypatch):
    model = load_model(tiny["base"], torch.device("cpu"))
    prompts = [[i + 1] * 20 for i in range(64)]
    most, seen = 64, []

    def embed(self, ids, do=torch.nn.Embedding.forward):
        seen.append(len(ids))
        if len(ids) > most:
            raise MemoryError
        return do(self, ids)

    def results() -> tuple:
        seen.clear()
        texts = model.generate(prompts, 4, "", temperature=1.0, seed=1)
        samples = model.generate(prompts[:1], 4, "", n=64, temperature=1.0, seed=1)
        read = model.log_likelihoods([(prompt, [5] * 20) for prompt in prompts])
        return texts, samples, read.round(3).tolist()

    monkeypatch.setattr(torch.nn.Embedding, "forward", embed)
    plenty = results()
    assert max(seen) == 64
    most = 10
    assert results() == plenty
    monkeypatch.setattr(text_model, "room", lambda *_: 0)
    assert results() == plenty and max(seen) == 1


def test_freed_memory_is_given_back_only_where_it_is_scarce(monkeypatch):
    given = []
    monkeypatch.setattr(memory, "give_freed_memory_back", lambda: given.append(1))
    for available, calls in ((10**15, 0), (0, 1)):
        monkeypatch.setattr(memory, "available_bytes", lambda: available)  # noqa: B023
        memory.leave_memory_to_others()
        assert len(given) == calls
