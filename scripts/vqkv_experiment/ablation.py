"""The experiments that vary a few knobs: sweep the groups of a plan, replay every cell, and one table of both."""
import itertools

from . import results, statistics, store, tables
from .driver import Experiment
from .results import BARE

HEADS = ["codec", "codes+side", "32K, books/1", "key NMSE", "value NMSE", "softmax KL", "output error", "KLD, last quarter", "p99.9", "PPL ratio",
         "no window", "flags"]


def table_row(r):
    number = tables.number
    return [r["label"], number(r["bits"], 3), number(r.get("resident_32k_1"), 2), number(r.get("key_nmse"), 3), number(r.get("value_nmse"), 3),
            number(r.get("softmax_kl"), 4), number(r.get("output_error_wo"), 3), tables.with_error(r.get("kld_last"), r.get("kld_last_error"), 4),
            number(r.get("kld_p999"), 3), number(r.get("ppl_ratio"), 4),
            tables.with_error(r.get(BARE + "kld_last"), r.get(BARE + "kld_last_error"), 4), r.get("flags", "")]


def caption(facts, judged, family):
    apart = sum(v["verdict"] in "ab" for v in judged)
    verdict = (f"no verdict: {len(judged)} pairs need {statistics.clusters_to_reach(0.05 / len(judged))} documents"
               if judged and judged[0]["verdict"] == "none" else f"{apart} of {len(judged)} pairs ({family}) are told apart")
    return (f"\n{facts['windows']} windows of {facts['context']} tokens of {len(facts['documents'])} documents, {facts['positions']} scored "
            f"positions; ± is a standard error over documents.\nVerdicts (verdicts.csv): exact sign flips over documents, Holm's correction over all "
            f"pairs; {verdict}.\n")


def run(file, about, parts, context=384, label=None, windowless=True, family="all of them", pair=lambda a, b: True,
        more=None, arguments=None):
    """Exit code of the experiment at `file`: groups `parts` swept and replayed, OUT/NAME/summary.csv, verdicts.csv and table.md.
    `label(line, record)` names a cell; without one its bits do and what the sweep varies.
    Pairs of summary rows that `pair` accepts are compared by the KLD of the last quarter, without a window where there is such
    a row. `more(x, summary, cells, rows)` may add columns and files."""
    x = Experiment(file, about, arguments)
    cells = [c for part in x.parts(*parts) for c in x.sweep(part, label or store.label_with_axes(x.out / f"{part}.jsonl"))]
    x.require_names(cells)
    rows = x.replay("held", cells, x.held(), 160 if x.test else context, windowless=windowless)
    summary, documents = [], {}
    for cell in cells:
        row, bare = rows.get(cell.label), rows.get(cell.label + " (no window)")
        if row is None:
            continue
        summary.append(results.swept(cell) | {"protocol": row["protocol"]} | results.played(row) | results.played(bare, BARE)
                       | {"flags": results.flags_of(cell, row)})
        documents[cell.label] = results.documents(bare or row)
    if not summary:
        x.say("nothing was replayed yet")
        return x.end()
    if more:
        more(x, summary, cells, rows)
    pairs = [(a["label"], b["label"]) for a, b in itertools.combinations(summary, 2) if pair(a, b)]
    judged = statistics.compare(documents, pairs)
    facts = next(iter(rows.values()))["facts"]
    x.write_summary(summary)
    x.write_summary(judged, "verdicts.csv")
    (x.out / "table.md").write_text(tables.markdown([table_row(r) for r in summary], HEADS) + "\n" + caption(facts, judged, family))
    return x.end()
