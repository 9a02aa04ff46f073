"""Methods that code channel by channel (lib/codec/methods): exact, rtn, kivi, quantspec, specache,
qjl's values, calibquant, fp8, ggml, kvquant. Codes are those of the C++ encoders bit for bit."""
import math
from dataclasses import dataclass, replace

import numpy as np

from .maps import Diagonal, Identity
from .method import Method
from .numbers import UnknownKind, float8, round_scale, round_side, to_float8
from .plan import Codes, Field, Layout, Levels, Side, SideRows


class Exact(Method):
    def set_up(self, params):
        self.layout = Layout(sides=[Side("x", self.knobs["dtype"], self.unit.channels)])

    def plan(self, prompt=None):
        return self.make_plan([SideRows(np.arange(self.unit.channels))])

    def encode(self, x, prompt=None):
        return Codes(len(x), [], [round_side(self.knobs["dtype"], x)])


# ---- Scalars on a grid: rtn, kivi, qjl's values, calibquant ----

@dataclass
class Grid:
    """AffineGrid of lib/codec/methods/affine.h."""
    bits: int
    mode: str = "asymmetric"  # integer_zero | symmetric | signed
    clip: float = 1.0
    dtype: str = "f16"
    range_holds_zero: bool = False
    inset: float = 0  # moves both ends in by this share of the range; asymmetric alone

    def line(self, low, high):
        """Scale, zero and whole zero point of groups whose values lie in [low, high], float32."""
        if self.mode in ("symmetric", "signed"):
            most = np.maximum(np.abs(low), np.abs(high)).astype(np.float64) * self.clip
            scale = round_scale(self.dtype, (most / ((1 << (self.bits - 1)) - 1)).astype(np.float32))
            return scale, np.zeros_like(scale), np.zeros_like(scale)
        low, high = low.astype(np.float64), high.astype(np.float64)
        flat = (self.mode == "integer_zero") & (high - low < 1e-6 * np.maximum(np.abs(low), np.abs(high)))
        widen = flat | self.range_holds_zero
        low, high = np.where(widen, np.minimum(low, 0), low), np.where(widen, np.maximum(high, 0), high)
        bottom, end = low * self.clip, high * self.clip
        if self.inset > 0:
            margin = self.inset * (end - bottom)
            bottom, end = bottom + margin, end - margin
        scale = np.minimum((end - bottom) / ((1 << self.bits) - 1), 3.0e38)
        scale = round_scale(self.dtype, scale.astype(np.float32))
        if self.mode == "asymmetric":
            return scale, round_side(self.dtype, bottom.astype(np.float32)), np.zeros_like(scale)
        whole = np.rint(-bottom / scale.astype(np.float64)).astype(np.float32)
        return scale, round_side(self.dtype, -scale * whole), whole

    def codes(self, line, x):
        scale, zero, whole = (v.astype(np.float64) for v in line)
        v, top, most = x.astype(np.float64), (1 << self.bits) - 1, (1 << (self.bits - 1)) - 1
        if self.mode == "asymmetric":
            code = np.rint(np.clip((v - zero) / scale, 0, top))
        elif self.mode == "integer_zero":
            code = np.clip(np.rint(np.clip(v / scale, -(2.0**50), 2.0**50)) + whole, 0, top)
        else:
            least = most + (self.mode == "signed")
            code = np.rint(np.clip(v / scale, -least, most)) + least
        return code.astype(np.uint16)


class Affine(Method):
    """Groups of channels of one token, or of tokens of one channel."""

    def set_grid(self, grid, group, along_tokens):
        self.grid, self.group, self.along_tokens = grid, group, along_tokens
        slots = self.unit.channels if along_tokens else self.unit.channels // group
        sides = [Side("scale", grid.dtype, slots, not along_tokens), Side("zero", grid.dtype, slots, not along_tokens)]
        self.layout = Layout([Field("code", grid.bits, self.unit.channels)],
                             sides[:1] if grid.mode in ("symmetric", "signed") else sides,
                             block_tokens=group if along_tokens else 1)

    def plan(self, prompt=None):
        half = 1 << (self.grid.bits - 1)
        return self.make_plan([Levels(
            offset={"signed": half, "symmetric": half - 1}.get(self.grid.mode, 0),
            scale_side=0, zero_side=1 if len(self.layout.sides) > 1 else -1,
            group_channels=1 if self.along_tokens else self.group, group_tokens=self.layout.block_tokens)])

    def encode(self, x, prompt=None):
        groups = (x.reshape(-1, self.group, x.shape[1]) if self.along_tokens else
                  x.reshape(len(x), -1, self.group))
        axis = 1 if self.along_tokens else 2
        line = self.grid.line(groups.min(axis=axis), groups.max(axis=axis))
        codes = self.grid.codes([np.expand_dims(v, axis) for v in line], groups).reshape(x.shape)
        return Codes(len(x), [codes], list(line[: len(self.layout.sides)]))


class Rtn(Affine):
    defaults = {"axis": "token", "mode": "asymmetric", "clip": 1.0, "scale_type": "f16"}

    def set_up(self, params):
        k, u = self.knobs, self.unit
        group = {0: u.head_dim, -1: u.channels}.get(k["group"], k["group"])
        self.set_grid(Grid(k["bits"], k["mode"], k["clip"], k["scale_type"], k["mode"] == "integer_zero" and u.role == "k"),
                      group, k["axis"] == "channel")


class Kivi(Affine):
    def set_up(self, params):
        self.set_grid(Grid(self.knobs["bits"]), self.knobs["group"], self.unit.role == "k")


class SpeCache(Affine):
    def set_up(self, params):
        bits = self.knobs["bits"]
        self.set_grid(Grid(bits, inset=0.25 if bits == 1 else 0), self.knobs["group"], self.unit.role == "k")


class QuantSpec(Affine):
    """4 bits, and 4 more of what they leave over on a grid 16 times finer; the first level is the upper ones alone."""
    stages = 2

    def set_up(self, params):
        self.set_grid(Grid(4), self.knobs["group"] or self.unit.head_dim, self.unit.role == "k")
        self.layout.fields = [Field("upper", 4, self.unit.channels), Field("lower", 4, self.unit.channels)]

    def level_layout(self, stages):
        upper, lower = self.layout.fields
        return replace(self.layout, fields=[upper, replace(lower, slots=0 if stages == 1 else lower.slots)])

    def plan(self, prompt=None, stages=2):
        plan = super().plan()
        if stages == 2:
            levels = (np.arange(16, dtype=np.float32) - 8) / 16
            plan.terms.append(replace(plan.terms[0], levels=levels.astype(np.float32), zero_side=-1, field=1))
        return plan

    def encode(self, x, prompt=None):
        codes = super().encode(x)
        scale, zero = (self.plan().terms[0].grouped(self.plan(), codes, side) for side in (0, 1))
        rest = (x.astype(np.float64) - zero - codes.fields[0] * scale) / (scale / 16)
        codes.fields.append((np.rint(np.clip(rest, -8, 7)) + 8).astype(np.uint16))
        return codes


class QjlValues(Affine):
    def set_up(self, params):
        self.set_grid(Grid(self.knobs["value_bits"]), self.knobs["group"], False)


class CalibQuant(Method):
    fit_tokens = 16

    def set_up(self, params):
        k = self.knobs
        self.grid = Grid(k["bits"], clip=k["key_clip" if self.unit.role == "k" else "value_clip"])
        self.layout = Layout([Field("code", k["bits"], self.unit.channels)])

    def fit(self, rows):
        return self.grid.line(rows.min(axis=0), rows.max(axis=0))

    def line(self, prompt):
        n = self.unit.channels
        return prompt or (np.ones(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32))

    def plan(self, prompt=None):
        scale, zero, _ = self.line(prompt)
        shifted = self.unit.role == "k" and (self.knobs["low_shift"] > 0 or self.knobs["high_shift"] > 0)
        return self.make_plan([Levels()], map=Diagonal(scale), outer_bias=zero, maps_scores=shifted)

    def encode(self, x, prompt=None):
        return Codes(len(x), [self.grid.codes(self.line(prompt), x)], [])


# ---- Formats of engines ----

class Fp8(Method):
    def set_up(self, params):
        self.mantissa = {"e4m3": 3, "e5m2": 2}[self.knobs["format"]]
        self.scale = params.tensor("scale").repeat(self.unit.head_dim)  # (channels)
        self.layout = Layout([Field("code", 8, self.unit.channels)])

    def plan(self, prompt=None):
        scaled = np.any(self.scale != 1)
        return self.make_plan([Levels(float8(np.arange(256), self.mantissa))],
                              map=Diagonal(self.scale) if scaled else Identity())

    def encode(self, x, prompt=None):
        most = np.float32(448 if self.mantissa == 3 else 57344)
        return Codes(len(x), [to_float8(np.clip(x / self.scale, -most, most), self.mantissa)], [])


class Ggml(Method):
    """Blocks of 32 channels, in float32 and its order (lib/codec/methods/ggml.cpp)."""
    # type: bits, has a minimum, offset
    formats = {"q8_0": (8, False, 128), "q5_1": (5, True, 0), "q5_0": (5, False, 16), "q4_1": (4, True, 0),
               "q4_0": (4, False, 8), "iq4_nl": (4, False, 0)}
    defaults = {"query": "exact"}
    uneven = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

    def set_up(self, params):
        self.type = self.knobs["type"]
        if self.type not in self.formats:
            raise UnknownKind(f"ggml type '{self.type}'")
        if self.knobs["query"] not in ("exact", "q8"):
            raise UnknownKind(f"ggml query '{self.knobs['query']}'")
        self.bits, self.minimum, self.offset = self.formats[self.type]
        blocks = self.unit.channels // 32
        sides = [Side("scale", "f16", blocks), Side("minimum", "f16", blocks)]
        self.layout = Layout([Field("code", self.bits, self.unit.channels)], sides[: 1 + self.minimum])

    def plan(self, prompt=None):
        return self.make_plan([Levels(self.uneven if self.type == "iq4_nl" else None, self.offset, 0,
                                      1 if self.minimum else -1, group_channels=32)],
                              rounds_queries=self.knobs["query"] == "q8")

    def encode(self, x, prompt=None):
        blocks = np.ascontiguousarray(x, np.float32).reshape(len(x), -1, 32)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes, scale, minimum = self.code(blocks)
        sides = [round_side("f16", scale), round_side("f16", minimum)]
        return Codes(len(x), [codes.astype(np.uint16).reshape(x.shape)], sides[: 1 + self.minimum])

    @staticmethod
    def inverse(d):
        v = np.float32(1) / d
        return np.where(np.isfinite(v), v, np.float32(0))[..., None]

    @staticmethod
    def truncated(v, top):
        return np.where(v >= top, top, np.where(v > 0, np.minimum(v, top), 0)).astype(np.int64)

    def code(self, x):
        loud = np.take_along_axis(x, np.abs(x).argmax(axis=2)[..., None], axis=2)[..., 0]
        loud = np.where(np.abs(loud) > 0, loud, np.float32(0))
        none = np.zeros_like(loud)
        if self.type == "q8_0":
            d = np.abs(loud) / np.float32(127)
            v = np.clip(x * self.inverse(d), np.float32(-127), np.float32(127))
            return 128 + np.trunc(v.astype(np.float64) + np.where(v < 0, -0.5, 0.5)).astype(np.int64), d, none
        if self.minimum:
            top, low = (1 << self.bits) - 1, x.min(axis=2)
            d = (x.max(axis=2) - low) / np.float32(top)
            return self.truncated((x - low[..., None]) * self.inverse(d) + np.float32(0.5), top), d, low
        if self.type != "iq4_nl":
            half = 1 << (self.bits - 1)
            d = loud / np.float32(-half)
            v = (x.astype(np.float64) * self.inverse(d) + (half + 0.5)).astype(np.float32)
            return self.truncated(v, 2 * half - 1), d, none
        d = loud / self.uneven[0]
        v = x * (np.float32(1) / d)[..., None]
        middles = (self.uneven[:-1] + self.uneven[1:]) / np.float32(2)
        codes = (v[..., None] >= middles).sum(axis=-1)
        level, fit, power = self.uneven[codes], none.copy(), none.copy()
        for i in range(32):
            weighed = x[..., i] * x[..., i] * level[..., i]
            fit, power = fit + weighed * x[..., i], power + weighed * level[..., i]
        fitted = fit / power
        quiet = np.abs(loud) < np.float32(1e-15)
        scale = np.where(quiet, np.float32(0), np.where(np.isfinite(fitted), fitted, d))
        return np.where(quiet[..., None], 0, codes), scale, none


class Kvquant(Method):
    def set_up(self, params):
        k, n = self.knobs, self.unit.channels
        self.keys = self.unit.role == "k"
        self.levels, (self.gain, self.shift) = params.tensor("levels"), params.tensor("norm")
        if self.keys:
            self.zero, self.range = params.tensor("zero"), params.tensor("range")
        self.layout = Layout([Field("code", k["bits"], n)],
                             [] if self.keys else [Side("scale", "f16", 1), Side("zero", "f16", 1)],
                             overlay=k["outliers"] > 0)

    def plan(self, prompt=None):
        decoded = self.levels.astype(np.float64) * np.float64(self.gain) + np.float64(self.shift)
        levels = round_side("f16", decoded.astype(np.float32))
        if self.keys:
            return self.make_plan([Levels(levels)], map=Diagonal(self.range), outer_bias=self.zero)
        return self.make_plan([Levels(levels, 0, 0, 1, group_channels=self.unit.channels)])

    def encode(self, x, prompt=None):
        n, channels = x.shape
        wide, sides = x.astype(np.float64), []
        if self.keys:
            normalized = (wide - self.zero) / self.range
            exact = np.abs(normalized) > 1
        else:
            ends = math.ceil(self.knobs["outliers"] / 2 * channels - 1e-9)
            order = np.argsort(x, axis=1, kind="stable")
            low, high = (np.take_along_axis(wide, order[:, i : i + 1], axis=1) for i in (ends, channels - ends - 1))
            exact = np.zeros(x.shape, bool)
            np.put_along_axis(exact, np.concatenate([order[:, :ends], order[:, channels - ends :]], axis=1), True, axis=1)
            zero = round_side("f16", (0.5 * (low + high)).astype(np.float32))
            scale = round_scale("f16", (0.5 * (high - low)).astype(np.float32))
            normalized, sides = (wide - zero) / scale.astype(np.float64), [scale, zero]
        middles = 0.5 * (self.levels[:-1].astype(np.float64) + self.levels[1:])
        codes = (normalized[..., None] > middles).sum(axis=-1).astype(np.uint16)
        overlay = np.zeros((0, 4), np.float32)
        if self.layout.overlay:
            t, c = np.nonzero(exact)
            overlay = np.stack([t, c, round_side("f16", x[t, c]), np.zeros(len(t))], axis=1).astype(np.float32)
        return Codes(n, [codes], sides, overlay)
