//! A part of a bucket, its precise parameters or the others, as flat buffers.

use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, Sliced};
use crate::error::Result;
use crate::parallel::layout::Layout;
use crate::parallel::{Devices, Sharding};

/// Consecutive parameters of one compute kind.
#[derive(Debug)]
pub struct Piece {
    layout: Layout,
    /// Offset of the piece in the stage's flat `[P]`.
    offset: i64,
    /// This rank's shard in f32, which the optimizer updates and a checkpoint holds.
    master: Tensor,
    /// This rank's shard in the compute kind; shares the master's storage if that kind is f32.
    computed: Tensor,
    /// The whole piece in the compute kind; `None` if only the shard is held between uses.
    full: Option<Tensor>,
    /// Runs of the shard that weight decay applies to.
    decayed: Vec<(i64, i64)>,
}

/// The shard of a piece that one rank holds and updates.
#[derive(Debug)]
pub struct Shard<'b> {
    /// The master values, f32.
    pub master: &'b mut Tensor,
    /// The same values in the compute kind, if that is another: code that changes the master must
    /// change them too.
    pub computed: Option<&'b mut Tensor>,
    /// Runs `(offset, length)` that weight decay applies to.
    pub decayed: &'b [(i64, i64)],
}

impl Piece {
    /// A piece of zeros.
    pub(super) fn new(
        layout: Layout,
        offset: i64,
        kind: Kind,
        sharding: Sharding,
        decayed: Vec<(i64, i64)>,
        devices: Devices,
    ) -> Self {
        let zeros =
            |length: i64, kind: Kind, device: Device| Tensor::zeros([length], (kind, device));
        let owned = layout.owned();
        let length = owned.end - owned.start;
        let keeps_all = sharding != Sharding::Parameters || layout.is_whole();
        let full = keeps_all.then(|| zeros(layout.padded, kind, devices.compute));
        let computed = full.as_ref().map_or_else(
            || zeros(length, kind, devices.compute),
            |full| full.narrow(0, owned.start, length),
        );
        let master = if kind == Kind::Float {
            computed.shallow_clone()
        } else {
            zeros(length, Kind::Float, devices.home)
        };
        Piece { layout, offset, master, computed, full, decayed }
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// The compute kind.
    pub fn kind(&self) -> Kind {
        self.computed.kind()
    }

    /// The whole piece in the compute kind; `None` if this rank does not hold it between steps.
    pub fn full(&self) -> Option<&Tensor> {
        self.full.as_ref()
    }

    /// This rank's shard and the full buffer to gather it into.
    pub(super) fn sliced(&self, full: &Tensor) -> Sliced {
        Sliced { owned: self.computed.shallow_clone(), full: full.shallow_clone() }
    }

    /// A buffer `[padded]` for the whole piece, uninitialized, on the compute device.
    pub(super) fn empty_full(&self, kind: Kind) -> Tensor {
        Tensor::empty([self.layout.padded], (kind, self.computed.device()))
    }

    /// A buffer `[padded]` for the piece's gradient, uninitialized except that the padding is zero.
    pub(super) fn empty_gradient(&self) -> Tensor {
        let Layout { numel, padded, .. } = self.layout;
        let gradient =
            self.empty_full(if self.kind() == Kind::Double { Kind::Double } else { Kind::Float });
        drop(gradient.narrow(0, numel, padded - numel).zero_());
        gradient
    }

    /// Returns this rank's shard of the stage's flat `[P]` f32 tensor; the padding is zero.
    pub(super) fn owned(&self, flat: &Tensor) -> Tensor {
        let (numel, owned, shard) =
            (self.layout.numel, self.layout.owned(), self.master.zeros_like());
        let held = (numel.min(owned.end) - owned.start).max(0);
        shard.narrow(0, 0, held).copy_(&flat.narrow(0, self.offset + owned.start.min(numel), held));
        shard
    }

    /// Gathers a tensor of which every rank of `shards` holds a shard: `[numel]` f32. No copy if
    /// this rank's shard is the whole.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub(super) fn whole(&self, owned: &Tensor, shards: &dyn Collective) -> Result<Tensor> {
        let full = if self.layout.is_whole() {
            owned.shallow_clone()
        } else {
            let (owned, full) =
                (owned.to_device(self.computed.device()), self.empty_full(Kind::Float));
            shards.all_gather(vec![Sliced { owned, full: full.shallow_clone() }])?.wait()?;
            full
        };
        Ok(full.narrow(0, 0, self.layout.numel))
    }

    /// Sets all parameters to the piece's part of the stage's flat `[P]` f32 tensor; each rank
    /// keeps the part that it holds.
    pub(super) fn set(&mut self, flat: &Tensor) {
        let Layout { numel, padded, .. } = self.layout;
        let values = flat.narrow(0, self.offset, numel);
        let whole =
            if padded == numel { values } else { values.constant_pad_nd([0, padded - numel]) };
        let owned = self.layout.owned();
        let shard = whole.narrow(0, owned.start, owned.end - owned.start);
        match &mut self.full {
            Some(full) => full.copy_(&whole),
            None => self.computed.copy_(&shard),
        }
        if self.has_separate_master() {
            self.master.copy_(&shard);
        }
    }

    /// This rank's shard, for an update.
    pub(super) fn shard_mut(&mut self) -> Shard<'_> {
        let is_separate = self.has_separate_master();
        Shard {
            master: &mut self.master,
            computed: is_separate.then_some(&mut self.computed),
            decayed: &self.decayed,
        }
    }

    /// True if the master weights do not share storage with the compute copy (different kind or
    /// device).
    fn has_separate_master(&self) -> bool {
        self.computed.data_ptr() != self.master.data_ptr()
    }
}
