//! Latents as a picture, undecoded: it shows samples that are empty, repeated or mixed up.

use std::cmp::Reverse;
use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::data::{Dataset, Group};
use crate::error::{Error, Result};
use crate::report::write_grid;

/// Samples in a row, and rows of all groups.
const COLUMNS: usize = 8;
const ROWS: usize = 4;
/// Three standard deviations of normalized latents are drawn as black and white.
const DEVIATIONS: f64 = 3.0;
/// Fills the places beside small pictures and behind the last one of a row.
const BLANK: f64 = 1.0;

/// Draws the first finite samples of the largest groups: up to three channels, of videos the first
/// frame.
///
/// # Errors
/// [`Error::Data`] if no sample is finite; errors of reading; [`Error::Storage`] if the file cannot
/// be written.
pub fn write(dataset: &Dataset, path: &Path) -> Result<()> {
    let mut groups: Vec<&Group> = dataset.groups().iter().collect();
    groups.sort_by_key(|group| Reverse(group.sample_ids.len()));
    groups.truncate(ROWS);
    let of_each = COLUMNS * (ROWS / groups.len().max(1));
    let (mut rows, mut labels) = (Vec::new(), Vec::new());
    for group in groups {
        let drawn = pictures(dataset, group, of_each)?;
        for row in drawn.chunks(COLUMNS) {
            labels.push(format!("{} from {}", group.name, row[0].0));
            rows.push(row.iter().map(|(_, picture)| picture.shallow_clone()).collect::<Vec<_>>());
        }
    }
    let sizes = || rows.iter().flatten().map(Tensor::size);
    let [Some(channels), Some(height), Some(width)] =
        [0, 1, 2].map(|axis| sizes().map(|size| size[axis]).max())
    else {
        return Err(Error::data(dataset.path(), "has no finite sample to draw"));
    };
    let whole = [channels, height, width];
    let pictures: Vec<Tensor> = rows.iter().flat_map(|row| filled(row, whole)).collect();
    let title = format!("{}: latents", dataset.manifest().name);
    write_grid(path, &Tensor::stack(&pictures, 0), &labels, COLUMNS, Some(&title))
}

/// Returns the first finite samples of a group with their pictures.
fn pictures(dataset: &Dataset, group: &Group, count: usize) -> Result<Vec<(u64, Tensor)>> {
    let mut drawn = Vec::new();
    for id in &group.sample_ids {
        match picture(dataset, *id) {
            Err(_) if !dataset.is_finite(*id)? => continue,
            picture => drawn.push((*id, picture?)),
        }
        if drawn.len() == count {
            break;
        }
    }
    Ok(drawn)
}

/// Returns one sample's latents as `[1 or 3, H, W]` in `[-1, 1]`.
fn picture(dataset: &Dataset, id: u64) -> Result<Tensor> {
    let batch = dataset.batch(&[id])?;
    let latents = batch.latents().expect("a sample has latents").get(0).to_kind(Kind::Float);
    let frame = if latents.dim() == 4 { latents.select(1, 0) } else { latents };
    let channels = if frame.size()[0] >= 3 { 3 } else { 1 };
    Ok((frame.narrow(0, 0, channels) / DEVIATIONS).clamp(-1.0, 1.0))
}

/// Returns a whole row of pictures of one shape.
fn filled(row: &[Tensor], whole: [i64; 3]) -> Vec<Tensor> {
    let blank = || Tensor::full(whole, BLANK, (Kind::Float, Device::Cpu));
    let placed = |picture: &Tensor| {
        let (place, size) = (blank(), picture.size());
        place.narrow(1, 0, size[1]).narrow(2, 0, size[2]).copy_(picture);
        place
    };
    let missing = COLUMNS - row.len();
    row.iter().map(placed).chain(std::iter::repeat_with(blank).take(missing)).collect()
}
