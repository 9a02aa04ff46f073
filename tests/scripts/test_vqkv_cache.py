"""The cache of scripts/vqkv.py against `vqkv-eval replay`: a tiny model in NumPy over it diverges from the exact cache as
replay says, token by token and behind an exact prompt. test_vqkv_cache.py FOLDER, where the tools lie. The same with
transformers: check_hf_cache.py."""
import os
import sys
import tempfile

try:
    import h5py  # noqa: F401
    import numpy as np
except ImportError as e:
    print(f"not run: {e} (Debian: python3-h5py python3-numpy)")
    sys.exit(1 if os.environ.get("VQKV_NO_SKIP") else 77)

from tiny_codecs import MODEL, Tools, refused
from tiny_model import ExactCache, TinyModel, divergence

import vqkv
from vqkv_numpy.cache import FlushRule, LayerCache

TOKENS, PROMPT = 192, 64
# Each rule of a cache, both sides of RoPE, heads alone and pooled, exceptions, and parameters of a prompt.
CELLS = {
    "rtn3": "codec: {name: rtn, bits: 3}\ncache: {sinks: 4, window: 32, flush: 16}\n",
    "kivi": "codec: {name: kivi, preset: r32}\n",
    "kvquant": "codec: {name: kvquant, preset: default}\n",
    "pq": "codec: {name: pq, bits: 4, iterations: 5, k: {rope: pre, transform: [center]}}\n"
          "cache: {sinks: 2, exact_dtype: bf16, k: {window: 16, flush: 32}, v: {window: 8, flush: 8}}\n",
    "decoquant": "codec: {name: rtn, preset: decoquant, bits: 3}\ncache: {window: 16, flush: 16}\n",
    "calibquant": "codec: {name: calibquant, preset: b4}\ncache: {window: 16, flush: 16, prompt: 64, generated: exact}\n",
}


def logits(model, ids, prompt, caches):
    parts = ([ids[:prompt]] if prompt else []) + [[t] for t in ids[prompt:]]
    starts = np.cumsum([0] + [len(p) for p in parts])
    return np.concatenate([model.logits(part, first, caches) for part, first in zip(parts, starts)])


def main():
    for window, flush in ((1, 32), (33, 1), (0, 1), (128, 64)):  # coded at once, in steps of a flush, never beyond the query
        ends = [FlushRule(window, flush).coded_end(4, i) for i in range(600)]
        assert ends[-1] > 400 and all(e <= i + 1 for i, e in enumerate(ends))
        assert all(b == a or (b - a) == flush for a, b in zip(ends[4:], ends[5:]))
    model = TinyModel(MODEL)
    golden = np.fromfile(f"{MODEL}.logits.bin", "<i4")
    count = len(golden) // (1 + model.c["vocab_size"])

    class Unrounded(ExactCache):
        def append(self, keys, values):
            self.keys = keys if self.keys is None else np.concatenate([self.keys, keys])
            self.values = values if self.values is None else np.concatenate([self.values, values])
            return self.keys, self.values

    exact = golden[count:].view("<f4").reshape(count, -1)
    assert np.abs(model.logits(golden[:count], 0, [Unrounded(), Unrounded()]) - exact).max() < 1e-4 * np.abs(exact).max()

    with tempfile.TemporaryDirectory() as folder:
        tools = Tools(sys.argv[1], folder)
        ids = tools.ids[-1][:TOKENS]
        exact = logits(model, ids, PROMPT, [ExactCache(), ExactCache()])
        for name, cell in CELLS.items():
            codecs = vqkv.load(tools.archive(name, cell))
            for mode, prompt in (("stepwise", 0), ("prefill-exact", PROMPT)):
                caches = [LayerCache(codecs, layer) for layer in range(codecs.shape["layers"])]
                kld = divergence(exact, logits(model, ids, prompt, caches))
                mean = kld[max(prompt - 1, 0) : TOKENS - 1].mean()
                rows = tools.run("vqkv-eval", "replay", "--model", MODEL, "--codec", codecs.path, "--token-ids",
                                 tools.documents[-1], "--context", TOKENS, "--windows", 1, "--mode", mode,
                                 "--skip-no-window", *(["--prompt", prompt] if prompt else []))["rows"]
                (replayed,) = (row["kld.mean"] for row in rows if row["codec"] == name)
                assert replayed > 1e-6 and abs(mean / replayed - 1) < 0.01, f"{name}, {mode}: {mean} for {replayed}"
                for u in caches[0].units:
                    assert u.coded_end == caches[0].policy.coded_end(u.unit.role, TOKENS - 1)
        path = f"{folder}/rtn3.codec.h5"
        codecs = vqkv.load(path)
        refused(vqkv.UnknownKind, "cache key 'windows'", lambda: LayerCache(codecs, 0, {"windows": 3}))
        refused(vqkv.UnknownKind, "cache key 'k.windw'; known: rule, window",
                lambda: LayerCache(codecs, 0, {"k": {"windw": 3}}))
        refused(vqkv.UnknownKind, "cache.generated 'exakt'",
                lambda: LayerCache(codecs, 0, {"prompt": 64, "generated": "exakt"}))
        refused(ValueError, "needs cache.prompt", lambda: LayerCache(codecs, 0, {"generated": "exact"}))
        refused(ValueError, "none holds for both roles", lambda: LayerCache(codecs, 0, {"v": {"rule": "none"}}))
        refused(ValueError, "cache.flush is 0; allowed: whole numbers from 1", lambda: LayerCache(codecs, 0, {"flush": 0}))
        refused(ValueError, "16 tokens of a prompt at least, not to 8",
                lambda: LayerCache(vqkv.load(f"{folder}/decoquant.codec.h5"), 0, {"prompt": 8}))
        refused(vqkv.UnknownKind, "cache.policy 'h2o'", lambda: LayerCache(codecs, 0, {"policy": "h2o"}))
        refused(ValueError, "the codecs are of 2 KV heads of 32",
                lambda: LayerCache(codecs, 0).append(np.zeros((1, 3, 32), "f4"), np.zeros((1, 3, 32), "f4")))
        refused(ValueError, "leaves f16", lambda: LayerCache(codecs, 0).append(*[np.full((1, 2, 32), 7e4, "f4")] * 2))
        assert LayerCache(codecs, 0, {"window": 8}).policy.rules["v"].window == 8
        images = tools.archive("images", "codec: {name: calibquant, preset: b4}\n")
        refused(vqkv.UnknownKind, "cache.coded 'image'", lambda: LayerCache(vqkv.load(images), 0))
        scores = tools.archive("scores", "codec: {name: calibquant, preset: default}\ncache: {window: 128}\n")
        refused(vqkv.UnknownKind, "maps the scores of coded keys", lambda: LayerCache(vqkv.load(scores), 0))
        rounded = tools.archive("rounded", "codec: {name: ggml, k: {query: q8}}\n")
        refused(vqkv.UnknownKind, "rounds the queries that meet coded keys", lambda: LayerCache(vqkv.load(rounded), 0))
        think = tools.archive("think", "codec: {name: exact, preset: think}\n")
        refused(vqkv.UnknownKind, "fitted to the queries of a prompt", lambda: LayerCache(vqkv.load(think), 0))
        tiers = tools.archive("tiers", "codec: {tiers: [{tokens: 64, name: rvq, codebooks: 3, bits: 3, iterations: 3}, "
                                       "{level: 1}]}\n")
        refused(vqkv.UnknownKind, "codecs in tiers", lambda: LayerCache(vqkv.load(tiers), 0))
        # A level reads the first codes of the tier before.
        whole, level = (vqkv.load(tiers).unit("k", 1, 0, tier) for tier in (0, 1))
        codes = whole.encode(np.random.default_rng(1).normal(size=(8, 32)))
        first = whole.method.codewords[0][codes.fields[0][:, 0]]
        assert np.array_equal(level.decode(codes.head(level.layout)), first)
        # Of two branches as many stages each, or all of one that has no more.
        branches = tools.archive("branches", "codec: {tiers: [{tokens: 64, name: simvq, codebooks: 4, bits: 3, rounds: 2, k: "
                                             "{low_codebooks: 1, low_period: 300}}, {level: 2}]}\n")
        whole, level = (vqkv.load(branches).unit("k", 1, 0, tier) for tier in (0, 1))
        assert [f.slots for f in whole.layout.fields] == [1, 3] and [f.slots for f in level.layout.fields] == [1, 2]
        codes = whole.encode(np.random.default_rng(2).normal(size=(8, 32)))
        rows = level.decode(codes.head(level.layout))
        (low, of_low), (high, of_high) = whole.method.branches
        assert sorted([*low, *high]) == list(range(32)) and set(low) == {(p + 16) % 32 for p in low}  # pairs stay together
        assert np.array_equal(rows[:, low], of_low.codewords[0][codes.fields[0][:, 0]])
        high_sum = sum(of_high.codewords[s][codes.fields[1][:, s]].astype(np.float64) for s in (0, 1))
        assert np.array_equal(rows[:, high], high_sum.astype(np.float32))
    print("ok")


if __name__ == "__main__":
    main()
