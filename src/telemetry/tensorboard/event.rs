//! Events of TensorBoard as bytes: records around protocol buffers, of which a few fields are
//! needed.
//!
//! Source: TensorFlow's `core/util/event.proto`, `core/framework/summary.proto`,
//! `core/framework/tensor.proto` and `core/lib/io/record_writer.h`.

/// One value under a tag.
#[derive(Clone, Debug)]
pub enum EventValue<'v> {
    Scalar(f32),
    /// Markdown.
    Text(String),
    /// A picture: the bytes of a PNG file.
    Png(&'v [u8]),
}

/// Contents of an event.
#[derive(Clone, Debug)]
pub enum Content<'v> {
    /// The first event of a file.
    Begin,
    /// Earlier events of this step and later ones are void: the run goes on before them.
    Restart,
    Values(&'v [(String, EventValue<'v>)]),
}

const VERSION: &str = "brain.Event:2";
/// `SessionLog.START`.
const START: u64 = 1;
/// `DT_STRING`.
const STRING: u64 = 7;
/// `colorspace` of red, green and blue.
const COLOURS: u64 = 3;

/// Returns an event as a record. `seconds`: since 1970.
pub fn record(seconds: f64, step: u64, content: &Content<'_>) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, seconds);
    event.integer(2, step);
    match content {
        Content::Begin => event.bytes(3, VERSION.as_bytes()),
        Content::Restart => {
            let mut log = Message::default();
            log.integer(1, START);
            event.message(7, log);
        }
        Content::Values(values) => {
            let mut summary = Message::default();
            values.iter().for_each(|(tag, value)| summary.message(1, value.summary(tag)));
            event.message(5, summary);
        }
    }
    framed(&event.bytes)
}

/// Frames bytes with their length and two checksums.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let (first, last) = (masked_crc(&length), masked_crc(data));
    [&length[..], &first.to_le_bytes(), data, &last.to_le_bytes()].concat()
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

impl EventValue<'_> {
    fn summary(&self, tag: &str) -> Message {
        let mut value = Message::default();
        value.bytes(1, tag.as_bytes());
        match self {
            EventValue::Scalar(number) => value.float(2, *number),
            EventValue::Png(bytes) => {
                let [width, height] = size_of_png(bytes);
                let mut image = Message::default();
                image.integer(1, height);
                image.integer(2, width);
                image.integer(3, COLOURS);
                image.bytes(4, bytes);
                value.message(4, image);
            }
            EventValue::Text(text) => {
                let (mut tensor, mut shape, mut axis) =
                    (Message::default(), Message::default(), Message::default());
                axis.integer(1, 1);
                shape.message(2, axis);
                tensor.integer(1, STRING);
                tensor.message(2, shape);
                tensor.bytes(8, text.as_bytes());
                value.message(8, tensor);
                let (mut metadata, mut plugin) = (Message::default(), Message::default());
                plugin.bytes(1, b"text");
                metadata.message(1, plugin);
                value.message(9, metadata);
            }
        }
        value
    }
}

/// Returns width and height from the header of a PNG file; 0 if it is cut.
fn size_of_png(bytes: &[u8]) -> [u64; 2] {
    [16, 20].map(|place| {
        let field = bytes.get(place..place + 4).and_then(|field| field.try_into().ok());
        u64::from(field.map_or(0, u32::from_be_bytes))
    })
}

/// A protocol buffer under construction.
#[derive(Default)]
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn integer(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.varint(field << 3 | 1);
        self.bytes.extend(value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.varint(field << 3 | 5);
        self.bytes.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.bytes.extend(value);
    }

    fn message(&mut self, field: u64, value: Message) {
        self.bytes(field, &value.bytes);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scalar_has_the_bytes_that_tensorboard_writes() {
        let values = [("train/loss".to_string(), EventValue::Scalar(1.5))];
        let found = record(2.0, 300, &Content::Values(&values));
        // By `tensorboard.compat.proto` and `RecordWriter` of tensorboard 2.21.0.
        let event =
            b"\x09\0\0\0\0\0\0\0\x40\x10\xac\x02\x2a\x13\x0a\x11\x0a\x0atrain/loss\x15\0\0\xc0\x3f";
        assert_eq!(found[..8], (event.len() as u64).to_le_bytes());
        assert_eq!(&found[12..12 + event.len()], event);
        assert_eq!(found.len(), event.len() + 16);
    }

    #[test]
    fn checksums_are_those_of_the_record_format() {
        // CRC-32C of nine digits is 0xe3069283 (RFC 3720, appendix B.4, has the algorithm).
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
    }
}
