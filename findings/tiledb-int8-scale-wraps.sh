#!/usr/bin/env bash
# TileDB's FloatScaleFilter stores floats as integers of 1 to 8 bytes, round((x - offset) / factor), which makes it the natural
# store for a cache at 8 bits. A value beyond the range of its integer is neither refused nor clipped: it wraps around, so
# that one just above the largest is read as the smallest, with the other sign, and an outlier of twice the range as nearly 0.
# A scale is fit to the first rows and the rows go on: a handful of values that are larger by a little then cost more than
# the rounding of all others. The documentation gives the formula and nothing of its ends; that of numcodecs'
# FixedScaleOffset, which wraps too, warns of them.
# Seen with tiledb 0.36.1 (libtiledb 2.30.0, x86-64), 20,000 rows of 128 normal values, factor from the largest of the first 256
# rows: 22 of 2,560,000 values are beyond the range and make 87 % of the squared error, which is 7.7 times that of clipped
# codes. With a range of 3: 3.02 is read as -3.02, -3.05 as 3, 4 as -2.06, 6 as -0.05.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check numpy==2.3.5 tiledb==0.36.1
"$dir/env/bin/python" - "$dir" <<'PY'
import itertools
import sys

import numpy as np
import tiledb

count = itertools.count()


def stored(x, factor):
    """What is read of x, kept in one signed byte a value."""
    path = f"{sys.argv[1]}/{next(count)}"
    rows = tiledb.Domain(tiledb.Dim("value", domain=(0, x.size - 1), tile=x.size, dtype=np.int64))
    byte = tiledb.FilterList([tiledb.FloatScaleFilter(factor=factor, offset=0.0, bytewidth=1)])
    tiledb.Array.create(path, tiledb.ArraySchema(domain=rows, attrs=[tiledb.Attr("", dtype=x.dtype, filters=byte)]))
    with tiledb.open(path, "w") as array:
        array[:] = x.ravel()
    with tiledb.open(path) as array:
        return array[:].reshape(x.shape)


values = np.array([1, -2, 3, 3.02, -3.05, 4, 6, -6], np.float32)
seen = stored(values, 3 / 127)
print("with a range of 3:", ", ".join(f"{v:g} is read as {s:.2f}" for v, s in zip(values, seen)))
ok = bool(np.abs(seen[:3] - values[:3]).max() < 3 / 127 and (np.sign(seen[3:]) == -np.sign(values[3:])).all()
          and np.abs(np.abs(seen[3:4]) - 3.02).max() < 3 / 127 and np.abs(seen[6:]).max() < 0.1)

x = np.random.default_rng(0).standard_normal((20000, 128)).astype(np.float32)
factor = float(np.abs(x[:256]).max()) / 127
seen = stored(x, factor)
codes = np.round(x / factor)
clipped = np.clip(codes, -128, 127) * factor
beyond = (codes != np.clip(codes, -128, 127))
error, least = (float(((y.astype(np.float64) - x) ** 2).sum()) for y in (seen, clipped))
print(f"{beyond.sum()} of {x.size} values are beyond the range; squared error {error:.0f}, {error / least:.2f} times that of "
      f"clipped codes, {100 * float(((seen - x)[beyond] ** 2).sum()) / error:.0f} % of it from those values")
ok &= 0 < beyond.sum() < 50 and error > 2 * least
ok &= bool(np.abs(seen - clipped)[~beyond].max() < 1.01 * factor)
sys.exit(0 if ok else 1)
PY
