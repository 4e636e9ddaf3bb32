// POCA's forward pass on x86 processors with AVX2 and FMA; poca_cpu.py calls it.
//
// PANEL maps at a time: their kernels are transposed once (pack), and per image two small matrix products give their
// scores and values at every position (embed), of which the softmax and the sum are taken while they lie in the nearest
// cache (attend).

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int LANES = 8, ROWS = 6;  // 12 sums, a kernel's 2 vectors and a feature fill 15 of 16 registers
constexpr int PANEL = 16, VECTORS = PANEL / LANES;
constexpr ptrdiff_t DEPTH = 128;      // channels at a time, so that weights and features lie in the nearest cache
constexpr ptrdiff_t NEAR = 64 * 1024;  // features that the second nearest cache holds

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));

struct Call {  // as in poca_cpu.py; strides and sizes count floats
    const float *x;
    ptrdiff_t image_stride, position_stride, channel_stride;
    const float *key_weight, *value_weight;  // (groups * maps, depth)
    float *out;                              // (batch, groups * maps)
    ptrdiff_t batch, length, channels, groups, maps, key_depth, value_depth, threads;
};

// (maps, depth) -> (depth, PANEL); maps that are missing repeat the first
void pack(const float *weight, ptrdiff_t maps, ptrdiff_t depth, float *packed) {
    for (int half = 0; half < PANEL; half += 8) {
        const float *row[8];
        for (int m = 0; m < 8; m++) row[m] = weight + (half + m < maps ? half + m : 0) * depth;
        ptrdiff_t c = 0;
        for (; c + 8 <= depth; c += 8) {  // 8 x 8 floats: pairs, pairs of pairs, halves
            __m256 a[8], b[8];
            for (int m = 0; m < 8; m++) a[m] = _mm256_loadu_ps(row[m] + c);
            for (int m = 0; m < 8; m += 2) {
                b[m] = _mm256_unpacklo_ps(a[m], a[m + 1]);
                b[m + 1] = _mm256_unpackhi_ps(a[m], a[m + 1]);
            }
            for (int m = 0; m < 8; m += 4) {
                a[m] = _mm256_shuffle_ps(b[m], b[m + 2], 0x44);
                a[m + 1] = _mm256_shuffle_ps(b[m], b[m + 2], 0xee);
                a[m + 2] = _mm256_shuffle_ps(b[m + 1], b[m + 3], 0x44);
                a[m + 3] = _mm256_shuffle_ps(b[m + 1], b[m + 3], 0xee);
            }
            for (int m = 0; m < 4; m++) {
                _mm256_storeu_ps(packed + (c + m) * PANEL + half, _mm256_permute2f128_ps(a[m], a[m + 4], 0x20));
                _mm256_storeu_ps(packed + (c + m + 4) * PANEL + half, _mm256_permute2f128_ps(a[m], a[m + 4], 0x31));
            }
        }
        for (; c < depth; c++)
            for (int m = 0; m < 8; m++) packed[c * PANEL + half + m] = row[m][c];
    }
}

// COUNT rows of a product of features (length, depth) and packed weights (depth, PANEL); added to maps but for the first
template <int COUNT>
void embed_rows(const Call &call, const float *x, const float *packed, ptrdiff_t depth, bool first, float *maps) {
    Vector sums[COUNT][VECTORS];
#pragma GCC unroll 16
    for (int row = 0; row < COUNT; row++)
        for (int v = 0; v < VECTORS; v++) sums[row][v] = first ? Vector{} : ((Vector *)maps)[row * VECTORS + v];
    for (ptrdiff_t c = 0; c < depth; c++, x += call.channel_stride, packed += PANEL) {
        Vector weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) weights[v] = ((const Vector *)packed)[v];
#pragma GCC unroll 16
        for (int row = 0; row < COUNT; row++)
            for (int v = 0; v < VECTORS; v++) sums[row][v] += x[row * call.position_stride] * weights[v];
    }
#pragma GCC unroll 16
    for (int row = 0; row < COUNT; row++)
        for (int v = 0; v < VECTORS; v++) ((Vector *)maps)[row * VECTORS + v] = sums[row][v];
}

constexpr decltype(&embed_rows<1>) EMBED_ROWS[] = {
    embed_rows<1>, embed_rows<2>, embed_rows<3>, embed_rows<4>, embed_rows<5>, embed_rows<ROWS>};

void embed(const Call &call, const float *x, const float *packed, ptrdiff_t depth, const float *next, float *maps) {
    ptrdiff_t fetched = 0;
    for (ptrdiff_t c = 0; c < depth; c += DEPTH) {
        ptrdiff_t channels = std::min(depth - c, DEPTH);
        for (ptrdiff_t row = 0, steps = (call.length + ROWS - 1) / ROWS, count; steps > 0; steps--, row += count) {
            count = (call.length - row) / steps;  // as even as it goes: 49 rows are five times 5 and four times 6
            for (; fetched < c + channels * (row + count) / call.length; fetched++)
                __builtin_prefetch(next + fetched * PANEL, 0, 2);
            EMBED_ROWS[count - 1](call, x + c * call.channel_stride + row * call.position_stride, packed + c * PANEL,
                                  channels, c == 0, maps + row * PANEL);
        }
    }
}

inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }  // b if one of them is NaN

// exp(x) to 2e-7: 2^n times a polynomial (Cephes' expf) on [-ln 2 / 2, ln 2 / 2]; NaN stays NaN, ends are cut off
inline Vector exponential(Vector x) {
    x = larger(Vector{} - 87.f, _mm256_min_ps(Vector{} + 88.f, x));
    Vector shifted = x * 1.44269504f + 12582912.f;  // n in the last bits, by rounding
    Vector n = shifted - 12582912.f;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * (x * x) + x + 1.f;
    return y * (Vector)(((Bits)shifted << 23) + (127 << 23));
}

// (length, PANEL) scores and values -> PANEL attended values. Scores are shifted by their largest only if the sums show
// that some exponential came near the ends of the number range.
void attend(const float *scores, const float *values, ptrdiff_t length, float *out) {
    for (int v = 0; v < VECTORS; v++) {
        const Vector *score = (const Vector *)scores + v, *value = (const Vector *)values + v;
        Vector shift = {}, total, sum;
        for (bool shifted : {false, true}) {
            total = sum = Vector{};
            for (ptrdiff_t l = 0; l < length; l++) {
                Vector attention = exponential(score[l * VECTORS] - shift);
                total += attention;
                sum += attention * value[l * VECTORS];
            }
            if (shifted || _mm256_movemask_ps((Vector)((total > 1e-20f) & (total < 1e20f))) == 0xff) break;
            shift = *score;
            for (ptrdiff_t l = 1; l < length; l++) shift = larger(score[l * VECTORS], shift);
        }
        ((Vector *)out)[v] = sum / total;
    }
}

size_t buffer_size(const Call &call) { return (call.key_depth + call.value_depth + 2 * call.length + 1) * PANEL; }

// One thread's share of the panels of all groups, for so many images at a time as the second nearest cache holds
void run(const Call &call, int thread, int threads, float *buffer) {
    float *key = buffer, *value = key + call.key_depth * PANEL;
    float *scores = value + call.value_depth * PANEL, *values = scores + call.length * PANEL;
    float *attended = values + call.length * PANEL;
    ptrdiff_t first_value = call.channels - call.groups * call.value_depth;
    ptrdiff_t images = std::max<ptrdiff_t>(NEAR / (call.length * (call.key_depth + call.value_depth)), 1);
    ptrdiff_t panels = (call.maps + PANEL - 1) / PANEL, all = call.groups * panels;
    ptrdiff_t tasks = (call.batch + images - 1) / images * all;
    for (ptrdiff_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++) {
        ptrdiff_t image = task / all * images, end = std::min(image + images, call.batch);
        ptrdiff_t group = task % all / panels, map = task % panels * PANEL;
        ptrdiff_t maps = std::min<ptrdiff_t>(call.maps - map, PANEL), row = group * call.maps + map;
        const float *key_weight = call.key_weight + row * call.key_depth;
        const float *value_weight = call.value_weight + row * call.value_depth;
        pack(key_weight, maps, call.key_depth, key);
        pack(value_weight, maps, call.value_depth, value);
        for (; image < end; image++) {
            const float *x = call.x + image * call.image_stride;
            embed(call, x + group * call.key_depth * call.channel_stride, key, call.key_depth,
                  key_weight + maps * call.key_depth, scores);
            embed(call, x + (first_value + group * call.value_depth) * call.channel_stride, value, call.value_depth,
                  value_weight + maps * call.value_depth, values);
            attend(scores, values, call.length, attended);
            memcpy(call.out + image * call.groups * call.maps + row, attended, maps * sizeof(float));
        }
    }
}

}  // namespace

// 0, or -1 if there is no memory
extern "C" int poca_forward(const Call *call) {
    int result = 0;
#pragma omp parallel num_threads(call->threads)
    {
        float *buffer = (float *)aligned_alloc(64, buffer_size(*call) * sizeof(float));
        if (buffer)
            run(*call, omp_get_thread_num(), omp_get_num_threads(), buffer);
        else
#pragma omp atomic write
            result = -1;
        free(buffer);
    }
    return result;
}
