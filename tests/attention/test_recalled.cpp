// Exact pairs that stand in for codes: on every path that decodes rows, for the tokens and heads that they are of.
#include "attention/plan_codec.h"
#include "attention/session_cpu.h"
#include "cache/recalled.h"
#include "support/codec_rows.h"
#include "support/error_of.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

constexpr int64_t kHeld = 300;

// Tokens [from, to) of which every `step`-th is recalled, of one head more than of the other.
RecalledPairs pairs_of(const CompressedCache& exact, int64_t from, int64_t to, int64_t step) {
  const CacheShape& shape = exact.shape();
  RecalledPairs out{shape.kv_heads, {}};
  for (int layer = 0; layer < shape.layers; ++layer)
    for (int h = 0; h < shape.kv_heads; ++h) {
      RecalledPairs::Head& head = out.heads.emplace_back();
      for (int64_t t = from; t < to; t += step + (step > 1) * h) head.positions.push_back(static_cast<int32_t>(t));
      head.k = head.v = Matrix<float>(std::ssize(head.positions), shape.head_dim);
      for (int64_t i = 0; i < head.k.rows; ++i) {
        const CacheView view(exact);
        view.load_keys(layer, h, head.positions[static_cast<size_t>(i)], 1, head.k.row(i), 1);
        view.load_values(layer, h, head.positions[static_cast<size_t>(i)], 1, head.v.row(i), shape.head_dim);
      }
    }
  return out;
}

Matrix<float> attend(CompressedCache& cache, const std::string& attention, const Tokens& x, int64_t first, int64_t n) {
  const auto backend = make_attention_backend(attention);
  KvSessionCpu kv(cache, *backend);
  const auto rows = [&](const Matrix<float>& m) { return m.view().slice_rows(first, n); };
  Matrix<float> out(n, x.q.cols * cache.shape().layers);
  kv.begin_block(n);
  for (int layer = 0; layer < cache.shape().layers; ++layer)
    kv.attend(layer, rows(x.q), rows(x.k), rows(x.v), out.view().slice_cols(layer * x.q.cols, x.q.cols));
  kv.end_block();
  return out;
}

}  // namespace

TEST_CASE("recalled pairs stand in for codes, and all of them make the exact cache", "[recalled]") {
  const CacheShape shape = make_shape(2, 3, 2, 16);
  const Tokens x(shape, 400, 3, true);
  const auto codes = make_set(shape, 1, [&](Role role, int) -> std::shared_ptr<Codec> {
    return find_method("kivi").make({{"bits", 1}, {"group", 16}}, unit_of(16, 1, role));
  });
  const CachePolicy policy = policy_of(3, {33, 16}, {50, 32});
  const auto exact = [&](int64_t n, const std::string& attention) {
    CompressedCache cache(shape, CachePolicy::exact());
    attend(cache, "cpu-reconstruct", x, 0, kHeld);
    return std::pair(attend(cache, attention, x, kHeld, n), pairs_of(cache, 0, kHeld, 1));
  };
  for (const int64_t n : {1, 40})  // a step, and a block that spans a flush of each role
    for (const std::string attention : {"reference", "cpu-reconstruct", "auto"}) {
      CAPTURE(n, attention);
      const auto [wanted, all] = exact(n, attention);
      const auto with = [&](const RecalledPairs* pairs, const std::string& by) {
        CompressedCache cache(codes, policy);
        attend(cache, "cpu-reconstruct", x, 0, kHeld);
        cache.recall(pairs);
        return attend(cache, by, x, kHeld, n);
      };
      CompressedCache far(shape, CachePolicy::exact());
      attend(far, "cpu-reconstruct", x, 0, kHeld + n);
      const RecalledPairs everything = pairs_of(far, 0, kHeld + n, 1), some = pairs_of(far, 5, 200, 7);
      CHECK(with(&everything, attention).storage == wanted.storage);
      if (n == 1) CHECK(with(&all, attention).storage == wanted.storage);
      const Matrix<float> few = with(&some, attention), judge = with(&some, "reference"),
                          none = with(nullptr, attention);
      CHECK(relative_error(few, judge) < 1e-10);
      CHECK(relative_error(few, none) > 1e-4);
    }
}

TEST_CASE("paths that score keys by their codes see no pairs, and say so", "[recalled]") {
  const CacheShape shape = make_shape(1, 1, 1, 16);
  const Tokens x(shape, 200, 5);
  const auto tables = make_set(shape, 1, [](Role, int channels) {
    DecodePlan p = empty_plan(channels);
    add_table(p, 4, 4);
    return std::make_shared<PlanCodec>(p);
  });
  CompressedCache cache(tables, policy_of(0, {8, 8}, {8, 8})), far(shape, CachePolicy::exact());
  attend(cache, "cpu-reconstruct", x, 0, 100);
  attend(far, "cpu-reconstruct", x, 0, 100);
  const RecalledPairs pairs = pairs_of(far, 0, 50, 2);
  cache.recall(&pairs);
  check_says(error_of([&] { attend(cache, "cpu-table", x, 100, 1); }, ErrorKind::kUnavailable),
             {"cpu-table", "far tier", "cpu-reconstruct"});
}
