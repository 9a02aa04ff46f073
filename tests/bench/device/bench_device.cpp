// Attention on a device: of decode steps over exact bf16 rows, product codes and levels in turns, beside what copies
// reach; of prompts over exact rows, beside products with weights. JSON on stdout.
//   bench_device [ROUNDS=11] [SHRINK=1]     SHRINK divides contexts, to try it where memory is short
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "attention/exact_decode.h"
#include "attention/exact_prefill.h"
#include "attention/level_decode.h"
#include "attention/pq_decode.h"
#include "core/error.h"
#include "core/json.h"
#include "core/rng.h"
#include "core/version.h"
#include "device/gemm.h"
#include "device/runtime.h"

using namespace vqkv;
using device::Buffer;

namespace {

constexpr int kHeads = 8, kGroup = 4, kDim = 128;

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

// One way of attending: what it is called, bytes of codes or rows that it reads, and a launch.
struct Way {
  std::string name;
  double bytes = 0;
  std::function<void()> launch;
};

// Rounds of all ways in turns: of each its median, and of the first's seconds over its own the median and the range.
Json turns(const std::vector<Way>& ways, int rounds) {
  std::vector<std::vector<double>> seconds(ways.size());
  for (int i = 0; i < rounds + 2; ++i)
    for (size_t w = 0; w < ways.size(); ++w) {
      const double s = device::seconds_of(ways[w].launch);
      if (i >= 2) seconds[w].push_back(s);  // the first ones warm up
    }
  Json out = Json::array();
  for (size_t w = 0; w < ways.size(); ++w) {
    std::vector<double> ratios;
    for (size_t i = 0; i < seconds[w].size(); ++i) ratios.push_back(seconds[0][i] / seconds[w][i]);
    out.push_back({{"way", ways[w].name},
                   {"ms", 1e3 * median(seconds[w])},
                   {"bytes_per_second", ways[w].bytes / median(seconds[w])},
                   {"ratio", median(ratios)},
                   {"ratio_low", *std::min_element(ratios.begin(), ratios.end())},
                   {"ratio_high", *std::max_element(ratios.begin(), ratios.end())}});
  }
  return out;
}

Json decode_row(int sequences, int tokens, int rounds) {
  // Blocks enough to fill the card and, of product codes, whose tables fill a multiprocessor, one for each.
  const int rows_of = sequences * kHeads, splits = std::max(1, 1024 / rows_of), few = std::max(1, 128 / rows_of);
  const auto rows = static_cast<size_t>(rows_of);
  const auto queries = noise<uint16_t>(rows * kGroup * kDim * 2, "queries");  // as fp32: small numbers
  const auto* q = reinterpret_cast<const float*>(queries.data());
  const std::vector<int32_t> full(static_cast<size_t>(sequences), tokens);
  const Buffer<int32_t> lengths(std::span<const int32_t>(full), "lengths");
  Buffer<float> out(rows * kGroup * kDim, "out");
  const size_t values = rows * static_cast<size_t>(tokens) * kDim;
  const auto pages = counting(sequences * tokens / kDevicePageTokens, "page table");
  const auto tiles = counting(sequences * tokens / kPqTile, "tile table");
  static_assert(kPqTile == kLevelTile);
  std::vector<Way> ways;

  const auto k = noise<uint16_t>(values, "keys"), v = noise<uint16_t>(values, "values");
  ExactDecoder exact(sequences, kHeads, kGroup, kDim, splits);
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
  ways.push_back({"exact bf16", 4.0 * static_cast<double>(values), [&] { exact(exact_call); }});

  const auto books = noise<uint16_t>(size_t{kHeads} * kPqEntries * kDim, "books");
  const auto codes = noise<uint8_t>(values, "codes");  // of keys and values, half a byte a value at most
  std::vector<std::unique_ptr<PqDecoder>> pq;
  for (const int count : {32, 16}) {
    pq.push_back(std::make_unique<PqDecoder>(sequences, kHeads, kGroup, count, kDim / count, few));
    PqDecode call{q, books.data(), books.data(), codes.data(), codes.data() + values / 2, tiles.data()};
    call.lengths = lengths.data(), call.out = out.data();
    call.sequences = sequences, call.kv_heads = kHeads, call.group = kGroup, call.most_tiles = tokens / kPqTile;
    ways.push_back({"pq " + std::to_string(count) + " x 256", 2.0 * static_cast<double>(values) * count / kDim,
                    [call, decoder = pq.back().get()] { (*decoder)(call); }});
  }
  const auto sides = noise<uint16_t>(values / 16, "scales and zeros");
  std::vector<std::unique_ptr<LevelDecoder>> levels;
  for (const int bits : {4, 2}) {
    levels.push_back(std::make_unique<LevelDecoder>(sequences, kHeads, kGroup, kDim, bits, splits));
    const auto* words = reinterpret_cast<const uint32_t*>(codes.data());
    LevelDecode call{q, words, words + values / 8, sides.data(), sides.data(), tiles.data()};
    call.lengths = lengths.data(), call.out = out.data();
    call.sequences = sequences, call.kv_heads = kHeads, call.group = kGroup, call.most_tiles = tokens / kLevelTile;
    ways.push_back({std::to_string(bits) + "-bit levels", 2.0 * static_cast<double>(values) * (bits + 1) / 8,
                    [call, decoder = levels.back().get()] { (*decoder)(call); }});
  }
  return {{"sequences", sequences}, {"tokens", tokens}, {"rounds", rounds}, {"ways", turns(ways, rounds)}};
}

// A prompt of so many tokens in one block, and a product of as many rows with (8192, 4096) weights, in turns.
Json prefill_row(int tokens, int rounds) {
  const size_t rows = static_cast<size_t>(tokens), values = rows * kHeads * kDim;
  const auto queries = noise<uint16_t>(values * kGroup * 2, "queries");
  const auto k = noise<uint16_t>(values, "keys"), v = noise<uint16_t>(values, "values");
  const auto pages = counting(tokens / kDevicePageTokens, "page table");
  const std::vector<PrefillBlock> whole{{0, tokens, 0, 0}};
  const Buffer<PrefillBlock> block(std::span<const PrefillBlock>(whole), "block");
  Buffer<float> out(values * kGroup, "out");
  ExactPrefill call;
  call.queries = reinterpret_cast<const float*>(queries.data());
  call.keys = k.data(), call.values = v.data(), call.page_table = pages.data(), call.of_block = block.data();
  call.out = out.data(), call.blocks = 1, call.kv_heads = kHeads, call.group = kGroup, call.head_dim = kDim;
  call.most_pages = tokens / kDevicePageTokens, call.longest = tokens;
  constexpr int kInputs = 4096, kOutputs = 8192;
  const auto x = noise<uint16_t>(rows * kInputs, "rows"), w = noise<uint16_t>(size_t{kInputs} * kOutputs, "weights");
  Buffer<float> y(rows * kOutputs, "products");
  const auto multiply = [&] {
    device::multiply_rows_bf16(x.data(), w.data(), tokens, kOutputs, kInputs, false, y.data());
  };
  const double pairs = 0.5 * static_cast<double>(tokens) * (tokens + 1);
  std::vector<double> attention, product;
  std::string missing;
  try {
    multiply();
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kUnavailable) throw;
    missing = e.what();
  }
  for (int i = 0; i < rounds + 2; ++i) {
    const double a = device::seconds_of([&] { exact_prefill(call); });
    const double p = missing.empty() ? device::seconds_of(multiply) : 0;
    if (i >= 2) attention.push_back(a), product.push_back(p);  // the first ones warm up
  }
  Json row = {{"tokens", tokens},
              {"rounds", rounds},
              {"ms", 1e3 * median(attention)},
              {"multiply_adds_per_second", 2 * pairs * kHeads * kGroup * kDim / median(attention)}};
  if (missing.empty())
    row["products_per_second"] = static_cast<double>(rows) * kInputs * kOutputs / median(product);
  else
    row["products"] = missing;
  return row;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const int rounds = argc > 1 ? std::max(1, std::atoi(argv[1])) : 11,
              shrink = argc > 2 ? std::max(1, std::atoi(argv[2])) : 1;
    const std::string name = device::require_device();
    Json rows = Json::array();
    const double copies = copy_rate(rounds);
    for (const auto& [sequences, tokens] : {std::pair{16, 32768}, std::pair{1, 131072}, std::pair{1, 32768}}) {
      Json row = decode_row(sequences, tokens / shrink, rounds);
      row["exact_of_copy"] = row["ways"][0]["bytes_per_second"].get<double>() / copies;
      rows.push_back(row);
    }
    Json prompts = Json::array();
    for (const int tokens : {8192, 32768}) prompts.push_back(prefill_row(tokens / shrink, rounds));
    std::printf("%s\n", Json{{"device", name},
                             {"tool", version_facts()},
                             {"copy_bytes_per_second", copies},
                             {"decode", rows},
                             {"prefill", prompts}}
                            .dump(1)
                            .c_str());
  } catch (const Error& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return static_cast<int>(e.kind());
  }
  return 0;
}
