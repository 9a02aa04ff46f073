#!/usr/bin/env bash
# transformers' QuantizedCache keeps the last residual_length tokens as they are and codes the rest. When those are full, it
# decodes the whole cache, appends them and codes all of it again. With the hqq back end at axis 1 that does no harm:
# decoded values fall on the same codes again. At axis 0 they do not. There a group is every n-th value of the flattened
# tensor, n being a 64th of its values, so it has other members once the cache is longer, and each flush adds about the
# error of one more quantization: at 4 and 8 bits the first tokens' squared error is 5 times as large after 4 flushes of 128
# tokens and 9 times after 8, though coding everything once at the final length costs no more than coding the prompt. Coding
# again without a change of length changes nothing. The documentation recommends axis 1 for hqq, but 0 is the default, and
# nothing warns.
# Seen with transformers 5.23.0, hqq 0.2.8.post1, torch 2.9.1 (CPU); normal values, 3 heads of 64, squared error of the first
# 320 tokens after 0, 1, 2, 4, 8 flushes over that of coding them once:
#   axis 0, the default:  8 bits 1.00 1.99 2.99 5.00 8.98;  4 bits 1.00 1.98 2.94 4.80 8.59;  2 bits 1.00 1.93 2.44 3.15 4.64
#   axis 1:  1.00 throughout
# torch's wheel for Linux is built for CUDA, whose libraries are GBs of further packages. A CPU needs nothing of them, but
# torch does not load without them: here empty libraries have their names, and one more has their functions, each of which
# gives 100, cudaErrorNoDevice (needs gcc and binutils).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
pip=("$dir/env/bin/pip" install -q --disable-pip-version-check)
DISABLE_CUDA=1 "${pip[@]}" --no-deps torch==2.9.1 hqq==0.2.8.post1
"${pip[@]}" transformers==5.23.0 numpy==2.3.5 sympy networkx jinja2 fsspec filelock typing-extensions \
  termcolor einops 2>"$dir/log" || { cat "$dir/log" >&2; exit 1; }  # else silent: it would tell what torch lacks

lib=("$dir"/env/lib/python3*/site-packages/torch/lib/*.so)
mkdir "$dir/cuda"
nm -D --undefined-only "${lib[@]}" | awk '$1 == "U" { sub(/@.*/, "", $2); print $2 }' | sort -u |
  grep -E '^(_*cu|nccl|nvrtc|nvshmem)' | sed 's/.*/long &(void) { return 100; }/' |
  gcc -shared -fPIC -o "$dir/cuda/none.so" -x c -
gcc -shared -o "$dir/cuda/empty.so" -x c /dev/null
for name in $(readelf -d "${lib[@]}" | grep -oE 'lib(cu|nccl|nv)[A-Za-z_]*\.so\.[0-9]+' | sort -u); do
  ln -s empty.so "$dir/cuda/$name"
done

LD_LIBRARY_PATH="$dir/cuda" LD_PRELOAD="$dir/cuda/none.so" "$dir/env/bin/python" - <<'PY'
import sys

import torch
from transformers import LlamaConfig, QuantizedCache

PROMPT, RESIDUAL, FLUSHES = 320, 128, 8
config = LlamaConfig(num_hidden_layers=1)


def error(keys, x):
    return float((keys[:, :, :PROMPT] - x[:, :, :PROMPT]).square().mean())


def coded(x, more, **options):
    """A cache that was given x, then `more`, and the keys it gave then: x coded once."""
    cache = QuantizedCache(config=config, **options)
    cache.update(x, x, 0)
    return cache, cache.update(more, more, 0)[0]


torch.manual_seed(0)
x = torch.randn(1, 3, PROMPT + RESIDUAL * (FLUSHES + 1), 64)
parts = x[:, :, PROMPT:].split(RESIDUAL, dim=2)  # each fills the residual, so that each update ends in a flush
ok = True
for bits, axis in ((8, None), (4, None), (2, None), (8, 1), (4, 1), (2, 1)):
    options = {"backend": "hqq", "nbits": bits, "residual_length": RESIDUAL}
    if axis is not None:
        options |= {"axis_key": axis, "axis_value": axis}
    cache, keys = coded(x[:, :, :PROMPT], parts[0], **options)
    once = error(keys, x)
    _, again = coded(keys[:, :, :PROMPT], parts[0], **options)
    same = error(again, x) / once
    at_once = error(coded(x[:, :, :-RESIDUAL], parts[-1], **options)[1], x) / once
    ratios = [1.0]
    for part in parts[1:]:  # the update gives the keys as they were before its own flush
        ratios.append(error(cache.update(part, part, 0)[0], x) / once)
    name = f"{bits} bits, axis {axis or '0 (default)'}"
    print(f"{name:22}" + "".join(f"{ratios[i]:7.3f}" for i in (0, 1, 2, 4, 8)) +
          f"   coded twice at one length {same:.3f}, all coded once at the final length {at_once:.3f}", flush=True)
    ok &= abs(same - 1) < 0.01 and abs(at_once - 1) < 0.05
    if axis is None:
        ok &= ratios[1] > 1.8 and ratios[8] > (4 if bits == 2 else 8)
    else:
        ok &= all(abs(r - 1) < 0.01 for r in ratios)
sys.exit(0 if ok else 1)
PY
