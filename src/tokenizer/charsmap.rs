//! The replacements that SentencePiece applies to a text before it is cut: a trie in one array,
//! then the replacements, each ended by a zero byte.
//!
//! The array is checked before it is used: the crate that walks it trusts every offset.
//!
//! Source: SentencePiece's `precompiled_charsmap`, and the array of its darts-clone.

use tokenizers::normalizers::Precompiled;

/// Longest map, four times the published one of NFKC.
const MAX_BYTES: usize = 1 << 20;

/// # Errors
/// A text, if a text could be looked up outside of the map.
pub fn precompiled(map: &[u8]) -> Result<Precompiled, String> {
    let broken = || "its precompiled_charsmap is broken".to_string();
    if map.len() > MAX_BYTES || !is_sound(map) {
        return Err(broken());
    }
    Precompiled::from(map).map_err(|_| broken())
}

/// One unit of the array: a label, the offset of its children, and a mark that one of them is a
/// value.
#[derive(Clone, Copy)]
struct Unit(u32);

impl Unit {
    fn offset(self) -> usize {
        ((self.0 >> 10) as usize) << ((self.0 & (1 << 9)) >> 6)
    }

    fn label(self) -> u32 {
        self.0 & (1 << 31 | 0xff)
    }

    fn has_value(self) -> bool {
        self.0 >> 8 & 1 == 1
    }

    fn value(self) -> usize {
        (self.0 & !(1 << 31)) as usize
    }
}

fn is_sound(map: &[u8]) -> bool {
    let Some((size, rest)) = map.split_first_chunk() else { return false };
    let Some((trie, texts)) = rest.split_at_checked(u32::from_le_bytes(*size) as usize) else {
        return false;
    };
    let (units, odd) = trie.as_chunks::<4>();
    let units: Vec<Unit> = units.iter().map(|unit| Unit(u32::from_le_bytes(*unit))).collect();
    let Ok(texts) = std::str::from_utf8(texts) else { return false };
    odd.is_empty() && all_lead_inside(&units, texts)
}

/// Walks from the root to every unit that a text can reach.
fn all_lead_inside(units: &[Unit], texts: &str) -> bool {
    let Some(root) = units.first() else { return false };
    let mut seen = vec![false; units.len()];
    let mut open = vec![root.offset()];
    while let Some(children) = open.pop() {
        if children | 0xff >= units.len() {
            return false;
        }
        if std::mem::replace(&mut seen[children], true) {
            continue;
        }
        for byte in 1..=0xff {
            let at = children ^ byte;
            let unit = units[at];
            if unit.label() != byte as u32 {
                continue;
            }
            let next = at ^ unit.offset();
            let value = || units.get(next).map(|unit| unit.value());
            if unit.has_value() && !value().is_some_and(|value| texts.is_char_boundary(value)) {
                return false;
            }
            open.push(next);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map that replaces `A` by `b`.
    fn map() -> Vec<u8> {
        let mut units = vec![0u32; 512];
        // The root's children lie at 256, those of `A` at 0, where the value is.
        units[0] = 256 << 10;
        units[256 ^ 0x41] = 0x41 | 1 << 8 | (256 ^ 0x41 ^ 2) << 10;
        units[2] = 1 << 31;
        let mut bytes = (units.len() as u32 * 4).to_le_bytes().to_vec();
        units.iter().for_each(|unit| bytes.extend(unit.to_le_bytes()));
        bytes.extend(b"b\0");
        bytes
    }

    #[test]
    fn a_sound_map_replaces() {
        let found = precompiled(&map()).expect("a sound map");
        assert_eq!(found.normalize_string("xAyA"), "xbyb");
    }

    #[test]
    fn maps_that_lead_outside_are_refused() {
        let lie = |at: usize, unit: u32| {
            let mut map = map();
            map[4 + 4 * at..][..4].copy_from_slice(&unit.to_le_bytes());
            map
        };
        let broken = [
            Vec::new(),
            vec![0; 4],
            u32::MAX.to_le_bytes().to_vec(),
            map()[..2000].to_vec(),
            [&map()[..], &[0xff]].concat(),
            vec![0; MAX_BYTES + 1],
            lie(0, 512 << 10),
            lie(0, u32::MAX),
            lie(256 ^ 0x41, 0x41 | 1 << 8 | 300_000 << 10),
            lie(2, 1 << 31 | 3),
        ];
        for map in broken {
            assert!(precompiled(&map).is_err(), "{} bytes", map.len());
        }
    }
}
