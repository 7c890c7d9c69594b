// What a compiled kernel asks of the runtime. Included by the shim headers and by the runtime itself.
#pragma once
#include <cstddef>
#include <cstdint>

// The values behind MSL's thread attributes, for one thread of one dispatch.
struct ThreadAttributes {
  uint32_t position_in_grid[3], position_in_threadgroup[3], threadgroup_position[3];
  uint32_t threads_per_grid[3], threads_per_threadgroup[3], threadgroups_per_grid[3];
  uint32_t dispatch_threads_per_threadgroup[3];
  uint32_t index_in_threadgroup, simdgroup, lane, simdgroups_per_threadgroup, simd_width;
};

enum BarrierScope { SIMDGROUP_BARRIER = 1, THREADGROUP_BARRIER = 2 };
enum MemoryFlags { MEM_DEVICE = 1, MEM_THREADGROUP = 2 };
constexpr size_t SLOT_BYTES = 64;  // the largest value a lane can pass to a collective

extern "C" {
// The generated entry point: calls the kernel with `buffers` and the attributes of this thread.
void emu_entry(void** buffers, const ThreadAttributes* thread);

const ThreadAttributes* emu_self();
void emu_register_threadgroup(void* memory, size_t bytes, const char* name);
void emu_barrier(BarrierScope scope, unsigned flags, int line);
// Deposits `bytes` of `value`, waits for the simdgroup, returns 32 slots of SLOT_BYTES; *active = lanes that took part.
const unsigned char* emu_exchange(const void* value, size_t bytes, int line, unsigned operation, uint32_t* active);
void emu_fault(const char* what, int line);
}
