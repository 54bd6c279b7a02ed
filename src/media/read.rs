//! Files of pictures: limits, formats, colours.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Cursor, Read, Seek};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Rgb, RgbImage};

use super::fit::Size;
use crate::error::{Error, Result};
use crate::files::safetensors::open_error;

/// Endings of the names of pictures.
pub const PICTURES: [&str; 4] = ["png", "jpg", "jpeg", "webp"];
/// Formats that are read, whatever the name says.
const FORMATS: [ImageFormat; 3] = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP];

/// Bytes in which nearly every header of a JPEG file ends.
const JPEG_HEAD_BYTES: u64 = 128 << 10;
/// Memory that a decoder may take for each pixel.
const BYTES_A_PIXEL: u64 = 8;

/// Bounds of one picture. A file beyond them is refused by its header, before memory is taken for
/// its pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most pixels of a picture or of a frame.
    pub pixels: u64,
    /// Most bytes of a file of a picture.
    pub bytes: u64,
}

impl Default for Limits {
    /// 64 Mi pixels, which is 8192 by 8192, and 256 MiB.
    fn default() -> Self {
        Limits { pixels: 64 << 20, bytes: 256 << 20 }
    }
}

impl Limits {
    pub(super) fn check(&self, path: &Path, size: Size) -> Result<()> {
        match size.pixels() {
            0 => Err(Error::data(path, "has no pixels")),
            pixels if pixels > self.pixels => {
                let what = format!("has {size} pixels; at most {} are read", self.pixels);
                Err(Error::data(path, what))
            }
            _ => Ok(()),
        }
    }
}

/// Returns true if a file's name ends as that of a picture, in whatever case.
pub fn is_picture(path: &Path) -> bool {
    has_ending(path, &PICTURES)
}

/// Returns true if the ending of a file's name is one of these, in whatever case.
pub(super) fn has_ending(path: &Path, endings: &[&str]) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str());
    ending.is_some_and(|ending| endings.iter().any(|known| ending.eq_ignore_ascii_case(known)))
}

/// Returns the size of a picture once it is turned as its EXIF data say. Reads the header only.
///
/// # Errors
/// [`Error::Data`] if the file is no picture or beyond the limits; [`Error::Storage`].
pub fn picture_size(path: &Path, limits: &Limits) -> Result<Size> {
    let (mut file, format) = open(path, limits)?;
    if format == ImageFormat::Jpeg {
        // The decoder takes its input whole.
        let mut head = Vec::new();
        let read = file.by_ref().take(JPEG_HEAD_BYTES).read_to_end(&mut head);
        read.map_err(Error::storage(path, "read"))?;
        if let Ok(mut decoder) = decoder(path, Cursor::new(head), format, limits) {
            return Ok(turned(&mut decoder).0);
        }
        file.rewind().map_err(Error::storage(path, "read"))?;
    }
    Ok(turned(&mut decoder(path, file, format, limits)?).0)
}

/// Reads a picture's colours.
pub(super) fn colours(path: &Path, limits: &Limits) -> Result<RgbImage> {
    let (file, format) = open(path, limits)?;
    let mut decoder = decoder(path, file, format, limits)?;
    let (_, orientation) = turned(&mut decoder);
    let image = DynamicImage::from_decoder(decoder).map_err(refusal(path, format))?;
    let mut image = DynamicImage::ImageRgb8(eight_bits(image));
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

/// Reads a picture as grey, a byte a pixel, by Pillow's `convert("L")`.
pub(super) fn grey(path: &Path, limits: &Limits) -> Result<(Size, Vec<u8>)> {
    let image = colours(path, limits)?;
    // Source: ITU-R BT.601, in 16 bits after the point.
    let luma = |pixel: &Rgb<u8>| {
        let [red, green, blue] = pixel.0.map(u32::from);
        ((red * 19_595 + green * 38_470 + blue * 7_471 + 0x8000) >> 16) as u8
    };
    Ok((Size::new(image.width(), image.height()), image.pixels().map(luma).collect()))
}

/// Opens a regular file of a format that is read.
fn open(path: &Path, limits: &Limits) -> Result<(BufReader<File>, ImageFormat)> {
    // Checked before opening: opening a FIFO would wait for its writer.
    let found = fs::metadata(path).map_err(|error| open_error(path, error))?;
    if !found.is_file() {
        return Err(Error::data(path, "is not a regular file"));
    }
    if found.len() > limits.bytes {
        let what = format!("has {} bytes; at most {} are read", found.len(), limits.bytes);
        return Err(Error::data(path, what));
    }
    let mut file = BufReader::new(File::open(path).map_err(|error| open_error(path, error))?);
    let mark = file.fill_buf().map_err(Error::storage(path, "read"))?;
    match image::guess_format(mark) {
        Ok(format) if FORMATS.contains(&format) => Ok((file, format)),
        _ => Err(Error::data(path, "is no PNG, JPEG or WebP file")),
    }
}

/// Reads a header, and checks what it says.
fn decoder<'i>(
    path: &Path,
    input: impl BufRead + Seek + 'i,
    format: ImageFormat,
    limits: &Limits,
) -> Result<impl ImageDecoder + 'i> {
    let mut reader = ImageReader::with_format(input, format);
    let mut memory = image::Limits::no_limits();
    memory.max_alloc = Some(limits.pixels.saturating_mul(BYTES_A_PIXEL));
    reader.limits(memory);
    let decoder = reader.into_decoder().map_err(refusal(path, format))?;
    let (width, height) = decoder.dimensions();
    limits.check(path, Size::new(width, height))?;
    Ok(decoder)
}

/// Returns the size of a picture that is turned, and how to turn it. Metadata that are damaged turn
/// nothing.
fn turned(decoder: &mut impl ImageDecoder) -> (Size, Orientation) {
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let (width, height) = decoder.dimensions();
    let is_turned = matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    );
    let size = if is_turned { Size::new(height, width) } else { Size::new(width, height) };
    (size, orientation)
}

/// Drops alpha, and the lower half of 16 bits.
fn eight_bits(image: DynamicImage) -> RgbImage {
    let upper = |value: u16| (value >> 8) as u8;
    let grey = |value: u16| [upper(value); 3];
    let (width, height) = (image.width(), image.height());
    let pixels: Vec<u8> = match &image {
        DynamicImage::ImageLuma16(image) => image.pixels().flat_map(|p| grey(p[0])).collect(),
        DynamicImage::ImageLumaA16(image) => image.pixels().flat_map(|p| grey(p[0])).collect(),
        DynamicImage::ImageRgb16(image) => image.iter().copied().map(upper).collect(),
        DynamicImage::ImageRgba16(image) => {
            image.pixels().flat_map(|p| [p[0], p[1], p[2]].map(upper)).collect()
        }
        _ => return image.into_rgb8(),
    };
    RgbImage::from_raw(width, height, pixels).expect("three bytes for each pixel")
}

/// For `map_err`: what a decoder complains about.
fn refusal(path: &Path, format: ImageFormat) -> impl FnOnce(ImageError) -> Error {
    let path = path.to_path_buf();
    move |error| match error {
        ImageError::IoError(error) if error.raw_os_error().is_some() => {
            Error::storage(path, "read")(error)
        }
        other => Error::data(path, format!("is no sound {format:?} file: {other}")),
    }
}
