// One thread budget for the process. oneDNN and our own loops share it.
#pragma once
#include <cstdint>
#include <functional>

namespace vqkv {

// Sets the budget (default: the processors this process may use). Call before the first parallel work.
void set_thread_count(int threads);
int thread_count();

// Calls body(i) for i in [0, n), each i once, in any order, on up to thread_count() threads; the calling thread works
// too. A call from inside a body runs serially. After an exception no further body begins, and when those that have
// begun have ended the exception of the lowest index is rethrown: the same at any thread count. Bodies must write to
// places of their own; reductions are the caller's, in index order, so that the result does not depend on the thread
// count.
void parallel_for(int64_t n, const std::function<void(int64_t)>& body);
// The same for body(first, end) over runs of `chunk` of them, the last one shorter.
void parallel_chunks(int64_t n, int64_t chunk, const std::function<void(int64_t first, int64_t end)>& body);

}  // namespace vqkv
