// Switches of libtorch that the bindings leave out, and handlers for C++ exceptions that no wrapper of the
// bindings catches: they must not unwind into Rust.

#include <cstdlib>
#include <exception>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

// Allows or forbids cuDNN's kernels of scaled dot-product attention in this process, from the next call of
// attention on.
extern "C" void fm_dist_allow_cudnn_attention(bool allowed) noexcept { at::globalContext().setSDPUseCuDNN(allowed); }

extern "C" bool fm_dist_cudnn_attention_is_allowed() noexcept { return at::globalContext().userEnabledCuDNNSDP(); }

// Returns a copy of a CPU tensor in pinned memory; the bindings pass a device besides, which warns. Throws without a GPU.
extern "C" at::Tensor *fm_dist_pinned(const at::Tensor *tensor) { return new at::Tensor(tensor->pin_memory()); }

// Calls body(data). If it throws a std::exception, calls on_exception(data, text). A Rust panic passes through.
extern "C" void fm_dist_guarded(void (*body)(void *), void (*on_exception)(void *, const char *), void *data) {
    try {
        body(data);
    } catch (const std::exception &error) {
        on_exception(data, error.what());
    }
}

namespace {

void (*report)(const char *) = nullptr;

[[noreturn]] void terminate() {
    try {
        if (const auto thrown = std::current_exception()) std::rethrow_exception(thrown);
        report("C++ ended the program without an exception");
    } catch (const std::exception &error) {
        report(error.what());
    } catch (...) {
        report("C++ ended the program by an exception without a text");
    }
    std::abort();
}

} // namespace

// Sets the function that receives the text of an uncaught exception from now on. It does not return.
extern "C" void fm_dist_on_terminate(void (*on_exception)(const char *)) {
    report = on_exception;
    std::set_terminate(terminate);
}
