// Lists the codecs of the installed library and codes a few vectors with one of them; a method that takes the name of
// another is refused.
#include <cstdio>
#include <cstring>

#include "codec/codec.h"
#include "core/error.h"
#include "core/json.h"

int main() {
  for (const vqkv::Method* m : vqkv::all_methods()) std::printf("%s\n", m->describe().name.c_str());
  vqkv::UnitShape unit;
  unit.head_dim = 64;
  unit.heads = 1;
  const auto codec = vqkv::find_method("rtn").make({{"bits", 4}}, unit);
  vqkv::Matrix<float> x(64, 64), y(64, 64);
  vqkv::Rng rng(7);
  for (float& v : x.storage) v = static_cast<float>(rng.normal());
  vqkv::CodeBlock block;
  codec->encode(x, block);
  codec->decode(block, y);
  double error = 0, energy = 0;
  for (size_t i = 0; i < x.storage.size(); ++i) {
    const double e = x.storage[i] - y.storage[i];
    error += e * e;
    energy += x.storage[i] * x.storage[i];
  }
  std::printf("4-bit RTN, relative error %.4f\n", error / energy);
  try {
    vqkv::register_method(vqkv::find_method("rtn"));
    return 1;
  } catch (const vqkv::Error& e) {
    if (e.kind() != vqkv::ErrorKind::kUsage || !std::strstr(e.what(), "'rtn'")) return 1;
  }
  return error < 0.02 * energy ? 0 : 1;
}
