//! A stage's parameters as tensors.

use std::ops::Index;
use std::sync::Arc;

use tch::Tensor;

use super::{Param, ParamInfo};
use crate::nn::LowRank;
use crate::nn::packed::{Packed, Weight};
use crate::nn::tuned::Dropping;

/// One tensor for each parameter.
#[derive(Debug)]
pub struct Views {
    tensors: Vec<Tensor>,
    /// Index of each [`Param`] among the tensors.
    places: Arc<[usize]>,
    low_ranks: Arc<[LowRank]>,
    /// The form of each tensor that is packed; empty where none is.
    packed: Arc<[Option<Packed>]>,
    dropping: Option<Dropping>,
}

impl Views {
    pub(in crate::nn) fn new(
        tensors: Vec<Tensor>,
        places: Arc<[usize]>,
        low_ranks: Arc<[LowRank]>,
        packed: Arc<[Option<Packed>]>,
    ) -> Self {
        Views { tensors, places, low_ranks, packed, dropping: None }
    }

    /// In the order of the set's infos.
    pub fn iter(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors.iter()
    }

    /// Leaves over the same storage, at which a graph starts. `infos`: those of the set; only what
    /// is trained has a gradient.
    pub fn leaves(&self, infos: &[ParamInfo]) -> Self {
        let leaf =
            |(view, info): (&Tensor, &ParamInfo)| view.detach().set_requires_grad(!info.frozen);
        self.with_tensors(self.tensors.iter().zip(infos).map(leaf).collect())
    }

    /// The same tensors, under which inputs of low-rank changes are dropped.
    pub(in crate::nn) fn dropping(&self, dropping: Dropping) -> Self {
        let tensors = self.tensors.iter().map(Tensor::shallow_clone).collect();
        Views { dropping: Some(dropping), ..self.with_tensors(tensors) }
    }

    /// The same tensors, for texts whose tokens have these numbers, `[L]` int64, or count from 0.
    pub fn at_places(&self, text_places: Option<&Tensor>) -> Self {
        let tensors = self.tensors.iter().map(Tensor::shallow_clone).collect();
        let dropping = self.dropping.as_ref().map(|dropping| dropping.at(text_places));
        Views { dropping, ..self.with_tensors(tensors) }
    }

    /// The weight of a linear map, which may be packed.
    pub(in crate::nn) fn weight(&self, param: Param) -> Weight<'_> {
        let place = self.places[param.0];
        let packed = self.packed.get(place).copied().flatten();
        Weight { held: &self.tensors[place], packed }
    }

    /// The low-rank changes of this weight, in the order in which they were added.
    pub(in crate::nn) fn low_ranks(&self, weight: Param) -> impl Iterator<Item = &LowRank> {
        self.low_ranks.iter().filter(move |low_rank| low_rank.weight == weight)
    }

    /// The mask of the inputs of low-rank changes in this use.
    pub(in crate::nn) fn drops(&self) -> Option<&Dropping> {
        self.dropping.as_ref()
    }

    fn with_tensors(&self, tensors: Vec<Tensor>) -> Self {
        let (places, low_ranks, packed) =
            (Arc::clone(&self.places), Arc::clone(&self.low_ranks), Arc::clone(&self.packed));
        Views::new(tensors, places, low_ranks, packed)
    }
}

impl Index<Param> for Views {
    type Output = Tensor;

    fn index(&self, param: Param) -> &Tensor {
        &self.tensors[self.places[param.0]]
    }
}
