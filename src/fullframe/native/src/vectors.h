// Vectors of float32, for the kernels that keep a block of sums in registers.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

// Elements of a vector, and how many vectors of sums fit into the registers beside what they are made of.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, HELD = 28;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, HELD = 12;
#else
constexpr int64_t LANES = 4, HELD = 12;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// Sums are rounded once per product here, as in the library's kernels: in every kernel, or an output would depend on
// which made it. Where the processor's instruction is not named, the compiler may choose it, and may not.
#define FUSED
#if defined(__AVX512F__)
#define MADD(a, b, c) (Vec) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#elif defined(__AVX__) && defined(__FMA__)
#define MADD(a, b, c) (Vec) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#elif defined(__clang__)
#if !defined(__x86_64__) && __has_builtin(__builtin_elementwise_fma)
#define MADD(a, b, c) __builtin_elementwise_fma(a, b, c)
#else  // it knows no such attribute, and rounds product and sum: in all kernels alike
#define MADD(a, b, c) ((a) * (b) + (c))
#endif
#else
#undef FUSED
#define FUSED __attribute__((optimize("fp-contract=fast")))
#define MADD(a, b, c) ((a) * (b) + (c))
#endif

#if defined(__AVX512BF16__)
#define ADD_PAIRS(a, b, c) (Vec) _mm512_dpbf16_ps((__m512)(c), (__m512bh)(a), (__m512bh)(b))
#else
#define ADD_PAIRS(a, b, c) (c)  // nothing of pairs is made
#endif

// A value kept in a register, where the compiler would rather load it again, or make it anew, at every use.
#if defined(__AVX512F__)
#define KEEP(value) asm("" : "+v"(value))
#elif defined(__x86_64__)
#define KEEP(value) asm("" : "+x"(value))
#else
#define KEEP(value)
#endif
#define KEEP_NUMBERS(a, b, c, d) asm("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d))

// A number, or a pair of them, in all lanes.
enum Kind { SINGLE, PAIRS };
template <Kind K> FUSED static inline __attribute__((always_inline)) Vec all(const float *at) {
    if constexpr (K == SINGLE) return *at - Vec{};
#if defined(__AVX512BF16__)
    else return (Vec)_mm512_set1_epi32(*(const int32_t *)at);
#endif
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Axis {
    int64_t out, in, kernel, stride, before, dilation;  // extents, geometry, padding before the window
    int64_t at(int64_t output, int64_t tap) const { return output * stride - before + tap * dilation; }
};
