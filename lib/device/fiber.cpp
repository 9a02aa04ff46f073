#include "device/fiber.h"

#include "core/error.h"

#if defined(__x86_64__)

// 30 ns a switch; ucontext's, below, asks the system for its signal mask twice and takes 900.
extern "C" void vqkv_change_stack(void** left, void* next);
asm(R"(
.text
.globl vqkv_change_stack
.type vqkv_change_stack, @function
vqkv_change_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size vqkv_change_stack, . - vqkv_change_stack
)");

namespace vqkv::device {

void Fiber::prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
  // A called function finds its stack 8 bytes off a multiple of 16, a return address on top: none, since it never does.
  auto** top = reinterpret_cast<void**>(stack + bytes / 16 * 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  top_ = top;
}

void Fiber::change(Fiber& from, Fiber& to) { vqkv_change_stack(&from.top_, to.top_); }

}  // namespace vqkv::device

#else

namespace vqkv::device {

void Fiber::prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
  VQKV_CHECK(getcontext(&context_) == 0);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::change(Fiber& from, Fiber& to) { VQKV_CHECK(swapcontext(&from.context_, &to.context_) == 0); }

}  // namespace vqkv::device

#endif
