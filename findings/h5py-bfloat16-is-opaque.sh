#!/usr/bin/env bash
# h5py accepts a NumPy array of ml_dtypes' bfloat16 (what JAX and many exporters hand over) and stores it as an opaque
# type of 2 bytes without a tag: no error, no warning, and whoever reads it gets void bytes and no sign of what they were.
# float8_e4m3fn goes the same way with 1 byte, while float8_e5m2 is refused with a TypeError.
# Seen with h5py 3.16.0 (HDF5 2.0.0) and ml_dtypes 0.6.0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check numpy==2.3.5 h5py==3.16.0 ml_dtypes==0.6.0
"$dir/env/bin/python" - "$dir" <<'PY'
import sys
import warnings

import h5py
import ml_dtypes
import numpy as np

warnings.simplefilter("error")
seen = {}
with h5py.File(f"{sys.argv[1]}/x.h5", "w") as f:
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        try:
            d = f.create_dataset(name, data=np.ones(4, getattr(ml_dtypes, name)))
            kind = d.id.get_type()
            opaque = kind.get_class() == h5py.h5t.OPAQUE
            seen[name] = ("opaque" if opaque else "typed", kind.get_size(), kind.get_tag() if opaque else None, d[...].dtype.str)
        except TypeError:
            seen[name] = "TypeError"
for item in seen.items():
    print(*item)
ok = (seen["bfloat16"] == ("opaque", 2, b"", "|V2") and seen["float8_e4m3fn"] == ("opaque", 1, b"", "|V1")
      and seen["float8_e5m2"] == "TypeError")
sys.exit(0 if ok else 1)
PY
