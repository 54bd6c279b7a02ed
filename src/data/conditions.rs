//! Named conditions of a dataset, used to generate samples.

use std::collections::BTreeMap;

use tch::Tensor;

use super::dataset::read_widened;
use super::manifest::ConditionsEntry;
use crate::error::Result;
use crate::files::safetensors::SafeTensors;

/// Named conditions for generation, e.g. one text embedding for each class.
#[derive(Debug)]
pub struct Conditions {
    pub names: Vec<String>,
    /// Tensors by key; row `i` belongs to name `i`.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Conditions {
    /// # Errors
    /// As [`SafeTensors::read_finite`].
    pub(super) fn read(file: &SafeTensors, entry: &ConditionsEntry) -> Result<Self> {
        let tensors = read_widened(file, entry.names.len() as u64)?;
        Ok(Conditions { names: entry.names.clone(), tensors })
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use crate::data::Dataset;
    use crate::data::made_up::{images, written};

    use super::*;

    fn conditions(of_one: f64) -> Result<Conditions> {
        let tensor = Tensor::ones([2, 5, 8], (Kind::Half, Device::Cpu));
        let _ = tensor.get(1).get(2).narrow(0, 3, 1).fill_(of_one);
        let folder = written(
            &[("a.safetensors", "2x2", vec![("image_latents", images(0, 4, 2))])],
            Some((&["zero", "one"], tensor)),
        );
        Dataset::open(folder.path())?.conditions().map(|conditions| conditions.expect("some"))
    }

    #[test]
    fn conditions_have_a_name_a_row() {
        let conditions = conditions(1.0).expect("sound");
        assert_eq!(conditions.names, ["zero", "one"]);
        assert_eq!(conditions.tensors["text_embeddings"].size(), [2, 5, 8]);
    }

    #[test]
    fn conditions_that_are_not_finite_are_refused_with_their_place() {
        let error = conditions(f64::NAN).expect_err("one is not").to_string();
        let what = "conditions.safetensors: `text_embeddings` holds numbers that are not finite: 1, the first at [1, 2, 3]";
        assert!(error.ends_with(what), "{error}");
    }
}
