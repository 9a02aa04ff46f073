#!/usr/bin/env bash
# TensorStore has float8_e8m0fnu, the type of MX formats' scales (8 bits of exponent, no sign, bias 127), and stores its bytes
# as they are, but converts it as another format: with bias 63, and with the top bit taken for a sign. Scales as ml_dtypes
# makes them, read as float32 through TensorStore, are wrong without exception: 0.5 becomes 2^63, 1 becomes 2^64, and 2
# becomes -2^65. Scales that it converts from float32 are wrong for everybody else: 1 is stored as 2^-64. There and back,
# 2^-62 to 2^64 come out right, so that a test within TensorStore passes. Its other small floats, among them float8_e4m3fn
# and float4_e2m1fn, convert as in ml_dtypes. Nothing warns.
# Seen with tensorstore 0.1.86 and ml_dtypes 0.6.0: of the 255 numbers of the format, 2^-127 to 2^127, none is read right and
# none is written right.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check numpy==2.3.5 tensorstore==0.1.86 ml_dtypes==0.6.0
"$dir/env/bin/python" - "$dir" <<'PY'
import sys

import ml_dtypes
import numpy as np
import tensorstore as ts

E8M0 = ml_dtypes.float8_e8m0fnu


def converted(store, kind):
    return np.asarray(ts.cast(store, kind).read().result())


scales = np.arange(255, dtype=np.uint8).view(E8M0)  # 255 is NaN
values = scales.astype(np.float32)  # 2^-127 to 2^127
file = ts.open({"driver": "zarr3", "kvstore": f"file://{sys.argv[1]}/scales/"}, create=True, dtype=ts.float8_e8m0fnu,
               shape=scales.shape).result()
file.write(scales).result()
same = np.array_equal(np.asarray(file.read().result()).view(np.uint8), scales.view(np.uint8))
read = converted(file, ts.float32)
written = converted(ts.array(values), ts.float8_e8m0fnu).view(np.uint8)
back = converted(ts.array(converted(ts.array(values), ts.float8_e8m0fnu)), ts.float32)
print(f"bytes of a zarr3 store kept: {same}; read right {int((read == values).sum())}, "
      f"written right {int((written == scales.view(np.uint8)).sum())} of {len(scales)}")
for n in (126, 127, 128):
    print(f"{values[n]}: read as {read[n]:.4g}, written as {written[n:n + 1].view(E8M0).astype(np.float32)[0]:.4g}")
kept = np.flatnonzero(back == values) - 127
print(f"written and read come back: 2^{kept.min()} to 2^{kept.max()}, {len(kept)} in all")
ok = same and not (read == values).any() and not (written == scales.view(np.uint8)).any() and len(kept) > 100
ok &= list(read[126:129]) == [2.0**63, 2.0**64, -2.0**65] and written[127] == 63

x = np.arange(65536, dtype=np.uint16).view(np.float16)
x = x[np.isfinite(x)].astype(np.float32)
for name in ("bfloat16", "float8_e3m4", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float4_e2m1fn"):
    got = converted(ts.array(x), getattr(ts, name))
    with np.errstate(all="ignore"):
        differ = int((got.view(np.uint8) != x.astype(getattr(ml_dtypes, name)).view(np.uint8)).sum())
    print(f"{name}: {differ} bytes differ from ml_dtypes")
    ok &= differ == 0
sys.exit(0 if ok else 1)
PY
