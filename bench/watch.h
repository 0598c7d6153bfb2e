// Of each instruction of bytecode, and each wait of a thread, when it began and ended, for bench/profile_step.py.

#include <stdint.h>
#include <atomic>
#include <chrono>

struct Event {
    const int64_t *at;  // the instruction; null for a wait
    int64_t begin, end;  // nanoseconds
};

static Event events[1 << 21];
static std::atomic<int64_t> used{0};

static int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

struct Watched {
    Event event;
    explicit Watched(const int64_t *at) : event{at, now(), 0} {}
    ~Watched() {
        const int64_t k = used++;
        event.end = now();
        if (k < 1 << 21) events[k] = event;
    }
};

#define WATCH(at) Watched watched(at)

// Where the events are; their number goes to `count`, and is 0 from then on.
extern "C" const Event *fullframe_events(int64_t *count) {
    *count = used.exchange(0);
    return events;
}
