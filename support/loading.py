"""Which model a name means: a run of ours, a folder or an id of the hub, an adapter; and how it is loaded."""

import contextlib
import importlib.util
import logging
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from data import TASKS
from model import ModernDecoderLM
from support.chat_template import is_ours
from support.hf_format import from_hf_config, from_tensors
from support.hub import unreachable
from support.hub_models import HubTokenizer
from support.machine import pick_dtype
from support.runs import TrainError, read_json, weights_hash
from support.text_model import KINDS, TextModel, class_name
from support.tokenizer_json import ForeignTokenizer, check_tokenizer
from tokenizer import EOT, Tokenizer


def load_model(
    name: str, device: torch.device, backend: str = "auto", context_length: int = 0,
    dtype: torch.dtype | None = None,
) -> TextModel:  # fmt: skip
    """Loads a run folder of ours, a Hugging Face folder or hub id, or a PEFT adapter, for inference.

    backend: "ours" computes with model.py, "transformers" with transformers; "auto" uses model.py where it
    can compute the model, after merging an adapter into its base in memory. dtype: of the weights and
    activations of transformers (default: the fast one of a GPU, float32 on a CPU); our weights stay float32
    and are cast when used. Raises TrainError, ValueError or OSError with a message for the user.
    """
    config = read_config(name)
    kind, adapter = kind_of(name, config), is_adapter(name)
    why_not = why_not_ours(kind, config)
    if adapter and config.get("num_local_experts"):  # transformers holds all experts as one matrix
        why_not = why_not or "an adapter on a mixture of experts"
    if backend == "ours" and why_not:
        raise TrainError(f"model.py cannot compute {name} ({why_not}): --backend=auto")
    tokenizer = load_tokenizer(name, ours=backend != "transformers")
    dtype = dtype or (pick_dtype("auto", device) if device.type == "cuda" else torch.float32)
    if (kind, dtype) == ("seq2seq", torch.float16):  # T5's activations exceed 65,504
        dtype = torch.float32
    if backend != "transformers" and not why_not:
        if adapter:
            merged = with_adapter(name, kind, merge=True)
            model = from_tensors(from_hf_config(merged.config.to_dict()), merged.state_dict(), name)
        else:
            model = ModernDecoderLM.from_pretrained(name)
        model = model.to(device)
    else:
        load = with_adapter if adapter else from_hub
        model = load(name, kind, dtype=dtype).to(device).eval()
    return TextModel(model, tokenizer, kind, name, context_length, is_chat(name, tokenizer, config))


def why_not_ours(kind: str, config: dict) -> str:
    """Why model.py cannot compute a model; "" if it can."""
    if kind != "causal":
        return kind
    try:
        from_hf_config(config)
    except (ValueError, KeyError) as error:
        return str(error)
    except (TypeError, AttributeError) as error:
        return f"its config.json is damaged: {error}"
    return ""


def is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").exists()


def is_chat(name: str, tokenizer: Tokenizer | HubTokenizer, config: dict) -> bool:
    """Whether a model was instruction-tuned, so that prompts must be turns of a conversation.

    A run says so in run.json. Other models are chat models if they have a chat template. Exception: all our
    tokenizers have our template, so there the sign is a config with two end-of-text tokens.
    """
    run = record_of(name)
    if run.exists():
        return bool(read_json(run).get("chat"))
    if is_ours(tokenizer.chat_template):
        return isinstance(config.get("eos_token_id"), list)
    return tokenizer.chat_template is not None


def record_of(name: str) -> Path:
    """run.json of a run folder, or of the run that a checkpoint belongs to."""
    folder = Path(name)
    return (folder.parents[1] if folder.parent.name == "checkpoints" else folder) / "run.json"


def adapter_base(name: str) -> str:
    """The base model of an adapter: a folder or a hub id.

    PEFT records the path that was given in training. It is tried as it is, then relative to the adapter's
    folder and to each of its parents. If an absolute path no longer exists (all runs were moved), its last
    parts are tried in the same folders.
    """
    folder = Path(name).absolute()
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    run = folder / "run.json"
    if not base and run.exists():
        base = read_json(run).get("parent")
    if not base:
        raise TrainError(
            f"{name}/adapter_config.json names no base model: set "
            "base_model_name_or_path to its folder or hub id"
        )
    if not isinstance(base, str):
        raise TrainError(f"{name}/adapter_config.json: base_model_name_or_path must be a text, not {base!r}")
    if Path(base).is_dir():
        return base
    parts = [part for part in Path(base).parts if part not in ("/", ".")]
    for parent in (folder, *folder.parents):
        ends = range(len(parts)) if Path(base).is_absolute() else (0,)
        for first in ends:
            found = parent.joinpath(*parts[first:])
            if (found / "config.json").exists() and found != folder:
                return str(found)
    return base


def read_config(name: str) -> dict:
    """config.json of a model; for an adapter, that of its base."""
    folder = Path(name)
    if is_adapter(name):
        return read_config(adapter_base(name))
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise TrainError(
                f"{folder} holds neither config.json nor adapter_config.json: not a finished run"
            )
        return read_json(folder / "config.json")
    if folder.parts[0] in ("/", "..", "out") or name.count("/") > 1:  # no name on the hub looks like that
        raise TrainError(f"there is no folder {folder}; python train.py --list shows all runs")
    unreachable()  # one check; otherwise transformers would retry for minutes
    from transformers import AutoConfig

    with explained(name):
        return AutoConfig.from_pretrained(name).to_dict()


def kind_of(name: str, config: dict) -> str:
    """The kind of a TextModel: "causal", "seq2seq" or "head"."""
    adapter = Path(name) / "adapter_config.json"
    if adapter.exists() and (kind := adapter_kind(read_json(adapter), name)):
        return kind
    if "ForSequenceClassification" in str(config.get("architectures")):
        return "head"
    return "seq2seq" if config.get("is_encoder_decoder") else "causal"


def adapter_kind(settings: dict, name: str) -> str | None:
    """The kind of model in adapter_config.json; None if it has none: then it is the kind of the base."""
    task_type = str(settings.get("task_type") or "")
    kinds = {theirs: ours for ours, theirs in LORA_KINDS.items()}
    if task_type and task_type not in kinds:
        raise TrainError(f"{name} is an adapter for {task_type}; known are {', '.join(kinds)}")
    if task_type:
        return kinds[task_type]
    trained = map(str, settings.get("modules_to_save") or ())
    return "head" if {"classifier", "score", "classification_head"} & set(trained) else None


@contextlib.contextmanager
def explained(name: str):
    """Turns errors of transformers and the hub into a TrainError: one line, with what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except pickle.UnpicklingError:  # raised by torch.load(weights_only=True)
        raise TrainError(
            f"{name} cannot be loaded: its weights are a pickle that holds more than tensors and could run "
            "code. Get them as model.safetensors"
        ) from None
    except Exception as error:  # whatever a library raises at a file that is not as it should be
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if Path(name).is_dir():
            raise TrainError(f"{name} cannot be loaded: {why}") from None
        raise TrainError(
            f"{name} is not a folder, and could not be loaded from the Hugging Face hub: {why}\n"
            f"  With a network: hf download {name} --local-dir models/{name.split('/')[-1]}, "
            "then --model=that folder"
        ) from None


def from_hub(name: str, kind: str, labels: tuple[str, ...] = (), **kwargs) -> nn.Module:
    """A transformers model, by default in float32; `labels`: with a classification head for them."""
    import transformers

    transformers.logging.set_verbosity_error()  # no warnings about a new head or a slow tokenizer
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is installed
    config = read_config(name)
    if config.get("model_type") == "modern_llm":
        raise TrainError(
            f"{name} was built with switches for which transformers has no architecture (`architecture` in "
            "model.py says which), so it cannot be tuned here; train.py --init_from and eval.py can use it"
        )
    if labels and not knows_labels(config, labels):
        names = dict(enumerate(label.strip() for label in labels))
        kwargs |= {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    with explained(name):
        load = getattr(transformers, KINDS[kind]).from_pretrained
        model, about = load(name, output_loading_info=True, **{"dtype": torch.float32} | kwargs)
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = None  # we pad with <|endoftext|>, which must be trained like any token
    # transformers initialises missing weights randomly; that is allowed only for a new head.
    inside = f"{model.base_model_prefix}."
    missing = [k for k in about["missing_keys"] if not labels or (k.startswith(inside) and "pooler" not in k)]
    if missing:
        raise TrainError(f"{name} is not a complete model: missing weights {', '.join(sorted(missing)[:4])}")
    return model


def knows_labels(config: dict, labels: Sequence[str]) -> bool:
    """Whether a checkpoint has a classification head for exactly these labels, in any order."""
    names = (config.get("id2label") or {}).values()
    return sorted(map(class_name, names)) == sorted(map(class_name, labels))


def with_adapter(name: str, kind: str, merge: bool = False, trainable: bool = False, **kwargs) -> nn.Module:
    """The base model with the PEFT adapter of a folder. `kwargs`: passed to from_hub."""
    base_name, run = adapter_base(name), Path(name) / "run.json"
    record = read_json(run) if run.exists() else {}
    tuned_on = record.get("base_hash", record.get("parent_hash"))
    if tuned_on and tuned_on != weights_hash(base_name):
        raise TrainError(
            f"{name} was trained on other weights than {base_name} now has: "
            "the base was trained again, so fine-tune again"
        )
    labels = tuple(TASKS[task].labels) if kind == "head" and (task := task_of(name)) else ()
    base = from_hub(base_name, kind, labels, **kwargs)
    n_tokens = load_tokenizer(name).vocab_size
    if n_tokens > base.config.vocab_size:  # training added chat tokens
        base.resize_token_embeddings(n_tokens)
    import peft  # after from_hub, which silences its imports

    with explained(name):
        model = peft.PeftModel.from_pretrained(base, name, is_trainable=trainable)
        if merge:
            return model.merge_and_unload()
    if not trainable and (dtype := kwargs.get("dtype")):
        model = model.to(dtype)
    return model


def task_of(name: str) -> str | None:
    """The task that a run folder, or one of its checkpoints, was tuned on."""
    run = record_of(name)
    return read_json(run).get("settings", {}).get("task") if run.exists() else None


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(name: str, ours: bool = True) -> Tokenizer | HubTokenizer:
    """Our Tokenizer, which is faster, if it can read the files; else, or if not `ours`, transformers'."""
    if Path(name).is_dir():
        try:
            tokenizer = Tokenizer.load(name)  # also if not `ours`: this checks the hash
            if ours and EOT in tokenizer.special_ids:
                return tokenizer
        except ForeignTokenizer:
            raise
        except (ValueError, OSError):  # of another kind, or there is no tokenizer.json
            if not any((Path(name) / file).exists() for file in TOKENIZER_FILES):
                raise TrainError(f"{name} holds no tokenizer.json and no other tokenizer file") from None
    from transformers import AutoTokenizer

    with explained(name):
        tokenizer = HubTokenizer(AutoTokenizer.from_pretrained(name))
    check_tokenizer(Path(name), tokenizer.hash)
    return tokenizer


def head_layers(model: nn.Module) -> list[str]:
    """The new layers of a classifier, which LoRA trains and saves as they are: all outside of the model that
    was trained before, and BERT's pooler, which it may not have had. PEFT by itself knows the last one only.
    """
    inside = model.base_model_prefix
    outside = [n for n, m in model.named_children() if n != inside and any(True for _ in m.parameters())]
    poolers = [n for n, _ in model.named_modules() if n.endswith(".pooler")]
    return outside + poolers


def all_linear(model: nn.Module, head: list[str]) -> str | list[str]:
    """The layers that LoRA corrects by default, without those of a head. PEFT would add experts that are one
    matrix of three dimensions, and it corrects these without dropout only: they stay as they are.
    """
    if not head and all(p.ndim < 3 for p in model.parameters()):
        return "all-linear"
    output = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output]
    return [name for name in linear if not any(f"{name}.".startswith(f"{part}.") for part in head)]


def four_bit(device: torch.device) -> dict:
    """How transformers is told to load weights in 4 bits: NF4, whose scales are quantized as well."""
    if not importlib.util.find_spec("bitsandbytes"):
        raise TrainError('--load_in_4bit needs the package bitsandbytes: pip install ".[qlora]"')
    from transformers import BitsAndBytesConfig

    compute = pick_dtype("auto", device)
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **how), "device_map": {"": device}}


LORA_KINDS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "head": "SEQ_CLS"}
