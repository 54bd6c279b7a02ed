//! Communicator that TCP connects, for clusters whose MPI cannot be started: nobody but the network is
//! needed.
//!
//! The algorithm is that of [`exchange`](super::exchange), with the same sums in the same order.
//! `tcp/rendezvous.rs` brings the ranks together, `tcp/mesh_setup.rs` connects each pair,
//! `tcp/setup_message.rs` has what they say until then; afterwards `tcp/frame.rs` is what they say,
//! `tcp/mesh.rs` serves the connections, `tcp/connection.rs` one of them.
//!
//! The network is trusted as MPI's is: nothing is encrypted. What connects by mistake, a port
//! scanner or another job, is recognized and ignored. Communicator of one machine go over its loopback;
//! memory is not shared.

mod connection;
mod frame;
mod mesh;
mod mesh_setup;
mod rendezvous;
mod roster;
mod setup_message;

use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::call::Call;
use super::exchange::{Channel, Communicator, Membership, SharedBuffer, Span, Transport};
use super::{Collective, Issued, Sliced};
use crate::error::{Error, Result};
pub(super) use connection::{last_words, let_go, wait_for_end};
use mesh::{Envelope, Mesh, Messages};

/// Communicator that TCP connects.
pub type Tcp = Communicator<TcpTransport>;

/// Some ranks of the world.
pub struct TcpTransport {
    mesh: Rc<RefCell<Mesh>>,
    membership: Membership,
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
        connection::hold(world.transport.mesh.borrow().connections());
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
        let membership = Membership { rank, world_size };
        let mesh = Rc::new(RefCell::new(Mesh::new(
            world_size,
            rendezvous::meet(membership, rendezvous, limit, refusing)?,
        )));
        Ok(Communicator::new(TcpTransport {
            mesh,
            membership,
            members: (0..world_size).collect(),
            id: 0,
        }))
    }
}

impl Transport for TcpTransport {
    type Channel = TcpChannel;

    const BACKEND: &'static str = "tcp";

    fn membership(&self) -> Membership {
        self.membership
    }

    fn shared_buffer(&self) -> Option<&Rc<SharedBuffer>> {
        None
    }

    fn channel(&self, call: Call, issued: Issued) -> TcpChannel {
        let tag = hash((self.id, issued.digest));
        let envelope =
            Rc::new(Envelope { call, rank: self.membership.rank, tag, name: issued.to_string() });
        TcpChannel { mesh: self.mesh.clone(), members: self.members.clone(), envelope }
    }

    fn meet(&self, call: Call, issued: Issued) -> Result<()> {
        let (channel, mut messages) = (self.channel(call, issued), Messages::default());
        self.membership.peers().try_for_each(|peer| channel.hear(&mut messages, peer))?;
        self.membership.peers().try_for_each(|peer| channel.tell(&mut messages, peer))?;
        channel.wait(&mut messages)
    }

    fn split(whole: &Communicator<Self>, _call: Call, color: usize) -> Result<Self> {
        let TcpTransport { mesh, membership, members, id } = &whole.transport;
        let colors = Tensor::zeros([membership.world_size as i64], (Kind::Int64, Device::Cpu));
        let own = Tensor::from_slice(&[color as i64]);
        whole.all_gather(vec![Sliced { owned: own, full: colors.shallow_clone() }])?.wait()?;
        let colors = Vec::<i64>::try_from(colors).expect("integers");
        let same: Vec<usize> =
            (0..membership.world_size).filter(|rank| colors[*rank] == color as i64).collect();
        let rank = same
            .iter()
            .position(|rank| *rank == membership.rank)
            .expect("this rank has its own color");
        Ok(TcpTransport {
            mesh: mesh.clone(),
            membership: Membership { rank, world_size: same.len() },
            members: same.iter().map(|rank| members[*rank]).collect(),
            id: hash((id, whole.issued().count, color)),
        })
    }
}

fn hash(what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

/// What carries one operation's messages.
pub struct TcpChannel {
    mesh: Rc<RefCell<Mesh>>,
    members: Rc<[usize]>,
    envelope: Rc<Envelope>,
}

impl Channel for TcpChannel {
    type Messages = Messages;

    fn send(&self, messages: &mut Messages, span: Span, peer: usize) -> Result<()> {
        self.mesh.borrow_mut().send(messages, &self.envelope, span, self.members[peer]);
        Ok(())
    }

    fn receive(&self, messages: &mut Messages, span: Span, peer: usize) -> Result<()> {
        self.mesh.borrow_mut().receive(messages, &self.envelope, span, (self.members[peer], peer));
        Ok(())
    }

    fn tell(&self, messages: &mut Messages, peer: usize) -> Result<()> {
        self.send(messages, Span::nothing(), peer)
    }

    fn hear(&self, messages: &mut Messages, peer: usize) -> Result<()> {
        self.receive(messages, Span::nothing(), peer)
    }

    fn wait(&self, messages: &mut Messages) -> Result<()> {
        self.mesh.borrow_mut().wait(messages, self.envelope.call)
    }
}
