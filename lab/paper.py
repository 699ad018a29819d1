"""A draft of a paper from the report's blocks, in Markdown and LaTeX.

Every number comes from the JSON files of the runs, as in the report; the draft says what was not run. Smoke
runs are marked in tables and left out of sentences.
"""

import shutil
import subprocess
from pathlib import Path

from lab.log import sampling_findings, task_findings
from support.pages import (
    Block,
    Figure,
    Sections,
    Table,
    Text,
    as_latex,
    as_markdown,
    blocks_of,
    fill,
    percent,
)
from support.results import Records, Run, read_json

TITLE = "The whole life of a small language model"
REFERENCES = (
    "Ainslie et al. (2023). GQA: training generalized multi-query transformer models. EMNLP.",
    "Clark et al. (2019). What does BERT look at? An analysis of BERT's attention. BlackboxNLP.",
    "Cobbe et al. (2021). Training verifiers to solve math word problems. arXiv:2110.14168.",
    "Eldan and Li (2023). TinyStories: how small can language models be and still speak coherent English? "
    "arXiv:2305.07759.",
    "Hoffmann et al. (2022). Training compute-optimal large language models. arXiv:2203.15556.",
    "Hu et al. (2022). LoRA: low-rank adaptation of large language models. ICLR.",
    "Jordan et al. (2024). Muon: an optimizer for hidden layers in neural networks.",
    "Min et al. (2022). Noisy channel language model prompting for few-shot text classification. ACL.",
    "Olsson et al. (2022). In-context learning and induction heads. Transformer Circuits.",
    "Ouyang et al. (2022). Training language models to follow instructions with human feedback. NeurIPS.",
    "Rafailov et al. (2023). Direct preference optimization. NeurIPS.",
    "Shazeer (2020). GLU variants improve transformer. arXiv:2002.05202.",
    "Su et al. (2021). RoFormer: enhanced transformer with rotary position embedding. arXiv:2104.09864.",
    "Touvron et al. (2023). LLaMA: open and efficient foundation language models. arXiv:2302.13971.",
    "Vaswani et al. (2017). Attention is all you need. NeurIPS.",
    "Wang et al. (2023). Self-consistency improves chain of thought reasoning. ICLR.",
    "Xiao et al. (2024). Efficient streaming language models with attention sinks. ICLR.",
    "Zhang and Sennrich (2019). Root mean square layer normalization. NeurIPS.",
)
INTRODUCTION = """
Language models are mostly studied at a scale that a reader cannot repeat. We follow a small one through its
whole life on hardware that people own: it is pretrained, tuned on tasks and on conversations, aligned with
preferences, and its answers are chosen by a verifier. Each stage is measured by one protocol, on the same
items for every model, with an interval beside each figure and paired differences between stages, so that a
reader sees what each stage adds and what it does not.
"""
RELATED = """
Decoders of the transformer (Vaswani et al., 2017) have converged on a few parts, as in LLaMA (Touvron et
al., 2023): normalization by the root mean square (Zhang and Sennrich, 2019), rotary positions (Su et al.,
2021), gated feed-forward layers (Shazeer, 2020), and grouped key-value heads (Ainslie et al., 2023). Very
small models write coherent text if the text is simple enough (Eldan and Li, 2023). Instructions and
preferences are learnt after pretraining (Ouyang et al., 2022; Rafailov et al., 2023), often with low-rank
updates (Hu et al., 2022). At test time, sampling many answers helps where one is chosen by a vote (Wang et
al., 2023) or by a verifier (Cobbe et al., 2021). What heads attend to was described for encoders (Clark et
al., 2019) and for decoders, where induction heads copy (Olsson et al., 2022).
"""
METHOD = """
Our decoder has the parts of LLaMA. It is pretrained, with Muon (Jordan et al., 2024) where a config says
so, instruction-tuned on answers alone, and aligned by DPO (Rafailov et al., 2023) on pairs of its own
answers. The verifier is a noisy channel (Min et al., 2022): the same model trained backwards, so that an
answer is scored by log p(answer | problem) + lambda log p(problem | answer). Texts longer than the context
are read with the first tokens kept (Xiao et al., 2024); sizes are compared at equal FLOPs (Hoffmann et al.,
2022).
"""
LIMITATIONS = """
The models are small, and the embedded tasks come from templates: what helps here may not help at a larger
scale or on text that people wrote. Intervals are over test items, and over seeds only where the lab
repeated a run.
"""


STAGES = {
    "train": "pretraining",
    "finetune": "fine-tuning",
    "sft": "instruction tuning",
    "dpo": "preferences",
    "verifier": "verification",
}
SIZE = (
    "{run.shown} has {parameters:count} parameters and read {step:,} batches ({seconds:minutes} minutes on "
    "{hardware[device]})."
)
DATA = "{run.shown} read {data[source]} ({data[licence]}), {data[tokens]:count} tokens."


def paper(records: Records, made: Sections) -> Sections:
    """The sections of the draft. `made`: the sections of the report, whose blocks it uses."""
    trained = [run for run in records.runs if run.stage == "train"]
    tables = {block.name: [block] for block in blocks_of(made, Table)}
    none = "No difference between a base and what was trained from it was measured."
    versions = records.runs[0].record.get("versions", {}) if records.runs else {}
    used = ", ".join(f"{library} {version}" for library, version in versions.items())
    choosing = first_blocks(made["Choosing among many answers"], 1, 1)
    return {
        "Abstract": [Text(abstract(records, trained))],
        "Introduction": texts(INTRODUCTION, what_follows(records)),
        "Related work": texts(RELATED),
        "Method": texts(METHOD, about(trained, SIZE) if trained else "Pretraining: not run."),
        "Data": texts(about(trained, DATA) or "Not run."),
        "Training": first_blocks(made["Training"], 1, 1),
        "Results on tasks": texts(*(task_findings(records) or [none])) + tables.get("side-by-side", []),
        "What each stage gained": made["What each stage gained"],
        "Choosing among many answers": texts(*sampling_findings(records)) + choosing,
        "Attention": heads(records, made["What the heads look at"]),
        "Ablations": tables.get("findings", []) + first_blocks(made["The lab"], 1, 1),
        "Errors": first_blocks(made["Where it fails"], 1, 0),
        "Limitations": texts(LIMITATIONS),
        "Reproducibility": texts(
            f"Versions: {used or 'not run'}.",
            "Every run folder holds its command, settings, seed, commit and its data's fingerprint.",
        ),
        "References": texts(*REFERENCES),
        "Appendix: every result": tables.get("results", texts("Not run.")),
    }


def texts(*paragraphs: str) -> list[Block]:
    return [Text(" ".join(words.split())) for words in paragraphs if words]


def about(runs: list[Run], template: str) -> str:
    """A sentence per run, where its record has what the template names."""
    return " ".join(filter(None, (fill(template, run.record | {"run": run}) for run in runs)))


def first_blocks(blocks: list[Block], tables: int, figures: int) -> list[Block]:
    """The texts before the first table or figure, then the first `tables` tables and `figures` figures."""
    kinds = [type(block) for block in blocks]
    begin = next((i for i, kind in enumerate(kinds) if kind in (Table, Figure)), len(blocks))
    found = [block for block in blocks[:begin] if isinstance(block, Text)]
    for kind, most in ((Table, tables), (Figure, figures)):
        found += [block for block in blocks if isinstance(block, kind)][:most]
    return found


def abstract(records: Records, trained: list[Run]) -> str:
    """The abstract, with numbers from the tables."""
    words = ["We follow a small language model through its whole life on consumer hardware."]
    if trained and not trained[0].smoke:
        words.append(fill("The base has {parameters:count} parameters.", trained[0].record))
        reached = "It reaches {bits_per_byte:.3f} bits a byte of its own validation text."
        words.append(fill(reached, trained[0].last))
    rows = [row for row in records.pipeline.get("rows", []) if row.get("exact_match")]
    rows = [row for row in rows if row.get("task") == rows[0].get("task")]
    rows = [row for row in rows if not records.run(row["model"]).smoke]
    for row in rows:
        name = records.run(row["model"]).name
        words.append(f"{name} solves {percent(row['exact_match'])} % of the problems greedily.")
    for way, metric in (rows[-1] if rows else {}).items():
        if ", best of" in way:
            words.append(f"With the {way} answers it solves {percent(metric)} %.")
    return " ".join(filter(None, words if rows else [*words, "Alignment: not run."]))


def what_follows(records: Records) -> str:
    done = [name for stage, name in STAGES.items() if any(run.stage == stage for run in records.runs)]
    missing = [name for name in STAGES.values() if name not in done]
    words = f"This draft reports {', '.join(done) or 'no stage'}."
    return words + (f" Not run: {', '.join(missing)}." if missing else "")


def heads(records: Records, blocks: list[Block]) -> list[Block]:
    """The head with the highest value of each attention score, from attention.json of the runs."""
    sentences = []
    for run in records.runs:
        scores = {} if run.smoke else read_json(run.folder / "attention.json").get("scores") or {}
        tops = []
        for score, layers in scores.items():
            value, layer, head = max((v, i, j) for i, row in enumerate(layers) for j, v in enumerate(row))
            tops.append(f"{score}: layer {layer}, head {head} ({value:.2f})")
        if tops:
            sentences.append(f"The heads of {run.name} with the highest scores are {'; '.join(tops)}.")
    return texts(*sentences) + first_blocks(blocks, 0, 2) if sentences else texts("Attention: not run.")


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
            break
    for suffix in ("aux", "log", "out"):
        (folder / f"paper.{suffix}").unlink(missing_ok=True)
