#!/usr/bin/env python3
"""How far two traces of one model and text are apart, e.g. those of scripts/dump_hf.py and of `vqkv-dump capture --dtype f32`.

    tests/scripts/compare_traces.py a.trace.h5 b.trace.h5 [TOLERANCE]

One row a dataset: relative RMS difference (integers: equal or not). Return code 1 when one is over TOLERANCE (1e-5).
"""
import json
import sys

import h5py
import numpy as np

tolerance, bad = float(sys.argv[3]) if len(sys.argv) > 3 else 1e-5, False
with h5py.File(sys.argv[1]) as a, h5py.File(sys.argv[2]) as b:
    rope = [np.asarray(json.loads(f.attrs["model_json"])["rope"]["inverse_frequency"]) for f in (a, b)]
    rows = [("inverse_frequency", *rope)]
    for name in sorted(set(a) | set(b)):
        if name in a and name in b:
            rows.append((name, a[name][...], b[name][...]))
        else:
            rows.append((name, np.zeros(1), np.ones(1)))
    for name, x, y in rows:
        if x.shape != y.shape or x.dtype.kind == "i":
            difference = 0.0 if np.array_equal(x, y) else np.inf
        else:
            x, y = x.astype("f8"), y.astype("f8")
            difference = float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-300))
        bad |= difference > tolerance
        print(f"{name:18} {difference:.1e}{'  over the tolerance' if difference > tolerance else ''}")
sys.exit(bad)
