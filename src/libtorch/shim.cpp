// Switches of libtorch that the bindings leave out, and handlers for C++ exceptions that no wrapper of the
// bindings catches: they must not unwind into Rust.

#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/record_function.h>

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

// Copies each tensor of `from` to that of `into`, on a GPU in a few launches for all. Throws as copies do.
extern "C" void fm_dist_copy_each(at::Tensor *const *into, const at::Tensor *const *from, size_t count) {
    std::vector<at::Tensor> targets, sources;
    for (size_t number = 0; number < count; number++) {
        targets.push_back(*into[number]);
        sources.push_back(*from[number]);
    }
    at::_foreach_copy_(targets, sources);
}

// Calls body(data). If it throws a std::exception, calls on_exception(data, text). A Rust panic passes through.
extern "C" void fm_dist_guarded(void (*body)(void *), void (*on_exception)(void *, const char *), void *data) {
    try {
        body(data);
    } catch (const std::exception &error) {
        on_exception(data, error.what());
    }
}

namespace {

std::atomic<void (*)(const char *)> seen_operator = nullptr;
std::optional<at::CallbackHandle> watching;
// Operators that this thread is in, the innermost last: true within one that has a kernel of its own.
thread_local std::vector<bool> within_kernel;

// Not so an operator that only calls others.
bool has_kernel(const at::RecordFunction &function) {
    const auto name = function.operator_name();
    const auto found = name ? c10::Dispatcher::singleton().findOp(*name) : std::nullopt;
    if (!found) return false;
    for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::CompositeExplicitAutograd,
                           c10::DispatchKey::CompositeExplicitAutogradNonFunctional})
        if (found->hasKernelForDispatchKey(key)) return true;
    return false;
}

std::unique_ptr<at::ObserverContext> begin_operator(const at::RecordFunction &function) {
    const bool is_within = !within_kernel.empty() && within_kernel.back(), is_kernel = !is_within && has_kernel(function);
    const auto seen = seen_operator.load();
    if (is_kernel && seen) seen(function.name());
    within_kernel.push_back(is_within || is_kernel);
    return nullptr;
}

void end_operator(const at::RecordFunction &, at::ObserverContext *) {
    // Empty for one that had begun before it was watched.
    if (!within_kernel.empty()) within_kernel.pop_back();
}

} // namespace

// From now on calls `seen` with the name of each operator that begins on any thread, has a kernel of its own and is not called by one
// that has; with null, ends that.
extern "C" void fm_dist_watch_operators(void (*seen)(const char *)) noexcept {
    if (watching) at::removeCallback(*watching);
    watching.reset();
    seen_operator = seen;
    if (seen) watching = at::addGlobalCallback(at::RecordFunctionCallback(begin_operator, end_operator).scopes({at::RecordScope::FUNCTION}));
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
