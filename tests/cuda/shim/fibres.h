// The threads of a block as fibres: each runs until it reaches a collective, which takes place once
// all of its warp (or block) has arrived.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <vector>

#ifndef __x86_64__
#define SHIM_UCONTEXT
#endif
#ifdef SHIM_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#define SHIM_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SHIM_ADDRESS_SANITIZER
#endif
#endif
#ifdef SHIM_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace dev::host {

// a place in a kernel's source
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site&) const = default;
};

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

// how a collective acts on the arguments of all lanes, in order of the lanes
using Action = void (*)(void* const* arguments);

enum class State { Ready, AtWarp, AtBlock, Done };

struct Thread {
  int index;  // in the block
  dim3 place;
  State state;
  const char* call;  // the collective it waits at
  Site site;
  Action action;
  void* argument;

  void* stack;
#ifdef SHIM_UCONTEXT
  ucontext_t context;
#else
  void* top;
#endif
  void* fake_stack = nullptr;

  int warp() const { return index / kWarp; }
  int lane() const { return index % kWarp; }
};

inline Thread* current = nullptr;

// end the program with a message that names the block and the thread
[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  std::fprintf(stderr, "shim: block (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
  if (current) std::fprintf(stderr, " thread %d", current->index);
  std::fprintf(stderr, ": ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  _exit(3);
}

#ifndef SHIM_UCONTEXT
// save the callee's registers and the stack pointer in *from, continue at to
extern "C" void shim_switch(void** from, void* to);
asm(R"(
  .text
  .type shim_switch, @function
shim_switch:
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
  .size shim_switch, .-shim_switch
)");
#endif

// runs the fibres of one block after the other; there is one scheduler per program
class Scheduler {
 public:
  static Scheduler& get() {
    static Scheduler scheduler;
    return scheduler;
  }

  // run body in each of count threads; called once per block
  void run(int count, const std::function<void()>& body) {
    while (int(threads_.size()) < count) add_thread();
    body_ = &body;
    count_ = count;
    block_epoch = 0;
    warp_epoch.assign(size_t(count / kWarp), 0);
    for (int i = 0; i < count; ++i) {
      threads_[i]->state = State::Ready;
      threads_[i]->place = {i % blockDim.x, i / blockDim.x % blockDim.y,
                            i / (blockDim.x * blockDim.y)};
    }
    do {
      for (int warp = 0; warp < count / kWarp; ++warp) run_warp(warp);
    } while (release_block());
  }

  // called by a fibre: wait until all lanes are here and action has been taken
  void wait(State state, const char* call, Site site, Action action, void* argument) {
    Thread& t = *current;
    t.state = state;
    t.call = call;
    t.site = site;
    t.action = action;
    t.argument = argument;
    leave(t);
  }

  int block_epoch = 0;          // barriers of the block so far
  std::vector<int> warp_epoch;  // barriers of each warp so far

 private:
  void add_thread() {
    auto t = std::make_unique<Thread>();
    t->index = int(threads_.size());
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    // the lowest page stays closed: a stack that overflows faults
    char* base = static_cast<char*>(
        mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base, page, PROT_NONE)) fail("no memory for a stack");
    t->stack = base + page;
#ifdef SHIM_UCONTEXT
    getcontext(&t->context);
    t->context.uc_stack.ss_sp = t->stack;
    t->context.uc_stack.ss_size = kStack;
    t->context.uc_link = nullptr;
    makecontext(&t->context, &Scheduler::fibre, 0);
#else
    // six registers, the address that the first switch returns to, and one for alignment
    void** top = reinterpret_cast<void**>(base + page + kStack) - 8;
    top[6] = reinterpret_cast<void*>(&Scheduler::fibre);
    t->top = top;
#endif
    threads_.push_back(std::move(t));
  }

  static void fibre() {
    Scheduler& s = get();
    s.arrived(nullptr);
    for (;;) {
      (*s.body_)();
      current->state = State::Done;
      s.leave(*current);
    }
  }

  void arrived([[maybe_unused]] void* fake_stack) {
#ifdef SHIM_ADDRESS_SANITIZER
    const void** bottom = current ? &main_bottom_ : nullptr;
    __sanitizer_finish_switch_fiber(fake_stack, bottom, current ? &main_size_ : nullptr);
#endif
  }

  void enter(Thread& t) {
    current = &t;
    threadIdx = t.place;
#ifdef SHIM_ADDRESS_SANITIZER
    __sanitizer_start_switch_fiber(&fake_stack_, t.stack, kStack);
#endif
#ifdef SHIM_UCONTEXT
    swapcontext(&main_, &t.context);
#else
    shim_switch(&main_, t.top);
#endif
    current = nullptr;
    arrived(fake_stack_);
  }

  void leave(Thread& t) {
#ifdef SHIM_ADDRESS_SANITIZER
    __sanitizer_start_switch_fiber(&t.fake_stack, main_bottom_, main_size_);
#endif
#ifdef SHIM_UCONTEXT
    swapcontext(&t.context, &main_);
#else
    shim_switch(&t.top, main_);
#endif
    arrived(t.fake_stack);
  }

  // run a warp until it is done or at a barrier of the block
  void run_warp(int warp) {
    auto lane = [&](int i) -> Thread& { return *threads_[warp * kWarp + i]; };
    for (;;) {
      for (int i = 0; i < kWarp; ++i) {
        if (lane(i).state == State::Ready) enter(lane(i));
      }
      for (int i = 1; i < kWarp; ++i) check_together(lane(0), lane(i));
      if (lane(0).state != State::AtWarp) return;
      void* arguments[kWarp];
      for (int i = 0; i < kWarp; ++i) {
        arguments[i] = lane(i).argument;
        lane(i).state = State::Ready;
      }
      current = &lane(0);  // for messages
      lane(0).action(arguments);
      current = nullptr;
    }
  }

  // two threads that should be at one collective, or both done
  void check_together(const Thread& a, const Thread& b) {
    const bool done = a.state == State::Done;
    if (done && b.state == State::Done) return;
    if (!done && b.state == a.state && a.call == b.call && a.site == b.site) return;
    const Thread& at = done ? b : a;
    const Thread& missing = done ? a : b;
    current = threads_[size_t(missing.index)].get();
    if (missing.state == State::Done) {
      fail("divergence: it has returned, while thread %d waits at %s (%s:%d)", at.index, at.call,
           at.site.file, at.site.line);
    }
    fail("divergence: it waits at %s (%s:%d), while thread %d waits at %s (%s:%d)", missing.call,
         missing.site.file, missing.site.line, at.index, at.call, at.site.file, at.site.line);
  }

  // past a barrier of the block, if all threads are there; false once all are done
  bool release_block() {
    Thread& first = *threads_[0];
    for (int i = kWarp; i < count_; i += kWarp) check_together(first, *threads_[i]);
    if (first.state == State::Done) return false;
    for (int i = 0; i < count_; ++i) threads_[i]->state = State::Ready;
    ++block_epoch;
    return true;
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  const std::function<void()>* body_ = nullptr;
  int count_ = 0;
#ifdef SHIM_UCONTEXT
  ucontext_t main_;
#else
  void* main_ = nullptr;
#endif
  void* fake_stack_ = nullptr;
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
};

}  // namespace dev::host
