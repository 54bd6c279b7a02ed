//! The way of a picture to the size of a bucket: scaled until it covers it, then cropped around its
//! centre.
//!
//! Source: NeMo AutoModel 0.5.0, `MultiTierBucketCalculator.resize_and_crop`.

use std::fmt;

use super::resize::{Filter, resize};

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
    pub(super) fn apply(self, pixels: Vec<u8>, original: Size, filter: Filter) -> Vec<u8> {
        let channels = pixels.len() / original.pixels() as usize;
        let resized = resize(pixels, original, self.resized, filter);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(original: (u32, u32), size: (u32, u32)) -> Fit {
        let sized = |(width, height)| Size::new(width, height);
        Fit::new(sized(original), sized(size)).expect("it is no thin line")
    }

    #[test]
    fn a_picture_covers_its_bucket_and_is_cropped_around_its_centre() {
        let wide = fit((1000, 500), (64, 64));
        assert_eq!(
            (wide.resized, wide.crop),
            (Size::new(128, 64), CropOffset { left: 32, top: 0 })
        );
        let odd = fit((641, 1000), (384, 640));
        assert_eq!((odd.resized, odd.crop), (Size::new(410, 640), CropOffset { left: 13, top: 0 }));
        // 49 · (64 / 49) is less than 64 in floating point, and no line may be missing.
        assert_eq!(fit((49, 49), (64, 64)).resized, Size::new(64, 64));
    }

    #[test]
    fn a_line_of_pixels_is_no_picture() {
        let what = Fit::new(Size::new(1, 1 << 26), Size::new(64, 64)).expect_err("it is a line");
        assert!(what.starts_with("has 1x67108864 pixels, and would have 64x"), "{what}");
    }

    #[test]
    fn the_crop_takes_the_middle() {
        let original = Size::new(5, 4);
        let pixels: Vec<u8> = (0..20).collect();
        let crop = CropOffset { left: 1, top: 1 };
        let fit = Fit { resized: original, crop, size: Size::new(3, 2) };
        assert_eq!(fit.apply(pixels.clone(), original, Filter::Lanczos), [6, 7, 8, 11, 12, 13]);
        let rgb: Vec<u8> = pixels.iter().flat_map(|grey| [*grey; 3]).collect();
        let cropped = fit.apply(rgb, original, Filter::Lanczos);
        assert_eq!(cropped[..6], [6, 6, 6, 7, 7, 7]);
        assert_eq!(cropped.len(), 18);
    }
}
