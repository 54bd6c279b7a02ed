//! Keys whose value is one of a few words.

use super::limits::Limits;
use super::tree::Content;
use super::value::Scalar;
use super::words::not_among;

/// A value that is one of a few words. Made by `choice!`.
pub trait Choice: Copy + PartialEq + 'static {
    /// Every word and its value, in the order of the listing.
    const ALL: &'static [(&'static str, Self)];

    /// The word of this value.
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
        known.ok_or_else(|| not_among("value", word, &words::<Self>()))
    }
}

fn words<T: Choice>() -> Vec<&'static str> {
    T::ALL.iter().map(|(word, _)| *word).collect()
}

impl<T: Choice> Scalar for T {
    type Limit = ();
    const PLURAL: &'static str = "words";

    fn read(found: &Content, _: &Limits<()>) -> Result<Self, String> {
        T::parse(found.text(&format!("one of {}", words::<T>().join(", ")))?)
    }

    fn shown(&self) -> String {
        self.word().to_string().shown()
    }

    fn words() -> Vec<&'static str> {
        words::<T>()
    }
}

/// Declares a [`Choice`]: its meaning, then word and value a line. `#[derive(Default)]` and
/// `#[default]` name the value that stands where no settings name one.
macro_rules! choice {
    (
        $(#[$attribute:meta])*
        $visibility:vis enum $name:ident {
            $( $(#[$meaning:meta])+ $word:literal => $value:ident, )+
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $visibility enum $name {
            $( $(#[$meaning])+ #[doc = concat!("\n\nWritten `\"", $word, "\"`.")] $value, )+
        }

        impl $crate::settings::Choice for $name {
            const ALL: &'static [(&'static str, Self)] = &[$(($word, $name::$value),)+];
        }

        impl ::std::str::FromStr for $name {
            type Err = String;

            fn from_str(word: &str) -> Result<Self, String> {
                $crate::settings::Choice::parse(word)
            }
        }
    };
}
pub(crate) use choice;
