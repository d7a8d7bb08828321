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
mod decode;
mod device;
mod direct;
mod encode;
mod error;
mod host;
mod host_memory;
mod kernels;
mod lane;
mod layout;
mod pin;
mod pool;
pub mod probe;
mod reads;
mod scratch;
#[allow(unsafe_code)]
mod sys;

pub use backend::{
    Backend, CopyPiece, DeviceInfo, DeviceKind, DeviceMemory, DmaFile, Edits, LoadPath, LoadReport,
    Piece, Region, RegionMemory, RowBuffer,
};
pub use bounce::BounceBackend;
pub use decode::DecodeError;
pub use device::{Cuda, Device, DeviceRange, WorkStream};
pub use direct::DirectBackend;
pub use encode::EncodeError;
pub use error::GdsError;
pub use host::HostBackend;
pub use layout::{
    ALIGNMENT, Column, HEAP_BUFFER_BYTES, Layout, LayoutError, Node, PinMode, Shape, Used,
    UsedBuffer, VIEW_BYTES,
};
pub use pin::{
    BufferChecksum, Checked, DeviceName, DeviceStatus, EncodedBytes, FilesStatus, FillReport,
    Generation, Headroom, Holder, Lease, LeaseNote, MAX_SLOTS, Mapping, MappingNote, NotAPinId,
    PinError, PinFigures, PinForm, PinId, PinOptions, PinRequest, PinStatus, Pins, Retired, Shared,
    Stall,
};
pub use pool::{PinnedBlock, PinnedPool, PoolLimits, PoolStats, Stretch, Transfer};
pub use scratch::{ScratchPool, ScratchStats};
pub use sys::cufile::{CuFile, RegisteredRange};
