// Count, mean and sum of squared deviations of two sets of numbers, as those of both together; the operations are
// those of `combine_moments`, one by one, so that the bits are, too.

#include <stdint.h>

extern "C" int fullframe_moments(const int64_t *words, void *const *tensors) {
    const int64_t count = words[0];
    double *a = (double *)tensors[0];
    const double *b = (const double *)tensors[1];
    for (int64_t k = 0; k < count; k++) {
        const double na = a[k], nb = b[k], mean = a[count + k], other = b[count + k];
        const double n = na + nb, weight = n < 1 ? 1 : n;
        const double about = mean - mean == 0 ? mean : 0;  // of finite ones
        const double middle = about + (na / weight * (mean - about) + nb / weight * (other - about));
        const double da = mean - middle, db = other - middle;
        a[k] = n;
        a[count + k] = middle;
        a[2 * count + k] = (a[2 * count + k] + b[2 * count + k]) + (na * (da * da) + nb * (db * db));
    }
    return 0;
}
