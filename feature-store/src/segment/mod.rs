//! Segments: immutable, sorted sets of rows in Arrow IPC files, read through a memory map.
//!
//! A segment is up to six files in a table's `segments/` folder, named by its
//! [`SegmentId`] as 16 hex digits:
//!
//! | file | holds |
//! |---|---|
//! | `<id>.arrow` | the rows, sorted by (encoded key, event time, created time, sequence): user columns only, an ordinary Arrow IPC file that any reader opens |
//! | `<id>.sys` | the sequence of each row |
//! | `<id>.idx` | key index over the rows |
//! | `<id>.stat` | null counts, least and greatest values of each record batch; segments of earlier releases lack it |
//! | `<id>.del` | deletes, only if there are any: key columns, `event_time`, `created_time`, `sequence` |
//! | `<id>.dix` | key index over the deletes |
//! | `<id>.rows` | the rows again, each in one slot, only if the table asks for it (`lookup = "rows"`) |
//!
//! Each file is written as `<name>.partial`, made read-only and synced, then renamed; the
//! folder is synced last. From then on its bytes never change, so readers share one mapping
//! without locks and merges read while queries run. After a crash a segment is whole, or it
//! is leftovers that no manifest names. [`SegmentMeta`], which the manifest carries, holds
//! the length and the checksums of every part: [`Segment::open`] checks what it must parse,
//! [`Segment::verify`] checks everything.
//!
//! # `.arrow` and `.del`: where the bytes lie
//!
//! `ARROW1\0\0`, the schema message, the record batches, an end-of-stream marker, the footer.
//! The metadata of a record batch is padded so that its body starts on a multiple of
//! [`PAGE_BYTES`]; in the body a buffer of [`PAGE_BYTES`] or more starts on one too, a smaller
//! one on a multiple of 64; the body's length is a multiple of [`PAGE_BYTES`]. Buffers lie in
//! this order, whatever their order in the schema: values of fixed width, all columns of one
//! width side by side at one pitch; bits of booleans; validity bitmaps; offsets; views; bytes
//! of variable length. The pitch of a group in a batch of `n` rows is `n * width` rounded up
//! to [`PAGE_BYTES`] (to 64 when it is smaller than [`PAGE_BYTES`]). A column without nulls in
//! a batch has a validity buffer of length zero. Nothing is compressed.
//!
//! The footer's metadata says: `pinion.format` (this format's version, `1`),
//! `pinion.batch_rows` (rows of a full batch, a power of two) and `pinion.groups` (JSON list,
//! in physical order, of `{"width_bytes", "pitch_bytes", "columns"}`, the pitch being that of
//! a full batch; a struct's child is named `parent.child`).
//!
//! The layouts of the index, of `.sys`, of `.stat` and of `.rows` stand in `index.rs`,
//! `sequences.rs`, `statistics.rs` and `packed.rs`.
//!
//! Elsewhere: which segments a reader sees (`snapshot`, `manifest`), which to combine
//! (`merge`), what an encoded key is (`pinion_schemas::KeyEncoder`).

#[cfg(target_endian = "big")]
compile_error!("segments are mapped as they are, little endian: big-endian hosts cannot read them");

mod arrow_reader;
mod arrow_writer;
mod body;
mod cut;
mod error;
mod files;
mod index;
mod index_writer;
pub mod ipc;
mod join;
mod lend;
#[allow(unsafe_code)]
mod map;
mod message;
mod meta;
mod packed;
mod packed_writer;
mod raw;
mod reader;
mod sequences;
mod sorted;
mod statistics;
mod verify;
mod writer;

#[cfg(test)]
mod tests;

pub use arrow_reader::{Block, FileChecksum};
pub use error::{OpenSegmentError, SegmentDamage, SegmentError};
pub(crate) use index::Probe;
pub use map::{MappedFile, file_behind};
pub(crate) use map::{Zeroed, map_file, prefetch};
pub(crate) use message::batch_message;
pub(crate) use meta::SUFFIXES;
pub use meta::{ArrowFileMeta, BatchMeta, FileMeta, SegmentId, SegmentMeta};
pub(crate) use packed::{Packed, PackedRows};
pub(crate) use raw::RawColumn;
pub use reader::{DeleteRow, Segment};
pub use sorted::Run;
pub use statistics::{ColumnStatistics, STATISTICS_FORMAT_VERSION, Statistics};
pub use verify::VerifyReport;
pub use writer::{SegmentWriter, SegmentWriterOptions};

/// Bodies, and buffers of at least this size, start at a multiple of it, in the file and so
/// in memory.
pub const PAGE_BYTES: usize = 4096;

/// Buffers smaller than [`PAGE_BYTES`] start at a multiple of this.
pub const SMALL_ALIGNMENT_BYTES: usize = 64;

/// The version of every file of a segment but `.stat`, which has its own, that this program
/// writes, and the newest it reads.
pub const SEGMENT_FORMAT_VERSION: u32 = 1;

/// A segment holds at most this many rows, and at most this many deletes: row numbers are
/// 32-bit and the last is kept free.
pub const MAX_SEGMENT_ROWS: u64 = u32::MAX as u64;
