"""Methods whose groups lie over a whole tensor (lib/codec/methods/tensor_groups.h): quanto and hqq, as transformers'
QuantizedCache calls them. Codes are those of the C++ encoders bit for bit but where a power of hqq's steps rounds otherwise."""
import math

import numpy as np

from .method import Method
from .numbers import round_side
from .plan import Codes, Field, Layout, Levels, Side


class Tensor(Method):
    def set_groups(self, form, tokens, zero_of_codes=False, padding=0):
        """form: neighbours | strided | tokens (TensorGroups::Form); padding: unused bits a group."""
        k, u = self.knobs, self.unit
        group, d, channels = k["group"], u.head_dim, u.channels
        self.tokens, self.dtype, self.zero_of_codes = tokens, k["dtype"], zero_of_codes
        self.per_token = form == "neighbours" and d % group == 0
        count = tokens * channels // group
        # In memory order: (heads, tokens, head_dim).
        h, t, c = np.indices((u.heads, tokens, d)).reshape(3, -1)
        n, channel = np.arange(h.size), h * d + c
        if self.per_token:
            g = t * (channels // group) + channel // group
        else:
            g = {"neighbours": n // group, "strided": n % count, "tokens": (h * tokens + t) // group * d + c}[form]
        self.member = (t * channels + channel)[np.argsort(g, kind="stable")].reshape(count, group)
        slots = channels // group if self.per_token else count
        sides = [Side(name, self.dtype, slots, self.per_token) for name in ("scale", "zero")]
        if padding:
            sides.append(Side("padding", "f16", count * padding // 16, False))
        self.layout = Layout([Field("code", k["bits"], channels)], sides, block_tokens=tokens)
        self.group_of = None
        if not self.per_token and not (form == "tokens" and tokens == group):
            self.group_of = np.empty((tokens, channels), np.int64)
            self.group_of.reshape(-1)[self.member] = np.arange(count)[:, None]

    def plan(self, prompt=None):
        lying = self.group_of is None
        return self.make_plan([Levels(
            scale_side=0, zero_side=1, zero_of_codes=self.zero_of_codes, group_of=self.group_of,
            group_channels=self.knobs["group"] if lying and self.per_token else 1,
            group_tokens=self.knobs["group"] if lying and not self.per_token else 1)])

    def encode(self, x, prompt=None):
        blocks = len(x) // self.tokens
        values = round_side(self.dtype, x).reshape(blocks, -1)
        codes = np.empty(values.shape, np.uint16)
        sides = [np.zeros((len(x) if s.per_token else blocks, s.slots), np.float32) for s in self.layout.sides]
        for b in range(blocks):
            made, scale, zero = self.code(values[b][self.member])
            codes[b][self.member] = made
            for side, of_groups in zip(sides, (scale, zero)):
                side.reshape(blocks, -1)[b] = of_groups
        return Codes(len(x), [codes.reshape(x.shape)], sides)

    def rounded(self, x):
        return round_side(self.dtype, x)


class Quanto(Tensor):
    def set_up(self, params):
        group = self.knobs["group"]
        if self.knobs["axis"] == 0:
            self.set_groups("neighbours", group // math.gcd(group, self.unit.head_dim))
        else:
            self.set_groups("tokens", group)

    def code(self, x):
        top = np.float32((1 << self.knobs["bits"]) - 1)
        low = x.min(axis=1, keepdims=True)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            step = self.rounded(self.rounded(np.minimum(x.max(axis=1, keepdims=True) - low, np.float32(3e38))) / top)
            level = np.where(step > 0, self.rounded(self.rounded(x - low) / step), np.float32(0))
        return np.clip(np.rint(level), 0, top).astype(np.uint16), step[:, 0], low[:, 0]


class Hqq(Tensor):
    def set_up(self, params):
        k = self.knobs
        padding = 32 * -(-k["group"] // 10) - 3 * k["group"] if k["bits"] == 3 else 0
        self.set_groups("neighbours" if k["axis"] else "strided", k["tokens"], True, padding)

    def code(self, x):
        f = np.float32
        top = f((1 << self.knobs["bits"]) - 1)
        low = x.min(axis=1, keepdims=True)
        with np.errstate(all="ignore"):
            width = x.max(axis=1, keepdims=True) - low
            inverse = np.where(width <= f(1e-4), f(1), np.minimum(top / width, f(2e4)))
            zero = -low * inverse
            least = f(np.inf)
            for _ in range(20):
                code = np.clip(np.rint(x * inverse + zero), 0, top)
                error = x - (code - zero) / inverse
                size = np.abs(error)
                away = (size.astype(np.float64) ** np.float64(f(0.7) - f(1))).astype(f)
                shrunk = np.where(size > 0, np.maximum(size - f(0.1) * away, f(0)), f(0))
                shrunk = np.where(error < 0, -shrunk, shrunk)
                terms = code - (x - shrunk) * inverse
                zero = (np.cumsum(terms, axis=1, dtype=np.float64)[:, -1:] / x.shape[1]).astype(f)
                mean = f(np.cumsum(np.cumsum(size, axis=1, dtype=np.float64)[:, -1])[-1] / x.size)
                if not mean < least:
                    break
                least = mean
            code = np.clip(np.rint(x * inverse + zero), 0, top).astype(np.uint16)
            scale = np.minimum(f(1) / inverse, f(1e36))
        return code, self.rounded(scale)[:, 0], self.rounded(-zero)[:, 0]
