"""Memory: predicted bytes against the bytes of tensors that are alive, and what happens when it runs out."""

import json
import os
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

from configs import ROOT
from lab import plan
from model import KVCache, ModelConfig, ModernDecoderLM, sample
from support import kernels, memory
from support.caches import FixedCache
from support.costs import GIB, generation_bytes, likelihood_bytes, shape_of
from support.memory import DoesNotFit, control_group_bytes, halving, is_out_of_memory, rows_that_fit
from support.text_model import on_all_cores, target_logits

pytestmark = pytest.mark.usefixtures("one_thread")


# -----------------------------------------------------------------------------
# Counting: bytes of all storages that are alive


class LiveBytes(TorchDispatchMode):
    """Sums the storages that operations make, while they are alive. Tensors may be on the device "meta",
    which has shapes but no numbers: then the largest models cost nothing. A question about their numbers
    ("are all rows finished?") is answered by no.
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
            return False
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t)
        return out

    @property
    def needed(self) -> int:
        """The peak beside the weights."""
        return self.peak - self.weights


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What flash and memory-efficient attention allocate on a GPU: the output, a log-sum-exp for every query
    in float32, and a boolean mask in the queries' dtype. ("meta" has only the plain path with all scores.)
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    sums = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return torch.empty_like(q) if sums.numel() else q


@pytest.fixture(autouse=True)
def fast_functions():
    kernels.install()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(ModernDecoderLM, "dtype", property(lambda self: self.head.dtype))


def on_meta(make) -> torch.nn.Module:
    with torch.device("meta"):
        return make().eval().bfloat16()


ids_of = partial(torch.ones, dtype=torch.long, device="meta")


@torch.no_grad()
def ours_generates(model: ModernDecoderLM, rows: int, prompt: int, new: int, n: int, sampled: bool) -> int:
    """Bytes that `generate` needs on a GPU: its moments, since a loop that asks for tokens needs numbers."""
    c, prompts = model.config, rows // n
    with LiveBytes(model) as live:
        cache = KVCache(c, prompts, prompt + new + -(prompt + new) % 8, model.device, model.dtype)
        logits = model.prefill([[1] * prompt] * prompts, cache)
        if n > 1:
            cache.select(torch.arange(prompts).repeat_interleave(n))
            logits = logits.repeat_interleave(n, dim=0)
        uniforms = torch.empty(rows, new, device="meta")
        token = sample(logits, uniforms[:, 0], float(sampled))
        cache = FixedCache(cache)
        for alive in (rows, rows // 2):
            for _ in range(2):
                cache.begin(1)
                logits = model.step(token.unsqueeze(1), cache)
                token = sample(logits, uniforms[:alive, 1], float(sampled))
            cache.select(torch.arange(alive // 2))
            token = token[: alive // 2]
    return live.needed


def filled(config, shape, rows: int, tokens: int) -> transformers.DynamicCache:
    """A cache that holds the keys and values of so many tokens."""
    cache = transformers.DynamicCache(config=config)
    for layer in range(shape.n_layers):
        kv = torch.empty(
            2, rows, shape.n_kv_heads, tokens, shape.head_dim, dtype=torch.bfloat16, device="meta"
        )
        cache.update(kv[0].clone(), kv[1].clone(), layer)
    return cache


def drawn(logits: torch.Tensor, rows: int, sampled: bool) -> torch.Tensor:
    """As transformers' generate does, a copy in float32; and a token of it as support/hub.py chooses it."""
    scores = logits[:, -1].to(copy=True, dtype=torch.float32)
    token = sample(scores, torch.empty(rows, device="meta"), float(sampled))
    return torch.full_like(scores, -torch.inf).scatter(1, token.unsqueeze(1), 0.0)


@torch.no_grad()
def decoder_generates(model, rows: int, prompt: int, new: int, sampled: bool) -> int:
    """Reading the prompts, and the last of the steps."""
    how = dict(use_cache=True, logits_to_keep=1)
    with LiveBytes(model) as reading:
        out = model(input_ids=ids_of(rows, prompt), attention_mask=ids_of(rows, prompt),
                    position_ids=ids_of(rows, prompt), **how)  # fmt: skip
        drawn(out.logits, rows, sampled)
        del out
    with LiveBytes(model) as live:
        cache = filled(model.config, shape_of(model.config, ours=False), rows, prompt + new - 1)
        live.peak = live.live  # filling it is not what is counted
        step = dict(input_ids=ids_of(rows, 1), position_ids=ids_of(rows, 1), cache=cache, **how)
        drawn(model(**step, attention_mask=ids_of(rows, prompt + new)).logits, rows, sampled)
    return max(reading.needed, live.needed)


@torch.no_grad()
def encoder_decoder_generates(model, rows: int, prompt: int, new: int, sampled: bool) -> int:
    shape = shape_of(model.config, "seq2seq", ours=False)
    with LiveBytes(model) as live:
        mask = ids_of(rows, prompt)
        encoded = model.get_encoder()(input_ids=ids_of(rows, prompt), attention_mask=mask)
        own, cross = (
            filled(model.config, shape, rows, new - 2),
            transformers.DynamicCache(config=model.config),
        )
        cache = transformers.EncoderDecoderCache(own, cross)
        for _ in range(2):  # the first step computes keys and values of the prompt
            out = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids_of(rows, 1),
                        cache=cache, use_cache=True)  # fmt: skip
            drawn(out.logits, rows, sampled)
            del out
    return live.needed


@torch.no_grad()
def reads(model, kind: str, rows: int, length: int, columns: int) -> int:
    """Log-likelihoods as TextModel computes them."""
    with LiveBytes(model) as live:
        targets = ids_of(rows, columns)
        logits = target_logits(model, kind, ids_of(rows, length), ids_of(rows, length), targets).flatten(0, 1)
        loss = F.cross_entropy(logits.float(), targets.flatten(), reduction="none")
        loss.view_as(targets).double().sum(-1)
    return live.needed


# -----------------------------------------------------------------------------
# The table: every stage of the speedrun that asks a model

STAGES = {
    "pretrain": "train.py configs/speedrun.py",
    "finetune-sst2": "finetune.py configs/sst2.py --name=sst2",
    "finetune-samsum": "finetune.py configs/samsum.py --name=samsum",
    "finetune-gsm8k": "finetune.py configs/gsm8k.py --name=gsm8k",
    "sft": "sft.py configs/sft.py",
    "dpo": "dpo.py configs/dpo.py",
    "verifier": "verifier.py configs/verifier.py",
    "eval-base": "eval.py out/base --tasks=sentiment,dialogue,arithmetic,storyworld --shots=0,4 --limit=500",
    "eval-sst2": "eval.py gpt2 out/sst2 --tasks=sst2",
    "eval-samsum": "eval.py google/flan-t5-small out/samsum --tasks=samsum",
    "eval-gsm8k": "eval.py gpt2 out/gsm8k --tasks=gsm8k",
    "README's 4 shots": "eval.py gpt2 --tasks=gsm8k --shots=0,4",
    "gsm8k sampled": "eval.py out/gsm8k --tasks=gsm8k --samples=16",
    "by transformers": "eval.py gpt2 out/sst2 --tasks=gsm8k,sst2 --backend=transformers",
    "TinyLlama": "eval.py TinyLlama/TinyLlama_v1.1 --tasks=gsm8k --backend=transformers",
    "QLoRA": "finetune.py configs/gsm8k.py --model=TinyLlama/TinyLlama_v1.1 --lora_r=8 --load_in_4bit",
    "eval-life": "eval.py out/base out/sft out/dpo --tasks=arithmetic,storyworld --samples=16 --battery=200",
}
SPACE = 10.0 * GIB  # what a 12 GB GPU gives
FLAN_T5 = transformers.T5Config(
    vocab_size=32_128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
)  # fmt: skip
TINY_LLAMA = transformers.LlamaConfig(
    vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
    num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
)  # fmt: skip
ON_HUB = {"gpt2": transformers.GPT2Config(), "google/flan-t5-small": FLAN_T5,
          "TinyLlama/TinyLlama_v1.1": TINY_LLAMA}  # fmt: skip


def counted(c: ModelConfig, batch: plan.Batch, rows: int) -> int:
    """Bytes of the tensors of a batch at its real shape."""
    s, sizes = batch.shape, (rows, batch.length, batch.new)
    if s.kind == "seq2seq":
        model = on_meta(lambda: transformers.T5ForConditionalGeneration(FLAN_T5))
    elif not s.ours:
        theirs = ON_HUB["gpt2"] if c.positions == "learned" else TINY_LLAMA
        model = on_meta(lambda: transformers.AutoModelForCausalLM.from_config(theirs))
    else:
        model = on_meta(lambda: ModernDecoderLM(c))
    if not batch.new:
        return reads(model, s.kind, rows, batch.length, batch.length)
    if s.ours:
        return ours_generates(model, *sizes, batch.n, batch.sampled)
    return (encoder_decoder_generates if s.kind == "seq2seq" else decoder_generates)(
        model, *sizes, batch.sampled
    )


def test_every_batch_of_the_speedrun_is_predicted_and_fits_a_12_gb_gpu(as_on_a_gpu):
    counter, known, wrong, table = plan.Plan(), {}, [], 0
    print(f"\n{'':20} rows prompt  new   n counted error  with weights (GiB)")
    for name, command in STAGES.items():
        work = counter.count(command.split())
        for batch in dict.fromkeys(work.asks):
            rows = batch.rows((SPACE - batch.weights(False) - 0.55 * GIB) / 1.06, on_cpu=False)
            key = (batch.shape, rows, batch.length, batch.new, batch.n, batch.sampled)
            if key not in known:
                known[key] = counted(work.shape, batch, rows)
            predicted = batch.bytes(rows, on_cpu=False)
            error, full = predicted / known[key] - 1, batch.weights(False) + 1.06 * predicted + 0.55 * GIB
            sizes = f"{name:20}{rows:5}{batch.length:7}{batch.new:5}{batch.n:4}"
            print(f"{sizes}{known[key] / GIB:8.2f}{error:+7.1%}{full / GIB:8.2f}")
            table += 1
            if not -0.05 <= error <= 0.25 or full > SPACE:
                wrong.append((name, rows, error, full / GIB))
    assert not wrong and table == 29


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
    predicted = generation_bytes(shape_of(c), rows, prompt, new, n, size=4, sampled=True, on_cpu=True)
    assert 0.95 < predicted / live.needed < 1.25


SMALL = dict(vocab_size=512, bos_token_id=1, eos_token_id=2)
THEIRS = [
    transformers.GPT2Config(n_layer=4, n_embd=64, n_head=4, n_positions=256, **SMALL),
    transformers.LlamaConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=4,
                             num_attention_heads=8, num_key_value_heads=2, **SMALL),
    transformers.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=4, num_heads=4, vocab_size=512,
                          feed_forward_proj="gated-gelu", decoder_start_token_id=0),
]  # fmt: skip


@pytest.mark.parametrize("config", THEIRS, ids=lambda config: config.model_type)
def test_generation_by_transformers_on_a_cpu_is_predicted(config):
    rows, prompt, new = 32, 100, 20
    mask = torch.ones(rows, prompt, dtype=torch.long)
    mask[:, 0] = 0  # padding on the left
    kind = "seq2seq" if config.is_encoder_decoder else "causal"
    auto = transformers.AutoModelForSeq2SeqLM if kind == "seq2seq" else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with LiveBytes(model) as live:
        model.generate(input_ids=torch.ones_like(mask), attention_mask=mask, max_new_tokens=new,
                       min_new_tokens=new, do_sample=False, pad_token_id=0)  # fmt: skip
    predicted = generation_bytes(shape_of(config, kind, ours=False), rows, prompt, new, size=4)
    assert 0.95 < predicted / live.needed < 1.25


@pytest.mark.parametrize("columns", [2, 90])
def test_likelihoods_on_a_cpu_are_predicted(columns):
    c = ModelConfig(vocab_size=1024, context_length=128, n_layers=3, d_model=96, n_heads=4)
    ids, targets = torch.ones(20, 90, dtype=torch.long), torch.ones(20, columns, dtype=torch.long)
    model = ModernDecoderLM(c).eval()
    with LiveBytes(model) as live, torch.no_grad():
        logits = target_logits(model, "causal", ids, None, targets).flatten(0, 1)
        F.cross_entropy(logits.float(), targets.flatten(), reduction="none")
    predicted = likelihood_bytes(shape_of(c), 20, 90, columns, size=4, on_cpu=True)
    assert 0.95 < predicted / live.needed < 1.25


@pytest.mark.parametrize("name", ON_HUB)
def test_shapes_are_those_of_the_config_classes(name):
    known = plan.ON_HUB[name]
    assert shape_of(known.config, known.kind, False) == shape_of(ON_HUB[name], known.kind, False)


# -----------------------------------------------------------------------------
# What is free


def write(folder, **files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_control_groups_limit_what_is_free(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/user/job\n")
    root = tmp_path / "v2"
    write(root / "user/job", memory__max="max", memory__current=100, memory__stat="inactive_file 10")
    assert control_group_bytes(root, own) is None
    write(root / "user", memory__max=1000, memory__current=700, memory__stat="anon 5\ninactive_file 50")
    assert control_group_bytes(root, own) == 350  # the group around the process' own is the tighter one
    own.write_text("9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    files = dict(memory__usage_in_bytes=300, memory__stat="inactive_file 1\ntotal_inactive_file 20")
    write(tmp_path / "v1/memory", memory__limit_in_bytes=2**63 - 4096, **files)
    assert control_group_bytes(tmp_path / "v1", own) is None
    write(tmp_path / "v1/memory", memory__limit_in_bytes=1000, **files)  # a container sees its group as root
    assert control_group_bytes(tmp_path / "v1", own) == 720
    assert control_group_bytes(tmp_path, tmp_path / "not there") is None


def test_free_memory_is_the_least_of_what_the_system_and_the_control_groups_leave(monkeypatch):
    assert memory.available_bytes() > 2**20
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    for limit, free in ((800, 800), (None, 1000)):
        monkeypatch.setattr(memory, "control_group_bytes", lambda limit=limit: limit)
        assert memory.free_bytes(torch.device("cpu")) == free
        assert memory.room(torch.device("cpu"), processes=4) == free * 0.6 / 4


@pytest.mark.parametrize(("fraction", "free"), [(1.0, 600 + 200), (0.5, 200 + 200)])
def test_on_a_gpu_what_torch_keeps_but_does_not_use_is_free_within_the_limit_of_the_process(
    fraction, free, monkeypatch
):
    values = {"mem_get_info": (600, 1000), "memory_reserved": 300, "memory_allocated": 100}
    for name, value in (values | {"get_per_process_memory_fraction": fraction}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value, raising=False)
    assert memory.free_bytes(torch.device("cuda")) == free


# -----------------------------------------------------------------------------
# As many rows as fit


def test_rows_are_halved_until_they_fit_and_are_at_least_one():
    need = lambda rows: 10 * rows + 5  # noqa: E731
    assert rows_that_fit(need, 256, 10**6) == 256
    assert rows_that_fit(need, 256, 700) == 64
    assert rows_that_fit(need, 256, 0) == rows_that_fit(need, 0, 100) == 1


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: torch.empty(2**55), True),
        (lambda: np.empty(2**55), True),
        (lambda: bytearray(2**55), True),
        (lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")), True),
        (
            lambda: raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")),
            True,
        ),
        (lambda: raised(OSError(12, "Cannot allocate memory")), True),
        (lambda: torch.ones(2) @ torch.ones(3), False),
        (lambda: open("/not/there"), False),
    ],
)
def test_running_out_of_memory_is_recognised_and_nothing_else(run, expected):
    with pytest.raises((RuntimeError, MemoryError, OSError, ValueError)) as info:
        run()
    assert is_out_of_memory(info.value) == expected


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

torch.manual_seed(0)
tokenizer = Tokenizer(*train_bpe(["one two three four"], 300, SPECIAL_TOKENS, workers=1), SPECIAL_TOKENS)
wide = ModelConfig(vocab_size=300, n_layers=2, d_model=32, n_heads=8, head_dim=128, context_length=128)
model = TextModel(ModernDecoderLM(wide).eval(), tokenizer, "causal")
prompts = [[i % 200 + 1] * 40 for i in range(256)]
generate, rows = ModernDecoderLM.generate, []

def watched(self, some, *args, **how):
    rows.append(len(some) * how["n"])
    return generate(self, some, *args, **how)

def results():
    rows.clear()
    texts = model.generate(prompts, 4, "", temperature=1.0, seed=1)
    samples = model.generate(prompts[:1], 60, "", n=512, temperature=1.0, seed=1)
    return texts, samples, [round(x, 3) for x in model.log_likelihoods([(p, [5] * 40) for p in prompts[:64]])]

ModernDecoderLM.generate = watched
torch.set_num_threads(1)
found = [[*results(), list(rows)]]
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 60 * 2**20, -1))
found.append([*results(), list(rows)])
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_generation_goes_on_with_fewer_rows_when_the_memory_of_the_process_runs_out():
    words = [sys.executable, "-c", EXHAUSTED]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (*plenty, rows), (*little, fewer) = json.loads(done.stdout)
    assert plenty == little, "the same texts, samples and likelihoods"
    assert rows == [256] * 3 and fewer.count(256) >= 2 and min(fewer) <= 64
    assert fewer[-1] < 256, "samples of one prompt are divided, too"


def exhausting(items: list[int]) -> list[int]:
    """Needs a petabyte for more than two items."""
    torch.empty(2**50 if len(items) > 2 else 1)
    return [10 * item for item in items]


def killed(item: int) -> None:
    os.kill(os.getpid(), 9)  # as Linux does to the largest process when memory runs out


@pytest.fixture
def two_workers():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_worker_process_that_is_killed_ends_in_one_line(two_workers):
    with pytest.raises(ValueError, match="^a worker process was killed"):
        list(on_all_cores(killed, [1, 2, 3, 4], torch.device("cpu")))


def test_worker_processes_halve_their_own_batches(two_workers):
    batches = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [10]]
    results = list(on_all_cores(partial(halving, exhausting), batches, torch.device("cpu")))
    assert results == [[10 * item for item in batch] for batch in batches]
