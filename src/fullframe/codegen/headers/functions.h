// What the expressions of a kernel call, the same on every device: number formats and pointwise operations.
//
// The prelude that this is put into has defined INLINE, the integer types, memcpy, the m_ functions of the
// mathematics library, for float and for double, and CLEAR_NAN.

// ---- number formats: bfloat16 is held as float and rounded where PyTorch rounds ----------------------------

template <class To, class From> INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

INLINE float load_bfloat16(uint16_t bits) { return bits_as<float>((uint32_t)bits << 16); }

// To nearest, ties to even; for numbers, and a NaN whose low bits do not carry into the sign.
INLINE float nearest_bfloat16(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    return bits_as<float>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

INLINE float narrow_bfloat16(float x) {  // the same for any NaN
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint16_t narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
    return load_bfloat16(narrow);
#else
    const uint32_t nan = -(uint32_t)(x != x);
    return bits_as<float>((bits_as<uint32_t>(nearest_bfloat16(x)) & ~nan) | (0x7fc00000u & nan));
#endif
}

// Of what arithmetic on bfloat16 values gives. The NaN that it makes has the low bits clear on most processors,
// and then needs no care; on others all bits are set.
INLINE float round_bfloat16(float x) { return CLEAR_NAN ? nearest_bfloat16(x) : narrow_bfloat16(x); }

INLINE uint16_t store_bfloat16(float x) { return (uint16_t)(bits_as<uint32_t>(x) >> 16); }  // x is rounded

// ---- pointwise operations; comparisons are written so that NaN goes where PyTorch lets it go -----------------

template <class T> INLINE T m_max(T a, T b) { return a != a ? a : (a > b ? a : b); }
template <class T> INLINE T m_min(T a, T b) { return a != a ? a : (a < b ? a : b); }
template <class T> INLINE T clamp_low(T x, T low) { return x < low ? low : x; }
template <class T> INLINE T clamp_high(T x, T high) { return x > high ? high : x; }
template <class T> INLINE T sign(T x) { return (T)((T)(x > 0) - (T)(x < 0)); }
template <class T> INLINE T sigmoid(T x) { return T(1) / (T(1) + m_exp(-x)); }
template <class T> INLINE T lerp(T a, T b, T w) {
    const bool low = m_abs(w) < T(0.5);
    return m_fma(low ? w : w - T(1), b - a, low ? a : b);
}

template <class T> INLINE T elu(T x, T alpha, T scale, T input) {
    const T below = m_expm1(x * input) * (alpha * scale);
    return x < 0 ? below : x * scale;
}
template <class T> INLINE T elu_backward(T g, T alpha, T scale, T input, bool is_result, T x) {
    const T coefficient = alpha * scale;
    const T below = is_result ? g * input * (x + coefficient) : g * input * coefficient * m_exp(x * input);
    return x > 0 ? g * scale : below;
}

template <class T> INLINE T gelu(T x) { return x * T(0.5) * (T(1) + m_erf(x * T(0.70710678118654752440))); }
template <class T> INLINE T gelu_tanh(T x) {
    const T beta = T(0.70710678118654752440 * 1.12837916709551257390);
    return T(0.5) * x * (T(1) + m_tanh(beta * (x + T(0.044715) * (x * x * x))));
}
template <class T> INLINE T gelu_backward(T g, T x) {
    const T cdf = T(0.5) * (T(1) + m_erf(x * T(0.70710678118654752440)));
    const T pdf = T(0.5 * 1.12837916709551257390 * 0.70710678118654752440) * m_exp(x * x * T(-0.5));
    return g * (cdf + x * pdf);
}
template <class T> INLINE T gelu_tanh_backward(T g, T x) {
    const T beta = T(0.70710678118654752440 * 1.12837916709551257390), kappa = T(0.044715);
    const T t = m_tanh(beta * (x + kappa * (x * x * x)));
    const T left = T(0.5) * (T(1) + t);
    const T right = T(0.5) * x * (T(1) - t * t) * (beta * (T(1) + T(3) * kappa * x * x));
    return g * (left + right);
}

template <class T> INLINE T silu(T x) { return x / (T(1) + m_exp(-x)); }
template <class T> INLINE T silu_backward(T g, T x) {
    const T s = sigmoid(x);
    return g * s * (T(1) + x * (T(1) - s));
}
template <class T> INLINE T mish(T x) { return x * m_tanh(m_log1p(m_exp(x))); }
template <class T> INLINE T mish_backward(T g, T x) {
    const T s = sigmoid(x), t = m_tanh(m_log1p(m_exp(x)));
    return g * (t + x * s * (T(1) - t * t));
}

template <class T> INLINE T softplus(T x, T beta, T threshold) {
    const T y = m_log1p(m_exp(x * beta)) / beta;
    return x * beta > threshold ? x : y;
}
template <class T> INLINE T softplus_backward(T g, T x, T beta, T threshold) {
    const T z = m_exp(x * beta), y = g * z / (z + T(1));
    return x * beta > threshold ? g : y;
}

// PyTorch divides on processors and multiplies on devices, by a float even in float64.
template <class T> INLINE T sixth(T x) {
#if defined(__CUDA_ARCH__)
    return x * T(1.0f / 6.0f);
#else
    return x / T(6);
#endif
}
template <class T> INLINE T hardsigmoid(T x) { return sixth(clamp_high(clamp_low(x + T(3), T(0)), T(6))); }
template <class T> INLINE T hardsigmoid_backward(T g, T x) {
    return x > T(-3) && x < T(3) ? g * T(1.0f / 6.0f) : T(0);  // PyTorch's constant, in float64 too
}
template <class T> INLINE T hardswish(T x) { return sixth(x * clamp_high(clamp_low(x + T(3), T(0)), T(6))); }
template <class T> INLINE T hardswish_backward(T g, T x) {
    const T inside = g * (x / T(3) + T(0.5));
    return x <= T(-3) ? T(0) : (x >= T(3) ? g : inside);
}
