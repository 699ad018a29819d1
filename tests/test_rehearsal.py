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


def logs(project: Path) -> str:
    return "\n".join(
        file.read_text(encoding="utf-8") for file in sorted((project / "out/logs").glob("*.log"))
    )


def python(place, *words: str) -> subprocess.CompletedProcess:
    project, env = place
    return subprocess.run([sys.executable, *words], cwd=project, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("profile", ["speedrun", "max3060"])
def test_a_plan_for_a_gpu_that_is_not_here_needs_no_network(place, profile):
    project, env = place
    env = env | {"HF_ENDPOINT": "http://127.0.0.1:9", "OUT": "planned"}
    command = ["bash", "run_all.sh", profile, "--plan", "--vram=12"]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "finetune-samsum" in done.stdout and "eval-life" in done.stdout


def test_every_command_of_speedrun_works_and_is_done_the_second_time(place):
    project, env = place
    assert rehearse(project, env, "speedrun", []) == []
    assert not NOISE.search(logs(project))
    read = logs(project)
    assert "1 without text left out" in read  # the empty dialogue of SAMSum
    table = (project / "out/report/results.csv").read_text(encoding="utf-8")
    for words in ("gpt2", "sst2", "ROUGE-L", "exact match", "bits/byte", "SMOKE RUN"):
        assert words in table, words


def test_the_commands_of_max3060_that_differ_work_too(place):
    project, env = place
    stages = ["tokenizer", "pretrain", "samples", "eval"]
    assert rehearse(project, env, "max3060", stages) == []
    assert not NOISE.search(logs(project))
    assert (project / "out/max3060/attention.json").exists()


COLLECTIONS = """
from data import DataError, load_conversations, load_preferences
for name in ("alpaca", "dolly"):
    print(name, len(load_conversations(name, "train")[0]))
for name in ("hh-rlhf", "ultrafeedback"):
    print(name, len(load_preferences(name, "train")[0]))
try:
    load_conversations("lima", "train")
except DataError as error:
    print("lima", error)
"""


def test_collections_of_the_hub_are_read_as_they_are_served(place):
    done = python(place, "-c", COLLECTIONS)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert all(int(found[name]) > 40 for name in ("alpaca", "dolly", "hh-rlhf", "ultrafeedback")), done
    assert "gated" in found["lima"] and "hf auth login" in found["lima"]


def test_a_model_of_the_hub_learns_to_follow_instructions(place):
    flags = ["--data=instructions", "--max_steps=2", "--eval_examples=4", "--name=gpt2_sft"]
    done = python(place, "sft.py", "--model=gpt2", *flags)
    assert done.returncode == 0, done.stderr
    assert "val_loss" in done.stdout
