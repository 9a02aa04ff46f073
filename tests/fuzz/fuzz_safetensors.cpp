// Any bytes as a safetensors file: a kBadData message, or tensors that can be read to the end.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/error.h"
#include "fuzz/memory_file.h"
#include "io/safetensors.h"

using namespace vqkv;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const fuzzing::MemoryFile memory(data, size);
  try {
    const SafetensorsFile file(memory.path());
    for (const SafeTensor& tensor : file.tensors()) {
      if (file.tensor_bytes(tensor).size() != tensor.size || file.find(tensor.name) != &tensor) __builtin_trap();
      if (tensor.dtype != "F32" && tensor.dtype != "F16" && tensor.dtype != "BF16") continue;
      std::vector<float> values(static_cast<size_t>(tensor.elements));
      file.read(tensor, values.data());
    }
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kBadData) __builtin_trap();
  }
  return 0;
}
