// Judges every memory access of a kernel compiled in checking mode.
//
// Clang's thread sanitizer puts a call before each load and store; the functions it calls are defined here instead of in
// its runtime. Each byte of a buffer or threadgroup array remembers its last writer and two readers with the barrier
// epochs of that moment. Two accesses are ordered only by a barrier between them that names their memory
// (threadgroup_barrier: the threadgroup; simdgroup_barrier: the simdgroup). Shuffles and simd_sum order nothing, and
// nothing orders two threadgroups: the strict reading of the Metal specification.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "emulator.h"

namespace {
struct Access {
  int32_t thread = -1;  // index in its threadgroup; -1: none yet
  uint32_t threadgroup = 0, epoch = 0, simdgroup_epoch = 0;
};
struct Byte {
  Access writer, readers[2];
};
struct Region {
  char* start;
  size_t bytes;
  checker::Kind kind;
  bool read_only;
  std::string name;
  std::vector<Byte> shadow;
};
std::vector<Region> regions;
size_t device_regions;
size_t last_region;  // accesses come in runs

Access access_now(checker::Kind kind) {
  const ThreadAttributes& t = emulator.current->thread;
  return {int32_t(t.index_in_threadgroup), emulator.threadgroup, emulator.epoch[kind],
          emulator.simdgroups[t.simdgroup].epoch[kind]};
}

bool ordered(const Access& before, const Access& now) {
  if (before.thread < 0) return true;
  if (before.threadgroup != now.threadgroup) return false;
  if (before.thread == now.thread || before.epoch < now.epoch) return true;
  bool same_simdgroup = before.thread / SIMD_WIDTH == now.thread / SIMD_WIDTH;
  return same_simdgroup && before.simdgroup_epoch < now.simdgroup_epoch;
}

// "pc +0x1234": the driver turns it into a line of the kernel.
std::string place(void* pc) {
  Dl_info info;
  char text[64] = "";
  if (dladdr(pc, &info)) snprintf(text, sizeof text, "pc +0x%zx", size_t((char*)pc - (char*)info.dli_fbase));
  return text;
}

Region* find_region(const char* address) {
  auto inside = [&](const Region& r) { return address >= r.start && address < r.start + r.bytes; };
  if (last_region < regions.size() && inside(regions[last_region])) return &regions[last_region];
  for (size_t i = 0; i < regions.size(); i++)
    if (inside(regions[i])) return &regions[last_region = i];
  return nullptr;
}

// The runtime's own objects and constants of the compiled kernel, which the shim's code may touch.
bool belongs_to_runtime(const char* address, bool write) {
  auto within = [&](const void* start, size_t bytes) {
    return address >= (const char*)start && address < (const char*)start + bytes;
  };
  if (within(emulator.current->stack, STACK_BYTES)) return true;
  if (within(emulator.fibers.data(), emulator.fibers.size() * sizeof(Fiber))) return true;
  if (within(emulator.simdgroups.data(), emulator.simdgroups.size() * sizeof(Simdgroup))) return true;
  if (within(emulator.buffers, device_regions * sizeof(void*))) return true;
  Dl_info data, code;
  return !write && dladdr(address, &data) && dladdr((void*)&report, &code) && data.dli_fbase == code.dli_fbase;
}

void report_stray(const char* address, size_t bytes, bool write, void* pc) {
  const char* what = write ? "write" : "read";
  for (const Fiber& fiber : emulator.fibers)
    if (address >= fiber.stack && address < fiber.stack + STACK_BYTES) {
      report("OUT OF BOUNDS %s of another thread's memory, %s", what, place(pc).c_str());
      stop_dispatch();
    }
  const Region* nearest = nullptr;
  for (const Region& region : regions)
    if (address >= region.start && (!nearest || region.start > nearest->start)) nearest = &region;
  report("OUT OF BOUNDS %s of %zu bytes at %s+%zu, size %zu, %s", what, bytes, nearest ? nearest->name.c_str() : "?",
         nearest ? size_t(address - nearest->start) : 0, nearest ? nearest->bytes : 0, place(pc).c_str());
  stop_dispatch();
}

void judge_write(Region& region, Byte& byte, const Access& now, size_t offset, void* pc) {
  for (const Access& reader : byte.readers)
    if (!ordered(reader, now))
      report("RACE write of %s+%zu against a read by thread %d, %s", region.name.c_str(), offset, reader.thread,
             place(pc).c_str());
  byte = Byte();
  byte.writer = now;
}

void judge_read(Byte& byte, const Access& now) {
  for (Access& reader : byte.readers)
    if (ordered(reader, now)) {
      reader = now;
      return;
    }
}

void judge(char* address, size_t bytes, bool write, void* pc) {
  if (!emulator.checking || !emulator.current) return;
  Region* region = find_region(address);
  if (!region && belongs_to_runtime(address, write)) return;
  if (!region || address + bytes > region->start + region->bytes) report_stray(address, bytes, write, pc);
  if (write && region->read_only) {
    report("WRITE to input buffer %s, %s", region->name.c_str(), place(pc).c_str());
    stop_dispatch();
  }
  if (region->read_only) return;
  const Access now = access_now(region->kind);
  for (size_t i = 0; i < bytes; i++) {
    size_t offset = address - region->start + i;
    Byte& byte = region->shadow[offset];
    if (!write && byte.writer.thread < 0 && region->kind == checker::THREADGROUP) {
      report("UNINITIALIZED read of threadgroup %s+%zu, %s", region->name.c_str(), offset, place(pc).c_str());
      stop_dispatch();
    }
    if (!ordered(byte.writer, now)) {
      report("RACE %s of %s+%zu against a write by thread %d of threadgroup %u, %s", write ? "write" : "read",
             region->name.c_str(), offset, byte.writer.thread, byte.writer.threadgroup, place(pc).c_str());
      stop_dispatch();
    }
    if (write)
      judge_write(*region, byte, now, offset, pc);
    else
      judge_read(byte, now);
  }
}

void judge_aligned(void* address, size_t bytes, bool write, void* pc) {
  bool misaligned = reinterpret_cast<uintptr_t>(address) & (bytes - 1);
  if (emulator.checking && emulator.current && misaligned)
    report("MISALIGNED %zu-byte access, %s", bytes, place(pc).c_str());
  judge(static_cast<char*>(address), bytes, write, pc);
}
}  // namespace

namespace checker {
void reset() {
  regions.clear();
  device_regions = last_region = 0;
}
void add_region(char* memory, size_t bytes, Kind kind, bool read_only, const char* name) {
  bool shadowed = emulator.checking && !read_only;
  regions.push_back({memory, bytes, kind, read_only, name, std::vector<Byte>(shadowed ? bytes : 0)});
  if (kind == DEVICE) device_regions = regions.size();
}
bool has_region(const char* memory) {
  for (size_t i = device_regions; i < regions.size(); i++)
    if (regions[i].start == memory) return true;
  return false;
}
void begin_threadgroup() { regions.erase(regions.begin() + device_regions, regions.end()); }
}  // namespace checker

// The hooks that -fsanitize=thread calls.
#define PC __builtin_return_address(0)
#define HOOKS(n)                                                                                            \
  void __tsan_read##n(void* p) { judge_aligned(p, n, false, PC); }                                          \
  void __tsan_write##n(void* p) { judge_aligned(p, n, true, PC); }                                          \
  void __tsan_unaligned_read##n(void* p) { judge((char*)p, n, false, PC); }                                 \
  void __tsan_unaligned_write##n(void* p) { judge((char*)p, n, true, PC); }
extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t n) { judge((char*)p, n, false, PC); }
void __tsan_write_range(void* p, size_t n) { judge((char*)p, n, true, PC); }
void* __tsan_memmove(void* to, const void* from, size_t n) {
  judge((char*)from, n, false, PC);
  judge((char*)to, n, true, PC);
  return memmove(to, from, n);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) { return __tsan_memmove(to, from, n); }
void* __tsan_memset(void* to, int value, size_t n) {
  judge((char*)to, n, true, PC);
  return memset(to, value, n);
}
}

// The handlers that -fsanitize=undefined calls in its minimal form.
static void undefined(const char* what, void* pc) {
  report("UNDEFINED %s, %s", what, place(pc).c_str());
  stop_dispatch();
}
#define UNDEFINED(name) \
  void __ubsan_handle_##name##_minimal() { undefined(#name, PC); }
extern "C" {
UNDEFINED(type_mismatch) UNDEFINED(alignment_assumption) UNDEFINED(add_overflow) UNDEFINED(sub_overflow)
UNDEFINED(mul_overflow) UNDEFINED(negate_overflow) UNDEFINED(divrem_overflow) UNDEFINED(shift_out_of_bounds)
UNDEFINED(out_of_bounds) UNDEFINED(builtin_unreachable) UNDEFINED(missing_return) UNDEFINED(float_cast_overflow)
UNDEFINED(load_invalid_value) UNDEFINED(invalid_builtin) UNDEFINED(nonnull_arg) UNDEFINED(nonnull_return)
UNDEFINED(pointer_overflow) UNDEFINED(vla_bound_not_positive)
}
