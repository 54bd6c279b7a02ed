//! Connects the ranks' watchdogs before the first step, and checks that all ranks have one program
//! and one configuration.

use std::fs::File;
use std::io;

use crate::assembly::device::open_libraries;
use crate::collective::agreement::{agree, known_to_all, on_rank_zero};
use crate::collective::{Collective, gather_texts, mpi_library_version};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::fault;
use crate::files::sha256::HashingWriter;
use crate::libtorch;
use crate::phase::Phase;
use crate::plan::{CheckRequest, check};
use crate::pulse;
use crate::run::changes::{Values, flattened};
use crate::train::TrainOptions;
use crate::watchdog::Watchdog;
use serde::{Deserialize, Serialize};

/// Properties that must be equal on all ranks before they compute together.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Program {
    /// Hash of the executable.
    sha256: String,
    mpi: String,
    libtorch: Option<String>,
    /// CPU capability by which libtorch chooses its kernels.
    cpu_capability: String,
}

/// Connects the ranks' watchdogs, which can name a failing rank from then on, and compares the
/// ranks' programs. Returns a warning if processors differ, since the last bits of CPU results may
/// then differ too.
///
/// # Errors
/// [`Error::Environment`] on every rank if programs or libraries differ, naming the rank.
///
/// # Ordering
/// Every rank calls it before any other collective.
pub fn begin(watchdog: &Watchdog, world: &dyn Collective) -> Result<Option<String>> {
    pulse::enter(Phase::Bootstrap);
    watchdog.connect(world)?;
    let text = serde_json::to_string(&Program::own()?).expect("texts are JSON");
    let read =
        |text: &String| serde_json::from_str::<Program>(text).expect("ranks send what they are");
    let programs: Vec<Program> = gather_texts(world, &text)?.iter().map(read).collect();
    let first = |differs: &dyn Fn(&Program) -> Option<String>| {
        programs
            .iter()
            .enumerate()
            .find_map(|(rank, program)| Some(format!("rank {rank} {}", differs(program)?)))
    };
    match first(&|program| program.difference(&programs[0])) {
        Some(what) => Err(known_to_all(Error::environment(what), 0, world)),
        None => Ok(first(&|program| program.kernel_difference(&programs[0]))),
    }
}

impl Program {
    fn own() -> Result<Self> {
        let path = std::env::current_exe().map_err(Error::storage("this program", "find"))?;
        let mut hashing = HashingWriter::new(io::sink());
        let copied = File::open(&path).and_then(|mut file| io::copy(&mut file, &mut hashing));
        copied.map_err(Error::storage(&path, "read"))?;
        let (_, mut sha256, _) = hashing.finish();
        if fault::argument(fault::Kind::OtherBuild, Phase::Bootstrap, 0.0).is_some() {
            sha256 = "another build".into();
        }
        let libtorch = libtorch::library().and_then(|library| libtorch::version(&library));
        Ok(Program {
            sha256,
            mpi: mpi_library_version(),
            libtorch,
            cpu_capability: libtorch::cpu_capability().into(),
        })
    }

    fn difference(&self, first: &Program) -> Option<String> {
        let libtorch = |program: &Program| {
            program.libtorch.clone().unwrap_or_else(|| "of an unknown version".into())
        };
        let pairs = [
            ("program", self.sha256.clone(), first.sha256.clone()),
            ("MPI", self.mpi.clone(), first.mpi.clone()),
            ("libtorch", libtorch(self), libtorch(first)),
        ];
        let (what, own, other) = pairs.into_iter().find(|(_, own, other)| own != other)?;
        Some(format!(
            "has {what} {own}, rank 0 has {other}; start the same build with the same libraries everywhere"
        ))
    }

    fn kernel_difference(&self, first: &Program) -> Option<String> {
        let (own, other) = (&self.cpu_capability, &first.cpu_capability);
        (own != other).then(|| format!("computes with {own}, rank 0 with {other}"))
    }
}

/// Returns on every rank the configuration that rank 0 read and checked for this world and its
/// data; an error of rank 0 ends all ranks. Other ranks need no configuration file, but one that
/// they have must be equal.
///
/// # Errors
/// Rank 0's own on rank 0, [`Error::Peer`] with its code on the others; [`Error::Config`] naming a
/// key in which another rank's configuration differs.
///
/// # Ordering
/// Every rank calls it.
pub fn share_config(
    own: Result<RunConfig>,
    options: &TrainOptions,
    world: &dyn Collective,
) -> Result<RunConfig> {
    let own_text = own.as_ref().map(RunConfig::to_toml).ok();
    let fit = || {
        let config = own?;
        open_libraries(&config)?;
        // Errors that would be the same on every rank are reported once, before anything is
        // written.
        check(
            &config,
            &CheckRequest {
                world_size: world.world_size(),
                latents: None,
                text_tokens: 0,
                scaling: None,
            },
        )?;
        match (options.debug, world.world_size()) {
            (true, ranks) if ranks > 1 => Err(Error::config(
                "--debug",
                format!("is for one process, found {ranks}; start it without mpirun"),
            )),
            _ => Ok(config.to_toml()),
        }
    };
    let text = on_rank_zero(world, fit)?;
    let difference = own_text.and_then(|own| difference(&own, &text));
    let agreed = match difference {
        Some((key, own, first)) => Err(Error::config(
            key,
            format!(
                "differs: rank {} has {own}, rank 0 {first}; give all ranks one configuration",
                world.rank()
            ),
        )),
        None => Ok(String::new()),
    };
    agree(agreed, world)?;
    RunConfig::read_listing("rank 0's configuration", &text)
}

/// Returns the first key in which two configurations differ, with both values.
fn difference(own: &str, first: &str) -> Option<(String, String, String)> {
    let (own, first) = (flattened(own), flattened(first));
    let shown =
        |values: &Values, key: &str| values.get(key).cloned().unwrap_or_else(|| "nothing".into());
    let key = own.keys().chain(first.keys()).find(|key| own.get(*key) != first.get(*key))?;
    Some((key.clone(), shown(&own, key), shown(&first, key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_differs_is_found_with_both_values() {
        let text = |lr: f64| format!("seed = 1\n[optimizer.adamw]\nlr = {lr}\n");
        let found = difference(&text(0.2), &text(0.1)).expect("one key differs");
        assert_eq!(found, ("optimizer.adamw.lr".into(), "0.2".into(), "0.1".into()));
        assert_eq!(difference(&text(0.1), &text(0.1)), None);
        let more = difference("a = 1", "a = 1\nb = 2").expect("one has more");
        assert_eq!(more, ("b".into(), "nothing".into(), "2".into()));
    }

    #[test]
    fn programs_that_differ_are_told_apart() {
        let program = |sha256: &str| Program {
            sha256: sha256.into(),
            mpi: "Open MPI".into(),
            libtorch: Some("2.13.0".into()),
            cpu_capability: "AVX2".into(),
        };
        assert_eq!(program("a").difference(&program("a")), None);
        assert!(
            program("a")
                .difference(&program("b"))
                .expect("they differ")
                .starts_with("has program a, rank 0 has b")
        );
        let other = Program { libtorch: Some("2.12.0".into()), ..program("a") };
        assert!(
            other
                .difference(&program("a"))
                .expect("they differ")
                .starts_with("has libtorch 2.12.0, rank 0 has 2.13.0")
        );
        let old = Program { cpu_capability: "no AVX2".into(), ..program("a") };
        assert_eq!(old.difference(&program("a")), None);
        assert_eq!(
            old.kernel_difference(&program("a")),
            Some("computes with no AVX2, rank 0 with AVX2".into())
        );
    }
}
