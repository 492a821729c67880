// Names that g++ 11 and later take from a libstdc++ or glibc newer than those of manylinux_2_28, hidden, and made of
// what the older ones have. Each object of a release is linked with a copy of its own.
#include <new>
#include <sstream>

#define HIDDEN __attribute__((visibility("hidden"), used))

// glibc 2.32: whether the process has one thread. False is always right, and costs an atomic operation.
extern "C" {
HIDDEN char __libc_single_threaded = 0;

// libstdc++ 11: new int[-1].
HIDDEN void refuse_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void refuse_length() { throw std::bad_array_new_length(); }

// libstdc++ 9: default constructors. The older ones take the mode.
HIDDEN void make_ostringstream(void* at) __asm__("_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void make_ostringstream(void* at) { new (at) std::ostringstream(std::ios_base::out); }

HIDDEN void make_stringstream(void* at) __asm__("_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void make_stringstream(void* at) { new (at) std::stringstream(std::ios_base::in | std::ios_base::out); }

// libstdc++ 11: parts of std::exception_ptr's constructor and destructor. The older one has its assignment.
void assign(void* to, const void* from) __asm__("_ZNSt15__exception_ptr13exception_ptraSERKS0_");

HIDDEN void add_reference(void* pointer) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(void* pointer) {
  void* never_destroyed = nullptr;  // an exception_ptr is one pointer
  assign(&never_destroyed, pointer);
}

HIDDEN void release(void* pointer) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release(void* pointer) {
  const void* none = nullptr;
  assign(pointer, &none);
}
}
