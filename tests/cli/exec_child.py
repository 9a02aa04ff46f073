"""A child of vqkv-eval in standard Python that does as it is told: codes nothing (rows come back as they are), or
misbehaves at a request. exec_child.py WAY [REQUEST [FILE FOR ITS PID]]"""
import json
import os
import struct
import sys
import time

HELLO, BLOCK = struct.Struct("<8sII"), struct.Struct("<4sIIIQII")
way = sys.argv[1]
at = int(sys.argv[2]) if len(sys.argv) > 2 and way not in ("log", "meet") else 0
stdin, stdout = sys.stdin.buffer, sys.stdout.buffer


def meet(mine, other):
    """Ends by itself once another child has been asked to end, too."""
    open(mine, "w").close()
    while not os.path.exists(other):
        time.sleep(0.02)
    open(mine + ".met", "w").close()


def read(size):
    data = stdin.read(size)
    if len(data) < size:
        if way == "meet":
            meet(sys.argv[2], sys.argv[3])
        sys.exit(0)
    return data


def hello(text, magic=b"vqkvexec", version=1, size=None):
    stdout.write(HELLO.pack(magic, version, len(text) if size is None else size) + text)
    stdout.flush()


asked = json.loads(read(HELLO.unpack(read(HELLO.size))[2]))
good = {"name": "child", "keys": "pre_rope" if way == "pre" else "post_rope"}
if way == "print":
    print("hello from a print()", flush=True)
elif way == "silent":
    time.sleep(60)
elif way == "old":
    hello(b"{}", version=7)
elif way == "bad-json":
    hello(b"{nothing")
elif way == "huge-json":
    hello(b"", size=1 << 30)
elif way == "no-keys":
    hello(json.dumps({"name": "child"}).encode())
elif way == "no-such-key":
    hello(json.dumps({**good, "dtype": "f16"}).encode())
elif way == "blocks":
    hello(json.dumps({**good, "block_tokens": {"k": 48}}).encode())
elif way == "end":
    sys.exit("no such weights")
else:
    hello(json.dumps(good).encode())

if way == "log":  # what was asked, a line a block
    log = open(sys.argv[2], "w")
    print(json.dumps(asked), file=log, flush=True)

request = 0
while True:
    magic, sequence, layer, role, position, tokens, channels = BLOCK.unpack(read(BLOCK.size))
    if way == "early" and request == at:  # answers before it has read the rows
        stdout.write(BLOCK.pack(magic, sequence, layer, role, 0, tokens, channels) + bytes(4 * tokens * channels))
        stdout.flush()
        read(4 * tokens * channels)
        request += 1
        at = request
        continue
    rows = read(4 * tokens * channels)
    claimed = tokens * channels // 2
    if way == "log":
        print(json.dumps([sequence, layer, role, position, tokens, channels]), file=log, flush=True)
    if request == at:
        if way == "die":
            print("out of luck", file=sys.stderr, flush=True)
            sys.exit(9)
        if way == "kill":
            os.kill(os.getpid(), 9)
        if way == "hang":
            if len(sys.argv) > 3:
                with open(sys.argv[3] + ".part", "w") as file:
                    file.write(str(os.getpid()))
                os.rename(sys.argv[3] + ".part", sys.argv[3])
            time.sleep(60)
        if way == "short":
            rows = rows[:-4]
        if way == "tokens":
            tokens -= 1
            rows = rows[: 4 * tokens * channels]
        if way == "layer":
            layer += 1
        if way == "claim":
            claimed = 1 << 60
        if way in ("nan", "infinity"):
            value = struct.pack("<f", float(way))
            rows = rows[: 4 * channels] + value + rows[4 * channels + 4 :]
        if way == "print-later":
            print("loss 0.25", flush=True)
    if way == "noisy":
        sys.stderr.write("x" * 300000)
        sys.stderr.flush()
    if way == "more" and request == at:
        rows += b"more"
    stdout.write(BLOCK.pack(magic, sequence, layer, role, claimed, tokens, channels) + rows)
    stdout.flush()
    request += 1
