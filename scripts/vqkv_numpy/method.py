"""What all methods are: knobs and parameters of an archive, a layout, a plan, and rows to codes."""
from dataclasses import dataclass, replace

from .plan import Plan


@dataclass
class Unit:
    """Heads of one layer and role; a transform may leave others behind it."""
    role: str  # k | v
    layer: int
    first_head: int
    heads: int
    head_dim: int
    rope: str  # pre | post
    rotary_dim: int

    @property
    def channels(self):
        return self.heads * self.head_dim

    def pair(self, p):
        """Channels of pair p (UnitShape::pair in lib/codec/codec.h)."""
        half, head = self.rotary_dim // 2, p // (self.head_dim // 2) * self.head_dim
        p %= self.head_dim // 2
        return (head + p, head + p + half) if p < half else (head + 2 * p, head + 2 * p + 1)


class Method:
    """knobs: those of the archive; params: tensor(name), facts(name). A subclass sets `layout`."""
    defaults = {}  # of knobs that files of older versions may lack
    stages = 1  # levels of its codes
    fit_tokens = 0  # of a prompt, that fit() asks for
    asks_queries = False  # of it, too

    def __init__(self, knobs, unit, params):
        self.knobs, self.unit = {**self.defaults, **knobs}, unit
        self.set_up(params)

    def fit(self, rows):
        """The parameters of one prompt, of its first rows (n, channels); None where nothing is fitted."""

    def level_layout(self, stages):
        """Of the first stages: fewer slots of every field (Codec::level_layout)."""
        return replace(self.layout, fields=[replace(f, slots=f.slots // self.stages * stages) for f in self.layout.fields])

    def make_plan(self, terms, **rest):
        n = self.unit.channels
        return Plan(n, n, self.layout, terms, rope=self.unit.rope, **rest)
