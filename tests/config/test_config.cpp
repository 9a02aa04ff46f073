#include <fmt/format.h>

#include <filesystem>
#include <fstream>

#include "config/config.h"
#include "config/sweep.h"
#include "core/error.h"
#include "core/whole_number.h"
#include "support/catch.h"
#include "support/error_of.h"

using namespace vqkv;
namespace fs = std::filesystem;

namespace {

std::string yaml_error(const std::string& text) {
  return error_of([&] { parse_yaml(text, "f.yaml"); });
}
bool has(const std::string& text, const std::string& part) {
  INFO(text);
  const bool found = text.find(part) != std::string::npos;
  CHECK(found);
  return found;
}

struct Folder {
  fs::path path;
  Folder() {
    std::string name = (fs::temp_directory_path() / "vqkv-config-XXXXXX").string();
    path = mkdtemp(name.data());
  }
  ~Folder() { fs::remove_all(path); }
  std::string write(const std::string& name, const std::string& text) const {
    fs::create_directories((path / name).parent_path());
    std::ofstream(path / name) << text;
    return (path / name).string();
  }
};

}  // namespace

TEST_CASE("scalars follow the core schema of YAML 1.2", "[config]") {
  const Json t =
      parse_yaml(
          "a: [yes, on, no, off, y, True, FALSE, true]\nb: [~, null, , 0x1F, 0o17, 017, -3, +4, 9223372036854775807]\n"
          "c: [1.5, .5, 5., 1e3, -2E-2, 1_000, 1.2.3, 0x, '4', \"true\"]\nd:\n",
          "f")
          .tree;
  CHECK(t["a"] == Json::array({"yes", "on", "no", "off", "y", true, false, true}));
  CHECK(t["b"] == Json::array({nullptr, nullptr, nullptr, 31, 15, 17, -3, 4, INT64_MAX}));
  CHECK(t["c"] == Json::array({1.5, .5, 5.0, 1000.0, -0.02, "1_000", "1.2.3", "0x", "4", "true"}));
  CHECK(t["c"][3].is_number_float());
  CHECK(t["d"].is_null());
  CHECK(parse_yaml("", "f").tree == Json::object());
  CHECK(parse_yaml("# only a remark\n", "f").tree == Json::object());
}

TEST_CASE("what yaml-cpp lets pass is refused with its position", "[config]") {
  has(yaml_error("a: 1\nb:\n  c: 1\n  c: 2\n"), "f.yaml:4:3: key 'c' stands twice");
  has(yaml_error("a: &x {b: 1}\nc:\n  <<: *x\n"), "f.yaml:3:3: merge keys");
  has(yaml_error("a: !!str 1\n"), "tags are not supported");
  has(yaml_error("a: .inf\n"), "not a finite number");
  has(yaml_error("a: 1e999\n"), "out of range");
  has(yaml_error("a: 9223372036854775808\n"), "64 bits");
  has(yaml_error("? [1]\n: 2\n"), "a key must be");
  has(yaml_error("null: 2\n"), "a key is missing");
  has(yaml_error("- 1\n"), "must be a map");
  has(yaml_error("a: 1\n---\nb: 2\n"), "more than one YAML document");
  has(yaml_error("a: [1, 2\n"), "f.yaml:");
  has(yaml_error("a: \"\xff\"\n"), "not UTF-8");
  has(yaml_error(std::string("a: \0b\n", 6)), "not UTF-8");
  for (const char* escape : {"\\N", "\\_", "\\0"}) {
    has(yaml_error(std::string("a: \"x") + escape + "\"\n"), "f.yaml:1:4: an escape");
    has(yaml_error(std::string("\"x") + escape + "\": 1\n"), "f.yaml:1:1: an escape");
  }
  has(yaml_error("a: &x [*x]\n"), "alias");
  has(yaml_error(std::string(kMaxConfigBytes + 1, '#')), "at most");
}

TEST_CASE("depth, node and alias bombs end in a message", "[config]") {
  std::string deep = "a: ";
  deep += std::string(200, '[') + std::string(200, ']');
  has(yaml_error(deep), "nested deeper");
  has(yaml_error(std::string(500'000, '[')), "f.yaml:1:");  // never closed
  std::string bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n";
  for (int i = 1; i < 12; ++i) {
    bomb += fmt::format("a{0}: &a{0} [", i);
    for (int k = 0; k < 10; ++k) bomb += fmt::format("*a{}, ", i - 1);
    bomb += "]\n";
  }
  has(yaml_error(bomb), "more than 200000 values");
  std::string fat = "a: &a '" + std::string(500'000, 'x') + "'\nb: [";
  for (int i = 0; i < 1000; ++i) fat += "*a, ";
  has(yaml_error(fat + "]\n"), "more than 200000 values");
  CHECK(parse_yaml("a: &a {x: 1}\nb: *a\n", "f").tree["b"]["x"] == 1);
}

TEST_CASE("includes merge in order below the file and cycles are named", "[config]") {
  const Folder f;
  f.write("codecs/rvq.yaml", "codec: {name: rvq, bits: 8, k: {rope: pre}}\ncache: {sinks: 4}\n");
  f.write("base.yaml", "include: codecs/rvq.yaml\ncodec: {bits: 6}\n");
  const std::string top = f.write("top.yaml", "include: [base.yaml]\ncodec:\n  k: {bits: 4}\n  list: [1, 2]\n");
  Config c = load_config(top);
  CHECK(
      c.tree ==
      Json::parse(R"({"codec":{"name":"rvq","bits":6,"k":{"rope":"pre","bits":4},"list":[1,2]},"cache":{"sinks":4}})"));
  has(c.where("codec.bits"), "base.yaml:2:9");
  has(c.where("codec.k.bits"), "top.yaml:3:7");
  has(c.where("cache.sinks"), "rvq.yaml:2:9");
  has(c.where("codec.nothing.here"), "top.yaml:2:1");
  has(c.annotate("codec.k.bits: 4 is outside [5, 8]"), "top.yaml:3:7: codec.k.bits");
  CHECK(c.annotate("nothing of this file") == "nothing of this file");

  const std::string a = f.write("a.yaml", "include: b.yaml\n");
  f.write("b.yaml", "x: 1\ninclude: a.yaml\n");
  const std::string circle = error_of([&] { load_config(a); });
  has(circle, "b.yaml:2:1: include goes in a circle: a.yaml -> b.yaml -> a.yaml");
  f.write("s.yaml", "include: s.yaml\n");
  has(error_of([&] { load_config((f.path / "s.yaml").string()); }), "circle");
  has(error_of([&] { load_config(f.write("m.yaml", "include: gone.yaml\n")); }), "gone.yaml does not exist");
  has(error_of([&] { load_config(f.path.string()); }), "is a folder");
  std::string many = "include: [";
  for (int i = 0; i < 100; ++i) many += "codecs/rvq.yaml, ";
  has(error_of([&] { load_config(f.write("many.yaml", many + "]\n")); }), "more than 64 included files");
}

TEST_CASE("overrides", "[config]") {
  Config c = parse_yaml("codec: {name: rvq, bits: 8}\nsweep: {grid: {codec.bits: [4, 8]}}\n", "f.yaml");
  apply_override(c, "codec.bits=6");
  apply_override(c, "codec.k.rope=pre");
  apply_override(c, "metrics=[a, b]");
  apply_override(c, "codec.extra={x: 1, y: [2, 3.5]}");
  apply_override(c, "sweep.grid.codec.bits=[2]");
  apply_override(c, "empty=");
  apply_override(c, "trace.path=a=b.h5");
  CHECK(c.tree["codec"] == Json::parse(R"({"name":"rvq","bits":6,"k":{"rope":"pre"},"extra":{"x":1,"y":[2,3.5]}})"));
  CHECK(c.tree["sweep"]["grid"] == Json::parse(R"({"codec.bits":[2]})"));
  CHECK(c.tree["empty"].is_null());
  CHECK(c.tree["trace"]["path"] == "a=b.h5");
  CHECK(c.where("codec.bits") == "command line");
  has(error_of([&] { apply_override(c, "nothing"); }), "write path=value");
  has(error_of([&] { apply_override(c, "a..b=1"); }), "empty part");
  has(error_of([&] { apply_override(c, "codec.bits.low=1"); }), "codec.bits is 6, not a map");
  has(error_of([&] { apply_override(c, "x=[1"); }), "command line: x");
}

TEST_CASE("a number in a path names an entry of a list", "[config]") {
  Config c = parse_yaml("codec: {tiers: [{bits: 8}, {bits: 4}]}\n", "f.yaml");
  apply_override(c, "codec.tiers.1.bits=3");
  apply_override(c, "codec.tiers.0.k.rope=pre");
  CHECK(c.tree["codec"] == Json::parse(R"({"tiers":[{"bits":8,"k":{"rope":"pre"}},{"bits":3}]})"));
  CHECK(*find_path(c.tree, "codec.tiers.0.bits") == 8);
  CHECK(find_path(c.tree, "codec.tiers.2.bits") == nullptr);
  CHECK(find_path(c.tree, "codec.tiers.x") == nullptr);
  CHECK(c.annotate("codec.tiers[1].bits: too few") == "command line: codec.tiers[1].bits: too few");
  has(error_of([&] { apply_override(c, "codec.tiers.2.bits=3"); }), "codec.tiers is a list of 2 entries");
  has(error_of([&] { apply_override(c, "codec.tiers.first=3"); }), "'first' is none of them");

  c.tree["sweep"] = Json::parse(R"({"grid": {"codec.tiers.0.bits": [2, 6]}})");
  const Sweep sweep = expand_sweep(c);
  REQUIRE(sweep.points.size() == 2);
  CHECK(sweep.points[1].tree["codec"]["tiers"][0]["bits"] == 6);
  CHECK(sweep.points[1].tree["codec"]["tiers"][1]["bits"] == 3);
}

TEST_CASE("an override that is a path keeps every character", "[config]") {
  Config c;
  for (const std::string text :
       {"a #1.h5", "dir: x.h5", "[x].h5", "{a}", "2024",      "4.0",  "true", "null", "~",   "'q'.h5", "\"q\"", "- x",
        "&a",      "*a",        "!a",     "| x", " lead.h5 ", "a\tb", "a=b",  "",     "%20", "@",      "`"}) {
    apply_override(c, "trace.path=" + text);
    CHECK(c.tree["trace"]["path"] == text);
    apply_override(c, "group=" + text);
    CHECK(c.tree["group"] == text);
  }
  // Everything else is YAML.
  apply_override(c, "codec.bits=4 # four");
  CHECK(c.tree["codec"]["bits"] == 4);
  apply_override(c, "sweep.grid.trace.path=['a #1.h5', b.h5]");
  CHECK(c.tree["sweep"]["grid"] == Json::parse(R"({"trace.path":["a #1.h5","b.h5"]})"));
}

TEST_CASE("a tab in front of a line is named", "[config]") {
  for (const auto& [text, place] :
       std::vector<std::pair<std::string, std::string>>{{"codec:\n\tname: rtn\n", "f.yaml:2:1"},
                                                        {"\tcodec: 1\n", "f.yaml:1:1"},
                                                        {"codec:\n  name: rtn\n\tbits: 4\n", "f.yaml:3:1"},
                                                        {"a: 1\n\t\nb: 2\n", "f.yaml:2:1"},
                                                        {"codec:\n  k:\n  \tbits: 4\n", "f.yaml:3:3"},
                                                        {"l:\n  - 1\n\t- 2\n", "f.yaml:3:1"}})
    has(yaml_error(text), place + ": a tab in front of the line; YAML is indented with spaces");
  CHECK(parse_yaml("a:\t4\nb: {c: 1,\n\td: 2}\n", "f").tree == Json::parse(R"({"a":4,"b":{"c":1,"d":2}})"));
}

TEST_CASE("a dotted key in a file is refused with the spelling that is meant", "[config]") {
  const auto refusal = [](const std::string& text) {
    return error_of([&] { refuse_dotted_keys(parse_yaml(text, "f.yaml")); });
  };
  has(refusal("a: 1\ncodec.k.bits: 4\n"), "f.yaml:2:1: 'codec.k.bits' is one key with a dot in it");
  has(refusal("codec.k.bits: 4\n"), "nested maps, codec: {k.bits: ...}");
  has(refusal("codec: {k.bits: 4}\n"), "f.yaml:1:9: 'codec.k.bits' is one key");
  CHECK(refusal("codec: {overrides: [{layers: [0], set: {k.bits: 8}}]}\n").empty());
}

TEST_CASE("a whole number is one however it is spelled", "[config]") {
  const Config c = parse_yaml(
      "a: [4, 4.0, 4e0, 0x4, 40e-1]\nseed: 1e3\nbig: 1e16\nhalf: 4.5\nl: [1.0, 2e0, {x: 1}]\nr: {range: [1.0, 3e0]}\n"
      "one: 2.0\n",
      "f.yaml");
  for (const Json& v : c.tree["a"]) CHECK(whole_number(v) == 4);
  ConfigReader r(c, "");
  CHECK(r.integer("seed", 0, 0, INT64_MAX) == 1000);
  CHECK(r.integers("r", 0, 9, false) == std::vector<int64_t>{1, 2, 3});
  CHECK(r.integers("one", 0, 9, false) == std::vector<int64_t>{2});
  has(error_of([&] { r.integer("big", 0, 0, INT64_MAX); }), "an integer in");  // beyond 2^53: no longer one integer
  has(error_of([&] { r.integer("half", 0, 0, 9); }), "found 4.5");
  has(error_of([&] { r.integers("half", 0, 9, false); }), "expected integers in [0, 9], found 4.5");
  has(error_of([&] { r.integers("l", 0, 9, false); }), "expected integers in [0, 9], found {\"x\":1}");
}

TEST_CASE("a group merges over the rest", "[config]") {
  Config c = parse_yaml("codec: {name: rvq, iterations: 25}\ngroups: {test: {codec: {iterations: 1}}}\n", "f.yaml");
  Config plain = c;
  apply_group(plain);
  CHECK(plain.tree == Json::parse(R"({"codec":{"name":"rvq","iterations":25}})"));
  apply_override(c, "group=test");
  apply_group(c);
  CHECK(c.tree == Json::parse(R"({"codec":{"name":"rvq","iterations":1}})"));
  CHECK(c.where("codec.iterations") == "f.yaml:2:25");
  // What the command line says holds over the group, on whichever side of it it stands.
  for (const bool first : {true, false}) {
    Config over =
        parse_yaml("codec: {name: rvq, iterations: 25}\ngroups: {test: {codec: {iterations: 1, beam: 2}}}\n", "f.yaml");
    if (first) apply_override(over, "codec.iterations=7");
    apply_override(over, "group=test");
    if (!first) apply_override(over, "codec.iterations=7");
    apply_override(over, "groups.test.codec.beam=4");
    apply_group(over);
    CHECK(over.tree == Json::parse(R"({"codec":{"name":"rvq","iterations":7,"beam":4}})"));
    CHECK(over.where("codec.iterations") == "command line");
  }
  Config wrong = parse_yaml("group: tst\ngroups: {test: {}}\n", "f.yaml");
  has(error_of([&] { apply_group(wrong); }), "group: 'tst' is not known, did you mean 'test'?; allowed: test");
  // Whether it is chosen or not, a group is a map; null is one that was not given.
  Config number = parse_yaml("groups:\n  test: {}\n  quick: 1\n", "f.yaml");
  CHECK(error_of([&] { apply_group(number); }) == "f.yaml:3:3: groups.quick: expected a map, found 1");
  Config written = parse_yaml("seed: 1\n", "f.yaml");
  apply_override(written, "groups={a: 1}");
  CHECK(error_of([&] { apply_group(written); }) == "command line: groups.a: expected a map, found 1");
  Config none = parse_yaml("seed: 1\ngroup: quick\ngroups: {quick: null, test: {}}\n", "f.yaml");
  has(error_of([&] { apply_group(none); }), "group: 'quick' is not known; allowed: test");
}

TEST_CASE("the strict reader", "[config]") {
  const Config c = parse_yaml(
      "cache:\n  sinks: 4\n  wndow: 128\nbad: {i: 4.5, b: yes, t: 3, l: [1, 1], r: {range: [0, 6, 3]}, far: 99, all: "
      "all}\n",
      "f.yaml");
  ConfigReader cache(c, "cache");
  CHECK(cache.integer("sinks", 0, 0, 10) == 4);
  CHECK(cache.integer("window", 64, 0, 1000) == 64);
  has(error_of([&] { cache.finish(); }), "f.yaml:3:3: cache: unknown key 'wndow', did you mean 'window'?; allowed: ");
  ConfigReader bad(c, "bad");
  has(error_of([&] { bad.integer("i", 0, 0, 9); }), "f.yaml:4:7: bad.i: expected an integer in [0, 9], found 4.5");
  has(error_of([&] { bad.boolean("b", false); }), "expected true or false, found \"yes\"");
  has(error_of([&] { bad.text("t", ""); }), "expected a text, found 3");
  has(error_of([&] { bad.integers("l", 0, 9, false); }), "1 stands twice");
  has(error_of([&] { bad.integers("far", 0, 9, false); }), "bad.far: expected integers in [0, 9], found 99");
  CHECK(bad.integers("r", 0, 9, false) == std::vector<int64_t>{0, 3, 6});
  CHECK(bad.integers("all", 0, 9, true).empty());
  has(error_of([&] { bad.integers("all", 0, 9, false); }), "a list of integers");
}

TEST_CASE("an empty list is refused wherever it might mean none or all, null is a key that was not given", "[config]") {
  const Config c = parse_yaml(
      "lists: {a: [], b: []}\nnulls: {a: ~, b: ~, i: ~, t: ~, c: ~, f: ~}\nsweep: {grid: {x: ~, y: [1, 2]}, zip: ~, "
      "skip: ~, repeat: ~}\n",
      "f.yaml");
  ConfigReader lists(c, "lists");
  has(error_of([&] { lists.integers("a", 0, 9, false); }), "f.yaml:1:9: lists.a: an empty list; leave the key out");
  has(error_of([&] { lists.integers("a", 0, 9, true); }), ", or all");
  has(error_of([&] { lists.texts("b"); }), "f.yaml:1:16: lists.b: an empty list; leave the key out");
  ConfigReader nulls(c, "nulls");
  CHECK(nulls.integers("a", 0, 9, false).empty());
  CHECK(nulls.texts("b").empty());
  CHECK(nulls.integer("i", 3, 0, 9) == 3);
  CHECK(nulls.text("t", "x") == "x");
  CHECK(nulls.choice("c", "x", {"x"}) == "x");
  CHECK(nulls.boolean("f", true));
  nulls.finish();
  CHECK(expand_sweep(c).points.size() == 2);
  for (const char* sweep : {"zip: []", "skip: []", "grid: {a: []}", "grid: {a: {b: []}}", "repeat: {a: []}"})
    has(error_of([&] { expand_sweep(parse_yaml(fmt::format("sweep: {{{}}}\n", sweep), "f.yaml")); }),
        ": an empty list; leave the key out");
  const Folder dir;
  has(error_of([&] { load_config(dir.write("a.yaml", "include: []\n")); }), "a.yaml:1:1: include: an empty list");
  CHECK(load_config(dir.write("b.yaml", "include: ~\na: 1\n")).tree == Json{{"a", 1}});
  CHECK(without_nulls(Json::parse(R"({"a":null,"b":{"c":null,"d":[{"e":null},null,1]}})")) ==
        Json::parse(R"({"b":{"d":[{},null,1]}})"));
}

TEST_CASE("sweeps expand in a fixed order", "[config][sweep]") {
  const Config c = parse_yaml(
      "codec: {name: rvq, bits: 8}\nseed: 0\nsweep:\n"
      "  grid: {codec.bits: {range: [4, 8, 4]}, codec: {books: [1, 2]}}\n"
      "  zip: [{codec.name: [rvq, pq], codec.group: [64, 8]}]\n"
      "  skip: [{codec.name: pq, codec.books: 1}]\n"
      "  repeat: {seed: [1, 2]}\n",
      "f.yaml");
  const Sweep s = expand_sweep(c);
  REQUIRE(s.points.size() == 16);
  // "codec.bits" sorts after "codec", whose nested axis comes first; repeats are innermost.
  CHECK(s.points[0].axes == Json::parse(R"({"codec.books":1,"codec.bits":4,"codec.name":"rvq","codec.group":64})"));
  CHECK(s.points[0].repeat == Json::parse(R"({"seed":1})"));
  CHECK(s.points[1].repeat == Json::parse(R"({"seed":2})"));
  CHECK(s.points[2].axes["codec.name"] == "pq");
  CHECK(s.points[4].axes["codec.bits"] == 8);
  CHECK(s.points[8].axes["codec.books"] == 2);
  int skipped = 0;
  for (const auto& p : s.points) {
    CHECK_FALSE(p.tree.contains("sweep"));
    CHECK((p.skip.empty() ? 0 : 1) == (p.axes["codec.name"] == "pq" && p.axes["codec.books"] == 1 ? 1 : 0));
    skipped += !p.skip.empty();
  }
  CHECK(skipped == 4);
  CHECK(s.points[0].tree["codec"] == Json::parse(R"({"name":"rvq","bits":4,"books":1,"group":64})"));
  Config resolved;
  resolved.marks = s.marks;
  CHECK(resolved.where("codec.books") == "f.yaml:4:50");

  CHECK(expand_sweep(parse_yaml("a: 1\n", "f")).points.size() == 1);
  const Sweep maps = expand_sweep(
      parse_yaml("codec: {name: x, left: 1}\nsweep: {grid: {codec: [{name: rtn}, {name: pq, bits: 4}]}}\n", "f"));
  REQUIRE(maps.points.size() == 2);
  CHECK(maps.points[0].tree["codec"] == Json::parse(R"({"name":"rtn"})"));
}

TEST_CASE("malformed sweeps are refused", "[config][sweep]") {
  const auto error = [](const std::string& sweep) {
    return error_of([&] { expand_sweep(parse_yaml("a: 1\nsweep: " + sweep + "\n", "f.yaml")); });
  };
  has(error("{gird: {a: [1]}}"), "sweep: unknown key 'gird', did you mean 'grid'?");
  has(error("{grid: {a: 1}}"), "a list [a, b]");
  has(error("{grid: {a: []}}"), "empty list");
  has(error("{grid: {a: {range: [1, 9, 0]}}}"), "never reaches");
  has(error("{grid: {a: {range: [1, 9, -1]}}}"), "never reaches");
  has(error("{grid: {a: {range: [0, 1e15, 1]}}}"), "more than 100000 values");
  has(error("{grid: {a: {range: [-9000000000000000000, 9000000000000000000, 9000000000000000000]}}}"), "up to 1e15");
  has(error("{zip: [{a: [1, 2], b: [1]}]}"), "one length");
  has(error("{grid: {a: [1]}, repeat: {a: [2]}}"), "both swept");
  has(error("{grid: {a: [1], a.b: [2]}}"), "both swept");
  has(error("{grid: {a: {range: [1, 100]}, b: {range: [1, 100]}, c: {range: [1, 100]}}}"), "more than 100000 cells");
  has(error("{skip: [{}]}"), "empty rule");
  has(error("{grid: [1]}"), "a map of paths");
}

TEST_CASE("one identity for one meaning", "[config]") {
  CHECK(config_hash(parse_yaml("a: 4\nb: {c: 0.1}\n", "f").tree) ==
        config_hash(parse_yaml("b: {c: 1e-1}\na: 4.0\n", "f").tree));
  CHECK(config_hash(parse_yaml("a: 4\n", "f").tree) != config_hash(parse_yaml("a: '4'\n", "f").tree));
  CHECK(canonical_json(parse_yaml("a: 0.1\n", "f").tree) == "{\"a\":0.1}");
}
