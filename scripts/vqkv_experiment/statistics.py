"""Rank correlation, exact sign flips over documents and Holm's correction: those of lib/metric/statistics.h, over means of
documents that several runs of `vqkv-eval replay` printed (`per_document`), which a run compares within itself alone."""
import math


def ranks_of(xs):
    """Ranks from 0, averaged over ties."""
    order = sorted(range(len(xs)), key=lambda i: xs[i])
    out = [0.0] * len(xs)
    i = 0
    while i < len(order):
        j = i
        while j < len(order) and xs[order[j]] == xs[order[i]]:
            j += 1
        for k in range(i, j):
            out[order[k]] = (i + j - 1) / 2
        i = j
    return out


def spearman(a, b):
    """Rank correlation; NaN when undefined."""
    ra, rb = ranks_of(a), ranks_of(b)
    ma, mb = sum(ra) / len(ra), sum(rb) / len(rb)
    sab = sum((x - ma) * (y - mb) for x, y in zip(ra, rb))
    saa, sbb = sum((x - ma) ** 2 for x in ra), sum((y - mb) ** 2 for y in rb)
    return sab / math.sqrt(saa * sbb) if saa > 0 and sbb > 0 else math.nan


MOST_CLUSTERS = 20  # 2^20 sums; more documents would need drawn signs, as the tools take


def sign_flip(differences, level=0.05):
    """(p, low, high) of paired differences, one a document: the two-sided share of sign assignments whose total is as far from
    zero, and the centres that the test at `level` does not refuse (NaN where so few documents can't reach it)."""
    if not 0 < len(differences) <= MOST_CLUSTERS:
        raise ValueError(f"{len(differences)} documents; sign flips are counted for 1 to {MOST_CLUSTERS}")
    sums, sizes = [0.0], [0]
    for d in differences:
        sums += [s + d for s in sums]
        sizes += [n + 1 for n in sizes]
    tie = 1e-12 * sum(map(abs, differences))
    low, high = sum(s <= tie for s in sums), sum(s >= -tie for s in sums)
    p = min(1.0, 2 * min(low, high) / len(sums))
    means = sorted(s / n for s, n in zip(sums, sizes) if n)
    r = int(level / 2 * len(sums))  # one more refused, less the empty subset
    return (p, means[r - 1], means[-r]) if r >= 1 and 2 * r <= len(means) + 1 else (p, math.nan, math.nan)


def holm(ps):
    """Adjusted p-values, in the order given."""
    out, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = least
    return out


def clusters_to_reach(level):
    """The least number of documents with which sign flips can reach `level`."""
    k = 1
    while 2.0 ** (1 - k) > level:
        k += 1
    return k


def compare(columns, pairs, level=0.05):
    """Verdicts about pairs of names in `columns` (name -> means of documents, in one order), corrected over all pairs: a list
    of {a, b, mean, low, high, p, p_corrected, verdict}, verdict "a", "b" (which is lower), "same" or "none" (too few)."""
    rows = []
    for a, b in pairs:
        d = [x - y for x, y in zip(columns[a], columns[b], strict=True)]
        p, low, high = sign_flip(d)
        rows.append({"a": a, "b": b, "mean": sum(d) / len(d), "low": low, "high": high, "p": p})
    can = bool(rows) and len(d) >= clusters_to_reach(level / len(rows))
    for row, p in zip(rows, holm([r["p"] for r in rows])):
        row["p_corrected"] = p
        row["verdict"] = "none" if not can else "same" if p > level else "a" if row["mean"] < 0 else "b"
    return rows
