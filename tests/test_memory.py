"""Memory: predicted bytes against the bytes of tensors that are alive, and what happens when it runs out."""

import json
import math
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification

from configs import ROOT, parse_config
from lab.plan import ON_HUB
from model import KVCache, ModelConfig, ModernDecoderLM, sample
from support import kernels, memory
from support.caches import FixedCache
from support.costs import GIB, generation_bytes, likelihood_bytes, shape_of
from support.memory import DoesNotFit, control_group_bytes, halving, is_out_of_memory, rows_that_fit
from support.plan import planned_model
from support.text_model import on_all_cores, target_logits
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
@pytest.mark.parametrize(
    ("prompt", "new", "n"), [(153, 160, 1), (153, 160, 16), (350, 160, 4), (768, 256, 1)]
)
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


PARTS = {
    "GPT-2": dict(norm="layer", ffn="gelu", positions="learned", bias=True),
    "GQA": dict(n_kv_heads=2),
    "sparse": dict(sparse_stride=16, n_kv_heads=2),
    "linear": dict(attention_kind="linear"),
    "sinks": dict(n_sinks=1, n_kv_heads=2),
}


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_generation_on_a_cpu_is_predicted(n, parts):
    torch.manual_seed(0)
    c = ModelConfig(vocab_size=256, context_length=256, n_layers=4, d_model=64, n_heads=8, **parts)
    model, rows, prompt, new = ModernDecoderLM(c).eval(), 64, 180, 40
    with LiveBytes(model) as live:
        model.generate([[i, 7, 8] * 60 for i in range(rows // n)], new, n=n, stop_tokens=range(30))
    how = dict(size=4, sampled=True, on_cpu=True)
    assert live.agrees_with(generation_bytes(shape_of(c), rows, prompt, new, n, **how))


SMALL = dict(vocab_size=512, bos_token_id=1, eos_token_id=2)
THEIRS = [
    transformers.GPT2Config(n_layer=4, n_embd=64, n_head=4, n_positions=256, **SMALL),
    transformers.LlamaConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=4,
                             num_attention_heads=8, num_key_value_heads=2, **SMALL),
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
    own, root = tmp_path / "cgroup", tmp_path / "groups"
    own.write_text("0::/user/job\n")
    (root / "user/job").mkdir(parents=True)
    for name, text in (("max", "max"), ("current", "100"), ("stat", "inactive_file 10")):
        (root / f"user/job/memory.{name}").write_text(text)
    assert control_group_bytes(root, own) == math.inf
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 5\ninactive_file 50")):
        (root / f"user/memory.{name}").write_text(text)
    assert control_group_bytes(root, own) == 350  # the group around the process' own is the tighter one
    assert control_group_bytes(tmp_path, tmp_path / "not there") == math.inf
    assert memory.available_bytes() > 2**20
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    for limit, free in ((800, 800), (math.inf, 1000)):
        monkeypatch.setattr(memory, "control_group_bytes", lambda limit=limit: limit)
        assert memory.free_bytes(torch.device("cpu")) == free
        assert memory.room(torch.device("cpu"), processes=4) == free * 0.6 / 4


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
    found = [
        rows_that_fit(lambda rows: 10 * rows + 5, most, room) for most in (256, 0) for room in (10**6, 700, 0)
    ]
    assert found == [256, 64, 1, 1, 1, 1]


ERRORS = {
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"): True,
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"): True,
    OSError(12, "Cannot allocate memory"): True,
    MemoryError(): True,
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"): False,
    FileNotFoundError(2, "No such file or directory"): False,
}


@pytest.mark.parametrize(("error", "expected"), ERRORS.items(), ids=str)
def test_running_out_of_memory_is_recognised_and_nothing_else(error, expected):
    assert is_out_of_memory(error) == expected
    for allocate in (torch.empty, np.empty, bytearray):
        with pytest.raises((RuntimeError, MemoryError)) as info:
            allocate(2**55)
        assert is_out_of_memory(info.value)


def raised(error: Exception):
    raise error


def test_a_batch_that_does_not_fit_is_halved_and_goes_on():
    sizes = []

    def double(items: list[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * item for item in items]

    assert halving(double, list(range(11))) == list(range(0, 22, 2))
    assert sizes == [11, 6, 3, 3, 3, 2]
    assert halving(double, list(range(4)), most=2) == [0, 2, 4, 6] and halving(double, []) == []
    with pytest.raises(RuntimeError, match="something else"):
        halving(lambda items: raised(RuntimeError("something else")), [1, 2])
    with pytest.raises(DoesNotFit, match="use a smaller model"):
        halving(lambda items: raised(MemoryError()), [1, 2])


EXHAUSTED = """
import json, resource
import torch
from support.text_model import TextModel
from model import ModelConfig, ModernDecoderLM
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

torch.set_num_threads(1)
torch.manual_seed(0)
tokenizer = Tokenizer(*train_bpe(["one two three four"], 300, SPECIAL_TOKENS, workers=1), SPECIAL_TOKENS)
wide = ModelConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=8, head_dim=128, context_length=128)
model = TextModel(ModernDecoderLM(wide).eval(), tokenizer, "causal")
prompts = [[i % 200 + 1] * 20 for i in range(256)]
generate, rows = ModernDecoderLM.generate, []

def watched(self, some, *args, **how):
    rows.append(len(some) * how["n"])
    return generate(self, some, *args, **how)

def results():
    rows.clear()
    texts = model.generate(prompts, 4, "", temperature=1.0, seed=1)
    samples = model.generate(prompts[:1], 20, "", n=512, temperature=1.0, seed=1)
    read = model.log_likelihoods([(p, [5] * 20) for p in prompts[:64]])
    return texts, samples, [round(x, 3) for x in read], list(rows)

ModernDecoderLM.generate = watched
found = [results()]
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 60 * 2**20, -1))
print(json.dumps([*found, results()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_generation_goes_on_with_fewer_rows_when_the_memory_of_the_process_runs_out():
    words = [sys.executable, "-c", EXHAUSTED]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (*plenty, rows), (*little, fewer) = json.loads(done.stdout)
    assert plenty == little, "the same texts, samples and likelihoods"
    assert rows == [256] * 3 and fewer.count(256) >= 2
    assert fewer[-1] < 256, "samples of one prompt are divided, too"


def exhausting(items: list[int]) -> list[int]:
    """Needs a petabyte for more than two items."""
    torch.empty(2**50 if len(items) > 2 else 1)
    return [10 * item for item in items]


def test_worker_processes_halve_their_own_batches(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    batches = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [10]]
    results = list(on_all_cores(partial(halving, exhausting), batches, torch.device("cpu")))
    assert results == [[10 * item for item in batch] for batch in batches]


def test_freed_memory_is_given_back_only_where_it_is_scarce(monkeypatch):
    given = []
    monkeypatch.setattr(memory, "give_freed_memory_back", lambda: given.append(1))
    for available, calls in ((10**15, 0), (0, 1)):
        monkeypatch.setattr(memory, "available_bytes", lambda: available)  # noqa: B023
        memory.leave_memory_to_others()
        assert len(given) == calls
