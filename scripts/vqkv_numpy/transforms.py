"""Chains of transforms (lib/codec/transform): forward over rows, and folded into the plan of the codec behind them."""
from dataclasses import replace

import numpy as np

from .maps import Blocks, Dense, Diagonal, Gather, Hadamard, Identity, apply, compose, walsh_hadamard
from .numbers import Rng, UnknownKind, round_scale, round_side, row_product
from .plan import Codes, Side


class Transform:
    """knobs: those of the archive; params: tensor(name) under this one's prefix."""
    fit_tokens = 0  # of a prompt, that fit() asks for
    asks_queries = False  # of it, too

    def __init__(self, knobs, unit, params):
        self.knobs, self.unit = knobs, unit
        self.set_up(params)

    def set_up(self, params):
        pass

    def coded(self):
        """The unit as what stands behind sees it."""
        return self.unit

    def fit(self, x):
        """What takes this one's place for a prompt of rows x."""
        return self

    def forward(self, x):
        return x

    def inverse(self):
        """x = y * map + bias."""
        return Identity(), None


class Center(Transform):
    def set_up(self, params):
        self.mean = params.tensor("mean")

    def forward(self, x):
        return x - self.mean

    def inverse(self):
        return Identity(), self.mean


class ChannelScale(Transform):
    def set_up(self, params):
        self.scale = params.tensor("scale")

    def forward(self, x):
        return x / self.scale

    def inverse(self):
        return Diagonal(self.scale), None


class TokenScale(Transform):
    """Divides each token, and decodes as the plan's token scale."""

    def set_up(self, params):
        u, k = self.unit, self.knobs
        self.groups = {"unit": 1, "head": u.heads}.get(k["per"]) or u.channels // k["width"]

    def scales(self, x):
        parts = x.reshape(len(x), self.groups, -1).astype(np.float64)
        if self.knobs["by"] == "absmax":
            s = np.abs(parts).max(axis=2)
        else:
            total = np.cumsum(parts * parts, axis=2)[..., -1]
            s = np.sqrt(total / parts.shape[2] if self.knobs["by"] == "rms" else total)
        return round_scale(self.knobs["type"], np.minimum(s, 3.4e38).astype(np.float32))


class HadamardTransform(Transform):
    def set_up(self, params):
        k, d = self.knobs, self.unit.head_dim
        self.block, self.sign = k["block"] or d & -d, None
        if k["signs"]:
            rng = Rng(f"hadamard/{k['seed']}")
            self.sign = np.array([-1.0 if rng.next_u32() & 1 else 1.0 for _ in range(self.unit.channels)], np.float32)

    def forward(self, x):
        return walsh_hadamard(x if self.sign is None else x * self.sign, self.block)

    def inverse(self):
        return Hadamard(self.block, None, self.sign), None


class PerHead(Transform):
    """A matrix a head: forward_matrix, back_matrix (heads, head_dim, head_dim)."""

    def forward(self, x):
        d, out = self.unit.head_dim, np.zeros(x.shape, np.float32)
        for h, m in enumerate(self.forward_matrix):
            row_product(x[:, h * d : (h + 1) * d], m, out[:, h * d : (h + 1) * d])
        return out

    def inverse(self):
        return Dense(self.back_matrix[0]) if len(self.back_matrix) == 1 else Blocks(list(self.back_matrix)), None


class Rotation(PerHead):
    def set_up(self, params):
        self.forward_matrix = params.tensor("rotation")
        self.back_matrix = self.forward_matrix.transpose(0, 2, 1)


class QueryMetric(PerHead):
    def set_up(self, params):
        self.pairs = self.unit.rope == "pre"
        if self.pairs:
            self.scale = params.tensor("scale")
        else:
            self.forward_matrix, self.back_matrix = params.tensor("forward"), params.tensor("back")

    def forward(self, x):
        return x / self.scale if self.pairs else super().forward(x)

    def inverse(self):
        return (Diagonal(self.scale), None) if self.pairs else super().inverse()


class LowRank(Transform):
    def set_up(self, params):
        self.axes, self.mean = params.tensor("axes"), params.tensor("mean")

    def coded(self):
        return replace(self.unit, heads=1, head_dim=len(self.axes), rotary_dim=0)

    def forward(self, x):
        total = np.zeros((len(x), len(self.axes)))
        for c in range(x.shape[1]):
            total += (x[:, c : c + 1].astype(np.float64) - self.mean[c]) * self.axes[:, c]
        return total.astype(np.float32)

    def inverse(self):
        return Dense(self.axes), self.mean


class KeptChannels(Transform):
    """channel: those that are coded, in rising order."""

    def coded(self):
        kept = len(self.channel) // self.unit.heads
        return self.unit if kept == self.unit.head_dim else replace(self.unit, head_dim=kept, rotary_dim=0)

    def forward(self, x):
        return x[:, self.channel]

    def inverse(self):
        origin = np.full(self.unit.channels, -1)
        origin[self.channel] = np.arange(len(self.channel))
        return Gather(len(self.channel), origin), None


class PruneChannels(KeptChannels):
    def set_up(self, params):
        self.channel = params.tensor("channel").reshape(-1).astype(np.int64)


class Think(KeptChannels):
    """Before a prompt the first channels of each head stay; a prompt's own plan stands in a file of codes."""
    asks_queries = True

    def set_up(self, params):
        d, self.fit_tokens = self.unit.head_dim, self.knobs["queries"]
        kept = d - int(self.knobs["ratio"] * d)
        self.channel = (np.arange(self.unit.heads)[:, None] * d + np.arange(kept)).reshape(-1)

    def fit(self, x):
        raise UnknownKind("transform 'think' is fitted to the queries of a prompt: this reader decodes its codes, from a "
                          "file that holds them, and makes none")


class Deco(Transform):
    """The axes of a prompt in runs of channels (lib/codec/transform/deco.cpp); 1 before there is one."""

    def set_up(self, params):
        self.fit_tokens = self.knobs["run"]
        self.ahead = self.back = np.eye(self.fit_tokens, dtype=np.float32)

    def fit(self, x):
        rows = x.reshape(-1, self.fit_tokens).astype(np.float64)
        values, vectors = np.linalg.eigh(rows.T @ rows)
        values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
        vectors = vectors * np.where(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))] < 0, -1, 1)
        singular = np.maximum(np.sqrt(values), np.sqrt(values[0]) * 1e-6)
        root = np.clip(np.sqrt(singular), 2.0**-10, 65504.0)
        fitted = Deco(self.knobs, self.unit, None)
        fitted.back = round_side("f16", (root[:, None] * vectors.T).astype(np.float32))
        fitted.ahead = np.linalg.inv(fitted.back.astype(np.float64)).astype(np.float32)
        return fitted

    def forward(self, x):
        runs = np.ascontiguousarray(x).reshape(-1, self.fit_tokens)
        return row_product(runs, self.ahead, np.zeros_like(runs)).reshape(x.shape)

    def inverse(self):
        return Blocks([self.back] * (self.unit.channels // self.fit_tokens)), None


TRANSFORMS = {"identity": Transform, "center": Center, "channel_scale": ChannelScale, "token_scale": TokenScale,
              "hadamard": HadamardTransform, "rotation": Rotation, "query_metric": QueryMetric, "low_rank": LowRank,
              "prune_channels": PruneChannels, "think": Think, "deco": Deco}


class Prefixed:
    def __init__(self, params, prefix):
        self.params, self.prefix = params, prefix

    def tensor(self, name):
        return self.params.tensor(self.prefix + name)


def sum_of(a, b):
    return b if a is None else a if b is None else a + b


class Chain:
    """A method behind transforms, itself like a method (ChainCodec in lib/codec/transform/chain.cpp). Its prompt: the
    transforms as fitted, and what the method behind them fitted."""

    def __init__(self, transforms, unit, params, make_inner):
        self.chain, self.unit, self.scale_at = [], unit, -1
        for i, knobs in enumerate(transforms):
            if knobs["name"] not in TRANSFORMS:
                raise UnknownKind(f"transform '{knobs['name']}'; known: {', '.join(TRANSFORMS)}")
            t = TRANSFORMS[knobs["name"]](knobs, unit, Prefixed(params, f"transform.{i}."))
            if isinstance(t, TokenScale):
                self.scale_at = i
            self.chain.append(t)
            unit = t.coded()
        self.inner = make_inner(unit)
        self.stages, self.layout = self.inner.stages, self.inner.layout
        self.fit_tokens = max(part.fit_tokens for part in [self.inner, *self.chain])
        self.asks_queries = any(t.asks_queries for t in self.chain)
        if self.scale_at >= 0:
            t = self.chain[self.scale_at]
            self.layout = replace(self.layout,
                                  sides=self.layout.sides + [Side("token_scale", t.knobs["type"], t.groups)])

    def level_layout(self, stages):
        return replace(self.layout, fields=self.inner.level_layout(stages).fields)

    def transforms(self, prompt):
        return prompt[0] if prompt else self.chain

    def step(self, i, t, x):
        """x through transform i, which is t, and its token scales."""
        if i != self.scale_at:
            return t.forward(x), None
        scales = t.scales(x)
        return x / scales.repeat(x.shape[1] // t.groups, axis=1), scales

    def fit(self, rows):
        fitted = []
        for i, t in enumerate(self.chain):
            fitted.append(t.fit(rows))
            rows = self.step(i, fitted[i], rows)[0]
        return fitted, self.inner.fit(rows)

    def encode(self, x, prompt=None):
        kept = None
        for i, t in enumerate(self.transforms(prompt)):
            x, scales = self.step(i, t, x)
            kept = scales if scales is not None else kept
        codes = self.inner.encode(x, prompt and prompt[1])
        overlay = codes.overlay.copy()
        channel = overlay[:, 1].astype(np.int64)
        for t in reversed(self.transforms(prompt) if len(overlay) else []):
            map, bias = t.inverse()
            if isinstance(map, Diagonal):
                overlay[:, 2] *= map.factor[channel]
            if bias is not None:
                overlay[:, 2] += np.where(overlay[:, 3] == 0, bias[channel], np.float32(0))
        overlay[:, 2] = round_side("f16", overlay[:, 2])
        return Codes(codes.tokens, codes.fields, codes.sides + ([] if kept is None else [kept]), overlay)

    def plan(self, prompt=None, **level):
        chain, plan = self.transforms(prompt), self.inner.plan(prompt and prompt[1], **level)
        n, coded, decoded = self.unit.channels, plan.code_channels, plan.channels
        scaled = chain[max(self.scale_at, 0)].unit.channels
        # Behind the inner codec: x' = outer + s (inner_bias + y map). A token scale of the chain splits its maps in two.
        inside, outside = [Identity(), None], [Identity(), None]
        for i, t in reversed(list(enumerate(chain))):
            if i == self.scale_at:
                continue
            map, bias = t.inverse()
            part = outside if i < self.scale_at else inside
            origin, to = t.coded().channels, t.unit.channels
            part[1] = sum_of(apply(map, part[1], to), bias)
            part[0] = compose(part[0], map, decoded if part is inside else scaled, origin, to)
        inner, outer = plan.inner_bias, plan.outer_bias
        if plan.token_scale_side < 0:
            inner, outer = sum_of(inner, outer), None
            if self.scale_at < 0:
                inner, outer = outer, inner
        inner, outer = apply(inside[0], inner, scaled), apply(inside[0], outer, scaled)
        if self.scale_at >= 0:
            inner = sum_of(inner, inside[1])
        else:
            outer = sum_of(outer, inside[1])
        map, side = compose(plan.map, inside[0], coded, decoded, scaled), plan.token_scale_side
        if self.scale_at >= 0:
            inner, outer = apply(outside[0], inner, n), outside[1]
            map, side = compose(map, outside[0], coded, scaled, n), len(self.layout.sides) - 1
        return replace(plan, channels=n, layout=self.layout, map=map, inner_bias=inner, outer_bias=outer,
                       token_scale_side=side)
