// Relaxed atomics. Fibers switch only at collectives, so a plain read-modify-write is atomic here.
#pragma once
namespace metal {
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
#define MSL_ATOMIC __attribute__((no_sanitize("thread"))) inline
#define MSL_ATOMICS(space)                                                                            \
  template <class T, class U>                                                                         \
  MSL_ATOMIC T atomic_fetch_add_explicit(volatile space atomic<T>* p, U amount, memory_order) {       \
    T before = p->value;                                                                              \
    p->value = T(before + T(amount));                                                                 \
    return before;                                                                                    \
  }                                                                                                   \
  template <class T>                                                                                  \
  MSL_ATOMIC T atomic_load_explicit(volatile space atomic<T>* p, memory_order) {                      \
    return p->value;                                                                                  \
  }
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)
}  // namespace metal
