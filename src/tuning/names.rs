//! Patterns of names of parameters and modules.

use std::collections::BTreeSet;

use crate::settings::GlobMap;

/// True if a pattern means a parameter: its name, or that of its module or of one around it.
pub fn matched(glob: &str, parameter: &str) -> bool {
    let ends = parameter.match_indices('.').map(|(end, _)| end).chain([parameter.len()]);
    ends.into_iter().any(|end| means(glob, &parameter[..end]))
}

/// True if a pattern means a module: its whole name, or the end of it behind a dot, as PEFT takes
/// the names of a list. `*` stands for any letters, dots included, `?` for one.
pub fn means(glob: &str, module: &str) -> bool {
    let ends = module.match_indices('.').map(|(dot, _)| dot + 1);
    std::iter::once(0).chain(ends).any(|start| fits(glob.as_bytes(), &module.as_bytes()[start..]))
}

/// True if the whole text fits the pattern.
fn fits(glob: &[u8], text: &[u8]) -> bool {
    // The last star, and where the text behind it begins.
    let (mut at, mut place, mut star) = (0, 0, None);
    while place < text.len() {
        match glob.get(at) {
            Some(b'*') => {
                star = Some((at, place));
                at += 1;
            }
            Some(letter) if *letter == b'?' || *letter == text[place] => {
                at += 1;
                place += 1;
            }
            _ => {
                let Some((last, begun)) = star else { return false };
                star = Some((last, begun + 1));
                (at, place) = (last + 1, begun + 1);
            }
        }
    }
    glob[at..].iter().all(|letter| *letter == b'*')
}

/// Returns the value of the longest pattern that fits, so that the order in which they are written,
/// and kept, does not matter.
pub fn longest<T>(map: &GlobMap<T>, fits: impl Fn(&str) -> bool) -> Option<&T> {
    let fitting = map.0.iter().filter(|(glob, _)| fits(glob));
    fitting.max_by_key(|(glob, _)| (glob.len(), glob)).map(|(_, value)| value)
}

/// Returns the part of a name that is most like a pattern that matches none: as many of its words
/// as the pattern has.
pub fn nearest<'n>(glob: &str, names: impl Iterator<Item = &'n str>) -> String {
    let count = glob.matches('.').count() + 1;
    let parts: BTreeSet<&str> = names.flat_map(|name| parts(name, count)).collect();
    let likeness = |name: &str| strsim::jaro_winkler(glob, name);
    let best = parts.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)).then(b.cmp(a)));
    best.map_or_else(|| "none".into(), |name| format!("`{name}`"))
}

/// Returns each run of so many words of a name; the name itself if it has fewer.
fn parts(name: &str, count: usize) -> Vec<&str> {
    let dots = || name.match_indices('.').map(|(dot, _)| dot);
    let starts: Vec<usize> = std::iter::once(0).chain(dots().map(|dot| dot + 1)).collect();
    let ends: Vec<usize> = dots().chain([name.len()]).collect();
    match ends.get(count - 1..) {
        Some(ends) => starts.iter().zip(ends).map(|(start, end)| &name[*start..*end]).collect(),
        None => vec![name],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_means_whole_names_and_ends_behind_a_dot() {
        let module = "transformer_blocks.12.attn.to_out.0";
        for glob in [
            module,
            "to_out.0",
            "attn.to_out.0",
            "*.attn.to_out.0",
            "transformer_blocks.*.to_out.0",
            "transformer_blocks.1?.attn.*",
            "*",
        ] {
            assert!(means(glob, module), "{glob}");
        }
        for glob in ["to_out", "out.0", "blocks.12.attn.to_out.0", "transformer_blocks.1", "", "??"]
        {
            assert!(!means(glob, module), "{glob}");
        }
        assert!(!means("transformer_blocks.*.to_q", "single_transformer_blocks.0.attn.to_q"));
        assert!(means("a*b*c", "axxbyybzzc") && !means("a*b*c", "axxbyyb"));
    }

    #[test]
    fn a_parameter_is_meant_by_its_own_name_and_by_modules_around_it() {
        let name = "blocks.3.attn1.to_q.bias";
        for glob in [name, "to_q", "attn1", "blocks.3", "blocks.*", "*.bias", "blocks.3.*"] {
            assert!(matched(glob, name), "{glob}");
        }
        assert!(!matched("blocks.30", name) && !matched("to_k", name));
    }

    #[test]
    fn the_nearest_part_of_a_name_has_as_many_words_as_the_pattern() {
        let names = ["blocks.0.attn.to_q", "blocks.0.attn.to_k", "blocks.0.ffn.net.2"];
        assert_eq!(nearest("to_qq", names.into_iter()), "`to_q`");
        assert_eq!(nearest("atn.to_k", names.into_iter()), "`attn.to_k`");
        assert_eq!(nearest("blocs.1", names.into_iter()), "`blocks.0`");
        assert_eq!(nearest("block.0.attn.to_q.x.y", names.into_iter()), "`blocks.0.attn.to_q`");
    }
}
