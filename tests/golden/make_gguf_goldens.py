#!/usr/bin/env python3
"""Golden files of the model formats, written by their own Python packages: gguf 0.19.0, safetensors 0.8.0, numpy 2.4.6.

  python tests/golden/make_gguf_goldens.py tests/golden/data

blocks.gguf   one tensor of random blocks per quantized type, "TYPE", and its dequantization, "TYPE.f32", by
              gguf.quants.dequantize; one key-value of each type.
types.safetensors, types.json   F32, F16, BF16 and I64 tensors and the fp32 bits of the first three.
"""
import json, pathlib, sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

folder = pathlib.Path(sys.argv[1])
rng = np.random.default_rng(20240917)

# Where each type keeps its half-precision scales: byte offsets in a block.
SCALES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q3_K: [108],
          T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.IQ4_NL: [0]}


def halves(n):
    """Finite halves over the whole range, with zeros of both signs and subnormals among them."""
    h = rng.integers(0, 1 << 16, n, dtype=np.uint16)
    h = np.where((h & 0x7C00) == 0x7C00, h & 0x83FF | 0x3800, h).astype(np.uint16)
    special = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x3C00], dtype=np.uint16)
    h[: min(n, len(special))] = special[: min(n, len(special))]
    rng.shuffle(h)
    return h


w = gguf.GGUFWriter(str(folder / "blocks.gguf"), "golden")
w.add_uint8("t.u8", 200)
w.add_int8("t.i8", -100)
w.add_uint16("t.u16", 60000)
w.add_int16("t.i16", -30000)
w.add_uint32("t.u32", 4000000000)
w.add_int32("t.i32", -2000000000)
w.add_uint64("t.u64", 2**63 - 1)
w.add_key_value("t.u64_big", 2**64 - 1, V.UINT64)
w.add_int64("t.i64", -(2**62))
w.add_float32("t.f32", 0.1)
w.add_float64("t.f64", 0.1)
w.add_bool("t.bool", True)
w.add_string("t.string", "naïve 文字")
w.add_array("t.strings", ["a", "", "βγ"])
w.add_array("t.ints", [1, -2, 3])
w.add_array("t.floats", [0.5, -0.25])
for t, offsets in SCALES.items():
    elements, size = gguf.GGML_QUANT_SIZES[t]
    rows, per_row = (3, 2) if elements == 256 else (6, 4)
    blocks = rng.integers(0, 256, (rows * per_row, size), dtype=np.uint8)
    for o in offsets:
        blocks[:, o:o + 2] = halves(len(blocks)).view(np.uint8).reshape(-1, 2)
    raw = blocks.reshape(rows, per_row * size)
    w.add_tensor(t.name, raw, raw_dtype=t)
    w.add_tensor(t.name + ".f32", gguf.quants.dequantize(raw, t).astype(np.float32))
h = halves(64).reshape(2, 32)
w.add_tensor("F16", h.view(np.float16))
w.add_tensor("F16.f32", h.view(np.float16).astype(np.float32))
b = rng.integers(0, 1 << 16, (2, 32), dtype=np.uint16)
raw = b.view(np.uint8).reshape(2, 64)
w.add_tensor("BF16", raw, raw_dtype=T.BF16)
w.add_tensor("BF16.f32", (b.astype(np.uint32) << 16).view(np.float32))
w.add_tensor("F32", rng.standard_normal((2, 3, 5)).astype(np.float32))
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()

from safetensors import TensorSpec, serialize_file  # the package's own serializer: numpy has no bfloat16

arrays = {"a.f32": ("float32", rng.standard_normal((3, 5)).astype(np.float32)),
          "b.f16": ("float16", halves(12).reshape(3, 4).view(np.float16)),
          "c.bf16": ("bfloat16", rng.integers(0, 1 << 16, (2, 7), dtype=np.uint16)),
          "d.i64": ("int64", np.array([-1, 2**40], dtype=np.int64)),
          "e.empty": ("float32", np.zeros((0, 3), dtype=np.float32))}
serialize_file({name: TensorSpec(dtype=dtype, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes)
                for name, (dtype, a) in arrays.items()}, str(folder / "types.safetensors"), {"format": "pt"})
bits = {"a.f32": arrays["a.f32"][1].view(np.uint32), "b.f16": arrays["b.f16"][1].astype(np.float32).view(np.uint32),
        "c.bf16": arrays["c.bf16"][1].astype(np.uint32) << 16}
(folder / "types.json").write_text(json.dumps({k: v.ravel().tolist() for k, v in bits.items()}) + "\n")
