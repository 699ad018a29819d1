"""How settings are made: dataclass defaults < config files < command-line flags.

    python train.py configs/max3060.py --batch_size=4 --compile=False

Every script has one dataclass that names its settings; `parse_config` turns it into a parser. The comment
behind a field is its line in `--help`, the field's type says what is accepted. A config file is plain Python
that only assigns (`d_ff = 4 * d_model` may use anything assigned before it, in an earlier file, or by
default). Several files may follow each other and the later one wins; flags win over files. A file that
assigns `baseline = "configs/cpu.py"` starts from that file, so that an experiment states nothing but what it
changes.

A profile such as `configs/speedrun.py` is read by several scripts: tokenizer.py, train.py and plan.py each
take their own settings from it. Elsewhere a name that is another script's setting is printed and left out (a
file may compute with it all the same); a name that is nobody's is an error that suggests the nearest one.
"""

import argparse
import ast
import difflib
import functools
import inspect
import io
import math
import re
import sys
import tokenize
import types
import typing
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class ConfigError(ValueError):
    """A setting the user can mend; the message says how."""


def parse_config(Config, doc: str = "", argv: list[str] | None = None):
    """The settings of one script: an instance of the dataclass `Config`.

    `argv` (default: the command line) holds config files and `--name=value` flags in any order. `doc`, the
    script's docstring, heads `--help`. Anything wrong ends the program with a message and exit status 2.
    """
    kinds, helps = typing.get_type_hints(Config), field_comments(Config)
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [configs/FILE.py ...] [--name=value ...]",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "files", nargs="*", metavar="configs/FILE.py", help="Python files that assign settings"
    )
    group, heading = parser, None
    for field in fields(Config):
        owner = next(c for c in reversed(Config.__mro__) if field.name in vars(c).get("__annotations__", {}))
        if owner is not heading:
            group, heading = parser.add_argument_group(owner.__name__), owner
        group.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            metavar=kind_name(kinds[field.name], short=True),
            help=f"{helps.get(field.name, '')} [{field.default!r}]".replace("%", "%%"),
        )
    # A bare `--flag` means True; it must not swallow the config file behind it.
    switches = {f"--{name}" for name, kind in kinds.items() if accepts(True, kind)}
    argv = [f"{word}=True" if word in switches else word for word in (sys.argv[1:] if argv is None else argv)]
    flags, unknown = parser.parse_known_intermixed_args(argv)
    try:
        if unknown:
            name = unknown[0].split("=")[0].lstrip("-")
            owners = scripts_with([name])[name] if name in settings_of_all_scripts() else []
            whose = f": {name} is a setting of {', '.join(owners)}" if owners else nearest(name, kinds)
            raise ConfigError(f"unknown flag {unknown[0]}{whose}")
        settings = {field.name: field.default for field in fields(Config)}
        for file in flags.files:
            settings = read_file(Path(file), settings, Config)
        for name in kinds:
            if hasattr(flags, name):
                settings[name] = read_text(getattr(flags, name), kinds[name], f"--{name}")
        chosen = {name: settings[name] for name in kinds}
        check_numbers(chosen, {field.name: field.default for field in fields(Config)})
        return Config(**chosen)
    except ValueError as error:  # ConfigError, or what a dataclass' __post_init__ finds inconsistent
        parser.exit(2, f"{parser.prog}: {error}\n")


# -----------------------------------------------------------------------------
# Config files


def read_file(path: Path, settings: dict, Config, seen: tuple = ()) -> dict:
    """`settings` after the assignments of the config file `path` (and, first, of its `baseline`)."""
    path = path if path.exists() else ROOT / path
    kinds, foreign = typing.get_type_hints(Config), []
    if path in seen:
        raise ConfigError(f"{path}: baselines go round in a circle")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"), str(path))  # -sig: Windows' editors mark UTF-8
    except OSError as error:
        have = ", ".join(sorted(f"configs/{p.name}" for p in (ROOT / "configs").glob("[!_]*.py")))
        raise ConfigError(f"cannot read config {path} ({error.strerror}); there are: {have}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line} is not UTF-8 ({error.reason}): save the file as UTF-8") from None
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}: {(error.text or '').strip()}") from None
    except ValueError as error:  # a null byte
        raise ConfigError(f"{path}: {error}") from None
    for node in tree.body:
        documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not (documents or isinstance(node, (ast.Assign, ast.AnnAssign))):
            raise ConfigError(f"{path}:{node.lineno}: a config file only assigns: name = value")
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if [getattr(target, "id", "") for target in targets] == ["baseline"]:
            if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
                raise ConfigError(f"{path}:{node.lineno}: baseline must be a quoted path")
            settings = read_file(Path(node.value.value), settings, Config, (*seen, path))
    before = settings_of_all_scripts() | settings
    scope = dict(before)
    try:
        exec(compile(tree, str(path), "exec"), scope)
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from None
    del scope["__builtins__"]
    for name, value in scope.items():
        if name.startswith("_") or (name in before and value is before[name]):
            continue  # `_name` is a file's own helper; the rest was there before
        if name not in before:
            raise ConfigError(f"{path}: unknown setting {name!r}{nearest(name, kinds)}")
        if name in kinds:
            value = checked(value, kinds[name], f"{path}: {name}")
        else:
            foreign.append(name)
        settings = settings | {name: value}
    if foreign:
        name_foreign(path, tuple(foreign), Config)
    return settings


# -----------------------------------------------------------------------------
# Whose setting is it?

SHARE_PROFILES = {"tokenizer.py", "train.py", "plan.py"}


@functools.cache  # once, however often a program reads the file
def name_foreign(path: Path, names: tuple[str, ...], Config) -> None:
    """Prints which of a file's settings this script does not have, and whose they are."""
    script, by_owners = Path(inspect.getsourcefile(Config)).name, {}
    for name, owners in scripts_with(names).items():
        if not (script in SHARE_PROFILES and SHARE_PROFILES & set(owners)):
            by_owners.setdefault(", ".join(owners), []).append(name)
    if by_owners:
        whose = "; ".join(f"{', '.join(names)} (of {owners})" for owners, names in by_owners.items())
        print(f"{path}: not used, other scripts' settings: {whose}", file=sys.stderr)


def scripts_with(names: Collection[str]) -> dict[str, list[str]]:
    """{setting: the scripts that have it}; if no script parses its class, the file that defines it."""
    classes, found = config_classes(), {name: [] for name in names}
    for script in sorted(ROOT.glob("*.py")):
        text = script.read_text(encoding="utf-8")
        parsed = re.search(r"^def main\(.*?parse_config\((\w+)", text, re.MULTILINE | re.DOTALL)
        settings = fields_of(parsed[1], classes) if parsed else {}
        for name in names:
            if name in settings:
                found[name].append(script.name)
    for name, scripts in found.items():
        if not scripts:
            scripts += sorted({c["file"] for c in classes.values() if name in c["fields"]})
    return found


def fields_of(name: str, classes: dict[str, dict]) -> dict:
    """Fields of a dataclass and of those that it extends."""
    if name not in classes:
        return {}
    found = {}
    for base in classes[name]["bases"]:
        found |= fields_of(base, classes)
    return found | classes[name]["fields"]


@functools.cache
def settings_of_all_scripts() -> dict:
    """All settings of all scripts and their defaults."""
    found = {}
    for about in config_classes().values():
        found |= about["fields"]
    return found


def config_classes() -> dict[str, dict]:
    """All `...Config` classes beside this folder, found without importing them: {class: its file, its bases,
    its own fields and their defaults}.
    """
    found = {}
    for script in sorted(ROOT.glob("*.py")):
        for node in ast.parse(script.read_text(encoding="utf-8")).body:
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
                continue
            own = {}
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    constant = isinstance(field.value, ast.Constant)
                    own[field.target.id] = field.value.value if constant else None
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            found[node.name] = {"file": script.name, "bases": bases, "fields": own}
    return found


def nearest(name: str, known) -> str:
    """The end of an error message: what the user may have meant."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; --help lists all"


# -----------------------------------------------------------------------------
# Numbers: which of them mean something. Every number of every script is finite and at least 0, and

AT_LEAST_1 = """max_steps batch_size grad_accum_steps log_every vocab_size context_length n_layers
    d_model n_heads experts_per_token n_experts moe_every n held_n rounds pairs seeds group
    rope_theta""".split()
AT_MOST_1 = ["decay_fraction", "label_smoothing"]
BELOW_1 = ["dropout", "lora_dropout", "beta1", "beta2"]
LARGEST_SEED = 2**63 - 1  # what torch.manual_seed takes
LARGEST = 10**12  # of all other whole numbers: torch counts with 64 bits, and squares some of them


def check_numbers(settings: dict, defaults: dict) -> None:
    """Raises ConfigError for a number that no run can use. A setting's own default may be outside of these
    ranges: there it stands for "as the model has it" or "all", as -1 and 0 do in some scripts.
    """
    for name, value in settings.items():
        if type(value) not in (int, float) or value == defaults.get(name):
            continue
        least = 1 if name in AT_LEAST_1 else 0
        if not math.isfinite(value):
            raise ConfigError(f"--{name}={value} must be a finite number")
        if value < least:
            raise ConfigError(f"--{name}={value} must be at least {least}")
        if name in BELOW_1 and value >= 1:
            raise ConfigError(f"--{name}={value} must be below 1")
        if name in AT_MOST_1 and value > 1:
            raise ConfigError(f"--{name}={value} must be at most 1")
        largest = LARGEST_SEED if name == "seed" else LARGEST
        if type(value) is int and value > largest:
            raise ConfigError(f"--{name}={value} must be at most {largest}")


# -----------------------------------------------------------------------------
# Types: bool, int, float, str, Literal[...] and unions of them


def alternatives(kind) -> tuple:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def accepts(value, kind) -> bool:
    """Whether a Python value may stand for `kind`. An int serves as a float; a bool is no int."""
    for one in alternatives(kind):
        if typing.get_origin(one) is typing.Literal:
            if value in typing.get_args(one) and not isinstance(value, bool):
                return True
        elif type(value) is one or (one is float and type(value) is int):
            return True
    return False


def checked(value, kind, where: str):
    if not accepts(value, kind):
        raise ConfigError(f"{where} must be {kind_name(kind)}, not {value!r}")
    whole = type(value) is int and float in alternatives(kind) and int not in alternatives(kind)
    return float(value) if whole else value


def read_text(text: str, kind, where: str):
    """The value that the flag's `text` stands for: 1e-3, 65_536, True, or the words themselves."""
    candidates = [text]
    if text.lower() in ("true", "false"):
        candidates.insert(0, text.lower() == "true")
    for number in (float, int):
        try:
            candidates.insert(0, number(text))
        except ValueError:
            pass
    for value in candidates:
        if accepts(value, kind):
            return checked(value, kind, where)
    raise ConfigError(f"{where} must be {kind_name(kind)}, not {text!r}")


def kind_name(kind, short: bool = False) -> str:
    """How messages, or in its short form `--help`, call a type."""
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    if short:
        names = {bool: "True|False", int: "N", float: "X", str: "TEXT"}
    parts = []
    for one in alternatives(kind):
        words = typing.get_args(one) if typing.get_origin(one) is typing.Literal else ()
        parts += [str(word) if short else repr(word) for word in words] or [names[one]]
    return ("|" if short else " or ").join(parts)


@functools.cache  # reading source takes a quarter of a second, and the lab parses hundreds of command lines
def field_comments(Config) -> dict[str, str]:
    """The comment behind each field of a dataclass and of those that it extends."""
    comments = {}
    for cls in reversed(Config.__mro__[:-1]):
        source = inspect.getsource(cls)
        on_line = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                lines = range(node.lineno, node.end_lineno + 1)  # more than one if a formatter wrapped it
                comments[node.target.id] = " ".join(on_line[i] for i in lines if i in on_line)
    return comments
