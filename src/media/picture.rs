//! A picture in memory.

use std::path::Path;

use image::RgbImage;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use tch::{Kind, Tensor};

use super::fit::{Fit, Size};
use super::read::{self, Limits};
use super::resize::Filter;
use crate::error::Result;
use crate::files::durable::replace_file;
use crate::tensor;

/// A picture of 8 bits a colour: red, green and blue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    size: Size,
    /// Rows from the top, three bytes a pixel.
    pixels: Vec<u8>,
}

impl Picture {
    /// Takes rows from the top, three bytes a pixel.
    ///
    /// # Panics
    /// If there are not as many bytes as the size says.
    pub fn from_pixels(size: Size, pixels: Vec<u8>) -> Self {
        assert_eq!(pixels.len() as u64, 3 * size.pixels(), "{size} pixels have other bytes");
        Picture { size, pixels }
    }

    /// Reads a PNG, JPEG or WebP file, recognized by its first bytes; of an animation the first
    /// frame. It is turned as its EXIF data say. Colours are Pillow's after `convert("RGB")`: alpha
    /// is dropped, palettes are resolved, grey is repeated, of 16 bits the upper 8 stay. Grey of 16
    /// bits, whose values Pillow cuts at 255, is read by its upper 8 bits, too.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if the file is none of these, damaged, or beyond
    /// the limits; [`Error::Storage`](crate::error::Error::Storage) if it cannot be read.
    pub fn read(path: &Path, limits: &Limits) -> Result<Self> {
        read::colours(path, limits).map(Self::from)
    }

    pub fn size(&self) -> Size {
        self.size
    }

    /// Returns rows from the top, three bytes a pixel.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Resizes by Pillow's LANCZOS and crops.
    pub fn fitted(self, fit: Fit) -> Picture {
        let pixels = fit.apply(self.pixels, self.size, Filter::Lanczos);
        Picture { size: fit.size, pixels }
    }

    /// Returns the colours as `[3, H, W]`, uint8.
    pub fn to_tensor(&self) -> Tensor {
        let [height, width] = [self.size.height, self.size.width].map(i64::from);
        let rows = Tensor::from_slice(&self.pixels).view([height, width, 3]);
        rows.permute([2, 0, 1]).contiguous()
    }

    /// Takes colours of `[3, H, W]`, uint8.
    ///
    /// # Panics
    /// If the tensor has another shape or kind.
    pub fn from_tensor(colours: &Tensor) -> Self {
        let size = colours.size();
        assert!(
            colours.kind() == Kind::Uint8 && size.len() == 3 && size[0] == 3,
            "a picture is [3, H, W] in uint8, not {size:?} in {:?}",
            colours.kind()
        );
        let rows = colours.to_device(tch::Device::Cpu).permute([1, 2, 0]).contiguous();
        let size = Size::new(size[2] as u32, size[1] as u32);
        Picture { size, pixels: tensor::bytes(&rows).to_vec() }
    }

    /// Writes a PNG file, replacing another one whole.
    ///
    /// # Errors
    /// [`Error::Storage`](crate::error::Error::Storage).
    pub fn write_png(&self, path: &Path) -> Result<()> {
        let Size { width, height } = self.size;
        replace_file(path, |out| {
            PngEncoder::new(out)
                .write_image(&self.pixels, width, height, ExtendedColorType::Rgb8)
                .map_err(std::io::Error::other)
        })
    }

    /// Reads a picture as a mask and brings it to the size of a picture's bucket: `[H, W]`, uint8;
    /// 255 where everything counts, 0 where nothing does. It is resized to what `fit` resizes its
    /// picture to, whatever its own size is, by Pillow's BILINEAR, and cropped alike.
    ///
    /// # Errors
    /// As [`Picture::read`].
    pub fn read_mask(path: &Path, fit: Fit, limits: &Limits) -> Result<Tensor> {
        let (size, grey) = read::grey(path, limits)?;
        let pixels = fit.apply(grey, size, Filter::Bilinear);
        let [height, width] = [fit.size.height, fit.size.width].map(i64::from);
        Ok(Tensor::from_slice(&pixels).view([height, width]))
    }
}

impl From<RgbImage> for Picture {
    fn from(image: RgbImage) -> Self {
        Picture { size: Size::new(image.width(), image.height()), pixels: image.into_raw() }
    }
}

/// Stacks frames of one size to `[3, F, H, W]`, uint8.
pub fn stacked(frames: &[Picture]) -> Tensor {
    let frames: Vec<Tensor> = frames.iter().map(Picture::to_tensor).collect();
    Tensor::stack(&frames, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn picture() -> Picture {
        let pixels = (0..4 * 3 * 3).collect();
        Picture::from_pixels(Size::new(4, 3), pixels)
    }

    #[test]
    fn a_picture_goes_through_a_tensor_and_a_png_unchanged() {
        let tensor = picture().to_tensor();
        assert_eq!((tensor.size(), tensor.kind()), (vec![3, 3, 4], Kind::Uint8));
        assert_eq!(tensor.int64_value(&[1, 2, 3]), 34);
        assert_eq!(Picture::from_tensor(&tensor), picture());
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("a.png");
        picture().write_png(&path).expect("it can be written");
        assert_eq!(Picture::read(&path, &Limits::default()).expect("it is sound"), picture());
    }

    #[test]
    fn frames_are_stacked_behind_their_colours() {
        let frames = stacked(&[picture(), picture()]);
        assert_eq!(frames.size(), [3, 2, 3, 4]);
        assert_eq!(frames.select(1, 1), picture().to_tensor());
    }

    #[test]
    fn a_mask_of_another_size_is_cropped_as_its_picture() {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("mask.png");
        // The left half counts.
        let mask = |x: u32, _| image::Luma([if x < 4 { 255 } else { 0 }]);
        image::GrayImage::from_fn(8, 4, mask).save(&path).expect("it can be written");
        let fit = Fit::new(Size::new(64, 32), Size::new(16, 16)).expect("it is no line");
        let mask = Picture::read_mask(&path, fit, &Limits::default()).expect("it is sound");
        assert_eq!(mask.size(), [16, 16]);
        assert_eq!(mask.int64_value(&[8, 2]), 255);
        assert_eq!(mask.int64_value(&[8, 13]), 0);
    }
}
