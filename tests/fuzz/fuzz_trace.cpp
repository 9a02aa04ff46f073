// Valid HDF5 containers whose shapes, types, values and attributes the input decides: the reader takes them or names
// what is wrong. Containers that break libhdf5 itself are the probe's part, and stay out here.
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "core/error.h"
#include "fuzz_input.h"
#include "io/raw_trace.h"
#include "io/trace.h"

using namespace vqkv;

namespace {

void break_once(RawTrace& t, fuzzing::Decisions& d) {
  constexpr Hdf5Type kTypes[] = {Hdf5Type::kBF16, Hdf5Type::kF16, Hdf5Type::kF32,
                                 Hdf5Type::kF64,  Hdf5Type::kI32, Hdf5Type::kI64};
  if (t.datasets.empty()) return;
  RawDataset& r = t.datasets[d.below(t.datasets.size())];
  switch (d.below(12)) {
    case 0:
      r.dims[d.below(r.dims.size())] = d.size();
      break;
    case 1:
      r.type = kTypes[d.below(std::size(kTypes))];
      break;
    case 2:
      t.drop(r.name);
      break;
    case 3:
      r.write = false;
      break;
    case 4:
      r.dims.push_back(d.size());
      break;
    case 5:
      if (r.dims.size() > 1) r.dims.pop_back();
      break;
    case 6:
      r.chunk.assign(r.dims.size(), 1 + static_cast<int64_t>(d.below(5)));
      break;
    case 7:
    case 8: {
      const uint64_t value = d.word();
      if (r.bytes.size() >= 8) std::memcpy(r.bytes.data() + d.below(r.bytes.size() - 7), &value, 8);
      break;
    }
    case 9: {
      auto it = t.text.begin();
      std::advance(it, static_cast<std::ptrdiff_t>(d.below(t.text.size())));
      it->second = d.text();
      break;
    }
    case 10:
      t.integer[d.byte() & 1 ? "complete" : "format_version"] = static_cast<int64_t>(d.word());
      break;
    default:
      d.break_json(t.model);
  }
}

void read_everything(const TraceReader& r) {
  const CacheShape& s = r.info().shape;
  for (int l = 0; l < s.layers; ++l) {
    for (int h = 0; h < s.kv_heads; ++h) {
      Matrix<float> x(r.tokens(), s.head_dim);
      r.key(l, h, 0, r.tokens(), x);
      r.value(l, h, 0, r.tokens(), x);
      for (const TraceDocument& d : r.documents()) {
        r.query_moment(l, h, d.id);
        r.query_pair_moment(l, h, d.id);
      }
      r.received_mass(l, h, 0, r.tokens());
      r.received_mass2(l, h, 0, r.tokens());
      if (!r.has_gradients()) continue;
      for (const GradientOf of : kGradientsOf) {
        r.squared_gradient(of, l, h, 0, r.tokens(), x);
        for (const TraceDocument& d : r.documents()) r.gradient_moment(of, l, h, d.id);
      }
    }
    for (int h = 0; h < s.q_heads; ++h) {
      Matrix<float> x(r.queries(), s.head_dim);
      r.query(l, h, 0, r.queries(), x);
    }
    if (r.has_output_weight()) r.output_weight(l);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string path =
      (std::filesystem::temp_directory_path() / ("vqkv-fuzz-trace-" + std::to_string(getpid()) + ".h5")).string();
  static const bool once = [] {
    set_probe_enabled(false);
    std::atexit([] { std::filesystem::remove(path); });
    return true;
  }();
  (void)once;
  fuzzing::Decisions decisions(data, size);
  const uint8_t kind = decisions.byte();
  RawTrace trace(kind & 1 ? "sampled" : "", kind & 2);
  for (int i = 0; i < 6 && decisions.more(); ++i) break_once(trace, decisions);
  for (RawDataset& d : trace.datasets) {
    // What would be written must stay small; what only claims a size may claim any.
    double bytes = 8;
    for (const int64_t n : d.dims) bytes *= static_cast<double>(n);
    if (bytes > 1e6) d.write = false;
  }
  try {
    trace.write(path);
  } catch (const std::exception&) {
    return 0;  // libhdf5 or JSON can't express it
  }
  try {
    const TraceReader reader(path);
    reader.verify();
    read_everything(reader);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kBadData) __builtin_trap();
  }
  return 0;
}
