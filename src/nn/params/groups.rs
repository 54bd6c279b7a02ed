//! Neighbouring parameters of a flat buffer that an optimizer updates by the same numbers.

use std::ops::Range;

use super::ParamSet;

/// Consecutive elements that are updated by the same learning rate and, where they decay, by the
/// same weight decay.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub elements: Range<i64>,
    /// Factor of the learning rate.
    pub lr_factor: f64,
    /// Factor of the weight decay.
    pub decay_factor: f64,
    /// Runs `(offset, length)` that weight decay applies to, counted from the group's first
    /// element.
    pub decayed: Vec<(i64, i64)>,
}

impl Group {
    /// Intersects the group with a range of the buffer; its elements are then counted from the
    /// range's first one. `None` if nothing is left.
    pub fn within(&self, range: &Range<i64>) -> Option<Group> {
        let (start, end) = (self.elements.start.max(range.start), self.elements.end.min(range.end));
        let run = |&(offset, length): &(i64, i64)| {
            let first = (self.elements.start + offset).max(start);
            let last = (self.elements.start + offset + length).min(end);
            (first < last).then_some((first - start, last - first))
        };
        (start < end).then(|| Group {
            elements: start - range.start..end - range.start,
            decayed: self.decayed.iter().filter_map(run).collect(),
            ..*self
        })
    }

    /// Adds neighbouring elements.
    fn grow(&mut self, length: i64, decays: bool) {
        let offset = self.elements.end - self.elements.start;
        match self.decayed.last_mut() {
            Some((start, run)) if decays && *start + *run == offset => *run += length,
            _ if decays => self.decayed.push((offset, length)),
            _ => {}
        }
        self.elements.end += length;
    }
}

impl ParamSet {
    /// The elements of the flat buffer by the factors of their update; what does not decay goes
    /// with any weight decay, so that a stage without factors is one group.
    pub fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        let mut start = 0;
        for info in self.infos() {
            let (decays, length) = (info.decay_factor != 0.0, info.numel());
            let fits = |group: &&mut Group| {
                let alike = group.decayed.is_empty() || group.decay_factor == info.decay_factor;
                group.lr_factor == info.lr_factor && (!decays || alike)
            };
            match groups.last_mut().filter(fits) {
                Some(group) => {
                    if decays {
                        group.decay_factor = info.decay_factor;
                    }
                    group.grow(length, decays);
                }
                None => {
                    let mut group = Group {
                        elements: start..start,
                        lr_factor: info.lr_factor,
                        decay_factor: info.decay_factor,
                        decayed: Vec::new(),
                    };
                    group.grow(length, decays);
                    groups.push(group);
                }
            }
            start += length;
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Builder, Init, Rows};

    /// Parameters of 6 and 3 elements in turns: matrices and biases.
    fn set() -> ParamSet {
        let mut set = ParamSet::new("block");
        let mut builder = Builder::new(&mut set, "block", Rows::Image);
        for layer in ["a", "b"] {
            builder.at(layer).param("weight", &[3, 2], Init::Zeros);
            builder.at(layer).param("bias", &[3], Init::Zeros);
        }
        set
    }

    fn group(elements: Range<i64>, factors: (f64, f64), decayed: &[(i64, i64)]) -> Group {
        let (lr_factor, decay_factor) = factors;
        Group { elements, lr_factor, decay_factor, decayed: decayed.to_vec() }
    }

    #[test]
    fn without_factors_a_stage_is_one_group_of_which_matrices_decay() {
        assert_eq!(set().groups(), [group(0..18, (1.0, 1.0), &[(0, 6), (9, 6)])]);
        let all = set().with_each(|info| info.decay_factor = 1.0);
        assert_eq!(all.groups(), [group(0..18, (1.0, 1.0), &[(0, 18)])], "neighbours are joined");
    }

    #[test]
    fn a_group_ends_where_a_factor_changes() {
        let set = set().with_each(|info| match info.name.as_str() {
            "block.a.bias" => info.lr_factor = 0.1,
            "block.b.weight" => info.decay_factor = 3.0,
            _ => {}
        });
        let expected = [
            group(0..6, (1.0, 1.0), &[(0, 6)]),
            group(6..9, (0.1, 0.0), &[]),
            group(9..18, (1.0, 3.0), &[(0, 6)]),
        ];
        assert_eq!(set.groups(), expected);
    }

    #[test]
    fn a_range_of_the_buffer_has_its_part_of_each_group() {
        let groups = set().groups();
        let part = groups[0].within(&(4..11)).expect("a part");
        assert_eq!((part.elements, part.decayed), (0..7, vec![(0, 2), (5, 2)]));
        let part = groups[0].within(&(16..40)).expect("a part");
        assert_eq!((part.elements, part.decayed), (0..2, vec![]));
        assert_eq!(groups[0].within(&(18..40)), None);
    }
}
