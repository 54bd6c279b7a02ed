// Data mixed with noise, with the bits of libtorch's operators. `count`: vectors; `of_sample`: numbers of a sample.
template <class T, int N>
__device__ void noising(const T *__restrict__ data, const float *__restrict__ noise, const float *__restrict__ sigma,
                        T *__restrict__ output, long long count, long long of_sample) {
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const float of_noise = sigma[place / ((unsigned int)of_sample / N)], of_data = 1.0f - of_noise;
        const Vector<float, N> noises = vectors<N>(noise)[place];
        Vector<T, N> numbers = vectors<N>(data)[place];
        for (int k = 0; k < N; k++)
            round_to(numbers.at[k], of_data * widened(numbers.at[k]) + of_noise * noises.at[k]);
        vectors<N>(output)[place] = numbers;
    }
}

#define DECLARE(T, N)                                                                                                                \
    extern "C" __global__ void noising_##T##_##N(const T *data, const float *noise, const float *sigma, T *output, long long count,  \
                                                 long long of_sample) {                                                              \
        noising<T, N>(data, noise, sigma, output, count, of_sample);                                                                 \
    }
FOR_EACH_KIND(DECLARE)
#undef DECLARE
