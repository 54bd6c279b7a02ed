// Switches of libtorch that the bindings leave out, and handlers for C++ exceptions that no wrapper of the
// bindings catches: they must not unwind into Rust.

#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/autograd.h>

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

// Computes the gradients of the inputs, undefined where the graph does not reach one, from those of the outputs. Throws as libtorch's
// backward passes do.
extern "C" void fm_dist_gradients(const at::Tensor *const *outputs, const at::Tensor *const *given, size_t num_outputs,
                                  const at::Tensor *const *inputs, size_t num_inputs, at::Tensor **found) {
    torch::autograd::variable_list roots, root_gradients, leaves;
    for (size_t number = 0; number < num_outputs; number++) {
        roots.push_back(*outputs[number]);
        root_gradients.push_back(*given[number]);
    }
    for (size_t number = 0; number < num_inputs; number++) leaves.push_back(*inputs[number]);
    const auto gradients = torch::autograd::grad(roots, leaves, root_gradients, false, false, true);
    for (size_t number = 0; number < num_inputs; number++) found[number] = new at::Tensor(gradients[number]);
}

// Offers a place for the gradient of a leaf: its field for one, which computing gradients of given leaves does not touch.
extern "C" void fm_dist_offer_place(const at::Tensor *leaf, const at::Tensor *place) noexcept { leaf->mutable_grad() = *place; }

// Returns the place that was offered, null if there is none left.
extern "C" at::Tensor *fm_dist_take_place(const at::Tensor *leaf) noexcept {
    at::Tensor place = std::exchange(leaf->mutable_grad(), at::Tensor());
    return place.defined() ? new at::Tensor(std::move(place)) : nullptr;
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

using Seen = void (*)(const char *name, uint64_t read, uint64_t written);
std::atomic<Seen> seen_operator = nullptr;
std::optional<at::CallbackHandle> watching;
// Operators that this thread is in, the innermost last: true within one that has a kernel of its own.
thread_local std::vector<bool> within_kernel;

// What is known of an operator that has a kernel of its own when it begins.
struct Begun : at::ObserverContext {
    uint64_t read;
    explicit Begun(uint64_t read) : read(read) {}
};

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

// Bytes of a tensor's numbers, each counted once where it stands in several places.
uint64_t bytes_of(const at::Tensor &tensor) {
    if (!tensor.defined() || tensor.layout() != at::kStrided) return 0;
    uint64_t bytes = tensor.element_size();
    for (int64_t axis = 0; axis < tensor.dim(); axis++)
        if (tensor.stride(axis) != 0 || tensor.size(axis) == 0) bytes *= tensor.size(axis);
    return bytes;
}

template <class Values> uint64_t bytes_of_all(const Values &values) {
    uint64_t bytes = 0;
    for (const auto &value : values) {
        if (value.isTensor()) bytes += bytes_of(value.toTensor());
        if (value.isTensorList())
            for (const at::Tensor &tensor : value.toTensorList()) bytes += bytes_of(tensor);
    }
    return bytes;
}

std::unique_ptr<at::ObserverContext> begin_operator(const at::RecordFunction &function) {
    const bool is_within = !within_kernel.empty() && within_kernel.back(), is_kernel = !is_within && has_kernel(function);
    within_kernel.push_back(is_within || is_kernel);
    return is_kernel ? std::make_unique<Begun>(bytes_of_all(function.inputs())) : nullptr;
}

void end_operator(const at::RecordFunction &function, at::ObserverContext *begun) {
    // Empty for one that had begun before it was watched.
    if (!within_kernel.empty()) within_kernel.pop_back();
    const auto seen = seen_operator.load();
    if (begun && seen) seen(function.name(), static_cast<Begun *>(begun)->read, bytes_of_all(function.outputs()));
}

} // namespace

// From now on calls `seen` with the name of each operator that runs on any thread, has a kernel of its own and is not called by one
// that has, and with the bytes of its inputs and of its outputs; with null, ends that.
extern "C" void fm_dist_watch_operators(Seen seen) noexcept {
    if (watching) at::removeCallback(*watching);
    watching.reset();
    seen_operator = seen;
    if (!seen) return;
    auto callback = at::RecordFunctionCallback(begin_operator, end_operator).needsInputs(true).needsOutputs(true);
    watching = at::addGlobalCallback(callback.scopes({at::RecordScope::FUNCTION}));
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
