// The kernels of all operations. OPERATIONS is the folder of their texts.
#include "on_host.hpp"

#define TEXT(path) TEXT_OF(OPERATIONS/path)
#define TEXT_OF(path) QUOTED(path)
#define QUOTED(path) #path

#include TEXT(launch/prelude.cu)

namespace column_sums_text {
#include TEXT(launch/column_sums.cu)
ON_HOST(column_sums_float)
ON_HOST(column_sums_bfloat16)
} // namespace column_sums_text

namespace gelu_tanh_text {
#include TEXT(gelu_tanh/kernel.cu)
#define BOTH(T, N) ON_HOST(gelu_tanh_##T##_##N) ON_HOST(gelu_tanh_backward_##T##_##N)
FOR_EACH_KIND(BOTH)
#undef BOTH
} // namespace gelu_tanh_text

namespace silu_gate_text {
#include TEXT(silu_gate/kernel.cu)
#define BOTH(T, N) ON_HOST(silu_gate_##T##_##N) ON_HOST(silu_gate_backward_##T##_##N)
FOR_EACH_KIND(BOTH)
#undef BOTH
} // namespace silu_gate_text

namespace rms_norm_text {
#include TEXT(rms_norm/kernel.cu)
#define BOTH(T, N) ON_HOST(rms_norm_##T##_##N) ON_HOST(rms_norm_backward_##T##_##N)
FOR_EACH_KIND(BOTH)
BOTH(float, 2)
BOTH(bfloat16, 2)
#undef BOTH
} // namespace rms_norm_text

namespace gated_residual_text {
#include TEXT(gated_residual/kernel.cu)
#define BOTH(T, M, N) ON_HOST(gated_residual_##T##_##M##_##N) ON_HOST(gated_residual_backward_##T##_##M##_##N)
FOR_EACH_MODULATED(BOTH)
#undef BOTH
} // namespace gated_residual_text

namespace modulated_norm_text {
#include TEXT(modulated_norm/kernel.cu)
#define BOTH(T, M, N) ON_HOST(modulated_norm_##T##_##M##_##N) ON_HOST(modulated_norm_backward_##T##_##M##_##N)
FOR_EACH_MODULATED(BOTH)
#undef BOTH
} // namespace modulated_norm_text

namespace rotation_text {
#include TEXT(rotation/kernel.cu)
ON_HOST(rotation_float_4)
ON_HOST(rotation_float_2)
ON_HOST(rotation_bfloat16_8)
ON_HOST(rotation_bfloat16_2)
} // namespace rotation_text

namespace patches_text {
#include TEXT(patches/kernel.cu)
ON_HOST(cut_float)
ON_HOST(cut_bfloat16)
ON_HOST(join_float)
ON_HOST(join_bfloat16)
} // namespace patches_text

namespace noising_text {
#include TEXT(noising/kernel.cu)
#define ONE(T, N) ON_HOST(noising_##T##_##N)
FOR_EACH_KIND(ONE)
#undef ONE
} // namespace noising_text

namespace squared_error_text {
#include TEXT(squared_error/kernel.cu)
#define BOTH(T, N) ON_HOST(squared_error_##T##_##N) ON_HOST(squared_error_backward_##T##_##N)
FOR_EACH_KIND(BOTH)
#undef BOTH
} // namespace squared_error_text

namespace ranges_text {
#include TEXT(ranges/kernel.cu)
ON_HOST(ranges_of_parts_8)
ON_HOST(ranges_of_parts_1)
ON_HOST(ranges_of_tensors)
} // namespace ranges_text
