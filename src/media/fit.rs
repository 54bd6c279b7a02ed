//! The way of a picture to the size of a bucket: scaled until it covers it, then cropped around its
//! centre.
//!
//! Source: NeMo AutoModel 0.5.0, `MultiTierBucketCalculator.resize_and_crop`.

use std::fmt;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

/// Most pixels of a picture between resizing and cropping.
const MOST_RESIZED_PIXELS: u64 = 64 << 20;

/// Width and height in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size {
    pub width: u32,
    pub height: u32,
}

impl Size {
    pub fn new(width: u32, height: u32) -> Self {
        Size { width, height }
    }

    pub fn pixels(self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }

    /// Returns width by height.
    pub fn ratio(self) -> f64 {
        f64::from(self.width) / f64::from(self.height)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// Columns and rows of the resized picture that are cut off at its left and at its top.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CropOffset {
    pub left: u32,
    pub top: u32,
}

/// Sizes on the way of one picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Size before the crop.
    pub resized: Size,
    pub crop: CropOffset,
    /// Size at the end.
    pub size: Size,
}

/// Weights of the pixels around a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// Pillow's LANCZOS, which the reference resizes pictures with.
    Lanczos,
    /// Pillow's BILINEAR: it does not ring, so that no mask gets ripples beside its edges.
    Bilinear,
}

impl Fit {
    /// Returns the way from `original` to `size`.
    ///
    /// The scale is the larger one of both sides', and the sides are cut to whole numbers. Where
    /// rounding makes a side one pixel too short, the reference's crop adds a black line; here the
    /// side keeps the length that it needs.
    /// # Errors
    /// A text if the picture is so narrow that it would get too many pixels before the crop.
    pub fn new(original: Size, size: Size) -> Result<Self, String> {
        let [width, height] = [original.width, original.height].map(f64::from);
        let scale = (f64::from(size.width) / width).max(f64::from(size.height) / height);
        let resized = Size {
            width: ((width * scale) as u32).max(size.width),
            height: ((height * scale) as u32).max(size.height),
        };
        if resized.pixels() > MOST_RESIZED_PIXELS {
            return Err(format!(
                "has {original} pixels, and would have {resized} to cover a bucket of {size}"
            ));
        }
        let crop = CropOffset {
            left: (resized.width - size.width) / 2,
            top: (resized.height - size.height) / 2,
        };
        Ok(Fit { resized, crop, size })
    }

    /// Resizes and crops `pixels` of `original` size with 1 or 3 bytes each.
    pub(super) fn apply(self, pixels: &[u8], original: Size, filter: Filter) -> Vec<u8> {
        let channels = pixels.len() / original.pixels() as usize;
        let resized = match self.resized == original {
            true => pixels.to_vec(),
            false => resize(pixels, original, self.resized, filter),
        };
        if self.resized == self.size {
            return resized;
        }
        let row = self.resized.width as usize * channels;
        let columns = self.crop.left as usize * channels..;
        let columns = columns.start..columns.start + self.size.width as usize * channels;
        let rows = resized.chunks_exact(row).skip(self.crop.top as usize);
        rows.take(self.size.height as usize)
            .flat_map(|row| &row[columns.clone()])
            .copied()
            .collect()
    }
}

/// Resizes by a convolution whose window grows where the picture shrinks, as Pillow's does.
fn resize(pixels: &[u8], original: Size, size: Size, filter: Filter) -> Vec<u8> {
    let kind = match pixels.len() as u64 == original.pixels() {
        true => PixelType::U8,
        false => PixelType::U8x3,
    };
    let filter = match filter {
        Filter::Lanczos => FilterType::Lanczos3,
        Filter::Bilinear => FilterType::Bilinear,
    };
    let source = ImageRef::new(original.width, original.height, pixels, kind)
        .expect("the pixels are those of the size");
    let mut target = Image::new(size.width, size.height, kind);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    Resizer::new().resize(&source, &mut target, &options).expect("both have one kind of pixels");
    target.into_vec()
}
