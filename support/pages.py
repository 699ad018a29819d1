"""A page made of blocks, written as HTML, Markdown, LaTeX and CSV.

A section of a page is a list of blocks: Text, Code, Table or Figure. All formats are written from the same
blocks, so they cannot disagree. Needs matplotlib, but not torch.
"""

import base64
import csv
import html
import io
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

# -----------------------------------------------------------------------------
# Blocks


@dataclass
class Text:
    """A paragraph; may contain **bold**, `code` and [text](address)."""

    words: str


@dataclass
class Code:
    words: str


@dataclass
class Table:
    name: str  # of the CSV file
    columns: list[str]
    rows: list[list]
    caption: str = ""  # in the paper; default: the name
    folded: bool = False  # on the HTML page: hidden until clicked


@dataclass
class Figure:
    name: str  # of the PNG file
    caption: str
    png: bytes


Block = Text | Code | Table | Figure


def figure(name: str, caption: str, fig) -> Figure:
    """A matplotlib figure as a block: adds the common style, saves it as PNG and closes it."""
    for axes in fig.axes:
        if "tokens" in axes.get_xlabel():
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(lambda x, _: count(x) if x else "0")
        if not axes.images and axes.get_label() != "<colorbar>":
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=80, bbox_inches="tight")
    plt.close(fig)
    return Figure(name, caption, file.getvalue())


# -----------------------------------------------------------------------------
# Numbers and texts in a cell


def percent(x: dict | None) -> str:
    """72.3 [69.4, 75.0] of {"value": 0.723, ...}."""
    if not x or x.get("value") is None:
        return ""
    interval = f" [{100 * x['low']:.1f}, {100 * x['high']:.1f}]" if x.get("low") is not None else ""
    return f"{100 * x['value']:.1f}{interval}"


def signed(x: dict | None, scale: float = 100, digits: int = 1) -> str:
    """+1.2 [-0.3, +2.7], a difference: {"value" or "mean", "low", "high"} times `scale`."""
    if not x:
        return ""
    text = f"{scale * x.get('value', x.get('mean')):+.{digits}f}"
    if "low" in x:
        text += f" [{scale * x['low']:+.{digits}f}, {scale * x['high']:+.{digits}f}]"
    return text


def count(n: float) -> str:
    """0.87M, 3.3M, 512."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def shorten(text: str, most: int = 240) -> str:
    text = " ⏎ ".join(str(text).strip().split("\n"))
    return text if len(text) <= most else text[: most - 1] + "…"


def thinned(lines: list, most: int = 1000) -> list:
    """At most about `most` of the lines, evenly spaced: more points cannot be seen in a figure."""
    return lines[:: max(1, len(lines) // most)]


# -----------------------------------------------------------------------------
# HTML

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fdfdfb; --line: #d8d8d2; --soft: #f1f1ec }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e0; --paper: #17181a; --line: #3a3c40; --soft: #212327 } }
body { margin: 0 auto; max-width: 74rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
.wide { overflow-x: auto }
table { border-collapse: separate; border-spacing: 0; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  min-width: 3.5rem; max-width: 28rem; overflow-wrap: break-word }
thead th { background: var(--soft) }
summary { cursor: pointer; margin: .6rem 0 }
figure { margin: 1.2rem 0 }
img { max-width: 100%; background: white; border-radius: 4px }
figcaption { font-size: .86rem; opacity: .8; position: sticky; left: 0 }
@media (max-width: 45rem) {  /* phones: wide tables scroll, the first column stays */
  figure { overflow-x: auto }
  img { max-width: 42rem }
  td { max-width: 14rem }
  td:first-child, th:first-child { position: sticky; left: 0; max-width: 8rem }
  td:first-child { background: var(--paper) } }
small { white-space: nowrap; opacity: .8 }
pre { background: var(--soft); padding: .6rem; overflow-x: auto; font-size: .82rem }
"""
LINK = re.compile(r"\[([^][]+)\]\(((?:https?://|figures/|[\w-]+\.(?:html|md)\b)[^()\s\"'<>]*)\)")


def html_text(text: str) -> str:
    """The words of a paragraph as HTML; all other markup is escaped."""
    parts = html.escape(text).split("**")
    parts = [f"<b>{p}</b>" if i % 2 and i < len(parts) - 1 else p for i, p in enumerate(parts)]
    codes = LINK.sub(r"<a href='\2'>\1</a>", "".join(parts)).split("`")
    return "".join(f"<code>{c}</code>" if i % 2 else c for i, c in enumerate(codes))


def html_table(table: Table) -> list[str]:
    def cell(x) -> str:
        """A cell; an interval goes below its number, to keep tables narrow."""
        interval = r"^(\S+) (\[[^][]+\])(?: (\([^()]+\)))?$"
        return re.sub(interval, r"\1<br><small>\2</small> \3", html.escape(str(x)))

    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in table.columns)
    out = [f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>"]
    for row in table.rows:
        out.append("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>")
    out.append("</tbody></table></div>")
    if table.folded:
        return [f"<details><summary>{len(table.rows)} rows</summary>", *out, "</details>"]
    return out


def as_html(title: str, sections: dict[str, list[Block]]) -> str:
    """The HTML page. All texts are escaped: generated text cannot become markup."""
    out = ["<!doctype html><html lang=en><meta charset=utf-8>"]
    out.append("<meta name=viewport content='width=device-width, initial-scale=1'>")
    out.append(f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>")
    for heading, blocks in sections.items():
        out.append(f"<h2>{html.escape(heading)}</h2>")
        for block in blocks:
            if isinstance(block, Text):
                out.append(f"<p>{html_text(block.words)}</p>")
            elif isinstance(block, Code):
                out.append(f"<pre>{html.escape(block.words)}</pre>")
            elif isinstance(block, Table):
                out += html_table(block)
            else:
                data, caption = base64.b64encode(block.png).decode(), html.escape(block.caption, quote=True)
                out.append(f"<figure><img alt='{caption}' src='data:image/png;base64,{data}'>")
                out.append(f"<figcaption>{caption}</figcaption></figure>")
    return "\n".join(out) + "\n"


# -----------------------------------------------------------------------------
# Markdown and CSV


def as_markdown(title: str, sections: dict[str, list[Block]]) -> str:
    def cell(x) -> str:
        return html.escape(str(x), quote=False).replace("|", "\\|").replace("\n", " ")

    out = [f"# {title}", ""]
    for heading, blocks in sections.items():
        out += [f"## {heading}", ""]
        for block in blocks:
            if isinstance(block, Text):
                out += [block.words, ""]
            elif isinstance(block, Code):
                out += ["```", block.words, "```", ""]
            elif isinstance(block, Table):
                lines = [block.columns, ["---"] * len(block.columns), *block.rows]
                out += ["| " + " | ".join(cell(c) for c in line) + " |" for line in lines] + [""]
            else:
                caption = cell(block.caption)
                out += [f"![{caption}](figures/{block.name}.png)", "", f"*{caption}*", ""]
    return "\n".join(out)


def write(folder: Path, title: str, sections: dict[str, list[Block]], name: str = "index") -> Path:
    """NAME.html, NAME.md, the figures and the CSV files; returns the path of the HTML page."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for block in (b for blocks in sections.values() for b in blocks):
        if isinstance(block, Figure):
            (folder / "figures" / f"{block.name}.png").write_bytes(block.png)
        elif isinstance(block, Table):
            with open(folder / f"{block.name}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([block.columns, *block.rows])
    (folder / f"{name}.md").write_text(as_markdown(title, sections), encoding="utf-8")
    (folder / f"{name}.html").write_text(as_html(title, sections), encoding="utf-8")
    return folder / f"{name}.html"


# -----------------------------------------------------------------------------
# LaTeX: an article similar to ACL's style, with only the packages and fonts of texlive-latex-base (no Times)

PREAMBLE = r"""
\documentclass[11pt,a4paper,twocolumn]{article}
\usepackage[utf8]{inputenc}
\usepackage{graphicx}
\usepackage{array,longtable}
\usepackage[margin=2.5cm]{geometry}
\setlength\columnsep{0.6cm}
\setlength\tabcolsep{4pt}
\setlength\LTcapwidth{\textwidth}
\sloppy
\makeatletter
\renewcommand\section{\@startsection{section}{1}{\z@}{-2ex plus -.5ex minus -.2ex}{1.5ex plus .3ex
  minus .2ex}{\large\bfseries\raggedright}}
\renewenvironment{abstract}{\centerline{\large\bfseries Abstract}\begin{list}{}{\setlength\leftmargin{.6cm}
  \setlength\rightmargin{.6cm}}\item\small\ignorespaces}{\end{list}}
\makeatother
""".strip()
LONG = 30  # a table with more rows goes to the end of the paper and may span pages
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "⏎": "/", "␣": " "}
SPECIAL |= {"…": r"\dots{}", "±": r"$\pm$", "×": r"$\times$"} | {c: "\\" + c for c in "&%$#_{}"}


def latex_text(text) -> str:
    """Escapes LaTeX's special characters; removes bold and code marks and the addresses of links."""
    text = LINK.sub(r"\1", str(text)).replace("**", "").replace("`", "")
    known = "".join(c if c in SPECIAL or c.isascii() or c.isalpha() and ord(c) < 256 else "?" for c in text)
    return "".join(SPECIAL.get(c, c) for c in known)


def latex_columns(table: Table, total: float, character: float) -> tuple[str, bool]:
    """Column types for a table of at most `total` cm, and whether every column got its full width.

    `character`: cm per character. Columns narrower than an equal share keep their width; the others share the
    rest and wrap their lines.
    """
    wants, words = [], []
    for i in range(len(table.columns)):
        cells = [str(row[i]) for row in [table.columns, *table.rows]]
        wants.append(character * max(len(cell) for cell in cells))
        words.append(character * max(len(word) for cell in cells for word in cell.split() or [""]))
    left, widths = total - 0.3 * len(wants), {}
    for n, i in enumerate(sorted(range(len(wants)), key=lambda i: wants[i])):
        share = max(words[i], left / (len(wants) - n))
        widths[i] = min(wants[i], share)
        left -= widths[i]
    fits = all(widths[i] == want for i, want in enumerate(wants))
    kinds = []
    for i, want in enumerate(wants):
        kinds.append("l" if widths[i] == want else rf">{{\raggedright\arraybackslash}}p{{{widths[i]:.2f}cm}}")
    return "".join(kinds), fits


def without_empty_columns(table: Table) -> Table:
    kept = [i for i in range(len(table.columns)) if any(str(row[i]) for row in table.rows)]
    rows = [[row[i] for i in kept] for row in table.rows]
    return replace(table, columns=[table.columns[i] for i in kept], rows=rows)


def latex_table(table: Table) -> list[str]:
    """A float in one or both columns of the page, or a longtable that may span pages."""
    table = without_empty_columns(table)
    caption = rf"\caption{{{latex_text(table.caption or table.name)}}}"
    head, *lines = [" & ".join(map(latex_text, row)) + r" \\" for row in [table.columns, *table.rows]]
    if len(table.rows) > LONG:
        layout, _ = latex_columns(table, 16, 0.14)
        out = [r"\scriptsize", rf"\begin{{longtable}}{{{layout}}}", caption + r" \\"]
        return [*out, r"\hline", head, r"\hline\endhead", *lines, r"\hline", r"\end{longtable}"]
    layout, narrow = latex_columns(table, 7.7, 0.18)
    if not narrow:
        layout, _ = latex_columns(table, 16, 0.15)
    kind, size = ("table", "footnotesize") if narrow else ("table*", "scriptsize")
    out = [rf"\begin{{{kind}}}[t]\centering\{size}"]
    out += [rf"\begin{{tabular}}{{{layout}}}", r"\hline", head, r"\hline", *lines, r"\hline"]
    return [*out, r"\end{tabular}", caption, rf"\end{{{kind}}}"]


def latex_figure(block: Figure) -> list[str]:
    width, height = struct.unpack(">II", block.png[16:24])  # from the PNG header
    kind = "figure*" if width > 2 * height else "figure"
    picture = rf"\includegraphics[width=\linewidth]{{../figures/{block.name}.png}}"
    return [rf"\begin{{{kind}}}[t]\centering", picture, rf"\caption{{{latex_text(block.caption)}}}",
            rf"\end{{{kind}}}"]  # fmt: skip


def as_latex(title: str, sections: dict[str, list[Block]]) -> str:
    """The article. The section "Abstract" becomes the abstract; "References" gets no number."""
    out = [PREAMBLE, rf"\title{{\Large\bfseries {latex_text(title)}}}", r"\author{}", r"\date{}"]
    out += [r"\begin{document}", r"\maketitle"]
    late = []  # tables that are too long for a column
    for heading, blocks in sections.items():
        if heading == "Abstract":
            words = [latex_text(b.words) for b in blocks if isinstance(b, Text)]
            out += [r"\begin{abstract}", *words, r"\end{abstract}"]
            continue
        out += ["", rf"\section{'*' * (heading == 'References')}{{{latex_text(heading)}}}"]
        for block in blocks:
            if heading == "References":
                out += ["", r"\noindent\hangindent=1em " + latex_text(block.words)]
            elif isinstance(block, Text | Code):
                out += ["", latex_text(block.words), ""]
            elif isinstance(block, Table) and len(block.rows) > LONG:
                late += latex_table(block)
                out += ["", "The table is at the end.", ""]
            elif isinstance(block, Table):
                out += latex_table(block)
            else:
                out += latex_figure(block)
    out += [r"\clearpage\onecolumn", *late] if late else []
    return "\n".join([*out, r"\end{document}"]) + "\n"
