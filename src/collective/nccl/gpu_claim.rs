//! The check that every rank has a GPU of its own, and all ranks one version of NCCL.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The hardware that one rank found and took, as it is sent to the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct GpuClaim {
    pub host: String,
    /// Number of GPUs that the driver shows to this rank.
    pub num_gpus: usize,
    /// UUID of the GPU that it took; `None` if the driver shows too few.
    pub gpu: Option<String>,
    /// Version of NCCL.
    pub nccl: String,
}

/// Checks the claims of all ranks, in rank order. Every rank comes to the same result.
///
/// # Errors
/// [`Error::Environment`] for a host with fewer GPUs than ranks, a GPU that two ranks took, and a
/// mix of NCCL versions.
pub(super) fn check(claims: &[GpuClaim]) -> Result<()> {
    let mut hosts = BTreeMap::<&str, Vec<usize>>::new();
    for (rank, claim) in claims.iter().enumerate() {
        hosts.entry(&claim.host).or_default().push(rank);
    }
    for (host, ranks) in hosts {
        let fewest = ranks.iter().map(|rank| claims[*rank].num_gpus).min().unwrap_or(0);
        if fewest < ranks.len() {
            return Err(Error::environment(format!(
                "{} ranks run on host {host} (ranks {ranks:?}) and its driver shows {fewest} GPUs: start one rank a GPU and show \
                 every rank all of them (Slurm: --gpu-bind=none)",
                ranks.len()
            )));
        }
    }
    for (rank, claim) in claims.iter().enumerate() {
        let same = |other: &GpuClaim| (&other.host, &other.gpu) == (&claim.host, &claim.gpu);
        if let Some(other) = claims[..rank].iter().position(same) {
            let (host, gpu) = (&claim.host, claim.gpu.as_deref().unwrap_or("?"));
            return Err(Error::environment(format!(
                "ranks {other} and {rank} both took GPU {gpu} of host {host}: is CUDA_VISIBLE_DEVICES set differently for them?"
            )));
        }
        if claim.nccl != claims[0].nccl {
            let (first, host, other) = (&claims[0].nccl, &claim.host, &claim.nccl);
            return Err(Error::environment(format!(
                "rank 0 has NCCL {first}, rank {rank} on host {host} {other}: install one version"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Claims from (host, number of GPUs, GPU).
    fn claims(found: &[(&str, usize, &str)]) -> Vec<GpuClaim> {
        let claim = |&(host, num_gpus, gpu): &(&str, usize, &str)| {
            let gpu = (!gpu.is_empty()).then(|| gpu.to_string());
            GpuClaim { host: host.into(), num_gpus, gpu, nccl: "2.29.7".into() }
        };
        found.iter().map(claim).collect()
    }

    fn refusal(claims: &[GpuClaim]) -> String {
        let error = check(claims).expect_err("must be refused");
        assert_eq!(error.exit_code(), 52);
        error.to_string()
    }

    #[test]
    fn one_gpu_a_rank_is_what_is_wanted() {
        check(&claims(&[("n1", 2, "a"), ("n1", 2, "b"), ("n2", 8, "a"), ("n2", 8, "b")]))
            .expect("GPUs have numbers of their own host");
    }

    #[test]
    fn a_host_with_fewer_gpus_than_ranks_is_named_with_them() {
        let text =
            refusal(&claims(&[("n1", 2, "a"), ("n2", 1, "c"), ("n1", 2, "b"), ("n2", 1, "")]));
        assert!(
            text.starts_with("2 ranks run on host n2 (ranks [1, 3]) and its driver shows 1 GPUs"),
            "{text}"
        );
    }

    #[test]
    fn two_ranks_on_one_gpu_are_both_named() {
        let text = refusal(&claims(&[("n1", 3, "a"), ("n1", 3, "b"), ("n1", 3, "a")]));
        assert!(text.starts_with("ranks 0 and 2 both took GPU a of host n1"), "{text}");
    }

    #[test]
    fn a_mix_of_versions_is_refused() {
        let mut mixed = claims(&[("n1", 1, "a"), ("n2", 1, "b")]);
        mixed[1].nccl = "2.27.3".into();
        assert_eq!(
            refusal(&mixed),
            "rank 0 has NCCL 2.29.7, rank 1 on host n2 2.27.3: install one version"
        );
    }
}
