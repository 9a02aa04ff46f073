#!/usr/bin/env python3
"""Choices and tables of the first look (scripts/quickstart, experiments/first-look). Standard library only.

    first_look.py choose SWEEP_BIN STORE           label=cell lines: scalar baselines, and under each budget the vector code
                                                   with the least attention output error on the select documents
    first_look.py select STORE AXIS=VALUE...       ids of the finished cells at those values of their axes
    first_look.py table  BIN_FOLDER OUT MODEL      OUT/sweep and OUT/replay.json as one markdown table
    first_look.py grid   OUT                       every cell of the stores in OUT, with the KLD of OUT/replay.json, as one table
    first_look.py ranks  OUT                       rank correlations of every metric with the replay's KLD; how much of it is told apart
"""
import glob
import json
import math
import os
import subprocess
import sys

from vqkv_experiment.statistics import spearman
from vqkv_experiment.store import bits_of, cells_of, in_query_metric, knobs, value
from vqkv_experiment.tables import markdown, number

BUDGETS = (4.5, 3.5, 2.5, 1.25)   # bits a value, codes and side data
SCALAR = ("exact", "rtn", "kivi")
RANK_BY = "output.relative_error_after_wo"  # sees keys and values; softmax KL sees keys alone


def name_of(cell):
    """Methods and shape as a label: pq-16x8, rtn-4, simvq-28x10_8x9, with +qm for keys in the metric of their queries."""
    k, v = (knobs(cell["config"]["codec"][role]) for role in "kv")
    kt, vt = (f"{r['codebooks']}x{r['bits']}" if "codebooks" in r else f"{r.get('bits', '')}" for r in (k, v))
    method = k["name"] if k["name"] == v["name"] else f"{k['name']}_{v['name']}"
    return f"{method}-{kt if kt == vt else f'{kt}_{vt}'}{'+qm' if in_query_metric(k) else ''}"


def choose(sweep, store):
    cells = cells_of(store)
    chosen = {}
    for cell, record in cells.values():
        if cell["config"]["codec"]["k"]["name"] in SCALAR and value(record, "cost", "bits_per_value.codes") >= 3:
            chosen[cell["id"]] = name_of(cell)  # 2-bit RTN is beyond help; its row is in the report
    for budget in BUDGETS:
        text = subprocess.run([sweep, "best", store, "--budget", f"{budget}bpv", "--column", "codes", "--by", RANK_BY,
                               "--top", "1000", "--json", "-q"], check=True, stdout=subprocess.PIPE).stdout
        for row in json.loads(text):
            if row["id"] in cells and cells[row["id"]][0]["config"]["codec"]["k"]["name"] not in SCALAR:
                chosen.setdefault(row["id"], name_of(cells[row["id"]][0]))
                break
    for cell, label in chosen.items():
        print(f"{label}={cell}")


def select(store, *conditions):
    wanted = dict(c.split("=", 1) for c in conditions)
    written = lambda v: v if isinstance(v, str) else json.dumps(v, separators=(",", ":"))
    for cell, _ in cells_of(store).values():
        if all(written(cell["axes"].get(axis)) == value for axis, value in wanted.items()):
            print(cell["id"][:8])


def replay(out):
    with open(os.path.join(out, "replay.json")) as f:
        return json.load(f)


def table(_, out, model):
    cells = {name_of(c): (c, r) for c, r in cells_of(os.path.join(out, "sweep")).values()}
    played = replay(out)
    facts = played["facts"]
    rows = []
    for r in played["rows"]:
        label = r["codec"]
        base = label.replace(" (no window)", "")
        cell, record = cells.get(base, (None, None))
        windowless = base != label
        cost = lambda context, n: value(record, "cost", "bits_per_value", context, n) if record and not windowless else math.nan
        rows.append([
            label,
            r["protocol"],
            number(value(record, "cost", "bits_per_value.codes") if record else None, 3),
            number(r["bits_per_value"], 2),
            f"{r['bytes']['total'] if 'total' in r['bytes'] else total(r['bytes']):,}",
            *(number(cost(c, n), 2) for c in (4096, 32768) for n in (1, 64)),
            number(value(record, "report", "attention.softmax_kl") if record and not windowless else None, 4),
            number(value(record, "report", RANK_BY) if record and not windowless else None, 3),
            f"{number(r.get('kld.last_quarter'), 4)} ± {number(r.get('kld.last_quarter.error'), 4)}",
            number(r.get("coded_mass.last_quarter"), 2),
            f"{number(r.get('ppl'), 2)} ± {number(r.get('ppl.error'), 2)}",
            f"{number(r.get('ppl.ratio'), 4)} ± {number(r.get('ppl.ratio.error'), 4)}",
            number(r.get("same_top"), 3)])
    context = facts["context"]
    print(markdown(rows, ["codec", "protocol", "codes+side", f"resident b/v at {context}", "bytes a sequence", "4K, books/1", "/64", "32K, books/1", "/64",
                    "softmax KL", "output error", "KLD, last quarter", "coded mass", "PPL", "PPL ratio", "same top"]))
    cluster = next((c["cluster"] for c in played["comparisons"]), "window")
    train = [r["train"] for _, r in cells_of(os.path.join(out, "sweep")).values() if r.get("train", {}).get("vectors")]
    seconds = sum(value(r, "time", "time.train") for _, r in cells_of(os.path.join(out, "sweep")).values())
    print(f"\nSmolLM2-135M-Instruct, a small model: KLD, PPL ratio and same top are gates, not a paper's scores. {facts['windows']} windows of {context} tokens,")
    print(f"{facts['positions']} scored positions on {len(facts['documents'])} documents that no codec was trained on; ± is a standard error over {cluster}s. Every layer and")
    print(f"head is coded. {len(train)} codecs trained on {train[0]['tokens'] if train else 0} tokens in up to "
          f"{max((t['iterations'] for t in train), default=0)} iterations a unit; {seconds:.0f} s of training on all threads together.")
    print("bits a value (b/v): codes and side data; everything resident, sinks and window included; with the codebooks shared by 1 and 64 sequences.")
    print("coded mass: share of the attention of the last quarter that fell on coded keys. `+qm`: keys in the metric of their queries.")
    pairs = [c for c in played["comparisons"] if c["what"] == "kld.last_quarter" and not c["windowless"]]
    told = [c for c in pairs if c["told_apart"]]
    if pairs:
        counted = f"{pairs[0]['clusters']} {pairs[0]['cluster']}s"
        print("Differences of the KLD of the last quarter, paired on the same positions, with the 95 % interval of each alone. Verdicts: exact sign")
        print(f"flips over {counted}, Holm's correction over all {pairs[0]['comparisons']} comparisons; ", end="")
        print(f"{len(told)} of the {len(pairs)} pairs with a window are told apart:" if pairs[0]["told_apart"] is not None else
              f"{counted} can't carry one, {pairs[0]['clusters_needed']} would do.")
    for c in told:
        print(f"  {c['a']} - {c['b']}: {c['mean']:+.4f} [{number(c['low'], 4)}, {number(c['high'], 4)}]: {c['verdict']}")


def total(ledger):
    return sum(v for k, v in ledger.items() if k not in ("codebooks", "total") and isinstance(v, (int, float)))


def replayed(out):
    """label -> (cell, record, KLD of the last quarter, the same without a window) of every cell of the stores in OUT, NaN where
    it was not replayed. Rows of OUT/replay.json bear a cell's name, or its id where names would meet."""
    kld = {r["codec"]: r.get("kld.last_quarter", math.nan) for r in replay(out)["rows"]}
    codecs = {}
    for plan in sorted(glob.glob(os.path.join(out, "*", "plan.jsonl"))):
        for cell, record in cells_of(os.path.dirname(plan)).values():
            label = name_of(cell) if name_of(cell) in kld else cell["id"][:8]
            codecs[label] = (cell, record, kld.get(label, math.nan), kld.get(label + " (no window)", math.nan))
    return codecs


def grid(out):
    rows = []
    for cell, record, kld, windowless in sorted(replayed(out).values(), key=lambda c: (bits_of(c[1]), c[0]["id"])):
        k = knobs(cell["config"]["codec"]["k"])
        if k["name"] in SCALAR:
            continue  # the window alone: no codes
        grouping = k["grouping"] if k["name"] == "pq" else f"groups of {k['group']}" if k["group"] else "whole"
        report = lambda tag, digits: number(value(record, "report", tag), digits)
        rows.append([f"{k['name']} {k['codebooks']}×{2 ** k['bits']}", grouping, "yes" if in_query_metric(k) else "no",
                     number(bits_of(record), 2), number(value(record, "cost", "bits_per_value", 32768, 1), 2),
                     report("key.nmse", 3), report("value.nmse", 3), report("attention.softmax_kl", 4), report(RANK_BY, 3),
                     number(kld, 4), number(windowless, 4)])
    print(markdown(rows, ["codec", "grouping", "query metric", "codes+side", "32K, books/1", "key NMSE", "value NMSE", "softmax KL",
                          "output error", "KLD, last quarter", "no window"]))


def ranks(out):
    codecs = {label: c for label, c in replayed(out).items() if not math.isnan(c[2])}
    budgets = {}
    for c in codecs.values():
        budgets.setdefault(bits_of(c[1]), []).append(c)
    alike = [group for group in budgets.values() if len(group) >= 4]

    def rank(group, tag, column):
        xs, ys = [value(c[1], "report", tag) for c in group], [c[column] for c in group]
        return math.nan if len(xs) < 3 or any(map(math.isnan, xs + ys)) else spearman(xs, ys)

    print(f"Spearman rank correlation with KLD (last quarter) over {len(codecs)} codecs, with a window and without; then the same among")
    print(f"codecs of equal bits, mean over {len(alike)} budgets of {', '.join(str(len(g)) for g in alike) or 'no'} codecs:")
    for tag in ("key.nmse", "key.unexplained_variance", "value.nmse", "logit.centred_rms", "attention.softmax_kl", "output.relative_error",
                "output.relative_error_after_wo"):
        means = [sum(rank(g, tag, column) for g in alike) / len(alike) if alike else math.nan for column in (2, 3)]
        print(f"  {tag:34s} {rank(codecs.values(), tag, 2):+.3f} {rank(codecs.values(), tag, 3):+.3f} {means[0]:+.3f} {means[1]:+.3f}")
    for windowless in (False, True):
        pairs = [c for c in replay(out)["comparisons"] if c["what"] == "kld.last_quarter" and c["windowless"] == windowless and
                 len({bits_of(codecs[c[side].replace(" (no window)", "")][1]) for side in "ab"}) == 1]
        told = sum(bool(c["told_apart"]) for c in pairs)
        print(f"Of {len(pairs)} pairs of equal bits {told} are told apart {'without a window' if windowless else 'with a window'}.")


if __name__ == "__main__":
    verbs = {"choose": choose, "select": select, "table": table, "grid": grid, "ranks": ranks}
    if len(sys.argv) < 3 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    verbs[sys.argv[1]](*sys.argv[2:])
