"""A page made of blocks, written as HTML, Markdown, LaTeX and CSV.

A section of a page is a list of blocks: Text, Table or Figure. All formats are written from the same
blocks, so they cannot disagree. support/page.html is a template of jinja2 that writes the HTML page,
support/paper.tex is the frame of the paper. Names of folders need not be UTF-8, so every text goes through
`valid` before it is written.
"""

import csv
import html
import re
from base64 import b64encode
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from string import Formatter

from support.tables import valid

# -----------------------------------------------------------------------------
# Blocks


@dataclass
class Text:
    """A paragraph; may contain **bold**, `code` and [text](address)."""

    words: str


@dataclass
class Table:
    name: str  # of the CSV file
    rows: list[dict]  # {column: cell}; a cell that a row lacks stays empty
    caption: str = ""  # in the paper; default: the name
    folded: bool = False  # on the HTML page: hidden until clicked

    def lines(self) -> list[list[str]]:
        """The head, then a line of cells per row."""
        columns = list(dict.fromkeys(chain(*self.rows)))
        cells = [[valid(str(row.get(column, ""))) for column in columns] for row in self.rows]
        return [columns, *cells]


@dataclass
class Figure:
    name: str  # of the PNG file
    caption: str
    png: bytes


Block = Text | Table | Figure
Sections = dict[str, list[Block]]  # {heading: blocks}


def blocks_of(sections: Sections, kind: type) -> list:
    """All blocks of one kind."""
    return [block for block in chain(*sections.values()) if isinstance(block, kind)]


# -----------------------------------------------------------------------------
# Rows and sentences from templates


def row(template: str, /, **values: object) -> dict[str, str]:
    """A row of a table. Template: "column: cell" on every line or between " | ", each cell as in `fill`."""
    parts = [part.split(": ", 1) for part in re.split(r"\n| \| ", template.strip())]
    return {column.strip(): fill(cell, **values) for column, cell in parts}


def rows_of(template: str, found: dict) -> list[dict]:
    """A row per entry of a dict. The template names its key as {key}, the entry as {x}, and its parts."""
    rows = []
    for key, x in found.items():
        values = x if isinstance(x, dict) else {}
        rows.append(row(template, **values | {"key": key, "x": x}))
    return rows


def say(template: str, /, **values: object) -> list[Text]:
    """A paragraph per line of a template."""
    return [Text(line) for line in lines_of(template, **values)]


def lines_of(template: str, /, **values: object) -> list[str]:
    """The lines of a template, each as in `fill`; lines that lack a value are left out."""
    lines = [fill(line, **values) for line in template.strip().split("\n")]
    return [line for line in lines if line]


def fill(template: str, /, **values: object) -> str:
    """str.format with the formats below; "" if a value is missing or None.

    >>> fill("{loss[mean]:.2f} after {seconds:minutes} minutes", loss={"mean": 0.5}, seconds=90)
    '0.50 after 1.5 minutes'
    """
    try:
        return Filler().vformat(template, (), values)
    except (LookupError, TypeError, AttributeError):
        return ""


class Filler(Formatter):
    def format_field(self, value: object, spec: str) -> str:
        if value is None:
            raise KeyError
        return FORMATS[spec](value) if spec in FORMATS else format(value, spec)


def interval(x: dict | None, scale: float = 1, digits: int = 1, sign: str = "") -> str:
    """12.3 [11.2, 13.4] of {"value" or "mean", and perhaps "low", "high"}; "" of {} or None."""
    numbers = [scale * x[key] for key in ("value", "mean", "low", "high") if x and x.get(key) is not None]
    value, *ends = [f"{number:{sign}.{digits}f}" for number in numbers] or [""]
    return f"{value} [{', '.join(ends)}]" if ends else value


percent = partial(interval, scale=100)  # 72.3 [69.4, 75.0] of {"value": 0.723, ...}
points = partial(interval, scale=100, sign="+")  # a difference of shares: +1.2 [-0.3, +2.7]
difference = partial(interval, digits=4, sign="+")  # a difference of losses: -0.0123 [-0.0200, -0.0040]


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


def shorten(text: object) -> str:
    text = str(text).strip().replace("\n", " ⏎ ")
    return text if len(text) <= 300 else text[:299] + "…"


FORMATS = dict(interval=interval, percent=percent, points=points, difference=difference)
FORMATS |= dict(count=count, minutes=minutes, gib=gib, shorten=shorten)

# -----------------------------------------------------------------------------
# HTML

LINK = re.compile(r"\[([^][]+)\]\(((?:https?://|figures/|[\w-]+\.(?:html|md)\b)[^()\s\"'<>]*)\)")
INTERVAL = re.compile(r"^(\S+) (\[[^][]+\])(?: (\([^()]+\)))?$")


def marked(words: str) -> str:
    """**bold**, `code` and [text](address) as HTML."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(words))
    text = LINK.sub(r"<a href='\2'>\1</a>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def narrowed(cell: str) -> str:
    """An interval goes below its number, to keep tables narrow."""
    return INTERVAL.sub(r"\1<br><small>\2</small> \3", html.escape(cell))


def as_html(title: str, sections: Sections) -> str:
    """The HTML page. All texts are escaped: generated text cannot become markup."""
    return rendered("page.html", title=title, sections=sections)


def rendered(template: str, /, **values: object) -> str:
    """A file of support/, a template of jinja2, with these values. What HTML holds is escaped."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(
        loader=folder, autoescape=select_autoescape(), trim_blocks=True, keep_trailing_newline=True
    )
    templates.filters |= {"marked": marked, "narrowed": narrowed, "base64": lambda b: b64encode(b).decode()}
    return valid(templates.get_template(template).render(values))


# -----------------------------------------------------------------------------
# Markdown and CSV


def markdown_text(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def markdown_block(block: Block) -> str:
    if isinstance(block, Text):
        return block.words
    if isinstance(block, Figure):
        caption = markdown_text(block.caption)
        return f"![{caption}](figures/{block.name}.png)\n\n*{caption}*"
    head, *body = block.lines()
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)


def as_markdown(title: str, sections: Sections) -> str:
    parts = [f"# {title}"]
    for heading, blocks in sections.items():
        parts += [f"## {heading}", *map(markdown_block, blocks)]
    return valid("\n\n".join(parts) + "\n")


def write(folder: Path, title: str, sections: Sections, name: str = "index") -> Path:
    """NAME.html, NAME.md, the figures and the CSV files; returns the path of the HTML page."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for block in blocks_of(sections, Figure):
        (folder / "figures" / f"{block.name}.png").write_bytes(block.png)
    for block in blocks_of(sections, Table):
        with open(folder / f"{block.name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(block.lines())
    (folder / f"{name}.md").write_text(as_markdown(title, sections), encoding="utf-8")
    page = folder / f"{name}.html"
    page.write_text(as_html(title, sections), encoding="utf-8")
    return page


# -----------------------------------------------------------------------------
# LaTeX

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "⏎": "/", "␣": " "}
SPECIAL |= {"…": r"\dots{}", "±": r"$\pm$", "×": r"$\times$"} | {c: "\\" + c for c in "&%$#_{}"}


def latex_text(text: str) -> str:
    """Escapes LaTeX's special characters; removes bold and code marks and the addresses of links."""
    text = LINK.sub(r"\1", text).replace("**", "").replace("`", "")
    return text.translate(str.maketrans(SPECIAL)).encode("latin-1", "replace").decode("latin-1")


def latex_table(block: Table) -> list[str]:
    """A table that may span pages; nothing if all cells are empty. The longest cells decide how wide a column
    is; no column is empty.
    """
    columns = [cells for cells in zip(*block.lines(), strict=True) if any(cells[1:])]
    if not columns:
        return []
    asked = [min(40, max(map(len, cells)) + 2) for cells in columns]
    layout = ""
    for characters in asked:
        width = 0.9 * characters / max(100, sum(asked))
        layout += rf">{{\raggedright\arraybackslash}}p{{{width:.3f}\textwidth}}"
    head, *body = [" & ".join(map(latex_text, line)) + r" \\" for line in zip(*columns, strict=True)]
    caption = rf"\caption{{{latex_text(block.caption or block.name)}}} \\"
    begin = [r"{\scriptsize", rf"\begin{{longtable}}{{{layout}}}", caption]
    return [*begin, r"\hline", head, r"\hline\endhead", *body, r"\hline\end{longtable}}"]


def latex_block(block: Block) -> list[str]:
    if isinstance(block, Text):
        return ["", latex_text(block.words), ""]
    picture = rf"\includegraphics[width=\linewidth]{{../figures/{block.name}.png}}"
    caption = rf"\caption{{{latex_text(block.caption)}}}"
    return [r"\begin{figure}[t]\centering", picture, caption, r"\end{figure}"]


def as_latex(title: str, sections: Sections) -> str:
    """The article. The section "Abstract" becomes the abstract; tables stand behind the two-column text."""
    out, tables = [], []
    for heading, blocks in sections.items():
        lines = []
        for block in blocks:
            if not isinstance(block, Table):
                lines += latex_block(block)
            elif table := latex_table(block):
                tables += table
                lines += ["", f"(Table at the end: {latex_text(block.caption or block.name)})"]
        if heading == "Abstract":
            out += [r"\begin{abstract}", *lines, r"\end{abstract}"]
        else:
            out += [rf"\section{{{latex_text(heading)}}}", *lines]
    body = "\n".join([*out, r"\clearpage\onecolumn", *tables])
    return rendered("paper.tex", title=latex_text(title), body=body)
