// A float32 convolution with rows of three neighbouring taps, by four products for two outputs instead of six
// (S. Winograd, Arithmetic Complexity of Computations, 1980: F(2, 3)).
//
// Of the pixels d0 ... d3 and the taps g0, g1, g2 of a row, with
//     p = (d0 - d2) g0,  q = (d1 + d2) (g0 + g1 + g2) / 2,  r = (d2 - d1) (g0 - g1 + g2) / 2,  s = (d1 - d3) g2
// each summed over rows of taps and channels, a couple of neighbouring outputs is p + q + r and q - r - s. Couples
// begin at even pixels of the whole image, so that an output does not depend on where its window is cut.
//
// Each row of pixels is made into four planes of what the products are of when it enters a band of output rows; each
// product is then a convolution of its own, one pixel wide, by the blocks above, in chains as short as theirs.

constexpr int64_t FEW = 1 << 16, MANY = 1 << 19;  // numbers of the planes kept, about: for a cache of a core, and for all

struct Couples {
    int64_t first, last;
    int64_t count() const { return last - first; }
};

struct Planes {  // of the rows that a band reads: by depth of the window and then by row, as in a ring
    int64_t depth, lines, couples, deep;  // depth of the window, rows kept of each slice, couples of a row, channels
    float *numbers;
    int64_t *held;        // which rows they are of
    const float **lists;  // by row of a band and row of taps: where the row that is read is kept, null outside
    int64_t plane() const { return couples * deep; }
    int64_t index(int64_t a, int64_t y) const { return a * lines + y % lines; }
    float *at(int64_t a, int64_t y) const { return numbers + index(a, y) * PRODUCTS * plane(); }
    int64_t size() const { return depth * lines * PRODUCTS * plane(); }
};

struct Work {
    Task t;
    int64_t phase;  // 1 where the first output is the second of a couple
    int64_t high;   // rows of a band
    Planes planes;
    float *sums, *zeros, *own;  // room for sums of products; a pixel outside; the weight in order, or null
    int64_t vectors() const { return (t.thick + LANES - 1) / LANES; }
    int64_t strips() const { return (vectors() + 2) / 3; }
    int64_t products() const { return t.rows() * PRODUCTS * t.deep; }
    bool large() const { return 4 * products() * least(vectors(), 3) * LANES > 2 * LARGE; }
};

// The rows that the outputs [top, bottom) of a slice read: where they are, and made where they are not kept.
static void fill(const Work &w, int64_t image, int64_t z, int64_t top, int64_t bottom, const Couples &c) {
    const Task &t = w.t;
    const Axis &d = t.axis[0], &h = t.axis[1];
    const int64_t from = t.axis[2].at(2 * c.first - w.phase, 0);
    const float **list = w.planes.lists;
    for (int64_t top_row = top; top_row < bottom; top_row++)
        for (int64_t k = 0; k < t.rows(); k++, list++) {
            const int64_t a = k / h.kernel, slice = d.at(z, a), y = h.at(top_row, k % h.kernel);
            *list = nullptr;
            if (slice < 0 || slice >= d.in || y < 0 || y >= h.in) continue;
            *list = w.planes.at(a, y);
            if (w.planes.held[w.planes.index(a, y)] == y) continue;
            w.planes.held[w.planes.index(a, y)] = y;
            const char *line = t.x + image * t.x_step[0] + slice * t.x_step[1] + y * t.x_step[2];
            const Row row = {(const float *)line, t.x_step[3] / 4, t.axis[2].in, t.deep};
            planes_of(row, from, c.count(), w.zeros, w.planes.at(a, y), w.planes.plane());
        }
}

// Outputs of some couples from their sums, the first at `at`, of which [skip, end) are wanted.
template <int V>
static void finish(const float *sums, int64_t couples, int64_t skip, int64_t end, float *at, int64_t pixel, int64_t used,
                   const float *bias) {
    const int64_t plane = couples * V * LANES;
    for (int64_t k = 0; k < couples; k++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++, sums += LANES) {
            const Vec p = *(const Loose *)sums, q = *(const Loose *)(sums + plane);
            const Vec r = *(const Loose *)(sums + 2 * plane), s = *(const Loose *)(sums + 3 * plane);
            float *to = at + 2 * k * pixel + v * LANES;
            const int64_t lanes = v < V - 1 ? LANES : used;
            if (2 * k >= skip && 2 * k < end) keep(to, p + q + r, bias ? bias + v * LANES : nullptr, lanes);
            if (2 * k + 1 >= skip && 2 * k + 1 < end) keep(to + pixel, q - r - s, bias ? bias + v * LANES : nullptr, lanes);
        }
}

struct Strip {  // of output channels, and their weight
    int64_t channel, vectors, pitch;
    const float *weight;
};

struct Block {  // couples of a row of outputs; their sums
    int64_t y;
    Couples couples;
    float *sums;
};

// All blocks of the rows [top, bottom).
template <typename F>
static inline void each(const Work &w, const Strip &s, int64_t top, int64_t bottom, int64_t couples, F &&use) {
    const int64_t wide = HELD / s.vectors, blocks = (couples + wide - 1) / wide, size = (couples + blocks - 1) / blocks;
    float *sums = w.sums;
    for (int64_t y = top; y < bottom; y++)
        for (int64_t first = 0; first < couples; first += size, sums += PRODUCTS * wide * s.vectors * LANES)
            use(Block{y, {first, least(first + size, couples)}, sums});
}

struct Part {  // of the sums: of one product, some rows of taps and some channels
    int64_t product, row, number;
};

// Adds a part to the sums of a block.
static inline void add(const Work &w, const Strip &s, const Part &part, Chain &c, const Block &b,
                       const float *const *lines) {
    const int64_t count = b.couples.count(), plane = part.product * w.planes.plane();
    const int64_t from = plane + b.couples.first * w.t.deep + part.number;
    for (int64_t j = 0; j < c.count; j++) {
        const float *line = lines[part.row + j];
        c.rows[j] = line ? (const char *)(line + from) : nullptr;
    }
    float *sums = b.sums + part.product * count * s.vectors * LANES;
    const Target target = {(char *)sums, s.vectors * LANES, LANES, part.row == 0 && part.number == 0, nullptr};
    BLOCKS<SINGLE>.of[s.vectors][count](c, target);
}

// All parts one after the other.
template <typename F> static inline void parts(const Work &w, const Strip &s, F &&use) {
    const Task &t = w.t;
    Chain c;
    c.taps = 1, c.pixel = 4 * t.deep, c.tap = 0;
    c.weight_deep = s.pitch, c.weight_tap = 0, c.weight_row = PRODUCTS * t.deep * s.pitch;
    for (int64_t product = 0; product < PRODUCTS; product++)
        for (int64_t number = 0; number < t.deep; number += t.part)
            for (int64_t row = 0; row < t.rows(); row += t.some) {
                c.count = least(t.some, t.rows() - row), c.deep = least(t.part, t.deep - number);
                c.weight = s.weight + row * c.weight_row + (product * t.deep + number) * s.pitch;
                use(Part{product, row, number}, c);
            }
}

// The outputs of a block, from its sums.
static void put(const Work &w, const Strip &s, const Block &b, char *line, int64_t first) {
    const Task &t = w.t;
    const int64_t pixel = t.out_step[3] / 4, used = least(t.thick - s.channel, s.vectors * LANES) - (s.vectors - 1) * LANES;
    first += 2 * b.couples.first;
    float *at = (float *)line + first * pixel + s.channel;
    const float *bias = t.bias ? t.bias + s.channel : nullptr;
    const int64_t count = b.couples.count(), skip = most(0, -first), end = t.axis[2].out - first;
    if (s.vectors == 1) finish<1>(b.sums, count, skip, end, at, pixel, used, bias);
    if (s.vectors == 2) finish<2>(b.sums, count, skip, end, at, pixel, used, bias);
    if (s.vectors == 3) finish<3>(b.sums, count, skip, end, at, pixel, used, bias);
}

// The rows [top, bottom) of a strip. A part of a large weight is used for all blocks at once.
static void band(const Work &w, const Strip &s, int64_t image, int64_t z, int64_t top, int64_t bottom, const Couples &c) {
    const Task &t = w.t;
    char *out = t.out + image * t.out_step[0] + z * t.out_step[1];
    const auto lines = [&](int64_t y) { return w.planes.lists + (y - top) * t.rows(); };
    const auto all = [&](auto &&use) { each(w, s, top, bottom, c.count(), use); };
    const auto finished = [&](const Block &b) { put(w, s, b, out + b.y * t.out_step[2], 2 * c.first - w.phase); };
    if (w.large()) {
        parts(w, s, [&](const Part &part, Chain &chain) {
            all([&](const Block &b) { add(w, s, part, chain, b, lines(b.y)); });
        });
        all(finished);
    } else
        all([&](Block b) {
            b.sums = w.sums;
            parts(w, s, [&](const Part &part, Chain &chain) { add(w, s, part, chain, b, lines(b.y)); });
            finished(b);
        });
}

static Strip strip(const Work &w, int64_t k) {
    const int64_t first = w.vectors() * k / w.strips(), some = w.vectors() * (k + 1) / w.strips() - first;
    if (!w.own) return {first * LANES, some, w.t.thick, (const float *)w.t.weight + first * LANES};
    return {first * LANES, some, some * LANES, w.own + w.products() * first * LANES};
}

// As many rows of outputs at once, and as many couples, as the planes that they read have room for; returns the latter.
static int64_t fit(Work &w, int64_t couples) {
    const Axis &h = w.t.axis[1];
    Planes &p = w.planes;
    const int64_t room = w.large() ? MANY : FEW;
    int64_t shares = 0;
    w.high = w.large() ? 2 * h.out : 1;
    p.depth = w.t.axis[0].kernel, p.deep = w.t.deep;
    do {
        w.high = (w.high + 1) / 2;
        p.lines = (w.high - 1) * h.stride + (h.kernel - 1) * h.dilation + 1;
        p.couples = least(couples, HELD);
    } while (w.high > 1 && p.size() > room);
    do p.couples = (couples + shares) / (shares + 1), shares++;
    while (p.couples > HELD && p.size() > room);
    return shares;
}

// words: as for a convolution, with chains of rows of one tap; then whether the first output is the second of a couple.
// The weight has rows of four: g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2.
extern "C" int fullframe_winograd(const int64_t *words, void *const *tensors) {
    Work w = {task(words, 4), words[36], 0, {}, nullptr, nullptr, nullptr};
    Task &t = w.t, weight;
    take(t, tensors);
    t.bias = (const float *)tensors[3];
    weight = t, weight.axis[2].kernel = PRODUCTS;
    const int64_t couples = (w.phase + t.axis[2].out + 1) / 2, shares = fit(w, couples);
    Planes &p = w.planes;
    const int64_t blocks = w.large() ? w.high * (p.couples / (HELD / 3) + 1) : 1, sums = blocks * PRODUCTS * HELD * LANES;
    const int64_t own = packed(weight) ? 0 : w.products() * w.vectors() * LANES, held = p.depth * p.lines;
    void *room = nullptr;
    if (posix_memalign(&room, 64, 4 * (p.size() + sums + own + t.deep) + 8 * (held + w.high * t.rows()))) return 1;
    p.held = (int64_t *)room, p.lists = (const float **)(p.held + held);
    p.numbers = (float *)(p.lists + w.high * t.rows());
    w.sums = p.numbers + p.size(), w.zeros = w.sums + sums, w.own = own ? w.zeros + t.deep : nullptr;
    memset(w.zeros, 0, 4 * t.deep);
    for (int64_t k = 0; w.own && k < w.strips(); k++) {
        const Strip s = strip(w, k);
        pack(weight, s.channel, least(s.vectors * LANES, t.thick - s.channel), s.pitch, false, (float *)s.weight);
    }
    for (int64_t part = 0; part < t.batch * t.axis[0].out * shares; part++) {
        const int64_t share = part % shares, z = part / shares % t.axis[0].out, image = part / shares / t.axis[0].out;
        const Couples c = {couples * share / shares, couples * (share + 1) / shares};
        for (int64_t k = 0; k < held; k++) p.held[k] = -1;
        for (int64_t top = 0; top < t.axis[1].out; top += w.high) {
            const int64_t bottom = least(top + w.high, t.axis[1].out);
            fill(w, image, z, top, bottom, c);
            for (int64_t k = 0; k < w.strips(); k++) band(w, strip(w, k), image, z, top, bottom, c);
        }
    }
    free(room);
    return 0;
}

// words: as for a convolution whose weight is turned or not. The weight as above; output channels innermost, then input
// channels, then the four, then rows.
extern "C" int fullframe_pack_winograd(const int64_t *words, void *const *tensors) {
    Task t = task(words, 4);
    t.weight = tensors[0];
    const bool turned = words[36] != 0;
    const int64_t rows = t.rows(), plane = t.deep * t.thick;
    patches<float>(t, 0, t.thick, t.thick, [&](const Patch<float> &p, int64_t first, int64_t start, int64_t r, int64_t) {
        float *to = (float *)tensors[1] + (turned ? rows - 1 - r : r) * PRODUCTS * plane + start * t.thick + first;
        const int64_t lanes = least(LANES, t.thick - first);
        for (int64_t c = 0; c < p.count; c++, to += t.thick) {
            const Vec a = get<Vec>(p.at(c, turned ? 2 : 0)), b = get<Vec>(p.at(c, 1));
            const Vec e = get<Vec>(p.at(c, turned ? 0 : 2)), made[] = {a, (a + b + e) / 2, (a - b + e) / 2, e};
            for (int64_t k = 0; k < PRODUCTS; k++) put_lanes(to + k * plane, (const float *)&made[k], lanes);
        }
    });
    return 0;
}
