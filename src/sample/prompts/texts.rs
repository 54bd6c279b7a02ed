//! Texts of prompts, encoded once and padded as a batch of the training data is.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::collective::Collective;
use crate::collective::agreement::agreed;
use crate::data::group::{Layout, SampleTensor};
use crate::data::{TEXTS, TextPadding};
use crate::encoding::{Conditions, Pipeline};
use crate::error::{Error, Result};
use crate::pulse;
use crate::run::requests;

/// Most texts that a text encoder gets at once.
const MOST: usize = 8;

/// Conditions of texts, `[1, …]` each, by text.
pub(super) struct Texts(BTreeMap<String, Conditions>);

impl Texts {
    /// Encodes the texts on rank 0, each once, and shares them.
    ///
    /// # Errors
    /// Errors of the pipeline; [`Error::Config`] if a text is longer than the data's;
    /// [`Error::Stopped`] if a signal arrived meanwhile.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn encoded<'t>(
        pipeline: &Pipeline,
        padding: TextPadding,
        texts: impl Iterator<Item = &'t str>,
        collective: &dyn Collective,
    ) -> Result<Self> {
        let mut texts: Vec<&str> = texts.collect();
        texts.sort_unstable();
        texts.dedup();
        let mut found = BTreeMap::new();
        // No rank waits longer for another than a few texts take.
        for some in texts.chunks(MOST) {
            let encodes = pulse::is_root(collective.rank());
            let own = if encodes {
                encoded(pipeline, padding, some)
            } else {
                blanks(pipeline, padding, some)
            };
            let own = agreed(own, collective)?;
            for tensor in own.iter().flat_map(BTreeMap::values) {
                collective.broadcast(tensor.shallow_clone(), 0)?.wait()?;
            }
            found.extend(some.iter().map(ToString::to_string).zip(own));
        }
        Ok(Texts(found))
    }

    /// Returns the conditions of one of the texts.
    pub fn of(&self, text: &str) -> Conditions {
        let found = self.0.get(text).expect("every text was encoded");
        found.iter().map(|(key, tensor)| (key.clone(), tensor.shallow_clone())).collect()
    }
}

fn encoded(pipeline: &Pipeline, padding: TextPadding, texts: &[&str]) -> Result<Vec<Conditions>> {
    requests::go_on()?;
    let found = pipeline.encode_prompts(texts)?;
    let in_batch = |(text, conditions): (&&str, Conditions)| {
        padded(text, conditions, &pipeline.prompt_shapes(text), padding)
    };
    texts.iter().zip(found).map(in_batch).collect()
}

fn blanks(pipeline: &Pipeline, padding: TextPadding, texts: &[&str]) -> Result<Vec<Conditions>> {
    texts.iter().map(|text| blank(pipeline, padding, text)).collect()
}

/// Returns ones with the shapes of what a text would be encoded as, `[1, …]`, also in its masks.
///
/// # Errors
/// [`Error::Config`] if the text is longer than the data's.
pub(super) fn blank(pipeline: &Pipeline, padding: TextPadding, text: &str) -> Result<Conditions> {
    let layout = pipeline.prompt_shapes(text);
    let ones = |tensor: &SampleTensor| Tensor::ones(&tensor.shape, (tensor.kind, Device::Cpu));
    let conditions = layout.iter().map(|(key, tensor)| (key.clone(), ones(tensor))).collect();
    padded(text, conditions, &layout, padding)
}

/// Returns the conditions of a text with an axis of samples, padded as the training data are: those
/// of unequal length with their mask.
fn padded(
    text: &str,
    conditions: Conditions,
    layout: &Layout,
    padding: TextPadding,
) -> Result<Conditions> {
    let mut batch = Conditions::new();
    for (key, tensor) in conditions {
        let Some(described) = layout.get(&key) else {
            batch.insert(key, tensor.unsqueeze(0).contiguous());
            continue;
        };
        let length = match padding.extended(&key, described) {
            Some(shape) => Some(shape[0]),
            None => described.unequal.then(|| padding.length(&key, described.shape[0])),
        };
        let Some(length) = length else {
            batch.insert(key, tensor.unsqueeze(0).contiguous());
            continue;
        };
        let found = tensor.size()[0];
        if found > length {
            let what = format!(
                "has {found} tokens, and data.text_tokens pads texts to {length}; shorten it"
            );
            return Err(Error::config(format!("prompt {text:?}"), what));
        }
        let mask = TEXTS.iter().find(|(text, _)| *text == key).filter(|_| described.unequal);
        if let Some((_, mask)) = mask {
            let tokens = Tensor::arange(length, (Kind::Int64, Device::Cpu)).lt(found);
            batch.insert(mask.to_string(), tokens.to_kind(Kind::Int64).unsqueeze(0).contiguous());
        }
        batch.insert(key, lengthened(&tensor, length).unsqueeze(0).contiguous());
    }
    Ok(batch)
}

/// Returns `[L, …]` with zeros behind it, as `[length, …]`.
fn lengthened(tensor: &Tensor, length: i64) -> Tensor {
    let size = tensor.size();
    // From the last axis to the first.
    let mut padding = vec![0; 2 * (size.len() - 1)];
    padding.extend([0, length - size[0]]);
    tensor.constant_pad_nd(padding)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(unequal: bool) -> Layout {
        let tensor = |shape: &[i64], unequal| SampleTensor {
            kind: Kind::Float,
            shape: shape.to_vec(),
            unequal,
        };
        Layout::from([
            ("text_embeddings".to_string(), tensor(&[3, 2], unequal)),
            ("pooled_prompt_embeds".into(), tensor(&[5], false)),
        ])
    }

    fn padded_by(padding: TextPadding, unequal: bool) -> Result<Conditions> {
        let float = (Kind::Float, Device::Cpu);
        let conditions = Conditions::from([
            ("text_embeddings".to_string(), Tensor::ones([3, 2], float)),
            ("pooled_prompt_embeds".into(), Tensor::ones([5], float)),
        ]);
        padded("a cat", conditions, &layout(unequal), padding)
    }

    #[test]
    fn texts_of_unequal_length_are_padded_and_get_their_mask() {
        for (padding, length) in
            [(TextPadding::Longest, 8), (TextPadding::Tokens(4), 4), (TextPadding::All(6), 6)]
        {
            let found = padded_by(padding, true).expect("short enough");
            assert_eq!(found["text_embeddings"].size(), [1, length, 2]);
            assert_eq!(found["text_embeddings"].sum(Kind::Double).double_value(&[]), 6.0);
            let expected = [[1; 3].as_slice(), &vec![0; length as usize - 3]].concat();
            assert_eq!(found["text_mask"], Tensor::from_slice(&expected).unsqueeze(0).contiguous());
            assert_eq!(found["pooled_prompt_embeds"].size(), [1, 5]);
        }
        let error = padded_by(TextPadding::Tokens(2), true).expect_err("too long").to_string();
        assert!(error.contains("prompt \"a cat\": has 3 tokens, and data.text_tokens"), "{error}");
    }

    #[test]
    fn texts_of_one_length_stay_unless_all_are_padded() {
        let found = padded_by(TextPadding::Tokens(4), false).expect("as it is");
        assert_eq!(found["text_embeddings"].size(), [1, 3, 2]);
        let found = padded_by(TextPadding::All(4), false).expect("longer");
        assert_eq!(found["text_embeddings"].size(), [1, 4, 2]);
        assert!(!found.contains_key("text_mask"), "the pipeline gives it where there is one");
    }
}
