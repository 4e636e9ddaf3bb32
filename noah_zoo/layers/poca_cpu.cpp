// POCA and its gradients, compiled for every kind of processor of a family; poca_cpu.py calls the one of this machine.

#ifdef _OPENMP
extern "C" int omp_get_thread_num();  // not every compiler that knows OpenMP comes with omp.h
#else
static int omp_get_thread_num() { return 0; }
#endif

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Four_indices){__VA_ARGS__})
#endif

#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

namespace {

constexpr ptrdiff_t DEPTH = 128;       // channels at a time, so that weights and features lie in the nearest cache
constexpr ptrdiff_t NEAR = 64 * 1024;  // features that the second nearest cache holds

typedef float Four __attribute__((vector_size(16)));
typedef int32_t Four_indices __attribute__((vector_size(16)));

struct Call {  // as in poca_cpu.py; strides and sizes count floats
    const float *x;
    ptrdiff_t image_stride, position_stride, channel_stride;
    const float *key_weight, *value_weight;  // (groups * maps, depth)
    float *out;                              // (batch, groups * maps); unused in backward
    ptrdiff_t batch, length, channels, groups, maps, key_depth, value_depth, threads;
    const float *grad;                    // of out; what follows is of backward alone
    float *dx, *dkey_weight, *dvalue_weight;  // of x and of the kernels; null if not needed
    ptrdiff_t channels_first;             // whether dx is (batch, channels, length), else (batch, length, channels)
    ptrdiff_t value_adds;                 // whether values read channels that keys read
    ptrdiff_t chunks;                     // that the images are divided into
    const float *value_bias;  // with dropout, (groups * maps,) or null; without it, it is not in here
    float *dvalue_bias;
    uint64_t seed;
    float drop_rate;
};

constexpr std::align_val_t LINE{64};

float *allocate(ptrdiff_t floats) { return (float *)operator new(floats * sizeof(float), LINE, std::nothrow); }

void release(float *memory) { operator delete(memory, LINE); }

#ifdef __x86_64__

#define SMALL 1
#define LARGE 2

// 12 sums, a kernel's 2 vectors and a feature fill 15 of 16 registers
BEGIN_TARGET("avx2,fma")
#define LANES 8
#define SUMS 12
#define LARGER _mm256_max_ps
#define SMALLER _mm256_min_ps
namespace avx2 {
#include "poca_cpu.h"
}
END_TARGET
#undef LANES
#undef SUMS
#undef LARGER
#undef SMALLER

// 24, 2 and 1 fill 27 of 32
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define LANES 16
#define SUMS 24
#define LARGER _mm512_max_ps
#define SMALLER _mm512_min_ps
namespace avx512 {
#include "poca_cpu.h"
}
END_TARGET

#else

// 24, 4 and 1 fill 29 of 32
#define LANES 4
#define SMALL 2
#define LARGE 4
#define SUMS 24
#define LARGER(a, b) (a > b ? a : b)
#define SMALLER(a, b) (a < b ? a : b)
namespace neon {
#include "poca_cpu.h"
}

#endif

}  // namespace

extern "C" {
size_t poca_call_size = sizeof(Call);  // by which poca_cpu.py knows that both mean the same

// 0, or -1 if there is no memory
#ifdef __x86_64__
int poca_run_avx2(const Call *call) { return avx2::run(*call); }
int poca_run_avx512(const Call *call) { return avx512::run(*call); }
#else
int poca_run_neon(const Call *call) { return neon::run(*call); }
#endif
}
