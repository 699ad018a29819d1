"""Speed beside other libraries: a training step, decoding, the tokenizer. Contenders take turns; medians.

    python -m lab.peers                                    # all three
    OMP_NUM_THREADS=1 python -m lab.peers --what=step --compile    # one thread, and compiled contenders too
    python -m lab.peers --what=decoding
    python -m lab.peers --what=tokenizer --corpus=wikitext2

Models have random weights of one shape, since speed does not depend on the text: 6 layers of width 288,
vocabulary 4,096. litgpt and rustbpe join if they are installed. Compare rows of one run only.
"""

from support.terminal import run_script

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from configs import ConfigError, parse_config
from data import DataError, documents
from model import ModelConfig, ModernDecoderLM
from support.costs import estimate_flops
from support.hf_format import to_hf_config, to_hf_tensors
from support.kernels import fastest_products, float32_products
from support.machine import hardware, matmul_flops, peak_flops, pick_device
from support.timing import in_turns, medians
from tokenizer import CORES, GPT2_PATTERN, SLAB, SPECIAL_TOKENS, Tokenizer, at_most, train_bpe


@dataclass
class PeersConfig:
    what: str = "step,decoding,tokenizer"  # what is measured, joined by commas
    device: str = "auto"  # cuda, cpu, ...
    compile: bool = False  # also with torch.compile: a minute each to start
    corpus: str = "storyworld"  # tokenizer: the text, 20 MB of it
    vocab_size: int = 4096  # tokenizer: tokens to learn


SHAPE = ModelConfig(n_layers=6, d_model=288, n_heads=6, d_ff=768, context_length=512, vocab_size=4096)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def llama_twin(c: ModelConfig) -> LlamaForCausalLM:
    """transformers' Llama of this shape."""
    keys = to_hf_config(c)
    for key in ("architectures", "model_type", "dtype"):
        keys.pop(key)
    return LlamaForCausalLM(LlamaConfig(**keys))


def litgpt_twin(c: ModelConfig) -> nn.Module:
    """litgpt's Llama of this shape."""
    from litgpt import GPT, Config

    shape = dict(block_size=c.context_length, n_layer=c.n_layers, n_head=c.n_heads, n_embd=c.d_model)
    shape |= dict(vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size, intermediate_size=c.d_ff)
    parts = dict(norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", rotary_percentage=1.0)
    return GPT(Config(**shape, **parts, parallel_residual=False, bias=False))


def print_rates(
    task: str, rates: dict[str, float], reference: str, more: dict[str, str] | None = None
) -> None:
    for name, rate in rates.items():
        times = f"{rate / rates[reference]:5.2f}x {reference}"
        print(
            f"{task:26} {name:30} {rate:10,.0f} tok/s  {times}  {(more or {}).get(name, '')}".rstrip(),
            flush=True,
        )


# -----------------------------------------------------------------------------
# A training step


def stepper(model: nn.Module, ids: Tensor, compiled: bool, precision: str) -> Callable:
    """A function that does one optimizer step: forward, loss, backward, clip, fused AdamW."""
    model = model.to(ids.device).train()
    net = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs = ids[:, :-1]
    targets = ids[:, 1:]

    def step() -> None:
        with float32_products(precision):
            if isinstance(model, ModernDecoderLM):
                total, count = net(inputs, targets)
                loss = total / count
            else:
                out = net(inputs)
                logits = getattr(out, "logits", out)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_step(cfg: PeersConfig) -> dict[str, dict[str, float]]:
    """One optimizer step of 16 sequences of 256 tokens in float32. Others as they come, and again with
    oneDNN's matrix products where ours use these (`fastest_products`).
    """
    device = pick_device(cfg.device)
    torch.set_flush_denormal(True)
    c = replace(SHAPE, context_length=256)
    default = torch.get_float32_matmul_precision()
    fastest = fastest_products(device)
    ids = torch.randint(c.vocab_size, (16, c.context_length), device=device)
    models = {"ours": ModernDecoderLM(c), "transformers": llama_twin(c)}
    if installed("litgpt"):
        models["litgpt"] = litgpt_twin(c)
    steps = {}
    for way in ("eager", "compiled") if cfg.compile else ("eager",):
        for name, model in models.items():
            make = partial(stepper, model, ids, way == "compiled")
            steps[f"{name}, {way}"] = make(fastest if name == "ours" else default)
            if name != "ours" and fastest != default:
                steps[f"{name}, {way}, oneDNN"] = make(fastest)
    seconds = medians(steps, rounds=10)
    with float32_products(fastest):
        peak = (
            matmul_flops(torch.float32)
            if device.type == "cpu"
            else peak_flops(torch.cuda.get_device_name(device))
        )
    rates = {name: ids[:, 1:].numel() / s for name, s in seconds.items()}
    found = {"tokens_per_second": rates}
    shares = {}
    if peak:
        found["share_of_matmul"] = {name: rate * estimate_flops(c) / peak for name, rate in rates.items()}
        shares = {name: f"{share:6.1%} of matmul peak" for name, share in found["share_of_matmul"].items()}
    print(f"{hardware(device)['device']}, {torch.get_num_threads()} threads, float32")
    print_rates("training step", rates, "transformers, eager", shares)
    return found


# -----------------------------------------------------------------------------
# Decoding


def decoding_rates(
    c: ModelConfig,
    tasks: dict[str, tuple[Tensor, int]],
    new: int,
    dtype: torch.dtype,
    compiled: bool,
    rounds: int,
) -> dict[str, dict[str, float]]:
    """{task: {who: tokens a second}} of tasks {name: (prompts (B, T), answers to each)} with the same
    weights: ours, transformers' generate (on a GPU with a static cache, which it compiles), and litgpt's on
    its own weights. One answer is greedy, several are sampled.
    """
    device = next(ids.device for ids, _ in tasks.values())
    ours = ModernDecoderLM(c).eval()
    theirs = llama_twin(c).eval()
    theirs.load_state_dict(to_hf_tensors(c, ours.state_dict()), strict=False)  # the head is the embedding
    ours = ours.to(device, dtype)
    theirs = theirs.to(device, dtype)
    cache = {"cache_implementation": "static"} if device.type == "cuda" else {}
    config = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None, **cache
    )
    theirs.generation_config = config
    found = {}
    for task, (ids, n) in tasks.items():
        mine = partial(ours.generate, ids.tolist(), new, n=n, temperature=float(n > 1))
        sampling = dict(do_sample=True, num_return_sequences=n, top_k=0) if n > 1 else dict(do_sample=False)
        runs = {"transformers": partial(theirs.generate, ids, **sampling)}
        runs["ours"] = mine
        if len(ids) == n == 1 and dtype == torch.float32 and installed("litgpt"):
            runs["litgpt"] = litgpt_decoder(c, ids[0], new)
        if compiled:
            runs["ours, compiled"] = partial(mine, compile=True)
        with torch.inference_mode():
            seconds = medians(runs, rounds=rounds, warmup=2)
        found[task] = {who: len(ids) * n * new / s for who, s in seconds.items()}
        print_rates(task, found[task], "transformers")
    return found


def litgpt_decoder(c: ModelConfig, ids: Tensor, new: int) -> Callable:
    from litgpt.generate.base import generate

    twin = litgpt_twin(c).to(ids.device).eval()
    twin.set_kv_cache(batch_size=1, device=ids.device)
    return partial(generate, twin, ids, len(ids) + new, temperature=0.0, top_p=0.0)


def decoding(cfg: PeersConfig) -> dict[str, dict[str, float]]:
    """Greedy decoding of 256 tokens from prompts of 8."""
    device = pick_device(cfg.device)
    prompts = torch.randint(1, SHAPE.vocab_size, (16, 8), device=device)  # 0 would count as padding
    tasks = {"batch 1": (prompts[:1], 1), "batch 16": (prompts, 1)}
    threads = torch.get_num_threads()
    print(f"{hardware(device)['device']}, {threads} threads, float32, 256 tokens from a prompt of 8")
    return decoding_rates(SHAPE, tasks, 256, torch.float32, cfg.compile, rounds=5)


# -----------------------------------------------------------------------------
# The tokenizer


def tokenizers(cfg: PeersConfig) -> None:
    """Learning and encoding 20 MB of a corpus, beside tokenizers, tiktoken and, if installed, rustbpe."""
    import tokenizers as hf
    from tokenizers import models, pre_tokenizers, trainers

    texts = list(at_most(documents(cfg.corpus, "train"), 20e6))

    def ours():
        return train_bpe(texts, cfg.vocab_size, SPECIAL_TOKENS)

    def hugging_face() -> None:
        model = hf.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
        options |= {"vocab_size": cfg.vocab_size, "special_tokens": SPECIAL_TOKENS}
        model.train_from_iterator(texts, trainers.BpeTrainer(**options))

    def rust() -> None:
        import rustbpe

        size = cfg.vocab_size - len(SPECIAL_TOKENS)
        rustbpe.Tokenizer().train_from_iterator(iter(texts), size, pattern=GPT2_PATTERN)

    learners = {"tokenizer.py": ours, "tokenizers": hugging_face}
    if installed("rustbpe"):
        learners["rustbpe"] = rust
    print_seconds(f"learning {cfg.vocab_size:,} tokens", texts, learners)

    mine = Tokenizer(*ours(), SPECIAL_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        mine.save(folder)
        theirs = hf.Tokenizer.from_file(f"{folder}/tokenizer.json")
    core = mine.core
    text = "".join(texts)[: 100 * SLAB]
    texts = [text[i : i + SLAB] for i in range(0, len(text), SLAB)]

    def each(encode: Callable) -> Callable:
        return lambda: [encode(text) for text in texts]

    def forgetful() -> None:
        mine._words.clear()
        each(mine.encode_plain)()

    encoders = {
        "encode_batch": lambda: mine.encode_batch(texts),
        "tiktoken, a thread for each core": lambda: core.encode_ordinary_batch(texts, num_threads=CORES),
        "encode": each(mine.encode),
        "tiktoken, 1 thread": each(core.encode_ordinary),
        "encode_plain, all words new": forgetful,
        "encode_plain": each(mine.encode_plain),
        "tokenizers.encode_batch_fast": lambda: [e.ids for e in theirs.encode_batch_fast(texts)],
        "tokenizers.encode": each(lambda text: theirs.encode(text).ids),
    }
    print_seconds("encoding documents of 64 KB", texts, encoders)


def print_seconds(what: str, texts: list[str], contenders: dict[str, Callable]) -> None:
    """Median wall-clock and CPU seconds of each contender."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    cpu = {name: [] for name in contenders}

    def watched(name: str) -> None:
        begun = time.process_time()
        contenders[name]()
        cpu[name].append(time.process_time() - begun)

    wall = in_turns({name: partial(watched, name) for name in contenders}, rounds=3, warmup=0)
    print(f"{what}, {megabytes:.1f} MB, {CORES} cores")
    for name in contenders:
        seconds = median(wall[name])
        print(f"  {name:34}{seconds:6.2f} s, {megabytes / seconds:5.1f} MB/s; {median(cpu[name]):6.2f} CPU s")


PARTS = {"step": training_step, "decoding": decoding, "tokenizer": tokenizers}


def main() -> None:
    cfg = parse_config(PeersConfig, __doc__)
    try:
        wanted = cfg.what.split(",")
        if unknown := set(wanted) - set(PARTS):
            raise ConfigError(f"--what={','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
        for part in wanted:
            PARTS[part](cfg)
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"lab.peers: {error}") from None


if __name__ == "__main__":
    run_script(main)
