
// Many tapes as one call: the tiles of a range of steps, several steps in flight, and what adds up their results.
//
// Every thread that helps calls `fullframe_flow_run`. A step without tapes is the caller's to make, by its functions;
// so is a tile whose tape fails. What each sum adds up, and in which order, does not depend on the threads.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

struct Track {  // a tape: its instructions, which arrays of the table it is given, its places, and its results
    const int64_t *words, *bases;
    int64_t count, slots, bytes;
};

struct Stage {  // a step: those it waits for, its tiles, and what adds up their results, from a mark for each on
    const int64_t *before;
    int64_t waits, tiles, flags;
    const Track *tracks, *after;
    const int64_t *marks;
};

enum Flag { ROOM = 1, FREES = 2, WIDE = 4 };

// Of the caller: each says by its last argument that it came to its end, and was not left by an exception.
struct Calls {
    void (*begin)(int64_t step, int64_t *done);
    void (*tile)(int64_t step, int64_t tile, void *results, int64_t *done);
    void (*add)(int64_t step, int64_t tile, int64_t *done);
    void (*end)(int64_t step, int64_t *done);
    void (*free)(int64_t step, int64_t *done);
    void (*wide)(int64_t on, int64_t *done);
    void (*look)(int64_t *done);
};

template <typename... A, typename... B> static bool ask(void (*call)(A...), B... given) {
    int64_t done = 0;
    call(given..., &done);
    return done == 1;
}

struct Open {  // a step in work: tiles given away, tiles not done, and the first whose result is not added yet
    int64_t number, given = 0, left;
    std::atomic<int64_t> next{0};
    std::vector<char> ready;
    std::vector<void *> blocks;
    std::vector<Slot> slots;
    std::mutex lock;
};

typedef std::chrono::steady_clock Clock;
static const auto PATIENCE = std::chrono::milliseconds(50);

struct Flow {
    const Stage *stages;  // of step `start` on
    int64_t start, stop, ahead, most;
    void *const *table;
    const Library &library;
    Calls calls;
    int64_t base;
    std::vector<char> done;
    std::vector<std::unique_ptr<Open>> open;
    std::mutex lock;
    std::condition_variable changed;
    int64_t idle = 0;
    bool failed = false;
    std::atomic<bool> short_of_memory{false};

    const Stage &stage(int64_t number) const { return stages[number - start]; }

    ~Flow() {
        for (auto &step : open) close(*step);
    }

    // All below here with the lock held, unless said otherwise ------------------------------------

    void fail() {
        failed = true;
        changed.notify_all();
    }

    bool begin() {
        for (int64_t k = base; k < stop && k < base + ahead; k++) {
            const Stage &s = stage(k);
            bool waits = done[k - start];
            for (auto &step : open) waits |= step->number == k;
            for (int64_t j = 0; j < s.waits && !waits; j++) waits = s.before[j] >= base && !done[s.before[j] - start];
            if (waits) continue;
            if ((!s.tracks || s.flags & ROOM) && !ask(calls.begin, k)) return false;
            std::unique_ptr<Open> made(new Open);
            made->number = k;
            made->left = s.tiles;
            made->ready.resize(s.tiles);
            made->blocks.resize(s.tiles);
            if (s.after) {
                made->slots.resize(s.after->slots);
                for (int64_t j = 0; j < s.after->count; j++) made->slots[j].at = (char *)table[s.after->bases[j]];
            }
            open.push_back(std::move(made));
        }
        return true;
    }

    bool may(const Open &step, bool own) const {
        const Stage &s = stage(step.number);
        return step.given < s.tiles && (own || !(s.flags & WIDE)) && step.given - step.next < most;
    }

    Open *pick(bool own, int64_t &tile) {
        for (auto &step : open)
            if (may(*step, own)) {
                tile = step->given++;
                return step.get();
            }
        return nullptr;
    }

    // Whether any thread may begin a tile.
    bool more() const {
        for (auto &step : open)
            if (may(*step, false)) return true;
        return false;
    }

    // Wake threads if there is more to do than the thread that asks will do itself.
    void wake() {
        int64_t more = -1;
        bool wide = base >= stop;
        for (auto &step : open) {
            const int64_t tiles = stage(step->number).tiles - step->given;
            more += tiles;
            wide |= tiles && stage(step->number).flags & WIDE;
        }
        if (wide) changed.notify_all();
        else for (; more > 0 && idle; more--) changed.notify_one();
    }

    bool finish(Open *step) {
        close(*step);
        const int64_t number = step->number;
        for (auto at = open.begin(); at != open.end(); ++at)
            if (at->get() == step) {
                open.erase(at);
                break;
            }
        done[number - start] = 1;
        for (; base < stop && done[base - start]; base++)
            if (stage(base).flags & FREES && !ask(calls.free, base)) return false;
        return begin();
    }

    void close(Open &step) {
        for (Slot &slot : step.slots) {
            if (slot.handle) library.remove(slot.handle);
            ::free(slot.block);
            slot = {nullptr, nullptr, nullptr};
        }
        for (void *&block : step.blocks) {
            ::free(block);
            block = nullptr;
        }
    }

    // Without the lock ----------------------------------------------------------------------------

    bool play_tile(const Track &track, void *block) {
        std::vector<Slot> slots(track.slots + 1);
        for (int64_t k = 0; k < track.count; k++) slots[k].at = (char *)table[track.bases[k]];
        slots[track.count].at = (char *)block;
        Tape tape = {track.words, slots.data(), library};
        const bool good = play(tape);
        for (int64_t k = track.count + 1; k < track.slots; k++) tape.drop(slots[k]);
        return good;
    }

    bool make(Open &step, int64_t tile) {
        const Stage &s = stage(step.number);
        if (!s.tracks) return ask(calls.tile, step.number, tile, (void *)nullptr);
        const Track &track = s.tracks[tile];
        void *block = nullptr;
        if (track.bytes) {
            if (posix_memalign(&block, 64, track.bytes)) {
                short_of_memory = true;
                return false;
            }
            memset(block, 0, track.bytes);
        }
        step.blocks[tile] = block;
        return play_tile(track, block) || ask(calls.tile, step.number, tile, block);
    }

    // Add up results in the order of their tiles, whichever comes first; whether it went well, and was the last.
    bool put(Open &step, int64_t tile, bool &last) {
        const Stage &s = stage(step.number);
        std::lock_guard<std::mutex> held(step.lock);
        step.ready[tile] = 1;
        for (; step.next < s.tiles && step.ready[step.next]; step.next++) {
            const int64_t k = step.next;
            if (!s.tracks) {
                if (!ask(calls.add, step.number, k)) return false;
            } else if (s.after) {
                Slot &slot = step.slots[s.after->count + k];
                slot = {(char *)step.blocks[k], nullptr, step.blocks[k]};
                step.blocks[k] = nullptr;
                Tape tape = {s.after->words + s.marks[k], step.slots.data(), library};
                if (!play(tape)) {
                    short_of_memory = true;
                    return false;
                }
            }
        }
        last = !--step.left;
        return !last || s.tracks || ask(calls.end, step.number);
    }

    int run(bool own) {
        auto seen = Clock::now();
        std::unique_lock<std::mutex> held(lock);
        while (!failed && base < stop) {
            if (own && Clock::now() - seen > PATIENCE) {  // let the caller see what came meanwhile
                held.unlock();
                const bool good = ask(calls.look);
                held.lock();
                if (!good) fail();
                seen = Clock::now();
                continue;
            }
            int64_t tile;
            Open *step = pick(own, tile);
            if (!step) {
                WATCH(nullptr);
                idle++;
                if (own) changed.wait_for(held, PATIENCE);
                else changed.wait(held);
                idle--;
                continue;
            }
            const bool wide = own && stage(step->number).flags & WIDE;
            held.unlock();
            bool last = false, good = (!wide || ask(calls.wide, 1)) && make(*step, tile);
            if (wide && !ask(calls.wide, 0)) good = false;
            good = good && put(*step, tile, last);
            held.lock();
            if (!good || (last && !finish(step))) fail();
            else if (last) wake();
            else if (idle && more()) changed.notify_one();  // it may have waited for this result
        }
        return failed ? 1 + short_of_memory : 0;
    }
};

extern "C" void *fullframe_flow_new(const Stage *stages, int64_t start, int64_t stop, int64_t ahead, int64_t most,
                                    void *const *table, const Library *library, const Calls *calls) {
    std::unique_ptr<Flow> flow;
    try {
        flow.reset(new Flow{stages, start, stop, ahead, most, table, *library, *calls, start});
        flow->done.resize(stop - start);
        std::lock_guard<std::mutex> held(flow->lock);
        if (!flow->begin()) flow->fail();
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
    return flow.release();
}

// 0 where all was done, 2 where there was no memory; else a function of the caller's has failed, or it called
// `fullframe_flow_fail`.
extern "C" int fullframe_flow_run(Flow *flow, int64_t own) {
    try {
        return flow->run(own);
    } catch (const std::bad_alloc &) {
        flow->short_of_memory = true;
        std::lock_guard<std::mutex> held(flow->lock);
        flow->fail();
        return 2;
    }
}

// Let no thread begin another tile.
extern "C" void fullframe_flow_fail(Flow *flow) {
    std::lock_guard<std::mutex> held(flow->lock);
    flow->fail();
}

extern "C" void fullframe_flow_delete(Flow *flow) { delete flow; }
