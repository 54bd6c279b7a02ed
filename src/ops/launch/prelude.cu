// What the texts of all operations begin with: kinds, vectors of numbers, and sums over the threads of a row.
//
// NVRTC compiles a text when it is first needed, with --fmad=false: a product is rounded before it is added unless fmaf says
// otherwise, and every operation is rounded as IEEE 754 says. The texts are C++ where __global__ and its like are defined to
// nothing: tests run them on a CPU, with a fiber for each thread.

struct bfloat16 {
    unsigned short bits;
};

__device__ float widened(float value) { return value; }
__device__ float widened(bfloat16 value) { return __uint_as_float((unsigned int)value.bits << 16); }

__device__ void round_to(float &into, float value) { into = value; }

// The nearest, of two equally near ones the even one.
__device__ void round_to(bfloat16 &into, float value) {
    const unsigned int bits = __float_as_uint(value);
    into.bits = value != value ? 0x7fc0 : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A number as the kind T holds it.
template <class T> __device__ float rounded(float value) {
    T narrow;
    round_to(narrow, value);
    return widened(narrow);
}

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

// Numbers that are read or written together, 16 bytes at a time if there are as many.
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) : 16) Vector {
    T at[N];
};

template <int N, class T> __device__ Vector<T, N> *vectors(T *numbers) { return (Vector<T, N> *)numbers; }
template <int N, class T> __device__ const Vector<T, N> *vectors(const T *numbers) { return (const Vector<T, N> *)numbers; }

// From the start of a row of each tensor to the start of its next one, in numbers.
template <int TENSORS> struct Pitches {
    long long of[TENSORS];
};

// Turns pairs of neighbours by their angles, cosine and sine of each; `sign`: of the angles.
template <class T, int N> __device__ Vector<T, N> turned(Vector<T, N> numbers, const Vector<float, N> &angles, float sign) {
    for (int k = 0; k < N; k += 2) {
        const float first = widened(numbers.at[k]), second = widened(numbers.at[k + 1]);
        const float cosine = angles.at[k], sine = sign * angles.at[k + 1];
        round_to(numbers.at[k], first * cosine - second * sine);
        round_to(numbers.at[k + 1], first * sine + second * cosine);
    }
    return numbers;
}

// The index of a thread in its grid, and their number.
__device__ unsigned int thread_of_grid() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ unsigned int threads_of_grid() { return gridDim.x * blockDim.x; }

// A block's own memory: a sum of each warp, then what the text says.
extern __shared__ float block_memory[];
const unsigned int WARP = 32, MOST_WARPS = 32;
__device__ float *own_memory() { return block_memory + MOST_WARPS; }

// Threads that compute a row together: a whole block, a warp, or a part of it with a power of two.
struct Team {
    // Threads of a team, the index of a thread in its team and of the team in its block, and the block's teams.
    unsigned int size, member, number, teams;

    __device__ explicit Team(long long size)
        : size((unsigned int)size), member(threadIdx.x % this->size), number(threadIdx.x / this->size), teams(blockDim.x / this->size) {}

    // The members among the threads of a warp.
    __device__ unsigned int mask() const { return size < WARP ? ((1u << size) - 1) << threadIdx.x % WARP / size * size : 0xffffffff; }

    // The sum of all members' values, for each of them, always added in one order. Each member calls it as often as every other.
    __device__ float sum(float value) const {
        for (unsigned int distance = (size < WARP ? size : WARP) / 2; distance > 0; distance /= 2)
            value += __shfl_xor_sync(mask(), value, distance);
        if (size <= WARP)
            return value;
        __syncthreads();
        if (member % WARP == 0)
            block_memory[member / WARP] = value;
        __syncthreads();
        float total = 0.0f;
        for (unsigned int warp = 0; warp < size / WARP; warp++)
            total += block_memory[warp];
        return total;
    }
};

// Adds up the columns that each team of a block has summed, `width` of them, and writes them to `into`.
__device__ void add_teams(const float *columns, unsigned int width, unsigned int stride, unsigned int teams, float *into) {
    for (unsigned int column = threadIdx.x; column < width; column += blockDim.x) {
        float total = 0.0f;
        for (unsigned int team = 0; team < teams; team++)
            total += columns[team * stride + column];
        into[column] = total;
    }
}

#define FOR_EACH_KIND(DECLARE) DECLARE(float, 4) DECLARE(float, 1) DECLARE(bfloat16, 8) DECLARE(bfloat16, 1)

// Kinds of tokens and of their modulation.
#define FOR_EACH_MODULATED(DECLARE)                                                                                                  \
    DECLARE(float, float, 4)                                                                                                         \
    DECLARE(float, float, 1)                                                                                                         \
    DECLARE(bfloat16, bfloat16, 8)                                                                                                   \
    DECLARE(bfloat16, bfloat16, 1)                                                                                                   \
    DECLARE(bfloat16, float, 8)                                                                                                      \
    DECLARE(bfloat16, float, 1)
