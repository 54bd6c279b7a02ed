//! Batches: which rows are encoded together. They follow from the rows alone, not from the number
//! of ranks nor from what was encoded before a kill, since libtorch may give a row other last
//! digits in another batch.

use std::collections::BTreeMap;

use super::store::Row;

/// Rows that are encoded together, and the file that holds them afterwards.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub file: String,
    /// Numbers of the rows.
    pub rows: Vec<usize>,
}

/// Batches of one sort of rows.
#[derive(Debug)]
pub(super) struct Batches {
    pub list: Vec<Batch>,
}

impl Batches {
    /// Divides rows, each of a number of tokens, into batches of at most `budget` tokens, where
    /// every row counts as the batch's longest; a longer row stands alone. Rows of a batch have
    /// equal `shape(row)`.
    ///
    /// `name`: begin of the names of files.
    pub fn new<K: Ord>(
        name: &str,
        rows: usize,
        budget: u64,
        shape: impl Fn(usize) -> K,
        tokens: impl Fn(usize) -> u64,
    ) -> Self {
        let mut by_shape: BTreeMap<K, Vec<usize>> = BTreeMap::new();
        for row in 0..rows {
            by_shape.entry(shape(row)).or_default().push(row);
        }
        let mut list = Vec::<Batch>::new();
        for mut members in by_shape.into_values() {
            // Sorting is stable: rows of one length stay in their order.
            members.sort_by_key(|row| tokens(*row));
            let mut begun = Vec::new();
            for row in members {
                // Lengths rise, so that this row would be the batch's longest.
                if !begun.is_empty() && (begun.len() as u64 + 1) * tokens(row) > budget {
                    list.push(Batch { file: String::new(), rows: std::mem::take(&mut begun) });
                }
                begun.push(row);
            }
            list.push(Batch { file: String::new(), rows: begun });
        }
        for (number, batch) in list.iter_mut().enumerate() {
            batch.file = format!("{name}-{number:06}.safetensors");
        }
        Batches { list }
    }

    /// Returns the place of each row.
    pub fn places(&self, rows: usize) -> Vec<Row> {
        let mut places = vec![Row { file: String::new(), number: 0 }; rows];
        for batch in &self.list {
            for (number, row) in batch.rows.iter().enumerate() {
                places[*row] = Row { file: batch.file.clone(), number };
            }
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_as_full_as_the_budget_allows_and_of_one_shape() {
        let shapes = ["a", "b", "a", "a", "b", "a"];
        let tokens = [4, 9, 2, 3, 9, 30];
        let batches = Batches::new("x", 6, 10, |row| shapes[row], |row| tokens[row]);
        let found: Vec<&[usize]> = batches.list.iter().map(|batch| batch.rows.as_slice()).collect();
        // 3 · 4 is more than 10; of `b`, 2 · 9 are, too.
        assert_eq!(found, [&[2, 3][..], &[0], &[5], &[1], &[4]]);
        assert_eq!(batches.list[2].file, "x-000002.safetensors");
        let places = batches.places(6);
        assert_eq!((places[3].file.as_str(), places[3].number), ("x-000000.safetensors", 1));
    }
}
