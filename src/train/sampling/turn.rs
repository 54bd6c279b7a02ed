//! The turn of samples in a run: when they are made, and what becomes of them.
//!
//! They come between a step and its checkpoint, after a validation, so that a run that goes on from
//! the checkpoint has them. Where they were left out since the run was asked to stop, they are made
//! up for.

use std::time::{Duration, Instant};

use crate::collective::agreement::on_rank_zero;
use crate::error::{Error, Result};
use crate::fault;
use crate::phase::Phase;
use crate::pulse;
use crate::run::requests::{Request, Requests};
use crate::telemetry::tensorboard::EventValue;
use crate::train::trainer::Trainer;

impl Trainer<'_> {
    /// Removes the samples of later steps, and makes those of the step that this start goes on from
    /// if they are due and missing. Returns false if the run is asked to stop meanwhile.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn sample_at_start(&mut self, requests: &Requests) -> Result<bool> {
        let Some(sampler) = &self.sampler else { return Ok(true) };
        let step = self.manifest.step;
        let is_due = self.config.sampling.is_due(step, self.config.max_steps);
        let looked = || {
            match self.folder.resumed_from() {
                Some(_) => sampler.gallery.cut_after(step)?,
                None => sampler.gallery.clear()?,
            }
            let is_owed = is_due && !sampler.gallery.has(step);
            Ok(if is_owed { "owed".into() } else { String::new() })
        };
        let owed = on_rank_zero(self.collective, looked)?;
        if owed.is_empty() { Ok(true) } else { self.sampled(requests) }
    }

    /// Makes samples after a step if they are due, unless the run is asked to stop. Returns the
    /// time that it took, and the request that it met.
    ///
    /// # Ordering
    /// Every rank calls it, with the same request.
    pub fn sample_if_due(
        &mut self,
        request: Request,
        requests: &Requests,
    ) -> Result<(Duration, Request)> {
        let began = Instant::now();
        self.owes_samples = false;
        if !self.config.sampling.is_due(self.manifest.step, self.config.max_steps) {
            return Ok((Duration::ZERO, request));
        }
        if request != Request::Stop && self.sampled(requests)? {
            return Ok((began.elapsed(), request));
        }
        self.owes_samples = self.sampler.is_some();
        let step = self.manifest.step;
        tracing::info!("samples of step {step} are left out, as the run is asked to stop");
        Ok((Duration::ZERO, Request::Stop))
    }

    /// Makes and keeps samples of the weights that would be exported, averages if there are any;
    /// false if the run was asked to stop meanwhile.
    fn sampled(&mut self, requests: &Requests) -> Result<bool> {
        let Trainer {
            sampler, replica, optimizer_state, config, device, collective, events, ..
        } = self;
        let Some(sampler) = sampler else { return Ok(true) };
        let (began, step) = (Instant::now(), self.manifest.step);
        pulse::enter(Phase::Sample);
        fault::error(Phase::Sample)?;
        let go_on = || requests.go_on_together(*collective);
        let made = optimizer_state.with_averages(replica, |replica| {
            sampler.generate(config, replica, *device, *collective, &go_on)
        });
        let own = match made {
            Ok(own) => own,
            Err(Error::Stopped { .. }) => return Ok(false),
            Err(error) => return Err(error),
        };
        if let Some(trouble) = sampler.kept_together(step, &own, *collective)? {
            tracing::warn!("samples of step {step} are incomplete: {trouble}; training goes on");
            return Ok(true);
        }
        tracing::info!(
            "[SAMPLES {step}] {} of prompts in {}, {:.1} s",
            sampler.origins.len(),
            sampler.gallery.of_step(step).display(),
            began.elapsed().as_secs_f64()
        );
        if events.are_written() {
            match sampler.gallery.pictures(step) {
                Ok(pictures) => events.append(step, || {
                    pictures.iter().map(|(tag, png)| (tag.clone(), EventValue::Png(png))).collect()
                }),
                Err(error) => tracing::warn!("no samples for TensorBoard: {error}"),
            }
        }
        Ok(true)
    }
}
