//! The format of the data on a connection: frames, each a header of fixed size that the bytes of
//! one piece may follow.

/// Bytes of a header. Most of them name the operation, for a peer that is at another one.
pub const HEADER_BYTES: usize = 128;

/// Offset of the name, after mark, kind, length and tag.
const NAME_OFFSET: usize = 24;

/// Every header starts with it, unless the stream has lost its frame boundaries.
const MARK: [u8; 4] = *b"fmd\x01";

const PIECE: u32 = 0;
const GOODBYE: u32 = 1;
const FAILED: u32 = 2;

/// The header of a frame.
#[derive(Debug, PartialEq)]
pub enum Frame {
    /// A header that `length` bytes of the operation with this tag and name follow.
    Piece { length: u64, tag: u64, name: String },
    /// The rank leaves in good order and sends nothing else.
    Goodbye,
    /// The rank ends the world with this exit code.
    Failed { code: i32 },
}

impl Frame {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        match self {
            Frame::Piece { length, tag, name } => piece(*length, *tag, name),
            Frame::Goodbye => header(GOODBYE, 0, 0, ""),
            Frame::Failed { code } => header(FAILED, u64::from(code.cast_unsigned()), 0, ""),
        }
    }

    /// Returns `None` if the bytes are not a header.
    pub fn decode(header: &[u8; HEADER_BYTES]) -> Option<Self> {
        let number = |offset: usize| {
            u64::from_le_bytes(header[offset..offset + 8].try_into().expect("eight bytes"))
        };
        let kind = u32::from_le_bytes(header[4..8].try_into().expect("four bytes"));
        let (length, tag) = (number(8), number(16));
        match kind {
            _ if header[..4] != MARK => None,
            PIECE => {
                let name =
                    String::from_utf8_lossy(&header[NAME_OFFSET..]).trim_end_matches('\0').into();
                Some(Frame::Piece { length, tag, name })
            }
            GOODBYE => Some(Frame::Goodbye),
            FAILED => Some(Frame::Failed { code: i32::try_from(length).ok()? }),
            _ => None,
        }
    }
}

/// Encodes the header of a piece.
pub fn piece(length: u64, tag: u64, name: &str) -> [u8; HEADER_BYTES] {
    header(PIECE, length, tag, name)
}

fn header(kind: u32, length: u64, tag: u64, name: &str) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MARK);
    header[4..8].copy_from_slice(&kind.to_le_bytes());
    header[8..16].copy_from_slice(&length.to_le_bytes());
    header[16..24].copy_from_slice(&tag.to_le_bytes());
    let name = &name.as_bytes()[..name.len().min(HEADER_BYTES - NAME_OFFSET)];
    header[NAME_OFFSET..NAME_OFFSET + name.len()].copy_from_slice(name);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_survives_its_journey() {
        let piece = Frame::Piece {
            length: 1 << 40,
            tag: u64::MAX,
            name: "all_reduce#8 (Sum of 4096 Float)".into(),
        };
        for frame in [piece, Frame::Goodbye, Frame::Failed { code: 41 }] {
            assert_eq!(Frame::decode(&frame.encode()), Some(frame));
        }
    }

    #[test]
    fn a_long_name_loses_its_end() {
        let name = "x".repeat(300);
        let header = Frame::Piece { length: 0, tag: 0, name }.encode();
        assert_eq!(
            Frame::decode(&header),
            Some(Frame::Piece { length: 0, tag: 0, name: "x".repeat(HEADER_BYTES - NAME_OFFSET) })
        );
    }

    #[test]
    fn what_is_no_header_is_recognized() {
        assert_eq!(Frame::decode(&[b'G'; HEADER_BYTES]), None);
        let mut header = Frame::Goodbye.encode();
        header[4] = 9;
        assert_eq!(Frame::decode(&header), None);
        let mut header = Frame::Failed { code: 1 }.encode();
        header[15] = 0xff;
        assert_eq!(Frame::decode(&header), None, "a code beyond an i32");
    }
}
