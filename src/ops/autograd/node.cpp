// A node of libtorch's graph whose gradient a Rust closure computes. libtorch offers that to C++ alone.

#include <memory>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace {

// Takes one gradient an output, undefined where nothing used it, and leaves one an input; owns those it takes, and consumes the closure.
using Backward = void (*)(void *closure, at::Tensor *const *received, size_t num_received, at::Tensor **given);
// Drops a closure that was not called.
using Release = void (*)(void *closure);

class CustomGradient : public torch::autograd::Node {
public:
    CustomGradient(size_t num_given, void *closure, Backward backward, Release release)
        : num_given_(num_given), closure_(closure), backward_(backward), release_(release) {}

    ~CustomGradient() override { drop(); }

    torch::autograd::variable_list apply(torch::autograd::variable_list &&received) override {
        TORCH_CHECK(closure_ != nullptr, "a custom gradient is asked for a second time");
        std::vector<at::Tensor *> places;
        for (auto &gradient : received) places.push_back(new at::Tensor(std::move(gradient)));
        std::vector<at::Tensor *> given(num_given_, nullptr);
        backward_(std::exchange(closure_, nullptr), places.data(), places.size(), given.data());
        torch::autograd::variable_list gradients;
        for (auto *gradient : given) gradients.push_back(std::move(*std::unique_ptr<at::Tensor>(gradient)));
        return gradients;
    }

    void release_variables() override { drop(); }

    std::string name() const override { return "CustomGradient"; }

private:
    void drop() {
        if (closure_ != nullptr) release_(std::exchange(closure_, nullptr));
    }

    size_t num_given_;
    void *closure_;
    Backward backward_;
    Release release_;
};

} // namespace

// True if the graph grows by an operation on these inputs.
extern "C" bool fm_dist_is_recorded(const at::Tensor *const *inputs, size_t num_inputs) noexcept {
    if (!at::GradMode::is_enabled()) return false;
    for (size_t index = 0; index < num_inputs; ++index) {
        if (inputs[index]->defined() && inputs[index]->requires_grad()) return true;
    }
    return false;
}

// Makes the outputs the results of an operation on the inputs, whose gradients the closure computes.
extern "C" void fm_dist_custom_gradient(const at::Tensor *const *inputs, size_t num_inputs, at::Tensor *const *outputs, size_t num_outputs,
                                        void *closure, Backward backward, Release release) noexcept {
    std::vector<at::Tensor> variables;
    for (size_t index = 0; index < num_inputs; ++index) variables.push_back(*inputs[index]);
    c10::intrusive_ptr<torch::autograd::Node> node = c10::make_intrusive<CustomGradient>(num_inputs, closure, backward, release);
    node->set_next_edges(torch::autograd::collect_next_edges(variables));
    for (size_t index = 0; index < num_outputs; ++index) torch::autograd::set_history(*outputs[index], node);
}

// True if nothing else holds the tensor's numbers.
extern "C" bool fm_dist_is_alone(const at::Tensor *tensor) noexcept {
    return tensor->use_count() == 1 && tensor->has_storage() && tensor->storage().use_count() == 1;
}
