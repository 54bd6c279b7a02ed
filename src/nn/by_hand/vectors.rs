//! Rows of numbers in vectors, so that loops over them have no ends to be treated apart.

/// Numbers of a vector.
pub const LANES: usize = 16;
/// Rows that are summed in f32 before they go to a sum in f64: many small numbers are not lost
/// against a large one.
const ROWS: usize = 32;

/// Rows of whole vectors, one after the other.
pub fn vectors<T>(elements: &[T]) -> &[[T; LANES]] {
    elements.as_chunks().0
}

pub fn vectors_mut<T>(elements: &mut [T]) -> &mut [[T; LANES]] {
    elements.as_chunks_mut().0
}

/// Sums over rows, by column.
pub struct Sums {
    total: Vec<f64>,
    of_block: Vec<[f32; LANES]>,
    rows: usize,
}

impl Sums {
    /// `width`: vectors of a row.
    pub fn new(width: usize) -> Self {
        Sums { total: vec![0.0; width * LANES], of_block: vec![[0.0; LANES]; width], rows: 0 }
    }

    /// Where the next row is to be added.
    #[inline(always)]
    pub fn row(&mut self) -> &mut [[f32; LANES]] {
        if self.rows == ROWS {
            self.settle();
        }
        self.rows += 1;
        &mut self.of_block
    }

    #[inline(always)]
    fn settle(&mut self) {
        self.rows = 0;
        for (total, sum) in self.total.iter_mut().zip(self.of_block.as_flattened_mut()) {
            *total += f64::from(std::mem::take(sum));
        }
    }

    pub fn taken(mut self) -> Vec<f64> {
        self.settle();
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_numbers_are_not_lost_against_a_large_sum() {
        let mut sums = Sums::new(1);
        for row in 0..10_000 {
            sums.row()[0][3] += if row == 0 { 16_777_216.0 } else { 1.0 };
        }
        let taken = sums.taken();
        // The first block of rows alone loses some.
        assert!((taken[3] - 16_787_215.0).abs() < ROWS as f64, "{}", taken[3]);
        assert_eq!(taken[..3], [0.0; 3]);
    }
}
