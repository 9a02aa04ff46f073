#!/usr/bin/env python3
"""Makes tests/golden/data/quantized_cache.json: tensors, and what transformers' QuantizedCache keeps of them.

Run once, from the repository root:
  python3 tests/golden/make_quantized_cache_goldens.py
Made with transformers 5.23.0, torch 2.9.1 on a CPU, optimum-quanto 0.2.7 and hqq 0.2.8.post1, through the layers of
transformers' cache (QuantoQuantizedLayer, HQQQuantizedLayer). The tests read only the file.

  x         tensors (heads, tokens, head_dim), float32, of which a case takes one in its dtype
  cases     one first update each. codes: two hexadecimal digits a value, in memory order; scale, zero: one a group, in the
            library's order; bits: bytes allocated, in bits a value; decoded, where it is there, is the library's
  refused   updates that end in an error, with its text
  flushed   a prompt, then tokens one by one: what the library decodes after `flushes` times coding all of it again
  again     mean squared error of a prompt of 320 tokens (3 heads of 64) after each of 8 flushes of 128 tokens, over that
            of coding it once
"""
import json, pathlib

import torch
from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

LAYERS = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def tensor(heads, tokens, head_dim, seed):
  """As keys are: a loud channel, a loud token; and one group of equal values."""
  x = torch.randn(heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed))
  x[:, :, 3] += 8
  x[:, tokens // 3] *= 4
  x[0, tokens - 1] = 1.5
  return x


def layer_of(backend, bits, axis, group, residual=128):
  return LAYERS[backend](nbits=bits, axis_key=axis, axis_value=axis, q_group_size=group, residual_length=residual)


def codes_of(backend, held, axis, group, shape):
  """Codes in memory order, then scales and zeros, of what a layer keeps."""
  if backend == "quanto":
    codes, scale, zero = held._data.unpack(), held._scale, held._shift
    if axis == -1:  # (group, channels * runs) -> (runs, group, channels)
      codes = codes.reshape(group, shape[-1], -1).permute(2, 0, 1)
    return codes.reshape(-1), scale.reshape(-1), zero.reshape(-1)
  packed, meta = held
  from hqq.core.quantize import Quantizer
  codes = Quantizer.unpack[meta["packing"]](packed, dtype=torch.uint8)
  if meta["nbits"] == 3:
    codes = codes[:group]
  return codes.reshape(-1), meta["scale"].reshape(-1), meta["zero"].reshape(-1)


def bytes_of(backend, held):
  if backend == "quanto":
    parts = [held._data._data, held._scale, held._shift]
  else:
    parts = [held[0], held[1]["scale"], held[1]["zero"]]
  return sum(t.numel() * t.element_size() for t in parts)


def main():
  shapes = {"even": (2, 16, 16), "few": (3, 5, 16), "wide": (2, 2, 64), "odd": (2, 4, 80), "half": (3, 2, 32)}
  x = {name: tensor(*shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
  wanted = [("quanto", b, a, 16, d, "even") for b in (2, 4) for a in (0, -1) for d in DTYPES]
  wanted += [("quanto", 4, 0, 64, "bf16", name) for name in ("wide", "odd", "half")]
  wanted += [("hqq", b, 0, 16, d, "even") for b in (1, 2, 3, 4, 8) for d in ("f32", "bf16")]
  wanted += [("hqq", b, 1, 16, d, "even") for b in (2, 4, 8) for d in ("f32", "bf16")]
  wanted += [("hqq", 4, 0, 16, "f16", "even"), ("hqq", 4, 0, 16, "bf16", "few"), ("hqq", 4, 0, 64, "bf16", "wide"),
             ("hqq", 4, 1, 64, "bf16", "odd")]
  cases = []
  for backend, bits, axis, group, dtype, name in wanted:
    given = x[name].to(DTYPES[dtype])[None]
    layer = layer_of(backend, bits, axis, group)
    layer.update(given, given)
    held = layer._quantized_keys
    codes, scale, zero = codes_of(backend, held, axis, group, given.shape)
    case = {"backend": backend, "bits": bits, "axis": axis, "group": group, "dtype": dtype, "x": name,
            "codes": bytes(codes.to(torch.uint8).tolist()).hex(), "scale": scale.float().tolist(), "zero": zero.float().tolist(),
            "allocated": 8 * bytes_of(backend, held) / given.numel()}
    if dtype == "bf16" and name == "wide":
      case["decoded"] = layer._dequantize(held).float().reshape(-1).tolist()
    cases.append(case)

  refused = []
  for backend, bits, axis, group, shape in (("hqq", 3, 1, 16, (2, 16, 16)), ("hqq", 4, 1, 16, (1, 5, 16)),
                                            ("quanto", 4, -1, 16, (3, 5, 16)), ("hqq", 4, 0, 64, (1, 1, 80))):
    given = torch.zeros(1, *shape)
    try:
      layer = layer_of(backend, bits, axis, group)
      layer.update(given, given)
      layer._dequantize(layer._quantized_keys)
      raise AssertionError(f"{backend} {bits} {axis}: accepted")
    except (RuntimeError, ValueError, AssertionError) as e:
      assert "accepted" not in str(e), e
      refused.append({"backend": backend, "bits": bits, "axis": axis, "group": group, "shape": shape, "error": str(e)})

  prompt, residual, flushes = 12, 8, 4
  long = tensor(1, prompt + residual * flushes, 16, 9)
  given = long.to(torch.bfloat16)[None]
  layer = layer_of("quanto", 4, 0, 16, residual)
  layer.update(given[:, :, :prompt], given[:, :, :prompt])
  for t in range(prompt, given.shape[2]):
    assert layer.keys.numel() == (t - prompt) % residual * 16
    layer.update(given[:, :, t : t + 1], given[:, :, t : t + 1])
  flushed = {"prompt": prompt, "residual": residual, "flushes": flushes, "x": long.tolist(),
             "decoded": layer._dequantize(layer._quantized_keys).float().reshape(-1).tolist()}

  again = []
  heads, prompt, d = 3, 320, 64
  given = tensor(heads, prompt + 8 * 128, d, 11).to(torch.bfloat16)[None]
  for backend, bits, axis in (("quanto", 4, 0), ("quanto", 2, 0), ("quanto", 4, -1), ("hqq", 4, 0), ("hqq", 2, 0),
                              ("hqq", 4, 1)):
    layer = layer_of(backend, bits, axis, 64)
    layer.update(given[:, :, :prompt], given[:, :, :prompt])
    exact = given[:, :, :prompt].float()
    error = lambda: float((layer._dequantize(layer._quantized_keys)[:, :, :prompt].float() - exact).square().mean())
    once, ratios = error(), []
    for flush in range(8):
      for t in range(prompt + 128 * flush, prompt + 128 * (flush + 1)):
        layer.update(given[:, :, t : t + 1], given[:, :, t : t + 1])
      ratios.append(round(error() / once, 3))
    again.append({"backend": backend, "bits": bits, "axis": axis, "ratios": ratios})

  path = pathlib.Path(__file__).parent / "data" / "quantized_cache.json"
  path.write_text(json.dumps({"x": {name: v.tolist() for name, v in x.items()}, "cases": cases, "refused": refused,
                              "flushed": flushed, "again": again}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main()
