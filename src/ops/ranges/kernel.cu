// The least and the greatest number of each of five tensors, in two stages.

// A NaN stays.
__device__ float lesser(float a, float b) { return b < a || b != b ? b : a; }
__device__ float greater(float a, float b) { return b > a || b != b ? b : a; }

// The least and the greatest number that one thread has seen, then those of its warp.
struct Range {
    float least, greatest;

    __device__ explicit Range(float number) : least(number), greatest(number) {}

    __device__ void take(float number) {
        least = lesser(least, number);
        greatest = greater(greatest, number);
    }

    __device__ void join_warp() {
        for (unsigned int distance = WARP / 2; distance > 0; distance /= 2) {
            least = lesser(least, __shfl_xor_sync(0xffffffff, least, distance));
            greatest = greater(greatest, __shfl_xor_sync(0xffffffff, greatest, distance));
        }
    }
};

// The range of the vectors number `first`, `first` + `step`, … of a tensor; of its first number where there are none.
template <class T, int N> __device__ Range seen(const void *tensor, unsigned int first, unsigned int step, long long count) {
    const T *const numbers = (const T *)tensor;
    Range range(widened(numbers[0]));
    for (unsigned int place = first; place < count; place += step) {
        const Vector<T, N> vector = vectors<N>(numbers)[place];
        for (int k = 0; k < N; k++)
            range.take(widened(vector.at[k]));
    }
    return range;
}

// True for each tensor in bfloat16.
struct Narrow {
    long long of[5];
};

// A block takes parts of one tensor, a warp each; `count`: vectors of a tensor; `ranges`: [tensors, 2, parts].
template <int N>
__device__ void ranges_of_parts(const void *a, const void *b, const void *c, const void *d, const void *e, float *__restrict__ ranges,
                                const Narrow &narrow, long long count, long long parts) {
    const unsigned int blocks = gridDim.x / 5, number = blockIdx.x / blocks;
    const unsigned int thread = blockIdx.x % blocks * blockDim.x + threadIdx.x, threads = blocks * blockDim.x;
    const void *const tensor = number == 0 ? a : number == 1 ? b : number == 2 ? c : number == 3 ? d : e;
    Range range = narrow.of[number] ? seen<bfloat16, N>(tensor, thread, threads, count) : seen<float, N>(tensor, thread, threads, count);
    range.join_warp();
    if (threadIdx.x % WARP == 0) {
        float *const place = ranges + 2 * number * parts + thread / WARP;
        place[0] = range.least;
        place[parts] = range.greatest;
    }
}

#define DECLARE(N)                                                                                                                   \
    extern "C" __global__ void ranges_of_parts_##N(const void *a, const void *b, const void *c, const void *d, const void *e,        \
                                                   float *ranges, Narrow narrow, long long count, long long parts) {                 \
        ranges_of_parts<N>(a, b, c, d, e, ranges, narrow, count, parts);                                                             \
    }
DECLARE(8)
DECLARE(1)
#undef DECLARE

// A block, one warp, for the least or the greatest number of a tensor; `parts`: [tensors, 2, count].
extern "C" __global__ void ranges_of_tensors(const float *parts, float *ranges, long long count) {
    Range range = seen<float, 1>(parts + blockIdx.x * count, threadIdx.x, blockDim.x, count);
    range.join_warp();
    if (threadIdx.x == 0)
        ranges[blockIdx.x] = blockIdx.x % 2 == 0 ? range.least : range.greatest;
}
