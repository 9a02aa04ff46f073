"""A cache of frozen codecs in NumPy: which tokens are exact and which coded, as lib/cache/policy.h says, and the keys and
values that attention sees of them. Rows are kept whole: this shows what a codec does to a model, not what it saves."""
from numbers import Integral

import numpy as np

from .numbers import UnknownKind, round_side

DEFAULTS = {"sinks": 4, "window": 128, "flush": 64, "rule": "window", "residual": 128, "exact_dtype": "f16", "prompt": 0,
            "generated": "coded", "policy": None, "coded": "all"}
OF_A_ROLE = ("rule", "window", "flush", "residual")


class FlushRule:
    """At the attention of the query at `position`, tokens [sinks, coded_end) are coded; the `first` ones together."""

    def __init__(self, window, flush, first=0):
        self.window, self.flush, self.first = window, flush, first

    def coded_end(self, sinks, position):
        if position < self.first:
            return min(sinks, position + 1)
        begin = max(sinks, self.first)
        past = max(0, position + 1 - self.window - begin)
        return min(begin, position + 1) + past // self.flush * self.flush


def given(keys, known, place=""):
    """Keys of a `cache:` section that say something, all of them known."""
    keys = {k: v for k, v in dict(keys or {}).items() if v is not None}
    for k in keys:
        if k not in known:
            raise UnknownKind(f"cache key '{place}{k}'; known: {', '.join(known)}")
    return keys


def whole(section, key, least):
    value = section[key]
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"cache.{key} is {value!r}; allowed: whole numbers from {least}")
    return value


def choice(section, key, known):
    if section[key] not in known:
        raise UnknownKind(f"cache.{key} '{section[key]}'; known: {', '.join(known)}")
    return section[key]


class Policy:
    """A `cache:` section: that of an archive (CodecSet.cache), with keys given anew in `changed`, for both roles or under
    k and v."""

    def __init__(self, section, changed=None):
        changed = given(changed, [*DEFAULTS, "k", "v"])
        for role in {"k", "v"} & set(changed):
            changed[role] = given(changed[role], OF_A_ROLE, role + ".")
        both, shared = {**DEFAULTS, **section, **changed}, {k: changed[k] for k in OF_A_ROLE if k in changed}
        kind = both["policy"] if isinstance(both["policy"], str) else (both["policy"] or {}).get("name", "all")
        if kind != "all":
            raise UnknownKind(f"cache.policy '{kind}': this cache keeps every token")
        choice(both, "coded", ("all",))  # a text of a model without eyes has no image
        self.sinks, self.prompt = whole(both, "sinks", 0), whole(both, "prompt", 0)
        self.dtype = choice(both, "exact_dtype", ("f16", "bf16", "f32"))
        self.codes_generated, self.waits = choice(both, "generated", ("coded", "exact")) == "coded", self.prompt
        if self.prompt == 0 and not self.codes_generated:
            raise ValueError("cache.generated: exact needs cache.prompt, the tokens behind which nothing is coded")
        self.rules = {}
        for role in ("k", "v"):
            own = {**both, **section.get(role, {}), **shared, **changed.get(role, {})}
            rule = choice(own, "rule", ("window", "kivi", "residual", "none"))
            if rule == "window":
                self.rules[role] = FlushRule(whole(own, "window", 0), whole(own, "flush", 1))
            elif rule != "none":
                residual = whole(own, "residual", 1)
                if rule == "residual":
                    self.rules[role] = FlushRule(1, residual, self.prompt)
                else:
                    self.rules[role] = FlushRule(1, residual) if role == "k" else FlushRule(residual + 1, 1)
        self.codes = bool(self.rules)
        if len(self.rules) == 1 or (self.prompt > 0 and not self.codes):
            raise ValueError("cache.rule: none holds for both roles or for neither, and not with cache.prompt")

    def coded_end(self, role, position):
        if not self.codes or position + 1 < self.waits:
            return min(self.sinks, position + 1)
        rule = self.rules[role]
        last = self.prompt - 1 + (rule.first > 0)  # a first lot is coded for the query behind it
        return rule.coded_end(self.sinks, position if self.codes_generated else min(position, last))

    def fitted_tokens(self, held):
        """How many of the held tokens a prompt's parameters are fitted to (fit_tokens in lib/cache/coding.h)."""
        if self.prompt > 0:
            return min(held, self.prompt)
        first = min(self.sinks + max(1, r.window) + r.flush - 1 for r in self.rules.values())
        return min(held, max(self.waits, first))


class Rope:
    """RoPE in the half layout, float32 (lib/core/rope.h). facts: `rope` of a codec set's shape."""

    def __init__(self, facts):
        self.head_dim, self.half = facts["head_dim"], facts["rotary_dim"] // 2
        self.frequency = np.array(facts["inverse_frequency"])
        self.factor = facts["attention_factor"]

    def turn(self, x, first, back=False):
        """Rows x (n, heads * head_dim) of positions first, first + 1, ..., turned; `back` undoes it."""
        angle = np.arange(first, first + len(x), dtype=np.float64)[:, None] * self.frequency
        c, s = ((f(angle) * self.factor).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        heads = x.reshape(len(x), -1, self.head_dim)
        a, b, rest = heads[..., : self.half], heads[..., self.half : 2 * self.half], heads[..., 2 * self.half :]
        if back:
            undo = np.float32(1.0 / (self.factor * self.factor))
            a, b = (a * c + b * s) * undo, (b * c - a * s) * undo
        else:
            a, b = a * c - b * s, a * s + b * c
        return np.concatenate([a, b, rest], axis=2).reshape(x.shape)


class Rows:
    """Rows that grow."""

    def __init__(self, channels):
        self.all, self.count = np.zeros((256, channels), np.float32), 0

    def append(self, x):
        while self.count + len(x) > len(self.all):
            self.all = np.concatenate([self.all, np.zeros_like(self.all)])
        self.all[self.count : self.count + len(x)] = x
        self.count += len(x)

    def view(self):
        return self.all[: self.count]


class CachedUnit:
    """The tokens of one unit: exact in its RoPE domain, and as attention sees them, keys after RoPE."""

    def __init__(self, unit, policy, rope):
        self.unit, self.policy, self.rope = unit, policy, rope
        self.exact, self.seen = Rows(unit.channels), Rows(unit.channels)
        self.coded_end, self.prompt = policy.sinks, None
        self.before_rope = unit.role == "k" and unit.rope == "pre"
        rule, flush = policy.rules.get(unit.role), unit.layout.block_tokens
        if policy.codes and not (rule.first and not policy.codes_generated):
            flush = rule.flush
        if flush % unit.layout.block_tokens:
            raise ValueError(f"cache.{unit.role}: flush {flush} is no multiple of the {unit.layout.block_tokens} tokens that "
                             f"{unit} codes together")
        if policy.codes and unit.method.asks_queries:
            raise UnknownKind(f"{unit}: fitted to the queries of a prompt, which a cache of keys and values has not")
        if policy.codes and unit.plan.rounds_queries:
            raise UnknownKind(f"{unit}: rounds the queries that meet coded keys (query: q8), which keys alone cannot do")
        if policy.codes and unit.plan.maps_scores:
            raise UnknownKind(f"{unit}: maps the scores of coded keys (low_shift, high_shift), which keys alone cannot do")

    def put(self, rows, first, before_rope):
        if self.unit.role == "k" and before_rope != self.before_rope:
            rows = self.rope.turn(rows, first, back=self.before_rope)
        if self.policy.dtype == "f16" and np.abs(rows).max(initial=0) >= 65520:
            raise ValueError(f"{self.unit}: a value leaves f16, the cache's exact_dtype")
        rows = round_side(self.policy.dtype, rows)
        self.exact.append(rows)
        self.seen.append(self.after_rope(rows, first))

    def after_rope(self, rows, first):
        return self.rope.turn(rows, first) if self.before_rope else rows

    def code(self, end):
        if end <= self.coded_end:
            return
        if self.unit.method.fit_tokens and self.prompt is None:
            self.prompt = self.unit.fit(self.exact.view()[: self.policy.fitted_tokens(self.exact.count)])
        rows = self.exact.view()[self.coded_end : end]
        decoded = self.unit.decode(self.unit.encode(rows, self.prompt), self.prompt)
        self.seen.view()[self.coded_end : end] = self.after_rope(decoded, self.coded_end)
        self.coded_end = end


class LayerCache:
    """One layer of one sequence. codecs: of vqkv.load; changed: keys of its `cache:` section, given anew."""

    def __init__(self, codecs, layer, changed=None):
        if codecs.tier_tokens:
            raise UnknownKind(f"{codecs.path}: codecs in tiers; this cache has one form of coded tokens")
        self.shape, self.policy = codecs.shape, Policy(codecs.cache, changed)
        rope = Rope(codecs.shape["rope"])
        self.length = 0
        self.policy.waits = max([self.policy.prompt] + [u.method.fit_tokens for u in codecs.units])
        if 0 < self.policy.prompt < self.policy.waits:
            raise ValueError(f"cache.prompt: {codecs.path} is fitted to {self.policy.waits} tokens of a prompt at least, not to "
                             f"{self.policy.prompt}")
        self.units = [CachedUnit(u, self.policy, rope) for u in codecs.units if u.layer == layer]
        if not self.units:
            raise KeyError(f"{codecs.path}: holds no layer {layer}")

    def append(self, keys, values, before_rope=False):
        """New tokens, (n, kv_heads, head_dim) float32 each; keys after RoPE unless said otherwise. What their queries
        attend to, (length, kv_heads, head_dim) each: one query sees the cache as decoding token by token does; the
        queries of several tokens see all that is not coded yet exactly, and it is coded behind them."""
        heads, dim = self.shape["kv_heads"], self.shape["head_dim"]
        for x in (keys, values):
            if x.shape[1:] != (heads, dim) or x.shape != keys.shape:
                raise ValueError(f"rows of shape {x.shape[1:]}; the codecs are of {heads} KV heads of {dim}")
        n = len(keys)
        for u in self.units:
            rows = (keys if u.unit.role == "k" else values)[:, u.unit.first_head : u.unit.first_head + u.unit.heads]
            u.put(np.ascontiguousarray(rows, np.float32).reshape(n, -1), self.length, before_rope)
        self.length += n
        if n == 1:
            for u in self.units:
                u.code(self.policy.coded_end(u.unit.role, self.length - 1))
        return self.seen("k"), self.seen("v")

    def seen(self, role):
        parts = [u.seen.view() for u in self.units if u.unit.role == role]  # in the order of their heads
        return np.concatenate(parts, axis=1).reshape(self.length, self.shape["kv_heads"], self.shape["head_dim"])
