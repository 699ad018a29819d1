"""A draft of a paper from the report's blocks, in Markdown and LaTeX.

Every number comes from the JSON files of the runs, as in the report; the draft says what was not run. Smoke
runs are marked in tables and left out of sentences.
"""

import shutil
import subprocess
from pathlib import Path

from lab.log import sampling_findings, task_findings
from support.pages import Block, Figure, Table, Text, as_latex, as_markdown, count, minutes, percent
from support.results import is_smoke, measurements, read_json, run_folders, shown_name, side_by_side

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


def paragraph(words: str) -> Text:
    return Text(" ".join(words.split()))


def paper(home: Path, made: dict[str, list[Block]]) -> dict[str, list[Block]]:
    """The sections of the draft. `made`: the sections of the report, whose blocks it uses."""
    runs = {folder: read_json(folder / "run.json") for folder in run_folders(home)}
    trained = {folder: run for folder, run in runs.items() if run.get("stage") == "train"}
    tables = {block.name: block for blocks in made.values() for block in blocks if isinstance(block, Table)}
    versions = next((run.get("versions", {}) for run in runs.values()), {})
    used = ", ".join(f"{k} {v}" for k, v in versions.items())
    rows = side_by_side(measurements(home))
    on_tasks = [Text(sentence) for sentence in task_findings(rows)]
    on_tasks = on_tasks or [Text("No difference between a base and what was trained from it was measured.")]
    every = [tables["results"]] if "results" in tables else [Text("Not run.")]
    return {
        "Abstract": [Text(abstract(home, trained))],
        "Introduction": [paragraph(INTRODUCTION), Text(what_follows(runs))],
        "Related work": [paragraph(RELATED)],
        "Method": [paragraph(METHOD), Text(sizes(trained, home))],
        "Data": [Text(" ".join(data_of(trained, home)) or "Not run.")],
        "Training": first_blocks(made["Training"], 1, 1),
        "Results on tasks": [*on_tasks, *[tables[n] for n in ("side-by-side",) if n in tables]],
        "What each stage gained": made["What each stage gained"],
        "Choosing among many answers": choosing(home, made["Choosing among many answers"]),
        "Attention": heads(home, made["What the heads look at"]),
        "Ablations": [
            *([tables["findings"]] if "findings" in tables else []),
            *first_blocks(made["The lab"], 1, 1),
        ],
        "Errors": first_blocks(made["Where it fails"], 1, 0),
        "Limitations": [paragraph(LIMITATIONS)],
        "Reproducibility": [
            Text(f"Versions: {used or 'not run'}."),
            Text("Every run folder holds its command, settings, seed, commit and its data's fingerprint."),
        ],
        "References": [Text(reference) for reference in REFERENCES],
        "Appendix: every result": every,
    }


def first_blocks(blocks: list[Block], tables: int, figures: int) -> list[Block]:
    """The texts before the first table or figure, then the first `tables` tables and `figures` figures."""
    found: list[Block] = []
    for block in blocks:
        some = [b for b in found if isinstance(b, type(block))]
        if isinstance(block, Text) and not any(isinstance(b, Table | Figure) for b in found):
            found.append(block)
        elif (
            isinstance(block, Table)
            and len(some) < tables
            or isinstance(block, Figure)
            and len(some) < figures
        ):
            found.append(block)
    return found


def abstract(home: Path, trained: dict[Path, dict]) -> str:
    """The abstract, with numbers from the tables."""
    words = ["We follow a small language model through its whole life on consumer hardware."]
    for folder, run in list(trained.items())[:1]:
        loss = (run.get("results") or {}).get("last", {}).get("bits_per_byte")
        reached = "" if loss is None else f" and reaches {loss:.3f} bits a byte of its own validation text"
        if not is_smoke(folder, home):
            words.append(f"The base has {count(run.get('parameters', 0))} parameters{reached}.")
    rows = [row for row in read_json(home / "pipeline.json").get("rows", []) if row.get("exact_match")]
    rows = [row for row in rows if row.get("task") == rows[0].get("task")]
    rows = [row for row in rows if not is_smoke(home / Path(row["model"]).name, home)]
    for row in rows:
        words.append(
            f"{Path(row['model']).name} solves {percent(row['exact_match'])} % of the problems greedily."
        )
    best = {k: x for k, x in (rows[-1] if rows else {}).items() if isinstance(x, dict) and ", best of" in k}
    for way, x in best.items():
        words.append(f"With the {way} answers it solves {percent(x)} %.")
    return " ".join(words if rows else [*words, "Alignment: not run."])


def what_follows(runs: dict[Path, dict]) -> str:
    names = {
        "train": "pretraining",
        "finetune": "fine-tuning",
        "sft": "instruction tuning",
        "dpo": "preferences",
    }
    names["verifier"] = "verification"
    done = dict.fromkeys(names[run["stage"]] for run in runs.values() if run.get("stage") in names)
    missing = [name for name in names.values() if name not in done]
    words = f"This draft reports {', '.join(done) or 'no stage'}."
    return words + (f" Not run: {', '.join(missing)}." if missing else "")


def sizes(trained: dict[Path, dict], home: Path) -> str:
    words = []
    for folder, run in trained.items():
        device = run.get("hardware", {}).get("device", "unknown")
        words.append(
            f"{shown_name(folder, home)} has {count(run.get('parameters', 0))} parameters and read "
            f"{run.get('step', 0):,} batches ({minutes(run.get('seconds', 0))} minutes on {device})."
        )
    return " ".join(words) or "Pretraining: not run."


def data_of(trained: dict[Path, dict], home: Path) -> list[str]:
    sentences = []
    for folder, run in trained.items():
        source = run.get("data")
        if isinstance(source, dict):
            about = (
                f"{source.get('source')} ({source.get('licence')}), {count(source.get('tokens', 0))} tokens"
            )
            sentences.append(f"{shown_name(folder, home)} read {about}.")
    return sentences


def choosing(home: Path, blocks: list[Block]) -> list[Block]:
    return [*(Text(sentence) for sentence in sampling_findings(home)), *first_blocks(blocks, 1, 1)]


def heads(home: Path, blocks: list[Block]) -> list[Block]:
    """The head with the highest value of each attention score, from attention.json of the runs."""
    sentences = []
    for folder in run_folders(home):
        scores = read_json(folder / "attention.json").get("scores")
        if not isinstance(scores, dict) or is_smoke(folder, home):
            continue
        tops = []
        for score, layers in scores.items():
            value, layer, head = max((v, i, j) for i, row in enumerate(layers) for j, v in enumerate(row))
            tops.append(f"{score}: layer {layer}, head {head} ({value:.2f})")
        sentences.append(Text(f"The heads of {folder.name} with the highest scores are {'; '.join(tops)}."))
    return [*sentences, *first_blocks(blocks, 0, 2)] if sentences else [Text("Attention: not run.")]


def write_paper(folder: Path, title: str, sections: dict[str, list[Block]]) -> None:
    """Writes paper.md and paper.tex, and paper.pdf if pdflatex is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown = as_markdown(title, sections).replace("](figures/", "](../figures/")
    (folder / "paper.md").write_text(markdown, encoding="utf-8")
    (folder / "paper.tex").write_text(as_latex(title, sections), encoding="utf-8")
    if not shutil.which("pdflatex"):
        return
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    pipe, errors = subprocess.PIPE, subprocess.STDOUT
    for _ in range(2):  # longtable takes its column widths from the previous run
        done = subprocess.run(command, cwd=folder, stdout=pipe, stderr=errors, text=True, errors="replace")
        if done.returncode:
            print(f"{folder}/paper.tex: pdflatex failed:\n" + "\n".join(done.stdout.splitlines()[-15:]))
            break
    for suffix in ("aux", "log", "out"):
        (folder / f"paper.{suffix}").unlink(missing_ok=True)
