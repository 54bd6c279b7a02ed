// Root-mean-square normalization and its gradients, a row a team; with a table of angles also the rotation of what was
// normalized.

// 1 / sqrt(mean + epsilon) of a sum of squares.
__device__ float inverse_root(float squares, long long width, float epsilon) { return 1.0f / sqrtf(squares / (float)width + epsilon); }

// Of the tokens whose parts are the rows, in numbers: a head, a token, and from the start of a token of x to the start of the next
// one; then the tokens of a sample.
struct Sizes {
    long long head, token, pitch, of_sample;
};

// The tokens whose parts are the rows: where they stand, and the angles by which they turn.
struct TokenLayout {
    // Cosine and sine of each token of a sample and each pair of a head; null if nothing turns.
    const float *table;
    // As in Sizes.
    unsigned int head, token, pitch, of_sample;

    __device__ TokenLayout(const float *table, const Sizes &sizes)
        : table(table), head(sizes.head), token(sizes.token), pitch(sizes.pitch), of_sample(sizes.of_sample) {}

    // The place of a row of x.
    __device__ long long start(unsigned int row, unsigned int width) const {
        const unsigned int rows = token / width;
        return (long long)(row / rows) * pitch + row % rows * width;
    }

    // Turns numbers of kind T, which stand at a place of a row; `sign`: of the angles.
    template <class T, int N>
    __device__ Vector<T, N> turn(const Vector<T, N> &numbers, unsigned int row, unsigned int width, unsigned int place, float sign) const {
        if constexpr (N > 1) {
            if (table) {
                const unsigned int number = row / (token / width) % of_sample;
                return turned(numbers, *vectors<N>(table + (long long)number * head + place * N % head), sign);
            }
        }
        return numbers;
    }
};

template <class T, int N>
__device__ void forward(const T *__restrict__ x, const T *__restrict__ weight, T *__restrict__ output, long long rows, long long width,
                        float epsilon, long long rounds_before_scale, const TokenLayout &tokens, long long team_size) {
    const Team team(team_size);
    const unsigned int of_row = (unsigned int)width / N;
    for (long long row = (long long)blockIdx.x * team.teams + team.number; row < rows; row += (long long)gridDim.x * team.teams) {
        const Vector<T, N> *const from = vectors<N>(x + tokens.start(row, width));
        Vector<T, N> *const into = vectors<N>(output + row * width);
        float squares = 0.0f;
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<T, N> numbers = from[place];
            for (int k = 0; k < N; k++)
                squares += widened(numbers.at[k]) * widened(numbers.at[k]);
        }
        const float inverse = inverse_root(team.sum(squares), width, epsilon);
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<T, N> weights = vectors<N>(weight)[place];
            Vector<T, N> numbers = from[place];
            for (int k = 0; k < N; k++) {
                const float normalized = widened(numbers.at[k]) * inverse;
                round_to(numbers.at[k], (rounds_before_scale ? rounded<T>(normalized) : normalized) * widened(weights.at[k]));
            }
            into[place] = tokens.turn(numbers, row, width, place, 1.0f);
        }
    }
}

// With n = x · inverse and g the gradient of n, that of x is inverse · (g − n · mean(g · n)); the weight's is the sum of
// grad_output, turned back, · n, here over a block's `block_rows` rows: `partial` [blocks, width].
template <class T, int N>
__device__ void backward(const T *__restrict__ x, const T *__restrict__ weight, const T *__restrict__ grad_output, T *__restrict__ grad_x,
                         float *__restrict__ partial, long long rows, long long width, float epsilon, long long block_rows,
                         const TokenLayout &tokens, long long team_size) {
    const Team team(team_size);
    const unsigned int of_row = (unsigned int)width / N;
    float *const columns = own_memory() + team.number * width;
    for (unsigned int place = team.member; place < of_row; place += team.size)
        vectors<N>(columns)[place] = {};
    const long long first = blockIdx.x * block_rows, end = first + block_rows < rows ? first + block_rows : rows;
    for (long long row = first + team.number; row < end; row += team.teams) {
        const Vector<T, N> *const from = vectors<N>(x + tokens.start(row, width));
        const Vector<T, N> *const gradients = vectors<N>(grad_output + row * width);
        Vector<T, N> *const into = vectors<N>(grad_x + row * width);
        float squares = 0.0f, products = 0.0f;
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<T, N> numbers = from[place], weights = vectors<N>(weight)[place];
            const Vector<T, N> gradient = tokens.turn(gradients[place], row, width, place, -1.0f);
            for (int k = 0; k < N; k++) {
                const float number = widened(numbers.at[k]);
                squares += number * number;
                products += widened(gradient.at[k]) * number * widened(weights.at[k]);
            }
        }
        const float inverse = inverse_root(team.sum(squares), width, epsilon);
        const float mean = team.sum(products) * inverse / (float)width;
        for (unsigned int place = team.member; place < of_row; place += team.size) {
            const Vector<T, N> weights = vectors<N>(weight)[place];
            const Vector<T, N> gradient = tokens.turn(gradients[place], row, width, place, -1.0f);
            Vector<T, N> numbers = from[place];
            Vector<float, N> sums = vectors<N>(columns)[place];
            for (int k = 0; k < N; k++) {
                const float number = widened(gradient.at[k]), normalized = widened(numbers.at[k]) * inverse;
                sums.at[k] += number * normalized;
                round_to(numbers.at[k], inverse * (number * widened(weights.at[k]) - normalized * mean));
            }
            vectors<N>(columns)[place] = sums;
            into[place] = numbers;
        }
    }
    __syncthreads();
    add_teams(own_memory(), (unsigned int)width, (unsigned int)width, team.teams, partial + blockIdx.x * width);
}

#define DECLARE(T, N)                                                                                                                \
    extern "C" __global__ void rms_norm_##T##_##N(const T *x, const T *weight, T *output, const float *table, long long rows,        \
                                                  long long width, float epsilon, long long rounds_before_scale, Sizes sizes,        \
                                                  long long team_size) {                                                             \
        forward<T, N>(x, weight, output, rows, width, epsilon, rounds_before_scale, TokenLayout(table, sizes), team_size);                \
    }                                                                                                                                \
    extern "C" __global__ void rms_norm_backward_##T##_##N(const T *x, const T *weight, const T *grad_output, T *grad_x,             \
                                                           float *partial, const float *table, long long rows, long long width,      \
                                                           float epsilon, long long block_rows, Sizes sizes, long long team_size) {  \
        backward<T, N>(x, weight, grad_output, grad_x, partial, rows, width, epsilon, block_rows, TokenLayout(table, sizes), team_size);  \
    }
FOR_EACH_KIND(DECLARE)
// Pairs that begin anywhere.
DECLARE(float, 2)
DECLARE(bfloat16, 2)
#undef DECLARE
