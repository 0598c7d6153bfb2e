// The weight gradient of a convolution over one window, channels innermost, float32 or bfloat16.
//
// For one row of taps it is a product of matrices, summed over the pixels: (output channels) x (taps and input
// channels). Where the taps of a row are neighbours, their columns are one run in memory that begins again at
// every pixel, so that nothing is gathered or copied. A small block of the product stays in registers while
// the pixels of a patch pass; a patch is so small that it stays in the first-level cache for all blocks.
// Padding is never made: a tap is summed over those pixels at which it lies inside the window.
//
// Products of bfloat16 are added up two by two, in float32, so both patches are copied first, each number beside that
// of the next pixel, with zeros outside of the window; a pair then takes the place of a number.

constexpr int64_t PATCH = 128;  // pixels
constexpr int64_t ROWS = HELD / 12 * 12;  // vectors of sums in a block
constexpr int64_t FEW = 2 * LANES;  // channels, from which on each tap is a run of its own: no pixel is then apart

static inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

struct Patch {  // of pixels; steps of both arrays from pixel to pixel and from row to row, in elements
    int64_t rows, pixels;
    int64_t thin_pixel, thin_row, wide_pixel, wide_row;
    int64_t pitch;  // of the product's rows
};

// Adds R x (V vectors) of the product; the first `skip` lanes of the last vector are another block's.
template <Kind K, int R, int V>
FUSED static void block(const Patch &p, const float *thin, const float *wide, float *out, int64_t skip) {
    Vec sum[R][V] = {};
    for (int64_t row = 0; row < p.rows; row++) {
        const float *a = thin + row * p.thin_row, *b = wide + row * p.wide_row;
        for (int64_t k = 0; k < p.pixels; k++, a += p.thin_pixel, b += p.wide_pixel) {
            Vec lanes[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                lanes[v] = *(const Loose *)(b + v * LANES);
                KEEP(lanes[v]);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const Vec one = all<K>(a + r);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) {
                    if constexpr (K == SINGLE) sum[r][v] = MADD(one, lanes[v], sum[r][v]);
                    else sum[r][v] = ADD_PAIRS(one, lanes[v], sum[r][v]);
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            float *to = out + r * p.pitch + v * LANES;
            if (v < V - 1 || skip == 0) *(Loose *)to += sum[r][v];
            else for (int64_t j = skip; j < LANES; j++) to[j] += sum[r][v][j];
        }
    }
}

template <Kind K, int V, int R>
static inline void some_rows(int64_t r, const Patch &p, const float *thin, const float *wide, float *out, int64_t skip) {
    if constexpr (R > 0) {
        if (r == R) block<K, R, V>(p, thin, wide, out, skip);
        else some_rows<K, V, R - 1>(r, p, thin, wide, out, skip);
    }
}

// All rows against V vectors of columns, in even shares.
template <Kind K, int V>
static void strip(const Patch &p, const float *thin, const float *wide, float *out, int64_t rows, int64_t skip) {
    constexpr int64_t MOST = ROWS / V < 12 ? ROWS / V : 12;
    const int64_t blocks = (rows + MOST - 1) / MOST;
    for (int64_t k = 0, r = 0; k < blocks; k++) {
        const int64_t end = rows * (k + 1) / blocks;
        some_rows<K, V, MOST>(end - r, p, thin + r, wide, out + r * p.pitch, skip);
        r = end;
    }
}

// The product of a patch: rows x columns, columns at least one vector.
template <Kind K>
static void product(const Patch &p, const float *thin, const float *wide, float *out, int64_t rows, int64_t columns) {
    if (p.rows <= 0 || p.pixels <= 0) return;
    const int64_t vectors = (columns + LANES - 1) / LANES, strips = (vectors + 2) / 3;
    for (int64_t k = 0, v = 0; k < strips; k++) {
        const int64_t end = vectors * (k + 1) / strips, wanted = end - v, last = columns - end * LANES;
        // A last vector that reaches over the columns is moved back to end with them, alone.
        const int64_t whole = last < 0 ? wanted - 1 : wanted, at = v * LANES;
        if (whole == 3) strip<K, 3>(p, thin, wide + at, out + at, rows, 0);
        if (whole == 2) strip<K, 2>(p, thin, wide + at, out + at, rows, 0);
        if (whole == 1) strip<K, 1>(p, thin, wide + at, out + at, rows, 0);
        if (last < 0) strip<K, 1>(p, thin, wide + columns - LANES, out + columns - LANES, rows, -last);
        v = end;
    }
}

// The outputs [low, high) for which a tap lies inside the window.
static int64_t low(const Axis &a, int64_t tap) { return most(0, -floor_div(tap * a.dilation - a.before, a.stride)); }
static int64_t high(const Axis &a, int64_t tap) {
    return least(a.out, floor_div(a.in - 1 + a.before - tap * a.dilation, a.stride) + 1);
}

struct Task {
    int64_t batch, groups, thick, deep;  // output and input channels of a group
    Axis axis[3];
    int64_t g_step[4], x_step[4];  // batch and spatial, in elements
    bool swapped;                  // vectors run over the output channels
    const float *g, *x;
    float *out;
};

// One row of taps from tap `first` to `last`, which are one run of columns, over the pixels [low, high) x rows.
static void run(const Task &t, const float *g, const float *x, float *out, int64_t first, int64_t last,
                const int64_t rows[2], const int64_t pixels[2], int64_t row_tap) {
    const Axis &h = t.axis[1], &w = t.axis[2];
    Patch p = {rows[1] - rows[0], pixels[1] - pixels[0], 0, 0, 0, 0, 0};
    if (p.rows <= 0 || p.pixels <= 0) return;
    g += rows[0] * t.g_step[2] + pixels[0] * t.g_step[3];
    x += h.at(rows[0], row_tap) * t.x_step[2] + w.at(pixels[0], first) * t.x_step[3];
    const int64_t columns = (last - first) * t.deep;
    const int64_t g_steps[2] = {t.g_step[3], t.g_step[2]};
    const int64_t x_steps[2] = {t.x_step[3] * w.stride, t.x_step[2] * h.stride};
    const int64_t taps = t.axis[0].kernel * h.kernel * w.kernel;
    if (t.swapped) {
        p.thin_pixel = x_steps[0], p.thin_row = x_steps[1], p.wide_pixel = g_steps[0], p.wide_row = g_steps[1];
        p.pitch = t.thick;
        product<SINGLE>(p, x, g, out + first * t.deep * t.thick, columns, t.thick);
    } else {
        p.thin_pixel = g_steps[0], p.thin_row = g_steps[1], p.wide_pixel = x_steps[0], p.wide_row = x_steps[1];
        p.pitch = taps * t.deep;
        product<SINGLE>(p, g, x, out + first * t.deep, t.thick, columns);
    }
}

// All taps of one row of taps over one patch.
static void row_of_taps(const Task &t, const float *g, const float *x, float *out, const int64_t rows[2],
                        const int64_t pixels[2], int64_t row_tap) {
    const Axis &w = t.axis[2];
    const bool joined = t.deep <= FEW && t.groups == 1 && w.dilation == 1 && t.x_step[3] == t.deep;
    if (!joined) {
        for (int64_t k = 0; k < w.kernel; k++) {
            const int64_t inside[2] = {most(pixels[0], low(w, k)), least(pixels[1], high(w, k))};
            run(t, g, x, out, k, k + 1, rows, inside, row_tap);
        }
        return;
    }
    // At the pixels in the middle all taps are inside; at each of the others, some.
    const int64_t middle[2] = {most(pixels[0], low(w, 0)), least(pixels[1], high(w, w.kernel - 1))};
    run(t, g, x, out, 0, w.kernel, rows, middle, row_tap);
    for (int64_t p = pixels[0]; p < pixels[1]; p++) {
        if (p == middle[0] && middle[1] > middle[0]) p = middle[1];
        if (p >= pixels[1]) break;
        const int64_t start = p * w.stride - w.before, one[2] = {p, p + 1};
        const int64_t first = most(0, -start), last = least(w.kernel, w.in - start);
        if (first < last) run(t, g, x, out, first, last, rows, one, row_tap);
    }
}

static void plane(const Task &t, const float *g, const float *x, float *out) {
    const Axis &h = t.axis[1], &w = t.axis[2];
    const int64_t shares = (w.out + PATCH - 1) / PATCH, width = (w.out + shares - 1) / shares;
    const int64_t height = most(1, PATCH / width), size = w.kernel * t.deep * (t.swapped ? t.thick : 1);
    for (int64_t top = 0; top < h.out; top += height)
        for (int64_t left = 0; left < w.out; left += width)
            for (int64_t k = 0; k < h.kernel; k++) {
                const int64_t rows[2] = {most(top, low(h, k)), least(least(top + height, h.out), high(h, k))};
                const int64_t pixels[2] = {left, least(left + width, w.out)};
                row_of_taps(t, g, x, out + k * size, rows, pixels, k);
            }
}

#if defined(__AVX512BF16__)
constexpr int64_t TALL = 4;  // rows of a patch whose pixels are copied: a row of x serves several rows of taps

struct Line {  // a row of pixels of bfloat16, null outside of the window; steps in elements
    const uint16_t *at;
    int64_t pixel, extent, channels;
};

// Some channels of a pixel, each in the low half of a number; of one that is null, zeros.
static inline __m512i numbers(const uint16_t *pixel, __mmask16 some) {
    return pixel ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, pixel)) : _mm512_setzero_si512();
}

static inline __m512i beside(__m512i first, __m512i second) {
    return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

// Pairs of the pixels first, first + advance, ...: each beside the one `apart` from it.
static void pairs(uint32_t *to, const Line &line, int64_t first, int64_t count, int64_t advance, int64_t apart) {
    const auto at = [&](int64_t pixel) {
        return line.at && pixel >= 0 && pixel < line.extent ? line.at + pixel * line.pixel : nullptr;
    };
    // Of these, both pixels are inside.
    const int64_t start = line.at ? least(count, most(0, -floor_div(first, advance))) : count;
    const int64_t end = most(start, least(count, floor_div(line.extent - 1 - apart - first, advance) + 1));
    const int64_t step = advance * line.pixel, next = apart * line.pixel, channels = line.channels;
    for (int64_t c = 0; c < channels; c += LANES) {
        const __mmask16 some = channels - c >= LANES ? 0xffff : (1 << (channels - c)) - 1;
        const auto outside = [&](int64_t k) {
            const uint16_t *a = at(first + k * advance), *b = at(first + k * advance + apart);
            const __m512i made = beside(numbers(a ? a + c : a, some), numbers(b ? b + c : b, some));
            _mm512_mask_storeu_epi32(to + k * channels + c, some, made);
        };
        for (int64_t k = 0; k < start; k++) outside(k);
        const uint16_t *from = line.at + (first + start * advance) * line.pixel + c;
        uint32_t *put = to + start * channels + c;
        if (some == 0xffff)
            for (int64_t k = start; k < end; k++, from += step, put += channels)
                _mm512_storeu_si512(put, beside(numbers(from, 0xffff), numbers(from + next, 0xffff)));
        else
            for (int64_t k = start; k < end; k++, from += step, put += channels)
                _mm512_mask_storeu_epi32(put, some, beside(numbers(from, some), numbers(from + next, some)));
        for (int64_t k = end; k < count; k++) outside(k);
    }
}

// A patch: its pairs copied, and all taps of it. `g` and `x` are planes.
static void patch(const Task &t, const uint16_t *g, const uint16_t *x, float *out, const int64_t rows[2],
                  const int64_t pixels[2], uint32_t *scratch) {
    const Axis &h = t.axis[1], &w = t.axis[2];
    const int64_t tall = rows[1] - rows[0], wide = (pixels[1] - pixels[0] + 1) / 2;
    const int64_t above = h.at(rows[0], 0), lines = h.at(rows[1] - 1, h.kernel - 1) + 1 - above;
    const int64_t count = 2 * (wide - 1) * w.stride + (w.kernel - 1) * w.dilation + 1;
    uint32_t *thick = scratch, *deep = scratch + tall * wide * t.thick;
    for (int64_t r = 0; r < tall; r++) {
        const Line line = {g + (rows[0] + r) * t.g_step[2], t.g_step[3], pixels[1], t.thick};
        pairs(thick + r * wide * t.thick, line, pixels[0], wide, 2, 1);
    }
    for (int64_t r = 0; r < lines; r++) {
        const int64_t y = above + r;
        const Line line = {y >= 0 && y < h.in ? x + y * t.x_step[2] : nullptr, t.x_step[3], w.in, t.deep};
        pairs(deep + r * count * t.deep, line, w.at(pixels[0], 0), count, 1, w.stride);
    }
    const int64_t taps = t.axis[0].kernel * h.kernel * w.kernel, joined = w.dilation == 1 ? w.kernel : 1;
    const Patch forward = {tall, wide, t.thick, wide * t.thick, 2 * w.stride * t.deep, h.stride * count * t.deep,
                           taps * t.deep};
    const Patch swapped = {tall, wide, forward.wide_pixel, forward.wide_row, forward.thin_pixel, forward.thin_row, t.thick};
    for (int64_t j = 0; j < h.kernel; j++)
        for (int64_t k = 0; k < w.kernel; k += joined) {
            const float *a = (const float *)thick;
            const float *b = (const float *)(deep + (j * h.dilation * count + k * w.dilation) * t.deep);
            const int64_t first = (j * w.kernel + k) * t.deep;
            if (t.swapped) product<PAIRS>(swapped, b, a, out + first * t.thick, joined * t.deep, t.thick);
            else product<PAIRS>(forward, a, b, out + first, t.thick, joined * t.deep);
        }
}

// Numbers of a patch's copies, at most.
static int64_t copied(const Task &t) {
    const Axis &h = t.axis[1], &w = t.axis[2];
    const int64_t lines = (TALL - 1) * h.stride + (h.kernel - 1) * h.dilation + 1;
    const int64_t count = PATCH * w.stride + (w.kernel - 1) * w.dilation + 1;
    return TALL * PATCH * t.thick + lines * count * t.deep;
}

static void plane(const Task &t, const uint16_t *g, const uint16_t *x, float *out, uint32_t *scratch) {
    const Axis &h = t.axis[1], &w = t.axis[2];
    const int64_t tall = least(TALL, h.out), most_wide = PATCH / tall & ~1;
    const int64_t shares = (w.out + most_wide - 1) / most_wide, width = ((w.out + shares - 1) / shares + 1) & ~1;
    for (int64_t top = 0; top < h.out; top += tall)
        for (int64_t left = 0; left < w.out; left += width) {
            const int64_t rows[2] = {top, least(top + tall, h.out)}, pixels[2] = {left, least(left + width, w.out)};
            patch(t, g, x, out, rows, pixels, scratch);
        }
}

#endif

// words: batch, groups, output and input channels of a group, three axes (extent of g, of x, kernel, stride,
// padding before, dilation), steps of g and of x (batch and three axes), whether vectors run over the output
// channels. tensors: g, x, and zeros for the product, float32: (output channel, taps, input channel), or (taps, input
// channel, output channel) per group.
static Task task(const int64_t *words) {
    Task t;
    t.batch = words[0], t.groups = words[1], t.thick = words[2], t.deep = words[3];
    for (int a = 0; a < 3; a++) {
        const int64_t *w = words + 4 + 6 * a;
        t.axis[a] = {w[0], w[1], w[2], w[3], w[4], w[5]};
    }
    for (int a = 0; a < 4; a++) t.g_step[a] = words[22 + a], t.x_step[a] = words[26 + a];
    t.swapped = words[30] != 0;
    return t;
}

// Every plane of g with the planes of x that its taps reach, and where their product goes.
template <typename T, typename F> static void planes(const Task &t, const T *g, const T *x, float *out, F &&each) {
    const Axis &d = t.axis[0];
    const int64_t slice = t.axis[1].kernel * t.axis[2].kernel * t.deep * (t.swapped ? t.thick : 1);
    for (int64_t group = 0; group < t.groups; group++) {
        float *mine = out + group * t.thick * t.deep * d.kernel * t.axis[1].kernel * t.axis[2].kernel;
        for (int64_t n = 0; n < t.batch; n++)
            for (int64_t k = 0; k < d.kernel; k++)
                for (int64_t z = low(d, k); z < high(d, k); z++)
                    each(g + n * t.g_step[0] + z * t.g_step[1] + group * t.thick,
                         x + n * t.x_step[0] + d.at(z, k) * t.x_step[1] + group * t.deep, mine + k * slice);
    }
}

extern "C" int fullframe_gradient(const int64_t *words, float *const *tensors) {
    const Task t = task(words);
    planes(t, tensors[0], tensors[1], tensors[2],
           [&](const float *g, const float *x, float *out) { plane(t, g, x, out); });
    return 0;
}

#if defined(__AVX512BF16__)
extern "C" int fullframe_gradient_of_halves(const int64_t *words, void *const *tensors) {
    const Task t = task(words);
    void *scratch = nullptr;
    if (posix_memalign(&scratch, 64, 4 * copied(t))) return 1;
    planes(t, (const uint16_t *)tensors[0], (const uint16_t *)tensors[1], (float *)tensors[2],
           [&](const uint16_t *g, const uint16_t *x, float *out) { plane(t, g, x, out, (uint32_t *)scratch); });
    free(scratch);
    return 0;
}
#endif
