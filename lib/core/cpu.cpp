#include "core/cpu.h"

#include <hwy/targets.h>

#include <cstdlib>
#include <fstream>

#include "core/error.h"
#if VQKV_X86_UNITS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vqkv {
namespace {

#if VQKV_X86_UNITS
// Asked of the processor itself: clang 16 does not know the name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// Tiles of bf16 products beside AVX512-BF16, which narrows their inputs. The system hands the state of tiles out on
// demand alone (arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), once a process.
bool may_use_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

CpuFeatures detect() {
  CpuFeatures f;
  bool avx512_bf16 = false;
#if VQKV_X86_UNITS
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
  f.avx512_vbmi = f.avx512 && __builtin_cpu_supports("avx512vbmi");
  avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
  f.bf16_products = avx512_bf16 && !__builtin_cpu_is("intel");
  f.amx = avx512_bf16 && may_use_amx();
#endif
  if (const char* cap = std::getenv("VQKV_CPU")) {
    const std::string c = cap;
    if (c == "baseline")
      f = CpuFeatures{};
    else if (c == "avx2")
      f = CpuFeatures{.avx2 = f.avx2};
    else if (c == "avx512")
      f.avx512_vbmi = f.bf16_products = f.amx = false;
    else if (c == "avx512_bf16")
      f.bf16_products = avx512_bf16, f.amx = false;
    else
      fail_usage("VQKV_CPU is '" + c + "'; allowed: baseline, avx2, avx512, avx512_bf16");
  }
  return f;
}

// Highway picks its kernels at the first call of each: what VQKV_CPU forbids, or a build without the units of x86-64,
// is taken out before main().
[[maybe_unused]] const bool g_highway_lowered = [] {
#if HWY_ARCH_X86
  const char* cap = std::getenv("VQKV_CPU");
  const std::string c = !kX86Units ? "baseline" : cap ? cap : "";
  const auto avx512 = HWY_AVX3 | HWY_AVX3_DL;
  if (c == "avx2") hwy::DisableTargets(avx512);
  if (c == "baseline") hwy::DisableTargets(avx512 | HWY_AVX2);
#endif
  return true;
}();

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::string cpu_arithmetic() {
  const CpuFeatures& f = cpu_features();
  return f.amx ? "avx512+amx" : f.bf16_products ? "avx512+bf16" : f.avx512 ? "avx512" : f.avx2 ? "avx2" : "baseline";
}

std::string cpu_model_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

}  // namespace vqkv
