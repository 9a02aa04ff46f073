"""Columns of a summary: what a sweep and a replay say of one codec."""
import math

from . import store

# Metrics of a sweep, the cheapest first: column -> tag.
CHEAP = {"key_nmse": "key.nmse", "key_unexplained": "key.unexplained_variance", "value_nmse": "value.nmse",
         "logit_rms": "logit.centred_rms", "softmax_kl": "attention.softmax_kl", "output_error": "output.relative_error",
         "output_error_wo": "output.relative_error_after_wo"}
# Numbers of a replay: column -> key of its row.
PLAYED = {"kld_last": "kld.last_quarter", "kld_last_error": "kld.last_quarter.error", "kld": "kld.mean", "kld_p99": "kld.p99",
          "kld_p999": "kld.p99.9", "same_top": "same_top", "ppl": "ppl", "ppl_error": "ppl.error", "ppl_ratio": "ppl.ratio",
          "ppl_ratio_error": "ppl.ratio.error", "coded_mass": "coded_mass.last_quarter", "resident": "bits_per_value",
          "resident_books": "bits_per_value_1"}
BARE = "bare_"  # before columns of the row without a window


def flags_of(cell, *rows):
    return " ".join(dict.fromkeys([*cell.record["flags"], *(f for r in rows if r for f in r["flags"])]))


def swept(cell):
    """What a cell is, costs and loses by the sweep."""
    codec = cell.line["config"]["codec"]
    out = {"label": cell.label, "part": cell.part, "roles": store.coded_roles(codec), "bits": store.bits_of(cell.record)}
    for context in (4096, 32768):
        for books in (1, 64):
            out[f"resident_{context // 1024}k_{books}"] = cell.value("bits_per_value", "cost", context, books)
    return out | {column: cell.value(tag) for column, tag in CHEAP.items()}


def played(row, prefix=""):
    """What a replay says of a codec; {} where there is no row."""
    return {prefix + column: row.get(key) for column, key in PLAYED.items()} if row else {}


def documents(row, measure="kld.last_quarter"):
    """The means of the replay's documents, in the order of its texts."""
    return row["per_document"][measure]


def budget_of(bits):
    """1, 2, 3, 4: a quarter of a bit below to half a bit above; None elsewhere."""
    return next((b for b in (1, 2, 3, 4) if b - 0.25 <= bits <= b + 0.5), None)


def on_equal_ground(row):
    """Of `equal-bytes`: both roles coded, under the one protocol."""
    return row.get("roles") == "KV" and (row["part"].startswith("bits") or row["part"] == "test")


def finite(v):
    return isinstance(v, (int, float)) and math.isfinite(v)


def number_of(row, *columns):
    """The first finite number of those columns; infinity where there is none, which sorts last."""
    return next((row[c] for c in columns if finite(row.get(c))), math.inf)
