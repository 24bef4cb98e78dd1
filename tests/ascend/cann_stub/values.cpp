#include "values.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace stub {
namespace {

float from_half(std::uint16_t bits) {
    const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    const std::uint32_t made = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    std::memcpy(&value, &made, 4);
    return value;
}

float from_bfloat(std::uint16_t bits) {
    const std::uint32_t made = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &made, 4);
    return value;
}

std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// The upper bits, rounded to the nearest, and to an even one between two.
std::uint32_t rounded(std::uint32_t bits, unsigned dropped) {
    return (bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1)) >> dropped;
}

std::uint16_t to_bfloat(float value) {
    const std::uint32_t bits = bits_of(value);
    return std::isnan(value) ? 0x7FC0 : rounded(bits, 16);
}

std::uint16_t to_half(float value) {
    const std::uint32_t sign = bits_of(value) >> 16 & 0x8000u, size = bits_of(std::fabs(value));
    if (std::isnan(value)) return 0x7E00;
    if (size >= 0x477FF000u) return sign | 0x7C00u;           // 65520 and more
    if (size < 0x38800000u)                                   // below the smallest normal half
        return sign | static_cast<std::uint32_t>(std::nearbyint(std::fabs(value) * 0x1p24f));
    return sign | (rounded(size, 13) - (112u << 10));
}

// The values of the 128 positive codes, in rising order; of E5M2 the last four are infinity and no numbers.
std::array<float, 128> float8_values(int type) {
    const int fraction_bits = type == kFloat8E4M3 ? 3 : 2, bias = type == kFloat8E4M3 ? 7 : 15;
    std::array<float, 128> values;
    for (int code = 0; code < 128; ++code) {
        const int exponent = code >> fraction_bits, fraction = code & ((1 << fraction_bits) - 1);
        const float scale = std::ldexp(1.0f, std::max(exponent, 1) - bias - fraction_bits);
        values[code] = scale * static_cast<float>(fraction + (exponent ? 1 << fraction_bits : 0));
    }
    if (type == kFloat8E5M2) values[124] = INFINITY;
    for (int code = type == kFloat8E4M3 ? 127 : 125; code < 128; ++code) values[code] = NAN;
    return values;
}

const std::array<float, 128> &float8(int type) {
    static const auto e4m3 = float8_values(kFloat8E4M3), e5m2 = float8_values(kFloat8E5M2);
    return type == kFloat8E4M3 ? e4m3 : e5m2;
}

std::uint8_t to_float8(float value, int type) {
    const auto &values = float8(type);
    const float size = std::fabs(value);
    const std::uint8_t sign = std::signbit(value) ? 128 : 0;
    if (std::isnan(value)) return sign | 127;
    int code = 0;
    while (values[code + 1] <= size) ++code;  // ends at the numbers that are none
    if (std::isinf(values[code]) || std::isnan(values[code + 1])) return sign | (size > values[code] ? 127 : code);
    const float next = std::isinf(values[code + 1]) ? 65536.0f : values[code + 1];
    const float below = size - values[code], above = next - size;
    return sign | (above < below || (above == below && code % 2) ? code + 1 : code);
}

template <typename Number>
long double loaded(const char *address) {
    Number value;
    std::memcpy(&value, address, sizeof value);
    return static_cast<long double>(value);
}

template <typename Number>
bool stored(char *address, long double value) {
    const auto made = static_cast<Number>(value);
    std::memcpy(address, &made, sizeof made);
    return true;
}

}  // namespace

bool load(const char *address, int type, long double *value) {
    switch (type) {
        case kFloat: *value = loaded<float>(address); return true;
        case kDouble: *value = loaded<double>(address); return true;
        case kHalf: case kBfloat: {
            std::uint16_t bits;
            std::memcpy(&bits, address, 2);
            *value = type == kHalf ? from_half(bits) : from_bfloat(bits);
            return true;
        }
        case kFloat8E5M2: case kFloat8E4M3: {
            const auto bits = static_cast<std::uint8_t>(*address);
            *value = (bits & 128 ? -1 : 1) * float8(type)[bits & 127];
            return true;
        }
        case kInt8: *value = loaded<std::int8_t>(address); return true;
        case kUint8: case kBool: *value = loaded<std::uint8_t>(address); return true;
        case kInt16: *value = loaded<std::int16_t>(address); return true;
        case kInt32: *value = loaded<std::int32_t>(address); return true;
        case kInt64: *value = loaded<std::int64_t>(address); return true;
        default: return false;
    }
}

bool store(char *address, int type, long double value) {
    switch (type) {
        case kFloat: return stored<float>(address, value);
        case kDouble: return stored<double>(address, value);
        case kInt8: return stored<std::int8_t>(address, value);
        case kUint8: return stored<std::uint8_t>(address, value);
        case kBool: return stored<std::uint8_t>(address, value != 0);
        case kInt16: return stored<std::int16_t>(address, value);
        case kInt32: return stored<std::int32_t>(address, value);
        case kInt64: return stored<std::int64_t>(address, value);
        case kHalf: return stored<std::uint16_t>(address, to_half(static_cast<float>(value)));
        case kBfloat: return stored<std::uint16_t>(address, to_bfloat(static_cast<float>(value)));
        case kFloat8E5M2: case kFloat8E4M3:
            return stored<std::uint8_t>(address, to_float8(static_cast<float>(value), type));
        default: return false;
    }
}

std::size_t bytes_of(int type) {
    switch (type) {
        case kInt8: case kUint8: case kBool: case kFloat8E5M2: case kFloat8E4M3: return 1;
        case kHalf: case kInt16: case kBfloat: return 2;
        case kFloat: case kInt32: return 4;
        case kInt64: case kDouble: return 8;
        default: return 0;
    }
}

}  // namespace stub
