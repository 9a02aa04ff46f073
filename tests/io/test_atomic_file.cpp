#include "io/atomic_file.h"

#include <sys/stat.h>

#include "io/mapped_file.h"
#include "support/catch.h"
#include "support/model_writers.h"

using namespace vqkv;
using namespace vqkv::testing;
namespace fs = std::filesystem;

TEST_CASE("a file appears under its name complete or not at all") {
  const TempFolder folder;
  const std::string path = folder.file("out.bin");
  {
    AtomicFile file(path);
    file.write("half");
    CHECK(fs::exists(path + ".partial"));
    CHECK_FALSE(fs::exists(path));
  }
  CHECK_FALSE(fs::exists(path + ".partial"));
  CHECK_FALSE(fs::exists(path));
  folder.write("out.bin.partial", "left by a run that was killed");
  {
    AtomicFile file(path);
    file.write("whole ");
    file.start_writing_out();
    CHECK_FALSE(fs::exists(path));
    file.write("text");
    file.commit();
  }
  CHECK(read_file(path) == "whole text");
  CHECK_FALSE(fs::exists(path + ".partial"));
  {
    AtomicFile again(path);
    again.write("x");
  }
  CHECK(read_file(path) == "whole text");
  write_file(path, "");
  CHECK(read_file(path).empty());
}

TEST_CASE("a second writer of the same file is refused, and the first is not disturbed") {
  const TempFolder folder;
  const std::string path = folder.file("out.bin");
  AtomicFile first(path);
  first.write("one");
  CHECK_THROWS_WITH(AtomicFile(path), Catch::Contains("another process is writing"));
  first.commit();
  CHECK(read_file(path) == "one");
}

TEST_CASE("a library may write to the partial path itself") {
  const TempFolder folder;
  AtomicFile file(folder.file("out.bin"));
  folder.write("out.bin.partial", "by a library");
  file.commit();
  CHECK(read_file(folder.file("out.bin")) == "by a library");
}

TEST_CASE("what can't be written or read is named") {
  const TempFolder folder;
  CHECK_THROWS_WITH(AtomicFile(folder.file("no/such/folder")),
                    Catch::Contains("no/such/folder") && Catch::Contains("can't be created"));
  CHECK_THROWS_WITH(read_file(folder.file("nothing")), Catch::Contains("nothing"));
  CHECK_THROWS_WITH(read_file(folder.path()), Catch::Contains("is a folder"));
  folder.write("long", std::string(100, 'x'));
  CHECK_THROWS_WITH(read_file(folder.file("long"), 99), Catch::Contains("100 bytes, at most 99"));
  CHECK_THROWS_WITH(require_free_space(folder.file("x"), int64_t{1} << 62),
                    Catch::Contains("4611686018427387904 bytes needed"));
  CHECK_NOTHROW(require_free_space(folder.file("x"), 1));
  CHECK_THROWS_WITH(MappedFile(folder.path()), Catch::Contains("not a regular file"));
  folder.write("empty", "");
  CHECK_THROWS_WITH(MappedFile(folder.file("empty")), Catch::Contains("is empty"));
  // What is there and is no file stays what it is; a link stays one, and its target is written.
  REQUIRE(::mkfifo(folder.file("pipe").c_str(), 0600) == 0);
  fs::create_symlink("/dev/null", folder.file("null"));
  for (const std::string name : {"pipe", "null"})
    CHECK_THROWS_WITH(write_file(folder.file(name), "x"), Catch::Contains("is a device, pipe or socket"));
  CHECK_THROWS_WITH(write_file(folder.path(), "x"), Catch::Contains("is a folder"));
  CHECK(fs::is_fifo(folder.file("pipe")));
  CHECK(fs::is_symlink(folder.file("null")));
  folder.write("target", "old");
  fs::create_symlink("target", folder.file("link"));
  fs::create_symlink("fresh", folder.file("dangling"));
  write_file(folder.file("link"), "new");
  write_file(folder.file("dangling"), "new");
  CHECK(fs::is_symlink(folder.file("link")));
  CHECK(fs::is_symlink(folder.file("dangling")));
  CHECK(read_file(folder.file("target")) == "new");
  CHECK(read_file(folder.file("fresh")) == "new");
  // /dev/full answers every write with "no space left on device".
  CHECK_THROWS_WITH(
      [&] {
        fs::create_symlink("/dev/full", folder.file("full.partial"));
        AtomicFile file(folder.file("full"));
        file.write("some bytes");
      }(),
      Catch::Contains("full.partial") && Catch::Contains("disk is full: 10 bytes still to write"));
}
