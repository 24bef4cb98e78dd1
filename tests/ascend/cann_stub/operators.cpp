// Operators: the older entry (aclop: by name, with descriptions) and the newer (aclnn: a function for each).
// Only those that move or convert data; any other is refused by its name.
#include "stub.h"
#include "values.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace stub {
namespace {

using Shape = std::vector<std::int64_t>;

enum Format { kNd = 2, kNz = 29 };

std::int64_t elements(const Shape &shape) {
    std::int64_t product = 1;
    for (const auto length : shape) product *= length;
    return product;
}

std::string written(const Shape &shape) {
    std::string text;
    for (const auto length : shape) text += (text.empty() ? "" : ", ") + std::to_string(length);
    return "[" + text + "]";
}

Shape contiguous(const Shape &shape) {
    Shape strides(shape.size(), 1);
    for (std::size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
    return strides;
}

// --- where an element lies in a format ---

constexpr std::int64_t kNzRows = 16;

std::int64_t nz_columns(int type) { return 32 / static_cast<std::int64_t>(bytes_of(type)); }

std::int64_t blocks(std::int64_t length, std::int64_t block) { return (length + block - 1) / block; }

// [..., rows, columns] lies as [..., blocks of columns, blocks of rows, 16, columns of 32 bytes].
std::int64_t nz_elements(const Shape &shape, int type) {
    const std::int64_t rows = shape[shape.size() - 2], columns = shape.back(), width = nz_columns(type);
    const std::int64_t stacked = elements(shape) / std::max<std::int64_t>(rows * columns, 1);
    return stacked * blocks(rows, kNzRows) * kNzRows * blocks(columns, width) * width;
}

std::int64_t nz_place(std::int64_t index, const Shape &shape, int type) {
    const std::int64_t rows = shape[shape.size() - 2], columns = shape.back(), width = nz_columns(type);
    const std::int64_t column = index % columns, row = index / columns % rows, matrix = index / columns / rows;
    const std::int64_t padded_rows = blocks(rows, kNzRows) * kNzRows;
    const std::int64_t per_matrix = padded_rows * blocks(columns, width) * width;
    return matrix * per_matrix + (column / width * padded_rows + row) * width + column % width;
}

int convert_format(const char *source, int from, char *target, int to, const Shape &shape, int type) {
    const std::size_t size = bytes_of(type);
    const std::int64_t number = elements(shape);
    if (from == to) {
        std::memcpy(target, source, size * (from == kNz ? nz_elements(shape, type) : number));
        return kSuccess;
    }
    if (to == kNz) std::memset(target, 0, size * nz_elements(shape, type));
    for (std::int64_t index = 0; index < number; ++index) {
        const std::int64_t place = nz_place(index, shape, type);
        std::memcpy(target + size * (to == kNz ? place : index), source + size * (from == kNz ? place : index), size);
    }
    return kSuccess;
}

bool can_convert(int from, int to) {
    long double value = 0;
    char place[8] = {};
    return from == to ? bytes_of(from) > 0 : load(place, from, &value) && store(place, to, value);
}

}  // namespace

// --- the newer entry: tensors ---

struct Tensor {
    Shape shape;
    Shape strides;
    std::int64_t offset;
    int type;
    int format;
    Shape storage;
    char *data;

    bool is_dense() const { return format != kNz && strides == contiguous(shape); }

    // Of the element with this index, row by row. In NZ a tensor is whole.
    char *at(std::int64_t index) const {
        std::int64_t place = offset;
        if (format == kNz) return data + bytes_of(type) * (place + nz_place(index, shape, type));
        for (std::size_t i = shape.size(); i-- > 0; index /= shape[i]) place += index % shape[i] * strides[i];
        return data + bytes_of(type) * place;
    }
};

struct Executor {
    const char *name;
    Task task;
};

namespace {

Tensor broadcast(const Tensor &source, const Shape &shape) {
    Tensor made = source;
    const std::size_t more = shape.size() - source.shape.size();
    made.shape = shape;
    made.strides.assign(shape.size(), 0);
    for (std::size_t i = more; i < shape.size(); ++i)
        made.strides[i] = source.shape[i - more] == 1 ? 0 : source.strides[i - more];
    return made;
}

int copy_elements(const Tensor &target, const Tensor &source) {
    const std::int64_t number = elements(target.shape);
    const std::size_t size = bytes_of(target.type);
    if (number > 0 && target.type == source.type && target.is_dense() && source.is_dense()) {
        std::memcpy(target.at(0), source.at(0), size * number);
        return kSuccess;
    }
    for (std::int64_t index = 0; index < number; ++index) {
        if (target.type == source.type) {
            std::memcpy(target.at(index), source.at(index), size);
            continue;
        }
        long double value = 0;
        load(source.at(index), source.type, &value);
        store(target.at(index), target.type, value);
    }
    return kSuccess;
}

int prepare(const char *name, Task task, std::uint64_t *workspace, Executor **executor) {
    *workspace = 0;
    *executor = new Executor{name, std::move(task)};
    return kSuccess;
}

int prepare_copy(const char *name, const Tensor &source, const Tensor &target, std::uint64_t *workspace,
                 Executor **executor) {
    const bool same = source.shape == target.shape;
    if (!can_convert(source.type, target.type))
        return fail(kUnsupported, "%s: no conversion from type %d to %d", name, source.type, target.type);
    if (!same && (source.format == kNz || target.format == kNz || source.shape.size() > target.shape.size()))
        return fail(kUnsupported, "%s: %s does not go into %s", name, written(source.shape).c_str(),
                    written(target.shape).c_str());
    const Tensor from = same ? source : broadcast(source, target.shape);
    return prepare(name, [=] { return copy_elements(target, from); }, workspace, executor);
}

int prepare_fill(const char *name, const Tensor &target, long double value, std::uint64_t *workspace,
                 Executor **executor) {
    if (bytes_of(target.type) == 0) return fail(kUnsupported, "%s: no type %d", name, target.type);
    const auto task = [=] {
        const std::int64_t number = elements(target.shape);
        const std::size_t size = bytes_of(target.type);
        char element[8];
        store(element, target.type, value);
        const bool is_dense = target.is_dense();
        char *place = number > 0 ? target.at(0) : nullptr;
        for (std::int64_t index = 0; index < number; ++index, place += size)
            std::memcpy(is_dense ? place : target.at(index), element, size);
        return static_cast<int>(kSuccess);
    };
    return prepare(name, task, workspace, executor);
}

int execute(Executor *executor, void *stream) {
    const std::unique_ptr<Executor> owned(executor);
    return enqueue(stream, owned->name, std::move(owned->task));
}

}  // namespace

// --- the older entry: descriptions and buffers ---

struct Description {
    int type;
    Shape shape;
    int format;
    int storage_format;
    Shape storage_shape;
};

struct Buffer {
    char *data;
    std::size_t size;
};

using Attributes = std::map<std::string, std::string>;

namespace {

int execute_by_name(const std::string &name, const std::vector<const Description *> &input_kinds,
                    const std::vector<const Buffer *> &inputs, const std::vector<const Description *> &output_kinds,
                    const std::vector<const Buffer *> &outputs, void *stream) {
    record("aclopCompileAndExecute", "\"operator\": " + quoted(name));
    const bool converts = (name == "Identity" || name == "TransData") && !inputs.empty() && outputs.size() == 1;
    if (!converts) return fail(kUnsupported, "the stub has no operator %s", name.c_str());
    const Description from = *input_kinds[0], to = *output_kinds[0];
    const Shape shape = from.storage_format == kNz ? to.shape : from.shape;
    const auto size = [&](const Description &kind) {
        return bytes_of(from.type) * (kind.storage_format == kNz ? nz_elements(shape, from.type) : elements(shape));
    };
    if (size(from) > inputs[0]->size || size(to) > outputs[0]->size)
        return fail(kInvalidParameter, "%s: %s in format %d to %d needs %zu and %zu bytes, got %zu and %zu",
                    name.c_str(), written(shape).c_str(), from.storage_format, to.storage_format, size(from),
                    size(to), inputs[0]->size, outputs[0]->size);
    const Buffer source = *inputs[0], target = *outputs[0];
    return enqueue(stream, name == "Identity" ? "Identity" : "TransData", [=] {
        return convert_format(source.data, from.storage_format, target.data, to.storage_format, shape, from.type);
    });
}

}  // namespace
}  // namespace stub

using namespace stub;

API Description *aclCreateTensorDesc(int type, int dimensions, const std::int64_t *lengths, int format) {
    const Shape shape(lengths, lengths + dimensions);
    return new Description{type, shape, format, format, shape};
}

API void aclDestroyTensorDesc(const Description *description) { delete description; }

API int aclSetTensorFormat(Description *description, int format) {
    description->storage_format = format;
    return kSuccess;
}

API int aclSetTensorShape(Description *description, int dimensions, const std::int64_t *lengths) {
    description->storage_shape.assign(lengths, lengths + dimensions);
    return kSuccess;
}

API void aclSetTensorDescName(Description *, const char *) {}
API int aclSetTensorPlaceMent(Description *, int) { return kSuccess; }
API int aclGetTensorDescType(const Description *description) { return description->type; }
API int aclGetTensorDescFormat(const Description *description) { return description->format; }
API std::size_t aclGetTensorDescNumDims(const Description *description) { return description->shape.size(); }

API int aclGetTensorDescDimV2(const Description *description, std::size_t index, std::int64_t *length) {
    if (index >= description->shape.size()) return fail(kInvalidParameter, "no dimension %zu", index);
    *length = description->shape[index];
    return kSuccess;
}

API Buffer *aclCreateDataBuffer(void *data, std::size_t size) { return new Buffer{static_cast<char *>(data), size}; }

API int aclDestroyDataBuffer(const Buffer *buffer) {
    delete buffer;
    return kSuccess;
}

API Attributes *aclopCreateAttr() { return new Attributes; }
API void aclopDestroyAttr(const Attributes *attributes) { delete attributes; }

API int aclopSetAttrString(Attributes *attributes, const char *name, const char *value) {
    (*attributes)[name] = value;
    return kSuccess;
}

API int aclopSetAttrInt(Attributes *attributes, const char *name, std::int64_t value) {
    (*attributes)[name] = std::to_string(value);
    return kSuccess;
}

API int aclopSetAttrBool(Attributes *, const char *, std::uint8_t) { return kSuccess; }
API int aclSetCompileopt(int, const char *) { return kSuccess; }
API std::size_t aclGetCompileoptSize(int) { return 1; }

API int aclGetCompileopt(int, char *value, std::size_t) {
    *value = 0;
    return kSuccess;
}

API int aclopCompileAndExecute(const char *name, int num_inputs, const Description *const *input_kinds,
                               const Buffer *const *inputs, int num_outputs, const Description *const *output_kinds,
                               const Buffer *const *outputs, const Attributes *, int, int, const char *, void *stream) {
    return execute_by_name(name, {input_kinds, input_kinds + num_inputs}, {inputs, inputs + num_inputs},
                           {output_kinds, output_kinds + num_outputs}, {outputs, outputs + num_outputs}, stream);
}

API int aclopCompileAndExecuteV2(const char *name, int num_inputs, Description **input_kinds, Buffer **inputs,
                                 int num_outputs, Description **output_kinds, Buffer **outputs, Attributes *attributes,
                                 int engine, int kind, const char *path, void *stream) {
    return aclopCompileAndExecute(name, num_inputs, input_kinds, inputs, num_outputs, output_kinds, outputs,
                                  attributes, engine, kind, path, stream);
}

API Tensor *aclCreateTensor(const std::int64_t *lengths, std::uint64_t dimensions, int type,
                            const std::int64_t *strides, std::int64_t offset, int format,
                            const std::int64_t *storage, std::uint64_t storage_dimensions, void *data) {
    const Shape shape(lengths, lengths + dimensions);
    const Shape steps = strides == nullptr ? contiguous(shape) : Shape(strides, strides + dimensions);
    return new Tensor{shape,  steps, offset, type, format, Shape(storage, storage + storage_dimensions),
                      static_cast<char *>(data)};
}

API int aclDestroyTensor(const Tensor *tensor) {
    delete tensor;
    return kSuccess;
}

API int aclnnInplaceCopyGetWorkspaceSize(const Tensor *target, const Tensor *source, std::uint64_t *workspace,
                                         Executor **executor) {
    return prepare_copy("aclnnInplaceCopy", *source, *target, workspace, executor);
}

API int aclnnInplaceCopy(void *, std::uint64_t, Executor *executor, void *stream) { return execute(executor, stream); }

API int aclnnCastGetWorkspaceSize(const Tensor *source, int, const Tensor *target, std::uint64_t *workspace,
                                  Executor **executor) {
    return prepare_copy("aclnnCast", *source, *target, workspace, executor);
}

API int aclnnCast(void *, std::uint64_t, Executor *executor, void *stream) { return execute(executor, stream); }

API int aclnnInplaceZeroGetWorkspaceSize(const Tensor *target, std::uint64_t *workspace, Executor **executor) {
    return prepare_fill("aclnnInplaceZero", *target, 0, workspace, executor);
}

API int aclnnInplaceZero(void *, std::uint64_t, Executor *executor, void *stream) { return execute(executor, stream); }

API int aclnnInplaceOneGetWorkspaceSize(const Tensor *target, std::uint64_t *workspace, Executor **executor) {
    return prepare_fill("aclnnInplaceOne", *target, 1, workspace, executor);
}

API int aclnnInplaceOne(void *, std::uint64_t, Executor *executor, void *stream) { return execute(executor, stream); }

API long double *aclCreateScalar(const void *value, int type) {
    auto made = std::make_unique<long double>(0);
    if (load(static_cast<const char *>(value), type, made.get())) return made.release();
    fail(kUnsupported, "aclCreateScalar: no type %d", type);
    return nullptr;
}

API int aclDestroyScalar(const long double *scalar) {
    delete scalar;
    return kSuccess;
}

API int aclnnInplaceFillScalarGetWorkspaceSize(const Tensor *target, const long double *value, std::uint64_t *workspace,
                                               Executor **executor) {
    return prepare_fill("aclnnInplaceFillScalar", *target, *value, workspace, executor);
}

API int aclnnInplaceFillScalar(void *, std::uint64_t, Executor *executor, void *stream) {
    return execute(executor, stream);
}

// For a cast in the newer way: the shape of what a format stores.
API int aclnnNpuFormatCastCalculateSizeAndFormat(const Tensor *source, int format, int, std::int64_t **shape,
                                                 std::uint64_t *dimensions, int *actual) {
    Shape stored = source->shape;
    if (format == kNz) {
        const std::int64_t rows = stored[stored.size() - 2], width = nz_columns(source->type);
        stored[stored.size() - 2] = blocks(stored.back(), width);
        stored.back() = blocks(rows, kNzRows);
        stored.insert(stored.end(), {kNzRows, width});
    }
    *shape = new std::int64_t[stored.size()];
    std::copy(stored.begin(), stored.end(), *shape);
    *dimensions = stored.size();
    *actual = format;
    return kSuccess;
}

API int aclnnNpuFormatCastGetWorkspaceSize(const Tensor *source, const Tensor *target, std::uint64_t *workspace,
                                           Executor **executor) {
    const Tensor from = *source, to = *target;
    const auto convert = [=] {
        const Shape &shape = to.format == kNz ? from.shape : to.shape;
        return convert_format(from.data, from.format, to.data, to.format, shape, from.type);
    };
    return prepare("aclnnNpuFormatCast", convert, workspace, executor);
}

API int aclnnNpuFormatCast(void *, std::uint64_t, Executor *executor, void *stream) { return execute(executor, stream); }
