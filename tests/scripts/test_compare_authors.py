"""scripts/compare_authors.py on the tiny model: every system decodes to what a reading of its paper's formulas decodes to,
within 1 % of its error, and KVQuant's levels lose no more than the reading's own. test_compare_authors.py FOLDER, where the
tools lie."""
import os
import sys
import tempfile

try:
    import h5py  # noqa: F401
    import numpy as np
except ImportError as e:
    print(f"not run: {e} (Debian: python3-h5py python3-numpy)")
    sys.exit(1 if os.environ.get("VQKV_NO_SKIP") else 77)

from tiny_codecs import Tools

import compare_authors
from vqkv_authors import readings

# Rows whose values agree but for the rounding of stored sides; of QuantSpec the lower nibble is no wider than that.
EQUAL = {"CommVQ": 0.9, "KVQuant": 0.9, "QuantSpec": 0.9}


def check_readings():
    """Worked examples of the papers' formulas, by hand."""
    key = np.array([[.15, -3], [.40, 5], [-.20, .5], [.25, -1]])  # 2 bits, four tokens a group
    made = readings.in_token_groups(key, 4, lambda x: readings.affine(x, 2))
    assert np.allclose(made, [[.2, -3], [.4, 5], [-.2, -1 / 3], [.2, -1 / 3]])
    levels = readings.lloyd(np.array([0.0, 1, 10, 11]), np.array([1.0, 3, 1, 1]), 2)
    assert np.allclose(levels, [.75, 10.5])
    books = np.array([[[1.0, 0], [0, 1]], [[0.25, 0], [0, 0.25]]])
    assert np.allclose(readings.greedy(np.array([[1.2, 0.1]]), books), [[1.25, 0]])


def main():
    check_readings()
    with tempfile.TemporaryDirectory() as folder:
        tools = Tools(sys.argv[1], folder)
        trace = compare_authors.Trace(tools.trace)
        for name in compare_authors.CASES:
            for r in compare_authors.compare(tools.binaries, trace, name):
                most = 1e-3 if r["excuse"] == "learned" else compare_authors.ALLOWED
                assert r["difference"] <= most, f"{name}: {r}"
                if not r["excuse"]:
                    assert r["difference"] >= -compare_authors.ALLOWED, f"{name}: {r}"
                    assert r["equal"] >= EQUAL.get(name, 0.98), f"{name}: {r}"
    print(f"ok: {len(compare_authors.CASES)} systems")


if __name__ == "__main__":
    main()
