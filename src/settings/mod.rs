//! One description of a room's settings that reads them, checks them and prints them.
//!
//! A settings struct lists its keys once, in [`Settings::visit`]: name, field, range, meaning. Reading TOML into it (strict,
//! every problem at once, with line and nearest valid name) and writing the annotated reference both walk that list, so
//! that the two cannot drift apart.

mod read;
mod tree;
mod write;

use std::fmt::Display;
use std::ops::{Bound, RangeBounds};

use crate::error::{ConfigProblem, Error, Result};
pub use tree::Leaf;
use tree::Node;

/// A struct whose fields come from a configuration table. `Default` gives the documented defaults.
pub trait Settings {
    /// Shows every key of the table to `keys`, in the order of the reference.
    fn visit(&mut self, keys: &mut Keys<'_>);
}

/// Interchangeable parts of which the configuration names one: `[optimizer.adamw]`. Made by `registry!`.
pub trait Family: Sized {
    const NAMES: &'static [&'static str];
    /// The member of that name with default settings.
    fn named(name: &str) -> Option<Self>;
    fn name(&self) -> &'static str;
    fn settings(&mut self) -> &mut dyn Settings;
}

/// A key whose value is one of a few words.
pub trait Choice: Copy + PartialEq + 'static {
    const ALL: &'static [(&'static str, Self)];

    fn word(self) -> &'static str {
        Self::ALL.iter().find(|(_, value)| *value == self).expect("every value of a choice has a word").0
    }
}

/// What a settings struct shows its keys to: a reader or a writer, at one table of the document.
pub struct Keys<'a> {
    mode: Mode<'a>,
    path: String,
}

enum Mode<'a> {
    Read { reader: &'a mut read::Reader, table: Option<&'a Node>, known: Vec<String> },
    Write(&'a mut write::Writer),
}

/// Reads `settings` from TOML text and `--set key.path=value` overrides on top of its present values.
///
/// # Errors
/// [`Error::Config`] with every problem found: syntax, unknown key, wrong type, out of range, duplicate.
pub fn read<T: Settings + Default>(settings: &mut T, source_name: &str, text: &str, overrides: &[String]) -> Result<()> {
    let (tree, mut problems) = tree::parse(text);
    let tree = tree::with_overrides(tree, overrides, &mut problems);
    let mut reader = read::Reader::new(problems, write::paths(&mut T::default()));
    reader.table(settings, &tree);
    if reader.problems.is_empty() { Ok(()) } else { Err(Error::Config { source_name: source_name.into(), problems: reader.problems }) }
}

/// The settings as TOML text with one comment line a key, complete and readable by [`read`].
pub fn write<T: Settings + ?Sized>(settings: &mut T) -> String {
    write::Writer::of(settings).text()
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
            *field = fits.ok_or_else(|| out_of_range(value, &range))?;
            Ok(())
        });
    }

    /// An integer that may be left out.
    pub fn optional_integer(&mut self, name: &str, field: &mut Option<usize>, range: impl RangeBounds<i64>, doc: &str) {
        let shown = field.map(|value| value.to_string());
        self.leaf(name, doc, shown, |leaf| {
            let Leaf::Integer(found) = leaf else { return Err(leaf.not_a("an integer")) };
            let fits = range.contains(found).then(|| usize::try_from(*found).ok()).flatten();
            *field = Some(fits.ok_or_else(|| out_of_range(found, &range))?);
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
                return Err(out_of_range(&value, &range));
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

    /// One word of a [`Choice`].
    pub fn choice<T: Choice>(&mut self, name: &str, field: &mut T, doc: &str) {
        let words: Vec<&str> = T::ALL.iter().map(|(word, _)| *word).collect();
        let doc = format!("{doc} One of: {}.", words.join(", "));
        let shown = write::quoted(field.word());
        self.leaf(name, &doc, Some(shown), |leaf| {
            let Leaf::Text(found) = leaf else { return Err(leaf.not_a(&format!("one of {}", words.join(", ")))) };
            *field = T::ALL.iter().find(|(word, _)| word == found).ok_or_else(|| not_among("value", found, &words))?.1;
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
            Mode::Write(writer) => Keys { mode: Mode::Write(writer), path }.member(family, doc),
            Mode::Read { reader, table, known } => {
                known.push(name.into());
                reader.nested(&mut OnlyMember { family, doc }, table.and_then(|node| node.get(name)), path);
            }
        }
    }

    /// One member of a family as a table of its own name inside this one: `[model.dit]`.
    pub fn member<F: Family>(&mut self, family: &mut F, doc: &str) {
        match &mut self.mode {
            Mode::Write(writer) => {
                let path = if self.path.is_empty() { family.name().into() } else { format!("{}.{}", self.path, family.name()) };
                writer.section(&path, &format!("{doc} One of: {}.", F::NAMES.join(", ")));
                family.settings().visit(&mut Keys { mode: Mode::Write(writer), path });
            }
            Mode::Read { reader, table, known } => {
                known.extend(F::NAMES.iter().map(ToString::to_string));
                if let Some(table) = table {
                    reader.member(family, table, &self.path);
                }
            }
        }
    }

    /// A family whose member is named by one key and whose settings are another table: `adapter_type` and `adapter`.
    pub fn named_family<F: Family>(&mut self, name_key: &str, table: &str, family: &mut F, doc: &str) {
        let shown = write::quoted(family.name());
        let full_doc = format!("{doc} One of: {}.", F::NAMES.join(", "));
        self.leaf(name_key, &full_doc, Some(shown), |leaf| {
            let Leaf::Text(found) = leaf else { return Err(leaf.not_a(&format!("one of {}", F::NAMES.join(", ")))) };
            *family = F::named(found).ok_or_else(|| not_among("value", found, F::NAMES))?;
            Ok(())
        });
        self.table(table, family.settings(), &format!("Arguments of the `{name_key}` chosen above."));
    }

    fn leaf(&mut self, name: &str, doc: &str, shown: Option<String>, read: impl FnOnce(&Leaf) -> Result<(), String>) {
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
fn not_among(what: &str, found: &str, valid: &[&str]) -> String {
    match nearest(found, valid.iter().copied()) {
        Some(near) => format!("unknown {what} `{found}`; did you mean `{near}`?"),
        None => format!("unknown {what} `{found}`; expected one of {}", valid.join(", ")),
    }
}

/// The valid name most like `found`, if any is like it at all.
fn nearest<'n>(found: &str, valid: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let scored = valid.map(|name| (strsim::jaro_winkler(found, name), name));
    // 0.8 keeps transpositions and missing letters and drops words that share only a prefix.
    scored.filter(|(score, _)| *score > 0.8).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name)
}

fn out_of_range<T: Display>(value: &T, range: &impl RangeBounds<T>) -> String {
    let low = match range.start_bound() {
        Bound::Included(low) => format!("at least {low}"),
        Bound::Excluded(low) => format!("above {low}"),
        Bound::Unbounded => String::new(),
    };
    let high = match range.end_bound() {
        Bound::Included(high) => format!("at most {high}"),
        Bound::Excluded(high) => format!("below {high}"),
        Bound::Unbounded => String::new(),
    };
    let both = [low, high].into_iter().filter(|bound| !bound.is_empty()).collect::<Vec<_>>().join(" and ");
    format!("{value} is out of range; must be {both}")
}

fn problem(key: &str, place: &str, what: String) -> ConfigProblem {
    ConfigProblem { key: key.into(), place: place.into(), what }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, Default, PartialEq)]
    struct Inner {
        rate: f64,
    }

    impl Settings for Inner {
        fn visit(&mut self, keys: &mut Keys<'_>) {
            keys.number("learning_rate", &mut self.rate, 0.0.., "Step size.");
        }
    }

    #[derive(Clone, Debug, Default, PartialEq)]
    struct Outer {
        steps: u64,
        name: String,
        limit: Option<usize>,
        inner: Inner,
    }

    impl Settings for Outer {
        fn visit(&mut self, keys: &mut Keys<'_>) {
            keys.integer("steps", &mut self.steps, 1.., "How many.");
            keys.text("name", &mut self.name, "Whose.");
            keys.optional_integer("limit", &mut self.limit, 0.., "Where to stop.");
            keys.table("train", &mut self.inner, "Training.");
        }
    }

    fn problems(text: &str, overrides: &[&str]) -> Vec<String> {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        match read(&mut Outer::default(), "test", text, &overrides) {
            Err(Error::Config { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
            Err(other) => panic!("{other}"),
            Ok(()) => Vec::new(),
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut outer = Outer { steps: 3, name: "a \"b\"".into(), limit: None, inner: Inner { rate: 1e-4 } };
        let text = write(&mut outer);
        let mut back = Outer::default();
        read(&mut back, "test", &text, &[]).expect("own text is valid");
        assert_eq!(back, outer);
    }

    #[test]
    fn all_problems_come_at_once_with_line_and_nearest_name() {
        let found = problems("steps = 0\nnme = 'x'\n[train]\nlerning_rate = 1.0\n", &[]);
        assert_eq!(
            found,
            [
                "steps (line 1): 0 is out of range; must be at least 1",
                "train.lerning_rate (line 4): unknown key; did you mean train.learning_rate?",
                "nme (line 2): unknown key; did you mean name?",
            ]
        );
    }

    #[test]
    fn a_key_in_the_wrong_table_is_sent_home() {
        assert_eq!(problems("learning_rate = 1.0", &[]), ["learning_rate (line 1): unknown key; did you mean train.learning_rate?"]);
    }

    #[test]
    fn overrides_win_and_are_named_in_errors() {
        let mut outer = Outer::default();
        read(&mut outer, "test", "steps = 3", &["steps=4".into(), "name=runs/x".into(), "train.learning_rate = 2".into()]).expect("valid");
        assert_eq!((outer.steps, outer.name.as_str(), outer.inner.rate), (4, "runs/x", 2.0));
        assert_eq!(problems("", &["steps=many"]), ["steps (--set): expected an integer, found the text \"many\""]);
        assert_eq!(problems("", &["steps"]), ["steps (--set): expected key.path=value"]);
    }

    #[test]
    fn not_a_number_and_duplicates_are_refused() {
        assert_eq!(problems("[train]\nlearning_rate = nan", &[]), ["train.learning_rate (line 2): NaN is not a finite number"]);
        assert_eq!(problems("steps = 1\nsteps = 2", &[]), ["steps (line 2): duplicate key"]);
        assert_eq!(problems("steps = 1e99", &[]), ["steps (line 1): expected an integer, found the number 1e99"]);
    }
}
