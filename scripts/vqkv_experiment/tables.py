"""Markdown tables and CSV files."""
import csv
import math
import os

TEXTS = ("codec", "protocol", "grouping", "system", "flags", "metric")  # columns of words


def number(v, digits):
    return "–" if v is None or (isinstance(v, float) and math.isnan(v)) else f"{v:.{digits}f}"


def with_error(v, error, digits):
    return number(v, digits) if error is None or v is None else f"{number(v, digits)} ± {number(error, digits)}"


def markdown(rows, heads, texts=TEXTS):
    """Rows of strings under their heads; columns named in `texts` are set left, all others right."""
    widths = [max(len(h), *(len(r[i]) for r in rows)) if rows else len(h) for i, h in enumerate(heads)]

    def line(r):
        cells = (c.ljust(w) if heads[i] in texts else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
        return "| " + " | ".join(cells) + " |"
    rule = "|" + "|".join("-" * (w + 2) if heads[i] in texts else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(heads), rule, *map(line, rows)])


def write_csv(path, rows):
    """Rows as maps, in the order of the columns' first appearance; numbers with 6 significant digits, nothing for NaN."""
    heads = list(dict.fromkeys(key for row in rows for key in row))

    def cell(v):
        if v is None or (isinstance(v, float) and math.isnan(v)):
            return ""
        return f"{v:.6g}" if isinstance(v, float) else v
    with open(path + ".partial", "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(heads)
        out.writerows([cell(row.get(h)) for h in heads] for row in rows)
    os.replace(path + ".partial", path)


def read_csv(path):
    """The same rows; what reads as a number is one, an empty field of a row is left out."""
    def parsed(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(path, newline="") as f:
        return [{k: parsed(v) for k, v in row.items() if v != ""} for row in csv.DictReader(f)]
