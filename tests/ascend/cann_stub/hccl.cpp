// HCCL between processes: messages are files in a folder that the ranks share, each written whole and renamed.
//
// A send ends when its receiver has taken the message, as HCCL's does: ranks that call in different orders wait for
// each other until the time-out, or are told so where the two calls that meet do not fit.
#include "mailbox.h"
#include "stub.h"
#include "values.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace stub {
namespace {

enum Result : int { kOk, kParameter, kPointer, kNotSupported = 5, kTimeout = 9, kCommunication = 19 };
enum Reduction { kSum, kProduct, kMost, kLeast };

constexpr std::size_t kRootBytes = 4108;
constexpr std::uint32_t kNotSet = 0xFFFFFFFFu;

// As long as what torch_npu passes; the first 24 bytes say how long it is, and of which version.
struct Config {
    std::uint64_t size;
    std::uint32_t magic;
    std::uint32_t version;
    std::uint64_t reserved;
    std::uint32_t buffer_size;
    std::uint32_t deterministic;
    char comm_name[128];
    char udi[128];
    std::uint32_t op_expansion_mode;
    std::uint32_t traffic_class;
    std::uint32_t service_level;
    std::uint32_t world_rank_id;
    std::uint64_t job_id;
    std::uint8_t zero_copy;
    std::int32_t exec_timeout;
    char algo[1600];
    char retry_enable[50];
    char retry_params[128];
    char buffer_name[128];
    std::uint32_t qos;
    std::uint64_t window_size;
};

// HCCL's number of a type -> the number that operators have for it.
int type_of(int data_type) {
    static const std::map<int, int> types = {{0, kInt8},  {1, kInt16},  {2, kInt32},   {3, kHalf},   {4, kFloat},
                                             {5, kInt64}, {7, kUint8},  {10, kDouble}, {11, kBfloat}};
    const auto found = types.find(data_type);
    return found == types.end() ? -1 : found->second;
}

struct Comm {
    std::string name;
    std::uint32_t rank;
    std::uint32_t size;
    int timeout_s;
    Mailbox mailbox;
    std::vector<std::uint64_t> sent, received;  // calls so far, for each peer; counted when they are called
    std::atomic<bool> is_closed{false};
    std::atomic<int> error{kOk};

    Deadline deadline() const { return std::chrono::steady_clock::now() + std::chrono::seconds(timeout_s); }
    bool gives_up() const { return is_closed || must_stop(); }
};

using CommPointer = std::shared_ptr<Comm>;

std::mutex &lock = *new std::mutex;
auto &communicators = *new std::map<void *, CommPointer>;

CommPointer find(void *handle) {
    std::lock_guard<std::mutex> guard(lock);
    const auto found = communicators.find(handle);
    return found == communicators.end() ? nullptr : found->second;
}

int seconds_from(const char *variable, int otherwise) {
    const char *given = std::getenv(variable);
    return given ? std::atoi(given) : otherwise;
}

// --- what a stream does ---

struct Transfer {
    bool is_send;
    char *data;
    std::size_t bytes;
    std::uint32_t peer;
    Label label;
};

int lost(const CommPointer &comm, const std::string &what) {
    if (comm->gives_up()) return kSuccess;  // destroyed by this process, which asks for the data no more
    comm->error = kTimeout;
    return fail(kStreamFailed,
                "EI0002: rank %u of %s: %s: no answer within %d s. Check that every rank makes the same calls in the "
                "same order, and HCCL_EXEC_TIMEOUT",
                comm->rank, comm->name.c_str(), what.c_str(), comm->timeout_s);
}

std::string described(const Transfer &transfer, const Label &label) {
    return label.call + (transfer.is_send ? " to rank " : " from rank ") + std::to_string(transfer.peer) + ", " +
           std::to_string(label.count) + " of type " + std::to_string(label.data_type);
}

// Everything is sent before anything is waited for.
int run_transfers(const CommPointer &comm, const std::vector<Transfer> &transfers) {
    const auto give_up = [comm] { return comm->gives_up(); };
    const Deadline deadline = comm->deadline();
    for (const Transfer &transfer : transfers)
        if (transfer.is_send) comm->mailbox.put(transfer.peer, transfer.label, transfer.data, transfer.bytes);
    for (const Transfer &transfer : transfers) {
        if (transfer.is_send) continue;
        Label arrived;
        if (!comm->mailbox.take(transfer.peer, transfer.label, transfer.data, transfer.bytes, deadline, give_up,
                                &arrived))
            return lost(comm, described(transfer, transfer.label));
        if (arrived.call != transfer.label.call || arrived.count != transfer.label.count ||
            arrived.data_type != transfer.label.data_type) {
            comm->error = kCommunication;
            return fail(kStreamFailed, "EI0005: rank %u of %s: %s was called, and that rank's call is %s",
                        comm->rank, comm->name.c_str(), described(transfer, transfer.label).c_str(),
                        described(transfer, arrived).c_str());
        }
    }
    for (const Transfer &transfer : transfers)
        if (transfer.is_send && !comm->mailbox.was_taken(transfer.peer, transfer.label, deadline, give_up))
            return lost(comm, described(transfer, transfer.label));
    return kSuccess;
}

// --- what a thread calls ---

std::string fields_of(const Comm &comm, std::uint64_t count, int data_type) {
    return "\"comm\": " + quoted(comm.name) + ", \"rank\": " + std::to_string(comm.rank) +
           ", \"count\": " + std::to_string(count) + ", \"data_type\": " + std::to_string(data_type);
}

int refuse(Result result, const std::string &text) {
    fail(kInvalidParameter, "%s", text.c_str());
    return result;
}

int check(const CommPointer &comm, const char *call, const void *buffer, std::uint64_t count, int data_type) {
    if (comm == nullptr) return refuse(kPointer, std::string(call) + ": no such communicator");
    if (type_of(data_type) < 0) return refuse(kParameter, std::string(call) + ": data type " + std::to_string(data_type));
    const std::size_t bytes = count * bytes_of(type_of(data_type));
    if (bytes && !on_device(buffer, bytes))
        return refuse(kParameter, std::string(call) + ": " + std::to_string(bytes) + " bytes do not lie in memory of the device");
    return kOk;
}

Transfer transfer(Comm &comm, const char *call, bool is_send, const void *buffer, std::uint64_t count, int data_type,
                  std::uint32_t peer) {
    const std::uint64_t number = is_send ? comm.sent[peer]++ : comm.received[peer]++;
    auto *data = static_cast<char *>(const_cast<void *>(buffer));
    return {is_send, data, count * bytes_of(type_of(data_type)), peer, {call, number, count, data_type}};
}

int launch(const CommPointer &comm, const char *call, void *stream, Task task) {
    (void)comm;
    return enqueue(stream, call, std::move(task)) == kSuccess ? kOk : kCommunication;
}

// Between HcclGroupStart and HcclGroupEnd: sends and receives that go together.
struct Group {
    CommPointer comm;
    void *stream;
    std::vector<Transfer> transfers;
};

thread_local int depth = 0;
thread_local std::vector<Group> groups;

int point_to_point(const char *call, bool is_send, void *buffer, std::uint64_t count, int data_type,
                   std::uint32_t peer, void *handle, void *stream) {
    const CommPointer comm = find(handle);
    if (const int result = check(comm, call, buffer, count, data_type)) return result;
    if (peer >= comm->size || peer == comm->rank)
        return refuse(kParameter, std::string(call) + ": rank " + std::to_string(peer) + " is no peer");
    record(call, fields_of(*comm, count, data_type) + ", \"peer\": " + std::to_string(peer) +
                     ", \"grouped\": " + (depth ? "true" : "false"));
    const Transfer one = transfer(*comm, "point to point", is_send, buffer, count, data_type, peer);
    if (depth == 0) return launch(comm, call, stream, [=] { return run_transfers(comm, {one}); });
    for (Group &group : groups)
        if (group.comm == comm && group.stream == stream) {
            group.transfers.push_back(one);
            return kOk;
        }
    groups.push_back({comm, stream, {one}});
    return kOk;
}

long double reduced(long double left, long double right, int reduction) {
    switch (reduction) {
        case kSum: return left + right;
        case kProduct: return left * right;
        case kMost: return std::max(left, right);
        default: return std::min(left, right);
    }
}

// What every rank has sent, [ranks, bytes], in `gathered`.
std::vector<Transfer> all_to_all_ranks(Comm &comm, const char *call, const void *own, char *gathered,
                                       std::uint64_t count, int data_type) {
    const std::size_t bytes = count * bytes_of(type_of(data_type));
    std::vector<Transfer> transfers;
    for (std::uint32_t peer = 0; peer < comm.size; ++peer) {
        if (peer == comm.rank) continue;
        transfers.push_back(transfer(comm, call, true, own, count, data_type, peer));
        transfers.push_back(transfer(comm, call, false, gathered + peer * bytes, count, data_type, peer));
    }
    return transfers;
}

std::string text_of(const char *characters, std::size_t size) {
    return quoted(std::string(characters, strnlen(characters, size)));
}

std::string fields_of(const Config &config) {
    const auto number = [](const char *name, std::uint64_t value) {
        return ", \"" + std::string(name) + "\": " + (value == kNotSet ? "null" : std::to_string(value));
    };
    return "\"hccl_algo\": " + text_of(config.algo, sizeof config.algo) +
           ", \"group_name\": " + text_of(config.udi, sizeof config.udi) +
           ", \"hccl_buffer_name\": " + text_of(config.buffer_name, sizeof config.buffer_name) +
           ", \"hccl_retry_enable\": " + text_of(config.retry_enable, sizeof config.retry_enable) +
           ", \"hccl_retry_params\": " + text_of(config.retry_params, sizeof config.retry_params) +
           number("hccl_buffer_size", config.buffer_size) +
           number("hccl_op_expansion_mode", config.op_expansion_mode) +
           number("hccl_exec_timeout", static_cast<std::uint32_t>(config.exec_timeout)) +
           number("hccl_world_rank_id", config.world_rank_id) + number("hccl_job_id", config.job_id) +
           number("hccl_sdma_qos", config.qos) + number("qos_traffic_class", config.traffic_class) +
           number("qos_service_level", config.service_level) +
           number("hccl_sym_win_max_mem_size_per_rank", config.window_size) +
           ", \"version\": " + std::to_string(config.version);
}

int join(const char *call, std::uint32_t size, const char *root, std::uint32_t rank, const Config *config, void **handle) {
    const std::string folder(root, strnlen(root, kRootBytes));
    record(call, "\"ranks\": " + std::to_string(size) + ", \"rank\": " + std::to_string(rank) +
                     (config ? ", \"config\": {" + fields_of(*config) + "}" : ""));
    if (folder.empty() || rank >= size) return refuse(kParameter, "the root's information is empty, or the rank is too high");
    int timeout_s = seconds_from("HCCL_EXEC_TIMEOUT", 1836);
    if (config && config->exec_timeout > 0) timeout_s = config->exec_timeout;
    auto comm = std::make_shared<Comm>();
    comm->name = folder.substr(folder.rfind('/') + 1);
    comm->rank = rank;
    comm->size = size;
    comm->timeout_s = timeout_s;
    comm->sent.assign(size, 0);
    comm->received.assign(size, 0);
    comm->mailbox = Mailbox(folder, rank);
    const int connect_s = seconds_from("HCCL_CONNECT_TIMEOUT", 120);
    const Deadline deadline = std::chrono::steady_clock::now() + std::chrono::seconds(connect_s);
    if (!comm->mailbox.meet(size, deadline))
        return refuse(kTimeout, "EI0006: rank " + std::to_string(rank) + ": not all of " + std::to_string(size) +
                                    " ranks have joined within " + std::to_string(connect_s) +
                                    " s. Check that every rank has started, and HCCL_CONNECT_TIMEOUT");
    std::lock_guard<std::mutex> guard(lock);
    *handle = comm.get();
    communicators[*handle] = std::move(comm);
    return kOk;
}

}  // namespace
}  // namespace stub

using namespace stub;

// --- communicators ---

API int HcclGetRootInfo(char *root) {
    const std::string folder = Mailbox::new_folder();
    if (folder.empty()) return refuse(kCommunication, "no folder for the ranks to share: see CANN_STUB_SHARED");
    std::memset(root, 0, kRootBytes);
    std::memcpy(root, folder.data(), folder.size());
    return kOk;
}

API std::uint32_t HcclGetCommConfigCapability() { return 12; }

API int HcclCommInitRootInfo(std::uint32_t size, const char *root, std::uint32_t rank, void **comm) {
    return join("HcclCommInitRootInfo", size, root, rank, nullptr, comm);
}

API int HcclCommInitRootInfoConfig(std::uint32_t size, const char *root, std::uint32_t rank, const Config *config,
                                   void **comm) {
    return join("HcclCommInitRootInfoConfig", size, root, rank, config, comm);
}

// What its streams still wait for is given up.
API int HcclCommDestroy(void *handle) {
    const CommPointer comm = find(handle);
    if (comm == nullptr) return refuse(kPointer, "HcclCommDestroy: no such communicator");
    record("HcclCommDestroy", "\"comm\": " + quoted(comm->name) + ", \"rank\": " + std::to_string(comm->rank));
    comm->is_closed = true;
    comm->mailbox.leave(comm->size);
    std::lock_guard<std::mutex> guard(stub::lock);
    communicators.erase(handle);
    return kOk;
}

API int HcclGetCommAsyncError(void *handle, int *error) {
    const CommPointer comm = find(handle);
    if (comm == nullptr) return refuse(kPointer, "HcclGetCommAsyncError: no such communicator");
    *error = comm->error;
    return kOk;
}

API int HcclGetCommName(void *handle, char *name) {
    const CommPointer comm = find(handle);
    if (comm == nullptr) return refuse(kPointer, "HcclGetCommName: no such communicator");
    std::strncpy(name, comm->name.c_str(), 127);
    name[127] = 0;
    return kOk;
}

API const char *HcclGetErrorString(int) { return "see aclGetRecentErrMsg"; }
API int HcclSetConfig(int, int) { return kOk; }

// --- point to point ---

API int HcclSend(void *buffer, std::uint64_t count, int data_type, std::uint32_t peer, void *comm, void *stream) {
    return point_to_point("HcclSend", true, buffer, count, data_type, peer, comm, stream);
}

API int HcclRecv(void *buffer, std::uint64_t count, int data_type, std::uint32_t peer, void *comm, void *stream) {
    return point_to_point("HcclRecv", false, buffer, count, data_type, peer, comm, stream);
}

API int HcclGroupStart() {
    ++depth;
    return kOk;
}

API int HcclGroupEnd() {
    if (depth == 0) return refuse(kParameter, "HcclGroupEnd without HcclGroupStart");
    if (--depth) return kOk;
    int result = kOk;
    for (const Group &group : std::exchange(groups, {})) {
        const int code = launch(group.comm, "HcclGroupEnd", group.stream,
                                [=] { return run_transfers(group.comm, group.transfers); });
        if (result == kOk) result = code;
    }
    return result;
}

struct Item {
    int kind;  // 0 send, 1 receive
    void *buffer;
    std::uint64_t count;
    int data_type;
    std::uint32_t peer;
};

API int HcclBatchSendRecv(const Item *items, std::uint32_t number, void *comm, void *stream) {
    HcclGroupStart();
    int result = kOk;
    for (const Item *item = items; item != items + number && result == kOk; ++item)
        result = point_to_point(item->kind == 0 ? "HcclBatchSendRecv: send" : "HcclBatchSendRecv: receive",
                                item->kind == 0, item->buffer, item->count, item->data_type, item->peer, comm, stream);
    const int ended = HcclGroupEnd();
    return result == kOk ? ended : result;
}

// --- collectives ---

API int HcclAllGather(void *own, void *all, std::uint64_t count, int data_type, void *handle, void *stream) {
    const CommPointer comm = find(handle);
    if (const int result = check(comm, "HcclAllGather", own, count, data_type)) return result;
    record("HcclAllGather", fields_of(*comm, count, data_type));
    const std::size_t bytes = count * bytes_of(type_of(data_type));
    char *places = static_cast<char *>(all);
    const auto transfers = all_to_all_ranks(*comm, "HcclAllGather", own, places, count, data_type);
    return launch(comm, "HcclAllGather", stream, [=] {
        std::memmove(places + comm->rank * bytes, own, bytes);
        return run_transfers(comm, transfers);
    });
}

API int HcclAllReduce(void *own, void *result, std::uint64_t count, int data_type, int reduction, void *handle,
                      void *stream) {
    const CommPointer comm = find(handle);
    if (const int code = check(comm, "HcclAllReduce", own, count, data_type)) return code;
    record("HcclAllReduce", fields_of(*comm, count, data_type));
    const int type = type_of(data_type);
    const std::size_t width = bytes_of(type), bytes = count * width;
    const auto gathered = std::make_shared<std::vector<char>>(bytes * comm->size);
    const auto transfers = all_to_all_ranks(*comm, "HcclAllReduce", own, gathered->data(), count, data_type);
    return launch(comm, "HcclAllReduce", stream, [=] {
        std::memcpy(gathered->data() + comm->rank * bytes, own, bytes);
        if (const int code = run_transfers(comm, transfers)) return code;
        for (std::uint64_t index = 0; index < count; ++index) {
            long double value = 0;
            for (std::uint32_t rank = 0; rank < comm->size; ++rank) {
                long double of_rank = 0;
                load(gathered->data() + rank * bytes + index * width, type, &of_rank);
                value = rank == 0 ? of_rank : reduced(value, of_rank, reduction);
            }
            store(static_cast<char *>(result) + index * width, type, value);
        }
        return static_cast<int>(kSuccess);
    });
}

API int HcclBroadcast(void *buffer, std::uint64_t count, int data_type, std::uint32_t root, void *handle, void *stream) {
    const CommPointer comm = find(handle);
    if (const int result = check(comm, "HcclBroadcast", buffer, count, data_type)) return result;
    record("HcclBroadcast", fields_of(*comm, count, data_type) + ", \"peer\": " + std::to_string(root));
    std::vector<Transfer> transfers;
    if (root != comm->rank)
        transfers.push_back(transfer(*comm, "HcclBroadcast", false, buffer, count, data_type, root));
    for (std::uint32_t peer = 0; root == comm->rank && peer < comm->size; ++peer)
        if (peer != root) transfers.push_back(transfer(*comm, "HcclBroadcast", true, buffer, count, data_type, peer));
    return launch(comm, "HcclBroadcast", stream, [=] { return run_transfers(comm, transfers); });
}

// Counts and places in elements, [ranks] each. What has no elements is sent too.
API int HcclAlltoAllV(const void *own, const std::uint64_t *send_counts, const std::uint64_t *send_places, int data_type,
                      void *all, const std::uint64_t *receive_counts, const std::uint64_t *receive_places, int, void *handle,
                      void *stream) {
    const CommPointer comm = find(handle);
    if (const int result = check(comm, "HcclAlltoAllV", nullptr, 0, data_type)) return result;
    const std::size_t width = bytes_of(type_of(data_type));
    const char *sent = static_cast<const char *>(own);
    char *received = static_cast<char *>(all);
    std::vector<Transfer> transfers;
    std::uint64_t total = 0;
    for (std::uint32_t peer = 0; peer < comm->size; ++peer) {
        total += send_counts[peer];
        if (peer == comm->rank) continue;
        transfers.push_back(transfer(*comm, "HcclAlltoAllV", true, sent + send_places[peer] * width, send_counts[peer], data_type, peer));
        transfers.push_back(transfer(*comm, "HcclAlltoAllV", false, received + receive_places[peer] * width, receive_counts[peer], data_type, peer));
    }
    record("HcclAlltoAllV", fields_of(*comm, total, data_type));
    const std::size_t own_bytes = send_counts[comm->rank] * width;
    const char *from = sent + send_places[comm->rank] * width;
    char *to = received + receive_places[comm->rank] * width;
    return launch(comm, "HcclAlltoAllV", stream, [=] {
        if (own_bytes) std::memcpy(to, from, own_bytes);
        return run_transfers(comm, transfers);
    });
}

API int HcclAlltoAll(const void *own, std::uint64_t count, int data_type, void *all, std::uint64_t, int, void *handle,
                     void *stream) {
    const CommPointer comm = find(handle);
    if (comm == nullptr) return refuse(kPointer, "HcclAlltoAll: no such communicator");
    std::vector<std::uint64_t> counts(comm->size, count), places(comm->size);
    for (std::uint32_t rank = 0; rank < comm->size; ++rank) places[rank] = rank * count;
    return HcclAlltoAllV(own, counts.data(), places.data(), data_type, all, counts.data(), places.data(), data_type,
                         handle, stream);
}
