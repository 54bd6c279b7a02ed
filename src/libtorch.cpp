// Switches of libtorch that the bindings leave out, and where C++ exceptions end that no wrapper of the bindings has caught: Rust must
// not meet them.

#include <cstdlib>
#include <exception>

#include <ATen/Context.h>

// Allows or forbids cuDNN's kernels of scaled dot-product attention, in this process, from the next attention on.
extern "C" void fm_dist_allow_cudnn_attention(bool allowed) noexcept { at::globalContext().setSDPUseCuDNN(allowed); }

extern "C" bool fm_dist_cudnn_attention_is_allowed() noexcept { return at::globalContext().userEnabledCuDNNSDP(); }

// Calls body(data). A std::exception that comes out of it is told to told(data, text); a panic of Rust passes.
extern "C" void fm_dist_guarded(void (*body)(void *), void (*told)(void *, const char *), void *data) {
    try {
        body(data);
    } catch (const std::exception &error) {
        told(data, error.what());
    }
}

namespace {

void (*tell)(const char *) = nullptr;

[[noreturn]] void terminate() {
    try {
        if (const auto thrown = std::current_exception()) std::rethrow_exception(thrown);
        tell("C++ ended the program without an exception");
    } catch (const std::exception &error) {
        tell(error.what());
    } catch (...) {
        tell("C++ ended the program by an exception without a text");
    }
    std::abort();
}

} // namespace

// From now on an exception that nobody catches is told to told(text), which does not return.
extern "C" void fm_dist_on_terminate(void (*told)(const char *)) {
    tell = told;
    std::set_terminate(terminate);
}
