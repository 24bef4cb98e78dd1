// Messages between the ranks of a communicator, as files in a folder: "<from>-<to>-<number>".
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace stub {

using Deadline = std::chrono::steady_clock::time_point;

struct Label {
    std::string call;  // what both sides have to have called
    std::uint64_t number = 0;
    std::uint64_t count = 0;
    int data_type = 0;
};

class Mailbox {
  public:
    Mailbox() = default;
    Mailbox(std::string folder, std::uint32_t rank) : folder_(std::move(folder)), rank_(rank) {}

    // In CANN_STUB_SHARED, which all ranks have to see; empty if it cannot be made.
    static std::string new_folder();

    // Whether all ranks have come before the deadline.
    bool meet(std::uint32_t ranks, Deadline deadline) const;
    // The last rank takes the folder away.
    void leave(std::uint32_t ranks) const;

    void put(std::uint32_t peer, const Label &label, const char *data, std::size_t bytes) const;
    // False when there was none in time. A message of another length is taken, and not written to `data`.
    bool take(std::uint32_t peer, const Label &label, char *data, std::size_t bytes, Deadline deadline,
              const std::function<bool()> &give_up, Label *arrived) const;
    bool was_taken(std::uint32_t peer, const Label &label, Deadline deadline,
                   const std::function<bool()> &give_up) const;

  private:
    std::string path(std::uint32_t from, std::uint32_t to, std::uint64_t number) const;

    std::string folder_;
    std::uint32_t rank_ = 0;
};

}  // namespace stub
