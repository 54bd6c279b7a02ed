//! Sums over many rows that lose nothing.

use super::{LANES, Vector};

/// Rows that are summed in f32 before they go to a sum in f64: many small numbers are not lost
/// against a large one.
const ROWS: usize = 32;

/// Sums over rows, one for each column.
pub struct Sums {
    total: Vec<f64>,
    block: Vec<Vector<f32>>,
    rows: usize,
}

impl Sums {
    /// Zeros for rows of `width` vectors.
    pub fn new(width: usize) -> Self {
        Sums { total: vec![0.0; width * LANES], block: vec![[0.0; LANES]; width], rows: 0 }
    }

    /// Returns the sums to which the next row is to be added.
    #[inline(always)]
    pub fn row(&mut self) -> &mut [Vector<f32>] {
        if self.rows == ROWS {
            self.settle();
        }
        self.rows += 1;
        &mut self.block
    }

    #[inline(always)]
    fn settle(&mut self) {
        self.rows = 0;
        for (total, sum) in self.total.iter_mut().zip(self.block.as_flattened_mut()) {
            *total += f64::from(std::mem::take(sum));
        }
    }

    /// Returns the sum of each column over all rows.
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
