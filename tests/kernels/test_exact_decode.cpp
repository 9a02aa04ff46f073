// Decode attention over exact rows on a device. Lattice data make every intermediate exact, so that any order
// of summing gives the same bits and any mistake another number; random data stay within the rounding of fp32.
#include <algorithm>
#include <cmath>
#include <span>

#include "attention/exact_decode.h"
#include "core/dtype.h"
#include "core/rng.h"
#include "kernels/exact_pages.h"
#include "kernels/reference_attention.h"
#include "support/catch.h"
#include "support/device.h"
#include "support/error_of.h"

using namespace vqkv;
using device::Buffer;

namespace {

struct Shape {
  int sequences, kv_heads, group, head_dim;
  std::vector<int32_t> lengths;
};

// Rows of all sequences in pages that lie in no order; what no token fills is never written.
struct ExactCase {
  Shape shape;
  std::vector<float> queries, keys, values;  // keys and values: (sequences, kv_heads, tokens of the longest, head_dim)
  int longest = 0;

  ExactCase(const Shape& s, bool lattice) : shape(s), longest(*std::max_element(s.lengths.begin(), s.lengths.end())) {
    Rng rng(7);
    const auto fill = [&](std::vector<float>& v, size_t n, auto draw) {
      v.resize(n);
      for (float& x : v) x = to_float(to_bf16(draw()));
    };
    const auto below = [&](uint64_t n) { return static_cast<int>(rng.below(n)); };
    const size_t heads = static_cast<size_t>(s.sequences) * static_cast<size_t>(s.kv_heads);
    const size_t q = heads * static_cast<size_t>(s.group) * static_cast<size_t>(s.head_dim);
    const size_t rows = heads * static_cast<size_t>(longest) * static_cast<size_t>(s.head_dim);
    if (lattice) {  // few terms a score, so that powers of two stay within 24 bits
      fill(queries, q, [&] { return static_cast<float>(below(3) - 1); });
      fill(keys, rows, [&] { return below(16) ? 0.0f : static_cast<float>(below(3) - 1); });
      fill(values, rows, [&] { return static_cast<float>(below(17) - 8); });
    } else {
      const float scale = 1.4427f / std::sqrt(static_cast<float>(s.head_dim));
      fill(queries, q, [&] { return scale * static_cast<float>(rng.normal()); });
      fill(keys, rows, [&] { return static_cast<float>(rng.normal()); });
      fill(values, rows, [&] { return static_cast<float>(rng.normal()); });
    }
  }

  size_t head_row(int sequence, int head, int token) const {
    return ((static_cast<size_t>(sequence) * static_cast<size_t>(shape.kv_heads) + static_cast<size_t>(head)) *
                static_cast<size_t>(longest) +
            static_cast<size_t>(token)) *
           static_cast<size_t>(shape.head_dim);
  }

  std::vector<float> expected() const {
    std::vector<float> out(queries.size());
    for (int s = 0; s < shape.sequences; ++s)
      for (int h = 0; h < shape.kv_heads; ++h)
        for (int g = 0; g < shape.group; ++g) {
          const auto q = static_cast<size_t>(((s * shape.kv_heads + h) * shape.group + g) * shape.head_dim);
          reference_attention(
              queries.data() + q, shape.lengths[static_cast<size_t>(s)], shape.head_dim,
              [&](int t, int c) { return keys[head_row(s, h, t) + static_cast<size_t>(c)]; },
              [&](int t, int c) { return values[head_row(s, h, t) + static_cast<size_t>(c)]; }, out.data() + q);
        }
    return out;
  }

  std::vector<float> run(int splits, DType rows_as = DType::kBF16) const {
    const Shape& s = shape;
    const ExactPages pages(
        s.kv_heads, s.head_dim, s.lengths,
        [&](int role, int q, int h, int t, int c) {
          return double{(role == 0 ? keys : values)[head_row(q, h, t) + static_cast<size_t>(c)]};
        },
        rows_as, longest);
    const Buffer<float> query(std::span<const float>(queries), "queries");
    Buffer<float> out(queries.size(), "out");
    ExactDecoder decode(s.sequences, s.kv_heads, s.group, s.head_dim, splits);
    const ExactRows rows = pages.view();
    ExactDecode call{query.data(), rows.keys,  rows.values, rows.page_table, rows.lengths,   out.data(),
                     s.sequences,  s.kv_heads, s.group,     s.head_dim,      rows.most_pages};
    call.f16 = rows_as == DType::kF16;
    decode(call);
    decode(call);  // arrivals are as they were
    return out.values();
  }
};

}  // namespace

TEST_CASE("decode over exact rows is exact on lattice data, in every order and split", "[kernel][exact]") {
  for (const auto& [shape, splits] : std::initializer_list<std::pair<Shape, int>>{{{2, 1, 4, 128, {250, 33}}, 3},
                                                                                  {{1, 2, 4, 128, {15}}, 1},
                                                                                  {{3, 1, 1, 128, {1, 16, 17}}, 2},
                                                                                  {{1, 1, 3, 64, {130}}, 2},
                                                                                  {{1, 1, 2, 64, {64}}, 5},
                                                                                  {{1, 1, 8, 64, {65}}, 2},
                                                                                  {{1, 1, 7, 80, {49}}, 2},
                                                                                  {{1, 1, 5, 96, {97}}, 2},
                                                                                  {{1, 1, 6, 128, {31}}, 1},
                                                                                  {{1, 2, 3, 16, {70}}, 2},
                                                                                  {{1, 1, 4, 32, {33}}, 1}}) {
    CAPTURE(shape.group, shape.head_dim, shape.lengths, splits);
    const ExactCase data(shape, true);
    const std::vector<float> expected = data.expected();
    in_every_order([&, n = splits] { CHECK(data.run(n) == expected); });
    CHECK(data.run(splits, DType::kF16) == expected);
  }
}

TEST_CASE("decode over exact rows is within fp32's rounding on random data", "[kernel][exact]") {
  const ExactCase data({2, 2, 4, 128, {200, 131}}, false);
  const std::vector<float> expected = data.expected(), found = data.run(3);
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i)
    worst = std::max(worst, std::abs(double{found[i]} - double{expected[i]}));
  CHECK(worst < 2e-6);
}

TEST_CASE("a head_dim without a kernel is refused with those that have one", "[kernel][exact]") {
  check_says(error_of([] { ExactDecoder(1, 1, 4, 72, 1); }), {"head_dim 72", "8, 16, 32, 64, 80, 96, 128"});
}

TEST_CASE("decode on exact rows reads shared memory in the fewest passes", "[kernel][traffic]") {
  const ExactCase data({1, 1, 4, 128, {200}}, false);
  const auto t = shared_traffic_of([&] { data.run(2); });
  if (!t) return;
  CHECK(t->fewest_read > 0);
  CHECK(t->read == t->fewest_read);
}
