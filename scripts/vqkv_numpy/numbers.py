"""Storage types and random streams, as lib/core/dtype.h and lib/core/rng.h have them."""
import hashlib
import math

import numpy as np


class UnknownKind(ValueError):
    """A method, transform, map or rule that this reader has no code for; the message names it."""


def bf16(x):
    """float32 rounded to bf16, to nearest even; finite input."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def float8(codes, mantissa):
    """The numbers of 8-bit codes: E4M3 (mantissa 3) or E5M2 (2), float32."""
    codes = np.asarray(codes)
    if mantissa == 2:
        numbers = (codes.astype(np.uint16) << 8).view(np.float16)
        with np.errstate(invalid="ignore"):  # NaN with a signal
            return np.where(np.isnan(numbers), np.float32(np.nan), numbers.astype(np.float32))
    # As a half, its exponent is 8 too small; infinities are numbers but for one NaN.
    half = ((codes & 0x80).astype(np.uint16) << 8) | ((codes & 0x7F).astype(np.uint16) << 7)
    return np.where((codes & 0x7F) == 0x7F, np.float32(np.nan), half.view(np.float16).astype(np.float32) * np.float32(256))


def to_float8(x, mantissa):
    """8-bit codes of float32 numbers that the format reaches, to nearest even."""
    positive = float8(np.arange(0x7F if mantissa == 3 else 0x7C), mantissa).astype(np.float64)
    middle = (positive[1:] + positive[:-1]) / 2
    magnitude = np.abs(np.asarray(x, np.float32)).astype(np.float64)
    low = np.searchsorted(middle, magnitude, "left")  # in a middle the lower one
    odd = (low < len(middle)) & (low % 2 == 1) & (magnitude == middle[np.minimum(low, len(middle) - 1)])
    return (low + odd + np.where(np.signbit(x), 0x80, 0)).astype(np.uint16)


MOST = {"f16": 65504.0, "bf16": float.fromhex("0x1.FEp127"), "f32": np.inf, "f8e5m2": np.inf}


def round_side(dtype, x):
    """float32 as `dtype` stores it, saturated at its largest finite number."""
    x = np.clip(np.asarray(x, np.float32), np.float32(-MOST[dtype]), np.float32(MOST[dtype]))
    if dtype == "f16":
        return x.astype(np.float16).astype(np.float32)
    if dtype == "bf16":
        return bf16(x)
    if dtype == "f8e5m2":
        return float8(to_float8(x, 2) & 0xFF, 2)
    if dtype == "f32":
        return x
    raise UnknownKind(f"storage type '{dtype}'")


def round_scale(dtype, x):
    """The same for what something is divided by: at least the smallest normal number."""
    least = np.float32(2.0**-14 if dtype == "f16" else 2.0**-126)
    return round_side(dtype, np.maximum(np.asarray(x, np.float32), least))


class Rng:
    """Philox4x32-10, a stream named by a text (core/rng.h)."""

    def __init__(self, text):
        self.key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        self.counter, self.block, self.spare = 0, [], None

    def next_u32(self):
        if not self.block:
            c = [self.counter & 0xFFFFFFFF, self.counter >> 32, 0, 0]
            k0, k1 = self.key & 0xFFFFFFFF, self.key >> 32
            for _ in range(10):
                p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
                c = [p1 >> 32 ^ c[1] ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
                k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
            self.counter, self.block = self.counter + 1, c[::-1]
        return self.block.pop()

    def uniform(self):
        low = self.next_u32()
        return ((self.next_u32() << 32 | low) >> 11) * 2.0**-53

    def normal(self):
        if self.spare is not None:
            value, self.spare = self.spare, None
            return value
        radius = math.sqrt(-2.0 * math.log(1.0 - self.uniform()))
        angle = 2.0 * math.pi * self.uniform()
        self.spare = radius * math.sin(angle)
        return radius * math.cos(angle)


def in_order(terms):
    """Their sum along the last axis, one after the other as a loop adds them."""
    return np.cumsum(terms, axis=-1)[..., -1]


def row_product(x, m, out):
    """out (n, cols) + x (n, rows) * m (rows, cols), row after row, rows whose x is 0 left out; the type of x."""
    for i in range(m.shape[0]):
        column = x[:, i : i + 1]
        np.add(out, column * m[i].astype(x.dtype), out=out, where=column != 0)
    return out
