//! The LoRA that a run begins with: A, B and magnitudes of its linear maps, from a file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tch::Tensor;

use crate::error::{Error, Result};
use crate::files::safetensors::SafeTensors;
use crate::nn::{LowRank, ParamSet, Stage};

/// Beginnings of names that stand for the model.
const PREFIXES: [&str; 3] = ["transformer.", "base_model.model.", "diffusion_model."];
const DOWN: &str = ".lora_A.weight";
const ALPHA: &str = ".alpha";

/// The file of a LoRA whose every pair is a change of the model's.
#[derive(Debug)]
pub struct FirstLora {
    path: PathBuf,
    file: SafeTensors,
    /// The beginning of the file's names of each module that it has.
    prefixes: BTreeMap<String, &'static str>,
}

impl FirstLora {
    /// Opens a file, and compares it with the changes of the model.
    ///
    /// # Errors
    /// [`Error::Data`] if it is no LoRA, or changes something else.
    pub fn open(path: &Path, stages: &[Box<dyn Stage>]) -> Result<Self> {
        let file = SafeTensors::open(path)?;
        let prefixes: BTreeMap<String, &'static str> = file
            .tensors()
            .iter()
            .filter_map(|info| info.name.strip_suffix(DOWN))
            .map(|name| {
                let prefix = PREFIXES.into_iter().find(|prefix| name.starts_with(prefix));
                let prefix = prefix.unwrap_or("");
                (name[prefix.len()..].to_string(), prefix)
            })
            .collect();
        let first = FirstLora { path: path.into(), file, prefixes };
        first.check(stages)?;
        Ok(first)
    }

    fn check(&self, stages: &[Box<dyn Stage>]) -> Result<()> {
        let refuse = |what: String| Err(Error::data(&self.path, what));
        if self.prefixes.is_empty() {
            return refuse(format!("holds no LoRA: no tensor is called …{DOWN}"));
        }
        let params = || stages.iter().map(|stage| stage.params());
        let changed: BTreeSet<&str> = params()
            .flat_map(|params| params.low_ranks().iter().map(|change| module(change, params)))
            .collect();
        if let Some(name) = self.prefixes.keys().find(|name| !changed.contains(name.as_str())) {
            return refuse(format!("changes `{name}`, which is no target of [lora] in this model"));
        }
        for params in params() {
            for change in params.low_ranks().iter().filter(|change| self.has(change, params)) {
                let (down, up, magnitude) = change.names(params);
                for name in [Some(down), Some(up), magnitude].into_iter().flatten() {
                    let info = params.infos().iter().find(|info| info.name == name);
                    let shape = &info.expect("a parameter of the change").shape;
                    let found = self.name_in_file(change, params, name);
                    match self.file.tensors().iter().find(|info| info.name == found) {
                        Some(info) if info.shape == *shape => {}
                        Some(info) => {
                            return refuse(format!(
                                "`{found}` is {:?}, [lora] needs {shape:?}",
                                info.shape
                            ));
                        }
                        None => return refuse(format!("holds no tensor `{found}`")),
                    }
                }
            }
        }
        Ok(())
    }

    /// Sets what the file has of a stage's changes.
    ///
    /// # Errors
    /// Errors of the file.
    pub fn set(&self, params: &ParamSet, flat: &Tensor) -> Result<()> {
        let views = params.split(flat);
        let place = |name: &str| {
            params.infos().iter().zip(views.iter()).find(|(info, _)| info.name == name)
        };
        for change in params.low_ranks().iter().filter(|change| self.has(change, params)) {
            let (down, up, magnitude) = change.names(params);
            let factor = self.scale(change, params)? / change.scale();
            for (name, factor) in [(Some(down), 1.0), (Some(up), factor), (magnitude, 1.0)] {
                let Some((_, view)) = name.and_then(place) else { continue };
                let name = self.name_in_file(change, params, name.unwrap_or_default());
                view.shallow_clone().copy_(&(self.file.read_finite(&name)? * factor));
            }
        }
        Ok(())
    }

    fn has(&self, change: &LowRank, params: &ParamSet) -> bool {
        self.prefixes.contains_key(module(change, params))
    }

    fn name_in_file(&self, change: &LowRank, params: &ParamSet, name: &str) -> String {
        let prefix = self.prefixes.get(module(change, params)).copied().unwrap_or_default();
        format!("{prefix}{name}")
    }

    /// The scale of the file's pair: alpha over rank, or 1 where there is no alpha.
    fn scale(&self, change: &LowRank, params: &ParamSet) -> Result<f64> {
        let module = module(change, params);
        let name = self.name_in_file(change, params, &format!("{module}{ALPHA}"));
        if !self.file.holds(&name) {
            return Ok(1.0);
        }
        let (down, ..) = change.names(params);
        let rank = self.file.read(&self.name_in_file(change, params, down))?.size()[0];
        Ok(self.file.read_finite(&name)?.double_value(&[]) / rank as f64)
    }
}

fn module<'p>(change: &LowRank, params: &'p ParamSet) -> &'p str {
    let weight = change.weight_name(params);
    weight.strip_suffix(".weight").unwrap_or(weight)
}
