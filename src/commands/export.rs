//! `fm-dist export`: writes a checkpoint's parameters as a diffusers transformer folder, or its
//! LoRA as a file of another program.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::json;
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::files::disk::{Disk, Output};
use crate::files::outputs::{Named, check_new_folder, refuse_existing};
use crate::files::safetensors::{self, WEIGHTS_STEM};
use crate::lora::Dialect;
use crate::model::{self, Dtype};
use crate::nn::ParamInfo;
use crate::run::checkpoint::SavedWeights;
use crate::run::folder;
use crate::run::locate::locate;
use crate::run::lora::files as lora_files;
use crate::run::whole::WholeModel;
use crate::settings::Family;

/// Options of `fm-dist export`.
#[derive(Clone, Debug)]
pub struct ExportRequest {
    /// A run folder or one of its checkpoints.
    pub run: PathBuf,
    /// The folder to create.
    pub out: PathBuf,
    /// Maximum size of a file of tensors; a single larger tensor gets a file of its own.
    pub max_shard_bytes: u64,
    /// Kind of the tensors; the run's own if unset. Parameters that diffusers keeps in f32 stay
    /// f32.
    pub dtype: Option<Dtype>,
    /// True if a LoRA is merged into the model that it was trained on.
    pub merge: bool,
    /// The format in which a LoRA is written, instead of a model.
    pub format: Option<Dialect>,
    /// The weights as they are, or averaged.
    pub weights: SavedWeights,
}

/// Writes `config.json` and the parameters of the whole model under diffusers' names; the folder
/// appears whole or not at all.
///
/// # Errors
/// [`Error::Config`] if diffusers has no class for the model, or the checkpoint no averages;
/// [`Error::NoCheckpoint`], [`Error::CheckpointMismatch`]; [`Error::Storage`], also if `out` exists
/// already.
pub fn export(request: &ExportRequest) -> Result<()> {
    if let Some(dialect) = request.format {
        let (run, folder) = locate(&request.run)?;
        let out = Named { argument: "--out", path: &request.out };
        let config = folder::config_of(&run)?;
        return lora_files::export(&folder, &config, request.weights, dialect, out);
    }
    refuse_existing(&request.out)?;
    check_new_folder(Named { argument: "--out", path: &request.out })?;
    let (run, folder) = locate(&request.run)?;
    let config = folder::config_of(&run)?;
    let family = &config.model.family;
    let no_class = || {
        Error::config(
            "--run",
            format!("trained a `{}`, for which diffusers has no class", family.name()),
        )
    };
    let description = model::write_config(family).ok_or_else(no_class)?;
    if config.lora.rank.is_some() && !request.merge {
        let what = "trained a LoRA; --format writes it, --merge the whole model with it";
        return Err(Error::config("--run", what));
    }
    let stages = config.stages()?;
    let parameters = WholeModel::open(&folder, &config, request.weights, &stages)?;
    let kind = request.dtype.unwrap_or(config.model.dtype).kind();
    let tensors: Vec<Planned<'_>> = stages
        .iter()
        .flat_map(|stage| stage.params().infos())
        .filter(|info| !info.added)
        .map(|info| Planned::new(info, kind))
        .collect();
    let export = Export {
        staged: staged(&request.out)?,
        parameters,
        shards: cut(&tensors, request.max_shard_bytes),
    };
    export.write(&description)?;
    export.parameters.check_base(&folder)?;
    Disk::PLAIN.rename(&export.staged, &request.out)
}

/// A parameter and the kind in which it is written.
#[derive(Clone, Copy)]
struct Planned<'i> {
    info: &'i ParamInfo,
    kind: Kind,
}

impl<'i> Planned<'i> {
    fn new(info: &'i ParamInfo, kind: Kind) -> Self {
        Planned { info, kind: if info.precise { Kind::Float } else { kind } }
    }

    fn bytes(&self) -> u64 {
        self.info.numel() as u64 * self.kind.elt_size_in_bytes() as u64
    }
}

/// Divides tensors into consecutive groups of at most `max_bytes` each.
fn cut<'i>(tensors: &[Planned<'i>], max_bytes: u64) -> Vec<Vec<Planned<'i>>> {
    let mut shards: Vec<Vec<Planned<'i>>> = Vec::new();
    let mut bytes = u64::MAX;
    for tensor in tensors {
        bytes = bytes.saturating_add(tensor.bytes());
        match shards.last_mut() {
            Some(shard) if bytes <= max_bytes => shard.push(*tensor),
            _ => {
                shards.push(vec![*tensor]);
                bytes = tensor.bytes();
            }
        }
    }
    shards
}

/// Creates a fresh folder beside `out` to write into.
fn staged(out: &Path) -> Result<PathBuf> {
    refuse_existing(out)?;
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let staged = out.with_file_name(format!(".{name}.tmp"));
    if staged.exists() {
        fs::remove_dir_all(&staged).map_err(Error::storage(&staged, "clear"))?;
    }
    fs::create_dir_all(&staged).map_err(Error::storage(&staged, "create"))?;
    Ok(staged)
}

struct Export<'i> {
    staged: PathBuf,
    parameters: WholeModel<'i>,
    shards: Vec<Vec<Planned<'i>>>,
}

impl Export<'_> {
    fn write(&self, description: &str) -> Result<()> {
        self.write_text("config.json", description)?;
        for index in 0..self.shards.len() {
            self.write_shard(index)?;
        }
        if self.shards.len() > 1 {
            self.write_text(&format!("{WEIGHTS_STEM}.safetensors.index.json"), &self.index())?;
        }
        Disk::PLAIN.sync_folder(&self.staged)
    }

    fn shard_name(&self, index: usize) -> String {
        match self.shards.len() {
            1 => format!("{WEIGHTS_STEM}.safetensors"),
            count => format!("{WEIGHTS_STEM}-{:05}-of-{count:05}.safetensors", index + 1),
        }
    }

    fn write_shard(&self, index: usize) -> Result<()> {
        let read =
            |planned: &Planned<'_>| Ok(self.parameters.read(planned.info)?.to_kind(planned.kind));
        let tensors = self.shards[index].iter().map(read).collect::<Result<Vec<Tensor>>>()?;
        let names = self.shards[index].iter().map(|planned| planned.info.name.as_str());
        let named: Vec<(&str, &Tensor)> = names.zip(&tensors).collect();
        // Without this entry diffusers takes the file for another framework's.
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        self.write_file(&self.shard_name(index), |file| safetensors::write(file, &named, &metadata))
    }

    fn index(&self) -> String {
        let places = self
            .shards
            .iter()
            .enumerate()
            .flat_map(|(index, shard)| shard.iter().map(move |planned| (index, planned)));
        let map: BTreeMap<&str, String> = places
            .map(|(index, planned)| (planned.info.name.as_str(), self.shard_name(index)))
            .collect();
        let bytes: u64 = self.shards.iter().flatten().map(Planned::bytes).sum();
        serde_json::to_string_pretty(
            &json!({ "metadata": { "total_size": bytes }, "weight_map": map }),
        )
        .expect("texts are JSON")
            + "\n"
    }

    fn write_text(&self, name: &str, text: &str) -> Result<()> {
        self.write_file(name, |file| file.write_all(text.as_bytes()))
    }

    fn write_file(
        &self,
        name: &str,
        fill: impl FnOnce(&mut BufWriter<Output<'_>>) -> io::Result<()>,
    ) -> Result<()> {
        Disk::PLAIN.write_file(&self.staged.join(name), None, fill)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Init, Rows};

    #[test]
    fn shards_are_as_full_as_they_may_be_and_a_giant_stands_alone() {
        let info = |numel: i64| ParamInfo {
            name: format!("p{numel}"),
            shape: vec![numel],
            init: Init::Zeros,
            precise: false,
            frozen: false,
            added: false,
            rows: Rows::One,
            form: None,
            lr_factor: 1.0,
            decay_factor: 0.0,
        };
        let infos = [3, 4, 20, 1, 9].map(info);
        let planned: Vec<Planned<'_>> =
            infos.iter().map(|info| Planned::new(info, Kind::BFloat16)).collect();
        let sizes = |max_bytes| {
            cut(&planned, max_bytes).iter().map(|shard| shard.len()).collect::<Vec<_>>()
        };
        assert_eq!(sizes(20), [2, 1, 2]);
        assert_eq!(sizes(13), [1, 1, 1, 1, 1]);
        assert_eq!(sizes(u64::MAX - 1), [5]);
    }
}
