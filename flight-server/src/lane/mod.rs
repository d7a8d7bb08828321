//! The local lane: lookups and mapped tables for programs on the same machine, over a Unix
//! socket. The protocol is `docs/local-lane.md`; what requests mean is Flight's.
//!
//! One blocking thread per connection: a request is read, answered and written without a
//! hop to another thread. Others may rely on: a peer can cost no more than its thread, its
//! buffers (bounded by the configured limits) and its leases; whatever bytes come, they are
//! refused with an error; a connection that ends, however it ends, releases all it had.
//!
//! Inside: `listener` (accepting, starting, stopping), `peer` (who may connect), `connection`
//! (one peer's requests), `socket` (frames through a socket), `frame` (bytes to
//! frames and back), `handles` (prepared lookups),
//! `map` (lending snapshots), `leases` (who holds which files), `pins` (lending pins: mappings and
//! their leases), `watch` (the peer's process), `meter` (metrics).

mod connection;
mod frame;
mod handles;
mod leases;
mod listener;
mod map;
mod meter;
mod peer;
mod pins;
mod socket;
mod watch;

pub(crate) use leases::Leases;
pub(crate) use listener::Lane;
