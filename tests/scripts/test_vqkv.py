"""scripts/vqkv.py against the tools: archives of every method, with every transform between them, made of a tiny model;
their codes decode to the bits of the C++ decoder, and NumPy's encoders write the same codes. test_vqkv.py FOLDER, where
the tools lie."""
import json
import os
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy as np
except ImportError as e:
    print(f"not run: {e} (Debian: python3-h5py python3-numpy)")
    sys.exit(1 if os.environ.get("VQKV_NO_SKIP") else 77)

from tiny_codecs import Tools, refused, root

import vqkv
from vqkv_numpy.cache import Policy, Rope
from vqkv_numpy.methods import make_method
from vqkv_numpy.numbers import float8, round_side, to_float8
from vqkv_numpy.plan import decode

# What of a method or preset takes its time, or more channels than a head of 32 has; the rest is as it is.
FITTING = {"pq": "iterations: 3, bits: 5", "rvq": "iterations: 3, refine: 1, bits: 5, codebooks: 4",
           "kumar": "iterations: 3, ema_steps: 2, ema_batch: 256, bits: 5",
           "simvq": "rounds: 2, steps: 2, points: 4, k: {bits: 5}, v: {bits: 5}",
           "commvq": "bits: 4, steps: 2, points: 256, start_points: 64, value_steps: 3, value_batch: 64, hidden: 64",
           "pq.nova": "iterations: 3, bits: 5, v: {transform: []}", "kivi.g64": "v: {group: 32}",
           "quantspec.g64": "v: {group: 32}", "specache": "v: {group: 32}",
           **{f"ggml.rot-{t}": "v: {transform: [hadamard]}" for t in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")}}
# Beside the presets: the other transforms, storage types, placements and ways to pool heads.
CELLS = {
    "fitted": "codec: {name: rtn, bits: 3, group: 16, k: {rope: pre, transform: [center, {name: hadamard, signs: true, "
              "block: 16}, channel_scale]}, v: {axis: channel, group: 8, transform: [{name: token_scale, per: head}]}}",
    "pooled": "codec: {name: pq, codebooks: 8, bits: 4, heads: all, k: {rope: pre, transform: [query_metric, "
              "{name: token_scale, by: absmax, type: bf16}]}, v: {transform: [{name: low_rank, rank: 32}, rotation]}}",
    "metric": "codec: {name: rvq, codebooks: 3, bits: 4, group: 16, grouping: rope_pair, encoding: greedy, heads: all, "
              "stored_as: bf16, k: {transform: [center, query_metric]}, v: {transform: [hadamard, channel_scale]}}",
    "pruned": "codec: {name: rtn, bits: 4, group: 8, scale_type: bf16, k: {transform: [center, {name: prune_channels, "
              "ratio: 0.25}, hadamard]}, v: {transform: [{name: prune_channels, ratio: 0.5}, identity]}}",
    "chained": "codec: {name: kumar, codebooks: 2, bits: 3, group: 16, scale_type: f8e5m2, stored_as: f8e5m2, heads: all, "
               "k: {transform: [channel_scale]}, v: {transform: [center]}}",
    "branches": "codec: {name: simvq, codebooks: 6, bits: 4, rounds: 2, encoding: beam, heads: all, k: {rope: pre, "
                "low_codebooks: 2, low_period: 300, transform: [center, hadamard]}}",
    "exceptions": "codec: {name: kvquant, bits: 2, outliers: 0.05, q_norm: true, transform: [center, channel_scale]}",
    "thinner": "codec: {name: rtn, bits: 4, group: 0, heads: all, k: {transform: [center, think]}, v: {transform: [deco, "
               "channel_scale]}}",
    "rounded": "codec: {name: ggml, type: q5_1, k: {query: q8, transform: [hadamard]}}",
    "calibrated": "codec: {name: calibquant, preset: b4, transform: [{name: hadamard, block: 8}]}\ncache: {window: 128}",
}
# Near ties between codewords may fall the other way, and the last bit of an axis.
SEARCHED = {"pq", "rvq", "simvq", "kumar", "commvq", "deco"}


def presets(tools):
    """(name, cell) of every preset of every method."""
    for method in tools.run("vqkv-sweep", "ls", "codecs"):
        name = method["name"]
        for preset, published in tools.run("vqkv-sweep", "explain", name)["presets"].items():
            knobs = f"name: {name}, preset: {preset}"
            fitting = FITTING.get(f"{name}.{preset}", FITTING.get(name))
            cache = "cache: {window: 128}\n" if published.get("cache", {}).get("coded") == "image" else ""  # of a text
            yield f"{name}.{preset}", f"codec: {{{knobs}{', ' + fitting if fitting else ''}}}\n{cache}"


def rows_of(trace, unit, window, rope, dtype):
    """The unit's rows of a whole window as a cache hands them to its codec."""
    first, count = window["first_token"], window["tokens"]
    heads = slice(unit.first_head, unit.first_head + unit.heads)
    x = trace["key" if unit.role == "k" else "value"][unit.layer, heads, first : first + count]
    x = np.ascontiguousarray(x.transpose(1, 0, 2), np.float32).reshape(count, -1)
    if unit.role == "k" and unit.rope == "post":
        x = rope.turn(x, 0)
    return round_side(dtype, x)


def check(tools, name, cell, trace):
    path, coded = tools.archive(name, cell), str(tools.folder / (name + ".codes.h5"))
    tools.run("vqkv-sweep", "encode", path, tools.trace, "trace.report=[3]", "-o", coded)
    units = vqkv.check(path, coded)  # bit for bit
    codecs, file = vqkv.load(path), vqkv.CodedRows(coded)
    assert units == len(codecs.units) and len(file.windows) == 1
    rope, policy = Rope(codecs.shape["rope"]), Policy(codecs.cache)
    policy.waits = max([policy.prompt] + [u.method.fit_tokens for u in codecs.units])
    for number, unit in enumerate(codecs.units):
        names = {unit.spec["method"], *(t["name"] for t in unit.spec["transforms"])}
        codes, decoded, _ = file.read(0, number, unit)
        rows, sinks = rows_of(trace, unit, file.windows[0], rope, policy.dtype), file.windows[0]["sinks"]
        prefix = rows[: policy.fitted_tokens(len(rows))]
        if "think" in names:
            refused(vqkv.UnknownKind, "'think' is fitted to the queries of a prompt", lambda: unit.fit(prefix))
            continue
        prompt = unit.fit(prefix)
        mine = unit.encode(rows[sinks : sinks + codes.tokens], prompt)
        where = f"{name}: {unit}"
        if names & SEARCHED:
            same = np.mean([np.mean(a == b) for a, b in zip(mine.fields, codes.fields)])
            error, theirs = (np.mean((y - rows[sinks : sinks + codes.tokens]) ** 2)
                             for y in (unit.decode(mine, prompt), decoded))
            near = same > 0.5 and abs(error - theirs) < 0.01 * theirs  # a stage that differs changes all behind it
            assert near, f"{where}: {same:.4f} of the codes, {error} for {theirs}"
        else:
            for a, b in zip(mine.fields + mine.sides, codes.fields + codes.sides):
                assert np.array_equal(a, b), f"{where}: {np.mean(a != b):.2g} of the codes differ"
            assert np.array_equal(mine.overlay, codes.overlay), where
        if unit.spec["method"] == "quantspec":  # its first level is a 4-bit code by itself: KIVI's
            first = codes.head(unit.method.level_layout(1))
            plain = make_method("kivi", {"bits": 4, "group": unit.method.group}, unit.method.unit, None)
            alone = decode(plain.plan(), plain.encode(rows[sinks : sinks + codes.tokens]))
            assert first.fields[1].shape[1] == 0 and np.array_equal(decode(unit.method.plan(stages=1), first), alone)
    return path, coded


def changed(path, copy, edit):
    """A copy of an archive whose facts `edit` changes."""
    with h5py.File(path) as f, h5py.File(copy, "w") as to:
        for name in f:
            f.copy(name, to)
        for name, value in f.attrs.items():
            to.attrs[name] = value
        edit(to.attrs)
    return copy


def check_refusals(tools, path, coded, other, fitted_path):
    copy = str(tools.folder / "copy.h5")

    def spoil(name, old, new):
        def edit(attributes):
            text = attributes[name]
            attributes[name] = text.replace(old, new) if isinstance(text, str) else new
        return lambda: vqkv.load(changed(path, copy, edit))

    refused(vqkv.UnknownKind, "method 'ntr'; known: exact, rtn", spoil("set", '"method":"rtn"', '"method":"ntr"'))
    refused(vqkv.UnknownKind, "transform 'warp'; known: identity", spoil("set", '"name":"center"', '"name":"warp"'))
    refused(vqkv.BadFile, "must be \"vqkv-codec\"", lambda: vqkv.load(coded))
    refused(vqkv.BadFile, "format version 2; this reader knows 1 to 1", spoil("format_version", None, 2))
    refused(vqkv.BadFile, "incomplete", spoil("complete", None, 0))
    refused(vqkv.BadFile, "codes of another codec file", lambda: vqkv.check(other, coded))
    unit = vqkv.load(path).units[0]
    refused(ValueError, "takes whole blocks", lambda: unit.encode(np.zeros((3, 5), np.float32)))
    refused(ValueError, "not finite", lambda: unit.encode(np.full((1, unit.channels), np.nan, np.float32)))
    refused(vqkv.BadFile, "'index_json' is damaged", spoil("index_json", '"facts"', '"facts'))
    fitted = vqkv.load(fitted_path).units[1]
    refused(ValueError, "15 rows; k of layer 0, KV heads 1 to 1: calibquant behind hadamard is fitted to 16 tokens",
            lambda: fitted.fit(np.zeros((15, fitted.channels), np.float32)))
    row = np.ones((1, fitted.channels), np.float32)
    refused(ValueError, "is fitted to each prompt", lambda: fitted.encode(row))
    codes = fitted.encode(row, fitted.fit(np.ones((16, fitted.channels), np.float32)))
    refused(ValueError, "is fitted to each prompt", lambda: fitted.decode(codes))

    def without(name):
        with h5py.File(changed(path, copy, lambda attributes: None), "r+") as f:
            del f[name]
        return lambda: vqkv.load(copy)

    refused(vqkv.BadFile, "copy.h5: 'codec/00000/transform.0.mean' is damaged", without("codec/00000/transform.0.mean"))
    # One bit of one code, and the files no longer agree.
    with h5py.File(coded, "r+") as f:
        f["window/00000/unit/00001/field/code"][5, 3] += 1
    refused(vqkv.BadFile, "window 0, k of layer 0, KV heads 1 to 1: rtn behind center", lambda: vqkv.check(path, coded))
    script = [sys.executable, str(root / "scripts/vqkv.py")]
    done = subprocess.run([*script, "check", path, coded], capture_output=True, text=True)
    assert done.returncode == 3 and "16 of " in done.stderr, done  # one code, in a block of the Hadamard matrix
    done = subprocess.run([*script, "list", path], capture_output=True, text=True)
    assert done.returncode == 0 and "k of layer 0, KV heads 0 to 0: rtn behind center" in done.stdout, done
    assert "v of layer 1, KV heads 1 to 1: rtn behind token_scale, 7.5 bits a value" in done.stdout, done
    assert subprocess.run(script, capture_output=True).returncode == 2


def check_float8():
    for mantissa in (3, 2):
        numbers = float8(np.arange(256), mantissa)
        finite = np.isfinite(numbers)
        assert np.array_equal(to_float8(numbers[finite], mantissa), np.arange(256)[finite])
        ordered = np.sort(numbers[finite & (numbers >= 0) & ~np.signbit(numbers)])
        middle = ((ordered[1:].astype(np.float64) + ordered[:-1]) / 2).astype(np.float32)
        assert np.all(to_float8(middle, mantissa) % 2 == 0)  # halfway to even


def kept_rows(unit):
    """What the kept codecs coded (rows_of in tests/golden/kept/kept_trace.h): (tokens, channels)."""
    t, c = np.indices((max(4, unit.layout.block_tokens), unit.channels), np.uint64)
    z = np.full(t.shape, 0x9E3779B97F4A7C15 if unit.role == "v" else 0, np.uint64)
    for part in (np.uint64(0), np.uint64(unit.first_head) + c // np.uint64(16), t, c % np.uint64(16)):
        z = (z ^ part) * np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(29)
    return ((z % np.uint64(255)).astype(np.float32) - 127) / 32


def check_kept():
    """Archives of version 1, which older builds wrote."""
    folder = root / "tests/golden/kept/v1"
    for name, units in json.loads((folder / "expected.json").read_text())["codecs"].items():
        codecs = vqkv.load(str(folder / (name + ".codec.h5")))
        assert len(codecs.units) == len(units)
        for unit, want in zip(codecs.units, units):
            fields = [np.array(c).reshape(-1, f.slots) for c, f in zip(want["fields"], unit.layout.fields)]
            sides = [np.array(v, np.float32).reshape(-1, s.slots) for v, s in zip(want["sides"], unit.layout.sides)]
            overlay = np.array(want.get("overlay", []), np.float32).reshape(-1, 4)
            codes = vqkv.Codes(want["blocks"] * unit.layout.block_tokens, fields, sides, overlay)
            fitted = unit.method.fit(kept_rows(unit)) if unit.method.fit_tokens else None  # to fewer than fit() takes
            rows = unit.decode(codes, fitted)
            for row, values in ((rows[0], want["first_row"]), (rows[-1], want["last_row"])):
                assert np.array_equal(row, np.array(values, np.float32)), f"{name}: {unit}"


def main():
    check_float8()
    check_kept()
    with tempfile.TemporaryDirectory() as folder:
        tools = Tools(sys.argv[1], folder)
        made = {}
        with h5py.File(tools.trace) as trace:
            for name, cell in [*presets(tools), *((n, c + "\n") for n, c in CELLS.items())]:
                made[name] = check(tools, name, cell, trace)
        used = {t["name"] for path, _ in made.values() for u in vqkv.load(path).units for t in u.spec["transforms"]}
        there = {t["name"] for t in tools.run("vqkv-sweep", "ls", "transforms")}
        assert used == there, f"no cell here stands behind {', '.join(there - used)}"
        check_refusals(tools, *made["fitted"], made["rtn.default"][0], made["calibrated"][0])
    print(f"ok: {len(made)} archives")


if __name__ == "__main__":
    main()
