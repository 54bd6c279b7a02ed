// Switches of libtorch that the bindings leave out, and handlers for C++ exceptions that no wrapper of the
// bindings catches: they must not unwind into Rust.

#include <cstdlib>
#include <exception>
#include <vector>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

// Permits the backends of scaled dot-product attention whose bits are set, and no others, from the next call of
// attention on. A backend's bit is that of its number in at::SDPBackend.
extern "C" void fm_dist_permit_attention(unsigned backends) noexcept {
    const auto permitted = [backends](at::SDPBackend backend) {
        return (backends >> static_cast<unsigned>(backend) & 1U) != 0;
    };
    auto &context = at::globalContext();
    context.setSDPUseMath(permitted(at::SDPBackend::math));
    context.setSDPUseFlash(permitted(at::SDPBackend::flash_attention));
    context.setSDPUseMemEfficient(permitted(at::SDPBackend::efficient_attention));
    context.setSDPUseCuDNN(permitted(at::SDPBackend::cudnn_attention));
}

// Sets the order in which permitted backends are asked on a GPU: all others before math.
extern "C" void fm_dist_prefer_fused_attention() noexcept {
    std::vector<int64_t> order;
    for (const auto backend : {at::SDPBackend::flash_attention, at::SDPBackend::cudnn_attention,
                               at::SDPBackend::efficient_attention, at::SDPBackend::math,
                               at::SDPBackend::overrideable})
        order.push_back(static_cast<int64_t>(backend));
    at::globalContext().setSDPPriorityOrder(order);
}

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
