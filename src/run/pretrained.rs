//! First values of a model's parameters: from a diffusers transformer folder, or drawn.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::collective::Collective;
use crate::collective::agreement::{agreed, on_rank_zero, tensor_of_rank_zero};
use crate::error::Result;
use crate::model::Model;
use crate::nn::{ParamInfo, ParamSet};
use crate::parallel::Replica;
use crate::pulse;
use crate::rng::Key;
use crate::run::frozen_base::{Base, Fingerprint};
use crate::run::lora::FirstLora;
use crate::run::requests;
use crate::run::weights::Weights;

/// The origin of parameters; those that no file has are drawn.
pub struct Origin<'o> {
    pub family: &'o Model,
    /// The folder of the model's own parameters.
    pub folder: Option<&'o Path>,
    /// The file of a LoRA.
    pub lora: Option<&'o Path>,
    /// The key that all draws follow from.
    pub key: Key,
}

/// Fills the model with its first values. Rank 0 reads each tensor of a file once and sends it to
/// the others, one stage at a time; each rank keeps its shards. Returns what the frozen parameters
/// are, if there are any.
///
/// # Errors
/// On the failing rank [`Error::Data`](crate::error::Error::Data), on the others
/// [`Error::Peer`](crate::error::Error::Peer): before anything is changed, a list of every missing,
/// unexpected and misshapen tensor; later, the file and the tensor of a number that is not finite.
///
/// # Ordering
/// Every rank calls it.
pub fn begin(
    origin: &Origin<'_>,
    replica: &mut Replica<'_>,
    collective: &dyn Collective,
) -> Result<Option<Base>> {
    let Origin { family, folder, lora, .. } = *origin;
    // Opening reads headers only, so each rank can afford it.
    let weights = folder.map(|folder| Weights::open(folder, family, &replica.stages)).transpose();
    let weights = agreed(weights, collective)?;
    let reads = pulse::is_root(collective.rank());
    let first = lora.filter(|_| reads);
    let first = first.map(|path| FirstLora::open(path, family, &replica.stages)).transpose();
    let first = agreed(first, collective)?;
    let mut fingerprint = Fingerprint::default();
    for (stage, bucket) in replica.stages.iter().zip(&mut replica.buckets) {
        let params = stage.params();
        let values = || first_values(params, origin.key, weights.as_ref(), first.as_ref());
        let whole = if weights.is_some() || lora.is_some() {
            tensor_of_rank_zero(collective, params.numel(), values)?
        } else {
            values()?
        };
        if bucket.has_frozen() {
            let views = params.split(&whole);
            let frozen = params.infos().iter().zip(views.iter()).filter(|(info, _)| info.frozen);
            frozen.for_each(|(info, values)| fingerprint.add(&info.name, values));
        }
        bucket.set(&whole);
    }
    if !replica.has_frozen() {
        return Ok(None);
    }
    let path = folder.map(|folder| folder.display().to_string());
    let fingerprint = on_rank_zero(collective, || Ok(fingerprint.text()))?;
    Ok(Some(Base { path, fingerprint }))
}

/// Returns a stage's first values, `[P]` f32.
fn first_values(
    params: &ParamSet,
    key: Key,
    weights: Option<&Weights>,
    lora: Option<&FirstLora>,
) -> Result<Tensor> {
    let whole = match weights {
        Some(weights) => {
            let read = |info: &ParamInfo| match info.added {
                false => weights.read(&info.name),
                true => Ok(Tensor::zeros(&info.shape, (Kind::Float, Device::Cpu))),
            };
            let whole = flat(params.infos().iter(), read)?;
            params.initialize_only(&whole, key, |info| info.added);
            whole
        }
        None => {
            let whole = Tensor::zeros([params.numel()], (Kind::Float, Device::Cpu));
            params.initialize(&whole, key);
            whole
        }
    };
    if let Some(lora) = lora {
        lora.set(params, &whole);
    }
    Ok(whole)
}

/// Returns parameters, each read by itself, as one flat f32 buffer.
///
/// # Errors
/// Errors of `read`; [`Error::Stopped`](crate::error::Error::Stopped) if a signal arrived
/// meanwhile.
pub fn flat<'i>(
    infos: impl Iterator<Item = &'i ParamInfo> + Clone,
    read: impl Fn(&ParamInfo) -> Result<Tensor>,
) -> Result<Tensor> {
    let numel = infos.clone().map(ParamInfo::numel).sum::<i64>();
    let whole = Tensor::empty([numel], (Kind::Float, Device::Cpu));
    let mut offset = 0;
    for info in infos {
        requests::go_on()?;
        whole.narrow(0, offset, info.numel()).copy_(&read(info)?.flatten(0, -1));
        offset += info.numel();
    }
    Ok(whole)
}
