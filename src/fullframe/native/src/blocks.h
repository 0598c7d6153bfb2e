// A block of the sums of a convolution, some pixels of a row times some vectors of output channels, stays in registers
// while the products pass: of each, a vector of the weight against the numbers of all pixels, read where they lie.
//
// Of bfloat16 the products of two channels are added up at once, in float32, so a pair of channels takes the place of a
// number. Below, a number is four bytes: a float32, or a pair.

#include <utility>

struct Steps {  // a step and its multiples in bytes: from them all pixels of a block have an address without registers
    int64_t one, three, five, seven;
};

constexpr int NEAR = 9;  // pixels that are addressed from one base

template <int P>
static inline const float *pixel(const char *const *bases, const Steps &s) {
    constexpr int k = P % NEAR;
    const char *base = bases[P / NEAR];
    if constexpr (k == 0) return (const float *)base;
    if constexpr (k == 1) return (const float *)(base + s.one);
    if constexpr (k == 2) return (const float *)(base + 2 * s.one);
    if constexpr (k == 3) return (const float *)(base + s.three);
    if constexpr (k == 4) return (const float *)(base + 4 * s.one);
    if constexpr (k == 5) return (const float *)(base + s.five);
    if constexpr (k == 6) return (const float *)(base + 2 * s.three);
    if constexpr (k == 7) return (const float *)(base + s.seven);
    return (const float *)(base + 8 * s.one);
}

// Adds one product to the sums of the pixels K.
template <Kind K, int V, int... P>
FUSED static inline __attribute__((always_inline)) void add(std::integer_sequence<int, P...>, const char *const *bases,
                                                            const Steps &s, const Vec *weight, Vec (*sum)[V]) {
    const auto one = [&](const float *x, Vec *to) FUSED __attribute__((always_inline)) {
        const Vec number = all<K>(x);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            if constexpr (K == SINGLE) to[v] = MADD(number, weight[v], to[v]);
            else to[v] = ADD_PAIRS(number, weight[v], to[v]);
        }
    };
    (one(pixel<P>(bases, s), sum[P]), ...);
}

struct Chain {  // the products of a chain
    const char *rows[64];  // where the first pixel of each row of taps begins; null where it is outside
    const float *weight;
    int64_t count, taps, deep;                     // rows of taps, taps of a row, numbers of a tap
    int64_t pixel, tap;                            // steps in bytes
    int64_t weight_row, weight_tap, weight_deep;  // and in numbers
};

struct Target {
    char *at;
    int64_t pixel, used;  // step from pixel to pixel, in elements; channels of the last vector
    bool first;           // whether nothing is there yet
    const float *bias;
};

// Puts the first lanes of a vector.
#if defined(__AVX512F__)
static inline void some(float *at, Vec sum, const float *before, int64_t used) {
    const __mmask16 lanes = (1 << used) - 1;
    const __m512 added = before ? _mm512_maskz_loadu_ps(lanes, before) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(at, lanes, before ? (__m512)(sum + (Vec)added) : (__m512)sum);
}
#else
static __attribute__((noinline)) void some(float *at, Vec sum, const float *before, int64_t used) {
    for (int64_t j = 0; j < used; j++) at[j] = before ? sum[j] + before[j] : sum[j];
}
#endif

// Keeps a vector of sums, of which there may be a part already.
static inline __attribute__((always_inline)) void keep(float *at, Vec sum, const float *before, int64_t used) {
    if (used == LANES) *(Loose *)at = before ? sum + *(const Loose *)before : sum;
    else some(at, sum, before, used);
}

#if defined(__AVX512BF16__)
static inline __attribute__((always_inline)) void keep(uint16_t *at, Vec sum, const float *bias, int64_t used) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)(bias ? sum + *(const Loose *)bias : sum));
    if (used == LANES) _mm256_storeu_si256((__m256i *)at, rounded);
    else _mm256_mask_storeu_epi16(at, (1 << used) - 1, rounded);
}
#endif

template <Kind K> struct Element { typedef float T; };
template <> struct Element<PAIRS> { typedef uint16_t T; };

template <Kind K, int P, int V>
FUSED static void block(const Chain &chain, const Target &to) {
    typedef typename Element<K>::T T;
    Vec sum[P][V] = {};
    Steps s = {chain.pixel, 3 * chain.pixel, 5 * chain.pixel, 7 * chain.pixel};
    for (int64_t r = 0; r < chain.count; r++) {
        const char *row = chain.rows[r];
        if (!row) continue;
        for (int64_t k = 0; k < chain.taps; k++, row += chain.tap) {
            const char *bases[4] = {row, row + NEAR * s.one, row + 2 * NEAR * s.one, row + 3 * NEAR * s.one};
            const float *w = chain.weight + r * chain.weight_row + k * chain.weight_tap;
            for (int64_t c = 0; c < chain.deep; c++, w += chain.weight_deep) {
                Vec weight[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) {
                    weight[v] = *(const Loose *)(w + v * LANES);
                    KEEP(weight[v]);
                }
                KEEP_NUMBERS(s.one, s.three, s.five, s.seven);
                add<K, V>(std::make_integer_sequence<int, P>{}, bases, s, weight, sum);
#pragma GCC unroll 4
                for (int b = 0; b < 4; b++) bases[b] += 4;
            }
        }
    }
#pragma GCC unroll 32
    for (int p = 0; p < P; p++) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            T *at = (T *)to.at + p * to.pixel + v * LANES;
            const float *bias = to.bias ? to.bias + v * LANES : nullptr;
            keep(at, sum[p][v], to.first ? bias : (const float *)at, v < V - 1 ? LANES : to.used);
        }
    }
}

template <Kind K> struct Blocks {  // by vectors and pixels
    void (*of[4][HELD + 1])(const Chain &, const Target &);
    template <int V, int P> void fill() {
        if constexpr (P > 0) of[V][P] = block<K, P, V>, fill<V, P - 1>();
    }
    Blocks() { fill<1, HELD>(), fill<2, HELD / 2>(), fill<3, HELD / 3>(); }
};
template <Kind K> static const Blocks<K> BLOCKS;

struct Task {
    int64_t batch, thick, deep;  // output channels, and numbers of an input pixel
    Axis axis[3];
    int64_t x_step[4], out_step[4];  // batch and spatial, in bytes
    int64_t weight_step[5];          // output channel, input channel, spatial, in elements
    int64_t some, part;              // rows of taps, and numbers, of a chain
    const char *x;
    const void *weight;
    const float *bias;
    char *out;

    int64_t rows() const { return axis[0].kernel * axis[1].kernel; }
    int64_t products() const { return rows() * axis[2].kernel * deep; }
};

constexpr int64_t LARGE = 1 << 18;  // bytes of a weight, from which on a chain of it is used for all blocks at once

// A vector's worth of output channels, and some input channels at a time, of a run of taps of a row: few pages of memory
// are in use at once, and each part of a weight is read while it is near.
template <typename T> struct Patch {
    static constexpr int64_t SOME = 16, WIDE = 32;
    T lanes[SOME * WIDE * LANES];
    int64_t count, taps;  // input channels and taps that are there

    T *at(int64_t c, int64_t tap) { return lanes + (c * taps + tap) * LANES; }
    const T *at(int64_t c, int64_t tap) const { return lanes + (c * taps + tap) * LANES; }

    // From output and input channel on at `from`, of which so many output channels are known; others are zero.
    void take(const T *from, const int64_t *step, int64_t known) {
        if (taps == 3) take_taps(from, step, known, std::integral_constant<int64_t, 3>{});
        else take_taps(from, step, known, taps);
        for (int64_t c = 0; c < count && known < LANES; c++)
            for (int64_t e = 0; e < taps; e++)
                for (int64_t j = known; j < LANES; j++) at(c, e)[j] = 0;
    }

    // With a number of taps that the compiler knows, or one that it does not.
    template <typename N> inline void take_taps(const T *from, const int64_t *step, int64_t known, N n) {
        const int64_t out = step[0], in = step[1], tap = step[4];
        const auto one = [&](const T *x, T *to) {
            for (int64_t e = 0; e < n; e++) to[e * LANES] = x[e * tap];
        };
        if (out >= in)  // the nearer ones innermost
            for (int64_t j = 0; j < known; j++)
                for (int64_t c = 0; c < count; c++) one(from + j * out + c * in, lanes + c * n * LANES + j);
        else
            for (int64_t c = 0; c < count; c++)
                for (int64_t j = 0; j < known; j++) one(from + j * out + c * in, lanes + c * n * LANES + j);
    }
};

// Calls `use` with all patches of the weight of `count` output channels from `channel` on, where each begins (output
// channel behind the first, input channel, row, tap), until the channels are `pitch`.
template <typename T, typename F> static void patches(const Task &t, int64_t channel, int64_t count, int64_t pitch, F &&use) {
    const int64_t *step = t.weight_step, high = t.axis[1].kernel, wide = t.axis[2].kernel;
    Patch<T> patch;
    for (int64_t start = 0; start < t.deep; start += Patch<T>::SOME)
        for (int64_t first = 0; first < pitch; first += LANES)
            for (int64_t r = 0; r < t.rows(); r++)
                for (int64_t e = 0; e < wide; e += Patch<T>::WIDE) {
                    patch.count = least(Patch<T>::SOME, t.deep - start), patch.taps = least(Patch<T>::WIDE, wide - e);
                    const T *from = (const T *)t.weight + (channel + first) * step[0] + start * step[1] +
                                    r / high * step[2] + r % high * step[3] + e * step[4];
                    patch.take(from, step, most(0, least(LANES, count - first)));
                    use(patch, first, start, r, e);
                }
}

// Puts the first lanes.
template <typename T> static inline void put_lanes(T *to, const T *from, int64_t count) {
    if (count == LANES) memcpy(to, from, LANES * sizeof(T));
    else memcpy(to, from, count * sizeof(T));
}

// The weight of some vectors of channels in the order in which it is used, which is with output channels innermost,
// then input channels, then taps; or with its taps from the last to the first.
template <typename T>
static void pack(const Task &t, int64_t channel, int64_t count, int64_t pitch, bool turned, T *to) {
    const int64_t wide = t.axis[2].kernel, taps = t.rows() * wide;
    patches<T>(t, channel, count, pitch, [&](const Patch<T> &p, int64_t first, int64_t start, int64_t r, int64_t e) {
        for (int64_t k = 0; k < p.taps; k++) {
            const int64_t tap = r * wide + e + k;
            T *at = to + ((turned ? taps - 1 - tap : tap) * t.deep + start) * pitch + first;
            for (int64_t c = 0; c < p.count; c++) put_lanes(at + c * pitch, p.at(c, k), least(LANES, pitch - first));
        }
    });
}

// Whether the weight lies in that order, all vectors of a product side by side.
static bool packed(const Task &t) {
    const int64_t *step = t.weight_step, pitch = t.thick;
    const Axis *a = t.axis;
    return t.thick % LANES == 0 && step[0] == 1 && step[1] == pitch && step[4] == t.deep * pitch &&
           step[3] == a[2].kernel * step[4] && (a[0].kernel == 1 || step[2] == a[1].kernel * step[3]);
}

// words: batch, output and input channels, three axes (extent of the output, of x, kernel, stride, padding before,
// dilation), steps of x and of the output (batch and three axes), of the weight (output channel, input channel, three
// axes), rows of taps and input channels of a chain. `size` is that of an element.
static Task task(const int64_t *words, int64_t size) {
    Task t = {};
    t.batch = words[0], t.thick = words[1], t.deep = words[2] * size / 4;
    for (int a = 0; a < 3; a++) {
        const int64_t *w = words + 3 + 6 * a;
        t.axis[a] = {w[0], w[1], w[2], w[3], w[4], w[5]};
    }
    for (int a = 0; a < 4; a++) t.x_step[a] = size * words[21 + a], t.out_step[a] = size * words[25 + a];
    memcpy(t.weight_step, words + 29, sizeof t.weight_step);
    t.some = words[34], t.part = words[35] * size / 4;
    return t;
}

static void take(Task &t, void *const *tensors) {
    t.x = (const char *)tensors[0], t.weight = tensors[1], t.out = (char *)tensors[2];
}
