//! Samples of the same prompts over a run: a row of pictures for each prompt.

use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::imageops::thumbnail;
use image::{ImageReader, Limits};

use super::canvas::encode_png;
use super::page::escaped;

/// Longest side of a picture on the page; larger ones are made smaller.
const MOST_PIXELS: u32 = 256;
/// Longest side of a picture that is decoded, and most bytes that decoding may take.
const MOST_SIDE: u32 = 1 << 18;
const MOST_BYTES: u64 = 1 << 30;

/// The pictures of one prompt.
#[derive(Clone, Debug)]
pub struct HistoryRow {
    /// The prompt's number.
    pub number: usize,
    pub label: String,
    /// One for each step, ascending.
    pub cells: Vec<HistoryCell>,
}

/// The picture of one step.
#[derive(Clone, Debug)]
pub struct HistoryCell {
    pub step: u64,
    png: Vec<u8>,
}

impl HistoryCell {
    /// Takes the picture in a PNG file, smaller where it is large; `None` if it is no such file.
    pub fn new(step: u64, png: &[u8]) -> Option<Self> {
        let mut reader = ImageReader::with_format(Cursor::new(png), image::ImageFormat::Png);
        let mut limits = Limits::default();
        (limits.max_image_width, limits.max_image_height) = (Some(MOST_SIDE), Some(MOST_SIDE));
        limits.max_alloc = Some(MOST_BYTES);
        reader.limits(limits);
        let picture = reader.decode().ok()?.to_rgb8();
        let (width, height) = picture.dimensions();
        let factor = f64::from(MOST_PIXELS) / f64::from(width.max(height));
        if factor >= 1.0 {
            return Some(HistoryCell { step, png: png.into() });
        }
        let smaller = |side: u32| ((f64::from(side) * factor) as u32).max(1);
        let picture = thumbnail(&picture, smaller(width), smaller(height));
        Some(HistoryCell { step, png: encode_png(&picture) })
    }
}

/// Returns a table with a row for each prompt and a column for each step.
pub(super) fn table(rows: &[HistoryRow]) -> String {
    let mut steps: Vec<u64> =
        rows.iter().flat_map(|row| &row.cells).map(|cell| cell.step).collect();
    steps.sort_unstable();
    steps.dedup();
    let heads: String = steps.iter().map(|step| format!("<th>step {step}</th>")).collect();
    let body: String = rows.iter().map(|row| line(row, &steps)).collect();
    format!("<div class=\"history\"><table>\n<tr><th></th>{heads}</tr>\n{body}</table></div>\n")
}

fn line(row: &HistoryRow, steps: &[u64]) -> String {
    let label = escaped(&row.label);
    let cell = |step: &u64| match row.cells.iter().find(|cell| cell.step == *step) {
        Some(cell) => format!(
            "<td><img alt=\"{label}, step {step}\" src=\"data:image/png;base64,{}\"></td>",
            STANDARD.encode(&cell.png)
        ),
        None => "<td></td>".into(),
    };
    let cells: String = steps.iter().map(cell).collect();
    format!("<tr><th>{label}</th>{cells}</tr>\n")
}

#[cfg(test)]
mod tests {
    use image::RgbImage;

    use super::*;

    fn cell(step: u64, width: u32, height: u32) -> HistoryCell {
        HistoryCell::new(step, &encode_png(&RgbImage::new(width, height))).expect("a PNG")
    }

    #[test]
    fn large_pictures_become_smaller_and_small_ones_stay() {
        let size = |cell: HistoryCell| {
            image::load_from_memory(&cell.png).expect("a PNG").to_rgb8().dimensions()
        };
        assert_eq!(size(cell(0, 64, 32)), (64, 32));
        assert_eq!(size(cell(0, 512, 1024)), (128, 256));
        assert_eq!(size(cell(0, 5000, 2)), (256, 1));
        assert!(HistoryCell::new(0, b"no picture").is_none());
    }

    #[test]
    fn a_step_without_a_picture_leaves_its_place_empty() {
        let row = |number, label: &str, steps: &[u64]| HistoryRow {
            number,
            label: label.into(),
            cells: steps.iter().map(|step| cell(*step, 8, 8)).collect(),
        };
        let table = table(&[row(0, "a <b>", &[0, 5]), row(1, "c", &[5])]);
        assert_eq!(table.matches("<img").count(), 3);
        assert!(table.contains("<th>a &lt;b&gt;</th>") && table.contains("<th>step 5</th>"));
        assert!(table.contains("<th>c</th><td></td><td><img"), "{table}");
    }
}
