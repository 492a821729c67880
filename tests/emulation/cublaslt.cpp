// A library with the interface of cuBLASLt, as far as csrc/engine/cuda/lt_gemm.cpp uses it, for host memory. It checks
// the rules of the documentation and those that the real library does not check but needs, and says which one is
// broken. All declarations are its own: a mistake in lt_abi.h must show here. Documentation:
// https://docs.nvidia.com/cuda/cublas/#cublasltmatmul
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/math/rounding.h"

namespace {

enum { kSuccess = 0, kNotInitialized = 1, kInvalid = 7, kArchMismatch = 8, kInternalError = 14, kNotSupported = 15 };
enum { kF32 = 0, kF16 = 2, kBf16 = 14, kCompute32 = 68 };
enum : unsigned { kPlain = 1, kGeluAux = 32 | 128, kDgelu = 64 | 128, kBias = 4, kBgrad = 16, kBgradB = 512 };

struct Handle {
  int magic = 0x4c54;
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t ld;
};
struct Desc {
  int compute, scale, trans_a = 0, trans_b = 0;
  unsigned epilogue = kPlain;
  void *bias = nullptr, *aux = nullptr;
  int64_t aux_ld = 0;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t schemes = 7, alignment[4] = {256, 256, 256, 256};  // of A, B, C, D
};
enum Scheme : uint32_t { kNone = 0, kInPlace = 1, kComputeType = 2, kOutputType = 4 };
struct Algo {  // the library's 64 bytes
  uint64_t problem, workspace;
  uint32_t scheme, alignment[6];  // of A, B, C, D, bias, aux
  uint32_t rest[5];
};
static_assert(sizeof(Algo) == 64);
struct Result {
  Algo algo;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

Handle the_handle;
std::atomic<int64_t> heuristics, products, broken_rules, objects;
enum Place { kNowhere, kHeuristic, kNothingFound, kState, kProduct, kAccumulation };
std::atomic<int> refused_at{kNowhere}, refused_with;
std::atomic<unsigned> refused_epilogue;

constexpr unsigned kEvery = ~0u;
bool refuses(Place place, unsigned epilogue) {
  return refused_at == place && (refused_epilogue == epilogue || refused_epilogue == kEvery);
}

int broken(const char* rule, int status = kInvalid) {
  ++broken_rules;
  fprintf(stderr, "emulated cuBLASLt: %s\n", rule);
  return status;
}

#define NEEDS(condition, rule, ...) \
  if (!(condition)) return broken(rule, ##__VA_ARGS__)

template <class T, class... Values>
int create(T** made, Values... values) {
  NEEDS(made, "a null pointer to a descriptor");
  *made = new T{values...};
  ++objects;
  return kSuccess;
}

template <class T>
int destroy(T* object) {
  NEEDS(object, "destroys a null descriptor");
  delete object;
  --objects;
  return kSuccess;
}

template <class T>
int store(T& field, const void* value, size_t bytes) {
  NEEDS(value && bytes == sizeof(T), "an attribute has another size");
  memcpy(&field, value, sizeof(T));
  return kSuccess;
}

int64_t size_of(int type) { return type == kF32 ? 4 : 2; }
uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256;
  return static_cast<uint32_t>(address & (~address + 1));
}
bool has_bias(unsigned e) { return e == kBgradB || e == (kGeluAux | kBias) || e == (kDgelu | kBgrad); }
bool has_aux(unsigned e) { return e & 128; }
bool is_forward(unsigned e) { return (e & ~unsigned{kBias}) == kGeluAux; }
bool is_dgelu(unsigned e) { return (e & ~unsigned{kBgrad}) == kDgelu; }

struct Sizes {
  int64_t m, n, k;
};

// Rules of heuristic and product alike.
int check(const void* handle, const Desc* desc, const Layout* a, const Layout* b, const Layout* c, const Layout* d,
          Sizes& sizes) {
  NEEDS(handle == &the_handle, "not a handle", kNotInitialized);
  NEEDS(desc && a && b && c && d, "a null descriptor");
  for (const Layout* x : {a, b, c, d}) {
    NEEDS(x->rows > 0 && x->columns > 0, "an empty matrix");
    NEEDS(x->rows <= INT32_MAX && x->columns <= INT32_MAX && x->ld <= INT32_MAX, "a size above 2^31 - 1");
    NEEDS(x->ld >= static_cast<int64_t>(x->rows), "a leading dimension below the number of rows");
  }
  NEEDS(desc->trans_a == 0 || desc->trans_a == 1, "an unknown operation on A");
  NEEDS(desc->trans_b == 0 || desc->trans_b == 1, "an unknown operation on B");
  sizes.m = static_cast<int64_t>(d->rows);
  sizes.n = static_cast<int64_t>(d->columns);
  sizes.k = static_cast<int64_t>(desc->trans_a ? a->rows : a->columns);
  NEEDS(static_cast<int64_t>(desc->trans_a ? a->columns : a->rows) == sizes.m, "rows of A and D differ");
  NEEDS(static_cast<int64_t>(desc->trans_b ? b->rows : b->columns) == sizes.n, "columns of B and D differ");
  NEEDS(static_cast<int64_t>(desc->trans_b ? b->columns : b->rows) == sizes.k, "columns of A and rows of B differ");
  NEEDS(c->type == d->type && c->rows == d->rows && c->columns == d->columns, "C and D differ");
  NEEDS(desc->compute == kCompute32 && desc->scale == kF32, "not computed in FP32", kNotSupported);
  NEEDS((a->type == kF16 || a->type == kBf16) && b->type == a->type, "types of A and B", kNotSupported);
  NEEDS(d->type == a->type || d->type == kF32, "type of D", kNotSupported);
  const unsigned e = desc->epilogue;
  NEEDS(e == kPlain || e == kBgradB || is_forward(e) || is_dgelu(e), "an unknown epilogue");
  NEEDS(!has_bias(e) || desc->bias, "a null bias");
  NEEDS(!has_bias(e) || reinterpret_cast<uintptr_t>(desc->bias) % 16 == 0, "a bias that is not aligned to 16 bytes");
  NEEDS(!has_aux(e) || desc->aux, "a null auxiliary matrix");
  NEEDS(!has_aux(e) || (desc->aux_ld % 8 == 0 && desc->aux_ld >= sizes.m), "leading dimension of the auxiliary matrix");
  NEEDS(!is_dgelu(e) || sizes.k > 1, "dGELU needs k > 1", kNotSupported);
  NEEDS(e != kBgradB || (sizes.m > 1 && sizes.n > 1 && sizes.k > 1), "BGRADB of one row", kNotSupported);
  NEEDS(e != kBgradB || desc->trans_b, "BGRADB needs a transposed B", kNotSupported);
  return kSuccess;
}

uint64_t fingerprint(const Desc& desc, std::initializer_list<const Layout*> layouts) {
  uint64_t hash = 14695981039346656037u;
  const auto mix = [&](uint64_t x) { hash = (hash ^ x) * 1099511628211u; };
  for (const Layout* x : layouts) {
    mix(static_cast<uint64_t>(x->type));
    mix(x->rows);
    mix(x->columns);
    mix(static_cast<uint64_t>(x->ld));
  }
  mix(static_cast<uint64_t>(desc.trans_a * 2 + desc.trans_b));
  mix(desc.epilogue);
  mix(static_cast<uint64_t>(desc.aux_ld));
  return hash;
}

struct Range {
  const char *begin, *end;
  Range(const void* p, int64_t bytes) : begin(static_cast<const char*>(p)), end(begin + bytes) {}
  Range(const void* p, const Layout& x)
      : Range(p, ((static_cast<int64_t>(x.columns) - 1) * x.ld + static_cast<int64_t>(x.rows)) * size_of(x.type)) {}
  bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
};

float load(int type, const void* list, int64_t i) {
  if (type == kF32) return static_cast<const float*>(list)[i];
  const uint16_t bits = static_cast<const uint16_t*>(list)[i];
  return type == kF16 ? fusedamp::f16_to_float(bits) : fusedamp::bf16_to_float(bits);
}
void save(int type, void* list, int64_t i, float x) {
  if (type == kF32) {
    static_cast<float*>(list)[i] = x;
  } else {
    static_cast<uint16_t*>(list)[i] = type == kF16 ? fusedamp::float_to_f16(x) : fusedamp::float_to_bf16(x);
  }
}
float rounded(int type, float x) {
  float result;
  save(type, &result, 0, x);
  return load(type, &result, 0);
}

constexpr float kRoot = 0.79788456f, kCube = 0.044715f;  // sqrt(2 / pi)
float gelu(float x) { return 0.5f * x * (1 + std::tanh(kRoot * (x + kCube * x * x * x))); }
float gelu_slope(float x) {
  const float t = std::tanh(kRoot * (x + kCube * x * x * x));
  return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kRoot * (1 + 3 * kCube * x * x);
}

// op(X) with k as the inner dimension: outer * k + inner.
std::vector<float> unpack(const void* data, const Layout& x, bool inner_is_row) {
  const auto rows = static_cast<int64_t>(x.rows), columns = static_cast<int64_t>(x.columns);
  std::vector<float> list(static_cast<size_t>(rows * columns));
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = inner_is_row ? column * rows + row : row * columns + column;
      list[static_cast<size_t>(at)] = load(x.type, data, column * x.ld + row);
    }
  }
  return list;
}

// Split in two halves, as the scheme says where their sums are stored.
float dot(const float* a, const float* b, int64_t k, uint32_t scheme, int type) {
  float half[2] = {0, 0};
  for (int64_t p = 0; p < k; ++p) half[scheme != kNone && p >= k / 2] += a[p] * b[p];
  if (scheme == kInPlace || scheme == kOutputType) half[0] = rounded(type, half[0]);
  if (scheme == kOutputType) half[1] = rounded(type, half[1]);
  return half[0] + half[1];
}

void compute(const Desc& desc, const Sizes& s, float alpha, const void* a, const Layout& la, const void* b,
             const Layout& lb, float beta, const void* c, int64_t ldc, void* d, const Layout& ld, uint32_t scheme) {
  const std::vector<float> as = unpack(a, la, desc.trans_a), bs = unpack(b, lb, !desc.trans_b);
  const unsigned e = desc.epilogue;
  std::vector<float> sums(static_cast<size_t>(s.m), 0.0f);
  for (int64_t j = 0; j < s.n; ++j) {
    for (int64_t i = 0; i < s.m; ++i) {
      float x = alpha * dot(&as[static_cast<size_t>(i * s.k)], &bs[static_cast<size_t>(j * s.k)], s.k, scheme, ld.type);
      if (beta != 0) x += beta * load(ld.type, c, j * ldc + i);
      if (e == (kGeluAux | kBias)) x += load(ld.type, desc.bias, i);
      if (is_forward(e)) {
        save(ld.type, desc.aux, j * desc.aux_ld + i, x);
        x = gelu(x);
      }
      if (is_dgelu(e)) x *= gelu_slope(load(ld.type, desc.aux, j * desc.aux_ld + i));
      sums[static_cast<size_t>(i)] += x;
      save(ld.type, d, j * ld.ld + i, x);
    }
  }
  if (e == (kDgelu | kBgrad)) {
    for (int64_t i = 0; i < s.m; ++i) save(ld.type, desc.bias, i, sums[static_cast<size_t>(i)]);
  }
  if (e != kBgradB) return;
  for (int64_t j = 0; j < s.n; ++j) {
    float sum = 0;
    for (int64_t p = 0; p < s.k; ++p) sum += bs[static_cast<size_t>(j * s.k + p)];
    save(ld.type, desc.bias, j, sum);
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// For tests. 0: heuristics, 1: products, 2: broken rules, 3: descriptors that exist.
EXPORT int64_t emulated_lt_count(int what) {
  const std::atomic<int64_t>* counts[] = {&heuristics, &products, &broken_rules, &objects};
  return *counts[what];
}
EXPORT void emulated_lt_refuse(int place, unsigned epilogue, int status) {
  refused_at = place;
  refused_epilogue = epilogue;
  refused_with = status;
}

EXPORT int cublasLtCreate(void** handle) {
  *handle = &the_handle;
  return kSuccess;
}
EXPORT int cublasLtDestroy(void*) { return kSuccess; }
EXPORT size_t cublasLtGetVersion() { return EMULATED_VERSION; }
EXPORT const char* cublasLtGetStatusName(int status) {
  switch (status) {
    case kSuccess: return "CUBLAS_STATUS_SUCCESS";
    case kNotInitialized: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case kInvalid: return "CUBLAS_STATUS_INVALID_VALUE";
    case kArchMismatch: return "CUBLAS_STATUS_ARCH_MISMATCH";
    case kInternalError: return "CUBLAS_STATUS_INTERNAL_ERROR";
    case kNotSupported: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "unrecognized status";
  }
}

EXPORT int cublasLtMatmulDescCreate(Desc** desc, int compute, int scale) { return create(desc, compute, scale); }
EXPORT int cublasLtMatmulDescDestroy(Desc* desc) { return destroy(desc); }
EXPORT int cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value, size_t bytes) {
  NEEDS(desc, "a null descriptor");
  switch (attribute) {
    case 3: return store(desc->trans_a, value, bytes);
    case 4: return store(desc->trans_b, value, bytes);
    case 7: return store(desc->epilogue, value, bytes);
    case 8: return store(desc->bias, value, bytes);
    case 11: return store(desc->aux, value, bytes);
    case 12: return store(desc->aux_ld, value, bytes);
    default: return broken("an unknown attribute of a product");
  }
}
EXPORT int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  return create(layout, type, rows, columns, ld);
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) { return destroy(layout); }
EXPORT int cublasLtMatmulPreferenceCreate(Preference** preference) { return create(preference); }
EXPORT int cublasLtMatmulPreferenceDestroy(Preference* preference) { return destroy(preference); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value,
                                                size_t bytes) {
  NEEDS(preference, "a null descriptor");
  if (attribute == 1) return store(preference->workspace, value, bytes);
  if (attribute == 3) return store(preference->schemes, value, bytes);
  NEEDS(attribute >= 5 && attribute <= 8, "an unknown attribute of a preference");
  return store(preference->alignment[attribute - 5], value, bytes);
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(void* handle, const Desc* desc, const Layout* a, const Layout* b,
                                          const Layout* c, const Layout* d, const Preference* preference, int wanted,
                                          Result* results, int* found) {
  ++heuristics;
  Sizes s;
  if (const int status = check(handle, desc, a, b, c, d, s)) return status;
  NEEDS(preference && results && found && wanted > 0, "no place for results");
  for (const uint32_t bytes : preference->alignment) {
    NEEDS(bytes > 0 && bytes <= 256 && (bytes & (bytes - 1)) == 0, "an alignment is not a power of two up to 256");
  }
  *found = 0;
  if (refuses(kHeuristic, desc->epilogue)) return refused_with;
  if (refuses(kNothingFound, desc->epilogue)) return kSuccess;
  Result result = {};
  result.algo.problem = fingerprint(*desc, {a, b, c, d});
  for (int i = 0; i < 4; ++i) result.algo.alignment[i] = preference->alignment[i];
  result.algo.alignment[4] = has_bias(desc->epilogue) ? alignment_of(desc->bias) : 0;
  result.algo.alignment[5] = has_aux(desc->epilogue) ? alignment_of(desc->aux) : 0;
  // Every third shape has one sum; others take the fastest scheme that is allowed.
  if ((s.m + s.n + s.k) % 3 != 0) {
    const uint32_t allowed = preference->schemes;
    const auto bytes = static_cast<uint64_t>(2 * 4 * s.m * s.n);
    if (allowed & kOutputType) {
      result.algo.scheme = kOutputType;
    } else if ((allowed & kInPlace) && (s.m + s.n + s.k) % 3 == 1) {
      result.algo.scheme = kInPlace;
    } else if ((allowed & kComputeType) && bytes <= preference->workspace) {
      result.algo.scheme = kComputeType;
      result.algo.workspace = result.workspace = bytes;
    }
  }
  if (refuses(kState, desc->epilogue)) result.state = refused_with;
  *results = result;
  *found = 1;
  return kSuccess;
}

EXPORT int cublasLtMatmul(void* handle, const Desc* desc, const void* alpha, const void* a, const Layout* la,
                          const void* b, const Layout* lb, const void* beta, const void* c, const Layout* lc, void* d,
                          const Layout* ld, const Algo* algo, void* workspace, size_t workspace_bytes, void* stream) {
  Sizes s;
  if (const int status = check(handle, desc, la, lb, lc, ld, s)) return status;
  NEEDS(alpha && beta && a && b && c && d, "a null pointer");
  NEEDS(algo && algo->problem == fingerprint(*desc, {la, lb, lc, ld}), "an algorithm for another problem");
  const void* lists[] = {a, b, c, d, desc->bias, desc->aux};
  for (int i = 0; i < 6; ++i) {
    NEEDS(!algo->alignment[i] || alignment_of(lists[i]) >= algo->alignment[i], "less aligned than was promised");
  }
  NEEDS(workspace_bytes >= algo->workspace, "a workspace that is too small");
  NEEDS(workspace || algo->workspace == 0, "a null workspace");
  NEEDS(reinterpret_cast<uintptr_t>(workspace) % 256 == 0, "a workspace that is not aligned to 256 bytes");
  NEEDS(stream == reinterpret_cast<void*>(0x57), "another stream");
  const Range in_a(a, *la), in_b(b, *lb), out(d, *ld), scratch(workspace, static_cast<int64_t>(workspace_bytes));
  NEEDS(!out.overlaps(in_a) && !out.overlaps(in_b), "D overlaps A or B");
  NEEDS(c == d || !out.overlaps(Range(c, *lc)), "C overlaps D");
  if (workspace) {
    const int64_t length = desc->epilogue == kBgradB ? s.n : s.m;
    const Range bias(desc->bias, desc->bias ? length * size_of(ld->type) : 0);
    const Range aux(desc->aux, desc->aux ? ((s.n - 1) * desc->aux_ld + s.m) * size_of(ld->type) : 0);
    for (const Range& other : {in_a, in_b, out, bias, aux}) NEEDS(!scratch.overlaps(other), "the workspace is in use");
    memset(workspace, 0xff, workspace_bytes);
  }
  const float factor = *static_cast<const float*>(beta);
  if (refuses(kProduct, desc->epilogue)) return refused_with;
  if (factor != 0 && refuses(kAccumulation, desc->epilogue)) return refused_with;
  compute(*desc, s, *static_cast<const float*>(alpha), a, *la, b, *lb, factor, c, lc->ld, d, *ld, algo->scheme);
  ++products;
  return kSuccess;
}
