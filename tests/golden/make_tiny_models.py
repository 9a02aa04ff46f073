#!/usr/bin/env python3
"""Tiny random-weight models of every family, and what llama.cpp computes with them, for tests/golden/test_tiny_models.cpp.

    python3 tests/golden/make_tiny_models.py       # rewrites tests/golden/tiny/

Each NAME.gguf has F32 weights and no vocabulary; NAME.logits.bin holds little-endian int32 ids (TOKENS) and float32
logits (TOKENS, vocab) of llama.cpp with an F32 cache. NAME/ is the same model as a Hugging Face folder (config.json,
model.safetensors): its q and k rows are in half-split order, those of the GGUF of architecture llama interleaved, as the
converters of llama.cpp write them.
Needs gguf, safetensors, llama-cpp-python and numpy.
"""
import json
import math
import pathlib
import shutil
import sys

import gguf
import numpy as np
from safetensors.numpy import save_file

here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[0] / "bench" / "peers"))
from llama_peer import Engine  # noqa: E402

TOKENS = 80  # past the original context of the llama3 scaling below

# hidden/q_heads differs from head_dim in all but qwen2; 50 and 97 are no multiples of anything; query heads per kv head: 3, 1, 7, 2.
MODELS = {
    "llama": dict(arch="llama", hidden=48, ffn=64, layers=2, q=6, kv=2, d=16, vocab=96, tied=False, theta=10000.0, eps=1e-5,
                  llama3=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
    "mistral": dict(arch="llama", hidden=40, ffn=48, layers=2, q=3, kv=3, d=16, vocab=96, tied=False, theta=1e6, eps=1e-5,
                    hf=True, hf_type="mistral"),
    "qwen2": dict(arch="qwen2", hidden=56, ffn=50, layers=2, q=7, kv=1, d=8, vocab=97, tied=True, theta=1e6, eps=1e-6, bias=True),
    "qwen3": dict(arch="qwen3", hidden=40, ffn=48, layers=2, q=4, kv=2, d=32, vocab=96, tied=True, theta=1e6, eps=1e-6, norm=True),
}


def llama3_factors(m: dict) -> np.ndarray:
    s, out = m["llama3"], []
    for i in range(m["d"] // 2):
        wave = 2 * math.pi * m["theta"] ** (2 * i / m["d"])
        low, high = s["original_max_position_embeddings"] / s["low_freq_factor"], s["original_max_position_embeddings"] / s["high_freq_factor"]
        if wave < high:
            out.append(1.0)
        elif wave > low:
            out.append(s["factor"])
        else:
            t = (s["original_max_position_embeddings"] / wave - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
            out.append(1 / ((1 - t) / s["factor"] + t))
    return np.array(out, np.float32)


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads, half, pair) -> (heads, pair, half)."""
    rest = w.shape[1:]
    return np.ascontiguousarray(w.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(w.shape))


def random_weights(m: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    def matrix(rows: int, cols: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, cols)) * gain / math.sqrt(cols)).astype(np.float32)

    def norm(n: int) -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(n)).astype(np.float32)

    h, d = m["hidden"], m["d"]
    t = {"model.embed_tokens.weight": matrix(m["vocab"], h, math.sqrt(h)), "model.norm.weight": norm(h)}
    if not m["tied"]:
        t["lm_head.weight"] = matrix(m["vocab"], h, 2.0)
    for l in range(m["layers"]):
        p = f"model.layers.{l}."
        t[p + "input_layernorm.weight"] = norm(h)
        t[p + "post_attention_layernorm.weight"] = norm(h)
        for name, heads in (("q", m["q"]), ("k", m["kv"]), ("v", m["kv"])):
            t[p + f"self_attn.{name}_proj.weight"] = matrix(heads * d, h, 2.0)
            if m.get("bias"):
                t[p + f"self_attn.{name}_proj.bias"] = (3 * rng.standard_normal(heads * d)).astype(np.float32)
        if m.get("norm"):
            t[p + "self_attn.q_norm.weight"] = norm(d)
            t[p + "self_attn.k_norm.weight"] = norm(d)
        t[p + "self_attn.o_proj.weight"] = matrix(h, m["q"] * d)
        t[p + "mlp.gate_proj.weight"] = matrix(m["ffn"], h, 2.0)
        t[p + "mlp.up_proj.weight"] = matrix(m["ffn"], h)
        t[p + "mlp.down_proj.weight"] = matrix(h, m["ffn"])
    return t


NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def write_gguf(path: pathlib.Path, name: str, m: dict, tensors: dict[str, np.ndarray]) -> None:
    w = gguf.GGUFWriter(str(path), m["arch"])
    w.add_name(f"tiny random {name}")
    w.add_context_length(4096)
    w.add_embedding_length(m["hidden"])
    w.add_block_count(m["layers"])
    w.add_feed_forward_length(m["ffn"])
    w.add_head_count(m["q"])
    w.add_head_count_kv(m["kv"])
    w.add_key_length(m["d"])
    w.add_value_length(m["d"])
    w.add_rope_dimension_count(m["d"])
    w.add_rope_freq_base(m["theta"])
    w.add_layer_norm_rms_eps(m["eps"])
    w.add_vocab_size(m["vocab"])
    w.add_tokenizer_model("none")
    w.add_file_type(gguf.LlamaFileType.ALL_F32)
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    for key, value in tensors.items():
        if key in top:
            w.add_tensor(top[key], value)
            continue
        _, _, layer, rest = key.split(".", 3)
        stem, kind = rest.rsplit(".", 1)
        if m["arch"] == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            value = interleave(value, m["q"] if stem.endswith("q_proj") else m["kv"])
        w.add_tensor(f"blk.{layer}.{NAMES[stem]}.{kind}", value)
    if "llama3" in m:
        w.add_tensor("rope_freqs.weight", llama3_factors(m))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_hf(folder: pathlib.Path, m: dict, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    kind = m.get("hf_type", m["arch"])
    config = {"architectures": [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                                 "qwen3": "Qwen3ForCausalLM"}[kind]],
              "model_type": kind, "hidden_size": m["hidden"], "intermediate_size": m["ffn"], "num_hidden_layers": m["layers"],
              "num_attention_heads": m["q"], "num_key_value_heads": m["kv"], "head_dim": m["d"], "vocab_size": m["vocab"],
              "rms_norm_eps": m["eps"], "rope_theta": m["theta"], "max_position_embeddings": 4096, "hidden_act": "silu",
              "tie_word_embeddings": m["tied"], "torch_dtype": "float32"}
    if kind == "qwen2":
        del config["head_dim"]
    if kind == "mistral":
        config["sliding_window"] = None
    if "llama3" in m:
        config["rope_scaling"] = {"rope_type": "llama3", **m["llama3"]}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    out = here / "tiny"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for index, (name, m) in enumerate(MODELS.items()):
        rng = np.random.default_rng(1000 + index)
        tensors = random_weights(m, rng)
        write_gguf(out / f"{name}.gguf", name, m, tensors)
        write_hf(out / name, m, tensors)
        ids = rng.integers(0, m["vocab"], TOKENS).astype("<i4")
        engine = Engine(str(out / f"{name}.gguf"), 256, 1, TOKENS)
        logits = np.array(engine.run(ids, 0, "all"), "<f4")
        assert np.isfinite(logits).all()
        (out / f"{name}.logits.bin").write_bytes(ids.tobytes() + logits.tobytes())
        print(name, "largest logit", np.abs(logits).max(), "spread", logits.std())


if __name__ == "__main__":
    main()
