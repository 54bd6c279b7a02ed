//! Names of linear maps, one file a family.
//!
//! Three parties name them: diffusers, whose names are ours; the published single file, which
//! ComfyUI loads; and kohya's trainers (sd-scripts, musubi-tuner), which mostly have the single
//! file's names. Where the single file holds several maps as one matrix, its rows are cut.

mod flux;
mod flux2;
mod hunyuan_video15;
mod qwen_image;
mod wan;

use crate::registry::registry;

registry! {
    /// A family whose LoRAs are read and written; the words are those of `[model.<name>]`.
    pub enum Family: Names by word {
        /// FLUX.1.
        "flux" => Flux = flux::NAMES,
        /// FLUX.2.
        "flux2" => Flux2 = flux2::NAMES,
        /// Qwen-Image.
        "qwen_image" => QwenImage = qwen_image::NAMES,
        /// Wan 2.1 and 2.2.
        "wan" => Wan = wan::NAMES,
        /// HunyuanVideo 1.5.
        "hunyuan_video15" => HunyuanVideo15 = hunyuan_video15::NAMES,
    }
}

/// A family's names.
#[derive(Debug)]
pub struct Names {
    /// The family's name in messages.
    pub title: &'static str,
    /// Beginning of `modelspec.architecture` in a file's metadata.
    pub architecture: &'static str,
    /// `ss_base_model_version` of kohya's metadata.
    pub version: &'static str,
    /// `ss_network_module` of kohya's metadata.
    pub network: &'static str,
    pub published: &'static [Published],
    pub linears: &'static [Linear],
}

/// Sizes of a published model, by which families with equal names are told apart.
#[derive(Debug)]
pub struct Published {
    /// Features of a token.
    pub width: i64,
    /// Number of `transformer_blocks`.
    pub double: u32,
    /// Number of `single_transformer_blocks`.
    pub single: u32,
}

/// One linear map, or one in every block: `*` in its names stands for the block's number.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    pub diffusers: &'static str,
    /// Its place in the published single file.
    pub native: Place,
    /// Its place in kohya's trainers.
    pub kohya: Place,
}

/// A matrix of another program, and the rows of it that are meant.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub name: &'static str,
    pub part: Part,
}

/// Rows of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// All, with the first half behind the second: a shift and a scale in the other order.
    Swapped,
    /// One of the maps that lie one below the other. `of`: their outputs, as multiples of the
    /// inputs.
    Slice {
        of: &'static [i64],
        index: usize,
    },
}

/// Queries, keys and values as one matrix.
const QKV: &[i64] = &[1, 1, 1];

/// A map under the same or another name elsewhere.
const fn plain(diffusers: &'static str, native: &'static str) -> Linear {
    part(diffusers, native, Part::Whole)
}

/// A map that is one of several in a matrix elsewhere.
const fn slice(
    diffusers: &'static str,
    native: &'static str,
    of: &'static [i64],
    index: usize,
) -> Linear {
    part(diffusers, native, Part::Slice { of, index })
}

const fn part(diffusers: &'static str, native: &'static str, part: Part) -> Linear {
    let place = Place { name: native, part };
    Linear { diffusers, native: place, kohya: place }
}

impl Linear {
    /// The same map with a whole matrix of its own in kohya's trainers.
    const fn apart(self, name: &'static str) -> Self {
        Linear { kohya: Place { name, part: Part::Whole }, ..self }
    }

    /// The same map with another name in kohya's trainers.
    const fn renamed(self, name: &'static str) -> Self {
        Linear { kohya: Place { name, part: self.native.part }, ..self }
    }
}

/// A linear map that a name stands for, alone or with others.
#[derive(Clone, Copy, Debug)]
pub struct Match<'n> {
    pub linear: &'static Linear,
    pub part: Part,
    /// The block's number, or nothing.
    pub number: &'n str,
}

impl Match<'_> {
    /// Returns diffusers' name.
    pub fn name(&self) -> String {
        self.linear.diffusers.replace('*', self.number)
    }
}

impl Names {
    /// Returns the maps that a name stands for in any of the spellings, with dots or underscores;
    /// none if it is unknown.
    pub fn matches<'n>(&self, name: &'n str) -> Vec<Match<'n>> {
        let spellings: [fn(&Linear) -> Place; 3] = [
            |linear| Place { name: linear.diffusers, part: Part::Whole },
            |linear| linear.native,
            |linear| linear.kohya,
        ];
        let found = spellings.iter().map(|spelling| {
            let of = |linear: &'static Linear| {
                let place = spelling(linear);
                number(place.name, name).map(|number| Match { linear, part: place.part, number })
            };
            self.linears.iter().filter_map(of).collect::<Vec<_>>()
        });
        found.into_iter().find(|matches| !matches.is_empty()).unwrap_or_default()
    }

    /// Returns the map that diffusers calls so.
    pub fn linear<'n>(&self, name: &'n str) -> Option<Match<'n>> {
        let of =
            |linear: &'static Linear| number(linear.diffusers, name).map(|number| (linear, number));
        let (linear, number) = self.linears.iter().find_map(of)?;
        (linear.diffusers.replace('*', number) == name).then_some(Match {
            linear,
            part: Part::Whole,
            number,
        })
    }

    /// Returns all names that a block of that number has in any spelling, and those of no block.
    pub fn spelled(&self, number: &str) -> Vec<String> {
        let names = |linear: &Linear| [linear.diffusers, linear.native.name, linear.kohya.name];
        self.linears.iter().flat_map(names).map(|name| name.replace('*', number)).collect()
    }
}

/// Returns what stands for `*` if the name is that of the template but for dots and underscores.
fn number<'n>(template: &str, name: &'n str) -> Option<&'n str> {
    let alike = |a: &str, b: &str| {
        let flat = |byte: u8| if byte == b'.' { b'_' } else { byte };
        a.len() == b.len() && a.bytes().map(flat).eq(b.bytes().map(flat))
    };
    let Some((before, after)) = template.split_once('*') else {
        return alike(template, name).then_some("");
    };
    let (start, end) = (before.len(), name.len().checked_sub(after.len())?);
    let [found_before, number, found_after] =
        [name.get(..start)?, name.get(start..end)?, name.get(end..)?];
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && alike(before, found_before) && alike(after, found_after)).then_some(number)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::settings::Choice;

    #[test]
    fn each_name_of_each_spelling_leads_back_to_its_maps() {
        for (_, family) in Family::ALL {
            let names: BTreeSet<&str> =
                family.linears.iter().map(|linear| linear.diffusers).collect();
            assert_eq!(names.len(), family.linears.len(), "{}: a name stands twice", family.title);
            for linear in family.linears {
                let numbered = |name: &str| name.replace('*', "17");
                let own = numbered(linear.diffusers);
                assert_eq!(family.linear(&own).expect("its own name").name(), own);
                for place in [linear.native, linear.kohya] {
                    for name in [numbered(place.name), numbered(place.name).replace('.', "_")] {
                        let matches = family.matches(&name);
                        let meant = matches.iter().find(|found| found.name() == own);
                        let meant = meant.unwrap_or_else(|| panic!("{own} is not under {name}"));
                        assert_eq!(meant.part, place.part, "{own} under {name}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_slices_of_a_matrix_are_all_there_and_nothing_else_has_its_name() {
        for (_, family) in Family::ALL {
            for place in family.linears.iter().flat_map(|linear| [linear.native, linear.kohya]) {
                let parts: Vec<Part> = family
                    .matches(place.name.replace('*', "0").as_str())
                    .iter()
                    .map(|found| found.part)
                    .collect();
                match place.part {
                    Part::Slice { of, .. } => {
                        let all = (0..of.len()).map(|index| Part::Slice { of, index });
                        assert_eq!(parts, all.collect::<Vec<_>>(), "{}", place.name);
                    }
                    part => assert_eq!(parts, [part], "{}", place.name),
                }
            }
        }
    }

    #[test]
    fn numbers_are_numbers() {
        assert_eq!(number("blocks.*.attn.to_q", "blocks.12.attn.to_q"), Some("12"));
        assert_eq!(number("blocks.*.attn.to_q", "blocks_12_attn_to_q"), Some("12"));
        for name in ["blocks.x.attn.to_q", "blocks..attn.to_q", "blocks.1.attn.to_k", "b", ""] {
            assert_eq!(number("blocks.*.attn.to_q", name), None, "{name}");
        }
        assert_eq!(number("blocks.*", "blöcks.1"), None);
    }
}
