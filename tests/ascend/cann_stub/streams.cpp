// Streams and events that run later: each stream is a thread, and before each task it dawdles, as seeded.
#include "stub.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <sys/prctl.h>
#include <thread>

namespace stub {

using Clock = std::chrono::steady_clock;

namespace {

// CANN_STUB_DELAY: "<seed>:<microseconds>"; half of the tasks start at once, some after ten times as long.
struct Delays {
    std::atomic<std::uint64_t> seed{1};
    std::atomic<std::int64_t> most_us{100};

    Delays() {
        if (const char *given = std::getenv("CANN_STUB_DELAY")) {
            char *rest = nullptr;
            seed = std::strtoull(given, &rest, 10);
            if (*rest == ':') most_us = std::strtoll(rest + 1, nullptr, 10);
        }
    }
};

// Never destroyed, as the streams' threads outlive main.
Delays &delays = *new Delays;
std::mutex &lock = *new std::mutex;
std::condition_variable &progressed = *new std::condition_variable;  // of anything: a task that ended, an event that passed
int failed_with = 0;                 // of the first task that failed; the process's devices are then lost
std::string &failure = *new std::string;

struct EventState {
    std::uint64_t recorded = 0;
    std::uint64_t passed = 0;
    Clock::time_point when{};
};

}  // namespace

struct Stream {
    struct Item {
        std::string what;
        Task task;
    };

    const int number;
    const int device;
    std::deque<Item> tasks;
    bool is_busy = false;
    bool is_stopping = false;
    int code = 0;
    std::string text;
    std::mt19937_64 random;
    std::condition_variable arrived;  // a task, or the stream's end: its own, as there are dozens of streams
    std::thread thread;

    Stream(int number, int device)
        : number(number), device(device), random(delays.seed * 1000003 + number), thread([this] { run(); }) {}

    bool is_idle() const { return tasks.empty() && !is_busy; }

    void run();
    void dawdle();
};

struct Event {
    std::shared_ptr<EventState> state = std::make_shared<EventState>();
};

namespace {

thread_local Stream *running = nullptr;
std::set<Stream *> &streams = *new std::set<Stream *>;
std::map<int, Stream *> &default_streams = *new std::map<int, Stream *>;
int made = 0;

// Between its first two streams torch_npu starts the threads of its task queue. One of them looks every
// microsecond, for as long as the process lives, for something to free; threads inherit how exactly they wake.
void let_the_task_queue_rest(bool is_started_next) {
    constexpr unsigned long kSeldom = 5'000'000, kUsual = 50'000;  // nanoseconds
    prctl(PR_SET_TIMERSLACK, is_started_next ? kSeldom : kUsual, 0, 0, 0);
}

Stream *make_stream(int device) {
    if (made == 1) let_the_task_queue_rest(false);
    auto *stream = new Stream(made++, device);
    if (made == 1) let_the_task_queue_rest(true);
    streams.insert(stream);
    return stream;
}

// With `lock` held.
Stream *stream_of(void *given) {
    if (given != nullptr) {
        auto *stream = static_cast<Stream *>(given);
        return streams.count(stream) ? stream : nullptr;
    }
    if (current_device() < 0) return nullptr;
    Stream *&stream = default_streams[current_device()];
    if (stream == nullptr) stream = make_stream(current_device());
    return stream;
}

template <typename Predicate>
bool wait_until(std::unique_lock<std::mutex> &guard, int timeout_ms, Predicate predicate) {
    if (timeout_ms < 0) {
        progressed.wait(guard, predicate);
        return true;
    }
    return progressed.wait_for(guard, std::chrono::milliseconds(timeout_ms), predicate);
}

int report(int code, const std::string &text) { return fail(code, "%s", text.c_str()); }

int synchronize(void *given, int timeout_ms) {
    std::unique_lock<std::mutex> guard(lock);
    Stream *stream = stream_of(given);
    if (stream == nullptr) return fail(kInvalidParameter, "%p is no stream", given);
    if (!wait_until(guard, timeout_ms, [&] { return stream->is_idle() || stream->is_stopping; }))
        return fail(kStreamTimeout, "stream %d is not done after %d ms", stream->number, timeout_ms);
    return stream->code ? report(stream->code, stream->text) : kSuccess;
}

}  // namespace

void Stream::dawdle() {
    const std::int64_t most = delays.most_us;
    if (most <= 0) return;
    const std::uint64_t drawn = random();
    if (drawn % 2) return;
    std::int64_t microseconds = static_cast<std::int64_t>((drawn >> 8) % static_cast<std::uint64_t>(most + 1));
    if (drawn % 32 == 0) microseconds *= 10;
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

void Stream::run() {
    running = this;
    std::unique_lock<std::mutex> guard(lock);
    for (;;) {
        arrived.wait(guard, [this] { return is_stopping || !tasks.empty(); });
        if (is_stopping) return;
        Item item = std::move(tasks.front());
        tasks.pop_front();
        is_busy = true;
        const bool dropped = code != 0;
        guard.unlock();
        int result = kSuccess;
        if (!dropped) {
            dawdle();
            result = item.task();
        }
        item.task = nullptr;
        guard.lock();
        if (result != kSuccess && code == 0) {
            code = result;
            text = item.what + " on stream " + std::to_string(number) + ": " + recent_message();
            std::fprintf(stderr, "%s\n", text.c_str());  // the vendor's libraries write a log of their own
            if (failed_with == 0) {
                failed_with = code;
                failure = text;
            }
        }
        is_busy = false;
        progressed.notify_all();
    }
}

int enqueue(void *given, const char *what, Task task) {
    std::lock_guard<std::mutex> guard(lock);
    Stream *stream = stream_of(given);
    if (stream == nullptr) return fail(kInvalidParameter, "%s: %p is no stream", what, given);
    if (stream->code) return report(stream->code, stream->text);
    stream->tasks.push_back({what, std::move(task)});
    stream->arrived.notify_one();
    return kSuccess;
}

int synchronize_all(int timeout_ms) {
    std::unique_lock<std::mutex> guard(lock);
    const int device = current_device();
    const bool idle = wait_until(guard, timeout_ms, [&] {
        for (const Stream *stream : streams)
            if (stream->device == device && !stream->is_idle()) return false;
        return true;
    });
    if (!idle) return fail(kStreamTimeout, "device %d is not done after %d ms", device, timeout_ms);
    return failed_with ? report(failed_with, failure) : kSuccess;
}

bool must_stop() {
    std::lock_guard<std::mutex> guard(lock);
    return running != nullptr && running->is_stopping;
}

}  // namespace stub

using namespace stub;

// For tests: the delays of the tasks that follow.
API void cann_stub_set_delay(std::uint64_t seed, std::int64_t most_us) {
    std::lock_guard<std::mutex> guard(stub::lock);
    delays.seed = seed;
    delays.most_us = most_us;
    for (Stream *stream : streams) stream->random.seed(seed * 1000003 + stream->number);
}

// --- streams ---

API int aclrtCreateStream(void **stream) {
    if (current_device() < 0) return fail(kNoContext, "a stream is made by a thread that has set no device");
    std::lock_guard<std::mutex> guard(stub::lock);
    *stream = make_stream(current_device());
    return kSuccess;
}

API int aclrtCreateStreamWithConfig(void **stream, std::uint32_t, std::uint32_t) {
    return aclrtCreateStream(stream);
}

API int aclrtDestroyStreamForce(void *given) {
    std::lock_guard<std::mutex> guard(stub::lock);
    Stream *stream = stream_of(given);
    if (stream == nullptr) return fail(kInvalidParameter, "%p is no stream", given);
    stream->is_stopping = true;
    streams.erase(stream);
    stream->thread.detach();  // what it runs may wait for long; the stream itself is never freed
    stream->arrived.notify_one();
    progressed.notify_all();
    return kSuccess;
}

API int aclrtDestroyStream(void *given) {
    if (const int code = synchronize(given, -1)) return code;
    return aclrtDestroyStreamForce(given);
}

API int aclrtSynchronizeStream(void *stream) { return synchronize(stream, -1); }

API int aclrtSynchronizeStreamWithTimeout(void *stream, std::int32_t timeout_ms) {
    return synchronize(stream, timeout_ms);
}

API int aclrtSynchronizeDevice() { return synchronize_all(-1); }
API int aclrtSynchronizeDeviceWithTimeout(std::int32_t timeout_ms) { return synchronize_all(timeout_ms); }

API int aclrtStreamQuery(void *given, int *status) {
    std::lock_guard<std::mutex> guard(stub::lock);
    Stream *stream = stream_of(given);
    if (stream == nullptr) return fail(kInvalidParameter, "%p is no stream", given);
    if (stream->code) return report(stream->code, stream->text);
    *status = stream->is_idle() ? 0 : 1;
    return kSuccess;
}

API int aclrtStreamGetId(void *given, std::int32_t *number) {
    std::lock_guard<std::mutex> guard(stub::lock);
    Stream *stream = stream_of(given);
    if (stream == nullptr) return fail(kInvalidParameter, "%p is no stream", given);
    *number = stream->number;
    return kSuccess;
}

API int aclrtSetStreamFailureMode(void *, std::uint64_t) { return kSuccess; }
API int aclrtSetStreamOverflowSwitch(void *, std::uint32_t) { return kSuccess; }

API int aclrtGetStreamOverflowSwitch(void *, std::uint32_t *flag) {
    *flag = 0;
    return kSuccess;
}

API int aclrtLaunchHostFunc(void *stream, void (*function)(void *), void *arguments) {
    return enqueue(stream, "aclrtLaunchHostFunc", [=] {
        function(arguments);
        return static_cast<int>(kSuccess);
    });
}

API int aclmdlRICaptureGetInfo(void *, int *status, void **model) {
    *status = 0;  // nothing can be captured
    *model = nullptr;
    return kSuccess;
}

// --- events ---

API int aclrtCreateEventExWithFlag(void **event, std::uint32_t) {
    *event = new Event;
    return kSuccess;
}

API int aclrtCreateEventWithFlag(void **event, std::uint32_t flag) {
    return aclrtCreateEventExWithFlag(event, flag);
}

API int aclrtDestroyEvent(void *event) {
    delete static_cast<Event *>(event);
    return kSuccess;
}

API int aclrtRecordEvent(void *event, void *stream) {
    auto state = static_cast<Event *>(event)->state;
    std::uint64_t number;
    {
        std::lock_guard<std::mutex> guard(stub::lock);
        number = ++state->recorded;
    }
    return enqueue(stream, "aclrtRecordEvent", [=] {
        std::lock_guard<std::mutex> guard(stub::lock);
        state->passed = number;
        state->when = Clock::now();
        progressed.notify_all();
        return static_cast<int>(kSuccess);
    });
}

API int aclrtResetEvent(void *, void *) { return kSuccess; }

API int aclrtStreamWaitEvent(void *stream, void *event) {
    auto state = static_cast<Event *>(event)->state;
    std::uint64_t number;
    {
        std::lock_guard<std::mutex> guard(stub::lock);
        number = state->recorded;
    }
    return enqueue(stream, "aclrtStreamWaitEvent", [=] {
        Stream *self = running;
        std::unique_lock<std::mutex> guard(stub::lock);
        progressed.wait(guard, [&] { return state->passed >= number || self->is_stopping; });
        return static_cast<int>(kSuccess);
    });
}

API int aclrtQueryEventStatus(void *event, int *status) {
    std::lock_guard<std::mutex> guard(stub::lock);
    const auto &state = static_cast<Event *>(event)->state;
    *status = state->passed >= state->recorded ? 1 : 0;
    return kSuccess;
}

API int aclrtQueryEventWaitStatus(void *event, int *status) {
    int passed = 0;
    const int code = aclrtQueryEventStatus(event, &passed);
    *status = passed ? 0 : 1;
    return code;
}

API int aclrtSynchronizeEvent(void *event) {
    auto state = static_cast<Event *>(event)->state;
    std::unique_lock<std::mutex> guard(stub::lock);
    const std::uint64_t number = state->recorded;
    progressed.wait(guard, [&] { return state->passed >= number || failed_with != 0; });
    return state->passed >= number ? kSuccess : report(failed_with, failure);
}

API int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    std::lock_guard<std::mutex> guard(stub::lock);
    const auto &from = static_cast<Event *>(start)->state, &to = static_cast<Event *>(end)->state;
    if (from->passed == 0 || to->passed == 0) return fail(kInvalidParameter, "an event has not passed yet");
    *milliseconds = std::chrono::duration<float, std::milli>(to->when - from->when).count();
    return kSuccess;
}

API int aclrtEventGetTimestamp(void *event, std::uint64_t *microseconds) {
    std::lock_guard<std::mutex> guard(stub::lock);
    const auto since = static_cast<Event *>(event)->state->when.time_since_epoch();
    *microseconds = std::chrono::duration_cast<std::chrono::microseconds>(since).count();
    return kSuccess;
}
