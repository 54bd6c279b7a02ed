//! Colours of JPEG files by libjpeg, whose arithmetic Pillow's are made with: pure Rust decoders
//! interpolate halved colours in other ways, and are up to 22 of 255 off at the edges of pictures.

use std::ops::RangeInclusive;
use std::panic::catch_unwind;

use mozjpeg::{ColorSpace, Decompress};

use super::fit::Size;

/// Second bytes of markers.
const START_OF_IMAGE: u8 = 0xd8;
const END_OF_IMAGE: u8 = 0xd9;
const START_OF_SCAN: u8 = 0xda;
const TEMPORARY: u8 = 0x01;
const RESTARTS: RangeInclusive<u8> = 0xd0..=0xd7;
/// Most scans of a picture; encoders make about ten.
const MOST_SCANS: usize = 100;

/// Decodes a file of `size` to rows of red, green and blue.
///
/// # Errors
/// A text on the damage.
pub(super) fn decoded(bytes: &[u8], size: Size) -> Result<Vec<u8>, String> {
    check_markers(bytes)?;
    // The bindings tell libjpeg's errors by unwinding, without a panic's message.
    let outcome = catch_unwind(|| scanlines(bytes, size));
    outcome.unwrap_or_else(|told| {
        Err(told.downcast::<String>().map_or("libjpeg gives up".into(), |text| *text))
    })
}

fn scanlines(bytes: &[u8], size: Size) -> Result<Vec<u8>, String> {
    let told = |error: std::io::Error| error.to_string();
    let file = Decompress::new_mem(bytes).map_err(told)?;
    if (file.width(), file.height()) != (size.width as usize, size.height as usize) {
        return Err("its headers disagree on its size".into());
    }
    let inks = matches!(file.color_space(), ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK);
    let mut started = match inks {
        true => file.to_colorspace(ColorSpace::JCS_CMYK),
        false => file.rgb(),
    }
    .map_err(told)?;
    let rows = started.read_scanlines::<u8>().map_err(told)?;
    started.finish().map_err(told)?;
    Ok(if inks { rows.chunks_exact(4).flat_map(from_inks).collect() } else { rows })
}

/// Returns the colours of inverted cyan, magenta, yellow and black, as Pillow mixes them.
fn from_inks(inks: &[u8]) -> [u8; 3] {
    let light = u32::from(inks[3]);
    [inks[0], inks[1], inks[2]].map(|ink| {
        let product = (255 - u32::from(ink)) * light + 128;
        (light - (((product >> 8) + product) >> 8)) as u8
    })
}

/// Follows the markers to the end of the picture: libjpeg would paint what is missing grey, and go
/// through all pixels for every scan.
fn check_markers(bytes: &[u8]) -> Result<(), String> {
    let (mut rest, mut scans) = (bytes, 0);
    while let Some(place) = rest.iter().position(|byte| *byte == 0xff) {
        rest = &rest[place + 1..];
        match rest.first().copied() {
            Some(END_OF_IMAGE) => return Ok(()),
            Some(START_OF_SCAN) => scans += 1,
            // Data that look like a marker, fill bytes, and markers without a segment.
            Some(0 | 0xff | START_OF_IMAGE | TEMPORARY) | None => continue,
            Some(marker) if RESTARTS.contains(&marker) => continue,
            Some(_) => {}
        }
        if scans > MOST_SCANS {
            return Err(format!("it has more than {MOST_SCANS} scans"));
        }
        let length = rest.get(1..3).map(|length| u16::from_be_bytes([length[0], length[1]]));
        rest = length.and_then(|length| rest.get(1 + usize::from(length)..)).unwrap_or_default();
    }
    Err("it ends early".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_counts_where_markers_lead_and_not_within_data_or_thumbnails() {
        let thumbnail = [&[0xff, 0xe1, 0, 6, 0xff, 0xd8, 0xff, 0xd9][..]].concat();
        let scan = [0xff, 0xda, 0, 3, 1, 7, 0xff, 0, 0xff, 0xd3, 9];
        let whole = [&[0xff, 0xd8], &thumbnail[..], &scan, &[0xff, 0xff, 0xd9, 5]].concat();
        assert_eq!(check_markers(&whole), Ok(()));
        for length in 0..whole.len() - 1 {
            assert_eq!(check_markers(&whole[..length]), Err("it ends early".into()), "{length}");
        }
    }

    #[test]
    fn a_picture_of_endless_scans_is_refused() {
        let scans = |count| [&[0xff, 0xd8][..], &[0xff, 0xda, 0, 2, 7].repeat(count)].concat();
        let ended = |count| [scans(count), vec![0xff, 0xd9]].concat();
        assert_eq!(check_markers(&ended(MOST_SCANS)), Ok(()));
        let what = check_markers(&ended(MOST_SCANS + 1)).expect_err("they are too many");
        assert_eq!(what, "it has more than 100 scans");
    }

    #[test]
    fn inks_mix_to_colours() {
        // Inverted: 255 is no ink.
        assert_eq!(from_inks(&[255, 255, 255, 255]), [255, 255, 255]);
        assert_eq!(from_inks(&[255, 0, 128, 255]), [255, 0, 128]);
        assert_eq!(from_inks(&[255, 0, 128, 0]), [0, 0, 0]);
    }
}
