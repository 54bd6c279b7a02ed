//! Agreement on success: if one rank failed, every rank learns of it before any goes on.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, gather_texts};
use crate::error::{Error, Result};
use crate::pulse;

/// The result of one rank, as it is sent to the others.
#[derive(Deserialize, Serialize)]
enum Outcome {
    Done(String),
    Failed { code: i32, what: String },
}

/// Returns every rank's text in rank order if all ranks succeeded.
///
/// # Errors
/// The first rank that failed gets its own error, to print it. Every other rank, also one that
/// failed too, gets [`Error::Peer`] with that rank's exit code.
pub fn agree(own: Result<String>, collective: &dyn Collective) -> Result<Vec<String>> {
    let outcome = match &own {
        Ok(text) => Outcome::Done(text.clone()),
        Err(error) => Outcome::Failed { code: error.exit_code(), what: error.to_string() },
    };
    let encoded = serde_json::to_string(&outcome).expect("two texts and a number are JSON");
    let mut texts = Vec::new();
    for (rank, text) in gather_texts(collective, &encoded)?.iter().enumerate() {
        match serde_json::from_str(text) {
            Ok(Outcome::Done(text)) => texts.push(text),
            Ok(Outcome::Failed { code, what }) => {
                let peer = Error::Peer {
                    speaker: Some(rank),
                    code,
                    what: format!("rank {rank} failed: {what}"),
                };
                return Err(own.err().filter(|_| rank == collective.rank()).unwrap_or(peer));
            }
            Err(error) => {
                return Err(Error::Collective {
                    backend: "agreement",
                    operation: "gather",
                    what: error.to_string(),
                });
            }
        }
    }
    Ok(texts)
}

/// Runs `act` on rank 0 only, e.g. to write a file that a run has once, and returns its text on
/// every rank.
///
/// # Errors
/// As [`agree`].
pub fn on_rank_zero(
    collective: &dyn Collective,
    act: impl FnOnce() -> Result<String>,
) -> Result<String> {
    let own = if pulse::is_root(collective.rank()) { act() } else { Ok(String::new()) };
    Ok(agree(own, collective)?.swap_remove(0))
}

/// Returns this rank's value if every rank succeeded.
///
/// # Errors
/// As [`agree`].
pub fn agreed<T>(own: Result<T>, collective: &dyn Collective) -> Result<T> {
    match own {
        Ok(value) => agree(Ok(String::new()), collective).map(|_| value),
        Err(error) => Err(agree(Err(error), collective).expect_err("this rank failed")),
    }
}

/// Makes a tensor on rank 0 only, e.g. by reading a file, and returns it on every rank. `[size]`
/// f32 on the CPU.
///
/// # Errors
/// As [`agree`].
pub fn tensor_of_rank_zero(
    collective: &dyn Collective,
    size: i64,
    make: impl FnOnce() -> Result<Tensor>,
) -> Result<Tensor> {
    let own = if pulse::is_root(collective.rank()) {
        make()
    } else {
        Ok(Tensor::empty([size], (Kind::Float, Device::Cpu)))
    };
    let tensor = agreed(own, collective)?;
    collective.broadcast(tensor.shallow_clone(), 0)?.wait()?;
    Ok(tensor)
}

/// Turns an error that every rank found alike into one that only rank `speaker` prints; the others
/// get [`Error::Peer`].
pub fn known_to_all(error: Error, speaker: usize, collective: &dyn Collective) -> Error {
    if collective.rank() == speaker {
        return error;
    }
    Error::Peer {
        speaker: Some(speaker),
        code: error.exit_code(),
        what: format!("rank {speaker} failed: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Threads;

    /// The errors of two ranks; those listed in `failing` fail.
    fn errors_of(failing: &[usize]) -> Vec<Error> {
        Threads::run(2, |rank| {
            let own = if failing.contains(&rank.rank()) {
                Err(Error::data("x", "broken"))
            } else {
                Ok("fine".into())
            };
            agree(own, rank).expect_err("one rank failed")
        })
    }

    #[test]
    fn one_failure_is_everybodys_with_its_code() {
        let errors = errors_of(&[1]);
        assert!(
            matches!(&errors[0], Error::Peer { speaker: Some(1), code: 40, what } if what == "rank 1 failed: x: broken"),
            "{:?}",
            errors[0]
        );
        assert!(matches!(&errors[1], Error::Data { .. }));
    }

    #[test]
    fn where_all_fail_one_speaks() {
        let errors = errors_of(&[0, 1]);
        assert!(matches!(&errors[0], Error::Data { .. }));
        assert!(
            matches!(&errors[1], Error::Peer { speaker: Some(0), code: 40, what } if what == "rank 0 failed: x: broken"),
            "{:?}",
            errors[1]
        );
    }
}
