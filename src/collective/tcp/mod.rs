//! Ranks that TCP connects, for clusters whose MPI cannot be started: nobody but the network is
//! needed.
//!
//! The algorithm is that of [`exchange`](super::exchange), with the same sums in the same order.
//! `tcp/rendezvous.rs` brings the ranks together, `tcp/greeting.rs` connects each pair,
//! `tcp/record.rs` has what they say until then; afterwards `tcp/frame.rs` is what they say,
//! `tcp/mesh.rs` serves the connections, `tcp/line.rs` one of them.
//!
//! The network is trusted as MPI's is: nothing is encrypted. What connects by mistake, a port
//! scanner or another job, is recognized and ignored. Ranks of one machine go over its loopback;
//! memory is not shared.

mod frame;
mod greeting;
mod line;
mod mesh;
mod record;
mod rendezvous;

use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::call::Call;
use super::exchange::{Board, Link, Place, Ranks, Stretch, Wire};
use super::{Collective, Issued, Sliced};
use crate::error::{Error, Result};
pub(super) use line::{last_words, let_go, wait_for_end};
use mesh::{Label, Mesh, Messages};

/// Ranks that TCP connects.
pub type Tcp = Ranks<Group>;

/// Some ranks of the world.
pub struct Group {
    mesh: Rc<RefCell<Mesh>>,
    place: Place,
    /// Each one's rank in the world.
    members: Rc<[usize]>,
    /// Differs between the groups of a rank.
    id: u64,
}

impl Tcp {
    /// Meets the other ranks at `rendezvous`, a `host:port` at which rank 0 listens. Every rank
    /// calls it.
    ///
    /// # Errors
    /// [`Error::Collective`](crate::error::Error::Collective) if not all have come within `limit`,
    /// naming those that have not; [`Error::Environment`](crate::error::Error::Environment) if two
    /// claim one rank, or the ranks do not agree on their number.
    /// # Panics
    /// If there is no such rank in a world of this size.
    pub fn connect(
        rank: usize,
        world_size: usize,
        rendezvous: &str,
        limit: Duration,
    ) -> Result<Self> {
        Tcp::meet(rank, world_size, rendezvous, limit, &|_| ())
    }

    /// Does as [`connect`](Self::connect) for the world that [`abort`](super::abort) ends: its
    /// connections outlive an early return. `refusing`: called on rank 0 with the reason before it
    /// turns the others away.
    pub(super) fn connect_for_life(
        rank: usize,
        world_size: usize,
        rendezvous: &str,
        limit: Duration,
        refusing: &dyn Fn(&Error),
    ) -> Result<Self> {
        let world = Tcp::meet(rank, world_size, rendezvous, limit, refusing)?;
        line::hold(world.link.mesh.borrow().lines());
        Ok(world)
    }

    fn meet(
        rank: usize,
        world_size: usize,
        rendezvous: &str,
        limit: Duration,
        refusing: &dyn Fn(&Error),
    ) -> Result<Self> {
        assert!(rank < world_size, "no rank {rank} among {world_size}");
        let place = Place { rank, world_size };
        let mesh = Rc::new(RefCell::new(Mesh::of(
            world_size,
            rendezvous::meet(place, rendezvous, limit, refusing)?,
        )));
        Ok(Ranks::of(Group { mesh, place, members: (0..world_size).collect(), id: 0 }))
    }
}

impl Link for Group {
    type Wire = Strand;

    const BACKEND: &'static str = "tcp";

    fn place(&self) -> Place {
        self.place
    }

    fn board(&self) -> Option<&Rc<Board>> {
        None
    }

    fn wire(&self, call: Call, issued: Issued) -> Strand {
        let tag = hash((self.id, issued.digest));
        let label = Rc::new(Label { call, rank: self.place.rank, tag, name: issued.to_string() });
        Strand { mesh: self.mesh.clone(), members: self.members.clone(), label }
    }

    fn meet(&self, call: Call, issued: Issued) -> Result<()> {
        let (wire, mut messages) = (self.wire(call, issued), Messages::default());
        self.place.peers().try_for_each(|peer| wire.hear(&mut messages, peer))?;
        self.place.peers().try_for_each(|peer| wire.tell(&mut messages, peer))?;
        wire.wait(&mut messages)
    }

    fn part(ranks: &Ranks<Self>, _call: Call, color: usize) -> Result<Self> {
        let Group { mesh, place, members, id } = &ranks.link;
        let colors = Tensor::zeros([place.world_size as i64], (Kind::Int64, Device::Cpu));
        let own = Tensor::from_slice(&[color as i64]);
        ranks.all_gather(vec![Sliced { owned: own, full: colors.shallow_clone() }])?.wait()?;
        let colors = Vec::<i64>::try_from(colors).expect("integers");
        let same: Vec<usize> =
            (0..place.world_size).filter(|rank| colors[*rank] == color as i64).collect();
        let rank =
            same.iter().position(|rank| *rank == place.rank).expect("this rank has its own color");
        Ok(Group {
            mesh: mesh.clone(),
            place: Place { rank, world_size: same.len() },
            members: same.iter().map(|rank| members[*rank]).collect(),
            id: hash((id, ranks.issued().count, color)),
        })
    }
}

fn hash(what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

/// What carries one operation's messages.
pub struct Strand {
    mesh: Rc<RefCell<Mesh>>,
    members: Rc<[usize]>,
    label: Rc<Label>,
}

impl Wire for Strand {
    type Messages = Messages;

    fn send(&self, messages: &mut Messages, stretch: Stretch, peer: usize) -> Result<()> {
        self.mesh.borrow_mut().send(messages, &self.label, stretch, self.members[peer]);
        Ok(())
    }

    fn receive(&self, messages: &mut Messages, stretch: Stretch, peer: usize) -> Result<()> {
        self.mesh.borrow_mut().receive(messages, &self.label, stretch, (self.members[peer], peer));
        Ok(())
    }

    fn tell(&self, messages: &mut Messages, peer: usize) -> Result<()> {
        self.send(messages, Stretch::nothing(), peer)
    }

    fn hear(&self, messages: &mut Messages, peer: usize) -> Result<()> {
        self.receive(messages, Stretch::nothing(), peer)
    }

    fn wait(&self, messages: &mut Messages) -> Result<()> {
        self.mesh.borrow_mut().wait(messages, self.label.call)
    }
}
