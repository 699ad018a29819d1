"""The plan: work counted by hand, rates that add up, and what run_all.sh hands over."""

import subprocess
import sys

import pytest
import torch

from configs import ROOT, ConfigError
from data import TASKS, load_conversations, load_task
from lab import plan as script
from lab.hardware import GIB
from lab.plan import Elsewhere, Here, Plan, PlanConfig, Work, answering_memory, estimate, memory, table
from model import ModelConfig
from support.costs import count_parameters
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = "train.py configs/cpu.py --max_steps=100 --batch_size=2"


def counted(*commands: str) -> list[Work]:
    """The work of commands that follow each other."""
    plan = Plan(PlanConfig())
    return [plan.count(command.split()) for command in commands]


# -----------------------------------------------------------------------------
# counting


def test_pretraining_trains_on_steps_times_rows_times_context():
    (work,) = counted(BASE)
    assert work.trains == 100 * 2 * 256 and (work.rows, work.length) == (2, 256)
    assert work.shape.d_model == 128 and work.reads == 100_000  # the last evaluation's


def test_a_stage_has_the_shape_of_what_an_earlier_one_makes():
    _, sft, dpo = counted(BASE, "sft.py configs/sft.py", "dpo.py configs/dpo.py")
    assert sft.shape.d_model == dpo.shape.d_model == 128
    with pytest.raises(ConfigError, match="out/nowhere is not known"):
        counted("sft.py configs/sft.py --model=out/nowhere")


def test_an_adapter_has_the_shape_of_what_it_corrects(tmp_path):
    (tmp_path / "run.json").write_text('{"parent": "gpt2", "stage": "finetune"}')
    assert Plan(PlanConfig()).shape(str(tmp_path)).d_model == 768


def test_a_tuned_model_that_model_py_cannot_compute_has_the_shape_of_its_parent(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "run.json").write_text('{"stage": "finetune", "parent": "google/flan-t5-small"}')
    plan = Plan(PlanConfig())
    assert plan.shape(str(tmp_path)) == plan.shape("google/flan-t5-small")


@pytest.mark.parametrize("loss", ["text", "packed", "answers"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_of_every_kind_of_stage_are_measured(loss, optimizer):
    c = ModelConfig(vocab_size=64, context_length=24, n_layers=1, d_model=16, n_heads=2)
    assert 1e-7 < Here(torch.device("cpu")).step(c, 3, loss, optimizer, False) < 1


def test_a_disk_that_is_too_small_is_refused_before_anything_begins(tmp_path, monkeypatch, capsys):
    base, sft = counted(BASE, "sft.py configs/sft.py --keep_last=2 --save_every=100")
    n = count_parameters(base.shape)["total"]
    assert (base.megabytes, sft.megabytes) == (pytest.approx(36 * n / 1e6), pytest.approx(48 * n / 1e6))
    free = type("Usage", (), {"free": 10e9})
    monkeypatch.setattr(script.shutil, "disk_usage", lambda folder: free)
    script.refuse_full_disk([{"megabytes": 9_000}], str(tmp_path / "not" / "there"))
    with pytest.raises(script.FullDisk, match="11.0 GB will be downloaded and written"):
        script.refuse_full_disk([{"megabytes": 9_000}, {"megabytes": 2_000}], str(tmp_path / "not" / "there"))
    free.free = 1000
    monkeypatch.setattr(sys, "argv", ["plan.py", f"--out={tmp_path}"])
    monkeypatch.setattr(sys, "stdin", ["tokenizer\tpython tokenizer.py configs/cpu.py\n"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 3 and "choose another disk" in capsys.readouterr().err


def test_answers_that_are_kept_are_drawn_once():
    _, _, dpo, rft, verifier, again = counted(
        BASE, "sft.py configs/sft.py", "dpo.py configs/dpo.py",
        "dpo.py configs/dpo.py --method=rft --name=rft", "verifier.py configs/verifier.py",
        "eval.py out/dpo --tasks=arithmetic --samples=16 --verifier=out/verifier",
    )  # fmt: skip
    said = script.SIZES["arithmetic"][4]
    assert dpo.samples == said * (5000 * 4 + 300 * 4 + 300) and rft.samples == 0
    assert verifier.samples == said * 1250 * 16  # what it learns from is DPO's
    assert again.samples == 2 * said * 1000 and again.reads == 0  # greedy answers; the rest was judged


def test_lora_trains_fewer_parameters_and_quantised_weights_take_less():
    full, lora, four = counted(
        *(f"finetune.py configs/gsm8k.py --model=TinyLlama/TinyLlama_v1.1 {flags}"
          for flags in ("", "--lora_r=16", "--lora_r=16 --load_in_4bit"))
    )  # fmt: skip
    c = full.shape
    assert count_parameters(c)["total"] == pytest.approx(1.1e9, rel=0.01)
    # A and B of q, k, v, o, gate, up and down.
    pairs = 2 * (c.d_model + c.d_model) + 2 * (c.d_model + 256) + 3 * (c.d_model + c.d_ff)
    assert lora.trained == 22 * 16 * pairs and lora.flops == pytest.approx(2 / 3)
    sizes = [memory(work, on_cpu=False) for work in (full, lora, four)]
    assert sizes[0] > 20 > sizes[1] > sizes[2]
    assert sizes[1] - sizes[2] > 3  # 1.1 billion weights of 4 bytes or of half a byte


def test_stages_count_the_memory_in_which_their_models_answer():
    tuned, both = counted(
        "finetune.py configs/gsm8k.py --name=gsm8k", "eval.py gpt2 out/gsm8k --tasks=gsm8k --shots=0,4"
    )
    (own,), asked = tuned.asks, both.asks
    assert (own.length, own.new, own.beside) == (195, 256, 16 * own.parameters)
    assert [(batch.length, batch.new) for batch in asked] == [(195, 256), (768, 256)] * 2
    assert {batch.rows(30 * GIB, on_cpu=False) for batch in asked} == {1024, 512}
    assert all(batch.bytes(1024, on_cpu=False) > 15 * GIB for batch in asked), "what a GPU of 12 GB has not"
    for work in (tuned, both):
        for space in (6, 10):  # GiB; batches fill the space, and do not exceed it
            assert 0.6 * space < answering_memory(work, space * GIB, on_cpu=False) <= space
    assert memory(both, on_cpu=False) == 0 < memory(tuned, on_cpu=False)


def test_on_a_cpu_all_processes_share_the_memory(monkeypatch):
    (work,) = counted("eval.py gpt2 --tasks=gsm8k --shots=4")
    for threads in (1, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert 2 < answering_memory(work, 6 * GIB, on_cpu=True) <= 6


@pytest.mark.parametrize("name", ["arithmetic", "sentiment", "dialogue", "instructions"])
def test_the_sizes_of_embedded_tasks_are_those_of_their_text(name):
    from itertools import islice

    from data import documents

    texts = list(islice(documents("storyworld:0.5,numbers:0.5", "train"), 3000))
    tokenizer = Tokenizer(*train_bpe(texts, 1024, SPECIAL_TOKENS, workers=1), SPECIAL_TOKENS)
    if name in TASKS:
        examples = load_task(name, "test")[0][:200]
        pairs = [(TASKS[name].prompt(e.text), e.target) for e in examples]
    else:
        chats = load_conversations(name, "test")[0][:200]
        pairs = [[" ".join(m["content"] for m in c[i::2]) for i in (0, 1)] for c in chats]
    told, *_ = (sum(len(tokenizer.encode(a + b)) for a, b in pairs) / len(pairs),)
    assert told == pytest.approx(sum(script.SIZES[name][3:]), rel=0.25)


# -----------------------------------------------------------------------------
# rates and the table


def test_seconds_here_are_tokens_times_measured_rates(monkeypatch):
    for name, rate in (("start", 3.0), ("training", 1e-3), ("sampling", 1e-4), ("reading", 1e-5)):
        monkeypatch.setattr(Here, name, lambda self, work=None, rate=rate: rate)
    commands = [("pretrain", BASE.split()), ("sft", "sft.py configs/sft.py".split())]
    rows = estimate(commands, PlanConfig())
    assert rows[0]["seconds"] == pytest.approx(3 + 51_200e-3 + 400e-4 + 100_000e-5)
    lines = table(rows)
    assert lines[2].startswith("pretrain") and "0.05M" in lines[2]
    assert lines[-1].startswith("disk") and lines[-2].startswith("all")
    assert float(lines[-2].split()[1]) == pytest.approx(sum(r["seconds"] for r in rows) / 60, abs=0.06)


def test_this_machine_is_measured_once_a_shape():
    c = ModelConfig(vocab_size=64, context_length=32, n_layers=1, d_model=16, n_heads=2)
    here, work = Here(torch.device("cpu")), Work(c, rows=2, length=32)
    first = here.training(work), here.reading(work)
    assert all(0 < seconds < 1 for seconds in first)
    assert (here.training(work), here.reading(work)) == first


def test_a_card_elsewhere_is_worked_out_and_an_unknown_one_refused():
    (work,) = counted("train.py configs/max3060.py")
    hours = work.trains * Elsewhere("RTX 3060").training(work) / 3600
    assert hours == pytest.approx(24.6, abs=0.5)  # 1.11B tokens of 811.6 MFLOP at 40 % of 25.5 TFLOP/s
    assert Elsewhere("RTX 4090").training(work) < Elsewhere("RTX 3060").training(work)
    with pytest.raises(ConfigError, match="not known"):
        Elsewhere("Voodoo 2")


# -----------------------------------------------------------------------------
# from the outside


def plan_of(*words: str, text: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lab.plan", *words]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True)


def test_one_stage_on_a_card_that_is_not_here():
    done = plan_of("finetune.py", "configs/sst2.py", "--vram=12")
    assert done.returncode == 0 and "RTX 3060" in done.stdout and "finetune" in done.stdout
    too_large = plan_of("train.py", "configs/max3060.py", "--batch_size=64", "--vram=12")
    assert "WARNING: more than the 10.0 GiB" in too_large.stdout


def test_what_run_all_hands_over_is_planned_and_kept(tmp_path):
    line = "pretrain\tpython train.py configs/max3060.py --out=out\n"
    done = plan_of("--card=RTX 3060", f"--out={tmp_path}", text=line)
    assert done.returncode == 0 and "pretrain" in done.stdout and not (tmp_path / "plan.tsv").exists()
    rows = [{"stage": "a", "seconds": 61.0, "gib": 1.5}, {"stage": "b", "seconds": 2.0, "gib": 0.5}]
    script.keep(rows, str(tmp_path))
    script.keep([rows[1] | {"seconds": 3.0}], str(tmp_path))  # going on: the first stage's word stands
    assert (tmp_path / "plan.tsv").read_text() == "a\t61.0\t1.50\nb\t3.0\t0.50\n"
    assert "nothing is left" in plan_of(text="").stdout
