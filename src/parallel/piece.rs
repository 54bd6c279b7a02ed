//! Part of a bucket: its precise parameters or the others, as flat buffers.

use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, Sliced};
use crate::error::Result;
use crate::parallel::layout::Layout;
use crate::parallel::{Devices, Sharding};

/// Consecutive parameters of one compute kind.
#[derive(Debug)]
pub struct Piece {
    layout: Layout,
    /// Where the piece begins in the stage's flat `[P]`.
    offset: i64,
    /// This rank's shard, f32; what the optimizer updates and a checkpoint holds.
    master: Tensor,
    /// This rank's shard in the compute kind; shares the master's storage where that is f32.
    computed: Tensor,
    /// All of the piece in the compute kind, unless only the shard is held between uses.
    full: Option<Tensor>,
    /// Runs of the shard that weight decay applies to.
    decayed: Vec<(i64, i64)>,
}

/// What one rank holds of a piece, and changes.
#[derive(Debug)]
pub struct Shard<'b> {
    /// f32.
    pub master: &'b mut Tensor,
    /// The same values in the compute kind, where that is another: whoever changes the master
    /// changes it too.
    pub computed: Option<&'b mut Tensor>,
    /// Runs `(offset, length)` that weight decay applies to.
    pub decayed: &'b [(i64, i64)],
}

impl Piece {
    /// Zeros.
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

    /// Kind of what is computed with.
    pub fn kind(&self) -> Kind {
        self.computed.kind()
    }

    /// All of the piece in the compute kind, where this rank holds it between steps.
    pub fn full(&self) -> Option<&Tensor> {
        self.full.as_ref()
    }

    /// This rank's shard on its way to all of the piece.
    pub(super) fn sliced(&self, full: &Tensor) -> Sliced {
        Sliced { owned: self.computed.shallow_clone(), full: full.shallow_clone() }
    }

    /// `[padded]`, not filled yet, where the piece computes.
    pub(super) fn room(&self, kind: Kind) -> Tensor {
        Tensor::empty([self.layout.padded], (kind, self.computed.device()))
    }

    /// Room for the piece's gradient; zero behind the last parameter.
    pub(super) fn room_for_gradient(&self) -> Tensor {
        let Layout { numel, padded, .. } = self.layout;
        let room = self.room(if self.kind() == Kind::Double { Kind::Double } else { Kind::Float });
        drop(room.narrow(0, numel, padded - numel).zero_());
        room
    }

    /// This rank's shard of the stage's flat `[P]` f32 tensor; the padding is zero.
    pub(super) fn owned(&self, flat: &Tensor) -> Tensor {
        let (numel, owned, shard) =
            (self.layout.numel, self.layout.owned(), self.master.zeros_like());
        let held = (numel.min(owned.end) - owned.start).max(0);
        shard.narrow(0, 0, held).copy_(&flat.narrow(0, self.offset + owned.start.min(numel), held));
        shard
    }

    /// What every rank of `shards` holds a shard of, whole: `[numel]` f32; no copy where this
    /// rank's is all of it.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub(super) fn whole(&self, owned: &Tensor, shards: &dyn Collective) -> Result<Tensor> {
        let full = if self.layout.is_whole() {
            owned.shallow_clone()
        } else {
            let (owned, full) = (owned.to_device(self.computed.device()), self.room(Kind::Float));
            shards.all_gather(vec![Sliced { owned, full: full.shallow_clone() }])?.wait()?;
            full
        };
        Ok(full.narrow(0, 0, self.layout.numel))
    }

    /// Sets all parameters to the piece's part of the stage's flat `[P]` f32 tensor; each rank
    /// keeps what it holds.
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
        if self.has_master_apart() {
            self.master.copy_(&shard);
        }
    }

    /// This rank's shard, to be changed.
    pub(super) fn shard_mut(&mut self) -> Shard<'_> {
        let apart = self.has_master_apart();
        Shard {
            master: &mut self.master,
            computed: apart.then_some(&mut self.computed),
            decayed: &self.decayed,
        }
    }

    /// Whether the master has a storage of its own: where it is of another kind, or lies elsewhere,
    /// than what is computed with.
    fn has_master_apart(&self) -> bool {
        self.computed.data_ptr() != self.master.data_ptr()
    }
}
