"""What codes are and how they become rows: the layout, the codes and the plan of lib/codec/code_block.h and plan.h, and
the reference decoder, double by double in the same order."""
from dataclasses import dataclass, field

import numpy as np

from .maps import Identity
from .numbers import row_product


@dataclass
class Field:
    """Codes of so many bits: (tokens, slots), or (blocks, slots) where per_token is false."""
    name: str
    bits: int
    slots: int
    per_token: bool = True


@dataclass
class Side:
    """Side scalars, stored as `dtype`; shapes as a Field's."""
    name: str
    dtype: str
    slots: int
    per_token: bool = True


@dataclass
class Layout:
    fields: list = field(default_factory=list)
    sides: list = field(default_factory=list)
    block_tokens: int = 1
    overlay: bool = False

    def bits_per_token(self):
        """Of fields and sides, without the overlay (CodeLayout::bits_per_token)."""
        size = {"f32": 32, "f16": 16, "bf16": 16, "f8e5m2": 8}
        kinds = [(f, f.bits) for f in self.fields] + [(s, size[s.dtype]) for s in self.sides]
        return sum(bits * k.slots / (1 if k.per_token else self.block_tokens) for k, bits in kinds)


@dataclass
class Codes:
    """Of whole blocks. fields: int arrays, sides: float32, both in the order of the layout; overlay (n, 4): token,
    channel, value, and 1 where it is added to the decoded number instead of taking its place."""
    tokens: int
    fields: list
    sides: list
    overlay: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))

    def head(self, layout):
        """The codes of a level: the first slots of every field (cut_codes in lib/codec/level.cpp)."""
        return Codes(self.tokens, [c[:, : f.slots] for c, f in zip(self.fields, layout.fields)], self.sides, self.overlay)


@dataclass
class Table:
    codewords: np.ndarray  # (books, entries, width)
    book_of_slot: np.ndarray  # (slots)
    channel: np.ndarray  # (slots, width)
    field: int = 0
    rotate90: bool = False  # a codeword acts as i Z on [x..., y...]

    def add(self, plan, codes, y):
        for slot, (book, channel) in enumerate(zip(self.book_of_slot, self.channel)):
            words = self.codewords[book][codes.fields[self.field][:, slot]].astype(np.float64)
            if self.rotate90:
                half = words.shape[1] // 2
                words = np.concatenate([-words[:, half:], words[:, :half]], axis=1)
            y[:, channel] += words


@dataclass
class Levels:
    levels: np.ndarray = None  # None: level(code) = code - offset
    offset: float = 0
    scale_side: int = -1  # -1: 1
    zero_side: int = -1  # -1: 0
    group_channels: int = 1
    group_tokens: int = 1
    field: int = 0
    group_of: np.ndarray = None  # (block_tokens, code channels): slots of per-block sides, where groups have another form
    zero_of_codes: bool = False  # scale * (level + zero)

    def grouped(self, plan, codes, side):
        """The side value of every (token, code channel)."""
        values = codes.sides[side].astype(np.float64)
        if self.group_of is not None:
            return values[:, self.group_of].reshape(codes.tokens, -1)
        if not plan.layout.sides[side].per_token:
            values = values.reshape(-1, plan.code_channels // self.group_channels).repeat(self.group_tokens, axis=0)
        return values.repeat(self.group_channels, axis=1)

    def add(self, plan, codes, y):
        c = codes.fields[self.field]
        level = c.astype(np.float64) - self.offset if self.levels is None else self.levels.astype(np.float64)[c]
        scale = 1.0 if self.scale_side < 0 else self.grouped(plan, codes, self.scale_side)
        zero = 0.0 if self.zero_side < 0 else self.grouped(plan, codes, self.zero_side)
        y += scale * (level + zero) if self.zero_of_codes else scale * level + zero


@dataclass
class SideRows:
    """DenseTerm: side values themselves."""
    channel: np.ndarray
    side: int = 0

    def add(self, plan, codes, y):
        y[:, self.channel] += codes.sides[self.side]


@dataclass
class Signs:
    projection: np.ndarray  # (rows or more, width)
    rows: int
    factor: np.float32
    field: int = 0
    scale_side: int = -1
    outlier_field: int = -1
    reach: str = "all"  # all | outliers | others

    def add(self, plan, codes, y):
        width = self.projection.shape[1]
        runs, each = plan.code_channels // width, (self.rows + 7) // 8
        for r in range(runs):
            bytes_ = codes.fields[self.field][:, r * each : (r + 1) * each].astype(np.uint8)
            bits = np.unpackbits(bytes_, axis=1, bitorder="little")[:, : self.rows]
            sign = np.where(bits, 1.0, -1.0)
            total = row_product(sign, self.projection[: self.rows], np.zeros((len(sign), width)))
            scale = np.full((len(sign), 1), np.float64(self.factor))
            if self.scale_side >= 0:
                scale = scale * codes.sides[self.scale_side][:, r : r + 1]
            added = np.full((len(sign), width), self.reach != "outliers")
            if self.outlier_field >= 0:
                named = codes.fields[self.outlier_field]
                count = named.shape[1] // runs
                named = named[:, r * count : (r + 1) * count].repeat(plan.layout.block_tokens, axis=0)
                np.put_along_axis(added, named.astype(np.int64), self.reach == "outliers", axis=1)
            part = y[:, r * width : (r + 1) * width]
            np.add(part, scale * total, out=part, where=added)


@dataclass
class Plan:
    channels: int
    code_channels: int
    layout: Layout
    terms: list
    map: object = field(default_factory=Identity)
    inner_bias: np.ndarray = None  # (channels)
    outer_bias: np.ndarray = None
    token_scale_side: int = -1
    rope: str = "post"
    maps_scores: bool = False  # attention adjusts the scores of coded keys, which rows alone cannot do
    rounds_queries: bool = False  # attention rounds the queries that meet coded keys, which rows alone cannot do


def decode(plan, codes):
    """Rows (tokens, channels), float32, in the RoPE domain of the plan: the bits of decode_plan (lib/codec/plan.cpp)."""
    y = np.zeros((codes.tokens, plan.code_channels))
    for term in plan.terms:
        term.add(plan, codes, y)
    z = np.zeros((codes.tokens, plan.channels))
    if plan.inner_bias is not None:
        z += plan.inner_bias
    z = plan.map.add(y, z)
    if plan.token_scale_side >= 0:
        scale = codes.sides[plan.token_scale_side].astype(np.float64)
        z *= scale.repeat(plan.channels // scale.shape[1], axis=1)
    if plan.outer_bias is not None:
        z += plan.outer_bias
    x = z.astype(np.float32)
    at = tuple(codes.overlay[:, :2].astype(np.int64).T)
    x[at] = np.where(codes.overlay[:, 3] != 0, x[at] + codes.overlay[:, 2], codes.overlay[:, 2])
    return x
