// State shared by the scheduler and the checker.
#pragma once
#include <string>
#include <vector>

#include "runtime.h"

enum class State { READY, IN_COLLECTIVE, AT_THREADGROUP_BARRIER, AT_SIMDGROUP_BARRIER, DONE };

constexpr size_t STACK_BYTES = 256 * 1024;
constexpr uint32_t SIMD_WIDTH = 32;
#ifndef THREADGROUP_MEMORY_LIMIT
#define THREADGROUP_MEMORY_LIMIT size_t(32768)  // bytes; every Apple GPU family
#endif
constexpr uint32_t THREADGROUP_SIZE_LIMIT = 1024;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::READY;
  int line = 0;
  unsigned operation = 0, flags = 0;
  ThreadAttributes thread = {};
};

// Barriers advance an epoch: [0] orders device memory, [1] threadgroup memory.
struct Simdgroup {
  unsigned char slots[2][SIMD_WIDTH][SLOT_BYTES];  // double buffer: the next collective must not overwrite this one
  int phase = 0;
  uint32_t active = 0;
  uint32_t epoch[2] = {0, 0};
};

struct Emulator {
  std::vector<Fiber> fibers;
  std::vector<Simdgroup> simdgroups;
  Fiber* current = nullptr;
  void** buffers = nullptr;
  uint32_t threadgroup = 0;  // index in the grid
  uint32_t epoch[2] = {0, 0};
  bool checking = false, stopped = false;
  std::string findings;
  int finding_count = 0;
  size_t threadgroup_bytes = 0, threadgroup_bytes_max = 0;
};

extern Emulator emulator;

// Records a finding with the thread that caused it.
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Records nothing; leaves the running thread for good and ends the dispatch.
[[noreturn]] void stop_dispatch();

namespace checker {
enum Kind { DEVICE = 0, THREADGROUP = 1 };  // also the index of an epoch
void reset();
void add_region(char* memory, size_t bytes, Kind kind, bool read_only, const char* name);
bool has_region(const char* memory);
void begin_threadgroup();  // forgets threadgroup regions
}  // namespace checker
