"""Without a connection, the hub is asked once, and what is in its cache works."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "DATA_DIR": str(tmp_path)}
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | nowhere
    began = time.monotonic()
    command = [sys.executable, "data.py", "--task=sst2", "--show=1"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "no connection" in done.stderr and "sentiment" in done.stderr
    assert "Retrying" not in done.stderr + done.stdout
    assert time.monotonic() - began < 60  # its own retries took minutes
