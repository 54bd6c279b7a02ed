// GELU and its gradient, with the operations of cpu.rs in their order and therefore with its bits.

// 2 · sqrt(2/π), and the factor of the cube.
const float SCALE = 1.595769f, CUBE = 0.044715f;

// e to the power of x, as `lanes::exp` has it.
__device__ float power_of_e(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    const float round = 12582912.0f, shifted = fmaf(x, 1.44269504f, round), whole = shifted - round;
    const float r = fmaf(whole, 2.1219444e-4f, fmaf(whole, -0.6933594f, x));
    float sum = fmaf(1.0f / 720.0f, r, 1.0f / 120.0f);
    sum = fmaf(sum, r, 1.0f / 24.0f);
    sum = fmaf(sum, r, 1.0f / 6.0f);
    sum = fmaf(sum, r, 0.5f);
    sum = fmaf(sum, r, 1.0f);
    sum = fmaf(sum, r, 1.0f);
    return sum * __uint_as_float((__float_as_uint(shifted) << 23) + __float_as_uint(1.0f));
}

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

template <class T, int N> __device__ void forward(const T *__restrict__ x, T *__restrict__ output, long long count) {
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        Vector<T, N> numbers = vectors<N>(x)[place];
        for (int k = 0; k < N; k++)
            round_to(numbers.at[k], value(widened(numbers.at[k])));
        vectors<N>(output)[place] = numbers;
    }
}

template <class T, int N>
__device__ void backward(const T *__restrict__ x, const T *__restrict__ grad_output, T *__restrict__ grad_x, long long count) {
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const Vector<T, N> numbers = vectors<N>(x)[place];
        Vector<T, N> gradient = vectors<N>(grad_output)[place];
        for (int k = 0; k < N; k++)
            round_to(gradient.at[k], widened(gradient.at[k]) * slope(widened(numbers.at[k])));
        vectors<N>(grad_x)[place] = gradient;
    }
}

// `count`: vectors.
#define DECLARE(T, N)                                                                                                                \
    extern "C" __global__ void gelu_tanh_##T##_##N(const T *x, T *output, long long count) { forward<T, N>(x, output, count); }      \
    extern "C" __global__ void gelu_tanh_backward_##T##_##N(const T *x, const T *grad_output, T *grad_x, long long count) {          \
        backward<T, N>(x, grad_output, grad_x, count);                                                                               \
    }
FOR_EACH_KIND(DECLARE)
#undef DECLARE
