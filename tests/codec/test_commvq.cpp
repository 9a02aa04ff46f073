// CommVQ's keys: the search for pairs, its training, and what the codes mean.
#include "codec/train/commvq.h"

#include <hwy/highway.h>

#include <array>
#include <cmath>
#include <complex>
#include <limits>

#include "codec/methods/table_codec.h"
#include "codec/train/binary_code.h"
#include "codec/vq_support.h"
#include "core/rope.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

using Complex = std::complex<double>;

// Pair p of a row stored as [x..., y...].
Complex pair_of(const float* row, int64_t width, int64_t p) { return {double{row[p]}, double{row[width / 2 + p]}}; }

double distance_to(const Matrix<float>& words, int64_t a, int64_t b, const float* x) {
  double sum = 0;
  for (int64_t p = 0; p < words.cols / 2; ++p)
    sum += std::norm(pair_of(x, words.cols, p) - pair_of(words.row(a), words.cols, p) -
                     Complex(0, 1) * pair_of(words.row(b), words.cols, p));
  return sum;
}

struct Scores {
  Matrix<float> turned, u, v;
  Scores(const PairSearch& search, ConstMatrix x)
      : turned(x.rows, x.cols), u(x.rows, search.stride()), v(x.rows, search.stride()) {
    search.scores(x, turned, u, v);
  }
};

// A codec of these codewords, (stages * groups, entries, width).
std::unique_ptr<Codec> with_words(const Json& knobs, const UnitShape& unit, const std::vector<int64_t>& shape,
                                  const Matrix<float>& words) {
  Archive parameters;
  parameters.tensor("codewords", shape, words.data());
  auto codec = checked("commvq", knobs, unit);
  codec->load(parameters);
  return codec;
}

Matrix<float> f16_gaussian(int64_t rows, int64_t cols, uint64_t key) {
  Matrix<float> m = gaussian(rows, cols, key);
  for (float& v : m.storage) v = round_to_f16(v);
  return m;
}

}  // namespace

// vq-methods r.9.4
TEST_CASE("the search of pairs finds the nearest of all sums on every instruction set of this machine",
          "[commvq][assign][golden]") {
  const auto targets = hwy::SupportedTargets();
  int tried = 0;
  for (int64_t rest = targets; rest != 0; rest &= rest - 1) {
    hwy::SetSupportedTargetsForTest(rest & -rest);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    ++tried;
    for (const auto [entries, width, rows] :
         {std::array<int64_t, 3>{1, 2, 3}, {2, 6, 40}, {16, 64, 40}, {17, 10, 40}, {64, 128, 30}, {100, 192, 10}}) {
      const Matrix<float> words = gaussian(entries, width, 1 + static_cast<uint64_t>(width));
      Matrix<float> x = gaussian(rows, width, 2 + static_cast<uint64_t>(width));
      const PairSearch search(words);
      // Half of the rows are sums themselves.
      std::vector<PairSearch::Pair> planted;
      for (int64_t r = 0; r < rows / 2; ++r) {
        planted.push_back({static_cast<int32_t>(r * 7 % entries), static_cast<int32_t>((3 * r + 1) % entries), 0});
        std::fill_n(x.row(r), width, 0.0f);
        search.subtract(planted.back(), x.row(r));
        for (int64_t c = 0; c < width; ++c) x(r, c) = -x(r, c);
      }
      const Scores scores(search, x);
      for (int64_t r = 0; r < rows; ++r) {
        double best = std::numeric_limits<double>::infinity(), norm = 0;
        for (int64_t a = 0; a < entries; ++a)
          for (int64_t b = 0; b < entries; ++b) best = std::min(best, distance_to(words, a, b, x.row(r)));
        for (int64_t c = 0; c < width; ++c) norm += double{x(r, c)} * x(r, c);
        const PairSearch::Pair found = search.nearest(scores.u.row(r), scores.v.row(r));
        CAPTURE(entries, width, r);
        const double tolerance = 4e-6 * static_cast<double>(width);
        REQUIRE(distance_to(words, found.a, found.b, x.row(r)) <= best + tolerance);
        REQUIRE(norm + found.score == Approx(best).margin(4 * tolerance));
        if (r < rows / 2 && entries > 1) {
          REQUIRE(found.a == planted[static_cast<size_t>(r)].a);
          REQUIRE(found.b == planted[static_cast<size_t>(r)].b);
        }
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  CHECK(tried >= 2);
}

TEST_CASE("what the search of pairs leaves out would not have been found, ties included", "[commvq][assign]") {
  for (const auto [entries, width] : {std::array<int64_t, 2>{40, 8}, {64, 64}, {9, 6}}) {
    Matrix<float> words = gaussian(entries, width, 3), x = gaussian(60, width, 4);
    for (int64_t e = entries / 2; e < entries - 1; ++e)  // every other codeword stands twice
      std::copy_n(words.row(e - entries / 2), width, words.row(e));
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t c = 0; c < width; ++c) x(r, c) *= r % 3 == 0 ? 0.1f : 2.0f;
    const PairSearch search(words);
    const Scores scores(search, x);
    const int64_t half = width / 2;
    Matrix<float> cross(entries, entries);
    for (int64_t a = 0; a < entries; ++a)
      for (int64_t b = 0; b < entries; ++b) {
        double sum = 0;
        for (int64_t i = 0; i < half; ++i)
          sum += double{words(a, half + i)} * words(b, i) - double{words(a, i)} * words(b, half + i);
        cross(a, b) = static_cast<float>(2 * sum);
      }
    PairSearch::Shares shares;
    for (int64_t r = 0; r < x.rows; ++r) {
      CAPTURE(entries, r);
      const float *u = scores.u.row(r), *v = scores.v.row(r);
      PairSearch::Pair best{0, 0, std::numeric_limits<float>::infinity()};
      for (int32_t b = 0; b < entries; ++b) {
        float low = std::numeric_limits<float>::infinity();
        int32_t at = 0;
        for (int32_t a = 0; a < entries; ++a)
          if (u[a] + cross(a, b) < low) low = u[a] + cross(a, b), at = a;
        if (low + v[b] < best.score) best = {at, b, low + v[b]};
      }
      const PairSearch::Pair found = search.nearest(u, v);
      REQUIRE(found.score == best.score);
      REQUIRE(found.a == best.a);
      REQUIRE(found.b == best.b);

      float norm = 0;
      for (int64_t c = 0; c < width; ++c) norm += x(r, c) * x(r, c);
      const float least = std::sqrt(std::max(0.0f, norm + best.score)), temperature = 0.02f,
                  farthest = least + 20 * temperature;
      search.shares(u, v, norm, least, temperature, shares);
      std::vector<std::pair<int32_t, int32_t>> expected, got;
      for (int32_t a = 0; a < entries; ++a)
        for (int32_t b0 = 0; b0 < search.stride(); b0 += PairSearch::Shares::kBlock) {
          bool any = false;
          for (int32_t b = b0; b < std::min<int64_t>(entries, b0 + PairSearch::Shares::kBlock); ++b)
            any = any || norm + (u[a] + cross(a, b) + v[b]) <= farthest * farthest * (1 + 0x1p-20f);
          if (any) expected.push_back({a, b0});
        }
      for (const auto& block : shares.blocks) got.push_back({block.a, block.b});
      REQUIRE(got == expected);
    }
  }
}

TEST_CASE("shares of pairs are exponentials of their distances, in order, without the negligible", "[commvq][assign]") {
  const Matrix<float> words = gaussian(20, 12, 1), x = gaussian(5, 12, 2);
  const PairSearch search(words);
  const Scores scores(search, x);
  PairSearch::Shares shares;
  for (int64_t r = 0; r < x.rows; ++r)
    for (const double temperature : {1.0, 0.05, 1e-6}) {
      double norm = 0;
      for (int64_t c = 0; c < x.cols; ++c) norm += double{x(r, c)} * x(r, c);
      const PairSearch::Pair nearest = search.nearest(scores.u.row(r), scores.v.row(r));
      const float least = std::sqrt(std::max(0.0f, static_cast<float>(norm) + nearest.score));
      search.shares(scores.u.row(r), scores.v.row(r), static_cast<float>(norm), least, static_cast<float>(temperature),
                    shares);
      CAPTURE(r, temperature);
      Matrix<double> p(20, 20);
      for (size_t i = 0; i < shares.blocks.size(); ++i) {
        const auto [a, b0] = shares.blocks[i];
        if (i > 0)
          REQUIRE((shares.blocks[i - 1].a < a || (shares.blocks[i - 1].a == a && shares.blocks[i - 1].b < b0)));
        for (int32_t j = 0; j < PairSearch::Shares::kBlock; ++j) {
          const float own = shares.p[i * PairSearch::Shares::kBlock + static_cast<size_t>(j)];
          if (b0 + j >= 20)
            REQUIRE(own == 0);
          else
            p(a, b0 + j) = double{own};
        }
      }
      double total = 0;
      for (int32_t a = 0; a < 20; ++a)
        for (int32_t b = 0; b < 20; ++b) {
          const double below = (std::sqrt(distance_to(words, a, b, x.row(r))) - double{least}) / temperature;
          total += p(a, b);
          if (below < 19) REQUIRE((p(a, b) > 0 || temperature < 1e-3));  // there the rounding of distances decides
          if (below > 21) REQUIRE((p(a, b) == 0 || temperature < 1e-3));
          if (temperature > 1e-3) REQUIRE(p(a, b) == Approx(std::exp(-below)).epsilon(2e-3).margin(1e-8));
        }
      REQUIRE(p(nearest.a, nearest.b) == 1);

      constexpr double kWeight = 2.5;
      Matrix<double> count = Matrix<double>(20, 20);
      std::fill(count.storage.begin(), count.storage.end(), 1.0);
      std::vector<double> rho(20, 7.0), kappa(20, 7.0);
      search.add(shares, kWeight, count.data(), count.cols, rho.data(), kappa.data());
      for (int64_t a = 0; a < 20; ++a) {
        double by_a = 0, by_b = 0;
        for (int64_t b = 0; b < 20; ++b) {
          by_a += p(a, b) * kWeight / total;
          by_b += p(b, a) * kWeight / total;
          REQUIRE(count(a, b) == Approx(1 + p(a, b) * kWeight / total).epsilon(1e-14));
        }
        REQUIRE(rho[static_cast<size_t>(a)] == Approx(by_a).epsilon(1e-12).margin(1e-300));
        REQUIRE(kappa[static_cast<size_t>(a)] == Approx(by_b).epsilon(1e-12).margin(1e-300));
      }
    }
}

TEST_CASE("the nearest pair has its share at any temperature", "[commvq][assign]") {
  // Late stages are cooled below the rounding of a distance.
  const Matrix<float> words = gaussian(20, 12, 1), x = gaussian(200, 12, 2);
  const PairSearch search(words);
  const Scores scores(search, x);
  PairSearch::Shares shares;
  Matrix<double> count(20, 20);
  std::vector<double> rho(20), kappa(20);
  for (int64_t r = 0; r < x.rows; ++r)
    for (const float temperature : {1e-6f, 1e-9f, 1e-12f}) {
      const float *u = scores.u.row(r), *v = scores.v.row(r);
      double norm = 0;
      for (int64_t c = 0; c < x.cols; ++c) norm += double{x(r, c)} * x(r, c);
      const PairSearch::Pair nearest = search.nearest(u, v);
      const float least = std::sqrt(std::max(0.0f, static_cast<float>(norm) + nearest.score));
      search.shares(u, v, static_cast<float>(norm), least, temperature, shares);
      std::fill(count.storage.begin(), count.storage.end(), 0.0);
      search.add(shares, 1, count.data(), count.cols, rho.data(), kappa.data());
      CAPTURE(r, temperature);
      REQUIRE(count(nearest.a, nearest.b) > 0.3);  // alone, or beside one or two at the same distance
    }
}

// vq-methods r.9.5: the system of complex numbers against the gradient of the least squares that it solves.
TEST_CASE("the book of a maximization is the least squares of its responsibilities", "[commvq][golden]") {
  constexpr int64_t kEntries = 6, kWidth = 10, kRows = 400;
  const Matrix<float> x = gaussian(kRows, kWidth, 3, 0.5);
  Rng rng(4);
  std::vector<std::vector<double>> p(kRows, std::vector<double>(kEntries * kEntries));
  PairSums sums(kEntries, kWidth);
  for (int64_t r = 0; r < kRows; ++r) {
    double total = 0;
    auto& own = p[static_cast<size_t>(r)];
    for (double& v : own) total += v = std::pow(rng.uniform(), 8);
    for (double& v : own) v /= total;
    for (int64_t a = 0; a < kEntries; ++a)
      for (int64_t b = 0; b < kEntries; ++b) {
        const double share = own[static_cast<size_t>(a * kEntries + b)];
        sums.count(a, b) += share;
        for (int64_t i = 0; i < kWidth / 2; ++i) {
          const Complex z = pair_of(x.row(r), kWidth, i), turned = Complex(0, -1) * z;
          sums.sum(a, i) += share * z.real();
          sums.sum(a, kWidth / 2 + i) += share * z.imag();
          sums.sum(b, i) += share * turned.real();
          sums.sum(b, kWidth / 2 + i) += share * turned.imag();
        }
      }
  }
  const Matrix<double> book = solve_pairs(sums, 0);
  const auto word = [&](int64_t a, int64_t i) { return Complex(book(a, i), book(a, kWidth / 2 + i)); };
  // The derivative by the conjugate of Z_a of sum p |Z_a + i Z_b - x|^2, of a as first code and as second.
  for (int64_t i = 0; i < kWidth / 2; ++i)
    for (int64_t code = 0; code < kEntries; ++code) {
      Complex slope = 0;
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t other = 0; other < kEntries; ++other) {
          const Complex z = pair_of(x.row(r), kWidth, i), turn(0, 1);
          slope += p[static_cast<size_t>(r)][static_cast<size_t>(code * kEntries + other)] *
                   (word(code, i) + turn * word(other, i) - z);
          slope += p[static_cast<size_t>(r)][static_cast<size_t>(other * kEntries + code)] * std::conj(turn) *
                   (word(other, i) + turn * word(code, i) - z);
        }
      CHECK(std::abs(slope) < 1e-10);
    }
}

// vq-methods r.9.3
TEST_CASE("scores follow from the codes and a table of the query, whatever the position", "[commvq][golden]") {
  UnitShape unit = unit_of(32, 2);
  unit.rope = RopePlacement::kPre;
  const Json knobs = {{"codebooks", 3}, {"bits", 3}, {"group", 64}};
  const Matrix<float> words = f16_gaussian(3 * 8, 64, 5);
  const auto codec = with_words(knobs, unit, {3, 8, 64}, words);
  CHECK(codec->plan().rope == RopePlacement::kPre);
  const RopeTable rope(RopeFacts::plain(32, 32, 10000));
  const Matrix<float> keys = gaussian(9, 64, 6);
  CodeBlock block;
  codec->encode(keys, block);
  Matrix<float> decoded(9, 64);
  codec->decode(block, decoded);
  std::vector<int32_t> position;
  for (int32_t t = 0; t < 9; ++t) position.push_back(1000 * t + 3);
  rope_apply(rope, position.data(), decoded);
  const Matrix<float> query = gaussian(1, 64, 7);
  for (int64_t t = 0; t < 9; ++t) {
    double score = 0, expected = 0;
    for (int64_t c = 0; c < 64; ++c) expected += double{query(0, c)} * decoded(t, c);
    // Pairs of both heads in one group: p of head h is element 16 h + p of a codeword, [x..., y...].
    for (int h = 0; h < 2; ++h)
      for (int p = 0; p < 16; ++p) {
        const Complex q = pair_of(query.row(0) + 32 * h, 32, p);
        Complex e = 0, f = 0;
        for (int stage = 0; stage < 3; ++stage) {
          const auto at = static_cast<size_t>(3 * t + stage);
          e += q * std::conj(pair_of(words.row(8 * stage + block.fields[0][at]), 64, 16 * h + p));
          f += q * std::conj(pair_of(words.row(8 * stage + block.fields[1][at]), 64, 16 * h + p));
        }
        const double angle = position[static_cast<size_t>(t)] * rope.facts().inverse_frequency[static_cast<size_t>(p)];
        score += std::cos(angle) * (e.real() + f.imag()) + std::sin(angle) * (e.imag() - f.real());
      }
    CHECK(score * double{block.sides[0][static_cast<size_t>(t)]} == Approx(expected).margin(2e-3));
  }
}

// vq-methods r.9.13
TEST_CASE("books that hold every vector lose nothing, in groups of one head, of several and of part of one",
          "[commvq][golden]") {
  // Lengths of 8 and values of 1/8 of them, which all types hold.
  for (const auto [head_dim, heads, group] : {std::array<int, 3>{64, 1, 64}, {32, 2, 64}, {16, 4, 32}, {64, 1, 16}}) {
    CAPTURE(head_dim, heads, group);
    const UnitShape unit = unit_of(head_dim, heads);
    const int groups = 64 / group;
    Matrix<float> x = gaussian(7, 64, 8);
    for (float& v : x.storage) v = v < 0 ? -1.0f : 1.0f;
    const std::vector<int32_t> channel = group_channels("rope_pair", unit, groups);
    Matrix<float> words(groups * 8, group);  // entry 0 stays zero; the last vector stands on the second code
    for (int g = 0; g < groups; ++g)
      for (int64_t r = 0; r < 7; ++r)
        for (int i = 0; i < group; ++i) {
          const bool second = r == 6;
          const int from = second ? (i + group / 2) % group : i;  // -i x = [y..., -x...]
          const float v = x(r, channel[static_cast<size_t>(g * group + from)]) / 8;
          words(g * 8 + 1 + r, i) = second && i >= group / 2 ? -v : v;
        }
    const auto codec = with_words({{"codebooks", 1}, {"bits", 3}, {"group", group}}, unit, {groups, 8, group}, words);
    CodeBlock block;
    CHECK(round_trip(*codec, x, &block).storage == x.storage);
    CHECK(block.sides[0] == std::vector<float>(7, 8.0f));
  }
}

TEST_CASE("commvq: published rates, one set of books for both codes", "[commvq][golden]") {
  const auto eight = unit_of(128, 8);
  const auto codec = checked("commvq", Json::object(), eight);
  CHECK(codec->layout().bits_per_token() / 1024 == 11 * 12 / 128.0 + 16 / 1024.0);
  CHECK(checked("commvq", {{"codebooks", 21}}, eight)->layout().bits_per_token() / 1024 ==
        21 * 12 / 128.0 + 16 / 1024.0);
  // Two heads of 64 make a group.
  CHECK(checked("commvq", Json::object(), unit_of(64, 8))->layout().bits_per_token() / 512 ==
        11 * 12 / 128.0 + 16 / 512.0);

  const auto small =
      trained("commvq", {{"codebooks", 2}, {"bits", 3}, {"steps", 3}}, unit_of(64, 4), gaussian(300, 256, 9));
  const DecodePlan plan = small->plan();
  REQUIRE(plan.terms.size() == 2);
  const auto &first = std::get<TableTerm>(plan.terms[0]), &second = std::get<TableTerm>(plan.terms[1]);
  CHECK(first.codewords == second.codewords);
  CHECK(first.op == TableTerm::Op::kIdentity);
  CHECK(second.op == TableTerm::Op::kRotate90);
  CHECK(first.book_of_slot == std::vector<int32_t>{0, 1, 2, 3});  // stage by stage
  CHECK(first.channel[32] == 64);                                 // pairs of the second head of a group
  CHECK(first.channel[64] == 32);                                 // partners of the first head's
  CHECK(first.channel[128] == 128);                               // the second group
  CHECK(small->constant_bytes() == 2 * 2 * 8 * 128 * 2);
  CHECK(small->levels() == 2);
  CHECK(small->level_layout(0).bits_per_token() == 2 * 2 * 3 + 16);
}

// vq-methods r.9.11
TEST_CASE("commvq: the first stages are the code of fewer stages", "[commvq][golden]") {
  const auto x = gaussian(600, 32, 10), test = gaussian(100, 32, 11);
  Json knobs = {{"codebooks", 4}, {"bits", 4}, {"group", 16}, {"steps", 4}};
  const auto whole = trained("commvq", knobs, unit_of(16, 2), x);
  double last = 2;
  for (int stages = 1; stages <= 4; ++stages) {
    knobs["codebooks"] = stages;
    const double shorter = round_trip_mse(*trained("commvq", knobs, unit_of(16, 2), x), test);
    CHECK(round_trip_mse(*whole, test, stages - 1) == shorter);
    CHECK(shorter < last);
    last = shorter;
  }
  CHECK(round_trip_mse(*whole, test) == last);
}

TEST_CASE("commvq: key books are multiples of one power of two, whatever holds them but bf16", "[commvq]") {
  const auto x = gaussian(600, 32, 10);
  for (const char* type : {"f16", "f32", "bf16"}) {
    const Json knobs = {{"codebooks", 3}, {"bits", 4}, {"steps", 3}, {"stored_as", type}};
    const auto codec = trained("commvq", knobs, unit_of(32), x);
    const DecodePlan plan = codec->plan();
    const AlignedVector<float>& words = *std::get<TableTerm>(plan.terms[0]).codewords;
    float most = 0;  // of the first book
    for (size_t i = 0; i < 16 * 32; ++i) most = std::max(most, std::abs(words[i]));
    const double step = std::exp2(std::ceil(std::log2(double{most})) - 10);
    const bool whole =
        std::all_of(words.begin(), words.end(), [&](float v) { return std::nearbyint(v / step) * step == v; });
    CAPTURE(type, most, step);
    CHECK(whole == (type != std::string("bf16")));
  }
}

TEST_CASE("commvq: expectation and maximization find the sums that rows were made of", "[commvq]") {
  // 2^4 x 2^4 sums of one book, a little noise: two codes of 4 bits hold what one of 4 bits does not.
  const PairSearch truth(gaussian(16, 32, 12));
  Matrix<float> x = gaussian(4000, 32, 13);
  Rng rng(14);
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t c = 0; c < x.cols; ++c) x(r, c) *= 0.02f;
    truth.subtract({static_cast<int32_t>(rng.below(16)), static_cast<int32_t>(rng.below(16)), 0}, x.row(r));
  }
  const Json knobs = {{"codebooks", 1}, {"bits", 4}};
  Json one = knobs, many = knobs;
  one["steps"] = 1;
  many["steps"] = 60;
  const double after_one = round_trip_mse(*trained("commvq", one, unit_of(32), x), x),
               after_many = round_trip_mse(*trained("commvq", many, unit_of(32), x), x);
  const double kmeans = round_trip_mse(*trained("rvq", {{"codebooks", 1}, {"bits", 4}}, unit_of(32), x), x);
  INFO("one step " << after_one << ", sixty " << after_many << ", 16 means " << kmeans);
  CHECK(after_many < 0.7 * after_one);
  CHECK(after_many < 0.7 * kmeans);
}

TEST_CASE("commvq: what does not divide is refused with the reason", "[commvq]") {
  const Method& m = find_method("commvq");
  CHECK(m.check(Json::object(), unit_of(64, 3)) == "groups of 128 channels don't divide the 192 of a unit");
  CHECK(m.check({{"group", 64}}, unit_of(64, 3)) == "");
  CHECK(m.check({{"group", 192}}, unit_of(64, 3)) == "");
  CHECK(m.check({{"group", 9}}, unit_of(18)) == "rope_pair needs sub-vectors of an even number of channels, not 9");
  CHECK(m.check({{"group", 6}}, unit_of(3, 2)) == "rope_pair: the 3 channels of a head make no pairs");
  CHECK(m.check(Json::object(), unit_of(6, 1, Role::kValue)) == "1 bits a value of 6 channels are no whole bytes");
  CHECK(m.check({{"value_bits", 4}}, unit_of(6, 1, Role::kValue)) == "");
  Archive parameters;
  const Matrix<float> words(2 * 8, 16, 1e-5f);  // no f16 number
  parameters.tensor("codewords", {2, 8, 16}, words.data());
  CHECK_THROWS_WITH(m.make({{"codebooks", 2}, {"bits", 3}}, unit_of(16))->load(parameters),
                    Catch::Contains("codewords") && Catch::Contains("f16"));
}
