//! One file of samples, read by number.

use super::finite::{check_finite, is_sound};
use super::safetensors::{SafeTensors, row_bytes};
use crate::error::Result;
use crate::pulse;

/// A file of a dataset, open.
#[derive(Debug)]
pub(super) struct SampleFile {
    pub tensors: SafeTensors,
    /// Number of its first sample; the others follow.
    pub first_id: u64,
    /// Its place among the dataset's groups.
    pub group: usize,
}

impl SampleFile {
    /// Whether all numbers of a sample are.
    pub fn is_finite(&self, id: u64) -> Result<bool> {
        let row = id - self.first_id;
        for info in self.tensors.tensors() {
            let mut data = self.tensors.buffer(row_bytes(info))?;
            self.tensors.read_rows_into(info, &[row], &mut data, |_| ())?;
            if check_finite(&self.tensors, info, &[id], &[row], &data).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fills `data` with one key of these samples, all of this file.
    pub fn read_rows(&self, key: &str, ids: &[u64], data: &mut [u8]) -> Result<()> {
        pulse::read_from(self.tensors.path());
        let info = self.tensors.info(key)?;
        let rows: Vec<u64> = ids.iter().map(|id| id - self.first_id).collect();
        let mut sound = true;
        self.tensors.read_rows_into(info, &rows, data, |piece| sound &= is_sound(info.kind, piece))?;
        if sound { Ok(()) } else { check_finite(&self.tensors, info, ids, &rows, data) }
    }
}
