//! Seconds of a collective: a latency for each hop or message, plus bytes over bandwidth (the
//! alpha-beta model).
//!
//! Source: Thakur, Rabenseifner & Gropp 2005, "Optimization of Collective Communication Operations
//! in MPICH".

use serde::Deserialize;

/// The transport of tensors between ranks.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Links {
    /// NCCL between GPUs: bytes per second that a GPU sends along rings within its node, and out of
    /// it.
    Nccl { within: f64, across: f64 },
    /// `collective/exchange` between ranks of one machine: bytes per second that a core copies or
    /// sums, chunk by chunk.
    Memory { pass: f64 },
}

/// NCCL's algorithms, each with several protocols.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nccl {
    ring: Vec<Protocol>,
    tree: Vec<Protocol>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Protocol {
    /// Seconds until the first byte is sent.
    begin: f64,
    /// Seconds of a hop between GPUs of a node.
    within: f64,
    /// Seconds of a hop between nodes.
    across: f64,
    /// Share of the links' bandwidth that the protocol attains.
    bandwidth: f64,
}

/// A collective on a tensor that each rank holds whole or as a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    AllReduce,
    ReduceScatter,
    AllGather,
}

/// Ranks of one communicator, the same number on each of their nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub ranks: usize,
    pub nodes: usize,
}

impl Links {
    pub fn numbers(&self) -> Vec<f64> {
        match *self {
            Links::Nccl { within, across } => vec![within, across],
            Links::Memory { pass } => vec![pass],
        }
    }
}

impl Nccl {
    pub fn numbers(&self) -> impl Iterator<Item = f64> {
        let all = self.ring.iter().chain(&self.tree);
        all.flat_map(|protocol| {
            [protocol.begin, protocol.within, protocol.across, protocol.bandwidth]
        })
    }

    /// Returns the seconds of an operation on `bytes` of the larger tensor by the fastest
    /// algorithm: a ring, which passes every byte from rank to rank, or for an all-reduce also a
    /// tree, whose latency grows with the logarithm of the number of nodes.
    ///
    /// Source: NVIDIA/nccl 2.30.7, src/graph/tuning.cc, `ncclTopoTuneModel`.
    pub fn seconds(
        &self,
        operation: Operation,
        bytes: f64,
        group: Group,
        (within, across): (f64, f64),
    ) -> f64 {
        let Group { ranks, nodes } = group;
        if ranks < 2 {
            return 0.0;
        }
        let (ranks_of_node, nodes) = ((ranks / nodes) as f64, nodes as f64);
        // Every GPU has a network card, and the rings of a node leave it through all of them.
        let leaving = if nodes > 1.0 { across * ranks_of_node } else { f64::INFINITY };
        let bandwidth = leaving.min(if ranks_of_node > 1.0 { within } else { f64::INFINITY });
        let rounds = if operation == Operation::AllReduce { 2.0 } else { 1.0 };
        let ring = |protocol: &Protocol| {
            let (hops, hops_across) = (rounds * (ranks as f64 - 1.0), rounds * (nodes - 1.0));
            let latency = protocol.begin
                + (hops - hops_across) * protocol.within
                + hops_across * protocol.across;
            latency + hops / ranks as f64 * bytes / (bandwidth * protocol.bandwidth)
        };
        let tree = |protocol: &Protocol| {
            let latency = protocol.begin
                + 2.0 * ((ranks_of_node - 1.0) * protocol.within + nodes.log2() * protocol.across);
            latency + 2.0 * bytes / (bandwidth * protocol.bandwidth)
        };
        let trees: &[Protocol] = if operation == Operation::AllReduce { &self.tree } else { &[] };
        self.ring.iter().map(ring).chain(trees.iter().map(tree)).fold(f64::INFINITY, f64::min)
    }
}

/// Returns the seconds of an operation through shared memory on `bytes` of the larger tensor, for
/// ranks that each have a whole core: a rank copies its chunks of the others' shards to shared
/// memory, adds theirs to its own shard, publishes the sum, and copies the others' sums.
///
/// Source: `collective/exchange/part.rs`.
pub(super) fn memory_seconds(
    operation: Operation,
    bytes: f64,
    ranks: usize,
    pass: f64,
    message: f64,
) -> f64 {
    if ranks < 2 {
        return 0.0;
    }
    let others = ranks as f64 - 1.0;
    let reduced = 2.0 * others;
    let shared = 1.0 + others;
    let passes = match operation {
        Operation::AllReduce => reduced + shared,
        Operation::ReduceScatter => reduced,
        Operation::AllGather => shared,
    };
    // Every other rank gets a message when chunks are ready and when they have been read.
    passes * bytes / ranks as f64 / pass + 2.0 * others * message
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Operation; 3] =
        [Operation::AllReduce, Operation::ReduceScatter, Operation::AllGather];

    fn protocol(begin: f64, within: f64, across: f64, bandwidth: f64) -> Protocol {
        Protocol { begin, within, across, bandwidth }
    }

    fn one_node(ranks: usize) -> Group {
        Group { ranks, nodes: 1 }
    }

    /// Two protocols, one with latencies and one without, the same for rings and trees.
    fn nccl(latency: f64) -> Nccl {
        let one = || vec![protocol(0.0, latency, 4.0 * latency, 1.0)];
        Nccl { ring: one(), tree: one() }
    }

    #[test]
    fn without_latency_a_ring_sends_each_byte_once_or_twice_less_a_ranks_share() {
        let seconds = |operation| nccl(0.0).seconds(operation, 800.0, one_node(8), (100.0, 1.0));
        assert_eq!(ALL.map(seconds), [14.0, 7.0, 7.0]);
    }

    #[test]
    fn with_endless_bandwidth_only_hops_take_time() {
        let group = Group { ranks: 16, nodes: 4 };
        let seconds =
            |operation| nccl(1.0).seconds(operation, 1e9, group, (f64::INFINITY, f64::INFINITY));
        // A ring: 15 hops, 3 of them between nodes at 4; a tree: up and down 3 hops within a node
        // and 2 levels of nodes.
        assert_eq!(seconds(Operation::ReduceScatter), 12.0 + 12.0);
        assert_eq!(seconds(Operation::AllReduce), 2.0 * (3.0 + 2.0 * 4.0));
    }

    #[test]
    fn alone_there_is_nothing_to_send() {
        assert!(ALL.iter().all(|operation| nccl(1.0).seconds(
            *operation,
            1e9,
            one_node(1),
            (1.0, 1.0)
        ) == 0.0));
        assert!(ALL.iter().all(|operation| memory_seconds(*operation, 1e9, 1, 1.0, 1.0) == 0.0));
    }

    #[test]
    fn the_slowest_link_carries_the_ring_and_a_node_leaves_by_all_its_cards() {
        let gather = |group| nccl(0.0).seconds(Operation::AllGather, 1600.0, group, (100.0, 10.0));
        assert_eq!(gather(Group { ranks: 16, nodes: 2 }), 1500.0 / 80.0);
        assert_eq!(gather(Group { ranks: 2, nodes: 2 }), 800.0 / 10.0);
    }

    #[test]
    fn more_ranks_never_take_less() {
        let group = |ranks: usize| Group { ranks, nodes: ranks.div_ceil(8) };
        for operation in ALL {
            let seconds = |ranks| nccl(1e-6).seconds(operation, 1e8, group(ranks), (3e11, 4e10));
            let all = (0..13).map(|power| seconds(1 << power)).collect::<Vec<_>>();
            assert!(all.is_sorted(), "{operation:?}: {all:?}");
            let through_memory = (1..64)
                .map(|ranks| memory_seconds(operation, 1e8, ranks, 1e9, 1e-6))
                .collect::<Vec<_>>();
            assert!(through_memory.is_sorted(), "{operation:?}: {through_memory:?}");
        }
    }

    #[test]
    fn the_protocol_with_the_least_time_is_taken() {
        let both = Nccl {
            ring: vec![protocol(0.0, 10.0, 10.0, 1.0), protocol(0.0, 1.0, 1.0, 0.5)],
            tree: vec![],
        };
        let gather = |bytes| both.seconds(Operation::AllGather, bytes, one_node(2), (1.0, 1.0));
        assert_eq!([gather(2.0), gather(2000.0)], [1.0 + 2.0, 10.0 + 1000.0]);
    }

    #[test]
    fn an_all_reduce_through_memory_is_a_reduce_scatter_and_an_all_gather() {
        let seconds = |operation| memory_seconds(operation, 400.0, 4, 10.0, 0.0);
        assert_eq!(ALL.map(seconds), [100.0, 60.0, 40.0]);
    }
}
