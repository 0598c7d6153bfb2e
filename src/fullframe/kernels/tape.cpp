// The work on a tile as a list of instructions, run in one call: kernels, the library's convolutions, copies.
//
// A list is made of numbers. A place in memory is a slot and a distance in bytes; slots are the arrays that the
// caller gives, then what the instructions make. A view is a place with type, extents and strides, as the library
// wants them. The library is reached through the C functions that it keeps stable, whose addresses the caller gives.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void *Handle;
typedef int32_t Failed;

struct Library {
    Failed (*from_blob)(void *, int64_t, const int64_t *, const int64_t *, int64_t, int32_t, int32_t, int32_t, Handle *);
    Failed (*remove)(Handle);
    Failed (*address)(Handle, void **);
    Failed (*strides)(Handle, int64_t **);
    Failed (*convolution)(Handle, Handle, Handle *, const int64_t *, int64_t, const int64_t *, int64_t, const int64_t *,
                          int64_t, int32_t, const int64_t *, int64_t, int64_t, Handle *);
    Failed (*backward)(Handle, Handle, Handle, const int64_t **, int64_t, const int64_t *, int64_t, const int64_t *,
                       int64_t, const int64_t *, int64_t, int32_t, const int64_t *, int64_t, int64_t, const int32_t *,
                       int64_t, Handle *, Handle *, Handle *);
    Failed (*direct)(Handle, Handle, Handle *, const int64_t *, int64_t, const int64_t *, int64_t, const int64_t *,
                     int64_t, int64_t, const char *, const double **, int64_t, const char **, Handle *);
    Failed (*direct_transposed)(Handle, Handle, Handle *, const int64_t *, int64_t, const int64_t *, int64_t,
                                const int64_t *, int64_t, const int64_t *, int64_t, int64_t, const char *,
                                const double **, int64_t, const char **, Handle *);
};

typedef int (*Kernel)(const int64_t *geometry, void *const *tensors, double *partials);
typedef int (*WeightGrad)(const int64_t *words, const float *g, const float *x, float *out);

enum Way { CHOSEN, CHOSEN_TRANSPOSED, DIRECT, DIRECT_TRANSPOSED };  // by the library, or oneDNN's
enum Code { END, KERNEL, NEW, DROP, CONVOLUTION, BACKWARD, COPY, ADD, WEIGHT_GRAD };

struct Slot {
    char *at;
    Handle handle;  // of a tensor of the library's
    void *block;    // of our own
};

struct Tape {
    const int64_t *next;
    Slot *slots;
    const Library &library;

    int64_t take() { return *next++; }
    char *place() {
        const int64_t slot = take(), offset = take();
        return slots[slot].at + offset;
    }
    // A tensor of the library's that looks at a view; null where there is none.
    Handle view() {
        char *at = place();
        const int64_t type = take(), rank = take();
        const int64_t *extents = next, *strides = next + rank;
        next += 2 * rank;
        Handle made = nullptr;
        return library.from_blob(at, rank, extents, strides, 0, (int32_t)type, 0, 0, &made) ? nullptr : made;
    }
    const int64_t *list(int64_t &length) {
        length = take();
        const int64_t *found = next;
        next += length;
        return found;
    }
    // Put a tensor that the library made into a slot; the strides that follow are those it must have.
    bool keep(int64_t slot, Handle made) {
        int64_t rank, *strides;
        const int64_t *wanted = list(rank);
        void *at;
        if (library.strides(made, &strides) || library.address(made, &at) || memcmp(strides, wanted, rank * 8)) {
            library.remove(made);
            return false;
        }
        slots[slot] = {(char *)at, made, nullptr};
        return true;
    }
    void drop(Slot &slot) {
        if (slot.handle) library.remove(slot.handle);
        free(slot.block);
        slot = {nullptr, nullptr, nullptr};
    }
};

static bool convolve(Tape &tape, bool back) {
    const int64_t slot = tape.take(), wanted = back ? tape.take() : 0;
    const bool biased = !back && tape.take();
    int64_t n[4];
    const int64_t *stride = tape.list(n[0]), *padding = tape.list(n[1]), *dilation = tape.list(n[2]);
    const int64_t *more = tape.list(n[3]), way = tape.take(), groups = tape.take();
    Handle given[3], made[3] = {nullptr, nullptr, nullptr};
    const int count = back ? 3 : 2 + biased;
    bool good = true;
    for (int k = 0; k < count; k++) good &= (given[k] = tape.view()) != nullptr;
    if (good && back) {
        const int32_t mask[3] = {wanted == 0, wanted == 1, 0};
        good = !tape.library.backward(given[0], given[1], given[2], nullptr, 0, stride, n[0], padding, n[1], dilation,
                                      n[2], way == CHOSEN_TRANSPOSED, more, n[3], groups, mask, 3, made, made + 1,
                                      made + 2);
    } else if (good) {
        Handle *bias = biased ? given + 2 : nullptr;
        const Library &library = tape.library;
        if (way == DIRECT)
            good = !library.direct(given[0], given[1], bias, padding, n[1], stride, n[0], dilation, n[2], groups,
                                   "none", nullptr, 0, nullptr, made);
        else if (way == DIRECT_TRANSPOSED)
            good = !library.direct_transposed(given[0], given[1], bias, padding, n[1], more, n[3], stride, n[0],
                                              dilation, n[2], groups, "none", nullptr, 0, nullptr, made);
        else
            good = !library.convolution(given[0], given[1], bias, stride, n[0], padding, n[1], dilation, n[2],
                                        way == CHOSEN_TRANSPOSED, more, n[3], groups, made);
    }
    for (int k = 0; k < count; k++)
        if (given[k]) tape.library.remove(given[k]);
    for (int k = 0; k < 3; k++)
        if (made[k] && k != wanted) tape.library.remove(made[k]);
    return good && made[wanted] && tape.keep(slot, made[wanted]);
}

// Calls a function for each run of elements: axes with the extent, and the strides in bytes of both arrays.
template <typename F>
static void walk(Tape &tape, F &&each) {
    const int64_t rank = tape.take();
    const int64_t *extent = tape.next, *to_step = extent + rank, *from_step = to_step + rank;
    tape.next += 3 * rank;
    char *to = tape.place();
    const char *from = tape.place();
    int64_t index[8] = {0};  // no tape has copies along more axes
    for (int64_t axis = 0; axis >= 0;) {
        int64_t a = 0, b = 0;
        for (int64_t k = 0; k < rank - 1; k++) a += index[k] * to_step[k], b += index[k] * from_step[k];
        each(to + a, from + b, extent[rank - 1], to_step[rank - 1], from_step[rank - 1]);
        axis = rank - 2;
        while (axis >= 0 && ++index[axis] == extent[axis]) index[axis--] = 0;
    }
}

static void copy(Tape &tape) {
    const int64_t size = tape.take();
    walk(tape, [size](char *to, const char *from, int64_t count, int64_t to_step, int64_t from_step) {
        if (to_step == size && from_step == size) memcpy(to, from, count * size);
        else for (int64_t k = 0; k < count; k++) memcpy(to + k * to_step, from + k * from_step, size);
    });
}

template <typename T>
static void add(Tape &tape) {
    walk(tape, [](char *to, const char *from, int64_t count, int64_t to_step, int64_t from_step) {
        if (to_step == sizeof(T) && from_step == sizeof(T))
            for (int64_t k = 0; k < count; k++) ((T *)to)[k] += ((const T *)from)[k];
        else
            for (int64_t k = 0; k < count; k++) *(T *)(to + k * to_step) += *(const T *)(from + k * from_step);
    });
}

static bool kernel(Tape &tape) {
    const Kernel run = (Kernel)tape.take();
    const int64_t *geometry = (const int64_t *)tape.take();
    const int64_t count = tape.take();
    void *tensors[64];
    for (int64_t k = 0; k < count; k++) tensors[k] = tape.place();
    double *partials = tape.take() ? (double *)tape.place() : nullptr;
    return !run(geometry, tensors, partials);
}

static bool step(Tape &tape, int64_t code) {
    switch (code) {
    case KERNEL: return kernel(tape);
    case NEW: {
        const int64_t slot = tape.take(), bytes = tape.take(), zero = tape.take();
        void *block = nullptr;
        if (posix_memalign(&block, 64, bytes ? bytes : 1)) return false;
        if (zero) memset(block, 0, bytes);
        tape.slots[slot] = {(char *)block, nullptr, block};
        return true;
    }
    case DROP: tape.drop(tape.slots[tape.take()]); return true;
    case CONVOLUTION: return convolve(tape, false);
    case BACKWARD: return convolve(tape, true);
    case COPY: copy(tape); return true;
    case ADD:
        if (tape.take() == 8) add<double>(tape);
        else add<float>(tape);
        return true;
    case WEIGHT_GRAD: {
        const WeightGrad run = (WeightGrad)tape.take();
        const int64_t *words = (const int64_t *)tape.take();
        const float *g = (const float *)tape.place(), *x = (const float *)tape.place();
        return !run(words, g, x, (float *)tape.place());
    }
    }
    return false;
}

// 0 where all was done; nothing of a tape that fails is kept.
extern "C" int fullframe_tape(const int64_t *words, void *const *bases, int64_t count, int64_t slots,
                              const Library *library) {
    Slot *all = (Slot *)calloc(slots ? slots : 1, sizeof(Slot));
    if (!all) return 1;
    for (int64_t k = 0; k < count; k++) all[k].at = (char *)bases[k];
    Tape tape = {words, all, *library};
    bool good = true;
    for (int64_t code; good && (code = tape.take()) != END;) good = step(tape, code);
    for (int64_t k = count; k < slots; k++) tape.drop(all[k]);
    free(all);
    return !good;
}
