// GELU and its gradient, with the operations of cpu.rs in their order and therefore with its bits.

// 2 · sqrt(2/π), and the factor of the cube.
const float SCALE = 1.595769f, CUBE = 0.044715f;

// (1 + tanh(u/2)) / 2 = 1 / (1 + exp(−u)), and 1 minus it.
struct Halves {
    float half, rest;

    __device__ explicit Halves(float x) {
        const float power = power_of_e(-SCALE * x * fmaf(CUBE * x, x, 1.0f));
        half = 1.0f / (1.0f + power);
        rest = power * half;
    }
};

__device__ float value(float x) { return x * Halves(x).half; }

__device__ float slope(float x) {
    const Halves halves(x);
    const float inner = SCALE * fmaf(3.0f * CUBE * x, x, 1.0f);
    return fmaf(x * halves.half * halves.rest, inner, halves.half);
}

// `count`: vectors; `width`: numbers of a row.
template <class T, int N>
__device__ void forward(const T *__restrict__ x, T *__restrict__ output, long long count, long long width, const Pitches<2> &pitches) {
    const unsigned int of_row = (unsigned int)width / N;
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const unsigned int row = place / of_row, column = place % of_row;
        Vector<T, N> numbers = vectors<N>(x + row * pitches.of[0])[column];
        for (int k = 0; k < N; k++)
            round_to(numbers.at[k], value(widened(numbers.at[k])));
        vectors<N>(output + row * pitches.of[1])[column] = numbers;
    }
}

template <class T, int N>
__device__ void backward(const T *__restrict__ x, const T *__restrict__ grad_output, T *__restrict__ grad_x, long long count,
                         long long width, const Pitches<3> &pitches) {
    const unsigned int of_row = (unsigned int)width / N;
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const unsigned int row = place / of_row, column = place % of_row;
        const Vector<T, N> numbers = vectors<N>(x + row * pitches.of[0])[column];
        Vector<T, N> gradient = vectors<N>(grad_output + row * pitches.of[1])[column];
        for (int k = 0; k < N; k++)
            round_to(gradient.at[k], widened(gradient.at[k]) * slope(widened(numbers.at[k])));
        vectors<N>(grad_x + row * pitches.of[2])[column] = gradient;
    }
}

#define DECLARE(T, N)                                                                                                                \
    extern "C" __global__ void gelu_tanh_##T##_##N(const T *x, T *output, long long count, long long width, Pitches<2> pitches) {    \
        forward<T, N>(x, output, count, width, pitches);                                                                             \
    }                                                                                                                                \
    extern "C" __global__ void gelu_tanh_backward_##T##_##N(const T *x, const T *grad_output, T *grad_x, long long count,            \
                                                            long long width, Pitches<3> pitches) {                                   \
        backward<T, N>(x, grad_output, grad_x, count, width, pitches);                                                               \
    }
FOR_EACH_KIND(DECLARE)
#undef DECLARE
