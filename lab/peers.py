"""Other libraries beside ours: training steps, decoding, the tokenizer. lab/hardware.py times them.

    OMP_NUM_THREADS=1 python -m lab.hardware --only=peers          # a step and decoding on one thread
    taskset -c 0 python -m lab.hardware --only=data --corpus=wikitext2    # the tokenizer on one core

Models have random weights of one shape, since speed does not depend on the text: 6 layers of width 288,
vocabulary 4,096. litgpt joins if it is installed. Contenders take turns: compare rows of one run only.
"""

import copy
import importlib.util
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import tokenizers as hf
import torch
import torch.nn.functional as F
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from data import documents
from finetune import Adapter
from model import ModelConfig, ModernDecoderLM
from sft import SFTConfig, collate_bins, conversation_loss, pack
from support.adapters import LORA_TARGETS, float32_where_trained, lora_config
from support.costs import estimate_flops
from support.cutting import SLAB
from support.hf_format import to_hf_config, to_hf_tensors
from support.kernels import fastest_products, float32_products, to_int8
from support.loading import import_peft
from support.machine import autocast, dtype_for
from support.plan import Step
from support.processes import CORES
from support.text_model import on_all_cores
from support.timing import matmul_flops, medians
from support.token_files import at_most
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe
from train import TrainConfig

SHAPE = ModelConfig(n_layers=6, d_model=288, n_heads=6, d_ff=768, context_length=512, vocab_size=4096)


def race(
    task: str, contenders: dict[str, Callable], amount: float, unit: str = "tok/s", rounds: int = 10, **how
) -> dict[str, float]:
    """Prints and returns the rate of each contender, whose call does `amount`, beside the first one's."""
    first = next(iter(contenders))
    rates = {}
    for name, seconds in medians(contenders, rounds, **how).items():
        rates[name] = amount / seconds
        times = rates[name] / rates[first]
        print(f"{task:28} {name:32} {rates[name]:12,.1f} {unit} {times:5.2f}x {first}", flush=True)
    return rates


def llama_twin(c: ModelConfig) -> LlamaForCausalLM:
    """transformers' Llama of this shape."""
    return LlamaForCausalLM(LlamaConfig.from_dict(to_hf_config(c)))


def paired_models(c: ModelConfig, new: int, **generation) -> tuple[ModernDecoderLM, LlamaForCausalLM]:
    """Our model of this shape, and transformers' Llama with its weights, which generates `new` tokens."""
    ours = ModernDecoderLM(c).eval()
    theirs = llama_twin(c).eval()
    theirs.load_state_dict(to_hf_tensors(c, ours.state_dict()), strict=False)  # the head is the embedding
    theirs.generation_config = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None, **generation
    )
    return ours, theirs


def litgpt_twin(c: ModelConfig) -> nn.Module:
    """litgpt's Llama of this shape."""
    from litgpt import GPT, Config

    config = Config(
        block_size=c.context_length,
        n_layer=c.n_layers,
        n_head=c.n_heads,
        n_embd=c.d_model,
        vocab_size=c.vocab_size,
        padded_vocab_size=c.vocab_size,
        intermediate_size=c.d_ff,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    return GPT(config)


# -----------------------------------------------------------------------------
# Training steps


def steps_of(model: nn.Module, batches: list, loss: Callable) -> Callable:
    """A function that does an optimizer step on each batch: forward, loss, backward, clip, fused AdamW."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def steps() -> None:
        for batch in batches:
            loss(*batch).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def stepper(model: nn.Module, ids: Tensor, compiled: bool, dtype: torch.dtype) -> Callable:
    """A function that does one optimizer step of pretraining on ids (B, T + 1), activations in `dtype`."""
    model = model.to(ids.device)
    net = torch.compile(model) if compiled else model

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with autocast(ids.device, dtype):
            out = net(inputs)
            logits = getattr(out, "logits", out)
            return F.cross_entropy(logits.flatten(0, 1), targets)

    return steps_of(model, [(ids[:, :-1], ids[:, 1:].flatten())], loss)


def training_step(device: torch.device, compiled: bool, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """One optimizer step of 16 sequences of 256 tokens. Others as they come, and in float32 again with
    oneDNN's matrix products where ours use these (`fastest_products`).
    """
    c = replace(SHAPE, context_length=256)
    name_of_dtype = str(dtype).removeprefix("torch.")
    ids = torch.randint(c.vocab_size, (16, c.context_length + 1), device=device)
    fastest = fastest_products(device)
    twins = {"transformers": llama_twin(c)}
    if importlib.util.find_spec("litgpt"):
        twins["litgpt"] = litgpt_twin(c)
    steps = {}
    for way in ("eager", "compiled") if compiled else ("eager",):
        for name, model in twins.items():
            step = stepper(model, ids, way == "compiled", dtype)
            steps[f"{name}, {way}"] = step
            if dtype == torch.float32 and fastest != torch.get_float32_matmul_precision():
                steps[f"{name}, {way}, oneDNN"] = float32_products(fastest)(step)
        settings = TrainConfig(batch_size=16, dtype=name_of_dtype, compile=way == "compiled")
        steps[f"ours, {way}"] = float32_products(fastest)(Step(c, settings, device))
    rates = race(f"training step, {name_of_dtype}", steps, 16 * c.context_length)
    with float32_products(fastest):
        peak = matmul_flops(dtype, device=device)
    shares = {name: rate * estimate_flops(c) / peak for name, rate in rates.items()}
    print("of large matrix products:", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    return {"tokens_per_second": rates, "share_of_matmul": shares}


def lora_rates(c: ModelConfig, device: torch.device, rounds: int) -> dict:
    """Tokens a second of LoRA on every linear layer: SFT on 32 conversations as long as GSM8K's.

    Ours packs them into rows of 512 tokens, 4 a step. PEFT on transformers' model has them as they come, 8 a
    step, padded, as transformers' Trainer would.
    """
    cfg = SFTConfig(lora_r=32, lora_dropout=0.0)
    model = ModernDecoderLM(c)
    dtype = dtype_for("auto", model, device)
    peft_config = lora_config(cfg, "causal", LORA_TARGETS["llama"])
    theirs = import_peft().get_peft_model(llama_twin(c).to(device, dtype), peft_config)
    Adapter(model.to(device, dtype), cfg, base="")
    count = 32
    room = min(512, c.context_length)
    lengths = torch.randint(room // 4, room * 5 // 8, (count,)).tolist()
    ids = [torch.randint(c.vocab_size, (length,)).tolist() for length in lengths]
    rows = [(text, [i > len(text) // 2 for i in range(len(text))]) for text in ids]
    packed = [[rows[i] for i in bin] for bin in pack(lengths, range(count), room)]
    alone = [[row] for row in rows]
    runs = {
        "transformers": lora_epoch(float32_where_trained(theirs), alone, 8, device, dtype),
        "ours": lora_epoch(model, packed, 4, device, dtype),
    }
    task = "SFT by LoRA of rank 32"
    return {"task": task, "tokens_per_second": race(task, runs, sum(lengths) - count, rounds=rounds)}


def lora_epoch(model: nn.Module, bins: list, rows: int, device: torch.device, dtype: torch.dtype) -> Callable:
    """A function that trains on all conversations, `rows` bins a step."""
    model = model.to(device)
    batches = []
    for i in range(0, len(bins), rows):
        batches.append([tensor.to(device) for tensor in collate_bins(bins[i : i + rows], pad=0)])

    def loss(*tensors: Tensor) -> Tensor:
        with autocast(device, dtype):
            nats, count = conversation_loss(model, *tensors)
        return nats / count

    return steps_of(model, batches, loss)


# -----------------------------------------------------------------------------
# Decoding


def decoding_rates(
    c: ModelConfig, device: torch.device, rows: int, new: int, compiled: bool, rounds: int
) -> dict[str, dict[str, float]]:
    """{task: {who: tokens a second}} with the same weights: ours, transformers' generate (on a GPU with a
    static cache, which it compiles), and litgpt's on its own weights. Greedy for one prompt and for `rows`
    prompts of 32 tokens; then so many sampled answers to one prompt, as a verifier wants them.
    """
    cache = "static" if device.type == "cuda" else None
    pair = paired_models(c, new, cache_implementation=cache)
    dtype = dtype_for("auto", pair[0], device)
    ours, theirs = (model.to(device, dtype) for model in pair)
    models = {"ours": ours}
    if device.type == "cpu":
        models["ours, int8"] = copy.deepcopy(ours)
        to_int8(models["ours, int8"])
    ids = torch.randint(1, c.vocab_size, (rows, 32), device=device)  # 0 would count as padding
    greedy = dict(do_sample=False)
    sampled = dict(do_sample=True, num_return_sequences=rows, top_k=0)
    tasks = {
        "1 row": (ids[:1], 1, greedy),
        f"{rows} rows": (ids, 1, greedy),
        f"{rows} answers to one prompt": (ids[:1], rows, sampled),
    }
    found = {}
    for task, (prompts, n, how) in tasks.items():
        runs = {"transformers": partial(theirs.generate, prompts, **how)}
        for name, model in models.items():
            runs[name] = partial(model.generate, prompts.tolist(), new, n=n, temperature=float(n > 1))
        if task == "1 row" and dtype == torch.float32 and importlib.util.find_spec("litgpt"):
            runs["litgpt"] = litgpt_decoder(c, ids[0], new)
        if compiled:
            runs["ours, compiled"] = partial(runs["ours"], compile=True)
        tokens = len(prompts) * n * new
        with torch.inference_mode():
            found[task] = race(task, runs, tokens, rounds=rounds)
    return found


def litgpt_decoder(c: ModelConfig, ids: Tensor, new: int) -> Callable:
    from litgpt.generate.base import generate

    twin = litgpt_twin(c).to(ids.device).eval()
    twin.set_kv_cache(batch_size=1, device=ids.device)
    return partial(generate, twin, ids, len(ids) + new, temperature=0.0, top_p=0.0)


def sampling_rates(c: ModelConfig, device: torch.device) -> dict:
    """Tokens a second of 16 sampled answers to each prompt, ours on all cores and transformers' generate,
    same weights. Both in the data type that ours samples in; a batch has at most 256 answers, or 1,024 on a
    GPU.
    """
    prompts = 64 if device.type == "cuda" else 32
    n = 16
    new = min(64, c.context_length // 4)
    task = f"{n} answers to {prompts} prompts"
    ours, theirs = paired_models(c, new, do_sample=True, num_return_sequences=n, top_k=0)
    ours = ours.to(device)
    dtype = dtype_for("auto", ours, device)
    theirs = theirs.to(device, dtype)
    length = min(96, c.context_length // 2)  # of a prompt
    ids = torch.randint(1, c.vocab_size, (prompts, length), device=device)
    together = 1024 // n
    if device.type == "cpu":
        together = min(256 // n, math.ceil(prompts / CORES))
    batches = ids.split(together)

    def sample(batch: Tensor) -> list[list[int]]:
        with autocast(device, dtype):
            return ours.generate(batch.tolist(), new, n=n, temperature=1.0)

    runs = {
        "transformers": lambda: [theirs.generate(batch) for batch in batches],
        "ours": lambda: list(on_all_cores(sample, batches, device)),
    }
    with torch.inference_mode():
        rates = race(task, runs, prompts * n * new, rounds=1, warmup=0)
    return {"task": task, "new_tokens": new, "tokens_per_second": rates}


# -----------------------------------------------------------------------------
# The tokenizer


def tokenizers(corpus: str, rounds: int) -> dict[str, float]:
    """MB/s of learning 10,000 tokens and of encoding 5 MB of a corpus, beside tokenizers and tiktoken."""
    vocab_size = 10_000
    text = "".join(at_most(documents(corpus, "train"), 5e6))
    texts = [text[i : i + SLAB] for i in range(0, len(text), SLAB)]
    megabytes = len(text.encode()) / 1e6
    ours = partial(train_bpe, texts, vocab_size, SPECIAL_TOKENS)

    def hugging_face() -> None:
        model = hf.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)

    learners = {"tokenizers": hugging_face, "tokenizer.py": ours}
    race(f"learning {vocab_size:,} tokens", learners, megabytes, "MB/s", rounds, warmup=0)

    mine = Tokenizer(*ours(), SPECIAL_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        mine.save(folder)
        theirs = hf.Tokenizer.from_file(f"{folder}/tokenizer.json")
    encoders = {
        "tiktoken, a thread for each core": partial(
            mine.core.encode_ordinary_batch, texts, num_threads=CORES
        ),
        "encode_batch": partial(mine.encode_batch, texts),
        "encode": partial(each, mine.encode, texts),
        "encode_plain": partial(each, mine.encode_plain, texts),
        "tokenizers.encode_batch_fast": partial(theirs.encode_batch_fast, texts),
        "tokenizers.encode": partial(each, theirs.encode, texts),
    }
    return race("encoding 64 KB at a time", encoders, megabytes, "MB/s", rounds, warmup=0)


def each(encode: Callable, texts: list[str]) -> None:
    for text in texts:
        encode(text)
