"""The stages on a GPU that is only pretended (tests/pretend_gpu.py): no tensor lies on the wrong device."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.stories import storyworld
from tokenizer import Tokenizer, write_tokens

ROOT = Path(__file__).resolve().parents[1]
can_compile = sys.platform == "linux" and shutil.which("c++")
pytestmark = pytest.mark.skipif(not can_compile, reason="needs Linux and a C++ compiler")
STEPS = "--max_steps=3 --warmup_steps=1 --eval_every=2 --save_every=2 --batch_size=4 --compile=False".split()


@pytest.fixture
def sft(tuned, tmp_path) -> str:
    """A copy, in which these tests keep their samples."""
    return str(shutil.copytree(tuned, tmp_path / "sft"))


def on_gpu(*words: str, entered: str = "", status: int = 0) -> str:
    """What the script prints, which has to end with this exit status."""
    command = [sys.executable, "tests/pretend_gpu.py", *words, "--device=cuda"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    how = dict(cwd=ROOT, env=env, input=entered, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ran = subprocess.run(command, **how)
    assert ran.returncode == status, ran.stdout[-3000:]
    assert "attention by math, training" not in ran.stdout
    return ran.stdout


def recorded(output: str) -> bool:
    return int(output.partition("CUDA graphs recorded: ")[2].split()[0]) > 0


@pytest.mark.parametrize(
    "by_document, attention", [(False, "flash, training"), (True, "efficient, training, masked")]
)
def test_pretraining_with_muon_and_samples(tiny, tmp_path, by_document, attention):
    tokenizer = Tokenizer.load(tiny["base"])
    tokenizer.save(tmp_path / "tokens")
    for split in ("train", "validation"):
        info = {"source": "a test", "licence": "none", "fingerprint": split}
        write_tokens(tokenizer, storyworld(split, 8), tmp_path / "tokens", split, info)
    how = "--n_layers=2 --d_model=64 --n_heads=4 --n_kv_heads=2 --context_length=64 --optimizer=muon".split()
    how += [f"--tokens={tmp_path}/tokens", f"--out={tmp_path}", f"--by_document={by_document}"]
    output = on_gpu("train.py", *how, *STEPS, "--sample_tokens=12")
    assert f"attention by {attention}" in output and recorded(output)


@pytest.mark.parametrize("more", [["--lora_r=2"], ["--dtype=float32"]], ids=" ".join)
def test_packed_instruction_tuning(tiny, tmp_path, more):
    how = [f"--model={tiny['base']}", f"--out={tmp_path}", "--data=arithmetic@60"]
    output = on_gpu("sft.py", *how, *STEPS, "--eval_examples=8", *more)
    assert "attention by efficient, training, masked" in output


def test_preferences_on_policy(sft, tmp_path):
    how = [f"--model={sft}", f"--out={tmp_path}"]
    few = "--problems=40 --first_problem=0 --n=4 --eval_examples=40".split()
    assert recorded(on_gpu("dpo.py", *how, *STEPS, *few))


@pytest.mark.parametrize("kind", ["channel", "head"])
def test_a_verifier_and_the_samples_that_it_chooses_from(sft, tmp_path, kind):
    how = [f"--model={sft}", f"--out={tmp_path}"]
    few = "--problems=100 --n=4 --held_n=4 --gold=20 --validation_problems=12 --test_problems=8".split()
    few += [f"--kind={kind}", "--name=verifier", "--first_problem=0"]
    assert recorded(on_gpu("verifier.py", *how, f"--start={sft}", *STEPS, *few))
    chosen = ["--samples=4", "--limit=8", "--tasks=arithmetic", f"--verifier={tmp_path}/verifier"]
    on_gpu("eval.py", sft, f"--out={tmp_path}", *chosen)


def test_chat(sft):
    on_gpu("chat.py", sft, "--prompt=Anna has", "--n=2", "--max_new_tokens=9")
    output = on_gpu("chat.py", sft, "--chat", "--max_new_tokens=9", entered="Say hello.\n")
    assert recorded(output)


MEASURE = """
from lab import hardware
hardware.MEMORY = {"small": "", "Muon": "--optimizer=muon"}
hardware.BASE += " --vocab_size=64 --n_layers=1 --d_model=32 --n_heads=2 --n_kv_heads=1 --d_ff=32"
hardware.BASE += " --context_length=64 --batch_size=2"
hardware.ANSWERS, hardware.PROMPT, hardware.NEW = [(1, 1), (8, 4)], 8, 9
hardware.main()
"""


def test_memory_is_measured_in_training_and_in_sampling(tmp_path):
    script, config = tmp_path / "measure.py", tmp_path / "tiny.py"
    script.write_text(MEASURE)
    config.write_text("n_layers, d_model, n_heads, d_ff, vocab_size = 1, 32, 2, 32, 64\n")
    output = on_gpu(str(script), f"--configs={config}", f"--out={tmp_path}", "--rounds=1", "--only=memory")
    assert recorded(output) and output.count("off by") == 4


MISTAKES = [
    "x + torch.ones(2)",
    "x.numpy()",
    "np.asarray(x)",
    "torch.ones(2)[x.long()]",
    "x.normal_(generator=torch.Generator())",
    "recorded(lambda: x * x.sum().item())",
    "recorded(lambda: x + torch.tensor([1, 2], device=x.device))",
    "recorded(lambda: x.cpu())",
    "recorded(lambda: x[x > 0])",
]
SCRIPT = f"""
import numpy as np
import torch

x = torch.ones(2, device="cuda")
total = torch.zeros(2, device="cuda")

def recorded(run):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph

graph = recorded(lambda: total.add_(x[:1]))
x += torch.tensor(1)
graph.replay()
assert total.tolist() == [2, 2]  # launched once, on what x then was
for mistake in {MISTAKES}:
    try:
        eval(mistake)
    except (RuntimeError, TypeError):
        print("found:", mistake)
"""


def test_mistakes_are_found_and_end_in_an_exit_status_though_the_script_goes_on(tmp_path):
    script = tmp_path / "mistakes.py"
    script.write_text(SCRIPT)
    output = on_gpu(str(script), status=1)
    assert re.findall("^found: (.*)", output, re.MULTILINE) == MISTAKES
