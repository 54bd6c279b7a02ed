//! Copies of tensors that the bindings leave out.

use tch::Tensor;
use torch_sys::C_tensor;

use super::{ffi, guarded};

/// Copies a CPU tensor to pinned memory, from which a GPU copies without a wait of the host.
///
/// # Panics
/// If there is no GPU, or no memory to pin.
#[allow(unsafe_code)]
pub fn pinned(tensor: &Tensor) -> Tensor {
    // SAFETY: the pointer is that of a living tensor; the new one is owned by the caller.
    guarded(|| unsafe { Tensor::from_ptr(ffi::fm_dist_pinned(tensor.as_ptr())) })
}

/// Copies each tensor to the one of the same number, also between kinds. A GPU does it in a few
/// launches for each pair of kinds, if both of each pair of tensors are contiguous.
///
/// # Panics
/// If there are not as many of both, or a pair has not one shape (a bug in the caller).
pub fn copy_each(into: &mut [Tensor], from: &[Tensor]) {
    assert_eq!(into.len(), from.len(), "tensors and their places");
    let mut pairs: Vec<(&mut Tensor, &Tensor)> = into.iter_mut().zip(from).collect();
    pairs.sort_by_key(kinds);
    pairs.chunk_by_mut(|a, b| kinds(a) == kinds(b)).for_each(copy_alike);
}

/// The kinds of a target and its source, as numbers.
fn kinds((target, source): &(&mut Tensor, &Tensor)) -> [i32; 2] {
    [target.kind() as i32, source.kind() as i32]
}

/// Copies pairs of two kinds: libtorch takes several in a launch only if none has others.
#[allow(unsafe_code)]
fn copy_alike(pairs: &mut [(&mut Tensor, &Tensor)]) {
    let targets: Vec<*mut C_tensor> =
        pairs.iter_mut().map(|(target, _)| target.as_mut_ptr()).collect();
    let sources: Vec<*const C_tensor> = pairs.iter().map(|(_, source)| source.as_ptr()).collect();
    // SAFETY: the pointers are those of living tensors, as many as are said.
    guarded(|| unsafe {
        ffi::fm_dist_copy_each(targets.as_ptr(), sources.as_ptr(), targets.len())
    });
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn tensors_are_copied_to_the_places_of_their_number() {
        let flat = Tensor::zeros([7], (Kind::Float, Device::Cpu));
        let mut places =
            [flat.narrow(0, 0, 2), flat.narrow(0, 3, 3).view([3, 1]), flat.narrow(0, 6, 1)];
        let from = [
            Tensor::from_slice(&[1.5f32, 2.0]).to_kind(Kind::BFloat16),
            Tensor::from_slice(&[3.0f32, 4.0, 5.0]).view([3, 1]),
            Tensor::from_slice(&[0.25f32]).to_kind(Kind::BFloat16),
        ];
        copy_each(&mut places, &from);
        assert_eq!(Vec::<f32>::try_from(flat).expect("f32"), [1.5, 2.0, 0.0, 3.0, 4.0, 5.0, 0.25]);
    }
}
