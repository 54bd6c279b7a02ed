//! Archives as `torch.save` writes them, made by hand, so that every lie can be told in one.

/// One file of a zip archive: its name and contents.
pub type Entry<'e> = (&'e str, &'e [u8]);

/// A zip archive of these entries, stored as they are.
pub fn zip(entries: &[Entry<'_>]) -> Vec<u8> {
    let (mut archive, mut directory) = (Vec::new(), Vec::new());
    for (name, contents) in entries {
        let local = archive.len() as u32;
        let (length, name_length) = (contents.len() as u32, name.len() as u16);
        let common = [
            &[0; 8][..],
            &crc32fast::hash(contents).to_le_bytes(),
            &length.to_le_bytes(),
            &length.to_le_bytes(),
            &name_length.to_le_bytes(),
            &[0, 0],
        ]
        .concat();
        archive.extend([b"PK\x03\x04\x00\x00", &common[..], name.as_bytes(), contents].concat());
        directory.extend([b"PK\x01\x02\x00\x00\x00\x00", &common[..], &[0; 10]].concat());
        directory.extend([&local.to_le_bytes()[..], name.as_bytes()].concat());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let (start, length) = (archive.len() as u32, directory.len() as u32);
    archive.extend(&directory);
    archive.extend([b"PK\x05\x06\x00\x00\x00\x00", &count[..], &count].concat());
    archive.extend([&length.to_le_bytes()[..], &start.to_le_bytes(), &[0, 0]].concat());
    archive
}

/// A file of `torch.save`: a pickle, and storages by their keys.
pub fn saved(pickle: &[u8], storages: &[Entry<'_>]) -> Vec<u8> {
    let named: Vec<(String, &[u8])> =
        storages.iter().map(|(key, data)| (format!("a/data/{key}"), *data)).collect();
    let mut entries: Vec<Entry<'_>> = vec![("a/data.pkl", pickle), ("a/byteorder", b"little")];
    entries.extend(named.iter().map(|(name, data)| (name.as_str(), *data)));
    zip(&entries)
}

/// Opcodes of a text.
pub fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// Opcodes of a tuple of small numbers.
pub fn numbers(numbers: &[u32]) -> Vec<u8> {
    let each = numbers.iter().flat_map(|number| [b"J", &number.to_le_bytes()[..]].concat());
    [b"(".to_vec(), each.collect(), b"t".to_vec()].concat()
}

/// A tensor to describe.
pub struct Described<'d> {
    pub class: &'d str,
    pub key: &'d str,
    /// Elements that the storage is said to have.
    pub elements: u32,
    pub offset: u32,
    pub shape: &'d [u32],
    pub strides: &'d [u32],
}

impl Described<'_> {
    /// Opcodes that rebuild the tensor.
    pub fn opcodes(&self) -> Vec<u8> {
        let number = |number: u32| [b"J", &number.to_le_bytes()[..]].concat();
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
            text("storage"),
            format!("ctorch\n{}\n", self.class).into_bytes(),
            text(self.key),
            text("cpu"),
            number(self.elements),
            b"tQ".to_vec(),
            number(self.offset),
            numbers(self.shape),
            numbers(self.strides),
            b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
        ]
        .concat()
    }
}

/// Six floats as two rows of three.
pub const SOUND: Described<'_> = Described {
    class: "FloatStorage",
    key: "0",
    elements: 6,
    offset: 0,
    shape: &[2, 3],
    strides: &[3, 1],
};

/// A whole pickle that results in what `body` leaves on the stack.
pub fn pickle(body: &[u8]) -> Vec<u8> {
    [b"\x80\x02", body, b"."].concat()
}
