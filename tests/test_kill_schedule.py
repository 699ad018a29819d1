"""kill_schedule.py kills every stage at every file operation; here a few, behind the last checkpoint."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("kill_schedule.py")


def test_a_kill_between_the_last_checkpoint_and_the_finish_changes_nothing():
    """The new checkpoint, its links into the run folder, the removal of older ones, the last run.json."""
    command = [sys.executable, str(SCRIPT), "--stage=train", "--last=48", "--every=8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of " in done.stdout and "all the same" in done.stdout
