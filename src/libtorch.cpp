// Switches of libtorch that the bindings leave out.

#include <ATen/Context.h>

// Allows or forbids cuDNN's kernels of scaled dot-product attention, in this process, from the next attention on.
extern "C" void fm_dist_allow_cudnn_attention(bool allowed) noexcept { at::globalContext().setSDPUseCuDNN(allowed); }

extern "C" bool fm_dist_cudnn_attention_is_allowed() noexcept { return at::globalContext().userEnabledCuDNNSDP(); }
