//! What can go wrong with a segment: while writing, while opening, and once it is open.

use std::io;

use arrow_schema::{ArrowError, DataType};
use pinion_schemas::KeyError;

use super::{MAX_SEGMENT_ROWS, SegmentId};

/// Why a segment could not be written.
///
/// After any of these the writer is only good for dropping, which removes what it wrote.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// A file could not be created, written, synced or renamed.
    #[error("cannot {action} segment file {file}")]
    Io {
        /// What was tried, such as `sync`.
        action: &'static str,
        /// The file's name without its folder.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// The id is taken: a published file is never replaced.
    #[error("segment file {file} exists already; published files are never replaced")]
    Exists {
        /// The file's name without its folder.
        file: String,
    },
    /// The type of a column has no place in a segment.
    #[error("column {column:?} has type {data_type}, which a segment cannot hold")]
    UnsupportedType {
        /// The column, with the path to the nested field.
        column: String,
        /// Its type.
        data_type: DataType,
    },
    /// A batch does not fit the segment's schema.
    #[error("a batch does not fit the schema of segment {id}")]
    Schema {
        /// The segment.
        id: SegmentId,
        /// Which column, and how.
        source: ArrowError,
    },
    /// The parts of one push differ in length.
    #[error("{rows} rows came with {other} {what}")]
    Lengths {
        /// Rows of the batch, or keys of the deletes.
        rows: usize,
        /// How many of the others there were.
        other: usize,
        /// What the others are.
        what: &'static str,
    },
    /// Rows must come in ascending order of their encoded keys.
    #[error("row {row} of segment {id} has a lesser key than the row before it")]
    OutOfOrder {
        /// The segment.
        id: SegmentId,
        /// The number of the offending row in the segment.
        row: u64,
    },
    /// Row numbers are 32-bit.
    #[error("segment {id} would hold more than {MAX_SEGMENT_ROWS} rows; split the input")]
    TooManyRows {
        /// The segment.
        id: SegmentId,
    },
    /// A delete's key is not a key of this table.
    #[error("the keys of deletes for segment {id} cannot be decoded")]
    DeleteKeys {
        /// The segment.
        id: SegmentId,
        /// What is wrong with them.
        source: KeyError,
    },
    /// Rows could not be joined into a batch, or a batch could not be laid out.
    #[error("cannot lay out rows of segment {id}")]
    Layout {
        /// The segment.
        id: SegmentId,
        /// What arrow said.
        source: ArrowError,
    },
}

/// Why a segment could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenSegmentError {
    /// The manifest names it but a file is gone: removed from outside.
    #[error("segment {id}: file {file} is missing")]
    Missing {
        /// The segment.
        id: SegmentId,
        /// The file's name.
        file: String,
    },
    /// A file has another length than the manifest says. Not a crash of ours: files are
    /// renamed only after the sync.
    #[error(
        "segment {id}: file {file} has {actual_bytes} bytes, the manifest says {expected_bytes}"
    )]
    Truncated {
        /// The segment.
        id: SegmentId,
        /// The file's name.
        file: String,
        /// Its length according to the manifest.
        expected_bytes: u64,
        /// Its length.
        actual_bytes: u64,
    },
    /// A newer program wrote the file.
    #[error(
        "segment {id}: file {file} has format version {found}, this program reads up to \
         {supported}; upgrade it"
    )]
    NewerVersion {
        /// The segment.
        id: SegmentId,
        /// The file's name.
        file: String,
        /// The file's version.
        found: u32,
        /// The newest version this program reads.
        supported: u32,
    },
    /// The footer, or the head, of an Arrow file is not what was written.
    #[error("segment {id}: the footer of {file} is damaged: {what}")]
    FooterDamaged {
        /// The segment.
        id: SegmentId,
        /// The file's name.
        file: String,
        /// Which check failed.
        what: String,
    },
    /// The header of a companion is not what was written.
    #[error("segment {id}: the header of {file} is damaged: {what}")]
    HeaderDamaged {
        /// The segment.
        id: SegmentId,
        /// The file's name.
        file: String,
        /// Which check failed.
        what: String,
    },
    /// The segment holds other columns than the definition version it is said to have.
    #[error("segment {id}: column {column} is {found} in the file, {expected} in the definition")]
    SchemaMismatch {
        /// The segment.
        id: SegmentId,
        /// The number of the first column that differs.
        column: usize,
        /// What the file has there.
        found: String,
        /// What the definition has there.
        expected: String,
    },
    /// The manifest's entry contradicts itself.
    #[error("the manifest's entry of segment {id} is not consistent: {what}")]
    Meta {
        /// The segment.
        id: SegmentId,
        /// The contradiction.
        what: String,
    },
    /// A file could not be opened or mapped.
    #[error("cannot open file {file} of segment {id}")]
    Io {
        /// The segment.
        id: SegmentId,
        /// The file's name.
        file: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Bytes of an open segment are not what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("segment {segment} is damaged: {file}{}: {what}", batch_suffix(*batch))]
pub struct SegmentDamage {
    /// The segment.
    pub segment: SegmentId,
    /// The file's name.
    pub file: String,
    /// Which check failed.
    pub what: String,
    /// The record batch, if the damage lies in one.
    pub batch: Option<usize>,
}

fn batch_suffix(batch: Option<usize>) -> String {
    batch.map_or_else(String::new, |batch| format!(", batch {batch}"))
}
