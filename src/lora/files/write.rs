//! Writes a file of one dialect, reads it back, and gives it its name only then.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use super::read::read;
use super::{ALPHA, Alpha, Dialect, Form, config, diffusers, facts, peft, rows};
use crate::error::{Error, Result};
use crate::files::disk::Disk;
use crate::files::outputs::{Named, check_files, check_new_folder, refuse_existing};
use crate::files::safetensors;
use crate::lora::family::{Family, Part};
use crate::lora::{Lora, Pair};

/// Writes the LoRA: a file, or PEFT's folder. Nothing is ever written over.
///
/// # Errors
/// [`Error::Config`] if `out` cannot be written, a module is none of the family's, or the dialect
/// cannot hold it; [`Error::Storage`], also if `out` exists; [`Error::Data`] if what was written
/// does not read back as the LoRA.
pub fn write(lora: &Lora, family: Family, dialect: Dialect, out: Named<'_>) -> Result<()> {
    let path = out.path;
    if dialect == Dialect::Peft {
        check_new_folder(out)?
    } else {
        check_files(&[out], &[])?
    }
    refuse_existing(path)?;
    let content = content(lora, family, dialect).map_err(|what| out.refused(what))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = path.with_file_name(format!(".{name}.tmp"));
    clear(&unfinished)?;
    let written = content
        .write(&unfinished)
        .and_then(|()| verify(lora, family, Named { argument: out.argument, path: &unfinished }));
    if let Err(error) = written {
        clear(&unfinished)?;
        return Err(error);
    }
    refuse_existing(path)?;
    Disk::PLAIN.rename(&unfinished, path)
}

/// Removes what an interrupted write left.
fn clear(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Err(_) => return Ok(()),
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    removed.map_err(Error::storage(path, "clear"))
}

/// The tensors and texts that a file, or PEFT's folder, will hold.
struct Content {
    tensors: Vec<(String, Tensor)>,
    metadata: BTreeMap<String, String>,
    /// Text of `adapter_config.json`.
    config: Option<String>,
}

impl Content {
    fn write(&self, path: &Path) -> Result<()> {
        let Some(config) = &self.config else { return self.write_tensors(path) };
        Disk::PLAIN.create_folder(path)?;
        self.write_tensors(&path.join(peft::FILE))?;
        Disk::PLAIN
            .write_file(&path.join(peft::CONFIG), None, |file| file.write_all(config.as_bytes()))?;
        Disk::PLAIN.sync_folder(path)
    }

    fn write_tensors(&self, path: &Path) -> Result<()> {
        let named: Vec<(&str, &Tensor)> =
            self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        Disk::PLAIN.write_file(path, None, |file| safetensors::write(file, &named, &self.metadata))
    }
}

/// A matrix of the file: its form, and the pairs of its parts.
struct Matrix<'a> {
    form: Form,
    parts: Vec<Option<&'a Pair>>,
}

fn content(lora: &Lora, family: Family, dialect: Dialect) -> Result<Content, String> {
    let mut tensors = Vec::new();
    for (stem, Matrix { form, parts }) in matrices(lora, family, dialect)? {
        let about = |what: String| format!("cannot hold `{stem}`: it {what}");
        let pair = match (form.place.part, parts.as_slice()) {
            (Part::Slice { of, .. }, parts) => rows::joined(parts, of).map_err(about)?,
            (Part::Swapped, [Some(pair)]) => rows::swapped(pair).map_err(about)?,
            (_, parts) => parts[0].expect("a pair for each matrix").shallow_clone(),
        };
        tensors.extend(stored(&stem, &form, &pair));
    }
    let mut metadata = facts::common(lora, family);
    let (alpha, mut text) = (alpha(lora, family, dialect), None);
    match dialect {
        Dialect::Diffusers => {
            let fields = config::describe(lora, family, alpha);
            let prefixed: Map<String, Value> = fields
                .into_iter()
                .map(|(key, value)| (format!("{}{key}", diffusers::PREFIX), value))
                .collect();
            metadata.insert(diffusers::METADATA.into(), pretty(prefixed));
        }
        Dialect::Peft => {
            let mut fields = config::describe(lora, family, alpha);
            fields.insert("base_model_name_or_path", json!(lora.facts.base_model));
            fields.insert("peft_type", json!("LORA"));
            fields.insert("task_type", Value::Null);
            fields.insert("inference_mode", json!(true));
            fields.insert("lora_dropout", json!(0.0));
            fields.insert("fan_in_fan_out", json!(false));
            text =
                Some(pretty(fields.into_iter().map(|(key, value)| (key.into(), value)).collect()));
        }
        Dialect::Kohya | Dialect::Comfyui => metadata.extend(facts::kohya(lora, family, alpha)),
    }
    Ok(Content { tensors, metadata, config: text })
}

fn pretty(fields: Map<String, Value>) -> String {
    serde_json::to_string_pretty(&fields).expect("texts and numbers are JSON")
}

/// The place of alpha in most of the file.
fn alpha(lora: &Lora, family: Family, dialect: Dialect) -> Alpha {
    let forms = lora.pairs.keys().filter_map(|name| family.linear(name));
    let places: Vec<Alpha> = forms.map(|found| dialect.form(family, found.linear).alpha).collect();
    let is_other = places.iter().find(|place| !place.is_folded());
    is_other.copied().unwrap_or(Alpha::Folded)
}

/// Returns the matrices that the file will have, by prefix and name.
fn matrices<'a>(
    lora: &'a Lora,
    family: Family,
    dialect: Dialect,
) -> Result<BTreeMap<String, Matrix<'a>>, String> {
    let mut matrices: BTreeMap<String, Matrix<'a>> = BTreeMap::new();
    for (name, pair) in &lora.pairs {
        let found = family
            .linear(name)
            .ok_or_else(|| format!("`{name}` is no linear map of {}", family.title))?;
        let form = dialect.form(family, found.linear);
        let module = form.place.name.replace('*', found.number);
        let module = if form.is_flat { module.replace('.', "_") } else { module };
        let (count, index) = match form.place.part {
            Part::Slice { of, index } => (of.len(), index),
            Part::Whole | Part::Swapped => (1, 0),
        };
        let matrix = matrices
            .entry(format!("{}{module}", form.prefix))
            .or_insert_with(|| Matrix { form, parts: vec![None; count] });
        matrix.parts[index] = Some(pair);
    }
    Ok(matrices)
}

/// Returns the tensors of one matrix.
fn stored(stem: &str, form: &Form, pair: &Pair) -> Vec<(String, Tensor)> {
    let is_folded = form.alpha.is_folded();
    let b = if is_folded { pair.scaled_b() } else { pair.b.shallow_clone() };
    let mut tensors = vec![
        (format!("{stem}{}", form.suffixes.a), pair.a.contiguous()),
        (format!("{stem}{}", form.suffixes.b), b.contiguous()),
    ];
    if matches!(form.alpha, Alpha::Tensor | Alpha::FoldedWithTensor) {
        let alpha = if is_folded { pair.rank() as f64 } else { pair.alpha };
        let alpha = Tensor::from_slice(&[alpha as f32]).squeeze();
        tensors.push((format!("{stem}{ALPHA}"), alpha));
    }
    if let Some(magnitude) = &pair.magnitude {
        let shape: &[i64] = if form.suffixes.has_column { &[-1, 1] } else { &[-1] };
        tensors.push((format!("{stem}{}", form.suffixes.magnitude), magnitude.reshape(shape)));
    }
    tensors
}

/// Reads the file back: every name leads to its module, and every pair does what it did.
fn verify(lora: &Lora, family: Family, written: Named<'_>) -> Result<()> {
    let found = read(written, Some(family))?.lora;
    let wrong = |what: String| {
        Error::data(written.path, format!("does not read back as it was written: {what}"))
    };
    let changes_nothing =
        |pair: &Pair| pair.b.count_nonzero_dim_intlist([0i64, 1]).int64_value(&[]) == 0;
    for (name, pair) in &lora.pairs {
        match found.pairs.get(name) {
            Some(back) if is_same(pair, back) => {}
            None if changes_nothing(pair) => {}
            Some(_) => return Err(wrong(format!("`{name}` is another LoRA"))),
            None => return Err(wrong(format!("`{name}` is missing"))),
        }
    }
    let added = |(name, pair): &(&String, &Pair)| {
        !lora.pairs.contains_key(name.as_str()) && !changes_nothing(pair)
    };
    match found.pairs.iter().find(added) {
        Some((name, _)) => Err(wrong(format!("`{name}` was added"))),
        None => Ok(()),
    }
}

/// True if both are the same matrices, or at least the same update, within the rounding of a scale.
fn is_same(pair: &Pair, other: &Pair) -> bool {
    let rounding = match pair.b.kind() {
        Kind::BFloat16 => 1e-2,
        Kind::Half => 2e-3,
        _ => 1e-5,
    };
    let near = |a: &Tensor, b: &Tensor| {
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
        let difference = (&a - &b).norm().double_value(&[]);
        a.size() == b.size() && difference <= rounding * a.norm().double_value(&[])
    };
    let b = |pair: &Pair| pair.b.to_kind(Kind::Double) * pair.scale();
    let magnitudes = match (&pair.magnitude, &other.magnitude) {
        (Some(a), Some(b)) => a.equal(b),
        (a, b) => a.is_none() && b.is_none(),
    };
    let is_equal = pair.rank() == other.rank()
        && pair.a.size() == other.a.size()
        && pair.a.equal(&other.a)
        && near(&b(pair), &b(other));
    magnitudes && (is_equal || near(&pair.product(), &other.product()))
}
