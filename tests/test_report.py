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
from lab.paper import paper, write_paper
from support.observations import observations
from support.pages import Figure, Table, Text, as_html, as_latex, as_markdown, fill, row, write
from support.results import SMOKE, Records

ROOT = Path(report.__file__).parent
SHARE = {"value": 0.723, "low": 0.694, "high": 0.75, "n": 1000}

# -----------------------------------------------------------------------------
# Folders as the stages write them, and what the report makes of them


class Section(list):
    """The blocks of one section."""

    def table(self, name: str) -> list[dict]:
        (found,) = [b for b in self if isinstance(b, Table) and b.name == name]
        return [dict(zip(found.columns, cells, strict=True)) for cells in found.rows]

    @property
    def figures(self) -> list[str]:
        return [b.name for b in self if isinstance(b, Figure)]

    @property
    def words(self) -> str:
        """Its texts and captions."""
        return "\n".join(b.caption if isinstance(b, Table | Figure) else b.words for b in self)


def section(home: Path, name: str) -> Section:
    (blocks,) = report.sections_of(Records(home), name).values()
    return Section(blocks)


def log(home: Path) -> dict[str, Section]:
    records = Records(home)
    made = report.pkgutil.resolve_name(report.LOG)(records, report.sections_of(records, "training"))
    return {heading: Section(blocks) for heading, blocks in made.items()}


def draft(home: Path) -> dict[str, list]:
    return paper(Records(home), report.sections_of(Records(home)))


def write_json(file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(x) + "\n" for x in rows))


# fmt: off
def line(step: int, **more) -> dict:
    return {"step": step, "loss": 5 - step / 100, "learning_rate": 1e-3, "grad_norm": 1.0,
            "tokens": 512 * step, "tokens_per_second": 1000.0 + step, "seconds": float(step),
            "peak_memory_gib": 0.5} | more


def make_run(folder: Path, lines: list[dict] | None = None, **more) -> Path:
    last = {"step": 100, "val_loss": 3.25}
    run = {"status": "finished", "stage": "train", "parameters": 869504, "seconds": 303.3, "git": "abc1234",
           "started": "2026-01-01", "command": "python train.py configs/cpu.py", "settings": {"seed": 1},
           "results": {"last": last, "best": last}, "versions": {"torch": "2"},
           "hardware": {"device": "CPU", "threads": 2}}
    write_json(folder / "run.json", run | more)
    write_lines(folder / "metrics.jsonl", lines or [line(10)])
    return folder


def measured(folder: Path, task: str, answers: list, split: str = "test", shots: int = 0, **more) -> None:
    """As if eval.py had measured `task`: answers are records, or True and False."""
    answers = [x if isinstance(x, dict) else {"text": f"t{i}", "correct": x} for i, x in enumerate(answers)]
    n, right = max(1, len(answers)), sum(x.get("correct", 0) for x in answers)
    share = {"value": right / n, "low": right / n - 0.01, "high": right / n + 0.01, "n": n}
    entry = {"task": task, "split": split, "shots": shots, "items": n, "metrics": {"accuracy": share}}
    name, file = f"{task} {split} {shots}-shot", folder / "results.json"
    before = json.loads(file.read_text())["results"] if file.exists() else {}
    write_json(file, {"results": before | {name: entry | more}})
    write_lines(folder / "answers" / f"{name.replace(' ', '-')}.jsonl", answers)


def life(home: Path) -> Path:
    """A base, a fine-tuned model of it, a smoke run and its child, a checkpoint, and a model of the hub."""
    base, out = make_run(home / "base"), {"settings": {"out": "out"}}
    mood = make_run(home / "mood", stage="finetune", task="sentiment", parent="elsewhere/out/base",
                    settings={"out": "elsewhere/out", "seed": 1}, started="2026-01-02",
                    evaluation={"split": "validation", "metrics": {"accuracy": SHARE | {"n": 50}}})
    make_run(home / "short", stage="sft", parent="out/base", smoke=True, started="2026-01-03", **out)
    child = make_run(home / "child", stage="dpo", parent="out/short", started="2026-01-04", **out)
    measured(base, "sentiment", [True, False] * 5)
    measured(base, "sentiment", [True, False, False] * 3, shots=4)
    bits = {"value": 0.625, "low": 0.5, "high": 0.75, "n": 99}
    measured(base, "storyworld", [], metrics={"bits_per_byte": bits}, items=7, of=70)
    for folder in (mood, child, home / "eval" / "google--flan-t5-small"):
        measured(folder, "sentiment", [True] * 10)
    measured(base / "checkpoints" / "step-500", "sentiment", [False] * 10)
    rows = [{"model": "out/base", "minutes": 0.62, "exact_match": SHARE},
            {"model": "out/child", "exact_match": SHARE, "storyworld, bits/byte": {"value": 0.2361}}]
    said = [{"asked": "Say <b>", "meant": "<b>", "said": "<script>alert(1)</script>"}]
    write_json(home / "pipeline.json", {"rows": rows, "battery": {"out/child": said}})
    write_lines(child / "samples.jsonl", [{"step": 1, "prompt": "p", "text": "t"}])
    return home


def lab_of(home: Path, quick: bool = False) -> Path:
    """A lab of two families: one change is better, one worse, one neither. Some of its run folders exist."""
    def entry(loss: float, verdict: str = "", mean: float = 0, half: float = 0, speed: float = 1e3) -> dict:
        found = {"hypothesis": f"h {loss}", "command": "python train.py x.py", "seeds": {"1": {}, "2": {}},
                 "bits_per_byte": {"mean": loss}, "val_loss": {"mean": 2 * loss}, "verdict": verdict,
                 "tokens_per_second": {"mean": speed}}
        gap = {"mean": mean, "low": mean - half, "high": mean + half, "n": 2}
        return found | {"difference": gap} if half else found

    experiments = {"baseline": entry(0.5), "muon": entry(0.375, "better", -0.125, 0.03125, speed=500.0),
                   "gelu": entry(0.75, "worse", 0.25, 0.03125),
                   "kv_heads_1": entry(0.5625, "no difference found", 0.0625, 0.125, speed=1500.0)}
    found = {"corpus": "storyworld", "quick": quick, "seeds": 2, "seconds": 60, "experiments": experiments,
             "families": {"ablations": ["muon", "gelu"], "gqa": ["kv_heads_1"]}, "measured": FAMILIES}
    folder = home / "experiments" / ("storyworld-quick" if quick else "storyworld")
    for name, seed in (("baseline", 1), ("baseline", 2), ("muon", 1), ("muon", 2)):
        settings = {"optimizer": "muon" if name == "muon" else "adamw", "seed": seed, "name": name}
        make_run(folder / f"{name}-s{seed}", [line(10 * i) for i in range(1, 4)], settings=settings,
                 wandb={"id": f"{name}{seed}"})
    write_json(folder / "experiments.json", found)
    return home


FAMILIES = {  # what the families of the lab measure beside the losses
    "gqa": {"kv_heads_1": {"cache_bytes_per_token": 1024, "tokens_per_second": 18044.4}},
    "moe": {"moe_4_top1": {
        "routing": {"1": {"steps": [10, 20], "busiest_expert": [2.0, 1.1], "dropped": [9, 0]}},
        "classes": [{"bits": 0.14, "share": {}}]}},
    "streams": {"baseline": {
        "perplexity": {"full": {"0-1": 5.0, "1-2": 50.0}},
        "continuations": {"window, first 4 kept": {"distinct_2": 0.91, "example": "the end"}},
        "endless": {"tokens": 5000, "cache_bytes": [524288] * 2, "tokens_per_second": [1383.0, 1430.0]}}},
    "scaling": {
        "points": [{"budget": 1e12, "parameters": 1e5, "tokens": 1.7e6, "loss": 5.0}],
        "law": {"E": 0.5, "A": 40.0, "B": 300.0, "a": 0.35, "b": 0.4, "error": 0.012},
        "best": [{"budget": 1e12, "inside": True, "parameters": 1e5, "loss": 4.9}],
        "predictions": {"speedrun": {"flops": 6e16, "parameters": 3e7, "tokens": 4e8, "loss": 1.2345}}},
    "shapes": {"rows-4": {"parameters": 935040, "rows": 4, "tokens_per_second": 9401.4,
                          "peak_memory_gib": 0.351, "most_rows_in_12_gib": 4096}},
    "transfer": {"sentiment": {"scratch, tuned": {"mean": 66.7, "low": 60.1, "high": 70.2}}},
}


def solved(folder: Path, right: list[bool], **more) -> None:
    """Answers to problems, greedy and chosen by a verifier, and what choosing among many adds."""
    records = [{"text": f"p{i}", "target": "t", "output": f"{folder.name} {i}", "correct": ok,
                "verifier": f"v {i}", "verifier correct": i == 0, "verifier sure": i / 10,
                "kinds": [] if ok else ["plan"]}
               for i, ok in enumerate(right)]
    curves = {"majority": {"1": SHARE, "2": SHARE}, "pass": {"1": {"value": 0.7}, "2": {"value": 0.8}}}
    gap = {"value": 0.012, "low": -0.003, "high": 0.027}
    measured(make_run(folder, **more), "arithmetic", records, curves=curves, verifiers={"verifier": "out/v"},
             differences={"majority - greedy": gap}, metrics={"exact_match": SHARE},
             gating={"verifier": [{"threshold": 0.5, "samples": 2.24, "right": SHARE}]})


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """One folder with all that a report shows."""
    home = lab_of(life(tmp_path_factory.mktemp("home")))
    solved(home / "sft", [False, False, True], stage="sft", started="2026-02-01")
    solved(home / "dpo", [False, True, True], parent="out/sft", started="2026-02-02")
    for name, said, sure in (("rev-a", ["bad", "bad", "good"], 0.99), ("rev-b", ["bad", "good"], 0.95)):
        measured(make_run(home / name), "sst2", [
            {"text": f"r{i}", "target": "good", "prediction": p, "correct": p == "good", "sure": sure,
             "kinds": ["other"] if i else ["negation", "short"]} for i, p in enumerate(said)], "validation")
    measured(make_run(home / "sum"), "samsum", [
        {"text": "d", "target": "t", "output": f"s{i}", "rougeL": i / 10, "kinds": kinds}
        for i, kinds in enumerate((["too short"], ["too short", "speaker"], ["other"]))])
    check = {"val_loss": 1.0, "reward_margin": 0.5, "reward_accuracy": 0.75, "chosen": -3.0, "rejected": -4.0}
    pairs = make_run(home / "pairs", [line(10), {"step": 10, **check}], stage="dpo",
                     data={"validation": {"pairs": 4}})
    write_lines(pairs / "violations.jsonl", [{"prompt": "q", "chosen": "y", "rejected": "n", "margin": -2.0}])
    make_run(home / "verifier", stage="verifier", verifier="channel", verification={
        "answers": 80, "problems": 5,
        "calibration": {"ece": 0.043, "bins": [{"n": 3, "said": 0.1, "is": 0.2}, {"n": 0}]},
        "channel": {"auc": 0.81, "auc_within": {"value": 0.77}, "best_of_n": SHARE}})
    about = {"source": "stories", "licence": "MIT", "fingerprint": "0123456789abcdef", "tokens": 1234}
    settings = {"seed": 1, "learning_rate": 0.003, "corpus": "", "hypothesis": "Muon wins."}
    made = make_run(home / "made", [line(10), line(50), {"step": 50, "val_loss": 3.5}, line(100)],
                    settings=settings, changed=["learning_rate", "corpus"],
                    data={"corpus": {"train": about}, "validation": {"source": "sums", "fingerprint": "f"}},
                    wandb={"id": "abc12345", "url": "https://wandb.ai/me/lm/runs/abc12345"})
    write_lines(made / "samples.jsonl", [{"step": 100 * i, "prompt": prompt, "text": f"{prompt} {100 * i}"}
                                         for i in range(1, 10) for prompt in ("", "a")])
    write_lines(made / "generations.jsonl", [{"step": 5, "prompt": "b", "text": "c"}])
    heads = [{"most": most, "layer": 0, "head": 1, "weights": [[1.0, 0.0], [0.5, 0.5]]}
             for most in ("previous", "first", "induction", "entropy", "")]
    found = {"scores": {"first": [[0.1, 0.9]], "previous": [[0.125, 0.875]]}, "copies": {"lists": 0.5},
             "maps": [{"tokens": ["a", "$\n"], "heads": heads}]}
    for folder in (home / "base", home / "eval" / "google--bert"):
        write_json(folder / "attention.json", found)
    (home / "ledger.tsv").write_text("sft\t120\tpython sft.py\ndpo\t60\tpython dpo.py\ntorn")
    (home / "plan.tsv").write_text("pretrain\t90\t0.62\nsft\t90.0\t0.50\ndpo\t45.0\t0.60\nlater\t9\t1\n")
    return home
# fmt: on


# -----------------------------------------------------------------------------
# What the sections say

CELLS = """
stages stages: base: greedy = 72.3 [69.4, 75.0]; minutes of training = 0.6; storyworld, bits/byte =
stages stages: child (SMOKE RUN, no result): storyworld, bits/byte = 0.236
results results: prompted, 4 examples: model = base; task = sentiment; split = test; items = 9
results results: a sample of 70: model = base; metric = bits/byte; value [95 %] = 0.625 [0.500, 0.750]
results results: 50: model = mood; split = validation; way = fine-tuned; value [95 %] = 72.3 [69.4, 75.0]
results results: preference-tuned: model = child; task = sentiment; note = SMOKE RUN, no result
results results: base, step 500: task = sentiment; split = test; way = base
results results: google/flan-t5-small: task = sentiment; split = test; way = base
ledger ledger: sft: minutes = 2.0; planned = 1.5; command = python sft.py
ledger ledger: all: minutes = 3.0; planned = 2.2
training runs: made: parameters = 870k; last validation loss = 3.2500 at 100; minutes = 5.1; tokens/s = 1,050
training runs: made: tokens = 51.2k; GiB (planned) = 0.50 (0.62); state = finished; stage = train
training runs: pairs: GiB (planned) = 0.50; tokens/s = 1,010 pairs; tokens =
samples samples-made: (start of a text): step 100 = 100; step 300 = 300; step 500 = 500; step 900 = 900
samples samples-made: a: step 900 = a 900
samples generations-made: b: step 5 = c
choosing differences-dpo-arithmetic: majority - greedy: points [95 %] = +1.2 [-0.3, +2.7]
choosing gating-dpo-verifier: 0.5: answers a problem = 2.2; right = 72.3 [69.4, 75.0]
verifiers verifier-verifier: channel: AUC = 0.810; AUC within a problem = 0.770; best of n = 72.3 [69.4, 75.0]
failures errors-sft-arithmetic-test: another wrong step, or one too many: answers = 2; wrong = 2
failures errors-sft-arithmetic-test: 2: % of the wrong ones = 100.0 [34.2, 100.0]
failures examples-sft-arithmetic-test: p0: said = sft 0; should be = t
failures changed-dpo-arithmetic-test-sft: mended: problem = p1; sft = sft 1; dpo = dpo 1
failures changed-dpo-arithmetic-test-verifier: mended: problem = p0; verifier = v 0; it says = 0.00
failures errors-rev-a-sst2-validation: a negation: answers = 1; wrong = 1
failures errors-rev-a-sst2-validation: none of these: answers = 2; % of these wrong = 50.0 [9.5, 90.5]
failures doubtful-sst2-validation: r0: label = good; mean probability = 0.97; models = rev-a, rev-b
failures errors-sum-samsum-test: less than half as long as the true one: answers = 2; ROUGE-L = 5.0
failures violations-pairs: q: margin = -2.0; chosen = y; rejected = n
lab lab-storyworld: muon: minus baseline [95 %] = -0.1250 [-0.1562, -0.0938]; verdict = better
lab gqa-storyworld: kv_heads_1: decoded tokens/s = 18,044
lab continuations-storyworld-baseline: window, first 4 kept: distinct 2 = 0.910
lab predicted-storyworld: speedrun, predicted best: loss = 1.234
lab shapes-storyworld: rows-4: GiB = 0.35
lab transfer-storyworld: sentiment: scratch, tuned = 66.7 [60.1, 70.2]
findings findings: storyworld, ablations: lowest bits/byte = muon, 0.3750; better = muon -0.1250
findings findings: storyworld, ablations: worse = gelu +0.2500
findings findings: storyworld, gqa: better = ; no difference found = kv_heads_1 +0.0625
making data: stories: run = made; split = train; licence = MIT; tokens = 1,234; SHA-256 = 0123456789ab
making data: sums: split = validation
"""  # section table: a cell of the row: column = cell; ...
WORDS = """
choosing: with 95 % intervals
verifiers: mean error 4.3 %
failures: **sft**, arithmetic, test: is wrong on 2 of 3.
failures: **dpo** is right where sft is wrong on 1 of 3 problems, wrong where sft is right on 0
failures: **sum**, samsum, test: has a flaw that can be counted in 2 of 3 summaries.
failures: **pairs** moved 1 of 4 held-out pairs the wrong way; the three worst:
lab: Loss = 0.500 + 40 / N^0.35
lab: a cache of 524,288 bytes, 1,383 to 1,430 tokens/s
findings: **mood** on sentiment, test: +50.0
attention: 50% of those of lists
attention: google/bert: rows look at columns. To look for: previous, a line just below the diagonal
making: **made**, commit abc1234, CPU, 2 threads; torch 2
making: learning_rate=0.003
"""


def test_tables_and_sentences_are_what_the_files_say(everything):
    sections = {name: section(everything, name) for name in set(re.findall(r"^\w+", CELLS + WORDS, re.M))}
    for text in CELLS.strip().splitlines():
        name, table, key, cells = re.fullmatch(r"(\w+) (\S+): (.+): (.+)", text).groups()
        (found,) = [x for x in sections[name].table(table) if key in map(str, x.values())]
        for cell in cells.split(";"):
            column, value = (x.strip() for x in cell.split("=", 1))
            assert str(found[column]) == value, text
    for text in WORDS.strip().splitlines():
        name, words = text.split(": ", 1)
        assert words in sections[name].words, text
    every = [(r["model"], r["task"], r["split"], r["way"]) for r in sections["results"].table("results")]
    assert len(every) == len(set(every)) == 13, "every result once"
    steps = list(sections["samples"].table("samples-made")[0])
    assert steps == ["prompt", "step 100", "step 300", "step 500", "step 700", "step 900"]
    _, *broken = sections["failures"].table("changed-dpo-arithmetic-test-verifier")
    assert [x["problem"] for x in broken] == ["p2", "p1"], "the surest first"
    advice, of_gqa = (x["recommendation"] for x in sections["findings"].table("findings"))
    assert advice == "use muon at 0.50 times the speed; leave out gelu"
    assert of_gqa.startswith("kv_heads_1: no difference in loss found, at 1.50 times the speed")
    drawn = {name: sections[name].figures for name in ("choosing", "verifiers", "attention")}
    assert drawn["choosing"] == ["choosing-sft-arithmetic", "choosing-dpo-arithmetic"]
    assert drawn["verifiers"] == ["reliability-verifier"]
    assert drawn["attention"][2:] == ["heads-eval-google--bert", "attention-eval-google--bert-1"]
    assert {"curves-made", "curves-pairs", "preferences-pairs"} <= set(sections["training"].figures)
    kinds = [name.partition("-")[0] for name in sections["lab"].figures]
    assert kinds == ["forest", "moe", "streams", "scaling"]


def test_runs_on_one_text_are_overlaid_and_perplexity_is_drawn_where_the_loss_has_one(tmp_path):
    head, channel = {"stage": "finetune", "kind": "head"}, {"stage": "verifier", "verifier": "channel"}
    kinds = {"a": {}, "b": {}, "c": {"tokenizer": "x"}, "d": {"stage": "dpo"}, "e": head, "f": channel}
    for name, more in kinds.items():
        lines, data = [line(10), {"step": 10, "val_loss": 4.0}], {"validation": {"fingerprint": "f"}}
        make_run(tmp_path / name, lines, data=data, **more)
    first, *rest = [b for b in section(tmp_path, "training") if isinstance(b, Figure)]
    assert first.name == "curves-together-1-train"
    assert [b.name for b in rest] == [f"curves-{x}" for x in "abcdef"]
    assert [b.name[-1] for b in rest if "perplexity" in b.caption] == ["a", "b", "c", "f"]


def test_generated_text_cannot_become_markup(tmp_path):
    sections = {"samples": section(life(tmp_path), "samples")}
    page = write(tmp_path / "report", "t", sections).read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "<script>" not in (tmp_path / "report" / "index.md").read_text()
    with open(tmp_path / "report" / "battery.csv", newline="") as file:
        assert list(csv.reader(file))[1] == ["Say <b>", "<b>", "<script>alert(1)</script>"]


# -----------------------------------------------------------------------------
# Every result


def test_results_stand_side_by_side_with_paired_differences(tmp_path):
    rows = section(life(tmp_path), "results").table("side-by-side")
    rows = {r["model"]: r for r in rows if r["items"] != 50}
    mood = rows["mood, fine-tuned"]
    assert mood["task"] == "sentiment, test" and mood["after training"] == "100.0 [99.0, 101.0]"
    assert mood["base"] == "50.0 [49.0, 51.0]" and mood["prompted"] == "33.3 [32.3, 34.3] (9 items)"
    assert mood["after - base"].startswith("+50.0 [+20.0, +80.0]")
    assert re.fullmatch(r"\+66\.7 \[.*\] \(9 items\)", mood["after - prompted"])
    assert SMOKE in rows["child, preference-tuned"]["after training"]
    found = section(tmp_path, "findings").words
    assert "**mood** on sentiment, test: +50.0" in found and "child" not in found


def test_a_model_that_learnt_from_nothing_stands_beside_one_that_was_pretrained(tmp_path):
    folder = tmp_path / "experiments" / "storyworld"
    for base, rate, right in (("pretrained", 1e-3, [True] * 10), ("scratch", 0, [True, False] * 5)):
        settings = {"out": "out", "seed": 1, "learning_rate": rate}
        make_run(folder / f"{base}-s1", settings=settings)
        tuned = make_run(folder / f"{base}-mood-s1", stage="finetune", task="sentiment", settings=settings,
                         parent=f"out/experiments/storyworld/{base}-s1", smoke=True)  # fmt: skip
        measured(tuned, "sentiment", right)
    (found,) = section(tmp_path, "results").table("side-by-side")
    assert found["from scratch"] == "50.0 [49.0, 51.0]" and found["after - scratch"].startswith("+50.0 [")
    assert "SMOKE" not in str(found), "the lab caps its examples on purpose: only a quick lab is a smoke run"


def test_smoke_runs_are_marked_wherever_their_name_stands(tmp_path):
    life(tmp_path)
    for name in ("stages", "training", "samples", "making"):
        text = as_markdown("t", {"s": section(tmp_path, name)})
        assert f"child ({SMOKE})" in text and "base (SMOKE" not in text
    assert f"child ({SMOKE})" in log(tmp_path)


# -----------------------------------------------------------------------------
# Whatever state the files are in


def test_an_empty_folder_gets_sentences_that_name_commands(tmp_path):
    sections = report.sections_of(Records(tmp_path))
    assert all(len(blocks) == 1 and isinstance(blocks[0], Text) for blocks in sections.values())
    page = write(tmp_path / "report", "t", sections).read_text()
    assert "bash run_all.sh cpu" in page and "<img" not in page
    text = as_markdown("t", draft(tmp_path))
    assert "Alignment: not run." in text and "Pretraining: not run." in text


@pytest.mark.parametrize("what", ["", "{", "[1, 2]", "null", "\x00\xff"])
def test_broken_files_break_nothing(what, tmp_path):
    folder = make_run(tmp_path / "base")
    for name in ("run.json", "metrics.jsonl", "samples.jsonl", "results.json"):
        (folder / name).write_text(what)
    for name in ("pipeline.json", "ledger.tsv", "plan.tsv"):
        (tmp_path / name).write_text(what)
    assert all(report.sections_of(Records(tmp_path)).values())


@pytest.mark.parametrize("entry", [None, 3, {}, {"metrics": None}, {"metrics": {"accuracy": None}}])
def test_results_that_cannot_be_read_are_left_out(entry, tmp_path):
    folder = make_run(tmp_path / "base", evaluation=entry)
    write_json(folder / "results.json", {"results": {"x": entry}})
    assert "Nothing was measured" in section(tmp_path, "results").words and section(tmp_path, "findings")


def test_a_run_that_is_still_going_is_shown_as_far_as_it_got(tmp_path):
    """Also before its first evaluation, and after a step whose loss was not finite."""
    data = {"validation": {"fingerprint": "f"}}
    bad = {key: value for key, value in line(30).items() if key != "loss"}
    a = make_run(tmp_path / "a", [line(10), line(20)], status="running", results={}, data=data)
    with open(a / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    b = make_run(tmp_path / "b", [{"step": 5, "val_loss": 3.0}, bad], results=None, data=data)
    blocks = section(tmp_path, "training")
    first, second = blocks.table("runs")
    assert (first["state"], first["best"], first["tokens/s"]) == ("running", "", "1,015")
    assert second["last validation loss"] == "" and blocks.figures == ["curves-a"]
    assert log(tmp_path) and draft(tmp_path) and report.comparison([a, b])


# -----------------------------------------------------------------------------
# The log


def test_the_log_has_an_entry_a_run_and_an_entry_an_experiment(everything):
    made = log(everything)
    rows = {x["run"]: x for x in made["All runs"].table("experiments")}
    run, muon = rows["made"], rows["muon"]
    assert (run["validation loss"], run["training loss"], run["tokens/s"]) == ("3.2500", "4.4667", "1,050")
    assert muon["minus baseline"] == "-0.1250 [-0.1562, -0.0938] bits/byte"
    assert muon["training loss"] == "4.8000" and rows["gelu"]["training loss"] == ""
    words = made["made"].words
    assert "**Hypothesis**: Muon wins." in words and "[curves-made](figures/curves-made.png)" in words
    assert "run `abc12345`, [https://wandb.ai/me/lm/runs/abc12345](https://wandb.ai" in words
    words = made["muon, storyworld"].words
    assert "**Hypothesis**: h 0.375" in words and "`optimizer=muon`; `python train.py x.py`" in words
    assert "seed 1: run `muon1`, offline; seed 2: run `muon2`, offline" in words
    assert "500 tokens/s, mean of 2 seeds" in words and "**Next steps**: Adopt it" in words
    assert made["muon, storyworld"].figures == ["curves-storyworld-muon"]


def test_quick_runs_are_marked_and_have_no_findings(tmp_path):
    assert section(lab_of(tmp_path, quick=True), "findings").words.startswith("No findings yet")
    assert all("SMOKE RUN" in heading for heading in list(log(tmp_path))[2:])


def test_observations_are_what_the_curves_say():
    def said(losses, *checks) -> str:
        lines = [line(10 * i, loss=x) for i, x in enumerate(losses)]
        sentences, todo = observations(lines + [{"step": s, "val_loss": x} for s, x in checks])
        return " ".join(sentences + todo)

    falling = [5 - i / 10 for i in range(30)]
    words = said(falling, (50, 4.5), (100, 4.0), (150, 3.5), (200, 3.0))
    assert "still falling: by 14.3 % since step 150" in words and words.endswith(" Train longer.")
    words = said(falling, (50, 4.0), (100, 3.0), (150, 3.2), (200, 3.4))
    assert "lowest at step 100 (3.0000) and rose to 3.4000" in words and "dropout" in words
    assert "flat since step 150" in said(falling, (50, 4.0), (100, 3.0), (150, 3.0), (200, 2.99))
    noisy = [3.0 + (0.2 if i % 2 else -0.2) for i in range(40)]
    assert "flat since step" in said([*noisy, 3.2, 3.2]), "the last mean is above the lowest, by chance"
    assert "The training loss was lowest" in said([*noisy, 5.0, 5.0, 5.0])
    words = said([x + 2 * (i == 20) for i, x in enumerate(falling)])
    assert "1 spike of the training loss, the largest at step 200 (+1.900)" in words and "warmup" in words
    assert said([5.0]) == "Too short to say anything."
    assert "3 steps were skipped" in observations([line(1, skipped=3)])[0][-1]


# -----------------------------------------------------------------------------
# Formats


def test_templates_of_rows_and_sentences():
    values = {"loss": {"mean": 0.5, "low": 0.25, "high": 0.75}, "n": 1234, "none": None}
    assert row("a: {n:,} | b: {loss[mean]:.2f}\nc: {loss:percent}", values) == {
        "a": "1,234", "b": "0.50", "c": "50.0 [25.0, 75.0]"
    }  # fmt: skip
    assert fill("{n} and {none}", values) == fill("{loss[none]}", values) == "", "not a number is no text"


def test_links_lead_to_the_web_or_beside_the_page(tmp_path):
    words = "[a](https://x.org/y) [b](figures/c.png) [c](javascript:alert(1)) <i>"
    page = as_html("t", {"s": [Text(words)]})
    assert "<a href='https://x.org/y'>a</a> <a href='figures/c.png'>b</a>" in page
    assert "href='javascript" not in page and "&lt;i&gt;" in page
    assert "a b" in as_latex("t", {"s": [Text(words)]})


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


def test_the_papers_text_holds_only_what_the_json_says(everything):
    sections = draft(everything)
    known = {95.0}
    for file in everything.rglob("*.json"):
        known |= numbers_of(json.loads(file.read_text()))
    for c in Records(everything).comparisons:  # differences are computed from the answers
        known |= numbers_of(c.minus(c.base) or {}) | numbers_of(c.minus(c.prompted) or {})
    shares = {abs(x) * scale for x in known for scale in (1, 100, 1e-3, 1e-6, 1 / 60)}
    blocks = [b for heading in sections if heading != "References" for b in sections[heading]]
    text = " ".join(b.words for b in blocks if isinstance(b, Text))
    text = re.sub(r"\([^()]*\b(?:19|20)\d\d\b[^()]*\)", "", text)  # citations
    for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text):
        digits, value = len(number.partition(".")[2]), float(number.replace(",", ""))
        assert any(abs(value - x) <= 0.5001 * 10**-digits for x in shares), f"{number} in: {text}"
    assert "base solves 72.3 [69.4, 75.0] % of" in text and "layer 0, head 1 (0.88)" in text
    assert list(sections)[:4] == ["Abstract", "Introduction", "Related work", "Method"]
    assert {"Results on tasks", "Attention"} <= set(sections)


def test_the_paper_is_valid_latex_and_a_long_table_goes_to_its_end(everything, tmp_path):
    table = Table("t", ["a", "empty", "b"], [[str(i), "", "x " * 60] for i in range(40)], "All of it.")
    text = as_latex("A & B", {"Abstract": [Text("50 %")], "R_1": [table], "Two": [Text("end")]})
    assert text.index("\nend\n") < text.index(r"\onecolumn") < text.index(r"\begin{longtable}")
    assert r"\caption{All of it.}" in text and "empty" not in text and r"\bfseries A \& B}" in text
    words = Text("100 % of a_b & **c** {d} # ~ ^ \\\\ <x> | é ⏎ 漢 $")
    text = as_latex("t", {"s": [words]})
    assert r"100 \% of a\_b \& c \{d\} \# " in text and "漢" not in text
    write_paper(tmp_path, Records(everything), report.sections_of(Records(everything)))
    text = (tmp_path / "paper.tex").read_text()
    for kind in set(re.findall(r"\\begin\{(\w+\*?)\}", text)):
        assert text.count(rf"\begin{{{kind}}}") == text.count(rf"\end{{{kind}}}")
    tables = re.findall(r"\\begin\{(?:tabular|longtable)\}\{([^\n]*)\}\n(.*?)\\end\{", text, re.S)
    for layout, lines in tables:
        columns = len(re.findall(r"l|p\{", layout.replace(r">{\raggedright\arraybackslash}", "")))
        rows = re.findall(r"^(?!\\caption)(.*) \\\\$", lines, re.M)
        assert rows and all(len(re.findall(r"(?<!\\)&", cells)) == columns - 1 for cells in rows), layout
    if shutil.which("pdflatex"):
        assert (tmp_path / "paper.pdf").read_bytes()[:4] == b"%PDF"


# -----------------------------------------------------------------------------
# The command


def test_comparison_shows_what_differs(tmp_path):
    a = make_run(tmp_path / "a", [line(10), {"step": 10, "val_loss": 4.0}])
    last = {"step": 10, "val_loss": 3.5}
    b = make_run(tmp_path / "b", settings={"seed": 1, "lr": 2}, results={"last": last})
    blocks = Section(report.comparison([a, b]))
    assert blocks.table("settings") == [{"setting": "lr", "a": "", "b": 2}]
    assert blocks.table("last")[1]["minus a"] == "+0.2500"
    assert "repeat them with --seed=2" in blocks.words
    with pytest.raises(report.ConfigError, match="nowhere"):
        report.comparison([a, tmp_path / "nowhere"])


def test_comparison_tells_noise_by_runs_that_differ_in_their_seed(tmp_path):
    def run(name: str, loss: float, **settings) -> Path:
        return make_run(tmp_path / name, settings=settings, results={"last": {"step": 10, "val_loss": loss}})

    folders = [run("a1", 3.0, seed=1, lr=1, out="x", model="x/base")]
    folders += [run("a2", 3.2, seed=2, lr=1, out="y", model="y/base"), run("b", 3.5, seed=1, lr=2)]
    folders += [run("again", 3.0, seed=1, lr=1, out="z", model="z/base")]  # the first one's twin: no news
    blocks = Section(report.comparison(folders))
    assert "a standard deviation of 0.1414." in blocks.words  # 0.2 / sqrt(2)
    first, second = blocks.table("noise")
    assert first["runs"] == f"{tmp_path}/a1, {tmp_path}/a2" and first["mean of the last loss"] == "3.1000"
    assert second["minus the first"] == "+0.4000, 2.3 standard errors"  # 0.4 / (0.1414 sqrt(1 + 1/2))


def test_it_needs_no_torch_and_says_where_the_page_is(tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess:
        program = "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'report.py';"
        program += "runpy.run_path('report.py', run_name='__main__')"
        command = [sys.executable, "-c", program, *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    make_run(tmp_path / "base")
    done = run(f"--home={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "report" / "index.html"
    assert (tmp_path / "report" / "experiments.html").exists()
    run(f"--home={tmp_path}", f"--to={tmp_path}/some", "--only=lab,training")
    page = (tmp_path / "some" / "index.md").read_text()
    assert re.findall("^## .*", page, re.M) == ["## Training", "## The lab"]
    assert not (tmp_path / "some" / "paper").exists()
    missing = run("--home=nowhere")
    assert missing.returncode == 1 and missing.stderr.startswith("report.py: there is no folder nowhere")
    assert "there are findings, stages" in run(f"--home={tmp_path}", "--only=nothing").stderr
