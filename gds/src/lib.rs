//! Tables in device memory.
//!
//! A [`Backend`] is one device and one way to fill its memory: `direct` (cuFile, GPUDirect),
//! `bounce` (pinned host blocks and asynchronous copies) or `host` (shared memory, no GPU). It
//! hands out [`Region`]s, exportable allocations that other processes map, and brings bytes into
//! them. Everything above it is the same for all three.
//!
//! Elsewhere: the tables themselves (`pinion-feature-store`), the protocol by which other
//! processes get at a region (`docs/local-lane.md`).
#![warn(missing_docs)]

mod backend;
mod bounce;
mod cuda_region;
mod device;
mod direct;
mod error;
mod host;
mod host_memory;
mod lane;
mod pool;
pub mod probe;
mod reads;
mod scratch;
#[allow(unsafe_code)]
mod sys;

pub use backend::{
    Backend, CopyPiece, DeviceInfo, DeviceKind, DeviceMemory, DmaFile, Edits, LoadPath, LoadReport,
    Piece, Region, RegionMemory,
};
pub use bounce::BounceBackend;
pub use device::{Cuda, Device, DeviceRange, WorkStream};
pub use direct::DirectBackend;
pub use error::GdsError;
pub use host::HostBackend;
pub use pool::{PinnedBlock, PinnedPool, PoolLimits, PoolStats, Stretch, Transfer};
pub use scratch::{ScratchPool, ScratchStats};
pub use sys::cufile::{CuFile, RegisteredRange};
