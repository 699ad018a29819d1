"""The answers of worked solutions as numbers, and the calculator that a model may use: `<<9*3=` -> `27>>`."""

import ast
import operator
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

NUMBER = re.compile(
    r"(?<![\d.])[-−]?[$€£]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:e[+-]?\d{1,2}\b)?",
    re.ASCII | re.IGNORECASE,
)


def extract_number(text: str) -> str | None:
    """The answer of a worked solution as a plain number: "#### 1,080" and "It costs $1,080.00." → "1080".

    What stands behind the first "####" counts, or else behind the last "A:" or "answer is", or else the last
    number of all. None if there is none.
    """
    if "####" in text:
        line = text.split("####")[1].split("\n")[0]
        found = NUMBER.findall(line)[:1]
    else:
        marked = re.findall(r"(?:^\s*A:|answer is:?)(.*)$", text, flags=re.M | re.I)
        found = NUMBER.findall(marked[-1])[:1] if marked else []
        found = found or NUMBER.findall(text)[-1:]
    return plain_number(found[0]) if found else None


def plain_number(text: str) -> str:
    """ "-$1,234.50" → "-1234.5", "1e3" → "1000": one spelling for one number, to compare them as text."""
    number = format(Decimal(re.sub("[$€£,]", "", text.replace("−", "-"))), "f")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return "0" if number == "-0" else number


class CalculatorError(ValueError):
    """The expression is not arithmetic, has no value, or is too large."""


LONGEST, LARGEST = 200, 256  # characters of an expression, bits of a number


def calculate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression: numbers, + - * / **, percent, parentheses. Never `eval`.

    Python's parser reads the expression, and only the nodes named in `value_of` are computed. Anything else,
    and more than a word problem can need, raises CalculatorError, so that no text costs more than a moment.
    """
    if len(expression) > LONGEST or not re.fullmatch(r"[0-9.,%()*/+\s-]*", expression):
        raise CalculatorError(f"{expression[:LONGEST]!r} is not arithmetic, or too long")
    thousands = r"(?<![\d,.])\d{1,3}(,\d{3})+(?![\d,])"
    text = re.sub(thousands, lambda number: number[0].replace(",", ""), expression)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python refuses 007
    text = " ".join(text.replace("%", " .percent ").split())  # an attribute binds closer than any operator
    try:
        return value_of(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, KeyError, ArithmeticError, RecursionError, MemoryError):
        raise CalculatorError(f"{expression!r} is not arithmetic, or too large") from None


def value_of(node: ast.AST, text: str) -> Fraction:
    """The value of a node of the parsed `text`."""
    match node:
        case ast.Constant(int() | float()):
            value = Fraction(ast.get_source_segment(text, node))
        case ast.Attribute(part, "percent"):
            value = value_of(part, text) / 100
        case ast.UnaryOp(sign, part):
            value = OPERATORS[type(sign)](value_of(part, text))
        case ast.BinOp(left, sign, right):
            value = OPERATORS[type(sign)](value_of(left, text), value_of(right, text))
        case _:
            raise SyntaxError
    if bits(value) > LARGEST:
        raise OverflowError
    return value


def power(base: Fraction, exponent: Fraction) -> Fraction:
    too_large = abs(exponent) * bits(base) > 2 * LARGEST
    if exponent.denominator != 1 or too_large:
        raise OverflowError  # before it is computed, not after
    return base**exponent


def bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: power,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def decimal_text(value: Fraction) -> str:
    """A Fraction as people write it: "24", "2.5", and "0.3333" where the decimals do not end."""
    number, decimals = divmod(round(abs(value) * 10_000), 10_000)
    text = f"{number}.{decimals:04}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 and text != "0" else text


def calculator_answer(text: str) -> str | None:
    """What a calculator types behind a text that ends in an open annotation: "... is <<9*3=" → "27>>"."""
    found = re.search(r"<<([^<>=]*)=$", text[-210:])
    if not found:
        return None
    try:
        return f"{decimal_text(calculate(found[1]))}>>"
    except CalculatorError:
        return None


def equations(text: str) -> Iterator[tuple[str, str]]:
    """The annotated steps of a solution, (expression, result) of `<<expression=result>>`."""
    for expression, result in re.findall(r"<<([^<>=]*)=([^<>=]*)>>", text):
        yield expression.replace(" ", ""), result.strip()


def calculates(text: str) -> bool:
    """Whether every annotated step of a solution is calculated right, and its last result is its answer."""
    last = None
    for expression, result in equations(text):
        last = extract_number(result)
        try:
            value = calculate(expression)
        except CalculatorError:
            return False
        if decimal_text(value) != last:
            return False
    return last is not None and last == extract_number(text)
