//! The addresses of all ranks, and what connecting to any of them has in common.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::call::Call;
use super::setup_message::Incoming;

/// The operation that errors name while ranks connect.
pub const CALL: Call = Call { backend: "tcp", operation: "connect" };

/// The longest attempt to connect to one address.
const ATTEMPT: Duration = Duration::from_secs(3);

/// The addresses at which a rank accepts connections.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Endpoint {
    pub host: String,
    pub addresses: Vec<IpAddr>,
    pub port: u16,
}

/// The endpoints of all ranks, in rank order.
pub struct Roster {
    pub token: String,
    pub endpoints: Vec<Endpoint>,
    /// The address at which this rank has reached rank 0; `None` on rank 0 itself.
    pub root: Option<IpAddr>,
}

/// Logs that a connection is ignored, and why; it closes when the caller drops it.
pub fn ignore(incoming: &Incoming, why: &str) {
    tracing::warn!("ignored a connection from {}: {why}", incoming.address);
}

/// Returns the timeout of one attempt to connect, by the deadline `until`.
pub fn attempt_timeout(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(1), ATTEMPT)
}
