#!/usr/bin/env python3
"""Holds our systems against readings of their papers' formulas, and against their authors' code where that is at hand: the
same rows of a trace, the same parameters, the errors of what decodes side by side. docs/author-code.md says what came out.

    scripts/compare_authors.py BIN TRACE [--authors FOLDER] [--only NAME ...] [--layers 0,15,29]

BIN: the folder of vqkv-sweep. TRACE: captured with `--query-stride 1 --gradients next-token`; codecs learn from all its
documents but the last, of which rows are compared. FOLDER: checkouts of the authors' repositories, by name, for a Python with
torch (docs/author-code.md). Exit code 1 where an error differs by more than 1 %, unless its row ends in a word that says why:
drawn (at random), learned (apart), fp16 (their arithmetic)."""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import h5py
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import vqkv  # noqa: E402
from vqkv_authors import readings as paper  # noqa: E402
from vqkv_numpy.cache import Rope  # noqa: E402
from vqkv_numpy.numbers import round_side  # noqa: E402
from vqkv_numpy.vectors import sign_sketch  # noqa: E402

ALLOWED = 0.01  # relative difference of errors


@dataclass
class Given:
    """What a reading sees of one unit (heads of a layer, keys or values), in double but for `unit`."""
    unit: vqkv.CodecUnit  # ours, for parameters that were learned
    x: np.ndarray  # (tokens, channels), coded
    prompt: np.ndarray  # (tokens of the window, channels)
    train: np.ndarray  # (tokens of the train documents, channels)
    train_gradient2: np.ndarray  # likewise
    queries: np.ndarray  # (query heads of its KV heads, tokens of the window, head_dim), after RoPE

    @property
    def role(self):
        return self.unit.role

    @property
    def heads(self):
        return self.unit.heads

    def books(self):
        """Of residual stages: (stages, entries, channels)."""
        m = self.unit.method
        return m.codewords.astype(np.float64).reshape(m.stages, -1, *m.codewords.shape[1:])[:, 0]

    def levels(self):
        """Of KVQuant."""
        return self.unit.method.levels.astype(np.float64)

    def complex_books(self):
        """Of CommVQ's keys: (stages, groups, entries, pairs)."""
        m = self.unit.method
        z = m.codewords.astype(np.float64)
        half = z.shape[2] // 2
        return (z[..., :half] + 1j * z[..., half:]).reshape(m.stages, m.groups, z.shape[1], half)


@dataclass
class Way:
    """Another hand's rows: run(given) returns them, or what to compare in place of rows: (exact, ours, theirs)."""
    run: object
    excuse: str = ""  # why its error may differ by more than ALLOWED


@dataclass
class Case:
    cell: str  # of a sweep; PROMPT: the tokens of a window
    ways: dict  # how: Way
    roles: str = "kv"


def formula(reading):
    return {"formula": Way(reading)}


def kvquant_learned(levels_of):
    """A way: the weighted error of the values that levels are learned from. Ours are the best levels there are."""
    def run(given):
        x, weight = paper.kvquant_calibration(given, 0.01)
        w = np.sqrt(weight)
        ours, theirs = (paper.nearest(np.sort(levels), x) for levels in (given.levels(), levels_of(given)))
        return w * x, w * ours, w * theirs
    return run


def qjl_reading(g, seed=None):
    m = g.unit.method
    sketch = sign_sketch(m.rows, g.unit.head_dim, True, m.knobs["seed"] if seed is None else seed)
    return paper.qjl(g, sketch, m.rows, m.outlier_rows, m.outliers, m.layout.block_tokens)


def commvq_reading(g):
    if g.role == "k":
        return paper.commvq_keys(g, g.complex_books())
    return paper.commvq_values(g, {k: v.astype(np.float64) for k, v in g.unit.method.params.items()})


ALL = "cache: {sinks: 0, window: 0, flush: 1}"
GROUPS = "cache: {sinks: 0, window: 1, flush: 32}"
PROMPT = "cache: {sinks: 0, window: 0, flush: 1, prompt: PROMPT}"
CASES = {
    "KIVI, 2 bits": Case(f"codec: {{name: kivi, bits: 2, group: 32}}\n{GROUPS}", formula(lambda g: paper.kivi(g, 2, 32))),
    "KIVI, 4 bits": Case(f"codec: {{name: kivi, bits: 4, group: 32}}\n{GROUPS}", formula(lambda g: paper.kivi(g, 4, 32))),
    "KVQuant": Case(f"codec: {{name: kvquant, preset: default, weight: fisher, scale_aware: false}}\n{ALL}",
                    {"formula, our levels": Way(lambda g: paper.kvquant(g, g.levels(), 0.01)),
                     "Lloyd's levels, weighted": Way(kvquant_learned(lambda g: paper.kvquant_levels(g, 3, 0.01)), "learned")}),
    "QJL": Case(f"codec: {{name: qjl, initial_layers: 1}}\n{GROUPS}", formula(qjl_reading), "k"),
    "CalibQuant, 1 bit": Case(f"codec: {{name: calibquant, preset: default}}\n{PROMPT}",
                              formula(lambda g: paper.calibquant(g, 1, 0.5 if g.role == "k" else 0.3))),
    "CalibQuant, 2 bits": Case(f"codec: {{name: calibquant, preset: b2}}\n{PROMPT}",
                               formula(lambda g: paper.calibquant(g, 2, 1))),
    "QuantSpec": Case(f"codec: {{name: quantspec, group: 32}}\n{GROUPS}", formula(lambda g: paper.quantspec(g, 32))),
    "SpeCache, 1 bit": Case(f"codec: {{name: specache, bits: 1, group: 32}}\n{GROUPS}",
                            formula(lambda g: paper.specache(g, 32))),
    "ThinK": Case("codec: {name: exact, preset: think}\ncache: {sinks: 0, window: 32, flush: 1, prompt: PROMPT}",
                  formula(lambda g: paper.think(g, 0.4, 32)), "k"),
    "DecoQuant": Case(f"codec: {{name: rtn, preset: decoquant}}\n{PROMPT}", formula(lambda g: paper.decoquant(g, 4, 16))),
    "VQKV": Case("codec: {name: simvq, share: heads, k: {codebooks: 8, bits: 6}, v: {codebooks: 4, bits: 6}, rounds: 4}\n" +
                 ALL, formula(lambda g: paper.vqkv(g, g.books()))),
    "Kumar": Case("codec: {name: kumar, codebooks: 4, bits: 6, group: 16, heads: all, points: 2000, ema_steps: 20, "
                  "ema_batch: 4096, k: {rope: pre}}\n" + ALL, formula(lambda g: paper.kumar(g, g.books(), 16))),
    "CommVQ": Case("codec: {name: commvq, codebooks: 2, bits: 4, group: 32, steps: 50, start_points: 4096, hidden: 64, "
                   "value_steps: 50, value_batch: 128, learning_rate: 0.01, heads: all, k: {rope: pre}}\n" + ALL,
                   formula(commvq_reading)),
}


class Trace:
    def __init__(self, path):
        self.path, self.file = path, h5py.File(path)
        self.documents = len(json.loads(self.file.attrs["documents_json"]))
        self.doc = self.file["doc"][()]

    def tokens(self, document):
        return np.flatnonzero(self.doc == document)

    def rows(self, unit, tokens, rope, dtype, gradient2=False):
        """A unit's rows of one window, as a cache hands them to its codec, or their squared gradients."""
        name = {"k": "key", "v": "value"}[unit.role]
        post = unit.role == "k" and unit.rope == "post"
        if gradient2:
            name = ("rotated_" if post else "") + name + "_gradient2"
        x = self.file[name][unit.layer, unit.first_head : unit.first_head + unit.heads, tokens[0] : tokens[-1] + 1]
        x = np.ascontiguousarray(x.transpose(1, 0, 2), np.float32).reshape(len(tokens), -1)
        if gradient2:
            return x
        return round_side(dtype, rope.turn(x, 0) if post else x)

    def queries(self, unit, tokens, rope):
        q_heads, kv_heads = len(self.file["q_head"]), len(self.file["kv_head"])
        group = q_heads // kv_heads
        first, count = unit.first_head * group, unit.heads * group
        q = self.file["query"][unit.layer, first : first + count, tokens[0] : tokens[-1] + 1].astype(np.float32)
        return np.stack([rope.turn(head, 0) for head in q])


def sweep(folder, *arguments):
    command = [str(pathlib.Path(folder) / "vqkv-sweep"), *map(str, arguments), "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def code(binaries, trace, cell, folder):
    """Frozen codecs of a cell, and what they make of the last document."""
    last = trace.documents - 1
    text, plan, out, archive, codes = (str(folder / n) for n in
                                       ("cell.yaml", "plan.jsonl", "out", "c.codec.h5", "c.codes.h5"))
    pathlib.Path(text).write_text(cell.replace("PROMPT", str(len(trace.tokens(last)))) + "\n")
    sweep(binaries, "plan", text, f"trace.path={trace.path}", f"trace.train={list(range(last))}", f"trace.report=[{last}]",
          "metrics=[value_nmse]", "-o", plan)
    cells = [json.loads(line) for line in open(plan)][1:]
    if "skip" in cells[0]:
        raise SystemExit(f"{cell}: {cells[0]['skip']}")
    sweep(binaries, "run", plan, "-o", out, "--keep-codecs")
    sweep(binaries, "export", out, "--cell", cells[0]["id"], "-o", archive)
    sweep(binaries, "encode", archive, trace.path, f"trace.report=[{last}]", "-o", codes)
    return vqkv.load(archive), vqkv.CodedRows(codes)


def units(trace, codecs, coded, layers):
    """Given, and the rows that ours decode to, of every unit of some layers."""
    rope, dtype = Rope(codecs.shape["rope"]), codecs.cache.get("exact_dtype", "f16")
    window = coded.windows[0]
    tokens = np.arange(window["first_token"], window["first_token"] + window["tokens"])
    train = [trace.tokens(d) for d in range(trace.documents - 1)]
    for number, unit in enumerate(codecs.units):
        if layers is not None and unit.layer not in layers:
            continue
        _, ours, _ = coded.read(0, number, unit)
        rows = trace.rows(unit, tokens, rope, dtype).astype(np.float64)
        yield Given(unit, rows[window["sinks"] : window["sinks"] + len(ours)], rows,
                    np.concatenate([trace.rows(unit, t, rope, dtype) for t in train]).astype(np.float64),
                    np.concatenate([trace.rows(unit, t, rope, dtype, True) for t in train]).astype(np.float64),
                    trace.queries(unit, tokens, rope).astype(np.float64)), ours.astype(np.float64)


class Sums:
    """Squared sums over units, and how they compare."""

    def __init__(self):
        self.power = self.ours = self.theirs = self.apart = 0.0
        self.values = self.equal = 0

    def add(self, x, ours, theirs):
        self.power += (x**2).sum()
        self.ours += ((x - ours) ** 2).sum()
        self.theirs += ((x - theirs) ** 2).sum()
        self.apart += ((ours - theirs) ** 2).sum()
        self.values += x.size
        self.equal += np.count_nonzero(np.abs(ours - theirs) <= 2e-3 * np.abs(theirs) + 1e-3 * np.sqrt((x**2).mean()))

    def row(self, system, role, how, excuse):
        """difference: of our error from theirs, relative; equal: values within 1e-3 of the rows' root mean square and 2e-3 of
        themselves, which fp16 sides may cost; apart: squared difference of rows over their squared error."""
        return {"system": system, "role": role, "how": how, "excuse": excuse, "values": self.values,
                "theirs": self.theirs / self.power, "ours": self.ours / self.power,
                "difference": self.ours / self.theirs - 1, "equal": self.equal / self.values,
                "apart": self.apart / self.theirs}


def compare(binaries, trace, name, layers=None, authors=None):
    """Rows of the table for one system."""
    case, sums = CASES[name], {}
    ways = {**case.ways, **(authors.ways(name) if authors else {})}
    with tempfile.TemporaryDirectory() as folder:
        codecs, coded = code(binaries, trace, case.cell, pathlib.Path(folder))
        for given, ours in units(trace, codecs, coded, layers):
            for how, way in ways.items() if given.role in case.roles else ():
                got = way.run(given)
                x, mine, theirs = got if isinstance(got, tuple) else (given.x, ours, np.asarray(got, np.float64))
                if x is not None:
                    sums.setdefault((given.role, how), Sums()).add(x, mine, theirs)
    return [s.row(name, role, how, ways[how].excuse) for (role, how), s in sums.items()]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("binaries")
    arguments.add_argument("trace")
    arguments.add_argument("--authors")
    arguments.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    arguments.add_argument("--layers", type=lambda s: [int(n) for n in s.split(",")])
    a = arguments.parse_args()
    authors = None
    if a.authors:
        from vqkv_authors.checkouts import Checkouts
        authors = Checkouts(a.authors)
    trace, worst = Trace(a.trace), 0.0
    print("| system | of | held against | values | NMSE, theirs | NMSE, ours | difference | equal values | apart | |")
    print("| --- | --- | --- | --: | --: | --: | --: | --: | --: | --- |")
    for name in a.only:
        for r in compare(a.binaries, trace, name, a.layers, authors):
            print(f"| {name} | {r['role']} | {r['how']} | {r['values']:,} | {r['theirs']:.4g} | {r['ours']:.4g} | "
                  f"{100 * r['difference']:+.2f} % | {100 * r['equal']:.2f} % | {r['apart']:.1g} | {r['excuse']} |", flush=True)
            if not r["excuse"]:
                worst = max(worst, abs(r["difference"]))
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
