//! The plan of a dataset's files: samples by groups, and groups cut into files of a wanted size.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

use super::Sample;
use crate::data::group::{Layout, SampleTensor};
use crate::data::{DataType, LENGTHS, TEXTS, latents_key};
use crate::files::sha256;

/// One file to write.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shard {
    pub path: String,
    pub group: String,
    /// Times that an epoch takes each of its samples.
    pub repeats: u64,
    /// Indices of its samples.
    pub samples: Vec<usize>,
}

/// Files to write, and how their tensors are stored.
#[derive(Debug)]
pub(super) struct Plan {
    pub shards: Vec<Shard>,
    /// Texts that are stored one after another, with their lengths.
    pub unequal: BTreeSet<String>,
}

impl Plan {
    /// Divides the samples, taken in this `order`, into files of at most `max_bytes` each; a larger
    /// sample gets a file of its own. The samples of a file have the same `repeats`.
    pub fn new(
        samples: &[Sample],
        order: &[usize],
        data_type: DataType,
        max_bytes: u64,
        repeats: impl Fn(usize) -> u64,
    ) -> Self {
        let unequal = unequal_texts(|| samples.iter().map(|sample| &sample.layout));
        let mut groups: Vec<(Layout, Vec<usize>)> = Vec::new();
        let mut by_layout: BTreeMap<String, usize> = BTreeMap::new();
        for &index in order {
            let layout = of_group(&samples[index].layout, &unequal);
            let group = *by_layout.entry(format!("{layout:?}")).or_insert_with(|| {
                groups.push((layout, Vec::new()));
                groups.len() - 1
            });
            groups[group].1.push(index);
        }
        let mut names = BTreeSet::new();
        let mut shards = Vec::new();
        for (layout, members) in groups {
            let name = free_name(&mut names, &sizes(&layout, data_type));
            let mut by_repeats: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
            for index in members {
                by_repeats.entry(repeats(index)).or_default().push(index);
            }
            let cut = by_repeats.into_iter().flat_map(|(repeats, members)| {
                let cut = cut(&members, max_bytes, |index| bytes_of(&samples[index].layout));
                cut.into_iter().map(move |samples| (repeats, samples))
            });
            shards.extend((0..).zip(cut).map(|(number, (repeats, samples))| Shard {
                path: format!("{name}-{number:05}.safetensors"),
                group: name.clone(),
                repeats,
                samples,
            }));
        }
        Plan { shards, unequal }
    }

    /// Returns a hash of the plan and the samples: work on an equal one can go on.
    pub fn fingerprint(&self, samples: &[Sample]) -> String {
        let mut hash = Sha256::new();
        for shard in &self.shards {
            hash.update(format!("{shard:?}\n"));
        }
        for Sample { layout, caption, origin } in samples {
            hash.update(format!("{layout:?} {caption:?} {origin:?}\n"));
        }
        sha256::hex(hash)
    }
}

/// Returns the texts that some sample holds without padding, or whose lengths differ though no
/// sample has a mask.
pub(super) fn unequal_texts<'l, I>(layouts: impl Fn() -> I) -> BTreeSet<String>
where
    I: Iterator<Item = &'l Layout>,
{
    let is_unequal = |text: &str, mask: &str| {
        let found = || layouts().filter_map(|layout| layout.get(text));
        let masked = layouts().any(|layout| layout.contains_key(mask));
        let lengths: BTreeSet<Option<i64>> =
            found().map(|tensor| tensor.shape.first().copied()).collect();
        found().any(|tensor| tensor.unequal) || (lengths.len() > 1 && !masked)
    };
    let texts = TEXTS.iter().filter(|(text, mask)| is_unequal(text, mask));
    texts.map(|(text, _)| text.to_string()).collect()
}

/// True if a text of samples of this layout is stored without padding. Beside a mask of their own
/// it stays as it is: the mask would follow from the lengths.
pub(super) fn is_unequal(key: &str, layout: &Layout, unequal: &BTreeSet<String>) -> bool {
    let has_mask = TEXTS.iter().any(|(text, mask)| *text == key && layout.contains_key(*mask));
    unequal.contains(key) && !has_mask
}

/// Returns what the samples of a group have in common.
pub(super) fn of_group(layout: &Layout, unequal: &BTreeSet<String>) -> Layout {
    let common = |(key, tensor): (&String, &SampleTensor)| {
        let mut tensor = tensor.clone();
        if is_unequal(key, layout, unequal) {
            tensor.unequal = true;
            tensor.shape.iter_mut().take(1).for_each(|length| *length = 0);
        }
        (key.clone(), tensor)
    };
    layout.iter().map(common).collect()
}

/// Returns the latents' size without channels, as `64x64` or `21x60x104`.
pub(super) fn sizes(layout: &Layout, data_type: DataType) -> String {
    let shape = layout.get(latents_key(data_type)).map_or(&[][..], |tensor| &tensor.shape);
    let sizes: Vec<String> = shape.iter().skip(1).map(i64::to_string).collect();
    sizes.join("x")
}

/// Returns the name, or the first of `name-2`, `name-3`, … that is free.
pub(super) fn free_name(taken: &mut BTreeSet<String>, name: &str) -> String {
    let further = (2..).map(|number| format!("{name}-{number}"));
    let mut names = std::iter::once(name.to_string()).chain(further);
    let free = names.find(|name| !taken.contains(name)).expect("one of infinitely many");
    taken.insert(free.clone());
    free
}

/// Returns the bytes of one sample.
pub(super) fn bytes_of(layout: &Layout) -> u64 {
    let bytes = |tensor: &SampleTensor| {
        tensor.shape.iter().product::<i64>() as u64 * tensor.kind.elt_size_in_bytes() as u64
    };
    layout.values().map(bytes).sum()
}

fn cut(members: &[usize], max_bytes: u64, bytes: impl Fn(usize) -> u64) -> Vec<Vec<usize>> {
    let mut cut: Vec<Vec<usize>> = Vec::new();
    let mut filled = 0;
    for &index in members {
        let more = bytes(index);
        match cut.last_mut() {
            Some(last) if filled + more <= max_bytes => last.push(index),
            _ => {
                cut.push(vec![index]);
                filled = 0;
            }
        }
        filled += more;
    }
    cut
}

/// Returns the key of a text's lengths.
pub(super) fn lengths_key(key: &str) -> String {
    format!("{key}{LENGTHS}")
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::data::Caption;

    fn sample(side: i64, tokens: i64, unequal: bool) -> Sample {
        let tensor = |shape: &[i64], unequal| SampleTensor {
            kind: Kind::Half,
            shape: shape.to_vec(),
            unequal,
        };
        let layout = Layout::from([
            ("image_latents".into(), tensor(&[1, side, side], false)),
            ("text_embeddings".into(), tensor(&[tokens, 2], unequal)),
        ]);
        Sample { layout, caption: Caption::default(), origin: String::new() }
    }

    fn unpadded() -> SampleTensor {
        SampleTensor { kind: Kind::Half, shape: vec![4, 2], unequal: true }
    }

    fn plan(samples: &[Sample], max_bytes: u64) -> Plan {
        let order: Vec<usize> = (0..samples.len()).collect();
        Plan::new(samples, &order, DataType::Image, max_bytes, |_| 1)
    }

    #[test]
    fn files_are_as_full_as_they_may_be() {
        // 8 + 16 bytes each.
        let samples = vec![sample(2, 4, false); 5];
        let paths: Vec<(String, usize)> = plan(&samples, 50)
            .shards
            .into_iter()
            .map(|shard| (shard.path, shard.samples.len()))
            .collect();
        let expected = [
            ("2x2-00000.safetensors", 2),
            ("2x2-00001.safetensors", 2),
            ("2x2-00002.safetensors", 1),
        ];
        assert_eq!(paths, expected.map(|(path, count)| (path.into(), count)));
        assert_eq!(plan(&samples, 1).shards.len(), 5, "a giant stands alone");
    }

    #[test]
    fn samples_that_are_repeated_unlike_share_a_group_and_no_file() {
        let samples = vec![sample(2, 4, false); 5];
        let repeats = |index: usize| if index == 1 || index == 4 { 3 } else { 1 };
        let plan = Plan::new(&samples, &[0, 1, 2, 3, 4], DataType::Image, 1 << 20, repeats);
        let found: Vec<(&str, u64, &[usize])> = plan
            .shards
            .iter()
            .map(|shard| (shard.group.as_str(), shard.repeats, shard.samples.as_slice()))
            .collect();
        assert_eq!(found, [("2x2", 1, &[0, 2, 3][..]), ("2x2", 3, &[1, 4])]);
    }

    #[test]
    fn samples_share_a_group_if_all_but_the_lengths_of_their_texts_agree() {
        let groups = |samples: &[Sample]| {
            let plan = plan(samples, 1 << 20);
            let groups: Vec<String> = plan.shards.into_iter().map(|shard| shard.group).collect();
            (groups.join(" "), plan.unequal.len())
        };
        let equal = [sample(2, 4, false), sample(2, 4, false), sample(4, 4, false)];
        assert_eq!(groups(&equal), ("2x2 4x4".into(), 0));
        let unequal = [sample(2, 4, false), sample(2, 9, false)];
        assert_eq!(groups(&unequal), ("2x2".into(), 1));
        assert_eq!(groups(&[sample(2, 4, true)]), ("2x2".into(), 1), "they are by their nature");
        let mut masked = unequal;
        for sample in &mut masked {
            let tokens = sample.layout["text_embeddings"].shape[0];
            let mask = SampleTensor { kind: Kind::Int64, shape: vec![tokens], unequal: false };
            sample.layout.insert("text_mask".into(), mask);
        }
        assert_eq!(groups(&masked), ("2x2 2x2-2".into(), 0), "a mask stays with its padding");
        masked[0].layout.remove("text_mask");
        masked[0].layout.insert("text_embeddings".into(), unpadded());
        assert_eq!(groups(&masked), ("2x2 2x2-2".into(), 1));
        let texts = BTreeSet::from(["text_embeddings".to_string()]);
        let is_unequal =
            |number: usize| is_unequal("text_embeddings", &masked[number].layout, &texts);
        assert_eq!([is_unequal(0), is_unequal(1)], [true, false], "beside its mask it is padded");
    }
}
