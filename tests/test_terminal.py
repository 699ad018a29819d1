"""Ctrl-C, closed pipes, encodings, and processes whose parent dies."""

from support.terminal import is_amd

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import wait_until

from support.processes import WorkerDied, alone_in, worker_pool
from support.runs import run_stage

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(f.name for f in ROOT.glob("*.py") if "__main__" in f.read_text(encoding="utf-8"))
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


def start(*words: str, **env: str) -> subprocess.Popen:
    """A script with Ctrl-C as in a terminal, even if pytest runs in the background."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("chosen, spins, kernels", [
    ({}, "2000" if is_amd() else "4000", "128"),
    ({"GOMP_SPINCOUNT": "7", "LRU_CACHE_CAPACITY": "9"}, "7", "9"),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, "None", "128"),
])  # fmt: skip
def test_threads_leave_cores_to_others_and_few_kernels_are_kept_unless_the_user_has_chosen(
    tmp_path, monkeypatch, chosen, spins, kernels
):
    names = ["GOMP_SPINCOUNT", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    for name in [*names, "OMP_WAIT_POLICY"]:
        monkeypatch.delenv(name, raising=False)
    text = f"import os\nfor name in {names}: print(os.environ.get(name))"
    output, _ = start(script(tmp_path, text), **chosen).communicate()
    assert output.decode().split() == [spins, kernels, "128"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_takes_over_the_terminal_first_of_all(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports[0].module == "support.terminal"
    assert source.splitlines()[-1] == "    run_script(main)"


def test_ctrl_c_while_libraries_are_imported_is_quiet():
    process = start("-v", "train.py", "--help")  # -v: says on stderr what is imported
    for line in process.stderr:
        if line.startswith(b"import 'support.terminal'"):  # printed after the module has run
            break
    process.send_signal(signal.SIGINT)
    assert b"Traceback" not in process.communicate()[1] and process.returncode == 130


def script(tmp_path: Path, text: str) -> str:
    """A script beside ours: `support.terminal` acts for the folder that it lies in."""
    (tmp_path / "support").mkdir()
    for name in ("__init__", "terminal"):
        (tmp_path / "support" / f"{name}.py").write_bytes((ROOT / "support" / f"{name}.py").read_bytes())
    file = tmp_path / "script.py"
    file.write_text(f"from support.terminal import run_script\n\n{text}", encoding="utf-8")
    return str(file)


def test_ctrl_c_in_main_tidies_up_and_ends_with_130(tmp_path):
    text = """
import time
def main():
    try:
        print("here", flush=True); time.sleep(300)
    finally:
        print("tidied up", flush=True)
run_script(main)
"""
    process = start(script(tmp_path, text))
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"tidied up\n", b"") and process.returncode == 130


def test_a_reader_that_goes_ends_the_script_in_silence(tmp_path):
    process = start(script(tmp_path, "def main():\n    while True: print('a line')\nrun_script(main)"))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 141 and process.stderr.read() == b""


def test_a_character_that_the_terminal_lacks_is_replaced(tmp_path):
    text = "def main():\n    print('caf\\u00e9 \\u6771\\u4eac', input()[:1])\nrun_script(main)"
    process = start(script(tmp_path, text), PYTHONIOENCODING="ascii")
    out, errors = process.communicate("é\n".encode())
    assert process.returncode == 0 and errors == b"" and b"??" in out


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def ends_with_its_parent(code: str) -> None:
    """`code` starts a process and prints its id."""
    parent = start("-c", code)
    pid = int(parent.stdout.readline())
    parent.kill()
    wait_until(lambda: not alive(pid))


def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    child = script(tmp_path, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(300)")
    code = "import os, subprocess, sys\nenv = os.environ | {'END_WITH_PARENT': str(os.getpid())}\n"
    ends_with_its_parent(code + f"subprocess.run([sys.executable, {child!r}], env=env)")


# -----------------------------------------------------------------------------
# Workers


@pytest.mark.parametrize("number, words", [
    (signal.SIGKILL, "out of memory.*--workers=1"),
    (signal.SIGTERM, "again$"),  # a batch system's, which says nothing of memory
])  # fmt: skip
def test_a_worker_that_dies_is_one_message(number, words):
    with pytest.raises(WorkerDied, match=words):
        with worker_pool(2, "--workers=1") as pool:
            pool.submit(signal.raise_signal, number).result()


def test_leaving_a_pool_by_an_exception_does_not_wait_for_its_work():
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        with worker_pool(2, "") as pool:
            pool.submit(time.sleep, 300)
            raise KeyboardInterrupt
    assert time.monotonic() - begun < 200


def test_workers_end_when_their_parent_is_killed():
    code = """
import os, time
from support.processes import worker_pool
with worker_pool(2, "") as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 300).result()
"""
    ends_with_its_parent(code)


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    code = "from pathlib import Path\nfrom support.processes import alone_in\n"
    code += f"with alone_in(Path({str(tmp_path)!r})): print('in', flush=True)"
    with alone_in(tmp_path):
        other = start("-c", code)
        assert b"waiting" in other.stdout.readline()
    assert other.stdout.readline() == b"in\n" and other.wait() == 0


def test_a_stage_reports_on_rank_0_alone(monkeypatch, capsys):
    cfg = SimpleNamespace(name="run", out="out")
    for rank in (0, 1):
        monkeypatch.setattr("support.runs.RANK", rank)
        run_stage(lambda _: {"loss": 2}, cfg, lambda folder, run: f"{folder}: loss {run['loss']}")
    assert capsys.readouterr().out == "out/run: loss 2\n"
