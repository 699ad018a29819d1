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
from configs import field_comments, parse_config
from model import ModelConfig

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
    experts: Literal[1, 2] = 2  # experts a token
    decay_fraction: float = 0.2  # share of the steps
    beta1: float = 0.9  # memory of the gradient
    dropout: float = -1.0  # -1: the model's own
    hypothesis: str = ""  # what an experiment expects
    baseline: str = ""  # the config it is compared with
    shift: int = -3  # its own default may be a number that no other value may be
    note: str = (
        "wrapped"  # a comment inside parentheses, where a formatter puts it if the line would be too long
    )

    def __post_init__(self):
        if self.d_model % 8:
            raise ValueError(f"d_model={self.d_model} is not a multiple of 8")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of its own: `root(name, text)` writes a file into it."""
    monkeypatch.setattr(configs, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    configs.settings_of_all_scripts.cache_clear()

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return name

    yield write
    configs.settings_of_all_scripts.cache_clear()


def parse(*argv: str) -> RunConfig:
    return parse_config(RunConfig, "What the script does.", list(argv))


def refusal(capsys, *argv: str) -> str:
    """The message with which these arguments are refused."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


# -----------------------------------------------------------------------------
# What wins


def test_without_arguments_the_defaults_hold():
    assert parse() == RunConfig()


def test_flags_win_over_files_and_files_over_defaults(root):
    file = root("configs/a.py", "batch_size = 4\nd_model = 32\n")
    config = parse(file, "--batch_size=2")
    assert (config.batch_size, config.d_model, config.d_ff) == (2, 32, 256)


def test_the_later_of_two_files_wins_and_flags_may_stand_anywhere(root):
    a, b = root("configs/a.py", "batch_size = 4\nd_ff = 8\n"), root("configs/b.py", "batch_size = 5\n")
    assert parse("--d_model=16", a, "--resume", b) == RunConfig(16, 8, batch_size=5, resume=True)
    assert parse(b, a).batch_size == 4


def test_a_file_is_found_from_any_folder(root, monkeypatch, tmp_path):
    root("configs/a.py", "batch_size = 4")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert parse("configs/a.py").batch_size == 4


def test_a_later_file_computes_from_an_earlier_one(root):
    a, b = root("configs/a.py", "d_model = 32"), root("configs/b.py", "d_ff = 4 * d_model")
    assert parse(a, b).d_ff == 128


# -----------------------------------------------------------------------------
# Values on the command line


@pytest.mark.parametrize(
    "words, field, value",
    [
        (["--resume"], "resume", True),
        (["--resume=False"], "resume", False),
        (["--resume=true"], "resume", True),
        (["--compile"], "compile", True),
        (["--compile=False"], "compile", False),
        (["--compile=auto"], "compile", "auto"),
        (["--batch_size", "3"], "batch_size", 3),
        (["--shift=-3"], "shift", -3),
        (["--batch_size=65_536"], "batch_size", 65536),
        (["--shift", "-3"], "shift", -3),
        (["--learning_rate", "0.5"], "learning_rate", 0.5),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--learning_rate=2"], "learning_rate", 2.0),
        (["--prompt=a=b=c"], "prompt", "a=b=c"),
        (["--prompt=5"], "prompt", "5"),
        (["--prompt=True"], "prompt", "True"),
        (["--prompt=--x"], "prompt", "--x"),
        (["--prompt="], "prompt", ""),
        (["--norm=layer"], "norm", "layer"),
    ],
)
def test_a_flag_gives_the_value_and_the_type_of_its_field(words, field, value):
    found = getattr(parse(*words), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "word, expected",
    [
        ("--batch_size=2.5", "whole number"),
        ("--batch_size=1e3", "whole number"),
        ("--batch_size=True", "whole number"),
        ("--batch_size=", "whole number"),
        ("--learning_rate=fast", "a number"),
        ("--learning_rate=True", "a number"),
        ("--resume=maybe", "True or False"),
        ("--resume=1", "True or False"),
        ("--norm=batch", "'rms' or 'layer'"),
        ("--compile=sometimes", "'auto' or True or False"),
    ],
)
def test_a_flag_of_the_wrong_type_is_told_what_was_expected(capsys, word, expected):
    message, (name, value) = refusal(capsys, word), word.split("=")
    assert expected in message and name in message and repr(value) in message


def test_an_unknown_flag_is_refused_with_the_nearest_name(capsys):
    assert "--batchsize=3" in (message := refusal(capsys, "--batchsize=3")) and "'batch_size'" in message
    assert "--help" in refusal(capsys, "--zzzzzz=3")
    assert "'batch_size'" in refusal(capsys, "--batch=3"), "an abbreviation is no name"


# -----------------------------------------------------------------------------
# Files


def test_a_file_computes_has_a_docstring_and_helpers(root):
    text = '"""Why this shape."""\nd_model = d_ff // 2  # from the default\n_heads, _wide = 3, [1, 2]\n'
    text += "d_ff = max(_wide) * d_model\nbatch_size: int = sum(_heads * n for n in _wide)\n"
    config = parse(root("configs/a.py", text))
    assert (config.d_model, config.d_ff, config.batch_size) == (128, 256, 9)


def test_in_a_file_an_int_serves_as_a_float_and_not_the_reverse(root, capsys):
    assert type(parse(root("configs/a.py", "learning_rate = 1")).learning_rate) is float
    assert "whole number, not 2.0" in refusal(capsys, root("configs/a.py", "batch_size = 2.0"))
    assert "whole number, not True" in refusal(capsys, root("configs/a.py", "batch_size = True"))
    assert "a text, not 3" in refusal(capsys, root("configs/a.py", "prompt = 3"))
    assert "True or False, not 1" in refusal(capsys, root("configs/a.py", "resume = 1"))


def test_an_unknown_name_in_a_file_is_refused_with_the_nearest_name(root, capsys):
    message = refusal(capsys, root("configs/a.py", "batchsize = 3"))
    assert "configs/a.py" in message and "'batchsize'" in message and "'batch_size'" in message


@pytest.mark.parametrize(
    "text", ["import os", "print(1)", "if True:\n    d_ff = 1", "def f(): pass", "d_ff += 1", "del d_ff"]
)
def test_a_file_may_only_assign(root, capsys, text):
    message = refusal(capsys, root("configs/a.py", "d_ff = 8\n" + text))
    assert "configs/a.py:2" in message and "name = value" in message


def test_a_broken_file_is_refused_with_the_line(root, capsys):
    assert "configs/a.py:2" in refusal(capsys, root("configs/a.py", "d_ff = 1\nd_ff = = 2"))
    assert "ZeroDivisionError" in refusal(capsys, root("configs/a.py", "d_ff = 1 // 0"))
    assert "'nothing'" in refusal(capsys, root("configs/a.py", "d_ff = nothing"))


def test_a_missing_file_lists_what_there_is(root, capsys):
    root("configs/a.py", ""), root("configs/b.py", ""), root("configs/__init__.py", "")
    message = refusal(capsys, "configs/c.py")
    assert "c.py" in message and "configs/a.py, configs/b.py" in message and "__init__" not in message


def test_a_name_of_another_scripts_config_is_left_to_that_script(root, capsys):
    root("speak.py", "raise SystemExit('never imported')\nclass SpeakConfig:\n    loudness: int = 3\n")
    assert parse(root("configs/a.py", "loudness = 5\nbatch_size = 2")) == RunConfig(batch_size=2)
    assert "'loudnes'" in refusal(capsys, root("configs/b.py", "loudnes = 5"))


def test_another_scripts_setting_from_an_earlier_file_can_be_computed_with(root):
    root("speak.py", "class SpeakConfig:\n    loudness: int = 3\n")
    a = root("configs/a.py", "loudness = 5")
    assert parse(a, root("configs/b.py", "batch_size = 2 * loudness")).batch_size == 10
    assert parse(root("configs/c.py", 'baseline = "configs/a.py"\nd_ff = loudness')).d_ff == 5


def test_the_default_of_another_scripts_setting_can_be_computed_with(root):
    root("speak.py", "class SpeakConfig:\n    loudness: int = 3\n    pitch: int = 4\n")
    assert parse(root("configs/a.py", "pitch = 2 * loudness\nd_ff = 8 * pitch")).d_ff == 48


# -----------------------------------------------------------------------------
# Experiments: baseline and hypothesis


@pytest.mark.parametrize("assignment", ["baseline = {}", "baseline: str = {}"])
def test_a_baseline_chain_starts_from_the_oldest(root, assignment):
    root("configs/a.py", "d_model, d_ff, batch_size = 16, 16, 16")
    root("configs/b.py", 'baseline = "configs/a.py"\nd_ff, batch_size = 32, 32')
    text = assignment.format('"configs/b.py"') + '\nbatch_size = 2 * d_ff\nhypothesis = "wider is better"'
    config = parse(root("configs/c.py", text))
    assert (config.d_model, config.d_ff, config.batch_size) == (16, 32, 64)
    assert (config.baseline, config.hypothesis) == ("configs/b.py", "wider is better")


def test_a_circle_of_baselines_and_a_missing_one_are_refused(root, capsys, tmp_path):
    root("configs/a.py", 'baseline = "configs/b.py"')
    root("configs/b.py", 'baseline = "configs/a.py"')
    assert "circle" in refusal(capsys, "configs/a.py")
    assert "circle" in refusal(capsys, str(tmp_path / "configs/a.py"))
    assert "circle" in refusal(capsys, root("configs/c.py", 'baseline = "configs/c.py"'))
    assert "missing.py" in refusal(capsys, root("configs/c.py", 'baseline = "configs/missing.py"'))
    assert "baseline" in refusal(capsys, root("configs/c.py", 'baseline = "configs/" + prompt'))


# -----------------------------------------------------------------------------
# Help, checks of the dataclass, speed


def test_help_shows_every_field_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert not stop.value.code and "What the script does." in shown
    assert "--d_ff N hidden units; 100% of them [256]" in shown
    assert "--prompt TEXT text to continue, \"%s\" and all ['Once']" in shown
    assert "--compile auto|True|False torch.compile ['auto']" in shown
    assert "--learning_rate X peak, reached after warmup [0.001]" in shown
    assert "a comment inside parentheses" in shown
    assert shown.index("SizeConfig:") < shown.index("--d_model") < shown.index("RunConfig:")


def test_every_field_of_the_model_has_a_comment():
    comments = field_comments(ModelConfig)
    assert [name for name in ModelConfig.__dataclass_fields__ if not comments.get(name)] == []


def test_a_literal_of_numbers_stays_whole():
    found = parse("--experts=1").experts
    assert found == 1 and type(found) is int


def test_what_the_dataclass_finds_inconsistent_is_a_message(capsys):
    assert "d_model=30 is not a multiple of 8" in refusal(capsys, "--d_model=30")


def test_reading_a_config_imports_no_torch():
    code = "import sys, configs; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("[!_]*.py")), ids=lambda p: p.name)
def test_every_config_of_the_project_reads_and_makes_a_valid_model(path):
    parse_config(ModelConfig, argv=[str(path)])


@pytest.mark.parametrize(
    "wrong",
    """batch_size=0 batch_size=-3 learning_rate=-1e-3 learning_rate=nan learning_rate=inf learning_rate=-inf
    d_ff=-1 shift=-2 decay_fraction=1.5 beta1=1 dropout=nan""".split(),
)
def test_numbers_that_mean_nothing_are_refused_by_name(root, capsys, wrong):
    assert f"--{wrong.split('=')[0]}=" in refusal(capsys, f"--{wrong}")
    name, value = wrong.split("=")
    file = root("configs/a.py", f"{name} = {value}" if "n" not in value else f"{name} = float('{value}')")
    assert f"{name}=" in refusal(capsys, file)


def test_the_numbers_of_every_script_are_in_range_by_default():
    for script in ("train", "tokenizer", "finetune", "sft", "dpo", "verifier", "eval", "experiments"):
        for name, Config in vars(importlib.import_module(script)).items():
            if name.endswith("Config") and dataclasses.is_dataclass(Config):
                values = {f.name: f.default for f in dataclasses.fields(Config)}
                outside = {"max_steps": 0, "dropout": -1.0, "context_length": 0, "layer": -1, "head": -1}
                configs.check_numbers(values, outside)


# -----------------------------------------------------------------------------
# Files of other editors, and of other scripts


def test_a_byte_order_mark_is_read_over(root, tmp_path):
    (tmp_path / "configs" / "bom.py").write_bytes(b"\xef\xbb\xbfbatch_size = 4\n")
    assert parse("configs/bom.py").batch_size == 4


def test_a_file_that_is_not_utf8_is_named_with_its_line(root, capsys, tmp_path):
    (tmp_path / "configs" / "latin.py").write_bytes(b'd_ff = 8\nprompt = "caf\xe9"\n')
    assert "configs/latin.py:2 is not UTF-8" in refusal(capsys, "configs/latin.py")
    (tmp_path / "configs" / "null.py").write_bytes(b"d_ff = 8\0\n")
    assert "configs/null.py" in refusal(capsys, "configs/null.py")


def test_settings_of_other_scripts_are_named_once(root, capsys):
    text = "class BaseConfig:\n    loudness: int = 3\nclass SpeakConfig(BaseConfig):\n    pitch: int = 4\n"
    root("speak.py", text + "def main():\n    cfg = parse_config(SpeakConfig, __doc__)\n")
    file = root("configs/foreign.py", "loudness, batch_size = 5, 2")
    assert parse(file) == parse(file) == RunConfig(batch_size=2)
    told = "configs/foreign.py: not used, other scripts' settings: loudness (of speak.py)\n"
    assert capsys.readouterr().err == told
    assert "loudness is a setting of speak.py" in refusal(capsys, "--loudness=4")


MAIN = {"train": "TrainConfig", "tokenizer": "TokenizerStageConfig", "finetune": "FinetuneConfig"}
MAIN |= {"sft": "SFTConfig", "dpo": "DPOConfig", "verifier": "VerifierConfig"}


def configs_of(script: str) -> list[str]:
    """The configs that are meant for a script: what is no config of fine-tuning or alignment is a profile."""
    names = {path.stem for path in (REPO / "configs").glob("[!_]*.py")}
    tuned = {"finetune": {"sst2", "samsum", "gsm8k", "sentiment"}}
    tuned |= {name: {name} for name in ("sft", "dpo", "verifier")}
    return sorted(tuned[script] if script in tuned else names.difference(*tuned.values()))


@pytest.mark.parametrize("script", MAIN)
def test_a_config_names_no_foreign_settings_to_the_scripts_that_it_is_for(script, capsys):
    Config = getattr(importlib.import_module(script), MAIN[script])
    for name in configs_of(script):
        parse_config(Config, argv=[f"configs/{name}.py"])
    assert capsys.readouterr().err == ""


def test_a_setting_of_finetuning_in_a_profile_is_named(tmp_path, capsys):
    from train import TrainConfig

    (tmp_path / "mine.py").write_text("lora_r = 4\nlearn_megabytes = 3\n")
    parse_config(TrainConfig, argv=[str(tmp_path / "mine.py")])
    told = capsys.readouterr().err
    assert "mine.py: not used" in told and "lora_r (of" in told and "finetune.py" in told
    assert "learn_megabytes" not in told, "tokenizer.py reads the same profile"


@pytest.mark.parametrize("name", configs_of("train"))
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


def test_gpt_tiny_is_a_gpt2():
    from support.hf_format import to_hf_config
    from train import TrainConfig, model_config

    cfg = parse_config(TrainConfig, argv=["configs/gpt_tiny.py"])
    about = to_hf_config(model_config(cfg))
    assert about["model_type"] == "gpt2" and cfg.corpus == "storyworld"
