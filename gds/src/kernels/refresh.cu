// What a refresh of a pin writes all over a slot, by one launch each: small edits from the host, and rows that another
// slot has already. Compiled to refresh.ptx by python/compile_kernels.py; packed and launched by gds/src/kernels.rs and
// gds/src/sys/kernels.rs.
//
// Whatever `packed` says, nothing outside of the memories named is touched: what lies outside is left out. What one
// launch writes does not overlap, so its order does not matter. Any grid does: what it does not cover, it comes back
// for.

using u64 = unsigned long long;
using u32 = unsigned int;

namespace {

struct alignas(16) Entry {
    u64 to;
    u32 from, bytes;
};

struct alignas(16) Buffer {
    u64 offset, width;
};

struct alignas(16) Wide {
    u64 low, high;
};

template <typename Element> __device__ void copy_as(char *to, const char *from, u64 bytes) {
    for (u64 at = 0; at < bytes; at += sizeof(Element)) {
        *reinterpret_cast<Element *>(to + at) = *reinterpret_cast<const Element *>(from + at);
    }
}

// By the widest element that divides both addresses and the length.
__device__ void copy(char *to, const char *from, u64 bytes) {
    const u64 together = reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from) | bytes;
    if (together % 16 == 0) {
        copy_as<Wide>(to, from, bytes);
    } else if (together % 8 == 0) {
        copy_as<u64>(to, from, bytes);
    } else if (together % 4 == 0) {
        copy_as<u32>(to, from, bytes);
    } else {
        copy_as<char>(to, from, bytes);
    }
}

__device__ u64 first() { return static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ u64 step() { return static_cast<u64>(gridDim.x) * blockDim.x; }

} // namespace

// `packed` begins with `count` entries and holds the bytes of each at a multiple of 16.
extern "C" __global__ void pinion_scatter(const char *packed, u64 packed_bytes, u64 count, char *to, u64 to_bytes) {
    for (u64 i = first(); i < count; i += step()) {
        const Entry entry = reinterpret_cast<const Entry *>(packed)[i];
        if (entry.to > to_bytes || entry.bytes > to_bytes - entry.to || entry.from > packed_bytes ||
            entry.bytes > packed_bytes - entry.from) {
            continue;
        }
        copy(to + entry.to, packed + entry.from, entry.bytes);
    }
}

// `packed` holds `buffers` places where each row has bytes, then the numbers of `rows` rows.
extern "C" __global__ void pinion_copy_rows(const char *packed, u64 buffers, u64 rows, const char *from,
                                            u64 from_bytes, char *to, u64 to_bytes) {
    const u64 limit = from_bytes < to_bytes ? from_bytes : to_bytes;
    const u32 *numbers = reinterpret_cast<const u32 *>(packed + buffers * sizeof(Buffer));
    for (u64 i = first(); i < buffers * rows; i += step()) {
        const Buffer buffer = reinterpret_cast<const Buffer *>(packed)[i / rows];
        const u64 row = numbers[i % rows];
        if (buffer.width == 0 || buffer.offset > limit || (limit - buffer.offset) / buffer.width <= row) {
            continue;
        }
        const u64 at = buffer.offset + row * buffer.width;
        copy(to + at, from + at, buffer.width);
    }
}
