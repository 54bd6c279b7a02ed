//! Matrices to units, by AVX-512.

#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512i, __mmask32, _MM_HINT_T0, _mm_prefetch, _mm512_loadu_epi32, _mm512_maskz_loadu_epi16,
    _mm512_permutex2var_epi32, _mm512_setzero_si512, _mm512_storeu_epi32,
};

use super::kernel::runs_here;
use super::operands::{COLUMNS, Factor, Rows};

/// Units of a vector.
const LANES: usize = 16;

/// Rows that run along the depth, to panels of `depth` units: the rows become columns.
///
/// # Panics
/// If there is not one panel for each [`COLUMNS`] rows, or the processor lacks the instructions (a
/// bug in the caller).
pub fn turn<T: Factor>(matrix: Rows<'_, T>, depth: usize, panels: &mut [u32]) {
    assert!(runs_here() && panels.len() == matrix.rows().next_multiple_of(COLUMNS) * depth);
    // SAFETY: the processor has the instructions.
    unsafe { turned(matrix, depth, panels) }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn turned<T: Factor>(matrix: Rows<'_, T>, depth: usize, panels: &mut [u32]) {
    for first in (0..matrix.rows().next_multiple_of(COLUMNS)).step_by(LANES) {
        let (panel, column) = (&mut panels[first / COLUMNS * COLUMNS * depth..], first % COLUMNS);
        for unit in (0..depth).step_by(LANES) {
            let rows = std::array::from_fn(|row| {
                match (first + row < matrix.rows()).then(|| matrix.row(first + row)) {
                    Some(row) => {
                        prefetch(row.as_ptr().wrapping_add((unit + UNITS_AHEAD) * T::IN_UNIT));
                        load(&row[unit * T::IN_UNIT..])
                    }
                    None => _mm512_setzero_si512(),
                }
            });
            for (unit, units) in (unit..depth).zip(transposed(rows)) {
                let places = &mut panel[unit * COLUMNS + column..][..LANES];
                // SAFETY: as many places as lanes.
                unsafe { _mm512_storeu_epi32(places.as_mut_ptr().cast(), units) }
            }
        }
    }
}

/// The first units of `numbers`, zeros beyond the last number.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load<T: Factor>(numbers: &[T]) -> __m512i {
    let halves = size_of_val(numbers) / 2;
    let lanes: __mmask32 = if halves >= 2 * LANES { !0 } else { (1 << halves) - 1 };
    // SAFETY: the lanes are as many as the numbers fill.
    unsafe { _mm512_maskz_loadu_epi16(lanes, numbers.as_ptr().cast()) }
}

/// Columns to rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    swapped::<8>(swapped::<4>(swapped::<2>(swapped::<1>(rows))))
}

/// Each two by two blocks of so many rows and lanes, with those beside the diagonal in each other's
/// place.
#[inline]
#[target_feature(enable = "avx512f")]
fn swapped<const DISTANCE: usize>(mut rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let vector = |lanes: [i32; LANES]| {
        // SAFETY: as many numbers as lanes.
        unsafe { _mm512_loadu_epi32(lanes.as_ptr()) }
    };
    // Lanes of the other row count from 16 on.
    let is_first = |lane: usize| lane & DISTANCE == 0;
    let of_first = vector(std::array::from_fn(
        |lane| if is_first(lane) { lane } else { LANES + lane - DISTANCE } as i32,
    ));
    let of_second = vector(std::array::from_fn(
        |lane| if is_first(lane) { lane + DISTANCE } else { LANES + lane } as i32,
    ));
    for row in 0..LANES {
        if is_first(row) {
            let (first, second) = (rows[row], rows[row + DISTANCE]);
            rows[row] = _mm512_permutex2var_epi32(first, of_first, second);
            rows[row + DISTANCE] = _mm512_permutex2var_epi32(first, of_second, second);
        }
    }
    rows
}

/// Rows that run across the depth, to groups of `WIDTH` columns with `depth` units each; writes
/// each column's sum, if told where.
///
/// # Panics
/// If there is not one group for each `WIDTH` columns, or the processor lacks the instructions (a
/// bug in the caller).
pub fn interleave<T: Factor, const WIDTH: usize>(
    matrix: Rows<'_, T>,
    depth: usize,
    groups: &mut [u32],
    sums: Option<&mut [f64]>,
) {
    assert!(runs_here() && groups.len() == matrix.columns().next_multiple_of(WIDTH) * depth);
    // SAFETY: the processor has the instructions.
    unsafe { interleaved::<T, WIDTH>(matrix, depth, groups, sums) }
}

/// Units whose numbers are summed in f32 before they go to a sum in f64: many small numbers are not
/// lost against a large one.
const BLOCK: usize = 16;

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn interleaved<T: Factor, const WIDTH: usize>(
    matrix: Rows<'_, T>,
    depth: usize,
    groups: &mut [u32],
    mut sums: Option<&mut [f64]>,
) {
    for first in (0..matrix.columns()).step_by(COLUMNS) {
        let columns = COLUMNS.min(matrix.columns() - first);
        let mut of_block = [0f32; COLUMNS];
        for unit in 0..depth {
            let lines: [[T; COLUMNS]; 2] = std::array::from_fn(|place| {
                let row = unit * T::IN_UNIT + place;
                prefetch(matrix.place(row + ROWS_AHEAD, first));
                if place < T::IN_UNIT { line(matrix, row, first) } else { [T::zeroed(); COLUMNS] }
            });
            let units = T::units(lines);
            for (group, units) in
                (first / WIDTH..).zip(units.chunks_exact(WIDTH)).take(columns.div_ceil(WIDTH))
            {
                groups[(group * depth + unit) * WIDTH..][..WIDTH].copy_from_slice(units);
            }
            if let Some(sums) = &mut sums {
                lines.iter().for_each(|line| {
                    of_block.iter_mut().zip(line).for_each(|(sum, number)| *sum += number.widened())
                });
                if (unit + 1).is_multiple_of(BLOCK) || unit + 1 == depth {
                    let sums = sums[first..][..columns].iter_mut();
                    sums.zip(&mut of_block)
                        .for_each(|(sum, of_block)| *sum += f64::from(std::mem::take(of_block)));
                }
            }
        }
    }
}

/// Rows that are asked for before their turn. They lie too far apart for the processor to see what
/// comes next, so that it waited for each.
const ROWS_AHEAD: usize = 16;
/// Units of a row that are asked for before their turn: many rows are read at once.
const UNITS_AHEAD: usize = 4 * LANES;

/// Asks for a cache line; nothing happens where there is none.
#[inline(always)]
fn prefetch<T>(place: *const T) {
    // SAFETY: no address is wrong for it.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) }
}

/// Neighbouring numbers of a row, zeros where the matrix ends.
#[inline(always)]
fn line<T: Factor>(matrix: Rows<'_, T>, row: usize, first: usize) -> [T; COLUMNS] {
    if row >= matrix.rows() {
        return [T::zeroed(); COLUMNS];
    }
    let numbers = &matrix.row(row)[first..];
    numbers.first_chunk().copied().unwrap_or_else(|| {
        let mut line = [T::zeroed(); COLUMNS];
        line[..numbers.len()].copy_from_slice(numbers);
        line
    })
}
