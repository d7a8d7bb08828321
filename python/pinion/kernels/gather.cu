// Rows of columns by their numbers: what `View.take` runs on a GPU. Compiled to gather.ptx by
// python/compile_kernels.py; the launches stand in pinion/gather.py.
//
// All steps are distances in bytes. An element is 1, 2, 4, 8 or 16 bytes; addresses and steps are multiples of
// that. A number below 0, or not below `row_count`, is of no row: nothing is read for it, and the first bytes of the
// fill, its low half first, are written instead. Any grid does: what it does not cover, it comes back for.

using u64 = unsigned long long;
using i64 = long long;

namespace {

struct alignas(16) Wide {
    u64 low, high;
};

__device__ bool is_row(i64 row, u64 row_count) {
    return row >= 0 && static_cast<u64>(row) < row_count;
}

template <typename Element> __device__ Element cut(u64 low, u64) { return static_cast<Element>(low); }
template <> __device__ Wide cut<Wide>(u64 low, u64 high) { return {low, high}; }

// out[i, c] = source[rows[i], c] for `count` numbers and `columns` columns. x runs along what lies closer together
// in the output, so that neighbouring threads write neighbouring bytes.
template <typename Element>
__device__ void gather(const i64 *rows, u64 count, const char *source, u64 row_count, u64 row_step, u64 columns,
                       u64 column_step, char *out, u64 out_row_step, u64 out_column_step, u64 low, u64 high) {
    const bool along_rows = out_row_step < out_column_step;
    const u64 inner = along_rows ? count : columns, outer = along_rows ? columns : count;
    const u64 x = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 y = static_cast<u64>(blockIdx.y) * blockDim.y + threadIdx.y;
    const u64 x_step = static_cast<u64>(gridDim.x) * blockDim.x, y_step = static_cast<u64>(gridDim.y) * blockDim.y;
    const Element fill = cut<Element>(low, high);
    for (u64 far = y; far < outer; far += y_step) {
        for (u64 near = x; near < inner; near += x_step) {
            const u64 i = along_rows ? near : far, column = along_rows ? far : near;
            const i64 row = rows[i];
            Element value = fill;
            if (is_row(row, row_count)) {
                value = *reinterpret_cast<const Element *>(source + row * row_step + column * column_step);
            }
            *reinterpret_cast<Element *>(out + i * out_row_step + column * out_column_step) = value;
        }
    }
}

} // namespace

#define GATHER(BYTES, Element)                                                                                         \
    extern "C" __global__ void pinion_gather_##BYTES(                                                                  \
        const i64 *rows, u64 count, const char *source, u64 row_count, u64 row_step, u64 columns, u64 column_step,     \
        char *out, u64 out_row_step, u64 out_column_step, u64 low, u64 high) {                                         \
        gather<Element>(rows, count, source, row_count, row_step, columns, column_step, out, out_row_step,             \
                        out_column_step, low, high);                                                                   \
    }

GATHER(1, unsigned char)
GATHER(2, unsigned short)
GATHER(4, unsigned int)
GATHER(8, u64)
GATHER(16, Wide)

// out[i] = 1 where rows[i] is the number of a row, else 0: the mask of a column that has no nulls.
extern "C" __global__ void pinion_found(const i64 *rows, u64 count, u64 row_count, char *out, u64 out_row_step) {
    const u64 step = static_cast<u64>(gridDim.x) * blockDim.x;
    for (u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        out[i * out_row_step] = is_row(rows[i], row_count);
    }
}
