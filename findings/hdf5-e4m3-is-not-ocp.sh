#!/usr/bin/env bash
# HDF5 lets a file define any float by its fields, so 1 + 4 + 3 bits with bias 7 looks like the way to store FP8 caches
# with a type that says what they are. HDF5 reads such a type by IEEE rules: the top exponent is infinity and NaN, and the
# largest number is 240. OCP's e4m3, which every FP8 cache uses, has numbers there, 256 to 448. Read back through that
# type, the 7 largest magnitudes of the format become infinity or NaN; written through it, 256 becomes infinity.
# Seen with h5py 3.16.0 (HDF5 2.0.0) and ml_dtypes 0.6.0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check numpy==2.3.5 h5py==3.16.0 ml_dtypes==0.6.0
"$dir/env/bin/python" - "$dir" <<'PY'
import sys

import h5py
import ml_dtypes
import numpy as np

bits = np.arange(256, dtype=np.uint8)
ocp = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
e4m3 = h5py.h5t.IEEE_F32LE.copy()
e4m3.set_fields(7, 3, 4, 0, 3)
e4m3.set_size(1)
e4m3.set_ebias(7)
raw = h5py.h5t.STD_U8LE
with h5py.File(f"{sys.argv[1]}/x.h5", "w") as f:
    d = h5py.h5d.create(f.id, b"codes", e4m3, h5py.h5s.create_simple(bits.shape))
    d.write(h5py.h5s.ALL, h5py.h5s.ALL, bits.view(np.void), mtype=e4m3)  # the bytes as they are
    d = h5py.h5d.create(f.id, b"values", e4m3, h5py.h5s.create_simple((3,)))
    d.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array([240, 256, 448], np.float32))
with h5py.File(f"{sys.argv[1]}/x.h5") as f:
    read = np.empty(256, np.float32)
    f["codes"].id.read(h5py.h5s.ALL, h5py.h5s.ALL, read)
    back = np.empty(3, np.float32)
    f["values"].id.read(h5py.h5s.ALL, h5py.h5s.ALL, back)
finite = np.isfinite(ocp)
lost = finite & (read != ocp)
print("magnitudes of the OCP format that are read as something else:", sorted({float(abs(v)) for v in ocp[lost]}))
print("read as:", sorted({str(abs(v)) for v in read[lost]}))
print("240, 256, 448 written and read:", back)
ok = sorted({float(abs(v)) for v in ocp[lost]}) == [256, 288, 320, 352, 384, 416, 448] and back[0] == 240 and np.isinf(back[1])
sys.exit(0 if ok else 1)
PY
