// Numbers moved between latents and tokens, a thread for each number of the latents.

struct Places {
    long long batch, channels;
    // Tokens along frames, rows and columns.
    long long grid[3], patch[3];
    // From a feature to that of the next channel, frame, row and column.
    long long strides[4];
};

// The place in the tokens of a number of the latents.
__device__ long long in_tokens(long long place, const Places &places) {
    long long sides[3], in_patch[3], token = 0;
    for (int axis = 2; axis >= 0; axis--) {
        const long long side = places.grid[axis] * places.patch[axis];
        sides[axis] = place % side / places.patch[axis];
        in_patch[axis] = place % side % places.patch[axis];
        place /= side;
    }
    const long long channel = place % places.channels, sample = place / places.channels;
    token = ((sample * places.grid[0] + sides[0]) * places.grid[1] + sides[1]) * places.grid[2] + sides[2];
    const long long features = places.channels * places.patch[0] * places.patch[1] * places.patch[2];
    return token * features + channel * places.strides[0] + in_patch[0] * places.strides[1] + in_patch[1] * places.strides[2] +
           in_patch[2] * places.strides[3];
}

#define DECLARE(T)                                                                                                                   \
    extern "C" __global__ void cut_##T(const T *latents, T *tokens, long long count, const __grid_constant__ Places places) {        \
        for (long long place = thread_of_grid(); place < count; place += threads_of_grid())                                          \
            tokens[in_tokens(place, places)] = latents[place];                                                                       \
    }                                                                                                                                \
    extern "C" __global__ void join_##T(const T *tokens, T *latents, long long count, const __grid_constant__ Places places) {       \
        for (long long place = thread_of_grid(); place < count; place += threads_of_grid())                                          \
            latents[place] = tokens[in_tokens(place, places)];                                                                       \
    }
DECLARE(float)
DECLARE(bfloat16)
#undef DECLARE
