//! Divides the blocks of the global batch among ranks. Integers only.

/// One rank's share of every step. A block is the samples of one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub rank: usize,
    pub world_size: usize,
    /// Number of micro-batches of one rank in one step.
    pub micro_batches: usize,
    /// Number of samples in a micro-batch.
    pub micro_batch_size: usize,
    /// True if a rank's blocks are adjacent in the global batch; otherwise the blocks of all ranks'
    /// first micro-batches come first, rank by rank, then those of the second.
    pub neighbours: bool,
}

impl Share {
    /// Returns the number of samples of one step over all ranks.
    pub fn global_batch(&self) -> usize {
        self.num_blocks() * self.micro_batch_size
    }

    /// Returns the index in the global batch of this rank's block for `micro_batch`.
    pub fn block(&self, micro_batch: usize) -> usize {
        if self.neighbours {
            self.rank * self.micro_batches + micro_batch
        } else {
            micro_batch * self.world_size + self.rank
        }
    }

    /// Returns rank and micro-batch of each block, in the order of the global batch.
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
                let share_of = |rank| Share {
                    rank,
                    world_size,
                    micro_batches,
                    micro_batch_size: 2,
                    neighbours,
                };
                let blocks: Vec<usize> = share_of(0)
                    .places()
                    .map(|(rank, micro_batch)| share_of(rank).block(micro_batch))
                    .collect();
                assert_eq!(
                    blocks,
                    (0..world_size * micro_batches).collect::<Vec<_>>(),
                    "{world_size} {neighbours}"
                );
            }
        }
    }
}
