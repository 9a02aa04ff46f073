#!/usr/bin/env python3
"""Facts about SmolLM2-135M-Instruct from llama.cpp, an engine of its own, for tests/smollm/test_llama_golden.cpp.

    python3 tests/golden/make_f32_gguf.py          # once
    python3 tests/golden/make_llama_goldens.py

llama.cpp runs with F32 weights (dequantized), an F32 cache and flash attention off, so that nothing but the order of
fp32 sums differs from another exact engine. Written to tests/golden/:
  smollm2_positions.bin     windows of 1,024 tokens of the texts in data/, one a text: for every position the NLL of the
                            next token, and ids and log-probabilities of the 16 most likely tokens
                            (an 8-byte length, a JSON header, then little-endian arrays in the header's order)
  smollm2_greedy.json       greedy continuations, 96 tokens each, and the smallest gap between the two best logits met
Needs llama-cpp-python and numpy.
"""
import json
import pathlib
import sys

import numpy as np

here = pathlib.Path(__file__).resolve().parent
root = here.parents[1]
sys.path.insert(0, str(root / "tests" / "bench" / "peers"))
from llama_peer import Engine, llama_cpp  # noqa: E402

CONTEXT, TOP, NEW = 1024, 16, 96
TEXTS = ["kjv-0.txt", "kjv-2.txt", "jargon-0.txt", "jargon-2.txt", "jargon-3.txt"]
PROMPTS = [
    "<|im_start|>user\nWhat is the capital of France, and what is it known for?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nExplain why the sky is blue.<|im_end|>\n<|im_start|>assistant\n",
    "In the beginning God created the heaven and the earth.",
    "The history of computing begins with",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWrite a short story about a lighthouse keeper.<|im_end|>\n<|im_start|>assistant\n",
]


def tokenize(engine: Engine, text: str) -> list[int]:
    raw = text.encode()
    vocab = llama_cpp.llama_model_get_vocab(engine.model)
    buffer = (llama_cpp.llama_token * (len(raw) + 8))()
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), False, True)
    return list(buffer[:count])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def main() -> None:
    engine = Engine(str(root / "data" / "models" / "SmolLM2-135M-Instruct.F32.gguf"), CONTEXT, 2, CONTEXT)
    ids, nll, top_id, top_logp = [], [], [], []
    for name in TEXTS:
        text = (root / "data" / name).read_text(encoding="utf-8")
        window = tokenize(engine, text[: 12 * CONTEXT])[:CONTEXT]
        assert len(window) == CONTEXT
        engine.clear()
        logp = log_softmax(engine.run(window, 0, "all"))
        best = np.argsort(-logp, axis=1, kind="stable")[:, :TOP]
        ids.append(window)
        nll.append(-logp[np.arange(CONTEXT - 1), window[1:]])
        top_id.append(best)
        top_logp.append(np.take_along_axis(logp, best, axis=1))
    arrays = [("ids", np.array(ids, "<u2")), ("nll", np.array(nll, "<f4")), ("top_id", np.array(top_id, "<u2")),
              ("top_logp", np.array(top_logp, "<f4"))]
    perplexity = float(np.exp(np.concatenate(nll).mean()))
    header = json.dumps({"engine": f"llama-cpp-python {llama_cpp.__version__}", "texts": TEXTS, "perplexity": perplexity,
                         "arrays": [{"name": n, "type": a.dtype.str, "shape": a.shape} for n, a in arrays]}).encode()
    with open(here / "smollm2_positions.bin", "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for _, a in arrays:
            out.write(a.tobytes())

    continuations = []
    for prompt in PROMPTS:
        prompt_ids = tokenize(engine, prompt)
        engine.clear()
        row = engine.run(prompt_ids, 0, "last")[0]
        new, gap = [], np.inf
        for step in range(NEW):
            second, first = np.partition(row, -2)[-2:]
            gap = min(gap, float(first - second))
            new.append(int(row.argmax()))
            row = engine.run([new[-1]], len(prompt_ids) + step, "last")[0]
        continuations.append({"prompt": prompt, "prompt_ids": prompt_ids, "ids": new, "smallest_gap": round(gap, 5)})
    (here / "smollm2_greedy.json").write_text(
        json.dumps({"engine": f"llama-cpp-python {llama_cpp.__version__}", "continuations": continuations}) + "\n")
    print("perplexity", perplexity, "gaps", [c["smallest_gap"] for c in continuations])


if __name__ == "__main__":
    main()
