//! The few tensor operations that the bindings leave out.

use tch::{Kind, Tensor};

/// `sigma` or another per-sample vector as `[B, 1, …, 1]`, ready to broadcast over a tensor of `rank` axes.
///
/// # Shapes
/// `per_sample`: `[B]`. Returns `[B, 1, …]` with `rank` axes.
pub fn broadcast_to_rank(per_sample: &Tensor, rank: usize) -> Tensor {
    let mut shape = vec![1; rank];
    shape[0] = -1;
    per_sample.view(shape.as_slice())
}

/// A contiguous CPU tensor's bytes, without a copy.
///
/// # Panics
/// If the tensor is not contiguous on the CPU (a bug in the caller).
#[allow(unsafe_code)]
pub fn bytes(tensor: &Tensor) -> &[u8] {
    assert!(tensor.device() == tch::Device::Cpu && tensor.is_contiguous(), "bytes of a contiguous CPU tensor");
    let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if length == 0 {
        return &[];
    }
    // SAFETY: the storage of a contiguous CPU tensor holds `length` bytes from `data_ptr` on, lives as long as the borrowed
    // tensor, and nobody writes to it meanwhile: fm-dist mutates tensors only through the thread that borrows them here.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const u8, length) }
}

/// Smallest and largest element as two f32 scalars on the tensor's device, without a host synchronization.
pub fn range(tensor: &Tensor) -> (Tensor, Tensor) {
    let (min, max) = tensor.detach().flatten(0, -1).aminmax(0, false);
    (min.to_kind(Kind::Float), max.to_kind(Kind::Float))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_little_endian_elements() {
        assert_eq!(bytes(&Tensor::from_slice(&[1i32, 2])), [1, 0, 0, 0, 2, 0, 0, 0]);
        assert!(bytes(&Tensor::from_slice::<f32>(&[])).is_empty());
    }

    #[test]
    fn a_per_sample_vector_broadcasts_over_latents() {
        let sigma = Tensor::from_slice(&[0.25f32, 0.75]);
        assert_eq!(broadcast_to_rank(&sigma, 4).size(), [2, 1, 1, 1]);
    }
}
