// What every generated CUDA kernel shares: mathematics, where elements lie, partial sums.
//
// The axes of a loop that a reduction keeps are counted by k, those that it reduces by r; without reductions all
// are kept. An element of a tensor lies at one offset that follows from k and one that follows from r. The axis
// that is innermost in memory is walked V elements at a time, a *column*, and k or r counts columns along it.
// Neighbouring threads take neighbouring columns of it.
//
// The source defines INDEX (unsigned), WIDE (whether it has 64 bits), THREADS of a block, TENSORS, KEPT and
// REDUCED (axes, at least 1), and SLOTS (numbers that the reductions have per k).

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define __builtin_nan(text) __longlong_as_double(0x7ff8000000000000LL)
#define __builtin_inf() __longlong_as_double(0x7ff0000000000000LL)
#endif

#define INLINE static __device__ __forceinline__

// ---- elementary functions ------------------------------------------------------------------------------------

#define DECLARE_UNARY(name)                               \
    INLINE float m_##name(float x) { return name##f(x); } \
    INLINE double m_##name(double x) { return name(x); }
DECLARE_UNARY(exp)
DECLARE_UNARY(exp2)
DECLARE_UNARY(expm1)
DECLARE_UNARY(log)
DECLARE_UNARY(log1p)
DECLARE_UNARY(log2)
DECLARE_UNARY(log10)
DECLARE_UNARY(sin)
DECLARE_UNARY(cos)
DECLARE_UNARY(tan)
DECLARE_UNARY(atan)
DECLARE_UNARY(sinh)
DECLARE_UNARY(cosh)
DECLARE_UNARY(tanh)
DECLARE_UNARY(erf)
DECLARE_UNARY(erfc)
DECLARE_UNARY(sqrt)
DECLARE_UNARY(floor)
DECLARE_UNARY(ceil)
DECLARE_UNARY(trunc)
DECLARE_UNARY(rint)
INLINE float m_pow(float x, float y) { return powf(x, y); }
INLINE double m_pow(double x, double y) { return pow(x, y); }
INLINE float m_fma(float a, float b, float c) { return fmaf(a, b, c); }
INLINE double m_fma(double a, double b, double c) { return fma(a, b, c); }
template <class T> INLINE T m_fma(T a, T b, T c) { return (T)(a * b + c); }
INLINE float m_abs(float x) { return fabsf(x); }
INLINE double m_abs(double x) { return fabs(x); }
template <class T> INLINE T m_abs(T x) { return x < 0 ? -x : x; }

constexpr bool CLEAR_NAN = false;  // see round_bfloat16

#include "functions.h"

// ---- where elements lie --------------------------------------------------------------------------------------

struct Axis {
    INDEX extent, magic, shift;  // the two for division by the extent
    INDEX stride[TENSORS + 1];   // of each tensor; and of the reductions' results
};

struct Geometry {
    INDEX kept_columns, reduced_columns, kept_axes, reduced_axes;
    INDEX across;             // log2 of how many k the threads of a block take at a time
    INDEX inner;              // whether neighbouring threads take neighbouring k, else r
    INDEX chunks;             // blocks that share a k: each has its part of r
    INDEX lanes;              // elements that are kept, of a column
    INDEX joining;            // as `across`, when the results of chunks are joined
    INDEX lane[TENSORS + 1];  // from one element of a column to the next; a number held in place of its address: 1
    Axis kept[KEPT], reduced[REDUCED];  // innermost first
};

struct Places {
    void *at[TENSORS];
    double *result, *work;  // of the reductions: [SLOTS][elements kept], and one for each chunk
};

INLINE INDEX least(INDEX a, INDEX b) { return a < b ? a : b; }

INLINE INDEX quotient(INDEX n, const Axis &axis) {
#if WIDE
    return n / axis.extent;
#else
    return (__umulhi(n, axis.magic) + n) >> axis.shift;  // for n below 2**31
#endif
}

template <int MOST> INLINE void locate(INDEX n, const Axis *axes, INDEX count, INDEX *at) {  // adds to the offsets
#pragma unroll
    for (int a = 0; a < MOST; a++) {
        if (a >= count) continue;
        const INDEX rest = a + 1 < count ? quotient(n, axes[a]) : 0;
        const INDEX index = n - rest * axes[a].extent;
#pragma unroll
        for (int t = 0; t <= TENSORS; t++) at[t] += index * axes[a].stride[t];
        n = rest;
    }
}

template <class T, int V> struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Lanes {
    T lane[V];
};

template <class T, int V> INLINE Lanes<T, V> fetch(const void *base, INDEX at, INDEX step) {
    const T *from = (const T *)base + at;
    Lanes<T, V> x;
    if (V == 1 || step) return *(const Lanes<T, V> *)from;
    x.lane[0] = *from;
#pragma unroll
    for (int j = 1; j < V; j++) x.lane[j] = x.lane[0];
    return x;
}

template <class T, int V> INLINE void put(void *base, INDEX at, const Lanes<T, V> &x) {
    *(Lanes<T, V> *)((T *)base + at) = x;
}

template <class T> INLINE T constant(void *place, INDEX held) {
    T x;
    if (!held) return *(const T *)place;
    memcpy(&x, &place, sizeof x);
    return x;
}

// ---- partial sums --------------------------------------------------------------------------------------------
//
// In float64: of a thread, then of the threads of a block that share a k, halving their number again and again,
// then of the chunks. The order of additions follows from the geometry alone.

struct Team {  // a thread among those of its block
    unsigned self, row, rows, pitch;  // those that share its k: its place and their number, how far they are apart

    __device__ Team(unsigned across, bool inner) : self(threadIdx.x), rows(THREADS >> across) {
        row = inner ? self >> across : self % rows;
        pitch = inner ? 1u << across : 1;
    }
    __device__ unsigned column(unsigned across, bool inner) const {
        return inner ? self & ((1u << across) - 1) : self / rows;
    }
};

template <int LANES> INLINE void join(const Team &team, double *shared, double *sum) {
#pragma unroll
    for (int q = 0; q < LANES; q++) shared[q * THREADS + team.self] = sum[q];
    for (unsigned half = team.rows / 2; half; half /= 2) {
        __syncthreads();
        if (team.row >= half) continue;
#pragma unroll
        for (int q = 0; q < LANES; q++) {
            double *mine = shared + q * THREADS + team.self;
            *mine = sum[q] += mine[half * team.pitch];
        }
    }
    __syncthreads();  // before the next one writes there
}

struct Moments {
    double count, mean, spread;  // the last: sum of squared deviations from the mean
};

INLINE double unless_infinite(double x) { return x - x == 0 ? x : 0; }

// From sums of deviations from a shift near the mean, and of their squares.
INLINE Moments moments(double count, double shift, double sum, double squares) {
    if (count == 0) return {0, 0, 0};
    const double spread = squares - sum * (sum / count);
    return {count, shift + sum / count, spread < 0 ? 0 : spread};
}

INLINE Moments merged(Moments a, Moments b) {  // Chan, Golub and LeVeque (1979)
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const double all = a.count + b.count, part = b.count / all, between = b.mean - a.mean;
    return {all, a.mean + between * part, a.spread + b.spread + between * between * (a.count * part)};
}

template <int LANES> INLINE void join(const Team &team, double *shared, Moments *m) {
    Moments *all = (Moments *)shared;
#pragma unroll
    for (int q = 0; q < LANES; q++) all[q * THREADS + team.self] = m[q];
    for (unsigned half = team.rows / 2; half; half /= 2) {
        __syncthreads();
        if (team.row >= half) continue;
#pragma unroll
        for (int q = 0; q < LANES; q++) {
            Moments *mine = all + q * THREADS + team.self;
            *mine = m[q] = merged(m[q], mine[half * team.pitch]);
        }
    }
    __syncthreads();
}

struct Slots {  // where a thread puts what it has of one k
    double *to;
    uint64_t apart;

    // Of element k of those kept, whose place in the results is `place`; before the chunks are joined, or after.
    __device__ Slots(const Geometry &g, const Places &p, uint64_t k, uint64_t place, bool last)
        : apart((uint64_t)g.kept_columns * g.lanes) {
        to = last ? p.result + place : p.work + blockIdx.x * (SLOTS * apart) + k;
    }
    __device__ void put(int slot, double sum) const { to[slot * apart] = sum; }
    __device__ void put(int slot, const Moments &m) const {
        put(slot, m.count), put(slot + 1, m.mean), put(slot + 2, m.spread);
    }
};

INLINE void take(const double *from, uint64_t, double &sum) { sum += *from; }
INLINE void take(const double *from, uint64_t apart, Moments &m) {
    m = merged(m, {from[0], from[apart], from[2 * apart]});
}
