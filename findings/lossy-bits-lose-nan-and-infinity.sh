#!/usr/bin/env bash
# The lossy bit filters of two array stores turn what is no number into numbers, and the other way round. numcodecs' BitRound
# (Zarr) rounds a NaN like any pattern of bits: CUDA's, all ones below the sign (0x7fffffff, CUDART_NAN_F; 0x7fff in float16),
# overflows into the sign and is read as -0, so that a kernel's NaNs are gone from the trace that was to show them. NaNs of
# processors stay. netCDF's GranularBitRound writes infinity as -0 and -infinity as 0: in attention scores a mask is gone, and
# the softmax of what is read gives the masked keys a share. Its BitGroom makes every other infinity a NaN, by position; its
# BitRound keeps all. Nothing warns. netCDF's documentation speaks of fill values alone, which are kept, numcodecs' of none.
# Seen with zarr 3.1.6, numcodecs 0.16.6, netCDF4 1.7.5.1.post1 (netCDF-C 4.10.1): as said, whatever number of bits or digits is
# kept; of the softmax of 32 normal scores and 32 masked ones 46 % goes to the masked ones with GranularBitRound.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check numpy==2.3.5 zarr==3.1.6 numcodecs==0.16.6 netCDF4==1.7.5.1.post1
"$dir/env/bin/python" - "$dir" <<'PY'
import itertools
import sys

import netCDF4
import numpy as np
import zarr
from numcodecs import BitRound

count = itertools.count()


def through_zarr(x, bits):
    store = zarr.create_array(f"{sys.argv[1]}/{next(count)}.zarr", data=x, zarr_format=2, filters=[BitRound(bits)])
    return store[...]


def through_netcdf(x, mode, digits):
    path = f"{sys.argv[1]}/{next(count)}.nc"
    with netCDF4.Dataset(path, "w") as f:
        f.createDimension("x", len(x))
        f.createVariable("x", x.dtype, ("x",), quantize_mode=mode, significant_digits=digits, compression="zlib")[...] = x
    with netCDF4.Dataset(path) as f:
        f.set_auto_mask(False)
        return f["x"][...]


def softmax(x):
    with np.errstate(invalid="ignore"):
        e = np.exp(x - x.max())
    return e / e.sum()


ok = True
for kind, bits in ((np.float32, (3, 7, 10)), (np.float16, (3, 7))):
    integer = np.uint32 if kind == np.float32 else np.uint16
    ones = np.iinfo(integer).max
    device = np.full(2, ones >> 1, integer).view(kind)  # NVIDIA's NaN
    host = np.array([np.nan, -np.nan], kind)
    for kept in bits:
        seen = through_zarr(np.concatenate([device, host, [kind(np.inf), kind(-np.inf), kind(1.5)]]), kept)
        print(f"BitRound, {np.dtype(kind)}, {kept} bits: NaN of a device {seen[:2]}, of a processor {seen[2:4]}, infinities "
              f"{seen[4:6]}")
        ok &= (seen[:2] == 0).all() and np.signbit(seen[:2]).all() and np.isnan(seen[2:4]).all()
        ok &= list(seen[4:]) == [np.inf, -np.inf, 1.5]

special = np.array([np.inf, np.inf, -np.inf, -np.inf, np.nan, np.nan], np.float32)
scores = np.random.default_rng(0).standard_normal(64).astype(np.float32)
scores[32:] = -np.inf
for mode, digits in (("GranularBitRound", 2), ("GranularBitRound", 4), ("BitGroom", 2), ("BitGroom", 4), ("BitRound", 7)):
    seen = through_netcdf(special, mode, digits)
    masked = float(softmax(through_netcdf(scores, mode, digits))[32:].sum())
    print(f"{mode}, {digits} digits: inf inf -inf -inf nan nan is read as {seen}; softmax of masked scores {masked:.2f}")
    if mode == "GranularBitRound":
        ok &= (seen[:4] == 0).all() and list(np.signbit(seen[:4])) == [True, True, False, False] and masked > 0.3
    elif mode == "BitGroom":
        ok &= list(np.isnan(seen[:4])) == [False, True, False, True] and np.isnan(masked)
    else:
        ok &= np.array_equal(seen, special, equal_nan=True) and masked == 0
    ok &= bool(np.isnan(seen[4:]).all())
sys.exit(0 if ok else 1)
PY
