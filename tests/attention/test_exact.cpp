#include <cmath>

#include "attention/plan_codec.h"
#include "attention/session_cpu.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

TEST_CASE("Attention over the exact cache equals a plain softmax in double", "[exact]") {
  const int group = GENERATE(1, 3, 4, 7);
  const int d = GENERATE(64, 80, 96, 128, 256);
  CacheShape shape = make_shape(1, group, 2, d);
  shape.rope.attention_factor = d == 64 ? 1.25 : 1.0;
  const int64_t n = 150;
  const Matrix<float> q = random_matrix(n, shape.q_heads * d, 1), k = random_matrix(n, shape.kv_heads * d, 2),
                      v = random_matrix(n, shape.kv_heads * d, 3);
  CompressedCache cache(shape, CachePolicy::exact(DType::kF32));
  const auto backend = make_attention_backend("cpu-reconstruct");
  KvSessionCpu session(cache, *backend);
  Matrix<float> out(n, shape.q_heads * d);
  session.begin_block(n);
  session.attend(0, q, k, v, out);
  session.end_block();
  CHECK(cache.length() == n);

  const RopeTable rope(shape.rope);
  Matrix<float> qr = q, kr = k;
  std::vector<int32_t> positions;
  for (int i = 0; i < n; ++i) positions.push_back(i);
  rope_apply(rope, positions.data(), qr);
  rope_apply(rope, positions.data(), kr);
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int h = 0; h < shape.q_heads; ++h) {
      const int kv = h / group;
      std::vector<double> p;
      double sum = 0;
      for (int64_t t = 0; t <= i; ++t) {
        double s = 0;
        for (int c = 0; c < d; ++c) s += static_cast<double>(qr(i, h * d + c)) * kr(t, kv * d + c);
        p.push_back(std::exp(s * shape.score_scale));
        sum += p.back();
      }
      for (int c = 0; c < d; ++c) {
        double o = 0;
        for (int64_t t = 0; t <= i; ++t) o += p[static_cast<size_t>(t)] / sum * v(t, kv * d + c);
        worst = std::max(worst, std::abs(o - out(i, h * d + c)));
      }
    }
  }
  CHECK(worst < 2e-5);
}

TEST_CASE("Blocks of any size give the bits of single steps", "[exact]") {
  const CacheShape shape = make_shape(2, 3, 3, 64);
  const int64_t n = 300;
  const Matrix<float> q = random_matrix(n, shape.q_heads * 64, 4), k = random_matrix(n, shape.kv_heads * 64, 5),
                      v = random_matrix(n, shape.kv_heads * 64, 6);
  const auto run = [&](int64_t block) {
    CountingResource memory;
    Matrix<float> out(n, shape.q_heads * 64);
    {
      CompressedCache cache(shape, CachePolicy::exact(), &memory);
      const auto backend = make_attention_backend("cpu-reconstruct");
      KvSessionCpu session(cache, *backend);
      for (int64_t t = 0; t < n; t += block) {
        const int64_t m = std::min(block, n - t);
        session.begin_block(m);
        for (int layer = 0; layer < 2; ++layer)
          session.attend(layer, q.view().slice_rows(t, m), k.view().slice_rows(t, m), v.view().slice_rows(t, m),
                         out.view().slice_rows(t, m));
        session.end_block();
        REQUIRE(cache.bytes().total_sequence() == memory.live());
      }
    }
    REQUIRE(memory.live() == 0);
    return out.storage;
  };
  const auto steps = run(1);
  CHECK((run(64) == steps));
  CHECK((run(300) == steps));
  CHECK((run(7) == steps));
}
