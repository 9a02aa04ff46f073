#!/usr/bin/env python3
"""Encoding throughput of the faiss-cpu wheel, one thread, on the shapes of bench_assign and bench_train.

Prints one JSON object: {"faiss": version, "compile_options": ..., "rows": [{"bench", "vectors_per_second"}, ...]}.
Each row is the median of --repeat runs in processor time, as Google Benchmark's items_per_second is.
"""
import argparse
import json
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("OPENBLAS_CORETYPE", None)

import faiss  # noqa: E402  (the environment must be set first)
import numpy as np  # noqa: E402


def rate(run, vectors, repeat):
    run()
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return vectors / statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    generator = np.random.default_rng(1)
    d = 128
    train = generator.standard_normal((16384, d), dtype=np.float32)
    rows = []

    def add(name, run, vectors):
        rows.append({"bench": name, "vectors_per_second": rate(run, vectors, args.repeat)})

    for groups, bits in ((16, 8), (32, 8), (64, 4)):
        pq = faiss.ProductQuantizer(d, groups, bits)
        pq.cp.niter = 4
        pq.train(train)
        x = generator.standard_normal((16384, d), dtype=np.float32)
        add(f"product/{groups}/{1 << bits}", lambda: pq.compute_codes(x), len(x))

    x = generator.standard_normal((4096, d), dtype=np.float32)
    for beam, table in ((1, 0), (5, 0), (5, 1)):
        rq = faiss.ResidualQuantizer(d, 8, 8)
        rq.train_type = faiss.ResidualQuantizer.Train_default
        rq.max_beam_size = 1
        rq.cp.niter = 4
        rq.train(train)
        rq.max_beam_size = beam
        rq.use_beam_LUT = table
        if table:
            rq.compute_codebook_tables()
        add(f"residual/8/256/beam{beam}{'/table' if table else ''}", lambda: rq.compute_codes(x), len(x))

    for width, entries, points in ((8, 256, 65536), (128, 256, 65536), (128, 1024, 65536)):
        x = generator.standard_normal((points, width), dtype=np.float32)

        def train_kmeans():
            kmeans = faiss.Clustering(width, entries)
            kmeans.niter = 5
            kmeans.max_points_per_centroid = points
            kmeans.min_points_per_centroid = 1
            kmeans.train(x, faiss.IndexFlatL2(width))

        add(f"kmeans/{width}/{entries}", train_kmeans, 5 * points)

    print(json.dumps({"faiss": faiss.__version__, "compile_options": faiss.get_compile_options(), "threads": 1,
                      "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
