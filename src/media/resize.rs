//! Resizing by convolution, to the numbers of Pillow.
//!
//! Pillow rounds to 8 bits after the rows and again after the columns, and so do two passes here, in
//! its order: columns go first where they lose more than twice as many pixels as rows do, as trying
//! Pillow 13.0.0 showed. Between roundings they compute in float32, because 16-bit weights would be
//! two steps off where neighbouring pixels differ most.

use bytemuck::cast_slice;
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use super::fit::Size;

/// Rows or columns that are held in float32 at once.
const BAND: u32 = 64;

/// Weights of the pixels around a place. Their window grows where a picture shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// Pillow's LANCZOS, which the reference resizes pictures with.
    Lanczos,
    /// Pillow's BILINEAR: it does not ring, so that no mask gets ripples beside its edges.
    Bilinear,
}

/// Resizes rows of pixels of 1 or 3 bytes.
pub(super) fn resize(pixels: Vec<u8>, original: Size, size: Size, filter: Filter) -> Vec<u8> {
    let channels = pixels.len() / original.pixels() as usize;
    let pass = Pass { channels, filter };
    match columns_go_first(original, size) {
        true => {
            let columns = pass.columns(pixels, original, size.height);
            pass.rows(columns, Size::new(original.width, size.height), size.width)
        }
        false => {
            let rows = pass.rows(pixels, original, size.width);
            pass.columns(rows, Size::new(size.width, original.height), size.height)
        }
    }
}

fn columns_go_first(original: Size, size: Size) -> bool {
    let lost = |before: u32, after: u32| i64::from(before) - i64::from(after);
    let (rows, columns) = (lost(original.width, size.width), lost(original.height, size.height));
    columns > 0 && columns > 2 * rows
}

struct Pass {
    channels: usize,
    filter: Filter,
}

impl Pass {
    /// Gives every row another length.
    fn rows(&self, pixels: Vec<u8>, original: Size, width: u32) -> Vec<u8> {
        if width == original.width {
            return pixels;
        }
        let row = original.width as usize * self.channels;
        let band = |rows: &[u8]| {
            let height = (rows.len() / row) as u32;
            self.convolved(rows, Size::new(original.width, height), Size::new(width, height))
        };
        pixels.chunks(row * BAND as usize).flat_map(band).collect()
    }

    /// Gives every column another length.
    fn columns(&self, pixels: Vec<u8>, original: Size, height: u32) -> Vec<u8> {
        if height == original.height {
            return pixels;
        }
        let row = original.width as usize * self.channels;
        let mut resized = vec![0; row * height as usize];
        for left in (0..original.width).step_by(BAND as usize) {
            let width = BAND.min(original.width - left);
            let start = left as usize * self.channels;
            let columns = start..start + width as usize * self.channels;
            let band: Vec<u8> =
                pixels.chunks_exact(row).flat_map(|row| &row[columns.clone()]).copied().collect();
            let from = Size::new(width, original.height);
            let band = self.convolved(&band, from, Size::new(width, height));
            let places = resized.chunks_exact_mut(row).zip(band.chunks_exact(columns.len()));
            places.for_each(|(row, band)| row[columns.clone()].copy_from_slice(band));
        }
        resized
    }

    /// Resizes along one axis, and rounds.
    fn convolved(&self, pixels: &[u8], original: Size, size: Size) -> Vec<u8> {
        let kind = if self.channels == 1 { PixelType::F32 } else { PixelType::F32x3 };
        let filter = match self.filter {
            Filter::Lanczos => FilterType::Lanczos3,
            Filter::Bilinear => FilterType::Bilinear,
        };
        let floats: Vec<f32> = pixels.iter().map(|value| f32::from(*value)).collect();
        let source = ImageRef::new(original.width, original.height, cast_slice(&floats), kind)
            .expect("the pixels are those of the size");
        let mut target = Image::new(size.width, size.height, kind);
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
        let resized = Resizer::new().resize(&source, &mut target, &options);
        resized.expect("both have one kind of pixels");
        let floats = target.buffer().chunks_exact(4).map(bytemuck::pod_read_unaligned::<f32>);
        floats.map(|value| (value + 0.5).clamp(0.0, 255.0) as u8).collect()
    }
}
