//! What a settings struct shows its keys to: each method is one kind of value, read strictly or
//! written with its meaning.

use std::fmt::Display;
use std::ops::{Bound, RangeBounds};
use std::str::FromStr;

use super::tree::{Leaf, Node};
use super::{Choice, Family, Settings, read, write};
use crate::error::ConfigProblem;

/// What a settings struct shows its keys to: a reader or a writer, at one table of the document.
pub struct Keys<'a> {
    pub(super) mode: Mode<'a>,
    pub(super) path: String,
}

pub(super) enum Mode<'a> {
    Read { reader: &'a mut read::Reader, table: Option<&'a Node>, known: Vec<String> },
    Write(&'a mut write::Writer),
}

impl Keys<'_> {
    /// An integer in `range`.
    pub fn integer<T>(&mut self, name: &str, field: &mut T, range: impl RangeBounds<i64>, doc: &str)
    where
        T: Copy + TryInto<i64> + TryFrom<i64> + Display,
    {
        let shown = field.to_string();
        self.leaf(name, doc, Some(shown), |leaf| {
            let Leaf::Integer(value) = leaf else { return Err(leaf.not_a("an integer")) };
            let fits = range.contains(value).then(|| T::try_from(*value).ok()).flatten();
            *field = fits.ok_or_else(|| out_of_range(value, &range, i64::to_string))?;
            Ok(())
        });
    }

    /// An integer that may be left out.
    pub fn optional_integer<T>(
        &mut self,
        name: &str,
        field: &mut Option<T>,
        range: impl RangeBounds<i64>,
        doc: &str,
    ) where
        T: Copy + TryFrom<i64> + Display,
    {
        let shown = field.map(|value| value.to_string());
        self.leaf(name, doc, shown, |leaf| {
            let Leaf::Integer(found) = leaf else { return Err(leaf.not_a("an integer")) };
            let fits = range.contains(found).then(|| T::try_from(*found).ok()).flatten();
            *field = Some(fits.ok_or_else(|| out_of_range(found, &range, i64::to_string))?);
            Ok(())
        });
    }

    /// `N` integers in `range`, as an array.
    pub fn integers<const N: usize>(
        &mut self,
        name: &str,
        field: &mut [i64; N],
        range: impl RangeBounds<i64>,
        doc: &str,
    ) {
        let shown = format!("{field:?}");
        self.leaf(name, doc, Some(shown), |leaf| {
            let Leaf::Integers(found) = leaf else {
                return Err(leaf.not_a(&format!("an array of {N} integers")));
            };
            if let Some(outside) = found.iter().find(|value| !range.contains(value)) {
                return Err(out_of_range(outside, &range, i64::to_string));
            }
            *field = found
                .as_slice()
                .try_into()
                .map_err(|_| format!("expected {N} integers, found {}", found.len()))?;
            Ok(())
        });
    }

    /// A finite number in `range`; an integer is taken as well.
    pub fn number(&mut self, name: &str, field: &mut f64, range: impl RangeBounds<f64>, doc: &str) {
        let shown = format!("{field:?}");
        self.leaf(name, doc, Some(shown), |leaf| {
            let value = match leaf {
                Leaf::Float(value) => *value,
                Leaf::Integer(value) => *value as f64,
                _ => return Err(leaf.not_a("a number")),
            };
            if !value.is_finite() {
                return Err(format!("{value} is not a finite number"));
            }
            if !range.contains(&value) {
                return Err(out_of_range(&value, &range, shown_number));
            }
            *field = value;
            Ok(())
        });
    }

    pub fn flag(&mut self, name: &str, field: &mut bool, doc: &str) {
        let shown = field.to_string();
        self.leaf(name, doc, Some(shown), |leaf| {
            let Leaf::Boolean(value) = leaf else { return Err(leaf.not_a("true or false")) };
            *field = *value;
            Ok(())
        });
    }

    pub fn text(&mut self, name: &str, field: &mut String, doc: &str) {
        let shown = write::quoted(field);
        self.leaf(name, doc, Some(shown), |leaf| {
            let Leaf::Text(value) = leaf else { return Err(leaf.not_a("a text in quotes")) };
            *field = value.clone();
            Ok(())
        });
    }

    /// A text that may be left out.
    pub fn optional_text(&mut self, name: &str, field: &mut Option<String>, doc: &str) {
        let shown = field.as_deref().map(write::quoted);
        self.leaf(name, doc, shown, |leaf| {
            let Leaf::Text(value) = leaf else { return Err(leaf.not_a("a text in quotes")) };
            *field = Some(value.clone());
            Ok(())
        });
    }

    /// A text with a grammar of its own, whose error says what is expected.
    pub fn parsed<T: FromStr<Err = String> + Display>(
        &mut self,
        name: &str,
        field: &mut T,
        doc: &str,
    ) {
        let shown = write::quoted(&field.to_string());
        self.leaf(name, doc, Some(shown), |leaf| {
            let Leaf::Text(found) = leaf else { return Err(leaf.not_a("a text in quotes")) };
            *field = found.parse()?;
            Ok(())
        });
    }

    /// As [`Keys::parsed`]; may be left out.
    pub fn optional_parsed<T: FromStr<Err = String> + Display>(
        &mut self,
        name: &str,
        field: &mut Option<T>,
        doc: &str,
    ) {
        let shown = field.as_ref().map(|value| write::quoted(&value.to_string()));
        self.leaf(name, doc, shown, |leaf| {
            let Leaf::Text(found) = leaf else { return Err(leaf.not_a("a text in quotes")) };
            *field = Some(found.parse()?);
            Ok(())
        });
    }

    /// One word of a [`Choice`].
    pub fn choice<T: Choice>(&mut self, name: &str, field: &mut T, doc: &str) {
        let words: Vec<&str> = T::ALL.iter().map(|(word, _)| *word).collect();
        let doc = format!("{doc} One of: {}.", words.join(", "));
        let shown = write::quoted(field.word());
        self.leaf(name, &doc, Some(shown), |leaf| {
            let Leaf::Text(found) = leaf else {
                return Err(leaf.not_a(&format!("one of {}", words.join(", "))));
            };
            *field = T::parse(found)?;
            Ok(())
        });
    }

    /// A nested table.
    pub fn table(&mut self, name: &str, settings: &mut dyn Settings, doc: &str) {
        let path = self.join(name);
        match &mut self.mode {
            Mode::Write(writer) => {
                writer.section(&path, doc);
                settings.visit(&mut Keys { mode: Mode::Write(writer), path });
            }
            Mode::Read { reader, table, known } => {
                known.push(name.into());
                reader.nested(settings, table.and_then(|node| node.get(name)), path);
            }
        }
    }

    /// A table that holds nothing but one member of a family: `[optimizer.adamw]`.
    pub fn family<F: Family>(&mut self, name: &str, family: &mut F, doc: &str) {
        let path = self.join(name);
        match &mut self.mode {
            Mode::Write(writer) => {
                Keys { mode: Mode::Write(writer), path }.member(family, doc);
            }
            Mode::Read { reader, table, known } => {
                known.push(name.into());
                reader.nested(
                    &mut OnlyMember { family, doc },
                    table.and_then(|node| node.get(name)),
                    path,
                );
            }
        }
    }

    /// One member of a family as a table of its own name inside this one: `[model.dit]`. Returns
    /// true where a document that is read names a member.
    pub fn member<F: Family>(&mut self, family: &mut F, doc: &str) -> bool {
        match &mut self.mode {
            Mode::Write(writer) => {
                let path = if self.path.is_empty() {
                    family.name().into()
                } else {
                    format!("{}.{}", self.path, family.name())
                };
                writer.section(&path, &format!("{doc} One of: {}.", F::NAMES.join(", ")));
                family.settings().visit(&mut Keys { mode: Mode::Write(writer), path });
                false
            }
            Mode::Read { reader, table, known } => {
                known.extend(F::NAMES.iter().map(ToString::to_string));
                table.is_some_and(|table| reader.member(family, table, &self.path))
            }
        }
    }

    /// A family whose member is named by one key and whose settings are another table:
    /// `adapter_type` and `adapter`.
    pub fn named_family<F: Family>(
        &mut self,
        name_key: &str,
        table: &str,
        family: &mut F,
        doc: &str,
    ) {
        let shown = write::quoted(family.name());
        let full_doc = format!("{doc} One of: {}.", F::NAMES.join(", "));
        self.leaf(name_key, &full_doc, Some(shown), |leaf| {
            let Leaf::Text(found) = leaf else {
                return Err(leaf.not_a(&format!("one of {}", F::NAMES.join(", "))));
            };
            *family = F::named(found).ok_or_else(|| not_among("value", found, F::NAMES))?;
            Ok(())
        });
        self.table(
            table,
            family.settings(),
            &format!("Arguments of the `{name_key}` chosen above."),
        );
    }

    fn leaf(
        &mut self,
        name: &str,
        doc: &str,
        shown: Option<String>,
        read: impl FnOnce(&Leaf) -> Result<(), String>,
    ) {
        let path = self.join(name);
        match &mut self.mode {
            Mode::Write(writer) => writer.line(&self.path, name, shown, doc),
            Mode::Read { reader, table, known } => {
                known.push(name.into());
                if let Some(node) = table.and_then(|table| table.get(name)) {
                    reader.leaf(node, path, read);
                }
            }
        }
    }

    fn join(&self, name: &str) -> String {
        if self.path.is_empty() { name.into() } else { format!("{}.{name}", self.path) }
    }
}

/// The table of a family that has no keys beside its member.
struct OnlyMember<'f, F> {
    family: &'f mut F,
    doc: &'f str,
}

impl<F: Family> Settings for OnlyMember<'_, F> {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.member(self.family, self.doc);
    }
}

/// "unknown value `x`; did you mean `y`?", or the list of valid ones when nothing is near.
pub(super) fn not_among(what: &str, found: &str, valid: &[&str]) -> String {
    match nearest(found, valid.iter().copied()) {
        Some(near) => format!("unknown {what} `{found}`; did you mean `{near}`?"),
        None => format!("unknown {what} `{found}`; expected one of {}", valid.join(", ")),
    }
}

/// The valid name most like `found`: a few letters differ, or one of the two begins with the other.
pub(super) fn nearest<'n>(found: &str, valid: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let scored = valid
        .filter(|name| is_near(found, name))
        .map(|name| (strsim::jaro_winkler(found, name), name));
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name)
}

/// Shortest name that is recognized as the beginning of another one.
const SHORTEST_BEGINNING: usize = 3;

/// One letter in five may differ: transposed and missing letters do, other words do not.
fn is_near(found: &str, name: &str) -> bool {
    let begins =
        |long: &str, short: &str| short.len() >= SHORTEST_BEGINNING && long.starts_with(short);
    strsim::osa_distance(found, name) <= found.chars().count().div_ceil(5)
        || begins(found, name)
        || begins(name, found)
}

/// Bounds of a number that must be above `low`.
pub fn above(low: f64) -> (Bound<f64>, Bound<f64>) {
    (Bound::Excluded(low), Bound::Unbounded)
}

/// Bounds of a number that must be above `low` and at most `high`.
pub fn above_up_to(low: f64, high: f64) -> (Bound<f64>, Bound<f64>) {
    (Bound::Excluded(low), Bound::Included(high))
}

/// `0.5`, `-1` and `1e-300`: the shortest of the ways to write a number.
fn shown_number(value: &f64) -> String {
    let [plain, scientific] = [format!("{value}"), format!("{value:e}")];
    if plain.len() <= scientific.len() + 3 { plain } else { scientific }
}

fn out_of_range<T>(value: &T, range: &impl RangeBounds<T>, shown: impl Fn(&T) -> String) -> String {
    let low = match range.start_bound() {
        Bound::Included(low) => format!("at least {}", shown(low)),
        Bound::Excluded(low) => format!("above {}", shown(low)),
        Bound::Unbounded => String::new(),
    };
    let high = match range.end_bound() {
        Bound::Included(high) => format!("at most {}", shown(high)),
        Bound::Excluded(high) => format!("below {}", shown(high)),
        Bound::Unbounded => String::new(),
    };
    let both =
        [low, high].into_iter().filter(|bound| !bound.is_empty()).collect::<Vec<_>>().join(" and ");
    format!("{} is out of range; must be {both}", shown(value))
}

pub(super) fn problem(key: &str, place: &str, what: String) -> ConfigProblem {
    ConfigProblem { key: key.into(), place: place.into(), what }
}
