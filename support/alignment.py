"""What SFT, DPO and the verifier share: the chat model that is trained, its Trainer, their command line."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

from data import DataError
from finetune import AdaptConfig, Epochs, FineTuner, build_model, parameters_of, plan_steps
from support.adapters import merge
from support.loading import origin, resolve
from support.runs import AlreadyFinished, TrainError
from support.text_model import TextModel
from train import Trainer


def chat_model(cfg: AdaptConfig) -> TextModel:
    """The decoder that will be trained; it reads and writes turns of conversations."""
    source = resolve(cfg.model)
    if source.kind != "causal":
        raise TrainError(f"{cfg.model} is no decoder ({source.kind}): only these hold conversations")
    return build_model(cfg, source, align=True)


def stage_trainer(cfg: AdaptConfig, model: TextModel, data: Epochs, tokens: float, about: dict, **stage):
    """The Trainer of a stage; steps, epochs and FLOPs follow from `data` and the mean tokens of its rows.

    Sets max_steps where it is 0. `about` goes to run.json.
    """
    smoke = plan_steps(cfg, math.ceil(data.batches * cfg.epochs))
    parameters, _ = parameters_of(model.model)
    per_parameter = 4 if cfg.lora_r else 6  # frozen weights need no gradient
    about = origin(cfg.model) | {"chat": True, "smoke": smoke} | about
    about["data"] = about["data"] | {"tokenizer": model.tokenizer.hash}
    usual = {
        "tokens_per_row": max(1, round(tokens)),
        "flops_per_row": per_parameter * parameters * tokens,
        "epoch": lambda step: step / data.batches,
        "tokenizer": model.tokenizer,
    }
    return FineTuner(cfg, model, data.batch, about=about, **usual | stage)


def train_and_merge(cfg: AdaptConfig, trainer: Trainer) -> dict:
    """All steps and then, with --merge, base and adapter as one model. If a process was killed before it had
    merged, the next one does it.
    """
    try:
        run = trainer.run_all_steps()
    except AlreadyFinished as finished:
        if not cfg.merge or (trainer.folder / "merged").exists():
            raise
        run = finished.run
    if cfg.merge and trainer.rank == 0:
        merge(trainer.folder)
    return run


def run_stage(stage: Callable, cfg: AdaptConfig, describe: Callable[[dict], str]) -> None:
    """A stage from the command line: what came out, from run.json; or what the user can correct."""
    try:
        print(describe(stage(cfg)))
    except AlreadyFinished as finished:
        print(describe(finished.run))
        print("nothing to do: --overwrite trains it anew, --name trains another")
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def best_evaluation(run: dict) -> str:
    folder = Path(run["settings"]["out"]) / run["settings"]["name"]
    figures = ", ".join(f"{name} {value:.4g}" for name, value in run["results"]["best"].items())
    return f"{folder}: {run['seconds'] / 60:.1f} min; {figures}; python chat.py {folder} --chat"
