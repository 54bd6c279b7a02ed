// What CUDA C++ has beyond C++, as far as our kernels use it, so that a kernel's own text runs on a CPU, thread after thread.
// Built with -ffp-contract=off, as the kernels are with --fmad=false.
#include <cmath>
#include <cstring>
#include <utility>

#define __global__
#define __device__ static
#define __grid_constant__

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) ushort4 {
    unsigned short x, y, z, w;
};
static ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }

static unsigned int __float_as_uint(float value) {
    unsigned int bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float __uint_as_float(unsigned int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static struct {
    unsigned int x;
} gridDim, blockDim, blockIdx, threadIdx;

template <class... Parameters, std::size_t... places>
static void call(void (*kernel)(Parameters...), void **arguments, std::index_sequence<places...>) {
    kernel(*static_cast<std::remove_reference_t<Parameters> *>(arguments[places])...);
}

// Runs a kernel as the double of the driver asks for it: blocks, threads of each, the addresses of the arguments.
template <class... Parameters>
static void run(void (*kernel)(Parameters...), unsigned int blocks, unsigned int threads, void **arguments) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            call(kernel, arguments, std::index_sequence_for<Parameters...>());
}
