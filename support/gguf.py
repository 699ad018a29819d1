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
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from model import ModelConfig, ModernDecoderLM
from support.chat_template import without_generation_marks
from support.files import write_atomically
from support.hf_format import MOE_SWITCHES, SWITCHES, architecture, to_hf_tensors
from support.results import read_json_or_empty
from support.tokenizer_json import spell
from tokenizer import DIGITS_PATTERN, EOT, GPT2_PATTERN, Tokenizer

# transformers' name of an architecture -> llama.cpp's. Its "llama" also computes Mixtral's experts.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen3": "qwen3", "gpt2": "gpt2"}
# Pre-tokenization, before BPE: llama.cpp's names of our two patterns.
PRE_TOKENIZERS = {GPT2_PATTERN: "gpt-2", DIGITS_PATTERN: "smollm"}
FILE_TYPES = {"F16": "MOSTLY_F16", "F32": "ALL_F32"}
# Ollama writes chat templates in Go; this one is CHAT_TEMPLATE of support/tokenizer_json.py.
MODELFILE = """FROM ./FILE
TEMPLATE \"\"\"{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>\"\"\"
PARAMETER stop <|end|>
PARAMETER stop <|endoftext|>
PARAMETER num_ctx CONTEXT
"""
OUR_TURN = "'<|' + message['role'] + '|>'"  # in CHAT_TEMPLATE of support/tokenizer_json.py


# -----------------------------------------------------------------------------
# Weights


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a query or key projection, reordered for the RoPE of llama.cpp's "llama".

    We and transformers rotate feature i with feature i + D/2 of a head; llama.cpp rotates feature 2i with
    2i + 1, as Meta's original code does. Works for weights (H D, d) and biases (H D).
    """
    halves = weight.reshape(n_heads, 2, -1, *weight.shape[1:])  # (H, 2, D/2, ...)
    return halves.transpose(1, 2).reshape(weight.shape)


def gguf_tensors(model: ModernDecoderLM, arch: str, dtype: str) -> dict[str, Tensor]:
    """The model's weights under llama.cpp's names and in its layout: (out, in), experts first.

    The large matrices become F16; llama.cpp needs vectors, position embeddings and routers in F32.
    """
    import gguf

    c = model.config
    weights = model.state_dict()
    found = {}
    if arch == "gpt2":  # queries, keys and values are one matrix
        weights = to_hf_tensors(c, weights)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.n_layers)
    for name, tensor in weights.items():
        if arch == "gpt2" and ".h." in name and tensor.dim() == 2:
            tensor = tensor.T  # GPT-2's own layout is (in, out)
        if arch == "llama" and re.search("[qk]_proj", name):
            tensor = interleaved(tensor, c.n_heads if "q_proj" in name else c.n_kv_heads)
        # Our experts are bare parameters, all of a layer in one: mlp.w1
        name = re.sub(r"mlp\.(w\d)$", r"block_sparse_moe.experts.\1.weight", name)
        name = names.get_name(name, (".weight", ".bias"))
        small = tensor.dim() < 2 or name.startswith("position_embd") or "ffn_gate_inp" in name
        found[name] = tensor.to(torch.float32 if dtype == "F32" or small else torch.float16)
    return found


# -----------------------------------------------------------------------------
# Settings and vocabulary: {name: value}, where GGUFWriter has a method add_{name}


def settings(c: ModelConfig) -> dict:
    found = {
        "vocab_size": c.vocab_size,
        # llama.cpp's "llama" has no sliding window, so the context is at most one window.
        "context_length": min(c.context_length, c.sliding_window or c.context_length),
        "embedding_length": c.d_model,
        "block_count": c.n_layers,
        "feed_forward_length": c.d_ff,
        "head_count": c.n_heads,
    }
    if architecture(c) == "gpt2":
        return found | {"layer_norm_eps": c.norm_eps}
    if c.ffn == "moe":
        found |= {"expert_count": c.n_experts, "expert_used_count": c.experts_per_token}
    return found | {
        "head_count_kv": c.n_kv_heads,
        "key_length": c.head_dim,
        "value_length": c.head_dim,
        "layer_norm_rms_eps": c.norm_eps,
        "rope_dimension_count": c.head_dim,
        "rope_freq_base": c.rope_theta,
    }


def vocabulary(tokenizer: Tokenizer, rows: int, end: int, template: str) -> dict:
    """Tokens, merges, special tokens; unused ones of the `rows` of the embedding get padding tokens.

    `end`: the id at which generation stops. `template`: the chat template, or "".
    """
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [TokenType.UNUSED] * rows
    for i, token in tokenizer.vocab.items():
        tokens[i] = spell(token)
        types[i] = TokenType.NORMAL
    for token, i in tokenizer.special_ids.items():
        if i < rows:
            tokens[i] = token
            types[i] = TokenType.CONTROL
    found = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": PRE_TOKENIZERS[tokenizer.pattern],
        "token_list": tokens,
        "token_types": types,
        "token_merges": [f"{spell(a)} {spell(b)}" for a, b in tokenizer.merges],
        "bos_token_id": tokenizer.eot_id,
        "eos_token_id": end,
        "pad_token_id": tokenizer.eot_id,
        # Every pretraining document begins with <|endoftext|>; a chat template defines its own beginning.
        "add_bos_token": not template,
        "add_space_prefix": False,
    }
    return found | ({"eot_token_id": end, "chat_template": template} if template else {})


def spaces_before_digits(tokenizer: Tokenizer) -> list[str]:
    """Tokens of several spaces or newlines that llama.cpp uses before a digit and we do not.

    Its "smollm" splits off the digits first, and then treats the whitespace before them as the end of a text.
    Our pattern separates the last whitespace character from the rest.
    """
    if tokenizer.pattern != DIGITS_PATTERN:
        return []
    texts = [token.decode("utf-8", "replace") for token in tokenizer.vocab.values()]
    return [text for text in texts if len(text) > 1 and text.isspace()]


def chat_ending(folder: Path, tokenizer: Tokenizer) -> tuple[str, str]:
    """The template of a chat model and the token that ends its answers; of others "" and <|endoftext|>."""
    end = read_json_or_empty(folder / "tokenizer_config.json").get("eos_token", EOT)
    chat = read_json_or_empty(folder / "run.json").get("chat") or end != EOT
    if not chat or not tokenizer.chat_template:
        return "", EOT
    # The generation marks are transformers' own.
    return without_generation_marks(tokenizer.chat_template), end


# -----------------------------------------------------------------------------
# The file


def write_gguf(folder: str | Path, file: str | Path = "", dtype: str = "F16") -> list[str]:
    """Converts a folder; returns messages for the user: what was written, and warnings."""
    try:
        import gguf
    except ImportError:
        raise ValueError('this needs the package gguf: pip install ".[gguf]"') from None
    folder = Path(folder)
    name = folder.resolve().name
    file = Path(file or folder / f"{name}.gguf")
    model, tokenizer = read_model(folder)
    c = model.config
    template, end = chat_ending(folder, tokenizer)
    arch = ARCHITECTURES[architecture(c)]
    end_id = tokenizer.special_ids.get(end, tokenizer.eot_id)
    values = {
        "name": name,
        "file_type": gguf.LlamaFileType[FILE_TYPES[dtype]],
        **settings(c),
        **vocabulary(tokenizer, c.vocab_size, end_id, template),
    }
    context = values["context_length"]

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, arch)
        for key, value in values.items():
            getattr(writer, f"add_{key}")(value)
        for key, tensor in gguf_tensors(model, arch, dtype).items():
            writer.add_tensor(key, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, write)
    lines = [f"{file}: {file.stat().st_size / 2**20:.1f} MiB, {dtype}, {arch}"]
    if OUR_TURN in template:
        modelfile = file.with_name("Modelfile")
        modelfile.write_text(MODELFILE.replace("FILE", file.name).replace("CONTEXT", str(context)))
        lines.append(f"{modelfile}: for Ollama, with the chat template")
    if context < c.context_length:
        lines.append(
            f"llama.cpp computes no sliding window for this architecture: the file allows {context} "
            f"tokens, one window, instead of {c.context_length}"
        )
    if wide := spaces_before_digits(tokenizer):
        lines.append(
            f"llama.cpp splits spaces and newlines before a digit differently: it may use {wide[0]!r} and "
            f"{len(wide) - 1} other tokens where training used one token per character"
        )
    return lines


def read_model(folder: Path) -> tuple[ModernDecoderLM, Tokenizer]:
    """Raises ValueError for a model or tokenizer that a GGUF file cannot describe."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter: train with --merge, then convert {folder / 'merged'}")
    model = ModernDecoderLM.from_pretrained(folder)
    tokenizer = Tokenizer.load(folder)
    if architecture(model.config) not in ARCHITECTURES:
        ours = asdict(model.config)
        plain = asdict(ModelConfig())
        switches = {name: ours[name] for name in SWITCHES + MOE_SWITCHES if ours[name] != plain[name]}
        raise ValueError(
            f"llama.cpp has no architecture for this combination of switches: {switches}. "
            "It runs Llama's shape, also with qk_norm (Qwen3) or ffn=moe (Mixtral), and GPT-2's: norm=layer, "
            "positions=learned, ffn=gelu, bias, tied embeddings, as many KV heads as heads"
        )
    if EOT not in tokenizer.special_ids:
        raise ValueError(f"{folder}: the tokenizer has no {EOT}, with which texts begin and end")
    if tokenizer.pattern not in PRE_TOKENIZERS:
        raise ValueError(
            f"this tokenizer splits words by an unknown pattern ({tokenizer.pattern[:60]}...), so its "
            "pre-tokenizer in llama.cpp is not known: use llama.cpp's convert_hf_to_gguf.py"
        )
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m support.gguf", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", help="run folder, or a folder with a Hugging Face model")
    parser.add_argument("file", nargs="?", default="", help="what to write; default FOLDER/NAME.gguf")
    parser.add_argument("--dtype", choices=FILE_TYPES, default="F16", help="of the matrices")
    options = parser.parse_args()
    try:
        print("\n".join(write_gguf(options.folder, options.file, options.dtype)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"support.gguf: {error}") from None


if __name__ == "__main__":
    main()
