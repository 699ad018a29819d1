"""The report: what it shows is what the files say, whatever state they are in."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import report
from lab.log import log
from lab.paper import paper, write_paper
from report import SECTIONS, comparison
from support.observations import observations
from support.pages import Code, Figure, Table, Text, as_html, as_latex, as_markdown, write
from tasks.mistakes import KINDS

ROOT = Path(report.__file__).parent


def shown(blocks: list, name: str) -> list[dict]:
    """Rows of the table with this name, by column."""
    (table,) = [b for b in blocks if isinstance(b, Table) and b.name == name]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def line(step: int) -> dict:
    return {
        "step": step, "loss": 5 - step / 100, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 512 * step,
        "tokens_per_second": 1000.0 + step, "seconds": float(step), "peak_memory_gib": 0.5,
    }  # fmt: skip


def make_run(folder: Path, lines: list[dict], **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    last = {"step": 100, "val_loss": 3.25}
    run = {
        "status": "finished", "stage": "train", "parameters": 869504, "seconds": 303.3, "git": "abc1234",
        "started": "2026-01-01", "command": "python train.py configs/cpu.py", "settings": {"seed": 1},
        "results": {"last": last, "best": last}, "versions": {"torch": "2"}, "hardware": {"device": "CPU"},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run | more))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_an_empty_folder_gets_sentences_that_name_commands(tmp_path):
    sections = {heading: section(tmp_path) for heading, section in SECTIONS.items()}
    assert all(len(blocks) == 1 and isinstance(blocks[0], Text) for blocks in sections.values())
    page = write(tmp_path / "report", "t", sections).read_text()
    assert "bash run_all.sh cpu" in page and "<img" not in page


def test_the_table_of_runs_says_what_the_files_say(tmp_path):
    lines = [line(10), line(50), {"step": 50, "val_loss": 3.5}, line(100), {"step": 100, "val_loss": 3.25}]
    make_run(tmp_path / "base", lines)
    (row,) = shown(report.training(tmp_path), "runs")
    assert row["parameters"] == "870k" and row["last validation loss"] == "3.2500 at 100"
    assert row["minutes"] == "5.1" and row["tokens/s"] == "1,050" and row["GiB"] == "0.50"


def test_a_run_that_is_still_going_is_shown_as_far_as_it_got(tmp_path):
    folder = make_run(tmp_path / "base", [line(10), line(20)], status="running", results={})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    assert [x["step"] for x in report.read_jsonl(folder / "metrics.jsonl")] == [10, 20]
    blocks = report.training(tmp_path)
    (row,) = shown(blocks, "runs")
    assert row["state"] == "running" and row["best"] == "" and isinstance(blocks[-1], Figure)


@pytest.mark.parametrize("what", ["", "{", "[1, 2]", "null", "\x00\xff"])
def test_broken_files_break_nothing(what, tmp_path):
    folder = make_run(tmp_path / "base", [line(10)])
    for name in ("run.json", "metrics.jsonl", "samples.jsonl", "results.json"):
        (folder / name).write_text(what)
    for name in ("pipeline.json", "ledger.tsv", "plan.tsv"):
        (tmp_path / name).write_text(what)
    for section in SECTIONS.values():
        assert section(tmp_path)


def test_memory_stands_beside_the_plan(tmp_path):
    make_run(tmp_path / "base", [line(10) | {"peak_memory_gib": 0.6}], stage="train")
    assert shown(report.training(tmp_path), "runs")[0]["GiB"] == "0.60"
    (tmp_path / "plan.tsv").write_text("pretrain\t90.0\t0.62\n")
    assert shown(report.training(tmp_path), "runs")[0]["GiB (planned)"] == "0.60 (0.62)"


def test_the_ledger_stands_beside_the_plan(tmp_path):
    (tmp_path / "ledger.tsv").write_text("sft\t120\tpython sft.py\ndpo\t60\tpython dpo.py\ntorn")
    (row, *_) = shown(report.ledger(tmp_path), "ledger")
    assert row["minutes"] == "2.0" and row["planned"] == ""
    (tmp_path / "plan.tsv").write_text("sft\t90.0\t0.50\ndpo\t45.0\t0.60\nlater\t999\t1\n")
    first, _, last = shown(report.ledger(tmp_path), "ledger")
    assert (first["planned"], last["minutes"], last["planned"]) == ("1.5", "3.0", "2.2")


def test_stages_and_curves_are_the_evaluations(tmp_path):
    x = {"value": 0.723, "low": 0.694, "high": 0.75, "n": 1000}
    rows = [{"model": "out/dpo", "stage": "dpo", "minutes": 0.62, "exact_match": x,
             "storyworld, bits/byte": {"value": 0.2361}}]  # fmt: skip
    said = {"out/dpo": [{"asked": "Say <b>", "meant": "<b>", "said": "<script>alert(1)</script>"}]}
    (tmp_path / "pipeline.json").write_text(json.dumps({"rows": rows, "battery": said}))
    (row,) = shown(report.stages(tmp_path), "stages")
    assert row["greedy"] == "72.3 [69.4, 75.0]" and row["storyworld, bits/byte"] == "0.236"
    folder = make_run(tmp_path / "dpo", [line(10)])
    entry = {"task": "arithmetic", "split": "test", "items": 1000, "metrics": {"exact_match": x},
             "curves": {"majority": {"1": x, "2": x}, "pass": {"1": {"value": 0.7}, "2": {"value": 0.8}}},
             "differences": {"majority - greedy": {"value": 0.012, "low": -0.003, "high": 0.027}},
             "gating": {"verifier": [{"threshold": 0.5, "samples": 2.24, "right": x}]}}  # fmt: skip
    (folder / "results.json").write_text(json.dumps({"results": {"arithmetic test 16 samples": entry}}))
    blocks = report.choosing(tmp_path)
    (row,) = shown(blocks, "differences-dpo-arithmetic")
    assert row["points [95 %]"] == "+1.2 [-0.3, +2.7]"
    assert shown(blocks, "gating-dpo-verifier")[0]["answers a problem"] == "2.2"

    sections = {"samples": report.samples(tmp_path), "choosing": blocks}
    page = as_html("t", sections)
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "<script>" not in as_markdown("t", sections)
    write(tmp_path / "report", "t", sections)
    with open(tmp_path / "report" / "battery.csv", newline="") as file:
        assert list(csv.reader(file))[1] == ["Say <b>", "<b>", "<script>alert(1)</script>"]
    assert (tmp_path / "report" / "figures" / "choosing-dpo-arithmetic.png").read_bytes()[:4] == b"\x89PNG"


def evaluated(folder: Path, task: str, split: str, records: list[dict], **more) -> None:
    """As if eval.py had been there."""
    entry = {"task": task, "split": split, "shots": 0, "items": len(records), "metrics": {}} | more
    name = f"{task} {split} " + (f"{entry['samples']} samples" if "samples" in more else "0-shot")
    (folder / "results.json").write_text(json.dumps({"results": {name: entry}}))
    (folder / "answers").mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "answers" / f"{name.replace(' ', '-')}.jsonl").write_text(text)


def test_failures_are_counted_and_shown(tmp_path):
    def folder_of(name: str, right: list[bool], **more) -> None:
        records = []
        for i, ok in enumerate(right):
            record = {"text": f"p{i}", "target": "t", "output": f"{name} {i}", "correct": ok}
            record |= {"verifier": f"v {i}", "verifier correct": i == 0, "kinds": [] if ok else ["plan"]}
            records.append(record)
        verifiers = {"verifier": "out/verifier"}
        folder = make_run(tmp_path / name, [line(10)], **more)
        evaluated(folder, "arithmetic", "test", records, samples=2, curves={}, verifiers=verifiers)

    folder_of("sft", [False, False, True])
    folder_of("dpo", [False, True, False], parent="out/sft", started="2026-01-02")
    blocks = report.failures(tmp_path)
    assert shown(blocks, "errors-sft-arithmetic-test") == [
        {"first mistake": KINDS["plan"], "answers": 2, "% of the wrong ones": "100.0 [34.2, 100.0]"}
    ]
    (example,) = shown(blocks, "examples-sft-arithmetic-test")
    assert example == {"kind": KINDS["plan"], "asked": "p0", "said": "sft 0", "should be": "t"}
    words = [b.words for b in blocks if isinstance(b, Text)]
    assert "**sft**, arithmetic, test: is wrong on 2 of 3." in words
    assert any(
        w.startswith("**dpo** is right where sft is wrong on 1 of 3 problems, wrong where sft is right on 1")
        for w in words
    )
    rows = shown(blocks, "changed-dpo-arithmetic-test-sft")
    assert rows == [
        {"": "mended", "problem": "p1", "sft": "sft 1", "dpo": "dpo 1"},
        {"": "broken", "problem": "p2", "sft": "sft 2", "dpo": "dpo 2"},
    ]
    rows = shown(blocks, "changed-dpo-arithmetic-test-verifier")
    assert [(r[""], r["problem"]) for r in rows] == [("mended", "p0"), ("broken", "p1")]


def test_reviews_are_sorted_by_what_makes_them_hard_and_doubtful_labels_are_named(tmp_path):
    def reviews(name: str, said: list[str], sure: float) -> None:
        records = [
            {"text": f"r{i}", "target": "good", "prediction": p, "correct": p == "good", "sure": sure,
             "kinds": ["negation", "short"] if i == 0 else ["other"]}
            for i, p in enumerate(said)
        ]  # fmt: skip
        evaluated(make_run(tmp_path / name, [line(10)]), "sst2", "validation", records)

    reviews("a", ["bad", "bad", "good"], 0.99)
    reviews("b", ["bad", "good", "good"], 0.95)
    blocks = report.failures(tmp_path)
    rows = shown(blocks, "errors-a-sst2-validation")
    assert [(r["the review has"], r["reviews"], r["wrong"]) for r in rows] == [
        (KINDS["negation"], 1, 1), (KINDS["short"], 1, 1), (KINDS["other"], 2, 1)
    ]  # fmt: skip
    (row,) = shown(blocks, "doubtful-sst2-validation")
    assert (row["text"], row["label"], row["all models say"]) == ("r0", "good", "bad")
    assert row["mean probability"] == "0.97" and row["models"] == "a, b"


def test_flaws_of_summaries_are_counted(tmp_path):
    records = [
        {"text": "d", "target": "t", "output": f"s{i}", "rougeL": i / 10, "kinds": kinds}
        for i, kinds in enumerate((["copied"], ["copied", "speaker"], ["other"]))
    ]
    evaluated(make_run(tmp_path / "a", [line(10)]), "samsum", "test", records)
    blocks = report.failures(tmp_path)
    assert blocks[0].words == "**a**, samsum, test: has a flaw that can be counted in 2 of 3 summaries."
    rows = {r["flaw"]: (r["summaries"], r["ROUGE-L of these"]) for r in shown(blocks, "errors-a-samsum-test")}
    assert rows == {KINDS["copied"]: (2, "5.0"), KINDS["speaker"]: (1, "10.0"), KINDS["other"]: (1, "20.0")}
    assert len(shown(blocks, "examples-a-samsum-test")) == 2


def test_what_a_verifier_breaks_comes_with_its_probability_the_surest_first(tmp_path):
    pairs = [
        ("p0", "a", True, "b", False, 0.5),
        ("p1", "a", True, "b", False, 0.9),
        ("p2", "a", False, "b", True, 0.7),
    ]
    rows = shown(report.changed("x", "greedy", "verifier", pairs), "changed-x")
    assert [(r["problem"], r["it says"]) for r in rows] == [("p2", "0.70"), ("p1", "0.90"), ("p0", "0.50")]


def test_preferences_are_drawn_and_violations_shown(tmp_path):
    check = {"val_loss": 1.0, "reward_margin": 0.5, "reward_accuracy": 0.75, "chosen": -3.0, "rejected": -4.0}
    data = {"validation": {"pairs": 4}}
    folder = make_run(tmp_path / "dpo", [line(10), {"step": 10, **check}], stage="dpo", data=data)
    row = {"prompt": "q", "chosen": "right", "rejected": "wrong", "margin": -2.0}
    (folder / "violations.jsonl").write_text(json.dumps(row) + "\n")
    assert "preferences-dpo" in [b.name for b in report.training(tmp_path) if isinstance(b, Figure)]
    blocks = report.failures(tmp_path)
    assert blocks[0].words == "**dpo** moved 1 of 4 held-out pairs the wrong way; the three worst:"
    (found,) = shown(blocks, "violations-dpo")
    assert found == {"margin": "-2.0", "prompt": "q", "chosen": "right", "rejected": "wrong"}


def test_runs_on_one_text_are_overlaid(tmp_path):
    data = {"validation": {"fingerprint": "f"}}
    for name, more in {"a": {}, "b": {}, "c": {"tokenizer": "another"}}.items():
        make_run(tmp_path / name, [line(10), {"step": 10, "val_loss": 4.0}], data=data, **more)
    names = [b.name for b in report.training(tmp_path) if isinstance(b, Figure)]
    assert names == ["curves-together-1-train", "curves-a", "curves-b", "curves-c"]


def test_making_names_settings_and_data(tmp_path):
    about = {"source": "stories", "licence": "MIT", "fingerprint": "0123456789abcdef", "tokens": 1234}
    data = [{"corpus": about, "weight": 1}, {"source": "sums", "fingerprint": "f"}]
    settings = {"seed": 1, "learning_rate": 0.003, "corpus": ""}
    make_run(tmp_path / "a", [line(10)], settings=settings, changed=["learning_rate", "corpus"], data=data)
    blocks = report.making(tmp_path)
    assert any(isinstance(b, Code) and b.words == "learning_rate=0.003" for b in blocks)
    first, second = shown(blocks, "data")
    assert (first["run"], first["source"], first["licence"], first["tokens"]) == (
        "a",
        "stories",
        "MIT",
        "1,234",
    )
    assert first["SHA-256"] == "0123456789ab" and second["source"] == "sums"


def test_attention_is_drawn(tmp_path):
    folder = make_run(tmp_path / "base", [line(10)])
    heads = [
        {"most": most, "layer": 0, "head": 1, "weights": [[1.0, 0.0], [0.5, 0.5]]} for most in report.SEEN
    ]
    scores = {most: [[0.1, 0.9]] for most in report.SEEN}
    found = {"scores": scores, "maps": [{"tokens": ["a", "$\n"], "heads": heads}]}
    (folder / "attention.json").write_text(json.dumps(found))
    blocks = report.attention(tmp_path)
    assert [b.name for b in blocks] == ["heads-base", "attention-base-1"]
    assert "first, a full first column" in blocks[1].caption


def test_the_lab_is_what_experiments_json_says(tmp_path):
    def entry(loss, **more):
        return {
            "hypothesis": "h",
            "bits_per_byte": {"mean": loss},
            "tokens_per_second": {"mean": 3500.4},
        } | more

    gap = {"mean": -0.0123, "low": -0.02, "high": -0.004}
    experiments = {"baseline": entry(0.25), "muon": entry(0.2377, difference=gap, verdict="better")}
    found = {"corpus": "storyworld", "seeds": 3, "seconds": 60, "experiments": experiments}
    file = tmp_path / "experiments" / "storyworld" / "experiments.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(found))
    row = shown(report.lab(tmp_path), "lab-storyworld")[1]
    assert row["minus baseline [95 %]"] == "-0.0123 [-0.0200, -0.0040]" and row["verdict"] == "better"


def test_what_the_lab_measured_is_shown(tmp_path):
    said = {"distinct_2": 0.91, "perplexity_of_the_end": 12.5, "example": "the end"}
    measured = {
        "gqa": {"kv_heads_1": {"cache_bytes_per_token": 1024, "tokens_per_second": 18044.4}},
        "moe": {"moe_4_top1": {
            "routing": {"1": {"steps": [10, 20], "busiest_expert": [2.0, 1.1], "dropped": [9, 0]}},
            "classes": [{"bits": 0.14, "share": {}}],
        }},
        "streams": {"baseline": {
            "perplexity": {"full": {"0-1": 5.0, "1-2": 50.0}},
            "continuations": {"window, first 4 kept": said},
            "endless": {"tokens": 5000, "cache_bytes": [524288] * 2, "tokens_per_second": [1383.0, 1430.0]},
        }},
        "scaling": {
            "points": [{"budget": 1e12, "parameters": 1e5, "tokens": 1.7e6, "loss": 5.0}],
            "law": {"E": 0.5, "A": 40.0, "B": 300.0, "a": 0.35, "b": 0.4, "error": 0.012},
            "best": [{"budget": 1e12, "inside": True, "parameters": 1e5, "loss": 4.9}],
            "predictions": {"speedrun": {"flops": 6e16, "parameters": 3e7, "tokens": 4e8, "loss": 1.2345}},
        },
        "shapes": {"rows-4": {"parameters": 935040, "rows": 4, "tokens_per_second": 9401.4,
                              "peak_memory_gib": 0.351, "most_rows_in_12_gib": 4096}},
        "transfer": {"sentiment": {"scratch, tuned": {"mean": 66.7, "low": 60.1, "high": 70.2}}},
    }  # fmt: skip
    baseline = {"hypothesis": "", "bits_per_byte": {"mean": 0.25}, "tokens_per_second": {"mean": 3500.0}}
    found = {"corpus": "storyworld", "seeds": 3, "seconds": 60, "measured": measured}
    file = tmp_path / "experiments" / "storyworld" / "experiments.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(found | {"experiments": {"baseline": baseline}}))
    blocks = report.lab(tmp_path)
    assert shown(blocks, "gqa-storyworld")[0]["decoded tokens/s"] == "18,044"
    assert shown(blocks, "continuations-storyworld-baseline")[0]["distinct 2"] == "0.910"
    assert shown(blocks, "predicted-storyworld")[0]["loss"] == "1.234"
    assert any(isinstance(b, Text) and "0.500 + 40 / N^0.35" in b.words for b in blocks)
    assert shown(blocks, "shapes-storyworld")[0]["GiB"] == "0.35"
    assert shown(blocks, "transfer-storyworld")[0]["scratch, tuned"] == "66.7 [60.1, 70.2]"
    words = " ".join(b.words for b in blocks if isinstance(b, Text))
    assert "a cache of 524,288 bytes, 1,383 to 1,430 tokens/s" in words


def test_observations_are_what_the_curves_say():
    def said(losses, checks=()) -> tuple[str, str]:
        lines = [line(10 * i) | {"loss": x} for i, x in enumerate(losses)]
        lines += [{"step": s, "val_loss": x} for s, x in checks]
        return tuple(" ".join(words) for words in observations(lines))

    falling = [5 - i / 10 for i in range(30)]
    words, todo = said(falling, [(50, 4.5), (100, 4.0), (150, 3.5), (200, 3.0)])
    assert "still falling: by 14.3 % since step 150" in words and todo == "Train longer."
    words, todo = said(falling, [(50, 4.0), (100, 3.0), (150, 3.2), (200, 3.4)])
    assert "lowest at step 100 (3.0000) and rose to 3.4000" in words and "dropout" in todo
    words, _ = said(falling, [(50, 4.0), (100, 3.0), (150, 3.0), (200, 2.99)])
    assert "flat since step 150" in words
    noisy = [3.0 + (0.2 if i % 2 else -0.2) for i in range(40)]
    assert "flat since step" in said([*noisy, 3.2, 3.2])[0], "the last mean is above the lowest, by chance"
    assert "The training loss was lowest" in said([*noisy, 5.0, 5.0, 5.0])[0]
    spiky = falling.copy()
    spiky[20] += 2
    words, todo = said(spiky)
    assert "1 spike of the training loss, the largest at step 200 (+1.900)" in words and "warmup" in todo
    assert said([5.0])[0] == "Too short to say anything."
    assert "3 steps were skipped" in observations([line(1) | {"skipped": 3}])[0][-1]


def test_the_log_has_an_entry_a_run(tmp_path):
    wandb = {"id": "abc12345", "url": "https://wandb.ai/me/lm/runs/abc12345"}
    make_run(tmp_path / "base", [line(10)], settings={"hypothesis": "Muon wins."}, wandb=wandb)
    text = as_markdown("t", log(tmp_path, {"Training": report.training(tmp_path)}))
    assert "## base" in text and "**Hypothesis**: Muon wins." in text
    assert "[curves-base](figures/curves-base.png)" in text
    assert "run `abc12345`, [https://wandb.ai/me/lm/runs/abc12345](https://wandb.ai" in text
    (row,) = shown(log(tmp_path, {})["All runs"], "experiments")
    assert (row["validation loss"], row["training loss"], row["tokens/s"]) == ("3.2500", "4.9000", "1,010")


def lab_of(home: Path, quick: bool = False) -> Path:
    """A lab of two families: one change is better, one worse, one neither. Some of its run folders exist."""

    def entry(
        loss: float, mean: float = 0, half: float = 0, verdict: str = "", speed: float = 1000.0
    ) -> dict:
        found = {"hypothesis": f"h {loss}", "command": "python train.py x.py", "seeds": {"1": {}, "2": {}}}
        found |= {"bits_per_byte": {"mean": loss}, "val_loss": {"mean": 2 * loss}, "verdict": verdict}
        found["tokens_per_second"] = {"mean": speed}
        if half:
            found["difference"] = {"mean": mean, "low": mean - half, "high": mean + half, "n": 2}
        return found

    experiments = {
        "baseline": entry(0.5),
        "muon": entry(0.375, -0.125, 0.03125, "better", speed=500.0),
        "gelu": entry(0.75, 0.25, 0.03125, "worse"),
        "kv_heads_1": entry(0.5625, 0.0625, 0.125, "no difference found", speed=1500.0),
    }
    families = {"ablations": ["muon", "gelu"], "gqa": ["kv_heads_1"]}
    found = {"corpus": "storyworld", "quick": quick, "seeds": 2, "seconds": 60, "families": families}
    folder = home / "experiments" / ("storyworld-quick" if quick else "storyworld")
    for name, optimizer in (("baseline", "adamw"), ("muon", "muon")):
        for seed in (1, 2):
            lines = [line(10 * i) for i in range(1, 4)]
            settings = {"optimizer": optimizer, "seed": seed, "name": name}
            make_run(folder / f"{name}-s{seed}", lines, settings=settings, wandb={"id": f"{name}{seed}"})
    (folder / "experiments.json").write_text(json.dumps(found | {"experiments": experiments}))
    return folder


def test_the_labs_experiments_are_in_the_log(tmp_path):
    lab_of(tmp_path)
    sections = log(tmp_path, {})
    rows = {row["run"]: row for row in shown(sections["All runs"], "experiments")}
    assert list(rows) == ["baseline", "muon", "gelu", "kv_heads_1"]
    assert rows["muon"]["minus baseline"] == "-0.1250 [-0.1562, -0.0938] bits/byte"
    assert rows["muon"]["training loss"] == "4.8000" and rows["gelu"]["training loss"] == ""
    words = "\n".join(b.words for b in sections["muon, storyworld"] if isinstance(b, Text))
    assert "**Hypothesis**: h 0.375" in words and "`optimizer=muon`; `python train.py x.py`" in words
    assert "seed 1: run `muon1`, offline; seed 2: run `muon2`, offline" in words
    assert "1,000 tokens/s" not in words and "500 tokens/s, mean of 2 seeds" in words
    assert "**Next steps**: Adopt it" in words
    figures = [b.name for b in sections["muon, storyworld"] if isinstance(b, Figure)]
    assert figures == ["curves-storyworld-muon"]


def test_findings_are_intervals_that_exclude_0_and_quick_runs_have_none(tmp_path):
    lab_of(tmp_path)
    ablations, gqa = shown(report.findings(tmp_path), "findings")
    assert ablations["lowest bits/byte"] == "muon, 0.3750" and ablations["better"] == "muon -0.1250"
    assert ablations["worse"] == "gelu +0.2500"
    assert ablations["recommendation"] == "use muon at 0.50 times the speed; leave out gelu"
    assert gqa["better"] == "" and gqa["no difference found"] == "kv_heads_1"
    assert "kv_heads_1: no difference in loss found, at 1.50 times the speed" in gqa["recommendation"]
    lab_of(tmp_path / "quick", quick=True)
    (block,) = report.findings(tmp_path / "quick")
    assert block.words.startswith("No findings yet")
    assert all("SMOKE RUN" in name for name in list(log(tmp_path / "quick", {}))[2:])


# -----------------------------------------------------------------------------
# Every result


def measured(folder: Path, name: str, task: str, right: list[bool] | None = None, **more) -> None:
    """As if eval.py had measured `task` on items 0, 1, ...; or more["metrics"] of a corpus."""
    entry = {"task": task, "split": "test", "shots": 0} | more
    if right is not None:
        value = sum(right) / len(right)
        interval = {"value": value, "low": value - 0.01, "high": value + 0.01, "n": len(right)}
        entry |= {"items": len(right), "of": len(right), "metrics": {"accuracy": interval}}
        (folder / "answers").mkdir(parents=True, exist_ok=True)
        records = [json.dumps({"text": f"t{i}", "correct": ok}) for i, ok in enumerate(right)]
        (folder / "answers" / f"{name.replace(' ', '-')}.jsonl").write_text("\n".join(records))
    file = folder / "results.json"
    before = json.loads(file.read_text())["results"] if file.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"results": before | {name: entry}}))


def life(home: Path) -> Path:
    """A base, a fine-tuned model of it, a smoke run and its child, a checkpoint, and a model of the hub."""
    base = make_run(home / "base", [line(10)], started="2026-01-01")
    more = {"stage": "finetune", "task": "sentiment", "parent": "elsewhere/out/base", "started": "2026-01-02"}
    tuned = make_run(home / "mood", [line(10)], settings={"out": "elsewhere/out", "seed": 1}, **more)
    measured(base, "sentiment test 0-shot", "sentiment", [True, False] * 5)
    measured(base, "sentiment test 4-shot", "sentiment", [True, False, False] * 3, shots=4)
    measured(tuned, "sentiment test 0-shot", "sentiment", [True] * 10)
    accuracy = {"accuracy": {"value": 0.96, "low": 0.9, "high": 0.99, "n": 50}}
    run = json.loads((tuned / "run.json").read_text())
    (tuned / "run.json").write_text(
        json.dumps(run | {"evaluation": {"split": "validation", "metrics": accuracy}})
    )
    bits = {"bits_per_byte": {"value": 0.625, "low": 0.5, "high": 0.75, "n": 99}}
    measured(base, "storyworld test 0-shot", "storyworld", metrics=bits, items=7, of=70)
    make_run(home / "sft", [line(10)], stage="sft", parent="out/base", smoke=True, started="2026-01-03",
             settings={"out": "out"})  # fmt: skip
    child = make_run(home / "dpo", [line(10)], stage="dpo", parent="out/sft", started="2026-01-04",
                     settings={"out": "out"})  # fmt: skip
    measured(child, "sentiment test 0-shot", "sentiment", [True] * 10)
    measured(base / "checkpoints" / "step-500", "sentiment test 0-shot", "sentiment", [False] * 10)
    measured(home / "eval" / "google--flan-t5-small", "sentiment test 0-shot", "sentiment", [True] * 10)
    return home


def test_every_result_is_in_one_table(tmp_path):
    rows = shown(report.results(life(tmp_path)), "results")
    found = {(r["model"], r["task"], r["split"], r["way"]): r for r in rows}
    assert len(rows) == len(found) == 8
    assert found["mood", "sentiment", "validation", "fine-tuned"]["value [95 %]"] == "96.0 [90.0, 99.0]"
    assert found["base", "sentiment", "test", "prompted, 4 examples"]["items"] == 9
    row = found["base", "storyworld", "test", "base"]
    assert (row["metric"], row["value [95 %]"], row["note"]) == (
        "bits/byte", "0.625 [0.500, 0.750]", "a sample of 70"
    )  # fmt: skip
    assert found["dpo", "sentiment", "test", "preference-tuned"]["note"] == "SMOKE RUN, no result"
    assert ("base, step 500", "sentiment", "test", "base") in found
    assert ("google/flan-t5-small", "sentiment", "test", "base") in found


def test_results_stand_side_by_side_with_paired_differences(tmp_path):
    rows = {
        row["model"]: row
        for row in shown(report.results(life(tmp_path)), "side-by-side")
        if row["items"] != 50
    }
    row = rows["mood, fine-tuned"]
    assert row["task"] == "sentiment, test" and row["after training"] == "100.0 [99.0, 101.0]"
    assert row["base"] == "50.0 [49.0, 51.0]" and row["prompted"] == "33.3 [32.3, 34.3] (9 items)"
    assert row["after - base"].startswith("+50.0 [+20.0, +80.0]")
    assert row["after - prompted"].startswith("+66.7 [") and row["after - prompted"].endswith("(9 items)")
    assert "SMOKE RUN, no result" in rows["dpo, preference-tuned"]["after training"]
    assert not any("dpo" in b.words for b in report.findings(tmp_path) if isinstance(b, Text))
    assert any("**mood** on sentiment, test: +50.0" in b.words for b in report.findings(tmp_path)
               if isinstance(b, Text))  # fmt: skip


def test_a_model_that_learnt_from_nothing_stands_beside_one_that_was_pretrained(tmp_path):
    folder = tmp_path / "experiments" / "storyworld"
    for base, rate, right in (("pretrained", 1e-3, [True] * 10), ("scratch", 0, [True, False] * 5)):
        settings = {"out": "out", "seed": 1, "learning_rate": rate}
        parent = f"out/experiments/storyworld/{base}-s1"
        make_run(folder / f"{base}-s1", [line(10)], settings=settings)
        tuned = make_run(folder / f"{base}-mood-s1", [line(10)], stage="finetune", task="sentiment",
                         parent=parent, settings=settings, smoke=True)  # fmt: skip
        measured(tuned, "sentiment test 0-shot", "sentiment", right)
    (row,) = shown(report.results(tmp_path), "side-by-side")
    assert row["from scratch"] == "50.0 [49.0, 51.0]" and row["after - scratch"].startswith("+50.0 [")
    assert "SMOKE" not in str(row), "the lab caps its examples on purpose: only a quick lab is a smoke run"


def test_smoke_runs_are_marked_wherever_their_name_stands(tmp_path):
    life(tmp_path)
    rows = [{"model": "out/dpo", "exact_match": {"value": 0.5}}]
    battery = {"out/dpo": [{"asked": "a", "meant": "b", "said": "c"}]}
    (tmp_path / "pipeline.json").write_text(json.dumps({"rows": rows, "battery": battery}))
    (tmp_path / "dpo" / "samples.jsonl").write_text('{"step": 1, "prompt": "p", "text": "t"}\n')
    for section in (report.stages, report.training, report.samples, report.making):
        text = as_markdown("t", {"s": section(tmp_path)})
        assert "dpo (SMOKE RUN, no result)" in text and "base (SMOKE" not in text
    assert "dpo (SMOKE RUN, no result)" in log(tmp_path, {})


@pytest.mark.parametrize("entry", [None, 3, {}, {"metrics": None}, {"metrics": {"accuracy": None}}])
def test_results_that_cannot_be_read_are_left_out(entry, tmp_path):
    folder = make_run(tmp_path / "base", [line(10)], evaluation=entry)
    (folder / "results.json").write_text(json.dumps({"results": {"x": entry}}))
    assert report.results(tmp_path) and report.findings(tmp_path)


# -----------------------------------------------------------------------------
# Samples, curves, attention


def test_samples_of_a_prompt_stand_side_by_side_by_step(tmp_path):
    folder = make_run(tmp_path / "base", [line(10)])
    lines = [
        {"step": 100 * i, "prompt": p, "text": f"{p or 'start'} {i}"} for i in range(1, 10) for p in ("", "a")
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "generations.jsonl").write_text(json.dumps({"step": 5, "prompt": "b", "text": "c"}) + "\n")
    blocks = report.samples(tmp_path)
    first, second = shown(blocks, "samples-base")
    assert list(first) == ["prompt", "step 100", "step 300", "step 500", "step 700", "step 900"]
    assert first["prompt"] == "(start of a text)" and second["step 900"] == "a 9"
    assert shown(blocks, "generations-base") == [{"prompt": "b", "step 5": "c"}]


@pytest.mark.parametrize("more, text", [({"stage": "train"}, True), ({"stage": "dpo"}, False),
                                        ({"stage": "finetune", "kind": "head"}, False),
                                        ({"stage": "verifier", "verifier": "channel"}, True)])  # fmt: skip
def test_perplexity_is_drawn_where_the_loss_has_one(more, text, tmp_path):
    make_run(tmp_path / "a", [line(10), {"step": 10, "val_loss": 4.0}], **more)
    (curves,) = [b for b in report.training(tmp_path) if isinstance(b, Figure)]
    assert ("perplexity" in curves.caption) == text


def test_any_number_of_heads_is_drawn_also_of_hub_models(tmp_path):
    heads = [{"most": "", "layer": i, "head": 0, "weights": [[1.0, 0.0], [0.5, 0.5]]} for i in range(5)]
    found = {
        "scores": {"first": [[0.5]], "previous": [[0.5]]},
        "maps": [{"tokens": ["$a", "b"], "heads": heads}],
    }
    folder = tmp_path / "eval" / "google--bert"
    folder.mkdir(parents=True)
    (folder / "attention.json").write_text(json.dumps(found))
    blocks = report.attention(tmp_path)
    assert [b.name for b in blocks] == ["heads-eval-google--bert", "attention-eval-google--bert-1"]
    assert blocks[1].caption == "google/bert: rows look at columns."


def test_links_lead_to_the_web_or_beside_the_page(tmp_path):
    words = "[a](https://x.org/y) [b](figures/c.png) [c](javascript:alert(1)) <i>"
    page = as_html("t", {"s": [Text(words)]})
    assert "<a href='https://x.org/y'>a</a> <a href='figures/c.png'>b</a>" in page
    assert "href='javascript" not in page and "&lt;i&gt;" in page
    assert "a b" in as_latex("t", {"s": [Text(words)]})


# -----------------------------------------------------------------------------
# The paper


def numbers_of(value) -> set[float]:
    """Every number in some JSON, also those in its texts."""
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, int | float):
        return {float(value)}
    if isinstance(value, str):
        return {float(x) for x in re.findall(r"\d+(?:\.\d+)?", value)}
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return set().union(*(numbers_of(key) | numbers_of(x) for key, x in inner))


def test_the_papers_text_holds_only_what_the_json_says(tmp_path):
    life(tmp_path)
    lab_of(tmp_path)
    x = {"value": 0.723, "low": 0.694, "high": 0.75}
    rows = [{"model": "out/base", "exact_match": x, "task": "arithmetic"}]
    (tmp_path / "pipeline.json").write_text(json.dumps({"rows": rows}))
    scores = {"previous": [[0.125, 0.875]], "first": [[0.75, 0.25]]}
    (tmp_path / "base" / "attention.json").write_text(json.dumps({"scores": scores, "maps": []}))
    sections = paper(tmp_path, {heading: section(tmp_path) for heading, section in SECTIONS.items()})
    known = set()
    for file in tmp_path.rglob("*.json"):
        known |= numbers_of(json.loads(file.read_text()))
    # Differences are computed from the answers: those of the comparisons are the only ones.
    for comparison_row in report.side_by_side(report.measurements(tmp_path)):
        for other in (comparison_row.base, comparison_row.prompted):
            known |= numbers_of(comparison_row.minus(other) or {})
    shares = {abs(x) * scale for x in known for scale in (1, 100, 1e-3, 1e-6, 1 / 60)} | {95}
    text = " ".join(b.words for heading, blocks in sections.items() if heading != "References"
                    for b in blocks if isinstance(b, Text))  # fmt: skip
    text = re.sub(r"\([^()]*\b(?:19|20)\d\d\b[^()]*\)", "", text)  # citations
    for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text):
        digits = len(number.partition(".")[2])
        value = float(number.replace(",", ""))
        assert any(abs(value - x) <= 0.5001 * 10**-digits for x in shares), f"{number} in: {text}"
    assert "87" in text and "layer 0, head 1 (0.88)" in text
    assert list(sections)[:4] == ["Abstract", "Introduction", "Related work", "Method"]
    assert {"Results on tasks", "Attention"} <= set(sections)


def test_a_long_table_goes_to_the_end_of_the_paper():
    table = Table("t", ["a", "empty", "b"], [[str(i), "", "x " * 60] for i in range(40)], "All of it.")
    text = as_latex("t", {"One": [table], "Two": [Text("end")]})
    assert text.index("end") < text.index(r"\onecolumn") < text.index(r"\begin{longtable}")
    assert r"\caption{All of it.}" in text and "empty" not in text


def test_the_paper_has_the_figures_and_compiles(tmp_path):
    blocks = [
        Text("100 % of a_b & **c** {d} # ~ ^ \\\\ <x> | é ⏎ 漢 $"),
        Table("t_1", ["a", "b"], [["1 %", "x" * 50], ["_", "&"]]),
        Code("python train.py --name=a_b"),
    ]
    sections = {"Abstract": [Text("50 %")], "Results_1": blocks}
    text = as_latex("A & B", sections)
    assert r"100 \% of a\_b \& c \{d\} \# " in text and r"\bfseries A \& B}" in text and "漢" not in text
    write_paper(tmp_path, "A & B", sections)
    assert "**c**" in (tmp_path / "paper.md").read_text()
    if shutil.which("pdflatex"):
        assert (tmp_path / "paper.pdf").read_bytes()[:4] == b"%PDF"


def test_the_paper_says_what_was_not_run(tmp_path):
    text = as_markdown("t", paper(tmp_path, {h: section(tmp_path) for h, section in SECTIONS.items()}))
    assert "Alignment: not run." in text and "Pretraining: not run." in text
    x = {"value": 0.723, "low": 0.694, "high": 0.75}
    rows = [{"model": "out/dpo", "exact_match": x, "verifier, best of 16": x | {"value": 0.805}}]
    (tmp_path / "pipeline.json").write_text(json.dumps({"rows": rows}))
    text = as_markdown("t", paper(tmp_path, {h: section(tmp_path) for h, section in SECTIONS.items()}))
    assert (
        "dpo solves 72.3 [69.4, 75.0] % of" in text and "verifier, best of 16 answers it solves 80.5" in text
    )


def test_comparison_shows_what_differs(tmp_path):
    a = make_run(tmp_path / "a", [line(10), {"step": 10, "val_loss": 4.0}])
    b = make_run(tmp_path / "b", [line(10), {"step": 10, "val_loss": 4.5}], settings={"seed": 1, "lr": 2},
                 results={"last": {"step": 10, "val_loss": 3.5}})  # fmt: skip
    blocks = comparison([a, b])
    assert shown(blocks, "settings") == [{"setting": "lr", "a": "", "b": 2}]
    assert shown(blocks, "last")[1]["minus a"] == "+0.2500"
    assert "repeat them with --seed=2" in blocks[-1].words
    with pytest.raises(report.ConfigError, match="nowhere"):
        comparison([a, tmp_path / "nowhere"])


def test_a_run_without_results_or_losses_is_shown(tmp_path):
    """Looked at before its first evaluation, and after a step whose loss was not finite."""
    data = {"validation": {"fingerprint": "f"}}
    bad = {k: v for k, v in line(10).items() if k != "loss"}
    a = make_run(tmp_path / "a", [bad], results=None, data=data)
    b = make_run(tmp_path / "b", [{"step": 5, "val_loss": 3.0}, bad, line(20)], results=None, data=data)
    assert report.training(tmp_path) and log(tmp_path, {}) and comparison([a, b])
    assert paper(tmp_path, {h: section(tmp_path) for h, section in SECTIONS.items()})


def test_comparison_tells_noise_by_runs_that_differ_in_their_seed(tmp_path):
    def run(name: str, loss: float, **settings) -> Path:
        last = {"step": 10, "val_loss": loss}
        return make_run(tmp_path / name, [line(10)], settings=settings, results={"last": last})

    folders = [run("a1", 3.0, seed=1, lr=1, out="x", model="x/base")]
    folders += [run("a2", 3.2, seed=2, lr=1, out="y", model="y/base"), run("b", 3.5, seed=1, lr=2)]
    folders += [run("again", 3.0, seed=1, lr=1, out="z", model="z/base")]  # the first one's twin: no news
    blocks = comparison(folders)
    assert blocks[-2].words.endswith("a standard deviation of 0.1414.")  # 0.2 / sqrt(2)
    rows = shown(blocks, "noise")
    assert rows[0] == {
        "runs": f"{tmp_path}/a1, {tmp_path}/a2",
        "mean of the last loss": "3.1000",
        "minus the first": "",
    }
    assert rows[1]["minus the first"] == "+0.4000, 2.3 standard errors"  # 0.4 / (0.1414 sqrt(1 + 1/2))


def test_it_needs_no_torch_and_says_where_the_page_is(tmp_path):
    make_run(tmp_path / "base", [line(10)])
    program = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['report.py', '--home=%s'];"
    program = program % tmp_path + "runpy.run_path('report.py', run_name='__main__')"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert Path(out.stdout.strip()) == tmp_path / "report" / "index.html"
    words = [sys.executable, "report.py", f"--home={tmp_path}", f"--to={tmp_path}/some"]
    subprocess.run([*words, "--only=lab,training"], cwd=ROOT, check=True)
    page = (tmp_path / "some" / "index.md").read_text()
    assert [x for x in page.splitlines() if x.startswith("## ")] == ["## Training", "## The lab"]
    assert not (tmp_path / "some" / "paper").exists()
    assert (tmp_path / "report" / "experiments.html").exists()
    missing = subprocess.run(
        [sys.executable, "report.py", "--home=nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert missing.returncode == 1 and missing.stderr.startswith("report.py: there is no folder nowhere")
