// Rotation of pairs, with the bits of cpu.rs.

// Sizes in numbers: a head's, a token's, all tokens of a sample; `count`: vectors. `sign`: of the angles.
template <class T, int N>
__device__ void forward(const T *__restrict__ x, const float *__restrict__ table, T *__restrict__ output, long long count, long long head,
                        long long token, long long tokens, float sign) {
    const unsigned int of_head = (unsigned int)head / N, of_token = (unsigned int)token / N;
    for (unsigned int place = thread_of_grid(); place < count; place += threads_of_grid()) {
        const unsigned int row = place / of_token % (unsigned int)tokens, column = place % of_head;
        vectors<N>(output)[place] = turned(vectors<N>(x)[place], vectors<N>(table)[row * of_head + column], sign);
    }
}

#define DECLARE(T, N)                                                                                                                \
    extern "C" __global__ void rotation_##T##_##N(const T *x, const float *table, T *output, long long count, long long head,        \
                                                  long long token, long long tokens, float sign) {                                   \
        forward<T, N>(x, table, output, count, head, token, tokens, sign);                                                           \
    }
DECLARE(float, 4)
DECLARE(float, 2)
DECLARE(bfloat16, 8)
DECLARE(bfloat16, 2)
#undef DECLARE
