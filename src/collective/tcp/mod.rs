//! A communicator over TCP, for clusters on which MPI cannot be started: it needs nothing but the
//! network.
//!
//! ```text
//!  rank 0                                        rank r > 0
//!  Coordinator listens at host:port
//!       | <--------------- Register ---------------- |  build, rank, world size,
//!       |                                            |  Endpoint (host, addresses, port)
//!       |   ... until all ranks have registered      |
//!       | -------- Welcome: token, endpoints ------> |  or Refused: exit code, reason
//!       v                                            v
//!  Roster: the endpoints of all ranks, and the token of this world
//!       |                                            |
//!  MeshSetup: each pair connects once; the higher rank dials the lower one
//!       | <---------- Hello: token, from, to ------- |
//!       | ----------- Hello: token, from, to ------> |
//!       v                                            v
//!  Mesh: a Connection to every peer, which carries Frames: Piece, Goodbye, Failed
//! ```
//!
//! The collectives are those of [`exchange`](super::exchange), with the same sums in the same
//! order. `tcp/rendezvous.rs` collects the ranks at rank 0, `tcp/mesh_setup.rs` connects each pair,
//! and both exchange the records of `tcp/setup_message.rs`. Afterwards `tcp/mesh.rs` drives all
//! connections, `tcp/connection.rs` is one of them, and `tcp/frame.rs` is the wire format.
//!
//! The network is trusted, as it is with MPI: nothing is encrypted. Connections made by mistake, by
//! a port scanner or another job, are recognized and ignored. Ranks of one machine use its loopback
//! interface; they share no memory.

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
pub(super) use connection::{announce_failure, release_connections, wait_for_end};
use mesh::{Envelope, Mesh, Messages};

/// A communicator over TCP.
pub type Tcp = Communicator<TcpTransport>;

/// The ranks of one communicator.
pub struct TcpTransport {
    mesh: Rc<RefCell<Mesh>>,
    membership: Membership,
    /// Rank in the world of each rank of this communicator.
    members: Rc<[usize]>,
    /// Differs between the communicators that a rank belongs to.
    id: u64,
}

impl Tcp {
    /// Connects to the other ranks at `rendezvous`, the `host:port` at which rank 0 listens. Every
    /// rank calls it.
    ///
    /// # Errors
    /// [`Error::Collective`](crate::error::Error::Collective) if ranks are missing after `limit`;
    /// it names them. [`Error::Environment`](crate::error::Error::Environment) if two processes
    /// claim one rank, or the processes disagree about the world size.
    /// # Panics
    /// If `rank` is not below `world_size`.
    pub fn connect(
        rank: usize,
        world_size: usize,
        rendezvous: &str,
        limit: Duration,
    ) -> Result<Self> {
        Tcp::join(rank, world_size, rendezvous, limit, &|_| ())
    }

    /// Does as [`connect`](Self::connect) for the world that [`abort`](super::abort) ends: its
    /// connections stay open after an early return. Rank 0 calls `on_refusal` with the reason
    /// before it refuses the others.
    pub(super) fn connect_for_life(
        rank: usize,
        world_size: usize,
        rendezvous: &str,
        limit: Duration,
        on_refusal: &dyn Fn(&Error),
    ) -> Result<Self> {
        let world = Tcp::join(rank, world_size, rendezvous, limit, on_refusal)?;
        connection::keep_open(world.transport.mesh.borrow().connections());
        Ok(world)
    }

    fn join(
        rank: usize,
        world_size: usize,
        rendezvous: &str,
        limit: Duration,
        on_refusal: &dyn Fn(&Error),
    ) -> Result<Self> {
        assert!(rank < world_size, "no rank {rank} among {world_size}");
        let membership = Membership { rank, world_size };
        let mesh = Rc::new(RefCell::new(Mesh::new(
            world_size,
            rendezvous::meet(membership, rendezvous, limit, on_refusal)?,
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

    fn barrier(&self, call: Call, issued: Issued) -> Result<()> {
        let (channel, mut messages) = (self.channel(call, issued), Messages::default());
        self.membership.peers().try_for_each(|peer| channel.receive_signal(&mut messages, peer))?;
        self.membership.peers().try_for_each(|peer| channel.send_signal(&mut messages, peer))?;
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

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The messages of one operation.
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

    fn send_signal(&self, messages: &mut Messages, peer: usize) -> Result<()> {
        self.send(messages, Span::empty(), peer)
    }

    fn receive_signal(&self, messages: &mut Messages, peer: usize) -> Result<()> {
        self.receive(messages, Span::empty(), peer)
    }

    fn wait(&self, messages: &mut Messages) -> Result<()> {
        self.mesh.borrow_mut().wait(messages, self.envelope.call)
    }
}
