//! Names and captions in JSON, whatever its shape, read without holding anything else.
//!
//! | shape | its meaning |
//! |---|---|
//! | `[{"file_name": "a.jpg", "caption": "…"}, …]` | a row for each picture |
//! | `{"items": […]}`, `{"data": […]}` | the same |
//! | `{"a.jpg": "…", "b.jpg": ["…", "…"], "c.jpg": {"caption": "…"}}` | captions by names |
//! | `{"file_name": …}` on each line | a row a line |

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{FIELDS, MAX_CAPTION_BYTES, MAX_CAPTIONS, NAMES};

/// Keys whose values are rows, not captions of a file of that name.
const HOLDERS: [&str; 2] = ["items", "data"];

/// A picture's name and one of its captions.
pub type Row = (String, String);

/// Position of a field among those that are looked for.
pub fn rank_of_field(key: &str, field: Option<&str>) -> Option<usize> {
    match field {
        Some(field) => (key == field).then_some(0),
        None => FIELDS.iter().position(|known| *known == key),
    }
}

pub fn rank_of_name(key: &str) -> Option<usize> {
    NAMES.iter().position(|known| *known == key)
}

/// Reads rows into `found`.
pub struct Rows<'r> {
    /// The name that the value belongs to, if a key has told it.
    pub name: Option<String>,
    /// True if an object's keys are names, false if they are fields of a row.
    pub by_name: bool,
    pub field: Option<&'r str>,
    pub found: &'r mut Vec<Row>,
}

impl Rows<'_> {
    fn inner(&mut self, name: Option<String>) -> Rows<'_> {
        Rows { name, by_name: false, field: self.field, found: self.found }
    }

    fn take<E: Error>(&mut self, name: &str, captions: Vec<String>) -> Result<(), E> {
        self.found.extend(captions.into_iter().map(|caption| (name.to_string(), caption)));
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Rows<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("captions by the names of pictures, or rows of both")
    }

    fn visit_str<E: Error>(mut self, text: &str) -> Result<(), E> {
        let name = self.name.take().ok_or_else(|| E::custom("a caption has no file's name"))?;
        let caption = checked(text)?;
        self.take(&name, vec![caption])
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut values: A) -> Result<(), A::Error> {
        let (name, before) = (self.name.clone(), self.found.len());
        while values.next_element_seed(self.inner(name.clone()))?.is_some() {
            if name.is_some() && self.found.len() - before > MAX_CAPTIONS {
                return Err(A::Error::custom(too_many()));
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<(), A::Error> {
        if self.by_name {
            while let Some(key) = entries.next_key::<String>()? {
                let name = Some(key).filter(|key| !HOLDERS.contains(&key.as_str()));
                entries.next_value_seed(self.inner(name))?;
            }
            return Ok(());
        }
        let (mut name, mut captions) = (None::<(usize, String)>, None::<(usize, Vec<String>)>);
        while let Some(key) = entries.next_key::<String>()? {
            if let Some(rank) = rank_of_field(&key, self.field) {
                let texts = entries.next_value_seed(Texts)?;
                if !texts.is_empty() && captions.as_ref().is_none_or(|(best, _)| rank < *best) {
                    captions = Some((rank, texts));
                }
            } else if let Some(rank) = rank_of_name(&key) {
                let texts = entries.next_value_seed(Texts)?;
                if name.as_ref().is_none_or(|(best, _)| rank < *best) {
                    name = texts.into_iter().next().map(|text| (rank, text)).or(name);
                }
            } else {
                entries.next_value::<IgnoredAny>()?;
            }
        }
        let name = self.name.take().or(name.map(|(_, name)| name));
        match (name, captions) {
            (Some(name), Some((_, captions))) => self.take(&name, captions),
            // Rows without a caption are as good as absent.
            _ => Ok(()),
        }
    }
}

/// Reads a text, a list of texts, or nothing.
struct Texts;

impl<'de> DeserializeSeed<'de> for Texts {
    type Value = Vec<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<String>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Texts {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a list of texts")
    }

    fn visit_unit<E: Error>(self) -> Result<Vec<String>, E> {
        Ok(Vec::new())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<String>, E> {
        Ok(vec![checked(text)?])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Vec<String>, A::Error> {
        let mut texts = Vec::new();
        while let Some(text) = values.next_element::<String>()? {
            texts.push(checked(&text)?);
            if texts.len() > MAX_CAPTIONS {
                return Err(A::Error::custom(too_many()));
            }
        }
        Ok(texts)
    }
}

fn too_many() -> String {
    format!("a picture has more than {MAX_CAPTIONS} captions")
}

fn checked<E: Error>(text: &str) -> Result<String, E> {
    match text.len() {
        0..=MAX_CAPTION_BYTES => Ok(text.to_string()),
        bytes => {
            let what = format!("a text has {bytes} bytes; at most {MAX_CAPTION_BYTES} are taken");
            Err(E::custom(what))
        }
    }
}
