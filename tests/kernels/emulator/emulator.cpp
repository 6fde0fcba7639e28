#include "emulator.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// Saves what a call preserves, changes the stack, and goes on there.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
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
)");
#else
#include <ucontext.h>
#endif

namespace emulator {

Lane* current = nullptr;
Dimensions block;

namespace {

constexpr size_t kStack = 256 * 1024;

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

enum class Waiting { kNo, kWarp, kBlock };

struct Fiber : Lane {
  unsigned char* stack = nullptr;
#ifdef __x86_64__
  void* context = nullptr;
#else
  ucontext_t context;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* sanitizer = nullptr;
#endif
  bool done = false;
  Waiting waiting = Waiting::kNo;
  int round = 0;  // of the warp's exchange buffer
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  uint32_t words[2][32][8];
  int operation[2][32];
  int arrived = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
int live = 0, at_barrier = 0;
unsigned char* shared = nullptr;
int shared_size = 0;
const std::function<void()>* body = nullptr;
std::string kernel_name;
std::string failure;
// By kernel: the shared memory that it was admitted with, and the tensor instructions that its warps have run.
std::map<std::string, int> admitted;
std::map<std::string, int64_t> instructions;
// Of warps and of threads in them. 0: first one first; 1: last first; more: at random, with this seed.
unsigned order = 0;

#ifdef __x86_64__
void* scheduler = nullptr;
#else
ucontext_t scheduler;
#endif
#ifdef __SANITIZE_ADDRESS__
void* scheduler_sanitizer = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#endif

Fiber& self() { return *static_cast<Fiber*>(current); }

void leave(bool for_good) {
  Fiber& fiber = self();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.sanitizer, scheduler_stack, scheduler_stack_size);
#else
  (void)for_good;
#endif
#ifdef __x86_64__
  emulator_switch(&fiber.context, scheduler);
#else
  swapcontext(&fiber.context, &scheduler);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self().sanitizer, &scheduler_stack, &scheduler_stack_size);
#endif
}

void enter(Fiber& fiber) {
  current = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&scheduler_sanitizer, fiber.stack, kStack);
#endif
#ifdef __x86_64__
  emulator_switch(&scheduler, fiber.context);
#else
  swapcontext(&scheduler, &fiber.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_sanitizer, nullptr, nullptr);
#endif
}

[[noreturn]] void main_of_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  Fiber& fiber = self();
  if (!fiber.open.empty() || !fiber.groups.empty()) fail("thread %d ends before its copies have come", fiber.index);
  fiber.done = true;
  --live;
  leave(true);
  std::abort();
}

void prepare(Fiber& fiber, int index) {
  if (fiber.stack == nullptr) {
    fiber.stack = static_cast<unsigned char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (fiber.stack == MAP_FAILED) std::abort();
  }
  fiber.index = index;
  fiber.thread = Dimensions(static_cast<unsigned>(index), 0, 0);
  fiber.done = false;
  fiber.waiting = Waiting::kNo;
  fiber.round = 0;
  fiber.open.clear();
  fiber.groups.clear();
#ifdef __SANITIZE_ADDRESS__
  fiber.sanitizer = nullptr;
  // The last thread on this stack never returned, and its guards are still there.
  __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
#ifdef __x86_64__
  // A return address, and below it the six registers that emulator_switch pops; the stack is as after a call.
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&main_of_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(&main_of_fiber), 0);
#endif
}

void run_block(int threads) {
  live = threads;
  at_barrier = 0;
  warps.assign(static_cast<size_t>((threads + 31) / 32), Warp{});
  for (int i = 0; i < threads; ++i) {
    if (static_cast<size_t>(i) >= fibers.size()) fibers.push_back(std::make_unique<Fiber>());
    prepare(*fibers[static_cast<size_t>(i)], i);
  }
  std::mt19937 random(order);
  const auto shuffled = [&](int count) {
    std::vector<int> turn(static_cast<size_t>(count));
    std::iota(turn.begin(), turn.end(), 0);
    if (order == 1) std::reverse(turn.begin(), turn.end());
    if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
    return turn;
  };
  // A warp runs as far as it can before the next: what it reads of another's without a barrier is then not there yet,
  // or not there any more.
  while (live > 0) {
    bool moved = false;
    for (int warp : shuffled(static_cast<int>(warps.size()))) {
      for (bool again = true; again;) {
        again = false;
        for (int lane : shuffled(32)) {
          Fiber& fiber = *fibers[static_cast<size_t>(32 * warp + lane)];
          if (fiber.done || fiber.waiting != Waiting::kNo) continue;
          moved = again = true;
          enter(fiber);
        }
      }
    }
    if (!moved) fail("%d of %d threads wait at a barrier that the others do not reach", live, threads);
  }
}

float bfloat16_at(uint32_t word, int half) { return mnemos::miras_scan::as_float(half ? word & 0xffff0000u : word << 16); }

// Tensor cores are measured to cut off rather than round: the sum is exact here, its conversion towards zero.
float towards_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}

}  // namespace

// Called by every lane of a warp.
void count() {
  if (current->index % 32 == 0) ++instructions[kernel_name];
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u): %s\n", kernel_name.c_str(), block.x, block.y, block.z,
               text);
  std::fflush(stderr);
  std::abort();
}

void block_barrier() {
  Fiber& fiber = self();
  if (live != static_cast<int>(warps.size()) * 32) fail("thread %d is at a barrier that other threads left", fiber.index);
  if (++at_barrier == live) {
    at_barrier = 0;
    for (int i = 0; i < live; ++i) fibers[static_cast<size_t>(i)]->waiting = Waiting::kNo;
    return;
  }
  fiber.waiting = Waiting::kBlock;
  leave(false);
}

const uint32_t (*exchange(int operation, const uint32_t* words, int count))[8] {
  Fiber& fiber = self();
  Warp& warp = warps[static_cast<size_t>(fiber.index / 32)];
  const int lane = fiber.index % 32, round = fiber.round;
  fiber.round ^= 1;
  std::memcpy(warp.words[round][lane], words, static_cast<size_t>(count) * 4);
  warp.operation[round][lane] = operation;
  if (++warp.arrived == 32) {
    for (int i = 0; i < 32; ++i) {
      if (warp.operation[round][i] != operation) fail("the lanes of warp %d do different things", fiber.index / 32);
      fibers[static_cast<size_t>(fiber.index / 32 * 32 + i)]->waiting = Waiting::kNo;
    }
    warp.arrived = 0;
  } else {
    fiber.waiting = Waiting::kWarp;
    leave(false);
  }
  return warp.words[round];
}

unsigned char* shared_memory() { return shared; }

void check_load(const void* address, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (p >= shared && p < shared + shared_size) return;
  for (size_t i = 0; i + 4 <= bytes; i += 4) {
    uint32_t word;
    std::memcpy(&word, p + i, 4);
    if (word == kNeverWritten) fail("thread %d reads global memory that nothing has written", current->index);
  }
}

void check_shared(const void* address, int bytes, int alignment) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < shared || p + bytes > shared + shared_size) fail("thread %d is outside of shared memory", current->index);
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment)) {
    fail("thread %d: an address in shared memory is not a multiple of %d", current->index, alignment);
  }
}

void copy_async(void* to, const void* from, bool valid) {
  check_shared(to, 16, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("thread %d copies from an address that is no multiple of 16", current->index);
  std::memset(to, 0xff, 16);
  self().open.push_back({to, from, valid});
}

void copy_commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void copy_wait(int pending) {
  auto& groups = self().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        check_load(copy.global, 16);
        std::memcpy(copy.shared, copy.global, 16);
      } else {
        std::memset(copy.shared, 0, 16);
      }
    }
    groups.pop_front();
  }
}

void admit(const char* name, int shared_bytes) { admitted[name] = shared_bytes; }

void run(const char* name, Dimensions grid, int threads, int shared_bytes, const std::function<void()>& function) {
  kernel_name = name;
  body = &function;
  shared_size = shared_bytes;
  const auto found = admitted.find(name);
  if (found == admitted.end() || found->second != shared_bytes) fail("it was not admitted with %d bytes", shared_bytes);
  if (threads % 32) fail("%d threads are no whole warps", threads);
  if (grid.y > 65535 || grid.z > 65535) fail("the grid is too large");
  if (shared_bytes > 163 * 1024) fail("%d bytes of shared memory are more than sm_80 has", shared_bytes);
  for (block.z = 0; block.z < grid.z; ++block.z) {
    for (block.y = 0; block.y < grid.y; ++block.y) {
      for (block.x = 0; block.x < grid.x; ++block.x) {
        // A new one for every block: the address sanitizer guards its ends.
        void* memory = nullptr;
        if (posix_memalign(&memory, 16, static_cast<size_t>(shared_bytes))) std::abort();
        shared = static_cast<unsigned char*>(memory);
        std::memset(shared, 0xff, static_cast<size_t>(shared_bytes));
        run_block(threads);
        std::free(memory);
        shared = nullptr;
      }
    }
  }
}

}  // namespace emulator

extern "C" void emulator_set_order(unsigned order) { emulator::order = order; }

// The tensor instructions of a kernel since the last call.
extern "C" int64_t emulator_instructions(const char* name) { return std::exchange(emulator::instructions[name], 0); }

// The most shared memory that a kernel was admitted with since the last call.
extern "C" int emulator_admitted() {
  int most = 0;
  for (const auto& [name, bytes] : emulator::admitted) most = std::max(most, bytes);
  emulator::admitted.clear();
  return most;
}

namespace mnemos::miras_scan {

namespace {
enum Operation { kTf32, kBfloat16, kMatrices, kMatricesTransposed, kShuffle };
}

uint32_t round_tf32(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & ~0x1fffu;
  return (bits + 0x1000u) & ~0x1fffu;
}

uint32_t pack_bfloat16(float low, float high) {
  const auto one = [](float value) -> uint32_t {
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return one(low) | one(high) << 16;
}

uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

// Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k8" (tf32) and "... mma.m16n8k16" (bf16). With group = lane / 4 and
// t = lane % 4, an accumulator has rows group, group + 8 and columns 2 t, 2 t + 1.
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto* lanes = emulator::exchange(kTf32, words, 6);
  emulator::count();
  const int lane = emulator::current->index % 32, group = lane / 4, t = lane % 4;
  for (int i = 0; i < 6; ++i) {
    if (words[i] & 0x1fffu) emulator::fail("an operand of a tf32 product is not rounded");
  }
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = d[i];
    for (int k = 0; k < 8; ++k) {
      // a: row group or group + 8 (odd registers), k t or t + 4 (upper two); b: k likewise, column group.
      const float left = as_float(lanes[row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)]);
      const float right = as_float(lanes[column * 4 + k % 4][4 + k / 4]);
      sum += static_cast<double>(left) * right;
    }
    d[i] = emulator::towards_zero(sum);
  }
}

void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto* lanes = emulator::exchange(kBfloat16, words, 6);
  emulator::count();
  const int lane = emulator::current->index % 32, group = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const float left = emulator::bfloat16_at(lanes[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2);
      const float right = emulator::bfloat16_at(lanes[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
      sum += static_cast<double>(left) * right;
    }
    d[i] = emulator::towards_zero(sum);
  }
}

// PTX ISA, ldmatrix: lane i of a tile gets elements 2 (i % 4), + 1 of row i / 4; transposed, of column i / 4.
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  emulator::check_shared(row, 16, 16);
  uint32_t words[2];
  std::memcpy(words, &row, 8);
  const auto* lanes = emulator::exchange(transposed ? kMatricesTransposed : kMatrices, words, 2);
  const int lane = emulator::current->index % 32;
  for (int tile = 0; tile < 4; ++tile) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int along = 2 * (lane % 4) + e, across = lane / 4;
      const int from = transposed ? along : across, element = transposed ? across : along;
      const unsigned char* address;
      std::memcpy(&address, lanes[8 * tile + from], 8);
      std::memcpy(&pair[e], address + 2 * element, 2);
    }
    r[tile] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

float shuffle_xor(float value, int mask) {
  const uint32_t word = as_bits(value);
  const auto* lanes = emulator::exchange(kShuffle, &word, 1);
  return as_float(lanes[(emulator::current->index % 32) ^ mask][0]);
}

}  // namespace mnemos::miras_scan

// The emulator's own check: a sum in shared memory, with and without the barrier that it needs.
extern "C" float emulated_sum(bool with_barrier, unsigned order) {
  emulator::order = order;
  emulator::admit("sum", 64 * 4);
  float result = 0.0f;
  emulator::run("sum", {1, 1, 1}, 64, 64 * 4, [&] {
    auto* x = reinterpret_cast<float*>(emulator::shared_memory());
    x[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (with_barrier) __syncthreads();
    if (threadIdx.x == 32) {
      for (int i = 0; i < 64; ++i) result += x[i];
    }
  });
  return result;
}

// Its own check of another thing: a copy of four words of global memory, of which three or four are written before.
extern "C" float emulated_copy(bool all_written) {
  emulator::admit("copy", 16);
  alignas(16) uint32_t source[4] = {0, 0, 0, all_written ? 0 : emulator::kNeverWritten};
  float result = 0.0f;
  emulator::run("copy", {1, 1, 1}, 32, 16, [&] {
    emulator::copy_async(emulator::shared_memory(), source, true);
    emulator::copy_commit();
    emulator::copy_wait(0);
    std::memcpy(&result, emulator::shared_memory(), 4);
  });
  return result;
}
