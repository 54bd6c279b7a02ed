//! The chunks of a WebP file, followed before its decoder does: that takes as much memory as a
//! chunk or a frame says that it has.

use std::io::{Read, Seek, SeekFrom};

use super::fit::Size;

/// Name and length of a chunk, and the bytes behind them that tell the size of a frame.
const HEAD_BYTES: usize = 18;
/// Bytes of a file before its chunks, and of a frame of an animation before its own.
const FILE_HEAD: u64 = 12;
const FRAME_HEAD: u64 = 16;

/// Returns the largest width and height that a frame says it has.
///
/// # Errors
/// A text if a chunk is longer than what it lies in, or the file cannot be read.
pub(super) fn largest_frame(file: &mut (impl Read + Seek), bytes: u64) -> Result<Size, String> {
    let head = head_at(file, 0)?;
    let end = 8 + u64::from(number(&head[4..8]));
    if end > bytes {
        return Err("it ends early".into());
    }
    let mut largest = Size::new(0, 0);
    follow(file, FILE_HEAD..end, true, &mut largest)?;
    Ok(largest)
}

fn follow(
    file: &mut (impl Read + Seek),
    places: std::ops::Range<u64>,
    is_outermost: bool,
    largest: &mut Size,
) -> Result<(), String> {
    let mut place = places.start;
    while place + 8 <= places.end {
        let head = head_at(file, place)?;
        let (start, length) = (place + 8, u64::from(number(&head[4..8])));
        if start + length > places.end {
            return Err("a part of it is longer than the whole".into());
        }
        let size = match &head[..4] {
            b"ANMF" if is_outermost => {
                follow(file, start + FRAME_HEAD..start + length, false, largest)?;
                None
            }
            b"VP8 " => Some([number(&head[14..16]) & 0x3fff, number(&head[16..18]) & 0x3fff]),
            b"VP8L" => {
                let bits = number(&head[9..13]);
                Some([bits & 0x3fff, (bits >> 14) & 0x3fff].map(|side| side + 1))
            }
            _ => None,
        };
        if let Some([width, height]) = size {
            *largest = Size::new(largest.width.max(width), largest.height.max(height));
        }
        place = start + length + length % 2;
    }
    Ok(())
}

/// Returns the bytes from a place on, zeros behind the end of the file.
fn head_at(file: &mut (impl Read + Seek), place: u64) -> Result<[u8; HEAD_BYTES], String> {
    let mut read = Vec::new();
    file.seek(SeekFrom::Start(place))
        .and_then(|_| file.take(HEAD_BYTES as u64).read_to_end(&mut read))
        .map_err(|error| error.to_string())?;
    let mut head = [0; HEAD_BYTES];
    head[..read.len()].copy_from_slice(&read);
    Ok(head)
}

/// Returns the number whose bytes these are, the lowest first.
fn number(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn chunk(name: &str, data: &[u8]) -> Vec<u8> {
        let mut chunk = [name.as_bytes(), &(data.len() as u32).to_le_bytes(), data].concat();
        chunk.resize(chunk.len().next_multiple_of(2), 0);
        chunk
    }

    fn file(chunks: &[Vec<u8>]) -> Vec<u8> {
        chunk("RIFF", &[b"WEBP".to_vec(), chunks.concat()].concat())
    }

    fn largest(file: &[u8]) -> Result<Size, String> {
        largest_frame(&mut Cursor::new(file), file.len() as u64)
    }

    #[test]
    fn frames_tell_their_sizes_wherever_they_lie() {
        let lossy = chunk("VP8 ", &[0, 0, 0, 0x9d, 1, 0x2a, 20, 0, 30, 0x40, 7]);
        let lossless = chunk("VP8L", &[0x2f, 0x28, 0, 0, 0]);
        let frame = chunk("ANMF", &[vec![0; 16], chunk("ALPH", &[1]), lossy.clone()].concat());
        let whole = file(&[chunk("VP8X", &[0; 10]), lossless, frame]);
        assert_eq!(largest(&whole), Ok(Size::new(41, 30)));
        assert_eq!(largest(&whole[..whole.len() - 2]), Err("it ends early".into()));
        let mut longer = file(&[lossy]);
        longer[16] += 2;
        assert_eq!(largest(&longer), Err("a part of it is longer than the whole".into()));
    }
}
