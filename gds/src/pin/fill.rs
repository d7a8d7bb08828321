//! Filling a slot with all latest rows of a snapshot.
//!
//! What lies on disk as a slot has it (the values of a fixed-width column, in a run of rows that a
//! segment holds side by side) is loaded from the segment's file by the backend, without a stop on
//! the host, by a thread of its own while the next rows are read. Everything else is encoded here
//! and written: rows that are compacted before the copy, rows of logs, texts, lists, booleans, and
//! validity, which files hold as bits. What is null is written over what was loaded, where that
//! is little; else the column's rows are encoded.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use arrow_buffer::NullBuffer;
use pinion_feature_store::{FileRange, KeyedRows, MappedRows, Snapshot};
use serde_json::{Value, json};

use super::columns::Columns;
use super::error::PinError;
use crate::backend::{Backend, DmaFile, Edits, LoadPath, LoadReport, Piece, Region};
use crate::encode::{Encoder, Rows};
use crate::layout::{Node, Shape, Used};

/// Bytes encoded before they are written.
const WRITE_AT_BYTES: u64 = 32 << 20;

/// Bytes, and pieces, named before they are loaded: enough to keep all readers of a disk busy, and
/// few enough that they soon begin.
const LOAD_AT_BYTES: u64 = 256 << 20;
const LOAD_AT_PIECES: usize = 4096;

/// Loads named while one is under way: the next is there when one ends.
const LOADS_AHEAD: usize = 2;

/// Of so many values one may be null, for the others to be loaded: a null that is written over what
/// was loaded costs about as much as four values that are encoded.
const VALUES_A_NULL: usize = 8;

/// How the bytes of a fill reached the slot, and why not all were loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FillReport {
    /// How loaded bytes went.
    pub path: LoadPath,
    /// Why by this path and not a faster one, in the backend's words.
    pub reason: Option<String>,
    /// Bytes loaded from files.
    pub loaded_bytes: u64,
    /// Bytes encoded on the host, by cause.
    pub encoded: EncodedBytes,
    /// Rows.
    pub rows: u64,
    /// From the first row to the last byte.
    pub elapsed: Duration,
}

/// Bytes that were encoded on the host and written, by what kept them from being loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EncodedBytes {
    /// Rows in a log, or apart from each other in a segment: compacted before the copy.
    pub scattered_bytes: u64,
    /// Texts, binary, lists, structs, booleans, and columns whose type changed since.
    pub form_bytes: u64,
    /// Nulls, which get NaN or 0, and validity that says so; with the other values of their rows
    /// where many are null.
    pub nulls_bytes: u64,
    /// Validity of columns that were loaded, and the one that columns without nulls share.
    pub validity_bytes: u64,
}

impl FillReport {
    /// Bytes of both ways.
    pub fn bytes(&self) -> u64 {
        self.loaded_bytes + self.encoded.total()
    }

    /// What other processes are told.
    pub fn to_json(&self) -> Value {
        let seconds = self.elapsed.as_secs_f64();
        let rate = self.bytes() as f64 / 1e9 / seconds.max(1e-9);
        json!({
            "path": self.path.to_string(),
            "reason": self.reason,
            "bytes": self.bytes(),
            "loaded_bytes": self.loaded_bytes,
            "encoded_bytes": {
                "scattered_rows": self.encoded.scattered_bytes,
                "form": self.encoded.form_bytes,
                "nulls": self.encoded.nulls_bytes,
                "validity": self.encoded.validity_bytes,
            },
            "rows": self.rows,
            "seconds": seconds,
            "gb_per_second": rate,
        })
    }
}

impl EncodedBytes {
    fn total(&self) -> u64 {
        self.scattered_bytes + self.form_bytes + self.nulls_bytes + self.validity_bytes
    }
}

/// A slot that was filled.
pub(crate) struct Filled {
    pub used: Used,
    pub report: FillReport,
}

/// What is filled, and with what.
pub(crate) struct Fill<'a> {
    pub backend: &'a dyn Backend,
    pub region: &'a Region,
    pub shape: &'a Shape,
    pub snapshot: &'a Snapshot,
    pub columns: &'a Columns,
    /// Asked before each batch of rows and each load.
    pub go_on: &'a (dyn Fn() -> Result<(), PinError> + Sync),
}

/// Stretches of a file to be loaded, and what is written over them then.
struct Load {
    file: Arc<DmaFile>,
    pieces: Vec<Piece>,
    nulls: Edits,
}

impl Fill<'_> {
    /// Fills the region with all latest rows of the snapshot, in the order of
    /// [`Snapshot::latest_values`], from row 0 on.
    ///
    /// # Errors
    ///
    /// Those of `go_on` too. After any the region holds anything, and nothing writes to it.
    pub fn run(&self) -> Result<Filled, PinError> {
        let started = Instant::now();
        let stopped = AtomicBool::new(false);
        thread::scope(|scope| {
            let (loads, to_load) = sync_channel(LOADS_AHEAD);
            let loader = thread::Builder::new()
                .name("pin-load".to_owned())
                .spawn_scoped(scope, || {
                    let loaded = self.load_all(to_load, &stopped);
                    stopped.fetch_or(loaded.is_err(), Ordering::Relaxed);
                    loaded
                })
                .map_err(|source| PinError::Io {
                    action: "start a thread".to_owned(),
                    source,
                })?;
            let filled = self.name_all(loads, &stopped);
            stopped.fetch_or(filled.is_err(), Ordering::Relaxed);
            // If it failed, that is why naming was stopped; if it was stopped, it did not fail.
            let loaded = match loader.join() {
                Ok(loaded) => loaded?,
                Err(panicked) => std::panic::resume_unwind(panicked),
            };
            let mut filled = filled?;
            let report = &mut filled.report;
            if let Some(loaded) = loaded {
                report.path = loaded.path;
                report.reason = loaded.reason;
            }
            report.elapsed = started.elapsed();
            Ok(filled)
        })
    }

    /// Loads all that comes, until stopped; tells of the last.
    fn load_all(
        &self,
        loads: Receiver<Load>,
        stopped: &AtomicBool,
    ) -> Result<Option<LoadReport>, PinError> {
        let mut last = None;
        for load in loads {
            if stopped.load(Ordering::Relaxed) {
                break;
            }
            (self.go_on)()?;
            last = Some(self.backend.load(&load.file, &load.pieces, self.region)?);
            if !load.nulls.is_empty() {
                self.backend.write(self.region, &load.nulls)?;
            }
        }
        Ok(last)
    }

    /// Reads all rows, writes what has to be encoded, and names what is to be loaded, until
    /// stopped, which is an error.
    fn name_all(&self, loads: SyncSender<Load>, stopped: &AtomicBool) -> Result<Filled, PinError> {
        let mut filling = Filling::new(self, loads);
        for rows in self.snapshot.latest_values(Some(&self.columns.names))? {
            if stopped.load(Ordering::Relaxed) {
                return Err(loading_ended());
            }
            (self.go_on)()?;
            filling.add(&rows?)?;
        }
        filling.end()
    }
}

/// Said of naming; why loading ended is said by whoever loaded.
fn loading_ended() -> PinError {
    PinError::Inconsistent {
        problem: "loading has ended".to_owned(),
    }
}

struct Filling<'a> {
    backend: &'a dyn Backend,
    region: &'a Region,
    shape: &'a Shape,
    encoder: Encoder<'a, Edits>,
    /// To the thread that loads.
    loads: SyncSender<Load>,
    /// The file that `pieces` are of.
    file: Option<(u64, Arc<DmaFile>)>,
    pieces: Vec<Piece>,
    piece_bytes: u64,
    /// Nulls within `pieces`.
    nulls: Edits,
    /// Few nulls are written over what was loaded.
    scatters: bool,
    /// Validity of loaded columns and of their elements, to be set: where, and how many bytes.
    valid: BTreeMap<(usize, usize), (u64, u64)>,
    rows: u64,
    /// Bytes encoded and written; the encoder has more.
    written_bytes: u64,
    report: FillReport,
}

impl<'a> Filling<'a> {
    fn new(fill: &Fill<'a>, loads: SyncSender<Load>) -> Filling<'a> {
        let none = Used {
            rows: 0,
            parts: vec![0; fill.shape.parts().len()],
        };
        Filling {
            backend: fill.backend,
            region: fill.region,
            shape: fill.shape,
            encoder: Encoder::new(fill.shape, &none, Edits::default()),
            loads,
            file: None,
            pieces: Vec::new(),
            piece_bytes: 0,
            nulls: Edits::default(),
            scatters: fill.backend.scatters(),
            valid: BTreeMap::new(),
            rows: 0,
            written_bytes: 0,
            report: FillReport {
                path: fill.backend.path(),
                reason: None,
                loaded_bytes: 0,
                encoded: EncodedBytes::default(),
                rows: 0,
                elapsed: Duration::ZERO,
            },
        }
    }

    /// After the last rows.
    fn end(mut self) -> Result<Filled, PinError> {
        self.hand_over()?;
        self.write()?;
        self.set_valid()?;
        if let Some(validity) = self.shape.shared_validity.filter(|_| self.rows > 0) {
            self.backend.set(self.region, validity, self.rows, 1)?;
            self.report.encoded.validity_bytes += self.rows;
        }
        self.report.rows = self.rows;
        Ok(Filled {
            used: Used {
                rows: self.rows,
                parts: self.encoder.parts,
            },
            report: self.report,
        })
    }

    fn add(&mut self, rows: &KeyedRows) -> Result<(), PinError> {
        let count = rows.batch.num_rows();
        let first = self.rows;
        self.rows += count as u64;
        let run = Rows::Run { first, count };
        for (at, array) in rows.batch.columns().iter().enumerate() {
            let before = self.encoded_bytes();
            let column = &self.shape.columns[at];
            if self.shares_validity(&column.node) && array.null_count() > 0 {
                return Err(PinError::Inconsistent {
                    problem: format!("column {:?} has nulls, its segments say none", column.name),
                });
            }
            let way = self.way_of(&column.node, array, rows.mapped.as_ref(), at);
            match &way {
                Way::Load(loaded) => {
                    self.load(rows.mapped.as_ref(), loaded, first)?;
                    self.all_valid(at, first, count as u64)?;
                }
                Way::LoadAndNulls(loaded, nulls) => {
                    self.load(rows.mapped.as_ref(), loaded, first)?;
                    self.write_nulls(at, nulls, first);
                }
                _ => self.encoder.column(at, array, &run)?,
            }
            let bytes = self.encoded_bytes() - before;
            let encoded = &mut self.report.encoded;
            match way {
                // Counted where their edits are made.
                Way::Load(_) | Way::LoadAndNulls(..) => {}
                Way::Scattered => encoded.scattered_bytes += bytes,
                Way::Nulls => encoded.nulls_bytes += bytes,
                Way::Form => encoded.form_bytes += bytes,
            }
            if self.encoder.sink.held_bytes() >= WRITE_AT_BYTES {
                self.write()?;
            }
        }
        Ok(())
    }

    fn way_of(
        &self,
        node: &Node,
        array: &ArrayRef,
        mapped: Option<&MappedRows>,
        column: usize,
    ) -> Way {
        let Some(mapped) = mapped else {
            return Way::Scattered;
        };
        let (base, width) = match node {
            Node::Fixed { width, values, .. } => (*values, u64::from(*width)),
            Node::FixedSizeList { size, child, .. } => match **child {
                Node::Fixed { width, values, .. } => (values, u64::from(width) * u64::from(*size)),
                _ => return Way::Form,
            },
            _ => return Way::Form,
        };
        let few = array.null_count() * VALUES_A_NULL <= array.len();
        let nulls = array.nulls().filter(|nulls| nulls.null_count() > 0);
        let written = nulls.filter(|_| self.scatters && few && matches!(node, Node::Fixed { .. }));
        if written.is_none() && has_nulls(array) {
            return Way::Nulls;
        }
        let range = mapped.columns.get(column).copied().flatten();
        match range.filter(|range| range.bytes == array.len() as u64 * width) {
            None => Way::Form,
            Some(range) => {
                let values = Values { range, base, width };
                match written {
                    None => Way::Load(values),
                    Some(nulls) => Way::LoadAndNulls(values, nulls.clone()),
                }
            }
        }
    }

    fn shares_validity(&self, node: &Node) -> bool {
        node.validity().is_some() && node.validity() == self.shape.shared_validity
    }

    fn encoded_bytes(&self) -> u64 {
        self.written_bytes + self.encoder.sink.bytes()
    }

    /// Names the values of rows from `first` on.
    fn load(
        &mut self,
        mapped: Option<&MappedRows>,
        values: &Values,
        first: u64,
    ) -> Result<(), PinError> {
        let Some(mapped) = mapped else {
            return Ok(());
        };
        let segment = mapped.file.segment().0;
        if self.file.as_ref().is_none_or(|(open, _)| *open != segment) {
            self.hand_over()?;
            let name = format!("segment {}", mapped.file.segment());
            let file = mapped.file.open().map_err(|source| PinError::Io {
                action: format!("open {name}"),
                source,
            })?;
            self.file = Some((segment, Arc::new(DmaFile::reopen(&file, &name)?)));
        }
        if self.piece_bytes >= LOAD_AT_BYTES
            || self.pieces.len() >= LOAD_AT_PIECES
            || self.nulls.held_bytes() >= WRITE_AT_BYTES
        {
            self.hand_over()?;
        }
        self.pieces.push(Piece {
            file_offset: values.range.offset,
            region_offset: values.base + first * values.width,
            bytes: values.range.bytes,
        });
        self.piece_bytes += values.range.bytes;
        self.report.loaded_bytes += values.range.bytes;
        Ok(())
    }

    /// Has the nulls of the values that were named last written over them.
    fn write_nulls(&mut self, column: usize, nulls: &NullBuffer, first: u64) {
        let before = self.nulls.bytes();
        std::mem::swap(&mut self.encoder.sink, &mut self.nulls);
        self.encoder.nulls(column, nulls, first);
        std::mem::swap(&mut self.encoder.sink, &mut self.nulls);
        self.report.encoded.nulls_bytes += self.nulls.bytes() - before;
    }

    /// Notes that rows of a loaded column, and its elements, are not null.
    fn all_valid(&mut self, column: usize, first: u64, count: u64) -> Result<(), PinError> {
        let node = &self.shape.columns[column].node;
        let mut found = Vec::with_capacity(2);
        let own = node.validity().filter(|_| !self.shares_validity(node));
        found.extend(own.map(|at| (at + first, count)));
        if let Node::FixedSizeList { size, child, .. } = node {
            let size = u64::from(*size);
            let validity = child.validity();
            found.extend(validity.map(|at| (at + first * size, count * size)));
        }
        for (which, (at, bytes)) in found.into_iter().enumerate() {
            self.report.encoded.validity_bytes += bytes;
            let open = self.valid.entry((column, which)).or_insert((at, 0));
            // A column's rows follow each other, batch by batch, while they are loaded.
            if open.0 + open.1 == at {
                open.1 += bytes;
                continue;
            }
            let (start, length) = std::mem::replace(open, (at, bytes));
            self.backend.set(self.region, start, length, 1)?;
        }
        Ok(())
    }

    fn set_valid(&mut self) -> Result<(), PinError> {
        for (at, bytes) in std::mem::take(&mut self.valid).into_values() {
            self.backend.set(self.region, at, bytes, 1)?;
        }
        Ok(())
    }

    /// What was measured is what comes; else nothing is written past a buffer's end.
    fn check_room(&self) -> Result<(), PinError> {
        let used = Used {
            rows: self.rows,
            parts: self.encoder.parts.clone(),
        };
        match self.shape.fits(&used) {
            true => Ok(()),
            false => Err(PinError::Inconsistent {
                problem: format!("more came than was measured: {used:?}"),
            }),
        }
    }

    /// Has what was named loaded.
    fn hand_over(&mut self) -> Result<(), PinError> {
        self.check_room()?;
        self.piece_bytes = 0;
        if let Some((_, file)) = &self.file
            && !self.pieces.is_empty()
        {
            let load = Load {
                file: Arc::clone(file),
                pieces: std::mem::take(&mut self.pieces),
                nulls: std::mem::take(&mut self.nulls),
            };
            self.loads.send(load).map_err(|_| loading_ended())?;
        }
        Ok(())
    }

    /// Writes what was encoded.
    fn write(&mut self) -> Result<(), PinError> {
        self.check_room()?;
        if !self.encoder.sink.is_empty() {
            let edits = std::mem::take(&mut self.encoder.sink);
            self.backend.write(self.region, &edits)?;
            self.written_bytes += edits.bytes();
        }
        Ok(())
    }
}

/// Where the values of some rows lie in a file, and where the column's lie in a slot.
struct Values {
    range: FileRange,
    base: u64,
    /// Bytes of a row.
    width: u64,
}

/// How a column of some rows gets into the slot.
enum Way {
    Load(Values),
    /// Loaded, and then its nulls are written.
    LoadAndNulls(Values, NullBuffer),
    Scattered,
    Nulls,
    Form,
}

fn has_nulls(array: &ArrayRef) -> bool {
    if array.null_count() > 0 {
        return true;
    }
    array.as_fixed_size_list_opt().is_some_and(|list| {
        let size = list.value_length() as usize;
        let first = list.value_offset(0) as usize;
        list.values().slice(first, list.len() * size).null_count() > 0
    })
}
