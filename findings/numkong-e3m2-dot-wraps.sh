#!/usr/bin/env bash
# NumKong (formerly SimSIMD) sums the dot product of e3m2 and e2m3, the 6-bit floats of MX formats, on x86-64 as integers of
# 32 bits in units of 1/256, which its documentation prefers to e5m2 for having no rounding error. From 2^23 on the sum wraps
# around, and is given as a float: with e3m2 from 10,700 products of the largest number, 28, with itself. Values scaled in
# groups of 32 to the format's range, as in MXFP6, reach that within 64 K, 64 positions of 8 heads of 128, in e2m3 within 1 M.
# The product of a vector with itself is then negative or far too small, and with AVX-512 VNNI its cosine distance to itself
# can be NaN and the squared distance of e3m2 is wrong too: measures of a cache's layer before and after coding, where e4m3
# gives plain numbers. The documentation says from which length on integers of 8 bits overflow, and nothing of these floats.
# The code without SIMD sums them as floats; that for Sapphire Rapids does by its documentation.
# Seen with numkong 7.8.6 on x86-64 with AVX-512 VNNI, true values in brackets: 10,700 times 28 with itself -8,388,416
# (8,388,800), 1,048,576 times 0 (822,083,584); 65,536 normal values scaled so, with themselves, -7.1 million (9.6 million),
# their squared distance to their negative 5.0 million (38.6 million); 1,048,576 of e2m3 -5.6 million (11.2 million).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check numpy==2.3.5 numkong==7.8.6
"$dir/env/bin/python" - <<'PY'
import sys

import numkong as nk
import numpy as np

LARGEST = {"e3m2": 28, "e2m3": 7.5, "e4m3": 448}
rng = np.random.default_rng(0)


def scaled(count, largest):
    """Normal values, each group of 32 scaled to the format's range."""
    groups = rng.standard_normal((count // 32, 32)).astype(np.float32)
    return (groups * (largest / np.abs(groups).max(1, keepdims=True))).astype(np.float32).ravel()


def coded(x, kind):
    """x in the format, and its numbers in float64."""
    codes = nk.astype(x, kind)
    return codes, np.asarray(nk.astype(codes, "f32")).astype(np.float64)


def wrapped(value):
    """What 32 bits hold of a sum in units of 1/256."""
    return ((value * 256 + 2**31) % 2**32 - 2**31) / 256


for name, has in nk.get_capabilities().items():
    if has and name not in ("serial", "haswell", "skylake", "icelake", "genoa"):  # those of later processors
        nk.disable_capability(name)
vnni = nk.get_capabilities()["icelake"]
print("with" if vnni else "without", "AVX-512 VNNI")
ok = True
for count in (10699, 10700, 1048576):
    x = nk.astype(np.full(count, 28, np.float32), "e3m2")
    seen, true = float(nk.dot(x, x)), 784.0 * count
    print(f"{count} times 28 with itself: {seen:.0f}, true is {true:.0f}")
    ok &= abs(seen - wrapped(true)) < 1 and (seen == true) == (count < 10700)
for kind in ("e3m2", "e2m3", "e4m3"):
    for count in (4096, 65536, 1048576):
        x, numbers = coded(scaled(count, LARGEST[kind]), kind)
        seen, true = float(nk.dot(x, x)), float(numbers @ numbers)
        minus = coded(-numbers.astype(np.float32), kind)[0]
        distance, angle = float(nk.sqeuclidean(x, minus)), float(nk.angular(x, x))
        print(f"{kind}, {count} scaled values: with themselves {seen:.0f}, true is {true:.0f}; squared distance to their "
              f"negative {distance:.0f}, true is {4 * true:.0f}; cosine distance to themselves {angle:.1g}")
        if true < 2**23 or kind == "e4m3":
            ok &= abs(seen / true - 1) < 1e-3 and abs(angle) < 1e-3
            continue
        ok &= abs(seen - wrapped(true)) < 2 and abs(seen / true - 1) > 0.5
        if vnni:
            ok &= (seen > 0 or np.isnan(angle)) and (kind == "e2m3" or distance < 0.2 * 4 * true)
sys.exit(0 if ok else 1)
PY
