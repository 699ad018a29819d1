"""What CONTRIBUTING.md and the README tell people to do, done."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from configs import SCRIPTS, declared, parse_config
from data import TASKS, load_task
from support.tables import read_jsonl
from train import TrainConfig

ROOT = Path(__file__).parents[1]


def example(kind: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.search(rf"```python {kind}\n(.*?)```", text, re.DOTALL)[1]


def test_the_task_of_the_example_is_found_and_asked(monkeypatch):
    monkeypatch.setattr("data.TASKS", dict(TASKS))
    exec(example("task"), {})
    examples, _ = load_task("parity", "test")
    assert len(examples) == 1000 and {e.target for e in examples} == {" even", " odd"}


def test_the_stage_of_the_example_trains_and_resumes(tiny, tmp_path):
    (tmp_path / "copying.py").write_text(example("stage"), encoding="utf-8")
    flags = f"--model={tiny['base']} --out={tmp_path} --name=copy --device=cpu --batch_size=4 --max_steps=20"
    command = [sys.executable, str(tmp_path / "copying.py"), *flags.split(), "--learning_rate=1e-2"]
    for _ in range(2):  # the second time it is done
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "was trained before" in done.stdout
    losses = [line["loss"] for line in read_jsonl(tmp_path / "copy/metrics.jsonl") if "loss" in line]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_the_experiment_of_the_example_is_a_config(tmp_path):
    (tmp_path / "wide.py").write_text(example("experiment"), encoding="utf-8")
    cfg = parse_config(TrainConfig, argv=[str(tmp_path / "wide.py")])
    assert (cfg.n_layers, cfg.d_ff, cfg.d_model) == (2, 704, 128) and cfg.hypothesis


def test_settings_and_files_of_every_command_in_the_readme_exist():
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "report/guide.md")]
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(texts), re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    scripts = [words[1:] for words in commands if words[:1] == ["python"] and words[1].endswith(".py")]
    assert len(scripts) > 40
    for script, *words in scripts:
        calls = re.findall(r"parse_config\((\w+)", (ROOT / script).read_text(encoding="utf-8"))
        settings = declared(Path(script).stem, SCRIPTS.get(Path(script).stem, calls[0]))
        for word in words:
            if word.startswith("--") and word != "--help":
                assert word.split("=")[0][2:] in settings, f"{script} has no {word}"
            elif word.endswith(".py"):
                assert (ROOT / word).exists()
