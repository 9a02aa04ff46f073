// Shapes by name or by number.
#include "experiment/shapes.h"

#include <algorithm>
#include <cctype>
#include <set>

#include "experiment/paper_tables.h"
#include "support/catch.h"
#include "support/error_of.h"

using namespace vqkv;

namespace {

bool same(const CacheShape& a, int layers, int q_heads, int kv_heads, int head_dim) {
  return a.layers == layers && a.q_heads == q_heads && a.kv_heads == kv_heads && a.head_dim == head_dim;
}

void refused(const std::string& text, std::initializer_list<const char*> parts) {
  INFO(text);
  check_says(error_of([&] { find_shape(text); }), parts);
}

}  // namespace

TEST_CASE("a shape is a name, in any case, or its four numbers", "[shape]") {
  CHECK(same(find_shape("llama-3.1-8b"), 32, 32, 8, 128));
  CHECK(same(find_shape("LLaMA-3.2-1B"), 16, 32, 8, 64));
  CHECK(same(find_shape("smollm2-135m"), 30, 9, 3, 64));
  CHECK(same(find_shape("head_dim=80,kv_heads=2,layers=5,q_heads=6"), 5, 6, 2, 80));
  CHECK(find_shape("llama-3.1-8b").group() == 4);
  std::set<std::string> names;
  for (const NamedShape& s : named_shapes()) {
    CAPTURE(s.name);
    CHECK(names.insert(s.name).second);
    CHECK(same(find_shape(s.name), s.layers, s.q_heads, s.kv_heads, s.head_dim));
    CHECK(std::string(s.source) != "");
  }
}

TEST_CASE("what is no shape is refused with what was meant", "[shape]") {
  refused("llama-3.1-7b",
          {"--shape: shape 'llama-3.1-7b' is not known", "did you mean 'llama-3.1-8b'?", "smollm2-135m"});
  refused("", {"--shape: shape '' is not known"});
  refused("layers=32,q_heads=32,kv_heads=8", {"--shape: `head_dim` is missing", "kv_heads and head_dim make a shape"});
  refused("layers=32,q_heads=32,kv_head=8,head_dim=128", {"kv_heads"});
  refused("layers=32,q_heads=32,kv_heads=8,head_dim=128,heads=3", {"unknown key 'heads'"});
  refused("layers=32,layers=32", {"layers stands twice"});
  refused("layers=32,q_heads", {"'q_heads' is not key=number"});
  refused("layers=32,q_heads=32,kv_heads=8,head_dim=128,", {"'' is not key=number"});
  refused("layers=0,q_heads=32,kv_heads=8,head_dim=128", {"--shape.layers"});
  refused("layers=many,q_heads=32,kv_heads=8,head_dim=128", {"--shape.layers"});
  refused("layers=32,q_heads=30,kv_heads=8,head_dim=128", {"query heads are a multiple of KV heads"});
  refused("layers=32,q_heads=32,kv_heads=8,head_dim=127", {"head_dim is even"});
  refused("layers=65536,q_heads=65536,kv_heads=65536,head_dim=2", {"at most 65536 KV heads in all layers"});
  refused("layers=1,q_heads=65536,kv_heads=1,head_dim=65536", {"1048576 channels of query heads"});
}

TEST_CASE("a shape that papers name is the one of that name", "[shape][papers]") {
  std::set<std::string> met;
  for (const Paper& p : find_papers({"all"}))
    for (const PaperTable& t : p.tables)
      for (const PaperNumber& n : t.numbers) {
        if (!n.shape) continue;
        std::string name = n.shape_name;
        std::ranges::transform(name, name.begin(), [](unsigned char c) { return std::tolower(c); });
        if (std::ranges::none_of(named_shapes(), [&](const NamedShape& s) { return name == s.name; })) continue;
        CAPTURE(p.name, t.id, name);
        const CacheShape s = find_shape(name);
        CHECK(same(*n.shape, s.layers, s.q_heads, s.kv_heads, s.head_dim));
        met.insert(name);
      }
  for (const char* name : {"llama-7b", "llama-2-7b", "llama-3-8b", "llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b"})
    CHECK(met.contains(name));
}
