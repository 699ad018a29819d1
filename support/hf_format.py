"""config.json and tensors of GPT-2, Llama, Mistral, Qwen3 and Mixtral, to and from ours."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from model import ModelConfig, ModernDecoderLM
from support.files import write_atomically

LLAMA = ModelConfig()  # the default switches


SWITCHES = """norm norm_position positions ffn n_sinks qk_norm sliding_window sparse_stride attention_kind
    bias""".split()


def architecture(c: ModelConfig) -> str:
    """The `model_type` under which transformers computes the same; modern_llm if there is none."""
    changed = {name for name in SWITCHES if getattr(c, name) != getattr(LLAMA, name)}
    if changed <= {"bias"}:
        return "llama"
    if changed in ({"sliding_window"}, {"qk_norm"}):
        return "mistral" if c.sliding_window else "qwen3"
    if changed - {"sliding_window"} == {"ffn"} and c.ffn == "moe":
        mixtral = not c.capacity_factor and c.experts_per_token > 1 and c.moe_every == 1
        return "mixtral" if mixtral else "modern_llm"
    gpt = changed == {"norm", "positions", "ffn", "bias"}
    gpt = gpt and (c.norm, c.positions, c.ffn, c.tie_embeddings) == ("layer", "learned", "gelu", True)
    heads = c.n_kv_heads == c.n_heads and c.head_dim * c.n_heads == c.d_model
    return "gpt2" if gpt and heads else "modern_llm"


CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "modern_llm": "ModernDecoderLM",
}


LLAMA_KEYS = {  # our field -> the key in config.json
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "dropout": "dropout",  # ours alone
}


MIXTRAL_KEYS = {
    "n_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "load_balance_coef": "router_aux_loss_coef",
    "router_z_coef": "router_z_loss_coef",
}


GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "n_layers": "n_layer",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "d_ff": "n_inner",
    "norm_eps": "layer_norm_epsilon",
    "dropout": "resid_pdrop",
}


def to_hf_config(c: ModelConfig) -> dict:
    """config.json for transformers. `from_hf_config` reads it back."""
    kind = architecture(c)
    out = {"architectures": [CLASSES[kind]], "model_type": kind, "dtype": "float32"}
    if kind == "modern_llm":
        return out | {"vocab_size": c.vocab_size, "modern_llm": asdict(c)}
    keys = GPT2_KEYS if kind == "gpt2" else LLAMA_KEYS | (MIXTRAL_KEYS if kind == "mixtral" else {})
    out |= {theirs: getattr(c, ours) for ours, theirs in keys.items()}
    if kind == "gpt2":
        dropout = {"embd_pdrop": c.dropout, "attn_pdrop": c.dropout}
        return out | dropout | {"activation_function": "gelu_new", "tie_word_embeddings": True}
    out |= {"hidden_act": "silu", "attention_bias": c.bias, "mlp_bias": c.bias, "attention_dropout": 0.0}
    if kind in ("mistral", "mixtral"):
        out["sliding_window"] = c.sliding_window or None
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    return out | {"rope_theta": c.rope_theta, "rope_parameters": rope}  # for transformers 4, and from 5 on


def from_hf_config(hf: dict) -> ModelConfig:
    """Reads config.json of GPT-2, Llama, Mistral, Qwen3, Mixtral or ours; refuses the rest by name."""
    kind = hf.get("model_type")
    if kind == "modern_llm":
        return ModelConfig(**hf["modern_llm"])
    if kind not in list(CLASSES):
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(CLASSES)}")
    if missing := not_computed(hf, kind):
        raise ValueError(
            f"this {kind} checkpoint needs {' and '.join(missing)}, which model.py does not compute"
        )
    keys = GPT2_KEYS if kind == "gpt2" else LLAMA_KEYS | (MIXTRAL_KEYS if kind == "mixtral" else {})
    c = {ours: hf[theirs] for ours, theirs in keys.items() if hf.get(theirs) is not None}
    if kind == "gpt2":
        gpt2 = {"norm": "layer", "positions": "learned", "ffn": "gelu", "bias": True}
        return ModelConfig(**{"d_ff": 4 * hf["n_embd"]} | c | gpt2)
    c["rope_theta"] = float(rope_of(hf).get("rope_theta") or hf.get("rope_theta") or 10000.0)
    c["bias"] = bool(hf.get("attention_bias"))
    c["qk_norm"] = kind == "qwen3"
    c["ffn"] = "moe" if kind == "mixtral" else "swiglu"
    if kind in ("mistral", "mixtral"):
        c["sliding_window"] = hf.get("sliding_window") or 0
    return ModelConfig(**{"tie_embeddings": False} | c)


def rope_of(hf: dict) -> dict:
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def not_computed(hf: dict, kind: str) -> list[str]:
    """What a checkpoint needs and model.py does not have."""
    rope = rope_of(hf)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    activation = hf.get("activation_function" if kind == "gpt2" else "hidden_act")
    known = ("gelu_new", "gelu_pytorch_tanh") if kind == "gpt2" else ("silu",)
    biased = [key for key in ("attention_bias", "mlp_bias") if hf.get(key)]
    needs = {
        f"RoPE scaling {rope_type!r}": rope_type != "default",
        f"activation {activation!r}": activation not in (None, *known),
        "an untied head": kind == "gpt2" and not hf.get("tie_word_embeddings", True),
        "one expert a token": kind == "mixtral" and hf.get("num_experts_per_tok") == 1,
        f"{' and '.join(biased)} alone": len(biased) == 1 or (biased and kind != "llama"),
        "a per-layer kind of attention": hf.get("use_sliding_window")
        or hf.get("scale_attn_by_inverse_layer_idx"),
    }
    return [name for name, needed in needs.items() if needed]


def gpt2_names(c: ModelConfig) -> list[tuple[str, list[str], bool]]:
    """(GPT-2's name, our names, transposed?). Its Conv1D stores (in, out); c_attn is q, k, v side by side."""
    names = [("transformer.wte.weight", ["model.embed_tokens.weight"], False)]
    names += [("transformer.wpe.weight", ["model.embed_positions.weight"], False)]
    for kind in ("weight", "bias"):
        names.append((f"transformer.ln_f.{kind}", [f"model.norm.{kind}"], False))
        for i in range(c.n_layers):
            theirs, ours, t = f"transformer.h.{i}", f"model.layers.{i}", kind == "weight"
            names += [
                (f"{theirs}.ln_1.{kind}", [f"{ours}.input_layernorm.{kind}"], False),
                (f"{theirs}.ln_2.{kind}", [f"{ours}.post_attention_layernorm.{kind}"], False),
                (f"{theirs}.attn.c_attn.{kind}", [f"{ours}.self_attn.{x}_proj.{kind}" for x in "qkv"], t),
                (f"{theirs}.attn.c_proj.{kind}", [f"{ours}.self_attn.o_proj.{kind}"], t),
                (f"{theirs}.mlp.c_fc.{kind}", [f"{ours}.mlp.up_proj.{kind}"], t),
                (f"{theirs}.mlp.c_proj.{kind}", [f"{ours}.mlp.down_proj.{kind}"], t),
            ]
    return names


def to_hf_tensors(c: ModelConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names, and in the layout, of the checkpoint on disk."""
    kind = architecture(c)
    if kind == "gpt2":
        whole = {name: torch.cat([ours[o] for o in parts]) for name, parts, _ in gpt2_names(c)}
        return {name: whole[name].T.contiguous() if t else whole[name] for name, _, t in gpt2_names(c)}
    if kind != "mixtral":
        return dict(ours)
    out = {}
    for name, tensor in ours.items():
        layer, _, leaf = name.rpartition(".mlp.")
        if leaf == "gate.weight":
            out[f"{layer}.block_sparse_moe.gate.weight"] = tensor
        elif leaf in ("w1", "w2", "w3"):
            for e, matrix in enumerate(tensor):
                out[f"{layer}.block_sparse_moe.experts.{e}.{leaf}.weight"] = matrix.clone()
        else:
            out[name] = tensor
    return out


def from_hf_tensors(c: ModelConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hf_tensors`; drops what is no weight (GPT-2's masks, a tied copy of the head)."""
    kind = architecture(c)
    theirs = {
        name: t for name, t in theirs.items() if not name.endswith(("rotary_emb.inv_freq", "masked_bias"))
    }
    if c.tie_embeddings:
        theirs.pop("lm_head.weight", None)
    if kind == "gpt2":  # the hub's first upload has no "transformer." before its names
        prefix = "" if "transformer.wte.weight" in theirs else "transformer."
        theirs = {prefix + name: t for name, t in theirs.items() if not name.endswith(".attn.bias")}
        out = {}
        for name, parts, transposed in gpt2_names(c):
            if name in theirs:
                tensor = theirs.pop(name)
                out |= zip(parts, (tensor.T if transposed else tensor).chunk(len(parts)), strict=True)
        return out | theirs
    if kind == "mixtral":
        for i in range(c.n_layers):
            old, new = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
            if f"{old}.gate.weight" in theirs:
                theirs[f"{new}.gate.weight"] = theirs.pop(f"{old}.gate.weight")
            for leaf in ("w1", "w2", "w3"):
                names = [f"{old}.experts.{e}.{leaf}.weight" for e in range(c.n_experts)]
                if all(name in theirs for name in names):
                    theirs[f"{new}.{leaf}"] = torch.stack([theirs.pop(name) for name in names])
    return theirs


def write_generation_config(folder: Path, ids: dict) -> None:
    """generation_config.json: the ids of bos, eos (one or a list) and pad. Without an eos, no file."""
    known = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {key: ids[key] for key in known if ids.get(key) is not None}
    if "eos_token_id" in ids:
        text = json.dumps(ids, indent=2) + "\n"
        write_atomically(folder / "generation_config.json", lambda path: path.write_text(text))


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, in one file or in shards. Pickled weights are never loaded."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists() and not (folder / shards[0]).exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if not (folder / shard).exists():
            pickled = [file.name for ending in ("*.bin", "*.pt", "*.pth") for file in folder.glob(ending)]
            why = f"; {pickled[0]} is a pickle, which can run code: it is never read" if pickled else ""
            raise FileNotFoundError(f"{folder / shard} is missing{why}")
        try:
            tensors |= load_file(folder / shard)
        except SafetensorError as error:
            raise ValueError(f"{folder / shard} is damaged ({error}); restore it or train again") from None
    return tensors


def save_pretrained(model: ModernDecoderLM, folder: Path, **extra) -> None:
    """Writes config.json (plus `extra`, such as eos_token_id) and model.safetensors, each atomically.

    The ids in `extra` also go to generation_config.json, from which transformers' `generate` takes them.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_hf_tensors(
        model.config, {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    )
    text = json.dumps(to_hf_config(model.config) | extra, indent=2)
    write_atomically(folder / "config.json", lambda path: path.write_text(text + "\n"))
    write_generation_config(folder, extra)
    write_atomically(
        folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )


def from_pretrained(name: str | Path) -> ModernDecoderLM:
    """A run folder of ours, or a GPT-2, Llama, Mistral, Qwen3 or Mixtral checkpoint: folder or hub id.

    Weights are float32 whatever they were stored as; the model is in evaluation mode. Raises
    FileNotFoundError or ValueError that say what is wrong: no such folder, an architecture this file can't
    compute, tensors missing or too many or misshapen.
    """
    folder = Path(name)
    if not folder.is_dir() and (folder.parts[0] in ("/", "..", "out") or len(folder.parts) > 2):
        raise FileNotFoundError(f"there is no folder {folder}")  # nor could it be a name on the hub
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:
            raise FileNotFoundError(
                f"{name} is neither a folder nor a model that the hub gave: {error}"
            ) from None
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no config.json: not a finished run, nor a Hugging Face model"
        )
    try:
        config = from_hf_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, UnicodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged or incomplete: {error!r}") from None
    return from_tensors(config, load_tensors(folder), f"{folder}")


def from_tensors(config: ModelConfig, tensors: dict[str, Tensor], source: str) -> ModernDecoderLM:
    """The model of a checkpoint's tensors, under the names that they have on disk, in evaluation mode.

    Raises ValueError, which names the `source`, if tensors are missing, too many or of another shape.
    """
    with torch.device("meta"):  # shapes only: no time spent on initialising weights that are then replaced
        model = ModernDecoderLM(config)
    ours, want = from_hf_tensors(config, tensors), model.state_dict()
    missing, unexpected = sorted(want.keys() - ours.keys()), sorted(ours.keys() - want.keys())
    misshapen = [k for k in want.keys() & ours.keys() if want[k].shape != ours[k].shape]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"{source} does not hold the model its config.json describes: missing {missing[:4]}, "
            f"unexpected {unexpected[:4]}, of another shape {misshapen[:4]}"
        )
    model.load_state_dict({k: v.float().contiguous() for k, v in ours.items()}, assign=True)
    model.set_context_length(config.context_length)
    return model.requires_grad_(True).eval()
