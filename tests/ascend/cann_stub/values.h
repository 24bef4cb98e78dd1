// Numbers of the types that the vendor's libraries know, one at a time.
#pragma once

#include <cstddef>

namespace stub {

enum Type { kFloat, kHalf, kInt8, kInt32, kUint8, kInt16 = 6, kInt64 = 9, kDouble = 11, kBool, kBfloat = 27,
            kFloat8E5M2 = 35, kFloat8E4M3 = 36 };

std::size_t bytes_of(int type);  // 0: not known
bool load(const char *address, int type, long double *value);
bool store(char *address, int type, long double value);

}  // namespace stub
