//! Pins: tables in device memory that other processes map.
//!
//! [`Pins`] makes them, lends them and takes them out of use. A pin is one or more slots, each a
//! full copy of the pinned columns in one exportable region; a **generation** is what one slot
//! holds, equal to one snapshot of the table. A frozen pin has one slot and one generation. A
//! fresh pin follows its table: the next generation is written into a slot that nobody leases,
//! while the newest stays where readers are given it.
//!
//! - A consumer asks once for a layout and the descriptors of its slots ([`Pins::share`]), then
//!   for each reading for a lease on the newest generation ([`Pins::lease`]), which is two
//!   numbers: slot and generation.
//! - A layout's number grows when slots are added or the shape changes. A lease is refused with
//!   `LayoutChanged` then, and the consumer asks for descriptors again; slots that it has mapped
//!   before come again among them under the same place, if only slots were added.
//! - A leased slot is never written, and its memory is not given back, whatever happens to the
//!   pin. If every slot but the newest is leased, the pin stays at its generation, says by whom it
//!   is stalled, and grows by a slot if it may.
//! - A consumer that has mapped the slots holds a [`Mapping`]: their memory counts as in use until
//!   that is dropped.
//! - A frozen pin in host memory of a table that lies in segments as it is (a **clean** snapshot)
//!   has no slot: its files are **lent**, nothing is copied and no memory taken. It keeps the
//!   segments on disk; how much of those that the table uses no more is bounded as well.
//! - Memory is counted against a budget per device from before it is allocated until it is given
//!   back. Pins that nobody leases are evicted for new ones, the longest unused first.
//!
//! Inside: ids and names (`names`), what is asked for (`request`), slots (`ring`), what is published
//! under which lock (`pin`, `claim`), the key index (`index`, `journal`, `keys`), the first fill
//! (`fill`) or what is lent instead (`lent`), changes (`refresh`, on threads of `worker`), memory (`budget`, `device`, `mapping`), the
//! whole (`registry`).
//!
//! Elsewhere: bytes and offsets (`layout`, `encode`), devices (`backend`), the protocol
//! (`docs/local-lane.md`).

mod budget;
mod claim;
mod columns;
mod device;
mod error;
mod fill;
mod generation;
mod index;
mod journal;
mod keys;
mod lease;
mod lent;
mod mapping;
mod names;
mod options;
// The module is named after its only type, as the noun is.
#[allow(clippy::module_inception)]
mod pin;
mod refresh;
mod registry;
mod request;
mod ring;
mod status;
#[cfg(test)]
mod tests;
mod worker;

pub use error::PinError;
pub use fill::{EncodedBytes, FillReport};
pub use generation::{Generation, Stall};
pub use lease::{BufferChecksum, Checked, Holder, Lease, LeaseNote};
pub use mapping::{Mapping, MappingNote};
pub use names::{DeviceName, NotAPinId, PinId};
pub use options::{Headroom, PinOptions};
pub use pin::Retired;
pub use registry::Pins;
pub use request::{MAX_SLOTS, PinForm, PinRequest, Shared};
pub use status::{DeviceStatus, FilesStatus, PinFigures, PinStatus};
