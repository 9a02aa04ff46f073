#!/usr/bin/env python3
"""Facts of the real small model, by the `gguf` package: a CRC-32 over the fp32 bits of some dequantized tensors, in the
Hugging Face row order. Made with gguf 0.19.0 and numpy 2.4.6:

  python tests/golden/make_model_facts.py data/models/SmolLM2-135M-Instruct.Q4_1.gguf > tests/golden/data/smollm2_tensors.json
"""
import importlib.metadata, json, sys, zlib

import gguf
import numpy as np

reader = gguf.GGUFReader(sys.argv[1])
tensors = {t.name: t for t in reader.tensors}


def heads_in_halves(w, heads):
    """Interleaved rows (head, pair, half) to half-split rows (head, half, pair)."""
    dim = w.shape[0] // heads
    return np.ascontiguousarray(w.reshape(heads, dim // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape))


out = {"made_with": {p: importlib.metadata.version(p) for p in ("gguf", "numpy")}, "tensors": {}}
wanted = ["token_embd.weight", "output_norm.weight"]
for layer in (0, 17, 29):
    wanted += [f"blk.{layer}.{n}.weight" for n in
               ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")]
for name in wanted:
    t = tensors[name]
    w = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
    if ".attn_q." in name:
        w = heads_in_halves(w, 9)
    if ".attn_k." in name:
        w = heads_in_halves(w, 3)
    out["tensors"][name] = {"shape": list(w.shape), "crc32": zlib.crc32(w.tobytes()), "first": float(w.flat[0]),
                            "last": float(w.flat[-1]), "sum": float(w.astype(np.float64).sum())}
json.dump(out, sys.stdout, indent=1)
print()
