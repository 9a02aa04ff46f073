"""scripts/vqkv_hf.py against `vqkv-eval replay`: a transformers model over a CodecCache gives the divergence that replay
measures, token by token and behind an exact prompt, and `generate` runs on it.

    python3 -m venv /tmp/hf && /tmp/hf/bin/pip install -r tests/scripts/check_hf_cache.txt
    /tmp/hf/bin/python tests/scripts/check_hf_cache.py build/release/bin

Not in CI: torch is 2 GB and more. There test_vqkv_cache.py runs the same core, without the framework.
"""
import sys
import tempfile

import numpy as np
import torch
import transformers
from tiny_codecs import CONTEXT, MODEL, Tools
from tiny_model import divergence

import vqkv
import vqkv_hf

# Name: the text of a cell. Scalars and codewords, on both sides of RoPE, heads alone and pooled.
CELLS = {
    "exact": "codec: {name: exact}\ncache: {rule: none}\n",
    "rtn3": "codec: {name: rtn, bits: 3}\ncache: {sinks: 4, window: 32, flush: 16}\n",
    "kivi": "codec: {name: kivi, preset: r32}\n",
    "kvquant": "codec: {name: kvquant, preset: default}\n",
    "pq": "codec: {name: pq, bits: 4, k: {rope: pre, transform: [center]}}\ncache: {window: 16, flush: 32}\n",
    "qjl": "codec: {name: qjl, initial_layers: 1}\ncache: {sinks: 0, rule: kivi, residual: 32}\n",
}
TOKENS, PROMPT = 192, 64


def logits(model, codecs, ids, prompt):
    """Of all tokens, fed one by one behind a prompt in one forward."""
    cache, out = vqkv_hf.CodecCache(codecs), []
    with torch.no_grad():
        for part in ([ids[:prompt]] if prompt else []) + [[t] for t in ids[prompt:]]:
            out.append(model(input_ids=torch.tensor([part]), past_key_values=cache).logits[0].numpy())
    return np.concatenate(out)


def main():
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        tools = Tools(sys.argv[1], folder)
        paths = {name: tools.archive(name, text) for name, text in CELLS.items()}
        ids = tools.ids[-1][:TOKENS]
        exact = {prompt: logits(model, vqkv.load(paths["exact"]), ids, prompt) for prompt in (0, PROMPT)}
        for name in list(CELLS)[1:]:
            codecs = vqkv.load(paths[name])
            for mode, prompt in (("stepwise", 0), ("prefill-exact", PROMPT)):
                kld = divergence(exact[prompt], logits(model, codecs, ids, prompt))
                mean = kld[max(prompt - 1, 0) : TOKENS - 1].mean()
                rows = tools.run("vqkv-eval", "replay", "--model", MODEL, "--codec", paths[name], "--token-ids",
                                 tools.documents[-1], "--context", TOKENS, "--windows", 1, "--mode", mode,
                                 "--skip-no-window", *(["--prompt", prompt] if prompt else []))["rows"]
                (replayed,) = (row["kld.mean"] for row in rows if row["codec"] == name)
                print(f"{name}, {mode}: KLD {mean:.6g} here, {replayed:.6g} in replay")
                assert replayed > 1e-6 and abs(mean / replayed - 1) < 0.01
        cache = vqkv_hf.CodecCache(vqkv.load(paths["rtn3"]), {"window": 8, "flush": 8})
        batch = torch.tensor([tools.ids[0][:60], tools.ids[1][:60]])
        out = model.generate(batch, attention_mask=torch.ones_like(batch), past_key_values=cache, max_new_tokens=20,
                             do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out.shape == (2, 80) and cache.get_seq_length() == 79
        assert cache.layers[0].sequences[1].units[0].coded_end == 4 + 64  # of the query at position 78
        for refused in (lambda: cache.layers[0].crop(3), lambda: cache.layers[0].reorder_cache(torch.tensor([1, 0]))):
            try:
                refused()
                raise SystemExit("nothing was refused")
            except NotImplementedError:
                pass
    print(f"ok: transformers {transformers.__version__}, torch {torch.__version__}, context {CONTEXT}")


if __name__ == "__main__":
    main()
