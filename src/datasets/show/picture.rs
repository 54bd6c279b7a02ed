//! Latents as a picture, undecoded: it shows samples that are empty, repeated or mixed up.

use std::path::Path;

use tch::{Kind, Tensor};

use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::report::write_grid;

/// Samples in the picture, in rows of eight.
const COLUMNS: usize = 8;
const ROWS: usize = 4;
/// Three standard deviations of normalized latents are drawn as black and white.
const DEVIATIONS: f64 = 3.0;

/// Draws the first samples of the largest group: up to three channels, of videos the first frame.
///
/// # Errors
/// Errors of reading; [`Error::Storage`] if the file cannot be written.
pub fn write(dataset: &Dataset, path: &Path) -> Result<()> {
    let largest = dataset.groups().iter().max_by_key(|group| group.sample_ids.len());
    let group = largest.ok_or_else(|| Error::data(dataset.path(), "has no samples"))?;
    let drawn: Vec<u64> = group.sample_ids.iter().copied().take(ROWS * COLUMNS).collect();
    let pictures = drawn.iter().map(|id| picture(dataset, *id)).collect::<Result<Vec<_>>>()?;
    let labels: Vec<String> = drawn.chunks(COLUMNS).map(|row| format!("from {}", row[0])).collect();
    let title = format!("{}: latents of group {}", dataset.manifest().name, group.name);
    write_grid(path, &Tensor::stack(&pictures, 0), &labels, COLUMNS, Some(&title))
}

/// Returns one sample's latents as `[1 or 3, H, W]` in `[-1, 1]`.
fn picture(dataset: &Dataset, id: u64) -> Result<Tensor> {
    let batch = dataset.batch(&[id])?;
    let latents = batch.latents().expect("a sample has latents").get(0).to_kind(Kind::Float);
    let frame = if latents.dim() == 4 { latents.select(1, 0) } else { latents };
    let channels = if frame.size()[0] >= 3 { 3 } else { 1 };
    Ok((frame.narrow(0, 0, channels) / DEVIATIONS).clamp(-1.0, 1.0))
}
