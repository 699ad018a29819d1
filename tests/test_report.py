"""The report: what it shows is what the files say, whatever state they are in."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import lab.pages  # noqa: F401  before a test replaces what it imports
import report
from lab.log import log
from lab.paper import paper, write_paper
from support.observations import observations
from support.pages import Figure, Table, Text, as_html, as_latex, as_markdown, write
from support.results import SMOKE, Records

ROOT = Path(report.__file__).parent
SHARE = {"value": 0.723, "low": 0.694, "high": 0.75, "n": 1000}

# -----------------------------------------------------------------------------
# Folders as the stages write them, and what the report makes of them


def page(records: Records, only: str = "") -> str:
    """The report as Markdown, and the log."""
    sections = report.sections_of(records, only)
    return as_markdown("t", sections) + as_markdown("t", log(records, sections))


@pytest.fixture
def undrawn(monkeypatch):
    """Figures without pictures: drawing takes most of the time."""
    for module in ("support.curves", "lab.pages", "report"):
        monkeypatch.setattr(f"{module}.canvas", lambda n, *_, **__: (MagicMock(), [MagicMock()] * n))
    for module in ("support.charts", "lab.pages"):
        monkeypatch.setattr(f"{module}.saved", lambda name, caption, fig: Figure(name, caption, b""))


def write_json(file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(x) + "\n" for x in rows))


# fmt: off
def line(step: int, **more) -> dict:
    return {"step": step, "loss": 5 - step / 100, "tokens": 512 * step, "tokens_per_second": 1000.0 + step,
            "seconds": float(step), "peak_memory_gib": 0.5} | more


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
    entry = {"task": task, "split": split, "shots": shots, "items": n, "metrics": {"accuracy": share}} | more
    name, file = f"{task} {split} {shots}-shot", folder / "results.json"
    before = json.loads(file.read_text())["results"] if file.exists() else {}
    write_json(file, {"results": before | {name: entry}})
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
    said = {"asked": "Say <b>", "meant": "<b>", "said": "<script>alert(1)</script>", "correct": False}
    write_json(home / "pipeline.json", {"battery": {"out/child": [said]}})
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
        lines = [line(10 * i) for i in range(1, 4)]
        make_run(folder / f"{name}-s{seed}", lines, settings=settings, wandb={"id": f"{name}{seed}"})
    write_json(folder / "experiments.json", found)
    return home


FAMILIES = {  # what the families of the lab measure beside the losses
    "gqa": {"kv_heads_1": {"cache_bytes_per_token": 1024, "tokens_per_second": 18044.4}},
    "streams": {"baseline": {
        "perplexity": {"full": {"0-1": 5.0, "1-2": 50.0}},
        "continuations": {"window, first 4 kept": {"distinct_2": 0.91, "example": "the end"}},
        "endless": {"tokens": 5000, "cache_bytes": [524288] * 2, "tokens_per_second": [1383.0, 1430.0]}}},
    "scaling": {
        "points": [{"budget": 1e12, "parameters": 1e5, "tokens": 1.7e6, "loss": 5.0}],
        "law": {"E": 0.5, "A": 40.0, "B": 300.0, "a": 0.35, "b": 0.4, "error": 0.012},
        "check": {"flops": 6e16, "said": {"parameters": 3e7, "tokens": 4e8, "loss": 1.2345},
                  "came": {"parameters": 3e7, "tokens": 4e8, "loss": 1.3}}},
    "transfer": {"sentiment": {"scratch, tuned": {"mean": 66.7, "low": 60.1, "high": 70.2}}},
}


def solved(folder: Path, right: list[bool], **more) -> None:
    """Answers to problems, and what choosing among many adds."""
    records = [{"text": f"p{i}", "target": "t", "output": f"{folder.name} {i}", "correct": ok,
                "kinds": [] if ok else ["plan"]} for i, ok in enumerate(right)]
    curves = {"majority": {"1": SHARE, "2": SHARE}, "pass": {"1": {"value": 0.7}, "2": {"value": 0.8}}}
    gap = {"value": 0.012, "low": -0.003, "high": 0.027}
    measured(make_run(folder, **more), "arithmetic", records, curves=curves, metrics={"exact_match": SHARE},
             differences={"majority - greedy": gap}, samples=16,
             gating={"verifier": [{"threshold": 0.5, "samples": 2.24, "right": SHARE}]})


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """One folder with all that a report shows."""
    home = lab_of(life(tmp_path_factory.mktemp("home")))
    solved(home / "sft", [False, False, True], stage="sft", started="2026-02-01")
    solved(home / "dpo", [False, True, True], parent="out/sft", started="2026-02-02")
    measured(make_run(home / "rev"), "sst2", [
        {"text": f"r{i}", "target": "good", "prediction": said, "correct": said == "good",
         "kinds": ["other"] if i else ["negation", "short"]}
        for i, said in enumerate(["bad", "bad", "good"])], "validation")
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
    made = make_run(home / "made", [line(10), line(50), {"step": 50, "val_loss": 3.5}, line(100)],
                    settings={"seed": 1, "learning_rate": 0.003, "corpus": "", "hypothesis": "Muon wins."},
                    changed=["learning_rate", "corpus"], data={"corpus": {"train": about}},
                    wandb={"id": "abc12345", "url": "https://wandb.ai/me/lm/runs/abc12345"})
    write_lines(made / "samples.jsonl", [{"step": 100 * i, "prompt": prompt, "text": f"{prompt} {100 * i}"}
                                         for i in range(1, 10) for prompt in ("", "a")])
    heads = [{"most": "first", "layer": 0, "head": 1, "weights": [[1.0, 0.0], [0.5, 0.5]]}]
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

EXPECTED = """
**mood** on sentiment, test: +50.0 [+20.0, +80.0] points over the base
| storyworld, ablations | muon, 0.3750 | muon -0.1250 at 0.50 times the speed
**arithmetic, test**: take sft (instruction-tuned), 72.3 [69.4, 75.0].
| child (SMOKE RUN, no result) |  |  |  | 0.0 [0.0, 79.3] |
| sentiment | test | base | 4 | prompted, 4 examples | accuracy | 33.3 [32.3, 34.3] | 9 |
| sentiment | test | base, step 500 | 0 | base | accuracy | 0.0 [-1.0, 1.0] | 10 |
| sentiment | test | google/flan-t5-small | 0 | base | accuracy | 100.0 [99.0, 101.0] | 10 |
| sentiment | validation | mood | 0 | fine-tuned | accuracy | 72.3 [69.4, 75.0] | 50 |
| storyworld | test | base | 0 | base | bits/byte | 0.625 [0.500, 0.750] | 99 | a sample of 70 |
| all | 3.0 | 2.2 |
| made | train | 870k | finished | 3.2500 at 100 | 3.2500 at 100 | 51.2k | 2.7e+11 | 5.1 | 1,050 | 0.50 |
| a | a 100 | a 300 | a 500 | a 700 | a 900 |
| majority - greedy | +1.2 [-0.3, +2.7] |
| 0.5 | 2.2 | 72.3 [69.4, 75.0] |
| channel | 0.810 | 0.770 | 72.3 [69.4, 75.0] |
| -2.0 | q | y | n |
| none of these | 2 | 1 | 33.3 [6.1, 79.2] | r1 | bad | good |
| another wrong step, or one too many | 2 | 2 | 66.7 [20.8, 93.9] | p0 | sft 0 | t |
Of repeated digits in lists, 50% are copied
| muon | h 0.375 | 0.3750 | -0.1250 [-0.1562, -0.0938] |  | 500 | better |
| kv_heads_1 | 1024 | 18,044 |
Loss = 0.500 + 40 / N^0.35
| one more run, measured | 6.00e+16 | 30M | 400M | 1.300 |
| sentiment | 66.7 [60.1, 70.2] |
Settings other than the defaults: `learning_rate=0.003`
| made | train | stories | MIT | 1,234 | 0123456789ab |
| muon | lab, storyworld | 2026-01-01 | 0.7500 | 4.8000 | 500 | -0.1250 [-0.1562, -0.0938] bits/byte
**Hypothesis**: Muon wins.
[https://wandb.ai/me/lm/runs/abc12345](https://wandb.ai/me/lm/runs/abc12345)
**Change**: `python train.py x.py`
"""


def test_the_page_and_the_log_say_what_the_files_say(everything, undrawn):
    records = Records(everything)
    text = page(records)
    for wanted in EXPECTED.strip().splitlines():
        assert wanted in text, wanted
    assert "child" not in page(records, "findings").partition("## All runs")[0], "a smoke run is no finding"
    assert [x[:5] for x in records.damaged[:1]] == ["torn:"]


def test_a_model_that_learnt_from_nothing_stands_beside_one_that_was_pretrained(tmp_path):
    for base, rate, right in (("pretrained", 1e-3, [True] * 10), ("scratch", 0, [True, False] * 5)):
        name, settings = f"experiments/storyworld/{base}", {"out": "out", "learning_rate": rate}
        make_run(tmp_path / f"{name}-s1", settings=settings)
        tuned = make_run(tmp_path / f"{name}-mood-s1", stage="finetune", task="sentiment", smoke=True,
                         settings=settings, parent=f"out/{name}-s1")  # fmt: skip
        measured(tuned, "sentiment", right)
    found = page(Records(tmp_path), "results")
    assert "| 100.0 [99.0, 101.0] (10 items) | 50.0 [49.0, 51.0] (10 items) |  |  | +50.0 [" in found
    assert "SMOKE" not in found, "the lab caps its examples on purpose: only a quick lab is a smoke run"


def test_smoke_runs_are_marked_wherever_their_name_stands(tmp_path, undrawn):
    records = Records(life(tmp_path))
    for name in ("stages", "training", "samples", "making"):
        assert f"child ({SMOKE})" in page(records, name) and "base (SMOKE" not in page(records, name)
    quick = Records(lab_of(tmp_path / "lab", quick=True))
    assert "No findings yet" in page(quick, "findings")
    assert all("SMOKE RUN" in heading for heading in list(log(quick, {}))[2:])


def test_generated_text_cannot_become_markup(tmp_path):
    sections = report.sections_of(Records(life(tmp_path)), "samples")
    text = write(tmp_path / "report", "t", sections).read_text()
    assert "<script>" not in text and "&lt;script&gt;alert(1)" in text
    assert "<script>" not in (tmp_path / "report" / "index.md").read_text()
    links = [Text("[a](https://x.org/y) [b](figures/c.png) [c](javascript:alert(1)) <i>")]
    text = as_html("t", {"s": links})
    assert "<a href='https://x.org/y'>a</a> <a href='figures/c.png'>b</a>" in text
    assert "href='javascript" not in text and "&lt;i&gt;" in text


# -----------------------------------------------------------------------------
# Whatever state the files are in


def test_names_that_are_not_utf8_and_tables_without_a_filled_cell_are_written(tmp_path):
    name = "caf\udce9"  # as Python reads the bytes caf\xe9
    sections = {name: [Text(name), Table("t", [{"run": name}]), Table("empty", [{"run": ""}, {}])]}
    write(tmp_path, name, sections)
    assert "caf\N{REPLACEMENT CHARACTER}" in (tmp_path / "t.csv").read_text()
    latex = as_latex(name, sections)
    assert latex.encode().count(b"begin{longtable}") == 1


def test_an_empty_folder_gets_sentences_that_name_commands(tmp_path):
    records = Records(tmp_path)
    sections = report.sections_of(records)
    assert all(len(blocks) == 1 and isinstance(blocks[0], Text) for blocks in sections.values())
    text = write(tmp_path / "report", "t", sections).read_text()
    assert "bash run_all.sh cpu" in text and "<img" not in text
    text = as_markdown("t", paper(records, sections))
    assert "Alignment: not run." in text and "Pretraining: not run." in text


@pytest.mark.parametrize("what", ["", "{", "[1, 2]", "\x00\xff"])
def test_broken_files_break_nothing(what, tmp_path):
    names = "base/run.json base/metrics.jsonl base/samples.jsonl base/results.json pipeline.json ledger.tsv"
    make_run(tmp_path / "base")
    for name in names.split():
        (tmp_path / name).write_text(what)
    assert all(report.sections_of(Records(tmp_path)).values())


def test_a_record_of_the_wrong_types_costs_itself_and_a_line(tmp_path, undrawn):
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    measured(good, "sentiment", [True])
    measured(bad, "sentiment", [True], metrics={"accuracy": {"value": "much"}})
    write_lines(bad / "metrics.jsonl", [line(1), line(2, loss="nan"), line(3, tokens=[1])])
    text = page(Records(tmp_path))
    assert "| sentiment | test | good |" in text and "| sentiment | test | bad |" not in text
    assert "curves-bad" in text and "curves-good" in text
    assert "bad/results.json, sentiment test 0-shot" in text and "bad/metrics.jsonl: 2 lines" in text


@pytest.mark.parametrize("seed", range(8))
def test_json_of_any_types_never_ends_in_a_traceback(seed, everything, tmp_path, undrawn):
    """In every file some value becomes one of another type."""
    home, rng = tmp_path / "home", random.Random(seed)
    shutil.copytree(everything, home)
    files = [*home.glob("*/*.json*"), *home.glob("*/*/*.json*"), home / "pipeline.json"]
    for file in sorted(file for file in files if file.stat().st_size):
        lines = at = [json.loads(text) for text in file.read_text().splitlines()]
        key = rng.randrange(len(lines))
        while isinstance(at[key], dict | list) and at[key] and rng.random() < 0.9:
            at = at[key]
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        at[key] = rng.choice(["text", [1], {"a": 1}, None, -1, 10**400, True])
        write_lines(file, lines)
    records = Records(home)
    sections = report.sections_of(records)
    assert all(sections.values()) and log(records, {}) and paper(records, sections)
    assert "What could not be read" in sections


def test_a_run_that_is_still_going_is_shown_as_far_as_it_got(tmp_path, undrawn):
    """Also before its first evaluation, and after a step whose loss was not finite."""
    a = make_run(tmp_path / "a", [line(10), line(20)], status="running", results={})
    with open(a / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    b = make_run(tmp_path / "b", [{"step": 5, "val_loss": 3.0}, {"step": 30, "skipped": 1}], results=None)
    text = page(Records(tmp_path))
    assert "| a | train | 870k | running |  |  | 10.2k |" in text and "| b | train | 870k |" in text
    assert "curves-a" in text and "curves-b" not in text and report.comparison([a, b])


# -----------------------------------------------------------------------------
# The log and the paper


def test_observations_are_what_the_curves_say():
    def said(losses, *checks) -> str:
        lines = [line(10 * i, loss=x) for i, x in enumerate(losses)]
        sentences, todo = observations(lines + [{"step": s, "val_loss": x} for s, x in checks])
        return " ".join(sentences + todo)

    falling = [5 - i / 10 for i in range(30)]
    assert "still falling: by 14.3 % since step 150" in said(falling, (100, 4.0), (150, 3.5), (200, 3.0))
    text = said(falling, (50, 4.0), (100, 3.0), (150, 3.2), (200, 3.4))
    assert "lowest at step 100 (3.0000) and rose to 3.4000" in text and "dropout" in text
    assert "flat since step 150" in said(falling, (50, 4.0), (100, 3.0), (150, 3.0), (200, 2.99))
    assert "1 spike" in said([x + 2 * (i == 20) for i, x in enumerate(falling)])
    assert "Too short" in said([5.0])
    assert "3 steps were skipped" in observations([line(1, skipped=3)])[0][-1]


def numbers_of(value) -> set[float]:
    """Every number in some JSON, also those in its texts."""
    return {float(x) for x in re.findall(r"\d+(?:\.\d+)?", json.dumps(value))}


def test_the_papers_text_holds_only_what_the_json_says(everything, undrawn):
    records = Records(everything)
    sections = paper(records, report.sections_of(records))
    known = {95.0} | set().union(*(numbers_of(json.loads(f.read_text())) for f in everything.rglob("*.json")))
    for c in records.comparisons:  # differences are computed from the answers
        known |= numbers_of(c.gaps)
    shares = {abs(x) * scale for x in known for scale in (1, 100, 1e-3, 1e-6, 1 / 60)}
    blocks = [b for heading in sections if heading != "References" for b in sections[heading]]
    text = " ".join(b.words for b in blocks if isinstance(b, Text))
    text = re.sub(r"\([^()]*\b(?:19|20)\d\d\b[^()]*\)", "", text)  # citations
    for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text):
        digits, value = len(number.partition(".")[2]), float(number.replace(",", ""))
        assert any(abs(value - x) <= 0.5001 * 10**-digits for x in shares), f"{number} in: {text}"
    assert "sft solves 72.3 [69.4, 75.0] % of" in text
    assert {"Abstract", "Method", "Results on tasks", "Attention"} <= set(sections)


def test_the_paper_is_valid_latex(everything, tmp_path):
    words = Text("100 % of a_b & **c** {d} # ~ ^ \\\\ <x> | é ⏎ 漢 $ [a](https://x.org)")
    text = as_latex("A & B", {"Abstract": [words], "R_1": [Table("t", [{"a": "&", "empty": "", "b": "x"}])]})
    assert r"100 \% of a\_b \& c \{d\} \# " in text and "漢" not in text and "x.org" not in text
    assert "empty" not in text and r"\bfseries A \& B}" in text
    records = Records(everything)
    sections = report.sections_of(records)
    write(tmp_path, "figures", sections)
    write_paper(tmp_path / "paper", records, sections)
    assert [x[:5] for x in records.damaged] == ["torn:"], "every figure can be drawn"
    text = (tmp_path / "paper/paper.tex").read_text()
    for kind in set(re.findall(r"\\begin\{(\w+\*?)\}", text)):
        assert text.count(rf"\begin{{{kind}}}") == text.count(rf"\end{{{kind}}}")
    for layout, lines in re.findall(r"\\begin\{longtable\}\{([^\n]*)\}\n(.*?)\\end\{", text, re.S):
        rows = re.findall(r"^(?!\\caption)(.*) \\\\$", lines, re.M)
        assert rows and all(len(re.findall(r"(?<!\\)&", x)) == layout.count("p{") - 1 for x in rows), layout
    if shutil.which("pdflatex"):
        assert (tmp_path / "paper/paper.pdf").read_bytes()[:4] == b"%PDF"


# -----------------------------------------------------------------------------
# The command


def test_comparison_shows_what_differs_and_what_is_noise(tmp_path, undrawn):
    def run(name: str, loss: float, **settings) -> Path:
        return make_run(tmp_path / name, settings=settings, results={"last": {"step": 10, "val_loss": loss}})

    a, b = run("a1", 3.0, seed=1, lr=1, out="x", model="x/base"), run("b", 3.5, seed=1, lr=2)
    text = as_markdown("t", {"t": report.comparison([a, b])})
    assert "| lr | 1 | 2 |" in text and "| 3.5000 | 3.5000 |  | +0.5000 |" in text and "--seed=2" in text
    twin = run("again", 3.0, seed=1, lr=1, out="z", model="z/base")  # the first one's twin: no news
    other = run("a2", 3.2, seed=2, lr=1, out="y", model="y/base")
    text = as_markdown("t", {"t": report.comparison([a, b, twin, other])})
    assert f"| {a}, {other} | 3.0000, 3.2000 | 3.1000 | 0.1414 | +0.0000 |" in text
    torn = make_run(tmp_path / "torn", results={"last": [1]})
    for folder in (tmp_path / "nowhere", torn):
        with pytest.raises(report.ConfigError, match=folder.name):
            report.comparison([a, folder])


def test_it_needs_no_torch_and_says_where_the_page_is(tmp_path):
    def run(*flags: str) -> subprocess.CompletedProcess:
        program = "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'report.py';"
        program += "runpy.run_path('report.py', run_name='__main__')"
        command = [sys.executable, "-c", program, *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    make_run(tmp_path / "base")
    done = run(f"--home={tmp_path}")
    assert Path(done.stdout.strip()) == tmp_path / "report" / "index.html"
    assert (tmp_path / "report" / "experiments.html").exists()
    run(f"--home={tmp_path}", f"--to={tmp_path}/some", "--only=lab,training")
    text = (tmp_path / "some" / "index.md").read_text()
    assert re.findall("^## .*", text, re.M) == ["## Training", "## The lab"]
    missing = run("--home=nowhere")
    assert missing.returncode == 1 and missing.stderr.startswith("report.py: there is no folder nowhere")
    assert "there are findings, stages" in run(f"--home={tmp_path}", "--only=nothing").stderr
