#!/usr/bin/env python3
"""llama.cpp as the peer of the reference runtime: speeds and full logits, one JSON line on stdout.

    python3 tests/bench/peers/llama_peer.py MODEL.gguf speed  [--prompt 512] [--new 64] [--threads 2] [--repeat 5]
    python3 tests/bench/peers/llama_peer.py MODEL.gguf serve  [--prompt 512] [--new 64] [--threads 2]
    python3 tests/bench/peers/llama_peer.py MODEL.gguf logits --ids IDS.txt [--context 1024] -o LOGITS.raw

speed   prefill of --prompt tokens (one batch, only the last row's logits) and --new decode steps after it, median of
        --repeat runs; F32 cache, flash attention off, both thread counts equal.
serve   the same once for every line on stdin ("prefill" or "decode"), so that scripts/bench can alternate with ours.
logits  windows of --context tokens, each from an empty cache, every row's logits as float32 little-endian,
        (tokens, vocab); IDS.txt holds decimal token ids separated by white space.

Use an F32 GGUF (tests/golden/make_f32_gguf.py), so that both engines start from the same numbers.
Needs llama-cpp-python and numpy.
"""
import argparse
import json
import pathlib
import statistics
import sys
import time

import llama_cpp
import numpy as np


class Engine:
    def __init__(self, path: str, context: int, threads: int, batch: int):
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp can't load {path}")
        c = llama_cpp.llama_context_default_params()
        c.n_ctx = context
        c.n_batch = c.n_ubatch = batch
        c.n_threads = c.n_threads_batch = threads
        c.type_k = c.type_v = llama_cpp.GGML_TYPE_F32
        c.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        c.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, c)
        if not self.context:
            raise SystemExit("llama.cpp can't make a context")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.size = batch

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def run(self, ids, first: int, rows: str) -> np.ndarray | None:
        """One block at positions [first, first + len(ids)); rows: "all" or "last"."""
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = int(token)
            batch.pos[i] = first + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = rows == "all" or i + 1 == len(ids)
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_batch_free(batch)
        count = len(ids) if rows == "all" else 1
        pointer = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(count, self.vocab))


@llama_cpp.llama_log_callback
def _silent(level, text, user):
    pass


class Speed:
    def __init__(self, args):
        self.args = args
        self.engine = Engine(args.model, args.prompt + args.new + 64, args.threads, args.prompt)
        self.ids = np.random.default_rng(1).integers(100, self.engine.vocab - 100, args.prompt)
        self.facts = {"engine": "llama.cpp", "version": llama_cpp.__version__, "threads": args.threads,
                      "prompt": args.prompt, "new": args.new}

    def prefill(self) -> dict:
        self.engine.clear()
        return self._rate(self.args.prompt, lambda: self.engine.run(self.ids, 0, "last"))

    def decode(self) -> dict:
        """After a prefill."""
        return self._rate(self.args.new, lambda: [self.engine.run([1000 + step], self.args.prompt + step, "last")
                                                  for step in range(self.args.new)])

    @staticmethod
    def _rate(tokens, work) -> dict:
        wall, processor = time.perf_counter(), time.process_time()
        work()
        return {"tok_s": tokens / (time.perf_counter() - wall),
                "tok_processor_s": tokens / (time.process_time() - processor)}


def speed(args) -> dict:
    engine = Speed(args)
    prefill, decode = [], []
    for repeat in range(args.repeat + 1):
        rates = engine.prefill(), engine.decode()
        if repeat:  # the first run warms up
            prefill.append(rates[0]["tok_s"])
            decode.append(rates[1]["tok_s"])
    return {**engine.facts, "prefill_tok_s": round(statistics.median(prefill), 1),
            "decode_tok_s": round(statistics.median(decode), 2)}


def serve(args) -> None:
    engine = Speed(args)
    engine.prefill()
    for line in sys.stdin:
        rate = engine.prefill()
        if line.strip() == "decode":
            rate = engine.decode()
        print(json.dumps({**engine.facts, **rate}), flush=True)


def logits(args) -> dict:
    ids = [int(t) for t in pathlib.Path(args.ids).read_text().split()]
    engine = Engine(args.model, args.context, args.threads, args.context)
    with open(args.output, "wb") as out:
        for first in range(0, len(ids), args.context):
            engine.clear()
            window = ids[first:first + args.context]
            out.write(np.ascontiguousarray(engine.run(window, 0, "all"), dtype="<f4").tobytes())
    return {"engine": "llama.cpp", "version": llama_cpp.__version__, "tokens": len(ids), "vocab": engine.vocab,
            "context": args.context, "output": args.output}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("what", choices=["speed", "serve", "logits"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--ids")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("-o", "--output")
    args = parser.parse_args()
    if args.what == "logits" and not (args.ids and args.output):
        parser.error("logits needs --ids and -o")
    if args.what == "serve":
        serve(args)
    else:
        print(json.dumps(speed(args) if args.what == "speed" else logits(args)))


if __name__ == "__main__":
    main()
