// One AdamW update of a flat slice in one pass over memory, four elements a thread at a time.
//
// NVRTC compiles this text when a run starts, with --fmad=false: a product is rounded before it is added unless fmaf says
// otherwise, and every operation is rounded as IEEE 754 says. They are those of cpu.rs in the same order, so that the bits
// are, too. The text is C++ where __global__ and its like are defined to nothing: a test runs it on a CPU.

// Elements at which weight decay begins and ends, in turns and in order, as far as one launch takes them: 2 KiB of arguments,
// which cost less than an upload, and no wait.
struct Bounds {
    long long at[256];
};

// What is the same for all elements of a launch.
struct Rule {
    float gradient, decay, fresh1, beta2, fresh2, correction, eps, move_by, average_share;
};

// The number of bounds at or before an element, which is odd where it decays.
__device__ long long bounds_until(const Bounds &bounds, long long num_bounds, long long element) {
    long long first = 0, last = num_bounds;
    while (first < last) {
        long long middle = (first + last) / 2;
        if (bounds.at[middle] <= element)
            first = middle + 1;
        else
            last = middle;
    }
    return first;
}

__device__ void update(float &param, float raw_gradient, float &exp_avg, float &exp_avg_sq, bool decays, const Rule &rule) {
    float gradient = raw_gradient * rule.gradient;
    exp_avg = fmaf(rule.fresh1, gradient - exp_avg, exp_avg);
    exp_avg_sq = fmaf(gradient * rule.fresh2, gradient, exp_avg_sq * rule.beta2);
    float denominator = sqrtf(exp_avg_sq) * rule.correction + rule.eps;
    float decayed = decays ? param * rule.decay : param;
    param = decayed + 1.0f / denominator * exp_avg * rule.move_by;
}

__device__ float averaged(float average, float param, const Rule &rule) { return average - rule.average_share * (average - param); }

// The nearest bfloat16, of two equally near ones the even one.
__device__ unsigned short bfloat16(float value) {
    unsigned int bits = __float_as_uint(value);
    if (value != value)
        return 0x7fc0;
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ float widened(unsigned short value) { return __uint_as_float((unsigned int)value << 16); }

__device__ float4 widened(ushort4 values) { return make_float4(widened(values.x), widened(values.y), widened(values.z), widened(values.w)); }

// Touches elements 0 to length − 1 of each tensor; what is narrow is in bfloat16. Of the gradients one is null; `computed` and the averages
// may be.
extern "C" __global__ void adamw(
    float *params, const float *gradient, const unsigned short *narrow_gradient, float *exp_avg, float *exp_avg_sq,
    unsigned short *computed, float *average, unsigned short *narrow_average, long long length,
    const __grid_constant__ Bounds bounds, long long num_bounds, const __grid_constant__ Rule rule) {
    const long long num_threads = (long long)gridDim.x * blockDim.x;
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    // Views of a flat buffer may begin anywhere.
    const unsigned long long starts = (unsigned long long)params | (unsigned long long)gradient | 2 * (unsigned long long)narrow_gradient |
                                      (unsigned long long)exp_avg | (unsigned long long)exp_avg_sq | 2 * (unsigned long long)computed |
                                      (unsigned long long)average | 2 * (unsigned long long)narrow_average;
    const long long fours = starts % 16 == 0 ? length / 4 : 0;

    for (long long four = thread; four < fours; four += num_threads) {
        float4 p = ((float4 *)params)[four], m = ((float4 *)exp_avg)[four], v = ((float4 *)exp_avg_sq)[four];
        const float4 g = gradient ? ((const float4 *)gradient)[four] : widened(((const ushort4 *)narrow_gradient)[four]);
        const long long element = 4 * four;
        long long passed = bounds_until(bounds, num_bounds, element);
        bool decays[4];
        for (int k = 0; k < 4; k++) {
            while (passed < num_bounds && bounds.at[passed] <= element + k)
                passed++;
            decays[k] = passed % 2 == 1;
        }
        update(p.x, g.x, m.x, v.x, decays[0], rule);
        update(p.y, g.y, m.y, v.y, decays[1], rule);
        update(p.z, g.z, m.z, v.z, decays[2], rule);
        update(p.w, g.w, m.w, v.w, decays[3], rule);
        ((float4 *)params)[four] = p;
        ((float4 *)exp_avg)[four] = m;
        ((float4 *)exp_avg_sq)[four] = v;
        if (computed)
            ((ushort4 *)computed)[four] = make_ushort4(bfloat16(p.x), bfloat16(p.y), bfloat16(p.z), bfloat16(p.w));
        if (average) {
            float4 a = ((float4 *)average)[four];
            a.x = averaged(a.x, p.x, rule);
            a.y = averaged(a.y, p.y, rule);
            a.z = averaged(a.z, p.z, rule);
            a.w = averaged(a.w, p.w, rule);
            ((float4 *)average)[four] = a;
        }
        if (narrow_average) {
            ushort4 a = ((ushort4 *)narrow_average)[four];
            a.x = bfloat16(averaged(widened(a.x), p.x, rule));
            a.y = bfloat16(averaged(widened(a.y), p.y, rule));
            a.z = bfloat16(averaged(widened(a.z), p.z, rule));
            a.w = bfloat16(averaged(widened(a.w), p.w, rule));
            ((ushort4 *)narrow_average)[four] = a;
        }
    }
    for (long long element = 4 * fours + thread; element < length; element += num_threads) {
        const bool decays = bounds_until(bounds, num_bounds, element) % 2 == 1;
        const float raw_gradient = gradient ? gradient[element] : widened(narrow_gradient[element]);
        update(params[element], raw_gradient, exp_avg[element], exp_avg_sq[element], decays, rule);
        if (computed)
            computed[element] = bfloat16(params[element]);
        if (average)
            average[element] = averaged(average[element], params[element], rule);
        if (narrow_average)
            narrow_average[element] = bfloat16(averaged(widened(narrow_average[element]), params[element], rule));
    }
}
