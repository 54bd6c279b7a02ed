//! What travels over a connection: frames, each a header of fixed size and perhaps the bytes of one
//! piece.

/// Bytes of a header, of which most name the operation for a peer that is at another one.
pub const HEADER_BYTES: usize = 128;

/// In front of the name: mark, kind, length, tag.
const NAME_BEGINS: usize = 24;

/// Where a stream has not lost its place, every header begins with it.
const MARK: [u8; 4] = *b"fmd\x01";

const PIECE: u32 = 0;
const GOODBYE: u32 = 1;
const FAILED: u32 = 2;

#[derive(Debug, PartialEq)]
pub enum Frame {
    /// `length` bytes follow, of the operation with this tag and name.
    Piece { length: u64, tag: u64, name: String },
    /// Nothing else comes: the rank leaves in good order.
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

    /// `None` for what is no header.
    pub fn decode(header: &[u8; HEADER_BYTES]) -> Option<Self> {
        let number = |first: usize| {
            u64::from_le_bytes(header[first..first + 8].try_into().expect("eight bytes"))
        };
        let kind = u32::from_le_bytes(header[4..8].try_into().expect("four bytes"));
        let (length, tag) = (number(8), number(16));
        match kind {
            _ if header[..4] != MARK => None,
            PIECE => {
                let name =
                    String::from_utf8_lossy(&header[NAME_BEGINS..]).trim_end_matches('\0').into();
                Some(Frame::Piece { length, tag, name })
            }
            GOODBYE => Some(Frame::Goodbye),
            FAILED => Some(Frame::Failed { code: i32::try_from(length).ok()? }),
            _ => None,
        }
    }
}

/// The header of a piece.
pub fn piece(length: u64, tag: u64, name: &str) -> [u8; HEADER_BYTES] {
    header(PIECE, length, tag, name)
}

fn header(kind: u32, length: u64, tag: u64, name: &str) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MARK);
    header[4..8].copy_from_slice(&kind.to_le_bytes());
    header[8..16].copy_from_slice(&length.to_le_bytes());
    header[16..24].copy_from_slice(&tag.to_le_bytes());
    let name = &name.as_bytes()[..name.len().min(HEADER_BYTES - NAME_BEGINS)];
    header[NAME_BEGINS..NAME_BEGINS + name.len()].copy_from_slice(name);
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
            Some(Frame::Piece { length: 0, tag: 0, name: "x".repeat(HEADER_BYTES - NAME_BEGINS) })
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
