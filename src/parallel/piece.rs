//! A part of a bucket, the parameters of one class, as flat buffers.

use tch::{Device, Kind, Tensor, no_grad};

use crate::collective::{Collective, Sliced};
use crate::cuda::PinnedMemory;
use crate::error::Result;
use crate::nn::{Class, Group};
use crate::parallel::copies::Arriving;
use crate::parallel::layout::{Cut, Layout};
use crate::parallel::{Copies, Devices, Sharding, Sharing};

/// Consecutive parameters of one kind, all trained or all frozen.
#[derive(Debug)]
pub struct Piece {
    class: Class,
    /// Layout of what is held: elements, or words of packed ones.
    layout: Layout,
    /// The device that computes.
    device: Device,
    /// This rank's shard in f32, which the optimizer updates and a checkpoint holds; `None` for a
    /// frozen piece, which nothing changes.
    master: Option<Tensor>,
    /// This rank's shard in the compute kind; shares the master's storage if that kind is f32. In
    /// host memory if it waits there between uses.
    computed: Tensor,
    /// The whole piece in the compute kind, on the shard's device; `None` if only the shard is held
    /// between uses.
    full: Option<Tensor>,
    /// The memory of `full` or `computed`, if a GPU reads it on the host.
    _pinned: Option<PinnedMemory>,
    /// True if it lies in host memory and is copied to the device for each use.
    is_streamed: bool,
    /// The shard's elements by the factors of their update.
    groups: Vec<Group>,
}

/// The shard of a trained piece that one rank holds and updates.
#[derive(Debug)]
pub struct Shard<'b> {
    /// The master values, f32.
    pub master: &'b mut Tensor,
    /// The same values in the compute kind, if that is another: code that changes the master must
    /// change them too.
    pub computed: Option<&'b mut Tensor>,
    /// Its elements by the factors of their update; the padding is in none.
    pub groups: &'b [Group],
}

/// The master values of a bucket for the time in which others are computed with.
#[must_use]
pub struct Loan(pub(super) Vec<Option<Tensor>>);

impl Shard<'_> {
    /// Computes with `values`. Returns the master values, in host memory, if they shared storage
    /// with what is computed with.
    pub(super) fn lend(self, values: &Tensor) -> Option<Tensor> {
        let Shard { master, computed, .. } = self;
        no_grad(|| match computed {
            Some(computed) => {
                computed.copy_(values);
                None
            }
            None => {
                let mut kept = Tensor::empty(master.size(), (master.kind(), Device::Cpu));
                kept.copy_(master);
                master.copy_(values);
                Some(kept)
            }
        })
    }

    /// Computes with the master values again, given what [`lend`](Self::lend) returned.
    pub(super) fn end_loan(self, kept: Option<Tensor>) {
        let Shard { master, computed, .. } = self;
        no_grad(|| match (computed, kept) {
            (Some(computed), _) => computed.copy_(master),
            (None, Some(kept)) => master.copy_(&kept),
            (None, None) => {}
        });
    }
}

impl Piece {
    /// A piece of zeros. `groups`: the stage's elements by the factors of their update. A frozen
    /// piece is divided only where the sharding divides what is computed with.
    pub(super) fn new(
        class: Class,
        groups: &[Group],
        devices: Devices,
        sharing: &Sharing<'_>,
    ) -> Self {
        let (kind, shards_all) = (class.kind, sharing.sharding == Sharding::Parameters);
        let cut = if class.frozen && !shards_all { Cut::WHOLE } else { sharing.cut() };
        let layout = Layout::new(class.length(), cut);
        let (device, is_streamed) = (devices.compute, class.frozen && devices.streams_frozen);
        let owned = layout.owned();
        let length = owned.end - owned.start;
        let keeps_all = !shards_all || layout.is_whole();
        let held = if keeps_all { layout.padded } else { length };
        let (held, pinned) = match is_streamed {
            true => Copies::to(device).zeros(held, kind),
            false => (Tensor::zeros([held], (kind, device)), None),
        };
        let (computed, full) = match keeps_all {
            true => (held.narrow(0, owned.start, length), Some(held)),
            false => (held, None),
        };
        let master = (!class.frozen).then(|| match kind {
            Kind::Float => computed.shallow_clone(),
            _ => Tensor::zeros([length], (Kind::Float, devices.home)),
        });
        let of_piece = groups.iter().filter_map(|group| group.within(&class.elements));
        let groups = of_piece.filter_map(|group| group.within(&owned)).collect();
        Piece {
            class,
            layout,
            device,
            master,
            computed,
            full,
            _pinned: pinned,
            is_streamed,
            groups,
        }
    }

    /// The class of its parameters.
    pub fn class(&self) -> &Class {
        &self.class
    }

    pub fn is_trained(&self) -> bool {
        self.master.is_some()
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// This rank's shard as it is kept: the f32 master, or what is computed with where it is
    /// frozen.
    pub fn values(&self) -> &Tensor {
        self.master.as_ref().unwrap_or(&self.computed)
    }

    /// The kind that it is held in between uses.
    pub fn kind(&self) -> Kind {
        self.computed.kind()
    }

    /// This rank's shard as it is computed with.
    pub(super) fn computed(&self) -> &Tensor {
        &self.computed
    }

    /// Brings a tensor that holds the piece, or this rank's shard of it, to the device.
    pub(super) fn arriving(&self, held: &Tensor, copies: &Copies) -> Result<Arriving> {
        match self.is_streamed {
            true => copies.start(held, self.device),
            false => Ok(Arriving::here(held.shallow_clone())),
        }
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
        Tensor::empty([self.layout.padded], (kind, self.device))
    }

    /// A buffer `[padded]` for the piece's gradient, uninitialized except that the padding is zero.
    pub(super) fn empty_gradient(&self, kind: Kind) -> Tensor {
        let Layout { numel, padded, .. } = self.layout;
        let gradient = self.empty_full(kind);
        drop(gradient.narrow(0, numel, padded - numel).zero_());
        gradient
    }

    /// Returns this rank's shard of a tensor of the piece's elements, f32; the padding is zero.
    pub(super) fn owned(&self, elements: &Tensor) -> Tensor {
        let (numel, owned) = (self.layout.numel, self.layout.owned());
        let shard = self.values().zeros_like().to_kind(Kind::Float);
        let held = (numel.min(owned.end) - owned.start).max(0);
        shard.narrow(0, 0, held).copy_(&elements.narrow(0, owned.start.min(numel), held));
        shard
    }

    /// Gathers a tensor of which every rank of `shards` holds a shard: `[numel]` f32. No copy if
    /// this rank's shard is the whole, in f32.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub(super) fn whole(&self, owned: &Tensor, shards: &dyn Collective) -> Result<Tensor> {
        let full = if self.layout.is_whole() {
            owned.shallow_clone()
        } else {
            let (owned, full) = (owned.to_device(self.device), self.empty_full(owned.kind()));
            shards.all_gather(vec![Sliced { owned, full: full.shallow_clone() }])?.wait()?;
            full
        };
        Ok(self.class.elements_of(&full.narrow(0, 0, self.layout.numel)))
    }

    /// Sets all parameters, given the piece's elements in f32; each rank keeps the part that it
    /// holds.
    pub(super) fn set(&mut self, elements: &Tensor) {
        let elements = &self.class.held(elements, self.device);
        let (numel, owned) = (self.layout.numel, self.layout.owned());
        let held = (numel.min(owned.end) - owned.start).max(0);
        let shard = elements.narrow(0, owned.start.min(numel), held);
        // The padding stays zero.
        match &mut self.full {
            Some(full) => full.narrow(0, 0, numel).copy_(elements),
            None => self.computed.narrow(0, 0, held).copy_(&shard),
        }
        if let Some(Shard { master, computed: Some(_), .. }) = self.shard_mut() {
            master.narrow(0, 0, held).copy_(&shard);
        }
    }

    /// This rank's shard, for an update; `None` if it is frozen.
    pub(super) fn shard_mut(&mut self) -> Option<Shard<'_>> {
        let Piece { master, computed, groups, .. } = self;
        let master = master.as_mut()?;
        // Another kind or device.
        let is_separate = computed.data_ptr() != master.data_ptr();
        Some(Shard { master, computed: is_separate.then_some(computed), groups })
    }
}
