//! Weights that a run begins with, from a diffusers transformer folder.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::collective::Collective;
use crate::collective::agreement::{agreed, tensor_of_rank_zero};
use crate::error::{Error, Result};
use crate::files::safetensors::Shards;
use crate::model::Model;
use crate::nn::ParamSet;
use crate::parallel::Replica;
use crate::run::requests;

/// Name of the weights' files before their endings, diffusers'.
pub const STEM: &str = "diffusion_pytorch_model";

/// Fills the model with the folder's weights. Rank 0 reads each tensor once and sends it to the
/// others, a stage at a time; each rank keeps what it holds.
///
/// # Errors
/// On one rank, [`Error::Peer`] on the others: [`Error::Data`] listing every missing, unexpected
/// and misshapen tensor, before anything is changed; naming file and tensor of a number that is not
/// finite.
///
/// # Ordering
/// Every rank calls it.
pub fn load_pretrained(
    folder: &Path,
    family: &Model,
    replica: &mut Replica<'_>,
    collective: &dyn Collective,
) -> Result<()> {
    // Opening reads headers only, so that each rank may do it.
    let shards = agreed(open(folder, family, replica), collective)?;
    for (stage, bucket) in replica.stages.iter().zip(&mut replica.buckets) {
        let params = stage.params();
        let read = tensor_of_rank_zero(collective, params.numel(), || {
            flat(params, |name| shards.read_finite(name))
        })?;
        bucket.set(&read);
    }
    Ok(())
}

fn open(folder: &Path, family: &Model, replica: &Replica<'_>) -> Result<Shards> {
    let shards = Shards::of_stem(folder, STEM)?;
    let expected = replica.infos().map(|info| (info.name.clone(), info.shape.as_slice())).collect();
    let kinds = [Kind::Float, Kind::BFloat16, Kind::Half];
    shards
        .check(&expected, &kinds, family.ignored_parameters())
        .map_err(|what| Error::data(folder, what))?;
    Ok(shards)
}

/// One stage's parameters, each read by its name, as the flat f32 buffer that holds them.
///
/// # Errors
/// The error that reading meets; [`Error::Stopped`] if a signal came meanwhile.
pub fn flat(params: &ParamSet, read: impl Fn(&str) -> Result<Tensor>) -> Result<Tensor> {
    let whole = Tensor::empty([params.numel()], (Kind::Float, Device::Cpu));
    let mut offset = 0;
    for info in params.infos() {
        requests::go_on()?;
        whole.narrow(0, offset, info.numel()).copy_(&read(&info.name)?.flatten(0, -1));
        offset += info.numel();
    }
    Ok(whole)
}
