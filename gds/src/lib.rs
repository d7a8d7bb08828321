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
mod error;

pub use backend::{
    Backend, CopyPiece, DeviceInfo, DeviceKind, DeviceMemory, DmaFile, Edits, LoadPath, LoadReport,
    Piece, Region, RegionMemory,
};
pub use error::GdsError;
