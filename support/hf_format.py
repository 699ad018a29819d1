"""config.json and tensors of GPT-2, Llama, Mistral, Qwen3 and Mixtral, to and from ours."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from model import ModelConfig, ModernDecoderLM
from support.files import write_atomically, write_json

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "modern_llm": "ModernDecoderLM",  # ours alone
}

# The fields that decide which of these computes a model. The others are numbers that all of them store.
SWITCHES = """norm norm_position positions ffn n_sinks qk_norm sliding_window sparse_stride attention_kind
    bias tie_embeddings n_kv_heads head_dim""".split()
MOE_SWITCHES = ["capacity_factor", "moe_every"]

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
MIXTRAL_KEYS = LLAMA_KEYS | {
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
KEYS = {"gpt2": GPT2_KEYS, "mixtral": MIXTRAL_KEYS}  # the others: LLAMA_KEYS


# -----------------------------------------------------------------------------
# config.json


def architecture(c: ModelConfig) -> str:
    """The `model_type` under which transformers computes the same; modern_llm if there is none.

    It is the first whose config.json, read back, sets the same switches.
    """
    switches = SWITCHES + (MOE_SWITCHES if c.ffn == "moe" else [])
    for kind in list(CLASSES)[:-1]:
        try:
            again = from_hf_config(config_of(c, kind))
        except ValueError:  # this kind has no such shape
            continue
        if all(getattr(again, name) == getattr(c, name) for name in switches):
            return kind
    return "modern_llm"


def to_hf_config(c: ModelConfig) -> dict:
    """config.json for transformers. `from_hf_config` reads it back."""
    return config_of(c, architecture(c))


def config_of(c: ModelConfig, kind: str) -> dict:
    """config.json of an architecture, with all that it can say about the model."""
    out = {"architectures": [CLASSES[kind]], "model_type": kind, "dtype": "float32"}
    if kind == "modern_llm":
        return out | {
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.context_length,
            "modern_llm": asdict(c),
        }
    for ours, theirs in KEYS.get(kind, LLAMA_KEYS).items():
        out[theirs] = getattr(c, ours)
    if kind == "gpt2":
        return out | {
            "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        }
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
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if missing := not_computed(hf, kind, rope):
        raise ValueError(
            f"this {kind} checkpoint needs {' and '.join(missing)}, which model.py does not compute"
        )
    c = {"tie_embeddings": kind == "gpt2"}
    for ours, theirs in KEYS.get(kind, LLAMA_KEYS).items():
        if hf.get(theirs) is not None:
            c[ours] = hf[theirs]
    if kind == "gpt2":
        c.setdefault("d_ff", 4 * hf["n_embd"])
        return ModelConfig(**c, norm="layer", positions="learned", ffn="gelu", bias=True)
    window = hf.get("sliding_window") if kind in ("mistral", "mixtral") else 0
    return ModelConfig(
        **c,
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        bias=bool(hf.get("attention_bias")),
        qk_norm=kind == "qwen3",
        ffn="moe" if kind == "mixtral" else "swiglu",
        sliding_window=window or 0,
    )


def not_computed(hf: dict, kind: str, rope: dict) -> list[str]:
    """What a checkpoint needs and model.py does not have."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    activation = hf.get("activation_function", hf.get("hidden_act"))
    known = ("gelu_new", "gelu_pytorch_tanh") if kind == "gpt2" else ("silu",)
    biases = bool(hf.get("attention_bias")) + bool(hf.get("mlp_bias"))
    needs = {
        f"RoPE scaling {rope_type!r}": rope_type != "default",
        f"activation {activation!r}": activation not in (None, *known),
        "an untied head": kind == "gpt2" and not hf.get("tie_word_embeddings", True),
        "one expert a token": kind == "mixtral" and hf.get("num_experts_per_tok") == 1,
        "attention_bias or mlp_bias alone": biases == 1 or (biases and kind != "llama"),
        "a per-layer kind of attention": hf.get("use_sliding_window")
        or hf.get("scale_attn_by_inverse_layer_idx"),
    }
    return [name for name, needed in needs.items() if needed]


# -----------------------------------------------------------------------------
# Tensors


# (a part of their name, the same part of ours); every other part is the same in both.
NAMES = {
    "gpt2": [
        ("transformer.wte.", "model.embed_tokens."),
        ("transformer.wpe.", "model.embed_positions."),
        ("transformer.ln_f.", "model.norm."),
        ("transformer.h.", "model.layers."),
        (".ln_1.", ".input_layernorm."),
        (".ln_2.", ".post_attention_layernorm."),
        (".attn.c_attn.", ".self_attn.qkv_proj."),  # one matrix with queries, keys and values
        (".attn.c_proj.", ".self_attn.o_proj."),
        (".mlp.c_fc.", ".mlp.up_proj."),
        (".mlp.c_proj.", ".mlp.down_proj."),
    ],
    "mixtral": [(".block_sparse_moe.", ".mlp.")],
}
QKV = ("q_proj", "k_proj", "v_proj")
EXPERTS = ("w1", "w2", "w3")
NO_WEIGHTS = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")


def to_hf_tensors(c: ModelConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names, and in the layout, of the checkpoint on disk."""
    kind = architecture(c)
    found = {}
    for name, tensor in ours.items():
        if kind == "gpt2":
            if re.search("[kv]_proj", name):  # joined to q_proj
                continue
            if "q_proj" in name:
                tensor = torch.cat([ours[name.replace("q_proj", part)] for part in QKV])
                name = name.replace("q_proj", "qkv_proj")
        tensor = transposed(kind, name, tensor)
        for theirs, own in NAMES.get(kind, ()):
            name = name.replace(own, theirs)
        layer, _, leaf = name.rpartition(".")
        if kind == "mixtral" and leaf in EXPERTS:  # of a layer: one tensor here, a matrix each there
            for e, matrix in enumerate(tensor):
                found[f"{layer}.experts.{e}.{leaf}.weight"] = matrix.clone()
        else:
            found[name] = tensor
    return found


def from_hf_tensors(c: ModelConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hf_tensors`; drops what is no weight (GPT-2's masks, a tied copy of the head)."""
    kind = architecture(c)
    found = {}
    experts = {}
    for name, tensor in theirs.items():
        if name.endswith(NO_WEIGHTS) or (c.tie_embeddings and name == "lm_head.weight"):
            continue
        if kind == "gpt2" and not name.startswith("transformer."):  # as in the hub's first upload
            name = f"transformer.{name}"
        for their_part, part in NAMES.get(kind, ()):
            name = name.replace(their_part, part)
        tensor = transposed(kind, name, tensor)
        if expert := re.fullmatch(r"(.*)\.experts\.(\d+)\.(w\d)\.weight", name):
            layer, e, leaf = expert.groups()
            experts.setdefault(f"{layer}.{leaf}", {})[int(e)] = tensor
        elif "qkv_proj" in name:
            for part, rows in zip(QKV, tensor.chunk(3), strict=True):
                found[name.replace("qkv_proj", part)] = rows
        else:
            found[name] = tensor
    for name, matrices in experts.items():
        if len(matrices) == c.n_experts:  # else it is missing
            found[name] = torch.stack([matrices[e] for e in sorted(matrices)])
    return found


def transposed(kind: str, name: str, tensor: Tensor) -> Tensor:
    """GPT-2's Conv1D stores (in, out), where nn.Linear has (out, in)."""
    return tensor.T.contiguous() if kind == "gpt2" and name.endswith("_proj.weight") else tensor


# -----------------------------------------------------------------------------
# Files


def write_generation_config(folder: Path, ids: dict) -> None:
    """generation_config.json: the ids of bos, eos (one or a list) and pad. Without an eos, no file."""
    known = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {key: ids[key] for key in known if ids.get(key) is not None}
    if "eos_token_id" in ids:
        write_json(folder / "generation_config.json", ids)


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, in one file or in shards. Pickled weights are never loaded."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.exists() and not (folder / "model.safetensors").exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
    tensors = {}
    for shard in sorted(shards):
        try:
            tensors |= load_file(folder / shard)
        except FileNotFoundError:
            pickles = [file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth")]
            why = f"; {pickles[0]} is a pickle, which can run code: it is never read" if pickles else ""
            raise FileNotFoundError(f"{folder / shard} is missing{why}") from None
        except SafetensorError as error:
            raise ValueError(f"{folder / shard} is damaged ({error}); restore it or train again") from None
    return tensors


def save_pretrained(model: ModernDecoderLM, folder: Path, **extra) -> None:
    """Writes config.json (plus `extra`, such as eos_token_id) and model.safetensors, each atomically.

    The ids in `extra` also go to generation_config.json, from which transformers' `generate` takes them.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ours = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    tensors = to_hf_tensors(model.config, ours)
    write_json(folder / "config.json", to_hf_config(model.config) | extra)
    write_generation_config(folder, extra)
    write_atomically(
        folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )


def find_folder(name: str | Path) -> Path | None:
    """The folder of a model; None for a name that can only be one of the hub. Raises FileNotFoundError."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise FileNotFoundError(
                f"{folder} holds neither config.json nor adapter_config.json: not a finished run"
            )
        return folder
    if folder.parts[0] in ("/", "..", "out") or len(folder.parts) > 2:
        raise FileNotFoundError(f"there is no folder {folder}; python train.py --list shows all runs")
    return None


def from_pretrained(name: str | Path) -> ModernDecoderLM:
    """`ModernDecoderLM.from_pretrained`, on the CPU."""
    folder = find_folder(name)
    if not folder:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:
            raise FileNotFoundError(
                f"{name} is neither a folder nor a model that the hub gave: {error}"
            ) from None
    file = folder / "config.json"
    try:
        config = from_hf_config(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, UnicodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged or incomplete: {error!r}") from None
    return from_tensors(config, load_tensors(folder), f"{folder}")


def from_tensors(config: ModelConfig, tensors: dict[str, Tensor], source: str) -> ModernDecoderLM:
    """The model of a checkpoint's tensors, under the names that they have on disk, in evaluation mode.

    Raises ValueError, which names the `source`, if tensors are missing, too many or of another shape.
    """
    with torch.device("meta"):  # shapes only: no time spent on initialising weights that are then replaced
        model = ModernDecoderLM(config)
    ours = from_hf_tensors(config, tensors)
    want = model.state_dict()
    faults = {
        "missing": want.keys() - ours.keys(),
        "unexpected": ours.keys() - want.keys(),
        "of another shape": [k for k in want.keys() & ours.keys() if want[k].shape != ours[k].shape],
    }
    found = ", ".join(f"{what} {sorted(names)[:4]}" for what, names in faults.items() if names)
    if found:
        raise ValueError(f"{source} does not hold the model its config.json describes: {found}")
    model.load_state_dict({k: v.float().contiguous() for k, v in ours.items()}, assign=True)
    model.set_context_length(config.context_length)
    return model.eval()
