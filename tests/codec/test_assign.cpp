#include "codec/train/assign.h"

#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "core/cpu.h"
#include "core/rng.h"
#include "core/thread_pool.h"
#include "support/catch.h"
#include "support/codec_rows.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

double distance_to(const float* x, const float* c, int64_t width) {
  double sum = 0;
  for (int64_t k = 0; k < width; ++k) sum += (double{x[k]} - c[k]) * (double{x[k]} - c[k]);
  return sum;
}

// The chosen codeword is as near as the nearest one, up to rounding that grows with the width.
void check_nearest(const Matrix<float>& x, const Matrix<float>& codewords, const std::vector<int32_t>& index,
                   const std::vector<float>& distance) {
  for (int64_t r = 0; r < x.rows; ++r) {
    double best = std::numeric_limits<double>::infinity();
    for (int64_t s = 0; s < codewords.rows; ++s) best = std::min(best, distance_to(x.row(r), codewords.row(s), x.cols));
    REQUIRE(index[static_cast<size_t>(r)] >= 0);
    REQUIRE(index[static_cast<size_t>(r)] < codewords.rows);
    const double chosen = distance_to(x.row(r), codewords.row(index[static_cast<size_t>(r)]), x.cols);
    const double tolerance = 2e-6 * static_cast<double>(x.cols);
    REQUIRE(chosen <= best + tolerance);
    REQUIRE(distance[static_cast<size_t>(r)] == Approx(chosen).margin(4 * tolerance));
  }
}

}  // namespace

TEST_CASE("assignment finds the nearest codeword on every instruction set of this machine", "[assign]") {
  const auto targets = hwy::SupportedTargets();
  int tried = 0;
  for (int64_t rest = targets; rest != 0; rest &= rest - 1) {
    hwy::SetSupportedTargetsForTest(rest & -rest);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    ++tried;
    for (const auto [width, entries, rows] : {std::array<int64_t, 3>{1, 3, 70},
                                              {2, 16, 200},
                                              {3, 5, 65},
                                              {4, 256, 129},
                                              {8, 256, 300},
                                              {16, 33, 64},
                                              {32, 100, 63},
                                              {64, 512, 66},
                                              {128, 31, 130},
                                              {192, 20, 10},
                                              {193, 20, 70},
                                              {300, 6, 65},
                                              {4864, 9, 5}}) {
      const auto x = gaussian(rows, width, 10 + static_cast<uint64_t>(width));
      const auto codewords = gaussian(entries, width, 90 + static_cast<uint64_t>(width));
      std::vector<int32_t> index(static_cast<size_t>(rows));
      std::vector<float> distance(static_cast<size_t>(rows));
      Assigner(codewords).assign(x, index.data(), distance.data());
      check_nearest(x, codewords, index, distance);
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  CHECK(tried >= 2);
}

// The documented scores by scalar code: the codebook's mean taken from both, |c|^2/2 then one multiply-add a channel,
// which rounds twice where the processor has no fused one.
std::vector<int32_t> scalar_codes(const Matrix<float>& x, const Matrix<float>& codewords) {
  const int64_t width = x.cols;
  const bool fused = cpu_features().avx2;
  std::vector<float> offset(static_cast<size_t>(width));
  for (int64_t k = 0; k < width; ++k) {
    double mean = 0;
    for (int64_t s = 0; s < codewords.rows; ++s) mean += codewords(s, k);
    offset[static_cast<size_t>(k)] = static_cast<float>(mean / static_cast<double>(codewords.rows));
  }
  std::vector<int32_t> index(static_cast<size_t>(x.rows), 0);
  std::vector<float> best(static_cast<size_t>(x.rows), std::numeric_limits<float>::infinity());
  for (int64_t s = 0; s < codewords.rows; ++s) {
    double norm = 0;
    for (int64_t k = 0; k < width; ++k) {
      const float c = codewords(s, k) - offset[static_cast<size_t>(k)];
      norm += static_cast<double>(c) * c;
    }
    for (int64_t r = 0; r < x.rows; ++r) {
      auto score = static_cast<float>(norm / 2);
      for (int64_t k = 0; k < width; ++k) {
        const float c = codewords(s, k) - offset[static_cast<size_t>(k)], v = x(r, k) - offset[static_cast<size_t>(k)];
        score = fused ? std::fma(-c, v, score) : score - c * v;
      }
      if (!(score < best[static_cast<size_t>(r)])) continue;
      best[static_cast<size_t>(r)] = score;
      index[static_cast<size_t>(r)] = static_cast<int32_t>(s);
    }
  }
  return index;
}

TEST_CASE("codes are those of the fp32 scores, also where bf16 screens the codewords", "[assign]") {
  // Scales: ordinary, where bf16 products are denormal, where squares leave fp32; and rows on top of codewords, rows
  // between two, repeated codewords, one codeword far out.
  for (const float scale : {1.0f, 1e-18f, 1e-22f, 3e17f, 4e18f}) {
    if (scale > 1e18f && !cpu_features().avx2) continue;  // without fused multiply-adds products leave it too: NaN
    for (const auto [width, entries] :
         {std::array<int64_t, 2>{8, 256}, {9, 100}, {16, 64}, {33, 37}, {64, 256}, {128, 300}, {192, 40}, {576, 100}}) {
      Matrix<float> codewords = gaussian(entries, width, 1 + static_cast<uint64_t>(width));
      Matrix<float> x = gaussian(200, width, 2 + static_cast<uint64_t>(width), 0.1);
      for (int64_t k = 0; k < width; ++k) {
        codewords(entries - 1, k) = codewords(3, k);
        codewords(entries / 2, k) = codewords(3, k);
        if (scale < 1e17f) codewords(7, k) *= 1000.0f;
        for (int64_t r = 0; r < 30; ++r) x(r, k) = codewords(r % entries, k);
        for (int64_t r = 30; r < 60; ++r) x(r, k) = (codewords(r - 30, k) + codewords(r - 29, k)) / 2;
        for (int64_t r = 60; r < 90; ++r) x(r, k) *= 100.0f;
        for (int64_t r = 90; r < 100; ++r) x(r, k) = 0;
      }
      for (float& v : x.storage) v *= scale;
      for (float& v : codewords.storage) v *= scale;
      std::vector<int32_t> index(200);
      Assigner(codewords).assign(x, index.data());
      CAPTURE(scale, width, entries);
      CHECK(index == scalar_codes(x, codewords));
    }
  }
}

TEST_CASE("a row whose scores leave fp32 gets a codeword that exists", "[assign]") {
  // Without fused multiply-adds real scores are NaN here, and only those of padding compare: "assignment on baseline".
  for (const auto [width, entries] :
       {std::array<int64_t, 2>{2, 5}, {4, 3}, {8, 5}, {16, 13}, {9, 5}, {64, 37}, {300, 3}}) {
    Matrix<float> codewords = gaussian(entries, width, 1), x = gaussian(100, width, 2);
    for (float& v : x.storage) v *= 1e37f;
    for (float& v : codewords.storage) v *= 1e37f;
    std::vector<int32_t> index(100, -1);
    Assigner(codewords).assign(x, index.data());
    CAPTURE(width, entries);
    for (const int32_t i : index) CHECK((i >= 0 && i < entries));
  }
}

TEST_CASE("codes with room between codewords equal brute force exactly, far from the origin too", "[assign]") {
  // Codewords on a grid of step 1, vectors within 0.4 of one: no rounding can change the answer.
  Matrix<float> codewords(256, 4), x(1000, 4);
  for (int64_t s = 0; s < 256; ++s)
    for (int64_t k = 0; k < 4; ++k) codewords(s, k) = 1000.0f + static_cast<float>((s >> (2 * k)) & 3);
  Rng rng(5);
  std::vector<int32_t> expected(1000), index(1000);
  for (int64_t r = 0; r < 1000; ++r) {
    expected[static_cast<size_t>(r)] = static_cast<int32_t>(rng.below(256));
    for (int64_t k = 0; k < 4; ++k)
      x(r, k) = codewords(expected[static_cast<size_t>(r)], k) + static_cast<float>(0.8 * rng.uniform() - 0.4);
  }
  Assigner(codewords).assign(x, index.data());
  CHECK(index == expected);
}

TEST_CASE("ties go to the lowest index", "[assign]") {
  for (int64_t entries : {2, 5, 16, 64}) {
    Matrix<float> codewords(entries, 8, 0.25f);  // all equal
    const auto x = gaussian(100, 8, 3);
    std::vector<int32_t> index(100, -1);
    Assigner(codewords).assign(x, index.data());
    CHECK(std::all_of(index.begin(), index.end(), [](int32_t i) { return i == 0; }));
  }
  Matrix<float> pair(2, 1);
  pair(0, 0) = -1;
  pair(1, 0) = 1;
  const float zero = 0;
  int32_t code = -1;
  Assigner(pair).assign({&zero, 1, 1}, &code);
  CHECK(code == 0);
}

TEST_CASE("a row's code depends on neither threads, nor chunks, nor neighbours, nor stride", "[assign]") {
  for (const int64_t width : {8, 64, 5000}) {
    const int64_t rows = width == 5000 ? 130 : 2000, entries = width == 5000 ? 50 : 256;
    const auto x = gaussian(rows, width, 21), codewords = gaussian(entries, width, 22);
    const Assigner assigner(codewords);
    std::vector<int32_t> one(static_cast<size_t>(rows)), two = one, alone = one, strided = one;
    std::vector<float> d1(static_cast<size_t>(rows)), d2 = d1, d3 = d1;
    const int before = thread_count();
    set_thread_count(1);
    assigner.assign(x, one.data(), d1.data());
    set_thread_count(2);
    assigner.assign(x, two.data(), d2.data());
    set_thread_count(before);
    for (int64_t r = 0; r < rows; ++r)
      assigner.assign_rows(x.view().slice_rows(r, 1), &alone[static_cast<size_t>(r)], &d3[static_cast<size_t>(r)]);
    Matrix<float> wide(rows, width + 3, 7.0f);  // the same vectors, unaligned, inside wider rows
    for (int64_t r = 0; r < rows; ++r) std::copy_n(x.row(r), width, wide.row(r) + 1);
    assigner.assign_rows(wide.view().slice_cols(1, width), strided.data());
    CHECK(one == two);
    CHECK(d1 == d2);
    CHECK(one == alone);
    CHECK(d1 == d3);
    CHECK(one == strided);
  }
}
