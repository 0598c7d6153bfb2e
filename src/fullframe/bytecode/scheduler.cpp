
// The bytecode of many tiles as one call: the tiles of a range of stages, several stages in flight, and what adds up their results.
//
// Every thread that helps calls `fullframe_scheduler_run`. A stage without bytecode is the caller's to make, by its functions;
// so is a tile whose bytecode fails. What each sum adds up, and in which order, does not depend on the threads.
//
// On one of several ranks the owner has the others to meet, and leaves the tiles to its helpers: it waits in `run` for the
// stages before a meeting, and says by `fullframe_scheduler_met` that one is over, for which some stages wait.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

struct BoundBytecode {  // bytecode: its instructions, what it is given, its places, and its results; it is given
                        // addresses of the table, each followed by how many bytes behind it an array begins
    const int64_t *words, *bases;
    int64_t count, slots, bytes;
};

struct Stage {  // a stage: those it waits for, its tiles, and what adds up their results, from a mark for each on
    const int64_t *before;
    int64_t waits, tiles, flags;
    const BoundBytecode *bound, *after;
    const int64_t *marks;
    int64_t meetings;  // that it waits for
};

enum Who { HELPER = 0, OWNER = 1, WAITING = 2 };  // a waiting owner makes only what nobody else may

enum Flag { ROOM = 1, FREES = 2, MULTI_THREADED = 4 };

// Of the caller: each says by its last argument that it came to its end, and was not left by an exception.
struct Calls {
    void (*begin)(int64_t stage, int64_t *done);
    void (*tile)(int64_t stage, int64_t tile, void *results, int64_t *done);
    void (*add)(int64_t stage, int64_t tile, int64_t *done);
    void (*end)(int64_t stage, int64_t *done);
    void (*free)(int64_t stage, int64_t *done);
    void (*multi_threaded)(int64_t on, int64_t *done);
    void (*poll)(int64_t *done);
};

template <typename... A, typename... B> static bool ask(void (*call)(A...), B... given) {
    int64_t done = 0;
    call(given..., &done);
    return done == 1;
}

struct OpenStage {  // a stage in work: tiles given away, tiles not done, and the first whose result is not added yet
    int64_t number, given = 0, left;
    std::atomic<int64_t> next{0};
    std::vector<char> ready;
    std::vector<void *> blocks;
    std::vector<Slot> slots;
    std::mutex lock;
};

typedef std::chrono::steady_clock Clock;
static const auto PATIENCE = std::chrono::milliseconds(50);
static const auto ATTENTION = std::chrono::microseconds(200);

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() asm volatile("yield")
#else
#define RELAX()
#endif

struct Scheduler {
    const Stage *stages;  // of stage `start` on
    int64_t start, stop, max_in_flight, most;
    void *const *table;
    const Library &library;
    Calls calls;
    int64_t base;
    std::vector<char> done;
    std::vector<std::unique_ptr<OpenStage>> open;
    std::mutex lock;
    std::condition_variable changed, reached;
    int64_t idle = 0;
    std::atomic<int64_t> news{0};  // counts what may have given an idle thread something to do
    bool failed = false;
    int64_t met = 0, awaited = INT64_MAX;  // meetings that are over, and the stage before which all are waited for
    std::atomic<bool> short_of_memory{false};

    const Stage &stage(int64_t number) const { return stages[number - start]; }

    char *at(const BoundBytecode &bound, int64_t k) const {
        return (char *)table[bound.bases[2 * k]] + bound.bases[2 * k + 1];
    }

    ~Scheduler() {
        for (auto &opened : open) close(*opened);
    }

    // All below here with the lock held, unless said otherwise ------------------------------------

    void fail() {
        failed = true;
        news++;
        changed.notify_all();
        reached.notify_all();
    }

    bool begin() {
        for (int64_t k = base; k < stop && k < base + max_in_flight; k++) {
            const Stage &s = stage(k);
            bool waits = done[k - start] || s.meetings > met;
            for (auto &opened : open) waits |= opened->number == k;
            for (int64_t j = 0; j < s.waits && !waits; j++) waits = s.before[j] >= base && !done[s.before[j] - start];
            if (waits) continue;
            if ((!s.bound || s.flags & ROOM) && !ask(calls.begin, k)) return false;
            std::unique_ptr<OpenStage> made(new OpenStage);
            made->number = k;
            made->left = s.tiles;
            made->ready.resize(s.tiles);
            made->blocks.resize(s.tiles);
            if (s.after) {
                made->slots.resize(s.after->slots);
                for (int64_t j = 0; j < s.after->count; j++) made->slots[j].at = at(*s.after, j);
            }
            open.push_back(std::move(made));
        }
        return true;
    }

    bool may(const OpenStage &opened, Who who) const {
        const Stage &s = stage(opened.number);
        if (s.flags & MULTI_THREADED ? who == HELPER : who == WAITING) return false;
        return opened.given < s.tiles && opened.given - opened.next < most;
    }

    OpenStage *pick(Who who, int64_t &tile) {
        for (auto &opened : open)
            if (may(*opened, who)) {
                tile = opened->given++;
                return opened.get();
            }
        return nullptr;
    }

    // Whether any thread may begin a tile.
    bool more() const {
        for (auto &opened : open)
            if (may(*opened, HELPER)) return true;
        return false;
    }

    // Wake threads if there is more to do than the thread that asks will do itself.
    void wake() {
        news++;
        int64_t more = -1;
        bool multi_threaded = base >= stop;
        for (auto &opened : open) {
            const int64_t tiles = stage(opened->number).tiles - opened->given;
            more += tiles;
            multi_threaded |= tiles && stage(opened->number).flags & MULTI_THREADED;
        }
        if (multi_threaded || base >= awaited) reached.notify_all();
        if (multi_threaded) changed.notify_all();
        else for (; more > 0 && idle; more--) changed.notify_one();
    }

    bool finish(OpenStage *opened) {
        close(*opened);
        const int64_t number = opened->number;
        for (auto at = open.begin(); at != open.end(); ++at)
            if (at->get() == opened) {
                open.erase(at);
                break;
            }
        done[number - start] = 1;
        for (; base < stop && done[base - start]; base++)
            if (stage(base).flags & FREES && !ask(calls.free, base)) return false;
        return begin();
    }

    void close(OpenStage &opened) {
        for (Slot &slot : opened.slots) {
            if (slot.handle) library.remove(slot.handle);
            ::free(slot.block);
            slot = {nullptr, nullptr, nullptr};
        }
        for (void *&block : opened.blocks) {
            ::free(block);
            block = nullptr;
        }
    }

    // Without the lock ----------------------------------------------------------------------------

    bool run_tile(const BoundBytecode &bound, void *block) {
        std::vector<Slot> slots(bound.slots + 1);
        for (int64_t k = 0; k < bound.count; k++) slots[k].at = at(bound, k);
        slots[bound.count].at = (char *)block;
        Frame frame = {bound.words, slots.data(), library};
        const bool good = interpret(frame);
        for (int64_t k = bound.count + 1; k < bound.slots; k++) frame.drop(slots[k]);
        return good;
    }

    bool make(OpenStage &opened, int64_t tile) {
        const Stage &s = stage(opened.number);
        if (!s.bound) return ask(calls.tile, opened.number, tile, (void *)nullptr);
        const BoundBytecode &bound = s.bound[tile];
        void *block = nullptr;
        if (bound.bytes) {
            if (posix_memalign(&block, 64, bound.bytes)) {
                short_of_memory = true;
                return false;
            }
        }
        opened.blocks[tile] = block;
        return run_tile(bound, block) || ask(calls.tile, opened.number, tile, block);
    }

    // Add up results in the order of their tiles, whichever comes first; whether it went well, and was the last.
    bool put(OpenStage &opened, int64_t tile, bool &last) {
        const Stage &s = stage(opened.number);
        std::lock_guard<std::mutex> held(opened.lock);
        opened.ready[tile] = 1;
        for (; opened.next < s.tiles && opened.ready[opened.next]; opened.next++) {
            const int64_t k = opened.next;
            if (!s.bound) {
                if (!ask(calls.add, opened.number, k)) return false;
            } else if (s.after) {
                Slot &slot = opened.slots[s.after->count + k];
                slot = {(char *)opened.blocks[k], nullptr, opened.blocks[k]};
                opened.blocks[k] = nullptr;
                Frame frame = {s.after->words + s.marks[k], opened.slots.data(), library};
                if (!interpret(frame)) {
                    short_of_memory = true;
                    return false;
                }
            }
        }
        last = !--opened.left;
        return !last || s.bound || ask(calls.end, opened.number);
    }

    // Look out for news for a while, without the lock; whether there are any. Small stages follow each other faster than
    // the system wakes a thread.
    bool busily(std::unique_lock<std::mutex> &held) {
        const int64_t known = news;
        held.unlock();
        for (const auto begun = Clock::now(); news == known && Clock::now() - begun < ATTENTION;)
            for (int k = 0; k < 32 && news == known; k++) RELAX();
        held.lock();
        return news != known;
    }

    // Help until all stages before one are done.
    int run(Who who, int64_t until) {
        const bool own = who != HELPER;
        auto seen = Clock::now();
        std::unique_lock<std::mutex> held(lock);
        if (who == WAITING) awaited = until;
        while (!failed && base < until) {
            if (own && Clock::now() - seen > PATIENCE) {  // let the caller see what came meanwhile
                held.unlock();
                const bool good = ask(calls.poll);
                held.lock();
                if (!good) fail();
                seen = Clock::now();
                continue;
            }
            int64_t tile;
            OpenStage *opened = pick(who, tile);
            if (!opened && who == WAITING) {
                reached.wait_for(held, PATIENCE);
                continue;
            }
            if (!opened) {
                WATCH(nullptr);
                idle++;
                // A rank's owner has a meeting meanwhile, and needs the processor.
                if (awaited < INT64_MAX || !busily(held)) own ? (void)changed.wait_for(held, PATIENCE) : changed.wait(held);
                idle--;
                continue;
            }
            const bool multi_threaded = own && stage(opened->number).flags & MULTI_THREADED;
            held.unlock();
            bool last = false, good = (!multi_threaded || ask(calls.multi_threaded, 1)) && make(*opened, tile);
            if (multi_threaded && !ask(calls.multi_threaded, 0)) good = false;
            good = good && put(*opened, tile, last);
            held.lock();
            if (!good || (last && !finish(opened))) fail();
            else if (last) wake();
            else if (idle && more()) news++, changed.notify_one();  // it may have waited for this result
        }
        return failed ? 1 + short_of_memory : 0;
    }
};

extern "C" void *fullframe_scheduler_new(const Stage *stages, int64_t start, int64_t stop, int64_t max_in_flight, int64_t most,
                                    void *const *table, const Library *library, const Calls *calls) {
    std::unique_ptr<Scheduler> scheduler;
    try {
        scheduler.reset(new Scheduler{stages, start, stop, max_in_flight, most, table, *library, *calls, start});
        scheduler->done.resize(stop - start);
        std::lock_guard<std::mutex> held(scheduler->lock);
        if (!scheduler->begin()) scheduler->fail();
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
    return scheduler.release();
}

// 0 where all was done, 2 where there was no memory; else a function of the caller's has failed, or it called
// `fullframe_scheduler_fail`.
extern "C" int fullframe_scheduler_run(Scheduler *scheduler, int64_t who, int64_t until) {
    try {
        return scheduler->run((Who)who, until);
    } catch (const std::bad_alloc &) {
        scheduler->short_of_memory = true;
        std::lock_guard<std::mutex> held(scheduler->lock);
        scheduler->fail();
        return 2;
    }
}

// One more meeting is over. False where a function of the caller's has failed.
extern "C" int fullframe_scheduler_met(Scheduler *scheduler) {
    std::lock_guard<std::mutex> held(scheduler->lock);
    scheduler->met++;
    if (!scheduler->begin()) scheduler->fail();
    scheduler->news++;
    scheduler->changed.notify_all();
    return !scheduler->failed;
}

// Let no thread begin another tile.
extern "C" void fullframe_scheduler_fail(Scheduler *scheduler) {
    std::lock_guard<std::mutex> held(scheduler->lock);
    scheduler->fail();
}

extern "C" void fullframe_scheduler_delete(Scheduler *scheduler) { delete scheduler; }
