"""run_all.sh: what can be said of it without installing anything."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import wait_until

from support.machine import DRIVER_FILE, NVIDIA_SMI

ROOT = Path(__file__).parents[1]
STAND_IN = r"""#!/usr/bin/env bash
[ "$1" = -c ] && { echo stand_in; exit; }
[ "$2" = support.machine ] && { . ./machine; exit; }
[ "$2" = lab.plan ] && { cat >planned; echo "the plan"; exit; }
[ "$2" = pip ] && { echo "$*" >>pip_calls; case "$*" in *index-url*) exit 1 ;; *) exit ;; esac; }
echo "$*" >>calls
[ "$1" = "${FAIL:-}" ] && { echo "no luck"; exit ${STATUS:-1}; }
mkdir -p out && cd out && mkdir -p tokens stand_in sentiment sft dpo verifier
case "$1 $*" in
train*) touch stand_in/model.safetensors ;;
finetune*) touch sentiment/run.json ;;
sft*) touch sft/model.safetensors sft/run.json ;;
"dpo.py "*) [ -z "${HANG:-}" ] || exec sleep 30; touch dpo/model.safetensors dpo/run.json ;;
verifier*) touch verifier/run.json ;;
eval*) touch stand_in/{results,attention}.json sentiment/results.json pipeline.json ;;
esac
"""
TRAINED = ["train.py", "finetune.py", "sft.py", "dpo.py", "verifier.py"]
EVERYTHING = ["tokenizer.py", "train.py", "chat.py", *TRAINED[1:], *["eval.py"] * 4]


class Project:
    """A copy of the script beside a `python` that notes its arguments and obeys $FAIL."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "run_all.sh", folder)
        files = dict.fromkeys(("sentiment", "sft", "dpo", "verifier"), "") | {"cpu": 'name = "stand_in"\n'}
        (folder / "configs").mkdir()
        for name, text in files.items():
            (folder / "configs" / f"{name}.py").write_text(text)
        (folder / "pyproject.toml").write_text('"torch>=2,<3",\n')
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(STAND_IN)
        python.chmod(0o755)

    def run(self, *words: str, status: int = 0, **env: str) -> subprocess.CompletedProcess:
        command = ["bash", "run_all.sh", *words]
        done = subprocess.run(command, cwd=self.folder, env=os.environ | env, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done

    def lines(self) -> list[str]:
        """Commands since the last look but the report, which closes every call."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith("report.py")]

    def scripts(self) -> list[str]:
        return [line.split()[0] for line in self.lines()]


@pytest.fixture
def new(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def done(new) -> Project:
    """A project whose stages have all run once."""
    new.run("cpu")
    assert new.scripts() == EVERYTHING
    return new


def test_stages_run_once_and_again_when_their_config_changes_or_their_result_is_gone(done):
    again = done.run("cpu")
    assert done.scripts() == [] and again.stdout.count("done before") == 11
    (done.folder / "configs" / "cpu.py").write_text('name = "stand_in"\nseed = 2\n')
    done.run("cpu")
    assert done.scripts() == EVERYTHING
    (done.folder / "configs" / "sentiment.py").write_text("seed = 2\n")
    done.run("cpu")
    assert done.scripts() == ["finetune.py", "eval.py"]  # what sft.py makes does not depend on it
    (done.folder / "out" / "stand_in" / "model.safetensors").unlink()
    done.run("cpu", "pretrain")
    assert done.scripts() == ["train.py"]
    done.run("cpu")
    assert done.scripts() == EVERYTHING[2:]  # what follows from it
    done.run("cpu", SEED="2")
    assert [line.split()[0] for line in done.lines() if "--seed=2" in line] == TRAINED


@pytest.mark.parametrize("began_anew", [False, True])
def test_what_follows_from_a_model_trained_anew_starts_anew_also_after_a_kill(done, began_anew):
    (done.folder / "out" / "sft" / "model.safetensors").unlink()
    command = ["bash", "run_all.sh", "cpu"]
    env = os.environ | {"HANG": "yes"}
    run = subprocess.Popen(command, cwd=done.folder, env=env, start_new_session=True)
    wait_until(lambda: "dpo.py" in done.scripts())  # it hangs there
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    if began_anew:
        (done.folder / "out" / "dpo" / "run.json").touch()
    done.run("cpu")
    lines = done.lines()
    assert [line.split()[0] for line in lines] == ["dpo.py", "verifier.py", "eval.py"]
    anew = [line.split()[0] for line in lines if line.endswith("--overwrite")]
    assert anew == (["verifier.py"] if began_anew else ["dpo.py", "verifier.py"])
    done.run("cpu")
    assert done.scripts() == []


def test_without_a_profile_the_machine_is_asked(new):
    machine = new.folder / "machine"
    machine.write_text("echo 'a GPU that torch cannot use' >&2; exit 1\n")
    assert "a GPU that torch cannot use" in new.run(status=1).stderr and new.scripts() == []
    machine.write_text("echo cpu\n")
    new.run()
    assert new.scripts() == EVERYTHING


def test_the_plan_comes_first_and_holds_the_commands_that_are_left(new):
    assert "the plan" in new.run("cpu", "--plan", "--vram=12").stdout and new.lines() == []
    planned = [line.split("\tpython ")[1] for line in (new.folder / "planned").read_text().splitlines()]
    shown = new.run("cpu").stdout
    assert planned == [line.removesuffix(" --overwrite") for line in new.lines()]
    assert shown.index("the plan") < shown.index("== tokenizer")
    new.run("cpu")
    assert (new.folder / "planned").read_text() == ""


def test_no_command_reaches_past_the_folder_of_its_own(new):
    new.run("cpu", OUT="elsewhere")
    for line in new.lines():
        words = line.split()
        assert "--out=elsewhere" in words or "elsewhere/stand_in" in words, line
        assert " out/" not in line
        if words[0] in ("sft.py", "dpo.py", "verifier.py"):  # or it would be the config's own, under out
            named = re.findall(r'^(\w+) = "out/', (ROOT / words[1]).read_text(), re.MULTILINE)
            assert named and all(f"--{key}=elsewhere/" in line for key in named), line


def test_a_failure_names_stage_log_and_the_command_that_goes_on(new):
    failed = new.run("cpu", FAIL="train.py", status=1).stderr
    assert new.scripts() == ["tokenizer.py", "train.py"]
    for words in ("pretrain", "out/logs/pretrain.log", "bash run_all.sh cpu"):
        assert words in failed
    assert "no luck" in (new.folder / "out" / "logs" / "pretrain.log").read_text()
    stopped = new.run("cpu", FAIL="train.py", STATUS="130", status=130).stderr
    assert "interrupted" in stopped and "failed" not in stopped


def test_words_reach_the_lab_or_are_refused(new):
    new.run("experiments", "--quick")
    new.run("hardware", "--only=data")
    assert new.lines() == ["-m lab.experiments --out=out --quick", "-m lab.hardware --out=out --only=data"]
    new.run("gpu", status=2)
    assert "pretrian" in new.run("cpu", "pretrian", status=2).stderr
    assert "bash run_all.sh test" in new.run("--help").stdout


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="elsewhere torch has one build")
def test_without_a_driver_torch_for_cpus_is_tried_first_and_need_not_be_had(new):
    if DRIVER_FILE.exists() or any(map(shutil.which, NVIDIA_SMI)):
        pytest.skip("this machine has an NVIDIA driver")
    calls = new.folder / "pip_calls"
    new.run("cpu")  # the stand-in refuses that index
    for_cpus, rest = calls.read_text().splitlines()
    assert "--index-url https://download.pytorch.org/whl/cpu torch>=2,<3" in for_cpus
    calls.unlink()
    (new.folder / ".venv" / "installed").unlink()
    (new.folder / "nvidia-smi").touch(mode=0o755)
    new.run("cpu", PATH=f"{new.folder}:{os.environ['PATH']}")
    assert calls.read_text().splitlines() == [rest]
