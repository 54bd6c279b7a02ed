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

/// Computes the gradients of the inputs, an undefined tensor where there is none, from the
/// output's.
type Backward = Box<dyn FnOnce(&Tensor) -> Vec<Tensor> + Send>;

#[allow(unsafe_code)]
mod ffi {
    use super::{C_tensor, c_void};

    unsafe extern "C" {
        pub fn fm_dist_is_recorded(inputs: *const *const C_tensor, num_inputs: usize) -> bool;
        pub fn fm_dist_custom_gradient(
            inputs: *const *const C_tensor,
            num_inputs: usize,
            output: *mut C_tensor,
            closure: *mut c_void,
            backward: unsafe extern "C" fn(
                *mut c_void,
                *const *mut C_tensor,
                usize,
                *mut *mut C_tensor,
            ),
            release: unsafe extern "C" fn(*mut c_void),
        );
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
        let num_inputs = inputs.len();
        let backward = move |grad_output: &Tensor| {
            let gradients = no_grad(|| backward(saved, grad_output));
            assert_eq!(gradients.len(), num_inputs, "a gradient for each input");
            gradients
        };
        record(inputs, &mut output, Box::new(backward));
    }
    output
}

/// True if the graph grows by an operation on these inputs.
#[allow(unsafe_code)]
fn is_recorded(inputs: &[&Tensor]) -> bool {
    let pointers: Vec<*const C_tensor> = inputs.iter().map(|tensor| tensor.as_ptr()).collect();
    // SAFETY: the pointers are those of living tensors, as many as are said.
    unsafe { ffi::fm_dist_is_recorded(pointers.as_ptr(), pointers.len()) }
}

#[allow(unsafe_code)]
fn record(inputs: &[&Tensor], output: &mut Tensor, backward: Backward) {
    let pointers: Vec<*const C_tensor> = inputs.iter().map(|tensor| tensor.as_ptr()).collect();
    let closure = Box::into_raw(Box::new(backward)).cast::<c_void>();
    // SAFETY: the pointers are those of living tensors. The node owns the closure: it gives it back
    // once, to `call` or to `release`, which are made for it.
    unsafe {
        ffi::fm_dist_custom_gradient(
            pointers.as_ptr(),
            pointers.len(),
            output.as_mut_ptr(),
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
    // SAFETY: the node gives back what `record` made, once, and one gradient, because there is one
    // output; they are libtorch's to free, so that Rust takes second handles.
    let (backward, grad_output) = unsafe {
        assert_eq!(num_received, 1);
        (Box::from_raw(closure.cast::<Backward>()), Tensor::clone_from_ptr(*received))
    };
    let gradients = backward(&grad_output);
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
