"""Which model a name means: a run of ours, a folder or an id of the hub, an adapter; and how it is loaded."""

import contextlib
import logging
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data import TASKS
from model import ModernDecoderLM
from support.chat_template import is_ours
from support.hf_format import find_folder, from_hf_config, from_tensors
from support.hub import unreachable
from support.hub_models import HubTokenizer
from support.machine import pick_dtype
from support.runs import TrainError, read_json, read_json_if_there, weights_hash
from support.text_model import TextModel, class_name
from support.tokenizer_json import ForeignTokenizer, check_tokenizer
from tokenizer import EOT, Tokenizer

KINDS = {  # kind of a TextModel: class of transformers, task type of PEFT
    "causal": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "head": ("AutoModelForSequenceClassification", "SEQ_CLS"),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass
class Source:
    """What a model's name stands for: its JSON files, read once."""

    name: str
    base: str  # folder or hub id of the weights: an adapter's base, else the name
    adapter: dict  # adapter_config.json; {} for a model without one
    config: dict  # config.json of the base
    run: dict  # run.json of the run folder, or of the checkpoint's run; {}
    kind: str  # "causal", "seq2seq" or "head"

    def why_not_ours(self) -> str:
        """Why model.py cannot compute it; "" if it can."""
        if self.kind != "causal":
            return self.kind
        try:
            from_hf_config(self.config)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return str(error)
        # transformers holds experts as one matrix
        experts = self.adapter and self.config.get("num_local_experts")
        return "an adapter on a mixture of experts" if experts else ""

    def is_chat(self, tokenizer: Tokenizer | HubTokenizer) -> bool:
        """Whether the model was instruction-tuned, so that prompts must be turns of a conversation.

        run.json knows. Other models are chat models if they have a chat template; but all our tokenizers have
        ours, so there the sign is a config with two end-of-text tokens.
        """
        if self.run:
            return bool(self.run.get("chat"))
        if is_ours(tokenizer.chat_template):
            return isinstance(self.config.get("eos_token_id"), list)
        return tokenizer.chat_template is not None


def resolve(name: str) -> Source:
    """Finds the model that a name means. Raises TrainError or OSError with a message for the user."""
    adapter = {}
    base = name
    run = read_run(name)
    if is_adapter(name):
        adapter = read_json(Path(name) / "adapter_config.json")
        base = adapter_base(Path(name), adapter.get("base_model_name_or_path") or run.get("parent"))
    config = read_config(base)
    return Source(name, base, adapter, config, run, kind_of(name, adapter, config))


def is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").exists()


def read_run(name: str) -> dict:
    """run.json of a run folder, or of the run that a checkpoint belongs to; {} if there is none."""
    folder = Path(name)
    home = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    return read_json_if_there(home / "run.json")


def adapter_base(folder: Path, base: object) -> str:
    """The base model of an adapter: a folder or a hub id.

    PEFT records the path that was given in training. It is tried as it is, then relative to the adapter's
    folder and to each of its parents. If an absolute path no longer exists (all runs were moved), its last
    parts are tried in the same folders.
    """
    if not isinstance(base, str) or not base:
        raise TrainError(f"{folder}/adapter_config.json names no base model: set base_model_name_or_path")
    if (Path(base) / "config.json").exists():
        return base
    folder = folder.absolute()
    parts = [part for part in Path(base).parts if part != "/"]
    for parent in (folder, *folder.parents):
        for first in range(len(parts) if Path(base).is_absolute() else 1):
            found = parent.joinpath(*parts[first:])
            if (found / "config.json").exists() and found != folder:
                return str(found)
    return base


def read_config(name: str) -> dict:
    """config.json of a folder or of a model of the hub."""
    folder = find_folder(name)
    if folder:
        return read_json(folder / "config.json")
    unreachable()  # one check; otherwise transformers would retry for minutes
    from transformers import AutoConfig

    with explained(name):
        return AutoConfig.from_pretrained(name).to_dict()


def kind_of(name: str, adapter: dict, config: dict) -> str:
    """The kind of a TextModel, from adapter_config.json, or else from config.json."""
    kinds = {task_type: kind for kind, (_, task_type) in KINDS.items()}
    if task_type := adapter.get("task_type"):
        if task_type not in kinds:
            raise TrainError(f"{name} is an adapter for {task_type}; known are {', '.join(kinds)}")
        return kinds[task_type]
    saved = adapter.get("modules_to_save") or ()
    heads = {"classifier", "score", "classification_head"}.intersection(map(str, saved))
    if heads or "ForSequenceClassification" in str(config.get("architectures")):
        return "head"
    return "seq2seq" if config.get("is_encoder_decoder") else "causal"


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
    source = resolve(name)
    why_not = source.why_not_ours()
    if backend == "ours" and why_not:
        raise TrainError(f"model.py cannot compute {name} ({why_not}): --backend=auto")
    ours = backend != "transformers" and not why_not
    tokenizer = load_tokenizer(name, ours=backend != "transformers")
    dtype = dtype or (pick_dtype("auto", device) if device.type == "cuda" else torch.float32)
    if ours or (source.kind == "seq2seq" and dtype == torch.float16):  # T5's activations exceed 65,504
        dtype = torch.float32
    model = load_network(source, ours, dtype=dtype).to(device).eval()
    return TextModel(model, tokenizer, source.kind, name, context_length, source.is_chat(tokenizer))


def load_network(
    source: Source, ours: bool, labels: tuple[str, ...] = (), trainable: bool = False, **kwargs
) -> nn.Module:
    """The network, with its adapter: of transformers, or of model.py (`ours`), where an adapter is merged.

    `labels`: of a new classification head. `kwargs`: passed to transformers' from_pretrained.
    """
    if not source.adapter:
        return ModernDecoderLM.from_pretrained(source.name) if ours else from_hub(source, labels, **kwargs)
    model = with_adapter(source, trainable, **kwargs)
    if not ours:
        return model
    merged = model.merge_and_unload()
    return from_tensors(from_hf_config(merged.config.to_dict()), merged.state_dict(), source.name)


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
        why = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, (KeyError, TypeError, AttributeError)):  # whose texts are no sentences
            why = f"one of its files lacks something or holds a wrong value ({type(error).__name__}: {why})"
        if Path(name).is_dir():
            raise TrainError(f"{name} cannot be loaded: {why}") from None
        raise TrainError(
            f"{name} is not a folder, and could not be loaded from the Hugging Face hub: {why}\n"
            f"  With a network: hf download {name} --local-dir models/{name.split('/')[-1]}, "
            "then --model=that folder"
        ) from None


def from_hub(
    source: Source, labels: tuple[str, ...], dtype: torch.dtype = torch.float32, **kwargs
) -> nn.Module:
    """The base as a transformers model, in float32 by default; with a classification head for `labels`."""
    import transformers

    transformers.logging.set_verbosity_error()  # no warnings about a new head or a slow tokenizer
    transformers.utils.logging.disable_progress_bar()
    name = source.base
    config = source.config
    if config.get("model_type") == "modern_llm":
        raise TrainError(
            f"{name} was built with switches for which transformers has no architecture (`architecture` in "
            "support/hf_format.py says which), so it cannot be tuned here; train.py --init_from and eval.py "
            "can use it"
        )
    names = class_names(source)
    known = sorted(map(class_name, names.values()))
    if names and source.kind == "head" and not config.get("id2label"):
        kwargs["id2label"] = names  # transformers does not read label2id alone
    if labels and known != sorted(map(class_name, labels)):
        kwargs["id2label"] = {i: label.strip() for i, label in enumerate(labels)}
        kwargs["label2id"] = {label.strip(): i for i, label in enumerate(labels)}
    with explained(name):
        load = getattr(transformers, KINDS[source.kind][0]).from_pretrained
        model, about = load(name, output_loading_info=True, dtype=dtype, **kwargs)
    model.get_input_embeddings().padding_idx = None  # we pad with <|endoftext|>, which must be trained
    # transformers initialises missing weights randomly; that is allowed only for a new head.
    inside = f"{model.base_model_prefix}."
    missing = [k for k in about["missing_keys"] if not labels or (k.startswith(inside) and "pooler" not in k)]
    if missing:
        raise TrainError(f"{name} is not a complete model: missing weights {', '.join(sorted(missing)[:4])}")
    return model


def class_names(source: Source) -> dict:
    """The class of each output, {number: name}: id2label of config.json, or else label2id turned round."""
    numbers_of, names_of = (source.config.get(key) or {} for key in ("label2id", "id2label"))
    if not isinstance(numbers_of, dict) or not isinstance(names_of, dict):
        raise TrainError(
            f"{source.base}: config.json must have id2label as an object, such as "
            '{"0": "bad", "1": "good"}, and label2id as the inverse'
        )
    return names_of or {number: label for label, number in numbers_of.items()}


def import_peft():
    """PEFT; without the messages about missing kernels of bitsandbytes, which it imports if installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import peft

    return peft


def refuse_changed_base(source: Source) -> None:
    """Raises TrainError if the base of an adapter no longer has the weights on which it was trained."""
    tuned_on = source.run.get("base_hash", source.run.get("parent_hash"))
    if tuned_on and tuned_on != weights_hash(source.base):
        raise TrainError(
            f"{source.name} was trained on other weights than {source.base} now has: the base was trained "
            "again, so fine-tune again"
        )


def with_adapter(source: Source, trainable: bool = False, **kwargs) -> nn.Module:
    """The base model with the PEFT adapter of a folder. `kwargs`: passed to from_hub."""
    refuse_changed_base(source)
    name = source.name
    task = TASKS.get(source.run.get("settings", {}).get("task"))
    base = from_hub(source, task.labels if task and source.kind == "head" else (), **kwargs)
    n_tokens = load_tokenizer(name).vocab_size
    if n_tokens > base.config.vocab_size:  # training added chat tokens
        base.resize_token_embeddings(n_tokens)
    with explained(name):
        model = import_peft().PeftModel.from_pretrained(base, name, is_trainable=trainable)
        found = model.load_adapter(name, "default", is_trainable=trainable)  # again: only this returns names
    for wrong, tensors in (("missing", found.missing_keys), ("surplus", found.unexpected_keys)):
        if tensors and not model.active_peft_config.is_prompt_learning:  # its one tensor has another name
            raise TrainError(
                f"{name}: the weights do not fit adapter_config.json and the base: {len(tensors)} tensors "
                f"are {wrong}, such as {tensors[0]}"
            )
    return model if trainable else model.to(base.dtype)


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
                if is_adapter(name):  # PEFT by itself saves no tokenizer
                    return load_tokenizer(resolve(name).base, ours)
                raise TrainError(f"{name} holds no tokenizer.json and no other tokenizer file") from None
    from transformers import AutoTokenizer

    with explained(name):
        tokenizer = HubTokenizer(AutoTokenizer.from_pretrained(name))
    check_tokenizer(Path(name), tokenizer.hash)
    return tokenizer


def is_smoke(name: str) -> bool:
    """Whether a model is a run that was cut short, or came from one."""
    return bool(read_run(name).get("smoke"))


def origin(name: str) -> dict:
    """What run.json says of the model that a run started from."""
    source = resolve(name)
    about = {"parent": name, "parent_hash": weights_hash(name)}
    if source.adapter:
        about["base_hash"] = weights_hash(source.base)
    return about
