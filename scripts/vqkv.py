#!/usr/bin/env python3
"""Reads frozen codecs (*.codec.h5) and coded rows (*.codes.h5) with NumPy and h5py alone, and decodes them to the bits of
the C++ decoder. docs/python.md says what it reads; docs/formats.md how the files are laid out.

    import vqkv
    codecs = vqkv.load("best.codec.h5")
    unit = codecs.unit("k", layer=3, head=1)
    codes = unit.encode(rows)                      # rows (tokens, unit.channels), float32, in the unit's RoPE domain
    rows_again = unit.decode(codes)

    scripts/vqkv.py check best.codec.h5 t.codes.h5   # decodes a file of `vqkv-sweep encode` and compares bit for bit
    scripts/vqkv.py list best.codec.h5               # its units, methods, and bits of codes and side values

What it has no code for (a method from outside this tree, an unknown map) is refused by its name: UnknownKind.
"""
import json
import os
import sys

import h5py
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from vqkv_numpy.maps import map_from_json  # noqa: E402
from vqkv_numpy.method import Unit  # noqa: E402
from vqkv_numpy.methods import make_method  # noqa: E402
from vqkv_numpy.numbers import UnknownKind  # noqa: E402,F401
from vqkv_numpy.plan import Codes, decode  # noqa: E402
from vqkv_numpy.transforms import Chain  # noqa: E402

ROLES = {"k": "k", "v": "v", "key": "k", "value": "v"}


class BadFile(ValueError):
    """A file is not what it should be; the message names it."""


class Archive:
    """Named f32 tensors and JSON facts (lib/io/archive.h). Their hashes are left to the tools: XXH3 is not NumPy's."""

    def __init__(self, path, kind, newest):
        self.path, self.prefix = path, ""
        try:
            self.file = h5py.File(path, "r")
        except OSError as e:
            raise BadFile(f"{path}: {e}") from None
        a = self.file.attrs
        if a.get("format") != kind:
            raise BadFile(f"{path}: attribute 'format' must be \"{kind}\"")
        version = a.get("format_version", 0)
        if not 1 <= version <= newest:
            raise BadFile(f"{path}: format version {version}; this reader knows 1 to {newest}")
        if a.get("complete") != 1:
            raise BadFile(f"{path}: incomplete: its writer did not finish")
        self.index = self.read("index_json", lambda: json.loads(a["index_json"]))

    def read(self, name, get):
        """get(); what a damaged file does to it says where."""
        try:
            return get()
        except (KeyError, OSError, ValueError) as e:
            raise BadFile(f"{self.path}: '{name}' is damaged: {e}") from None

    def under(self, prefix):
        part = object.__new__(Archive)
        part.__dict__.update(self.__dict__, prefix=self.prefix + prefix + "/")
        return part

    def has(self, name):
        return any(self.prefix + name in self.index[kind] for kind in ("tensors", "facts"))

    def tensor(self, name):
        full = self.prefix + name
        if full not in self.index["tensors"]:
            raise BadFile(f"{self.path}: parameter '{full}' is missing")
        return self.read(full, lambda: self.file[full][()].reshape(self.index["tensors"][full]["shape"]))

    def facts(self, name):
        full = self.prefix + name
        if full not in self.index["facts"]:
            raise BadFile(f"{self.path}: fact '{full}' is missing")
        group, _, key = full.rpartition("/")
        return self.read(full, lambda: json.loads(self.file["/" + group].attrs[key]))


class CodecUnit:
    """The codec of some heads of one layer and role, in one tier."""

    def __init__(self, spec, unit, method):
        self.spec, self.method, self.tier = spec, method, spec.get("tier", 0)
        for name in ("role", "layer", "first_head", "heads", "head_dim", "rope", "channels"):
            setattr(self, name, getattr(unit, name))
        level = spec.get("level")
        self.level = {"stages": level} if level else {}
        self.plan = method.plan(**self.level)
        self.layout = method.layout
        if level:
            self.layout = self.plan.layout = method.level_layout(level)

    def encode(self, rows, prompt=None):
        """Codes of whole blocks of rows (tokens, channels), in this unit's RoPE domain. prompt: of fit()."""
        rows = np.ascontiguousarray(rows, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.channels or len(rows) % self.layout.block_tokens:
            raise ValueError(f"rows of shape {rows.shape}; {self} takes whole blocks of {self.layout.block_tokens} tokens "
                             f"of {self.channels} channels")
        if not np.isfinite(rows).all():
            raise ValueError("values that are not finite cannot be coded")
        self.require_fitted(prompt)
        return self.method.encode(rows, prompt).head(self.layout)

    def fit(self, rows):
        """What the codec fits to the first rows of a prompt, or None; pass it to encode and decode."""
        if not self.method.fit_tokens:
            return None
        if len(rows) < self.method.fit_tokens:
            raise ValueError(f"{len(rows)} rows; {self} is fitted to {self.method.fit_tokens} tokens of a prompt at least")
        return self.method.fit(np.ascontiguousarray(rows, np.float32))

    def require_fitted(self, prompt):
        if prompt is None and self.method.fit_tokens:
            raise ValueError(f"{self} is fitted to each prompt: give encode() and decode() what fit() gives")

    def decode(self, codes, prompt=None):
        """Rows (tokens, channels), float32, in this unit's RoPE domain. prompt: of fit(), or the plan of a codes file."""
        self.require_fitted(prompt)
        if prompt is None:
            return decode(self.plan, codes)
        if not isinstance(prompt, dict):
            return decode(self.method.plan(prompt), codes)
        bias = {k: np.array(prompt[k], np.float32) if prompt.get(k) else None for k in ("inner_bias", "outer_bias")}
        plan = self.method.plan(**self.level)
        plan.layout, plan.map, plan.inner_bias, plan.outer_bias = self.layout, map_from_json(prompt["map"]), *bias.values()
        return decode(plan, codes)

    def __str__(self):
        names = [self.spec["method"]] + [t["name"] for t in self.spec["transforms"]]
        return (f"{self.role} of layer {self.layer}, KV heads {self.first_head} to {self.first_head + self.heads - 1}: "
                f"{' behind '.join(names)}")


class CodecSet:
    """shape: layers, q_heads, kv_heads, head_dim, score_scale, rope; cache: the canonical `cache:` section, or {};
    units in the archive's order: (tier, layer, role, first head)."""

    def __init__(self, path):
        archive = Archive(path, "vqkv-codec", 1)
        facts = archive.facts("set")
        self.path, self.shape, self.model_hash = path, facts["shape"], facts["model_hash"]
        self.tier_tokens = facts.get("tiers", [])
        self.cache = archive.facts("facts").get("cache", {}) if archive.has("facts") else {}
        self.units, made = [], {}
        for u in facts["units"]:
            spec = u["spec"]
            unit = Unit(spec["role"], spec["layer"], spec["first_head"], spec["heads"], spec["head_dim"], spec["rope"],
                        self.shape["rope"]["rotary_dim"])
            if spec.get("level"):  # of the codec of the tier before
                method = self.unit(unit.role, unit.layer, unit.first_head, spec["tier"] - 1).method
            else:
                number = u["codec"]
                if number not in made:
                    made[number] = self.make(spec, unit, archive.under(f"codec/{number:05}"))
                method = made[number]
            self.units.append(CodecUnit(spec, unit, method))

    @staticmethod
    def make(spec, unit, params):
        def inner(behind):
            return make_method(spec["method"], spec["knobs"], behind, params)
        return Chain(spec["transforms"], unit, params, inner) if spec["transforms"] else inner(unit)

    def unit(self, role, layer, head, tier=0):
        for u in self.units:
            if (u.role, u.layer, u.tier) == (ROLES[role], layer, tier) and 0 <= head - u.first_head < u.heads:
                return u
        raise KeyError(f"{self.path}: no unit codes {role}, layer {layer}, KV head {head}, tier {tier}")


def load(path):
    return CodecSet(path)


class CodedRows:
    """A file of `vqkv-sweep encode`: what units made of each window of a trace."""

    def __init__(self, path):
        self.archive = Archive(path, "vqkv-codes", 1)
        self.facts = self.archive.facts("codes")
        self.windows = self.facts["windows"]  # document, first_token, tokens, sinks

    def read(self, window, number, unit):
        """Codes, the rows that the C++ decoder makes of them, and the prompt's plan or None, of unit `number`. None where
        the window is too short to code anything."""
        part = self.archive.under(f"window/{window:05}/unit/{number:05}")
        if not part.has("rows"):
            return None
        rows, layout = part.tensor("rows"), unit.layout
        codes = Codes(len(rows), [part.tensor("field/" + f.name).astype(np.int64) for f in layout.fields],
                      [part.tensor("side/" + s.name) for s in layout.sides])
        if part.has("overlay"):
            codes.overlay = part.tensor("overlay")
        return codes, rows, part.facts("prompt") if part.has("prompt") else None


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def check(codec_path, codes_path):
    """Every unit of every window, decoded here and there; how many there were, or BadFile where one differs."""
    codecs, coded, count = load(codec_path), CodedRows(codes_path), 0
    if coded.facts["codec"] != codecs_hash(codec_path):
        raise BadFile(f"{codes_path}: codes of another codec file than {codec_path}")
    for w in range(len(coded.windows)):
        for number, unit in enumerate(codecs.units):
            found = coded.read(w, number, unit)
            if found is None:
                continue
            codes, rows, prompt = found
            mine = unit.decode(codes, prompt)
            if not same_bits(mine, rows):
                raise BadFile(f"window {w}, {unit}: {np.count_nonzero(mine != rows)} of {rows.size} values differ, by "
                              f"{np.abs(mine - rows).max()} at most")
            count += 1
    return count


def codecs_hash(path):
    return Archive(path, "vqkv-codec", 1).file.attrs["content_xxh3"]


def main(arguments):
    try:
        if len(arguments) == 3 and arguments[0] == "check":
            print(f"{check(*arguments[1:])} units decode to the bits of the C++ decoder")
        elif len(arguments) == 2 and arguments[0] == "list":
            for unit in load(arguments[1]).units:
                print(f"{unit}, {unit.layout.bits_per_token() / unit.channels:.4g} bits a value")
        else:
            print("usage: vqkv.py check FILE.codec.h5 FILE.codes.h5 | vqkv.py list FILE.codec.h5", file=sys.stderr)
            return 2
    except ValueError as e:  # BadFile, UnknownKind
        print(f"error: {e}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
