//! Loads initial weights from a diffusers transformer folder.

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

/// File name of diffusers' weights without its extension.
pub const STEM: &str = "diffusion_pytorch_model";

/// Fills the model with the folder's weights. Rank 0 reads each tensor once and sends it to the
/// others, one stage at a time; each rank keeps its shards.
///
/// # Errors
/// On the failing rank [`Error::Data`], on the others [`Error::Peer`]: before anything is changed,
/// a list of every missing, unexpected and misshapen tensor; later, the file and the tensor of a
/// number that is not finite.
///
/// # Ordering
/// Every rank calls it.
pub fn load_pretrained(
    folder: &Path,
    family: &Model,
    replica: &mut Replica<'_>,
    collective: &dyn Collective,
) -> Result<()> {
    // Opening reads headers only, so each rank can afford it.
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
    let shards = Shards::open_stem(folder, STEM)?;
    let expected = replica.infos().map(|info| (info.name.clone(), info.shape.as_slice())).collect();
    let kinds = [Kind::Float, Kind::BFloat16, Kind::Half];
    shards
        .check(&expected, &kinds, family.ignored_parameters())
        .map_err(|what| Error::data(folder, what))?;
    Ok(shards)
}

/// Returns one stage's parameters, each read by its name, as one flat f32 buffer.
///
/// # Errors
/// Errors of `read`; [`Error::Stopped`] if a signal arrived meanwhile.
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
