//! One description of a room's settings that reads them, checks them and prints them.
//!
//! A settings struct lists its keys once, in [`Settings::visit`]: name, field, range, meaning.
//! Reading TOML into it (strict, every problem at once, with line and nearest valid name) and
//! writing the annotated listing both walk that list, so that the two cannot drift apart.

mod keys;
mod notation;
mod read;
mod tree;
mod write;

use crate::error::{ConfigProblem, Error, Result};
pub use keys::{Keys, above, above_up_to};

/// A struct whose fields come from a configuration table. `Default` gives the documented defaults.
pub trait Settings {
    /// Shows every key of the table to `keys`, in the order of the listing.
    fn visit(&mut self, keys: &mut Keys<'_>);

    /// Names that other programs have for the document's keys, consulted before the nearest name is
    /// guessed.
    fn habits(&self) -> &'static [Habit] {
        &[]
    }
}

/// Names that other programs have for one thing, and the keys that say it here.
#[derive(Debug)]
pub struct Habit {
    /// Names of keys or tables, or dotted paths, with spaces between them.
    pub theirs: &'static str,
    /// Dotted paths; `*` stands for the chosen member of a family. Empty where there is no
    /// counterpart.
    pub ours: &'static [&'static str],
    /// Words that follow; empty where the keys say enough.
    pub remark: &'static str,
}

/// Interchangeable parts of which the configuration names one: `[optimizer.adamw]`. Made by
/// `registry!`.
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
        Self::ALL
            .iter()
            .find(|(_, value)| *value == self)
            .expect("every value of a choice has a word")
            .0
    }

    /// The value of that word.
    ///
    /// # Errors
    /// A text that names the nearest word, or all of them.
    fn parse(word: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().find(|(known, _)| *known == word).map(|(_, value)| *value);
        let words = || Self::ALL.iter().map(|(word, _)| *word).collect::<Vec<_>>();
        known.ok_or_else(|| keys::not_among("value", word, &words()))
    }
}

/// Lets choices be parsed from their words.
macro_rules! parsed_from_words {
    ($($choice:ty),+ $(,)?) => {
        $(impl ::std::str::FromStr for $choice {
            type Err = String;
            fn from_str(word: &str) -> Result<Self, String> {
                <Self as $crate::settings::Choice>::parse(word)
            }
        })+
    };
}
pub(crate) use parsed_from_words;

/// Longest configuration that is read, overrides included: the complete listing takes a quarter of
/// it, the parser a thousand times as much memory.
const MAX_BYTES: usize = 48 << 10;

/// Reads `settings` from TOML text and `--set key.path=value` overrides on top of its present
/// values.
///
/// # Errors
/// [`Error::Config`] with every problem found: too long, syntax, unknown key, wrong type, out of
/// range, duplicate.
pub fn read<T: Settings + Default>(
    settings: &mut T,
    source_name: &str,
    text: &str,
    overrides: &[String],
) -> Result<()> {
    let bytes = text.len() + overrides.iter().map(String::len).sum::<usize>();
    if bytes > MAX_BYTES {
        let what = format!(
            "is {bytes} bytes long with its overrides, longer than the {MAX_BYTES} allowed"
        );
        return Err(Error::Config {
            source_name: source_name.into(),
            problems: vec![keys::problem("text", "", what)],
        });
    }
    let (tree, mut problems) = tree::parse(text);
    if let Some(what) = notation::foreign(text).filter(|_| !problems.is_empty()) {
        return Err(Error::Config {
            source_name: source_name.into(),
            problems: vec![keys::problem("text", "", what)],
        });
    }
    let tree = tree::with_overrides(tree, overrides, &mut problems);
    refuse(source_name, read::Reader::read(settings, &tree, problems))
}

/// Reads `settings` from a JSON object on top of their present values, as strictly as [`read`].
///
/// # Errors
/// [`Error::Config`] with every problem found.
pub fn read_json(
    settings: &mut dyn Settings,
    source_name: &str,
    object: &serde_json::Map<String, serde_json::Value>,
) -> Result<()> {
    refuse(source_name, read::Reader::read(settings, &tree::of_json(object), Vec::new()))
}

fn refuse(source_name: &str, problems: Vec<ConfigProblem>) -> Result<()> {
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Error::Config { source_name: source_name.into(), problems })
    }
}

/// The table that a text is; none for a text that is no TOML, or longer than any configuration: the
/// parser takes a thousand times as much memory.
pub fn table(text: &str) -> Option<toml::Table> {
    if text.len() <= MAX_BYTES { toml::from_str(text).ok() } else { None }
}

/// The settings as a JSON object; what is unset is `null`.
pub fn write_json(settings: &mut dyn Settings) -> serde_json::Map<String, serde_json::Value> {
    let values: toml::Table = toml::from_str(&write(settings)).expect("a listing is TOML");
    let value = |key: &String| {
        values.get(key).map_or(serde_json::Value::Null, |value| serde_json::json!(value))
    };
    write::paths(settings).iter().map(|key| (key.clone(), value(key))).collect()
}

/// The settings as TOML text with one comment line a key, complete and readable by [`read`].
pub fn write<T: Settings + ?Sized>(settings: &mut T) -> String {
    write::Writer::of(settings).text()
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
            Err(Error::Config { problems, .. }) => {
                problems.iter().map(ToString::to_string).collect()
            }
            Err(other) => panic!("{other}"),
            Ok(()) => Vec::new(),
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut outer =
            Outer { steps: 3, name: "a \"b\"".into(), limit: None, inner: Inner { rate: 1e-4 } };
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
        assert_eq!(
            problems("learning_rate = 1.0", &[]),
            ["learning_rate (line 1): unknown key; did you mean train.learning_rate?"]
        );
    }

    #[test]
    fn bounds_are_told_as_people_write_them() {
        #[derive(Default)]
        struct Bounds(f64, f64);
        impl Settings for Bounds {
            fn visit(&mut self, keys: &mut Keys<'_>) {
                keys.number("positive", &mut self.0, above(0.0), "");
                keys.number("share", &mut self.1, above_up_to(1e-9, 0.5), "");
            }
        }
        let said = |text: &str| {
            read(&mut Bounds::default(), "test", text, &[]).expect_err("out of range").to_string()
        };
        assert_eq!(
            said("positive = 0"),
            "test: positive (line 1): 0 is out of range; must be above 0"
        );
        assert_eq!(
            said("positive = -1e-300"),
            "test: positive (line 1): -1e-300 is out of range; must be above 0"
        );
        assert_eq!(
            said("share = 0.75"),
            "test: share (line 1): 0.75 is out of range; must be above 1e-9 and at most 0.5"
        );
        assert_eq!(
            said("share = 123456"),
            "test: share (line 1): 123456 is out of range; must be above 1e-9 and at most 0.5"
        );
    }

    #[test]
    fn overrides_win_and_are_named_in_errors() {
        let mut outer = Outer::default();
        read(
            &mut outer,
            "test",
            "steps = 3",
            &["steps=4".into(), "name=runs/x".into(), "train.learning_rate = 2".into()],
        )
        .expect("valid");
        assert_eq!((outer.steps, outer.name.as_str(), outer.inner.rate), (4, "runs/x", 2.0));
        assert_eq!(
            problems("", &["steps=many"]),
            ["steps (--set): expected an integer, found the text \"many\""]
        );
        assert_eq!(problems("", &["steps"]), ["steps (--set): expected key.path=value"]);
    }

    #[test]
    fn a_text_that_is_no_configuration_is_refused_unread() {
        let comment = "#".repeat(MAX_BYTES);
        assert!(
            problems(&comment, &["steps"])[0]
                .ends_with("is 49157 bytes long with its overrides, longer than the 49152 allowed")
        );
        assert_eq!(problems(&comment[8..], &["steps"]), ["steps (--set): expected key.path=value"]);
    }

    #[test]
    fn not_a_number_and_duplicates_are_refused() {
        assert_eq!(
            problems("[train]\nlearning_rate = nan", &[]),
            ["train.learning_rate (line 2): NaN is not a finite number"]
        );
        assert_eq!(problems("steps = 1\nsteps = 2", &[]), ["steps (line 2): duplicate key"]);
        assert_eq!(
            problems("steps = 1e99", &[]),
            ["steps (line 1): expected an integer, found the number 1e99"]
        );
    }
}
