//! Which blocks of the global batch are a rank's. Integers only.

/// One rank's part of every step. A block is a micro-batch's samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub rank: usize,
    pub world_size: usize,
    /// Micro-batches of one rank in one step.
    pub micro_batches: usize,
    /// Samples in a micro-batch.
    pub micro_batch_size: usize,
    /// Whether a rank's blocks are neighbours in the global batch; otherwise those of a micro-batch
    /// are, rank after rank.
    pub neighbours: bool,
}

impl Share {
    /// Samples of one step over all ranks.
    pub fn global_batch(&self) -> usize {
        self.num_blocks() * self.micro_batch_size
    }

    /// Number within the global batch of this rank's micro-batch.
    pub fn block(&self, micro_batch: usize) -> usize {
        if self.neighbours {
            self.rank * self.micro_batches + micro_batch
        } else {
            micro_batch * self.world_size + self.rank
        }
    }

    /// Rank and micro-batch of each block, in the order of the global batch.
    pub fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        let Share { world_size, micro_batches, neighbours, .. } = *self;
        let place = move |block: usize| match neighbours {
            true => (block / micro_batches, block % micro_batches),
            false => (block % world_size, block / world_size),
        };
        (0..self.num_blocks()).map(place)
    }

    fn num_blocks(&self) -> usize {
        self.world_size * self.micro_batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_has_one_place() {
        for (world_size, micro_batches) in [(1, 4), (4, 1), (2, 3)] {
            for neighbours in [false, true] {
                let of = |rank| Share {
                    rank,
                    world_size,
                    micro_batches,
                    micro_batch_size: 2,
                    neighbours,
                };
                let blocks: Vec<usize> =
                    of(0).places().map(|(rank, micro_batch)| of(rank).block(micro_batch)).collect();
                assert_eq!(
                    blocks,
                    (0..world_size * micro_batches).collect::<Vec<_>>(),
                    "{world_size} {neighbours}"
                );
            }
        }
    }
}
