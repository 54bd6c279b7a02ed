//! Tries all backends on a run's cases, or finds what an earlier trial has found.

use std::fmt;
use std::path::PathBuf;

use super::case::Case;
use super::child::Request;
use super::machine::Machine;
use super::outcome::{Outcome, Tried};
use super::process::{self, Limits};
use crate::fault;
use crate::files::cache::Cache;
use crate::folders;
use crate::libtorch::AttentionBackend;
use crate::pulse;

/// This program, also after its file was replaced.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// Folder of the program within the user's cache folder, and of outcomes within that.
const CACHE_FOLDER: &str = "fm-dist";
const KIND: &str = "attention";
/// To be counted up whenever trials change, so that earlier outcomes are not taken for theirs.
const REVISION: u32 = 1;

/// A device on which no backend can be tried, and the reason.
#[derive(Clone, Debug, PartialEq)]
pub struct Unavailable(pub String);

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a trial has found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Findings {
    /// An outcome for each backend and case.
    pub tried: Vec<Tried>,
    /// The reason for which outcomes could not be kept for the next start.
    pub not_kept: Option<String>,
}

/// A trial of all backends on one device.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The program whose hidden command tries a backend.
    pub program: PathBuf,
    /// Number of the GPU; `None` for the CPU.
    pub gpu: Option<usize>,
    pub limits: Limits,
    /// Outcomes of earlier trials; `None` to try anew.
    pub cache: Option<Cache>,
    pub machine: Machine,
    /// An injected fault of the children. With one the cache is neither read nor written.
    pub fault: Option<String>,
}

impl Trial {
    /// A trial by this program, with the cache in the user's cache folder, if there is one.
    pub fn on_gpu(number: usize) -> Self {
        Trial {
            program: THIS_PROGRAM.into(),
            gpu: Some(number),
            limits: Limits::default(),
            cache: folders::cache().map(|folder| Cache::new(&folder.join(CACHE_FOLDER), KIND)),
            machine: Machine::here(),
            fault: fault::ordered().map(ToString::to_string),
        }
    }

    /// Tries every backend on every case: the cases with a mask and those without in processes of
    /// their own, one after the other, so that none disturbs another's time.
    ///
    /// # Errors
    /// [`Unavailable`] if the device cannot be opened.
    pub fn run(&self, cases: &[Case]) -> Result<Findings, Unavailable> {
        let mut findings = Findings::default();
        for masked in [false, true] {
            let alike: Vec<Case> =
                cases.iter().filter(|case| case.masked == masked).copied().collect();
            if !alike.is_empty() {
                let Findings { tried, not_kept } = self.known_or_tried(&alike)?;
                findings.tried.extend(tried);
                findings.not_kept = findings.not_kept.or(not_kept);
            }
        }
        Ok(findings)
    }

    fn known_or_tried(&self, cases: &[Case]) -> Result<Findings, Unavailable> {
        let key = self.key(cases);
        let cache = self.cache.as_ref().zip(key.as_deref()).filter(|_| self.fault.is_none());
        let known = cache.and_then(|(cache, key)| cache.read(key));
        if let Some(tried) = known.and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            return Ok(Findings { tried, not_kept: None });
        }
        let mut tried = Vec::new();
        for backend in AttentionBackend::ALL {
            let outcomes = self.outcomes(backend, cases)?;
            tried.extend(cases.iter().zip(outcomes).map(|(case, outcome)| Tried {
                backend,
                case: *case,
                outcome,
            }));
        }
        let is_lasting = tried.iter().all(|tried| tried.outcome.is_lasting());
        let kept = cache.filter(|_| is_lasting).map_or(Ok(()), |(cache, key)| {
            let bytes = serde_json::to_vec(&tried).expect("finite numbers and texts are JSON");
            cache.write(key, &bytes)
        });
        Ok(Findings { tried, not_kept: kept.err().map(|error| error.to_string()) })
    }

    fn outcomes(
        &self,
        backend: AttentionBackend,
        cases: &[Case],
    ) -> Result<Vec<Outcome>, Unavailable> {
        if !cases.iter().any(|case| case.is_taken_by(backend)) {
            return Ok(vec![Outcome::NotTaken; cases.len()]);
        }
        let request = Request {
            backend,
            gpu: self.gpu,
            cases: cases.to_vec(),
            rank: pulse::rank(),
            fault: self.fault.clone(),
        };
        process::run(&self.program, &request, self.limits)
    }

    /// One line that names all that outcomes depend on; `None` if that is not known.
    fn key(&self, cases: &[Case]) -> Option<String> {
        let cases = serde_json::to_string(cases).expect("numbers and words are JSON");
        Some(format!("revision {REVISION}; {}; {cases}", self.machine.key()?))
    }
}
