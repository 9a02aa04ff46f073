// Decode attention on product codes on a device. Lattice data make every intermediate exact in the half precision that
// the kernel keeps tables, weights and a tile's sums in.
#include <algorithm>
#include <cmath>
#include <span>

#include "attention/pq_decode.h"
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

struct PqCase {
  int books, width, sequences, kv_heads, group;
  std::vector<int32_t> lengths;
  int most_tiles;
  int dim() const { return books * width; }
  std::vector<float> queries, key_books, value_books;  // books: (kv_heads, books, entries, width)
  std::vector<uint8_t> key_codes, value_codes;         // (sequences, kv_heads, most_tiles * 32, books)
  std::vector<int32_t> exact;                          // tokens that are exact beside the coded ones; empty: none
  std::vector<float> exact_keys, exact_values;         // (sequences, kv_heads, kMostExact, dim)

  PqCase(int books_, int width_, int sequences_, int kv_heads_, int group_, std::vector<int32_t> lengths_, bool lattice,
         uint64_t seed)
      : books(books_),
        width(width_),
        sequences(sequences_),
        kv_heads(kv_heads_),
        group(group_),
        lengths(std::move(lengths_)),
        most_tiles((*std::max_element(lengths.begin(), lengths.end()) + kPqTile - 1) / kPqTile) {
    Rng rng(seed);
    const size_t words = static_cast<size_t>(kv_heads * dim()) * kPqEntries;
    const size_t codes = static_cast<size_t>(sequences * kv_heads * most_tiles) * kPqTile * static_cast<size_t>(books);
    queries.resize(static_cast<size_t>(sequences * kv_heads * group * dim()));
    key_books.resize(words);
    value_books.resize(words);
    const auto sign = [&] { return static_cast<float>(rng.below(2)) * 2 - 1; };
    const auto normal = [&] { return to_float(to_f16(static_cast<float>(rng.normal()))); };
    for (float& x : queries)
      x = lattice ? (rng.below(4) ? 0.0f : sign()) : normal() * 1.4427f / std::sqrt(static_cast<float>(dim()));
    for (float& x : key_books) x = lattice ? (rng.below(240) ? 0.0f : sign()) : normal();
    for (float& x : value_books) x = lattice ? static_cast<float>(rng.below(5)) - 2 : normal();
    for (auto* all : {&key_codes, &value_codes}) {
      all->resize(codes);
      for (uint8_t& c : *all) c = static_cast<uint8_t>(rng.below(256));
    }
  }

  size_t code_at(int s, int h, int t, int b) const {
    return static_cast<size_t>(((s * kv_heads + h) * most_tiles * kPqTile + t) * books + b);
  }
  size_t word_at(int h, int b, int code) const {
    return static_cast<size_t>(((h * books + b) * kPqEntries + code) * width);
  }

  // The same queries over exact tokens, too.
  PqCase with_exact(std::vector<int32_t> tokens, bool lattice) const {
    PqCase out = *this;
    out.exact = std::move(tokens);
    Rng rng(11);
    const auto sign = [&] { return static_cast<float>(rng.below(2)) * 2 - 1; };
    for (auto* rows : {&out.exact_keys, &out.exact_values}) {
      rows->resize(static_cast<size_t>(sequences * kv_heads * kMostExact * dim()));
      for (float& x : *rows)
        x = !lattice                  ? to_float(to_f16(static_cast<float>(rng.normal())))
            : rows == &out.exact_keys ? (rng.below(240) ? 0.0f : sign())
                                      : static_cast<float>(rng.below(5)) - 2;
    }
    return out;
  }
  // The key (0) or value (1) of a coded token, then of the exact ones.
  double number(int role, int s, int h, int t, int c) const {
    const int n = lengths[static_cast<size_t>(s)];
    if (t >= n)
      return (role ? exact_values
                   : exact_keys)[static_cast<size_t>(((s * kv_heads + h) * kMostExact + t - n) * dim() + c)];
    const uint8_t code = (role ? value_codes : key_codes)[code_at(s, h, t, c / width)];
    return (role ? value_books : key_books)[word_at(h, c / width, code) + static_cast<size_t>(c % width)];
  }

  // `spread`: of scores of one query, at most.
  std::vector<float> expected(double* spread) const {
    std::vector<float> out(queries.size());
    *spread = 0;
    for (int s = 0; s < sequences; ++s)
      for (int h = 0; h < kv_heads; ++h)
        for (int g = 0; g < group; ++g) {
          const auto q = static_cast<size_t>(((s * kv_heads + h) * group + g) * dim());
          *spread = std::max(
              *spread, reference_attention(
                           queries.data() + q,
                           lengths[static_cast<size_t>(s)] + (exact.empty() ? 0 : exact[static_cast<size_t>(s)]), dim(),
                           [&](int t, int c) { return number(0, s, h, t, c); },
                           [&](int t, int c) { return number(1, s, h, t, c); }, out.data() + q));
        }
    return out;
  }

  std::vector<float> run(int splits) const {
    const auto f16s = [](const std::vector<float>& v) {
      std::vector<uint16_t> out(v.size());
      for (size_t i = 0; i < v.size(); ++i) out[i] = to_f16(v[i]).bits;
      return out;
    };
    const std::vector<uint16_t> keys = f16s(key_books), values = f16s(value_books);
    std::vector<uint16_t> slots(values.size());
    for (int h = 0; h < kv_heads; ++h)
      for (int b = 0; b < books; ++b)
        for (int e = 0; e < kPqEntries; ++e)
          std::copy_n(values.data() + word_at(h, b, e), width,
                      slots.data() + (h * books * kPqEntries + pq_value_slot(width, b, e)) * width);
    // Tiles lie in no order; tokens beyond a length are coded as whatever.
    const int tiles = sequences * most_tiles;
    std::vector<int32_t> table(static_cast<size_t>(tiles));
    for (int i = 0; i < tiles; ++i) table[static_cast<size_t>(i)] = tiles - 1 - i;
    std::vector<uint8_t> packed[2];
    for (int role = 0; role < 2; ++role) {
      packed[role].resize(key_codes.size());
      for (int s = 0; s < sequences; ++s)
        for (int h = 0; h < kv_heads; ++h)
          for (int t = 0; t < most_tiles * kPqTile; ++t)
            for (int b = 0; b < books; ++b) {
              const int tile = table[static_cast<size_t>(s * most_tiles + t / kPqTile)];
              packed[role][static_cast<size_t>((tile * kv_heads + h) * kPqTile * books +
                                               pq_code_place(books, t % kPqTile, b))] =
                  (role ? value_codes : key_codes)[code_at(s, h, t, b)];
            }
    }
    const Buffer<float> query(std::span<const float>(queries), "queries");
    const Buffer<uint16_t> k_books(std::span<const uint16_t>(keys), "key books");
    const Buffer<uint16_t> v_books(std::span<const uint16_t>(slots), "value books");
    const Buffer<uint8_t> k_codes(std::span<const uint8_t>(packed[0]), "key codes");
    const Buffer<uint8_t> v_codes(std::span<const uint8_t>(packed[1]), "value codes");
    const Buffer<int32_t> tile_table(std::span<const int32_t>(table), "tile table");
    const Buffer<int32_t> tokens(std::span<const int32_t>(lengths), "lengths");
    Buffer<float> out(queries.size(), "out");
    PqDecoder decode(sequences, kv_heads, group, books, width, splits);
    PqDecode call{query.data(),  k_books.data(), v_books.data(), k_codes.data(), v_codes.data(), tile_table.data(),
                  tokens.data(), out.data(),     sequences,      kv_heads,       group,          most_tiles};
    const ExactPages pages(kv_heads, dim(), exact, [&](int role, int s, int h, int t, int c) {
      return number(role, s, h, lengths[static_cast<size_t>(s)] + t, c);
    });
    call.exact = pages.view();
    decode(call);
    decode(call);  // arrivals are as they were
    return out.values();
  }
};

}  // namespace

TEST_CASE("decode on product codes is exact on lattice data, in every order and split", "[kernel][pq]") {
  for (const auto& [data, splits] :
       {std::pair{PqCase(32, 4, 2, 1, 4, {100, 0}, true, 8).with_exact({70, 5}, true), 3},
        std::pair{PqCase(16, 8, 1, 2, 3, {33}, true, 9).with_exact({65}, true), 1},
        std::pair{PqCase(16, 4, 2, 1, 3, {1, 64}, true, 10).with_exact({128, 0}, true), 2},
        std::pair{PqCase(32, 4, 2, 1, 4, {270, 33}, true, 1), 3}, std::pair{PqCase(32, 4, 1, 2, 3, {31}, true, 2), 1},
        std::pair{PqCase(32, 4, 1, 1, 1, {64}, true, 3), 5}, std::pair{PqCase(32, 4, 3, 1, 2, {1, 32, 65}, true, 4), 2},
        std::pair{PqCase(16, 8, 2, 2, 4, {270, 33}, true, 5), 2}, std::pair{PqCase(16, 8, 1, 1, 3, {31}, true, 6), 1},
        std::pair{PqCase(16, 4, 2, 1, 3, {100, 7}, true, 7), 3}}) {
    CAPTURE(data.group, data.lengths, splits);
    double spread = 0;
    const std::vector<float> expected = data.expected(&spread);
    REQUIRE(spread > 0);
    REQUIRE(spread <= 4);  // sums of a tile keep within 11 bits
    in_every_order([&, &d = data, n = splits] { CHECK(d.run(n) == expected); });
  }
}

TEST_CASE("decode on product codes is within half's rounding on random data", "[kernel][pq]") {
  const auto [books, width] = GENERATE(std::pair{32, 4}, std::pair{16, 8}, std::pair{16, 4});
  CAPTURE(books, width);
  const PqCase data = PqCase(books, width, 2, 1, 4, {250, 100}, false, 5).with_exact({40, 0}, false);
  double spread = 0, worst = 0, size = 0;
  const std::vector<float> expected = data.expected(&spread), found = data.run(2);
  for (size_t i = 0; i < expected.size(); ++i) {
    worst = std::max(worst, std::abs(double{found[i]} - double{expected[i]}));
    size += double{expected[i]} * double{expected[i]};
  }
  CAPTURE(worst, std::sqrt(size / static_cast<double>(expected.size())));
  CHECK(worst < 1e-3);
}

TEST_CASE("product codes without a kernel are refused with those that have one", "[kernel][pq]") {
  check_says(error_of([] { PqDecoder(1, 1, 5, 32, 4, 1); }), {"5 query heads", "up to 4"});
  check_says(error_of([] { PqDecoder(1, 1, 4, 8, 16, 1); }), {"8 books of 16", "32 of 4, 16 of 8 and 16 of 4"});
}

TEST_CASE("decode on product codes reads shared memory in the fewest passes", "[kernel][traffic]") {
  const auto [books, width] = GENERATE(std::pair{32, 4}, std::pair{16, 8}, std::pair{16, 4});
  CAPTURE(books, width);
  const PqCase data(books, width, 1, 1, 4, {200}, false, 5);
  const auto t = shared_traffic_of([&] { data.run(2); });
  if (!t) return;
  CHECK(t->fewest_read > 0);
  CHECK(t->read == t->fewest_read);
  CHECK(t->written <= 4 * t->fewest_written);  // tables, filled once a block
}
