//! Warns at the first step if latents look as if they were not normalised.

use crate::collective::{Collective, gather_texts};
use crate::data::Moments;
use crate::error::Result;

/// Standard deviations of a global batch's latents that cause no warning. A VAE's scaling factor
/// brings those of a whole dataset to about 1, and a few samples of one kind stay within a factor
/// of two. Without it they have 5.5 (Stable Diffusion), 2.8 (FLUX) or 2.1 (HunyuanVideo); with it
/// applied twice 0.36 (FLUX).
const USUAL: std::ops::RangeInclusive<f64> = 0.5..=2.0;

/// Returns a warning about all ranks' latents of the first step, the same on each rank; `None` if
/// they are usual.
///
/// # Ordering
/// Every rank calls it.
pub fn warning(own: Moments, collective: &dyn Collective) -> Result<Option<String>> {
    let text = serde_json::to_string(&own).expect("numbers are JSON");
    let read = |text: &String| {
        serde_json::from_str::<Moments>(text).expect("ranks send what they measured")
    };
    let all =
        gather_texts(collective, &text)?.iter().map(read).fold(Moments::default(), Moments::merge);
    Ok(all.standard_deviation().and_then(question))
}

/// Returns a warning that latents may not be normalised, if their standard deviation is unusual.
pub fn question(deviation: f64) -> Option<String> {
    let what = "are they normalised (scaling and shift factor of the VAE)?";
    (!USUAL.contains(&deviation)).then(|| {
        format!("latents have standard deviation {deviation:.3}, about 1 was expected; {what}")
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::collective::Threads;

    #[test]
    fn all_ranks_latents_are_judged_together() {
        // Each rank's own latents have no spread at all.
        let warning_of = |rank: &Threads, scale: f64| {
            let latents = Tensor::full(
                [4],
                scale * (rank.rank() as f64 * 2.0 - 1.0),
                (Kind::Float, Device::Cpu),
            );
            warning(Moments::from_tensor(&latents), rank).expect("ranks that live")
        };
        for (scale, expected) in [(1.0, None), (12.1, Some("12.100")), (0.18, Some("0.180"))] {
            for told in Threads::run(2, |rank| warning_of(rank, scale)) {
                assert_eq!(told.is_some(), expected.is_some(), "{told:?}");
                assert!(
                    told.iter()
                        .zip(expected)
                        .all(|(told, number)| told
                            .contains(&format!("standard deviation {number}, "))),
                    "{told:?}"
                );
            }
        }
    }
}
