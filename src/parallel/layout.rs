//! The part of a flat buffer that a rank owns. Integers only.

use std::ops::Range;

/// Slices start at multiples of this many elements, which are whole vectors in every kind, so that
/// an operator rounds an element the same way wherever a sharding cuts the buffer.
const ALIGNMENT: i64 = 64;

/// How the ranks of a world divide every flat buffer. Shards divide it among the ranks of one
/// group, and each shard is held by as many replicas. Grains divide it into the parts whose norms
/// are measured separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub num_shards: usize,
    pub shard: usize,
    pub num_replicas: usize,
    pub replica: usize,
    /// Grains of each rank. A norm is the sum over all grains in order, so it is the same for all
    /// numbers of ranks with the same product of ranks and grains.
    pub grains: usize,
}

impl Cut {
    /// One rank that holds everything.
    pub const WHOLE: Cut = Cut { num_shards: 1, shard: 0, num_replicas: 1, replica: 0, grains: 1 };

    /// This rank's index in the order of the flat buffers: shard by shard, replica by replica.
    pub fn index(&self) -> usize {
        self.shard * self.num_replicas + self.replica
    }
}

/// A flat buffer of `numel` elements under a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub numel: i64,
    /// `numel` plus the padding that makes all grains equally long.
    pub padded: i64,
    cut: Cut,
}

impl Layout {
    pub fn new(numel: i64, cut: Cut) -> Self {
        let unit = ALIGNMENT * (cut.num_shards * cut.num_replicas * cut.grains) as i64;
        let units = (numel + unit - 1) / unit;
        Layout { numel, padded: units * unit, cut }
    }

    /// True if this rank's shard is the whole buffer.
    pub fn is_whole(&self) -> bool {
        self.cut.num_shards == 1
    }

    /// This rank's shard of the padded buffer.
    pub fn owned(&self) -> Range<i64> {
        let length = self.padded / self.cut.num_shards as i64;
        let start = self.cut.shard as i64 * length;
        start..start + length
    }

    /// The grains that this rank measures, as ranges of its shard.
    pub fn grains(&self) -> impl Iterator<Item = Range<i64>> {
        let Cut { num_shards, num_replicas, replica, grains, .. } = self.cut;
        let length = self.padded / (num_shards * num_replicas * grains) as i64;
        let first = (replica * grains) as i64;
        (first..first + grains as i64).map(move |grain| grain * length..(grain + 1) * length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts(num_shards: usize, num_replicas: usize, grains: usize) -> Vec<Cut> {
        let indices = (0..num_shards)
            .flat_map(|shard| (0..num_replicas).map(move |replica| (shard, replica)));
        indices
            .map(|(shard, replica)| Cut { num_shards, shard, num_replicas, replica, grains })
            .collect()
    }

    #[test]
    fn shards_cover_the_buffer_once_whatever_its_length() {
        for numel in [0, 1, 63, 64, 65, 1000, 12_345] {
            for num_shards in [1, 2, 3, 4, 7] {
                let layouts: Vec<Layout> =
                    cuts(num_shards, 1, 1).into_iter().map(|cut| Layout::new(numel, cut)).collect();
                let mut end = 0;
                for layout in &layouts {
                    assert_eq!(layout.owned().start, end);
                    assert_eq!(layout.owned().start % ALIGNMENT, 0);
                    end = layout.owned().end;
                }
                assert_eq!(end, layouts[0].padded);
                let unit = ALIGNMENT * num_shards as i64;
                assert!(
                    (numel..numel + unit).contains(&end),
                    "{numel} elements on {num_shards} ranks take {end}"
                );
            }
        }
    }

    #[test]
    fn grains_of_all_ranks_in_order_of_place_cover_the_buffer_once() {
        for (num_shards, num_replicas, grains) in
            [(1, 4, 1), (4, 1, 1), (2, 2, 1), (2, 1, 4), (1, 1, 8)]
        {
            let mut end = 0;
            for cut in cuts(num_shards, num_replicas, grains) {
                let layout = Layout::new(1000, cut);
                for grain in layout.grains() {
                    assert_eq!(layout.owned().start + grain.start, end, "{cut:?}");
                    end = layout.owned().start + grain.end;
                }
            }
            assert_eq!(
                end,
                Layout::new(1000, Cut { num_shards, num_replicas, grains, ..Cut::WHOLE }).padded
            );
        }
    }

    #[test]
    fn grains_are_the_same_for_one_rank_and_for_many() {
        let layout =
            |num_shards, grains| Layout::new(999, Cut { num_shards, grains, ..Cut::WHOLE });
        let one: Vec<_> = layout(1, 8).grains().collect();
        assert_eq!(layout(8, 1).padded, layout(1, 8).padded);
        assert_eq!(layout(2, 4).grains().collect::<Vec<_>>(), one[..4]);
    }
}
