//! `settings!`: one table a struct, one entry a setting.

/// Declares a struct of settings with its documented fields, its `Default` and its
/// [`Settings`](crate::settings::Settings).
///
/// ```text
/// settings! {
///     /// `[noise]`.
///     pub struct Noise {
///         /// Steps from noise to data.
///         ///
///         /// More than 50 change nothing that an eye sees.
///         pub num_steps: i64 = 50, in 1..=10_000;
///         /// The shape of the noise.
///         pub shape: Shape, as table;
///     }
/// }
/// ```
///
/// The first paragraph of an entry's doc lines is its comment in the listing of `fm-dist config`;
/// `cargo doc` shows all of them, the default and the range. Without a default the type's own
/// holds. The type says how a value is read and shown ([`Value`](crate::settings::Value)). Behind
/// `in` stands the range of a number, or of each of several. Behind `as` stands the way of a field
/// that is no value: a method of [`Keys`](crate::settings::Keys).
macro_rules! settings {
    (
        $(#[$attribute:meta])*
        $visibility:vis struct $name:ident {
            $(
                $(#[doc = $doc:literal])+
                $field_visibility:vis $field:ident: $type:ty
                    $(= $default:expr)? $(, in $range:expr)? $(, as $way:ident)?;
            )+
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Debug, PartialEq)]
        $visibility struct $name {
            $(
                $(#[doc = $doc])+
                $(#[doc = concat!("\n\nDefault: `", stringify!($default), "`.")])?
                $(#[doc = concat!("Range: `", stringify!($range), "`.")])?
                $field_visibility $field: $type,
            )+
        }

        impl Default for $name {
            fn default() -> Self {
                $name { $($field: $crate::settings::settings!(@default $($default)?),)+ }
            }
        }

        impl $crate::settings::Settings for $name {
            fn visit(&mut self, keys: &mut dyn $crate::settings::Keys) {
                $(
                    let key = $crate::settings::Key {
                        name: stringify!($field),
                        meaning: &$crate::settings::first_paragraph(&[$($doc),+]),
                    };
                    $crate::settings::settings!(
                        @show keys, key, self.$field $(, in $range)? $(, as $way)?
                    );
                )+
            }
        }
    };

    (@default) => { Default::default() };
    (@default $default:expr) => { $default };

    (@show $keys:ident, $key:ident, $field:expr) => {
        $keys.value($key, &mut $crate::settings::unlimited(&mut $field))
    };
    (@show $keys:ident, $key:ident, $field:expr, in $range:expr) => {
        $keys.value($key, &mut $crate::settings::within(&mut $field, $range))
    };
    (@show $keys:ident, $key:ident, $field:expr, as $way:ident) => {
        $keys.$way($key, &mut $field)
    };
}
pub(crate) use settings;

/// The doc lines before the first empty one, as one line.
pub(crate) fn first_paragraph(lines: &[&str]) -> String {
    let paragraph = lines.iter().map(|line| line.trim()).take_while(|line| !line.is_empty());
    paragraph.collect::<Vec<_>>().join(" ")
}
