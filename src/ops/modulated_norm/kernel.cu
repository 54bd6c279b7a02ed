// Modulated layer normalization and its gradients, a row a team. T is the kind of the tokens, M that of the modulation and of
// every intermediate number.

struct Norm {
    float epsilon, base;
};

// What a row is multiplied by.
template <class M, int N> __device__ Vector<M, N> factors_of(Vector<M, N> scale, float base) {
    for (int k = 0; k < N; k++)
        round_to(scale.at[k], widened(scale.at[k]) + base);
    return scale;
}

// Numbers and those to be added to them, rounded.
template <class T, int N> __device__ Vector<T, N> sum_of(Vector<T, N> numbers, const Vector<T, N> &others) {
    for (int k = 0; k < N; k++)
        round_to(numbers.at[k], widened(numbers.at[k]) + widened(others.at[k]));
    return numbers;
}

// `sharing`: rows that share a row of the modulation; `pitches`: of scale and shift; `moments`: mean of each row, and one over the root of its variance and
// epsilon.
template <class T, class M, int N>
__device__ void forward(const T *__restrict__ x, const M *__restrict__ scale, const M *__restrict__ shift, T *__restrict__ output,
                        float *__restrict__ moments, long long rows, long long width, long long sharing, const Pitches<2> &pitches,
                        const Norm &norm, long long team_size) {
    const Team team(team_size);
    const unsigned int of_row = (unsigned int)width / N;
    for (long long row = (long long)blockIdx.x * team.teams + team.number; row < rows; row += (long long)gridDim.x * team.teams) {
        const Vector<T, N> *const from = vectors<N>(x + row * width);
        Vector<T, N> *const into = vectors<N>(output + row * width);
        const Vector<M, N> *const scales = vectors<N>(scale + row / sharing * pitches.of[0]);
        const Vector<M, N> *const shifts = vectors<N>(shift + row / sharing * pitches.of[1]);
        float sum = 0.0f;
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<T, N> numbers = from[place];
            for (int k = 0; k < N; k++)
                sum += widened(numbers.at[k]);
        }
        const float mean = team.sum(sum) / (float)width;
        float squares = 0.0f;
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<T, N> numbers = from[place];
            for (int k = 0; k < N; k++) {
                const float difference = widened(numbers.at[k]) - mean;
                squares += difference * difference;
            }
        }
        const float inverse = 1.0f / sqrtf(team.sum(squares) / (float)width + norm.epsilon);
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<M, N> factors = factors_of(scales[place], norm.base), move = shifts[place];
            Vector<T, N> numbers = from[place];
            for (int k = 0; k < N; k++) {
                const float normalized = rounded<M>((widened(numbers.at[k]) - mean) * inverse);
                const float scaled = rounded<M>(normalized * widened(factors.at[k]));
                round_to(numbers.at[k], rounded<M>(scaled + widened(move.at[k])));
            }
            into[place] = numbers;
        }
        if (team.member == 0) {
            moments[2 * row] = mean;
            moments[2 * row + 1] = inverse;
        }
    }
}

// With n the normalized row and g its gradient, that of x is inverse · (g − mean(g) − n · mean(g · n)), and what other uses of x
// `passed`, if any; scale's and shift's are the sums of grad_output · n and of grad_output, here over a block's `block_rows` rows:
// `partial` [2, modulations, blocks, width].
template <class T, class M, int N>
__device__ void backward(const T *__restrict__ x, const M *__restrict__ scale, const float *__restrict__ moments,
                         const T *__restrict__ grad_output, const T *__restrict__ passed, T *__restrict__ grad_x,
                         float *__restrict__ partial, long long width, long long sharing, long long pitch, float base,
                         long long block_rows, long long team_size) {
    const Team team(team_size);
    const unsigned int of_row = (unsigned int)width / N;
    float *const of_scale = own_memory() + 2 * team.number * width, *const of_shift = of_scale + width;
    for (unsigned int place = team.member; place < of_row; place += team.size)
        vectors<N>(of_scale)[place] = vectors<N>(of_shift)[place] = {};
    const long long blocks = (sharing + block_rows - 1) / block_rows, modulation = blockIdx.x / blocks;
    const Vector<M, N> *const scales = vectors<N>(scale + modulation * pitch);
    const long long first = blockIdx.x % blocks * block_rows, end = first + block_rows < sharing ? first + block_rows : sharing;
    for (long long row = modulation * sharing + first + team.number; row < modulation * sharing + end; row += team.teams) {
        const Vector<T, N> *const from = vectors<N>(x + row * width), *const gradients = vectors<N>(grad_output + row * width);
        Vector<T, N> *const into = vectors<N>(grad_x + row * width);
        const float mean = moments[2 * row], inverse = moments[2 * row + 1];
        float sum = 0.0f, products = 0.0f;
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<T, N> numbers = from[place], gradient = gradients[place];
            const Vector<M, N> factors = factors_of(scales[place], base);
            Vector<float, N> for_scale = vectors<N>(of_scale)[place], for_shift = vectors<N>(of_shift)[place];
            for (int k = 0; k < N; k++) {
                const float number = widened(gradient.at[k]), normalized = (widened(numbers.at[k]) - mean) * inverse;
                const float scaled = number * widened(factors.at[k]);
                for_scale.at[k] += number * normalized;
                for_shift.at[k] += number;
                sum += scaled;
                products += scaled * normalized;
            }
            vectors<N>(of_scale)[place] = for_scale;
            vectors<N>(of_shift)[place] = for_shift;
        }
        const float gradient_mean = team.sum(sum) / (float)width, product_mean = team.sum(products) / (float)width;
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<T, N> gradient = gradients[place];
            const Vector<M, N> factors = factors_of(scales[place], base);
            Vector<T, N> numbers = from[place];
            for (int k = 0; k < N; k++) {
                const float normalized = (widened(numbers.at[k]) - mean) * inverse;
                const float scaled = widened(gradient.at[k]) * widened(factors.at[k]);
                round_to(numbers.at[k], inverse * (scaled - gradient_mean - normalized * product_mean));
            }
            into[place] = passed ? sum_of(numbers, vectors<N>(passed + row * width)[place]) : numbers;
        }
    }
    __syncthreads();
    float *const of_block = partial + blockIdx.x * width;
    add_teams(own_memory(), (unsigned int)width, 2 * (unsigned int)width, team.teams, of_block);
    add_teams(own_memory() + width, (unsigned int)width, 2 * (unsigned int)width, team.teams, of_block + gridDim.x * width);
}

#define DECLARE(T, M, N)                                                                                                             \
    extern "C" __global__ void modulated_norm_##T##_##M##_##N(const T *x, const M *scale, const M *shift, T *output, float *moments, \
                                                              long long rows, long long width, long long sharing, Pitches<2> pitches, \
                                                              Norm norm, long long team_size) {                                      \
        forward<T, M, N>(x, scale, shift, output, moments, rows, width, sharing, pitches, norm, team_size);                          \
    }                                                                                                                                \
    extern "C" __global__ void modulated_norm_backward_##T##_##M##_##N(                                                              \
        const T *x, const M *scale, const float *moments, const T *grad_output, const T *passed, T *grad_x, float *partial,          \
        long long width, long long sharing, long long pitch, float base, long long block_rows, long long team_size) {                \
        backward<T, M, N>(x, scale, moments, grad_output, passed, grad_x, partial, width, sharing, pitch, base, block_rows,          \
                          team_size);                                                                                                \
    }
FOR_EACH_MODULATED(DECLARE)
#undef DECLARE
