// What the parts of the stub share: errors with a text, allocations, streams and the record of calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define API extern "C" __attribute__((visibility("default")))

namespace stub {

// Codes of the vendor's that torch_npu tells apart.
enum : int {
    kSuccess = 0,
    kInvalidParameter = 107000,
    kNoContext = 107002,
    kStreamTimeout = 107020,
    kTaskAborted = 107022,
    kOutOfMemory = 207001,
    kUnsupported = 500001,  // not 207000: of that one torch_npu only warns
    kStreamFailed = 507899,
    kInternal = 500000,
};

// Keeps the text for aclGetRecentErrMsg of this thread, and gives the code back.
__attribute__((format(printf, 2, 3))) int fail(int code, const char *format, ...);
std::string recent_message();

// One line of JSON in the folder CANN_STUB_RECORD, if it is set: {"call": name, <fields>}.
void record(const char *call, const std::string &fields);
std::string quoted(const std::string &text);

// --- memory (runtime.cpp) ---

int current_device();  // -1 where this thread has none
// Whether [address, address + size) lies in one allocation of a device.
bool on_device(const void *address, std::size_t size);

// --- streams (streams.cpp) ---

struct Stream;

// A task gives 0, or an error code after `fail`; then the stream fails, and what follows on it is dropped.
using Task = std::function<int()>;
// `stream` as torch_npu gives it; null is the default stream of this thread's device.
int enqueue(void *stream, const char *what, Task task);
int synchronize_all(int timeout_ms);
// For a task that waits: whether its stream is being given up.
bool must_stop();

}  // namespace stub
