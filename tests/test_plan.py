"""The plan: work counted by hand, rates that add up, and what run_all.sh hands over."""

import io
import sys
from itertools import islice

import pytest
import torch

from configs import ConfigError
from data import EMBEDDED, TASKS, documents, load_task
from lab import plan as script
from lab.plan import DataSheet, Measured, Plan, PlanConfig, Stage, estimate
from model import ModelConfig
from support.costs import GIB, count_parameters
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe
from train import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
BASE, SFT = "train.py configs/cpu.py --max_steps=100 --batch_size=2", "sft.py configs/sft.py"


def counted(*commands: str) -> list[Stage]:
    """The work of commands that follow each other."""
    plan = Plan()
    return [plan.count(command.split()) for command in commands]


def test_pretraining_trains_on_steps_times_rows_times_context_and_later_stages_have_its_shape():
    work, sft, dpo = counted(BASE, f"{SFT} --keep_last=2 --save_every=100", "dpo.py configs/dpo.py")
    assert work.trains == 100 * 2 * 256
    assert work.reads == 100_000  # the last evaluation's
    assert work.model.d_model == sft.model.d_model == dpo.model.d_model == 128
    n = count_parameters(work.model)["total"]
    assert (work.megabytes, sft.megabytes) == (pytest.approx(36 * n / 1e6), pytest.approx(48 * n / 1e6))
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
    assert plan.model(str(tmp_path)) == plan.model(parent)


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
    *_, unknown = counted(BASE, SFT, "eval.py out/sft --tasks=arithmetic --samples=16 --verifier=out/later")
    assert unknown.reads > 0


def test_lora_trains_fewer_parameters_and_quantised_weights_take_less():
    tune = "finetune.py configs/gsm8k.py --model=TinyLlama/TinyLlama_v1.1 "
    commands = [tune, f"{tune}--lora_r=16", f"{tune}--lora_r=16 --load_in_4bit"]
    full, lora, _ = counted(*commands)
    c = full.model
    assert count_parameters(c)["total"] == pytest.approx(1.1e9, rel=0.01)
    pairs = 2 * (c.d_model + c.d_model) + 2 * (c.d_model + 256) + 3 * (c.d_model + c.d_ff)  # A and B
    assert lora.adapter == 22 * 16 * pairs and full.adapter is None
    full, lora, four_bit = estimate([("tune", command.split()) for command in commands], PlanConfig(vram=24))
    assert full.gib > 20 > lora.gib > four_bit.gib + 3  # weights of 4 bytes or of half a byte


def test_who_starts_from_an_adapter_trains_the_adapter(tmp_path):
    sft = f"{SFT} --lora_r=8 --name="
    further = "dpo.py configs/dpo.py --model=out/"
    _, adapter, both, dpo, of_all = counted(
        BASE, f"{sft}adapter", f"{sft}both --merge", f"{further}adapter", f"{further}both/merged --name=full"
    )  # fmt: skip
    assert dpo.adapter == adapter.adapter == both.adapter > 0
    assert of_all.adapter is None and of_all.megabytes > 5 * dpo.megabytes
    (tmp_path / "run.json").write_text('{"stage": "sft", "parent": "gpt2"}')  # made before
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    assert counted(f"dpo.py configs/dpo.py --model={tmp_path}")[0].adapter


def test_the_sizes_of_embedded_tasks_and_corpora_are_those_of_their_text():
    texts = list(islice(documents("storyworld:0.5,numbers:0.5", "train"), 3000))
    tokenizer = Tokenizer(*train_bpe(texts, 1024, SPECIAL_TOKENS, workers=1), SPECIAL_TOKENS)
    for name in ("arithmetic", "sentiment", "dialogue"):
        pairs = [TASKS[name].prompt(e.text) + e.target for e in load_task(name, "test")[0][:200]]
        tokens = sum(len(tokenizer.encode(pair)) for pair in pairs) / len(pairs)
        assert tokens == pytest.approx(script.SIZES[name].tokens, rel=0.25), name
    for name in ("storyworld", "arithmetic", "numbers"):
        some = list(islice(documents(name, "train"), 500))
        megabytes = sum(len(text.encode()) for text in some) / len(some) * EMBEDDED[name][1] / 1e6
        assert script.MEGABYTES[name] == pytest.approx(megabytes, rel=0.1)


def test_seconds_here_are_tokens_times_measured_rates_and_are_kept_for_the_report(monkeypatch, tmp_path):
    for name, rate in (("start", 3.0), ("training", 1e-3), ("sampling", 1e-4), ("reading", 1e-5)):
        monkeypatch.setattr(Measured, name, lambda self, work=None, rate=rate: rate)
    rows = estimate([("pretrain", BASE.split()), ("sft", SFT.split())], PlanConfig())
    assert rows[0].seconds == pytest.approx(3 + 51_200e-3 + 400e-4 + 100_000e-5)
    *_, total, disk = script.table(rows)
    assert float(total.split()[1]) == pytest.approx(sum(r.seconds for r in rows) / 60, abs=0.06)
    assert disk.startswith("disk")
    script.keep(rows, str(tmp_path))
    assert (tmp_path / "plan.tsv").read_text().startswith("pretrain\t55.2\t")


def test_an_evaluation_needs_the_memory_of_its_largest_model():
    small = "eval.py gpt2 --tasks=gsm8k".split()
    large = "eval.py TinyLlama/TinyLlama_v1.1 gpt2 --tasks=gsm8k".split()
    one, both = estimate([("eval", small), ("eval", large)], PlanConfig(vram=12))
    assert 6 * 124.4e6 / GIB < one.gib < 1  # weights in float32 and bfloat16, and one answer
    assert both.gib > 6 * 1.1e9 / GIB


def test_this_machine_is_measured_once_a_shape():
    here = Measured(torch.device("cpu"))
    c = ModelConfig(vocab_size=64, context_length=24, n_layers=1, d_model=16, n_heads=2)
    cfg = TrainConfig(optimizer="muon", compile=True, batch_size=2)
    work = Stage(model=c, length=24, per_step=48, cfg=cfg)
    first, again = [(here.training(work), here.reading(c), here.sampling(c)) for _ in range(2)]
    assert first == again and all(1e-7 < seconds < 1 for seconds in first)


def test_a_gpu_elsewhere_is_worked_out_and_an_unknown_one_refused():
    (work,) = counted("train.py configs/max3060.py")
    hours = work.trains * DataSheet("RTX 3060").training(work) / 3600
    assert hours == pytest.approx(24.6, abs=0.5)  # 1.11B tokens of 811.6 MFLOP at 40 % of 25.5 TFLOP/s
    assert DataSheet("RTX 4090").training(work) < DataSheet("RTX 3060").training(work)
    with pytest.raises(ConfigError, match="not known"):
        DataSheet("Voodoo 2")


def test_a_disk_that_is_too_small_is_refused_before_anything_begins(tmp_path, monkeypatch, capsys):
    free = type("Usage", (), {"free": 10e9})
    monkeypatch.setattr(script.shutil, "disk_usage", lambda folder: free)
    script.keep([Stage(megabytes=9_000)], str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        script.keep([Stage(megabytes=9_000), Stage(megabytes=2_000)], str(tmp_path))
    assert stopped.value.code == 3 and "11.0 GB will be downloaded" in capsys.readouterr().err


def test_stages_on_a_gpu_that_is_not_here(tmp_path, monkeypatch, capsys):
    def plan_of(*words: str, text: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        script.main()
        return capsys.readouterr().out

    shown = plan_of("train.py", "configs/max3060.py", "--batch_size=64", "--vram=12")
    assert "RTX 3060" in shown and "train" in shown and "WARNING: more than the 10.0 GiB" in shown
    line = "pretrain\tpython train.py configs/max3060.py --out=out\n"
    shown = plan_of("--card=RTX 3060", f"--out={tmp_path}", text=line)
    assert "pretrain" in shown and not (tmp_path / "plan.tsv").exists()
    assert "nothing is left" in plan_of()
