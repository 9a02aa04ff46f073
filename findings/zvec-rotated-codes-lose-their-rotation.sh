#!/usr/bin/env bash
# Zvec can rotate vectors at random before it codes them in INT8 or INT4 (enable_rotate), which its documentation offers to
# reduce the quantization error. With HNSW and Vamana that holds until optimize() merges segments and builds the graph, as is
# usual after loading: from then on queries and rows don't fit any more, as if each were rotated otherwise, and what is
# found is random. Not even a row finds itself. Nothing is raised, and opening the collection again doesn't help. Without the
# rotation all is well, and so are Flat and IVF with it. Who measures here what a rotation gains before 8-bit codes of keys, as
# QuaRot-like methods apply it, finds it worth less than nothing.
# Seen with zvec 0.8.0, 2,000 rows of 128 normal values, the true 10 of 20 queries by inner product that are found, before and
# after optimize(): HNSW INT8 99 % and 99 %, rotated 98 % and 1 %; INT4 84 % and 84 %, rotated about 82 % and 1 %; Vamana INT8
# rotated 98 % and 1 %; Flat and IVF INT8 rotated 99 % and 99 %. Rows nearest to themselves, HNSW INT8 rotated, by L2: all
# before, none after. The rotation is another in each run.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check numpy==2.3.5 zvec==0.8.0
"$dir/env/bin/python" - "$dir" <<'PY'
import sys

import numpy as np
import zvec
from zvec import (DataType, Doc, FlatIndexParam, HnswIndexParam, IVFIndexParam, MetricType, QuantizerParam, QuantizeType, Query,
                  VamanaIndexParam)

ROWS, D, K = 2000, 128, 10
rng = np.random.default_rng(0)
rows = rng.standard_normal((ROWS, D)).astype(np.float32)
queries = rng.standard_normal((20, D)).astype(np.float32)


def top(collection, query, k):
    return [int(doc.id) for doc in collection.query(Query("v", vector=query.tolist()), topk=k)]


def recall(collection):
    """Share of the K rows of largest inner product that are found."""
    return float(np.mean([len(set(top(collection, q, K)) & set(np.argsort(-(rows @ q))[:K])) / K for q in queries]))


def find_themselves(collection):
    """Share of 200 rows that are the nearest row to themselves."""
    return float(np.mean([top(collection, rows[i], 1) == [i] for i in range(200)]))


def filled(index, metric, kind, rotate):
    path = f"{sys.argv[1]}/{index.__name__}-{metric.name}-{kind}-{rotate}"
    param = index(metric_type=metric, quantize_type=getattr(QuantizeType, kind), quantizer_param=QuantizerParam(rotate))
    schema = zvec.CollectionSchema("rows", vectors=zvec.VectorSchema("v", DataType.VECTOR_FP32, D, index_param=param))
    collection = zvec.create_and_open(path=path, schema=schema)
    for start in range(0, ROWS, 500):
        collection.insert([Doc(id=str(i), vectors={"v": rows[i].tolist()}) for i in range(start, start + 500)])
    return path, collection


ok = True
for index, kind, rotate in ((HnswIndexParam, "INT8", False), (HnswIndexParam, "INT8", True), (HnswIndexParam, "INT4", False),
                            (HnswIndexParam, "INT4", True), (VamanaIndexParam, "INT8", True), (FlatIndexParam, "INT8", True),
                            (IVFIndexParam, "INT8", True)):
    path, collection = filled(index, MetricType.IP, kind, rotate)
    before = recall(collection)
    collection.optimize()
    after = recall(collection)
    del collection
    again = recall(zvec.open(path))
    print(f"{index.__name__} {kind}, rotated {rotate}: {100 * before:.0f} % found, after optimize() {100 * after:.0f} %, "
          f"opened again {100 * again:.0f} %")
    lost = rotate and index in (HnswIndexParam, VamanaIndexParam)
    ok &= before > 0.75 and (max(after, again) < 0.05 if lost else min(after, again) > 0.75)
for rotate in (False, True):
    _, collection = filled(HnswIndexParam, MetricType.L2, "INT8", rotate)
    before = find_themselves(collection)
    collection.optimize()
    after = find_themselves(collection)
    print(f"HnswIndexParam INT8, L2, rotated {rotate}: nearest to themselves are {100 * before:.0f} % of rows, after optimize() "
          f"{100 * after:.0f} %")
    ok &= before == 1 and (after < 0.05 if rotate else after == 1)
sys.exit(0 if ok else 1)
PY
