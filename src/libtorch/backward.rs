//! A backward pass that begins with given gradients.

use tch::Tensor;
use torch_sys::C_tensor;

use super::{ffi, guarded};

/// Returns the gradient of each of `inputs`, undefined if the graph does not reach it, given those
/// of `outputs`. The graph is freed.
///
/// # Panics
/// With libtorch's words, if the backward pass fails.
#[allow(unsafe_code)]
pub fn gradients(outputs: &[&Tensor], given: &[&Tensor], inputs: &[&Tensor]) -> Vec<Tensor> {
    assert_eq!(outputs.len(), given.len(), "outputs and their gradients");
    let pointers = |tensors: &[&Tensor]| -> Vec<*const C_tensor> {
        tensors.iter().map(|tensor| tensor.as_ptr()).collect()
    };
    let (outputs, given, inputs) = (pointers(outputs), pointers(given), pointers(inputs));
    let mut found = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: the pointers are those of living tensors, as many as are said. Each place gets a new
    // tensor, which is owned here.
    guarded(|| unsafe {
        ffi::fm_dist_gradients(
            outputs.as_ptr(),
            given.as_ptr(),
            outputs.len(),
            inputs.as_ptr(),
            inputs.len(),
            found.as_mut_ptr(),
        )
    });
    // SAFETY: as above.
    found.into_iter().map(|gradient| unsafe { Tensor::from_ptr(gradient) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_those_of_all_outputs_by_what_is_given_for_each() {
        let leaf = |number: f32| Tensor::from_slice(&[number]).set_requires_grad(true);
        let (a, b, apart) = (leaf(2.0), leaf(3.0), leaf(1.0));
        let (product, sum) = (&a * &b, &a + &b);
        let given = [&Tensor::from_slice(&[10f32]), &Tensor::from_slice(&[0.5f32])];
        let found = gradients(&[&product, &sum], &given, &[&a, &b, &apart]);
        assert_eq!([&found[0], &found[1]].map(|one| one.double_value(&[0])), [30.5, 20.5]);
        assert!(!found[2].defined(), "the graph does not reach it");
    }

    #[test]
    #[should_panic(expected = "does not require grad")]
    fn an_output_without_a_graph_is_refused_by_name() {
        let x = Tensor::from_slice(&[2f32]);
        gradients(&[&x], &[&x], &[&x]);
    }
}
