"""A page made of blocks, written as HTML, Markdown, LaTeX and CSV.

A section of a page is a list of blocks: Text, Table or Figure. All formats are written from the same
blocks, so they cannot disagree. The pages' frames are support/page.html and support/paper.tex.
"""

import base64
import csv
import html
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Formatter, Template

# -----------------------------------------------------------------------------
# Blocks


@dataclass
class Text:
    """A paragraph; may contain **bold**, `code` and [text](address)."""

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


Block = Text | Table | Figure
Sections = dict[str, list[Block]]  # {heading: blocks}


def blocks_of(sections: Sections, kind: type) -> Iterable:
    """All blocks of one kind."""
    for blocks in sections.values():
        yield from (block for block in blocks if isinstance(block, kind))


# -----------------------------------------------------------------------------
# Rows and sentences from templates


def table(name: str, rows: list[dict], caption: str = "", folded: bool = False) -> Table:
    """A table of rows {column: cell}; a cell that a row lacks stays empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[row.get(column, "") for column in columns] for row in rows]
    return Table(name, columns, cells, caption, folded)


def row(template: str, values: dict) -> dict[str, str]:
    """A row of a table. Template: "column: cell" on every line or between " | ", each cell as in `fill`."""
    parts = [part.split(": ", 1) for part in re.split(r"\n| \| ", template.strip())]
    return {column.strip(): fill(cell, values) for column, cell in parts}


def fill(template: str, values: dict) -> str:
    """str.format with the formats below; "" if a value is missing or None.

    >>> fill("{loss[mean]:.2f} after {seconds:minutes} minutes", {"loss": {"mean": 0.5}, "seconds": 90})
    '0.50 after 1.5 minutes'
    """
    try:
        return Filler().vformat(template, (), values)
    except (KeyError, IndexError, TypeError, AttributeError):
        return ""


class Filler(Formatter):
    def format_field(self, value: object, spec: str) -> str:
        if value is None:
            raise KeyError
        return FORMATS[spec](value) if spec in FORMATS else format(value, spec)


def interval(x: dict | None, scale: float = 1, digits: int = 1, sign: str = "") -> str:
    """12.3 [11.2, 13.4] of {"value" or "mean", and perhaps "low", "high"}; "" of {} or None."""
    numbers = [scale * x[key] for key in ("value", "mean", "low", "high") if x and x.get(key) is not None]
    texts = [f"{number:{sign}.{digits}f}" for number in numbers]
    return texts[0] + f" [{', '.join(texts[1:])}]" * (len(texts) > 1) if texts else ""


def percent(x: dict | None) -> str:
    """72.3 [69.4, 75.0] of {"value": 0.723, ...}."""
    return interval(x, 100)


def points(x: dict | None) -> str:
    """+1.2 [-0.3, +2.7], a difference of shares."""
    return interval(x, 100, 1, "+")


def difference(x: dict | None) -> str:
    """-0.0123 [-0.0200, -0.0040], a difference of losses."""
    return interval(x, 1, 4, "+")


def count(n: float) -> str:
    """0.87M, 3.3M, 512."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f}"


def shorten(text: object, most: int = 300) -> str:
    text = " ⏎ ".join(str(text).strip().split("\n"))
    return text if len(text) <= most else text[: most - 1] + "…"


FORMATS = {f.__name__: f for f in (interval, percent, points, difference, count, minutes, gib, shorten)}

# -----------------------------------------------------------------------------
# HTML

LINK = re.compile(r"\[([^][]+)\]\(((?:https?://|figures/|[\w-]+\.(?:html|md)\b)[^()\s\"'<>]*)\)")
INTERVAL = re.compile(r"^(\S+) (\[[^][]+\])(?: (\([^()]+\)))?$")


def html_text(text: str) -> str:
    """The words of a paragraph as HTML; all other markup is escaped."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", LINK.sub(r"<a href='\2'>\1</a>", text))


def html_table(block: Table) -> str:
    """An interval goes below its number, to keep tables narrow."""
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in block.columns)
    out = [f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>"]
    for row in block.rows:
        cells = (INTERVAL.sub(r"\1<br><small>\2</small> \3", html.escape(str(cell))) for cell in row)
        out.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    out.append("</tbody></table></div>")
    if block.folded:
        out = [f"<details><summary>{len(block.rows)} rows</summary>", *out, "</details>"]
    return "\n".join(out)


def html_block(block: Block) -> str:
    match block:
        case Text(words):
            return f"<p>{html_text(words)}</p>"
        case Table():
            return html_table(block)
    caption, data = html.escape(block.caption), base64.b64encode(block.png).decode()
    picture = f"<img alt='{caption}' src='data:image/png;base64,{data}'>"
    return f"<figure>{picture}\n<figcaption>{caption}</figcaption></figure>"


def as_html(title: str, sections: Sections) -> str:
    """The HTML page. All texts are escaped: generated text cannot become markup."""
    out = []
    for heading, blocks in sections.items():
        out += [f"<h2>{html.escape(heading)}</h2>", *map(html_block, blocks)]
    return filled("page.html", html.escape(title), out)


def filled(frame: str, title: str, lines: list[str]) -> str:
    """A file of support/ with $title and $body replaced."""
    text = (Path(__file__).parent / frame).read_text(encoding="utf-8")
    return Template(text).substitute(title=title, body="\n".join(lines))


# -----------------------------------------------------------------------------
# Markdown and CSV


def markdown_cell(cell: object) -> str:
    return html.escape(str(cell), quote=False).replace("|", "\\|").replace("\n", " ")


def markdown_block(block: Block) -> str:
    match block:
        case Text(words):
            return words
        case Table():
            lines = [block.columns, ["---"] * len(block.columns), *block.rows]
            return "\n".join("| " + " | ".join(map(markdown_cell, line)) + " |" for line in lines)
    caption = markdown_cell(block.caption)
    return f"![{caption}](figures/{block.name}.png)\n\n*{caption}*"


def as_markdown(title: str, sections: Sections) -> str:
    parts = [f"# {title}"]
    for heading, blocks in sections.items():
        parts += [f"## {heading}", *map(markdown_block, blocks)]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, title: str, sections: Sections, name: str = "index") -> Path:
    """NAME.html, NAME.md, the figures and the CSV files; returns the path of the HTML page."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for block in blocks_of(sections, Figure):
        (folder / "figures" / f"{block.name}.png").write_bytes(block.png)
    for block in blocks_of(sections, Table):
        with open(folder / f"{block.name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([block.columns, *block.rows])
    (folder / f"{name}.md").write_text(as_markdown(title, sections), encoding="utf-8")
    (folder / f"{name}.html").write_text(as_html(title, sections), encoding="utf-8")
    return folder / f"{name}.html"


# -----------------------------------------------------------------------------
# LaTeX

LONG = 30  # a table with more rows goes to the end of the paper and may span pages
NARROW, WIDE = 7.7, 16  # cm: a column of the paper, and both
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "⏎": "/", "␣": " "}
SPECIAL |= {"…": r"\dots{}", "±": r"$\pm$", "×": r"$\times$"} | {c: "\\" + c for c in "&%$#_{}"}


def latex_text(text: object) -> str:
    """Escapes LaTeX's special characters; removes bold and code marks and the addresses of links."""
    out = ""
    for c in LINK.sub(r"\1", str(text)).replace("**", "").replace("`", ""):
        typeset = c.isascii() or (c.isalpha() and ord(c) < 256)
        out += SPECIAL.get(c, c if typeset else "?")
    return out


def latex_columns(lines: list[list[str]], total: float, character: float) -> str:
    """Column types for a table of at most `total` cm, of cells with `character` cm per character.

    Columns narrower than an equal share keep their width; the others share the rest and wrap their cells
    between words.
    """
    columns = list(zip(*lines, strict=True))
    wants = [character * max(map(len, cells)) for cells in columns]
    words = [character * max(map(len, " ".join(cells).split(" "))) for cells in columns]
    left, kinds = total - 0.3 * len(wants), ["l"] * len(wants)
    for done, i in enumerate(sorted(range(len(wants)), key=wants.__getitem__)):
        share = max(words[i], left / (len(wants) - done))
        if wants[i] > share:
            kinds[i] = rf">{{\raggedright\arraybackslash}}p{{{share:.2f}cm}}"
        left -= min(wants[i], share)
    return "".join(kinds)


def latex_table(block: Table) -> list[str]:
    """A float in one or both columns of the page, or a longtable that may span pages. No empty columns."""
    columns = [cells for cells in zip(block.columns, *block.rows, strict=True) if any(map(str, cells[1:]))]
    lines = [[str(cell) for cell in line] for line in zip(*columns, strict=True)]
    caption = rf"\caption{{{latex_text(block.caption or block.name)}}}"
    head, *body = [" & ".join(map(latex_text, line)) + r" \\" for line in lines]
    if len(body) > LONG:
        layout = latex_columns(lines, WIDE, 0.14)
        begin = [r"\scriptsize", rf"\begin{{longtable}}{{{layout}}}", caption + r" \\"]
        return [*begin, r"\hline", head, r"\hline\endhead", *body, r"\hline", r"\end{longtable}"]
    kind, size, layout = "table", "footnotesize", latex_columns(lines, NARROW, 0.18)
    if "p{" in layout:  # too wide for one column
        kind, size, layout = "table*", "scriptsize", latex_columns(lines, WIDE, 0.15)
    begin = [rf"\begin{{{kind}}}[t]\centering\{size}", rf"\begin{{tabular}}{{{layout}}}"]
    end = [r"\end{tabular}", caption, rf"\end{{{kind}}}"]
    return [*begin, r"\hline", head, r"\hline", *body, r"\hline", *end]


def latex_block(block: Block) -> list[str]:
    match block:
        case Text(words):
            return ["", latex_text(words), ""]
        case Table():
            return latex_table(block)
    width, height = struct.unpack(">II", block.png[16:24])  # from the PNG header
    kind = "figure*" if width > 2 * height else "figure"
    picture = rf"\includegraphics[width=\linewidth]{{../figures/{block.name}.png}}"
    caption = rf"\caption{{{latex_text(block.caption)}}}"
    return [rf"\begin{{{kind}}}[t]\centering", picture, caption, rf"\end{{{kind}}}"]


def as_latex(title: str, sections: Sections) -> str:
    """The article. The section "Abstract" becomes the abstract; "References" gets no number."""
    out, late = [], []  # late: tables that are too long for a column
    for heading, blocks in sections.items():
        if heading == "Abstract":
            words = [line for block in blocks for line in latex_block(block)]
            out += [r"\begin{abstract}", *words, r"\end{abstract}"]
            continue
        out += ["", rf"\section{'*' * (heading == 'References')}{{{latex_text(heading)}}}"]
        for block in blocks:
            if isinstance(block, Table) and len(block.rows) > LONG:
                late += latex_table(block)
                block = Text("The table is at the end.")
            out += [r"\noindent\hangindent=1em"] * (heading == "References") + latex_block(block)
    out += [r"\clearpage\onecolumn", *late] if late else []
    return filled("paper.tex", latex_text(title), out)
