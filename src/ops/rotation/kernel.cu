// Rotation of pairs, with the bits of cpu.rs.

// Sizes in numbers: a head's, a token's, all tokens of a sample; `count`: vectors. `sign`: of the angles.
template <class T, int N>
__device__ void turned(const T *__restrict__ x, const float *__restrict__ table, T *__restrict__ output, long long count, long long head,
                       long long token, long long tokens, float sign) {
    const unsigned int of_head = (unsigned int)head / N, of_token = (unsigned int)token / N;
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const unsigned int row = place / of_token % (unsigned int)tokens, column = place % of_head;
        const Vector<float, N> angles = vectors<N>(table)[row * of_head + column];
        Vector<T, N> numbers = vectors<N>(x)[place];
        for (int k = 0; k < N; k += 2) {
            const float first = widened(numbers.at[k]), second = widened(numbers.at[k + 1]);
            const float cosine = angles.at[k], sine = sign * angles.at[k + 1];
            round_to(numbers.at[k], first * cosine - second * sine);
            round_to(numbers.at[k + 1], first * sine + second * cosine);
        }
        vectors<N>(output)[place] = numbers;
    }
}

#define DECLARE(T, N)                                                                                                                \
    extern "C" __global__ void rotation_##T##_##N(const T *x, const float *table, T *output, long long count, long long head,        \
                                                  long long token, long long tokens, float sign) {                                   \
        turned<T, N>(x, table, output, count, head, token, tokens, sign);                                                            \
    }
DECLARE(float, 4)
DECLARE(float, 2)
DECLARE(bfloat16, 8)
DECLARE(bfloat16, 2)
#undef DECLARE
