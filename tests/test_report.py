"""The report: what it shows is what the files say, whatever state they are in."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import report
from errors import KINDS
from report import SECTIONS, Figure, Table, as_html, as_markdown, comparison, observations, write

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
    assert all(len(blocks) == 1 and isinstance(blocks[0], report.Text) for blocks in sections.values())
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
    words = [b.words for b in blocks if isinstance(b, report.Text)]
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
    assert any(isinstance(b, report.Code) and b.words == "learning_rate=0.003" for b in blocks)
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
    assert any(isinstance(b, report.Text) and "0.500 + 40 / N^0.35" in b.words for b in blocks)
    assert shown(blocks, "shapes-storyworld")[0]["GiB"] == "0.35"
    assert shown(blocks, "transfer-storyworld")[0]["scratch, tuned"] == "66.7 [60.1, 70.2]"
    words = " ".join(b.words for b in blocks if isinstance(b, report.Text))
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
    make_run(tmp_path / "base", [line(10)], settings={"hypothesis": "Muon wins."})
    text = report.log(tmp_path)
    assert (
        "## base" in text
        and "- **Hypothesis**: Muon wins." in text
        and "| base | train | 2026-01-01 | 3.2500 |" in text
    )


def test_the_paper_has_the_figures_and_compiles(tmp_path):
    blocks = [
        report.Text("100 % of a_b & **c** {d} # ~ ^ \\\\ <x> | é ⏎ 漢 $"),
        Table("t_1", ["a", "b"], [["1 %", "x" * 50], ["_", "&"]]),
        report.Code("python train.py --name=a_b"),
    ]
    sections = {"Abstract": [report.Text("50 %")], "Results_1": blocks}
    text = report.as_latex("A & B", sections)
    assert r"100 \% of a\_b \& c \{d\} \# " in text and r"\title{A \& B}" in text and "漢" not in text
    report.write_paper(tmp_path, "A & B", sections)
    assert "**c**" in (tmp_path / "paper.md").read_text()
    if shutil.which("pdflatex"):
        assert (tmp_path / "paper.pdf").read_bytes()[:4] == b"%PDF"


def test_the_paper_says_what_was_not_run(tmp_path):
    text = as_markdown("t", report.paper(tmp_path, {h: section(tmp_path) for h, section in SECTIONS.items()}))
    assert "Alignment: not run." in text and "Pretraining: not run." in text
    x = {"value": 0.723, "low": 0.694, "high": 0.75}
    rows = [{"model": "out/dpo", "exact_match": x, "verifier, best of 16": x | {"value": 0.805}}]
    (tmp_path / "pipeline.json").write_text(json.dumps({"rows": rows}))
    text = as_markdown("t", report.paper(tmp_path, {h: section(tmp_path) for h, section in SECTIONS.items()}))
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
    assert report.training(tmp_path) and report.log(tmp_path) and comparison([a, b])
    assert report.paper(tmp_path, {h: section(tmp_path) for h, section in SECTIONS.items()})


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
    missing = subprocess.run(
        [sys.executable, "report.py", "--home=nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert missing.returncode == 1 and missing.stderr.startswith("report.py: there is no folder nowhere")
