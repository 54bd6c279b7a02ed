//! A table's keys as its settings show them, one by one, to whoever reads or writes them.

use std::ops::{Deref, DerefMut, RangeBounds};

use super::limits::Limits;
use super::tree::Node;
use super::value::{Misfit, Value};
use super::words::{not_among, quoted};

/// A struct whose fields come from a table of the configuration. Made by `settings!`; `Default`
/// gives the documented defaults.
pub trait Settings {
    /// Shows every key of the table to `keys`, in the order of the listing.
    fn visit(&mut self, keys: &mut dyn Keys);
}

/// Interchangeable parts of which the configuration names one: `[optimizer.adamw]`. Made by
/// `registry!`.
pub trait Family: Sized {
    /// Every name, in the order of the listing.
    const NAMES: &'static [&'static str];
    /// The member of that name with default settings.
    fn named(name: &str) -> Option<Self>;
    /// The name of this member.
    fn name(&self) -> &'static str;
    /// The settings of this member.
    fn settings(&mut self) -> &mut dyn Settings;
}

/// A key's name, and its meaning for the listing.
#[derive(Clone, Copy, Debug)]
pub struct Key<'k> {
    pub(crate) name: &'k str,
    pub(crate) meaning: &'k str,
}

/// Visitor of the keys of a settings struct: a reader or a writer, at one table of the document.
/// Each method is one way in which a field appears in the document.
pub trait Keys {
    /// `name = value`.
    fn value(&mut self, key: Key<'_>, field: &mut dyn Field);

    /// A table: `[name]`.
    fn table(&mut self, key: Key<'_>, settings: &mut dyn Settings);

    /// An array of tables: `[[name]]`, none or several.
    fn tables(&mut self, key: Key<'_>, tables: &mut dyn Tables);

    /// A table that holds nothing but the table of one member: `[name.adamw]`.
    fn family(&mut self, key: Key<'_>, family: &mut dyn Members);

    /// The table of one member in this table: `[dit]`, whatever the field is called.
    fn member(&mut self, key: Key<'_>, family: &mut dyn Members);
}

impl dyn Keys + '_ {
    /// Keys in this very table, whatever the field is called.
    pub fn flat(&mut self, _: Key<'_>, settings: &mut dyn Settings) {
        settings.visit(self);
    }

    /// A member named by the key `name_type`, with its settings in the table `name`.
    pub fn named_family(&mut self, key: Key<'_>, family: &mut dyn Members) {
        let name_key = format!("{}_type", key.name);
        let meaning = format!("Arguments of the `{name_key}` chosen above.");
        self.value(Key { name: &name_key, ..key }, &mut MemberName(&mut *family));
        self.table(Key { meaning: &meaning, ..key }, family.settings());
    }
}

/// A field of settings as the value of a key.
pub trait Field {
    /// Sets the field to what the document has.
    ///
    /// # Errors
    /// Every part of it that does not fit; the field stays as it was.
    fn read(&mut self, found: &Node) -> Result<(), Vec<Misfit>>;

    /// The value as TOML on one line; none while it is unset.
    fn shown(&self) -> Option<String>;

    /// Every value, where there are a few only.
    fn words(&self) -> Vec<&'static str>;
}

/// A field of any [`Value`] and the range that it must lie in.
pub(crate) struct Limited<'f, T: Value> {
    field: &'f mut T,
    limits: Limits<T::Limit>,
}

/// The field without a range.
pub(crate) fn unlimited<T: Value>(field: &mut T) -> Limited<'_, T> {
    Limited { field, limits: Limits::none() }
}

/// The field, every number of which must lie in `range`.
pub(crate) fn within<T: Value>(field: &mut T, range: impl RangeBounds<T::Limit>) -> Limited<'_, T> {
    Limited { field, limits: Limits::of(range) }
}

impl<T: Value> Field for Limited<'_, T> {
    fn read(&mut self, found: &Node) -> Result<(), Vec<Misfit>> {
        *self.field = T::read(found, &self.limits)?;
        Ok(())
    }

    fn shown(&self) -> Option<String> {
        self.field.shown()
    }

    fn words(&self) -> Vec<&'static str> {
        T::words()
    }
}

/// A [`Family`] without its type.
pub trait Members {
    /// [`Family::NAMES`].
    fn names(&self) -> &'static [&'static str];

    /// The name of the chosen member.
    fn chosen(&self) -> &'static str;

    /// Chooses the member that the document names, which is one of [`Members::names`]. The settings
    /// of the one that is chosen already are kept, so that files and overrides add up.
    fn choose(&mut self, name: &str);

    /// The settings of the chosen member.
    fn settings(&mut self) -> &mut dyn Settings;
}

impl<F: Family> Members for F {
    fn names(&self) -> &'static [&'static str] {
        F::NAMES
    }

    fn chosen(&self) -> &'static str {
        self.name()
    }

    fn choose(&mut self, name: &str) {
        if self.name() != name {
            *self = F::named(name).expect("one of the family's names");
        }
    }

    fn settings(&mut self) -> &mut dyn Settings {
        Family::settings(self)
    }
}

/// The name of a family's member as the value of a key.
struct MemberName<'f>(&'f mut dyn Members);

impl Field for MemberName<'_> {
    fn read(&mut self, found: &Node) -> Result<(), Vec<Misfit>> {
        let names = self.0.names();
        let refused = |what| Misfit::whole(found, what);
        let name = found.content.text(&format!("one of {}", names.join(", "))).map_err(refused)?;
        if !names.contains(&name) {
            return Err(refused(not_among("value", name, names)));
        }
        self.0.choose(name);
        Ok(())
    }

    fn shown(&self) -> Option<String> {
        Some(quoted(self.0.chosen()))
    }

    fn words(&self) -> Vec<&'static str> {
        self.0.names().to_vec()
    }
}

/// The tables of an array.
pub trait Tables {
    /// Makes them `count` tables of defaults.
    fn reset(&mut self, count: usize);

    fn all(&mut self) -> Vec<&mut dyn Settings>;

    /// A table of defaults, for the listing of an empty array.
    fn example(&self) -> Box<dyn Settings>;
}

impl<T: Settings + Default + 'static> Tables for Vec<T> {
    fn reset(&mut self, count: usize) {
        *self = (0..count).map(|_| T::default()).collect();
    }

    fn all(&mut self) -> Vec<&mut dyn Settings> {
        self.iter_mut().map(|table| table as &mut dyn Settings).collect()
    }

    fn example(&self) -> Box<dyn Settings> {
        Box::new(T::default())
    }
}

/// A family's member, and whether a document names it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Named<F> {
    member: F,
    /// True once a document has named the member; before, it is the default one.
    pub is_named: bool,
}

impl<F> Deref for Named<F> {
    type Target = F;

    fn deref(&self) -> &F {
        &self.member
    }
}

impl<F> DerefMut for Named<F> {
    fn deref_mut(&mut self) -> &mut F {
        &mut self.member
    }
}

impl<F: Family> Members for Named<F> {
    fn names(&self) -> &'static [&'static str] {
        F::NAMES
    }

    fn chosen(&self) -> &'static str {
        self.member.name()
    }

    fn choose(&mut self, name: &str) {
        self.member.choose(name);
        self.is_named = true;
    }

    fn settings(&mut self) -> &mut dyn Settings {
        Family::settings(&mut self.member)
    }
}
