//! LoRAs from files that are added to a model whose own is trained, or that has none: each changes
//! the weights by its own product, so that several of one module sum up.

use std::path::PathBuf;

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::files::outputs::Named;
use crate::lora::{self, Lora, Pair, linears};
use crate::model::Model;
use crate::nn::{Init, LowRankChange, ParamSet, Stage, Tuned};
use crate::parallel::Replica;
use crate::run::lora::family_of;

const ARGUMENT: &str = "--lora";

/// A file of a LoRA of any dialect, and the factor of its change.
#[derive(Clone, Debug, PartialEq)]
pub struct AddedLora {
    pub file: PathBuf,
    pub scale: f64,
}

/// LoRAs that fit a model, in the order in which they are added.
#[derive(Debug)]
pub struct AddedLoras(Vec<(Lora, f64)>);

impl AddedLoras {
    /// Reads the files, and compares them with the model.
    ///
    /// # Errors
    /// As [`lora::read`]; [`Error::Config`](crate::error::Error::Config) if one changes what the
    /// model does not have, or if a DoRA, which takes a weight's norm, would not be the only change
    /// of it.
    pub fn open(files: &[AddedLora], family: &Model, stages: &[Box<dyn Stage>]) -> Result<Self> {
        let mut read: Vec<(Lora, f64)> = Vec::new();
        for AddedLora { file, scale } in files {
            let named = Named { argument: ARGUMENT, path: file };
            let found = lora::read(named, Some(family_of(family, ARGUMENT)?))?;
            let what = format!("{} tensors of text encoders", found.of_text_encoders);
            if found.of_text_encoders > 0 {
                tracing::warn!("{}: {what} are left out", file.display());
            }
            fit(&found.lora, stages, &read).map_err(|what| named.refused(what))?;
            read.push((found.lora, *scale));
        }
        Ok(AddedLoras(read))
    }

    /// Returns the model with these changes beside its own.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn added_to(
        &self,
        model: Replica<'static>,
        kind: Kind,
        device: Device,
    ) -> Result<Replica<'static>> {
        if self.0.is_empty() {
            return Ok(model);
        }
        let mut flats = Vec::new();
        for stage in 0..model.stages.len() {
            flats.push(model.parameters(stage)?.to_device(Device::Cpu));
        }
        let (before, stages): (Vec<ParamSet>, Vec<Box<dyn Stage>>) = model
            .stages
            .into_iter()
            .map(|stage| (stage.params().clone(), self.changed(stage)))
            .unzip();
        drop(model.buckets);
        let mut changed = Replica::alone(stages, kind, device, None);
        let stages = changed.stages.iter().zip(&mut changed.buckets);
        for (((stage, bucket), before), flat) in stages.zip(&before).zip(flats) {
            bucket.set(&self.values(stage.params(), before, &flat));
        }
        Ok(changed)
    }

    fn changed(&self, stage: Box<dyn Stage>) -> Box<dyn Stage> {
        let mut params = stage.params().clone();
        for (lora, scale) in &self.0 {
            for (weight, pair) in pairs(lora, stage.params()) {
                params.change_by_low_rank(&weight, &change(pair, *scale));
            }
        }
        Box::new(Tuned::new(stage, params))
    }

    /// Returns a changed stage's parameters, `[P]` f32: those of before, and the pairs.
    fn values(&self, params: &ParamSet, before: &ParamSet, flat: &Tensor) -> Tensor {
        let whole = Tensor::zeros([params.numel()], (Kind::Float, Device::Cpu));
        let (views, known) = (params.split(&whole), before.split(flat));
        let own = before.low_ranks().len();
        for (info, view) in before.infos().iter().zip(known.iter()) {
            let mut places = params.infos().iter().zip(views.iter());
            let place = places.find(|(other, _)| other.name == info.name);
            let (_, place) = place.expect("a changed stage keeps its parameters");
            place.shallow_clone().copy_(view);
        }
        let added = self.0.iter().flat_map(|(lora, _)| pairs(lora, before));
        for (change, (_, pair)) in params.low_ranks()[own..].iter().zip(added) {
            change.set(&views, [&pair.a, &pair.b], pair.magnitude.as_ref());
        }
        whole
    }
}

/// The pairs of a stage's linear maps, with the name of each weight.
fn pairs<'a>(lora: &'a Lora, params: &ParamSet) -> Vec<(String, &'a Pair)> {
    let of = |weight: &str| lora.pairs.get(weight.strip_suffix(".weight")?);
    params.linears().filter_map(|info| Some((info.name.clone(), of(&info.name)?))).collect()
}

fn change(pair: &Pair, scale: f64) -> LowRankChange {
    LowRankChange {
        rank: pair.rank(),
        scale: scale * pair.scale(),
        init: Init::Zeros,
        precise: false,
        with_magnitude: pair.magnitude.is_some(),
        dropout: 0.0,
    }
}

/// Checks that a LoRA changes what a model has, behind others.
fn fit(lora: &Lora, stages: &[Box<dyn Stage>], earlier: &[(Lora, f64)]) -> Result<(), String> {
    let maps = stages.iter().flat_map(|stage| stage.params().linears());
    lora.fit(&linears(maps.map(|info| (info.name.as_str(), info.shape.as_slice()))))?;
    let own = |module: &str| {
        let mut changes = stages.iter().flat_map(|stage| {
            let params = stage.params();
            params.low_ranks().iter().map(move |change| change.module(params))
        });
        changes.any(|changed| changed == module)
    };
    let is_changed = |module: &str| {
        own(module) || earlier.iter().any(|(other, _)| other.pairs.contains_key(module))
    };
    let mut magnitudes = lora.pairs.iter().filter(|(_, pair)| pair.magnitude.is_some());
    match magnitudes.find(|(module, _)| is_changed(module)) {
        Some((module, _)) => Err(format!(
            "is a DoRA, which must be the first change of `{module}`: name it first, or merge the others"
        )),
        None => Ok(()),
    }
}
