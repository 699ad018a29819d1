"""The form from which the page starts a run: the stages' dataclasses, with their --help lines."""

import importlib
import runpy
from dataclasses import Field, fields
from functools import cache
from pathlib import Path
from typing import get_type_hints

from configs import ROOT, alternatives, field_comments
from support.watching import STAGES

NOT_HERE = "out name overwrite plan measure vram card list verifier problem answer wandb".split()
KINDS = {bool: "bool", int: "int", float: "float", str: "str"}


def config_class(stage: str):
    return getattr(importlib.import_module(stage), STAGES[stage])


def settings_of(stage: str) -> list[Field]:
    """Settings that the page may change."""
    return [field for field in fields(config_class(stage)) if field.name not in NOT_HERE]


@cache
def forms() -> dict:
    return {stage: form(stage) for stage in STAGES}


def form(stage: str) -> dict:
    """Settings in groups, one for each dataclass that `Config` extends."""
    Config, groups = config_class(stage), {}
    types, helps = get_type_hints(Config), field_comments(Config)
    for field in settings_of(stage):
        owner = next(c for c in reversed(Config.__mro__) if field.name in vars(c).get("__annotations__", {}))
        title = owner.__doc__.splitlines()[0]
        about = {"name": field.name, "default": field.default, "help": helps.get(field.name, "")}
        about |= kind_of(types[field.name])
        groups.setdefault(title, []).append(about)
    files = sorted(ROOT.glob("configs/[!_]*.py"))
    return {
        "doc": importlib.import_module(stage).__doc__.splitlines()[0],
        "configs": [file.stem for file in files if stage_of(file) == stage],
        "groups": [{"title": title, "fields": some} for title, some in groups.items()],
    }


def kind_of(annotation) -> dict:
    """{"kind": "bool", "int", "float", "str" or "choice", "choices": [...]} of a setting's type."""
    types = alternatives(annotation)
    choices = [one for one in types if not isinstance(one, type)]
    if choices and bool in types:
        choices += [True, False]
    if choices:
        return {"kind": "choice", "choices": choices}
    return {"kind": next(KINDS[one] for one in types if one in KINDS), "choices": []}


def stage_of(config: Path) -> str:
    """Which script a config file is for."""
    if config.stem in STAGES:
        return config.stem
    return "finetune" if "task" in runpy.run_path(str(config)) else "train"
