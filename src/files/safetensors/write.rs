//! Writes safetensors files: equal tensors give equal bytes, and only files that the reader accepts
//! are written.

use std::collections::BTreeMap;
use std::io::{self, Write};

use tch::{Device, Kind, Tensor};

use super::header::{self, Content, METADATA, dtype_of};
use crate::tensor::bytes;

/// A tensor that a file will hold.
#[derive(Clone, Debug)]
pub struct Planned<'n> {
    pub name: &'n str,
    pub kind: Kind,
    pub shape: Vec<i64>,
}

/// A file being written: its header is written, and its tensors follow one at a time. The bytes
/// depend only on names, order, values and metadata.
pub struct Writer<W> {
    file: W,
    missing_bytes: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the header of a file that will hold these tensors in this order.
    ///
    /// # Errors
    /// Errors of `file`; [`io::ErrorKind::InvalidInput`], before the first byte, for names, kinds
    /// or shapes that [`SafeTensors::open`](super::SafeTensors::open) would refuse.
    pub fn begin(
        mut file: W,
        planned: &[Planned<'_>],
        metadata: &BTreeMap<String, String>,
    ) -> io::Result<Self> {
        let (header, missing_bytes) = header_of(planned, metadata)
            .map_err(|what| io::Error::new(io::ErrorKind::InvalidInput, what))?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        Ok(Writer { file, missing_bytes })
    }

    /// Writes the next tensor; it is copied if it is on another device or not contiguous.
    ///
    /// # Panics
    /// If more bytes are written than were planned (a bug in the caller).
    pub fn tensor(&mut self, tensor: &Tensor) -> io::Result<()> {
        let tensor = tensor.to_device(Device::Cpu).contiguous();
        let bytes = bytes(&tensor);
        self.missing_bytes =
            self.missing_bytes.checked_sub(bytes.len() as u64).expect("no more than was planned");
        self.file.write_all(bytes)
    }

    /// Returns the file after all planned tensors were written.
    ///
    /// # Panics
    /// If tensors are missing (a bug in the caller).
    pub fn finish(self) -> W {
        assert_eq!(self.missing_bytes, 0, "bytes that were planned and not written");
        self.file
    }
}

/// Writes a whole file with `tensors` in the given order.
///
/// # Errors
/// Errors of [`Writer::begin`].
pub fn write(
    file: &mut impl Write,
    tensors: &[(&str, &Tensor)],
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let planned: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| Planned { name, kind: tensor.kind(), shape: tensor.size() })
        .collect();
    let mut writer = Writer::begin(file, &planned, metadata)?;
    tensors.iter().try_for_each(|(_, tensor)| writer.tensor(tensor))?;
    writer.finish();
    Ok(())
}

/// Returns the header's text and the size of the data after it.
fn header_of(
    tensors: &[Planned<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<(String, u64), String> {
    let mut entries = Vec::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        let texts: Vec<String> = metadata
            .iter()
            .map(|(key, text)| format!("{}:{}", quoted(key), quoted(text)))
            .collect();
        entries.push(format!("{}:{{{}}}", quoted(METADATA), texts.join(",")));
    }
    let mut end = 0;
    for Planned { name, kind, shape } in tensors {
        let dtype = dtype_of(*kind)
            .ok_or_else(|| format!("tensor `{name}` is {kind:?}, which the format cannot hold"))?;
        let begin = end;
        end += shape.iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64;
        let shape: Vec<String> = shape.iter().map(ToString::to_string).collect();
        let shape = shape.join(",");
        entries.push(format!(
            r#"{}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#,
            quoted(name)
        ));
    }
    let mut text = format!("{{{}}}", entries.join(","));
    // The format requires data aligned to 8 bytes; the length field itself takes 8.
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    header::parse(text.as_bytes(), end, Content::Samples)?;
    header::check_length(text.len() as u64)?;
    Ok((text, end))
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_file_are_these_and_no_others() {
        let (a, b) = (Tensor::from_slice(&[1i16, -2]), Tensor::from_slice(&[1.5f32]));
        let metadata =
            BTreeMap::from([("step".into(), "7".into()), ("by \"us\"".into(), "µ\n".into())]);
        let mut file = Vec::new();
        write(&mut file, &[("b", &b), ("a", &a)], &metadata).expect("a sound file");
        let header = concat!(
            r#"{"__metadata__":{"by \"us\"":"µ\n","step":"7"},"#,
            r#""b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I16","shape":[2],"data_offsets":[4,8]}}"#,
            "      "
        );
        let expected = [
            &(header.len() as u64).to_le_bytes(),
            header.as_bytes(),
            &[0, 0, 0xc0, 0x3f, 1, 0, 0xfe, 0xff],
        ]
        .concat();
        assert_eq!(String::from_utf8_lossy(&file), String::from_utf8_lossy(&expected));
        assert_eq!(file, expected);
    }

    #[test]
    fn what_the_reader_would_refuse_is_not_written() {
        let sound = Tensor::from_slice(&[1u8]);
        let empty = Tensor::from_slice::<u8>(&[]);
        let complex = Tensor::zeros([1], (Kind::ComplexFloat, Device::Cpu));
        let refused = |tensors: &[(&str, &Tensor)]| {
            let mut file = Vec::new();
            let error = write(&mut file, tensors, &BTreeMap::new()).expect_err("an unsound file");
            assert!(file.is_empty(), "nothing is written of an unsound file");
            error.to_string()
        };
        assert!(refused(&[("../a", &sound)]).contains("illegal tensor name `../a`"));
        assert!(refused(&[("a", &sound), ("a", &sound)]).contains("duplicate tensor `a`"));
        assert!(refused(&[("a", &empty)]).contains("an axis of 0, expected at least 1"));
        assert_eq!(
            refused(&[("a", &complex)]),
            "tensor `a` is ComplexFloat, which the format cannot hold"
        );
    }

    #[test]
    fn a_view_is_written_as_its_values() {
        let table = Tensor::from_slice(&[1i64, 2, 3, 4]).view([2, 2]);
        let (mut of_view, mut of_copy) = (Vec::new(), Vec::new());
        write(&mut of_view, &[("t", &table.tr())], &BTreeMap::new()).expect("a view");
        write(
            &mut of_copy,
            &[("t", &Tensor::from_slice(&[1i64, 3, 2, 4]).view([2, 2]))],
            &BTreeMap::new(),
        )
        .expect("a copy");
        assert_eq!(of_view, of_copy);
    }
}
