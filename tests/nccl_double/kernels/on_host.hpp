// What CUDA C++ has beyond C++, as far as our kernels use it, so that a kernel's own text runs on a CPU: the blocks one after the
// other, the threads of a block as fibers, which take turns at barriers and shuffles. Built with -ffp-contract=off, as the kernels
// are with --fmad=false.
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__ inline
#define __shared__
#define __grid_constant__

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) ushort4 {
    unsigned short x, y, z, w;
};
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline unsigned int __float_as_uint(float value) {
    unsigned int bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Index {
    unsigned int x;
};
static Index gridDim, blockDim, blockIdx, threadIdx;

// The most that a block of any GPU since sm_80 may ask for.
const unsigned int MOST_BLOCK_BYTES = 99 << 10, GUARD_BYTES = 1 << 10;
alignas(16) float block_memory[(MOST_BLOCK_BYTES + GUARD_BYTES) / sizeof(float)];

namespace host {

const unsigned int WARP_THREADS = 32, STACK_BYTES = 64 << 10;

struct Barrier {
    unsigned int arrived = 0;
    unsigned long passed = 0;
};

// It begins once, and computes one thread after the other.
struct Fiber {
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    jmp_buf place;
    bool has_begun = false;
    // True behind the end of a thread.
    bool has_ended;
};

// Where the scheduler goes on: jumps cost no call of the system, as switches of contexts do.
static jmp_buf scheduler;
static std::vector<Fiber> fibers;
static std::vector<float> mail;
// By the first thread of those that wait for each other within a warp.
static std::vector<Barrier> barriers_in_warps;
static Barrier barrier_of_block;
// True once a barrier was passed or a thread ended, since it was last looked at.
static bool moves;
static void (*body)(void **);
static void **body_arguments;

[[noreturn]] inline void fail(const char *what) {
    std::fprintf(stderr, "a kernel on the host: %s\n", what);
    std::abort();
}

// Goes on with the scheduler, until it comes back to this fiber.
__attribute__((noinline)) static void leave() {
    if (!_setjmp(fibers[threadIdx.x].place))
        _longjmp(scheduler, 1);
}

inline void wait_at(Barrier &barrier, unsigned int members) {
    const unsigned long passed = barrier.passed;
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        barrier.passed++;
        moves = true;
    }
    while (barrier.passed == passed)
        leave();
}

static void begin_fiber() {
    for (;;) {
        body(body_arguments);
        fibers[threadIdx.x].has_ended = moves = true;
        leave();
    }
}

// Goes on with a fiber, until it leaves.
__attribute__((noinline)) static void go_on(Fiber &fiber) {
    if (_setjmp(scheduler))
        return;
    if (fiber.has_begun)
        _longjmp(fiber.place, 1);
    fiber.has_begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&context, begin_fiber, 0);
    setcontext(&context);
}

inline void run_block() {
    for (Fiber &fiber : fibers)
        fiber.has_ended = false;
    for (unsigned int left = 1; left > 0;) {
        left = 0;
        moves = false;
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) {
            if (fibers[threadIdx.x].has_ended)
                continue;
            go_on(fibers[threadIdx.x]);
            left += !fibers[threadIdx.x].has_ended;
        }
        if (left > 0 && !moves)
            fail("a barrier or shuffle that not all of its threads reach");
    }
}

template <class... Parameters, std::size_t... places>
static void call(void (*kernel)(Parameters...), void **arguments, std::index_sequence<places...>) {
    kernel(*static_cast<std::remove_reference_t<Parameters> *>(arguments[places])...);
}

// Runs a kernel as the double of the driver asks for it: blocks, threads of each, bytes of a block's memory, the addresses of the
// arguments. A block's memory begins as NaNs, and nothing may be written behind it.
template <auto kernel> static void run(unsigned int blocks, unsigned int threads, unsigned int block_bytes, void **arguments) {
    gridDim.x = blocks;
    blockDim.x = threads;
    fibers.resize(threads);
    mail.resize(threads);
    body_arguments = arguments;
    body = [](void **given) {
        []<class... Parameters>(void (*function)(Parameters...), void **given) {
            call(function, given, std::index_sequence_for<Parameters...>());
        }(kernel, given);
    };
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        barriers_in_warps.assign(threads, {});
        barrier_of_block = {};
        std::memset(block_memory, 0xff, block_bytes + GUARD_BYTES);
        run_block();
        const unsigned char *const guard = reinterpret_cast<unsigned char *>(block_memory) + block_bytes;
        for (unsigned int place = 0; place < GUARD_BYTES; place++)
            if (guard[place] != 0xff)
                fail("it writes behind its block's memory");
    }
}

} // namespace host

inline void __syncthreads() { host::wait_at(host::barrier_of_block, blockDim.x); }

inline float __shfl_xor_sync(unsigned int mask, float value, int distance) {
    const unsigned int thread = threadIdx.x, lane = thread % host::WARP_THREADS;
    if (!(mask >> lane & 1) || !(mask >> (lane ^ distance) & 1) || blockDim.x % host::WARP_THREADS != 0)
        host::fail("a shuffle with a thread that is not in its mask");
    host::Barrier &barrier = host::barriers_in_warps[thread - lane + __builtin_ctz(mask)];
    const unsigned int members = __builtin_popcount(mask);
    host::mail[thread] = value;
    host::wait_at(barrier, members);
    const float received = host::mail[thread ^ distance];
    host::wait_at(barrier, members);
    return received;
}

#define ON_HOST(kernel)                                                                                                              \
    extern "C" void kernel##_on_host(unsigned int blocks, unsigned int threads, unsigned int block_bytes, void **arguments) {        \
        host::run<kernel>(blocks, threads, block_bytes, arguments);                                                                  \
    }
