//! Groups of ranks: those that hold slices of one copy of the training state, and those that hold
//! the same slice.

use std::ops::{Add, Deref};

use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, Sliced, Solo, Spent, nodes};
use crate::error::{Error, Result};
use crate::parallel::layout::Cut;
use crate::parallel::{Sharding, ShardingGroup};

/// The shard groups and replica groups of a world. The ranks of a shard group hold the state
/// together, slice by slice; those of a replica group hold the same slice, and their gradients are
/// summed.
pub struct Sharing<'c> {
    pub sharding: Sharding,
    cut: Cut,
    shards: RankGroup<'c>,
    replicas: RankGroup<'c>,
    /// The rank at each index in the order of the flat buffers.
    ranks: Vec<usize>,
}

/// A group of ranks: the whole world, this rank alone, or a communicator that was split off.
enum RankGroup<'c> {
    World(&'c dyn Collective),
    Alone(Solo),
    Split(Box<dyn Collective>),
}

impl<'c> Deref for RankGroup<'c> {
    type Target = dyn Collective + 'c;

    fn deref(&self) -> &(dyn Collective + 'c) {
        match self {
            RankGroup::World(world) => *world,
            RankGroup::Alone(solo) => solo,
            RankGroup::Split(group) => &**group,
        }
    }
}

impl Sharing<'static> {
    /// One rank that holds everything.
    pub fn alone() -> Self {
        let (shards, replicas) = (RankGroup::Alone(Solo), RankGroup::Alone(Solo));
        Sharing { sharding: Sharding::None, cut: Cut::WHOLE, shards, replicas, ranks: vec![0] }
    }
}

impl<'c> Sharing<'c> {
    /// Divides the ranks of `world` according to a sharding; each rank's part is measured in
    /// `grains`.
    ///
    /// # Errors
    /// [`Error::Config`] if ranks are to share within nodes that have different numbers of ranks.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn new(
        world: &'c dyn Collective,
        sharding: Sharding,
        group: ShardingGroup,
        grains: usize,
    ) -> Result<Self> {
        let node_of_rank = match group {
            ShardingGroup::World => vec![0; world.world_size()],
            ShardingGroup::Node => nodes(world)?,
        };
        Sharing::within_nodes(world, sharding, &node_of_rank, grains)
    }

    /// Does as [`new`](Self::new), given the node of each rank: state is sharded among the ranks of
    /// a node and replicated across nodes.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn within_nodes(
        world: &'c dyn Collective,
        sharding: Sharding,
        node_of_rank: &[usize],
        grains: usize,
    ) -> Result<Self> {
        let (rank, world_size) = (world.rank(), world.world_size());
        let on_node = |node: usize| node_of_rank.iter().filter(|other| **other == node).count();
        let num_shards = if sharding == Sharding::None { 1 } else { on_node(node_of_rank[rank]) };
        if node_of_rank
            .iter()
            .any(|node| sharding != Sharding::None && on_node(*node) != num_shards)
        {
            let counts: Vec<usize> = node_of_rank.iter().map(|node| on_node(*node)).collect();
            let what = format!(
                "`node` needs as many ranks on each node; the nodes of ranks 0, 1, … have {counts:?}"
            );
            return Err(Error::config("parallel.sharding_group", what));
        }
        let shard = match num_shards {
            1 => 0,
            _ => node_of_rank[..rank].iter().filter(|node| **node == node_of_rank[rank]).count(),
        };
        let num_replicas = world_size / num_shards;
        let (shards, replicas) = match (num_shards, num_replicas) {
            (1, 1) => (RankGroup::Alone(Solo), RankGroup::Alone(Solo)),
            (1, _) => (RankGroup::Alone(Solo), RankGroup::World(world)),
            (_, 1) => (RankGroup::World(world), RankGroup::Alone(Solo)),
            _ => (
                RankGroup::Split(world.split(node_of_rank[rank])?),
                RankGroup::Split(world.split(shard)?),
            ),
        };
        let cut = Cut { num_shards, shard, num_replicas, replica: replicas.rank(), grains };
        Ok(Sharing { sharding, cut, shards, replicas, ranks: ranks_in_order(world, cut)? })
    }

    pub fn cut(&self) -> Cut {
        self.cut
    }

    /// The ranks that hold one copy of the state together.
    pub fn shards(&self) -> &(dyn Collective + 'c) {
        &*self.shards
    }

    /// The ranks that hold the same slice as this one.
    pub fn replicas(&self) -> &(dyn Collective + 'c) {
        &*self.replicas
    }

    /// Ends the communicators that were split off, after an error.
    pub fn abandon(self) {
        for group in [self.shards, self.replicas] {
            if let RankGroup::Split(group) = group {
                group.abandon();
            }
        }
    }

    /// Reorders values given by rank of the world to the order of the flat buffers.
    pub fn in_order<'m, T>(&'m self, by_rank: &'m [T]) -> impl Iterator<Item = &'m T> {
        self.ranks.iter().map(move |rank| &by_rank[*rank])
    }

    /// Returns the seconds spent in the split-off communicators since the last call; the world's
    /// own are not included.
    pub fn spent(&self) -> Spent {
        let split = [&self.shards, &self.replicas]
            .into_iter()
            .filter(|group| matches!(group, RankGroup::Split(_)));
        split.map(|group| group.spent()).fold(Spent::default(), Add::add)
    }
}

fn ranks_in_order(world: &dyn Collective, cut: Cut) -> Result<Vec<usize>> {
    let indices = Tensor::zeros([world.world_size() as i64], (Kind::Int64, Device::Cpu));
    let own = Tensor::from_slice(&[cut.index() as i64]);
    world.all_gather(vec![Sliced { owned: own, full: indices.shallow_clone() }])?.wait()?;
    let indices = Vec::<i64>::try_from(indices).expect("integers");
    let mut ranks: Vec<usize> = (0..indices.len()).collect();
    ranks.sort_by_key(|rank| indices[*rank]);
    Ok(ranks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Threads;

    /// Cut and order of the ranks, as each rank of a world of threads gets them.
    fn shared(sharding: Sharding, node_of_rank: &[usize]) -> Vec<Result<(Cut, Vec<usize>)>> {
        Threads::run(node_of_rank.len(), |world| {
            let sharing = Sharing::within_nodes(world, sharding, node_of_rank, 1)?;
            Ok((sharing.cut(), sharing.ranks))
        })
    }

    fn shards_and_replicas(sharding: Sharding, node_of_rank: &[usize]) -> Vec<(usize, usize)> {
        shared(sharding, node_of_rank)
            .into_iter()
            .map(|result| result.expect("sound").0)
            .map(|cut| (cut.shard, cut.replica))
            .collect()
    }

    #[test]
    fn a_node_shares_and_the_nodes_repeat() {
        assert_eq!(
            shards_and_replicas(Sharding::None, &[0, 0, 1, 1]),
            [(0, 0), (0, 1), (0, 2), (0, 3)]
        );
        assert_eq!(
            shards_and_replicas(Sharding::Optimizer, &[0, 0, 0, 0]),
            [(0, 0), (1, 0), (2, 0), (3, 0)]
        );
        assert_eq!(
            shards_and_replicas(Sharding::Parameters, &[0, 0, 1, 1]),
            [(0, 0), (1, 0), (0, 1), (1, 1)]
        );
        assert_eq!(
            shards_and_replicas(Sharding::Parameters, &[0, 1, 0, 1]),
            [(0, 0), (0, 1), (1, 0), (1, 1)]
        );
        assert_eq!(shards_and_replicas(Sharding::Gradients, &[0, 1, 2]), [(0, 0), (0, 1), (0, 2)]);
    }

    #[test]
    fn every_rank_knows_who_stands_where() {
        for result in shared(Sharding::Optimizer, &[0, 0, 1, 1]) {
            assert_eq!(result.expect("sound").1, [0, 2, 1, 3]);
        }
    }

    #[test]
    fn nodes_of_unequal_size_cannot_share() {
        for result in shared(Sharding::Optimizer, &[0, 0, 1]) {
            let text = result.expect_err("unequal").to_string();
            assert!(
                text.contains("as many ranks on each node") && text.contains("[2, 2, 1]"),
                "{text}"
            );
        }
        assert_eq!(shards_and_replicas(Sharding::None, &[0, 0, 1]).len(), 3);
    }
}
