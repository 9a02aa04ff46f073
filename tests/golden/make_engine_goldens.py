#!/usr/bin/env python3
"""Makes tests/golden/data/engine_codes.json: rows, and the bytes that other quantizers make of them.

Run once, from the repository root:
  python3 tests/golden/make_engine_goldens.py
Made with gguf 0.19.0 (NumPy quantizers), xllamacpp 2026.10.11549 (llama.cpp's reference functions, called in its shared
library; the package `gguf` has no iq4_nl) and ml_dtypes 0.6.0 (8-bit floats). Where two of them know a format, they must
agree. The tests read only the file.

  x         blocks of 32 numbers, exact in float32
  ggml      format -> the blocks' bytes in hexadecimal
  fp8_x     numbers, exact in float32
  e4m3, e5m2   their bytes, saturated
"""
import ctypes, json, pathlib

import gguf
import ml_dtypes
import numpy as np
import xllamacpp

BYTES = {"q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18}
LIBRARY = ctypes.CDLL(str(next(pathlib.Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))


def rows():
  rng = np.random.default_rng(17)
  normal = rng.standard_normal((6, 32)) * np.array([[1], [0.02], [30], [1], [1], [5e-6]])
  normal[3, 7] = -40  # an outlier
  normal[4] = np.abs(normal[4]) + 0.5  # one sign
  ties = np.round(rng.standard_normal((3, 32)) * 8) / 4
  ties[:, 0] = [8, -8, 127 / 16]
  even = np.where(np.arange(32) % 2, 2.0, -2.0)[None]  # the loudest value twice, the negative one first
  constant = np.full((1, 32), 3.25)
  flushed = rng.standard_normal((1, 32)) * 1e-8  # scales below float16
  return np.concatenate([normal, ties, even, constant, -constant, flushed]).astype(np.float32)


def by_llama_cpp(name, x):
  out = np.zeros((len(x), BYTES[name]), np.uint8)
  function = getattr(LIBRARY, f"quantize_row_{name}_ref")
  function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
  function(x.ctypes.data, out.ctypes.data, x.size)
  return out


def main():
  x = rows()
  blocks = {}
  for name in BYTES:
    blocks[name] = by_llama_cpp(name, x)
    if name != "iq4_nl":
      kind = gguf.GGMLQuantizationType[name.upper()]
      assert np.array_equal(gguf.quants.quantize(x, kind).reshape(len(x), -1), blocks[name]), name
  rng = np.random.default_rng(18)
  halves = [(1 + (2 * k + 1) / 16) * 2.0**e for k in range(4) for e in (-16, -8, -6, 0, 8)]
  f = np.concatenate([[0, -0.0, 448, 464, 465, -1e6, 57344, 1e30, 2**-9, 2**-10, 1.5 * 2**-10, 2**-16, 2**-17, 1e-30],
                      halves, 1.125 + np.array([2.0**-20, -2.0**-20]), rng.standard_normal(20) * 4.0**rng.integers(-8, 6, 20)])
  f = f.astype(np.float32)
  fp8 = {name: np.clip(f, -top, top).astype(kind).view(np.uint8).tolist()
         for name, kind, top in (("e4m3", ml_dtypes.float8_e4m3fn, 448), ("e5m2", ml_dtypes.float8_e5m2, 57344))}
  out = {"x": [[float(v) for v in row] for row in x],
         "ggml": {name: [bytes(b).hex() for b in blocks[name]] for name in BYTES},
         "fp8_x": [float(v) for v in f], **fp8}
  path = pathlib.Path(__file__).resolve().parent / "data/engine_codes.json"
  path.write_text(json.dumps(out, separators=(",", ":")).replace("],", "],\n") + "\n")


main()
