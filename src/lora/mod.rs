//! LoRAs: low-rank updates of a model's linear maps, and their files in the dialects that
//! people load.
//!
//! A [`Lora`] holds one [`Pair`] for each linear map that it changes, under diffusers' name of
//! the map: that of our models' parameter without `.weight`, as `transformer_blocks.0.attn.to_q`.
//! A pair stands for W + (alpha / r)·B·A.
//!
//! | module | holds |
//! |---|---|
//! | here | the LoRA, and the check that it fits a model |
//! | [`family`] | names of each family's linear maps, in diffusers and elsewhere |
//! | [`files`] | reading and writing: diffusers, ComfyUI, kohya, PEFT |

pub mod family;
pub mod files;

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

pub use family::Family;
pub use files::{Dialect, Found, read, write};

use crate::settings::nearest;

/// Most names that a message lists.
const LISTED: usize = 3;

/// Linear maps of a model by diffusers' names: `[outputs, inputs]` each.
pub type Linears = BTreeMap<String, [i64; 2]>;

/// A LoRA of a model.
#[derive(Debug, Default)]
pub struct Lora {
    /// By diffusers' name of the linear map.
    pub pairs: BTreeMap<String, Pair>,
    pub facts: Facts,
}

/// The update of one linear map. Both matrices are on the CPU and of one kind.
#[derive(Debug)]
pub struct Pair {
    /// `[r, inputs]`.
    pub a: Tensor,
    /// `[outputs, r]`.
    pub b: Tensor,
    /// The product is scaled by alpha / r. A run with rsLoRA, whose scale is alpha / √r, stands
    /// here with its alpha times √r.
    pub alpha: f64,
    /// DoRA's magnitude of each row, `[outputs]`.
    pub magnitude: Option<Tensor>,
}

/// Facts that a file tells of the run that made the LoRA. Nothing is computed from them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Name or folder of the base model.
    pub base_model: Option<String>,
    /// Name of the dataset.
    pub dataset: Option<String>,
    /// Optimizer steps that the LoRA was trained for.
    pub steps: Option<u64>,
    /// The run's rank; single modules may have another.
    pub rank: Option<i64>,
    /// The run's alpha.
    pub alpha: Option<f64>,
    /// The run's targets, as they were configured.
    pub targets: Vec<String>,
}

impl Pair {
    pub fn rank(&self) -> i64 {
        self.a.size()[0]
    }

    pub fn inputs(&self) -> i64 {
        self.a.size()[1]
    }

    pub fn outputs(&self) -> i64 {
        self.b.size()[0]
    }

    /// Returns the factor of the product B·A.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank() as f64
    }

    /// Returns B times the scale, in B's kind.
    pub fn scaled_b(&self) -> Tensor {
        if self.scale() == 1.0 {
            return self.b.shallow_clone();
        }
        (self.b.to_kind(Kind::Double) * self.scale()).to_kind(self.b.kind())
    }

    /// Returns the update of the weight, `[outputs, inputs]` in f32.
    pub fn product(&self) -> Tensor {
        (self.b.to_kind(Kind::Float) * self.scale()).matmul(&self.a.to_kind(Kind::Float))
    }

    /// Returns the same pair over the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Pair {
            a: self.a.shallow_clone(),
            b: self.b.shallow_clone(),
            alpha: self.alpha,
            magnitude: self.magnitude.as_ref().map(Tensor::shallow_clone),
        }
    }
}

impl Lora {
    /// Checks that every pair belongs to one of the model's linear maps, and has its shape.
    ///
    /// # Errors
    /// A reason on one line: each misfit with the nearest name or the expected shape.
    pub fn fit(&self, model: &Linears) -> Result<(), String> {
        let fits = |(name, pair): &(&String, &Pair)| {
            model.get(name.as_str()) == Some(&[pair.outputs(), pair.inputs()])
        };
        let misfits: Vec<(&String, &Pair)> = self.pairs.iter().filter(|pair| !fits(pair)).collect();
        if misfits.is_empty() {
            return Ok(());
        }
        let told = misfits.iter().map(|(name, pair)| match model.get(*name) {
            Some([outputs, inputs]) => format!(
                "`{name}` of {inputs} inputs and {outputs} outputs, the LoRA's has {} and {}",
                pair.inputs(),
                pair.outputs()
            ),
            None => match nearest(name, model.keys().map(String::as_str)) {
                Some(near) => format!("no linear map `{name}`, the nearest is `{near}`"),
                None => format!("no linear map `{name}`"),
            },
        });
        Err(format!("the model has {}", listed(told)))
    }

    /// Returns the rank and the alpha of most pairs.
    pub(crate) fn usual(&self) -> (i64, f64) {
        let mut counts: Vec<((i64, f64), usize)> = Vec::new();
        for found in self.pairs.values().map(|pair| (pair.rank(), pair.alpha)) {
            match counts.iter_mut().find(|(known, _)| *known == found) {
                Some((_, count)) => *count += 1,
                None => counts.push((found, 1)),
            }
        }
        // The first of several that are equally frequent, so that equal LoRAs give equal files.
        let most = counts.iter().map(|(_, count)| *count).max();
        let found = counts.iter().find(|(_, count)| Some(*count) == most);
        found.map_or((1, 1.0), |(usual, _)| *usual)
    }
}

/// Returns the linear maps among a model's parameters: matrices named `….weight`.
pub fn linears<'p>(parameters: impl Iterator<Item = (&'p str, &'p [i64])>) -> Linears {
    let linear = |(name, shape): (&str, &[i64])| match (name.strip_suffix(".weight"), shape) {
        (Some(name), &[outputs, inputs]) => Some((name.to_string(), [outputs, inputs])),
        _ => None,
    };
    parameters.filter_map(linear).collect()
}

/// Joins the first few of many texts; only they are made.
pub(crate) fn listed(texts: impl ExactSizeIterator<Item = String>) -> String {
    let more = texts.len().saturating_sub(LISTED);
    let shown = texts.take(LISTED).collect::<Vec<_>>().join("; ");
    if more == 0 { shown } else { format!("{shown}; and {more} more") }
}

#[cfg(test)]
pub(crate) mod tests {
    use tch::Device;

    use super::*;
    use crate::rng::{Key, Purpose};

    /// A pair of random matrices; those of another scope are others.
    pub fn pair(scope: u64, [outputs, inputs]: [i64; 2], rank: i64, alpha: f64) -> Pair {
        let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let draw = || (random([rank, inputs]), random([outputs, rank]));
        let (a, b) = Key::new(1, Purpose::Test).scope(scope).seeded(draw);
        Pair { a, b, alpha, magnitude: None }
    }

    #[test]
    fn a_lora_of_another_model_is_told_by_name_and_shape() {
        let model = linears(
            [
                ("blocks.0.attn.to_q.weight", &[8i64, 6][..]),
                ("blocks.0.attn.to_q.bias", &[8]),
                ("blocks.0.attn.to_k.weight", &[8, 6]),
            ]
            .into_iter(),
        );
        assert_eq!(model.len(), 2);
        let of = |name: &str, outputs| Lora {
            pairs: BTreeMap::from([(name.to_string(), pair(0, [outputs, 6], 2, 2.0))]),
            facts: Facts::default(),
        };
        of("blocks.0.attn.to_q", 8).fit(&model).expect("it fits");
        let told = |name: &str, outputs| of(name, outputs).fit(&model).expect_err("a misfit");
        assert_eq!(
            told("blocks.0.attn.to_qq", 8),
            "the model has no linear map `blocks.0.attn.to_qq`, the nearest is `blocks.0.attn.to_q`"
        );
        assert_eq!(
            told("blocks.0.attn.to_k", 9),
            "the model has `blocks.0.attn.to_k` of 6 inputs and 8 outputs, the LoRA's has 6 and 9"
        );
    }

    #[test]
    fn the_usual_rank_and_alpha_are_those_of_most_pairs() {
        let pairs = [(2, 4.0), (3, 3.0), (3, 3.0), (3, 1.0)];
        let pairs = pairs.iter().enumerate().map(|(index, &(rank, alpha))| {
            (format!("blocks.{index}"), pair(0, [4, 4], rank, alpha))
        });
        let lora = Lora { pairs: pairs.collect(), facts: Facts::default() };
        assert_eq!(lora.usual(), (3, 3.0));
    }

    #[test]
    fn a_scale_goes_into_b_and_nothing_else_changes() {
        let pair = pair(0, [5, 4], 2, 3.0);
        assert_eq!(pair.scale(), 1.5);
        let folded = Pair { b: pair.scaled_b(), alpha: 2.0, ..pair.shallow_clone() };
        let difference = (pair.product() - folded.product()).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "{difference}");
    }
}
