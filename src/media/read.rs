//! Files of pictures: limits, formats, colours.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Cursor, Read, Seek};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Rgb, RgbImage};

use super::fit::Size;
use super::{jpeg, webp};
use crate::error::{Error, Result};
use crate::files::safetensors::open_error;

/// Endings of the names of pictures.
const PICTURES: [&str; 4] = ["png", "jpg", "jpeg", "webp"];
/// Formats that are read, whatever the name says.
const FORMATS: [ImageFormat; 3] = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP];

/// Bytes in which the header of a JPEG file ends: of most, and of nearly all with a thumbnail.
const JPEG_HEADS: [u64; 2] = [8 << 10, 128 << 10];
/// Memory that metadata may take once they are unpacked; a row of pixels has to fit, too.
const METADATA_BYTES: u64 = 16 << 20;

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
    let (size, orientation) = match format {
        ImageFormat::Jpeg => jpeg_header(path, &mut file, limits)?,
        _ => still_header(path, file, format, limits)?.1,
    };
    Ok(if is_quarter(orientation) { Size::new(size.height, size.width) } else { size })
}

/// Reads a picture's colours.
pub(super) fn colours(path: &Path, limits: &Limits) -> Result<RgbImage> {
    let (mut file, format) = open(path, limits)?;
    let (image, orientation) = if format == ImageFormat::Jpeg {
        let (size, orientation) = jpeg_header(path, &mut file, limits)?;
        let bytes = head(path, &mut file, limits.bytes)?;
        let pixels = jpeg::decoded(&bytes, size)
            .map_err(|what| Error::data(path, format!("is no sound JPEG file: {what}")))?;
        (rgb(size, pixels), orientation)
    } else {
        let (decoder, (_, orientation)) = still_header(path, file, format, limits)?;
        let image = DynamicImage::from_decoder(decoder).map_err(refusal(path, format))?;
        (eight_bits(image), orientation)
    };
    let mut image = DynamicImage::ImageRgb8(image);
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

fn rgb(size: Size, pixels: Vec<u8>) -> RgbImage {
    RgbImage::from_raw(size.width, size.height, pixels).expect("three bytes for each pixel")
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

/// Opens a decoder, which reads the header.
fn decoder<'i>(
    path: &Path,
    input: impl BufRead + Seek + 'i,
    format: ImageFormat,
) -> Result<impl ImageDecoder + 'i> {
    let mut reader = ImageReader::with_format(input, format);
    let mut memory = image::Limits::no_limits();
    memory.max_alloc = Some(METADATA_BYTES);
    reader.limits(memory);
    reader.into_decoder().map_err(refusal(path, format))
}

/// Reads the header of a PNG or WebP file.
fn still_header(
    path: &Path,
    mut file: BufReader<File>,
    format: ImageFormat,
    limits: &Limits,
) -> Result<(impl ImageDecoder, (Size, Orientation))> {
    let unsound = |what: String| Error::data(path, format!("is no sound {format:?} file: {what}"));
    let mut largest = Size::new(0, 0);
    if format == ImageFormat::WebP {
        let bytes = file.get_ref().metadata().map_err(Error::storage(path, "inspect"))?.len();
        largest = webp::largest_frame(&mut file, bytes).map_err(unsound)?;
        limits.check(path, largest)?;
        file.rewind().map_err(Error::storage(path, "read"))?;
    }
    let mut decoder = decoder(path, file, format)?;
    let (size, orientation) = header(path, &mut decoder, limits)?;
    if largest.width > size.width || largest.height > size.height {
        return Err(unsound("its headers disagree on its size".into()));
    }
    Ok((decoder, (size, orientation)))
}

/// Reads the header of a JPEG file. Its decoder takes its input whole, and so gets a head of it,
/// and a longer one where that is too short.
fn jpeg_header(
    path: &Path,
    file: &mut BufReader<File>,
    limits: &Limits,
) -> Result<(Size, Orientation)> {
    for bytes in JPEG_HEADS {
        let head = head(path, file, bytes.min(limits.bytes))?;
        let is_whole = (head.len() as u64) < bytes;
        let decoder = decoder(path, Cursor::new(head), ImageFormat::Jpeg);
        if is_whole || decoder.is_ok() {
            return header(path, &mut decoder?, limits);
        }
    }
    let whole = head(path, file, limits.bytes)?;
    header(path, &mut decoder(path, Cursor::new(whole), ImageFormat::Jpeg)?, limits)
}

/// Reads a file from its beginning, up to so many bytes.
fn head(path: &Path, file: &mut BufReader<File>, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = file.rewind().and_then(|()| file.take(most).read_to_end(&mut bytes));
    read.map_err(Error::storage(path, "read"))?;
    Ok(bytes)
}

/// Returns the size before turning, and how to turn. Damaged metadata turn nothing.
fn header(
    path: &Path,
    decoder: &mut impl ImageDecoder,
    limits: &Limits,
) -> Result<(Size, Orientation)> {
    let (width, height) = decoder.dimensions();
    limits.check(path, Size::new(width, height))?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    Ok((Size::new(width, height), orientation))
}

/// Returns true if width and height change places.
fn is_quarter(orientation: Orientation) -> bool {
    matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    )
}

/// Drops alpha, and the lower half of 16 bits.
fn eight_bits(image: DynamicImage) -> RgbImage {
    let upper = |value: u16| (value >> 8) as u8;
    let grey = |value: u16| [upper(value); 3];
    let size = Size::new(image.width(), image.height());
    let pixels: Vec<u8> = match &image {
        DynamicImage::ImageLuma16(image) => image.pixels().flat_map(|p| grey(p[0])).collect(),
        DynamicImage::ImageLumaA16(image) => image.pixels().flat_map(|p| grey(p[0])).collect(),
        DynamicImage::ImageRgb16(image) => image.iter().copied().map(upper).collect(),
        DynamicImage::ImageRgba16(image) => {
            image.pixels().flat_map(|p| [p[0], p[1], p[2]].map(upper)).collect()
        }
        _ => return image.into_rgb8(),
    };
    rgb(size, pixels)
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

#[cfg(test)]
mod tests {
    use super::*;
    use image::codecs::jpeg::JpegEncoder;
    use std::io::Write;
    use tempfile::TempDir;

    /// A picture whose pixels all differ, in the format of the name.
    fn written(folder: &TempDir, name: &str, size: (u32, u32)) -> std::path::PathBuf {
        let path = folder.path().join(name);
        let colour = |x: u32, y: u32| Rgb([(x * 7) as u8, (y * 5) as u8, (x + y) as u8]);
        RgbImage::from_fn(size.0, size.1, colour).save(&path).expect("it can be written");
        path
    }

    fn refused(path: &Path, limits: Limits) -> String {
        let text = colours(path, &limits).expect_err("it is refused").to_string();
        text.strip_prefix(&format!("{}: ", path.display())).expect("it names the file").into()
    }

    #[test]
    fn a_file_that_ends_early_is_refused_in_every_format() {
        let folder = TempDir::new().expect("a folder");
        for name in ["a.png", "a.jpg", "a.webp"] {
            let path = written(&folder, name, (64, 48));
            let limits = Limits::default();
            assert_eq!(picture_size(&path, &limits).expect("it is sound"), Size::new(64, 48));
            colours(&path, &limits).expect("it is sound");
            let bytes = fs::read(&path).expect("it was written");
            fs::write(&path, &bytes[..bytes.len() - 40]).expect("it can be written");
            let what = refused(&path, limits);
            assert!(what.starts_with("is no sound "), "{name}: {what}");
        }
    }

    #[test]
    fn pixels_and_bytes_beyond_the_limits_are_refused_by_the_header() {
        let folder = TempDir::new().expect("a folder");
        let limits = Limits { pixels: 3071, bytes: 1 << 20 };
        for name in ["a.png", "a.jpg", "a.webp"] {
            let path = written(&folder, name, (64, 48));
            assert_eq!(refused(&path, limits), "has 64x48 pixels; at most 3071 are read");
            picture_size(&path, &limits).expect_err("it is refused");
        }
        let path = written(&folder, "a.png", (64, 48));
        let bytes = fs::metadata(&path).expect("it was written").len();
        let what = refused(&path, Limits { bytes: bytes - 1, ..Limits::default() });
        assert_eq!(what, format!("has {bytes} bytes; at most {} are read", bytes - 1));
    }

    #[test]
    fn the_bytes_tell_the_format_and_not_the_name() {
        let folder = TempDir::new().expect("a folder");
        let path = written(&folder, "a.png", (8, 6));
        let other = folder.path().join("b.jpg");
        fs::rename(path, &other).expect("it can be renamed");
        assert_eq!(colours(&other, &Limits::default()).expect("it is a PNG").dimensions(), (8, 6));
        fs::write(&other, "GIF89a").expect("it can be written");
        assert_eq!(refused(&other, Limits::default()), "is no PNG, JPEG or WebP file");
        assert_eq!(refused(folder.path(), Limits::default()), "is not a regular file");
    }

    #[test]
    fn a_header_behind_long_metadata_is_found() {
        let folder = TempDir::new().expect("a folder");
        let (path, mut bytes) = (folder.path().join("a.jpg"), Vec::new());
        let picture = RgbImage::from_pixel(10, 6, Rgb([9, 9, 9]));
        JpegEncoder::new(&mut bytes).encode_image(&picture).expect("it can be written");
        // Comments behind the first marker.
        let comment = [&[0xff, 0xfe, 0xff, 0xff][..], &[0; 0xfffd]].concat();
        let mut file = File::create(&path).expect("it can be written");
        let parts = [&bytes[..2], &comment, &comment, &comment, &bytes[2..]];
        parts.iter().for_each(|part| file.write_all(part).expect("it can be written"));
        let size = picture_size(&path, &Limits::default()).expect("it is sound");
        assert_eq!(size, Size::new(10, 6));
        colours(&path, &Limits::default()).expect("it is sound");
    }
}
