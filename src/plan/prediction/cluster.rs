//! The rates of clusters. The numbers and their sources are in `clusters.toml`.

use std::collections::BTreeMap;

use serde::Deserialize;
use tch::Kind;

use super::links::{Links, Nccl};
use super::{Passes, StageWork};
use crate::error::{Error, Result};

/// The clusters that are built in.
const KNOWN: &str = include_str!("clusters.toml");

/// Path of the built-in clusters, for users who want to read or change them.
pub const KNOWN_NAME: &str = "src/plan/prediction/clusters.toml";

/// Machines that run ranks, with the rates that they attain.
#[derive(Clone, Debug)]
pub struct Cluster {
    pub name: String,
    pub(super) constants: Constants,
    pub(super) nccl: Nccl,
}

/// One `[cluster.<name>]` table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Constants {
    about: String,
    /// GPUs of a node, one for each rank; or cores of the one machine, which ranks share.
    pub workers: usize,
    /// Bytes per second that a worker's elementwise passes read and write.
    pub memory: f64,
    /// Bytes per second that a worker's optimizer reads and writes; each read and each write of a
    /// tensor counts.
    pub update: f64,
    /// Seconds to launch an operator.
    launch: f64,
    /// Seconds of a message of a few bytes between two ranks' hosts.
    pub message: f64,
    float32: Rates,
    bfloat16: Rates,
    pub links: Links,
}

/// Floating-point operations per second of one worker.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rates {
    peak: f64,
    /// Share of the peak that matrix products attain.
    products: f64,
    /// Share of the peak that attention attains.
    attention: f64,
}

/// A file of clusters.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Clusters {
    nccl: Nccl,
    cluster: BTreeMap<String, Constants>,
}

impl Cluster {
    /// Returns the cluster called `name` from `file`, which is the name and text of a file like
    /// `clusters.toml`; from the built-in ones if there is no file.
    ///
    /// # Errors
    /// [`Error::Config`] if the file is malformed, or if it does not contain the name, with the
    /// names that it does contain.
    pub fn named(name: &str, file: Option<(&str, &str)>) -> Result<Self> {
        let (source, text) = file.unwrap_or((KNOWN_NAME, KNOWN));
        let broken = |error: toml::de::Error| {
            Error::config(
                "--clusters",
                format!("{source}: {}", error.to_string().trim().replace('\n', " ")),
            )
        };
        let mut clusters: Clusters = toml::from_str(text).map_err(broken)?;
        let names = clusters.cluster.keys().cloned().collect::<Vec<_>>().join(", ");
        let unknown = || {
            Error::config("--cluster", format!("unknown cluster `{name}`; {source} has {names}"))
        };
        let constants = clusters.cluster.remove(name).ok_or_else(unknown)?;
        let cluster = Cluster { name: name.into(), constants, nccl: clusters.nccl };
        match cluster.numbers().into_iter().find(|number| !(number.is_finite() && *number > 0.0)) {
            Some(number) => Err(Error::config(
                "--clusters",
                format!("{source}: {number} in `{name}` must be a number above zero"),
            )),
            None => Ok(cluster),
        }
    }

    /// Returns the names of the built-in clusters.
    pub fn known() -> String {
        let clusters: Clusters = toml::from_str(KNOWN).expect("the file that is built in is sound");
        clusters.cluster.into_keys().collect::<Vec<_>>().join(", ")
    }

    /// Returns the cluster's description.
    pub fn about(&self) -> &str {
        &self.constants.about
    }

    fn numbers(&self) -> Vec<f64> {
        let Constants {
            workers, memory, update, launch, message, float32, bfloat16, links, ..
        } = &self.constants;
        let rates = [float32, bfloat16]
            .into_iter()
            .flat_map(|rates| [rates.peak, rates.products, rates.attention]);
        let own = [*workers as f64, *memory, *update, *launch, *message].into_iter().chain(rates);
        own.chain(links.numbers()).chain(self.nccl.numbers()).collect()
    }

    /// True if collectives run on a stream beside the computation and operators are launched ahead
    /// of it.
    pub fn is_asynchronous(&self) -> bool {
        matches!(self.constants.links, Links::Nccl { .. })
    }

    /// Refuses a number of ranks that would leave some GPUs of a node unused while other nodes are
    /// full.
    ///
    /// # Errors
    /// [`Error::Config`] naming the nearest numbers that fill nodes.
    pub fn check_world(&self, ranks: usize) -> Result<()> {
        let workers = self.constants.workers;
        if !self.is_asynchronous() || ranks <= workers || ranks.is_multiple_of(workers) {
            return Ok(());
        }
        let below = ranks / workers * workers;
        let what = format!(
            "{ranks} ranks fill no nodes of {workers} on {}; nearest: {below} or {}",
            self.name,
            below + workers
        );
        Err(Error::config("--world", what))
    }

    /// Returns the workers that one of `ranks` has for `threads` threads: a GPU, or cores, which
    /// are shared if there are more ranks than cores.
    pub(super) fn workers_of_a_rank(&self, ranks: usize, threads: usize) -> f64 {
        match self.constants.links {
            Links::Nccl { .. } => 1.0,
            Links::Memory { .. } => {
                (self.constants.workers as f64 / ranks as f64).min(threads as f64)
            }
        }
    }

    /// Returns the seconds that one worker takes for matrix products, attention, passes over memory
    /// and operator launches of a stage.
    fn seconds(
        &self,
        kind: Kind,
        product_flop: f64,
        attention_flop: f64,
        Passes { operators, bytes }: Passes,
    ) -> f64 {
        let Constants { memory, launch, float32, bfloat16, .. } = &self.constants;
        let rates = if kind == Kind::Float { float32 } else { bfloat16 };
        let products = product_flop / (rates.peak * rates.products);
        let computed = products + attention_flop / (rates.peak * rates.attention) + bytes / memory;
        let started = operators * launch;
        if self.is_asynchronous() { computed.max(started) } else { computed + started }
    }

    /// Returns the seconds of a stage's forward, which reads its parameters.
    pub(super) fn forward_seconds(&self, stage: &StageWork, kind: Kind) -> f64 {
        let passes = stage.forward.moving(stage.parameter_bytes(kind));
        self.seconds(kind, stage.product_flop, stage.attention_flop, passes)
    }

    /// Returns the seconds of a stage's backward: a product for each of the forward's and another
    /// one for each matrix that is trained, five of attention's for two. Parameters are read;
    /// gradients of the trained ones are written, and where they are `copied` when they are joined,
    /// read and written once more, in this kind.
    ///
    /// Source: Dao 2023, arXiv:2307.08691, for attention.
    pub(super) fn backward_seconds(
        &self,
        stage: &StageWork,
        kind: Kind,
        copied: Option<Kind>,
    ) -> f64 {
        let trained = |kind| stage.trained_bytes(kind);
        let copied = copied.map_or(0.0, |into| trained(kind) + trained(into));
        let bytes = stage.parameter_bytes(kind) + trained(kind) + copied;
        self.seconds(
            kind,
            stage.product_flop + stage.trained_flop,
            2.5 * stage.attention_flop,
            stage.backward.moving(bytes),
        )
    }
}

impl Passes {
    /// These passes, which move so many bytes more.
    fn moving(self, bytes: f64) -> Self {
        Passes { bytes: self.bytes + bytes, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_names_its_source_beside_it_or_above_its_table() {
        let mut explained = false;
        for line in KNOWN.lines() {
            match line.split_once('#') {
                Some((before, source)) => {
                    explained = before.trim().is_empty() || before.starts_with("[[nccl");
                    assert!(source.trim().len() > 3, "{line}");
                }
                None if line.starts_with('[') || line.is_empty() => explained = false,
                None => assert!(
                    explained || ["about", "workers"].iter().any(|name| line.starts_with(name)),
                    "without a source: {line}"
                ),
            }
        }
    }

    #[test]
    fn an_unknown_cluster_is_refused_with_the_known_ones() {
        let text = Cluster::named("h1000", None).expect_err("unknown").to_string();
        assert!(
            text.contains("unknown cluster `h1000`") && text.contains("a100, cpu2, h100, h200"),
            "{text}"
        );
    }

    #[test]
    fn a_file_that_is_not_as_it_must_be_is_refused_by_its_name() {
        let refused = |text: &str| {
            Cluster::named("h100", Some(("mine.toml", text))).expect_err("wrong").to_string()
        };
        assert!(refused("nccl = 3").contains("mine.toml"));
        assert!(refused(&KNOWN.replace("launch", "lunch")).contains("unknown field `lunch`"));
        let negative = refused(&KNOWN.replace("peak = 67e12", "peak = -67e12"));
        assert!(
            negative.contains("-67000000000000 in `h100` must be a number above zero"),
            "{negative}"
        );
    }

    #[test]
    fn nodes_are_full_or_alone() {
        let check = |ranks| Cluster::named("h100", None).expect("known").check_world(ranks);
        assert!([1, 5, 8, 16, 4096].into_iter().all(|ranks| check(ranks).is_ok()));
        let text = check(12).expect_err("half a node").to_string();
        assert!(text.contains("12 ranks fill no nodes of 8 on h100; nearest: 8 or 16"), "{text}");
    }

    #[test]
    fn ranks_share_cores_and_never_a_gpu() {
        let (cpus, gpus) = (
            Cluster::named("cpu2", None).expect("known"),
            Cluster::named("h100", None).expect("known"),
        );
        assert_eq!([1, 2, 4].map(|ranks| cpus.workers_of_a_rank(ranks, 1)), [1.0, 1.0, 0.5]);
        assert_eq!(cpus.workers_of_a_rank(1, 2), 2.0);
        assert_eq!(gpus.workers_of_a_rank(64, 1), 1.0);
    }
}
