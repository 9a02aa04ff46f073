"""scripts/dump_hf.py: its writing half with arrays, its recording half with a stand-in for a torch model; the tools then
open what it wrote."""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy as np
except ImportError as e:
    print(f"not run: {e} (Debian: python3-h5py python3-numpy)")
    sys.exit(1 if os.environ.get("VQKV_NO_SKIP") else 77)

root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
spec = importlib.util.spec_from_file_location("dump_hf", os.path.join(root, "scripts", "dump_hf.py"))
dump_hf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dump_hf)
vqkv_dump = sys.argv[2] if len(sys.argv) > 2 else None

L, Q, K, D, HIDDEN = 2, 4, 2, 8, 12
ROPE = {"head_dim": D, "rotary_dim": D, "theta": 10000.0, "scaling": "none", "attention_factor": 1.0, "layout": "half",
        "inverse_frequency": [10000.0 ** (-2 * p / D) for p in range(D // 2)]}


# ---- A stand-in for torch: enough of a tensor and of a module for the hooks ----
class Tensor:
    def __init__(self, a):
        self.a = np.asarray(a, "f4")
        self.shape = self.a.shape

    def detach(self): return self
    def float(self): return self
    def cpu(self): return self
    def numpy(self): return self.a
    def dim(self): return self.a.ndim
    def reshape(self, *s): return Tensor(self.a.reshape(*s))
    def transpose(self, i, j): return Tensor(self.a.swapaxes(i, j))


class Handle:
    def __init__(self, hooks, hook): self.hooks, self.hook = hooks, hook
    def remove(self): self.hooks.remove(self.hook)


class Module:
    def __init__(self, f): self.f, self.hooks = f, []

    def register_forward_hook(self, hook):
        self.hooks.append(hook)
        return Handle(self.hooks, hook)

    def __call__(self, x):
        y = self.f(x)
        for h in list(self.hooks):
            h(self, (x,), y)
        return y


class Attention:
    scaling = D ** -0.5

    def __init__(self, rng, norm):
        def linear(heads):
            w, b = rng.normal(size=(HIDDEN, heads * D)), 20 * rng.normal(size=heads * D)  # keys have large means
            return Module(lambda x: Tensor(x.a @ w + b))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = linear(Q), linear(K), linear(K), Module(lambda x: x)
        self.o_proj.weight = Tensor(rng.normal(size=(HIDDEN, Q * D)))
        if norm:  # as Qwen3: on (batch, n, heads, d), after the projection
            unit = lambda x: Tensor(x.a / np.sqrt((x.a ** 2).mean(-1, keepdims=True)))
            self.q_norm, self.k_norm = Module(unit), Module(unit)


class Model:
    def __init__(self, seed, norm):
        rng = np.random.default_rng(seed)
        self.norm, self.rng, self.layers = norm, np.random.default_rng(seed + 1), [Attention(rng, norm) for _ in range(L)]
        self.embedding = rng.normal(size=(50, HIDDEN))

    def named_modules(self):
        return [("model", self)] + [(f"layers.{i}.self_attn", m) for i, m in enumerate(self.layers)]

    def __call__(self, ids):
        x = Tensor(self.embedding[np.asarray(ids)][None])
        truth = []
        for m in self.layers:
            q, k, v = m.q_proj(x).reshape(1, -1, Q, D), m.k_proj(x).reshape(1, -1, K, D), m.v_proj(x).reshape(1, -1, K, D)
            if self.norm:
                q, k = m.q_norm(q), m.k_norm(k)
            truth.append((q.a[0], k.a[0], v.a[0]))
        return truth


def bf16(x):
    return (dump_hf.to_bf16_bits(x).astype("<u4") << 16).view("<f4")


# Every finite bf16 pattern survives, halves go to even.
every = (np.arange(65536, dtype="<u4") << 16).view("<f4")
finite = np.isfinite(every)
assert np.array_equal(dump_hf.to_bf16_bits(every)[finite], np.arange(65536)[finite])
assert list(dump_hf.to_bf16_bits(np.array([0x3F808000, 0x3F818000, 0x3F808001], "<u4").view("<f4"))) == [0x3F80, 0x3F82, 0x3F81]
# Every finite float16 becomes the nearest bf16, of two as near the one whose last bit is 0; distances in float64 are exact.
half = np.arange(65536, dtype="<u2").view("<f2").astype("<f4")
half = half[np.isfinite(half)]
bits = dump_hf.to_bf16_bits(half)
for step in (-1, 1):
    other = (bits + np.array(step, "i4")).astype("<u2").astype("<u4") << 16
    near, far = (np.abs(b.view("<f4").astype("f8") - half) for b in (bits.astype("<u4") << 16, other))
    assert np.all((near < far) | np.isnan(far) | ((near == far) & (bits % 2 == 0)))
# XXH3-128 of nothing, in canonical order.
assert dump_hf.new_hash().hexdigest() == "99aa06d3014798d86001c324468d497f"

# Keys are held against the model's cache; what a trace can't say is refused.
def refuses(f, *args):
    try:
        f(*args)
    except SystemExit:
        return True
    return False


class Facts:
    def __init__(self, **facts): self.__dict__.update(facts)


keys = np.random.default_rng(5).normal(size=(30, K, D)).astype("f4")
turned = dump_hf.rope_rotate(keys, np.arange(30), ROPE)
angle = np.arange(30)[:, None] * np.asarray(ROPE["inverse_frequency"])[None]
adjacent = (keys.reshape(30, K, D // 2, 2).astype("f8") @ [[1], [1j]])[..., 0] * np.exp(1j * angle)[:, None]
adjacent = np.stack([adjacent.real, adjacent.imag], axis=-1).reshape(30, K, D)   # pairs (2p, 2p + 1)
dump_hf.check_keys(keys, dump_hf.to_bf16_bits(turned).astype("<u4").__lshift__(16).view("<f4"), ROPE, 0)
dump_hf.check_keys(keys, turned[-7:], ROPE, 0)   # of a sliding window
assert refuses(dump_hf.check_keys, keys, adjacent, ROPE, 0)
assert refuses(dump_hf.check_keys, keys, keys, ROPE, 0)
assert refuses(dump_hf.check_keys, keys, turned, {**ROPE, "inverse_frequency": [f * 0.9 for f in ROPE["inverse_frequency"]]}, 0)
# YaRN is one set of frequencies and a factor on cos and sin: described, and part of the comparison.
yarn_keys = {**ROPE, "attention_factor": 1.25}
dump_hf.check_keys(keys, 1.25 * turned, yarn_keys, 0)
assert refuses(dump_hf.check_keys, keys, 1.25 * turned, ROPE, 0)
rotary = Facts(inv_freq=Tensor(ROPE["inverse_frequency"]), attention_scaling=1.25)
described = dump_hf.rope_facts(Facts(modules=lambda: [rotary]), Facts(rope_scaling={"rope_type": "yarn"}, rope_theta=500.0), D)
assert (described["scaling"], described["attention_factor"], described["theta"]) == ("yarn", 1.25, 500.0)
for kind in ("dynamic", "longrope"):
    assert refuses(dump_hf.rope_facts, Facts(modules=lambda: [rotary]), Facts(rope_scaling={"type": kind}), D)
# Gradients behind RoPE, from those before it: of a linear loss they are its weights, whatever the factor and however many
# channels rotate.
for rope in (yarn_keys, {**yarn_keys, "rotary_dim": 4, "inverse_frequency": [1.0, 0.01]}):
    weights = np.random.default_rng(6).normal(size=(30, K, D))
    before = np.zeros_like(weights)
    for c in range(D):
        unit = np.zeros_like(weights)
        unit[..., c] = 1
        before[..., c] = (dump_hf.rope_rotate(unit, np.arange(30), rope) * weights).sum(-1)
    assert np.allclose(dump_hf.rotated_gradient(before, rope), weights)

plain, sinks = [Facts()], [Facts(sinks=1)]
for config, context, modules, bad in (
        (Facts(), 4096, plain, False), (Facts(layer_types=["full_attention"] * 2, sliding_window=64), 4096, plain, False),
        (Facts(layer_types=["sliding_attention", "full_attention"], sliding_window=64), 65, plain, True),
        (Facts(layer_types=["sliding_attention", "full_attention"], sliding_window=64), 64, plain, False),
        (Facts(layer_types=["chunked_attention"]), 64, plain, True), (Facts(sliding_window=64), 65, plain, True),
        (Facts(sliding_window=64, use_sliding_window=False), 65, plain, False), (Facts(sliding_window=None), 65, plain, False),
        (Facts(attn_logit_softcapping=50.0), 64, plain, True), (Facts(), 64, sinks, True)):
    assert refuses(dump_hf.check_attention, config, modules, context) == bad, vars(config)

rng = np.random.default_rng(0)
texts = [rng.integers(0, 50, 45).tolist(), rng.integers(0, 50, 9).tolist()]
ranks = set()
with tempfile.TemporaryDirectory() as folder:
    for dtype in ("bf16", "f16", "f32"):
        for norm in (False, True):
            model, path = Model(3, norm), os.path.join(folder, f"{dtype}{norm}.trace.h5")
            modules = dump_hf.attention_modules(model)
            assert len(modules) == L
            windows = dump_hf.plan_windows(texts, 20, 0, 8, 3, 7)
            assert [len(w) for _, w, _ in windows] == [20, 20, 8, 10] and all(w[0] == 7 for _, w, _ in windows)
            assert windows[0][2] == [0, 8, 16, 17, 18, 19]
            facts = {"name": "fake", "hash": "0" * 64, "layers": L, "q_heads": Q, "kv_heads": K, "head_dim": D, "hidden": HIDDEN,
                     "dtype": dtype, "score_scale": D ** -0.5, "rope": ROPE, "facts": {"architecture": "fake"}}
            recorder = dump_hf.Recorder(modules, Q, K, D)
            kept = []
            with dump_hf.TraceWriter(path, facts, ["a", "b"], sum(len(w) for _, w, _ in windows), sum(len(q) for _, _, q in windows),
                                     {"tool": "test"}) as out:
                for document, ids, at in windows:
                    truth = model(ids)
                    for layer, (q, k, v) in enumerate(truth):
                        r = recorder.rows[layer]
                        assert np.array_equal(r["q"], q) and np.array_equal(r["k"], k) and np.array_equal(r["v"], v)
                    sums = [dump_hf.query_sums(q, k, at, ROPE, D ** -0.5, K) for q, k, _ in truth]
                    kept.append((document, truth, at, sums))
                    out.add(document, ids, at, [k for _, k, _ in truth], [v for _, _, v in truth], [q[at] for q, _, _ in truth],
                            np.stack([s[0] for s in sums]), np.stack([s[1] for s in sums]), [s[2] for s in sums], [s[3] for s in sums])
                for layer, m in enumerate(modules):
                    out.output_weight(layer, m.o_proj.weight.numpy())
                digest = out.finish()
            recorder.close()
            assert not modules[0].q_proj.hooks and os.listdir(folder).count(os.path.basename(path) + ".partial") == 0
            # Sums: each recorded query's mass is one; a moment's trace is the sum over pairs.
            for _, _, at, sums in kept:
                for moment, pair, mass, mass2 in sums:
                    assert np.allclose(mass.sum(1), len(at) * Q // K) and np.all(mass2 <= mass + 1e-12)
                    assert np.allclose(np.trace(moment, axis1=1, axis2=2), pair.sum(1))
            with h5py.File(path) as f:
                want = np.concatenate([t[1][1] for _, t, _, _ in kept])
                want = bf16(want) if dtype == "bf16" else want.astype("f2" if dtype == "f16" else "f4")
                assert np.array_equal(f["key"][1].transpose(1, 0, 2), want)
                assert np.allclose(f["query_moment"][0, 1], sum(s[1][0] for d, _, _, s in kept if d == 0))
                assert f.attrs["content_xxh3"] == digest
            if vqkv_dump:
                r = subprocess.run([vqkv_dump, "verify", path, "--json"], capture_output=True, text=True)
                assert r.returncode == 0, r.stderr + r.stdout
                assert json.loads(r.stdout)[0]["content_xxh3"] == digest
                r = subprocess.run([vqkv_dump, "inspect", path, "--json", "-q"], capture_output=True, text=True)
                assert r.returncode == 0, r.stderr
                facts = json.loads(r.stdout)
                assert facts["tokens"] == 58 and facts["documents"][1]["name"] == "b"
                row = next(x for x in facts["heads"] if (x["layer"], x["head"], x["rows"]) == (1, 0, "k pre-RoPE"))
                rows = want[:, 0].astype("f8")
                assert np.isclose(row["norm"], np.linalg.norm(rows, axis=1).mean(), rtol=1e-6)
                for name, x in (("rank90", rows), ("rank90_centred", rows - rows.mean(0))):
                    energy = np.cumsum(np.linalg.svd(x, compute_uv=False) ** 2)
                    assert row[name] == 1 + np.sum(energy < 0.9 * energy[-1]), (name, row[name])
                ranks.add((row["rank90"], row["rank90_centred"]))
    assert not vqkv_dump or all(plain < centred for plain, centred in ranks), ranks
    # Types of tokens and gradients are recorded where the facts promise them, and then of every window.
    path = os.path.join(folder, "more.trace.h5")
    with_more = {**facts, "layers": L, "q_heads": Q, "kv_heads": K, "head_dim": D, "hidden": 0, "dtype": "f16", "name": "x", "hash": "0",
                 "score_scale": 1.0, "rope": ROPE, "facts": {}, "gradients": "next-token", "token_types": ["text", "image"]}
    rows = lambda n, heads: rng.normal(size=(L, n, heads, D))
    g, types = [], [[0, 1, 1], [1, 0]]
    with dump_hf.TraceWriter(path, with_more, ["a"], 5, 2) as out:
        for t in types:
            n = len(t)
            g.append(1e-4 * rng.normal(size=(3, L, n, K, D)))
            window = (0, list(range(n)), [n - 1], rows(n, K), rows(n, K), rows(1, Q), np.zeros((L, K, D, D)), np.zeros((L, K, D // 2)),
                      np.zeros((L, K, n)), np.zeros((L, K, n)))
            out.add(*window, token_type=t, squared_gradient=g[-1] ** 2, gradient_moment=np.einsum("olnhi,olnhj->olhij", g[-1], g[-1]))
            for wrong in ({"token_type": t}, {"squared_gradient": g[-1] ** 2, "gradient_moment": np.zeros((3, L, K, D, D))},
                          {"token_type": [2] * n, "squared_gradient": g[-1] ** 2, "gradient_moment": np.zeros((3, L, K, D, D))}):
                try:
                    out.add(*window, **wrong)
                    raise AssertionError("a window was taken that lacks what the facts promise")
                except ValueError as e:
                    assert "type" in str(e)
        digest = out.finish()
    with h5py.File(path) as f:
        assert f["token_type"][...].tolist() == [0, 1, 1, 1, 0] and f["token_type"].dims[0].label == "token"
        all_g = np.concatenate(g, axis=2)
        for i, of in enumerate(dump_hf.GRADIENTS):
            assert np.array_equal(f[of + "_gradient2"][...], bf16((all_g[i] ** 2).transpose(0, 2, 1, 3)))
            assert np.allclose(f[of + "_gradient_moment"][0, 1, 1], all_g[i, 1, :, 1].T @ all_g[i, 1, :, 1])
    if vqkv_dump:
        r = subprocess.run([vqkv_dump, "verify", path, "--json"], capture_output=True, text=True)
        assert r.returncode == 0 and json.loads(r.stdout)[0]["content_xxh3"] == digest, r.stderr + r.stdout
        r = subprocess.run([vqkv_dump, "inspect", path, "--json", "-q"], capture_output=True, text=True)
        inspected = json.loads(r.stdout)
        assert inspected["tokens_by_type"] == {"text": 2, "image": 3} and inspected["gradients"] == "next-token"
        row = next(x for x in inspected["heads"] if (x["layer"], x["head"], x["rows"]) == (1, 1, "k post-RoPE"))
        assert np.isclose(row["gradient_rms"], np.sqrt((all_g[1, 1, :, 1] ** 2).mean()), rtol=0.01)
        assert subprocess.run([vqkv_dump, "inspect", path, "-q"], capture_output=True, text=True).stdout.count("3 image, 2 text") == 1

    # NaN and an unfinished writer leave nothing behind.
    path = os.path.join(folder, "bad.trace.h5")
    try:
        with dump_hf.TraceWriter(path, {**facts, "layers": L, "q_heads": Q, "kv_heads": K, "head_dim": D, "hidden": 0, "dtype": "bf16", "rope": ROPE,
                                        "name": "x", "hash": "0", "score_scale": 1.0, "facts": {}}, ["a"], 3, 1) as out:
            bad = np.full((L, 3, K, D), np.nan)
            out.add(0, [1, 2, 3], [0], bad, bad, np.zeros((L, 1, Q, D)), np.zeros((L, K, D, D)), np.zeros((L, K, D // 2)),
                    np.zeros((L, K, 3)), np.zeros((L, K, 3)))
        raise AssertionError("NaN was written")
    except ValueError as e:
        assert "/key at layer 0" in str(e)
    assert not os.path.exists(path) and not os.path.exists(path + ".partial")
print("ok")
