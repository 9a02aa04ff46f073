#!/usr/bin/env python3
"""A Hugging Face cache that codes keys and values with a frozen codec, so that a winner can be confirmed in one's own
evaluation. Needs torch and transformers beside NumPy and h5py; docs/python.md.

    import vqkv, vqkv_hf
    cache = vqkv_hf.CodecCache(vqkv.load("best.codec.h5"))
    model.generate(**inputs, past_key_values=cache, max_new_tokens=200)

A forward of one token attends as `vqkv-eval replay` does token by token. A forward of several (a prompt) attends to all
that is not coded yet exactly, and what the cache's rule says is coded before the next single token: replay's mode
prefill-exact. A cache serves one batch, without padding, in the order it was fed: it is made anew for the next, and beam
search and rollback are refused.
"""
import os
import sys

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from vqkv_numpy.cache import LayerCache  # noqa: E402


class CodecLayer(DynamicLayer):
    is_croppable = False

    def __init__(self, codecs, layer, changed=None):
        super().__init__()
        self.make = lambda: LayerCache(codecs, layer, changed)
        self.make()  # what can be refused is, before a model runs
        self.sequences = None

    def update(self, key_states, value_states, *args, **kwargs):
        """(batch, kv_heads, tokens, head_dim) each, keys after RoPE; what attention sees, of their type and device."""
        if self.sequences is None:
            if not self.is_initialized:
                self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.sequences = [self.make() for _ in range(key_states.shape[0])]
        if len(self.sequences) != key_states.shape[0]:
            raise ValueError(f"a batch of {key_states.shape[0]} in a cache of {len(self.sequences)} sequences")

        def rows(x):
            return x.detach().to("cpu", torch.float32).transpose(1, 2).numpy()

        def states(parts, like):
            return torch.from_numpy(np.stack(parts)).transpose(1, 2).to(like.device, like.dtype)

        seen = [s.append(k, v) for s, k, v in zip(self.sequences, rows(key_states), rows(value_states))]
        self.keys, self.values = (states([part[i] for part in seen], like)
                                  for i, like in enumerate((key_states, value_states)))
        return self.keys, self.values

    def reset(self):
        self.sequences = self.keys = self.values = None
        self.is_initialized = False

    def refuse(self, *args, **kwargs):
        raise NotImplementedError("a CodecCache is fed forwards and in one order: coded tokens cannot be taken back")

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = refuse


class CodecCache(Cache):
    """codecs: of vqkv.load; cache: keys of their `cache:` section given anew, e.g. {"window": 64}."""

    def __init__(self, codecs, cache=None):
        super().__init__(layers=[CodecLayer(codecs, layer, cache) for layer in range(codecs.shape["layers"])])
