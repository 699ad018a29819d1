"""PEFT's LoRA, for models that transformers computes: any architecture, heads, 4-bit weights."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

from support.files import write_folder_atomically, write_json
from support.hub_models import set_token_ids
from support.loading import KINDS, import_peft, load_tokenizer, origin, resolve, with_adapter
from support.machine import pick_dtype
from support.model_card import write_model_card
from support.runs import TrainError, read_json_if_there

LORA_TARGETS = {  # all linear layers of the blocks; other architectures leave the search to PEFT
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
# Keys of adapter_config.json that do not change the computation; and the targets, which are checked apart.
ELSEWHERE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "target_modules")
LORA_TARGETS |= dict.fromkeys(("mistral", "qwen2", "qwen3"), LORA_TARGETS["llama"])


def lora_config(cfg, kind: str, targets: str | list[str], **more):
    """PEFT's description of an adapter, from a finetune.AdaptConfig."""
    return import_peft().LoraConfig(
        task_type=KINDS[kind][1],
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha or 2 * cfg.lora_r,
        lora_dropout=cfg.lora_dropout,
        target_modules=targets,
        **more,
    )


def add_peft_lora(model: nn.Module, cfg, kind: str, new_tokens: list[int] = ()) -> nn.Module:
    """Freezes the model and puts LoRA's corrections beside its linear layers. B = 0 at first: no change.

    The embeddings of `new_tokens` are trained and saved, too. TrainError for a target that no layer has.
    """
    peft = import_peft()
    architecture = model.config.model_type
    head = head_layers(model) if kind == "head" else []
    targets = target_names(model, cfg.lora_targets) or LORA_TARGETS.get(architecture)
    config = lora_config(
        cfg,
        kind,
        targets or all_linear(model, head),
        modules_to_save=head or None,
        trainable_token_indices=dict.fromkeys(embedding_names(model), new_tokens) if new_tokens else None,
        fan_in_fan_out=architecture == "gpt2",  # its Conv1D stores (in, out) where Linear stores (out, in)
    )
    if cfg.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=cfg.gradient_checkpointing
        )
    try:
        return float32_where_trained(peft.get_peft_model(model, config))
    except ValueError as error:
        why = " ".join(str(error).split())[:300]
        raise TrainError(f"--lora_targets={cfg.lora_targets}: LoRA cannot be added: {why}") from None


def is_plain_lora(adapter: dict) -> bool:
    """True if adapter_config.json asks for LoRA on linear layers of a Llama and for nothing else, so that
    finetune.py's own LoRA can compute it.
    """
    targets = adapter.get("target_modules")
    numbers = {name: adapter.get(name) for name in ("r", "lora_alpha", "lora_dropout")}
    if not isinstance(targets, list) or not all(isinstance(x, int | float) for x in numbers.values()):
        return False
    usual = import_peft().LoraConfig(**numbers, task_type="CAUSAL_LM").to_dict()
    for key, value in adapter.items():
        if value and key not in ELSEWHERE and value != usual.get(key):
            return False
    return {*map(str, targets)} <= {*LORA_TARGETS["llama"]}


def target_names(model: nn.Module, targets: str) -> list[str]:
    """The names of --lora_targets, each of which must be a layer's; [] if there are none."""
    names = targets.replace(",", " ").split()
    for target in names:
        if not any(is_target(n, [target]) and hasattr(m, "weight") for n, m in model.named_modules()):
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            raise TrainError(
                f"--lora_targets={targets}: no layer is called {target!r}; there are "
                f"{', '.join(sorted(linear))}"
            )
    return names


def is_target(name: str, targets: list[str]) -> bool:
    """True if a layer's full name ends with one of the targets, as PEFT compares them."""
    return f".{name}".endswith(tuple(f".{target}" for target in targets))


def float32_where_trained(model: nn.Module) -> nn.Module:
    """A frozen matrix may be bfloat16; what is trained may not."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


def embedding_names(model: nn.Module) -> list[str]:
    """The names of the input and output embeddings; PEFT trains two that share a matrix as one."""
    inputs = model.get_input_embeddings()
    outputs = model.get_output_embeddings()
    matrices = [inputs]
    if outputs is not None and outputs.weight is not inputs.weight:
        matrices.append(outputs)
    return [name.rpartition(".")[2] for name, module in model.named_modules() if module in matrices]


def head_layers(model: nn.Module) -> list[str]:
    """The new layers of a classifier, which LoRA trains and saves as they are: all outside of the model that
    was trained before, and BERT's pooler, which it may not have had. PEFT by itself knows the last one only.
    """
    layers = []
    for name, module in model.named_modules():
        outside = "." not in name and name not in ("", model.base_model_prefix)
        if (outside and list(module.parameters())) or name.endswith(".pooler"):
            layers.append(name)
    return layers


def all_linear(model: nn.Module, head: list[str]) -> str | list[str]:
    """The layers that LoRA corrects by default, without those of a head. PEFT would add experts that are one
    matrix of three dimensions, and it corrects these without dropout only: they stay as they are.
    """
    if not head and all(p.ndim < 3 for p in model.parameters()):
        return "all-linear"
    found = []
    for name, module in model.named_modules():
        in_head = any(f"{name}.".startswith(f"{part}.") for part in head)
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings() and not in_head:
            found.append(name)
    return found


def four_bit(device: torch.device) -> dict:
    """How transformers loads weights in 4 bits: NF4, whose scales are quantized as well."""
    if not importlib.util.find_spec("bitsandbytes"):
        raise TrainError('--load_in_4bit needs the package bitsandbytes: pip install ".[qlora]"')
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=pick_dtype("auto", device),
    )
    return {"quantization_config": quantized, "device_map": {"": device}}


def merge(folder: Path) -> None:
    """Base and adapter as one model, in {folder}/merged: W + (alpha / r) B A is a matrix like any other."""
    source = resolve(str(folder))
    model = with_adapter(source).merge_and_unload()
    run = source.run
    ids = read_json_if_there(folder / "generation_config.json")  # a chat stops elsewhere than its base
    set_token_ids(model, {k: v for k, v in ids.items() if k.endswith("_token_id")})
    about = {key: run[key] for key in ("chat", "task", "smoke", "seconds", "results") if key in run}
    about |= {"status": "finished", "stage": "merge", "settings": {"task": run.get("task")}}

    def write(target: Path) -> None:
        model.save_pretrained(target)
        load_tokenizer(str(folder), ours=False).inner.save_pretrained(target)
        write_json(target / "run.json", origin(str(folder)) | about)

    write_folder_atomically(folder / "merged", write)
    write_model_card(folder / "merged")
