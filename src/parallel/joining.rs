//! A stage's flat gradients: the kinds in which a step joins, sends and keeps them, and the places
//! in them where those of its parameters are computed.

use tch::{Device, Kind, Tensor};

use crate::libtorch::{copy_each, offer_place};
use crate::nn::ParamSet;
use crate::ops::at_least_float;
use crate::parallel::bucket::Weights;
use crate::parallel::piece::Piece;
use crate::parallel::{Bucket, ReduceDtype, Sharding};

/// What happens to a stage's gradients between its backward and the optimizer, on which their kinds
/// depend: they are widened only where something is added to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joining {
    /// True if a rank adds up several micro-batches.
    adds: bool,
    /// True if it does so before anything is sent.
    adds_first: bool,
    /// The kind in which gradients of bfloat16 parameters travel; `None` if this rank is alone.
    sent: Option<ReduceDtype>,
}

impl Default for Joining {
    /// Gradients that others may be added to.
    fn default() -> Self {
        Joining { adds: true, adds_first: true, sent: None }
    }
}

impl Joining {
    /// For a step of this many micro-batches on each of `ranks`.
    pub fn new(ranks: usize, sharding: Sharding, dtype: ReduceDtype, micro_batches: usize) -> Self {
        let sent = (ranks > 1).then_some(dtype);
        let adds = micro_batches > 1;
        let scatters_each = sent.is_some() && sharding.scatters_each_micro_batch();
        Joining { adds, adds_first: adds && !scatters_each, sent }
    }

    /// The kind in which the gradients of parameters of `kind` are joined.
    pub fn joined(self, kind: Kind) -> Kind {
        if self.adds_first { at_least_float(kind) } else { self.sent(kind) }
    }

    /// The kind in which they travel between ranks; their own, if this rank is alone.
    pub fn sent(self, kind: Kind) -> Kind {
        match self.sent {
            Some(dtype) => dtype.kind(kind),
            None if self.adds_first => at_least_float(kind),
            None => kind,
        }
    }

    /// The kind in which the optimizer gets them.
    pub fn kept(self, kind: Kind) -> Kind {
        if self.adds && !self.adds_first { at_least_float(kind) } else { self.sent(kind) }
    }
}

impl ReduceDtype {
    /// The kind in which gradients of parameters of `kind` are reduced; precise ones are always
    /// reduced in f32.
    fn kind(self, kind: Kind) -> Kind {
        match self {
            ReduceDtype::BFloat16 if kind != Kind::Float => Kind::BFloat16,
            _ => Kind::Float,
        }
    }
}

/// Places in which the gradients of a stage's parameters are computed.
pub struct Places {
    /// The flat gradient of each trained piece, or nothing where gradients are copied to it later;
    /// empty if all are.
    flats: Vec<Option<Tensor>>,
    joining: Joining,
}

impl Places {
    /// For gradients that are all copied when they are known.
    pub fn none(joining: Joining) -> Self {
        Places { flats: Vec::new(), joining }
    }
}

impl Bucket {
    /// Makes places for the gradients of the stage's trained parameters where these are joined in
    /// the kind of the parameters, and offers them to what computes the gradients.
    pub fn places(&self, params: &ParamSet, weights: &Weights, joining: Joining) -> Places {
        let flat = |piece: &Piece| {
            let kind = piece.kind();
            (joining.joined(kind) == kind).then(|| {
                let flat = piece.empty_gradient(kind);
                let places = params.split_class(piece.class(), &flat).map(|(_, place)| place);
                let leaves = weights.of_class(piece.class());
                leaves.zip(places).for_each(|(leaf, place)| offer_place(leaf, &place));
                flat
            })
        };
        Places { flats: self.trained().map(flat).collect(), joining }
    }

    /// Joins the gradients of the stage's trained parameters to one flat tensor for each trained
    /// piece, in the kind of [`Joining::joined`]. Those that were computed in their place are there
    /// already. Gradients are undefined for parameters that the stage's graph did not reach; these
    /// become zero, so that all ranks issue the same collectives.
    pub fn joined(&self, params: &ParamSet, places: Places, gradients: Vec<Tensor>) -> Vec<Tensor> {
        let Places { flats, joining } = places;
        let missing = |piece: &Piece| piece.empty_gradient(joining.joined(piece.kind()));
        let flats = self.trained().zip(flats.into_iter().chain(std::iter::repeat_with(|| None)));
        let joined: Vec<Tensor> =
            flats.map(|(piece, flat)| flat.unwrap_or_else(|| missing(piece))).collect();
        let (mut places, mut arrived) = (Vec::new(), Vec::new());
        for ((_, mut view), gradient) in self.by_name(params, &joined).zip(gradients) {
            match gradient.defined() {
                true if gradient.data_ptr() == view.data_ptr() => {}
                // Freed at once: a CPU takes the pages of its place only now.
                true if view.device() == Device::Cpu => view.copy_(&gradient),
                true => {
                    places.push(view);
                    arrived.push(gradient.contiguous());
                }
                false => drop(view.zero_()),
            }
        }
        if !places.is_empty() {
            copy_each(&mut places, &arrived);
        }
        joined
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Solo;
    use crate::libtorch::take_place;
    use crate::parallel::bucket::tests::params;
    use crate::parallel::{Copies, Devices, Sharing};

    use Kind::{BFloat16, Float};
    use ReduceDtype::{BFloat16 as Narrow, Float32 as Wide};

    /// Kinds of gradients of bfloat16 parameters: joined, sent, kept.
    fn kinds(
        ranks: usize,
        sharding: Sharding,
        dtype: ReduceDtype,
        micro_batches: usize,
    ) -> [Kind; 3] {
        let joining = Joining::new(ranks, sharding, dtype, micro_batches);
        [joining.joined(BFloat16), joining.sent(BFloat16), joining.kept(BFloat16)]
    }

    #[test]
    fn a_gradient_that_nobody_adds_to_keeps_its_kind() {
        assert_eq!(kinds(1, Sharding::None, Wide, 1), [BFloat16; 3]);
        assert_eq!(kinds(8, Sharding::None, Narrow, 1), [BFloat16; 3]);
        assert_eq!(kinds(8, Sharding::Gradients, Narrow, 1), [BFloat16; 3]);
    }

    #[test]
    fn sums_are_in_float32() {
        for sharding in [Sharding::None, Sharding::Gradients] {
            assert_eq!(kinds(1, sharding, Narrow, 2), [Float; 3]);
            assert_eq!(kinds(8, sharding, Wide, 1), [Float; 3]);
            assert_eq!(kinds(8, sharding, Wide, 2), [Float; 3]);
        }
        assert_eq!(kinds(8, Sharding::Optimizer, Narrow, 2), [Float, BFloat16, BFloat16]);
        assert_eq!(kinds(8, Sharding::Gradients, Narrow, 2), [BFloat16, BFloat16, Float]);
    }

    #[test]
    fn precise_parameters_have_precise_gradients() {
        let joining = Joining::new(8, Sharding::None, Narrow, 1);
        assert_eq!([joining.joined(Float), joining.sent(Float), joining.kept(Float)], [Float; 3]);
        assert_eq!(Joining::default().joined(Kind::Double), Kind::Double);
    }

    #[test]
    fn gradients_are_offered_their_place_where_it_is_of_their_kind() {
        let params = params();
        let sharing = Sharing::alone();
        let bucket = Bucket::new(&params, BFloat16, Devices::one(Device::Cpu), None, &sharing);
        let gathering = bucket.gather(&Solo, &Copies::default());
        let weights = gathering.and_then(|gathering| gathering.wait(&params)).expect("alone");
        // The table is in f32 whatever is added, the matrix and the bias are not.
        for (micro_batches, expected) in [(1, [true; 3]), (2, [true, false, false])] {
            let joining = Joining::new(1, Sharding::None, Wide, micro_batches);
            let places = bucket.places(&params, &weights, joining);
            let leaves = weights.trained().into_iter();
            let gradients: Vec<Tensor> = leaves
                .zip(1..)
                .map(|(leaf, number)| match take_place(leaf) {
                    Some(mut place) => place.fill_(number),
                    None => leaf.full_like(number),
                })
                .collect();
            let given = gradients.iter().map(Tensor::shallow_clone).collect();
            let joined = bucket.joined(&params, places, given);
            let views = bucket.by_name(&params, &joined).map(|(_, view)| view);
            for ((view, gradient), (number, is_there)) in
                views.zip(&gradients).zip((1..).zip(expected))
            {
                assert_eq!(view.data_ptr() == gradient.data_ptr(), is_there, "{micro_batches}");
                assert!(view.eq(number).all().int64_value(&[]) == 1, "{micro_batches}: {view}");
            }
        }
    }
}
