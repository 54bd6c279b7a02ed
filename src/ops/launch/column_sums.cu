// The second stage of sums over many rows: sums over blocks of rows become one, in f64 and in one order.

const unsigned int COLUMNS = 8;

// `partial`: [outer, blocks, columns]; `sums`: [outer, columns]. A block of threads takes 8 columns.
template <class T> __device__ void column_sums(const float *__restrict__ partial, T *__restrict__ sums, long long blocks, long long columns) {
    double *const shares = (double *)own_memory();
    const unsigned int lanes = blockDim.x / COLUMNS, lane = threadIdx.x / COLUMNS;
    const unsigned int groups = (unsigned int)((columns + COLUMNS - 1) / COLUMNS);
    const long long outer = blockIdx.x / groups, column = (long long)(blockIdx.x % groups) * COLUMNS + threadIdx.x % COLUMNS;
    double share = 0.0;
    if (column < columns)
        for (long long block = lane; block < blocks; block += lanes)
            share += (double)partial[(outer * blocks + block) * columns + column];
    shares[threadIdx.x] = share;
    __syncthreads();
    if (lane == 0 && column < columns) {
        double total = 0.0;
        for (unsigned int other = 0; other < lanes; other++)
            total += shares[other * COLUMNS + threadIdx.x];
        round_to(sums[outer * columns + column], (float)total);
    }
}

#define DECLARE(T)                                                                                                                   \
    extern "C" __global__ void column_sums_##T(const float *partial, T *sums, long long blocks, long long columns) {                 \
        column_sums<T>(partial, sums, blocks, columns);                                                                              \
    }
DECLARE(float)
DECLARE(bfloat16)
#undef DECLARE
