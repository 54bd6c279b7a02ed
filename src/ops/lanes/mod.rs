//! Loops over a CPU's vectors, which the single passes of operations are made of.
//!
//! A loop is a function with `#[inline(always)]`, generic over the [kinds of its
//! numbers](crate::tensor::Element); [`vectorized!`] compiles it for several instruction sets.
//! Rows are cut into whole vectors, so that a loop has no end to be treated apart.

mod exp;
mod sums;

pub use exp::exp;
pub use sums::Sums;

/// Numbers of a vector.
pub const LANES: usize = 16;

/// One vector of numbers.
pub type Vector<T> = [T; LANES];

/// Rows of whole vectors, one after the other. Numbers behind the last whole vector are left out.
pub fn vectors<T>(elements: &[T]) -> &[Vector<T>] {
    elements.as_chunks().0
}

/// As [`vectors`], to be written.
pub fn vectors_mut<T>(elements: &mut [T]) -> &mut [Vector<T>] {
    elements.as_chunks_mut().0
}

/// Declares a function that calls `$body`, an `#[inline(always)]` function of the same signature,
/// compiled for several instruction sets, of which each call takes the widest that this processor
/// has. Rounding to bfloat16 gains most by AVX-512.
///
/// ```text
/// vectorized! {
///     fn doubled<T>(x: &[T], into: &mut [T]) = doubled_loop;
/// }
/// ```
///
/// Each type parameter is an [`Element`](crate::tensor::Element).
macro_rules! vectorized {
    (
        fn $name:ident<$($kind:ident),+>($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?
            = $body:ident;
    ) => {
        #[multiversion::multiversion(targets(
            "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+fma",
            "x86_64+avx2+fma",
            "aarch64+neon"
        ))]
        fn $name<$($kind: $crate::tensor::Element),+>($($argument: $type),*) $(-> $result)? {
            $body($($argument),*)
        }
    };
}
pub(super) use vectorized;
