//! A folder of a model's weights as people have them: under diffusers' names, perhaps behind
//! another program's prefix, perhaps in 8 bits with scales.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::files::safetensors::{Shards, WEIGHTS_STEM};
use crate::model::Model;
use crate::nn::Stage;

/// Beginnings that programs put before the names of a model's parameters.
const PREFIXES: [&str; 4] = ["", "model.diffusion_model.", "diffusion_model.", "transformer."];

/// Ends of the names of a weight's scales in files of 8 bits, in the place of `weight`.
const SCALES: [&str; 2] = ["scale_weight", "weight_scale"];

/// Parts of names beside them, which say how to compute in 8 bits.
const OF_COMPUTATION: [&str; 5] =
    ["scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant", ".scale_weight"];

/// The weights of a model.
pub struct Weights {
    folder: PathBuf,
    shards: Shards,
    prefix: &'static str,
}

impl Weights {
    /// Opens a folder whose weights are those of a model.
    ///
    /// # Errors
    /// [`Error::Data`] with a list of every missing, unexpected and misshapen tensor.
    pub fn open(folder: &Path, family: &Model, stages: &[Box<dyn Stage>]) -> Result<Self> {
        let shards = Shards::open_stem(folder, WEIGHTS_STEM)?;
        let own =
            || stages.iter().flat_map(|stage| stage.params().infos()).filter(|info| !info.added);
        let is_before =
            |prefix: &&&str| own().any(|info| shards.holds(&format!("{prefix}{}", info.name)));
        let prefix = PREFIXES.iter().find(is_before).copied().unwrap_or_default();
        let expected: BTreeMap<String, &[i64]> =
            own().map(|info| (format!("{prefix}{}", info.name), info.shape.as_slice())).collect();
        let wide = [Kind::Float, Kind::BFloat16, Kind::Half];
        let kinds = [&wide[..], &[Kind::Float8e4m3fn, Kind::Float8e5m2]].concat();
        let ignored = [family.ignored_parameters(), &OF_COMPUTATION, &[".weight_scale"]].concat();
        shards.check(&expected, &kinds, &ignored).map_err(|what| Error::data(folder, what))?;
        Ok(Weights { folder: folder.into(), shards, prefix })
    }

    /// Returns one parameter, of the kind that it is stored in; f32 if it has scales.
    ///
    /// # Errors
    /// [`Error::Data`] naming the first number that is not finite, or scales of another shape;
    /// errors of the files.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let stored = format!("{}{name}", self.prefix);
        let values = self.shards.read_finite(&stored)?;
        let is_narrow = [Kind::Float8e4m3fn, Kind::Float8e5m2].contains(&values.kind());
        let stem = stored.strip_suffix("weight").filter(|_| is_narrow);
        let names = stem.map(|stem| SCALES.map(|end| format!("{stem}{end}")));
        let Some(scales) = names.into_iter().flatten().find(|name| self.shards.holds(name)) else {
            return Ok(values);
        };
        let (values, read) = (values.to_kind(Kind::Float), self.shards.read_finite(&scales)?);
        scaled(&values, &read).ok_or_else(|| {
            let (shape, found) = (values.size(), read.size());
            let what = format!(
                "`{scales}` is {found:?}: neither one number nor some for each row of {shape:?}"
            );
            Error::data(&self.folder, what)
        })
    }
}

/// Returns values times their scales: one for all, one a row, or several a row, each for as many
/// columns. `None` for others.
fn scaled(values: &Tensor, scales: &Tensor) -> Option<Tensor> {
    let scales = scales.to_kind(Kind::Float);
    let (shape, count) = (values.size(), scales.numel() as i64);
    if count == 1 {
        return Some(values * scales.view([-1]).double_value(&[0]));
    }
    let (rows, columns) = (*shape.first()?, values.numel() as i64 / shape.first()?.max(&1));
    let blocks =
        Some(count / rows.max(1)).filter(|blocks| *blocks > 0 && blocks * rows == count)?;
    let fits = columns % blocks == 0;
    fits.then(|| {
        (values.view([rows, blocks, -1]) * scales.view([rows, blocks, 1])).view(&shape[..])
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use tch::Device;

    use super::*;
    use crate::files::safetensors::write;
    use crate::model::{Architecture, Flux};
    use crate::rng::{Key, Purpose};

    fn tiny() -> Flux {
        Flux {
            in_channels: 16,
            num_layers: 1,
            num_single_layers: 1,
            attention_head_dim: 16,
            num_attention_heads: 2,
            joint_attention_dim: 12,
            pooled_projection_dim: 10,
            axes_dims_rope: [4, 6, 6],
            ..Flux::default()
        }
    }

    /// How each weight is stored: its name, and tensors under names of their own.
    type Stored = Vec<(String, Tensor)>;

    /// Writes a folder of the tiny model, and returns its values as they should be read.
    fn folder(root: &Path, stored: impl Fn(&str, &Tensor) -> Stored) -> Vec<(String, Tensor)> {
        let stages = tiny().stages().expect("sound");
        let infos = stages.iter().flat_map(|stage| stage.params().infos());
        let key = Key::new(3, Purpose::Test);
        let draw = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let values: Vec<(String, Tensor)> = infos
            .map(|info| (info.name.clone(), key.named(&info.name).seeded(|| draw(&info.shape))))
            .collect();
        let tensors: Stored =
            values.iter().flat_map(|(name, values)| stored(name, values)).collect();
        let borrowed: Vec<(&str, &Tensor)> =
            tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut file =
            File::create(root.join(format!("{WEIGHTS_STEM}.safetensors"))).expect("a file");
        write(&mut file, &borrowed, &BTreeMap::new()).expect("room");
        values
    }

    fn off(root: &Path, values: &[(String, Tensor)]) -> f64 {
        let stages = tiny().stages().expect("sound");
        let weights = Weights::open(root, &Model::Flux(tiny()), &stages).expect("its weights");
        let off = |(name, expected): &(String, Tensor)| {
            let found = weights.read(name).expect("a weight").to_kind(Kind::Float);
            ((found - expected).norm() / expected.norm()).double_value(&[])
        };
        values.iter().map(off).fold(0.0, f64::max)
    }

    #[test]
    fn a_prefix_of_another_program_is_taken_off() {
        for prefix in PREFIXES {
            let root = tempfile::tempdir().expect("a folder");
            let stored =
                |name: &str, values: &Tensor| vec![(format!("{prefix}{name}"), values.copy())];
            let values = folder(root.path(), stored);
            assert_eq!(off(root.path(), &values), 0.0, "{prefix}");
        }
    }

    /// Number of scales of a matrix of so many rows.
    type Count = fn(i64) -> [i64; 2];

    #[test]
    fn weights_of_8_bits_are_read_with_their_scales() {
        let counts: [Count; 3] = [|_| [1, 1], |rows| [rows, 1], |rows| [rows, 2]];
        for (end, beside) in [("scale_weight", "scaled_fp8"), ("weight_scale", "x.input_scale")] {
            for count in counts {
                let root = tempfile::tempdir().expect("a folder");
                let stored = |name: &str, values: &Tensor| {
                    let matrix = match (name.strip_suffix("weight"), &values.size()[..]) {
                        (Some(stem), &[rows, columns]) if columns % 2 == 0 => {
                            Some((stem, rows, columns))
                        }
                        _ => None,
                    };
                    let Some((stem, rows, columns)) = matrix else {
                        return vec![(name.to_string(), values.to_kind(Kind::BFloat16))];
                    };
                    let [blocks, per_row] = count(rows);
                    let wide = values.view([blocks, per_row, rows * columns / blocks / per_row]);
                    let scales = wide.abs().amax([2], true) / 448.0;
                    let codes = (wide / &scales).to_kind(Kind::Float8e4m3fn).view([rows, columns]);
                    let scales = match blocks {
                        1 => scales.view([1]),
                        _ => scales.view([rows, per_row, 1]),
                    };
                    vec![(name.to_string(), codes), (format!("{stem}{end}"), scales)]
                };
                let values = folder(root.path(), |name, values| {
                    let mut tensors = stored(name, values);
                    if name == "proj_out.weight" {
                        tensors
                            .push((beside.into(), Tensor::ones([1], (Kind::Float, Device::Cpu))));
                    }
                    tensors
                });
                let off = off(root.path(), &values);
                assert!((0.01..0.04).contains(&off), "{end}: {off}");
            }
        }
    }

    #[test]
    fn scales_of_another_weight_are_refused() {
        let root = tempfile::tempdir().expect("a folder");
        folder(root.path(), |name, values| {
            let narrow = (name.to_string(), values.to_kind(Kind::Float8e4m3fn));
            let scales = Tensor::ones([7], (Kind::Float, Device::Cpu));
            match name.strip_suffix("proj_out.weight") {
                Some("") => vec![narrow, ("proj_out.scale_weight".into(), scales)],
                _ => vec![(name.to_string(), values.copy())],
            }
        });
        let stages = tiny().stages().expect("sound");
        let weights =
            Weights::open(root.path(), &Model::Flux(tiny()), &stages).expect("its weights");
        let said = weights.read("proj_out.weight").expect_err("seven scales").to_string();
        assert!(said.contains("`proj_out.scale_weight` is [7]: neither one number"), "{said}");
    }
}
