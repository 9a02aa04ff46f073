#!/usr/bin/env bash
# llama.cpp's flash attention on a processor adds up the values of an f16 cache in f16, position after position, also when
# GGML_PREC_F32 is asked for. Those of a q8_0 cache it adds up in float32. In generation over a long context the default f16
# cache, the baseline that quantized ones are measured against, thus loses more than q8_0, and where the channels of V have
# a mean, the sum stops growing once a term is below half a unit of its last place: the output shrinks towards 0.
# It is no matter of what is stored: 64 queries in a call, as in a prompt, go another way, where f16 is as good as it can be.
# Calls of 2, 8 and 32 queries are like one of 1. Threads share out the positions of a single query, so that two do better.
# Seen with xllamacpp 2026.10.11549 (llama.cpp in a wheel, x86-64), relative error, one query a call, 1 thread, D = 128,
# scores of standard deviation 0.5, V normal with mean 0 or 1:
#   positions         1,024    4,096   16,384   65,536
#   mean 0, f16       0.005    0.010    0.018    0.041
#   mean 0, q8_0      0.007    0.006    0.007    0.008
#   mean 1, f16       0.004    0.05     0.42     0.76    (2 threads 0.002, 0.005, 0.19, 0.61)
#   mean 1, q8_0      0.0003   0.0001   0.0001   0.00003
# Sharper scores help little: standard deviation 2, mean 1 and 65,536 positions end at 0.33 and q8_0 at 0.0005.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check --no-deps numpy==2.3.5 xllamacpp==2026.10.11549
"$dir/env/bin/python" - "$dir" <<'PY'
import ctypes
import glob
import sys
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p

import numpy as np

library = ctypes.CDLL(glob.glob(f"{sys.argv[1]}/env/lib/python3*/site-packages/xllamacpp/xllamacpp*.so")[0])


class Params(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def function(name, result, *arguments):
    f = getattr(library, name)
    f.restype, f.argtypes = result, arguments
    return f


init = function("ggml_init", c_void_p, Params)
free = function("ggml_free", None, c_void_p)
tensor = function("ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
data = function("ggml_get_data", c_void_p, c_void_p)
size = function("ggml_nbytes", c_size_t, c_void_p)
copy = function("ggml_cpy", c_void_p, c_void_p, c_void_p, c_void_p)
attend = function("ggml_flash_attn_ext", c_void_p, *[c_void_p] * 5, c_float, c_float, c_float)
set_precision = function("ggml_flash_attn_ext_set_prec", None, c_void_p, c_int)
new_graph = function("ggml_new_graph", c_void_p, c_void_p)
expand = function("ggml_build_forward_expand", None, c_void_p, c_void_p)
compute = function("ggml_graph_compute_with_ctx", c_int, c_void_p, c_void_p, c_int)
F32, F16, Q8_0, PREC_F32 = 0, 1, 8, 10
D = 128


def attention(kind, q, k, v, threads=1):
    context = init(Params(3 * (k.nbytes + v.nbytes) + (32 << 20), None, False))

    def run(node, threads=1):
        graph = new_graph(context)
        expand(graph, node)
        if compute(context, graph, threads) != 0:
            sys.exit("the graph was not computed")

    def put(x):
        t = tensor(context, F32, D, len(x))
        ctypes.memmove(data(t), x.ctypes.data, x.nbytes)
        return t

    cache = [tensor(context, kind, D, len(k)) for _ in range(2)]
    for x, t in zip((k, v), cache):
        run(copy(context, put(x), t))
    out = attend(context, put(q), *cache, None, D**-0.5, 0, 0)
    set_precision(out, PREC_F32)
    run(out, threads)
    y = np.frombuffer(ctypes.string_at(data(out), size(out)), np.float32).reshape(len(q), D).copy()
    free(context)
    return y


def exact(q, k, v):
    scores = q.astype(np.float64) @ k.T.astype(np.float64) * D**-0.5
    p = np.exp(scores - scores.max(1, keepdims=True))
    return p @ v.astype(np.float64) / p.sum(1, keepdims=True)


def error(y, x):
    return float(np.linalg.norm(y - x) / np.linalg.norm(x))


rng = np.random.default_rng(0)
ok = True
cases = [(0.5, mean, positions) for mean in (0, 1) for positions in (1024, 4096, 16384, 65536)] + [(2, 1, 65536)]
for deviation, mean, positions in cases:
    q = rng.standard_normal((64, D)).astype(np.float32)
    k = (deviation * rng.standard_normal((positions, D))).astype(np.float32)
    v = (mean + rng.standard_normal((positions, D))).astype(np.float32)
    x = exact(q, k, v)

    def alone(kind, threads=1):
        return float(np.mean([error(attention(kind, q[i:i + 1], k, v, threads), x[i:i + 1]) for i in range(4)]))

    f16, q8, halves, together = alone(F16), alone(Q8_0), alone(F16, 2), error(attention(F16, q, k, v), x)
    print(f"scores {deviation}, mean {mean}, {positions} positions: f16 {f16:.4f} (2 threads {halves:.4f}), q8_0 {q8:.5f}; "
          f"64 queries in a call, f16 {together:.5f}")
    ok &= together < 0.001
    if positions >= 16384:
        ok &= f16 > 2 * q8 if mean == 0 else f16 > 0.25 and q8 < 0.002
sys.exit(0 if ok else 1)
PY
