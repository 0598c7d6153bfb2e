// A convolution of one window, channels innermost, float32.
//
// A block of sums, some pixels of a row times some vectors of output channels, stays in registers while the products
// pass: of each, a vector of the weight against the numbers of all pixels, read where they lie. Only where a block
// reaches over the left or right border are its numbers copied, with zeros; a row of taps above or below is left out.
// The products of an output are added up in chains, each of some rows of taps and some channels, and the chains one
// after the other; which these are, and their order, does not depend on the place of a pixel or the window's size.

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
template <int V, int... K>
FUSED static inline __attribute__((always_inline)) void add(std::integer_sequence<int, K...>, const char *const *bases,
                                                            const Steps &s, const Vec *weight, Vec (*sum)[V]) {
    const auto one = [&](const float *x, Vec *to) FUSED __attribute__((always_inline)) {
        const Vec number = *x - Vec{};
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) to[v] = MADD(number, weight[v], to[v]);
    };
    (one(pixel<K>(bases, s), sum[K]), ...);
}

struct Chain {  // the products of a chain; steps in elements
    const float *rows[64];  // where the first pixel of each row of taps begins; null where it is outside
    const float *weight;
    int64_t count, taps, deep;  // rows of taps, taps of a row, channels of a tap
    int64_t pixel, tap;
    int64_t weight_row, weight_tap, weight_deep;
};

struct Target {
    float *at;
    int64_t pixel, used;  // step from pixel to pixel; channels of the last vector
    bool first;           // whether nothing is there yet
    const float *bias;
};

// Puts the first lanes of a vector.
static __attribute__((noinline)) void some(float *at, Vec sum, const float *before, int64_t used) {
    for (int64_t j = 0; j < used; j++) at[j] = before ? sum[j] + before[j] : sum[j];
}

template <int P, int V>
FUSED static void block(const Chain &chain, const Target &to) {
    Vec sum[P][V] = {};
    Steps s = {4 * chain.pixel, 12 * chain.pixel, 20 * chain.pixel, 28 * chain.pixel};
    for (int64_t r = 0; r < chain.count; r++) {
        const char *row = (const char *)chain.rows[r];
        if (!row) continue;
        for (int64_t k = 0; k < chain.taps; k++, row += 4 * chain.tap) {
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
                add<V>(std::make_integer_sequence<int, P>{}, bases, s, weight, sum);
#pragma GCC unroll 4
                for (int b = 0; b < 4; b++) bases[b] += 4;
            }
        }
    }
#pragma GCC unroll 32
    for (int p = 0; p < P; p++) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            float *at = to.at + p * to.pixel + v * LANES;
            const float *before = !to.first ? at : to.bias ? to.bias + v * LANES : nullptr;
            if (v < V - 1 || to.used == LANES) *(Loose *)at = before ? sum[p][v] + *(const Loose *)before : sum[p][v];
            else some(at, sum[p][v], before, to.used);
        }
    }
}

struct Blocks {  // by vectors and pixels
    void (*of[4][HELD + 1])(const Chain &, const Target &);
    template <int V, int P> void fill() {
        if constexpr (P > 0) of[V][P] = block<P, V>, fill<V, P - 1>();
    }
    Blocks() { fill<1, HELD>(), fill<2, HELD / 2>(), fill<3, HELD / 3>(); }
};
static const Blocks BLOCKS;

struct Task {
    int64_t batch, thick, deep;  // output and input channels
    Axis axis[3];
    int64_t x_step[4], out_step[4];  // batch and spatial
    int64_t weight_step[5];          // output channel, input channel, spatial
    int64_t some, part;              // rows of taps, and channels, of a chain
    const float *x, *weight, *bias;
    float *out;

    int64_t rows() const { return axis[0].kernel * axis[1].kernel; }
    int64_t products() const { return rows() * axis[2].kernel * deep; }
};

struct Place {  // of a block: which pixels of a row of outputs
    int64_t image, slice, row, first, last;
};

// Points a chain to what a block reads of rows of taps from `row`, channels from `channel` on.
static void aim(const Task &t, Chain &chain, const Place &p, int64_t row, int64_t channel, float *scratch) {
    const Axis &d = t.axis[0], &h = t.axis[1], &w = t.axis[2];
    const int64_t from = w.at(p.first, 0), end = w.at(p.last - 1, w.kernel - 1) + 1;
    const bool border = from < 0 || end > w.in;
    for (int64_t j = 0; j < chain.count; j++) {
        const int64_t z = d.at(p.slice, (row + j) / h.kernel), y = h.at(p.row, (row + j) % h.kernel);
        chain.rows[j] = nullptr;
        if (z < 0 || z >= d.in || y < 0 || y >= h.in) continue;
        const float *line = t.x + p.image * t.x_step[0] + z * t.x_step[1] + y * t.x_step[2] + channel;
        chain.rows[j] = border ? scratch : line + from * t.x_step[3];
        for (int64_t q = from; border && q < end; q++, scratch += chain.deep) {
            if (q < 0 || q >= w.in) memset(scratch, 0, 4 * chain.deep);
            else memcpy(scratch, line + q * t.x_step[3], 4 * chain.deep);
        }
    }
    const int64_t step = border ? chain.deep : t.x_step[3];
    chain.pixel = step * w.stride, chain.tap = step * w.dilation;
}

constexpr int64_t LARGE = 1 << 18;  // bytes of a weight, from which on a chain of it is used for all blocks at once

// The outputs of some vectors of channels, from `channel` on, of one slice of an image.
static void slice(const Task &t, int64_t image, int64_t z, int64_t channel, int64_t vectors, const float *weight,
                  int64_t pitch, float *scratch) {
    const Axis &w = t.axis[2];
    const int64_t wide = HELD / vectors, blocks = (w.out + wide - 1) / wide, all = t.axis[1].out * blocks;
    const int64_t group = 4 * t.products() * vectors * LANES > LARGE ? all : 1;
    const int64_t used = least(t.thick - channel, vectors * LANES) - (vectors - 1) * LANES;
    Chain chain;
    chain.weight_deep = pitch, chain.weight_tap = t.deep * pitch, chain.weight_row = w.kernel * t.deep * pitch;
    for (int64_t start = 0; start < all; start += group)
        for (int64_t c = 0; c < t.deep; c += t.part)
            for (int64_t r = 0; r < t.rows(); r += t.some)
                for (int64_t b = start; b < start + group; b++) {
                    const int64_t y = b / blocks, k = b % blocks;
                    const Place place = {image, z, y, w.out * k / blocks, w.out * (k + 1) / blocks};
                    chain.count = least(t.some, t.rows() - r), chain.taps = w.kernel;
                    chain.deep = least(t.part, t.deep - c);
                    chain.weight = weight + r * chain.weight_row + c * pitch;
                    aim(t, chain, place, r, c, scratch);
                    if (chain.tap == chain.deep && chain.deep == t.deep) chain.deep *= chain.taps, chain.taps = 1;
                    float *at = t.out + image * t.out_step[0] + z * t.out_step[1] + y * t.out_step[2] +
                                place.first * t.out_step[3] + channel;
                    const Target target = {at, t.out_step[3], used, c == 0 && r == 0, t.bias ? t.bias + channel : nullptr};
                    BLOCKS.of[vectors][place.last - place.first](chain, target);
                }
}

// The weight of some vectors of channels in the order in which it is used, which is with output channels innermost,
// then input channels, then taps; or with its taps from the last to the first. It goes by some input channels at a time,
// so that few pages of memory are in use at once: weights have each output channel in one run.
static void pack(const Task &t, int64_t channel, int64_t count, int64_t pitch, bool turned, float *to) {
    constexpr int64_t SOME = 16;
    const int64_t *step = t.weight_step;
    const int64_t deep = t.axis[0].kernel, high = t.axis[1].kernel, wide = t.axis[2].kernel, taps = deep * high * wide;
    const auto lanes = [&](int64_t first, int64_t c, const float *from) {
        const int64_t end = least(LANES, pitch - first), known = most(0, least(end, count - first));
        for (int64_t a = 0, tap = 0; a < deep; a++)
            for (int64_t b = 0; b < high; b++)
                for (int64_t e = 0; e < wide; e++, tap++) {
                    const float *at = from + a * step[2] + b * step[3] + e * step[4];
                    float *put = to + ((turned ? taps - 1 - tap : tap) * t.deep + c) * pitch + first;
                    for (int64_t j = 0; j < known; j++) put[j] = at[j * step[0]];
                    for (int64_t j = known; j < end; j++) put[j] = 0;
                }
    };
    for (int64_t start = 0; start < t.deep; start += SOME)
        for (int64_t first = 0; first < pitch; first += LANES)
            for (int64_t c = start; c < least(start + SOME, t.deep); c++)
                lanes(first, c, t.weight + (channel + first) * step[0] + c * step[1]);
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
// axes), rows of taps and input channels of a chain.
static Task task(const int64_t *words) {
    Task t = {};
    t.batch = words[0], t.thick = words[1], t.deep = words[2];
    for (int a = 0; a < 3; a++) {
        const int64_t *w = words + 3 + 6 * a;
        t.axis[a] = {w[0], w[1], w[2], w[3], w[4], w[5]};
    }
    memcpy(t.x_step, words + 21, sizeof t.x_step), memcpy(t.out_step, words + 25, sizeof t.out_step);
    memcpy(t.weight_step, words + 29, sizeof t.weight_step);
    t.some = words[34], t.part = words[35];
    return t;
}

// tensors: x, weight, output, and a bias or null.
extern "C" int fullframe_convolution(const int64_t *words, float *const *tensors) {
    Task t = task(words);
    t.x = tensors[0], t.weight = tensors[1], t.out = tensors[2], t.bias = tensors[3];
    const Axis &w = t.axis[2];
    const int64_t reach = HELD * w.stride + w.kernel * w.dilation;
    const int64_t kept = packed(t) ? 0 : t.products() * 3 * LANES;
    void *room = nullptr;
    if (posix_memalign(&room, 64, 4 * (kept + reach * t.some * t.part))) return 1;
    float *own = (float *)room, *scratch = own + kept;
    const int64_t vectors = (t.thick + LANES - 1) / LANES, strips = (vectors + 2) / 3;
    for (int64_t k = 0, v = 0; k < strips; k++) {
        const int64_t end = vectors * (k + 1) / strips, some = end - v, channel = v * LANES;
        if (kept) pack(t, channel, least(some * LANES, t.thick - channel), some * LANES, false, own);
        for (int64_t n = 0; n < t.batch; n++)
            for (int64_t z = 0; z < t.axis[0].out; z++)
                slice(t, n, z, channel, some, kept ? own : t.weight + channel, kept ? some * LANES : t.thick, scratch);
        v = end;
    }
    free(room);
    return 0;
}

// words as above, then whether the taps are to be turned. tensors: weight, and where it is put.
extern "C" int fullframe_pack(const int64_t *words, float *const *tensors) {
    Task t = task(words);
    t.weight = tensors[0];
    pack(t, 0, t.thick, t.thick, words[36] != 0, tensors[1]);
    return 0;
}
