//! A text encoder's folder, and the encoder with its weights.

use std::fmt;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor, no_grad};

use super::class::TEXT;
use super::{Depth, EndToken, Network, Output, Sizes, TextClass};
use crate::error::{Error, Result};
use crate::nn::Views;
use crate::published::Weights;
use crate::settings::Family;

/// A text encoder whose settings and headers have been read, and none of its weights.
#[derive(Debug)]
pub struct TextEncoder {
    folder: PathBuf,
    class: TextClass,
    weights: Weights,
}

impl TextEncoder {
    /// Opens the folder `text_encoder` or `text_encoder_2` of a pipeline.
    ///
    /// # Errors
    /// Errors of [`TextClass::read`]; [`Error::Data`] with a list of every missing, unexpected and
    /// misshapen tensor of the text part.
    pub fn open(folder: &Path) -> Result<Self> {
        let class = TextClass::read(folder)?;
        let weights = Weights::open(folder, TEXT, class.names())?;
        weights.check(&class.tensors())?;
        Ok(TextEncoder { folder: folder.into(), class, weights })
    }

    /// Returns the class with its settings.
    pub fn class(&self) -> &TextClass {
        &self.class
    }

    pub fn sizes(&self) -> Sizes {
        self.class.sizes()
    }

    /// Features of an output's vectors.
    pub fn width(&self, output: &Output) -> i64 {
        let width = self.sizes().width;
        match output {
            Output::Last | Output::Pooled => width,
            Output::Hidden(layers) => width * layers.len() as i64,
        }
    }

    /// Number of parameters that an output needs.
    ///
    /// # Errors
    /// As [`load`](Self::load), if the class has no such output.
    pub fn num_params(&self, output: &Output) -> Result<i64> {
        Ok(self.network(output)?.params().numel())
    }

    /// Loads what `output` needs, to compute in `kind` on `device`.
    ///
    /// # Errors
    /// [`Error::Data`] if the class has no such output, or naming the first number that is not
    /// finite; errors of reading.
    pub fn load(&self, output: Output, device: Device, kind: Kind) -> Result<LoadedTextEncoder> {
        let network = self.network(&output)?;
        let params = self.weights.load(network.params(), device, kind)?;
        Ok(LoadedTextEncoder { class: self.class.clone(), network, params, device, output })
    }

    /// The part of the network that an output needs.
    fn network(&self, output: &Output) -> Result<Box<dyn Network>> {
        let depth = self.depth(output).map_err(|what| Error::data(&self.folder, what))?;
        Ok(self.class.network(depth))
    }

    fn depth(&self, output: &Output) -> Result<Depth, String> {
        let (name, layers) = (self.class.name(), self.sizes().layers);
        match output {
            Output::Pooled if self.class.end_token().is_none() => {
                Err(format!("a {name} has no pooled output"))
            }
            Output::Last | Output::Pooled => Ok(Depth { layers, is_normed: true }),
            Output::Hidden(wanted) => match wanted.iter().max() {
                None => Err("no states are asked for".into()),
                Some(&last) if last > layers => Err(format!(
                    "this {name} has the states after 0 to {layers} layers, not {last}"
                )),
                Some(&last) => {
                    let is_normed = last == layers && self.class.norms_last();
                    Ok(Depth { layers: last, is_normed })
                }
            },
        }
    }
}

/// A text encoder with the weights that one output needs.
pub struct LoadedTextEncoder {
    class: TextClass,
    network: Box<dyn Network>,
    params: Views,
    device: Device,
    output: Output,
}

impl LoadedTextEncoder {
    /// Returns the output, in the kind of the computation and on its device.
    ///
    /// # Shapes
    /// `ids`: `[B, L]` of whole numbers on any device; `mask`: `[B, L]` of any kind, zero where a
    /// token is padding, on either side. Returns `[B, L, D]`, pooled `[B, D]`; `D` is
    /// [`TextEncoder::width`].
    /// # Panics
    /// If an id is outside the vocabulary, or texts are longer than the class takes (a bug in the
    /// caller, who asks [`TextEncoder::sizes`]).
    pub fn encode(&self, ids: &Tensor, mask: Option<&Tensor>) -> Tensor {
        self.check(ids);
        let ids = ids.to_device(self.device).to_kind(Kind::Int64);
        let mask = mask.map(|mask| mask.to_device(self.device).ne(0));
        no_grad(|| self.computed(&ids, mask.as_ref()))
    }

    fn computed(&self, ids: &Tensor, mask: Option<&Tensor>) -> Tensor {
        let wanted = match &self.output {
            Output::Hidden(layers) => layers.as_slice(),
            Output::Last | Output::Pooled => &[],
        };
        let mut states: Vec<Option<Tensor>> = wanted.iter().map(|_| None).collect();
        let mut each = |layer: usize, found: &Tensor| {
            let places = wanted.iter().zip(&mut states).filter(|(wanted, _)| **wanted == layer);
            places.for_each(|(_, place)| *place = Some(found.shallow_clone()));
        };
        let last = self.network.forward(&self.params, ids, mask, &mut each);
        match &self.output {
            Output::Last => last,
            Output::Pooled => self.pooled(ids, &last),
            Output::Hidden(layers) => {
                let is_last = |layer| layer == self.class.sizes().layers;
                let state = |(layer, state): (&usize, Option<Tensor>)| match state {
                    Some(state) if !is_last(*layer) => state,
                    _ => last.shallow_clone(),
                };
                let states: Vec<Tensor> = layers.iter().zip(states).map(state).collect();
                Tensor::cat(&states, -1)
            }
        }
    }

    /// The state `[B, D]` of each text's pooled place.
    fn pooled(&self, ids: &Tensor, last: &Tensor) -> Tensor {
        let end = self.class.end_token().expect("checked when it was loaded");
        let places = end.first_places(ids);
        let (batch, _, width) = last.size3().expect("[B, L, D]");
        let places = places.view([batch, 1, 1]).expand([batch, 1, width], false);
        last.gather(1, &places, false).squeeze_dim(1)
    }

    fn check(&self, ids: &Tensor) {
        let Sizes { vocabulary, longest, .. } = self.class.sizes();
        let (_, length) = ids.size2().expect("[B, L]");
        if let Some(longest) = longest.filter(|longest| length > *longest) {
            panic!("the text encoder takes {longest} tokens at most, not {length}");
        }
        let [least, most] = [ids.min(), ids.max()].map(|id| id.int64_value(&[]));
        if let Some(id) = [least, most].into_iter().find(|id| !(0..vocabulary).contains(id)) {
            panic!("the text encoder has {vocabulary} tokens, and none of the id {id}");
        }
    }
}

impl EndToken {
    /// The first place of the token in each text; 0 in a text without it.
    ///
    /// # Shapes
    /// `ids`: `[B, L]`. Returns `[B]`.
    fn first_places(self, ids: &Tensor) -> Tensor {
        let is_end = match self {
            EndToken::Id(id) => ids.eq(id),
            EndToken::Greatest => ids.eq_tensor(&ids.amax(-1, true)),
        };
        let length = ids.size()[1];
        let places = Tensor::arange(length, (Kind::Int64, ids.device())).expand_as(ids);
        places.where_scalarother(&is_end, length).amin(-1, false).remainder(length)
    }
}

impl fmt::Debug for LoadedTextEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LoadedTextEncoder { class, device, output, .. } = self;
        write!(f, "{} on {device:?} for {output:?}", class.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pooled_vector_stands_at_the_first_end() {
        let ids = Tensor::from_slice(&[3i64, 9, 9, 4, 5, 9, 1, 2, 0]).view([3, 3]);
        let places = |end: EndToken| Vec::<i64>::try_from(end.first_places(&ids)).expect("places");
        assert_eq!(places(EndToken::Id(9)), [1, 2, 0]);
        assert_eq!(places(EndToken::Greatest), [1, 2, 1]);
    }
}
