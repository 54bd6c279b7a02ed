//! Tensor operations that the bindings leave out.

use half::bf16;
use tch::{Kind, Tensor};

/// Reshapes `sigma` or another per-sample vector to broadcast over a tensor of `rank` axes.
///
/// # Shapes
/// `per_sample`: `[B]`. Returns `[B, 1, …, 1]` with `rank` axes.
pub fn broadcast_to_rank(per_sample: &Tensor, rank: usize) -> Tensor {
    let mut shape = vec![1; rank];
    shape[0] = -1;
    per_sample.view(shape.as_slice())
}

/// Borrows the bytes of a contiguous CPU tensor, without a copy.
///
/// # Panics
/// If the tensor is not contiguous on the CPU (a bug in the caller).
#[allow(unsafe_code)]
pub fn bytes(tensor: &Tensor) -> &[u8] {
    let Some(length) = length(tensor) else { return &[] };
    // SAFETY: the storage of a contiguous CPU tensor holds `length` bytes from `data_ptr` on and
    // lives as long as the borrowed tensor. It is not written meanwhile: fm-dist mutates tensors
    // only on the thread that borrows them here.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr() as *const u8, length) }
}

/// Does as [`bytes`] for writing. Autograd graphs that saved the tensor do not notice the change,
/// so no graph may hold it.
#[allow(unsafe_code)]
pub fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    let Some(length) = length(tensor) else { return &mut [] };
    // SAFETY: as in `bytes`; the caller's `&mut` stands for all handles of the storage.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr() as *mut u8, length) }
}

/// Bytes of a contiguous CPU tensor; `None` if it is empty.
fn length(tensor: &Tensor) -> Option<usize> {
    assert!(
        tensor.device() == tch::Device::Cpu && tensor.is_contiguous(),
        "bytes of a contiguous CPU tensor"
    );
    Some(tensor.numel() * tensor.kind().elt_size_in_bytes()).filter(|length| *length > 0)
}

/// An element type that loops compute with, in f32.
pub trait Element: bytemuck::Pod + Send + Sync {
    const KIND: Kind;

    fn widened(self) -> f32;

    /// Rounds to the nearest value of the type, ties to even, as libtorch does.
    fn rounded(number: f32) -> Self;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;

    #[inline(always)]
    fn widened(self) -> f32 {
        self
    }

    #[inline(always)]
    fn rounded(number: f32) -> Self {
        number
    }
}

impl Element for bf16 {
    const KIND: Kind = Kind::BFloat16;

    #[inline(always)]
    fn widened(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// Written without a branch, so that the compiler vectorizes loops.
    #[inline(always)]
    fn rounded(number: f32) -> Self {
        let bits = number.to_bits();
        let rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        bf16::from_bits(if number.is_nan() { 0x7fc0 } else { rounded })
    }
}

/// Borrows the elements of a contiguous CPU tensor.
///
/// # Panics
/// If the tensor is of another kind, or as for [`bytes`] (a bug in the caller).
pub fn elements<T: Element>(tensor: &Tensor) -> &[T] {
    assert_eq!(tensor.kind(), T::KIND);
    bytemuck::cast_slice(bytes(tensor))
}

/// Does as [`elements`] for writing; see [`bytes_mut`].
pub fn elements_mut<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    assert_eq!(tensor.kind(), T::KIND);
    bytemuck::cast_slice_mut(bytes_mut(tensor))
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
        let numbers = [
            0.0f32,
            -0.0,
            1.0,
            1.0 + 1.0 / 256.0,
            1.0 + 3.0 / 256.0,
            f32::MAX,
            f32::INFINITY,
            -1e-40,
            2.345,
        ];
        let expected = Tensor::from_slice(&numbers).to_kind(Kind::BFloat16);
        assert_eq!(elements::<bf16>(&expected), numbers.map(bf16::rounded));
        assert!(bf16::rounded(f32::NAN).is_nan());
        assert!(numbers.iter().all(
            |number| bf16::rounded(bf16::rounded(*number).widened()) == bf16::rounded(*number)
        ));
    }

    #[test]
    fn what_is_written_to_the_elements_is_the_tensors() {
        let mut tensor = Tensor::from_slice(&[1f32, 2.0]);
        elements_mut(&mut tensor)[1] = 5f32;
        assert_eq!(elements::<f32>(&tensor), [1.0, 5.0]);
    }

    #[test]
    fn a_per_sample_vector_broadcasts_over_latents() {
        let sigma = Tensor::from_slice(&[0.25f32, 0.75]);
        assert_eq!(broadcast_to_rank(&sigma, 4).size(), [2, 1, 1, 1]);
    }
}
