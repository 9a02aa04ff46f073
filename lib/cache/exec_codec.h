// A codec in another program: blocks of rows go to a child process and come back reconstructed (docs/exec.md says how).
// Seen from a cache it is a codec whose codes are those rows, in f32: every path attends to what the child returned.
// What the child's codes weigh can't be counted here; claimed_bytes() is its word for it.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "cache/policy.h"
#include "codec/codec_set.h"

namespace vqkv {

struct ExecOptions {
  std::string command;              // words as split_command takes them
  double seconds = 60;              // that an answer may take
  std::function<bool()> stop = {};  // asked while an answer is awaited; true ends the wait in an error
};

// One child, for one sequence at a time under one policy: tokens are handed over once and in order, in blocks of the
// policy's flush, and the next sequence begins when nothing holds the last one's any more.
class ExecCodec {
 public:
  // Starts the program and shakes hands. kUsage: it can't be started, or the policy gives tokens up. kBadData, with the
  // command and the end of its stderr: it ends, hangs, or answers something else.
  ExecCodec(const CacheShape& shape, const CachePolicy& policy, const ExecOptions& options);

  // The same program once more, for a cache under another policy.
  std::shared_ptr<const ExecCodec> under(const CachePolicy& policy) const;

  // Ends the programs at once, so that several take no longer than one; none codes anything afterwards.
  static void end_together(std::span<const std::shared_ptr<const ExecCodec>> programs);

  // What the program calls itself: 1 to 40 printable characters.
  const std::string& name() const;
  // A codec for all heads of each (layer, role). Encoding is kBadData where the child dies, is late, or answers
  // anything but finite rows of the shape asked for: command, layer, role, position and what came.
  std::shared_ptr<const CodecSet> codecs() const { return codecs_; }
  // What the child says it keeps of the present sequence, or of the last one where there is none.
  int64_t claimed_bytes() const;

 private:
  class Talk;
  class UnitCodec;
  std::shared_ptr<Talk> talk_;
  std::shared_ptr<const CodecSet> codecs_;
};

}  // namespace vqkv
