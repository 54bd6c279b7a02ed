//! One stage's parameters as flat buffers, and the part of them that this rank holds.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, Sliced, Work};
use crate::error::Result;
use crate::nn::{Class, ParamInfo, ParamSet, Views};
use crate::parallel::copies::Arriving;
use crate::parallel::piece::{Loan, Piece, Shard};
use crate::parallel::{Copies, Devices, Sharing};
use crate::rng::Key;

/// A stage's parameters: in the kind that they are computed in, and master values in f32 of those
/// that are trained.
#[derive(Debug)]
pub struct Bucket {
    /// One for each class of the stage's parameters: frozen before trained, precise ones in f32
    /// before those in the compute kind, packed ones last. Empty for a stage without parameters.
    pieces: Vec<Piece>,
}

/// A stage's parameters for one use, each a leaf of its graph. Buffers that were gathered for the
/// use are freed with it.
#[derive(Debug)]
pub struct Weights {
    leaves: Views,
}

/// A stage's parameters while they are being gathered.
pub struct Gathering<'b> {
    bucket: &'b Bucket,
    /// The full buffer of each piece.
    full: Vec<Arriving>,
    work: Work,
}

impl Bucket {
    /// Parameters initialized from `key`; zeros without one.
    pub fn new(
        params: &ParamSet,
        kind: Kind,
        devices: Devices,
        key: Option<Key>,
        sharing: &Sharing<'_>,
    ) -> Self {
        let groups = params.groups();
        let piece = |class| Piece::new(class, &groups, devices, sharing);
        let mut bucket = Bucket { pieces: params.classes(kind).into_iter().map(piece).collect() };
        if let Some(key) = key {
            // One stage at a time, so that no rank ever holds more of an unsharded model than its
            // largest stage.
            let flat = Tensor::zeros([params.numel()], (Kind::Float, Device::Cpu));
            params.initialize(&flat, key);
            bucket.set(&flat);
        }
        bucket
    }

    /// True if some of its parameters are trained.
    pub fn is_trained(&self) -> bool {
        self.trained().next().is_some()
    }

    /// True if some of its parameters are frozen.
    pub fn has_frozen(&self) -> bool {
        self.pieces.iter().any(|piece| !piece.is_trained())
    }

    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The pieces that are trained: those that have gradients and optimizer state.
    pub fn trained(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.iter().filter(|piece| piece.is_trained())
    }

    /// Sets all parameters from `[P]` f32; each rank keeps the part that it holds.
    pub fn set(&mut self, flat: &Tensor) {
        set(self.pieces.iter_mut(), flat);
    }

    /// Sets the trained parameters from all of them in order, f32.
    pub fn set_trained(&mut self, flat: &Tensor) {
        set(self.pieces.iter_mut().filter(|piece| piece.is_trained()), flat);
    }

    /// Returns the stage's parameters, `[P]` f32.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn parameters(&self, sharing: &Sharing<'_>) -> Result<Tensor> {
        joined(self.pieces.iter().map(|piece| piece.whole(piece.values(), sharing.shards())))
    }

    /// Returns the stage's trained parameters, one after another, f32.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn trained_parameters(&self, sharing: &Sharing<'_>) -> Result<Tensor> {
        joined(self.trained().map(|piece| piece.whole(piece.values(), sharing.shards())))
    }

    /// Gathers a tensor with an element for each trained parameter's, of which every rank holds a
    /// shard: f32. `owned` has a tensor of the shard's length for each trained piece. Nothing is
    /// copied or moved to another device if there is one piece and this rank holds all of it.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn whole(&self, owned: &[Tensor], sharing: &Sharing<'_>) -> Result<Tensor> {
        joined(self.trained().zip(owned).map(|(piece, owned)| piece.whole(owned, sharing.shards())))
    }

    /// Returns this rank's shards of a flat f32 tensor with an element for each trained
    /// parameter's, one for each trained piece; the padding is zero.
    pub fn owned(&self, flat: &Tensor) -> Vec<Tensor> {
        let mut start = 0;
        let shard = |piece: &Piece| {
            let part = flat.narrow(0, start, piece.layout().numel);
            start += piece.layout().numel;
            piece.owned(&part)
        };
        self.trained().map(shard).collect()
    }

    /// Starts to gather the parameters for one use.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it for the same stages in the same order.
    pub fn gather(&self, shards: &dyn Collective, copies: &Copies) -> Result<Gathering<'_>> {
        let mut missing = Vec::new();
        let held = |piece: &Piece| match piece.full() {
            Some(full) => piece.arriving(full, copies),
            None => {
                let full = piece.empty_full(piece.kind());
                let owned = piece.arriving(piece.computed(), copies)?.wait()?;
                missing.push(Sliced { owned, full: full.shallow_clone() });
                Ok(Arriving::here(full))
            }
        };
        let full = self.pieces.iter().map(held).collect::<Result<_>>()?;
        let work = if missing.is_empty() { Work::done() } else { shards.all_gather(missing)? };
        Ok(Gathering { bucket: self, full, work })
    }

    /// Returns the part of every trained parameter in flat tensors, one for each trained piece.
    pub fn by_name<'p>(
        &'p self,
        params: &'p ParamSet,
        flats: &'p [Tensor],
    ) -> impl Iterator<Item = (&'p ParamInfo, Tensor)> {
        self.trained().zip(flats).flat_map(|(piece, flat)| params.split_class(piece.class(), flat))
    }

    /// Starts to send this rank's updated shard to the ranks that keep full pieces.
    ///
    /// # Ordering
    /// As [`gather`](Self::gather).
    pub fn publish(&self, shards: &dyn Collective) -> Result<Work> {
        let cut = self.trained().filter(|piece| !piece.layout().is_whole());
        let sliced: Vec<Sliced> =
            cut.filter_map(|piece| piece.full().map(|full| piece.sliced(full))).collect();
        if sliced.is_empty() { Ok(Work::done()) } else { shards.all_gather(sliced) }
    }

    /// This rank's shard of each trained piece, for an update.
    pub fn shards_mut(&mut self) -> impl Iterator<Item = Shard<'_>> {
        self.pieces.iter_mut().filter_map(Piece::shard_mut)
    }

    /// Computes with other values in the place of the master values: `values` has this rank's shard
    /// of each trained piece. Returns what [`end_loan`](Self::end_loan) needs.
    pub fn lend(&mut self, values: &[Tensor]) -> Loan {
        Loan(self.shards_mut().zip(values).map(|(shard, values)| shard.lend(values)).collect())
    }

    /// Computes with the master values again, which are the same to the last bit.
    pub fn end_loan(&mut self, Loan(kept): Loan) {
        self.shards_mut().zip(kept).for_each(|(shard, kept)| shard.end_loan(kept));
    }

    /// Applies `change` to this rank's master values of each trained piece, and copies them to the
    /// compute kind.
    pub fn update(&mut self, mut change: impl FnMut(&mut Tensor)) {
        for Shard { master, computed, .. } in self.shards_mut() {
            change(master);
            if let Some(computed) = computed {
                computed.copy_(master);
            }
        }
    }
}

impl Weights {
    /// The parameters as the stage's forward takes them.
    pub fn leaves(&self) -> &Views {
        &self.leaves
    }

    /// The leaves for which the backward pass computes gradients, in the order of the stage's
    /// trained parameters.
    pub fn trained(&self) -> Vec<&Tensor> {
        self.leaves.iter().filter(|leaf| leaf.requires_grad()).collect()
    }

    /// The leaves of a class.
    pub(super) fn of_class(&self, class: &Class) -> impl Iterator<Item = &Tensor> {
        let Range { start, end } = class.infos();
        self.leaves.iter().take(end).skip(start)
    }
}

impl Gathering<'_> {
    /// Waits for the stage's parameters.
    pub fn wait(self, params: &ParamSet) -> Result<Weights> {
        let Gathering { bucket, full, work } = self;
        work.wait()?;
        let full = full.into_iter().map(Arriving::wait).collect::<Result<Vec<_>>>()?;
        let classes = bucket.pieces.iter().map(Piece::class);
        let views = params.split_classes(classes.zip(&full));
        Ok(Weights { leaves: views.leaves(params.infos()) })
    }
}

fn set<'p>(pieces: impl Iterator<Item = &'p mut Piece>, flat: &Tensor) {
    let mut start = 0;
    for piece in pieces {
        let numel = piece.class().numel();
        piece.set(&flat.narrow(0, start, numel));
        start += numel;
    }
}

/// Joins pieces to one tensor, on the device of the first: masters may be on the compute device or
/// at home.
fn joined(pieces: impl Iterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let mut pieces = pieces.collect::<Result<Vec<_>>>()?;
    Ok(match pieces.len() {
        1 => pieces.remove(0),
        0 => Tensor::zeros([0], (Kind::Float, Device::Cpu)),
        _ => {
            let here = |piece: &Tensor| piece.to_device(pieces[0].device());
            Tensor::cat(&pieces.iter().map(here).collect::<Vec<_>>(), 0)
        }
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::collective::Threads;
    use crate::nn::{Builder, Init, Rows};
    use crate::parallel::{Sharding, ShardingGroup};
    use crate::rng::Purpose;

    /// A stage of a matrix, a bias, and a table in f32.
    pub fn params() -> ParamSet {
        let mut params = ParamSet::new("stage");
        let mut builder = Builder::new(&mut params, "stage", Rows::Image);
        builder.param("weight", &[7, 11], Init::Normal { std: 1.0 });
        builder.param("bias", &[11], Init::Normal { std: 1.0 });
        builder.precise_param("table", &[5], Init::Normal { std: 1.0 });
        params
    }

    const KEY: Key = Key { seed: 3, purpose: Purpose::Test, step: 0, micro_batch: 0, scope: 0 };

    fn alone(kind: Kind) -> Bucket {
        Bucket::new(&params(), kind, Devices::one(Device::Cpu), Some(KEY), &Sharing::alone())
    }

    /// The result of `look` on each of three ranks that share a bucket.
    fn on_three<T: Send>(
        sharding: Sharding,
        kind: Kind,
        look: fn(Bucket, &Sharing<'_>) -> T,
    ) -> Vec<T> {
        Threads::run(3, |world| {
            let sharing = Sharing::new(world, sharding, ShardingGroup::World, 1).expect("sound");
            look(
                Bucket::new(&params(), kind, Devices::one(Device::Cpu), Some(KEY), &sharing),
                &sharing,
            )
        })
    }

    const SHARDINGS: [Sharding; 4] =
        [Sharding::None, Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters];

    #[test]
    fn every_sharding_holds_the_same_parameters_together() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let expected = alone(kind).parameters(&Sharing::alone()).expect("alone");
            for sharding in SHARDINGS {
                let wholes = on_three(sharding, kind, |bucket, sharing| {
                    bucket.parameters(sharing).expect("no rank fails")
                });
                assert!(wholes.iter().all(|whole| whole.equal(&expected)), "{sharding:?} {kind:?}");
            }
        }
    }

    #[test]
    fn gathered_leaves_are_those_of_one_rank() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for sharding in SHARDINGS {
                let gathered = on_three(sharding, kind, |mut bucket, sharing| {
                    bucket.update(|master| drop(master.g_add_scalar_(1.0)));
                    bucket.publish(sharing.shards()).and_then(Work::wait).expect("no rank fails");
                    let weights = bucket
                        .gather(sharing.shards(), &Copies::default())
                        .and_then(|gathering| gathering.wait(&params()))
                        .expect("no rank fails");
                    assert!(
                        weights.trained().len() == 3
                            && weights.trained().iter().all(|leaf| leaf.requires_grad())
                    );
                    weights.leaves().iter().map(Tensor::detach).collect::<Vec<_>>()
                });
                let mut one = alone(kind);
                one.update(|master| drop(master.g_add_scalar_(1.0)));
                let expected = one
                    .gather(&crate::collective::Solo, &Copies::default())
                    .and_then(|gathering| gathering.wait(&params()))
                    .expect("alone");
                for views in gathered {
                    assert!(
                        views
                            .iter()
                            .zip(expected.leaves().iter())
                            .all(|(a, b)| a.equal(b) && a.kind() == b.kind())
                    );
                }
            }
        }
    }

    #[test]
    fn only_parameter_sharding_lets_the_parameters_go() {
        let held = |sharding| {
            on_three(sharding, Kind::BFloat16, |bucket, _| {
                bucket.pieces().iter().any(|piece| piece.full().is_some())
            })
        };
        assert_eq!(SHARDINGS.map(|sharding| held(sharding)[0]), [true, true, true, false]);
        let owned = |sharding| {
            on_three(sharding, Kind::Float, |bucket, _| bucket.pieces()[0].values().numel())
        };
        // 93 elements: 192 with the padding of three ranks.
        assert_eq!(SHARDINGS.map(|sharding| owned(sharding)[0]), [192, 64, 64, 64]);
    }

    #[test]
    fn shards_of_a_flat_tensor_join_to_it_again() {
        let equal = on_three(Sharding::Gradients, Kind::BFloat16, |bucket, sharing| {
            let flat = Tensor::arange(93, (Kind::Float, Device::Cpu));
            bucket.whole(&bucket.owned(&flat), sharing).expect("no rank fails").equal(&flat)
        });
        assert_eq!(equal, [true; 3]);
    }

    #[test]
    fn decay_reaches_the_matrix_alone_however_it_is_cut() {
        let sums = on_three(Sharding::Optimizer, Kind::BFloat16, |mut bucket, _| {
            bucket
                .shards_mut()
                .flat_map(|shard| shard.groups)
                .flat_map(|group| &group.decayed)
                .map(|(_, length)| length)
                .sum::<i64>()
        });
        assert_eq!(sums.iter().sum::<i64>(), 77);
    }
}
