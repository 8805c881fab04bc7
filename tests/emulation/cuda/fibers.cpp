// Fibers: stacks, switches between them, and what the sanitizers must know of both. x86-64 only.
#include <sys/mman.h>

#include "engine_state.h"

#if defined(QLK_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(QLK_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

// Saves the callee-saved registers and the stack pointer in *save, continues at `load`.
extern "C" void qlk_switch_stack(void** save, void* load);
asm(R"(
.text
.globl qlk_switch_stack
.type qlk_switch_stack, @function
qlk_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size qlk_switch_stack, .-qlk_switch_stack
)");

namespace qlk::emulation {

Fiber* running = nullptr;
void* scheduler_tsan = nullptr;

namespace {

constexpr size_t kStackBytes = 256 << 10, kPageBytes = 4096;
void* scheduler_stack = nullptr;
#if defined(QLK_ASAN)
void* scheduler_asan_stack = nullptr;
const void* scheduler_bottom = nullptr;
size_t scheduler_bytes = 0;
#endif

}  // namespace

void* new_sync() {
  static char addresses[1 << 20];
  static size_t next = 0;
  next = (next + 8) % sizeof addresses;
  return addresses + next;
}

void release(void* sync) {
#if defined(QLK_TSAN)
  __tsan_release(sync);
#else
  (void)sync;
#endif
}

void acquire(void* sync) {
#if defined(QLK_TSAN)
  __tsan_acquire(sync);
#else
  (void)sync;
#endif
}

void to_scheduler() {
  Fiber* self = running;
#if defined(QLK_ASAN)
  __sanitizer_start_switch_fiber(&self->asan_stack, scheduler_bottom, scheduler_bytes);
#endif
#if defined(QLK_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  qlk_switch_stack(&self->stack_pointer, scheduler_stack);
#if defined(QLK_ASAN)
  __sanitizer_finish_switch_fiber(self->asan_stack, nullptr, nullptr);
#endif
}

void to_fiber(Fiber* fiber) {
  running = fiber;
  thread_index = fiber->index;
#if defined(QLK_ASAN)
  __sanitizer_start_switch_fiber(&scheduler_asan_stack, fiber->stack, kStackBytes);
#endif
#if defined(QLK_TSAN)
  __tsan_switch_to_fiber(fiber->tsan, __tsan_switch_to_fiber_no_sync);
#endif
  qlk_switch_stack(&scheduler_stack, fiber->stack_pointer);
#if defined(QLK_ASAN)
  __sanitizer_finish_switch_fiber(scheduler_asan_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void begin_fiber() {
#if defined(QLK_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);
#endif
}

Fiber* new_fiber(int number, void (*entry)()) {
  auto* fiber = new Fiber;
  fiber->number = number;
  for (HeldSums& held : fiber->sums) held.users = 0;
  // A guard page below: an overflow faults.
  void* memory = mmap(nullptr, kStackBytes + kPageBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPageBytes, PROT_NONE) != 0)
    fail("no memory for the stack of thread %d", number);
  fiber->stack = static_cast<unsigned char*>(memory) + kPageBytes;
  // Six saved registers, the entry, and a slot that aligns the stack as a call would.
  auto** top = reinterpret_cast<void**>(fiber->stack + kStackBytes) - 8;
  for (int i = 0; i < 6; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(entry);
  top[7] = nullptr;
  fiber->stack_pointer = top;
#if defined(QLK_TSAN)
  fiber->tsan = __tsan_create_fiber(0);
#endif
  return fiber;
}

}  // namespace qlk::emulation
