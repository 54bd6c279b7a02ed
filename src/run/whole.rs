//! The parameters of the whole model of a checkpoint, one by one: trained ones from the checkpoint,
//! frozen ones from where they began, and weights with a low-rank change merged with it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use tch::Tensor;

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::files::safetensors::Shards;
use crate::nn::{LowRank, ParamInfo, ParamSet, Stage};
use crate::rng::{Key, Purpose};
use crate::run::checkpoint::{self, SavedWeights};
use crate::run::frozen_base::{Base, Fingerprint};
use crate::run::weights::Weights;

/// Reads the model of a checkpoint.
pub struct WholeModel<'s> {
    trained: Shards,
    /// The folder of the frozen parameters; `None` if they were drawn, or if there are none.
    frozen: Option<Weights>,
    key: Key,
    /// Changes by the name of the changed weight.
    changes: BTreeMap<String, (&'s LowRank, &'s ParamSet)>,
    /// Identity of the frozen parameters, as the checkpoint has it.
    base: Option<Base>,
    /// Fingerprint of the frozen parameters read so far.
    read: RefCell<Fingerprint>,
}

impl<'s> WholeModel<'s> {
    /// Opens a checkpoint of this configuration, whose stages are `stages`, with its trained
    /// parameters as they are or averaged.
    ///
    /// # Errors
    /// Errors of [`checkpoint::open_parameters`]; [`Error::Data`] if the folder with the
    /// frozen parameters is not the model's.
    pub fn open(
        folder: &Path,
        config: &RunConfig,
        weights: SavedWeights,
        stages: &'s [Box<dyn Stage>],
    ) -> Result<Self> {
        let base = checkpoint::base_of(folder)?;
        let origin = config.model.pretrained().filter(|_| base.is_some());
        let open = |origin| Weights::open(origin, &config.model.family, stages);
        let changes = stages.iter().flat_map(|stage| {
            let params = stage.params();
            let named =
                |change: &'s LowRank| (change.weight_name(params).to_string(), (change, params));
            params.low_ranks().iter().map(named).collect::<Vec<_>>()
        });
        Ok(WholeModel {
            trained: checkpoint::open_parameters(folder, config, weights, stages)?,
            frozen: origin.map(open).transpose()?,
            key: Key::new(config.seed, Purpose::Initialization),
            changes: changes.collect(),
            base,
            read: RefCell::default(),
        })
    }

    /// Returns one of the model's own parameters, f32 on the CPU.
    ///
    /// # Errors
    /// Errors of the files.
    pub fn read(&self, info: &ParamInfo) -> Result<Tensor> {
        let own = match (&self.frozen, info.frozen) {
            (_, false) => self.trained.read(&info.name)?,
            (Some(weights), true) => weights.read(&info.name)?,
            (None, true) => info.drawn(self.key),
        };
        if info.frozen {
            self.read.borrow_mut().add(&info.name, &own);
        }
        let Some((change, params)) = self.changes.get(&info.name) else { return Ok(own) };
        let (down, up, magnitude) = change.names(params);
        let magnitude = magnitude.map(|name| self.trained.read(name)).transpose()?;
        let factors = [&self.trained.read(down)?, &self.trained.read(up)?];
        Ok(change.merged(&own, factors, magnitude.as_ref()))
    }

    /// Checks, once every parameter was read, that the frozen ones are those of the checkpoint.
    ///
    /// # Errors
    /// [`Error::CheckpointMismatch`].
    pub fn check_base(&self, folder: &Path) -> Result<()> {
        let Some(base) = &self.base else { return Ok(()) };
        let fingerprint = self.read.borrow().text();
        if fingerprint == base.fingerprint {
            return Ok(());
        }
        let path = base.path.clone().filter(|_| self.frozen.is_some());
        let now = Base { path, fingerprint };
        let what = format!("the frozen parameters are {now}, the checkpoint's were {base}");
        Err(Error::checkpoint_mismatch(folder, what))
    }
}
