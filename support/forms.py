"""The form from which the page starts a run: the stages' dataclasses, with their --help lines."""

import importlib
import runpy
from dataclasses import fields
from typing import get_type_hints

from configs import ROOT, SCRIPTS, alternatives, field_comments, owner_of, read_file
from support.watching import STAGES

NOT_HERE = "out name overwrite plan measure vram card list wandb".split()
CONFIGS = sorted(file.stem for file in ROOT.glob("configs/[!_]*.py"))


def config_class(stage: str):
    return getattr(importlib.import_module(stage), SCRIPTS[stage])


def settings_of(stage: str) -> list[str]:
    """Names of the settings that the page may change."""
    return [field.name for field in fields(config_class(stage)) if field.name not in NOT_HERE]


def configured(stage: str, config: str) -> dict:
    """All settings of a stage with the values of a config file; with none the defaults."""
    Config = config_class(stage)
    settings = {field.name: field.default for field in fields(Config)}
    found = read_file(ROOT / f"configs/{config}.py", settings, Config) if config else settings
    return {name: found[name] for name in settings}  # others are those of other scripts


def form(stage: str) -> dict:
    """Settings in groups, one for each dataclass that the stage's extends; their values in each config."""
    Config = config_class(stage)
    types = get_type_hints(Config)
    helps = field_comments(Config)
    groups = {}
    for name in settings_of(stage):
        title = owner_of(name, Config).__doc__.splitlines()[0]
        about = {"name": name, "help": helps.get(name, ""), **kind_of(types[name])}
        groups.setdefault(title, []).append(about)
    configs = {}
    for config in CONFIGS:
        if stage_of(config) == stage:
            configs[config] = configured(stage, config)
    doc = importlib.import_module(stage).__doc__.splitlines()[0]
    return {"doc": doc, "configs": configs, "groups": groups}


def kind_of(annotation) -> dict:
    """{"kind": "bool", "int", "float", "str" or "choice", "choices": [...]} of a setting's type."""
    types = alternatives(annotation)
    choices = [one for one in types if not isinstance(one, type)]
    if choices and bool in types:
        choices += [True, False]
    return {"kind": "choice" if choices else types[0].__name__, "choices": choices}


def stage_of(config: str) -> str:
    """Which script a config file is for, by the end of its name or by what it sets."""
    end = config.rpartition("_")[2]
    if end in STAGES:
        return end
    return "finetune" if "task" in runpy.run_path(str(ROOT / f"configs/{config}.py")) else "train"
