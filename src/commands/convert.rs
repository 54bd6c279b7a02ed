//! `fm-dist convert`: writes a LoRA in another dialect.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files::outputs::Named;
use crate::lora::{self, Dialect, Family, Found};
use crate::model;
use crate::settings::{Choice, Family as _};

/// Options of `fm-dist convert`.
#[derive(Clone, Debug)]
pub struct ConvertRequest {
    /// A file of any dialect, or the folder of PEFT's.
    pub lora: PathBuf,
    pub format: Dialect,
    /// The file to create; for PEFT's dialect the folder.
    pub out: PathBuf,
    /// Family of the base, where names alone leave it open.
    pub family: Option<Family>,
    /// Leaves out LoRAs of text encoders instead of refusing a file with such.
    pub drop_text_encoders: bool,
    /// A diffusers transformer folder whose modules the LoRA must fit; its weights are not read.
    pub base: Option<PathBuf>,
}

/// Converts the file; returns a line about it.
///
/// # Errors
/// Errors of [`lora::read`] and [`lora::write`]; [`Error::Config`] if the LoRA does not fit the
/// base.
pub fn convert(request: &ConvertRequest) -> Result<String> {
    let input = Named { argument: "--lora", path: &request.lora };
    let out = Named { argument: "--out", path: &request.out };
    let base = request.base.as_deref().map(base).transpose()?;
    let of_base = base.as_ref().map(|(family, _)| *family);
    if let (Some(named), Some(family)) = (request.family, of_base)
        && named != family
    {
        let what = format!("is {}, the base is {}", named.word(), family.word());
        return Err(Error::config("--family", what));
    }
    let Found { lora, dialect, family, of_text_encoders } =
        lora::read(input, request.family.or(of_base))?;
    if of_text_encoders > 0 && !request.drop_text_encoders {
        return Err(input.refused(format!(
            "also holds {of_text_encoders} tensors of text encoders, which are not converted; leave them out by --drop-text-encoders"
        )));
    }
    if let Some((_, linears)) = &base {
        lora.fit(linears).map_err(|what| input.refused(format!("does not fit --base: {what}")))?;
    }
    lora::write(&lora, family, request.format, out)?;
    let count = lora.pairs.len();
    let (from, to) = (dialect.word(), request.format.word());
    let shown = request.out.display();
    let title = family.title;
    Ok(format!("{shown}: {count} modules of {title}, from {from} to {to}; read back and compared"))
}

/// Returns family and linear maps of a transformer folder.
fn base(folder: &Path) -> Result<(Family, lora::Linears)> {
    let model = model::read_folder(folder).map_err(about_base)?;
    let family = Family::parse(model.name()).map_err(|_| {
        Error::config("--base", format!("is a `{}`, without LoRA files", model.name()))
    })?;
    let stages = model.stages().map_err(about_base)?;
    let infos = stages.iter().flat_map(|stage| stage.params().infos());
    let linears = lora::linears(infos.map(|info| (info.name.as_str(), info.shape.as_slice())));
    Ok((family, linears))
}

/// Names the argument instead of the configuration's key.
fn about_base(error: Error) -> Error {
    let Error::Config { source_name, mut problems } = error else { return error };
    for problem in problems.iter_mut().filter(|problem| problem.key == "model.path") {
        problem.key = "--base".into();
    }
    Error::Config { source_name, problems }
}
