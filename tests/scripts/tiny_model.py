"""The tiny Qwen3 of tests/golden/tiny in NumPy, one layer's attention at a time over whatever cache it is given: what a
framework does with scripts/vqkv.py, without the framework."""
import json
import struct

import numpy as np


def tensors(path):
    """name -> array of a safetensors file of f32."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    out = {}
    for name, t in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            first, end = (8 + size + o for o in t["data_offsets"])
            assert t["dtype"] == "F32"
            out[name] = np.frombuffer(data[first:end], "<f4").reshape(t["shape"])
    return out


def norm(x, gain, eps):
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + eps).astype(np.float32) * gain


class ExactCache:
    """Keys and values as float16 holds them."""

    def __init__(self):
        self.keys = self.values = None

    def append(self, keys, values):
        keys, values = (x.astype(np.float16).astype(np.float32) for x in (keys, values))
        self.keys = keys if self.keys is None else np.concatenate([self.keys, keys])
        self.values = values if self.values is None else np.concatenate([self.values, values])
        return self.keys, self.values


class TinyModel:
    def __init__(self, folder):
        self.c, self.w = json.loads((folder / "config.json").read_text()), tensors(folder / "model.safetensors")

    def turn(self, x, first):
        half = x.shape[-1] // 2
        angle = np.arange(first, first + len(x))[:, None] * self.c["rope_theta"] ** (-np.arange(half) / half)
        c, s = np.cos(angle).astype(np.float32)[:, None], np.sin(angle).astype(np.float32)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * c - b * s, a * s + b * c], axis=-1)

    def logits(self, ids, first, caches):
        """Of new tokens at positions first, first + 1, ...: (tokens, vocabulary)."""
        c, w, n, d = self.c, self.w, len(ids), self.c["head_dim"]
        group, eps = c["num_attention_heads"] // c["num_key_value_heads"], c["rms_norm_eps"]
        x = w["model.embed_tokens.weight"][ids]
        for layer, cache in enumerate(caches):
            p = f"model.layers.{layer}."
            h = norm(x, w[p + "input_layernorm.weight"], eps)
            q, k, v = ((h @ w[f"{p}self_attn.{r}_proj.weight"].T).reshape(n, -1, d) for r in "qkv")
            q, k = (self.turn(norm(y, w[f"{p}self_attn.{r}_norm.weight"], eps), first) for r, y in (("q", q), ("k", k)))
            keys, values = cache.append(k, v)
            scores = np.einsum("qhd,khd->hqk", q, keys.repeat(group, axis=1)) / np.sqrt(np.float32(d))
            scores = np.where(np.arange(len(keys)) <= np.arange(first, first + n)[:, None], scores, -np.inf)
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
            out = np.einsum("hqk,khd->qhd", scores, values.repeat(group, axis=1)).reshape(n, -1)
            x = x + out @ w[p + "self_attn.o_proj.weight"].T
            h = norm(x, w[p + "post_attention_layernorm.weight"], eps)
            gate, up = (h @ w[f"{p}mlp.{m}_proj.weight"].T for m in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
        return norm(x, w["model.norm.weight"], eps) @ w["model.embed_tokens.weight"].T


def divergence(exact, other):
    """KL(exact || other) of every row of logits, nats."""
    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    p, q = log_softmax(exact), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(axis=1)
