// The squared error and its gradient, with the bits of libtorch's operators. T is the kind of the prediction; `count`: vectors.
template <class T, int N>
__device__ void forward(const T *__restrict__ prediction, const float *__restrict__ target, float *__restrict__ errors,
                        long long count) {
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const Vector<T, N> predicted = vectors<N>(prediction)[place];
        Vector<float, N> numbers = vectors<N>(target)[place];
        for (int k = 0; k < N; k++) {
            const float error = widened(predicted.at[k]) - numbers.at[k];
            numbers.at[k] = error * error;
        }
        vectors<N>(errors)[place] = numbers;
    }
}

template <class T, int N>
__device__ void backward(const T *__restrict__ prediction, const float *__restrict__ target, const float *__restrict__ grad_errors,
                         T *__restrict__ grad_prediction, long long count) {
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const Vector<float, N> targets = vectors<N>(target)[place], gradients = vectors<N>(grad_errors)[place];
        Vector<T, N> numbers = vectors<N>(prediction)[place];
        for (int k = 0; k < N; k++)
            round_to(numbers.at[k], 2.0f * (widened(numbers.at[k]) - targets.at[k]) * gradients.at[k]);
        vectors<N>(grad_prediction)[place] = numbers;
    }
}

#define DECLARE(T, N)                                                                                                                \
    extern "C" __global__ void squared_error_##T##_##N(const T *prediction, const float *target, float *errors, long long count) {   \
        forward<T, N>(prediction, target, errors, count);                                                                            \
    }                                                                                                                                \
    extern "C" __global__ void squared_error_backward_##T##_##N(const T *prediction, const float *target, const float *grad_errors,  \
                                                                T *grad_prediction, long long count) {                               \
        backward<T, N>(prediction, target, grad_errors, grad_prediction, count);                                                     \
    }
FOR_EACH_KIND(DECLARE)
#undef DECLARE
