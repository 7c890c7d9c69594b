// Runs a Metal dispatch on one CPU thread: every Metal thread is a fiber, one threadgroup lives at a time.
//
// A fiber runs until it reaches a collective or a barrier. When nothing more can run, simdgroups whose live lanes all
// stand at the same operation of the same line go on, and a threadgroup barrier opens when all its threads wait at the
// same line. Anything else is divergence: undefined in Metal, an error here.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "emulator.h"

Emulator emulator;
static std::vector<char*> stacks;
static void* scheduler_stack_pointer;

// Saves the callee-saved registers, stores the stack pointer in *save, continues on `next` (x86-64, System V).
extern "C" void emu_switch(void** save, void* next);
asm(R"(.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void report(const char* format, ...) {
  if (emulator.finding_count++ >= 12) return;
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  emulator.findings += text;
  if (emulator.current) {
    const ThreadAttributes& t = emulator.current->thread;
    snprintf(text, sizeof text, " [threadgroup %u, thread %u, simdgroup %u, lane %u]", emulator.threadgroup,
             t.index_in_threadgroup, t.simdgroup, t.lane);
    emulator.findings += text;
  }
  emulator.findings += "\n";
}

static void yield_to_scheduler() {
  Fiber* me = emulator.current;
  emu_switch(&me->stack_pointer, scheduler_stack_pointer);
}

void stop_dispatch() {
  emulator.stopped = true;
  emulator.current->state = State::DONE;
  yield_to_scheduler();
  abort();  // a stopped dispatch never resumes its fibers
}

static void fiber_main() {
  emu_entry(emulator.buffers, &emulator.current->thread);
  emulator.current->state = State::DONE;
  yield_to_scheduler();
  abort();
}

static void prepare(Fiber& fiber) {
  auto top = reinterpret_cast<uintptr_t>(fiber.stack + STACK_BYTES - 64) & ~uintptr_t(15);
  auto** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // keeps the stack aligned as after a call
  *--slot = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; i++) *--slot = nullptr;  // the six registers that emu_switch pops
  fiber.stack_pointer = slot;
}

static void resume(Fiber& fiber) {
  emulator.current = &fiber;
  emu_switch(&scheduler_stack_pointer, fiber.stack_pointer);
  emulator.current = nullptr;
}

extern "C" {
const ThreadAttributes* emu_self() { return &emulator.current->thread; }

void emu_fault(const char* what, int line) {
  report("FAULT line %d: %s", line, what);
  stop_dispatch();
}

void emu_barrier(BarrierScope scope, unsigned flags, int line) {
  Fiber& me = *emulator.current;
  me.state = scope == THREADGROUP_BARRIER ? State::AT_THREADGROUP_BARRIER : State::AT_SIMDGROUP_BARRIER;
  me.line = line;
  me.operation = 1000 + scope;
  me.flags = flags;
  yield_to_scheduler();
}

const unsigned char* emu_exchange(const void* value, size_t bytes, int line, unsigned operation, uint32_t* active) {
  Fiber& me = *emulator.current;
  Simdgroup& group = emulator.simdgroups[me.thread.simdgroup];
  int phase = group.phase;
  memcpy(group.slots[phase][me.thread.lane], value, bytes);
  me.state = State::IN_COLLECTIVE;
  me.line = line;
  me.operation = operation;
  yield_to_scheduler();
  *active = group.active;
  return group.slots[phase][0];
}

void emu_register_threadgroup(void* memory, size_t bytes, const char* name) {
  auto* start = static_cast<char*>(memory);
  if (checker::has_region(start)) return;  // the first thread of the threadgroup registers for all
  checker::add_region(start, bytes, checker::THREADGROUP, false, name);
  memset(start, 0xff, bytes);  // NaN in every float type
  emulator.threadgroup_bytes += bytes;
  emulator.threadgroup_bytes_max = std::max(emulator.threadgroup_bytes_max, emulator.threadgroup_bytes);
  if (emulator.threadgroup_bytes > THREADGROUP_MEMORY_LIMIT)
    report("LIMIT threadgroup memory %zu > %zu bytes", emulator.threadgroup_bytes, THREADGROUP_MEMORY_LIMIT);
}
}

static void advance(uint32_t epoch[2], unsigned flags) {
  if (flags & MEM_DEVICE) epoch[checker::DEVICE]++;
  if (flags & MEM_THREADGROUP) epoch[checker::THREADGROUP]++;
}

static bool waits_in_simdgroup(const Fiber& fiber) {
  return fiber.state == State::IN_COLLECTIVE || fiber.state == State::AT_SIMDGROUP_BARRIER;
}

enum class Release { NOTHING, SOME, DIVERGED };

// Lets one simdgroup go on if all its lanes stand at the same collective.
static Release release_simdgroup(uint32_t index) {
  auto first = emulator.fibers.begin() + index * SIMD_WIDTH;
  auto last = emulator.fibers.begin() + std::min<size_t>(emulator.fibers.size(), (index + 1) * SIMD_WIDTH);
  auto leader = std::find_if(first, last, waits_in_simdgroup);
  if (leader == last) return Release::NOTHING;
  uint32_t waiting = 0;
  for (auto fiber = first; fiber != last; ++fiber) {
    bool together =
        waits_in_simdgroup(*fiber) && fiber->line == leader->line && fiber->operation == leader->operation;
    if (together) waiting |= 1u << (fiber - first);
  }
  Simdgroup& group = emulator.simdgroups[index];
  if (__builtin_popcount(waiting) != last - first) {
    emulator.current = &*leader;
    report("DIVERGENCE line %d: simdgroup operation reached by lanes %08x only", leader->line, waiting);
    emulator.current = nullptr;
    return Release::DIVERGED;
  }
  group.active = waiting;
  group.phase ^= 1;
  if (leader->state == State::AT_SIMDGROUP_BARRIER) advance(group.epoch, leader->flags);
  for (auto fiber = first; fiber != last; ++fiber) fiber->state = State::READY;
  return Release::SOME;
}

static Release release_threadgroup() {
  auto& fibers = emulator.fibers;
  size_t waiting = 0;
  const Fiber* leader = nullptr;
  bool same_line = true;
  for (const Fiber& fiber : fibers) {
    if (fiber.state != State::AT_THREADGROUP_BARRIER) continue;
    waiting++;
    if (!leader) leader = &fiber;
    same_line = same_line && fiber.line == leader->line;
  }
  if (!leader) return Release::NOTHING;
  if (waiting != fibers.size() || !same_line) {
    report("DIVERGENCE line %d: threadgroup_barrier reached by %zu of %zu threads%s", leader->line, waiting,
           fibers.size(), same_line ? "" : ", at different lines");
    return Release::DIVERGED;
  }
  advance(emulator.epoch, leader->flags);
  for (Fiber& fiber : fibers) fiber.state = State::READY;
  return Release::SOME;
}

// Thread order within a round: 0 forward, 1 backward, else a shuffle seeded by `order`.
static void arrange(std::vector<uint32_t>& indices, int order, std::mt19937& random) {
  if (order == 1) std::sort(indices.rbegin(), indices.rend());
  if (order > 1) std::shuffle(indices.begin(), indices.end(), random);
}

static bool run_threadgroup(int order, std::mt19937& random) {
  std::vector<uint32_t> indices(emulator.fibers.size());
  for (uint32_t i = 0; i < indices.size(); i++) indices[i] = i;
  for (;;) {
    arrange(indices, order, random);
    for (uint32_t i : indices) {
      if (emulator.fibers[i].state != State::READY) continue;
      resume(emulator.fibers[i]);
      if (emulator.stopped) return false;
    }
    bool progress = false;
    for (uint32_t group = 0; group < emulator.simdgroups.size(); group++) {
      Release outcome = release_simdgroup(group);
      if (outcome == Release::DIVERGED) return false;
      progress = progress || outcome == Release::SOME;
    }
    if (progress) continue;
    Release outcome = release_threadgroup();
    if (outcome == Release::DIVERGED) return false;
    if (outcome == Release::NOTHING) return true;  // every thread has returned
  }
}

static void place_threads(uint32_t index, const uint32_t grid[3], const uint32_t group[3], const uint32_t groups[3]) {
  uint32_t at[3] = {index % groups[0], (index / groups[0]) % groups[1], index / (groups[0] * groups[1])};
  uint32_t size[3];  // threadgroups at the edge of the grid are smaller, as in dispatchThreads
  for (int d = 0; d < 3; d++) size[d] = std::min(group[d], grid[d] - at[d] * group[d]);
  uint32_t threads = size[0] * size[1] * size[2];
  emulator.fibers.assign(threads, Fiber());
  emulator.simdgroups.assign((threads + SIMD_WIDTH - 1) / SIMD_WIDTH, Simdgroup());
  for (uint32_t i = 0; i < threads; i++) {
    Fiber& fiber = emulator.fibers[i];
    fiber.stack = stacks[i];
    ThreadAttributes& t = fiber.thread;
    uint32_t local[3] = {i % size[0], (i / size[0]) % size[1], i / (size[0] * size[1])};
    for (int d = 0; d < 3; d++) {
      t.position_in_threadgroup[d] = local[d];
      t.threadgroup_position[d] = at[d];
      t.position_in_grid[d] = at[d] * group[d] + local[d];
      t.threads_per_grid[d] = grid[d];
      t.threads_per_threadgroup[d] = size[d];
      t.dispatch_threads_per_threadgroup[d] = group[d];
      t.threadgroups_per_grid[d] = groups[d];
    }
    t.index_in_threadgroup = i;
    t.simdgroup = i / SIMD_WIDTH;
    t.lane = i % SIMD_WIDTH;
    t.simdgroups_per_threadgroup = emulator.simdgroups.size();
    t.simd_width = SIMD_WIDTH;
    prepare(fiber);
  }
}

struct Buffer {
  void* memory;
  size_t bytes;
  int read_only;
  const char* name;
};

// Runs one dispatch of `grid` threads. Returns 0 when nothing was found; findings are written to `text`.
extern "C" int emu_dispatch(const Buffer* buffers, int count, const uint32_t* grid, const uint32_t* threadgroup, int order,
                            int checking, char* text, size_t text_bytes, size_t* threadgroup_bytes) {
  emulator = Emulator();
  emulator.checking = checking;
  checker::reset();
  std::vector<void*> pointers(count);
  for (int i = 0; i < count; i++) {
    pointers[i] = buffers[i].memory;
    checker::add_region(static_cast<char*>(buffers[i].memory), buffers[i].bytes, checker::DEVICE, buffers[i].read_only,
                        buffers[i].name);
  }
  emulator.buffers = pointers.data();

  uint32_t group[3], groups[3];
  for (int d = 0; d < 3; d++) {
    group[d] = std::min(threadgroup[d], grid[d]);
    groups[d] = (grid[d] + group[d] - 1) / group[d];
  }
  uint32_t size = group[0] * group[1] * group[2];
  if (size > THREADGROUP_SIZE_LIMIT) report("LIMIT threadgroup of %u threads", size);
  while (stacks.size() < size) {
    void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks.push_back(static_cast<char*>(stack));
  }

  std::mt19937 random(order);
  std::vector<uint32_t> sequence(groups[0] * groups[1] * groups[2]);
  for (uint32_t i = 0; i < sequence.size(); i++) sequence[i] = i;
  arrange(sequence, order, random);
  for (uint32_t index : sequence) {
    if (emulator.finding_count) break;
    emulator.threadgroup = index;
    emulator.epoch[0] = emulator.epoch[1] = 0;
    emulator.threadgroup_bytes = 0;
    checker::begin_threadgroup();
    place_threads(index, grid, group, groups);
    if (!run_threadgroup(order, random)) break;
  }
  snprintf(text, text_bytes, "%s", emulator.findings.c_str());
  *threadgroup_bytes = emulator.threadgroup_bytes_max;
  return emulator.finding_count;
}
