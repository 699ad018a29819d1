"""Rehearses the GPU profiles on a CPU without a network: run_all.sh itself, with everything small.

    python tests/rehearsal.py                       # speedrun, then max3060: all commands of both
    python tests/rehearsal.py speedrun finetune     # some stages
    bash run_all.sh rehearse                        # the first, after setting up .venv

It copies the project into a folder, writes smaller numbers into the copy, serves the models and data sets of
the hub from this computer (tests/local_hub.py) and runs `bash run_all.sh PROFILE` there twice.
The second time every stage has to say that it is done. All that it makes stays in the folder.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from local_hub import make_hub, offline_but_for, serving  # noqa: E402

# What is appended to the copies of the config files; later assignments win.
BASE = """
vocab_size = 512
n_layers, d_model, n_heads, n_kv_heads, d_ff = 2, 64, 4, 2, 128
context_length = 256
batch_size, grad_accum_steps = 4, 2
max_steps, warmup_steps, eval_every, save_every = 10, 2, 5, 5
eval_tokens, final_eval_tokens = 2_000, 4_000
"""
TUNED = """
batch_size, grad_accum_steps = 4, 2
max_steps, warmup_steps, eval_every, save_every = 6, 2, 3, 3
eval_examples, max_eval_examples = 4, 8
"""
SMALLER = {
    "speedrun": BASE,
    "max3060": BASE,
    "sst2": TUNED,
    "samsum": TUNED,
    "gsm8k": TUNED,
    # SFT takes more steps: without a few right answers DPO and the verifier have nothing to learn from.
    "sft": 'data = "arithmetic"\nbatch_size, max_steps, learning_rate = 8, 150, 1e-2\n'
    "eval_examples, eval_every = 8, 75\n",
    "dpo": "problems = 60\nmax_steps, eval_every, save_every = 4, 2, 2\neval_examples = 80\n",
    "verifier": "gold, problems, validation_problems, test_problems = 40, 60, 20, 20\nheld_n = 4\n"
    "max_steps, eval_every, save_every = 4, 2, 2\n",
    "smol_sst2": TUNED,
}
for stage in ("sft", "dpo", "verifier"):
    more = "context_length = 256\n" + SMALLER[stage].replace('"arithmetic"', '"gsm8k"')
    SMALLER[f"smol_{stage}"] = more
SMALLER["smol_sft"] += "grad_accum_steps, learning_rate = 1, 2e-3\n"  # by LoRA, of a model that is tuned
# What is replaced in the copy of run_all.sh: numbers of flags, which would win over any config file.
FLAGS = {
    "(python eval.py ": "(python eval.py --limit=8 ",
    " --limit=500": "",
    " --limit=300": "",
    " --samples=16": " --samples=4",
    " --samples=8": " --samples=4",
    " --battery=200": " --battery=6",
}
# The plan measures models of the hub in their real shapes; here they have the shape of the small ones.
PLAN = """for _name in ON_HUB:
    ON_HUB[_name] = ModelConfig(vocab_size=1000, n_layers=2, d_model=32, n_heads=4, d_ff=64)
"""


def copy_project(folder: Path) -> Path:
    """A copy of the project in which everything is small, and `python` is the one that runs this."""
    project = folder / "project"
    shutil.copytree(ROOT, project, ignore=left_out)
    for name, settings in SMALLER.items():
        with open(project / f"configs/{name}.py", "a", encoding="utf-8") as config:
            config.write(f"\n# for the rehearsal\n{settings.strip()}\n")
    end = '\n\nif __name__ == "__main__":'
    replaced = {"run_all.sh": FLAGS, "lab/plan.py": {end: f"\n\n{PLAN}{end}"}}
    for name, words in replaced.items():
        text = (project / name).read_text(encoding="utf-8")
        for old, new in words.items():
            if old not in text:
                raise SystemExit(f"{name} no longer holds {old!r}: adapt tests/rehearsal.py")
            text = text.replace(old, new)
        (project / name).write_text(text, encoding="utf-8")

    python = project / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    nothing_to_install = 'echo "[serve] $(cksum <pyproject.toml)" >.venv/installed'
    subprocess.run(nothing_to_install, shell=True, cwd=project, check=True)
    return project


def left_out(folder: str, names: list[str]) -> set[str]:
    """What is not copied: hidden files, and at the top what is not needed to run the stages."""
    top = {"out", "data", "models", "report", "tests"} if Path(folder) == ROOT else set()
    return {name for name in names if name in top or name.startswith((".", "__pycache__"))}


def environment(server, folder: Path) -> dict[str, str]:
    """No GPU, no network but the local hub, no files in $DATA_DIR, one thread: the models are small."""
    env = os.environ | offline_but_for(server, folder / "home")
    env |= {"DATA_DIR": str(folder / "data"), "OUT": "out", "SEED": ""}
    return env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(project: Path, env: dict[str, str], *words: str) -> tuple[int, str]:
    """Exit status and output, which is shown as it comes, of `bash run_all.sh ...` in the copy."""
    print(f"\n$ bash run_all.sh {' '.join(words)}", flush=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    with subprocess.Popen(["bash", "run_all.sh", *words], cwd=project, env=env, **pipes) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def rehearse(project: Path, env: dict[str, str], profile: str, stages: list[str]) -> list[str]:
    """Runs a profile twice; returns what went wrong."""
    status, first = run(project, env, profile, *stages)
    if status:
        return [f"{profile}: exit status {status}"]
    ran = re.findall(r"^== (\S+): (?!done before)", first, re.MULTILINE)
    table = first.partition("the plan, ")[2].partition("\nall ")[0]
    planned = re.findall(r"^(\S+) .*\d", table, re.MULTILINE)[1:]  # without the heading
    status, second = run(project, env, profile, *stages)
    done = re.findall(r"^== (\S+): done before", second, re.MULTILINE)
    wrong = []
    if planned != ran:
        wrong.append(f"{profile}: planned were {planned}, but {ran} ran")
    if status or done != ran:
        wrong.append(f"{profile}, the second time: status {status}, done before {done}, not {ran}")
    print(f"\n{profile}: {len(ran)} stages; {project / 'out/report/index.html'}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", choices=["speedrun", "max3060"], help="default: both")
    parser.add_argument("stages", nargs="*", help="default: all; see run_all.sh")
    default = Path(tempfile.gettempdir()) / "rehearsal"
    parser.add_argument("--folder", type=Path, default=default, help="is emptied first")
    args = parser.parse_args()
    if args.folder.exists() and not (args.folder / "hub").is_dir():
        sys.exit(f"{args.folder} is no folder of an earlier rehearsal: name another by --folder")
    shutil.rmtree(args.folder, ignore_errors=True)
    project = copy_project(args.folder)
    wrong = []
    with serving(make_hub(args.folder / "hub")) as server:
        for profile in [args.profile] if args.profile else ["speedrun", "max3060"]:
            wrong += rehearse(project, environment(server, args.folder), profile, args.stages)
    if wrong:
        sys.exit("\n".join(["", "the rehearsal found:", *wrong]))


if __name__ == "__main__":
    main()
