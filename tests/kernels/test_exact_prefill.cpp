// Prompts on a device's tensor cores. Lattice data make every intermediate exact, weights included, so that any mistake
// is another number; random data stay within the rounding of weights to bf16.
#include <algorithm>
#include <cmath>
#include <span>

#include "attention/exact_prefill.h"
#include "core/rng.h"
#include "kernels/exact_pages.h"
#include "kernels/reference_attention.h"
#include "support/catch.h"
#include "support/device.h"

using namespace vqkv;
using device::Buffer;

namespace {

struct Part {
  int tokens, held;
};

struct Prompts {
  int kv_heads, group, head_dim;
  std::vector<Part> parts;       // one a sequence
  std::vector<int32_t> lengths;  // of the sequences, behind their blocks
  std::vector<float> queries, rows[2];
  int longest = 0, query_rows = 0;

  Prompts(int heads, int of_group, int dim, std::vector<Part> of, bool lattice)
      : kv_heads(heads), group(of_group), head_dim(dim), parts(std::move(of)) {
    for (const Part& p : parts) {
      lengths.push_back(p.held + p.tokens);
      longest = std::max(longest, p.held + p.tokens);
      query_rows += p.tokens;
    }
    Rng rng(11);
    const auto bf16 = [](double v) { return to_float(to_bf16(static_cast<float>(v))); };
    const auto below = [&](uint64_t n) { return static_cast<int>(rng.below(n)); };
    queries.resize(static_cast<size_t>(query_rows * kv_heads * group * head_dim));
    for (float& v : queries) v = lattice ? float(below(3) - 1) : bf16(rng.normal() * 1.4427 / std::sqrt(dim));
    for (int role = 0; role < 2; ++role) {
      rows[role].resize(parts.size() * static_cast<size_t>(kv_heads * longest * head_dim));
      for (float& v : rows[role])
        v = !lattice ? bf16(rng.normal()) : role == 1 ? float(below(17) - 8) : below(16) ? 0.0f : float(below(3) - 1);
    }
  }

  const float* row(int role, int sequence, int head, int token) const {
    return rows[role].data() + static_cast<size_t>(((sequence * kv_heads + head) * longest + token) * head_dim);
  }

  // call(query's row of all heads, sequence, KV head, tokens that it sees) of every query.
  template <class Call>
  void each_query(Call call) const {
    int first = 0;
    for (size_t s = 0; s < parts.size(); first += parts[s++].tokens)
      for (int t = 0; t < parts[s].tokens; ++t)
        for (int h = 0; h < kv_heads; ++h)
          for (int g = 0; g < group; ++g)
            call(static_cast<size_t>((((first + t) * kv_heads + h) * group + g) * head_dim), static_cast<int>(s), h,
                 parts[s].held + t + 1);
  }

  std::vector<float> expected() const {
    std::vector<float> out(queries.size());
    each_query([&](size_t at, int s, int h, int seen) {
      reference_attention(
          queries.data() + at, seen, head_dim, [&](int t, int c) { return row(0, s, h, t)[c]; },
          [&](int t, int c) { return row(1, s, h, t)[c]; }, out.data() + at);
    });
    return out;
  }

  std::vector<float> run(DType rows_as = DType::kBF16) const {
    const ExactPages pages(
        kv_heads, head_dim, lengths,
        [&](int role, int s, int h, int t, int c) { return double{row(role, s, h, t)[c]}; }, rows_as, longest);
    std::vector<PrefillBlock> blocks;
    ExactPrefill call;
    int first = 0;
    for (size_t s = 0; s < parts.size(); first += parts[s++].tokens) {
      blocks.push_back({first, parts[s].tokens, parts[s].held, static_cast<int32_t>(s)});
      call.longest = std::max(call.longest, parts[s].tokens);
    }
    const Buffer<float> query(std::span<const float>(queries), "queries");
    const Buffer<PrefillBlock> of(std::span<const PrefillBlock>(blocks), "blocks");
    Buffer<float> out(queries.size(), "out");
    call.queries = query.data();
    call.keys = pages.view().keys;
    call.values = pages.view().values;
    call.page_table = pages.view().page_table;
    call.of_block = of.data();
    call.out = out.data();
    call.blocks = static_cast<int>(parts.size());
    call.kv_heads = kv_heads;
    call.group = group;
    call.head_dim = head_dim;
    call.most_pages = pages.most_pages;
    call.f16 = rows_as == DType::kF16;
    exact_prefill(call);
    return out.values();
  }
};

}  // namespace

TEST_CASE("prompts over exact rows are exact on lattice data, in every order", "[kernel][prefill]") {
  struct Shape {
    int kv_heads, group, head_dim;
    std::vector<Part> parts;
  };
  for (const Shape& s : std::initializer_list<Shape>{{1, 4, 128, {{40, 0}}},
                                                     {2, 3, 64, {{70, 0}, {1, 0}, {5, 130}}},
                                                     {1, 1, 64, {{130, 62}}},
                                                     {1, 8, 80, {{9, 60}}},
                                                     {1, 7, 96, {{19, 45}}},
                                                     {1, 5, 32, {{33, 31}}},
                                                     {2, 2, 16, {{64, 64}}},
                                                     {2, 2, 8, {{20, 3}}},
                                                     {1, 6, 8, {{1, 95}}}}) {
    CAPTURE(s.group, s.head_dim);
    const Prompts data(s.kv_heads, s.group, s.head_dim, s.parts, true);
    const std::vector<float> expected = data.expected();
    in_every_order([&] { CHECK(data.run() == expected); });
    CHECK(data.run(DType::kF16) == expected);
  }
}

TEST_CASE("prompts over exact rows are within the rounding of weights on random data", "[kernel][prefill]") {
  const Prompts data(2, 4, 128, {{70, 90}}, false);
  const std::vector<float> expected = data.expected(), found = data.run();
  std::vector<float> size(expected.size());  // what values weigh, without their signs
  data.each_query([&](size_t at, int s, int h, int seen) {
    reference_attention(
        data.queries.data() + at, seen, data.head_dim, [&](int t, int c) { return data.row(0, s, h, t)[c]; },
        [&](int t, int c) { return std::abs(data.row(1, s, h, t)[c]); }, size.data() + at);
  });
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i)
    worst = std::max(worst, std::abs(double{found[i]} - double{expected[i]}) / double{size[i]});
  // Each weight is off by half a unit of bf16's eight bits at most.
  CHECK(worst < 0x1p-9 + 1e-6);
}

TEST_CASE("prompts on exact rows read shared memory in the fewest passes", "[kernel][traffic]") {
  const Prompts data(1, 4, 128, {{40, 30}}, false);
  const auto t = shared_traffic_of([&] { data.run(); });
  if (!t) return;
  CHECK(t->fewest_read > 0);
  CHECK(t->read == t->fewest_read);
}
