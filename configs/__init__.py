"""How settings are made: dataclass defaults < config files < command-line flags.

    python train.py configs/max3060.py --batch_size=4 --compile=False

Every script has one dataclass that names its settings; `parse_config` makes a parser of it. The comment
behind a field is its line in `--help`. A config file is Python that only assigns; `d_ff = 4 * d_model` may
use what was assigned before it, in an earlier file, or by default. The later of several files wins, and flags
win over files. A file that assigns `baseline = "configs/cpu.py"` starts from that file, so that an experiment
states only what it changes.

A profile such as configs/speedrun.py serves tokenizer.py and train.py: each takes its own settings from it.
Every other name that the script does not have is an error.
"""

import argparse
import ast
import difflib
import functools
import inspect
import math
import re
import sys
import typing
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {  # script: its dataclass
    "tokenizer": "TokenizerStageConfig", "train": "TrainConfig", "finetune": "FinetuneConfig",
    "sft": "SFTConfig", "dpo": "DPOConfig", "verifier": "VerifierConfig", "eval": "EvalConfig",
    "chat": "ChatConfig", "serve": "ServeConfig", "report": "ReportConfig",
}  # fmt: skip
SHARE_PROFILES = ("tokenizer", "train")


class ConfigError(ValueError):
    """A setting that the user can correct; the message says how."""


def parse_config(Config, doc: str = "", argv: list[str] | None = None):
    """The settings of one script: an instance of the dataclass `Config`.

    `argv` (default: the command line) holds config files and `--name=value` flags in any order. `doc`, the
    script's docstring, heads `--help`. An error ends the program with a message and exit status 2.
    """
    kinds = typing.get_type_hints(Config)
    defaults = {field.name: field.default for field in fields(Config)}
    parser = make_parser(Config, doc, kinds)
    # A bare `--flag` means True; it must not swallow the config file behind it.
    switches = {f"--{name}" for name, kind in kinds.items() if accepts(True, kind)}
    words = sys.argv[1:] if argv is None else argv
    words = [f"{word}=True" if word in switches else word for word in words]
    flags, unknown = parser.parse_known_intermixed_args(words)
    try:
        if unknown:
            flag = unknown[0]
            name = flag.split("=")[0].lstrip("-")
            raise ConfigError(f"unknown flag {flag}{hint(name, kinds)}")
        settings = defaults
        for file in flags.files:
            settings = read_file(Path(file), settings, Config)
        settings = {name: settings[name] for name in kinds}
        del flags.files
        for name, text in vars(flags).items():
            settings[name] = read_text(text, kinds[name], f"--{name}")
        check_numbers(settings, defaults)
        check_texts(settings, defaults)
        return Config(**settings)
    except ValueError as error:  # ConfigError, or what the dataclass' __post_init__ finds inconsistent
        parser.exit(2, f"{parser.prog}: {error}\n")


def names_in(only: str, known: Iterable[str]) -> list[str]:
    """The names in --only=A,B; without any, all known ones. Raises ConfigError for another name."""
    names = [name for name in only.split(",") if name]
    if unknown := set(names).difference(known):
        raise ConfigError(f"--only={','.join(sorted(unknown))}: there are {', '.join(known)}")
    return names or list(known)


def make_parser(Config, doc: str, kinds: dict) -> argparse.ArgumentParser:
    """A parser whose values are texts; `--help` groups the settings by the class that declares them."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # None unless started by `python -m`
    program = f"-m {module.name}" if module else "%(prog)s"
    parser = argparse.ArgumentParser(
        prog=module.name if module else None,
        usage=f"python {program} [configs/FILE.py ...] [--name=value ...]",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="*", metavar="configs/FILE.py", help="files that assign settings")
    helps = field_comments(Config)
    groups = {}
    for field in fields(Config):
        name = field.name
        owner = owner_of(name, Config)
        if owner not in groups:
            groups[owner] = parser.add_argument_group(owner.__name__)
        about = f"{helps[name]} [{field.default!r}]"
        groups[owner].add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            metavar=kind_name(kinds[name]),
            help=about.replace("%", "%%"),
        )
    return parser


def owner_of(field: str, Config) -> type:
    """The class that declares a field of `Config`: this one, or the one that it extends."""
    return next(c for c in reversed(Config.__mro__) if field in inspect.get_annotations(c))


@functools.cache  # reading source takes a quarter of a second, and the lab parses hundreds of command lines
def field_comments(Config) -> dict[str, str]:
    """The comment behind each field of a dataclass and of those that it extends."""
    comments = {}
    for cls in reversed(Config.__mro__[:-1]):
        source = inspect.getsource(cls)
        lines = source.splitlines()
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):  # on more than one line if a formatter wrapped it
                parts = [line.partition("  # ")[2] for line in lines[node.lineno - 1 : node.end_lineno]]
                comments[node.target.id] = " ".join(filter(None, parts))
    return comments


# -----------------------------------------------------------------------------
# Config files


def read_file(path: Path, settings: dict, Config, seen: tuple = ()) -> dict:
    """`settings` after the assignments of the config file `path` (and, first, of its `baseline`)."""
    path = path if path.exists() else ROOT / path
    if path in seen:
        raise ConfigError(f"{path}: baselines form a circle")
    tree = parsed(path)
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="baseline")], value=ast.Constant(value=str(baseline))):
                settings = read_file(Path(baseline), settings, Config, (*seen, path))
            case ast.Assign(targets=[ast.Name(id="baseline")]):
                raise ConfigError(f"{path}:{node.lineno}: baseline must be a quoted path")
            case ast.Assign() | ast.Expr(value=ast.Constant()):
                pass
            case _:
                raise ConfigError(f"{path}:{node.lineno}: a config file only assigns: name = value")
    shared = {}
    if Path(inspect.getsourcefile(Config)).stem in SHARE_PROFILES:
        for script in SHARE_PROFILES:
            shared |= declared(script, SCRIPTS[script])
    before = shared | settings
    scope = dict(before)
    try:
        exec(compile(tree, str(path), "exec"), scope)
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from None
    kinds = typing.get_type_hints(Config)
    for name, value in scope.items():
        if name.startswith("_") or value is before.get(name, scope):
            continue  # `_name` is a helper of the file; the rest was there before
        if name in kinds:
            value = checked(value, kinds[name], f"{path}: {name}")
        elif name not in shared:
            raise ConfigError(f"{path}: unknown setting {name!r}{hint(name, kinds)}")
        settings = settings | {name: value}
    return settings


def parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8-sig"), str(path))  # -sig: Windows' editors mark UTF-8
    except OSError as error:
        files = sorted((ROOT / "configs").glob("[!_]*.py"))
        have = ", ".join(f"configs/{file.name}" for file in files)
        raise ConfigError(f"cannot read config {path} ({error.strerror}); there are: {have}") from None
    except (SyntaxError, ValueError) as error:  # ValueError: not UTF-8
        raise ConfigError(f"{path}: {error}") from None


# -----------------------------------------------------------------------------
# Settings of other scripts. They are read from the source, because an import of train.py loads torch


@functools.cache
def declared(module: str, name: str) -> dict:
    """{setting: default} of a dataclass and of those that it extends, wherever they are imported from."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        match node:
            case ast.ImportFrom() if name in [alias.name for alias in node.names]:
                return declared(node.module, name)
            case ast.ClassDef() if node.name == name:
                for base in node.bases:
                    found |= declared(module, base.id)
                for field in node.body:
                    if isinstance(field, ast.AnnAssign):
                        found[field.target.id] = getattr(field.value, "value", None)
    return found


def hint(name: str, known) -> str:
    """The end of an error message: whose setting `name` is, or which one the user may have meant."""
    owners = []
    for script, Config in SCRIPTS.items():
        if name in declared(script, Config):
            owners.append(f"{script}.py")
    if owners:
        return f": it is a setting of {', '.join(owners)}"
    for close in difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {close!r}?"
    return "; --help lists all"


# -----------------------------------------------------------------------------
# Values: every text is UTF-8, and every number of every script is finite and at least 0, and

AT_LEAST_1 = """max_steps batch_size grad_accum_steps log_every vocab_size context_length n_layers
    d_model n_heads experts_per_token n_experts moe_every n held_n rounds seeds group problems rope_theta"""
LARGEST = 10**12  # torch counts with 64 bits, and squares some numbers
RANGES = dict.fromkeys(AT_LEAST_1.split(), (1, LARGEST))
RANGES |= dict.fromkeys(("decay_fraction", "label_smoothing"), (0, 1))
RANGES |= dict.fromkeys(("dropout", "lora_dropout", "momentum", "beta1", "beta2"), (0, math.nextafter(1, 0)))
RANGES |= dict.fromkeys(("beta", "embedding_rate"), (1e-6, LARGEST))  # they divide
RANGES |= {"seed": (0, 2**63 - 1)}  # what torch.manual_seed takes


def check_numbers(settings: dict, defaults: dict) -> None:
    """Raises ConfigError for a number that no run can use. A setting's own default may be outside of these
    ranges: there it stands for "as the model has it" or "all", as -1 and 0 do in some scripts.
    """
    for name, value in settings.items():
        if type(value) not in (int, float) or value == defaults.get(name):
            continue
        low, high = RANGES.get(name, (0, LARGEST))
        if not low <= value <= high:  # so nan is refused, too
            raise ConfigError(f"--{name}={value} must be a number from {low} to {high}")


def check_texts(settings: dict, defaults: dict) -> None:
    """Raises ConfigError for a text that cannot be written or handed to another program, and for an empty
    --out, as from --out=$UNSET, which would lead to the root of the file system.
    """
    for name, value in settings.items():
        if not isinstance(value, str) or value == defaults.get(name):
            continue
        if re.search("[\0\ud800-\udfff]", value):  # Python reads bytes that are not UTF-8 as surrogates
            raise ConfigError(f"--{name}={value!r} must be UTF-8 text without null characters")
        if name == "out" and not value:
            raise ConfigError("--out= is empty: it must name a folder")


# -----------------------------------------------------------------------------
# Types: bool, int, float, str, Literal[...] and unions of them


def alternatives(kind) -> list:
    """The types and values that a setting may have: Literal["auto"] | bool -> ["auto", bool]."""
    found = []
    for part in typing.get_args(kind):
        found += alternatives(part)
    return found or [kind]


def accepts(value, kind) -> bool:
    """Whether a Python value may stand for `kind`. An int serves as a float; a bool is no int."""
    for option in alternatives(kind):
        if option is float and type(value) is int:
            return True
        if type(value) is option or (value == option and type(value) is type(option)):
            return True
    return False


def checked(value, kind, where: str):
    if not accepts(value, kind):
        raise ConfigError(f"{where} must be {kind_name(kind)}, not {value!r}")
    return float(value) if kind is float else value


def read_text(text: str, kind, where: str):
    """The value that the flag's `text` stands for: 1e-3, 65_536, True, or the words themselves."""
    if accepts(text, kind):
        return text
    try:
        value = ast.literal_eval(text.title() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        value = text
    return checked(value, kind, where)


def kind_name(kind) -> str:
    """A type as `--help` and messages name it, such as INT or auto|True|False."""
    names = {bool: "True|False", int: "INT", float: "FLOAT", str: "TEXT"}
    return "|".join(str(names.get(option, option)) for option in alternatives(kind))
