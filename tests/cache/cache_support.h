// Policies, tokens and ledgers for the tests of caches.
#pragma once
#include "attention/plan_codec.h"
#include "core/json.h"

namespace vqkv::test {

inline void feed(CompressedCache& cache, const Tokens& x, int64_t first, int64_t n,
                 Visibility visibility = Visibility::kReplay) {
  cache.begin_block(n, visibility);
  for (int layer = 0; layer < cache.shape().layers; ++layer)
    cache.append(layer, x.k.view().slice_rows(first, n), x.v.view().slice_rows(first, n),
                 x.q.view().slice_rows(first, n));
  cache.end_block();
}

// `policy` of a text whose first `tokens` are a prompt.
inline CachePolicy with_prompt(CachePolicy policy, int64_t tokens, bool codes_generated = true) {
  policy.prompt = tokens;
  policy.codes_generated = codes_generated;
  return policy;
}

inline bool same(const ByteLedger& a, const ByteLedger& b) {
  return canonical_json(a.to_json()) == canonical_json(b.to_json());
}

}  // namespace vqkv::test
