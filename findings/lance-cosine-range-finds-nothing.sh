#!/usr/bin/env bash
# Lance's quantized indexes (IVF_PQ, IVF_SQ, IVF_RQ) give twice the cosine distance, which is the squared L2 distance of
# normalized vectors, where IVF_FLAT and a search without an index give the distance itself. The documentation calls distances
# of an index approximate, not scaled; its remedy, refine_factor, computes those of the rows found anew. A distance_range is
# held against the doubled ones all the same: the rows within a cosine distance are found without an index and none of them
# with it, refined or not, without an error. With twice the bound they come back. A plain search changes its scale as soon as
# one row is appended that the index doesn't hold yet, and changes back at optimize_indices(). Who merges or drops keys of a
# cache from some similarity on has one rule before the index is built and another after. lancedb's open issue 3530 has the
# doubled distances.
# Seen with pylance 14.0.2, 5,000 rows of 128 values around a common mean, one partition, a range that holds 1,500 rows: without
# an index 1,500, IVF_FLAT 1,500, IVF_SQ, IVF_PQ and IVF_RQ 0, refined 0, with twice the bound 1,486, about 2,220 and 1,490.
# Distance over the true one, median of the 100 nearest: SQ 2.00, PQ 1.9, RQ 2.00, with a row appended 1.00; by L2 1.00, 0.95,
# 1.00.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check numpy==2.3.5 pyarrow==26.0.1 pylance==14.0.2
LANCE_LOG=error "$dir/env/bin/python" - "$dir" <<'PY'
import sys

import lance
import numpy as np
import pyarrow as pa

N, D = 5000, 128
rng = np.random.default_rng(0)
mean = rng.standard_normal(D)
rows = (mean + rng.standard_normal((N, D))).astype(np.float32)
query = (mean + rng.standard_normal(D)).astype(np.float32)
x = rows.astype(np.float64)
true = {"cosine": 1 - x @ query / (np.linalg.norm(x, axis=1) * np.linalg.norm(query)), "L2": ((x - query) ** 2).sum(1)}


def table(start, x):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), D)
    return pa.table({"id": pa.array(range(start, start + len(x))), "v": vectors})


def search(path, k, metric, **options):
    nearest = {"column": "v", "q": query, "k": k, "metric": metric, "nprobes": 1} | options
    found = lance.dataset(path).to_table(nearest=nearest, columns=["id", "_distance"])
    return found["id"].to_numpy(), found["_distance"].to_numpy()


def scale(path, metric):
    """Median of the distances of the 100 nearest rows over the true ones."""
    ids, distances = search(path, 100, metric)
    return float(np.median((distances / true[metric][ids % N])[ids < N]))


def within(path, bound, **options):
    """How many rows are found within a cosine distance, and their median distance over the true one."""
    ids, distances = search(path, N, "cosine", distance_range=(None, bound), **options)
    return len(ids), float(np.median(distances / true["cosine"][ids])) if len(ids) else None


ok = True
ends = np.sort(true["cosine"])
bound = float(ends[1499:1501].mean())
for kind, options in (("IVF_FLAT", {}), ("IVF_SQ", {}), ("IVF_PQ", {"num_sub_vectors": 32}), ("IVF_RQ", {})):
    scales = {}
    for metric in true:
        path = f"{sys.argv[1]}/{kind}-{metric}"
        data = lance.write_dataset(table(0, rows), path)
        if metric == "cosine":
            flat = within(path, bound)
        data.create_index("v", kind, metric=metric, num_partitions=1, **options)
        if metric == "cosine":
            indexed, refined = within(path, bound), within(path, bound, refine_factor=1)
            twice = within(path, 2 * bound, refine_factor=1)
        scales[metric] = [scale(path, metric)]
        lance.write_dataset(table(N, -query[None]), path, mode="append")
        scales[metric].append(scale(path, metric))
        lance.dataset(path).optimize.optimize_indices()
        scales[metric].append(scale(path, metric))
    print(f"{kind}: within a cosine distance of {bound:.3f} without index {flat[0]} rows, with it {indexed[0]}, refined "
          f"{refined[0]}; within twice that, refined, {twice[0]} at {twice[1]:.2f} times their distance;",
          "; ".join(f"{metric} {a:.2f} times the true distance, a row appended {b:.2f}, optimized {c:.2f}"
                    for metric, (a, b, c) in scales.items()))
    doubled = kind != "IVF_FLAT"
    ok &= flat[0] == 1500 and (indexed[0], refined[0]) == ((0, 0) if doubled else (1500, 1500))
    if kind in ("IVF_SQ", "IVF_RQ"):  # product quantization isn't as close to the rows
        ok &= abs(twice[0] - 1500) < 200
    for metric, seen in scales.items():
        factor = 2 if doubled and metric == "cosine" else 1
        ok &= all(abs(a / b - 1) < 0.1 for a, b in zip(seen, (factor, 1, factor)))
sys.exit(0 if ok else 1)
PY
