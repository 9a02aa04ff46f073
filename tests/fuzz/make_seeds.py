#!/usr/bin/env python3
"""Seeds of the fuzz targets that read model files; needs the packages gguf, safetensors and numpy.

  python tests/fuzz/make_seeds.py tests/fuzz/seeds
"""
import json, pathlib, sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from safetensors.numpy import save_file

root = pathlib.Path(sys.argv[1])
for name in ("gguf", "safetensors", "model_config"):
    (root / name).mkdir(parents=True, exist_ok=True)


def model(path, arch, quantized):
    hidden, ffn, vocab, heads, kv, dim = 32, 32, 3, 2, 1, 16
    w = gguf.GGUFWriter(str(path), arch)
    w.add_name("seed")
    for key, value in (("block_count", 1), ("embedding_length", hidden), ("feed_forward_length", ffn), ("context_length", 64),
                       ("attention.head_count", heads), ("attention.head_count_kv", kv), ("attention.key_length", dim)):
        w.add_uint32(f"{arch}.{key}", value)
    w.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    w.add_float32(f"{arch}.rope.freq_base", 10000.0)
    w.add_string("tokenizer.ggml.model", "gpt2")
    w.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    w.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    matrices = {"token_embd.weight": (vocab, hidden)}
    vectors = {"output_norm.weight": hidden, "blk.0.attn_norm.weight": hidden, "blk.0.ffn_norm.weight": hidden}
    for part, shape in (("attn_q", (heads * dim, hidden)), ("attn_k", (kv * dim, hidden)), ("attn_v", (kv * dim, hidden)),
                        ("attn_output", (hidden, heads * dim)), ("ffn_gate", (ffn, hidden)), ("ffn_up", (ffn, hidden)),
                        ("ffn_down", (hidden, ffn))):
        matrices[f"blk.0.{part}.weight"] = shape
    if arch == "qwen2":
        vectors |= {f"blk.0.attn_{p}.bias": n for p, n in (("q", heads * dim), ("k", kv * dim), ("v", kv * dim))}
    if arch == "qwen3":
        vectors |= {"blk.0.attn_q_norm.weight": dim, "blk.0.attn_k_norm.weight": dim}
    for name, (rows, cols) in matrices.items():
        w.add_tensor(name, gguf.quants.quantize(np.full((rows, cols), 0.25, np.float32), quantized), raw_dtype=quantized)
    for name, n in vectors.items():
        w.add_tensor(name, np.ones(n, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


model(root / "gguf" / "llama_q8_0.gguf", "llama", T.Q8_0)
model(root / "gguf" / "qwen2_q4_1.gguf", "qwen2", T.Q4_1)
model(root / "gguf" / "qwen3_q5_0.gguf", "qwen3", T.Q5_0)

save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16), "c": np.ones((1, 2), np.int64)},
          str(root / "safetensors" / "three.safetensors"), {"format": "pt"})
save_file({"x": np.array(1, np.float32)}, str(root / "safetensors" / "scalar.safetensors"))

config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
          "intermediate_size": 12, "vocab_size": 5, "num_hidden_layers": 1, "tie_word_embeddings": True,
          "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu"}
layer = ["input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
         "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
names = ["model.embed_tokens.weight", "model.norm.weight"] + [f"model.layers.0.{n}.weight" for n in layer]
index = json.dumps({"weight_map": {n: "shard.safetensors" for n in names}}, separators=(",", ":"))
for name, more in (("llama", {}),
                   ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
                   ("mistral", {"model_type": "mistral", "sliding_window": None}),
                   ("rope_parameters", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}})):
    (root / "model_config" / name).write_bytes(json.dumps(config | more).encode() + b"\0" + index.encode())
