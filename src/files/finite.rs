//! Finds numbers that are not finite when they are read, while file, tensor and sample are known.

use half::{bf16, f16};
use multiversion::multiversion;
use tch::{Kind, Tensor};

use super::float8;
use super::safetensors::{SafeTensors, TensorInfo, row_bytes};
use crate::error::{Error, Result};
use crate::tensor::bytes;

/// Smallest magnitude that bfloat16 rounds to infinity, half a step above bfloat16's largest
/// number; float32 does so a little later.
pub(crate) const TOO_LARGE: f32 = f32::from_bits(0x7f7f_8000);

/// Numbers of a tensor that no computation can use.
#[derive(Debug, PartialEq)]
struct Unusable {
    count: usize,
    /// Flat index of the first, and its value.
    first: usize,
    value: f64,
}

/// Refuses NaN, infinities and numbers that float32 or bfloat16 would make infinite in `data`, the
/// bytes of these rows of the samples `ids`.
pub(crate) fn check_finite(
    file: &SafeTensors,
    info: &TensorInfo,
    ids: &[u64],
    rows: &[u64],
    data: &[u8],
) -> Result<()> {
    let row_bytes = row_bytes(info) as usize;
    for (bytes, (id, row)) in data.chunks_exact(row_bytes).zip(ids.iter().zip(rows)) {
        if let Some(unusable) = not_finite(info.kind, bytes) {
            let (count, nature, first) =
                (unusable.count, unusable.nature(), unusable.first(&info.shape[1..]));
            let what = format!(
                "`{}` of sample {id} (row {row}) has {count} numbers {nature}, {first}",
                info.name
            );
            return Err(Error::data(file.path(), what));
        }
    }
    Ok(())
}

impl SafeTensors {
    /// Returns one whole tensor of finite numbers, on the CPU.
    ///
    /// # Errors
    /// Errors of [`read`](Self::read); [`Error::Data`] naming the tensor and its first number that
    /// is not finite, or that float32 or bfloat16 would make infinite.
    pub fn read_finite(&self, name: &str) -> Result<Tensor> {
        let (info, tensor) = (self.info(name)?, self.read(name)?);
        match not_finite(info.kind, bytes(&tensor)) {
            Some(unusable) => {
                let (count, nature, first) =
                    (unusable.count, unusable.nature(), unusable.first(&info.shape));
                Err(Error::data(
                    self.path(),
                    format!("`{name}` holds numbers {nature}: {count}, {first}"),
                ))
            }
            None => Ok(tensor),
        }
    }
}

impl Unusable {
    fn nature(&self) -> &'static str {
        if self.value.is_finite() {
            "beyond what float32 and bfloat16 hold"
        } else {
            "that are not finite"
        }
    }

    /// Describes the first of them, in a tensor or row of this shape.
    fn first(&self, shape: &[i64]) -> String {
        let place = index_of(self.first, shape);
        if self.value.is_finite() {
            format!("the first {:e} at {place:?}", self.value)
        } else {
            format!("the first at {place:?}")
        }
    }
}

/// Finds elements that are NaN, infinite or too large. It works on the bytes, since a tensor
/// operation would start libtorch's threads on each reader thread as well.
fn not_finite(kind: Kind, bytes: &[u8]) -> Option<Unusable> {
    fn scan<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f64) -> Option<Unusable> {
        let (elements, _) = bytes.as_chunks::<N>();
        let bad = |element: &[u8; N]| {
            value(*element).is_nan() || value(*element).abs() >= f64::from(TOO_LARGE)
        };
        let first = elements.iter().position(bad)?;
        Some(Unusable {
            count: elements.iter().filter(|element| bad(element)).count(),
            first,
            value: value(elements[first]),
        })
    }
    if is_sound(kind, bytes) {
        return None;
    }
    match kind {
        Kind::Half => scan(bytes, |b| f16::from_le_bytes(b).to_f64()),
        Kind::BFloat16 => scan(bytes, |b| bf16::from_le_bytes(b).to_f64()),
        Kind::Float => scan(bytes, |b| f64::from(f32::from_le_bytes(b))),
        Kind::Double => scan(bytes, f64::from_le_bytes),
        Kind::Float8e4m3fn | Kind::Float8e5m2 => {
            let numbers = float8::numbers(kind);
            scan(bytes, |[byte]: [u8; 1]| f64::from(numbers[usize::from(byte)]))
        }
        _ => None,
    }
}

/// True if all numbers are finite in float32 and bfloat16; vectorized, which is many times as fast
/// as one by one. False for kinds that it cannot check.
#[multiversion(targets = "simd")]
pub(crate) fn is_sound(kind: Kind, bytes: &[u8]) -> bool {
    // Magnitudes are ordered like their bits, with NaN last.
    match kind {
        Kind::Half | Kind::BFloat16 => {
            let infinity = if kind == Kind::Half { 0x7c00 } else { 0x7f80 };
            let largest = bytes
                .as_chunks::<2>()
                .0
                .iter()
                .fold(0, |largest: u16, b| largest.max(u16::from_le_bytes(*b) & 0x7fff));
            largest < infinity
        }
        Kind::Float => {
            let largest = bytes
                .as_chunks::<4>()
                .0
                .iter()
                .fold(0, |largest: u32, b| largest.max(u32::from_le_bytes(*b) & 0x7fff_ffff));
            largest < TOO_LARGE.to_bits()
        }
        Kind::Double => {
            let magnitude = |b: &[u8; 8]| u64::from_le_bytes(*b) & (u64::MAX >> 1);
            bytes.as_chunks::<8>().0.iter().fold(0, |largest: u64, b| largest.max(magnitude(b)))
                < f64::from(TOO_LARGE).to_bits()
        }
        // The largest magnitudes are NaN, and infinity where the kind has it.
        Kind::Float8e4m3fn | Kind::Float8e5m2 => {
            let infinity = if kind == Kind::Float8e5m2 { 0x7c } else { 0x7f };
            bytes.iter().fold(0, |largest: u8, byte| largest.max(byte & 0x7f)) < infinity
        }
        _ => false,
    }
}

/// Returns the index along each axis of the `flat`-th element.
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
    use super::*;

    #[test]
    fn every_float_kind_tells_nan_and_infinity_from_large_numbers() {
        let values =
            Tensor::from_slice(&[1.0, -65504.0, f64::NAN, 0.0, f64::NEG_INFINITY, f64::INFINITY]);
        for kind in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
            let values = values.to_kind(kind);
            let unusable = not_finite(kind, bytes(&values)).expect("three of them");
            assert_eq!((unusable.count, unusable.first), (3, 2), "{kind:?}");
            assert!(
                is_sound(kind, bytes(&values.narrow(0, 0, 2))) && !is_sound(kind, bytes(&values)),
                "{kind:?}"
            );
        }
        assert_eq!(
            not_finite(Kind::Int64, bytes(&Tensor::from(-1i64))),
            None,
            "all ones in an integer"
        );
    }

    #[test]
    fn floats_of_8_bits_are_told_by_their_bytes() {
        for (kind, bad) in [
            (Kind::Float8e4m3fn, &[0x7f, 0xff][..]),
            (Kind::Float8e5m2, &[0x7c, 0x7d, 0x7e, 0x7f, 0xfc, 0xfd, 0xfe, 0xff]),
        ] {
            for byte in 0..=u8::MAX {
                assert_eq!(is_sound(kind, &[byte]), !bad.contains(&byte), "{kind:?} {byte:#x}");
                let found = not_finite(kind, &[0, byte]).map(|found| found.first);
                assert_eq!(found, bad.contains(&byte).then_some(1), "{kind:?} {byte:#x}");
            }
        }
    }

    #[test]
    fn numbers_that_the_computation_would_make_infinite_are_told_by_their_value() {
        let largest = f64::from(bf16::MAX);
        let values = Tensor::from_slice(&[largest, -1e300, 3.4e38]).view([1, 3]);
        let found = not_finite(Kind::Double, bytes(&values)).expect("two of them");
        assert_eq!((found.count, found.nature()), (2, "beyond what float32 and bfloat16 hold"));
        assert_eq!(found.first(&[1, 3]), "the first -1e300 at [0, 1]");
        for (kind, computed) in [
            (Kind::Double, Kind::BFloat16),
            (Kind::Float, Kind::BFloat16),
            (Kind::Double, Kind::Float),
        ] {
            for value in [largest, 3.39e38, 3.396e38, 3.3962e38, 3.4e38, 1e39] {
                let tensor = Tensor::from_slice(&[value]).to_kind(kind);
                let becomes_infinite = tensor.to_kind(computed).isinf().double_value(&[0]) == 1.0;
                assert!(
                    is_sound(kind, bytes(&tensor)) || value > largest,
                    "{value:e} is refused in vain"
                );
                assert!(
                    !becomes_infinite || !is_sound(kind, bytes(&tensor)),
                    "{value:e} in {kind:?} becomes infinite in {computed:?}"
                );
            }
        }
    }

    #[test]
    fn an_index_counts_along_the_last_axis_first() {
        assert_eq!(index_of(0, &[2, 3, 4]), [0, 0, 0]);
        assert_eq!(index_of(17, &[2, 3, 4]), [1, 1, 1]);
        assert!(index_of(0, &[]).is_empty());
    }
}
