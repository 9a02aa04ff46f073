#!/usr/bin/env python3
"""Tiny random Hugging Face folders as users have them, and what transformers computes with them, for
tests/golden/test_hf_models.cpp.

    python3 tests/golden/make_hf_models.py            # rewrites tests/golden/hf/
    python3 tests/golden/make_hf_models.py --check    # computes with the installed transformers, compares, writes nothing

NAME/ is config.json and model.safetensors (F32); NAME.logits.bin holds little-endian int32 ids (TOKENS) and float32 logits
(TOKENS, VOCAB), computed in float64. Made with transformers 5.24.0 and torch 2.15.0; 4.57.6 gives the same (--check) but where `since` says 5.
Needs torch, transformers, safetensors and numpy.
"""
import json
import math
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

here = pathlib.Path(__file__).resolve().parent / "hf"
TOKENS, VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, DIM = 80, 64, 24, 24, 2, 2, 1, 16

# What each folder says beyond the sizes, and what its file does with the tensors.
MODELS = {
    "tied_other_head": dict(type="llama", tied=True, head="other", since=5, config={"rope_theta": 10000.0}),
    "tied_head_alone": dict(type="qwen3", tied=True, head="alone", since=5, config={"rope_theta": 10000.0}),
    "bare_tensors": dict(type="llama", tied=True, bare=True, config={"rope_theta": 10000.0}),
    "yarn_old_spelling": dict(type="llama", tied=False, bias=True, config={
        "attention_bias": True, "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
    "yarn_new_spelling": dict(type="qwen3", tied=True, bias=True, since=5, config={
        "attention_bias": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64,
                            "beta_fast": 8.0, "beta_slow": 0.5, "mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False}}),
    "yarn_attention_factor": dict(type="mistral", tied=False, config={
        "sliding_window": None, "rope_theta": 10000.0, "max_position_embeddings": 20,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7}}),
    "sliding_window": dict(type="mistral", tied=False, config={"rope_theta": 10000.0, "sliding_window": 48}),
    "null_window": dict(type="qwen2", tied=True, bias=True, config={
        "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0, "attention_bias": False, "rope_theta": 10000.0}),
}
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def random_weights(m: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    def matrix(rows: int, cols: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, cols)) * gain / math.sqrt(cols)).astype(np.float32)

    def vector(n: int, mean: float, spread: float) -> np.ndarray:
        return (mean + spread * rng.standard_normal(n)).astype(np.float32)

    d = HIDDEN // HEADS if m["type"] == "qwen2" else DIM
    t = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, math.sqrt(HIDDEN)), "model.norm.weight": vector(HIDDEN, 1, 0.2)}
    if not m["tied"] or m.get("head") == "other":
        t["lm_head.weight"] = matrix(VOCAB, HIDDEN, 2.0)
    for l in range(LAYERS):
        p = f"model.layers.{l}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            t[f"{p}{norm}.weight"] = vector(HIDDEN, 1, 0.2)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            t[f"{p}self_attn.{name}_proj.weight"] = matrix(heads * d, HIDDEN, 2.0)
            if m.get("bias"):
                t[f"{p}self_attn.{name}_proj.bias"] = vector(heads * d, 0, 1)
        t[p + "self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * d)
        if m.get("bias") and m["type"] != "qwen2":
            t[p + "self_attn.o_proj.bias"] = vector(HIDDEN, 0, 1)
        if m["type"] == "qwen3":
            for name in ("q", "k"):
                t[f"{p}self_attn.{name}_norm.weight"] = vector(d, 1, 0.2)
        t[p + "mlp.gate_proj.weight"] = matrix(FFN, HIDDEN, 2.0)
        t[p + "mlp.up_proj.weight"] = matrix(FFN, HIDDEN)
        t[p + "mlp.down_proj.weight"] = matrix(HIDDEN, FFN)
    if m.get("head") == "alone":
        t["lm_head.weight"] = t.pop("model.embed_tokens.weight")
    return {name.removeprefix("model."): w for name, w in t.items()} if m.get("bare") else t


def write(folder: pathlib.Path, m: dict, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    config = {"architectures": [CLASSES[m["type"]]], "model_type": m["type"], "hidden_size": HIDDEN, "intermediate_size": FFN,
              "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
              "vocab_size": VOCAB, "rms_norm_eps": 1e-6, "max_position_embeddings": 256, "hidden_act": "silu",
              "tie_word_embeddings": m["tied"], "torch_dtype": "float32", **m["config"]}
    if m["type"] == "qwen2":
        del config["head_dim"]
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def logits_of(folder: pathlib.Path, ids: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor(ids[None].astype("i8"))).logits[0].numpy()
    assert np.isfinite(logits).all()
    return logits.astype("<f4")


def main() -> None:
    version = int(transformers.__version__.split(".")[0])
    if sys.argv[1:] == ["--check"]:
        for name, m in MODELS.items():
            data = (here / f"{name}.logits.bin").read_bytes()
            ids, kept = np.frombuffer(data, "<i4", TOKENS), np.frombuffer(data, "<f4", offset=4 * TOKENS).reshape(TOKENS, VOCAB)
            if version < m.get("since", 0):
                print(f"{name}: transformers {transformers.__version__} reads it in another way")
                continue
            off = np.abs(logits_of(here / name, ids) - kept).max() / kept.std()
            print(f"{name}: off by {off:.1e} of the spread")
            assert off < 2e-5
        return
    if version != 5:
        raise SystemExit("error: the references are those of transformers 5")
    shutil.rmtree(here, ignore_errors=True)
    for index, (name, m) in enumerate(MODELS.items()):
        rng = np.random.default_rng(2000 + index)
        write(here / name, m, random_weights(m, rng))
        ids = rng.integers(0, VOCAB, TOKENS).astype("<i4")
        logits = logits_of(here / name, ids)
        (here / f"{name}.logits.bin").write_bytes(ids.tobytes() + logits.tobytes())
        print(name, "largest logit", np.abs(logits).max(), "spread", logits.std())


if __name__ == "__main__":
    main()
