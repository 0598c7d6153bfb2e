// A convolution of one window, channels innermost, float32 or bfloat16.
//
// Where a block of sums reaches over the left or right border, and only there, its numbers are copied, with zeros; a row
// of taps above or below is left out. The products of an output are added up in chains, each of some rows of taps and
// some channels, and the chains one after the other; which these are, and their order, does not depend on the place of
// a pixel or the window's size. Of bfloat16 there is one chain, whose sum is rounded at its end.

struct Place {  // of a block: which pixels of a row of outputs
    int64_t image, slice, row, first, last;
};

// Points a chain to what a block reads of rows of taps from `row`, numbers from `number` on.
static void aim(const Task &t, Chain &chain, const Place &p, int64_t row, int64_t number, char *scratch) {
    const Axis &d = t.axis[0], &h = t.axis[1], &w = t.axis[2];
    const int64_t from = w.at(p.first, 0), end = w.at(p.last - 1, w.kernel - 1) + 1;
    const bool border = from < 0 || end > w.in;
    for (int64_t j = 0; j < chain.count; j++) {
        const int64_t z = d.at(p.slice, (row + j) / h.kernel), y = h.at(p.row, (row + j) % h.kernel);
        chain.rows[j] = nullptr;
        if (z < 0 || z >= d.in || y < 0 || y >= h.in) continue;
        const char *line = t.x + p.image * t.x_step[0] + z * t.x_step[1] + y * t.x_step[2] + 4 * number;
        chain.rows[j] = border ? scratch : line + from * t.x_step[3];
        for (int64_t q = from; border && q < end; q++, scratch += 4 * chain.deep) {
            if (q < 0 || q >= w.in) memset(scratch, 0, 4 * chain.deep);
            else memcpy(scratch, line + q * t.x_step[3], 4 * chain.deep);
        }
    }
    const int64_t step = border ? 4 * chain.deep : t.x_step[3];
    chain.pixel = step * w.stride, chain.tap = step * w.dilation;
}

// The outputs of some vectors of channels, from `channel` on, of one slice of an image.
template <Kind K>
static void slice(const Task &t, int64_t image, int64_t z, int64_t channel, int64_t vectors, const float *weight,
                  int64_t pitch, char *scratch) {
    const Axis &w = t.axis[2];
    const int64_t wide = HELD / vectors, blocks = (w.out + wide - 1) / wide, all = t.axis[1].out * blocks;
    const int64_t group = K == SINGLE && 4 * t.products() * vectors * LANES > LARGE ? all : 1;
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
                    if (chain.tap == 4 * chain.deep && chain.deep == t.deep) chain.deep *= chain.taps, chain.taps = 1;
                    constexpr int64_t SIZE = sizeof(typename Element<K>::T);
                    char *at = t.out + image * t.out_step[0] + z * t.out_step[1] + y * t.out_step[2] +
                               place.first * t.out_step[3] + channel * SIZE;
                    const float *bias = t.bias ? t.bias + channel : nullptr;
                    const Target target = {at, t.out_step[3] / SIZE, used, c == 0 && r == 0, bias};
                    BLOCKS<K>.of[vectors][place.last - place.first](chain, target);
                }
}

#if defined(__AVX512BF16__)
// The same for pairs of input channels, each vector of output channels made of two.
static void pack_pairs(const Task &t, int64_t channel, int64_t count, int64_t pitch, uint32_t *to) {
    const int64_t *step = t.weight_step;
    const auto lanes = [&](const uint16_t *from, int64_t first, int64_t known) {
        const __mmask16 some = known >= LANES ? 0xffff : (1 << known) - 1;
        if (step[0] == 1) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from + first));
        uint32_t found[LANES] = {0};
        for (int64_t j = 0; j < least(known, LANES); j++) found[j] = from[(first + j) * step[0]];
        return _mm512_loadu_si512(found);
    };
    for (int64_t a = 0; a < t.axis[0].kernel; a++)
        for (int64_t b = 0; b < t.axis[1].kernel; b++)
            for (int64_t e = 0; e < t.axis[2].kernel; e++)
                for (int64_t c = 0; c < t.deep; c++, to += pitch) {
                    const uint16_t *at = (const uint16_t *)t.weight + channel * step[0] + 2 * c * step[1] + a * step[2] +
                                         b * step[3] + e * step[4];
                    for (int64_t first = 0; first < pitch; first += LANES) {
                        const __m512i next = _mm512_slli_epi32(lanes(at + step[1], first, count - first), 16);
                        _mm512_storeu_si512(to + first, _mm512_or_si512(lanes(at, first, count - first), next));
                    }
                }
}
#endif

// All outputs, by strips of output channels; with room for a copy of so many numbers of the weight.
template <Kind K, typename F> static int strips(const Task &t, int64_t kept, F &&copy) {
    const Axis &w = t.axis[2];
    const int64_t reach = HELD * w.stride + w.kernel * w.dilation;
    void *room = nullptr;
    if (posix_memalign(&room, 64, 4 * (kept + reach * t.some * t.part))) return 1;
    float *own = (float *)room;
    char *scratch = (char *)(own + kept);
    const int64_t vectors = (t.thick + LANES - 1) / LANES, count = (vectors + 2) / 3;
    for (int64_t k = 0, v = 0; k < count; k++) {
        const int64_t end = vectors * (k + 1) / count, some = end - v, channel = v * LANES;
        if (kept) copy(channel, least(some * LANES, t.thick - channel), some * LANES, own);
        const float *weight = kept ? own : (const float *)t.weight + channel;
        for (int64_t n = 0; n < t.batch; n++)
            for (int64_t z = 0; z < t.axis[0].out; z++)
                slice<K>(t, n, z, channel, some, weight, kept ? some * LANES : t.thick, scratch);
        v = end;
    }
    free(room);
    return 0;
}

// How many numbers of float32 a vector has.
extern "C" int fullframe_lanes() { return LANES; }

// tensors: x, weight, output, and a bias or null.
extern "C" int fullframe_convolution(const int64_t *words, void *const *tensors) {
    Task t = task(words, 4);
    take(t, tensors);
    t.bias = (const float *)tensors[3];
    return strips<SINGLE>(t, packed(t) ? 0 : t.products() * 3 * LANES,
                          [&](int64_t channel, int64_t count, int64_t pitch, float *to) {
                              pack(t, channel, count, pitch, false, to);
                          });
}

#if defined(__AVX512BF16__)
// The same of bfloat16, of an even number of input channels, which are one chain.
extern "C" int fullframe_convolution_of_halves(const int64_t *words, void *const *tensors) {
    Task t = task(words, 2);
    take(t, tensors);
    t.some = t.rows(), t.part = t.deep;
    const uint16_t *bias = (const uint16_t *)tensors[3];
    void *wide = nullptr;
    if (bias && posix_memalign(&wide, 64, 4 * (t.thick + LANES))) return 1;
    for (int64_t k = 0; bias && k < t.thick; k++) ((uint32_t *)wide)[k] = (uint32_t)bias[k] << 16;
    t.bias = (const float *)wide;
    const int failed = strips<PAIRS>(t, t.products() * 3 * LANES,
                                     [&](int64_t channel, int64_t count, int64_t pitch, float *to) {
                                         pack_pairs(t, channel, count, pitch, (uint32_t *)to);
                                     });
    free(wide);
    return failed;
}
#endif

// words as above, then whether the taps are to be turned. tensors: weight, and where it is put.
extern "C" int fullframe_pack(const int64_t *words, void *const *tensors) {
    Task t = task(words, 4);
    t.weight = tensors[0];
    pack(t, 0, t.thick, t.thick, words[36] != 0, (float *)tensors[1]);
    return 0;
}

// The same of elements of two bytes.
extern "C" int fullframe_pack_halves(const int64_t *words, void *const *tensors) {
    Task t = task(words, 4);
    t.weight = tensors[0];
    pack(t, 0, t.thick, t.thick, words[36] != 0, (uint16_t *)tensors[1]);
    return 0;
}
