// Rows of pixels as what the four products of Winograd's F(2, 3) are of: of the pixels d0 ... d3 that a couple of
// neighbouring outputs of three taps reads, d0 - d2, d1 + d2, d2 - d1 and d1 - d3.

constexpr int64_t PRODUCTS = 4;

struct Row {  // of pixels, null outside of the window; steps in elements
    const float *at;
    int64_t pixel, extent, channels;
    const float *pixel_or(int64_t k, const float *none) const { return at && k >= 0 && k < extent ? at + k * pixel : none; }
};

template <typename T> static inline T get(const float *at) {
    T found;
    memcpy(&found, at, sizeof found);
    return found;
}
template <typename T> static inline void put(float *at, T value) { memcpy(at, &value, sizeof value); }

// Calls `some` for all channels, as many at a time as it can.
template <typename F> static inline void by_channels(int64_t count, F &&some) {
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) some(n, Vec{});
    for (; n < count; n++) some(n, float{});
}

// Of the pixels from `first` on, in four planes with the channels of a couple side by side.
static void planes_of(const Row &x, int64_t first, int64_t couples, const float *zeros, float *to, int64_t plane) {
    const float *d[4] = {nullptr, nullptr, x.pixel_or(first, zeros), x.pixel_or(first + 1, zeros)};
    for (int64_t k = 0; k < couples; k++, to += x.channels) {
        d[0] = d[2], d[1] = d[3];
        d[2] = x.pixel_or(first + 2 * k + 2, zeros), d[3] = x.pixel_or(first + 2 * k + 3, zeros);
        by_channels(x.channels, [&](int64_t n, auto kind) {
            typedef decltype(kind) T;
            const T a = get<T>(d[0] + n), b = get<T>(d[1] + n), c = get<T>(d[2] + n), e = get<T>(d[3] + n);
            put<T>(to + n, a - c), put<T>(to + plane + n, b + c);
            put<T>(to + 2 * plane + n, c - b), put<T>(to + 3 * plane + n, b - e);
        });
    }
}
