// SiLU of one half of a row's features times the other half, and its gradients, with the operations of cpu.rs in their order and
// therefore with its bits.

// 1 / (1 + exp(−x)), and 1 minus it.
struct Sigmoid {
    float value, rest;

    __device__ explicit Sigmoid(float x) {
        const float power = power_of_e(-x);
        value = 1.0f / (1.0f + power);
        rest = power * value;
    }
};

// `count`: vectors of the output; `width`: numbers of its rows.
template <class T, int N>
__device__ void forward(const T *__restrict__ x, T *__restrict__ output, long long count, long long width, const Pitches<2> &pitches) {
    const unsigned int of_row = (unsigned int)width / N;
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const unsigned int row = place / of_row, column = place % of_row;
        const Vector<T, N> *const from = vectors<N>(x + row * pitches.of[0]);
        const Vector<T, N> factors = from[of_row + column];
        Vector<T, N> numbers = from[column];
        for (int k = 0; k < N; k++) {
            const float gate = widened(numbers.at[k]);
            round_to(numbers.at[k], rounded<T>(gate * Sigmoid(gate).value) * widened(factors.at[k]));
        }
        vectors<N>(output + row * pitches.of[1])[column] = numbers;
    }
}

template <class T, int N>
__device__ void backward(const T *__restrict__ x, const T *__restrict__ grad_output, T *__restrict__ grad_x, long long count,
                         long long width, const Pitches<3> &pitches) {
    const unsigned int of_row = (unsigned int)width / N;
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const unsigned int row = place / of_row, column = place % of_row;
        const Vector<T, N> *const from = vectors<N>(x + row * pitches.of[0]);
        Vector<T, N> *const into = vectors<N>(grad_x + row * pitches.of[2]);
        const Vector<T, N> gradient = vectors<N>(grad_output + row * pitches.of[1])[column];
        Vector<T, N> gates = from[column], factors = from[of_row + column];
        for (int k = 0; k < N; k++) {
            const float gate = widened(gates.at[k]), number = widened(gradient.at[k]);
            const Sigmoid sigmoid(gate);
            const float of_active = rounded<T>(number * widened(factors.at[k]));
            round_to(gates.at[k], of_active * (sigmoid.value * fmaf(gate, sigmoid.rest, 1.0f)));
            round_to(factors.at[k], number * rounded<T>(gate * sigmoid.value));
        }
        into[column] = gates;
        into[of_row + column] = factors;
    }
}

#define DECLARE(T, N)                                                                                                                \
    extern "C" __global__ void silu_gate_##T##_##N(const T *x, T *output, long long count, long long width, Pitches<2> pitches) {    \
        forward<T, N>(x, output, count, width, pitches);                                                                             \
    }                                                                                                                                \
    extern "C" __global__ void silu_gate_backward_##T##_##N(const T *x, const T *grad_output, T *grad_x, long long count,            \
                                                            long long width, Pitches<3> pitches) {                                   \
        backward<T, N>(x, grad_output, grad_x, count, width, pitches);                                                               \
    }
FOR_EACH_KIND(DECLARE)
#undef DECLARE
