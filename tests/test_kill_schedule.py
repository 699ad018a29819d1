"""kill_schedule.py kills every stage at every file operation; here pretraining at some of them."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("kill_schedule.py")


def test_a_kill_within_any_file_operation_changes_nothing():
    """Of checkpoints, their links into the run folder, removals of older ones, logs and run.json."""
    command = [sys.executable, str(SCRIPT), "--stage=train", "--every=16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "all the same" in done.stdout, done.stdout + done.stderr
