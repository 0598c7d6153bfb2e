// The work on a tile as a list of instructions, run in one call: kernels, the library's ops, copies.
//
// A list is made of numbers. A place in memory is a slot and a distance in bytes; slots are the arrays that the
// caller gives, then what the instructions make. A view is a place with type, extents and strides, as the library
// wants them. The library is reached through the C functions that it keeps stable, whose addresses the caller gives.

#include <atomic>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef WATCH  // which a profiler may define: an instruction begins, and ends with the block
#define WATCH(at)
#endif

typedef void *Handle;
typedef int32_t Failed;

struct Library {
    Failed (*from_blob)(void *, int64_t, const int64_t *, const int64_t *, int64_t, int32_t, int32_t, int32_t, Handle *);
    Failed (*remove)(Handle);
    Failed (*address)(Handle, void **);
    Failed (*strides)(Handle, int64_t **);
    Failed (*new_list)(size_t, Handle *);
    Failed (*push)(Handle, uint64_t);
    Failed (*new_value)(uint64_t **);
    Failed (*new_text)(const char *, size_t, Handle *);
    Failed (*call)(const char *, const char *, uint64_t *);
    Failed (*add)(Handle, Handle, double, Handle *);
    Failed (*type)(Handle, int32_t *);
};

typedef int (*Kernel)(const int64_t *geometry, void *const *tensors, double *partials);
typedef int (*Own)(const int64_t *words, void *const *tensors);

enum Code { END, KERNEL, NEW, DROP, CALL, COPY, ADD, OWN, KEPT, PLUS, CLEAR, WORKSPACE };
enum Argument { PLAIN, TENSOR, LIST, OPTIONAL, STRING };

// Where tiles have what they make on the way, kept from tile to tile: what the C library is given back and asked for
// again comes from the system page by page where it may keep little. Each begins with its size. They do not lie among
// the C library's blocks, where one that stays keeps those below it from being given back.
static std::atomic<char *> workspaces[64];
constexpr int64_t HEAD = 64;

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
static void *from_system(int64_t bytes) {
    void *block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return block == MAP_FAILED ? nullptr : block;
}
static void give_back(char *block) { munmap(block, HEAD + *(int64_t *)block); }
#else
static void *from_system(int64_t bytes) {
    void *block = nullptr;
    return posix_memalign(&block, HEAD, bytes) ? nullptr : block;
}
static void give_back(char *block) { free(block); }
#endif

static void keep_workspace(char *block) {
    for (auto &kept : workspaces) {
        char *none = nullptr;
        if (kept.compare_exchange_strong(none, block)) return;
    }
    give_back(block);
}

// One that is large enough, or a new one in place of another: so they are no more than tiles in work, and of the large
// ones no more than tiles in work that need such.
static char *take_workspace(int64_t bytes) {
    char *small = nullptr;
    for (auto &kept : workspaces) {
        char *block = kept.exchange(nullptr);
        if (!block) continue;
        if (bytes <= *(int64_t *)block) {
            if (small) keep_workspace(small);
            return block;
        }
        if (small) keep_workspace(small);
        small = block;
    }
    if (small) give_back(small);
    char *block = (char *)from_system(HEAD + bytes);
    if (block) *(int64_t *)block = bytes;
    return block;
}

// Gives those back that no tile has and that are larger than so many bytes.
extern "C" void fullframe_release(int64_t most) {
    for (auto &kept : workspaces) {
        char *block = kept.exchange(nullptr);
        if (!block) continue;
        if (*(int64_t *)block > most) give_back(block);
        else keep_workspace(block);
    }
}

struct Slot {
    char *at;
    Handle handle;  // of a tensor of the library's
    void *block;    // of our own
};

struct Frame {
    const int64_t *next;
    Slot *slots;
    const Library &library;
    char *workspace = nullptr;

    ~Frame() {
        if (workspace) keep_workspace(workspace);
    }
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
    // Put a tensor that the library made into a slot; it must have the type and the strides that follow.
    bool keep(int64_t slot, Handle made) {
        const int64_t type = take(), rank = take(), *wanted = next;
        next += rank;
        int64_t *strides;
        int32_t found;
        void *at;
        if (library.type(made, &found) || found != type || library.strides(made, &strides) ||
            library.address(made, &at) || memcmp(strides, wanted, rank * 8)) {
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

// An argument as the library's dispatcher takes it, which it then owns.
static bool argument(Frame &frame, uint64_t &value) {
    const Library &library = frame.library;
    const int64_t kind = frame.take();
    Handle made = nullptr;
    if (kind == PLAIN) {
        value = (uint64_t)frame.take();
        return true;
    }
    if (kind == OPTIONAL) {
        uint64_t *held = nullptr;
        if (library.new_value(&held) || !argument(frame, *held)) return false;
        value = (uint64_t)held;
        return true;
    }
    if (kind == TENSOR) made = frame.view();
    else if (kind == STRING) {
        const char *text = (const char *)frame.take();
        if (library.new_text(text, frame.take(), &made)) return false;
    } else {
        const int64_t count = frame.take();
        if (library.new_list(count, &made)) return false;
        for (int64_t k = 0; k < count; k++) {
            uint64_t part;
            if (!argument(frame, part) || library.push(made, part)) return false;
        }
    }
    value = (uint64_t)made;
    return made != nullptr;
}

// An op by its name. What a call that fails has made so far is lost: it is not met, since the same call has gone well.
static bool call(Frame &frame) {
    const char *name = (const char *)frame.take(), *overload = (const char *)frame.take();
    const int64_t count = frame.take();
    uint64_t stack[16];
    for (int64_t k = 0; k < count; k++)
        if (!argument(frame, stack[k])) return false;
    if (frame.library.call(name, overload, stack)) return false;
    bool good = true;
    for (int64_t k = 0, results = frame.take(); k < results; k++) {
        const int64_t slot = frame.take();
        if (slot < 0) frame.library.remove((Handle)stack[k]);
        else good &= frame.keep(slot, (Handle)stack[k]);
    }
    return good;
}

// A sum or difference, whose factor is a number of a kind that the dispatcher does not take.
static bool plus(Frame &frame) {
    const int64_t bits = frame.take();
    double factor;
    memcpy(&factor, &bits, 8);
    Handle a = frame.view(), b = frame.view(), made = nullptr;
    const bool good = a && b && !frame.library.add(a, b, factor, &made);
    if (a) frame.library.remove(a);
    if (b) frame.library.remove(b);
    const int64_t slot = frame.take();
    return good && frame.keep(slot, made);
}

// Calls a function for each plane of elements: the two innermost axes, with their extents, and the strides in bytes of
// both arrays; the first of them is 1 where there is one axis.
struct Plane {
    int64_t rows, count, to_row, to_step, from_row, from_step;
};

template <typename F>
static void walk(const int64_t *words, char *to, const char *from, F &&each) {
    const int64_t rank = words[0], *extent = words + 1, *to_step = extent + rank, *from_step = to_step + rank;
    const int64_t outer = rank > 1 ? rank - 2 : 0;
    Plane plane = {1, extent[rank - 1], 0, to_step[rank - 1], 0, from_step[rank - 1]};
    if (rank > 1) plane.rows = extent[outer], plane.to_row = to_step[outer], plane.from_row = from_step[outer];
    int64_t index[8] = {0};  // no bytecode has copies along more axes
    for (int64_t axis = 0; axis >= 0;) {
        int64_t a = 0, b = 0;
        for (int64_t k = 0; k < outer; k++) a += index[k] * to_step[k], b += index[k] * from_step[k];
        each(to + a, from + b, plane);
        axis = outer - 1;
        while (axis >= 0 && ++index[axis] == extent[axis]) index[axis--] = 0;
    }
}

template <typename F>
static void walk(Frame &frame, F &&each) {
    const int64_t *words = frame.next;
    frame.next += 1 + 3 * words[0];
    char *to = frame.place();
    const char *from = frame.place();
    walk(words, to, from, each);
}

struct Wide {  // an element of sixteen bytes
    uint64_t halves[2];
};

// Rows of so many bytes, which the compiler knows: the few channels of each pixel.
template <int64_t BYTES>
static void copy_rows(char *to, const char *from, const Plane &p) {
    for (int64_t row = 0; row < p.rows; row++, to += p.to_row, from += p.from_row) memcpy(to, from, BYTES);
}

// Neighbours along rows become neighbours along columns: by squares of whole cache lines, each read and written once.
template <typename T>
static void turn(char *to, const char *from, const Plane &p) {
    constexpr int64_t LINE = 64 / sizeof(T);
    T square[LINE][LINE] = {};
    for (int64_t row = 0; row < p.rows; row += LINE) {
        const int64_t rows = p.rows - row < LINE ? p.rows - row : LINE;
        for (int64_t k = 0; k < p.count; k += LINE) {
            const int64_t count = p.count - k < LINE ? p.count - k : LINE;
            const char *read = from + row * sizeof(T) + k * p.from_step;
            char *write = to + row * p.to_row + k * sizeof(T);
            for (int64_t j = 0; j < count; j++) memcpy(square[j], read + j * p.from_step, rows * sizeof(T));
            for (int64_t i = 0; i < rows; i++) {
                T line[LINE];
                for (int64_t j = 0; j < LINE; j++) line[j] = square[j][i];
                memcpy(write + i * p.to_row, line, count * sizeof(T));
            }
        }
    }
}

template <typename T>
static void copy_plane(char *to, const char *from, const Plane &p) {
    if (p.to_step == sizeof(T) && p.from_step == sizeof(T)) {
        const int64_t bytes = p.count * sizeof(T);
        switch (bytes) {
        case 8: return copy_rows<8>(to, from, p);
        case 16: return copy_rows<16>(to, from, p);
        case 32: return copy_rows<32>(to, from, p);
        case 64: return copy_rows<64>(to, from, p);
        case 128: return copy_rows<128>(to, from, p);
        }
        for (int64_t row = 0; row < p.rows; row++, to += p.to_row, from += p.from_row) memcpy(to, from, bytes);
        return;
    }
    if (p.to_step == sizeof(T) && p.from_row == sizeof(T)) return turn<T>(to, from, p);
    for (int64_t row = 0; row < p.rows; row++, to += p.to_row, from += p.from_row)
        for (int64_t k = 0; k < p.count; k++) memcpy(to + k * p.to_step, from + k * p.from_step, sizeof(T));
}

static void copy(int64_t size, char *to, const char *from, const Plane &p) {
    switch (size) {
    case 1: return copy_plane<uint8_t>(to, from, p);
    case 2: return copy_plane<uint16_t>(to, from, p);
    case 4: return copy_plane<uint32_t>(to, from, p);
    case 8: return copy_plane<uint64_t>(to, from, p);
    default: return copy_plane<Wide>(to, from, p);
    }
}

static void copy(Frame &frame) {
    const int64_t size = frame.take();
    walk(frame, [size](char *to, const char *from, const Plane &p) { copy(size, to, from, p); });
}

// As the instruction: words are bytes of an element, the number of axes, their extents, and both arrays' strides.
extern "C" void fullframe_copy(const int64_t *words, char *to, const char *from) {
    walk(words + 1, to, from, [words](char *a, const char *b, const Plane &p) { copy(words[0], a, b, p); });
}

struct Half {  // bfloat16
    uint16_t bits;
    operator double() const {
        const uint32_t wide = (uint32_t)bits << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }
};

template <typename T, typename U = T>
static void add(Frame &frame) {
    walk(frame, [](char *to, const char *from, const Plane &p) {
        for (int64_t row = 0; row < p.rows; row++, to += p.to_row, from += p.from_row)
            if (p.to_step == sizeof(T) && p.from_step == sizeof(U))
                for (int64_t k = 0; k < p.count; k++) ((T *)to)[k] += (T)((const U *)from)[k];
            else
                for (int64_t k = 0; k < p.count; k++)
                    *(T *)(to + k * p.to_step) += (T) * (const U *)(from + k * p.from_step);
    });
}

static bool kernel(Frame &frame) {
    const Kernel run = (Kernel)frame.take();
    const int64_t *geometry = (const int64_t *)frame.take();
    const int64_t count = frame.take();
    void *tensors[64];
    for (int64_t k = 0; k < count; k++) tensors[k] = frame.place();
    double *partials = frame.take() ? (double *)frame.place() : nullptr;
    return !run(geometry, tensors, partials);
}

static bool own(Frame &frame) {
    const Own run = (Own)frame.take();
    const int64_t *words = (const int64_t *)frame.take();
    const int64_t count = frame.take();
    void *tensors[8] = {nullptr};
    for (int64_t k = 0; k < count; k++) tensors[k] = frame.place();
    return !run(words, tensors);
}

static bool execute(Frame &frame, int64_t code) {
    switch (code) {
    case KERNEL: return kernel(frame);
    case NEW: {
        const int64_t slot = frame.take(), bytes = frame.take(), size = frame.take(), pattern = frame.take();
        const int64_t base = frame.take(), offset = frame.take();  // in an array, if any; else in the workspace
        void *block = nullptr;                                    // or, where it is less than 0, in a block of its own
        if (offset < 0 && posix_memalign(&block, 64, bytes ? bytes : 1)) return false;
        char *at = block ? (char *)block : base < 0 ? frame.workspace + HEAD + offset : frame.slots[base].at + offset;
        if (size && !pattern) memset(at, 0, bytes);
        else if (size)
            for (int64_t k = 0; k < bytes; k += size) memcpy(at + k, &pattern, size);
        frame.slots[slot] = {at, nullptr, block};
        return true;
    }
    case WORKSPACE: return (frame.workspace = take_workspace(frame.take())) != nullptr;
    case KEPT: {
        const int64_t slot = frame.take();
        frame.slots[slot] = {(char *)frame.take(), nullptr, nullptr};
        return true;
    }
    case PLUS: return plus(frame);
    case DROP: frame.drop(frame.slots[frame.take()]); return true;
    case CALL: return call(frame);
    case COPY: copy(frame); return true;
    case ADD:
        switch (frame.take()) {
        case 0: add<float>(frame); return true;
        case 1: add<double>(frame); return true;
        case 2: add<int64_t>(frame); return true;
        case 3: add<double, float>(frame); return true;
        case 4: add<double, Half>(frame); return true;
        case 5: add<float, Half>(frame); return true;
        case 6: add<uint8_t>(frame); return true;  // of truth values, too, which are bytes
        }
        return false;
    case OWN: return own(frame);
    case CLEAR: {
        char *at = frame.place();
        memset(at, 0, frame.take());
        return true;
    }
    }
    return false;
}

// Runs the instructions up to an end.
static bool interpret(Frame &frame) {
    for (int64_t code; (code = frame.take()) != END;) {
        WATCH(frame.next - 1);
        if (!execute(frame, code)) return false;
    }
    return true;
}

// 0 where all was done; nothing of bytecode that fails is kept.
extern "C" int fullframe_interpret(const int64_t *words, void *const *bases, int64_t count, int64_t slots,
                              const Library *library) {
    Slot *all = (Slot *)calloc(slots ? slots : 1, sizeof(Slot));
    if (!all) return 1;
    for (int64_t k = 0; k < count; k++) all[k].at = (char *)bases[k];
    Frame frame = {words, all, *library};
    const bool good = interpret(frame);
    for (int64_t k = count; k < slots; k++) frame.drop(all[k]);
    free(all);
    return !good;
}
