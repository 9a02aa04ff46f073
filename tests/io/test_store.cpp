#include <fmt/format.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <algorithm>
#include <fstream>
#include <functional>

#include "core/error.h"
#include "io/atomic_file.h"
#include "io/result_index.h"
#include "io/store.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/sweep_trace.h"

using namespace vqkv;

TEST_CASE("JSON lines: torn ends are tolerated, torn middles are not", "[store]") {
  CHECK(parse_jsonl("", "f").records.empty());
  const JsonlRead whole = parse_jsonl("{\"a\":1}\n\n{\"a\":2}\n", "f");
  CHECK(whole.records.size() == 2);
  CHECK(whole.torn.empty());
  CHECK(parse_jsonl("{\"a\":1}\n{\"a\":2}", "f").records.size() == 2);  // only the newline is missing
  const JsonlRead torn = parse_jsonl("{\"a\":1}\n{\"a\":2,\"b", "f");
  CHECK(torn.records.size() == 1);
  CHECK(torn.torn == "f line 2: 9 bytes of an unfinished record");
  CHECK(data_error_of([] { parse_jsonl("{\"a\":1}\n{\"a\":\n{\"a\":2}\n", "f"); }).find("f line 2") == 0);
  std::vector<int64_t> at;
  CHECK(parse_jsonl("{\"a\":1}\n\n{\"a\":2}\n{\"a\":", "f", [&](Json&& record, int64_t line) {
          CHECK(record.contains("a"));
          at.push_back(line);
        }) == "f line 4: 5 bytes of an unfinished record");
  CHECK(at == std::vector<int64_t>{1, 3});
  CHECK(data_error_of([] { parse_jsonl("[1]\n", "f", 7); }) == "f line 7: a JSON object is expected");
  CHECK(data_error_of([] { parse_jsonl("[1]\n", "f"); }) == "f line 1: a JSON object is expected");
  CHECK(data_error_of([] { parse_jsonl("{\"a\":1,\"a\":2}\n", "f"); }).find("stands twice") != std::string::npos);
}

TEST_CASE("a writer continues after a torn line and excludes a second one", "[store]") {
  const TestFolder dir;
  const std::string path = dir / "results/main.jsonl";
  {
    JsonlWriter w(path);
    w.append({{"n", 1}});
    w.append({{"n", 2}});
    CHECK(error_of([&] { JsonlWriter second(path); }).find("another run is writing") != std::string::npos);
  }
  for (const std::string& tail :
       {std::string("{\"n\":3,\"text\":\"unfin"), std::string("\0\0\0\0", 4), std::string("{")}) {
    std::ofstream(path, std::ios::app | std::ios::binary) << tail;
    CHECK(parse_jsonl(read_file(path), path).records.size() == 2);
    CHECK_FALSE(parse_jsonl(read_file(path), path).torn.empty());
    JsonlWriter w(path);
    CHECK(parse_jsonl(read_file(path), path).torn.empty());
  }
  std::ofstream(path, std::ios::app) << "{\"n\":3}";  // complete but for its newline: kept
  {
    JsonlWriter w(path);
    w.append({{"n", 4}});
  }
  const auto records = parse_jsonl(read_file(path), path).records;
  REQUIRE(records.size() == 4);
  CHECK(records[2]["n"] == 3);
  CHECK(records[3]["n"] == 4);
  std::ofstream(path, std::ios::app) << std::string(300'000, 'x');  // a long unfinished line
  JsonlWriter w(path);
  CHECK(parse_jsonl(read_file(path), path).records.size() == 4);
}

TEST_CASE("a full disk leaves whole lines", "[store]") {
  // A file size limit stands in for a full disk: the write is cut short in the same way.
  const TestFolder dir;
  const std::string path = dir / "r.jsonl";
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit {
      1000, 1000
    };
    setrlimit(RLIMIT_FSIZE, &limit);
    try {
      JsonlWriter w(path);
      for (int i = 0; i < 100; ++i) w.append({{"n", i}, {"text", std::string(90, 'x')}});
    } catch (const Error& e) { _exit(e.kind() == ErrorKind::kBadData ? 7 : 8); }
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WEXITSTATUS(status) == 7);
  const JsonlRead read = parse_jsonl(read_file(path), path);
  CHECK(read.torn.empty());
  CHECK(read.records.size() >= 8);
}

TEST_CASE("the result index in long form", "[store]") {
  const TestFolder dir;
  const std::vector<Json> records = {
      Json::parse(
          R"({"cell":"aa","id":"a","status":"ok","flags":["extrapolated"],"protocol":"window 64, blocks of 16","config":{"codec":{"k":{"bits":4},"name":"x, \"y\""},"list":[1,2]},"axes":{"codec.bits":4},
                      "measurements":[{"role":"report","tag":"key.nmse","value":0.5,"unit":"1","stderr":0.1,"n":3,"better":"lower","exact":false},
                                      {"role":"cost","tag":"bytes","context":4096,"sequences":64,"value":10}]})"),
      Json::parse(
          R"({"cell":"bb","id":"b","status":"skipped","reason":"3 does not divide 16","config":{"codec":{"k":{"bits":3}}}})")};
  const RecordSource source = [&](const auto& body) { std::for_each(records.begin(), records.end(), body); };
  std::set<std::string> columns;
  for (const Json& r : records) add_config_columns(r, columns);
  write_result_csv(dir / "r.csv", columns, source);
  CHECK(read_file(dir / "r.csv") ==
        "id,status,reason,flags,protocol,role,tag,context,sequences,value,unit,stderr,n,better,exact,codec.bits,codec."
        "k.bits,"
        "codec.name,list\n"
        "a,ok,,extrapolated,\"window 64, blocks of 16\",report,key.nmse,,,0.5,1,0.1,3,lower,false,4,4,\"x, "
        "\"\"y\"\"\",\"[1,2]\"\n"
        "a,ok,,extrapolated,\"window 64, blocks of 16\",cost,bytes,4096,64,10,,,,,,4,4,\"x, \"\"y\"\"\",\"[1,2]\"\n"
        "b,skipped,3 does not divide 16,,,,,,,,,,,,,,3,,\n");
  write_result_sqlite(dir / "r.sqlite", source, {{"plan", "p"}});
  write_result_sqlite(dir / "r.sqlite", source, {{"plan", "p"}});  // rebuilt in place
  CHECK(std::filesystem::file_size(dir / "r.sqlite") > 4096);
  CHECK_FALSE(std::filesystem::exists(dir / "r.sqlite.partial"));
}
