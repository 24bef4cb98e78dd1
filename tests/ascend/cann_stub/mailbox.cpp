#include "mailbox.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <thread>
#include <unistd.h>
#include <vector>

namespace stub {
namespace {

struct Header {
    char call[32];
    std::uint64_t count;
    std::int64_t data_type;
    std::uint64_t bytes;
};

// Asks again and again, at first often.
bool comes_true(Deadline deadline, const std::function<bool()> &give_up, const std::function<bool()> &question) {
    auto pause = std::chrono::microseconds(20);
    while (!question()) {
        if (std::chrono::steady_clock::now() > deadline || (give_up && give_up())) return false;
        std::this_thread::sleep_for(pause);
        pause = std::min(pause * 2, std::chrono::microseconds(1000));
    }
    return true;
}

bool exists(const std::string &path) { return access(path.c_str(), F_OK) == 0; }

void touch(const std::string &path) {
    const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (file >= 0) close(file);
}

bool all_there(const std::string &prefix, std::uint32_t ranks) {
    for (std::uint32_t rank = 0; rank < ranks; ++rank)
        if (!exists(prefix + std::to_string(rank))) return false;
    return true;
}

}  // namespace

std::string Mailbox::new_folder() {
    const char *shared = std::getenv("CANN_STUB_SHARED");
    std::string pattern = std::string(shared ? shared : "/tmp") + "/hccl-XXXXXX";
    return mkdtemp(pattern.data()) ? pattern : "";
}

bool Mailbox::meet(std::uint32_t ranks, Deadline deadline) const {
    touch(folder_ + "/joined-" + std::to_string(rank_));
    return comes_true(deadline, {}, [&] { return all_there(folder_ + "/joined-", ranks); });
}

void Mailbox::leave(std::uint32_t ranks) const {
    touch(folder_ + "/left-" + std::to_string(rank_));
    std::error_code ignored;
    if (all_there(folder_ + "/left-", ranks)) std::filesystem::remove_all(folder_, ignored);
}

void Mailbox::put(std::uint32_t peer, const Label &label, const char *data, std::size_t bytes) const {
    const std::string target = path(rank_, peer, label.number), written = target + ".part";
    Header header{};
    std::strncpy(header.call, label.call.c_str(), sizeof header.call - 1);
    header.count = label.count;
    header.data_type = label.data_type;
    header.bytes = bytes;
    std::FILE *file = std::fopen(written.c_str(), "wb");
    if (file == nullptr) return;
    const bool whole = std::fwrite(&header, sizeof header, 1, file) == 1 && std::fwrite(data, 1, bytes, file) == bytes;
    if (std::fclose(file) == 0 && whole) std::rename(written.c_str(), target.c_str());
}

bool Mailbox::take(std::uint32_t peer, const Label &label, char *data, std::size_t bytes, Deadline deadline,
                   const std::function<bool()> &give_up, Label *arrived) const {
    const std::string source = path(peer, rank_, label.number);
    if (!comes_true(deadline, give_up, [&] { return exists(source); })) return false;
    std::FILE *file = std::fopen(source.c_str(), "rb");
    if (file == nullptr) return false;
    Header header{};
    bool whole = std::fread(&header, sizeof header, 1, file) == 1;
    if (whole && header.bytes == bytes) whole = std::fread(data, 1, bytes, file) == bytes;
    std::fclose(file);
    *arrived = {header.call, label.number, header.count, static_cast<int>(header.data_type)};
    unlink(source.c_str());
    return whole;
}

bool Mailbox::was_taken(std::uint32_t peer, const Label &label, Deadline deadline,
                        const std::function<bool()> &give_up) const {
    const std::string sent = path(rank_, peer, label.number);
    return comes_true(deadline, give_up, [&] { return !exists(sent); });
}

std::string Mailbox::path(std::uint32_t from, std::uint32_t to, std::uint64_t number) const {
    return folder_ + "/" + std::to_string(from) + "-" + std::to_string(to) + "-" + std::to_string(number);
}

}  // namespace stub
