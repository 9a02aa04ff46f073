// What a model does to rows between its products, on a device, beside the same in double.
#include <cmath>
#include <span>

#include "core/dtype.h"
#include "core/rng.h"
#include "core/rope.h"
#include "model/llama_rows.h"
#include "support/catch.h"
#include "support/device.h"

using namespace vqkv;
using device::Buffer;

namespace {

std::vector<float> normals(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> out(n);
  for (float& v : out) v = static_cast<float>(rng.normal());
  return out;
}

template <class T>
Buffer<T> on_device(const std::vector<T>& v, const char* name) {
  return Buffer<T>(std::span<const T>(v), name);
}

// bf16 bits nearest to v, or as near as fp32's rounding before lets them be: half a unit of 8 bits and a little.
void check_bf16(uint16_t bits, double v) {
  REQUIRE(std::abs(double{to_float(bf16{bits})} - v) <= std::max(std::abs(v), 1e-30) * 0x1p-8 * 1.0001);
}

}  // namespace

TEST_CASE("rows of an embedding", "[kernel][rows]") {
  const int cols = 100;
  std::vector<uint16_t> table;
  for (const float v : normals(7 * cols, 1)) table.push_back(to_bf16(v).bits);
  const std::vector<int32_t> tokens{6, 0, 3};
  const auto t = on_device(table, "table");
  const auto ids = on_device(tokens, "tokens");
  in_every_order([&] {
    Buffer<float> x(3 * cols, "x");
    embed_rows(ids.data(), t.data(), 3, cols, x.data());
    const std::vector<float> found = x.values();
    for (size_t r = 0; r < 3; ++r)
      for (size_t c = 0; c < cols; ++c)
        REQUIRE(found[r * cols + c] == to_float(bf16{table[static_cast<size_t>(tokens[r]) * cols + c]}));
  });
}

TEST_CASE("RMS norm and SwiGLU round once, to bf16", "[kernel][rows]") {
  const int rows = 3, cols = 580;
  const std::vector<float> x = normals(rows * cols, 2), w = normals(cols, 3), wide = normals(rows * 2 * cols, 4);
  const auto dx = on_device(x, "x"), dw = on_device(w, "w"), dwide = on_device(wide, "gate and up");
  in_every_order([&] {
    Buffer<uint16_t> normed(rows * cols, "normed"), gated(rows * cols, "gated");
    norm_rows_bf16(dx.data(), dw.data(), 1e-5f, rows, cols, normed.data());
    swiglu_rows_bf16(dwide.data(), rows, cols, gated.data());
    const std::vector<uint16_t> n = normed.values(), g = gated.values();
    for (size_t r = 0; r < rows; ++r) {
      double squares = 0;
      for (size_t c = 0; c < cols; ++c) squares += double{x[r * cols + c]} * double{x[r * cols + c]};
      const double factor = 1 / std::sqrt(squares / cols + 1e-5);
      for (size_t c = 0; c < cols; ++c) {
        check_bf16(n[r * cols + c], double{x[r * cols + c]} * factor * double{w[c]});
        const double gate = wide[r * 2 * cols + c], up = wide[(r * 2 + 1) * cols + c];
        check_bf16(g[r * cols + c], gate / (1 + std::exp(-gate)) * up);
      }
    }
  });
}

TEST_CASE("queries, keys and values are biased, normed, rotated and put into their pages", "[kernel][rows]") {
  struct Shape {
    int q_heads, kv_heads, head_dim, rotary_dim;
    bool bias, norm;
  };
  for (const Shape& s : {Shape{3, 1, 64, 64, false, false}, Shape{4, 2, 96, 48, true, true}}) {
    CAPTURE(s.head_dim, s.bias);
    const int rows = 5, heads = s.q_heads + 2 * s.kv_heads, page_tokens = 4, pages = 4, d = s.head_dim;
    const auto row = static_cast<size_t>(heads * d);
    const std::vector<float> qkv = normals(rows * row, 5), bias = normals(row, 6),
                             q_norm = normals(static_cast<size_t>(d), 7), k_norm = normals(static_cast<size_t>(d), 8);
    const std::vector<int32_t> table{2, 0, 3, 1}, sequence{0, 0, 1, 1, 1},
        position{3, 4, 0, 5, 6};  // 2 pages a sequence
    const RopeTable rope(RopeFacts::plain(d, s.rotary_dim, 10000));
    std::vector<float> rotation;
    for (const int32_t p : position) rotation.insert(rotation.end(), rope.row(p), rope.row(p) + s.rotary_dim);

    // The same on the host: in place, then rotated by the function that everything else uses.
    std::vector<double> expected(qkv.begin(), qkv.end());
    for (size_t r = 0; r < rows; ++r)
      for (int h = 0; h < heads; ++h) {
        double* x = expected.data() + r * row + static_cast<size_t>(h * d);
        double squares = 0;
        for (int c = 0; c < d; ++c) {
          if (s.bias) x[c] += double{bias[static_cast<size_t>(h * d + c)]};
          squares += x[c] * x[c];
        }
        const std::vector<float>& norm = h < s.q_heads ? q_norm : k_norm;
        for (int c = 0; c < d && s.norm && h < s.q_heads + s.kv_heads; ++c)
          x[c] *= double{norm[static_cast<size_t>(c)]} / std::sqrt(squares / d + 1e-6);
      }
    std::vector<float> turned(expected.begin(), expected.end());
    const int rotates = (s.q_heads + s.kv_heads) * d;
    for (size_t r = 0; r < rows; ++r)
      rope_apply(rope, position.data() + r, MutMatrix(turned.data() + r * row, 1, rotates));

    const auto bias_on = on_device(bias, "bias"), q_norm_on = on_device(q_norm, "q norm"),
               k_norm_on = on_device(k_norm, "k norm"), rotation_on = on_device(rotation, "rotation");
    const auto table_on = on_device(table, "page table"), sequence_on = on_device(sequence, "sequence"),
               position_on = on_device(position, "position");
    in_every_order([&] {
      auto x = on_device(qkv, "qkv");
      Buffer<float> queries(static_cast<size_t>(rows * s.q_heads * d), "queries");
      const auto page = static_cast<size_t>(s.kv_heads * page_tokens * d);
      Buffer<uint16_t> keys(pages * page, "keys"), values(pages * page, "values");
      keys.zero();
      values.zero();
      QkvRows call;
      call.qkv = x.data();
      call.bias = s.bias ? bias_on.data() : nullptr;
      call.q_norm = s.norm ? q_norm_on.data() : nullptr;
      call.k_norm = s.norm ? k_norm_on.data() : nullptr;
      call.norm_eps = 1e-6f;
      call.rotation = rotation_on.data();
      call.rows = rows;
      call.q_heads = s.q_heads;
      call.kv_heads = s.kv_heads;
      call.head_dim = d;
      call.rotary_dim = s.rotary_dim;
      call.query_scale = 0.25f;
      call.queries = queries.data();
      call.keys = keys.data();
      call.values = values.data();
      call.page_table = table_on.data();
      call.sequence = sequence_on.data();
      call.place = position_on.data();
      call.most_pages = 2;
      call.page_tokens = page_tokens;
      place_qkv_rows(call);
      const std::vector<float> seen = x.values(), q = queries.values();
      const std::vector<uint16_t> k = keys.values(), v = values.values();
      for (size_t i = 0; i < seen.size(); ++i) REQUIRE(std::abs(double{seen[i]} - expected[i]) < 1e-5);
      size_t written = 0;
      for (size_t r = 0; r < rows; ++r) {
        for (int c = 0; c < s.q_heads * d; ++c)
          REQUIRE(std::abs(q[r * static_cast<size_t>(s.q_heads * d) + static_cast<size_t>(c)] -
                           0.25f * turned[r * row + static_cast<size_t>(c)]) < 1e-5);
        const int at = table[static_cast<size_t>(sequence[r] * 2 + position[r] / page_tokens)];
        for (int h = 0; h < s.kv_heads; ++h)
          for (int c = 0; c < d; ++c) {
            const auto place =
                static_cast<size_t>(((at * s.kv_heads + h) * page_tokens + position[r] % page_tokens) * d + c);
            check_bf16(k[place], turned[r * row + static_cast<size_t>((s.q_heads + h) * d + c)]);
            check_bf16(v[place], turned[r * row + static_cast<size_t>((s.q_heads + s.kv_heads + h) * d + c)]);
            written += k[place] != 0;
          }
      }
      size_t nonzero = 0;
      for (const uint16_t bits : k) nonzero += bits != 0;
      CHECK(nonzero == written);  // nothing else was touched
    });
  }
}

TEST_CASE("the likeliest token is the first of the largest logits, and a bias is added to each row", "[kernel][rows]") {
  const int vocab = 1000;
  std::vector<float> logits = normals(3 * vocab, 9);
  logits[137] = logits[801] = logits[140] = 9.0f;
  logits[vocab + 999] = 10.0f;
  for (size_t c = 0; c < vocab; ++c) logits[2 * vocab + c] = -INFINITY;
  const std::vector<float> bias = normals(vocab, 10);
  const auto on = on_device(logits, "logits"), bias_on = on_device(bias, "bias");
  in_every_order([&] {
    Buffer<int32_t> tokens(3, "tokens");
    most_likely_rows(on.data(), 3, vocab, tokens.data());
    CHECK(tokens.values() == std::vector<int32_t>{137, 999, 0});
    auto x = on_device(logits, "x");
    add_bias_rows(x.data(), bias_on.data(), 2, vocab);
    const std::vector<float> found = x.values();
    for (size_t i = 0; i < found.size(); ++i) {
      const float added = i < 2 * vocab ? logits[i] + bias[i % vocab] : logits[i];
      REQUIRE(found[i] == added);
    }
  });
}
