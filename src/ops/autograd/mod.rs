//! An operation that brings its own gradient, which the bindings leave out of libtorch's autograd.
//!
//! libtorch's graph stays the only one. An operation here is a node of it like any other, whose
//! backward is a Rust closure. It pays where one pass over memory does what takes libtorch's
//! operators many.
//!
//! libtorch runs the nodes of a GPU's tensors on a thread of its own for that GPU, so a closure and
//! what it saved must be `Send`.

use std::ffi::c_void;
use std::mem;
use std::slice;

use tch::{Tensor, no_grad};
use torch_sys::C_tensor;

/// Computes the gradients of the inputs from those of the outputs, of which at least one is
/// defined; an undefined tensor stands for none.
type Backward = Box<dyn FnOnce(Vec<Tensor>) -> Vec<Tensor> + Send>;

#[allow(unsafe_code)]
mod ffi {
    use super::{C_tensor, c_void};

    unsafe extern "C" {
        pub fn fm_dist_is_recorded(inputs: *const *const C_tensor, num_inputs: usize) -> bool;
        pub fn fm_dist_custom_gradient(
            inputs: *const *const C_tensor,
            num_inputs: usize,
            outputs: *const *mut C_tensor,
            num_outputs: usize,
            closure: *mut c_void,
            backward: unsafe extern "C" fn(
                *mut c_void,
                *const *mut C_tensor,
                usize,
                *mut *mut C_tensor,
            ),
            release: unsafe extern "C" fn(*mut c_void),
        );
        pub fn fm_dist_is_alone(tensor: *const C_tensor) -> bool;
    }
}

/// Computes an operation whose gradient is a closure.
///
/// `forward` computes the output, without a graph, as a tensor of its own storage, and what the
/// gradient needs besides the output's: saved inputs, detached, so that they hold no graph that
/// holds them. `backward(saved, grad_output)` gives one gradient for each of `inputs`, of its shape
/// and kind; [`Tensor::new`] where none is needed. It is called at most once, on the thread on
/// which libtorch runs the node: the caller of the backward pass for an output on the CPU, another
/// one for an output on a GPU.
pub fn custom_gradient<S: Send + 'static>(
    inputs: &[&Tensor],
    forward: impl FnOnce() -> (Tensor, S),
    backward: impl FnOnce(S, &Tensor) -> Vec<Tensor> + Send + 'static,
) -> Tensor {
    let (mut output, saved) = no_grad(forward);
    if is_recorded(inputs) {
        let backward = |received: Vec<Tensor>| backward(saved, &received[0]);
        record(inputs, &mut [&mut output], backward);
    }
    output
}

/// Computes an operation whose gradient is a closure, and passes its first input on.
///
/// Returns that input for its other uses, and the output. `backward(saved, grad_output, passed)`
/// also gets the gradient that came from the other uses, if there is one, and returns the sum of
/// both as the first input's: where it writes its own, adding costs no pass over memory. All else
/// is as in [`custom_gradient`]; an output that nothing uses leaves `passed` alone.
pub fn passing_on<S: Send + 'static>(
    inputs: &[&Tensor],
    forward: impl FnOnce() -> (Tensor, S),
    backward: impl FnOnce(S, &Tensor, Option<Tensor>) -> Vec<Tensor> + Send + 'static,
) -> (Tensor, Tensor) {
    let first = inputs[0];
    if !is_recorded(&[first]) {
        let backward = |saved, grad_output: &Tensor| backward(saved, grad_output, None);
        return (first.shallow_clone(), custom_gradient(inputs, forward, backward));
    }
    let (mut output, saved) = no_grad(forward);
    let mut passed_on = first.detach();
    let num_inputs = inputs.len();
    let backward = move |received: Vec<Tensor>| {
        let [grad_output, passed] = received.try_into().expect("a gradient for each output");
        if grad_output.defined() {
            return backward(saved, &grad_output, Some(passed).filter(Tensor::defined));
        }
        [passed].into_iter().chain((1..num_inputs).map(|_| Tensor::new())).collect()
    };
    record(inputs, &mut [&mut output, &mut passed_on], backward);
    (passed_on, output)
}

/// True if nothing else holds the numbers of a tensor, so that they may be overwritten.
#[allow(unsafe_code)]
pub fn is_alone(tensor: &Tensor) -> bool {
    // SAFETY: the pointer is that of a living tensor.
    unsafe { ffi::fm_dist_is_alone(tensor.as_ptr()) }
}

/// True if the graph grows by an operation on these inputs.
#[allow(unsafe_code)]
fn is_recorded(inputs: &[&Tensor]) -> bool {
    let pointers: Vec<*const C_tensor> = inputs.iter().map(|tensor| tensor.as_ptr()).collect();
    // SAFETY: the pointers are those of living tensors, as many as are said.
    unsafe { ffi::fm_dist_is_recorded(pointers.as_ptr(), pointers.len()) }
}

/// Makes `outputs` those of a node with this gradient.
#[allow(unsafe_code)]
fn record(
    inputs: &[&Tensor],
    outputs: &mut [&mut Tensor],
    backward: impl FnOnce(Vec<Tensor>) -> Vec<Tensor> + Send + 'static,
) {
    let num_inputs = inputs.len();
    let backward: Backward = Box::new(move |received: Vec<Tensor>| {
        if !received.iter().any(Tensor::defined) {
            return (0..num_inputs).map(|_| Tensor::new()).collect();
        }
        let gradients = no_grad(|| backward(received));
        assert_eq!(gradients.len(), num_inputs, "a gradient for each input");
        gradients
    });
    let inputs: Vec<*const C_tensor> = inputs.iter().map(|tensor| tensor.as_ptr()).collect();
    let outputs: Vec<*mut C_tensor> =
        outputs.iter_mut().map(|tensor| tensor.as_mut_ptr()).collect();
    let closure = Box::into_raw(Box::new(backward)).cast::<c_void>();
    // SAFETY: the pointers are those of living tensors. The node owns the closure: it gives it back
    // once, to `call` or to `release`, which are made for it.
    unsafe {
        ffi::fm_dist_custom_gradient(
            inputs.as_ptr(),
            inputs.len(),
            outputs.as_ptr(),
            outputs.len(),
            closure,
            call,
            release,
        )
    }
}

/// Calls a closure that [`record`] gave away.
#[allow(unsafe_code)]
unsafe extern "C" fn call(
    closure: *mut c_void,
    received: *const *mut C_tensor,
    num_received: usize,
    given: *mut *mut C_tensor,
) {
    // SAFETY: the node gives back what `record` made, once, and as many gradients as are said, each
    // of which it no longer owns.
    let (backward, received) = unsafe {
        let received = slice::from_raw_parts(received, num_received);
        let owned = received.iter().map(|gradient| Tensor::from_ptr(*gradient)).collect();
        (Box::from_raw(closure.cast::<Backward>()), owned)
    };
    let gradients = backward(received);
    // SAFETY: there is a place for each gradient of an input.
    let places = unsafe { slice::from_raw_parts_mut(given, gradients.len()) };
    for (place, mut gradient) in places.iter_mut().zip(gradients) {
        *place = gradient.as_mut_ptr();
        // The node frees it.
        mem::forget(gradient);
    }
}

/// Drops a closure that [`record`] gave away.
#[allow(unsafe_code)]
unsafe extern "C" fn release(closure: *mut c_void) {
    // SAFETY: the node gives back what `record` made, and only once.
    drop(unsafe { Box::from_raw(closure.cast::<Backward>()) });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use tch::{Device, Kind};

    use super::*;

    /// `x³`.
    fn cube(x: &Tensor) -> Tensor {
        custom_gradient(
            &[x],
            || (x * x * x, x.detach()),
            |x, grad_output| vec![grad_output * (&x * &x * 3.0)],
        )
    }

    #[test]
    fn it_is_a_node_among_others() {
        let x = Tensor::from_slice(&[1f32, -2.0]).set_requires_grad(true);
        let loss = (cube(&(&x * 2.0)) + &x).sum(Kind::Float);
        let gradients = Tensor::run_backward(&[loss], &[&x], false, false);
        assert_eq!(Vec::<f32>::try_from(&gradients[0]).expect("f32"), [25.0, 97.0]);
    }

    #[test]
    fn without_a_graph_nothing_is_saved() {
        let saved = Arc::new(());
        let doubled = |x: &Tensor| {
            let kept = Arc::clone(&saved);
            custom_gradient(&[x], move || (x * 2.0, kept), |_, grad_output| vec![grad_output * 2.0])
        };
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu));
        let output = doubled(&x);
        assert!(!output.requires_grad() && Arc::strong_count(&saved) == 1);
        let tracked = x.set_requires_grad(true);
        assert!(!no_grad(|| doubled(&tracked)).requires_grad() && Arc::strong_count(&saved) == 1);
        let output = doubled(&tracked);
        assert!(output.requires_grad() && Arc::strong_count(&saved) == 2);
        drop(output);
        assert_eq!(Arc::strong_count(&saved), 1, "a graph that is dropped drops what was saved");
    }

    #[test]
    fn what_was_saved_goes_with_the_backward_pass() {
        let saved = Arc::new(());
        let kept = Arc::clone(&saved);
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let output = custom_gradient(
            &[&x],
            || (&x * 2.0, kept),
            |_kept, grad_output| vec![grad_output * 2.0],
        );
        let _ = Tensor::run_backward(&[output.sum(Kind::Float)], &[&x], false, false);
        assert_eq!(Arc::strong_count(&saved), 1);
    }

    /// `2·x` and `x` again, whose gradient tells what came for both.
    fn doubled_and_passed_on(x: &Tensor) -> (Tensor, Tensor) {
        passing_on(
            &[x],
            || (x * 2.0, ()),
            |(), grad_output, passed| {
                let passed = passed.unwrap_or_else(|| grad_output.zeros_like());
                vec![grad_output * 2.0 + passed * 100.0]
            },
        )
    }

    /// The gradient of `x` for a loss of what [`doubled_and_passed_on`] returns.
    fn gradient_of(loss: impl FnOnce(Tensor, Tensor) -> Tensor) -> Vec<f32> {
        let x = Tensor::from_slice(&[1f32, -2.0]).set_requires_grad(true);
        let (passed_on, doubled) = doubled_and_passed_on(&x);
        assert_eq!(passed_on.data_ptr(), x.data_ptr(), "nothing is copied");
        let gradients =
            Tensor::run_backward(&[loss(passed_on, doubled).sum(None)], &[&x], false, false);
        Vec::try_from(&gradients[0]).expect("f32")
    }

    #[test]
    fn the_gradient_of_the_other_uses_of_an_input_comes_to_the_operation() {
        // What is passed counts a hundredfold.
        assert_eq!(gradient_of(|x, doubled| x * 3.0 + doubled * 5.0), [310.0; 2]);
        assert_eq!(gradient_of(|_, doubled| doubled * 5.0), [10.0; 2]);
        assert_eq!(gradient_of(|x, _| x * 3.0), [3.0; 2]);
    }

    #[test]
    fn an_input_without_a_gradient_is_passed_on_without_one() {
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu));
        let weight = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let (passed_on, product) = passing_on(
            &[&x, &weight],
            || (&x * &weight, x.detach()),
            |x, grad_output, passed| {
                assert!(passed.is_none());
                vec![Tensor::new(), grad_output * x]
            },
        );
        assert!(!passed_on.requires_grad() && product.requires_grad());
        product.sum(None).backward();
        assert_eq!(Vec::<f32>::try_from(weight.grad()).expect("f32"), [1.0; 2]);
    }

    #[test]
    fn a_gradient_is_alone_unless_something_else_holds_it() {
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu));
        assert!(is_alone(&x));
        let view = x.view([2, 1]);
        assert!(!is_alone(&x) && !is_alone(&view));
        drop(view);
        assert!(is_alone(&x));
        let _other = x.shallow_clone();
        assert!(!is_alone(&x));
    }

    #[test]
    fn a_backward_pass_may_run_on_another_thread() {
        let x = Tensor::from_slice(&[1f32, -2.0]).set_requires_grad(true);
        let loss = cube(&x).sum(Kind::Float);
        let here = thread::current().id();
        let other = thread::spawn(move || {
            let gradients = Tensor::run_backward(&[loss], &[&x], false, false);
            (thread::current().id(), Vec::<f32>::try_from(&gradients[0]).expect("f32"))
        });
        let (there, gradient) = other.join().expect("a sound backward pass");
        assert!(there != here && gradient == [3.0, 12.0], "{gradient:?}");
    }
}
