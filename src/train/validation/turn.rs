//! A validation's turn in a run: when there is one, and what becomes of it.
//!
//! A validation comes between a step and its checkpoint, so that the checkpoint holds its loss. One
//! that is left out since the run is asked to stop is made up for where the run goes on: the
//! checkpoint without it says so.

use std::time::Duration;

use crate::collective::agreement::on_rank_zero;
use crate::error::{Error, Result};
use crate::fault;
use crate::phase::Phase;
use crate::pulse;
use crate::run::checkpoint::{Judged, best};
use crate::run::requests::{Request, Requests};
use crate::train::trainer::Trainer;
use crate::train::validation::Judgement;

/// The findings of a validation.
struct Found {
    judged: Judged,
    judgement: Judgement,
}

impl Trainer<'_> {
    /// Validates before the first step of a start, if the step before has a validation that it was
    /// not given: before training, or where a run was asked to stop meanwhile. Returns false if it
    /// is asked to stop again.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn validate_at_start(&mut self, requests: &Requests) -> Result<bool> {
        if !self.owes_validation {
            return Ok(true);
        }
        let Some(Found { judged, judgement }) = self.found(requests)? else { return Ok(false) };
        self.owes_validation = false;
        self.tell(&judgement);
        // Before the first step there is no checkpoint.
        if judged.step > 0 {
            self.saver.record(&judged, self.collective)?;
        }
        Ok(true)
    }

    /// Validates after a step if it is due, unless the run is asked to stop. Returns the time that
    /// it took, and the request that it met.
    ///
    /// # Ordering
    /// Every rank calls it, with the same request.
    pub fn validate_if_due(
        &mut self,
        request: Request,
        requests: &Requests,
    ) -> Result<(Duration, Request)> {
        (self.judged, self.is_best) = (None, false);
        let step = self.manifest.step;
        let is_due = self.config.validation.is_due(step, self.config.max_steps);
        if !is_due {
            return Ok((Duration::ZERO, request));
        }
        let found = if request == Request::Stop { None } else { self.found(requests)? };
        let Some(Found { judged, judgement }) = found else {
            self.owes_validation = true;
            tracing::info!("validation of step {step} is left out, as the run is asked to stop");
            return Ok((Duration::ZERO, Request::Stop));
        };
        self.tell(&judgement);
        self.is_best = self.saver.would_be_best(&judged, self.collective)?;
        self.judged = Some(judged);
        Ok((Duration::from_secs_f64(judgement.seconds), request))
    }

    /// Judges the weights that would be exported, averages if there are any; `None` if the run was
    /// asked to stop meanwhile.
    fn found(&mut self, requests: &Requests) -> Result<Option<Found>> {
        let Trainer { validator, replica, optimizer_state, pipeline, collective, manifest, .. } =
            self;
        let Some(validator) = validator else { return Ok(None) };
        pulse::enter(Phase::Validate);
        fault::error(Phase::Validate)?;
        let go_on = || requests.go_on_together(*collective);
        let judging = optimizer_state.with_averages(replica, |replica| {
            validator.judge(replica, pipeline, *collective, &go_on)
        });
        match judging {
            Ok(judgement) => {
                let (step, loss) = (manifest.step, judgement.loss);
                let criterion = validator.set().criterion.clone();
                Ok(Some(Found { judged: Judged { step, loss, criterion }, judgement }))
            }
            Err(Error::Stopped { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn tell(&mut self, judgement: &Judgement) {
        let step = self.manifest.step;
        tracing::info!("{}", judgement.line(step));
        self.metrics.append(&judgement.metrics(step));
        self.events.append(step, || judgement.scalars());
    }

    /// Returns true on every rank if the step that the run goes on from has a validation, and its
    /// checkpoint lacks it or holds one by another criterion.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub(in crate::train) fn owes_validation(&self) -> Result<bool> {
        let Some(validator) = &self.validator else { return Ok(false) };
        if !self.config.validation.is_due(self.manifest.step, self.config.max_steps) {
            return Ok(false);
        }
        let looked = || {
            let known = self.folder.resumed_from().and_then(best::judged);
            let is_known = known.is_some_and(|known| known.criterion == validator.set().criterion);
            Ok(if is_known { String::new() } else { "owed".into() })
        };
        Ok(!on_rank_zero(self.collective, looked)?.is_empty())
    }
}
