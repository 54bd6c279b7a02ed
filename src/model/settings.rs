//! `[model]`: which family, from where, begun how, computed in what.

use std::path::Path;

use tch::Kind;

use crate::error::{Error, Result};
use crate::model::{Model, diffusers};
use crate::nn::FrozenDtype;
use crate::settings::{Family, Named, choice, settings};

choice! {
    /// Kind of the model's computation; master weights and optimizer state are f32 in any case.
    pub enum Dtype {
        /// 32 bits.
        "float32" => Float32,
        /// 16 bits with the exponent of 32.
        "bfloat16" => Bfloat16,
    }
}

impl Dtype {
    pub fn kind(self) -> Kind {
        match self {
            Dtype::Float32 => Kind::Float,
            Dtype::Bfloat16 => Kind::BFloat16,
        }
    }
}

choice! {
    /// First values of the parameters of a model with a `path`.
    pub enum Beginning {
        /// The weights in the folder.
        "pretrained" => Pretrained,
        /// The family's own initialization.
        "random" => Random,
    }
}

settings! {
    /// `[model]`: the architecture, from a folder or from a table, and its kind.
    pub struct ModelSettings {
        /// Folder of a diffusers transformer, config.json and safetensors; instead of the table
        /// with the architecture.
        pub path: Option<String> = None;
        /// What the parameters of a model with a `path` begin as; without one they are random.
        pub init: Beginning = Beginning::Pretrained;
        /// Kind of the computation; master weights and optimizer state stay float32.
        pub dtype: Dtype = Dtype::Float32;
        /// Form of the blocks' frozen linear maps between products; unset: as they are
        /// computed with.
        pub frozen_dtype: Option<FrozenDtype> = None;
        /// The architecture.
        pub family: Named<Model>, as member;
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
            if !self.family.is_named {
                *self.family = diffusers::read_folder(path)?;
            } else if path.exists() && diffusers::read_folder(path)? != *self.family {
                let what = format!(
                    "is another model than the one in {}; leave the table out, or the path",
                    path.display()
                );
                return Err(Error::config(format!("model.{}", self.family.name()), what));
            }
        }
        self.family.is_named = true;
        Ok(())
    }

    /// The form of frozen linear maps; `None` if it is that of the computation.
    pub fn frozen_form(&self) -> Option<FrozenDtype> {
        let is_own =
            |form: &FrozenDtype| *form == FrozenDtype::Bfloat16 && self.dtype == Dtype::Bfloat16;
        self.frozen_dtype.filter(|form| !is_own(form))
    }

    /// Folder of the weights to begin with, if the parameters do not begin at random.
    pub fn pretrained(&self) -> Option<&Path> {
        self.path.as_deref().map(Path::new).filter(|_| self.init == Beginning::Pretrained)
    }
}
