// Small writes all over a region, by one launch: what a refresh of a pin changes. Compiled to scatter.ptx by
// python/compile_kernels.py; packed and launched by gds/src/scatter.rs and gds/src/sys/kernels.rs.
//
// `packed` begins with `count` entries and holds the bytes of each at a multiple of 16. Entries do not overlap in the
// output, so their order does not matter. One that lies outside of either side is left out: whatever `packed` says,
// nothing else is touched. Any grid does: what it does not cover, it comes back for.

using u64 = unsigned long long;

namespace {

struct alignas(16) Entry {
    u64 to;
    unsigned int from, bytes;
};

struct alignas(16) Wide {
    u64 low, high;
};

template <typename Element> __device__ void copy(char *to, const char *from, unsigned int bytes) {
    for (unsigned int at = 0; at < bytes; at += sizeof(Element)) {
        *reinterpret_cast<Element *>(to + at) = *reinterpret_cast<const Element *>(from + at);
    }
}

} // namespace

extern "C" __global__ void pinion_scatter(const char *packed, u64 packed_bytes, u64 count, char *out, u64 out_bytes) {
    const u64 step = static_cast<u64>(gridDim.x) * blockDim.x;
    for (u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const Entry entry = reinterpret_cast<const Entry *>(packed)[i];
        if (entry.to > out_bytes || entry.bytes > out_bytes - entry.to || entry.from > packed_bytes ||
            entry.bytes > packed_bytes - entry.from) {
            continue;
        }
        char *to = out + entry.to;
        const char *from = packed + entry.from;
        const u64 together = reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from) | entry.bytes;
        if (together % 16 == 0) {
            copy<Wide>(to, from, entry.bytes);
        } else if (together % 8 == 0) {
            copy<u64>(to, from, entry.bytes);
        } else if (together % 4 == 0) {
            copy<unsigned int>(to, from, entry.bytes);
        } else {
            copy<char>(to, from, entry.bytes);
        }
    }
}
