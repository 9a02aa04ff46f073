// Archives: what is written comes back; what is damaged does not.
#include <fstream>

#include "core/error.h"
#include "io/archive.h"
#include "io/atomic_file.h"
#include "io/hdf5.h"
#include "support/catch.h"
#include "trace_fixture.h"

using namespace vqkv;

namespace {

void write_archive(const std::string& path) {
  ArchiveWriter out(path, "vqkv-test", 2);
  const std::vector<float> book{1.5f, -2.0f, 0x1p-149f, 3.0f, -0.0f, 65504.0f};
  out.tensor("codec/00000/books", {2, 3}, book.data());
  out.tensor("codec/00000/chain.0/mean", {6}, book.data());
  out.tensor("scalar", {}, book.data());
  out.tensor("none", {0, 4}, nullptr);
  out.facts("codec/00000/train", {{"seconds", 1.25}, {"curve", {0.5, 0.25}}});
  out.facts("config", {{"name", "rvq"}});
  out.finish();
}

std::string archive_refusal(
    const std::string& path, const std::function<void(const ArchiveReader&)>& use = [](const ArchiveReader&) {}) {
  try {
    const ArchiveReader in(path, "vqkv-test", 1, 2);
    use(in);
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kBadData);
    CHECK_THAT(e.what(), Catch::Contains(path));
    return e.what();
  }
  return "";
}

void read_everything(const ArchiveReader& in) {
  in.tensor("codec/00000/books", {2, 3});
  in.tensor("codec/00000/chain.0/mean", {6});
  in.tensor("scalar", {});
  in.tensor("none", {0, 4});
  in.facts("codec/00000/train");
  in.facts("config");
}

}  // namespace

TEST_CASE("an archive reads back bit for bit", "[archive]") {
  const TempDir dir("archive");
  write_archive(dir / "a.h5");
  REQUIRE_FALSE(std::filesystem::exists(dir / "a.h5.partial"));
  const ArchiveReader in(dir / "a.h5", "vqkv-test", 1, 2);
  CHECK(in.version() == 2);
  CHECK(in.tensor("codec/00000/books", {2, -1}) == AlignedVector<float>{1.5f, -2.0f, 0x1p-149f, 3.0f, -0.0f, 65504.0f});
  CHECK(std::signbit(in.tensor("codec/00000/books", {-1, 3})[4]));
  CHECK(in.shape("codec/00000/books") == std::vector<int64_t>{2, 3});
  CHECK(in.tensor("scalar", {}) == AlignedVector<float>{1.5f});
  CHECK(in.tensor("none", {0, 4}).empty());
  CHECK(in.facts("codec/00000/train") == Json{{"seconds", 1.25}, {"curve", {0.5, 0.25}}});
  CHECK(in.has_facts("config"));
}

TEST_CASE("an archive refuses absent names, other shapes, formats and versions", "[archive]") {
  const TempDir dir("archive-refuse");
  const std::string path = dir / "a.h5";
  write_archive(path);
  CHECK_THAT(archive_refusal(path,
                             [](const ArchiveReader& in) {
                               in.tensor("books", {2, 3});
                             }),
             Catch::Contains("'books' is missing"));
  CHECK_THAT(archive_refusal(path,
                             [](const ArchiveReader& in) {
                               in.tensor("codec/00000/books", {3, 2});
                             }),
             Catch::Contains("(2, 3), must be (3, 2)"));
  CHECK_THAT(archive_refusal(path, [](const ArchiveReader& in) { in.tensor("codec/00000/books", {6}); }),
             Catch::Contains("must be (6)"));
  CHECK_THAT(archive_refusal(path, [](const ArchiveReader& in) { in.facts("plan"); }),
             Catch::Contains("'plan' are missing"));
  const auto opening = [&](const std::string& format, int64_t oldest, int64_t newest) -> std::string {
    try {
      const ArchiveReader in(path, format, oldest, newest);
    } catch (const Error& e) { return e.what(); }
    return "";
  };
  CHECK_THAT(opening("vqkv-codec", 1, 2), Catch::Contains("must be \"vqkv-codec\""));
  CHECK_THAT(opening("vqkv-test", 1, 1), Catch::Contains("version 2; this build reads 1 to 1"));
  CHECK_THAT(opening("vqkv-test", 3, 4), Catch::Contains("version 2"));
  const float nan = NAN;
  ArchiveWriter out(dir / "b.h5", "vqkv-test", 1);
  CHECK_THROWS_WITH(out.tensor("x", {1}, &nan), Catch::Contains("'x' holds nan"));
  CHECK_THROWS_AS(out.tensor("../x", {0}, nullptr), Error);
  CHECK_THROWS_AS(out.tensor("/x", {0}, nullptr), Error);
  const float one = 1;
  out.tensor("x", {1}, &one);
  CHECK_THROWS_AS(out.facts("x", 1), Error);
}

TEST_CASE("every flipped byte of an archive is noticed or harmless, and never a crash", "[archive]") {
  const TempDir dir("archive-damage");
  write_archive(dir / "a.h5");
  const std::string bytes = read_file(dir / "a.h5");
  // The values themselves: each byte of the stored book.
  const float first[2] = {1.5f, -2.0f};
  const size_t at = bytes.find(std::string(reinterpret_cast<const char*>(first), 8));
  REQUIRE(at != std::string::npos);
  const auto damaged = [&](size_t where, char flip) {
    std::string copy = bytes;
    copy[where] = static_cast<char>(copy[where] ^ flip);
    std::ofstream(dir / "d.h5", std::ios::binary).write(copy.data(), static_cast<std::streamsize>(copy.size()));
    return archive_refusal(dir / "d.h5", read_everything);
  };
  for (size_t i = 0; i < 24; ++i) CHECK_THAT(damaged(at + i, 0x10), Catch::Contains("does not match its hash"));
  Rng rng(3);
  for (int i = 0; i < 150; ++i) damaged(rng.below(bytes.size()), static_cast<char>(1 + rng.below(255)));
  for (int i = 0; i < 20; ++i) {
    std::ofstream(dir / "c.h5", std::ios::binary)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size() * static_cast<size_t>(i) / 20));
    CHECK_FALSE(archive_refusal(dir / "c.h5", read_everything).empty());
  }
}
