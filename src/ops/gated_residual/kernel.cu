// Gated residual and its gradients. T is the kind of the tokens, M that of the gate and of the intermediate product.

// Forward, with the bits of cpu.rs. `count`: vectors; `width`: numbers of a row; `sharing`: rows that share a row of the gate;
// `pitch`: from the start of a row of the gate to the start of the next one.
template <class T, class M, int N>
__device__ void forward(const T *__restrict__ x, const M *__restrict__ gate, const T *__restrict__ change, T *__restrict__ output,
                        long long count, long long width, long long sharing, long long pitch) {
    const unsigned int of_row = (unsigned int)width / N;
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const unsigned int gate_row = place / of_row / (unsigned int)sharing;
        const Vector<M, N> gates = vectors<N>(gate + gate_row * pitch)[place % of_row];
        const Vector<T, N> changes = vectors<N>(change)[place];
        Vector<T, N> numbers = vectors<N>(x)[place];
        for (int k = 0; k < N; k++)
            round_to(numbers.at[k], widened(numbers.at[k]) + rounded<M>(widened(gates.at[k]) * widened(changes.at[k])));
        vectors<N>(output)[place] = numbers;
    }
}

// Gradients of the change, with the bits of cpu.rs, and of the gate as sums over blocks of rows, `partial` [gates, blocks, width].
// A thread keeps a vector of columns through a block of `rows` rows; a block of threads takes neighbouring ones.
template <class T, class M, int N>
__device__ void backward(const T *__restrict__ change, const M *__restrict__ gate, const T *__restrict__ grad_output,
                         T *__restrict__ grad_change, float *__restrict__ partial, long long width, long long sharing, long long pitch,
                         long long rows) {
    const unsigned int of_row = (unsigned int)width / N, tiles = (of_row + blockDim.x - 1) / blockDim.x;
    const unsigned int column = blockIdx.x % tiles * blockDim.x + threadIdx.x, block = blockIdx.x / tiles;
    if (column >= of_row)
        return;
    const unsigned int blocks = (unsigned int)((sharing + rows - 1) / rows), gate_row = block / blocks;
    const long long first = block % blocks * rows, end = first + rows < sharing ? first + rows : sharing;
    const Vector<M, N> gates = vectors<N>(gate + gate_row * pitch)[column];
    Vector<float, N> sums = {};
    for (long long row = first; row < end; row++) {
        const long long place = (gate_row * sharing + row) * of_row + column;
        const Vector<T, N> changes = vectors<N>(change)[place];
        Vector<T, N> gradient = vectors<N>(grad_output)[place];
        for (int k = 0; k < N; k++) {
            const float number = widened(gradient.at[k]);
            sums.at[k] += number * widened(changes.at[k]);
            round_to(gradient.at[k], number * widened(gates.at[k]));
        }
        vectors<N>(grad_change)[place] = gradient;
    }
    vectors<N>(partial)[(long long)block * of_row + column] = sums;
}

#define DECLARE(T, M, N)                                                                                                             \
    extern "C" __global__ void gated_residual_##T##_##M##_##N(const T *x, const M *gate, const T *change, T *output, long long count, \
                                                              long long width, long long sharing, long long pitch) {                 \
        forward<T, M, N>(x, gate, change, output, count, width, sharing, pitch);                                                     \
    }                                                                                                                                \
    extern "C" __global__ void gated_residual_backward_##T##_##M##_##N(const T *change, const M *gate, const T *grad_output,         \
                                                                       T *grad_change, float *partial, long long width,              \
                                                                       long long sharing, long long pitch, long long rows) {         \
        backward<T, M, N>(change, gate, grad_output, grad_change, partial, width, sharing, pitch, rows);                             \
    }
FOR_EACH_MODULATED(DECLARE)
#undef DECLARE
