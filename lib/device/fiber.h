// A stack of its own, to be gone on with from where it was left: the threads of a block take turns on one host thread.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace vqkv::device {

class Fiber {
 public:
  // The next switch to it calls `entry`, which never returns, on the stack [stack, stack + bytes).
  void prepare(unsigned char* stack, size_t bytes, void (*entry)());
  // Leaves `from`, the one that runs, for `to`.
  static void change(Fiber& from, Fiber& to);

 private:
#if defined(__x86_64__)
  void* top_ = nullptr;  // of its stack where it was left: the six saved registers, then the address to go on at
#else
  ucontext_t context_{};
#endif
};

}  // namespace vqkv::device
