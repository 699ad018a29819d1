"""run_all.sh: what can be said of it without installing anything."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_all(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "run_all.sh", *words], cwd=folder, env=os.environ | env, capture_output=True, text=True
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the script beside stand-ins: a `python` that notes its arguments and obeys $FAIL."""
    (tmp_path / "run_all.sh").write_text((ROOT / "run_all.sh").read_text())
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cpu.py").write_text('name = "stand_in"\n')
    for name in ("sentiment", "sft", "dpo", "verifier"):
        (tmp_path / "configs" / f"{name}.py").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/usr/bin/env bash\n"
        '[ "$1" = -c ] && { echo stand_in; exit; }\n'
        '[ "$2" = support.machine ] && { . ./machine; exit; }\n'
        '[ "$2" = lab.plan ] && { cat >planned; echo "the plan"; exit; }\n'
        'echo "$*" >>calls\n'
        '[ "$1" = "${FAIL:-}" ] && { echo "no luck"; exit ${STATUS:-1}; }\n'
        "mkdir -p out && cd out && mkdir -p tokens stand_in sentiment sft dpo verifier\n"
        'case "$1 $*" in\n'
        "train*) touch stand_in/model.safetensors ;;\n"
        "finetune*) touch sentiment/run.json ;;\n"
        "sft*) touch sft/model.safetensors sft/run.json ;;\n"
        '"dpo.py "*) [ -z "${HANG:-}" ] || exec sleep 30; touch dpo/model.safetensors dpo/run.json ;;\n'
        "verifier*) touch verifier/run.json ;;\n"
        "eval*) touch stand_in/{results,attention}.json sentiment/results.json pipeline.json ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    return tmp_path


EVERYTHING = ["tokenizer.py", "train.py", "chat.py", "finetune.py", "sft.py", "dpo.py", "verifier.py"]
EVERYTHING += ["eval.py"] * 4


def calls(project: Path) -> list[str]:
    """Scripts that ran since the last look; the report, which closes every call, apart."""
    file = project / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [line.split()[0] for line in lines if not line.startswith(("-m", "report.py"))]


def test_stages_run_in_order_once_and_again_when_their_config_changes(project):
    assert run_all(project, "cpu").returncode == 0
    assert calls(project) == EVERYTHING
    again = run_all(project, "cpu")
    assert again.returncode == 0 and calls(project) == [] and again.stdout.count("done before") == 11
    (project / "configs" / "cpu.py").write_text('name = "stand_in"\nseed = 2\n')
    assert run_all(project, "cpu").returncode == 0
    assert calls(project) == EVERYTHING
    (project / "configs" / "sentiment.py").write_text("seed = 2\n")
    assert run_all(project, "cpu").returncode == 0
    assert calls(project) == ["finetune.py", "eval.py"]  # what sft.py makes does not depend on it


def test_what_follows_from_a_model_trained_anew_starts_anew(project):
    run_all(project, "cpu")
    calls(project)
    (project / "out" / "sft" / "model.safetensors").unlink()
    assert run_all(project, "cpu").returncode == 0
    lines = (project / "calls").read_text().splitlines()
    assert [line.split()[0] for line in lines if line.endswith("--overwrite")] == ["dpo.py", "verifier.py"]
    calls(project)
    again = run_all(project, "cpu")
    assert again.returncode == 0 and calls(project) == []


def killed_in_dpo(project: Path) -> None:
    """SFT has been trained anew, and everything is killed while the new DPO samples its pairs."""
    (project / "out" / "sft" / "model.safetensors").unlink()
    env = os.environ | {"HANG": "yes"}
    run = subprocess.Popen(["bash", "run_all.sh", "cpu"], cwd=project, env=env, start_new_session=True)
    try:
        while "dpo.py" not in calls_so_far(project):
            assert run.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def calls_so_far(project: Path) -> list[str]:
    file = project / "calls"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def test_a_stage_that_was_killed_is_not_done_and_still_starts_anew(project):
    run_all(project, "cpu")
    calls(project)
    killed_in_dpo(project)
    calls(project)
    assert run_all(project, "cpu").returncode == 0
    lines = (project / "calls").read_text().splitlines()
    assert [line.split()[0] for line in lines if line.endswith("--overwrite")] == ["dpo.py", "verifier.py"]
    assert calls(project) == ["dpo.py", "verifier.py", "eval.py"]
    assert run_all(project, "cpu").returncode == 0 and calls(project) == []


def test_a_stage_that_began_anew_and_was_killed_goes_on(project):
    run_all(project, "cpu")
    calls(project)
    killed_in_dpo(project)
    (project / "out" / "dpo" / "run.json").touch()  # the new run had begun
    calls(project)
    assert run_all(project, "cpu").returncode == 0
    lines = (project / "calls").read_text().splitlines()
    assert [line.split()[0] for line in lines if line.endswith("--overwrite")] == ["verifier.py"]


def test_a_single_stage_makes_what_follows_from_it_out_of_date(project):
    run_all(project, "cpu")
    (project / "out" / "sft" / "model.safetensors").unlink()
    run_all(project, "cpu", "sft")
    calls(project)
    assert run_all(project, "cpu").returncode == 0
    assert calls(project) == ["dpo.py", "verifier.py", "eval.py"]


def test_without_a_profile_the_machine_is_asked(project):
    machine = project / "machine"
    machine.write_text("echo cpu\n")
    assert run_all(project).returncode == 0 and calls(project) == EVERYTHING
    machine.write_text("echo 'a GPU that torch cannot use' >&2; exit 1\n")
    refused = run_all(project)
    assert refused.returncode == 1 and "a GPU that torch cannot use" in refused.stderr
    assert calls(project) == []


def test_a_stage_whose_result_was_deleted_runs_again(project):
    run_all(project, "cpu")
    calls(project)
    (project / "out" / "stand_in" / "model.safetensors").unlink()
    assert run_all(project, "cpu").returncode == 0
    assert calls(project) == EVERYTHING[1:]  # and what follows from it


def test_the_plan_comes_first_and_holds_the_commands_that_are_left(project):
    only = run_all(project, "cpu", "--plan", "--vram=12")
    assert only.returncode == 0 and "the plan" in only.stdout and calls(project) == []
    lines = [line.split("\t") for line in (project / "planned").read_text().splitlines()]
    assert [command.split()[1] for _, command in lines] == EVERYTHING and lines[0][0] == "tokenizer"
    done = run_all(project, "cpu")
    ran = (project / "calls").read_text().splitlines()
    ran = [line.removesuffix(" --overwrite") for line in ran if not line.startswith(("-m", "report.py"))]
    assert [command.removeprefix("python ") for _, command in lines] == ran
    assert done.stdout.index("the plan") < done.stdout.index("== tokenizer")
    assert run_all(project, "cpu").returncode == 0
    assert (project / "planned").read_text() == ""


def test_one_stage_may_be_named(project):
    assert run_all(project, "cpu", "tokenizer").returncode == 0
    assert calls(project) == ["tokenizer.py"]


def test_no_command_reaches_past_the_folder_of_its_own(project):
    assert run_all(project, "cpu", OUT="elsewhere").returncode == 0
    lines = (project / "calls").read_text().splitlines()
    assert lines[-1] == "report.py --home=elsewhere"
    commands = [line for line in lines[:-1] if not line.startswith("-m pip")]
    for line in commands:
        words = line.split()
        assert "--out=elsewhere" in words or "elsewhere/stand_in" in words, line
        assert not any(word.startswith("out/") for word in words), line
        if words[0] in ("sft.py", "dpo.py", "verifier.py"):  # or it would be the config's own, under out
            config = (ROOT / words[1]).read_text()
            named = re.findall(r'^(\w+) = "out/', config, re.MULTILINE)
            assert named and all(f"--{key}=elsewhere/" in line for key in named), line


def test_a_failure_names_stage_log_and_the_command_that_goes_on(project):
    failed = run_all(project, "cpu", FAIL="train.py")
    assert failed.returncode == 1 and calls(project) == ["tokenizer.py", "train.py"]
    assert "stage pretrain failed" in failed.stderr and "out/logs/pretrain.log" in failed.stderr
    assert "bash run_all.sh cpu" in failed.stderr
    assert "no luck" in (project / "out" / "logs" / "pretrain.log").read_text()
    assert run_all(project, "cpu").returncode == 0 and calls(project) == EVERYTHING[1:]


def test_an_interruption_keeps_its_exit_status_and_is_no_failure(project):
    stopped = run_all(project, "cpu", FAIL="train.py", STATUS="130")
    assert stopped.returncode == 130 and "interrupted" in stopped.stderr and "failed" not in stopped.stderr


def test_the_lab_gets_its_flags(project):
    assert run_all(project, "experiments", "--quick").returncode == 0
    lines = [
        line
        for line in (project / "calls").read_text().splitlines()
        if not line.startswith(("-m", "report.py"))
    ]
    assert lines == ["experiments.py --out=out --quick"]


def test_the_machine_is_measured_and_reported(project):
    assert run_all(project, "hardware", "--only=data").returncode == 0
    assert "-m lab.hardware --out=out --only=data" in (project / "calls").read_text()


def test_another_seed_reaches_every_stage_that_trains(project):
    assert run_all(project, "cpu").returncode == 0
    assert run_all(project, "cpu", SEED="2").returncode == 0  # other commands, so nothing counts as done
    seeded = [line.split()[0] for line in (project / "calls").read_text().splitlines() if "--seed=2" in line]
    assert seeded == ["train.py", "finetune.py", "sft.py", "dpo.py", "verifier.py"]


def test_words_it_does_not_know_are_refused(project):
    assert run_all(project, "gpu").returncode == 2
    unknown = run_all(project, "cpu", "pretrian")
    assert unknown.returncode == 2 and "finetune, sft, dpo, verifier, eval" in unknown.stderr


def test_help_prints_the_commands(project):
    shown = run_all(project, "--help")
    assert shown.returncode == 0 and "bash run_all.sh test" in shown.stdout and "set -euo" not in shown.stdout
