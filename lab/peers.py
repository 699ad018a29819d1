"""Speed beside other libraries: a training step, decoding, the tokenizer. Contenders take turns; medians.

    python -m lab.peers                                    # all three
    OMP_NUM_THREADS=1 python -m lab.peers --what=step --compile    # one thread, and compiled contenders too
    python -m lab.peers --what=decoding
    python -m lab.peers --what=tokenizer --corpus=wikitext2

Models have random weights of one shape, since speed does not depend on what they say: 6 layers of width 288,
vocabulary 4,096. litgpt and rustbpe join if they are installed. Compare rows of one run only.
"""

from support.terminal import run_script

import copy
import importlib.util
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from configs import ConfigError, parse_config
from data import DataError, documents
from model import ModelConfig, ModernDecoderLM
from support.costs import estimate_flops
from support.hf_format import to_hf_config, to_hf_tensors
from support.kernels import fastest_products, float32_products
from support.machine import hardware, matmul_flops, peak_flops, pick_device, pick_dtype
from tokenizer import CORES, GPT2_PATTERN, SLAB, SPECIAL_TOKENS, Tokenizer, at_most, train_bpe


@dataclass
class PeersConfig:
    what: str = "step,decoding,tokenizer"  # what is measured, joined by commas
    device: str = "auto"  # cuda, cpu, ...
    dtype: str = "auto"  # of the training step; auto: float32
    compile: bool = False  # also with torch.compile: a minute each to start
    corpus: str = "storyworld"  # tokenizer: the text, 20 MB of it
    vocab_size: int = 4096  # tokenizer: tokens to learn
    workers: int = 0  # tokenizer: threads and processes; 0: one for each core


SHAPE = ModelConfig(n_layers=6, d_model=288, n_heads=6, d_ff=768, context_length=512, vocab_size=4096)


def llama_twin(c: ModelConfig) -> LlamaForCausalLM:
    """transformers' Llama of this shape."""
    keys = {k: v for k, v in to_hf_config(c).items() if k not in ("architectures", "model_type", "dtype")}
    return LlamaForCausalLM(LlamaConfig(**keys))


def litgpt_twin(c: ModelConfig) -> nn.Module:
    """A Llama of this shape by litgpt, if that is installed: for benchmarks."""
    from litgpt import GPT, Config

    shape = dict(block_size=c.context_length, n_layer=c.n_layers, n_head=c.n_heads, n_embd=c.d_model)
    shape |= dict(vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size, intermediate_size=c.d_ff)
    parts = dict(norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", rotary_percentage=1.0)
    return GPT(Config(**shape, **parts, parallel_residual=False, bias=False))


def training_step(cfg: PeersConfig) -> dict[str, dict[str, float]]:
    """One optimizer step of 16 sequences: forward, loss, backward, clip, fused AdamW.

    Others as they come, and again with `fastest_products` where these are others.
    """
    device = pick_device(cfg.device)
    dtype = pick_dtype("float32" if cfg.dtype == "auto" else cfg.dtype, device)
    torch.set_flush_denormal(True)
    c = replace(SHAPE, context_length=256)
    ids = torch.randint(c.vocab_size, (16, c.context_length), device=device)
    models = {"ours": ModernDecoderLM(c), "transformers": llama_twin(c)}
    if importlib.util.find_spec("litgpt"):
        models["litgpt"] = litgpt_twin(c)

    def say(text: str) -> None:  # not into the table
        print(text, file=sys.stderr, flush=True)

    def stepper(name: str, model: nn.Module, compiled: bool, precision: str):
        model = model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        net = torch.compile(model) if compiled else model

        def step():
            with float32_products(precision):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    if name == "ours":
                        loss, n = net(ids[:, :-1], ids[:, 1:])
                        loss = loss / n
                    else:
                        out = net(ids[:, :-1])
                        logits = out.logits if name == "transformers" else out
                        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return step

    default, ours, steps = torch.get_float32_matmul_precision(), fastest_products(device), {}
    for compiled in (False, True) if cfg.compile else (False,):
        way = "compiled" if compiled else "eager"
        for name, model in models.items():
            steps[f"{name}, {way}"] = stepper(name, model, compiled, ours if name == "ours" else default)
            if name != "ours" and ours != default:
                steps[f"{name}, {way}, oneDNN"] = stepper(name, model, compiled, ours)
    times: dict[str, list[float]] = {name: [] for name in steps}
    rounds = 12
    for i in range(rounds):
        say(f"round {i + 1} of {rounds}")
        for name, step in steps.items():
            if i == 0:
                say(f"  {name}: first step" + ", which compiles: a minute" * ("compiled" in name))
            begun = time.perf_counter()
            step()
            if i > 1:  # the first two allocate and compile
                times[name].append(time.perf_counter() - begun)
    tokens, flops = ids[:, 1:].numel(), estimate_flops(c)
    with float32_products(ours):
        peak = matmul_flops(dtype) if device.type == "cpu" else peak_flops(torch.cuda.get_device_name(device))
    rates = {name: tokens / float(np.median(measured)) for name, measured in times.items()}
    found = {"tokens_per_second": rates}
    if peak:
        found["share_of_matmul"] = {name: rate * flops / peak for name, rate in rates.items()}
    print(f"{hardware(device)['device']}, {torch.get_num_threads()} threads, {dtype}")
    for name, rate in rates.items():
        share = f"{found['share_of_matmul'][name]:6.1%} of matmul peak" if peak else ""
        times_theirs = rate / rates["transformers, eager"]
        print(f"{name:30} {rate:9,.0f} tok/s  {times_theirs:5.2f}x transformers eager  {share}", flush=True)
    return found


def decoding(cfg: PeersConfig) -> dict[str, dict[str, float]]:
    """Greedy decoding of 256 tokens: transformers' `generate` on the same weights, litgpt's on its own."""
    device, T = pick_device(cfg.device), 256
    c = SHAPE
    ours = ModernDecoderLM(c).to(device)
    theirs = llama_twin(c).eval().to(device)
    theirs.load_state_dict(to_hf_tensors(c, ours.state_dict()), strict=False)  # the head is the embedding
    greedy = GenerationConfig(do_sample=False, max_new_tokens=T, pad_token_id=0, eos_token_id=None)
    print(
        f"{hardware(device)['device']}, {torch.get_num_threads()} threads, float32, "
        f"{T} tokens from a prompt of 8"
    )
    found = {}
    for batch in (1, 16):
        ids = torch.randint(c.vocab_size, (batch, 8), device=device)
        runs = {
            "transformers": lambda ids=ids: theirs.generate(ids, generation_config=copy.copy(greedy)),
            "ours": lambda ids=ids: ours.generate(ids.tolist(), T, temperature=0),
        }
        if batch == 1 and importlib.util.find_spec("litgpt"):
            from litgpt.generate.base import generate

            twin = litgpt_twin(c).to(device).eval()
            twin.set_kv_cache(batch_size=1, device=device)
            runs["litgpt"] = lambda ids=ids, twin=twin: generate(
                twin, ids[0], 8 + T, temperature=0.0, top_p=0.0
            )
        if cfg.compile:
            runs["ours, compiled"] = lambda ids=ids, model=ours: model.generate(
                ids.tolist(), T, temperature=0, compile=True
            )
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(6):
            for name, run in runs.items():
                begun = time.perf_counter()
                with torch.inference_mode():
                    run()
                if i:  # the first round allocates and compiles
                    times[name].append(time.perf_counter() - begun)
        rates = found[f"batch {batch}"] = {name: batch * T / sorted(some)[2] for name, some in times.items()}
        for name, rate in rates.items():
            times_theirs = rate / rates["transformers"]
            print(
                f"batch {batch:2}  {name:16} {rate:9,.0f} tok/s  {times_theirs:5.2f}x transformers",
                flush=True,
            )
    return found


def tokenizers(cfg: PeersConfig) -> None:
    """Learning and encoding 20 MB of a corpus, beside tokenizers, tiktoken and, if installed, rustbpe."""
    import tokenizers as hf
    from tokenizers import models, pre_tokenizers, trainers

    texts = list(at_most(documents(cfg.corpus, "train"), 20e6))

    def ours():
        return train_bpe(texts, cfg.vocab_size, SPECIAL_TOKENS)

    def hugging_face():
        model = hf.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
        options |= {"vocab_size": cfg.vocab_size, "special_tokens": SPECIAL_TOKENS}
        model.train_from_iterator(texts, trainers.BpeTrainer(**options))

    def rust():
        import rustbpe

        size = cfg.vocab_size - len(SPECIAL_TOKENS)
        rustbpe.Tokenizer().train_from_iterator(iter(texts), size, pattern=GPT2_PATTERN)

    learners = {"tokenizer.py": ours, "tokenizers": hugging_face, "rustbpe": rust}
    in_turns(f"learning {cfg.vocab_size:,} tokens", texts, learners)

    mine = Tokenizer(*ours(), SPECIAL_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        mine.save(folder)
        theirs = hf.Tokenizer.from_file(f"{folder}/tokenizer.json")
    core, whole = mine.core, "".join(texts)[: 100 * SLAB]
    texts = [whole[i : i + SLAB] for i in range(0, len(whole), SLAB)]

    def plain_anew():
        mine._words.clear()
        return [mine.encode_plain(text) for text in texts]

    encoders = {
        "encode_batch": lambda: mine.encode_batch(texts),
        "tiktoken, a thread for each core": lambda: core.encode_ordinary_batch(texts, num_threads=CORES),
        "encode": lambda: [mine.encode(text) for text in texts],
        "tiktoken, 1 thread": lambda: [core.encode_ordinary(text) for text in texts],
        "encode_plain, all words new": plain_anew,
        "encode_plain": lambda: [mine.encode_plain(text) for text in texts],
        "tokenizers.encode_batch_fast": lambda: [e.ids for e in theirs.encode_batch_fast(texts)],
        "tokenizers.encode": lambda: [theirs.encode(text).ids for text in texts],
    }
    in_turns("encoding documents of 64 KB", texts, encoders)


def in_turns(what: str, texts: list[str], contenders: dict, rounds: int = 3) -> None:
    """Print each one's medians; in turns, there and back, so that nobody has the slow minute or place."""
    megabytes, times = sum(len(text.encode()) for text in texts) / 1e6, {name: [] for name in contenders}
    for turn in range(rounds):
        for name, run in list(contenders.items())[:: (1, -1)[turn % 2]]:
            wall, cpu = time.perf_counter(), time.process_time()
            with suppress(ImportError):  # a library that is not installed
                run()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(f"{what}, {megabytes:.1f} MB, {CORES} cores")
    for name, rows in times.items():
        if rows:
            wall, cpu = (sorted(column)[rounds // 2] for column in zip(*rows, strict=True))
            print(f"  {name:34}{wall:6.2f} s, {megabytes / wall:5.1f} MB/s; {cpu:6.2f} CPU s")


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
