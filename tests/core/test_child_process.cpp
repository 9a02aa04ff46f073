// A program beside this one: words of a command, large exchanges, and every way to end.
#include "core/child_process.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "core/clock.h"
#include "core/error.h"
#include "support/catch.h"

using namespace vqkv;
using Catch::Contains;

namespace {

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }
std::span<std::byte> room_of(std::string& text) { return std::as_writable_bytes(std::span(text)); }

}  // namespace

TEST_CASE("a command is split as documented, without a shell", "[child]") {
  using Words = std::vector<std::string>;
  CHECK(split_command("python3 a.py --bits 4") == Words{"python3", "a.py", "--bits", "4"});
  CHECK(split_command("  a\t b\n") == Words{"a", "b"});
  CHECK(split_command("'a b' \"c d\"e f\\ g") == Words{"a b", "c de", "f g"});
  CHECK(split_command(R"(sh -c 'echo "$HOME" | cat')") == Words{"sh", "-c", "echo \"$HOME\" | cat"});
  CHECK(split_command(R"(a "say \"hi\" \n" '\' *.txt ~ $X)") == Words{"a", "say \"hi\" \\n", "\\", "*.txt", "~", "$X"});
  CHECK(split_command("a ''") == Words{"a", ""});
  for (const char* bad : {"", "  ", "''", "a 'b", "a \"b\\\""}) CHECK_THROWS_AS(split_command(bad), Error);
}

TEST_CASE("megabytes go to a child and come back at once", "[child]") {
  ChildProcess cat({"cat"});
  std::string sent(8 << 20, 'x'), got(sent.size(), ' ');
  for (size_t i = 0; i < sent.size(); i += 4099) sent[i] = static_cast<char>(i);
  size_t looks = 0;
  const auto done = cat.exchange(bytes_of(sent), room_of(got), 60, {}, [&](std::span<const std::byte>) { ++looks; });
  CHECK(done.end == ChildProcess::End::kDone);
  CHECK(done.received == sent.size());
  CHECK((got == sent));
  CHECK(looks > 1);
  CHECK(cat.state() == "still running");
}

TEST_CASE("a child that ends, hangs or can't be started", "[child]") {
  std::string room(64, ' ');
  {
    ChildProcess gone({"sh", "-c", "printf abc; echo why >&2; exit 3"});
    const auto done = gone.exchange({}, room_of(room), 60);
    CHECK(done.end == ChildProcess::End::kClosed);
    CHECK(done.received == 3);
    CHECK(gone.state() == "exit code 3");
    CHECK(gone.stderr_tail() == "why\n");
    // Writing to it is no signal to this process.
    const std::string much(1 << 20, 'x');
    CHECK(gone.exchange(bytes_of(much), room_of(room), 60).end == ChildProcess::End::kClosed);
  }
  {
    ChildProcess killed({"sh", "-c", "kill -9 $$"});
    CHECK(killed.exchange({}, room_of(room), 60).end == ChildProcess::End::kClosed);
    CHECK_THAT(killed.state(), Contains("killed by signal 9"));
  }
  {
    ChildProcess loud({"sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' e >&2; printf 0123; printf 45; sleep 60"});
    CHECK(loud.exchange({}, room_of(room).first(4), 60).end == ChildProcess::End::kDone);
    CHECK(loud.stderr_tail() == std::string(2048, 'e'));
    while (loud.unread() == 0) {}  // it writes once more
    CHECK(loud.unread() == 2);
  }
  {
    pid_t background = 0;
    {
      ChildProcess parent({"sh", "-c", "sleep 60 >/dev/null 2>&1 & printf '%10d' $!"});
      std::string number(10, ' ');
      REQUIRE(parent.exchange({}, room_of(number), 60).end == ChildProcess::End::kDone);
      background = static_cast<pid_t>(std::stol(number));
      CHECK(parent.state() == "exit code 0");
    }
    // What it started goes with it, though it ended itself before: gone, or dead and nobody's yet.
    std::ifstream stat("/proc/" + std::to_string(background) + "/stat");
    std::string id, name, state;
    const Stopwatch gone;
    while (stat >> id >> name >> state && state != "Z" && gone.seconds() < 20) {
      stat.close();
      stat.open("/proc/" + std::to_string(background) + "/stat");
    }
    CHECK((!stat.good() || state == "Z"));
  }
  const Stopwatch time;
  {
    ChildProcess late({"sleep", "60"});
    CHECK(late.exchange({}, room_of(room), 0.2).end == ChildProcess::End::kTimeout);
    int asked = 0;
    CHECK(late.exchange({}, room_of(room), 60, [&] { return ++asked > 2; }).end == ChildProcess::End::kStopped);
  }
  CHECK(time.seconds() < 30);  // it doesn't wait for the minute
  try {
    ChildProcess({"/no/such/program"});
    FAIL("started");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kUsage);
    CHECK_THAT(e.what(), Contains("'/no/such/program' can't be started: No such file"));
  }
}

TEST_CASE("children are ended together, and how they ended stays known", "[child]") {
  std::string name = (std::filesystem::temp_directory_path() / "vqkv-child-XXXXXX").string();
  const std::filesystem::path folder = mkdtemp(name.data());
  const std::string a = folder / "a", b = folder / "b";
  // Each ends by itself once both have lost their stdin.
  const std::string meet = "cat > /dev/null; : > $0; while [ ! -e $1 ]; do sleep 0.02; done; exit 5";
  ChildProcess first({"sh", "-c", meet, a, b}), second({"sh", "-c", meet, b, a});
  ChildProcess stubborn({"sh", "-c", "trap '' TERM; echo no >&2; while :; do sleep 1; done"});
  ChildProcess* const all[] = {&first, &second, &stubborn};
  ChildProcess::end_together(all);
  for (ChildProcess* const c : {&first, &second}) {
    CHECK(c->state() == "exit code 5");
    CHECK(c->exit_code() == 5);
    CHECK(c->last_words() == "exit code 5, nothing on its stderr");
  }
  CHECK(stubborn.last_words() == "killed by signal 9 (Killed), its stderr ends with:\nno\n");
  CHECK(stubborn.exit_code() == -1);
  ChildProcess::end_together(all);  // again: nothing happens
  std::filesystem::remove_all(folder);
}

TEST_CASE("a signal reaches a child at once", "[child]") {
  ChildProcess child({"sleep", "60"});
  child.signal(15);
  std::string room(1, ' ');
  CHECK(child.exchange({}, room_of(room), 60).end == ChildProcess::End::kClosed);
  CHECK(child.state() == "killed by signal 15 (Terminated)");
}
