// What every generated C++ kernel shares: mathematics, blocks of lanes, partial sums.
//
// The two innermost axes of a kernel's loop are called pixels and channels. A few whole pixels, seen as one
// run of *lanes*, make a step; the lanes of a step are a multiple of VECTOR, which the source defines. A block
// is several steps. The generated body walks the lanes VECTOR at a time and, for each of these columns, the
// steps of the block: so it consists of full vectors whatever the number of channels, and per-channel operands
// and accumulators stay in registers. An array that lies in memory that way already is used where it is; any
// other one, and the last pixels of a row, which do not fill a step, pass through a buffer.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MEMBER inline __attribute__((always_inline))
#define APART __attribute__((noinline))
#define RARE __attribute__((noinline, cold))

// Before a loop whose turns do not wait for each other.
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

constexpr int64_t WIDEST = 2048;     // lanes of a step made of several pixels
constexpr int64_t BUFFERED = 2048;   // lanes of a block with buffers: these stay in the first-level cache
constexpr int64_t DIRECT = 16384;    // of one without
constexpr int64_t RUN = 8;           // steps added up in registers, in float32
constexpr int64_t FLUSH = 64;        // after so many steps a double takes over
constexpr int64_t NEAR = 256;        // lanes walked out of order: where they are more, prefetching suffers
constexpr int64_t RECENTRE = 8192;   // steps between two new shifts of a second moment
constexpr int MAX_RANK = 16;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- elementary functions: the vector forms of the mathematics library where it has them ---------------------

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR_FORM __attribute__((simd("notinbranch"), const))
#else
#define VECTOR_FORM
#endif
#define DECLARE_UNARY(name)                             \
    extern "C" VECTOR_FORM double name(double) noexcept; \
    extern "C" VECTOR_FORM float name##f(float) noexcept; \
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
extern "C" VECTOR_FORM double pow(double, double) noexcept;
extern "C" VECTOR_FORM float powf(float, float) noexcept;
INLINE float m_pow(float x, float y) { return powf(x, y); }
INLINE double m_pow(double x, double y) { return pow(x, y); }
#define DECLARE_BUILTIN(name)                                     \
    INLINE float m_##name(float x) { return __builtin_##name##f(x); } \
    INLINE double m_##name(double x) { return __builtin_##name(x); }
DECLARE_BUILTIN(sqrt)
DECLARE_BUILTIN(floor)
DECLARE_BUILTIN(ceil)
DECLARE_BUILTIN(trunc)
DECLARE_BUILTIN(rint)
// a * b + c, rounded once where the processor can: where PyTorch's own kernels do that.
#ifdef __FMA__
INLINE float m_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double m_fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif
template <class T> INLINE T m_fma(T a, T b, T c) { return (T)(a * b + c); }
template <class T> INLINE T m_abs(T x) { return x < 0 ? -x : x; }
INLINE float m_abs(float x) { return __builtin_fabsf(x); }
INLINE double m_abs(double x) { return __builtin_fabs(x); }

constexpr bool CLEAR_NAN = true;  // see round_bfloat16

#include "functions.h"

// ---- blocks --------------------------------------------------------------------------------------------------

struct Form {  // how pixels make steps
    int64_t channels, pixels, lanes;  // of a step: pixels of so many channels; lanes, the unused ones included
    int64_t run;                      // steps that are done together, column by column
    int64_t runs;                     // of such runs, until a double takes over
    bool single;                      // a block must not have more than one step

    Form(int64_t channels_, bool alone, bool single_) : channels(channels_), pixels(1), run(RUN), single(single_ || alone) {
        for (int64_t c = channels; pixels < VECTOR && c % 2 == 0; c /= 2) pixels *= 2;
        pixels = VECTOR / pixels;
        if (alone || pixels * channels > WIDEST) pixels = 1;
        lanes = (pixels * channels + VECTOR - 1) / VECTOR * VECTOR;
        while (lanes > VECTOR && run > 1 && run * lanes > NEAR) run /= 2;
        runs = least(FLUSH / run, RUN);
    }
    bool full() const { return lanes == pixels * channels; }
    // Whether an array needs no buffer, and then how far a step is from the next.
    bool direct(int64_t across, int64_t along) const {
        return full() && (along == 1 || channels == 1) && (pixels == 1 || across == channels);
    }
    int64_t pitch() const { return pixels == 1 ? lanes : channels; }  // of the pixels in a buffer
};

struct Block {
    int64_t steps, pixels;
    bool whole;   // the steps are full; else one is begun
};

struct Arena {  // scratch of one call, for arrays of elements of at most 8 bytes
    char *memory, *next;
    int64_t bytes;

    Arena(int64_t arrays, int64_t lanes) : bytes((lanes * 8 + 63) / 64 * 64) {
        memory = (char *)malloc((size_t)(arrays * bytes + 64));
        next = memory + (64 - (uintptr_t)memory % 64);
    }
    ~Arena() { free(memory); }
    template <class T> T *take() {
        T *array = (T *)next;
        next += bytes;
        return array;
    }
    template <class T> T *zeros(int64_t lanes) { return (T *)memset(take<T>(), 0, (size_t)lanes * sizeof(T)); }
};

template <class T> INLINE void copy_row(T *to, const T *from, int64_t n) {
    int64_t c = 0;
    for (; c + 16 <= n; c += 16) memcpy(to + c, from + c, 16 * sizeof(T));
    for (; c + 8 <= n; c += 8) memcpy(to + c, from + c, 8 * sizeof(T));
    for (; c + 4 <= n; c += 4) memcpy(to + c, from + c, 4 * sizeof(T));
    for (; c < n; c++) to[c] = from[c];
}

template <class T> struct Input {
    int64_t across, along, step = 0;  // strides between pixels, between channels; between the steps of lanes()
    bool direct;
    T *buffer;
    const T *held = nullptr;  // where the buffer was filled from
    int64_t pixels = 0;       // and how far

    Input(Arena &arena, const Form &form, const int64_t *inner)
        : across(inner[0]), along(inner[1]), direct(form.direct(across, along)), buffer(arena.take<T>()) {}

    MEMBER const T *lanes(const T *at, const Form &form, Block block) {
        if (direct && block.whole) {
            step = across * form.pixels;
            return at;
        }
        step = form.lanes;
        // A constant or a vector per channel is filled once.
        if (at != held || block.pixels > pixels) fill(at, form, block.pixels);
        return buffer;
    }
    APART void fill(const T *at, const Form &form, int64_t count) {
        held = at, pixels = count;
        T *to = buffer;
        for (int64_t p = 0; p < count; p++, at += across, to += form.pitch()) {
            if (along == 1)
                copy_row(to, at, form.channels);
            else
                for (int64_t c = 0; c < form.channels; c++) to[c] = at[c * along];
        }
    }
};

template <class T> struct Output {
    int64_t across, along, step = 0;
    bool direct;
    T *buffer;

    Output(Arena &arena, const Form &form, const int64_t *inner)
        : across(inner[0]), along(inner[1]), direct(form.direct(across, along)), buffer(arena.take<T>()) {}

    MEMBER T *lanes(T *at, const Form &form, Block block) {
        step = direct && block.whole ? across * form.pixels : form.lanes;
        return direct && block.whole ? at : buffer;
    }
    MEMBER void commit(T *at, const Form &form, Block block) {
        if (!direct || !block.whole) spill(at, form, block.pixels);
    }
    APART void spill(T *at, const Form &form, int64_t count) {
        const T *from = buffer;
        for (int64_t p = 0; p < count; p++, at += across, from += form.pitch()) {
            if (along == 1)
                copy_row(at, from, form.channels);
            else
                for (int64_t c = 0; c < form.channels; c++) at[c * along] = from[c];
        }
    }
};

// ---- partial sums: a few additions in float32, then double per lane, then the slot of the result --------------
//
// Lanes l, l + period, ... belong to channel l; period 1: all to one sum.

template <class T> APART void flush_lanes(double *to, T *from, int64_t lanes, int64_t valid) {
    int64_t l = 0;
    for (; l + VECTOR <= valid; l += VECTOR)
        for (int64_t j = 0; j < VECTOR; j++) to[l + j] += (double)from[l + j];
    for (; l < valid; l++) to[l] += (double)from[l];
    for (l = 0; l < lanes; l += VECTOR) memset(from + l, 0, VECTOR * sizeof(T));  // those not valid, too
}

template <class T> struct Sum {
    T *sum, *square = nullptr;
    double *total;
    double *slot = nullptr;
    int64_t lanes, period, apart, used = 0, pending = 0;

    Sum(Arena &arena, const Form &form, int64_t period_, int64_t apart_, int64_t)
        : sum(arena.zeros<T>(form.lanes)), total(arena.zeros<double>(form.lanes)), lanes(form.lanes),
          period(period_), apart(apart_) {}

    MEMBER int64_t open(double *to) {  // how many steps the next block may have
        if (to != slot) turn(to);
        return INT64_MAX;
    }
    MEMBER void pause(const Form &form, int64_t valid, bool last) {  // after a run
        if (++pending < form.runs && !last) return;
        flush_lanes(total, sum, lanes, valid);
        pending = 0;
    }
    MEMBER void add(int64_t, int64_t valid) { used = valid > used ? valid : used; }  // after a block
    APART void turn(double *to) {
        for (int64_t c = 0; c < (slot ? period : 0); c++) {
            double all = 0;
            for (int64_t l = c; l < used; l += period) all += total[l], total[l] = 0;
            slot[c * apart] += all;
        }
        slot = to, used = 0;
    }
};

// Count, mean and sum of squared deviations, about a shift near the mean, so that nothing cancels. The first
// few elements are kept as they are and give the first shift. Chunks of steps are merged by the update of Chan,
// Golub and LeVeque (1979), and each gives the next one its shift; an outlier among n elements moves the mean by
// a part in n, so a chunk has n squared / 64 elements at most. A shift is a
// multiple of a small part of the standard deviation: then what is left of values of few digits (bfloat16,
// masks, counts) are numbers of few digits, whose squares are exact.
template <class T> struct Moments {
    T *sum, *square, *shift;
    double *total, *squares;
    double *slot = nullptr;
    int64_t lanes, period, apart, plane, used = 0, pending = 0, steps = 0, limit = 1;
    double count = 0;
    bool raw = true;  // one step, no shift: `total` holds the values themselves

    Moments(Arena &arena, const Form &form, int64_t period_, int64_t apart_, int64_t plane_)
        : sum(arena.zeros<T>(form.lanes)), square(arena.zeros<T>(form.lanes)), shift(arena.zeros<T>(form.lanes)),
          total(arena.zeros<double>(form.lanes)), squares(arena.zeros<double>(form.lanes)), lanes(form.lanes),
          period(period_), apart(apart_), plane(plane_) {}

    MEMBER int64_t open(double *to) {  // how many steps the next block may have
        if (to != slot) turn(to);
        return limit - steps;
    }
    MEMBER void pause(const Form &form, int64_t valid, bool last) {
        if (++pending < form.runs && !last) return;
        flush_lanes(total, sum, lanes, valid);
        flush_lanes(squares, square, lanes, valid);
        pending = 0;
    }
    MEMBER void add(int64_t done, int64_t valid) {
        used = valid > used ? valid : used;
        count += (double)(done * (valid / period));
        steps += done;
        if (steps >= limit) recentre();
    }
    RARE void turn(double *to) {
        close();
        slot = to;
        if (to) prepare();
    }
    RARE void recentre() {
        close();
        prepare();
    }
    void prepare() {  // the next chunk: its length; its shift, one per channel, none where the mean is not finite
        const double most = *slot * *slot / 64 / (double)(lanes > period ? lanes / period : 1);
        raw = *slot < 8;
        limit = raw || most < 1 ? 1 : most < (double)RECENTRE ? (int64_t)most : RECENTRE;
        for (int64_t c = 0; c < period; c++) {
            const double *at = slot + c * apart;
            const double deviation = __builtin_sqrt(at[2 * plane] / *at);
            const double part = bits_as<double>(bits_as<uint64_t>(deviation) & 0x7ff0000000000000u) / 16;
            const double multiple = part > 0 ? __builtin_rint(at[plane] / part) * part : at[plane];
            const T mean = (T)multiple;
            const T centre = !raw && mean - mean == 0 ? mean : 0;
            for (int64_t l = c; l < lanes; l += period) shift[l] = centre;
        }
    }
    void close() {
        if (!steps) return;
        for (int64_t c = 0; c < period; c++) {
            double all = 0, spread = 0;
            // About one of the values, so that the mean of equal values is that value.
            const double centre = raw && total[c] - total[c] == 0 ? total[c] : 0;
            for (int64_t l = c; l < used; l += period) all += total[l] - centre;
            const double middle = centre + all / count;
            for (int64_t l = c; l < used; l += period) {
                spread += raw ? (total[l] - middle) * (total[l] - middle) : squares[l];
                total[l] = squares[l] = 0;
            }
            merge(slot + c * apart, (double)shift[c] + middle, raw ? spread : spread - all * middle);
        }
        used = steps = 0, count = 0;
    }
    void merge(double *to, double mean, double spread) {
        const double before = to[0], all = before + count, between = mean - to[plane];
        to[0] = all;
        to[plane] = before == 0 ? mean : to[plane] + between * (count / all);
        to[2 * plane] += spread + (before == 0 ? 0 : between * between * (before * count / all));
    }
};
