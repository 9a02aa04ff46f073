#!/usr/bin/env python3
"""Seeds of the fuzz targets that read texts, and of those that read their input as decisions; needs nothing but Python.

  python3 tests/fuzz/make_text_seeds.py tests/fuzz/seeds
"""
import json
import pathlib
import random
import sys

root = pathlib.Path(sys.argv[1])
goldens = pathlib.Path(__file__).resolve().parents[1] / "golden" / "data" / "tokens"


def put(target, name, content):
    (root / target).mkdir(parents=True, exist_ok=True)
    (root / target / name).write_bytes(content if isinstance(content, bytes) else content.encode())


# The published pre-tokenizers over vocabularies cut to the 256 bytes and their first 40 merges.
for name in ("gpt2", "smollm", "qwen2", "llama-bpe"):
    t = json.loads((goldens / f"{name}.tokenizer.json").read_text())
    t["model"]["merges"] = t["model"]["merges"][:40]
    made = ["".join(m if isinstance(m, list) else m.split(" ")) for m in t["model"]["merges"]]
    kept = [w for w, i in sorted(t["model"]["vocab"].items(), key=lambda e: e[1]) if i < 256] + made
    t["model"]["vocab"] = {w: i for i, w in enumerate(dict.fromkeys(kept))}
    for i, added in enumerate(t["added_tokens"]):
        added["id"] = len(t["model"]["vocab"]) + i
    text = json.dumps(t, ensure_ascii=False, separators=(",", ":"))
    put("tokenizer_json", name, text.encode() + b"\0" + "It's 1234 <|im_start|>\u00e9\u4e2d\n\n  x".encode())
put("tokenizer_json", "config", json.dumps({"add_bos_token": True, "bos_token": {"content": "<end>"}, "eos_token_id": [1, 2],
                                            "chat_template": [{"name": "default", "template": "{{ m }}"}],
                                            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
                                            "added_tokens": [{"id": 3, "content": "<end>", "special": True, "lstrip": True}]}))

put("yaml", "cell.yaml", """# one cell
trace: {path: t.trace.h5, train: [0, 1], select: [2], report: [3]}
cache: {sinks: 4, window: 128, flush: 64}
codec:
  name: rvq
  codebooks: 8   # stages
  bits: 8
  k: {rope: pre, transform: [center, {name: query_metric, axes: true}]}
  overrides:
    - {layers: [0, 1], heads: all, set: {k.bits: 4}}
""")
put("yaml", "grid.yaml", """codec: {name: pq, codebooks: 2, bits: 4}
sweep:
  grid: {codec.codebooks: [1, 2, 4], codec.bits: [3, 5]}
  zip: {codec.k.bits: [1, 2], codec.v.bits: [3, 4]}
  repeat: {seed: [1, 2]}
  skip:
    - {codec.codebooks: 4, codec.bits: 5}
group: small
groups:
  small: {sweep: {grid: {codec.bits: [2]}}}
""")
put("yaml", "syntax.yaml", 'a: &x {b: [1, 2.5e-3, 0x1f, .5, ~, true, "q\\n", \'s\']}\nc: *x\nd: |\n  lines\n  more\ne: >-\n  folded\n? f\n: - 1\n  - - 2\n')
put("yaml", "override", "sweep.grid.codec.bits=[4, {a: 8}]")

record = {"cell": "9c" * 32, "attempt": 1, "status": "ok", "time": "2026-01-02T03:04:05Z",
          "measurements": [{"tag": "key.nmse", "role": "report", "value": 0.0123, "n": 2, "per_layer": [0.01, 1e-300]},
                           {"tag": "bits_per_value", "role": "cost", "context": 4096, "sequences": 64, "value": 2.5}],
          "flags": ["extrapolated"], "prov": {"command": "\u00e9 \\ \"", "host": None, "dirty": False}}
line = json.dumps(record, separators=(",", ":"))
put("jsonl", "two.jsonl", line + "\n" + line.replace('"ok"', '"failed"') + "\n")
put("jsonl", "cut.jsonl", line + "\n" + line[:100])
put("jsonl", "odd.jsonl", '\n{}\n[]\n1\n"x"\n{"a":{"b":[{"c":[[1]]}]}}\r\n')

draw = random.Random(1)
for target in ("trace", "archive"):
    for i in range(6):
        put(target, f"decisions-{i}", draw.randbytes(16 << i))
