//! Generated pictures side by side, with a label before each row.

use std::path::Path;

use image::{Rgb, RgbImage};
use plotters::backend::DrawingBackend;
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::files::durable::replace_file;
use crate::report::canvas::{self, Anchor, Canvas, GREY, INK, Picture, text_width};
use crate::tensor::bytes;

/// Smaller pictures are enlarged by the largest whole factor that stays within this size.
const PICTURE_PIXELS: u32 = 128;
/// Text size and gaps, in layout pixels; the file has two pixels for each.
const TEXT_SIZE: f64 = 13.0;
const TITLE_SIZE: f64 = 16.0;
const GAP: u32 = 3;
const MARGIN: u32 = 14;

/// Writes the grid as a PNG file.
///
/// # Shapes
/// As [`grid_png`].
/// # Errors
/// [`Error::Storage`](crate::error::Error::Storage) if the file cannot be written.
pub fn write_grid(
    path: &Path,
    images: &Tensor,
    rows: &[String],
    columns: usize,
    title: Option<&str>,
) -> Result<()> {
    let bytes = grid_png(images, rows, columns, title);
    replace_file(path, |out| out.write_all(&bytes))
}

/// Returns the grid as PNG bytes: `columns` pictures in each row, and a label from `rows` before
/// it; small pictures are enlarged by a whole factor.
///
/// `images`: `[N, C, H, W]`, any float kind, values in `[-1, 1]` (values beyond are clipped), `C` 1
/// or 3, `N` at most rows times columns.
/// # Panics
/// If the shapes do not fit (a bug in the caller).
pub fn grid_png(images: &Tensor, rows: &[String], columns: usize, title: Option<&str>) -> Vec<u8> {
    let pictures = pictures(images);
    assert!(
        pictures.len() <= rows.len() * columns,
        "{} pictures for {} rows of {columns}",
        pictures.len(),
        rows.len()
    );
    let side = pictures.first().map_or((1, 1), RgbImage::dimensions);
    let factor = (PICTURE_PIXELS / side.0.max(side.1)).max(1);
    // An odd size would put every other picture between two layout pixels.
    let cell = [side.0 * factor, side.1 * factor].map(|pixels| pixels.div_ceil(2));
    let layout = Layout::new(rows, columns as u32, cell, title);
    let mut sheet = canvas::bitmap(&layout, layout.width(), layout.height());
    for (i, picture) in pictures.iter().enumerate() {
        let (left, top) = layout.cell(i / columns, i % columns);
        enlarge(picture, factor, &mut sheet, (left * 2, top * 2));
    }
    canvas::encode_png(&sheet)
}

fn pictures(images: &Tensor) -> Vec<RgbImage> {
    let (n, c, h, w) = images.size4().expect("images are [N, C, H, W]");
    assert!(c == 1 || c == 3, "pictures have 1 or 3 channels, not {c}");
    let colours = images.to_device(Device::Cpu).to_kind(Kind::Float).expand([n, 3, h, w], false);
    let levels = ((colours + 1.0) * 127.5).round().nan_to_num(0.0, None, None).clamp(0.0, 255.0);
    let pixels = levels.to_kind(Kind::Uint8).permute([0, 2, 3, 1]).contiguous();
    let picture = |i| {
        RgbImage::from_raw(w as u32, h as u32, bytes(&pixels.get(i)).to_vec())
            .expect("three bytes a pixel")
    };
    (0..n).map(picture).collect()
}

fn enlarge(picture: &RgbImage, factor: u32, sheet: &mut RgbImage, (left, top): (u32, u32)) {
    for (x, y, pixel) in picture.enumerate_pixels() {
        let Rgb(colour) = *pixel;
        let block = (0..factor).flat_map(|dy| (0..factor).map(move |dx| (dx, dy)));
        block.for_each(|(dx, dy)| {
            sheet.put_pixel(left + x * factor + dx, top + y * factor + dy, Rgb(colour))
        });
    }
}

/// Positions of the labels and pictures, in layout pixels.
struct Layout<'g> {
    rows: &'g [String],
    columns: u32,
    cell: [u32; 2],
    title: Option<&'g str>,
    left: u32,
    top: u32,
}

impl<'g> Layout<'g> {
    fn new(rows: &'g [String], columns: u32, cell: [u32; 2], title: Option<&'g str>) -> Self {
        let widest =
            rows.iter().map(|row| text_width(row, TEXT_SIZE, false)).fold(0.0, f64::max) as u32;
        let left = MARGIN + if widest > 0 { widest + 12 } else { 0 };
        let top = MARGIN + title.map_or(0, |_| TITLE_SIZE as u32 + 14);
        Layout { rows, columns, cell, title, left, top }
    }

    fn width(&self) -> u32 {
        let pictures =
            self.left + self.columns * (self.cell[0] + GAP) - GAP.min(self.columns * GAP);
        let title = self.title.map_or(0.0, |title| text_width(title, TITLE_SIZE, true)) as u32;
        pictures.max(MARGIN + title) + MARGIN
    }

    fn height(&self) -> u32 {
        self.cell(self.rows.len(), 0).1 - GAP.min(self.rows.len() as u32 * GAP) + MARGIN
    }

    fn cell(&self, row: usize, column: usize) -> (u32, u32) {
        (
            self.left + column as u32 * (self.cell[0] + GAP),
            self.top + row as u32 * (self.cell[1] + GAP),
        )
    }
}

impl Picture for Layout<'_> {
    fn paint<B: DrawingBackend>(&self, canvas: &mut Canvas<'_, B>) {
        if let Some(title) = self.title {
            let base_line = f64::from(MARGIN) + TITLE_SIZE * 0.8;
            canvas.text(title, (f64::from(MARGIN), base_line), Anchor::Left, INK, TITLE_SIZE, true);
        }
        for (i, row) in self.rows.iter().enumerate() {
            let (left, top) = self.cell(i, 0);
            let base_line = f64::from(top) + f64::from(self.cell[1]) / 2.0 + TEXT_SIZE * 0.36;
            canvas.text(
                row,
                (f64::from(left) - 12.0, base_line),
                Anchor::Right,
                GREY,
                TEXT_SIZE,
                false,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(png: &[u8]) -> RgbImage {
        image::load_from_memory(png).unwrap().to_rgb8()
    }

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|i| i.to_string()).collect()
    }

    #[test]
    fn pictures_are_enlarged_without_blur_in_row_order() {
        let images = Tensor::from_slice(&[-1.0f32, -0.5, 0.5, 5.0])
            .view([4, 1, 1, 1])
            .expand([4, 1, 8, 8], false);
        let sheet = decoded(&grid_png(&images, &names(2), 2, None));
        let mut seen: Vec<u8> = Vec::new();
        for y in [100, 220] {
            let row = (60..sheet.width() - 30).map(|x| sheet.get_pixel(x, y).0[0]);
            seen.extend(row);
        }
        seen.dedup();
        let shades: Vec<u8> = seen.into_iter().filter(|&shade| shade != 255).collect();
        assert_eq!(
            shades,
            [0, 64, 191],
            "black, dark, light; the clipped fourth is as white as the gaps"
        );
    }

    #[test]
    fn three_channels_keep_their_colours() {
        let red = Tensor::from_slice(&[1.0f32, -1.0, f32::NAN])
            .view([1, 3, 1, 1])
            .expand([1, 3, 16, 16], false);
        let sheet = decoded(&grid_png(&red, &names(1), 1, Some("one")));
        let reds = sheet.pixels().filter(|pixel| pixel.0 == [255, 0, 0]).count();
        assert_eq!(reds, 128 * 128);
    }

    #[test]
    fn an_empty_or_unfinished_grid_is_a_picture_too() {
        let none = Tensor::zeros([0, 1, 8, 8], (Kind::Float, Device::Cpu));
        assert!(decoded(&grid_png(&none, &[], 4, None)).width() > 0);
        let three = Tensor::zeros([3, 1, 8, 8], (Kind::Float, Device::Cpu));
        let greys = decoded(&grid_png(&three, &names(2), 2, None))
            .pixels()
            .filter(|pixel| pixel.0 == [128; 3])
            .count();
        assert!(greys >= 3 * 128 * 128, "{greys}");
    }

    #[test]
    #[should_panic(expected = "5 pictures for 2 rows of 2")]
    fn too_many_pictures_are_a_bug() {
        grid_png(&Tensor::zeros([5, 1, 8, 8], (Kind::Float, Device::Cpu)), &names(2), 2, None);
    }
}
