"""A draft of a paper in Markdown and LaTeX: the text of lab/paper.md with the report's blocks.

Every number comes from the JSON files of the runs, as in the report; the draft says what was not run. Smoke
runs are marked in tables and left out of sentences.
"""

import shutil
import subprocess
from pathlib import Path

from lab.log import task_findings
from support.pages import Block, Figure, Sections, Table, Text, as_latex, as_markdown, blocks_of, say
from support.results import Records, Run

TITLE = "The whole life of a small language model"
MODEL = """
{run.shown} has {parameters:count} parameters and read {step:,} batches ({seconds:minutes} minutes on \
{hardware[device]}).
"""
DATA = "{run.shown} read {data[source]} ({data[licence]}), {data[tokens]:count} tokens."


def paper(records: Records, made: Sections) -> Sections:
    """The sections of the draft. `made`: the sections of the report, whose blocks it uses."""
    bases = [run for run in records.runs if run.stage == "train"]
    tables = {table.name: [table] for table in blocks_of(made, Table)}
    none = [Text("No difference between a base and what was trained from it was measured.")]
    parts = {  # of lab/paper.md
        "abstract": records.each([records], abstract),
        "models": records.each(bases, lambda run: about(run, MODEL))
        or [Text("Pretraining: not run.")] * (not bases),
        "data": records.each(bases, lambda run: about(run, DATA)) or [Text("Not run.")],
        "training": first(made["Training"], 1, 1),
        "tasks": (task_findings(records) or none) + tables.get("side-by-side", []),
        "life": made["What each stage gained"],
        "choosing": first(made["Choosing among many answers"], 1, 1),
        "attention": first(made["What the heads look at"], 0, 2),
        "ablations": tables.get("findings", []) + first(made["The lab"], 1, 1),
        "errors": first(made["Where it fails"], 1, 0),
        "versions": records.each(records.runs[:1], lambda run: about(run, "Versions: {run.versions}.")),
        "results": tables.get("results", [Text("Not run.")]),
    }
    sections: Sections = {}
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    for paragraph in text.strip().split("\n\n"):
        if paragraph.startswith("## "):
            blocks = sections[paragraph[3:]] = []
        elif paragraph.startswith("$"):
            blocks += parts[paragraph[1:]]
        else:
            blocks.append(Text(" ".join(paragraph.split())))
    return sections


def about(run: Run, template: str) -> list[Block]:
    """A paragraph, if the record of the run has what the template names."""
    return say(template, **run.record, run=run)


def first(blocks: list[Block], tables: int, figures: int) -> list[Block]:
    """The first tables and figures of a section; its first sentence if it has none."""
    found = [block for block in blocks if isinstance(block, Table)][:tables]
    found += [block for block in blocks if isinstance(block, Figure)][:figures]
    return found or blocks[:1]


def abstract(records: Records) -> list[Block]:
    """The abstract, with numbers from the tables."""
    words = [Text("We follow a small language model through its whole life on consumer hardware.")]
    base = next((run for run in records.runs if run.stage == "train" and not run.smoke), None)
    if base:
        words += say("The base has {parameters:count} parameters.", **base.record)
        words += say("It reaches {bits_per_byte:.3f} bits a byte of its own validation text.", **base.last)
    solvers = [m for m in records.measurements if m.sampled and not m.smoke]
    for m in solvers:
        words += say("{m.run.name} solves {m.values[exact_match]} % of {m.task}'s problems greedily.", m=m)
        for way, value in m.values.items():
            if ", best of" in way:
                words += say("With the {way} answers it solves {value} %.", way=way, value=value)
    if not solvers:
        words.append(Text("Alignment: not run."))
    return [Text(" ".join(block.words for block in words))]


def write_paper(folder: Path, records: Records, made: Sections) -> None:
    """Writes paper.md and paper.tex, and paper.pdf if pdflatex is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = paper(records, made)
    markdown = as_markdown(TITLE, sections).replace("](figures/", "](../figures/")
    (folder / "paper.md").write_text(markdown, encoding="utf-8")
    (folder / "paper.tex").write_text(as_latex(TITLE, sections), encoding="utf-8")
    if not shutil.which("pdflatex"):
        return
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    for _ in range(2):  # longtable takes its column widths from the previous run
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        print(f"{folder}/paper.tex: pdflatex failed:\n" + "\n".join(done.stdout.splitlines()[-15:]))
    for suffix in ("aux", "log", "out"):
        (folder / f"paper.{suffix}").unlink(missing_ok=True)
