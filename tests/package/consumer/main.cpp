// Lists the codecs of the installed library and codes a few vectors with one of them.
#include <cstdio>

#include "codec/codec.h"
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
  return error < 0.02 * energy ? 0 : 1;
}
