//! `[model]`: which family, from where, begun how, computed in what.

use std::path::Path;

use tch::Kind;

use crate::error::{Error, Result};
use crate::model::{Model, diffusers};
use crate::settings::{Choice, Family, Keys, Settings};

/// Kind of the model's computation; master weights and optimizer state are f32 whatever this is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dtype {
    #[default]
    Float32,
    Bfloat16,
}

impl Choice for Dtype {
    const ALL: &'static [(&'static str, Self)] =
        &[("float32", Dtype::Float32), ("bfloat16", Dtype::Bfloat16)];
}

impl Dtype {
    pub fn kind(self) -> Kind {
        match self {
            Dtype::Float32 => Kind::Float,
            Dtype::Bfloat16 => Kind::BFloat16,
        }
    }
}

/// What the parameters of a model with a `path` begin as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Beginning {
    #[default]
    Pretrained,
    Random,
}

impl Choice for Beginning {
    const ALL: &'static [(&'static str, Self)] =
        &[("pretrained", Beginning::Pretrained), ("random", Beginning::Random)];
}

/// `[model]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelSettings {
    pub path: Option<String>,
    pub init: Beginning,
    pub dtype: Dtype,
    pub family: Model,
    /// Whether the family is settled: a table names it, or it has been resolved.
    named: bool,
}

impl Settings for ModelSettings {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        let doc = "Folder of a diffusers transformer, config.json and safetensors; instead of the table with the architecture.";
        keys.optional_text("path", &mut self.path, doc);
        keys.choice(
            "init",
            &mut self.init,
            "What the parameters of a model with a `path` begin as; without one they are random.",
        );
        keys.choice(
            "dtype",
            &mut self.dtype,
            "Kind of the computation; master weights and optimizer state stay float32.",
        );
        self.named |= keys.member(&mut self.family, "The architecture.");
    }
}

impl ModelSettings {
    /// Takes the family from the folder at `path`, unless a table names it: a run's own listing
    /// does, and needs no folder.
    ///
    /// # Errors
    /// As [`diffusers::read_folder`]; [`Error::Config`] if the table and a folder that is there
    /// describe different models.
    pub fn resolve(&mut self) -> Result<()> {
        if let Some(path) = self.path.as_deref().map(Path::new) {
            if !self.named {
                self.family = diffusers::read_folder(path)?;
            } else if path.exists() && diffusers::read_folder(path)? != self.family {
                let what = format!(
                    "is another model than the one in {}; leave the table out, or the path",
                    path.display()
                );
                return Err(Error::config(format!("model.{}", self.family.name()), what));
            }
        }
        self.named = true;
        Ok(())
    }

    /// Folder of the weights to begin with, if the parameters do not begin at random.
    pub fn pretrained(&self) -> Option<&Path> {
        self.path.as_deref().map(Path::new).filter(|_| self.init == Beginning::Pretrained)
    }
}
