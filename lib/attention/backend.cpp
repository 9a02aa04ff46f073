#include <fmt/format.h>

#include <map>

#include "attention/attention.h"
#include "attention/backends_cpu.h"
#include "attention/provided.h"
#include "attention/session_cpu.h"
#include "core/error.h"
#include "core/names.h"

namespace vqkv {
namespace {

using Provided = std::map<std::string, std::function<std::unique_ptr<AttentionBackend>()>>;
Provided& provided() {
  static Provided all;
  return all;
}

}  // namespace

void provide_attention_backend(const std::string& name, std::function<std::unique_ptr<AttentionBackend>()> make) {
  provided()[name] = std::move(make);
}

std::vector<std::string> attention_backend_names() {
  return {"reference", "cpu-reconstruct", "cpu-table", "cpu-table8"};
}

std::unique_ptr<AttentionBackend> make_attention_backend(const std::string& name) {
  if (name == "reference") return make_reference_backend();
  if (name == "cpu-reconstruct") return make_tiled_backend(KeyScan::kNone, ValueSums::kNever);
  if (name == "cpu-table") return make_tiled_backend(KeyScan::kFixed, ValueSums::kWherePays);
  if (name == "cpu-table8") return make_tiled_backend(KeyScan::kBytes, ValueSums::kWherePays);
  if (name == "auto") return make_auto_backend();
  if (const auto it = provided().find(name); it != provided().end()) return it->second();
  if (name.rfind(kDeviceAttention, 0) == 0)
    fail_unavailable(fmt::format("backend '{}' needs a CUDA device; --device cuda takes one where there is", name));
  std::vector<std::string> known = attention_backend_names();
  known.push_back("auto");
  fail_unknown("attention backend", name, known);
}

std::unique_ptr<KvSession> AttentionBackend::make_session(CompressedCache& cache, std::pmr::memory_resource* memory) {
  return std::make_unique<KvSessionCpu>(cache, *this, memory);
}

}  // namespace vqkv
