"""One reading a system of its paper's formulas, in NumPy and double, written apart from lib/ and scripts/vqkv_numpy: rows
in, rows as decoded out. What a system learned or drew it is given. Sides stay in double: storage types are ours to lose by."""
import math

import numpy as np


def affine(x, bits):
    """Round to nearest between the ends of the last axis: KIVI, section 3."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    scale = np.where(high > low, (high - low) / (2**bits - 1), 1)
    return low + scale * np.rint((x - low) / scale)


def in_token_groups(x, size, f):
    """f over runs of `size` tokens of each channel."""
    return f(x.reshape(-1, size, x.shape[1]).swapaxes(1, 2)).swapaxes(1, 2).reshape(x.shape)


def in_channel_groups(x, size, f):
    return f(x.reshape(len(x), -1, size)).reshape(x.shape)


def on_kivis_axes(role, x, size, f):
    return (in_token_groups if role == "k" else in_channel_groups)(x, size, f)


def kivi(given, bits, group):
    return on_kivis_axes(given.role, given.x, group, lambda x: affine(x, bits))


def quantspec(given, group):
    """Two nibbles: section 4.2 and its figure; the lower one of what the upper one leaves over."""
    def code(x):
        low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
        scale = (high - low) / 15
        upper = np.rint((x - low) / scale)
        rest = x - low - upper * scale
        return low + upper * scale + np.clip(np.rint(rest / (scale / 16)), -8, 7) * scale / 16
    return on_kivis_axes(given.role, given.x, group, code)


def specache(given, group):
    """One bit: levels at the quarters of a range (section 3.2)."""
    def code(x):
        low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
        return np.where(x < (low + high) / 2, (3 * low + high) / 4, (low + 3 * high) / 4)
    return on_kivis_axes(given.role, given.x, group, code)


def calibquant(given, bits, clip):
    """Per channel over all tokens of the prompt, both ends times `clip` (section 3)."""
    low, high = given.prompt.min(axis=0) * clip, given.prompt.max(axis=0) * clip
    scale = (high - low) / (2**bits - 1)
    return low + scale * np.rint(np.clip((given.x - low) / scale, 0, 2**bits - 1))


# ---- KVQuant: sections 3.1 to 3.4 ----

def lloyd(values, weights, count):
    """Levels of least weighted squared error near a start at even quantiles."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    total = np.concatenate([[0], np.cumsum(weights)])
    first = np.concatenate([[0], np.cumsum(weights * values)])
    levels = np.interp((np.arange(count) + 0.5) / count * total[-1], total[1:], values)
    for _ in range(1000):
        ends = np.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        ends = np.concatenate([[0], ends, [len(values)]])
        mass = np.diff(total[ends])
        moved = np.where(mass > 0, np.diff(first[ends]) / np.maximum(mass, 1e-300), levels)
        if np.abs(moved - levels).max() < 1e-9:
            break
        levels = moved
    return np.sort(levels)


def nearest(levels, x):
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]


def kvquant_ranges(role, train, x, outliers):
    """Zero and half range of every row of x, and which of its values are exact."""
    share = outliers / 2
    if role == "k":  # a channel's, of the tokens calibrated on
        low, high = (np.quantile(train, q, axis=0) for q in (share, 1 - share))
        return (low + high) / 2, (high - low) / 2, (x < low) | (x > high)
    low, high = (np.quantile(x, q, axis=1, keepdims=True) for q in (share, 1 - share))
    exact = (x <= low) | (x >= high)
    inside = np.where(exact, np.median(x, axis=1, keepdims=True), x)
    low, high = inside.min(axis=1, keepdims=True), inside.max(axis=1, keepdims=True)
    return (low + high) / 2, (high - low) / 2, exact


def kvquant(given, levels, outliers):
    zero, half, exact = kvquant_ranges(given.role, given.train, given.x, outliers)
    return np.where(exact, given.x, zero + half * nearest(levels, (given.x - zero) / half))


def kvquant_calibration(given, outliers):
    """What levels are learned from: normalized values that are coded, and their weights."""
    zero, half, exact = kvquant_ranges(given.role, given.train, given.train, outliers)
    return ((given.train - zero) / half)[~exact], given.train_gradient2[~exact]


def kvquant_levels(given, bits, outliers):
    return lloyd(*kvquant_calibration(given, outliers), 2**bits)


# ---- QJL: definitions 3.1 and 3.2, and section 4 on outliers ----

def qjl(given, sketch, rows, outlier_rows, outliers, group):
    """sketch: (rows, head_dim). The vector whose product with a query is the estimate of that with the key."""
    x = given.x.reshape(-1, group, given.x.shape[1])
    loud = np.argsort(-np.linalg.norm(x, axis=1), axis=1)[:, :outliers]
    apart = np.zeros((len(x), 1, x.shape[2]), bool)
    np.put_along_axis(apart[:, 0], loud, True, axis=1)

    def estimate(part, s):
        signs = np.where(part @ s.T > 0, 1.0, -1.0)
        return math.sqrt(math.pi / 2) / len(s) * np.linalg.norm(part, axis=2, keepdims=True) * (signs @ s)

    inside, outside = np.where(apart, 0, x), np.where(apart, x, 0)
    return np.where(apart, estimate(outside, sketch[:outlier_rows]), estimate(inside, sketch[:rows])).reshape(given.x.shape)


# ---- ThinK: section 3.2. DecoQuant: section 3 ----

def think(given, ratio, newest):
    """queries (heads of the group, tokens, channels)."""
    energy = (given.queries[:, -newest:] ** 2).sum(axis=(0, 1)) * (given.prompt**2).sum(axis=0)
    dropped = np.argsort(energy, kind="stable")[: int(ratio * len(energy))]
    y = given.x.copy()
    y[:, dropped] = 0
    return y


def decoquant(given, bits, run):
    """The singular values are shared between both factors; the larger one is rounded by the loudest value of a token."""
    _, singular, axes = np.linalg.svd(given.prompt.reshape(-1, run), full_matrices=False)
    small = np.sqrt(singular)[:, None] * axes
    large = np.linalg.solve(small.T, given.x.reshape(-1, run).T).T.reshape(given.x.shape)
    scale = np.abs(large).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    return ((np.rint(large / scale) * scale).reshape(-1, run) @ small).reshape(given.x.shape)


# ---- Codewords ----

def greedy(x, books):
    """Of each residual the nearest word of the next book."""
    rest = x
    for words in books:
        distance = (words**2).sum(axis=1) - 2 * rest @ words.T
        rest = rest - words[distance.argmin(axis=1)]
    return x - rest


def vqkv(given, books):
    """books (stages, entries, channels): the frozen random ones through their layers."""
    return greedy(given.x, books)


def kumar(given, books, group):
    """Keys before RoPE in the interleaved layout of the authors' model, where channels 2p and 2p + 1 make a pair; group j of
    a head takes every (head_dim / group)-th channel from j on. Values as they lie (section 2)."""
    heads = given.x.reshape(len(given.x), given.heads, -1)
    d = heads.shape[2]
    order = np.arange(d)
    if given.role == "k":
        order = np.arange(d).reshape(2, -1).T.reshape(-1)  # x_0, y_0, x_1, y_1, ...
        order = order.reshape(group, -1).T.reshape(-1)
    scale = heads.std(axis=2, ddof=1, keepdims=True)
    scale = np.where(scale == 0, 1, scale)
    parts = (heads / scale)[..., order].reshape(-1, group)
    y = np.empty_like(heads)
    y[..., order] = greedy(parts, books).reshape(heads.shape)
    return (y * scale).reshape(given.x.shape)


def commvq_keys(given, books):
    """books (stages, groups, entries, pairs), complex: every sum Z_a + i Z_b is a centre (section 3.2)."""
    length = np.linalg.norm(given.x, axis=1, keepdims=True)
    halves = (given.x / length).reshape(len(given.x), given.heads, 2, -1)
    z = halves[:, :, 0] + 1j * halves[:, :, 1]
    rest = z.reshape(len(z), books.shape[1], -1)
    out = np.zeros_like(rest)
    for stage in books:
        for g, words in enumerate(stage):
            centres = (words[:, None] + 1j * words[None]).reshape(-1, words.shape[1])
            distance = (np.abs(centres) ** 2).sum(axis=1) - 2 * (rest[:, g] @ centres.conj().T).real
            chosen = centres[distance.argmin(axis=1)]
            rest[:, g] -= chosen
            out[:, g] += chosen
    out = out.reshape(z.shape)
    return (np.stack([out.real, out.imag], axis=2)).reshape(given.x.shape) * length


def commvq_values(given, p):
    """p: channel_scale, the layers of the encoder and the matrix, as named in lib/codec/train/binary_code.h (section 3.3)."""
    scaled = given.x / p["channel_scale"]
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    unit = scaled / length
    unit = (unit - unit.mean(axis=1, keepdims=True)) / np.sqrt(unit.var(axis=1, keepdims=True) + 1e-5)
    hidden = unit @ p["first"].T + p["first_bias"]
    hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    chosen = (hidden @ p["second"].T + p["second_bias"]).reshape(len(unit), -1, 4).argmax(axis=2)
    bits = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])[chosen].reshape(len(unit), -1)
    decoded = bits @ (p["rows"] / p["channel_scale"])
    norm = np.linalg.norm(decoded, axis=1, keepdims=True)
    return decoded / np.where(norm == 0, 1, norm) * length * p["channel_scale"]
