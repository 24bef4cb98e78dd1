// Initialisation, devices, contexts, memory and errors, all in host memory of this process.
#include "stub.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <map>
#include <mutex>
#include <stdexcept>
#include <unistd.h>
#include <utility>

namespace stub {
namespace {

constexpr std::size_t kDeviceBytes = std::size_t{2} << 30;
constexpr unsigned char kPoison = 0xA5;

struct Allocation {
    std::size_t size;
    int device;  // -1: pinned host memory
};

// Never destroyed, as the streams' threads outlive main.
std::mutex &lock = *new std::mutex;
auto &allocations = *new std::map<std::uintptr_t, Allocation>;
auto &used = *new std::map<int, std::size_t>;
thread_local std::string message;
thread_local int device_of_thread = -1;

int device_count() {
    const char *given = std::getenv("CANN_STUB_DEVICES");
    return given ? std::atoi(given) : 4;
}

const Allocation *holding(const void *address, std::size_t size) {
    const auto start = reinterpret_cast<std::uintptr_t>(address);
    auto after = allocations.upper_bound(start);
    if (after == allocations.begin()) return nullptr;
    --after;
    return start + size <= after->first + after->second.size ? &after->second : nullptr;
}

int allocate(void **address, std::size_t size, int device) {
    std::lock_guard<std::mutex> guard(lock);
    if (device >= 0 && used[device] + size > kDeviceBytes)
        return fail(kOutOfMemory, "device %d has %zu bytes, %zu are in use, %zu more were asked for", device,
                    kDeviceBytes, used[device], size);
    void *made = nullptr;
    if (posix_memalign(&made, 4096, size ? size : 1)) return fail(kOutOfMemory, "host has no %zu bytes", size);
    std::memset(made, kPoison, size);
    allocations[reinterpret_cast<std::uintptr_t>(made)] = {size, device};
    if (device >= 0) used[device] += size;
    *address = made;
    return kSuccess;
}

// The memory itself is kept: a task that still writes to it spoils nothing else.
int release(void *address, bool is_device) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = allocations.find(reinterpret_cast<std::uintptr_t>(address));
    if (found == allocations.end() || (found->second.device >= 0) != is_device)
        return fail(kInvalidParameter, "%p was not allocated on the %s", address, is_device ? "device" : "host");
    if (is_device) used[found->second.device] -= found->second.size;
    std::memset(address, ~kPoison, found->second.size);
    allocations.erase(found);
    return kSuccess;
}

enum CopyKind { kHostToHost, kHostToDevice, kDeviceToHost, kDeviceToDevice, kDefault };

int check_copy(void *target, std::size_t room, const void *source, std::size_t count, int kind) {
    if (count > room) return fail(kInvalidParameter, "%zu bytes are copied to a place of %zu", count, room);
    const bool to = on_device(target, count), from = on_device(source, count);
    const bool fits = kind == kHostToHost       ? !to && !from
                      : kind == kHostToDevice   ? to && !from
                      : kind == kDeviceToHost   ? !to && from
                      : kind == kDeviceToDevice ? to && from
                                                : kind == kDefault;
    if (fits || count == 0) return kSuccess;
    return fail(kInvalidParameter, "a copy of kind %d has its target %s and its source %s the device", kind,
                to ? "on" : "off", from ? "on" : "off");
}

}  // namespace

int fail(int code, const char *format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const bool has_code = text[0] == 'E' && std::strlen(text) > 6 && text[6] == ':';  // as "EI0006: ..."
    message = has_code ? text : "EZ9999: [cann_stub] " + std::string(text);
    return code;
}

std::string recent_message() { return std::exchange(message, {}); }

std::string quoted(const std::string &text) {
    std::string made = "\"";
    for (const char letter : text) {
        if (letter == '"' || letter == '\\') made += '\\';
        if (static_cast<unsigned char>(letter) >= ' ') made += letter;
    }
    return made + '"';
}

void record(const char *call, const std::string &fields) {
    static const char *folder = std::getenv("CANN_STUB_RECORD");
    if (folder == nullptr) return;
    const std::string path = std::string(folder) + "/" + std::to_string(getpid()) + ".jsonl";
    const std::string line = "{\"call\": " + quoted(call) + (fields.empty() ? "" : ", ") + fields + "}\n";
    const int file = open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0 || write(file, line.data(), line.size()) < 0) std::perror("cann_stub: record");
    if (file >= 0) close(file);
}

int current_device() { return device_of_thread; }

bool on_device(const void *address, std::size_t size) {
    std::lock_guard<std::mutex> guard(lock);
    const Allocation *found = holding(address, size);
    return found != nullptr && found->device >= 0;
}

}  // namespace stub

using namespace stub;

// --- the process ---

API int aclInit(const char *) { return kSuccess; }
API int aclFinalize() { return kSuccess; }
API const char *aclrtGetSocName() { return "Ascend910B1"; }
API void aclAppLog(int, const char *, const char *, std::uint32_t, const char *, ...) {}
API int aclmdlInitDump() { return kSuccess; }
API int aclmdlSetDump(const char *) { return kSuccess; }
API int aclmdlFinalizeDump() { return kSuccess; }

API const char *aclGetRecentErrMsg() {
    thread_local std::string given;
    given = recent_message();
    return given.empty() ? nullptr : given.c_str();
}

API int aclGetDeviceCapability(std::uint32_t, int what, std::int64_t *value) {
    constexpr std::int64_t values[] = {20, 40, 192 << 20};  // cube cores, vector cores, bytes of cache
    if (what < 0 || what > 2) return fail(kInvalidParameter, "no capability %d", what);
    *value = values[what];
    return kSuccess;
}

API int aclGetCannAttributeList(const int **attributes, std::size_t *number) {
    static const int known[] = {0, 1, 2};  // infinities and NaN, bfloat16, no compilation while running
    *attributes = known;
    *number = 3;
    return kSuccess;
}

API int aclGetCannAttribute(int, std::int32_t *value) {
    *value = 1;
    return kSuccess;
}

// Of every package: CANN_STUB_VERSION, as torch_npu takes other ways from some versions on.
API int aclsysGetVersionStr(const char *, char *version) {
    const char *given = std::getenv("CANN_STUB_VERSION");
    std::strcpy(version, given ? given : "9.0.0");
    return kSuccess;
}

struct PackageVersion {
    char version[128];
    char parts[4][64];
    char reserved[128];
};

API int aclsysGetCANNVersion(int, PackageVersion *version) {
    *version = {};
    aclsysGetVersionStr(nullptr, version->version);
    std::sscanf(version->version, "%63[^.].%63[^.].%63s", version->parts[0], version->parts[1], version->parts[2]);
    return kSuccess;
}

// --- devices and contexts ---

API int aclrtGetDeviceCount(std::uint32_t *count) {
    *count = static_cast<std::uint32_t>(device_count());
    return kSuccess;
}

API int aclrtSetDevice(std::int32_t device) {
    if (device < 0 || device >= device_count())
        return fail(kInvalidParameter, "device %d is not one of %d", device, device_count());
    device_of_thread = device;
    return kSuccess;
}

API int aclrtResetDevice(std::int32_t) {
    device_of_thread = -1;
    return kSuccess;
}

API int aclrtGetDevice(std::int32_t *device) {
    if (device_of_thread < 0) return fail(kNoContext, "this thread has set no device");
    *device = device_of_thread;
    return kSuccess;
}

// A context is its device's number plus one.
API int aclrtGetCurrentContext(void **context) {
    if (device_of_thread < 0) return fail(kNoContext, "this thread has set no device");
    *context = reinterpret_cast<void *>(static_cast<std::intptr_t>(device_of_thread) + 1);
    return kSuccess;
}

API int aclrtSetCurrentContext(void *context) {
    return aclrtSetDevice(static_cast<std::int32_t>(reinterpret_cast<std::intptr_t>(context) - 1));
}

API int aclrtGetPrimaryCtxState(std::int32_t, std::uint32_t *flags, std::int32_t *active) {
    *flags = 0;
    *active = 1;
    return kSuccess;
}

API int aclrtDeviceCanAccessPeer(std::int32_t *can, std::int32_t, std::int32_t) {
    *can = 1;
    return kSuccess;
}

API int aclrtDeviceEnablePeerAccess(std::int32_t, std::uint32_t) { return kSuccess; }
API int aclrtSetOpWaitTimeout(std::uint32_t) { return kSuccess; }
API int aclrtSetOpExecuteTimeOut(std::uint32_t) { return kSuccess; }
API int aclrtSetDeviceSatMode(int) { return kSuccess; }
API int aclrtCtxSetSysParamOpt(int, std::int64_t) { return kSuccess; }
API int aclrtSetSysParamOpt(int, std::int64_t) { return kSuccess; }

API int aclrtGetSysParamOpt(int, std::int64_t *value) {
    *value = 0;
    return kSuccess;
}

API int aclrtPeekAtLastError(int) { return kSuccess; }
API int aclrtGetLastError(int) { return kSuccess; }

// --- memory ---

API int aclrtMalloc(void **address, std::size_t size, int) {
    if (device_of_thread < 0) return fail(kNoContext, "memory is asked for by a thread that has set no device");
    return allocate(address, size, device_of_thread);
}

API int aclrtMallocAlign32(void **address, std::size_t size, int policy) {
    return aclrtMalloc(address, size, policy);
}

API int aclrtFree(void *address) { return release(address, true); }
API int aclrtMallocHost(void **address, std::size_t size) { return allocate(address, size, -1); }

API int aclrtMallocHostWithCfg(void **address, std::uint64_t size, void *) {
    return allocate(address, size, -1);
}

API int aclrtFreeHost(void *address) { return release(address, false); }

API int aclrtGetMemInfo(int, std::size_t *free, std::size_t *total) {
    std::lock_guard<std::mutex> guard(stub::lock);
    *total = kDeviceBytes;
    *free = kDeviceBytes - used[device_of_thread];
    return kSuccess;
}

struct PointerAttributes {
    std::uint32_t device;
    int place;  // 0 host, 1 device, 2 not known
    std::uint32_t page;
    std::uint32_t reserved[4];
};

API int aclrtPointerGetAttributes(const void *address, PointerAttributes *attributes) {
    std::lock_guard<std::mutex> guard(stub::lock);
    const Allocation *found = holding(address, 1);
    *attributes = {};
    attributes->place = found == nullptr ? 2 : found->device < 0 ? 0 : 1;
    if (found != nullptr && found->device >= 0) attributes->device = found->device;
    return kSuccess;
}

API int aclrtMemcpy(void *target, std::size_t room, const void *source, std::size_t count, int kind) {
    if (const int code = check_copy(target, room, source, count, kind)) return code;
    std::memcpy(target, source, count);
    return kSuccess;
}

API int aclrtMemcpyAsync(void *target, std::size_t room, const void *source, std::size_t count, int kind,
                         void *stream) {
    if (const int code = check_copy(target, room, source, count, kind)) return code;
    return enqueue(stream, "aclrtMemcpyAsync", [=] {
        std::memcpy(target, source, count);
        return static_cast<int>(kSuccess);
    });
}

API int aclrtMemset(void *target, std::size_t room, std::int32_t value, std::size_t count) {
    if (count > room) return fail(kInvalidParameter, "%zu bytes are set in a place of %zu", count, room);
    std::memset(target, value, count);
    return kSuccess;
}

API int aclrtMemsetAsync(void *target, std::size_t room, std::int32_t value, std::size_t count, void *stream) {
    if (count > room) return fail(kInvalidParameter, "%zu bytes are set in a place of %zu", count, room);
    return enqueue(stream, "aclrtMemsetAsync", [=] {
        std::memset(target, value, count);
        return static_cast<int>(kSuccess);
    });
}

// What the libraries ask for and the stub does not have.
extern "C" long cann_stub_refuse(const char *symbol) {
    std::fprintf(stderr, "cann_stub: %s was called, which the stub does not have\n", symbol);
    return fail(kUnsupported, "%s was called, which the stub does not have", symbol);
}

extern "C" long cann_stub_throw(const char *symbol) {
    cann_stub_refuse(symbol);
    throw std::runtime_error(recent_message());
}
