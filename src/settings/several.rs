//! Values that hold several scalars: arrays, lists, maps from patterns.

use super::limits::Limits;
use super::tree::{Content, Node};
use super::value::{Misfit, Scalar, Value};
use super::words::quoted;

/// Exactly `N` integers.
impl<const N: usize> Value for [i64; N] {
    type Limit = i64;

    fn read(found: &Node, limits: &Limits<i64>) -> Result<Self, Vec<Misfit>> {
        let read = || {
            let integers = found.content.integers();
            let integers = integers
                .ok_or_else(|| found.content.not_a(&format!("an array of {N} integers")))?;
            match integers.iter().find(|value| !limits.contains(**value)) {
                Some(outside) => Err(limits.refusal(*outside, |value| value.to_string())),
                None => integers
                    .as_slice()
                    .try_into()
                    .map_err(|_| format!("expected {N} integers, found {}", integers.len())),
            }
        };
        read().map_err(|what| Misfit::whole(found, what))
    }

    fn shown(&self) -> Option<String> {
        Some(format!("{self:?}"))
    }
}

/// Any number of scalars.
impl<T: Scalar> Value for Vec<T> {
    type Limit = T::Limit;

    fn read(found: &Node, limits: &Limits<T::Limit>) -> Result<Self, Vec<Misfit>> {
        let Content::List(items) = &found.content else {
            let what = found.content.not_a(&format!("an array of {}", T::PLURAL));
            return Err(Misfit::whole(found, what));
        };
        gathered(items.iter().enumerate().map(|(index, item)| {
            T::read(&item.content, limits).map_err(|what| Misfit {
                within: format!("[{index}]"),
                place: item.place.clone(),
                what,
            })
        }))
    }

    fn shown(&self) -> Option<String> {
        let items: Vec<String> = self.iter().map(Scalar::shown).collect();
        Some(format!("[{}]", items.join(", ")))
    }

    fn words() -> Vec<&'static str> {
        T::words()
    }
}

/// Reads an array of scalars, or one that stands alone.
pub fn one_or_several<T: Scalar>(
    found: &Node,
    limits: &Limits<T::Limit>,
) -> Result<Vec<T>, Vec<Misfit>> {
    match found.content {
        Content::List(_) => Vec::read(found, limits),
        _ => <T as Value>::read(found, limits).map(|scalar| vec![scalar]),
    }
}

/// Scalars by patterns of names, as `"blocks.*" = 4`, in the order of the document.
///
/// The document has an inline table, `ranks = { "blocks.*" = 4 }`, or a table, `[lora.ranks]`.
#[derive(Clone, Debug, PartialEq)]
pub struct GlobMap<T>(pub Vec<(String, T)>);

impl<T> Default for GlobMap<T> {
    fn default() -> Self {
        GlobMap(Vec::new())
    }
}

impl<T: Scalar> Value for GlobMap<T> {
    type Limit = T::Limit;

    fn read(found: &Node, limits: &Limits<T::Limit>) -> Result<Self, Vec<Misfit>> {
        let Content::Table(entries) = &found.content else {
            let expected = format!("a table of {}, {{ \"pattern\" = … }}", T::PLURAL);
            return Err(Misfit::whole(found, found.content.not_a(&expected)));
        };
        let entry = |(pattern, node): &(String, Node)| {
            let read = match node.content {
                Content::Table(_) => Err("found a table; put a pattern with dots in quotes".into()),
                _ => T::read(&node.content, limits),
            };
            read.map(|value| (pattern.clone(), value)).map_err(|what| Misfit {
                within: format!(".{}", quoted(pattern)),
                place: node.place.clone(),
                what,
            })
        };
        gathered(entries.iter().map(entry)).map(GlobMap)
    }

    fn shown(&self) -> Option<String> {
        let entry =
            |(pattern, value): &(String, T)| format!("{} = {}", quoted(pattern), value.shown());
        let entries: Vec<String> = self.0.iter().map(entry).collect();
        Some(if entries.is_empty() { "{}".into() } else { format!("{{ {} }}", entries.join(", ")) })
    }

    fn words() -> Vec<&'static str> {
        T::words()
    }
}

/// All parts, or everything that is wrong with any of them.
fn gathered<T>(parts: impl Iterator<Item = Result<T, Misfit>>) -> Result<Vec<T>, Vec<Misfit>> {
    let (mut sound, mut misfits) = (Vec::new(), Vec::new());
    for part in parts {
        match part {
            Ok(part) => sound.push(part),
            Err(misfit) => misfits.push(misfit),
        }
    }
    if misfits.is_empty() { Ok(sound) } else { Err(misfits) }
}
