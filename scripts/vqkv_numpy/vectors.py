"""Methods of codewords and of projections (lib/codec/methods): pq, rvq, simvq, kumar, commvq, qjl's keys. Plans decode to
the bits of C++. Where a codeword is searched near ties may fall the other way than there, since products are rounded in
another order."""
import math
from dataclasses import replace

import numpy as np

from .method import Method
from .numbers import Rng, in_order, round_scale, round_side, row_product
from .plan import Codes, Field, Layout, Side, Signs, Table


# ---- Codewords ----

class TableMethod(Method):
    """pq, rvq, simvq, kumar: sums of codewords over groups of channels (lib/codec/methods/table_codec.h)."""
    scale_slots, scale_type = 0, "f16"

    def set_up(self, params):
        k, n = self.knobs, self.unit.channels
        self.codewords, self.channel = params.tensor("codewords"), np.array(params.facts("channels"))
        self.groups, self.stages, self.beam = self.shape()
        self.books = len(self.codewords) // self.stages  # a stage: one a group, or one for all
        self.channel = self.channel.reshape(self.groups, n // self.groups)
        self.layout = Layout([Field("code", k["bits"], self.stages * self.groups)],
                             [Side("token_scale", self.scale_type, self.scale_slots)] if self.scale_slots else [])

    def plan(self, prompt=None, stages=None):
        slot = np.arange((stages or self.stages) * self.groups)
        book = slot // self.groups * self.books + (slot % self.groups if self.books > 1 else 0)
        return self.make_plan([Table(self.codewords, book, self.channel[slot % self.groups])],
                              token_scale_side=0 if self.scale_slots else -1)

    def scales(self, x):
        """Standard deviations (n, slots), as stored."""
        parts = x.reshape(len(x), self.scale_slots, -1).astype(np.float64)
        n = parts.shape[2]
        off = parts - in_order(parts)[..., None] / n
        deviation = np.sqrt(in_order(off * off) / (n - 1)) if n > 1 else np.zeros(parts.shape[:2])
        narrow = self.scale_type == "f8e5m2"
        bounded = np.clip(deviation, 2.0**-14 if narrow else 0.0, 57344.0 if narrow else 3e38)
        return np.where(deviation > 0, round_scale(self.scale_type, bounded.astype(np.float32)), np.float32(1))

    def encode(self, x, prompt=None):
        sides = []
        if self.scale_slots:
            sides = [self.scales(x)]
            x = x / sides[0].repeat(x.shape[1] // self.scale_slots, axis=1)
        codes = np.zeros((len(x), self.stages, self.groups), np.uint16)
        for g in range(self.groups):
            codes[:, :, g] = self.search(x[:, self.channel[g]], self.codewords[g % self.books :: self.books])
        return Codes(len(x), [codes.reshape(len(x), -1)], sides)

    def search(self, x, books):
        """Codes (n, stages); a beam keeps the best partial sums of each stage. Residuals are float32, distances double."""
        rest, chosen, (n, entries) = x[:, None], np.zeros((len(x), 1, 0), np.int64), (len(x), books.shape[1])
        for book in books:
            left, words = rest.astype(np.float64), book.astype(np.float64)
            error = (left**2).sum(axis=2)[..., None] + (words**2).sum(axis=1) - 2 * left @ words.T
            best = np.argsort(error.reshape(n, -1), axis=1, kind="stable")[:, : self.beam]
            entry, code = best // entries, best % entries
            chosen = np.concatenate([np.take_along_axis(chosen, entry[..., None], axis=1), code[..., None]], axis=2)
            rest = np.take_along_axis(rest, entry[..., None], axis=1) - book[code]
        return chosen[:, 0]


class Pq(TableMethod):
    def shape(self):
        return self.knobs["codebooks"], 1, 1


class Rvq(TableMethod):
    def shape(self):
        k = self.knobs
        return (self.unit.channels // (k["group"] or self.unit.channels), k["codebooks"],
                k["beam"] if k["encoding"] == "beam" else 1)


class SimVq(TableMethod):
    def shape(self):
        return 1, self.knobs["codebooks"], self.knobs["beam"] if self.knobs["encoding"] == "beam" else 1


class SimVqBranches(Method):
    """Two sets of channels, each with a code of its own (lib/codec/methods/branches.h)."""

    def set_up(self, params):
        k, self.branches = self.knobs, []
        for name, stages in (("low", k["low_codebooks"]), ("high", k["codebooks"] - k["low_codebooks"])):
            part = params.under(name)
            channel = np.array(part.facts("branch"))
            unit = replace(self.unit, heads=1, head_dim=len(channel), rotary_dim=0)
            self.branches.append((channel, SimVq({**k, "codebooks": stages}, unit, part)))
            (field,) = self.branches[-1][1].layout.fields
            field.name = f"{name}_{field.name}"
        self.stages = max(m.stages for _, m in self.branches)
        self.layout = self.level_layout(self.stages)

    def level_layout(self, stages):
        return Layout([f for _, m in self.branches for f in m.level_layout(min(stages, m.stages)).fields])

    def plan(self, prompt=None, stages=None):
        terms = []
        for field, (channel, m) in enumerate(self.branches):
            (table,) = m.plan(stages=min(stages or m.stages, m.stages)).terms
            terms.append(replace(table, channel=channel[table.channel], field=field))
        return self.make_plan(terms)

    def encode(self, x, prompt=None):
        return Codes(len(x), [f for channel, m in self.branches for f in m.encode(x[:, channel]).fields], [])


def make_simvq(knobs, unit, params):
    return (SimVqBranches if knobs.get("low_codebooks") else SimVq)(knobs, unit, params)  # older files have no such knob


class Kumar(TableMethod):
    defaults = {"scale_type": "f16"}

    def shape(self):
        self.scale_slots, self.scale_type = self.unit.heads, self.knobs["scale_type"]
        return self.unit.channels // self.knobs["group"], self.knobs["codebooks"], 1


def length(x):
    """Of rows, bounded to a float32."""
    return np.minimum(np.sqrt(in_order(x.astype(np.float64) ** 2)), 3e38).astype(np.float32)[:, None]


class CommVqKeys(Method):
    def set_up(self, params):
        k, n = self.knobs, self.unit.channels
        self.codewords, self.stages = params.tensor("codewords"), k["codebooks"]
        width = self.codewords.shape[2]
        self.groups = n // width
        pairs = np.array([self.unit.pair(p) for p in range(n // 2)]).reshape(self.groups, width // 2, 2)
        self.channel = np.concatenate([pairs[..., 0], pairs[..., 1]], axis=1)
        slots = self.stages * self.groups
        self.layout = Layout([Field("first", k["bits"], slots), Field("second", k["bits"], slots)],
                             [Side("token_scale", k["scale_type"], 1)])

    def plan(self, prompt=None, stages=None):
        slot = np.arange((stages or self.stages) * self.groups)
        terms = [Table(self.codewords, slot, self.channel[slot % self.groups], f, bool(f)) for f in (0, 1)]
        return self.make_plan(terms, token_scale_side=0)

    def encode(self, x, prompt=None):
        scale = round_scale(self.knobs["scale_type"], length(x))
        codes = np.zeros((2, len(x), self.stages, self.groups), np.uint16)
        for g in range(self.groups):
            rest = x[:, self.channel[g]] / scale
            half = rest.shape[1] // 2
            for stage, z in enumerate(self.codewords[g :: self.groups]):
                turned = np.concatenate([-z[:, half:], z[:, :half]], axis=1)  # i Z
                wide, wide_turned, r = z.astype(np.float64), turned.astype(np.float64), rest.astype(np.float64)
                norm, cross = (wide**2).sum(axis=1), 2 * wide @ wide_turned.T
                for first in range(0, len(x), 256):
                    part = r[first : first + 256]
                    score = (norm - 2 * part @ wide.T)[:, :, None] + (norm - 2 * part @ wide_turned.T)[:, None] + cross
                    best = score.reshape(len(part), -1).argmin(axis=1)
                    codes[0, first : first + 256, stage, g], codes[1, first : first + 256, stage, g] = divmod(best, len(z))
                rest = rest - (z[codes[0, :, stage, g]] + turned[codes[1, :, stage, g]])
        return Codes(len(x), [c.reshape(len(x), -1) for c in codes], [scale])


class CommVqValues(Method):
    def set_up(self, params):
        k, n = self.knobs, self.unit.channels
        self.params = {name: params.tensor(name) for name in
                       ("channel_scale", "first", "first_bias", "second", "second_bias", "rows")}
        self.bits = k["value_bits"] * n
        self.layout = Layout([Field("bits", 8, self.bits // 8)], [Side("token_scale", k["scale_type"], 1)])

    def plan(self, prompt=None):
        rows = self.params["rows"]
        bias = (np.cumsum(rows.astype(np.float64), axis=0)[-1] / 2).astype(np.float32)  # bits are 0 or 1, signs -1 or 1
        return self.make_plan([Signs(rows, self.bits, np.float32(0.5))], inner_bias=bias, token_scale_side=0)

    def encode(self, x, prompt=None):
        p = {name: v.astype(np.float64) for name, v in self.params.items()}
        scaled = x / p["channel_scale"]
        norm = np.sqrt((scaled**2).sum(axis=1, keepdims=True))
        unit = scaled * np.where(norm > 0, 1 / np.maximum(norm, 1e-300), 0)
        unit = unit - unit.mean(axis=1, keepdims=True)
        unit = (unit / np.sqrt((unit**2).mean(axis=1, keepdims=True) + 1e-5)).astype(np.float32).astype(np.float64)
        hidden = unit @ p["first"].T + p["first_bias"]
        hidden = 0.5 * hidden * (1 + np.vectorize(math.erf, otypes=[float])(hidden / math.sqrt(2)))
        logits = hidden @ p["second"].T + p["second_bias"]
        chosen = logits.reshape(len(x), -1, 4).argmax(axis=2)
        bits = np.stack([(chosen == 0) | (chosen == 2), (chosen == 1) | (chosen == 2)], axis=2).reshape(len(x), -1)
        square = ((bits @ p["rows"] / p["channel_scale"]) ** 2).sum(axis=1, keepdims=True)
        scale = np.where(square > 0, np.minimum(norm / np.sqrt(np.maximum(square, 1e-300)), 3e38), 0)
        packed = np.packbits(bits, axis=1, bitorder="little").astype(np.uint16)
        return Codes(len(x), [packed], [round_scale(self.knobs["scale_type"], scale.astype(np.float32))])


# ---- Signs ----

sketches = {}


def sign_sketch(rows, width, orthogonal, seed):
    """Projections (rows, width): those of lib/codec/sign_sketch.cpp, which no file holds."""
    key = rows, width, orthogonal, seed
    if key not in sketches:
        rng = Rng(f"sign sketch/{seed}/{rows}/{width}")
        s = np.array([rng.normal() for _ in range(rows * width)]).reshape(rows, width)
        for first in range(0, rows if orthogonal else 0, width):
            for i in range(first, min(rows, first + width)):
                for j in list(range(first, i)) * 2:
                    s[i] -= in_order(s[i] * s[j]) / width * s[j]
                s[i] /= np.sqrt(in_order(s[i] * s[i]) / width)
        sketches[key] = s.astype(np.float32)
    return sketches[key]


class QjlKeys(Method):
    def set_up(self, params):
        k, u = self.knobs, self.unit
        share = "initial_" if u.layer < k["initial_layers"] else ""
        self.rows, self.outliers = int(k[share + "rows"] * u.head_dim + 0.5), k["outliers"]
        self.outlier_rows = int(k[share + "outlier_rows"] * u.head_dim + 0.5) if self.outliers else 0
        self.sketch = sign_sketch(self.rows, u.head_dim, k["orthogonal"], k["seed"])
        self.layout = Layout([Field("sign", 8, u.heads * self.rows // 8)],
                             [Side("norm" if self.outliers else "token_scale", "f16", u.heads)])
        if self.outliers:
            self.layout.block_tokens = k["group"]
            self.layout.fields.append(Field("outlier", 8, u.heads * self.outliers, False))
        if self.outlier_rows:
            self.layout.fields.append(Field("outlier_sign", 8, u.heads * self.outlier_rows // 8))
            self.layout.sides.append(Side("outlier_norm", "f16", u.heads))

    def term(self, rows, **rest):
        return Signs(self.sketch, rows, np.float32(math.sqrt(math.pi / 2) / rows), **rest)

    def plan(self, prompt=None):
        if not self.outliers:
            return self.make_plan([self.term(self.rows)], token_scale_side=0)
        terms = [self.term(self.rows, scale_side=0, outlier_field=1, reach="others")]
        if self.outlier_rows:
            terms.append(self.term(self.outlier_rows, field=2, scale_side=1, outlier_field=1, reach="outliers"))
        return self.make_plan(terms)

    def encode(self, x, prompt=None):
        u, tokens = self.unit, self.layout.block_tokens
        wide = x.astype(np.float64).reshape(-1, tokens, u.heads, u.head_dim)
        energy = in_order(np.moveaxis(wide**2, 1, -1))  # (blocks, heads, head_dim)
        apart = np.sort(np.argsort(-energy, axis=2, kind="stable")[..., : self.outliers], axis=2)
        outlier = np.zeros(energy.shape, bool)
        np.put_along_axis(outlier, apart, True, axis=2)

        def part(of, rows):
            v = np.where(of[:, None], wide, 0.0).reshape(-1, u.head_dim)
            norm = np.minimum(np.sqrt(in_order(v * v)), 3.0e38).astype(np.float32)
            projected = row_product(v, self.sketch.T, np.zeros((len(v), len(self.sketch))))[:, :rows]
            signs = np.packbits(projected > 0, axis=1, bitorder="little").astype(np.uint16)
            return signs.reshape(len(x), -1), round_side("f16", norm).reshape(len(x), -1)

        signs, norms = part(~outlier, self.rows)
        fields, sides = [signs], [norms]
        if self.outliers:
            fields.append(apart.reshape(len(apart), -1).astype(np.uint16))
        if self.outlier_rows:
            signs, norms = part(outlier, self.outlier_rows)
            fields, sides = fields + [signs], sides + [norms]
        return Codes(len(x), fields, sides)
