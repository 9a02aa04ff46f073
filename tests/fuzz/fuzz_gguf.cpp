// Any bytes as a GGUF: a kBadData message, or key-values, tensors and a model that can be read to the end.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/error.h"
#include "core/json.h"
#include "core/thread_pool.h"
#include "fuzz/memory_file.h"
#include "io/gguf.h"
#include "model/model_files.h"

using namespace vqkv;

namespace {

template <class F>
void bad_data_or_fine(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kBadData) __builtin_trap();
  }
}

void read_everything(const std::string& path) {
  const GgufFile file(path);
  size_t total = 0;
  for (const auto& [key, value] : file.values()) {
    bad_data_or_fine([&] { total += file.string(key).size(); });
    bad_data_or_fine([&] { total += static_cast<size_t>(file.integer(key, 0, 100)); });
    bad_data_or_fine([&] { total += file.number(key) > 0; });
    bad_data_or_fine([&] { total += file.boolean_or(key, false); });
    bad_data_or_fine([&] {
      for (const auto s : file.strings(key)) total += s.empty() ? 0 : static_cast<size_t>(s.back());
    });
    bad_data_or_fine([&] { total += file.integers(key).size(); });
    bad_data_or_fine([&] { total += file.floats(key).size(); });
  }
  for (const GgufTensor& tensor : file.tensors()) {
    std::vector<float> values(static_cast<size_t>(tensor.elements()));
    ggml_dequantize(tensor.type, file.tensor_bytes(tensor).data(), values.data(), tensor.elements());
    total += values.size();
  }
  if (total == ~size_t{0}) __builtin_trap();
}

void read_model(const std::string& path) {
  const auto weights = ModelWeights::open(path);
  (void)weights->facts().to_json().dump();
  for (int w = 0; w <= static_cast<int>(Weight::kDown); ++w)
    if (weights->has(static_cast<Weight>(w))) (void)weights->read(static_cast<Weight>(w), weights->facts().layers - 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  set_thread_count(1);
  const fuzzing::MemoryFile file(data, size);
  bad_data_or_fine([&] { read_everything(file.path()); });
  bad_data_or_fine([&] { read_model(file.path()); });
  return 0;
}
