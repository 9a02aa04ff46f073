"""Linear maps as lib/codec/linear_map.h keeps them, so that a chain of transforms folds into a plan with the same bits:
x (n, cols) = y (n, rows) * map."""
from dataclasses import dataclass, field

import numpy as np

from .numbers import UnknownKind, row_product


@dataclass
class Identity:
    def add(self, y, x):
        """x + y * map, in double."""
        return x + y


@dataclass
class Diagonal:
    factor: np.ndarray  # (cols)

    def add(self, y, x):
        return x + y * self.factor.astype(np.float64)


@dataclass
class Gather:
    rows: int
    origin: np.ndarray  # (cols), -1: from nowhere
    factor: np.ndarray = None  # (cols); None: 1

    def add(self, y, x):
        taken = y[:, np.maximum(self.origin, 0)] * (1.0 if self.factor is None else self.factor.astype(np.float64))
        return np.where(self.origin >= 0, x + taken, x)


@dataclass
class Blocks:
    blocks: list  # (rows, cols) each, along the diagonal

    def add(self, y, x):
        x, row, col = x.copy(), 0, 0
        for b in self.blocks:
            row_product(y[:, row : row + b.shape[0]], b, x[:, col : col + b.shape[1]])
            row, col = row + b.shape[0], col + b.shape[1]
        return x


@dataclass
class Hadamard:
    block: int
    before: np.ndarray = None  # (channels); None: 1
    after: np.ndarray = None

    def add(self, y, x):
        v = y if self.before is None else y * self.before.astype(np.float64)
        v = walsh_hadamard(v, self.block)
        return x + (v if self.after is None else v * self.after.astype(np.float64))


@dataclass
class Dense:
    values: np.ndarray  # (rows, cols)

    def add(self, y, x):
        return row_product(y, self.values, x.copy())


def walsh_hadamard(x, block):
    """Every `block` columns of x (n, channels) times the orthonormal matrix, in the type of x and the order of
    walsh_hadamard in linear_map.h."""
    n, channels = x.shape
    v = x.reshape(n, channels // block, block)
    half = 1
    while half < block:
        pairs = v.reshape(n, channels // block, block // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        v = np.stack([a + b, a - b], axis=-2).reshape(n, channels // block, block)
        half *= 2
    return (v * (x.dtype.type(1) / np.sqrt(x.dtype.type(block)))).reshape(n, channels)


def apply(map, v, cols):
    """A bias (rows) through a map, float32; None stays None."""
    if v is None:
        return None
    return map.add(v.astype(np.float64)[None], np.zeros((1, cols)))[0].astype(np.float32)


def map_from_json(j):
    """As a file of codes states what a prompt fitted (docs/formats.md)."""
    def numbers(name):
        return np.array(j[name], np.float32) if j.get(name) else None
    kind = j["kind"]
    if kind == "identity":
        return Identity()
    if kind == "diagonal":
        return Diagonal(numbers("factor"))
    if kind == "gather":
        return Gather(j["rows"], np.array(j["from"]), numbers("factor"))
    if kind == "blocks":
        return Blocks([np.array(b["values"], np.float32).reshape(b["rows"], b["cols"]) for b in j["blocks"]])
    if kind == "hadamard":
        return Hadamard(j["block"], numbers("before"), numbers("after"))
    if kind == "dense":
        return Dense(numbers("values").reshape(j["rows"], j["cols"]))
    raise UnknownKind(f"linear map '{kind}'")


# ---- Products of maps: compose() of linear_map.cpp ----

@dataclass
class Part:
    row: int
    col: int
    values: np.ndarray = field(repr=False)  # (rows, cols), double


def as_gather(map):
    if isinstance(map, Diagonal):
        return Gather(len(map.factor), np.arange(len(map.factor)), map.factor)
    return map if isinstance(map, Gather) else None


def gather_product(first, second):
    origin = np.where(second.origin < 0, -1, first.origin[np.maximum(second.origin, 0)])
    factor = None
    if first.factor is not None or second.factor is not None:
        own = np.ones(first.origin.shape) if first.factor is None else first.factor.astype(np.float64)
        own = np.where(second.origin < 0, 0.0, own[np.maximum(second.origin, 0)])
        factor = (own * (1.0 if second.factor is None else second.factor.astype(np.float64))).astype(np.float32)
    if first.rows != len(origin) or not np.array_equal(origin, np.arange(len(origin))):
        return Gather(first.rows, origin, factor)
    return Identity() if factor is None else Diagonal(factor)


def ends_of(map, rows, cols):
    """Behind each run of channels that the map does not mix with others: (row, column)."""
    if isinstance(map, (Identity, Diagonal)):
        return [(i, i) for i in range(1, cols + 1)]
    if isinstance(map, Hadamard):
        return [(i, i) for i in range(map.block, cols + 1, map.block)]
    if isinstance(map, Dense):
        return [(rows, cols)]
    if isinstance(map, Blocks):
        return [tuple(e) for e in np.cumsum([b.shape for b in map.blocks], axis=0)]
    least, ends, after = [rows] * (cols + 1), [], 0
    for j in reversed(range(cols)):
        least[j] = least[j + 1] if map.origin[j] < 0 else min(least[j + 1], int(map.origin[j]))
    for j in range(cols - 1):
        after = max(after, int(map.origin[j]) + 1)
        if after <= least[j + 1]:
            ends.append((after, j + 1))
    return ends + [(rows, cols)]


def parts_of(map, rows, cols):
    dense = map.add(np.eye(rows), np.zeros((rows, cols)))
    parts, row, col = [], 0, 0
    for row_end, col_end in ends_of(map, rows, cols):
        parts.append(Part(row, col, dense[row:row_end, col:col_end]))
        row, col = row_end, col_end
    return parts


def together(parts):
    rows, cols = (sum(p.values.shape[axis] for p in parts) for axis in (0, 1))
    out = Part(parts[0].row, parts[0].col, np.zeros((rows, cols)))
    for p in parts:
        r, c = p.row - out.row, p.col - out.col
        out.values[r : r + p.values.shape[0], c : c + p.values.shape[1]] = p.values
    return out


def block_product(first, second, rows, middle, cols):
    a, b, blocks = parts_of(first, rows, middle), parts_of(second, middle, cols), []
    i = j = 0
    while i < len(a):
        i0, j0 = i, j
        i, j = i + 1, j + 1
        while a[i - 1].col + a[i - 1].values.shape[1] != b[j - 1].row + b[j - 1].values.shape[0]:
            if a[i - 1].col + a[i - 1].values.shape[1] < b[j - 1].row + b[j - 1].values.shape[0]:
                i += 1
            else:
                j += 1
        if i == len(a):
            j = len(b)  # columns that nothing comes to
        left, right = together(a[i0:i]).values, together(b[j0:j]).values
        blocks.append(row_product(left, right, np.zeros((left.shape[0], right.shape[1]))).astype(np.float32))
    return Blocks(blocks) if len(blocks) > 1 else Dense(blocks[0])


def compose(first, second, rows, middle, cols):
    """y * first * second in the narrowest kind that is exact: the same choices, so the same rounding."""
    if isinstance(first, Identity):
        return second
    if isinstance(second, Identity):
        return first
    a, b = as_gather(first), as_gather(second)
    if a is not None and b is not None:
        return gather_product(a, b)
    if isinstance(first, Hadamard) and isinstance(second, Diagonal):
        return Hadamard(first.block, first.before, second.factor if first.after is None else second.factor * first.after)
    if isinstance(second, Hadamard) and isinstance(first, Diagonal):
        return Hadamard(second.block, first.factor if second.before is None else first.factor * second.before, second.after)
    return block_product(first, second, rows, middle, cols)
