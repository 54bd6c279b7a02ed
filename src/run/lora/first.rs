//! The LoRA that a run begins with: A, B and magnitudes of its linear maps, from a file of any
//! dialect.

use std::collections::BTreeMap;
use std::path::Path;

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::files::outputs::Named;
use crate::lora::{self, Lora};
use crate::model::Model;
use crate::nn::{LowRank, ParamSet, Stage};
use crate::run::lora::family_of;

const KEY: &str = "lora.init_from";

/// A LoRA whose every pair is a change of the model's.
#[derive(Debug)]
pub struct FirstLora(Lora);

impl FirstLora {
    /// Reads a file, and compares it with the changes of the model.
    ///
    /// # Errors
    /// As [`lora::read`]; [`Error::Config`](crate::error::Error::Config) if it changes something
    /// else, or by other ranks.
    pub fn open(path: &Path, family: &Model, stages: &[Box<dyn Stage>]) -> Result<Self> {
        let file = Named { argument: KEY, path };
        let found = lora::read(file, Some(family_of(family, KEY)?))?;
        let first = FirstLora(found.lora);
        first.check(stages).map_err(|what| file.refused(what))?;
        Ok(first)
    }

    fn check(&self, stages: &[Box<dyn Stage>]) -> Result<(), String> {
        let params = || stages.iter().map(|stage| stage.params());
        let changes = params().flat_map(|params| {
            params.low_ranks().iter().map(move |change| (change.module(params), (change, params)))
        });
        let changes: BTreeMap<&str, (&LowRank, &ParamSet)> = changes.collect();
        for (module, pair) in &self.0.pairs {
            let Some((change, params)) = changes.get(module.as_str()) else {
                return Err(format!(
                    "changes `{module}`, which is no target of [lora] in this model"
                ));
            };
            let shape = |name: &str| {
                let info = params.infos().iter().find(|info| info.name == name);
                info.map(|info| info.shape.clone()).unwrap_or_default()
            };
            let (down, up, magnitude) = change.names(params);
            for (name, found) in [(down, &pair.a), (up, &pair.b)] {
                if found.size() != shape(name) {
                    let (found, needed) = (found.size(), shape(name));
                    return Err(format!("`{name}` is {found:?}, [lora] needs {needed:?}"));
                }
            }
            match (magnitude, &pair.magnitude) {
                (Some(_), None) => {
                    return Err(format!("`{module}` has no magnitude: it is no DoRA"));
                }
                (None, Some(_)) => {
                    return Err(format!("`{module}` has a magnitude: lora.use_dora must be true"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Sets what the file has of a stage's changes; its scale goes into B.
    pub fn set(&self, params: &ParamSet, flat: &Tensor) {
        let views = params.split(flat);
        let place = |name: &str| {
            let mut places = params.infos().iter().zip(views.iter());
            places.find(|(info, _)| info.name == name).map(|(_, view)| view.shallow_clone())
        };
        for change in params.low_ranks() {
            let Some(pair) = self.0.pairs.get(change.module(params)) else { continue };
            let (down, up, magnitude) = change.names(params);
            let up_values = &pair.b.to_kind(Kind::Float) * (pair.scale() / change.scale());
            let parts = [
                (Some(down), Some(&pair.a)),
                (Some(up), Some(&up_values)),
                (magnitude, pair.magnitude.as_ref()),
            ];
            for (name, values) in parts {
                if let (Some(mut view), Some(values)) = (name.and_then(place), values) {
                    view.copy_(values);
                }
            }
        }
    }
}
