"""What pretraining checks and records: its token files and the model that it starts from."""

import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path

from configs import parse_config
from model import ModernDecoderLM
from support.runs import TrainError
from tokenizer import Tokenizer, TokenizerConfig, TokenizerStageConfig


def tokenizer_command(cfg) -> str:
    """The command that makes the token files of these settings: the same config files, and what differs."""
    files = []
    if Path(sys.argv[0]).name == "train.py":  # not a test or a notebook
        files = [word for word in sys.argv[1:] if word.endswith(".py") and not word.startswith("-")]
    from_files = parse_config(TokenizerStageConfig, "", files)
    flags = []
    for f in fields(TokenizerConfig):
        value = getattr(cfg, f.name)
        if value != getattr(from_files, f.name):
            flags.append(f"--{f.name}={value}")
    return shlex.join(["python", "tokenizer.py", *files, *flags])


def adopt(model: ModernDecoderLM, cfg, tokenizer: Tokenizer) -> None:
    """Makes --init_from's model and the settings agree: shape from the model, context and dropout from us."""
    have = model.config
    theirs = tokenizer.hash
    if (Path(cfg.init_from) / "tokenizer.json").exists():
        theirs = Tokenizer.load(cfg.init_from).hash
    # Token files hold no chat tokens, so GPT-2 itself can read those that its vocabulary made.
    if theirs != tokenizer.hash or have.vocab_size < min(tokenizer.vocab_size, 50257):
        raise TrainError(
            f"{cfg.init_from} ({have.vocab_size} tokens) has another vocabulary than the token files "
            f"({tokenizer.vocab_size}): make them with python tokenizer.py --tokenizer={cfg.init_from}"
        )
    if have.positions != "learned":
        model.set_context_length(cfg.context_length)
    elif have.context_length < cfg.context_length:
        raise TrainError(f"{cfg.init_from} has {have.context_length} positions, --context_length is larger")
    model.set_dropout(cfg.dropout)
    for name in asdict(have).keys() - {"context_length"}:
        setattr(cfg, name, getattr(have, name))


def data_record(train: dict, validation: dict) -> dict:
    """What run.json records of the token files; a resumed run must have the same."""
    keys = ("source", "fingerprint", "tokens", "bytes")
    record = {key: train.get(key) for key in (*keys, "licence")}
    if "left_out" in train:  # rows without text
        record["left_out"] = train["left_out"]
    return record | {"validation": {key: validation.get(key) for key in keys}}
