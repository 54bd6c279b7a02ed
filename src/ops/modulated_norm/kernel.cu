// Modulated layer normalization and its gradients, a row a team. T is the kind of the tokens, M that of the modulation and of
// every intermediate number.

// `sharing`: rows that share a row of the modulation; `moments`: mean of each row, and one over the root of its variance and
// epsilon.
template <class T, class M, int N>
__device__ void forward(const T *__restrict__ x, const M *__restrict__ factor, const M *__restrict__ shift, T *__restrict__ output,
                        float *__restrict__ moments, long long rows, long long width, long long sharing, float epsilon,
                        long long team_size) {
    const Team team(team_size);
    const unsigned int of_row = (unsigned int)width / N;
    for (long long row = (long long)blockIdx.x * team.teams + team.number; row < rows; row += (long long)gridDim.x * team.teams) {
        const Vector<T, N> *const from = vectors<N>(x + row * width);
        Vector<T, N> *const into = vectors<N>(output + row * width);
        const Vector<M, N> *const factors = vectors<N>(factor + row / sharing * width);
        const Vector<M, N> *const shifts = vectors<N>(shift + row / sharing * width);
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
        const float inverse = 1.0f / sqrtf(team.sum(squares) / (float)width + epsilon);
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<M, N> scale = factors[place], move = shifts[place];
            Vector<T, N> numbers = from[place];
            for (int k = 0; k < N; k++) {
                const float normalized = rounded<M>((widened(numbers.at[k]) - mean) * inverse);
                const float scaled = rounded<M>(normalized * widened(scale.at[k]));
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

// With n the normalized row and g its gradient, that of x is inverse · (g − mean(g) − n · mean(g · n)); factor's and shift's are
// the sums of grad_output · n and of grad_output, here over a block's `block_rows` rows: `partial` [2, modulations, blocks, width].
template <class T, class M, int N>
__device__ void backward(const T *__restrict__ x, const M *__restrict__ factor, const float *__restrict__ moments,
                         const T *__restrict__ grad_output, T *__restrict__ grad_x, float *__restrict__ partial, long long width,
                         long long sharing, long long block_rows, long long team_size) {
    const Team team(team_size);
    const unsigned int of_row = (unsigned int)width / N;
    float *const of_factor = own_memory() + 2 * team.number * width, *const of_shift = of_factor + width;
    for (unsigned int place = team.member; place < of_row; place += team.size)
        vectors<N>(of_factor)[place] = vectors<N>(of_shift)[place] = {};
    const long long blocks = (sharing + block_rows - 1) / block_rows, modulation = blockIdx.x / blocks;
    const Vector<M, N> *const factors = vectors<N>(factor + modulation * width);
    const long long first = blockIdx.x % blocks * block_rows, end = first + block_rows < sharing ? first + block_rows : sharing;
    for (long long row = modulation * sharing + first + team.number; row < modulation * sharing + end; row += team.teams) {
        const Vector<T, N> *const from = vectors<N>(x + row * width), *const gradients = vectors<N>(grad_output + row * width);
        Vector<T, N> *const into = vectors<N>(grad_x + row * width);
        const float mean = moments[2 * row], inverse = moments[2 * row + 1];
        float sum = 0.0f, products = 0.0f;
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<T, N> numbers = from[place], gradient = gradients[place];
            const Vector<M, N> scale = factors[place];
            Vector<float, N> for_factor = vectors<N>(of_factor)[place], for_shift = vectors<N>(of_shift)[place];
            for (int k = 0; k < N; k++) {
                const float number = widened(gradient.at[k]), normalized = (widened(numbers.at[k]) - mean) * inverse;
                const float scaled = number * widened(scale.at[k]);
                for_factor.at[k] += number * normalized;
                for_shift.at[k] += number;
                sum += scaled;
                products += scaled * normalized;
            }
            vectors<N>(of_factor)[place] = for_factor;
            vectors<N>(of_shift)[place] = for_shift;
        }
        const float gradient_mean = team.sum(sum) / (float)width, product_mean = team.sum(products) / (float)width;
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<T, N> gradient = gradients[place];
            const Vector<M, N> scale = factors[place];
            Vector<T, N> numbers = from[place];
            for (int k = 0; k < N; k++) {
                const float normalized = (widened(numbers.at[k]) - mean) * inverse;
                const float scaled = widened(gradient.at[k]) * widened(scale.at[k]);
                round_to(numbers.at[k], inverse * (scaled - gradient_mean - normalized * product_mean));
            }
            into[place] = numbers;
        }
    }
    __syncthreads();
    float *const of_block = partial + blockIdx.x * width;
    add_teams(own_memory(), (unsigned int)width, 2 * (unsigned int)width, team.teams, of_block);
    add_teams(own_memory() + width, (unsigned int)width, 2 * (unsigned int)width, team.teams, of_block + gridDim.x * width);
}

#define DECLARE(T, M, N)                                                                                                             \
    extern "C" __global__ void modulated_norm_##T##_##M##_##N(const T *x, const M *factor, const M *shift, T *output, float *moments, \
                                                              long long rows, long long width, long long sharing, float epsilon,     \
                                                              long long team_size) {                                                 \
        forward<T, M, N>(x, factor, shift, output, moments, rows, width, sharing, epsilon, team_size);                               \
    }                                                                                                                                \
    extern "C" __global__ void modulated_norm_backward_##T##_##M##_##N(                                                              \
        const T *x, const M *factor, const float *moments, const T *grad_output, T *grad_x, float *partial, long long width,         \
        long long sharing, long long block_rows, long long team_size) {                                                              \
        backward<T, M, N>(x, factor, moments, grad_output, grad_x, partial, width, sharing, block_rows, team_size);                  \
    }
FOR_EACH_MODULATED(DECLARE)
#undef DECLARE
