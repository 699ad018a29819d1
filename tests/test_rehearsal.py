"""The GPU profiles, rehearsed: every command of run_all.sh on a CPU without a network, everything small."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import make_hub, serving
from rehearsal import copy_project, environment, rehearse

# What no log of a run that went well should hold.
NOISE = re.compile(r"Traceback|Warning:|\bnan\b|\binf\b|Retrying in|Fetching \d|Generating \w+ split")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A copy of the project, and the environment in which the hub is on this computer."""
    folder = tmp_path_factory.mktemp("rehearsal")
    project = copy_project(folder)
    with serving(make_hub(folder / "hub")) as server:
        yield project, environment(server, folder)


def output(place, *command: str, **env: str) -> str:
    project, usual = place
    done = subprocess.run(command, cwd=project, env=usual | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("profile", ["speedrun", "max3060"])
def test_a_plan_for_a_gpu_that_is_not_here_needs_no_network(place, profile):
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "OUT": "planned"}
    shown = output(place, "bash", "run_all.sh", profile, "--plan", "--vram=12", **offline)
    assert "finetune-samsum" in shown and "eval-life" in shown


def test_every_command_of_the_profiles_works_and_is_done_the_second_time(place):
    project, env = place
    assert rehearse(project, env, "speedrun", []) == []
    table = (project / "out/report/results.csv").read_text(encoding="utf-8")
    for words in ("gpt2", "sst2", "ROUGE-L", "exact match", "bits/byte", "SMOKE RUN"):
        assert words in table, words
    assert rehearse(project, env, "max3060", ["tokenizer", "pretrain", "samples", "eval"]) == []
    assert (project / "out/max3060/attention.json").exists()
    assert rehearse(project, env | {"MODEL": "out/sft"}, "smol", []) == []
    logs = "\n".join(file.read_text(encoding="utf-8") for file in (project / "out/logs").glob("*.log"))
    assert "1 without text left out" in logs  # the empty dialogue of SAMSum
    assert not NOISE.search(logs)


def test_a_model_of_the_hub_learns_to_follow_instructions(place):
    flags = ["--data=instructions", "--max_steps=2", "--eval_examples=4", "--name=gpt2_sft"]
    assert "val_loss" in output(place, sys.executable, "sft.py", "--model=gpt2", *flags)
