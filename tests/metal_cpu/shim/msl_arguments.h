// How emu_entry passes buffers and thread attributes to a kernel's parameters.
#pragma once
struct PointerArgument {
  void* memory;
  template <class T>
  operator T*() const {
    return (T*)memory;
  }
};
struct ReferenceArgument {
  void* memory;
  template <class T>
  operator T&() const {
    return *(T*)memory;
  }
};
struct PositionArgument {
  const uint32_t* at;
  operator metal::vec<uint, 3>() const { return uint3(at[0], at[1], at[2]); }
  operator metal::vec<uint, 2>() const { return uint2(at[0], at[1]); }
  operator uint() const { return at[0]; }
};
#define ATTRIBUTE_thread_position_in_grid PositionArgument{t->position_in_grid}
#define ATTRIBUTE_thread_position_in_threadgroup PositionArgument{t->position_in_threadgroup}
#define ATTRIBUTE_threadgroup_position_in_grid PositionArgument{t->threadgroup_position}
#define ATTRIBUTE_threads_per_grid PositionArgument{t->threads_per_grid}
#define ATTRIBUTE_grid_size PositionArgument{t->threads_per_grid}
#define ATTRIBUTE_threads_per_threadgroup PositionArgument{t->threads_per_threadgroup}
#define ATTRIBUTE_threadgroups_per_grid PositionArgument{t->threadgroups_per_grid}
#define ATTRIBUTE_dispatch_threads_per_threadgroup PositionArgument{t->dispatch_threads_per_threadgroup}
#define ATTRIBUTE_thread_index_in_threadgroup t->index_in_threadgroup
#define ATTRIBUTE_simdgroup_index_in_threadgroup t->simdgroup
#define ATTRIBUTE_thread_index_in_simdgroup t->lane
#define ATTRIBUTE_simdgroups_per_threadgroup t->simdgroups_per_threadgroup
#define ATTRIBUTE_threads_per_simdgroup t->simd_width
#define ATTRIBUTE_thread_execution_width t->simd_width
#define ATTRIBUTE_quadgroup_index_in_threadgroup (t->index_in_threadgroup / 4)
#define ATTRIBUTE_thread_index_in_quadgroup (t->lane & 3)
