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
    let Some(length) = length(tensor) else { return &[] };
    // SAFETY: the storage of a contiguous CPU tensor holds `length` bytes from `data_ptr` on, lives as long as the borrowed
    // tensor, and nobody writes to it meanwhile: fm-dist mutates tensors only through the thread that borrows them here.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const u8, length) }
}

/// As [`bytes`], to be written. Graphs that saved the tensor do not notice, so it is for what no graph holds.
#[allow(unsafe_code)]
pub fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    let Some(length) = length(tensor) else { return &mut [] };
    // SAFETY: as in `bytes`; the caller's `&mut` stands for all handles of the storage.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr() as *mut u8, length) }
}

/// Bytes of a contiguous CPU tensor, if it has any.
fn length(tensor: &Tensor) -> Option<usize> {
    assert!(tensor.device() == tch::Device::Cpu && tensor.is_contiguous(), "bytes of a contiguous CPU tensor");
    Some(tensor.numel() * tensor.kind().elt_size_in_bytes()).filter(|length| *length > 0)
}

/// A contiguous f32 CPU tensor's elements.
pub fn floats(tensor: &Tensor) -> &[f32] {
    assert_eq!(tensor.kind(), Kind::Float);
    bytemuck::cast_slice(bytes(tensor))
}

/// A contiguous f32 CPU tensor's elements, to be written.
pub fn floats_mut(tensor: &mut Tensor) -> &mut [f32] {
    assert_eq!(tensor.kind(), Kind::Float);
    bytemuck::cast_slice_mut(bytes_mut(tensor))
}

/// A contiguous bfloat16 CPU tensor's elements, to be written as their bits.
pub fn bfloat16s_mut(tensor: &mut Tensor) -> &mut [u16] {
    assert_eq!(tensor.kind(), Kind::BFloat16);
    bytemuck::cast_slice_mut(bytes_mut(tensor))
}

/// The bits of the nearest bfloat16, ties to even, as libtorch rounds.
#[inline(always)]
pub fn round_to_bfloat16(number: f32) -> u16 {
    let bits = number.to_bits();
    let rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    if number.is_nan() { 0x7fc0 } else { rounded }
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
    fn bfloat16_is_rounded_as_libtorch_rounds() {
        let numbers = [0.0f32, -0.0, 1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX, f32::INFINITY, -1e-40, 3.1415];
        let mut expected = Tensor::from_slice(&numbers).to_kind(Kind::BFloat16);
        assert_eq!(bfloat16s_mut(&mut expected), numbers.map(round_to_bfloat16));
        assert!(round_to_bfloat16(f32::NAN) & 0x7fff > 0x7f80, "not a number stays none");
    }

    #[test]
    fn what_is_written_to_the_elements_is_the_tensors() {
        let mut tensor = Tensor::from_slice(&[1f32, 2.0]);
        floats_mut(&mut tensor)[1] = 5.0;
        assert_eq!(floats(&tensor), [1.0, 5.0]);
    }

    #[test]
    fn a_per_sample_vector_broadcasts_over_latents() {
        let sigma = Tensor::from_slice(&[0.25f32, 0.75]);
        assert_eq!(broadcast_to_rank(&sigma, 4).size(), [2, 1, 1, 1]);
    }
}
