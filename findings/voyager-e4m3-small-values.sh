#!/usr/bin/env bash
# Voyager's E4M3 is OCP's e4m3 from 2^-6 up and something else below: its subnormal numbers are spaced 2^-10 instead of
# 2^-9 and end at 7 * 2^-10, so that there is nothing between 0.0068 and 0.0156, where the format has 4 numbers. What lies
# there goes to either end by turns, not to the nearer one: 0.0075 becomes 0.0156, the larger 0.0080 becomes 0.0068. There
# is no scale beside the codes: rows of small values, as late layers' V can be, lose far more than 8 bits must, and their
# order, without an error or a warning.
# Seen with voyager 2.2.3 and ml_dtypes 0.6.0 as reference, squared error in % of the squared values, normal values of
# standard deviation 1, 0.1, 0.03, 0.01: voyager 0.07, 0.08, 0.44, 6.72; OCP 0.07, 0.07, 0.08, 0.32 (21 times less).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check numpy==2.3.5 voyager==2.2.3 ml_dtypes==0.6.0
"$dir/env/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np
from voyager import Index, Space, StorageDataType


def stored(x):
    index = Index(Space.InnerProduct, num_dimensions=x.shape[1], storage_data_type=StorageDataType.E4M3)
    return index.get_vectors(index.add_items(x, num_threads=1))


def ocp(x):
    return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def error(y, x):
    return 100 * float(((y - x) ** 2).sum() / (x**2).sum())


numbers = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # 0 to 448
back = stored(numbers[:, None].repeat(4, 1))[:, 0]
moved = {float(a): float(b) for a, b in zip(numbers, back) if a != b}
print("numbers of the format that come back as others:", moved)
ok = sorted(moved) == [k * 2.0**-9 for k in (4, 5, 6, 7)]

grid = np.linspace(0, 2.0**-6, 4096, dtype=np.float32)
values = np.unique(stored(grid[:, None].repeat(4, 1))[:, 0])
print("all values up to 2^-6, in 2^-10:", values * 2**10)
ok &= np.array_equal(values * 2**10, [0, 1, 2, 3, 4, 5, 6, 7, 16])
rising = np.array([7.25, 7.75, 8.25, 8.75, 9.25, 9.75, 10.25, 10.75, 11.25, 11.75], np.float32)
ends = stored((rising / 2**10)[:, None].repeat(4, 1))[:, 0] * 2**10
print("in 2^-10:", *(f"{a} becomes {b:.0f}" for a, b in zip(rising, ends)), sep=" ")
ok &= np.array_equal(ends, [7, 16] * 5)

rng = np.random.default_rng(0)
for deviation, times in ((1, 1.0), (0.1, 1.14), (0.03, 5.3), (0.01, 21)):
    x = (deviation * rng.standard_normal((4000, 128))).astype(np.float32)
    y, z = error(stored(x), x), error(ocp(x), x)
    print(f"standard deviation {deviation}: squared error {y:.2f} %, with OCP's e4m3 {z:.2f} %")
    ok &= abs(y / z / times - 1) < 0.05
sys.exit(0 if ok else 1)
PY
