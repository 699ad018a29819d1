"""The plan: work counted by hand, rates that add up, and what run_all.sh hands over."""

import subprocess
import sys
from itertools import islice

import pytest
import torch

from configs import ROOT, ConfigError
from data import TASKS, documents, load_conversations, load_task
from lab import plan as script
from lab.plan import DataSheet, Measured, Plan, PlanConfig, Work, answering_memory, estimate, training_memory
from model import ModelConfig
from support.costs import GIB, count_parameters
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

pytestmark = pytest.mark.usefixtures("one_thread")
BASE, SFT = "train.py configs/cpu.py --max_steps=100 --batch_size=2", "sft.py configs/sft.py"
TINY = ModelConfig(vocab_size=64, context_length=24, n_layers=1, d_model=16, n_heads=2)


def counted(*commands: str) -> list[Work]:
    """The work of commands that follow each other."""
    plan = Plan()
    return [plan.count(command.split()) for command in commands]


# -----------------------------------------------------------------------------
# counting


def test_pretraining_trains_on_steps_times_rows_times_context_and_later_stages_have_its_shape():
    work, sft, dpo = counted(BASE, SFT, "dpo.py configs/dpo.py")
    assert work.trains == 100 * 2 * 256 and (work.rows, work.length) == (2, 256)
    assert work.reads == 100_000  # the last evaluation's
    assert work.shape.d_model == sft.shape.d_model == dpo.shape.d_model == 128
    with pytest.raises(ConfigError, match="out/nowhere is not known"):
        counted(f"{SFT} --model=out/nowhere")


@pytest.mark.parametrize(
    ("config", "parent"), [(None, "gpt2"), ('{"model_type": "t5"}', "google/flan-t5-small")]
)
def test_an_adapter_or_a_tuned_model_of_the_hub_has_the_shape_of_its_parent(config, parent, tmp_path):
    (tmp_path / "run.json").write_text(f'{{"stage": "finetune", "parent": "{parent}"}}')
    if config:
        (tmp_path / "config.json").write_text(config)
    plan = Plan()
    assert plan.model(str(tmp_path)).config == plan.model(parent).config


def test_a_disk_that_is_too_small_is_refused_before_anything_begins(tmp_path, monkeypatch, capsys):
    base, sft = counted(BASE, f"{SFT} --keep_last=2 --save_every=100")
    n = count_parameters(base.shape)["total"]
    assert (base.megabytes, sft.megabytes) == (pytest.approx(36 * n / 1e6), pytest.approx(48 * n / 1e6))
    free = type("Usage", (), {"free": 10e9})
    monkeypatch.setattr(script.shutil, "disk_usage", lambda folder: free)
    script.refuse_full_disk([Work(megabytes=9_000)], str(tmp_path / "not" / "there"))
    with pytest.raises(script.FullDisk, match="11.0 GB will be downloaded and written"):
        script.refuse_full_disk(
            [Work(megabytes=9_000), Work(megabytes=2_000)], str(tmp_path / "not" / "there")
        )
    free.free = 1000
    monkeypatch.setattr(sys, "argv", ["plan.py", f"--out={tmp_path}"])
    monkeypatch.setattr(sys, "stdin", ["tokenizer\tpython tokenizer.py configs/cpu.py\n"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 3 and "choose another disk" in capsys.readouterr().err


def test_answers_that_are_kept_are_drawn_once():
    _, _, dpo, rft, verifier, again = counted(
        BASE, SFT, "dpo.py configs/dpo.py", "dpo.py configs/dpo.py --method=rft --name=rft",
        "verifier.py configs/verifier.py",
        "eval.py out/dpo --tasks=arithmetic --samples=16 --verifier=out/verifier",
    )  # fmt: skip
    answer = script.SIZES["arithmetic"].answer
    assert dpo.samples == answer * (5000 * 4 + 300 * 4 + 300) and rft.samples == 0
    assert verifier.samples == answer * 1250 * 16  # what it learns from is DPO's
    assert again.samples == 2 * answer * 1000 and again.reads == 0  # greedy answers; the rest was judged


def test_lora_trains_fewer_parameters_and_quantised_weights_take_less():
    tune = "finetune.py configs/gsm8k.py --model=TinyLlama/TinyLlama_v1.1 "
    full, lora, four = counted(tune, f"{tune}--lora_r=16", f"{tune}--lora_r=16 --load_in_4bit")
    c = full.shape
    assert count_parameters(c)["total"] == pytest.approx(1.1e9, rel=0.01)
    # A and B of q, k, v, o, gate, up and down.
    pairs = 2 * (c.d_model + c.d_model) + 2 * (c.d_model + 256) + 3 * (c.d_model + c.d_ff)
    assert lora.options["trained"] == 22 * 16 * pairs and full.full and not lora.full
    sizes = [training_memory(work, on_cpu=False) for work in (full, lora, four)]
    assert sizes[0] > 20 > sizes[1] > sizes[2]
    assert sizes[1] - sizes[2] > 3  # 1.1 billion weights of 4 bytes or of half a byte


def test_stages_count_the_memory_in_which_their_models_answer(monkeypatch):
    tuned, both = counted(
        "finetune.py configs/gsm8k.py --name=gsm8k", "eval.py gpt2 out/gsm8k --tasks=gsm8k --shots=0,4"
    )
    (own,) = tuned.asks
    assert (own.length, own.new, own.beside) == (195, 256, 16 * own.parameters)
    assert [(batch.length, batch.new) for batch in both.asks] == [(195, 256), (768, 256)] * 2
    assert {batch.rows(30 * GIB, on_cpu=False) for batch in both.asks} == {1024, 512}
    assert all(batch.bytes(1024, on_cpu=False) > 15 * GIB for batch in both.asks), (
        "what a GPU of 12 GB has not"
    )
    for work in (tuned, both):
        for space in (6, 10):  # GiB; batches fill the space, and do not exceed it
            assert 0.6 * space < answering_memory(work, space * GIB, on_cpu=False) <= space
    assert training_memory(both, on_cpu=False) == 0 < training_memory(tuned, on_cpu=False)
    for threads in (1, 8):  # on a CPU all processes share the memory
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert 2 < answering_memory(both, 6 * GIB, on_cpu=True) <= 6


@pytest.mark.parametrize("name", ["arithmetic", "sentiment", "dialogue", "instructions"])
def test_the_sizes_of_embedded_tasks_are_those_of_their_text(name):
    texts = list(islice(documents("storyworld:0.5,numbers:0.5", "train"), 3000))
    tokenizer = Tokenizer(*train_bpe(texts, 1024, SPECIAL_TOKENS, workers=1), SPECIAL_TOKENS)
    if name in TASKS:
        pairs = [TASKS[name].prompt(e.text) + e.target for e in load_task(name, "test")[0][:200]]
    else:
        pairs = [" ".join(m["content"] for m in chat) for chat in load_conversations(name, "test")[0][:200]]
    tokens = sum(len(tokenizer.encode(pair)) for pair in pairs) / len(pairs)
    assert tokens == pytest.approx(script.SIZES[name].tokens, rel=0.25)


def test_the_sizes_of_embedded_corpora_are_those_of_their_text():
    for name in ("storyworld", "arithmetic", "numbers"):
        some = list(islice(documents(name, "train"), 500))
        megabytes = sum(len(text.encode()) for text in some) / len(some) * script.EMBEDDED[name][1] / 1e6
        assert script.MEGABYTES[name] == pytest.approx(megabytes, rel=0.1)


# -----------------------------------------------------------------------------
# rates and the table


def test_seconds_here_are_tokens_times_measured_rates(monkeypatch):
    for name, rate in (("start", 3.0), ("training", 1e-3), ("sampling", 1e-4), ("reading", 1e-5)):
        monkeypatch.setattr(Measured, name, lambda self, work=None, rate=rate: rate)
    rows = estimate([("pretrain", BASE.split()), ("sft", SFT.split())], PlanConfig())
    assert rows[0].seconds == pytest.approx(3 + 51_200e-3 + 400e-4 + 100_000e-5)
    lines = script.table(rows)
    assert lines[2].startswith("pretrain") and "0.05M" in lines[2]
    assert lines[-1].startswith("disk") and lines[-2].startswith("all")
    assert float(lines[-2].split()[1]) == pytest.approx(sum(r.seconds for r in rows) / 60, abs=0.06)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_this_machine_is_measured_once_a_shape(optimizer):
    here = Measured(torch.device("cpu"))
    work = Work(
        TINY, rows=2, length=24, pretraining=True, options={"muon": optimizer == "muon", "compiled": True}
    )
    first = here.training(work), here.reading(work), here.sampling(work)
    assert all(1e-7 < seconds < 1 for seconds in first)
    assert (here.training(work), here.reading(work), here.sampling(work)) == first


def test_a_gpu_elsewhere_is_worked_out_and_an_unknown_one_refused():
    (work,) = counted("train.py configs/max3060.py")
    hours = work.trains * DataSheet("RTX 3060").training(work) / 3600
    assert hours == pytest.approx(24.6, abs=0.5)  # 1.11B tokens of 811.6 MFLOP at 40 % of 25.5 TFLOP/s
    assert DataSheet("RTX 4090").training(work) < DataSheet("RTX 3060").training(work)
    with pytest.raises(ConfigError, match="not known"):
        DataSheet("Voodoo 2")


# -----------------------------------------------------------------------------
# from the outside


def plan_of(*words: str, text: str = "") -> str:
    command = [sys.executable, "-m", "lab.plan", *words]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=True).stdout


def test_stages_on_a_gpu_that_is_not_here(tmp_path):
    told = plan_of("finetune.py", "configs/sst2.py", "--vram=12")
    assert "RTX 3060" in told and "finetune" in told
    too_large = plan_of("train.py", "configs/max3060.py", "--batch_size=64", "--vram=12")
    assert "WARNING: more than the 10.0 GiB" in too_large
    line = "pretrain\tpython train.py configs/max3060.py --out=out\n"
    told = plan_of("--card=RTX 3060", f"--out={tmp_path}", text=line)
    assert "pretrain" in told and not (tmp_path / "plan.tsv").exists()
    assert "nothing is left" in plan_of()


def test_the_plan_is_kept_for_the_report(tmp_path):
    first, second = (
        Work(stage=name, seconds=s, train_gib=gib) for name, s, gib in (("a", 61, 1.5), ("b", 2, 0.5))
    )
    script.keep([first, second], str(tmp_path))
    second.seconds = 3
    script.keep([second], str(tmp_path))  # going on: the first stage's line stands
    assert (tmp_path / "plan.tsv").read_text() == "a\t61.0\t1.50\nb\t3.0\t0.50\n"
