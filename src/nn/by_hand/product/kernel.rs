//! Products by AVX-512, a tile at a time.
//!
//! The sums of a tile stay in registers over the whole depth, in f32. So a number of the product
//! depends on its row and its column alone, not on how many there are. The bfloat16 instructions
//! take numbers below f32's normal range for zero.

#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, __mmask16, _mm256_mask_storeu_epi16,
    _mm256_maskz_loadu_epi16, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
};
use std::mem::transmute;

use half::bf16;

use super::operands::{COLUMNS, Factor, Left, Panels, ROWS};

/// Numbers of a vector.
const LANES: usize = 16;
/// Vectors of a tile's row.
const VECTORS: usize = COLUMNS / LANES;

/// Whether this processor has the instructions.
pub fn runs_here() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// What the instructions do with numbers of a kind.
pub trait Number: Factor {
    /// `sum + left · right`, over all numbers of a unit.
    ///
    /// # Safety
    /// The processor [has the instructions](runs_here), here and below.
    unsafe fn multiply_add(sum: __m512, left: __m512, right: __m512) -> __m512;

    /// The numbers at `place` that `lanes` name, widened; zero for others.
    ///
    /// # Safety
    /// What `lanes` name lies within one allocation.
    unsafe fn load(place: *const Self, lanes: __mmask16) -> __m512;

    /// Writes the lanes that `lanes` name, rounded.
    ///
    /// # Safety
    /// What `lanes` name lies within one allocation, which nobody else reads or writes.
    unsafe fn store(place: *mut Self, lanes: __mmask16, numbers: __m512);
}

impl Number for f32 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn multiply_add(sum: __m512, left: __m512, right: __m512) -> __m512 {
        _mm512_fmadd_ps(left, right, sum)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(place: *const f32, lanes: __mmask16) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_maskz_loadu_ps(lanes, place) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(place: *mut f32, lanes: __mmask16, numbers: __m512) {
        // SAFETY: the caller's.
        unsafe { _mm512_mask_storeu_ps(place, lanes, numbers) }
    }
}

impl Number for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn multiply_add(sum: __m512, left: __m512, right: __m512) -> __m512 {
        // SAFETY: the same 512 bits by another name.
        let [left, right] =
            unsafe { [transmute::<__m512, __m512bh>(left), transmute::<__m512, __m512bh>(right)] };
        _mm512_dpbf16_ps(sum, left, right)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(place: *const bf16, lanes: __mmask16) -> __m512 {
        // SAFETY: the caller's.
        let numbers = unsafe { _mm256_maskz_loadu_epi16(lanes, place.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(numbers)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn store(place: *mut bf16, lanes: __mmask16, numbers: __m512) {
        // SAFETY: the same 256 bits by another name; the caller's.
        unsafe {
            _mm256_mask_storeu_epi16(
                place.cast(),
                lanes,
                transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers)),
            )
        }
    }
}

/// Where a product goes: row by row, `stride` numbers from the begin of one to the begin of the
/// next.
pub struct Destination<'o, O> {
    pub elements: &'o mut [O],
    pub stride: usize,
    pub scale: Scale<'o>,
    pub onto: Onto<'o, O>,
}

/// What a product is multiplied by.
#[derive(Clone, Copy)]
pub enum Scale<'o> {
    All(f32),
    /// Each row by its own.
    Rows(&'o [f32]),
}

/// What is added to a product.
#[derive(Clone, Copy)]
pub enum Onto<'o, O> {
    Nothing,
    /// The same to each row.
    Bias(&'o [O]),
    /// The numbers that lie where it goes.
    Itself,
}

/// `scale · left · right`, onto something if told.
///
/// # Panics
/// If the sizes do not fit each other, or the processor lacks the instructions (a bug in the
/// caller).
pub fn multiply<T: Number, O: Number>(
    left: Left<'_, T>,
    right: &Panels,
    into: &mut Destination<'_, O>,
) {
    let (rows, columns) = (left.rows(), right.columns());
    assert!(
        runs_here() && left.depth() == right.depth(),
        "depths of {} and {} units",
        left.depth(),
        right.depth()
    );
    assert!(
        (rows - 1) * into.stride + columns <= into.elements.len(),
        "{rows} rows of {columns} numbers"
    );
    if let Scale::Rows(scales) = into.scale {
        assert_eq!(scales.len(), rows);
    }
    if let Onto::Bias(bias) = into.onto {
        assert_eq!(bias.len(), columns);
    }
    // SAFETY: the processor has the instructions; the operands are of one depth, and the product
    // fits where it goes.
    unsafe { tiles(left, right, into) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tiles<T: Number, O: Number>(
    left: Left<'_, T>,
    right: &Panels,
    into: &mut Destination<'_, O>,
) {
    let (rows, columns) = (left.rows(), right.columns());
    for (first_column, panel) in right.each() {
        let lanes = lanes(columns - first_column);
        for first_row in (0..rows).step_by(ROWS) {
            let (places, step) = left.strip(first_row);
            // SAFETY: a strip and a panel have as many units as the depth.
            let sums = unsafe { tile::<T>(right.depth(), places, step, panel.as_ptr()) };
            for (row, sums) in (first_row..rows).zip(sums) {
                // SAFETY: row and columns are the product's.
                unsafe { put(into, row, first_column, lanes, sums) }
            }
        }
    }
}

/// The lanes of a tile's row that are columns, if so many are left.
fn lanes(columns: usize) -> [__mmask16; VECTORS] {
    let lanes = if columns >= COLUMNS { u32::MAX } else { (1 << columns) - 1 };
    [lanes as u16, (lanes >> LANES) as u16]
}

/// # Safety
/// The processor has the instructions; at each of the places lie `depth` units, each `step` behind
/// the one before it, at `panel` `depth` rows of [`COLUMNS`] units.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile<T: Number>(
    depth: usize,
    places: [*const u32; ROWS],
    step: usize,
    panel: *const u32,
) -> [[__m512; VECTORS]; ROWS] {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for unit in 0..depth {
        // SAFETY: the caller's.
        unsafe {
            let right: [__m512; VECTORS] = std::array::from_fn(|vector| {
                _mm512_loadu_ps(panel.add(unit * COLUMNS + vector * LANES).cast())
            });
            for (sums, place) in sums.iter_mut().zip(places) {
                let left = _mm512_set1_ps(f32::from_bits(place.add(unit * step).read_unaligned()));
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = T::multiply_add(*sum, left, right);
                }
            }
        }
    }
    sums
}

/// # Safety
/// The processor has the instructions; the lanes from `column` of `row` on are of the product's.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn put<O: Number>(
    into: &mut Destination<'_, O>,
    row: usize,
    column: usize,
    lanes: [__mmask16; VECTORS],
    sums: [__m512; VECTORS],
) {
    let scale = _mm512_set1_ps(match into.scale {
        Scale::All(scale) => scale,
        Scale::Rows(scales) => scales[row],
    });
    for (vector, (lanes, sum)) in lanes.into_iter().zip(sums).enumerate() {
        let column = column + vector * LANES;
        // SAFETY: the caller's. Of a vector without lanes nothing is read or written.
        unsafe {
            let place = into.elements.as_mut_ptr().wrapping_add(row * into.stride + column);
            let scaled = _mm512_mul_ps(sum, scale);
            let sum = match into.onto {
                Onto::Nothing => scaled,
                Onto::Bias(bias) => {
                    _mm512_add_ps(scaled, O::load(bias.as_ptr().wrapping_add(column), lanes))
                }
                Onto::Itself => _mm512_add_ps(scaled, O::load(place, lanes)),
            };
            O::store(place, lanes, sum);
        }
    }
}
