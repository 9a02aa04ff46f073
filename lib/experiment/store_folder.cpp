#include "experiment/store_folder.h"

#include <fmt/format.h>

#include <filesystem>

#include "core/error.h"
#include "io/store.h"

namespace vqkv {

void open_store(const std::string& folder, const Plan& plan) {
  namespace fs = std::filesystem;
  std::error_code ec;
  fs::create_directories(folder, ec);
  if (!fs::is_directory(folder))
    fail_data(
        fmt::format("{}: the result folder can't be made: {}", folder, ec ? ec.message() : "a file is in its place"));
  const std::string path = (fs::path(folder) / "plan.jsonl").string();
  const FileLock lock((fs::path(folder) / ".lock").string());
  if (!fs::exists(path)) {
    write_plan(plan, path);
    return;
  }
  if (planned_hash(path) == plan.hash()) return;
  const Plan have = read_plan(path);
  if (have.hash() != plan.hash())
    fail_usage(fmt::format(
        "{} holds the results of another plan ({} instead of {}): {}\nUse another -o, so that both stay readable.",
        folder, have.hash().substr(0, 12), plan.hash().substr(0, 12), plan_difference(have, plan)));
}

}  // namespace vqkv
