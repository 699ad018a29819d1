"""The form from which the page starts a run: the stages' dataclasses, with their --help lines."""

import importlib
import runpy
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

from configs import ROOT, alternatives, field_comments
from support.watching import STAGES

CLASSES = {"train": "TrainConfig", "finetune": "FinetuneConfig", "sft": "SFTConfig", "dpo": "DPOConfig"}
CLASSES |= {"verifier": "VerifierConfig"}
NOT_HERE = "out name overwrite plan measure vram card list verifier problem answer wandb".split()


def config_class(stage: str):
    return getattr(importlib.import_module(stage), CLASSES[stage])


@cache
def forms() -> dict:
    found = {}
    for stage in STAGES:
        Config, groups, names = config_class(stage), {}, []
        kinds, helps = get_type_hints(Config), field_comments(Config)
        for field in fields(Config):
            if field.name in NOT_HERE:
                continue
            owner = next(
                c for c in reversed(Config.__mro__) if field.name in vars(c).get("__annotations__", {})
            )
            groups.setdefault((owner.__doc__ or owner.__name__).splitlines()[0], []).append(
                {"name": field.name, "default": field.default, "help": helps.get(field.name, "")}
                | kind_of_field(kinds[field.name])
            )
            names.append(field.name)
        doc = sys.modules[Config.__module__].__doc__.splitlines()[0]
        configs = [file.stem for file in sorted(ROOT.glob("configs/[!_]*.py")) if stage_of(file) == stage]
        grouped = [{"title": title, "fields": some} for title, some in groups.items()]
        found[stage] = {"doc": doc, "configs": configs, "groups": grouped, "names": names}
    return found


def kind_of_field(kind) -> dict:
    """{"kind": "int" ..., "choices": [...]} of a setting's type."""
    choices = [value for one in alternatives(kind) for value in get_args(one)]
    if choices:
        return {
            "kind": "choice",
            "choices": [*choices, *([True, False] if bool in alternatives(kind) else [])],
        }
    names = {bool: "bool", int: "int", float: "float"}
    return {"kind": next((names[one] for one in alternatives(kind) if one in names), "str"), "choices": []}


def stage_of(config: Path) -> str:
    """Which script a config file is for."""
    if config.stem in STAGES:
        return config.stem
    return "finetune" if "task" in runpy.run_path(str(config)) else "train"
