//! How the operands of a product lie in memory, and how they are laid out for it.
//!
//! A *unit* is what one lane of a multiplication takes: one f32, or two bfloat16 that are
//! neighbours along the depth, the first in the lower half. Both are 32 bits, so that all that lies
//! in units is the same for both kinds.

use half::bf16;

use super::layout::{interleave, turn};
use crate::tensor::Element;

/// Rows of a tile of the product.
pub const ROWS: usize = 8;
/// Columns of a tile of the product.
pub const COLUMNS: usize = 32;

/// A kind that products take.
pub trait Factor: Element {
    /// Numbers of a unit.
    const IN_UNIT: usize;

    /// Units of neighbouring columns, from a row and, where a unit has two numbers, the next one.
    fn units(rows: [[Self; COLUMNS]; 2]) -> [u32; COLUMNS];
}

impl Factor for f32 {
    const IN_UNIT: usize = 1;

    #[inline(always)]
    fn units([row, _]: [[f32; COLUMNS]; 2]) -> [u32; COLUMNS] {
        row.map(f32::to_bits)
    }
}

impl Factor for bf16 {
    const IN_UNIT: usize = 2;

    #[inline(always)]
    fn units([row, next]: [[bf16; COLUMNS]; 2]) -> [u32; COLUMNS] {
        std::array::from_fn(|column| {
            u32::from(row[column].to_bits()) | u32::from(next[column].to_bits()) << 16
        })
    }
}

/// Rows of numbers, `stride` numbers from the begin of one to the begin of the next.
#[derive(Clone, Copy)]
pub struct Rows<'e, T> {
    elements: &'e [T],
    stride: usize,
    rows: usize,
    columns: usize,
}

impl<'e, T> Rows<'e, T> {
    /// # Panics
    /// If the elements end before the last row does (a bug in the caller).
    pub fn new(elements: &'e [T], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(
            rows > 0 && (rows - 1) * stride + columns <= elements.len(),
            "{rows} rows of {columns}, {stride} apart"
        );
        Rows { elements, stride, rows, columns }
    }

    /// Rows one right after the other.
    pub fn dense(elements: &'e [T], columns: usize) -> Self {
        Self::new(elements, elements.len() / columns, columns, columns)
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    pub fn row(&self, row: usize) -> &'e [T] {
        &self.elements[row * self.stride..][..self.columns]
    }

    /// Where a number lies, or would lie if the matrix went on.
    #[inline(always)]
    pub fn place(&self, row: usize, column: usize) -> *const T {
        self.elements.as_ptr().wrapping_add(row * self.stride + column)
    }

    /// Some of the rows.
    pub fn part(&self, first: usize, rows: usize) -> Self {
        Self::new(&self.elements[first * self.stride..], rows, self.columns, self.stride)
    }

    /// Some of the columns.
    pub fn side(&self, first: usize, columns: usize) -> Self {
        Self::new(&self.elements[first..], self.rows, columns, self.stride)
    }
}

/// A right operand in panels of [`COLUMNS`] columns: a panel's units lie row by row, zeros where
/// the operand ends.
pub struct Panels {
    units: Vec<u32>,
    depth: usize,
    columns: usize,
}

impl Panels {
    pub const fn new() -> Self {
        Panels { units: Vec::new(), depth: 0, columns: 0 }
    }

    /// Lays out the transpose of `matrix`, whose rows run along the depth.
    pub fn transposed<T: Factor>(&mut self, matrix: Rows<'_, T>) {
        (self.depth, self.columns) = (matrix.columns.div_ceil(T::IN_UNIT), matrix.rows);
        self.units.resize(self.columns.next_multiple_of(COLUMNS) * self.depth, 0);
        turn(matrix, self.depth, &mut self.units);
    }

    /// Lays out `matrix`, whose columns run along the depth.
    pub fn straight<T: Factor>(&mut self, matrix: Rows<'_, T>) {
        (self.depth, self.columns) = (matrix.rows.div_ceil(T::IN_UNIT), matrix.columns);
        self.units.resize(self.columns.next_multiple_of(COLUMNS) * self.depth, 0);
        interleave::<T, COLUMNS>(matrix, self.depth, &mut self.units, None);
    }

    /// Units of a column.
    pub fn depth(&self) -> usize {
        self.depth
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Each panel with its first column.
    pub fn each(&self) -> impl Iterator<Item = (usize, &[u32])> {
        (0..self.columns)
            .step_by(COLUMNS)
            .zip(self.units.chunks_exact((COLUMNS * self.depth).max(1)))
    }
}

/// The transpose of a matrix as left operand, in strips of [`ROWS`] rows: a strip's units lie
/// column by column, zeros where the operand ends.
#[derive(Default)]
pub struct Strips {
    units: Vec<u32>,
    depth: usize,
    rows: usize,
}

impl Strips {
    /// Lays out the transpose of `matrix`, whose columns run along the depth.
    pub fn transposed<T: Factor>(&mut self, matrix: Rows<'_, T>) {
        self.lay_out(matrix, None);
    }

    /// As [`transposed`](Self::transposed); returns the sums of the columns, which are read anyway.
    pub fn transposed_and_summed<T: Factor>(&mut self, matrix: Rows<'_, T>) -> Vec<f64> {
        let mut sums = vec![0.0; matrix.columns];
        self.lay_out(matrix, Some(&mut sums));
        sums
    }

    fn lay_out<T: Factor>(&mut self, matrix: Rows<'_, T>, sums: Option<&mut [f64]>) {
        (self.depth, self.rows) = (matrix.rows.div_ceil(T::IN_UNIT), matrix.columns);
        self.units.resize(self.rows.next_multiple_of(ROWS) * self.depth, 0);
        interleave::<T, ROWS>(matrix, self.depth, &mut self.units, sums);
    }
}

/// A left operand.
#[derive(Clone, Copy)]
pub enum Left<'e, T> {
    /// Rows along the depth, of whole units.
    Rows(Rows<'e, T>),
    Strips(&'e Strips),
}

impl<T: Factor> Left<'_, T> {
    pub fn rows(&self) -> usize {
        match self {
            Left::Rows(rows) => rows.rows,
            Left::Strips(strips) => strips.rows,
        }
    }

    /// Units of a row.
    ///
    /// # Panics
    /// If rows end within a unit (a bug in the caller).
    pub fn depth(&self) -> usize {
        match self {
            Left::Rows(rows) => {
                assert!(
                    rows.columns.is_multiple_of(T::IN_UNIT),
                    "rows of {} in units of {}",
                    rows.columns,
                    T::IN_UNIT
                );
                rows.columns / T::IN_UNIT
            }
            Left::Strips(strips) => strips.depth,
        }
    }

    /// Where the units of a strip's rows begin, of the last one once more for rows that are none;
    /// and how many units one lies behind the other.
    #[inline(always)]
    pub fn strip(&self, first: usize) -> ([*const u32; ROWS], usize) {
        match self {
            Left::Rows(rows) => (
                std::array::from_fn(|row| {
                    rows.row((first + row).min(rows.rows - 1)).as_ptr().cast()
                }),
                1,
            ),
            Left::Strips(strips) => {
                let strip = &strips.units[first * strips.depth..][..ROWS * strips.depth];
                (std::array::from_fn(|row| strip[row..].as_ptr()), ROWS)
            }
        }
    }
}
