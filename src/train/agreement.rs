//! What one rank could not do, no rank pretends to have done.

use serde::{Deserialize, Serialize};

use crate::collective::{Collective, gather_texts};
use crate::error::{Error, Result};

/// How a rank fared, as the others see it.
#[derive(Deserialize, Serialize)]
enum Outcome {
    Done(String),
    Failed { code: i32, what: String },
}

/// Every rank's text in rank order, if all succeeded.
///
/// # Errors
/// The rank's own error where it failed; [`Error::Peer`] with the first failure's code on every other rank.
pub fn agree(own: Result<String>, collective: &dyn Collective) -> Result<Vec<String>> {
    let outcome = match &own {
        Ok(text) => Outcome::Done(text.clone()),
        Err(error) => Outcome::Failed { code: error.exit_code(), what: error.to_string() },
    };
    let encoded = serde_json::to_string(&outcome).expect("two texts and a number are JSON");
    let outcomes = gather_texts(collective, &encoded)?;
    own?;
    let read = |(rank, text): (usize, &String)| match serde_json::from_str(text) {
        Ok(Outcome::Done(text)) => Ok(text),
        Ok(Outcome::Failed { code, what }) => Err(Error::Peer { code, what: format!("rank {rank} failed: {what}") }),
        Err(error) => Err(Error::Collective { backend: "agreement", operation: "gather", what: error.to_string() }),
    };
    outcomes.iter().enumerate().map(read).collect()
}

/// What only rank 0 does, e.g. writing what a run has once: its text, on every rank.
///
/// # Errors
/// As [`agree`].
pub fn on_rank_zero(collective: &dyn Collective, act: impl FnOnce() -> Result<String>) -> Result<String> {
    let own = if collective.rank() == 0 { act() } else { Ok(String::new()) };
    Ok(agree(own, collective)?.swap_remove(0))
}

/// An error that every rank met alike, said by `speaker` alone.
pub fn known_to_all(error: Error, speaker: usize, collective: &dyn Collective) -> Error {
    if collective.rank() == speaker {
        return error;
    }
    Error::Peer { code: error.exit_code(), what: format!("rank {speaker} failed: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Threads;

    #[test]
    fn one_failure_is_everybodys_with_its_code() {
        let world = Threads::world(2);
        let join = |rank: Threads| {
            std::thread::spawn(move || {
                let own = if rank.rank() == 1 { Err(Error::data("x", "broken")) } else { Ok("fine".into()) };
                agree(own, &rank).expect_err("one rank failed")
            })
        };
        let threads: Vec<_> = world.into_iter().map(join).collect();
        let errors: Vec<Error> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        assert!(matches!(&errors[0], Error::Peer { code: 40, what } if what == "rank 1 failed: x: broken"), "{:?}", errors[0]);
        assert!(matches!(&errors[1], Error::Data { .. }));
    }
}
