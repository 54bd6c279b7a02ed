//! Numbers that are not finite are found where they are read, while it is known whose they are.

use multiversion::multiversion;
use tch::Kind;

use super::safetensors::{SafeTensors, TensorInfo, row_bytes};
use crate::error::{Error, Result};

/// Refuses NaN and infinities in `data`, the bytes of these rows, which hold the samples `ids`.
pub(super) fn check_finite(file: &SafeTensors, info: &TensorInfo, ids: &[u64], rows: &[u64], data: &[u8]) -> Result<()> {
    let row_bytes = row_bytes(info) as usize;
    for (bytes, (id, row)) in data.chunks_exact(row_bytes).zip(ids.iter().zip(rows)) {
        if let Some((count, first)) = not_finite(info.kind, bytes) {
            let first = index_of(first, &info.shape[1..]);
            let what =
                format!("`{}` of sample {id} (row {row}) has {count} numbers that are not finite, the first at {first:?}", info.name);
            return Err(Error::data(file.path(), what));
        }
    }
    Ok(())
}

/// How many elements are NaN or infinite, and which is the first. On the bytes: a tensor operation here would start
/// libtorch's threads on the reader's side as well.
fn not_finite(kind: Kind, bytes: &[u8]) -> Option<(usize, usize)> {
    fn scan<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool) -> Option<(usize, usize)> {
        let (elements, _) = bytes.as_chunks::<N>();
        let first = elements.iter().position(|element| bad(*element))?;
        Some((elements.iter().filter(|element| bad(**element)).count(), first))
    }
    if is_sound(kind, bytes) {
        return None;
    }
    // An exponent of all ones is infinity or NaN.
    match kind {
        Kind::Half => scan(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        Kind::BFloat16 => scan(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        Kind::Float => scan(bytes, |b| !f32::from_le_bytes(b).is_finite()),
        Kind::Double => scan(bytes, |b| !f64::from_le_bytes(b).is_finite()),
        _ => None,
    }
}

/// Whether 16- and 32-bit numbers are all finite, in vectors, many times as fast as one by one; false where it is not known.
#[multiversion(targets = "simd")]
pub(super) fn is_sound(kind: Kind, bytes: &[u8]) -> bool {
    match kind {
        Kind::Half | Kind::BFloat16 => {
            let exponent = if kind == Kind::Half { 0x7c00 } else { 0x7f80 };
            let largest = bytes.as_chunks::<2>().0.iter().fold(0, |largest: u16, b| largest.max(u16::from_le_bytes(*b) & exponent));
            largest < exponent
        }
        Kind::Float => {
            let largest = bytes.as_chunks::<4>().0.iter().fold(0, |largest: u32, b| largest.max(u32::from_le_bytes(*b) & 0x7f80_0000));
            largest < 0x7f80_0000
        }
        _ => false,
    }
}

/// The index along each axis of the `flat`-th element.
fn index_of(flat: usize, shape: &[i64]) -> Vec<i64> {
    let mut rest = flat as i64;
    let mut index = vec![0; shape.len()];
    for (axis, size) in shape.iter().enumerate().rev() {
        index[axis] = rest % size;
        rest /= size;
    }
    index
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;
    use crate::tensor::bytes;

    #[test]
    fn every_float_kind_tells_nan_and_infinity_from_large_numbers() {
        let values = Tensor::from_slice(&[1.0, -65504.0, f64::NAN, 0.0, f64::NEG_INFINITY, f64::INFINITY]);
        for kind in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
            let values = values.to_kind(kind);
            assert_eq!(not_finite(kind, bytes(&values)), Some((3, 2)), "{kind:?}");
            assert_eq!(not_finite(kind, bytes(&values.narrow(0, 0, 2))), None, "{kind:?}");
        }
        assert_eq!(not_finite(Kind::Int64, bytes(&Tensor::from(-1i64))), None, "all ones in an integer");
    }

    #[test]
    fn an_index_counts_along_the_last_axis_first() {
        assert_eq!(index_of(0, &[2, 3, 4]), [0, 0, 0]);
        assert_eq!(index_of(17, &[2, 3, 4]), [1, 1, 1]);
        assert!(index_of(0, &[]).is_empty());
    }
}
