// Runs CUDA C++ kernels on the CPU, for tests. host_device.py includes this before a .cu file.
//
// Each thread of a block is a fiber. The blocks run one after another, the fibers of a block all
// on one thread of the processor, and a fiber runs until it waits for others: in a barrier, in a
// shuffle or in a vote. So a run is deterministic, and the order of the threads can be chosen.
//
// NVIDIA's own headers define the vector types and the 16-bit floats. A kernel sees CUDA_CPU
// defined, and neither __CUDACC__ nor __CUDA_ARCH__.
#pragma once

#define CUDA_CPU 1

#include <vector_types.h>

#include <vector_functions.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__) && !defined(CUDA_CPU_PORTABLE)
#define CUDA_CPU_ASSEMBLY 1
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Qualifiers. Blocks run one after another, so a static array is one block's shared memory; it is
// filled anew before each of them (see Region).
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__ __attribute__((noinline))

// A .cu file says under #ifndef what this is on the device:
// extern __shared__ __align__(16) unsigned char name[]
#define DYNAMIC_SHARED(name) unsigned char* const name = cuda_cpu::dynamic_shared

namespace cuda_cpu {

// What runs between two fibers is the harness's: checking it would cost more than the kernels.
#define CUDA_CPU_UNCHECKED __attribute__((no_sanitize("address", "undefined")))

constexpr unsigned kLanes = 32, kMaxWarps = 32, kMaxThreads = kLanes * kMaxWarps;
constexpr size_t kStackBytes = 256 * 1024;  // a sanitizer's report is written on a fiber's stack
constexpr int kPoison = 0xff;  // NaN in every float type, -1 in every signed integer

enum class Wait : unsigned char { kNone, kBlock, kWarp, kShuffle, kVote };

// Where a kernel waits: its own line, since these are defaults of the functions that it calls.
struct Place {
  const char* file;
  int line;
};

struct Fiber {
  void* stack_pointer;
  char* bottom;
  void* fake_stack;  // AddressSanitizer's
};

struct Thread {
  uint3 index;
  Fiber* fiber;  // null until the thread begins
  Wait wait;
  unsigned mask;    // of the lanes that take part
  unsigned source;  // the lane that a shuffle reads
  uint64_t value;   // given by this lane, then received
  Place place;
  uint64_t loads, multiply_adds;
};

// Sets of lanes. One that is neither ready nor waiting for its warp nor at its end waits for the
// block.
struct Warp {
  unsigned present, ready, waiting, ended;
};

// What the launcher is told of a kernel, and its caller of the kernel's parameters.
struct Parameter {
  uint32_t bytes;
  char kind;  // p: pointer, i: integer, f: floating point, s: anything else
};
struct Kernel {
  void (*run)(void** arguments);
  const void* address;
  const Parameter* parameters;
  uint64_t count;
};
struct Region {
  unsigned char* start;
  uint64_t bytes;
};
enum Order : uint32_t { kForward, kReverse, kShuffle };
struct Launch {
  uint32_t grid[3], block[3];
  uint32_t thread_order, block_order;
  uint64_t seed;
  uint64_t shared_bytes;
  void* stacks;           // of cuda_cpu_stacks
  const Region* regions;  // the static __shared__ arrays
  uint64_t region_count;
};

// What a launch did: the most of any block, and of any thread. Loads and multiply-adds are counted
// with CUDA_CPU_COUNTS alone, since that takes as long as they do.
struct Counts {
  uint64_t barriers;       // of a block
  uint64_t loads;          // of a thread, by __ldg
  uint64_t multiply_adds;  // of a thread, by fmaf and fma
};

// One kernel runs at a time in a module, which its caller sees to.
inline Thread threads[kMaxThreads];
inline Warp warps[kMaxWarps];
inline unsigned warp_order[kMaxWarps];
inline unsigned thread_count, warp_count, warp_at;
inline Thread* current;

inline Fiber fibers[kMaxThreads];
inline Fiber* idle[kMaxThreads];
inline unsigned fiber_count, idle_count;
inline char* stacks;
inline Fiber host;
inline size_t host_stack_bytes;

inline void (*body)(void**);
inline void** arguments;
inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;
inline unsigned char* dynamic_shared;

inline uint32_t thread_order;
inline uint64_t random_state;
inline unsigned first_lane;  // the order within a warp: from this lane on,
inline bool lanes_reversed;  // up or down

inline unsigned arrived, arrived_true;  // in the barrier of the block
inline Thread *first_arrived, *arrived_elsewhere;
inline unsigned barrier_result;
inline uint64_t barriers;  // that the block has passed
inline Counts most;

inline char failure[1024];

// ---------------------------------------------------------------------------------- fibers

void work();  // what a fiber does

inline const size_t page_bytes = size_t(sysconf(_SC_PAGESIZE));
inline const size_t stack_stride = page_bytes + kStackBytes;

#if defined(CUDA_CPU_ASSEMBLY)
// Saves the registers that a called function must keep, and the stack pointer; loads another's.
extern "C" __attribute__((visibility("hidden"))) void cuda_cpu_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.type cuda_cpu_switch, @function
cuda_cpu_switch:
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
.size cuda_cpu_switch, . - cuda_cpu_switch
)");

// Below `top`: six registers, the function to return to, and no caller of that.
inline void prepare(Fiber& fiber, char* top) {
  void** frame = reinterpret_cast<void**>(top) - 8;
  memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(&work);
  fiber.stack_pointer = frame;
}

inline void swap_stacks(Fiber& from, Fiber& to) {
  cuda_cpu_switch(&from.stack_pointer, to.stack_pointer);
}
#else
// Slower, since the signal mask is saved too, by a call of the kernel.
inline ucontext_t contexts[kMaxThreads + 1];

inline ucontext_t* context_of(Fiber& fiber) {
  return &contexts[&fiber == &host ? kMaxThreads : &fiber - fibers];
}

inline void prepare(Fiber& fiber, char* top) {
  ucontext_t* context = context_of(fiber);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.bottom;
  context->uc_stack.ss_size = top - fiber.bottom;
  context->uc_link = nullptr;
  makecontext(context, work, 0);
}

inline void swap_stacks(Fiber& from, Fiber& to) { swapcontext(context_of(from), context_of(to)); }
#endif

inline void prepare(Fiber& fiber) {
  // Stacks that began at the same offset in a page would compete for a few sets of the cache.
  const size_t color = (&fiber - fibers) * 13 % 64 * 64;
  prepare(fiber, fiber.bottom + kStackBytes - color);
}

CUDA_CPU_UNCHECKED inline void after_switch([[maybe_unused]] Fiber* me) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(me ? me->fake_stack : nullptr, &bottom, &bytes);
  if (host.bottom == nullptr) {  // the first switch of a launch leaves the host's stack
    host.bottom = static_cast<char*>(const_cast<void*>(bottom));
    host_stack_bytes = bytes;
  }
#endif
}

CUDA_CPU_UNCHECKED inline void switch_to(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  const size_t bytes = &to == &host ? host_stack_bytes : kStackBytes;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, bytes);
#endif
  swap_stacks(from, to);
  after_switch(&from);
}

// A fiber that has run a thread to its end waits for another; each launch begins with none.
CUDA_CPU_UNCHECKED inline Fiber* take_fiber() {
  if (idle_count > 0) return idle[--idle_count];
  Fiber& fiber = fibers[fiber_count];
  fiber.bottom = stacks + fiber_count++ * stack_stride + page_bytes;
  prepare(fiber);
  return &fiber;
}

// Threads that will not go on leave behind what AddressSanitizer knows of their stacks.
inline void forget_stacks() {
#if defined(__SANITIZE_ADDRESS__)
  for (unsigned i = 0; i < fiber_count; ++i)
    __asan_unpoison_memory_region(fibers[i].bottom, kStackBytes);
#endif
}

// ------------------------------------------------------------------------------- scheduling

CUDA_CPU_UNCHECKED inline uint64_t random_bits() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  const int used = snprintf(failure, sizeof failure, "block (%u, %u, %u): ", block_index.x,
                            block_index.y, block_index.z);
  va_list values;
  va_start(values, format);
  vsnprintf(failure + used, sizeof failure - used, format, values);
  va_end(values);
}

inline const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::kBlock: return "a barrier of the block";
    case Wait::kWarp: return "__syncwarp";
    case Wait::kShuffle: return "a shuffle";
    case Wait::kVote: return "a vote";
    default: return "nothing";
  }
}

CUDA_CPU_UNCHECKED inline bool same_place(const Place& a, const Place& b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

CUDA_CPU_UNCHECKED inline unsigned lane_of(const Thread& thread) {
  return (&thread - threads) % kLanes;
}
CUDA_CPU_UNCHECKED inline Warp& warp_of(const Thread& thread) {
  return warps[(&thread - threads) / kLanes];
}

// Sets the order of the warps and lanes up to the next barrier of the block. In each warp the
// lanes' order is that of the numbers, up or down, beginning with any of them.
CUDA_CPU_UNCHECKED inline void order_warps() {
  warp_at = 0;
  for (unsigned i = 0; i < warp_count; ++i)
    warp_order[i] = thread_order == kReverse ? warp_count - 1 - i : i;
  first_lane = 0;
  lanes_reversed = thread_order == kReverse;
  if (thread_order != kShuffle) return;
  for (unsigned i = warp_count; i > 1; --i)
    std::swap(warp_order[i - 1], warp_order[random_bits() % i]);
  first_lane = random_bits() % kLanes;
  lanes_reversed = random_bits() % 2;
}

CUDA_CPU_UNCHECKED inline unsigned next_lane(unsigned ready) {
  const unsigned turned =
      first_lane == 0 ? ready : ready >> first_lane | ready << (kLanes - first_lane);
  const unsigned at = lanes_reversed ? 31 - __builtin_clz(turned) : __builtin_ctz(turned);
  return (at + first_lane) % kLanes;
}

inline void fail_in_warp(const Thread* lanes, const Warp& warp) {
  const Thread& stuck = lanes[__builtin_ctz(warp.waiting)];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Thread& other = lanes[lane];
    if (!(stuck.mask & warp.present) >> lane & 1) continue;
    const bool ended = warp.ended >> lane & 1;
    if (!ended && other.wait == stuck.wait && other.mask == stuck.mask &&
        same_place(other.place, stuck.place))
      continue;
    char where[256] = "has returned";
    if (!ended)
      snprintf(where, sizeof where, "waits in %s with mask 0x%08x at %s:%d", name_of(other.wait),
               other.mask, other.place.file, other.place.line);
    return fail("warp %u waits in %s with mask 0x%08x at %s:%d, where lane %u does not come: it %s",
                unsigned(lanes - threads) / kLanes, name_of(stuck.wait), stuck.mask,
                stuck.place.file, stuck.place.line, lane, where);
  }
}

// Gives the lanes of `group`, which have all come, what they came for.
CUDA_CPU_UNCHECKED inline bool exchange(Thread* lanes, unsigned group) {
  const Wait wait = lanes[__builtin_ctz(group)].wait;
  uint64_t given[kLanes], votes = 0;
  for (unsigned left = group; left; left &= left - 1) {
    const unsigned lane = __builtin_ctz(left);
    given[lane] = lanes[lane].value;
    votes |= uint64_t(given[lane] != 0) << lane;
  }
  for (unsigned left = group; left; left &= left - 1) {
    Thread& thread = lanes[__builtin_ctz(left)];
    if (wait == Wait::kShuffle) {
      if (!(group >> thread.source & 1)) {
        fail("warp %u: the shuffle at %s:%d reads lane %u, which does not take part in it "
             "(mask 0x%08x)",
             unsigned(lanes - threads) / kLanes, thread.place.file, thread.place.line,
             thread.source, thread.mask);
        return false;
      }
      thread.value = given[thread.source];
    } else {
      thread.value = votes;
    }
  }
  return true;
}

// Ends the waiting of every group of lanes of which all have come; false if there is none.
CUDA_CPU_UNCHECKED inline bool release_lanes(unsigned number) {
  Warp& warp = warps[number];
  Thread* lanes = threads + number * kLanes;
  bool is_released = false;
  for (unsigned left = warp.waiting; left;) {
    const Thread& first = lanes[__builtin_ctz(left)];
    const unsigned group = first.mask & warp.present;
    unsigned alike = 0;
    for (unsigned others = group & warp.waiting; others; others &= others - 1) {
      const Thread& other = lanes[__builtin_ctz(others)];
      if (other.wait == first.wait && other.mask == first.mask &&
          same_place(other.place, first.place))
        alike |= 1u << __builtin_ctz(others);
    }
    left &= ~alike;
    if (alike != group) continue;
    if (!exchange(lanes, group)) return false;
    warp.waiting &= ~group;
    warp.ready |= group;
    is_released = true;
  }
  if (!is_released) fail_in_warp(lanes, warp);
  return is_released;
}

// All threads that have not ended wait for the block: let them go on, if there are any.
CUDA_CPU_UNCHECKED inline bool release_block() {
  if (arrived == 0) return false;
  const Place& place = first_arrived->place;
  if (arrived < thread_count) {
    fail("%u of %u threads wait in the barrier at %s:%d, the others have returned without it",
         arrived, thread_count, place.file, place.line);
    return false;
  }
  if (arrived_elsewhere != nullptr) {
    fail("threads wait in different barriers: thread %u at %s:%d, thread %u at %s:%d",
         unsigned(first_arrived - threads), place.file, place.line,
         unsigned(arrived_elsewhere - threads), arrived_elsewhere->place.file,
         arrived_elsewhere->place.line);
    return false;
  }
  ++barriers;
  barrier_result = arrived_true;
  arrived = arrived_true = 0;
  for (unsigned i = 0; i < warp_count; ++i) warps[i].ready = warps[i].present;
  order_warps();
  return true;
}

// Returns the thread to run next; null when the block has ended or a failure is noted. A warp runs
// until none of its lanes can go on; so between two barriers one may be far ahead of another.
CUDA_CPU_UNCHECKED inline Thread* next_thread() {
  if (failure[0]) return nullptr;
  for (;;) {
    for (; warp_at < warp_count; ++warp_at) {
      const unsigned number = warp_order[warp_at];
      Warp& warp = warps[number];
      while (!warp.ready && warp.waiting)
        if (!release_lanes(number)) return nullptr;
      if (warp.ready) {
        const unsigned lane = next_lane(warp.ready);
        warp.ready &= ~(1u << lane);
        return &threads[number * kLanes + lane];
      }
    }
    if (!release_block()) return nullptr;
  }
}

// Makes `thread` the one that runs, and returns its fiber; the host's if there is no thread.
CUDA_CPU_UNCHECKED inline Fiber& make_current(Thread* thread) {
  if (thread == nullptr) return host;
  current = thread;
  thread_index = thread->index;
  if (thread->fiber == nullptr) thread->fiber = take_fiber();
  return *thread->fiber;
}

// Runs threads from their beginning to their end. A thread that never waits needs no switch: the
// next one begins on the same stack.
CUDA_CPU_UNCHECKED void work() {
  after_switch(nullptr);
  for (;;) {
    body(arguments);
    Fiber& mine = *current->fiber;
    warp_of(*current).ended |= 1u << lane_of(*current);
    Thread* next = next_thread();
    idle[idle_count++] = &mine;
    Fiber& theirs = make_current(next);
    if (&theirs != &mine) switch_to(mine, theirs);
  }
}

// Lets others run until what the current thread waits for has come.
__attribute__((noinline)) CUDA_CPU_UNCHECKED uint64_t wait(Wait wait, unsigned mask,
                                                           unsigned source, uint64_t value,
                                                           Place place) {
  Thread& me = *current;
  me.wait = wait;
  me.mask = mask;
  me.source = source;
  me.value = value;
  me.place = place;
  if (wait == Wait::kBlock) {
    if (arrived++ == 0) {
      first_arrived = &me;
      arrived_elsewhere = nullptr;
    } else if (!same_place(first_arrived->place, place)) {
      arrived_elsewhere = &me;
    }
    arrived_true += value != 0;
  } else {
    if (!(mask >> lane_of(me) & 1))
      fail("thread %u calls %s at %s:%d with mask 0x%08x, which leaves out its own lane %u",
           unsigned(&me - threads), name_of(wait), place.file, place.line, mask, lane_of(me));
    warp_of(me).waiting |= 1u << lane_of(me);
  }
  Fiber& theirs = make_current(next_thread());
  if (&theirs != me.fiber) switch_to(*me.fiber, theirs);
  asm volatile("" ::: "memory");  // others have run: nothing in memory is as it was
  return wait == Wait::kBlock ? barrier_result : me.value;
}

CUDA_CPU_UNCHECKED inline void run_block(const Launch& launch) {
  for (uint64_t i = 0; i < launch.region_count; ++i)
    memset(launch.regions[i].start, kPoison, launch.regions[i].bytes);
  memset(dynamic_shared, kPoison, launch.shared_bytes);
  for (unsigned i = 0; i < thread_count; ++i) {
    threads[i].fiber = nullptr;
    threads[i].loads = threads[i].multiply_adds = 0;
  }
  barriers = 0;
  for (unsigned i = 0; i < warp_count; ++i) {
    const unsigned left = thread_count - i * kLanes;
    const unsigned present = left < kLanes ? (1u << left) - 1 : ~0u;
    warps[i] = {present, present, 0, 0};
  }
  arrived = arrived_true = 0;
  order_warps();
  Fiber& first = make_current(next_thread());
  host.bottom = nullptr;
  switch_to(host, first);
  most.barriers = std::max(most.barriers, barriers);
  for (unsigned i = 0; i < thread_count; ++i) {
    most.loads = std::max(most.loads, threads[i].loads);
    most.multiply_adds = std::max(most.multiply_adds, threads[i].multiply_adds);
  }
}

#if defined(__SANITIZE_ADDRESS__)
inline bool says_where;

inline void say_where() {
  if (current != nullptr)
    fprintf(stderr, "In block (%u, %u, %u), thread (%u, %u, %u)\n", block_index.x, block_index.y,
            block_index.z, thread_index.x, thread_index.y, thread_index.z);
}

// Each of the two sanitizers has a function of this name, and only one is found by it.
inline void say_where_at_the_end() {
  says_where = true;
  __sanitizer_set_death_callback(say_where);
  void* undefined_behavior = dlopen("libubsan.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (undefined_behavior == nullptr) return;
  using Setter = void (*)(void (*)());
  if (void* found = dlsym(undefined_behavior, "__sanitizer_set_death_callback"))
    reinterpret_cast<Setter>(found)(say_where);
  dlclose(undefined_behavior);
}
#endif

template <class T>
constexpr Parameter describe() {
  constexpr bool is_integer = std::is_integral_v<T> || std::is_enum_v<T>;
  constexpr bool is_float = std::is_floating_point_v<T> || std::is_same_v<T, __half>;
  return {sizeof(T), std::is_pointer_v<T> ? 'p' : is_integer ? 'i' : is_float ? 'f' : 's'};
}

template <auto kernel>
struct Entry;

template <class... T, void (*kernel)(T...)>
struct Entry<kernel> {
  static_assert((std::is_trivially_copyable_v<T> && ...), "parameters are copied byte by byte");

  template <size_t... i>
  static void call(void** values, std::index_sequence<i...>) {
    kernel(*static_cast<T*>(values[i])...);
  }
  static void run(void** values) { call(values, std::index_sequence_for<T...>()); }

  static constexpr Parameter parameters[sizeof...(T) + 1] = {describe<T>()..., {}};
  static Kernel get() {
    return {run, reinterpret_cast<const void*>(kernel), parameters, sizeof...(T)};
  }
};

}  // namespace cuda_cpu

// Returns memory for the stacks of a block, for all launches of a process; null if there is none.
extern "C" __attribute__((visibility("default"))) void* cuda_cpu_stacks() {
  using namespace cuda_cpu;
  const size_t bytes = kMaxThreads * stack_stride;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  // The lowest page is closed: a stack that overflows must not run into its neighbour.
  for (unsigned i = 0; i < kMaxThreads; ++i)
    if (mprotect(static_cast<char*>(memory) + i * stack_stride, page_bytes, PROT_NONE) != 0)
      return nullptr;
  return memory;
}

// What the last launch did.
extern "C" __attribute__((visibility("default"))) const cuda_cpu::Counts* cuda_cpu_counts() {
  return &cuda_cpu::most;
}

// Runs a grid. Returns null, or what went wrong in a barrier, a shuffle or a vote.
extern "C" __attribute__((visibility("default"))) const char* cuda_cpu_launch(
    const cuda_cpu::Kernel* kernel, const cuda_cpu::Launch* launch, void** arguments) {
  using namespace cuda_cpu;
  const auto [x, y, z] = launch->grid;
  const uint32_t* block = launch->block;
  grid_size = dim3(x, y, z);
  block_size = dim3(block[0], block[1], block[2]);
  thread_count = block[0] * block[1] * block[2];
  warp_count = (thread_count + kLanes - 1) / kLanes;
  stacks = static_cast<char*>(launch->stacks);
  fiber_count = idle_count = 0;
  for (unsigned i = 0; i < thread_count; ++i)
    threads[i].index = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
  body = kernel->run;
  cuda_cpu::arguments = arguments;
  thread_order = launch->thread_order;
  random_state = launch->seed;
  failure[0] = 0;
  most = {};
  // Exactly as large as asked for, so that the next byte is one that AddressSanitizer guards.
  dynamic_shared = static_cast<unsigned char*>(malloc(launch->shared_bytes));
  if (dynamic_shared == nullptr && launch->shared_bytes) return "there is no memory left";
#if defined(__SANITIZE_ADDRESS__)
  if (!says_where) say_where_at_the_end();
#endif
  const uint64_t count = uint64_t(x) * y * z;
  for (uint64_t i = 0; i < count && !failure[0]; ++i) {
    const uint64_t at = launch->block_order == kReverse ? count - 1 - i : i;
    block_index = {unsigned(at % x), unsigned(at / x % y), unsigned(at / x / y)};
    run_block(*launch);
  }
  current = nullptr;
  if (failure[0]) forget_stacks();
  free(dynamic_shared);
  return failure[0] ? failure : nullptr;
}

// ---------------------------------------------------------------------- what kernels may use

inline constexpr const uint3& threadIdx = cuda_cpu::thread_index;
inline constexpr const uint3& blockIdx = cuda_cpu::block_index;
inline constexpr const dim3& blockDim = cuda_cpu::block_size;
inline constexpr const dim3& gridDim = cuda_cpu::grid_size;
inline constexpr int warpSize = cuda_cpu::kLanes;

// The last parameters of what waits: where it was called.
#define CUDA_CPU_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_CPU_PLACE) {
  cuda_cpu::wait(cuda_cpu::Wait::kBlock, 0, 0, 0, {file, line});
}
inline int __syncthreads_count(int predicate, CUDA_CPU_PLACE) {
  return int(cuda_cpu::wait(cuda_cpu::Wait::kBlock, 0, 0, predicate != 0, {file, line}));
}
inline int __syncthreads_or(int predicate, CUDA_CPU_PLACE) {
  return __syncthreads_count(predicate, file, line) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_CPU_PLACE) {
  return __syncthreads_count(predicate, file, line) == int(cuda_cpu::thread_count);
}
inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_CPU_PLACE) {
  cuda_cpu::wait(cuda_cpu::Wait::kWarp, mask, 0, 0, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_CPU_PLACE) {
  return unsigned(cuda_cpu::wait(cuda_cpu::Wait::kVote, mask, 0, predicate != 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_CPU_PLACE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_CPU_PLACE) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}

namespace cuda_cpu {

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Place place) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = wait(Wait::kShuffle, mask, source, bits, place);
  memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}

// The lane that runs, and the first and last lane of its segment of the warp.
struct Segment {
  unsigned lane, first, last;
};
inline Segment segment(int width, Place place) {
  const unsigned lane = lane_of(*current), others = unsigned(width) - 1;
  if (width >= 1 && width <= 32 && (width & (width - 1)) == 0)
    return {lane, lane & ~others, lane | others};
  fail("the shuffle at %s:%d has width %d, which is no power of two up to 32", place.file,
       place.line, width);
  return {lane, lane, lane};  // the shuffle does not return
}

}  // namespace cuda_cpu

// Lanes are reckoned as by PTX's shfl.sync: modulo 32, and a lane whose source is outside its
// segment keeps its own value; but an index wraps around, and xor may reach an earlier segment.
#define CUDA_CPU_SHUFFLE(T, name, Operand, source_lane)                                         \
  inline T name(unsigned mask, T value, Operand operand, int width = 32, CUDA_CPU_PLACE) {      \
    [[maybe_unused]] const auto [lane, first, last] = cuda_cpu::segment(width, {file, line});   \
    const unsigned by = unsigned(operand) % 32, source = source_lane;                           \
    return cuda_cpu::shuffle(mask, value, source, {file, line});                                \
  }
#define CUDA_CPU_SHUFFLES(T)                                                                    \
  CUDA_CPU_SHUFFLE(T, __shfl_sync, int, first + by % (last - first + 1))                        \
  CUDA_CPU_SHUFFLE(T, __shfl_up_sync, unsigned, lane >= first + by ? lane - by : lane)          \
  CUDA_CPU_SHUFFLE(T, __shfl_down_sync, unsigned, lane + by <= last ? lane + by : lane)         \
  CUDA_CPU_SHUFFLE(T, __shfl_xor_sync, int, (lane ^ by) <= last ? lane ^ by : lane)
CUDA_CPU_SHUFFLES(int)
CUDA_CPU_SHUFFLES(unsigned)
CUDA_CPU_SHUFFLES(long)
CUDA_CPU_SHUFFLES(unsigned long)
CUDA_CPU_SHUFFLES(long long)
CUDA_CPU_SHUFFLES(unsigned long long)
CUDA_CPU_SHUFFLES(float)
CUDA_CPU_SHUFFLES(double)
CUDA_CPU_SHUFFLES(__half)
CUDA_CPU_SHUFFLES(__half2)
CUDA_CPU_SHUFFLES(__nv_bfloat16)
CUDA_CPU_SHUFFLES(__nv_bfloat162)

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { abort(); }

// Loads and stores with a hint for the cache. As on the device, the pointer says the type.
#define CUDA_CPU_LOAD(name)  \
  template <class T>         \
  T name(const T* pointer) { \
    return *pointer;         \
  }
#define CUDA_CPU_STORE(name)                         \
  template <class T>                                 \
  void name(T* pointer, std::remove_cv_t<T> value) { \
    *pointer = value;                                \
  }
#ifdef CUDA_CPU_COUNTS
template <class T>
T __ldg(const T* pointer) {
  ++cuda_cpu::current->loads;
  return *pointer;
}
#else
CUDA_CPU_LOAD(__ldg)
#endif
CUDA_CPU_LOAD(__ldca)
CUDA_CPU_LOAD(__ldcg)
CUDA_CPU_LOAD(__ldcs)
CUDA_CPU_LOAD(__ldlu)
CUDA_CPU_LOAD(__ldcv)
CUDA_CPU_STORE(__stwb)
CUDA_CPU_STORE(__stcg)
CUDA_CPU_STORE(__stcs)
CUDA_CPU_STORE(__stwt)

// One thread runs at a time, so that these are atomic. Integers wrap around, as on the device.
#define CUDA_CPU_ATOMIC(name, T, ...)                                                        \
  inline T name(T* address, T value) {                                                       \
    const T old = *address;                                                                  \
    *address = __VA_ARGS__;                                                                  \
    return old;                                                                              \
  }
#define CUDA_CPU_INTEGER_ATOMICS(T, U)                                                       \
  CUDA_CPU_ATOMIC(atomicAdd, T, static_cast<T>(static_cast<U>(old) + static_cast<U>(value))) \
  CUDA_CPU_ATOMIC(atomicMin, T, value < old ? value : old)                                   \
  CUDA_CPU_ATOMIC(atomicMax, T, value > old ? value : old)                                   \
  CUDA_CPU_ATOMIC(atomicAnd, T, old & value)                                                 \
  CUDA_CPU_ATOMIC(atomicOr, T, old | value)                                                  \
  CUDA_CPU_ATOMIC(atomicXor, T, old ^ value)                                                 \
  CUDA_CPU_ATOMIC(atomicExch, T, value)                                                      \
  inline T atomicCAS(T* address, T compare, T value) {                                       \
    const T old = *address;                                                                  \
    if (old == compare) *address = value;                                                    \
    return old;                                                                              \
  }
CUDA_CPU_INTEGER_ATOMICS(int, unsigned)
CUDA_CPU_INTEGER_ATOMICS(unsigned, unsigned)
CUDA_CPU_INTEGER_ATOMICS(unsigned long long, unsigned long long)
CUDA_CPU_ATOMIC(atomicSub, int, int(unsigned(old) - unsigned(value)))
CUDA_CPU_ATOMIC(atomicSub, unsigned, old - value)
CUDA_CPU_ATOMIC(atomicMin, long long, value < old ? value : old)
CUDA_CPU_ATOMIC(atomicMax, long long, value > old ? value : old)
CUDA_CPU_ATOMIC(atomicAdd, float, old + value)
CUDA_CPU_ATOMIC(atomicAdd, double, old + value)
CUDA_CPU_ATOMIC(atomicExch, float, value)

// Bits.
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

namespace cuda_cpu {

template <class To, class From>
To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace cuda_cpu

inline int __float_as_int(float x) { return cuda_cpu::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_cpu::same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_cpu::same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_cpu::same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_cpu::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_cpu::same_bits<double>(x); }

// Arithmetic that is never contracted, or always. The fast versions here are the exact ones.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }

// Of a NaN and a number, the number; of a signed and an unsigned integer, an unsigned one.
namespace cuda_cpu {
template <class A, class B>
using Common = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>,
                                std::common_type_t<A, B>>;
}
template <class A, class B>
cuda_cpu::Common<A, B> min(A a, B b) {
  using T = cuda_cpu::Common<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B>
cuda_cpu::Common<A, B> max(A a, B b) {
  using T = cuda_cpu::Common<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) > T(b) ? T(a) : T(b);
}

#ifdef CUDA_CPU_COUNTS
#define fmaf(a, b, c) (++cuda_cpu::current->multiply_adds, fmaf(a, b, c))
#define fma(a, b, c) (++cuda_cpu::current->multiply_adds, fma(a, b, c))
#endif
