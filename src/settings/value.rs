//! Types that a key can have: how each is read from a document and shown in a listing.

use super::limits::Limits;
use super::tree::{Content, Node};
use super::words::{quoted, shown_number};

/// A value that stands alone: a number, a flag, a text, a word.
pub trait Scalar: Sized {
    /// The type that a range of such values bounds; `()` if a range has no meaning.
    type Limit: Copy + PartialOrd;

    /// Several such values, in messages: "numbers".
    const PLURAL: &'static str;

    /// # Errors
    /// A text that says what was found and what is expected.
    fn read(found: &Content, limits: &Limits<Self::Limit>) -> Result<Self, String>;

    /// The value as TOML.
    fn shown(&self) -> String;

    /// All values, if there are only a few.
    fn words() -> Vec<&'static str> {
        Vec::new()
    }
}

/// A part of a value that is not as it should be.
#[derive(Debug)]
pub struct Misfit {
    /// The part's path within the value, as `[2]`; empty for the value itself.
    pub(super) within: String,
    pub(super) place: String,
    pub(super) what: String,
}

impl Misfit {
    /// The value at `node` itself.
    pub(super) fn whole(node: &Node, what: String) -> Vec<Self> {
        vec![Misfit { within: String::new(), place: node.place.clone(), what }]
    }
}

/// A type that a key can have: a scalar, one that may be left out, or several.
pub trait Value: Sized {
    /// The type that a range bounds: the scalar, or each of several.
    type Limit: Copy + PartialOrd;

    /// # Errors
    /// Every part that does not fit.
    fn read(found: &Node, limits: &Limits<Self::Limit>) -> Result<Self, Vec<Misfit>>;

    /// Returns the value as TOML on one line; `None` while it is unset.
    fn shown(&self) -> Option<String>;

    /// All values, if there are only a few.
    fn words() -> Vec<&'static str> {
        Vec::new()
    }
}

impl<T: Scalar> Value for T {
    type Limit = T::Limit;

    fn read(found: &Node, limits: &Limits<T::Limit>) -> Result<Self, Vec<Misfit>> {
        T::read(&found.content, limits).map_err(|what| Misfit::whole(found, what))
    }

    fn shown(&self) -> Option<String> {
        Some(Scalar::shown(self))
    }

    fn words() -> Vec<&'static str> {
        <T as Scalar>::words()
    }
}

/// May be left out.
impl<T: Scalar> Value for Option<T> {
    type Limit = T::Limit;

    fn read(found: &Node, limits: &Limits<T::Limit>) -> Result<Self, Vec<Misfit>> {
        <T as Value>::read(found, limits).map(Some)
    }

    fn shown(&self) -> Option<String> {
        self.as_ref().map(Scalar::shown)
    }

    fn words() -> Vec<&'static str> {
        <T as Scalar>::words()
    }
}

macro_rules! integers {
    ($($integer:ty),+) => { $(
        impl Scalar for $integer {
            type Limit = i64;
            const PLURAL: &'static str = "integers";

            fn read(found: &Content, limits: &Limits<i64>) -> Result<Self, String> {
                let Content::Integer(value) = *found else {
                    return Err(found.not_a("an integer"));
                };
                let fits = limits.contains(value).then(|| Self::try_from(value).ok()).flatten();
                fits.ok_or_else(|| limits.refusal(value, |value| value.to_string()))
            }

            fn shown(&self) -> String {
                self.to_string()
            }
        }
    )+ };
}
integers!(i32, i64, u64, usize);

/// A finite number; an integer is taken as well.
impl Scalar for f64 {
    type Limit = f64;
    const PLURAL: &'static str = "numbers";

    fn read(found: &Content, limits: &Limits<f64>) -> Result<Self, String> {
        let value = match *found {
            Content::Float(value) => value,
            Content::Integer(value) => value as f64,
            _ => return Err(found.not_a("a number")),
        };
        match value {
            value if !value.is_finite() => Err(format!("{value} is not a finite number")),
            value if !limits.contains(value) => Err(limits.refusal(value, shown_number)),
            value => Ok(value),
        }
    }

    fn shown(&self) -> String {
        format!("{self:?}")
    }
}

impl Scalar for bool {
    type Limit = ();
    const PLURAL: &'static str = "true or false";

    fn read(found: &Content, _: &Limits<()>) -> Result<Self, String> {
        if let Content::Boolean(value) = *found {
            Ok(value)
        } else {
            Err(found.not_a("true or false"))
        }
    }

    fn shown(&self) -> String {
        self.to_string()
    }
}

impl Scalar for String {
    type Limit = ();
    const PLURAL: &'static str = "texts";

    fn read(found: &Content, _: &Limits<()>) -> Result<Self, String> {
        found.text("a text in quotes").map(ToString::to_string)
    }

    fn shown(&self) -> String {
        quoted(self)
    }
}

/// Makes types with a grammar of their own (`FromStr`, whose error says what is expected, and
/// `Display`) the value of a key.
macro_rules! parsed {
    ($($type:ty),+) => { $(
        impl $crate::settings::Scalar for $type {
            type Limit = ();
            const PLURAL: &'static str = "texts";

            fn read(
                found: &$crate::settings::Content,
                _: &$crate::settings::Limits<()>,
            ) -> Result<Self, String> {
                found.text("a text in quotes")?.parse()
            }

            fn shown(&self) -> String {
                $crate::settings::Scalar::shown(&self.to_string())
            }
        }
    )+ };
}
pub(crate) use parsed;
