// make_trace FILE DTYPE: a trace whose values a few lines of Python can say again (test_trace_readers.py).
#include <cstdio>

#include "core/error.h"
#include "io/trace_fixture.h"

using namespace vqkv;

namespace {
// Integers of at most 7 bits and a sign: exact in bf16.
float value_at(int64_t what, int64_t layer, int64_t head, int64_t token, int64_t channel) {
  return static_cast<float>((what * 71 + layer * 31 + head * 17 + token * 3 + channel * 5) % 255 - 127);
}
}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  try {
    const TraceInfo info = trace_info(dtype_from_name(argv[2]), 10, 3, 2, 4, 8);
    TraceWriter writer(argv[1], info, {"first.txt", "second.txt"}, 1100 + 50, 6);
    int64_t first = 0;
    for (const int64_t n : {1100, 50}) {
      const std::vector<int32_t> at = n == 50 ? std::vector<int32_t>{0, 49} : std::vector<int32_t>{0, 7, 1000, 1099};
      TraceWindowData w = trace_window(info, n == 50 ? 1 : 0, n, at, 4);
      for (int64_t l = 0; l < 3; ++l) {
        const size_t i = static_cast<size_t>(l);
        for (int64_t t = 0; t < n; ++t)
          for (int64_t c = 0; c < 16; ++c) {
            w.key[i](t, c) = value_at(0, l, c / 8, first + t, c % 8);
            w.value[i](t, c) = value_at(1, l, c / 8, first + t, c % 8);
          }
        for (size_t q = 0; q < at.size(); ++q)
          for (int64_t c = 0; c < 32; ++c)
            w.query[i](static_cast<int64_t>(q), c) = value_at(2, l, c / 8, first + at[q], c % 8);
        for (size_t k = 0; k < w.query_moment[i].size(); ++k)
          w.query_moment[i][k] = static_cast<double>(k) / 3.0 + static_cast<double>(l);
      }
      writer.add(w);
      first += n;
    }
    Rng rng(1);
    for (int l = 0; l < 3; ++l) writer.output_weight(l, random_matrix(rng, 10, 32));
    writer.finish();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
