#!/usr/bin/env python3
"""A codec in another program, for `vqkv-eval replay --codec "exec:python3 scripts/exec_rtn.py"`: round to nearest, as
the built-in `rtn` does it. A start for a codec of one's own: replace code(). The stream is described in docs/exec.md."""
import argparse
import json
import struct
import sys

import numpy as np

HELLO = struct.Struct("<8sII")  # magic, version, bytes of JSON
BLOCK = struct.Struct("<4sIIIQII")  # magic, sequence, layer, role, first position or bytes claimed, tokens, channels


def code(x, bits, group):
    """Rows (tokens, channels) as a decoder would give them back, and the bytes that their codes take."""
    groups = x.reshape(len(x), -1, group)
    low = groups.min(axis=2, keepdims=True).astype(np.float64)
    high = groups.max(axis=2, keepdims=True).astype(np.float64)
    top = 2**bits - 1
    # Stored as float16, no scale below its smallest normal number; measured with what is stored.
    scale = np.maximum(((high - low) / top).astype(np.float32), np.float32(2.0**-14)).astype(np.float16)
    zero = low.astype(np.float16)
    codes = np.rint(np.clip((groups - zero.astype(np.float64)) / scale.astype(np.float64), 0, top))
    rows = zero.astype(np.float32) + scale.astype(np.float32) * codes.astype(np.float32)
    return rows.reshape(x.shape), (codes.size * bits + 7) // 8 + 2 * scale.size + 2 * zero.size


def read(stream, size):
    data = stream.read(size)
    if len(data) < size:
        sys.exit(0 if not data else "the stream ends within a block")
    return data


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32, help="channels that share a scale")
    parser.add_argument("--keys", choices=["pre_rope", "post_rope"], default="post_rope")
    o = parser.parse_args()
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer

    _, version, size = HELLO.unpack(read(stdin, HELLO.size))
    if version != 1:
        sys.exit(f"version {version} of the stream is not known")
    json.loads(read(stdin, size))  # layers, kv_heads, head_dim, rope, cache: what a codec may want to know
    hello = json.dumps({"name": f"rtn-{o.bits}.py", "keys": o.keys}).encode()
    stdout.write(HELLO.pack(b"vqkvexec", 1, len(hello)) + hello)
    stdout.flush()

    while True:
        magic, sequence, layer, role, position, tokens, channels = BLOCK.unpack(read(stdin, BLOCK.size))
        x = np.frombuffer(read(stdin, 4 * tokens * channels), "<f4").reshape(tokens, channels)
        rows, claimed = code(x, o.bits, o.group)
        stdout.write(BLOCK.pack(magic, sequence, layer, role, claimed, tokens, channels))
        stdout.write(np.ascontiguousarray(rows, "<f4").tobytes())
        stdout.flush()


if __name__ == "__main__":
    main()
