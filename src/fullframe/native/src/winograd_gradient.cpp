// The weight gradient of rows of three neighbouring taps in float32, by four products for two pixels instead of six: the
// transpose of Winograd's F(2, 3).
//
// Of the neighbouring pixels y0, y1 of g and d0 ... d3 of x, with
//     p = (d0 - d2) y0,  q = (d1 + d2) (y0 + y1),  r = (d2 - d1) (y0 - y1),  s = (d1 - d3) y1
// each summed over all such couples, the taps' gradients are p + (q + r) / 2, (q - r) / 2 and (q + r) / 2 - s. What the
// products are of is made once for a patch of couples, in planes, with zeros outside of the window.

constexpr int64_t HIGH = 8, COUPLES = 128;  // rows of a patch, and couples, at most

struct Room {  // for the planes of a patch of so many rows and pixels, and a pixel outside of the window
    int64_t tall, width;
    float *planes;
    const float *zeros;
};

static void planes_of_g(const Row &g, int64_t first, int64_t couples, const float *zeros, float *to, int64_t plane) {
    for (int64_t k = 0; k < couples; k++, to += g.channels) {
        const float *y = g.pixel_or(first + 2 * k, zeros), *next = g.pixel_or(first + 2 * k + 1, zeros);
        by_channels(g.channels, [&](int64_t n, auto kind) {
            typedef decltype(kind) T;
            const T a = get<T>(y + n), b = get<T>(next + n);
            put<T>(to + n, a), put<T>(to + plane + n, a + b);
            put<T>(to + 2 * plane + n, a - b), put<T>(to + 3 * plane + n, b);
        });
    }
}

// The products of a patch, of one slice of g and of x; `out` has four in the place of three taps.
static void patch(const Task &t, const float *g, const float *x, float *out, const int64_t rows[2],
                  const int64_t pixels[2], const Room &room) {
    const Axis &h = t.axis[1], &w = t.axis[2];
    const int64_t tall = rows[1] - rows[0], wide = (pixels[1] - pixels[0] + 1) / 2;
    const int64_t above = h.at(rows[0], 0), lines = h.at(rows[1] - 1, h.kernel - 1) + 1 - above;
    const int64_t thick_row = wide * t.thick, deep_row = wide * t.deep;
    const int64_t thick_plane = tall * thick_row, deep_plane = lines * deep_row;
    float *thick = room.planes, *deep = thick + PRODUCTS * thick_plane;
    for (int64_t r = 0; r < tall; r++) {
        const Row row = {g + (rows[0] + r) * t.g_step[2], t.g_step[3], pixels[1], t.thick};
        planes_of_g(row, pixels[0], wide, room.zeros, thick + r * thick_row, thick_plane);
    }
    for (int64_t r = 0; r < lines; r++) {
        const int64_t y = above + r;
        const Row row = {y >= 0 && y < h.in ? x + y * t.x_step[2] : nullptr, t.x_step[3], w.in, t.deep};
        planes_of(row, w.at(pixels[0], 0), wide, room.zeros, deep + r * deep_row, deep_plane);
    }
    const int64_t products = t.axis[0].kernel * h.kernel * PRODUCTS, down = h.stride * deep_row;
    const Patch forward = {tall, wide, t.thick, thick_row, t.deep, down, products * t.deep};
    const Patch swapped = {tall, wide, t.deep, down, t.thick, thick_row, t.thick};
    for (int64_t k = 0; k < PRODUCTS; k++)
        for (int64_t j = 0; j < h.kernel; j++) {
            const float *a = thick + k * thick_plane, *b = deep + k * deep_plane + j * h.dilation * deep_row;
            const int64_t first = (j * PRODUCTS + k) * t.deep;
            if (t.swapped) product<SINGLE>(swapped, b, a, out + first * t.thick, t.deep, t.thick);
            else product<SINGLE>(forward, a, b, out + first, t.thick, t.deep);
        }
}

static void plane(const Task &t, const float *g, const float *x, float *out, const Room &room) {
    const int64_t high = t.axis[1].out, wide = t.axis[2].out;
    for (int64_t top = 0; top < high; top += room.tall)
        for (int64_t left = 0; left < wide; left += room.width) {
            const int64_t rows[2] = {top, least(top + room.tall, high)}, pixels[2] = {left, least(left + room.width, wide)};
            patch(t, g, x, out, rows, pixels, room);
        }
}

// The size of a share, where a whole goes into as few even shares as are not larger than `most`.
static int64_t share(int64_t whole, int64_t most) {
    const int64_t count = (whole + most - 1) / most;
    return (whole + count - 1) / count;
}

// The gradients of the taps: `runs` of three, each from four of the products, and `count` of those.
struct Runs {
    int64_t count, runs, length;  // numbers of a run
    int64_t from, to;             // from one run to the next
    int64_t taps, again;          // in the gradients, from tap to tap, and from one of the count to the next
};

static void fold(const Runs &r, const float *products, float *out) {
    const int64_t plane = r.runs * r.from;
    for (int64_t k = 0; k < r.count; k++, products += PRODUCTS * plane, out += r.again)
        for (int64_t j = 0; j < r.runs; j++) {
            const float *p = products + j * r.from, *q = p + plane, *s = q + plane, *e = s + plane;
            float *a = out + j * r.to, *b = a + r.taps, *c = b + r.taps;
            by_channels(r.length, [&](int64_t n, auto kind) {
                typedef decltype(kind) T;
                const T sum = get<T>(q + n), other = get<T>(s + n), half = (sum + other) / 2;
                put<T>(a + n, get<T>(p + n) + half), put<T>(b + n, (sum - other) / 2), put<T>(c + n, half - get<T>(e + n));
            });
        }
}

// As many output channels at once as their products fit into a cache of one core, in even shares of whole vectors.
static int64_t channels_at_once(const Task &t) {
    constexpr int64_t FIT = 1 << 17, FEWEST = 2 * LANES;
    const int64_t each = t.axis[0].kernel * t.axis[1].kernel * PRODUCTS * t.deep;
    return (share(t.thick, most(FEWEST, FIT / each)) + LANES - 1) / LANES * LANES;
}

// words and tensors as of the other.
extern "C" int fullframe_winograd_gradient(const int64_t *words, float *const *tensors) {
    const Task t = task(words);
    const Axis &h = t.axis[1];
    const int64_t rows = t.axis[0].kernel * h.kernel, some = channels_at_once(t), zeros = most(some, t.deep);
    const int64_t size = PRODUCTS * rows * t.deep * some;
    Room room = {share(h.out, HIGH), 0, nullptr, nullptr};
    room.width = 2 * share((t.axis[2].out + 1) / 2, COUPLES / room.tall);
    const int64_t lines = (room.tall - 1) * h.stride + (h.kernel - 1) * h.dilation + 1;
    const int64_t planes_size = PRODUCTS * room.width / 2 * (room.tall * some + lines * t.deep);
    void *kept = nullptr;
    if (posix_memalign(&kept, 64, 4 * (size + zeros + planes_size))) return 1;
    float *products = (float *)kept;
    room.zeros = products + size, room.planes = products + size + zeros;
    memset(products + size, 0, 4 * zeros);
    for (int64_t first = 0; first < t.groups * t.thick;) {
        const int64_t group = first / t.thick, wide = least(some, (group + 1) * t.thick - first);
        Task part = t;
        part.groups = 1, part.thick = wide, part.axis[2].kernel = PRODUCTS;
        memset(products, 0, 4 * PRODUCTS * rows * t.deep * wide);
        planes(part, (const float *)tensors[0] + first, (const float *)tensors[1] + group * t.deep, products,
               [&](const float *g, const float *x, float *out) { plane(part, g, x, out, room); });
        const int64_t whole = rows * 3 * t.deep;
        if (t.swapped) {
            float *out = tensors[2] + group * whole * t.thick + first - group * t.thick;
            fold({rows, t.deep, wide, wide, t.thick, t.deep * t.thick, 3 * t.deep * t.thick}, products, out);
        } else fold({wide * rows, 1, t.deep, t.deep, 0, t.deep, 3 * t.deep}, products, tensors[2] + first * whole);
        first += wide;
    }
    free(kept);
    return 0;
}
