//! Families of interchangeable implementations; a name in the configuration selects one.

/// Declares a family behind one trait, with one line `name => Variant(Settings)` for each member.
///
/// The enum derefs to the trait, implements [`Family`](crate::settings::Family), and defaults to
/// the first member.
///
/// Members without settings of their own are chosen by a word: `name => Variant = value` a line.
/// The enum then derefs to the value and is a [`Choice`](crate::settings::Choice).
macro_rules! registry {
    (
        $(#[$attribute:meta])*
        pub enum $choice:ident: $part:ident by word {
            $( $(#[$meaning:meta])+ $name:literal => $Variant:ident = $value:expr, )+
        }
    ) => {
        $crate::settings::choice! {
            $(#[$attribute])*
            pub enum $choice { $( $(#[$meaning])+ $name => $Variant, )+ }
        }

        impl ::std::ops::Deref for $choice {
            type Target = $part;
            fn deref(&self) -> &$part {
                match self { $(Self::$Variant => const { &$value },)+ }
            }
        }
    };

    (
        $(#[$attribute:meta])*
        pub enum $family:ident: $part:ident {
            $first:literal => $First:ident($first_type:ty),
            $( $name:literal => $Variant:ident($type:ty), )*
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Debug, PartialEq)]
        pub enum $family { $First($first_type), $($Variant($type),)* }

        impl Default for $family {
            fn default() -> Self {
                Self::$First(Default::default())
            }
        }

        impl ::std::ops::Deref for $family {
            type Target = dyn $part;
            fn deref(&self) -> &Self::Target {
                match self { Self::$First(part) => part, $(Self::$Variant(part) => part,)* }
            }
        }

        impl $crate::settings::Family for $family {
            const NAMES: &'static [&'static str] = &[$first, $($name,)*];
            fn named(name: &str) -> Option<Self> {
                match name {
                    $first => Some(Self::$First(Default::default())),
                    $($name => Some(Self::$Variant(Default::default())),)*
                    _ => None,
                }
            }
            fn name(&self) -> &'static str {
                match self { Self::$First(_) => $first, $(Self::$Variant(_) => $name,)* }
            }
            fn settings(&mut self) -> &mut dyn $crate::settings::Settings {
                match self { Self::$First(part) => part, $(Self::$Variant(part) => part,)* }
            }
        }
    };
}
pub(crate) use registry;
