"""A run as a GGUF file, which llama.cpp, Ollama and LM Studio run.

    python -m support.gguf out/sft                       # writes out/sft/sft.gguf and out/sft/Modelfile
    python -m support.gguf out/base base.gguf --dtype=F32
    llama-cli -m out/sft/sft.gguf                        # llama.cpp; --jinja for the chat template
    ollama create my-model -f out/sft/Modelfile && ollama run my-model

llama.cpp's own converter refuses our runs: it recognises a tokenizer by the hash of the ids of a test text,
so it does not know a newly trained vocabulary. This file states the pre-tokenizer itself.

Needs `pip install gguf` (or `.[gguf]`). Reads a run folder, or any folder that model.py and tokenizer.py can
read; writes one file, and for a chat model a Modelfile with the chat template in Ollama's language (Go).
Architectures that llama.cpp cannot compute are an error that names the settings.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from model import ModelConfig, ModernDecoderLM
from support.chat_template import without_generation_marks
from support.files import write_atomically
from support.hf_format import LLAMA, SWITCHES, architecture
from tokenizer import DIGITS_PATTERN, EOT, GPT2_PATTERN, Tokenizer, spell

# transformers' name of an architecture -> llama.cpp's. Its "llama" also computes Mixtral's experts.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen3": "qwen3", "gpt2": "gpt2"}
# Pre-tokenization, before BPE: llama.cpp's names of our two patterns.
PRE_TOKENIZERS = {GPT2_PATTERN: "gpt-2", DIGITS_PATTERN: "smollm"}
# Ollama writes chat templates in Go; the middle line is tokenizer.CHAT_TEMPLATE.
MODELFILE = """FROM ./{file}
TEMPLATE \"\"\"{template}\"\"\"
PARAMETER stop <|end|>
PARAMETER stop <|endoftext|>
PARAMETER num_ctx {context}
"""
OUR_TURN = "'<|' + message['role'] + '|>'"  # in tokenizer.CHAT_TEMPLATE
GO_TEMPLATE = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"


class GGUFError(ValueError):
    """An error that the user can fix; the message says how."""


# -----------------------------------------------------------------------------
# Weights


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a query or key projection, reordered for the RoPE of llama.cpp's "llama".

    We and transformers rotate feature i with feature i + D/2 of a head; llama.cpp rotates feature 2i with
    2i + 1, as Meta's original code does. Works for weights (H D, d) and biases (H D).
    """
    halves = weight.reshape(n_heads, 2, -1, *weight.shape[1:])  # (H, 2, D/2, ...)
    return halves.transpose(1, 2).reshape(weight.shape)


LAYER_NAMES = {  # ours -> llama.cpp's, in each layer
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.w1": "ffn_gate_exps",
    "mlp.w2": "ffn_down_exps",
    "mlp.w3": "ffn_up_exps",
}
TOP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):  # our experts are bare parameters: mlp.w1
        stem, kind = name, "weight"
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    _, _, layer, leaf = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[leaf]}.{kind}"


def gguf_tensors(model: ModernDecoderLM) -> dict[str, Tensor]:
    """The model's weights, float32, under llama.cpp's names and in its layout: (out, in), experts first."""
    c, kind, found = model.config, architecture(model.config), {}
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head") and c.tie_embeddings:
            continue
        if ARCHITECTURES[kind] == "llama" and ".q_proj." in name:
            tensor = interleaved(tensor, c.n_heads)
        if ARCHITECTURES[kind] == "llama" and ".k_proj." in name:
            tensor = interleaved(tensor, c.n_kv_heads)
        found[gguf_name(name)] = tensor.detach().float().cpu()
    if kind == "gpt2":  # queries, keys and values are one matrix
        for layer in range(c.n_layers):
            for ending in ("weight", "bias"):
                parts = [found.pop(f"blk.{layer}.attn_{x}.{ending}") for x in "qkv"]
                found[f"blk.{layer}.attn_qkv.{ending}"] = torch.cat(parts)
    return found


def stored_as(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """The large matrices become F16; llama.cpp needs vectors, position embeddings and routers in F32."""
    small = tensor.dim() < 2 or name.startswith("position_embd") or "ffn_gate_inp" in name
    return tensor if dtype == "F32" or small else tensor.half()


# -----------------------------------------------------------------------------
# Settings and vocabulary


def refuse_unknown(c: ModelConfig) -> None:
    """Raises GGUFError for configs that llama.cpp has no architecture for."""
    if architecture(c) in ARCHITECTURES:
        return
    switches = [*SWITCHES, "capacity_factor", "moe_every"]
    changed = {name: getattr(c, name) for name in switches if getattr(c, name) != getattr(LLAMA, name)}
    what = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    raise GGUFError(
        f"llama.cpp has no architecture for this combination of switches: {what}. "
        "It runs Llama's shape, also with qk_norm (Qwen3) or ffn=moe (Mixtral), and GPT-2's: norm=layer, "
        "positions=learned, ffn=gelu, bias, tied embeddings, as many KV heads as heads"
    )


def usable_context(c: ModelConfig) -> int:
    """The context for llama.cpp. Its "llama" has no sliding window, so the context is at most one window."""
    return min(c.context_length, c.sliding_window or c.context_length)


def add_settings(writer, c: ModelConfig, name: str, dtype: str) -> None:
    import gguf

    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "F32" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(usable_context(c))
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    if architecture(c) == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    if c.ffn == "moe":
        writer.add_expert_count(c.n_experts)
        writer.add_expert_used_count(c.experts_per_token)


def add_vocabulary(writer, tokenizer: Tokenizer, rows: int, end: int, template: str) -> None:
    """Tokens, merges, special tokens; unused ones of the `rows` of the embedding get padding tokens.

    `end`: the id at which generation stops. `template`: the chat template, or "".
    """
    import gguf

    if tokenizer.pattern not in PRE_TOKENIZERS:
        raise GGUFError(
            f"this tokenizer splits words by an unknown pattern ({tokenizer.pattern[:60]}...), so its "
            "pre-tokenizer in llama.cpp is not known: use llama.cpp's convert_hf_to_gguf.py"
        )
    special = {i: token for token, i in tokenizer.special_ids.items()}
    tokens, types = [], []
    for i in range(rows):
        if i in special:
            tokens.append(special[i])
            types.append(gguf.TokenType.CONTROL)
        elif i in tokenizer.vocab:
            tokens.append(spell(tokenizer.vocab[i]))
            types.append(gguf.TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{i}]")
            types.append(gguf.TokenType.UNUSED)
    merges = [f"{spell(a)} {spell(b)}" for a, b in tokenizer.merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[tokenizer.pattern])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eot_id)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(tokenizer.eot_id)
    # Every pretraining document begins with <|endoftext|>; a chat template defines its own beginning.
    writer.add_add_bos_token(not template)
    writer.add_add_space_prefix(False)
    if template:
        writer.add_eot_token_id(end)  # end of a turn
        writer.add_chat_template(template)


def spaces_before_digits(tokenizer: Tokenizer) -> list[str]:
    """Tokens of several spaces or newlines that llama.cpp uses before a digit and we do not.

    Its "smollm" splits off the digits first, and then treats the whitespace before them as the end of a text.
    Our pattern separates the last whitespace character from the rest.
    """
    if tokenizer.pattern != DIGITS_PATTERN:
        return []
    texts = [token.decode("utf-8", "replace") for token in tokenizer.vocab.values()]
    return [text for text in texts if len(text) > 1 and text.isspace()]


# -----------------------------------------------------------------------------
# The file


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def chat_template(folder: Path) -> str:
    """The template of a chat model, without generation marks, which are transformers' own; "" for others."""
    run, config = read_json(folder / "run.json"), read_json(folder / "tokenizer_config.json")
    if not run.get("chat") and config.get("eos_token") in (EOT, None):
        return ""
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    return without_generation_marks(template or "")


def end_id(folder: Path, tokenizer: Tokenizer, rows: int, template: str) -> int:
    """The id that ends an answer. Older runs name <|endoftext|> although their template has <|end|>."""
    name = read_json(folder / "tokenizer_config.json").get("eos_token", EOT)
    if "<|end|>" in template:
        name = "<|end|>"
    found = tokenizer.special_ids.get(name, tokenizer.eot_id)
    return found if template and found < rows else tokenizer.eot_id


def write_gguf(folder: str | Path, file: str | Path = "", dtype: str = "F16") -> list[str]:
    """Converts a folder; returns messages for the user: what was written, and warnings."""
    try:
        import gguf
    except ImportError:
        raise GGUFError('this needs the package gguf: pip install ".[gguf]"') from None
    folder = Path(folder)
    file = Path(file or folder / f"{folder.resolve().name}.gguf")
    if (folder / "adapter_config.json").exists():
        raise GGUFError(f"{folder} is an adapter: train with --merge, then convert {folder / 'merged'}")
    model, tokenizer = ModernDecoderLM.from_pretrained(folder), Tokenizer.load(folder)
    c = model.config
    refuse_unknown(c)
    if EOT not in tokenizer.special_ids:
        raise GGUFError(f"{folder}: the tokenizer has no {EOT}, with which texts begin and end")
    template = chat_template(folder)
    end = end_id(folder, tokenizer, c.vocab_size, template)

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, ARCHITECTURES[architecture(c)])
        add_settings(writer, c, folder.resolve().name, dtype)
        add_vocabulary(writer, tokenizer, c.vocab_size, end, template)
        for name, tensor in gguf_tensors(model).items():
            writer.add_tensor(name, stored_as(name, tensor, dtype).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, write)
    lines = [f"{file}: {file.stat().st_size / 2**20:.1f} MiB, {dtype}, {ARCHITECTURES[architecture(c)]}"]
    if OUR_TURN in template:
        modelfile = file.with_name("Modelfile")
        text = MODELFILE.format(file=file.name, context=usable_context(c), template=GO_TEMPLATE)
        write_atomically(modelfile, lambda path: path.write_text(text))
        lines.append(f"{modelfile}: for Ollama, with the chat template")
    if usable_context(c) < c.context_length:
        lines.append(
            f"llama.cpp computes no sliding window for this architecture: the file allows {c.sliding_window} "
            f"tokens, one window, instead of {c.context_length}"
        )
    if wide := spaces_before_digits(tokenizer):
        lines.append(
            f"llama.cpp splits spaces and newlines before a digit differently: it may use {wide[0]!r} and "
            f"{len(wide) - 1} other tokens where training used one token per character"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m support.gguf", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", help="run folder, or a folder with a Hugging Face model")
    parser.add_argument("file", nargs="?", default="", help="what to write; default FOLDER/NAME.gguf")
    parser.add_argument("--dtype", choices=("F16", "F32"), default="F16", help="of the matrices")
    options = parser.parse_args()
    try:
        print("\n".join(write_gguf(options.folder, options.file, options.dtype)))
    except (ValueError, OSError) as error:  # GGUFError is a ValueError
        raise SystemExit(f"support.gguf: {error}") from None


if __name__ == "__main__":
    main()
