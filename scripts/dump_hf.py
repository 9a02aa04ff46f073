#!/usr/bin/env python3
"""Writes a vqkv trace from any Hugging Face transformers model, so that models vqkv doesn't run can be swept.

    scripts/dump_hf.py --model meta-llama/Llama-3.2-1B --text a.txt b.txt -o t.trace.h5
    scripts/dump_hf.py --model ./checkpoint --text a.txt --context 4096 --max-tokens 65536 --dtype bf16 -o t.trace.h5
    scripts/dump_hf.py --model llava-hf/llava-1.5-7b-hf --image a.png b.png --text a.txt b.txt -o t.trace.h5
    scripts/dump_hf.py --model ./checkpoint --text a.txt --gradients next-token -o t.trace.h5

Needs torch, transformers, h5py and numpy; xxhash or the system's libxxhash for the content hash. The file has the
layout of docs/formats.md and is checked with `vqkv-dump verify`. Keys, values and queries are recorded before RoPE,
after bias and after q/k norm where the model has one.

Run with torch 2.8.0 and transformers 4.57.6, and with transformers 5.24.0, on SmolLM2-135M (4.57.6 alone) and on random Llama
(llama3 scaling), Qwen2, Qwen3 and Mistral models: keys, values, queries, moments and received mass differ from those of
`vqkv-dump capture` of the same folder and tokens by less than 3e-6 of their size (relative RMS, f32;
tests/scripts/compare_traces.py), W_O by nothing. The tokens are those of the transformers tokenizer.

With --image a document is one prompt, of an image and a text, as the model's processor makes it: one window, in which the
trace tells image tokens from text (/token_type), as `cache: {coded: image}` asks. The image stands where the text has the
model's image token (`<image>` of LLaVA), or before it. With --gradients the datasets of `vqkv-dump capture --gradients` are
filled, by autograd: squares of the gradients of keys and values, and sums of g g^T; labels are text, never a token of
an image. tests/scripts/check_dump_hf.py holds both against the tools, with the versions that it ran with.

The keys of every window are held against those in the model's own cache, after RoPE, so that a model whose RoPE isn't what
the trace says is refused (Qwen2-VL, which gives each token of an image three positions), as is one that attends both ways
within an image (Gemma 3, PaliGemma).

The writing half (TraceWriter) takes numpy arrays and nothing else: import it to record from another framework.
"""
import argparse
import ctypes
import ctypes.util
import datetime
import inspect
import json
import os
import sys

import h5py
import numpy as np

FORMAT, VERSION = "vqkv-trace", 1
CHUNK_TOKENS, MASS_TOKENS = 1024, 8192
GRADIENTS = ("key", "rotated_key", "value")  # of what: keys before RoPE, the same keys after it, values
TOKEN_TYPES = ["text", "image"]


# ---- Numbers ---------------------------------------------------------------------------------------------------------

def to_bf16_bits(x):
    """f32 -> bf16 bits (uint16), rounding to nearest even; NaN stays NaN."""
    u = np.ascontiguousarray(x, dtype="<f4").view("<u4")
    rounded = ((u.astype(np.uint64) + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")
    return np.where((u & 0x7FFFFFFF) > 0x7F800000, ((u >> 16) | 0x40).astype("<u2"), rounded)


def bf16_type():
    """The self-describing HDF5 type: sign 1, exponent 8 at bit 7 with bias 127, mantissa 7."""
    t = h5py.h5t.IEEE_F32LE.copy()
    t.set_fields(15, 7, 8, 0, 7)
    t.set_size(2)
    t.set_ebias(127)
    return t


FILE_TYPE = {"bf16": bf16_type, "f16": lambda: h5py.h5t.IEEE_F16LE, "f32": lambda: h5py.h5t.IEEE_F32LE,
             "f64": lambda: h5py.h5t.IEEE_F64LE, "i32": lambda: h5py.h5t.STD_I32LE, "i64": lambda: h5py.h5t.STD_I64LE}
MEMORY = {"bf16": "<u2", "f16": "<f2", "f32": "<f4", "f64": "<f8", "i32": "<i4", "i64": "<i8"}


def stored(x, dtype):
    """Values as they lie in the file."""
    if dtype == "bf16":
        return to_bf16_bits(x)
    return np.ascontiguousarray(x, dtype=MEMORY[dtype])


def all_finite(raw, dtype):
    if dtype == "bf16":
        return not np.any((raw & 0x7F80) == 0x7F80)
    return bool(np.all(np.isfinite(raw)))


# ---- XXH3-128 --------------------------------------------------------------------------------------------------------

class _SystemXxh3:
    """Streaming XXH3-128 through libxxhash, where the Python module is absent."""
    _lib = None

    def __init__(self):
        if _SystemXxh3._lib is None:
            name = ctypes.util.find_library("xxhash")
            if not name:
                raise ImportError
            lib = ctypes.CDLL(name)

            class Digest(ctypes.Structure):
                _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]
            lib.XXH3_createState.restype = ctypes.c_void_p
            lib.XXH3_freeState.argtypes = [ctypes.c_void_p]
            lib.XXH3_128bits_reset.argtypes = [ctypes.c_void_p]
            lib.XXH3_128bits_update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
            lib.XXH3_128bits_digest.argtypes = [ctypes.c_void_p]
            lib.XXH3_128bits_digest.restype = Digest
            _SystemXxh3._lib = lib
        self._state = self._lib.XXH3_createState()
        self._lib.XXH3_128bits_reset(self._state)

    def __del__(self):
        if getattr(self, "_state", None):
            self._lib.XXH3_freeState(self._state)

    def update(self, data):
        data = bytes(data)
        self._lib.XXH3_128bits_update(self._state, data, len(data))

    def hexdigest(self):
        d = self._lib.XXH3_128bits_digest(self._state)
        return f"{d.high:016x}{d.low:016x}"


def new_hash():
    try:
        import xxhash
        return xxhash.xxh3_128()
    except ImportError:
        pass
    try:
        return _SystemXxh3()
    except ImportError:
        raise SystemExit("error: the content hash needs the Python module xxhash or the system's libxxhash")


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


# ---- The writing half: numpy arrays in, a trace out -----------------------------------------------------------------

def layout(m, tokens, queries, documents):
    """(name, type, dims, chunk, axes, leading hash dims or None) of every dataset, in the order of the content hash."""
    L, Q, K, D, H, t = m["layers"], m["q_heads"], m["kv_heads"], m["head_dim"], m["hidden"], m["dtype"]
    out = [("layer", "i32", (L,), None, ("layer",), 0)]
    for name, n in (("kv_head", K), ("q_head", Q), ("channel", D), ("channel_b", D), ("pair", D // 2), ("token", tokens)):
        out.append((name, "i32", (n,), None, (name,), None))
    out.append(("query_token", "i32", (queries,), None, ("query_token",), 0))
    out.append(("document", "i32", (documents,), None, ("document",), None))
    if H > 0:
        out.append(("hidden", "i32", (H,), None, ("hidden",), None))
        out.append(("attention_channel", "i32", (Q * D,), None, ("attention_channel",), None))
    for name in ("token_id", "position", "doc", "window") + (("token_type",) if m.get("token_types") else ()):
        out.append((name, "i32", (tokens,), None, ("token",), 0))
    out.append(("moment_count", "i64", (documents,), None, ("document",), 0))
    out.append(("query_moment", "f64", (documents, L, K, D, D), None, ("document", "layer", "kv_head", "channel", "channel_b"), 0))
    out.append(("query_pair_moment", "f64", (documents, L, K, D // 2), None, ("document", "layer", "kv_head", "pair"), 0))
    for name in ("received_mass", "received_mass2"):
        out.append((name, "f32", (L, K, tokens), (1, 1, MASS_TOKENS), ("layer", "kv_head", "token"), 2))
    if H > 0:
        out.append(("output_weight", t, (L, H, Q * D), None, ("layer", "hidden", "attention_channel"), 1))
    for name in ("key", "value"):
        out.append((name, t, (L, K, tokens, D), (1, 1, CHUNK_TOKENS, D), ("layer", "kv_head", "token", "channel"), 2))
    out.append(("query", t, (L, Q, queries, D), (1, 1, CHUNK_TOKENS, D), ("layer", "q_head", "query_token", "channel"), 2))
    if m.get("gradients"):
        for of in GRADIENTS:
            out.append((of + "_gradient2", "bf16", (L, K, tokens, D), (1, 1, CHUNK_TOKENS, D), ("layer", "kv_head", "token", "channel"), 2))
        for of in GRADIENTS:
            out.append((of + "_gradient_moment", "f64", (documents, L, K, D, D), None, ("document", "layer", "kv_head", "channel", "channel_b"), 0))
    return out


class TraceWriter:
    """Writes PATH.partial and renames it in finish(); leaves nothing when finish() is not reached.

    model: name, hash, layers, q_heads, kv_heads, head_dim, hidden (0: no W_O), dtype (bf16|f16|f32), score_scale, and
    rope: {head_dim, rotary_dim, theta, scaling, attention_factor, layout: "half", inverse_frequency (rotary_dim/2)}; where
    they are recorded, gradients (next-token|sampled) and token_types (names, the first "text").
    tokens and queries are the exact totals to come.
    """

    def __init__(self, path, model, documents, tokens, queries, provenance=None, keys="pre_rope", layer_index=None):
        self.path, self.partial, self.m, self.keys = path, path + ".partial", dict(model), keys
        self.m.setdefault("facts", {})
        self.documents, self.tokens, self.queries = list(documents), tokens, queries
        self.provenance = provenance or {}
        self.layer_index = list(range(self.m["layers"])) if layer_index is None else list(layer_index)
        self.table = layout(self.m, tokens, queries, len(self.documents))
        self.first_token = self.first_query = self.windows = 0
        self.per_token = {row[0]: np.zeros(tokens, "<i4") for row in self.table if row[4] == ("token",) and row[0] != "token"}
        self.query_token = np.zeros(queries, "<i4")
        D, L, K = self.m["head_dim"], self.m["layers"], self.m["kv_heads"]
        self.moment = np.zeros((len(self.documents), L, K, D, D), "<f8")
        self.pair_moment = np.zeros((len(self.documents), L, K, D // 2), "<f8")
        self.gradient_moment = np.zeros((len(GRADIENTS), len(self.documents), L, K, D, D), "<f8") if self.m.get("gradients") else None
        self.count = np.zeros(len(self.documents), "<i8")
        self.f = h5py.File(self.partial, "w", libver=("v110", "v110"))
        self.f.attrs["format"] = FORMAT
        self.f.attrs["format_version"] = np.int64(VERSION)
        self.f.attrs["complete"] = np.int64(0)
        self.d, self.hashes = {}, {}
        for name, kind, dims, chunk, _, lead in self.table:
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            if chunk:
                plist.set_chunk(tuple(min(c, n) for c, n in zip(chunk, dims)))
            self.d[name] = h5py.h5d.create(self.f.id, name.encode(), FILE_TYPE[kind](), h5py.h5s.create_simple(dims), plist)
            blocks = int(np.prod(dims[:lead])) if lead else 1
            self.hashes[name] = None if lead is None else [new_hash() for _ in range(blocks)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.f:
            self.d.clear()
            self.f.close()
            self.f = None
        if os.path.exists(self.partial):
            os.remove(self.partial)

    def _kind(self, name):
        return next(row[1] for row in self.table if row[0] == name)

    def _write(self, name, start, raw):
        """A box of values that are already as the file stores them: the library converts nothing."""
        space = self.d[name].get_space()
        space.select_hyperslab(tuple(start) + (0,) * (raw.ndim - len(start)), raw.shape)
        self.d[name].write(h5py.h5s.create_simple(raw.shape), space, np.ascontiguousarray(raw), mtype=self.d[name].get_type())

    def _rows(self, name, layer, first, x):
        """x (rows, heads, ...) of one layer."""
        kind = self._kind(name)
        for head in range(x.shape[1]):
            raw = stored(x[:, head], kind)
            if not all_finite(raw, kind):
                raise ValueError(f"{self.path}: /{name} at layer {layer}, head {head} holds a value that {kind} can't: NaN or too large")
            self.hashes[name][layer * x.shape[1] + head].update(raw.tobytes())
            self._write(name, (layer, head, first), raw[None, None])

    def add(self, document, token_id, query_token, key, value, query, query_moment, query_pair_moment, mass, mass2,
            token_type=None, squared_gradient=None, gradient_moment=None):
        """One window, in the order of documents. n tokens, m recorded queries (ascending, relative to the window):
        key, value (L, n, kv_heads, d); query (L, m, q_heads, d) pre-RoPE; query_moment (L, kv_heads, d, d) post-RoPE and
        query_pair_moment (L, kv_heads, d/2), sums over all n positions and the group's heads; mass, mass2
        (L, kv_heads, n), sums of p and p^2 over the recorded queries and the group's heads. With token_types, token_type
        (n), their numbers; with gradients, in the order of GRADIENTS, squared_gradient (3, L, n, kv_heads, d) and
        gradient_moment (3, L, kv_heads, d, d), sums of g g^T over all n positions."""
        n, m = len(token_id), len(query_token)
        if (token_type is None) == ("token_type" in self.per_token) or (squared_gradient is None) != (self.gradient_moment is None):
            raise ValueError(f"{self.path}: token types and gradients are those of every window or of none, as the model's facts say")
        if token_type is not None and not set(token_type) <= set(range(len(self.m["token_types"]))):
            raise ValueError(f"{self.path}: a token type is none of {self.m['token_types']}")
        t, q = slice(self.first_token, self.first_token + n), slice(self.first_query, self.first_query + m)
        self.per_token["token_id"][t] = token_id
        self.per_token["position"][t] = np.arange(n)
        self.per_token["doc"][t] = document
        self.per_token["window"][t] = self.windows
        if token_type is not None:
            self.per_token["token_type"][t] = token_type
        self.query_token[q] = np.asarray(query_token) + self.first_token
        for layer in range(self.m["layers"]):
            self._rows("key", layer, self.first_token, np.asarray(key[layer], "<f4"))
            self._rows("value", layer, self.first_token, np.asarray(value[layer], "<f4"))
            self._rows("query", layer, self.first_query, np.asarray(query[layer], "<f4"))
            self._rows("received_mass", layer, self.first_token, np.asarray(mass[layer], "<f4").T)
            self._rows("received_mass2", layer, self.first_token, np.asarray(mass2[layer], "<f4").T)
            for i in range(len(GRADIENTS) if squared_gradient is not None else 0):
                self._rows(GRADIENTS[i] + "_gradient2", layer, self.first_token, np.asarray(squared_gradient[i][layer], "<f4"))
        self.moment[document] += query_moment
        self.pair_moment[document] += query_pair_moment
        if gradient_moment is not None:
            self.gradient_moment[:, document] += gradient_moment
        self.count[document] += n * (self.m["q_heads"] // self.m["kv_heads"])
        self.first_token += n
        self.first_query += m
        self.windows += 1

    def output_weight(self, layer, w):
        """W_O of a layer, (hidden, q_heads * d)."""
        raw = stored(w, self.m["dtype"])
        if not all_finite(raw, self.m["dtype"]):
            raise ValueError(f"{self.path}: W_O of layer {layer} holds a value that is not finite")
        self.hashes["output_weight"][layer].update(raw.tobytes())
        self._write("output_weight", (layer, 0, 0), raw[None])

    def finish(self):
        """Returns the content hash."""
        if self.first_token != self.tokens or self.first_query != self.queries:
            raise ValueError(f"{self.path}: {self.tokens} tokens and {self.queries} queries announced, "
                             f"{self.first_token} and {self.first_query} written")
        whole = {"layer": np.asarray(self.layer_index, "<i4"), "query_token": self.query_token, "moment_count": self.count,
                 "query_moment": self.moment, "query_pair_moment": self.pair_moment, **self.per_token}
        for i in range(len(GRADIENTS) if self.gradient_moment is not None else 0):
            whole[GRADIENTS[i] + "_gradient_moment"] = self.gradient_moment[i]
        for name, kind, dims, chunk, axes, lead in self.table:
            if name in whole or lead is None:
                raw = np.ascontiguousarray(whole.get(name, np.arange(dims[0])), MEMORY[kind])
                self._write(name, (0,) * len(dims), raw)
                if lead is not None:
                    self.hashes[name][0].update(raw.tobytes())
        for name, kind, dims, chunk, axes, lead in self.table:
            if axes == (name,):
                self.f[name].make_scale(name)
        for name, kind, dims, chunk, axes, lead in self.table:
            if axes != (name,):
                for i, axis in enumerate(axes):
                    self.f[name].dims[i].attach_scale(self.f[axis])
                    self.f[name].dims[i].label = axis
        keys = ("name", "hash", "layers", "q_heads", "kv_heads", "head_dim", "hidden", "dtype", "score_scale", "rope", "facts")
        model_json = canonical({k: self.m[k] for k in (*keys, *(k for k in ("gradients", "token_types") if self.m.get(k)))})
        total = new_hash()
        total.update(f"{FORMAT} {VERSION}\nkeys={self.keys}\nmodel={model_json}\n".encode())
        for name, kind, dims, chunk, axes, lead in self.table:
            if lead is not None:
                text = f"{name} {kind} {'x'.join(map(str, dims))}\n" + "".join(h.hexdigest() + "\n" for h in self.hashes[name])
                total.update(text.encode())
        self.f.attrs["keys"] = self.keys
        self.f.attrs["model_json"] = model_json
        self.f.attrs["provenance_json"] = canonical(self.provenance)
        self.f.attrs["documents_json"] = canonical(self.documents)
        self.f.attrs["content_xxh3"] = total.hexdigest()
        self.f.attrs["complete"] = np.int64(1)  # last
        self.d.clear()
        self.f.close()
        self.f = None
        with open(self.partial, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(self.partial, self.path)
        return total.hexdigest()


def rope_rotate(x, position, rope):
    """x (n, heads, d) turned as the model does: channels p and p + rotary_dim/2 by position * inverse_frequency[p]."""
    half = rope["rotary_dim"] // 2
    angle = np.asarray(position, "f8")[:, None] * np.asarray(rope["inverse_frequency"], "f8")[None]
    cos = (np.cos(angle) * rope["attention_factor"])[:, None]
    sin = (np.sin(angle) * rope["attention_factor"])[:, None]
    out = np.array(x, "f8")
    a, b = out[..., :half].copy(), out[..., half:2 * half].copy()
    out[..., :half] = a * cos - b * sin
    out[..., half:2 * half] = a * sin + b * cos
    return out


def query_sums(q, k, query_token, rope, score_scale, kv_heads):
    """Of one layer and window: query_moment (kv_heads, d, d), query_pair_moment (kv_heads, d/2), mass and mass2
    (kv_heads, n), from q (n, q_heads, d) and k (n, kv_heads, d) before RoPE."""
    n, heads, d = q.shape
    group, half = heads // kv_heads, rope["rotary_dim"] // 2
    position = np.arange(n)
    turned_q, turned_k = rope_rotate(q, position, rope), rope_rotate(k, position, rope)
    square = np.asarray(q, "f8") ** 2
    pairs = np.concatenate([square[..., :half] + square[..., half:2 * half],
                            square[..., 2 * half::2] + square[..., 2 * half + 1::2]], axis=-1)
    moment, pair = np.zeros((kv_heads, d, d)), np.zeros((kv_heads, d // 2))
    mass, mass2 = np.zeros((kv_heads, n)), np.zeros((kv_heads, n))
    query_token = np.asarray(query_token)
    for h in range(kv_heads):
        pair[h] = pairs[:, h * group:(h + 1) * group].sum((0, 1))
        for g in range(h * group, (h + 1) * group):
            moment[h] += turned_q[:, g].T @ turned_q[:, g]
            for first in range(0, len(query_token), 256):
                at = query_token[first:first + 256]
                score = turned_q[at, g] @ turned_k[:, h].T * score_scale
                score[position[None] > at[:, None]] = -np.inf
                p = np.exp(score - score.max(1, keepdims=True))
                p /= p.sum(1, keepdims=True)
                mass[h] += p.sum(0)
                mass2[h] += (p * p).sum(0)
    return moment, pair, mass, mass2


def rotated_gradient(gradient, rope):
    """(n, heads, d) with respect to keys after RoPE, from those before it: k' = f R k in the channels that rotate, so
    g = f R^T g'."""
    out = rope_rotate(gradient, np.arange(len(gradient)), rope)
    out[..., :rope["rotary_dim"]] /= rope["attention_factor"] ** 2
    return out


# ---- The recording half: a transformers model ------------------------------------------------------------------------

def attention_modules(model):
    """The self-attention modules in layer order: whatever has separate q, k, v and output projections."""
    found = [(name, m) for name, m in model.named_modules() if all(hasattr(m, p) for p in ("q_proj", "k_proj", "v_proj", "o_proj"))]
    if not found:
        raise SystemExit("error: no attention module with q_proj, k_proj, v_proj and o_proj was found: this model fuses them, "
                         "and the script can't tell where K and V lie; use TraceWriter from your own hooks")
    return [m for _, m in found]


def rope_facts(model, config, head_dim):
    """What the model itself computes with: the inverse frequencies are read from its rotary module."""
    rotary = [m for m in model.modules() if hasattr(m, "inv_freq")]
    if not rotary:
        raise SystemExit("error: no rotary embedding was found (no module with inv_freq): only RoPE models can be recorded")
    inverse = rotary[0].inv_freq.detach().float().cpu().numpy().astype("f8").tolist()
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "none")) or "none"
    if kind in ("dynamic", "longrope"):
        raise SystemExit(f"error: RoPE scaling '{kind}' depends on the length of the text; a trace holds one set of frequencies")
    theta = getattr(config, "rope_theta", None) or scaling.get("rope_theta", 10000.0)
    return {"head_dim": head_dim, "rotary_dim": 2 * len(inverse), "theta": float(theta),
            "scaling": "none" if kind in ("default", "none") else kind, "attention_factor": float(getattr(rotary[0], "attention_scaling", 1.0)),
            "layout": "half", "inverse_frequency": inverse}


def check_attention(config, modules, context):
    """Refuses what received mass and a replay would get wrong: anything but plain causal softmax over the window."""
    types, window = set(getattr(config, "layer_types", None) or []), getattr(config, "sliding_window", None)
    other = types - {"full_attention", "sliding_attention"}
    if other:
        raise SystemExit(f"error: layers of type {', '.join(sorted(other))} can't be recorded; only causal softmax attention can")
    # Mistral has no layer_types and slides wherever there is a window; Qwen2 says use_sliding_window.
    slides = "sliding_attention" in types if types else window is not None and getattr(config, "use_sliding_window", True)
    if slides and (window is None or context > window):
        raise SystemExit(f"error: the model attends to the last {window} tokens in some layers; --context {window} or less can be recorded")
    if getattr(config, "attn_logit_softcapping", None) or any(hasattr(m, "sinks") for m in modules):
        raise SystemExit("error: the model caps its attention logits or has attention sinks of its own; received mass would be wrong")


def cached_keys(cache, layer):
    """(n, kv_heads, d) of a transformers cache of one sequence: keys after RoPE."""
    keys = cache.layers[layer].keys if hasattr(cache, "layers") else cache[layer][0]
    return keys[0].transpose(0, 1).detach().float().cpu().numpy()


def check_keys(key, cached, rope, layer):
    """key (n, kv_heads, d) before RoPE, turned as the trace says, must be what the model's cache holds (of a layer with a
    sliding window: the last tokens)."""
    turned = rope_rotate(key, np.arange(len(key)), rope)[-len(cached):]
    # bf16 weights round at 2^-9; another layout or other frequencies differ by the size of the keys.
    if turned.shape != cached.shape or np.linalg.norm(turned - cached) > 0.03 * np.linalg.norm(cached):
        raise SystemExit(f"error: layer {layer} turns its keys in another way than pairs (p, p + {rope['rotary_dim'] // 2}) by "
                         "position * inverse_frequency[p]: its RoPE can't be described in a trace")


def language_model(model):
    """The part whose attention is cached: of a multimodal model not its encoder of images."""
    base = model.base_model
    return getattr(base, "language_model", None) or getattr(base, "text_model", None) or base


class Recorder:
    """Hooks that keep each layer's projections of one forward pass, after bias and after q/k norm where there is one, and
    with `gradients` what autograd says of keys and values."""

    def __init__(self, modules, q_heads, kv_heads, head_dim, gradients=False):
        self.rows, self.outputs = [{} for _ in modules], [{} for _ in modules]
        self.gradients, self.kv_heads, self.head_dim = gradients, kv_heads, head_dim
        self.handles = []
        heads = {"q": q_heads, "k": kv_heads, "v": kv_heads}
        for layer, module in enumerate(modules):
            for role in ("q", "k", "v"):
                # q_norm and k_norm act on whole heads after the projection (Qwen3, Gemma 3) and replace what it gave.
                source = getattr(module, f"{role}_norm", None) if role != "v" else None
                for m in (getattr(module, f"{role}_proj"), source):
                    if m is not None:
                        self.handles.append(m.register_forward_hook(self._keep(layer, role, heads[role], head_dim)))

    def _keep(self, layer, role, heads, head_dim):
        def hook(_module, _inputs, output):
            self.rows[layer][role] = self._rows(output, heads, head_dim)
            if self.gradients and role != "q":
                output.retain_grad()
                self.outputs[layer][role] = output
        return hook

    @staticmethod
    def _rows(x, heads, head_dim):
        x = x.detach().float()
        if x.dim() == 4 and x.shape[1] == heads and x.shape[2] != heads:   # (batch, heads, n, d): norm after the transpose
            x = x.transpose(1, 2)
        return x.reshape(-1, heads, head_dim).cpu().numpy()

    def gradient_rows(self, rope):
        """(3, layers, n, kv_heads, d) in the order of GRADIENTS, after the backward pass of a loss."""
        key, value = ([self._rows(x[role].grad, self.kv_heads, self.head_dim) for x in self.outputs] for role in ("k", "v"))
        return np.stack([np.stack(key), np.stack([rotated_gradient(g, rope) for g in key]), np.stack(value)])

    def close(self):
        for h in self.handles:
            h.remove()


def plan_windows(documents, context, max_tokens, stride, tail, bos):
    """(document, token ids, recorded positions) of each window: consecutive, each behind BOS where the model adds one."""
    fresh = context - (bos is not None)
    windows = []
    for d, ids in enumerate(documents):
        ids = ids[:max_tokens] if max_tokens else ids
        for at in range(0, len(ids), fresh):
            w = ([bos] if bos is not None else []) + list(ids[at:at + fresh])
            windows.append((d, w, recorded(len(w), stride, tail)))
    return windows


def recorded(n, stride, tail):
    return [t for t in range(n) if t % stride == 0 or t >= n - tail]


def read_text(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def text_documents(a, tokenizer):
    """Token ids of each document, and what stands before each window of them, or None."""
    documents, bos = [], None
    if a.token_ids:
        documents = [json.loads(read_text(path)) for path in a.token_ids]
    else:
        documents = [tokenizer(read_text(path), add_special_tokens=False)["input_ids"] for path in a.text]
        if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
            bos = tokenizer.bos_token_id
    for path, ids in zip(a.token_ids or a.text, documents):
        if not ids:
            raise SystemExit(f"error: {path}: holds no token")
    return documents, bos


def check_image_model(model):
    """The token that stands for a part of an image; refuses models whose images a trace can't say."""
    config, arguments = model.config, inspect.signature(model.forward).parameters
    token = next((getattr(config, k) for k in ("image_token_id", "image_token_index") if isinstance(getattr(config, k, None), int)), None)
    if token is None or "pixel_values" not in arguments:
        raise SystemExit(f"error: {config.model_type} has no image_token_id in its configuration, or takes no pixels: --image is for models that do")
    if "token_type_ids" in arguments:  # what their masks are made of
        raise SystemExit(f"error: {config.model_type} attends both ways within an image; only causal softmax attention can be recorded")
    return token


def image_prompts(a, processor, token):
    """What the model's processor makes of each image and its text: its inputs, the token ids among them."""
    from PIL import Image
    if len(a.image) != len(a.text):
        raise SystemExit(f"error: {len(a.image)} images and {len(a.text)} texts; each prompt is of one of each")
    prompts = []
    for image, path in zip(a.image, a.text):
        text, mark = read_text(path), getattr(processor, "image_token", None)
        if not isinstance(mark, str):
            raise SystemExit(f"error: {type(processor).__name__} does not name its image_token")
        inputs = processor(images=Image.open(image).convert("RGB"), text=text if mark in text else mark + text, return_tensors="pt")
        n, images = inputs["input_ids"].shape[1], int((inputs["input_ids"] == token).sum())
        if images == 0:
            raise SystemExit(f"error: {path}: its prompt has no token {token}, which stands for images in {type(processor).__name__}")
        if n > a.context:
            raise SystemExit(f"error: {path}: its prompt has {n} tokens, {images} of them of the image; an image can't be cut: --context {n}")
        prompts.append(inputs)
    return prompts


def next_token_loss(logits, ids, skip):
    """Sum of -log p over the positions before the last whose next token is not `skip`, in nats."""
    import torch
    labels = ids[1:].clone()
    labels[labels == (-1 if skip is None else skip)] = -100
    return torch.nn.functional.cross_entropy(logits[:-1].float(), labels, ignore_index=-100, reduction="sum")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a folder or a name that transformers knows")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", help="UTF-8 files, one document a file")
    source.add_argument("--token-ids", nargs="+", help="lists of numbers as JSON in place of texts, taken as they are")
    p.add_argument("--image", nargs="+", help="pictures, one a text: each document is one prompt of both")
    p.add_argument("--gradients", choices=("next-token",), help="also record gradients of the text's own next tokens")
    p.add_argument("--context", type=int, default=2048)
    p.add_argument("--max-tokens", type=int, default=0, help="of each document; 0: all")
    p.add_argument("--query-stride", type=int, default=16)
    p.add_argument("--query-tail", type=int, default=64)
    p.add_argument("--dtype", choices=("bf16", "f16", "f32"), default="bf16", help="stored type")
    p.add_argument("--torch-dtype", default="float32", help="of the weights and the computation")
    p.add_argument("--device", default="cpu")
    p.add_argument("--no-output-weight", action="store_true")
    p.add_argument("-o", "--out", required=True)
    a = p.parse_args()
    if a.image and (a.token_ids or a.max_tokens):
        p.error("--image goes with --text, and cuts none")
    return a


def main():
    a = arguments()
    new_hash()  # before the minutes, not after them

    import torch
    import transformers
    # The argument was renamed in 4.56.
    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    precision = {"dtype" if version >= (4, 56) else "torch_dtype": getattr(torch, a.torch_dtype)}
    kind = transformers.AutoModelForImageTextToText if a.image else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(a.model, **precision).to(a.device).eval().requires_grad_(False)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    language = language_model(model)
    modules = attention_modules(language)
    check_attention(config, modules, a.context)
    q_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or q_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // q_heads
    scale = float(getattr(modules[0], "scaling", head_dim ** -0.5))

    bos = image_token = None
    if a.image:
        image_token = check_image_model(model)
        inputs = image_prompts(a, transformers.AutoProcessor.from_pretrained(a.model), image_token)
        windows = [(d, x["input_ids"][0].tolist(), recorded(x["input_ids"].shape[1], a.query_stride, a.query_tail)) for d, x in enumerate(inputs)]
    else:
        documents, bos = text_documents(a, None if a.token_ids else transformers.AutoTokenizer.from_pretrained(a.model))
        windows = plan_windows(documents, a.context, a.max_tokens, a.query_stride, a.query_tail, bos)
        inputs = [{"input_ids": torch.tensor([ids])} for _, ids, _ in windows]

    import hashlib
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    facts = {"name": os.path.basename(a.model.rstrip("/")), "hash": digest.hexdigest(), "layers": len(modules), "q_heads": q_heads,
             "kv_heads": kv_heads, "head_dim": head_dim, "hidden": 0 if a.no_output_weight else modules[0].o_proj.weight.shape[0],
             "dtype": a.dtype, "score_scale": scale, "rope": rope_facts(language, config, head_dim),
             "facts": {"architecture": model.config.model_type, "source": "transformers"}}
    if a.gradients:
        facts["gradients"] = a.gradients
        # With frozen weights the graph begins where the tokens' rows do.
        model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, rows: rows.requires_grad_(True))
    if a.image:
        facts["token_types"] = TOKEN_TYPES
    provenance = {"tool": "dump_hf.py", "command": " ".join(sys.argv), "torch": torch.__version__, "transformers": transformers.__version__,
                  "torch_dtype": a.torch_dtype, "bos": bos is not None, "context": a.context,
                  "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")}
    tokens, queries = sum(len(w) for _, w, _ in windows), sum(len(q) for _, _, q in windows)
    recorder = Recorder(modules, q_heads, kv_heads, head_dim, bool(a.gradients))
    names = [os.path.basename(path) for path in a.text or a.token_ids]
    with TraceWriter(a.out, facts, names, tokens, queries, provenance) as out, torch.set_grad_enabled(bool(a.gradients)):
        for i, (document, ids, at) in enumerate(windows):
            moved = {k: v.to(a.device) for k, v in inputs[i].items()}
            # Without the head: its logits would be the largest array by far.
            result = (model if a.gradients else model.base_model)(**moved, use_cache=True)
            extra = {}
            if a.gradients:
                next_token_loss(result.logits[0], moved["input_ids"][0], image_token).backward()
                g = recorder.gradient_rows(facts["rope"])
                extra = {"squared_gradient": g ** 2, "gradient_moment": np.einsum("olnhi,olnhj->olhij", g, g, dtype="f8")}
            if a.image:
                extra["token_type"] = [int(t == image_token) for t in ids]
            for layer, r in enumerate(recorder.rows):
                check_keys(r["k"], cached_keys(result.past_key_values, layer), facts["rope"], layer)
            sums = [query_sums(r["q"], r["k"], at, facts["rope"], scale, kv_heads) for r in recorder.rows]
            out.add(document, ids, at, [r["k"] for r in recorder.rows], [r["v"] for r in recorder.rows], [r["q"][at] for r in recorder.rows],
                    np.stack([s[0] for s in sums]), np.stack([s[1] for s in sums]), [s[2] for s in sums], [s[3] for s in sums], **extra)
            print(f"window {i + 1}/{len(windows)}", file=sys.stderr)
        if not a.no_output_weight:
            for layer, m in enumerate(modules):
                out.output_weight(layer, m.o_proj.weight.detach().float().cpu().numpy())
        out.finish()
    recorder.close()
    print(a.out)


if __name__ == "__main__":
    main()
