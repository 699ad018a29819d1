"""Settings: defaults < files < flags, and every mistake is named to the person who made it."""

import dataclasses
import importlib
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import configs
from configs import SCRIPTS, field_comments, parse_config

REPO = Path(__file__).resolve().parents[1]


@dataclass
class SizeConfig:
    d_model: int = 64  # width of the residual stream
    d_ff: int = 256  # hidden units; 100% of them


@dataclass
class RunConfig(SizeConfig):
    batch_size: int = 8  # sequences in one forward pass
    learning_rate: float = 1e-3  # peak, reached after warmup
    compile: Literal["auto"] | bool = "auto"  # torch.compile
    resume: bool = False  # go on with an earlier run
    norm: Literal["rms", "layer"] = "rms"  # normalisation
    prompt: str = "Once"  # text to continue, "%s" and all
    out: str = "out"  # the folder of everything
    experts: Literal[1, 2] = 2  # experts a token
    baseline: str = ""  # the config it is compared with
    shift: int = -3  # its own default may be a number that no other value may be
    note: str = (
        "wrapped"  # a comment inside parentheses, where a formatter puts it if the line would be too long
    )

    def __post_init__(self):
        if self.d_model % 8:
            raise ValueError(f"d_model={self.d_model} is not a multiple of 8")


def config_of(script: str):
    return getattr(importlib.import_module(script), SCRIPTS[script])


@pytest.fixture
def file(tmp_path, monkeypatch):
    """file(name, text) writes configs/NAME.py in a folder of its own, and returns its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()

    def write(name: str, text: str | bytes) -> str:
        path = Path("configs", f"{name}.py")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def parse(*argv: str) -> RunConfig:
    return parse_config(RunConfig, "What the script does.", list(argv))


def refusal(capsys, *argv: str, Config=RunConfig) -> str:
    """The message with which these arguments are refused."""
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, "", list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


# -----------------------------------------------------------------------------
# Values


def test_flags_win_over_files_and_the_later_file_over_the_earlier(file):
    a, b = file("a", "batch_size = 4\nd_ff = 8\n"), file("b", b"\xef\xbb\xbfbatch_size = 5\n")
    assert parse(a, "--batch_size=2") == RunConfig(d_ff=8, batch_size=2)
    assert parse("--d_model=16", a, "--resume", b) == RunConfig(16, 8, batch_size=5, resume=True)
    assert parse_config(config_of("train"), argv=["configs/cpu.py"]).d_model == 128  # from any folder


def test_a_file_computes_from_defaults_earlier_files_and_its_own_helpers(file):
    text = '"""Why this shape."""\nd_model = d_ff // 2  # from the default, or an earlier file\n'
    text += "_wide = [1, 2]\nd_ff = max(_wide) * d_model\nbatch_size = sum(3 * n for n in _wide)\n"
    a, b = file("a", "d_ff = 512"), file("b", text)
    assert parse(b) == RunConfig(128, 256, batch_size=9)
    assert parse(a, b) == RunConfig(256, 512, batch_size=9)


def test_a_chain_of_baselines_starts_from_the_oldest(file):
    file("a", "d_model, d_ff, batch_size = 16, 16, 16")
    file("b", 'baseline = "configs/a.py"\nd_ff, batch_size = 32, 32')
    c = file("c", 'baseline = "configs/b.py"\nbatch_size = 2 * d_ff')
    assert parse(c) == RunConfig(16, 32, batch_size=64, baseline="configs/b.py")


@pytest.mark.parametrize("words, field, value", [
    ("--resume", "resume", True), ("--resume=false", "resume", False), ("--compile", "compile", True),
    ("--compile=auto", "compile", "auto"), ("--batch_size 3", "batch_size", 3),
    ("--batch_size=65_536", "batch_size", 65536), ("--shift -3", "shift", -3), ("--experts=1", "experts", 1),
    ("--learning_rate=2", "learning_rate", 2.0), ("--prompt=a=b", "prompt", "a=b"),
    ("--prompt=5", "prompt", "5"), ("--prompt=--x", "prompt", "--x"), ("--prompt='x'", "prompt", "'x'"),
])  # fmt: skip
def test_a_flag_gives_the_value_and_the_type_of_its_field(words, field, value):
    found = getattr(parse(*words.split(" ")), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name, value, expected", [
    ("batch_size", 2.5, "INT"), ("batch_size", True, "INT"), ("learning_rate", "fast", "FLOAT"),
    ("resume", 1, "True|False"), ("norm", "batch", "rms|layer"), ("compile", "some", "auto|True|False"),
])  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_with_the_right_one(file, capsys, name, value, expected):
    for words in (f"--{name}={value}", file("a", f"{name} = {value!r}")):
        assert f"{name} must be {expected}, not" in refusal(capsys, words)


@pytest.mark.parametrize("flag, reason", [
    ("--batch_size=0", "a number from 1"), ("--learning_rate=-1e-3", "a number from 0"),
    ("--decay_fraction=1.5", "to 1"), ("--beta1=1", "a number"),
    ("--beta=0", "a number"), ("--n=9999999999999", "to 10"), ("--seed=-1", "a number"),
    ("--data=caf\udce9", "UTF-8"), ("--data=a\0b", "UTF-8"), ("--out=", "empty"),
])  # fmt: skip
def test_numbers_and_texts_that_no_run_can_use_are_refused_by_name(capsys, flag, reason):
    message = refusal(capsys, flag, Config=config_of("dpo"))
    assert flag.split("=")[0] in message and reason in message


def test_what_is_no_number_is_refused_and_a_default_may_be_outside_of_the_range(file, capsys):
    assert "--learning_rate=nan" in refusal(capsys, file("a", "learning_rate = float('nan')"))
    assert "--shift=-2" in refusal(capsys, "--shift=-2") and parse("--shift=-3").shift == -3


# -----------------------------------------------------------------------------
# Names and files


def test_an_unknown_name_is_refused_with_the_nearest_one(file, capsys):
    for words in ("--batchsize=3", "--batch=3", file("a", "batchsize = 3")):  # an abbreviation is no name
        assert "did you mean 'batch_size'" in refusal(capsys, words)
    assert "--help" in refusal(capsys, "--zzzzzz=3")
    for script in ("tokenizer", "train", "sft"):
        for words in ("--label_smoothing=0.1", file("a", "label_smoothing = 0.1")):
            assert "it is a setting of dpo.py" in refusal(capsys, words, Config=config_of(script))
    assert "d_model=30 is not a multiple of 8" in refusal(capsys, "--d_model=30")


def test_a_profile_serves_the_tokenizer_and_training(file):
    text = 'corpus = "storyworld"\nlearn_megabytes = 3\nd_ff = 8 * d_model\nbatch_size = d_ff // 32'
    profile = file("profile", text)
    tokenizer, train = (parse_config(config_of(script), argv=[profile]) for script in ("tokenizer", "train"))
    assert tokenizer.learn_megabytes == 3 and tokenizer.corpus == train.corpus == "storyworld"
    assert train.batch_size == train.d_model // 4


@pytest.mark.parametrize("text, expected", [
    ("d_ff = 1\nd_ff = = 2", "line 2"), ("d_ff = nothing", "NameError"),
    (b'd_ff = 8\nprompt = "caf\xe9"\n', "utf-8"), ('baseline = "configs/" + prompt', "quoted path"),
    ('baseline = "configs/a.py"', "circle"), ("d_ff = 8\nimport os", "a.py:2: a config file only assigns"),
    ("d_ff = 8\nd_ff += 1", "a.py:2: a config file only assigns"),
])  # fmt: skip
def test_a_broken_file_is_named_with_the_cause(file, capsys, text, expected):
    message = refusal(capsys, file("a", text))
    assert "configs/a.py" in message and expected in message


def test_a_circle_of_baselines_is_refused_and_a_missing_file_lists_what_there_is(file, capsys):
    a, _ = file("a", 'baseline = "configs/b.py"'), file("b", 'baseline = "configs/a.py"')
    assert "circle" in refusal(capsys, a)
    for words in ("configs/c.py", file("d", 'baseline = "configs/c.py"')):
        message = refusal(capsys, words)
        assert "c.py" in message and "configs/cpu.py, configs/dpo.py" in message


# -----------------------------------------------------------------------------
# Help


def test_help_shows_every_field_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert not stop.value.code and "What the script does." in shown
    assert "--d_ff INT hidden units; 100% of them [256]" in shown
    assert "--prompt TEXT text to continue, \"%s\" and all ['Once']" in shown
    assert "--compile auto|True|False torch.compile ['auto']" in shown
    assert "a comment inside parentheses" in shown
    assert shown.index("SizeConfig:") < shown.index("--d_model") < shown.index("RunConfig:")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_has_a_comment_a_default_in_its_range_and_is_found_in_the_source(script):
    Config = config_of(script)
    values = {field.name: field.default for field in dataclasses.fields(Config)}
    assert all(map(field_comments(Config).get, values))
    assert set(configs.declared(script, SCRIPTS[script])) == set(values)
    outside = {"max_steps": 0, "dropout": -1.0, "context_length": 0, "seed": -1, "layer": -1, "head": -1}
    configs.check_numbers(values, outside)


# -----------------------------------------------------------------------------
# The configs of the project


TUNED = {  # config: its script; all others are profiles of tokenizer.py and train.py
    **dict.fromkeys(("sst2", "samsum", "gsm8k", "sentiment", "smol_sst2", "smol_samsum"), "finetune"),
    **{"sft": "sft", "dpo": "dpo", "verifier": "verifier"},
    **{"smol_sft": "sft", "smol_dpo": "dpo", "smol_verifier": "verifier"},
}
NAMES = sorted(path.stem for path in (REPO / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("name", TUNED)
def test_every_config_is_read_by_the_script_that_it_is_for(name):
    parse_config(config_of(TUNED[name]), argv=[f"configs/{name}.py"])


def test_reading_a_profile_imports_no_torch():
    code = "import sys, tokenizer as t; t.parse_config(t.TokenizerStageConfig, '', ['configs/cpu.py']); "
    code += "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TUNED])
def test_the_command_in_the_error_makes_the_tokens_that_training_looks_for(name, tmp_path, monkeypatch):
    import tokenizer
    import train

    words = [f"configs/{name}.py", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    cfg = parse_config(train.TrainConfig, argv=words)
    with pytest.raises(train.TrainError) as error:
        train.pretrain(cfg)
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command[:3] == ["python", "tokenizer.py", f"configs/{name}.py"]
    made = parse_config(tokenizer.TokenizerStageConfig, argv=command[2:])
    assert tokenizer.tokens_folder(made) == tokenizer.tokens_folder(cfg)
