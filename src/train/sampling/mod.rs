//! Samples of prompts while a run trains, always the same ones, so that a row of pictures shows
//! what the model learns.
//!
//! Each sample is made by one rank alone, with noise of its own seed, so that it has the same bits
//! at every number of ranks. Ranks take samples in turns, and those without one of their own repeat
//! one, so that all take part in gathering each stage's parameters. Texts are encoded before the
//! model is built, and their conditions kept; the decoder is in memory only while it decodes.
//!
//! | question | file |
//! |---|---|
//! | what is computed | `mod.rs` |
//! | when, and what becomes of it | `turn.rs` |
//! | the pictures in the run folder | `gallery.rs` |

mod gallery;
mod turn;

pub use gallery::row;

use std::path::Path;

use tch::{Device, Tensor};

use crate::collective::Collective;
use crate::collective::agreement::agree;
use crate::config::RunConfig;
use crate::data::Dataset;
use crate::error::Result;
use crate::parallel::Replica;
use crate::pulse;
use crate::sample::conditions::Origin;
use crate::sample::prompts::PromptedPipeline;
use gallery::Gallery;

/// Makes samples of a run's prompts.
pub struct Sampler {
    prompted: PromptedPipeline,
    /// The start of each sample: the conditions of its prompt, and its noise.
    origins: Vec<Origin>,
    gallery: Gallery,
}

impl Sampler {
    /// Encodes the prompts of a run, and removes from its folder the samples of steps after `step`;
    /// `None` if it has no prompts.
    ///
    /// # Errors
    /// As [`PromptedPipeline::of_run`] and [`PromptedPipeline::origins`].
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn new(
        config: &RunConfig,
        dataset: &Dataset,
        device: Device,
        run: &Path,
        collective: &dyn Collective,
    ) -> Result<Option<Self>> {
        let Some(prompted) = PromptedPipeline::of_run(config, dataset)? else { return Ok(None) };
        let prompted = prompted.on(device, config.model.dtype.kind());
        let gallery = Gallery::new(run, config, &prompted)?;
        let origins = prompted.origins(config, collective)?;
        Ok(Some(Sampler { prompted, origins, gallery }))
    }

    /// Generates the samples that are this rank's, each with its number; latents are
    /// `[1, C, (F,) H, W]` f32 on the CPU. `go_on` is called before each step from noise to data.
    ///
    /// # Errors
    /// Errors of the model and of `go_on`.
    ///
    /// # Ordering
    /// Every rank calls it.
    fn generate(
        &self,
        config: &RunConfig,
        replica: &Replica<'_>,
        device: Device,
        collective: &dyn Collective,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<Vec<(usize, Tensor)>> {
        let (count, world_size) = (self.origins.len(), collective.world_size());
        let mut own = Vec::new();
        for round in 0..count.div_ceil(world_size) {
            let turn = round * world_size + collective.rank();
            let origin = &self.origins[turn.min(count - 1)];
            let plan = self.prompted.plan(config, origin, device)?;
            let samples = plan.generate(replica, 1, go_on)?;
            if turn < count {
                own.push((turn, samples.images));
            }
        }
        Ok(own)
    }

    /// Writes the samples of a step, each on the rank that made it. Returns what went wrong on the
    /// first rank on which something did: pictures are no reason to end a run.
    ///
    /// # Errors
    /// Errors of the collectives.
    ///
    /// # Ordering
    /// Every rank calls it.
    fn kept_together(
        &self,
        step: u64,
        own: &[(usize, Tensor)],
        collective: &dyn Collective,
    ) -> Result<Option<String>> {
        let writes_list = pulse::is_root(collective.rank());
        let acts: [&dyn Fn() -> Result<()>; 3] = [
            &|| if writes_list { self.gallery.begin(step) } else { Ok(()) },
            &|| self.keep(step, own),
            &|| if writes_list { self.gallery.finish(step) } else { Ok(()) },
        ];
        for act in acts {
            let trouble = act().err().map(|error| error.to_string()).unwrap_or_default();
            let all = agree(Ok(trouble), collective)?;
            if let Some(trouble) = all.into_iter().find(|trouble| !trouble.is_empty()) {
                return Ok(Some(trouble));
            }
        }
        Ok(None)
    }

    /// Decodes samples and writes them into the run folder.
    ///
    /// # Errors
    /// Errors of the decoder and of the disk.
    fn keep(&self, step: u64, samples: &[(usize, Tensor)]) -> Result<()> {
        let kept = samples.iter().try_for_each(|(number, latents)| {
            pulse::still_at_work();
            self.gallery.write(step, *number, &self.prompted.frames(latents)?)
        });
        self.prompted.unload();
        kept
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tch::Kind;

    use super::*;
    use crate::collective::Threads;
    use crate::config::DEFAULT;
    use crate::sample::prompts::{Prompt, Words};

    #[test]
    fn a_picture_that_cannot_be_written_is_told_on_every_rank_and_is_no_error() {
        let sets = ["model.dit.in_channels=48", "model.dit.condition_width=64"];
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let config = RunConfig::read("test", DEFAULT, &sets).expect("sound settings");
        let run = tempfile::tempdir().expect("a temporary folder");
        let told = |is_blocked: bool| {
            Threads::run(2, |rank| {
                let words = Words { pipeline: "sampling.pipeline", size: "sampling.size" };
                let usual = || Ok(vec![48, 2, 2]);
                let prompted =
                    PromptedPipeline::open(&config, &[Prompt::new("a cat")], 1, words, usual);
                let prompted = prompted.expect("it needs no folder");
                let gallery = Gallery::new(run.path(), &config, &prompted).expect("no videos");
                let origins = prompted.origins(&config, rank).expect("no weights");
                let sampler = Sampler { prompted, origins, gallery };
                let latents = Tensor::zeros([1, 48, 2, 2], (Kind::Float, Device::Cpu));
                let own = if is_blocked { vec![] } else { vec![(rank.rank(), latents)] };
                sampler.kept_together(3, &own, rank).expect("all ranks answer")
            })
        };
        assert_eq!(told(false), [None, None]);
        assert!(run.path().join("samples/step-00000003/1.png").is_file());
        fs::remove_dir_all(run.path().join("samples")).expect("own files");
        fs::write(run.path().join("samples"), "a file").expect("a disk with room");
        for trouble in told(true) {
            let trouble = trouble.expect("no folder can be made there");
            assert!(trouble.contains("samples/step-00000003"), "{trouble}");
        }
    }
}
