#!/usr/bin/env python3
"""Encoding throughput of the faiss-cpu wheel, one thread, on the shapes of bench_assign and bench_train.

    python3 tests/bench/peers/faiss_peer.py [--repeat 5]
    python3 tests/bench/peers/faiss_peer.py --serve      # a bench name a line on stdin, one JSON row a line on stdout

Prints one JSON object: {"faiss": version, "compile_options": ..., "rows": [{"bench", "vectors_per_second"}, ...]}.
Each row is the median of --repeat runs in processor time, as Google Benchmark's items_per_second is. --serve keeps the
trained quantizers between requests, so that scripts/bench can alternate with ours.
"""
import argparse
import json
import os
import statistics
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("OPENBLAS_CORETYPE", None)

import faiss  # noqa: E402  (the environment must be set first)
import numpy as np  # noqa: E402

WIDTH = 128


def rate(run, vectors, repeat):
    run()
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return vectors / statistics.median(seconds)


def gaussian(rows, columns):
    return np.random.default_rng(1).standard_normal((rows, columns), dtype=np.float32)


def product(groups, bits):
    pq = faiss.ProductQuantizer(WIDTH, groups, bits)
    pq.cp.niter = 4
    pq.train(gaussian(16384, WIDTH))
    x = gaussian(16384, WIDTH)
    return lambda: pq.compute_codes(x), len(x)


def residual(beam, table):
    rq = faiss.ResidualQuantizer(WIDTH, 8, 8)
    rq.train_type = faiss.ResidualQuantizer.Train_default
    rq.max_beam_size = 1
    rq.cp.niter = 4
    rq.train(gaussian(16384, WIDTH))
    rq.max_beam_size = beam
    rq.use_beam_LUT = table
    if table:
        rq.compute_codebook_tables()
    x = gaussian(4096, WIDTH)
    return lambda: rq.compute_codes(x), len(x)


def kmeans(width, entries):
    x = gaussian(65536, width)

    def train():
        clustering = faiss.Clustering(width, entries)
        clustering.niter = 5
        clustering.max_points_per_centroid = len(x)
        clustering.min_points_per_centroid = 1
        clustering.train(x, faiss.IndexFlatL2(width))

    return train, 5 * len(x)


BENCHES = {
    "product/16/256": lambda: product(16, 8),
    "product/32/256": lambda: product(32, 8),
    "product/64/16": lambda: product(64, 4),
    "residual/8/256/beam1": lambda: residual(1, 0),
    "residual/8/256/beam5": lambda: residual(5, 0),
    "residual/8/256/beam5/table": lambda: residual(5, 1),
    "kmeans/8/256": lambda: kmeans(8, 256),
    "kmeans/128/256": lambda: kmeans(128, 256),
    "kmeans/128/1024": lambda: kmeans(128, 1024),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    facts = {"faiss": faiss.__version__, "compile_options": faiss.get_compile_options(), "threads": 1}
    ready = {}

    def row(name):
        if name not in ready:
            ready[name] = BENCHES[name]()
        run, vectors = ready[name]
        return {"bench": name, "vectors_per_second": rate(run, vectors, args.repeat)}

    if args.serve:
        for line in sys.stdin:
            print(json.dumps({**facts, **row(line.strip())}), flush=True)
    else:
        print(json.dumps({**facts, "rows": [row(name) for name in BENCHES]}, indent=1))


if __name__ == "__main__":
    main()
