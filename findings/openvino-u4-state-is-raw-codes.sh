#!/usr/bin/env bash
# OpenVINO's KV_CACHE_PRECISION "u4" works in attention on a processor, but the cache's variable state, as query_state() gives
# it, is not the cache: it has the type and shape of K and V and holds their raw codes, 0.0 to 15.0, without scale and zero
# point, and each two neighbours swapped. At f32, f16 and u8 the same call gives K and V. Nothing warns: who saves the cache
# of a prompt so, or measures the error of a cache by its state, gets numbers that are not near it, and what would decode
# them, a minimum and a step per row, is not in them.
# Seen with openvino 2026.4.1 (x86-64), rows of 128 normal values, f32 as inference precision; squared error in units of the
# squared values: attention 0.016, state 65 and 67 (u8: 0.00005, and 0.00003 for both). Once each pair is swapped, all codes
# equal round(15 (x - min) / (max - min)) of their row.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check numpy==2.3.5 openvino==2026.4.1
"$dir/env/bin/python" - <<'PY'
import sys

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo

HEADS, D, TOKENS = 2, 128, 96


def model():
    """Attention over all keys and values so far, which are kept in two variables, as in an exported language model."""
    shape = [-1, HEADS, -1, D]
    q, k, v = (op.parameter(shape, ov.Type.f32, name=name) for name in ("q", "k", "v"))
    beam = op.parameter([-1], ov.Type.i32, name="beam")
    caches, sinks = [], []
    for name, new in (("past k", k), ("past v", v)):
        batch = op.gather(op.shape_of(new, "i64"), op.constant(np.array([0])), op.constant(np.int64(0)))
        empty = op.broadcast(op.constant(np.float32(0)), op.concat([batch, op.constant(np.array([HEADS, 0, D]))], 0))
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape(shape), ov.Type.f32, name
        variable = Variable(info)
        past = op.gather(op.read_value(empty, variable), beam, op.constant(np.int64(0)))
        caches.append(op.concat([past, new], 2))
        sinks.append(op.assign(caches[-1], variable))
    return ov.Model([op.result(op.scaled_dot_product_attention(q, *caches))], sinks, [q, k, v, beam], "attention")


def error(y, x):
    return float(((y - x) ** 2).sum() / (x**2).sum())


rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, HEADS, TOKENS, D)).astype(np.float32) for _ in range(3))
exact = np.empty(q.shape)
for t in range(TOKENS):
    scores = np.einsum("bhd,bhtd->bht", q[:, :, t].astype(np.float64), k[:, :, :t + 1]) / np.sqrt(D)
    p = np.exp(scores - scores.max(2, keepdims=True))
    exact[:, :, t] = np.einsum("bht,bhtd->bhd", p / p.sum(2, keepdims=True), v[:, :, :t + 1])

ok = True
for precision, limit in (("f32", 1e-9), ("f16", 1e-6), ("u8", 1e-3), ("u4", 0.05)):
    request = ov.Core().compile_model(model(), "CPU", {
        "KV_CACHE_PRECISION": precision, "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}).create_infer_request()
    out = [request.infer([x[:, :, t:t + 1] for x in (q, k, v)] + [np.zeros(1, np.int32)])[0].copy() for t in range(TOKENS)]
    state = {s.name: np.array(s.state.data) for s in request.query_state()}
    attention, by_state = error(np.concatenate(out, 2), exact), [error(state[f"past {n}"], x) for n, x in (("k", k), ("v", v))]
    print(f"{precision}: squared error of attention {attention:.2g}, of the state's k {by_state[0]:.2g}, v {by_state[1]:.2g}; "
          f"state of k from {state['past k'].min():.3f} to {state['past k'].max():.3f}, {state['past k'].dtype}")
    ok &= attention < limit and (min(by_state) > 10 if precision == "u4" else max(by_state) < limit)
for name, x in (("k", k), ("v", v)):
    codes = state[f"past {name}"].reshape(1, HEADS, TOKENS, -1, 2)[..., ::-1].reshape(x.shape)
    low, high = x.min(3, keepdims=True), x.max(3, keepdims=True)
    equal = float((codes == np.round((x - low) / (high - low) * 15)).mean())
    print(f"u4, {name}: {100 * equal:.2f} % of the swapped state are min-max codes of their rows")
    ok &= equal > 0.999
sys.exit(0 if ok else 1)
PY
