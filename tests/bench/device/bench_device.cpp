// Decode attention on a device: exact bf16 rows and product codes in turns, beside what copies reach. JSON on stdout.
//   bench_device [ROUNDS=11] [SHRINK=1]     SHRINK divides contexts, to try it where memory is short
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "attention/exact_decode_cuda.h"
#include "attention/pq_decode_cuda.h"
#include "core/error.h"
#include "core/json.h"
#include "core/rng.h"
#include "core/version.h"
#include "device/runtime.h"

using namespace vqkv;
using device::Buffer;

namespace {

constexpr int kHeads = 8, kGroup = 4, kDim = 128, kBooks = 32;

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// `bytes` of noise, made once and repeated.
void fill(void* to, size_t bytes) {
  std::vector<uint8_t> noise(std::min<size_t>(bytes, size_t{16} << 20));
  Rng rng(1);
  for (uint8_t& b : noise) b = static_cast<uint8_t>(rng.below(128));  // below: no bf16 of noise is infinite or NaN
  auto* at = static_cast<uint8_t*>(to);
  device::copy_in(at, noise.data(), noise.size());
  for (size_t done = noise.size(); done < bytes; done += noise.size())
    device::copy_within(at + done, at, std::min(noise.size(), bytes - done));
}

template <class T>
Buffer<T> noise(size_t count, const char* name) {
  Buffer<T> out(count, name);
  fill(out.data(), count * sizeof(T));
  return out;
}

Buffer<int32_t> counting(int n, const char* name) {
  std::vector<int32_t> v(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) v[static_cast<size_t>(i)] = i;
  return Buffer<int32_t>(std::span<const int32_t>(v), name);
}

// Bytes a second that a copy reads and writes.
double copy_rate(int rounds) {
  constexpr size_t kBytes = size_t{1} << 30;
  auto from = noise<uint8_t>(kBytes, "copy source");
  Buffer<uint8_t> to(kBytes, "copy target");
  std::vector<double> seconds;
  for (int i = 0; i < rounds; ++i)
    seconds.push_back(device::seconds_of([&] { device::copy_within(to.data(), from.data(), kBytes); }));
  return 2.0 * static_cast<double>(kBytes) / median(seconds);
}

Json decode_row(int sequences, int tokens, int exact_splits, int pq_splits, int rounds) {
  const auto rows = static_cast<size_t>(sequences) * kHeads;
  const auto queries = noise<uint16_t>(rows * kGroup * kDim * 2, "queries");  // as fp32: small numbers
  const auto* q = reinterpret_cast<const float*>(queries.data());
  const std::vector<int32_t> full(static_cast<size_t>(sequences), tokens);
  const Buffer<int32_t> lengths(std::span<const int32_t>(full), "lengths");
  Buffer<float> out(rows * kGroup * kDim, "out");

  const size_t values = rows * static_cast<size_t>(tokens) * kDim;
  const auto k = noise<uint16_t>(values, "keys"), v = noise<uint16_t>(values, "values");
  const auto pages = counting(sequences * tokens / kDevicePageTokens, "page table");
  ExactDecoder exact(sequences, kHeads, kGroup, kDim, exact_splits);
  const ExactDecode exact_call{q,
                               k.data(),
                               v.data(),
                               pages.data(),
                               lengths.data(),
                               out.data(),
                               sequences,
                               kHeads,
                               kGroup,
                               kDim,
                               tokens / kDevicePageTokens};

  const size_t books = size_t{kHeads} * kPqEntries * kDim;
  const size_t codes = rows * static_cast<size_t>(tokens) * kBooks;
  const auto key_books = noise<uint16_t>(books, "key books"), value_books = noise<uint16_t>(books, "value books");
  const auto key_codes = noise<uint8_t>(codes, "key codes"), value_codes = noise<uint8_t>(codes, "value codes");
  const auto tiles = counting(sequences * tokens / kPqTile, "tile table");
  PqDecoder pq(sequences, kHeads, kGroup, kBooks, kDim / kBooks, pq_splits);
  const PqDecode pq_call{q,
                         key_books.data(),
                         value_books.data(),
                         key_codes.data(),
                         value_codes.data(),
                         tiles.data(),
                         lengths.data(),
                         out.data(),
                         sequences,
                         kHeads,
                         kGroup,
                         tokens / kPqTile};
  std::vector<double> exact_seconds, pq_seconds, ratios;
  for (int i = 0; i < rounds + 2; ++i) {
    const double a = device::seconds_of([&] { exact(exact_call); }), b = device::seconds_of([&] { pq(pq_call); });
    if (i < 2) continue;  // warming up
    exact_seconds.push_back(a);
    pq_seconds.push_back(b);
    ratios.push_back(a / b);
  }
  const double exact_bytes = 4.0 * static_cast<double>(values), code_bytes = 2.0 * static_cast<double>(codes);
  return {{"sequences", sequences},
          {"tokens", tokens},
          {"rounds", rounds},
          {"exact_ms", 1e3 * median(exact_seconds)},
          {"exact_bytes_per_second", exact_bytes / median(exact_seconds)},
          {"pq_ms", 1e3 * median(pq_seconds)},
          {"pq_code_bytes_per_second", code_bytes / median(pq_seconds)},
          {"ratio", median(ratios)},
          {"ratio_low", *std::min_element(ratios.begin(), ratios.end())},
          {"ratio_high", *std::max_element(ratios.begin(), ratios.end())}};
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const int rounds = argc > 1 ? std::max(1, std::atoi(argv[1])) : 11,
              shrink = argc > 2 ? std::max(1, std::atoi(argv[2])) : 1;
    const std::string name = device::require_device();
    Json rows = Json::array();
    const double copies = copy_rate(rounds);
    for (const auto& [sequences, tokens, exact_splits, pq_splits] :
         {std::tuple{16, 32768, 8, 1}, std::tuple{1, 131072, 64, 16}, std::tuple{1, 32768, 32, 16}}) {
      Json row = decode_row(sequences, tokens / shrink, exact_splits, pq_splits, rounds);
      row["exact_of_copy"] = row["exact_bytes_per_second"].get<double>() / copies;
      rows.push_back(row);
    }
    std::printf("%s\n",
                Json{{"device", name}, {"tool", version_facts()}, {"copy_bytes_per_second", copies}, {"decode", rows}}
                    .dump(1)
                    .c_str());
  } catch (const Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return static_cast<int>(e.kind());
  }
  return 0;
}
