//! Merges: levels in, one sorted stream out.
//!
//! The same code turns a log into a segment, several segments into one, and a history
//! table into its latest view. A merge reads at a fixed sequence: what is superseded below
//! it is dropped, what is superseded later is carried over by whoever publishes.

mod input;
pub(crate) mod plan;

use std::path::Path;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_select::interleave::interleave_record_batch;
use pinion_schemas::EncodedKeys;

use self::input::{Cursor, DeleteEntry, collect_deletes};
use crate::compat::Version;
use crate::error::{ReadError, WorkError};
use crate::level::Level;
use crate::order::RowOrder;
use crate::segment::{SegmentId, SegmentMeta, SegmentWriter, SegmentWriterOptions};
use crate::snapshot::SnapshotInner;

/// Rows per output step.
const STEP_ROWS: usize = 8192;

/// A sorted stream of the rows of some levels.
pub(crate) struct Merged {
    version: Arc<Version>,
    cursors: Vec<Cursor>,
    deletes: Vec<DeleteEntry>,
    next_delete: usize,
    /// Keep one version per key.
    latest: bool,
    /// Versions with earlier event times are gone.
    cut: i64,
    /// The key being taken; kept for its room.
    key: Vec<u8>,
    out: Picked,
}

/// Rows picked but not yet copied, and deletes to carry.
#[derive(Default)]
struct Picked {
    sources: Vec<RecordBatch>,
    picks: Vec<(usize, usize)>,
    keys: EncodedKeys,
    sequences: Vec<u64>,
    deletes: Vec<DeleteEntry>,
}

/// Some rows and deletes of the stream, in order.
pub(crate) struct Step {
    pub batch: RecordBatch,
    pub keys: EncodedKeys,
    pub sequences: Vec<u64>,
    pub deletes: Vec<DeleteEntry>,
}

/// A version met in the stream.
#[derive(Clone, Copy)]
struct Candidate {
    order: RowOrder,
    source: usize,
    row: usize,
}

impl Merged {
    /// The rows of `levels` (oldest first) that a reader at `end_sequence` sees, in the
    /// columns of `version`, sorted by (key, event time, created time, sequence).
    pub(crate) fn new(
        version: Arc<Version>,
        levels: &[&Level],
        end_sequence: u64,
        max_event: Option<i64>,
        latest: bool,
    ) -> Result<Merged, ReadError> {
        let cut = version.cut(max_event);
        let cursors = levels
            .iter()
            .map(|level| Cursor::new(&version, level, end_sequence))
            .collect::<Result<Vec<_>, _>>()?;
        let deletes = collect_deletes(levels, end_sequence)?;
        Ok(Merged {
            version,
            cursors,
            deletes,
            next_delete: 0,
            latest,
            cut,
            key: Vec::new(),
            out: Picked::default(),
        })
    }

    /// The latest row of every key of a history table.
    pub(crate) fn latest_of(snapshot: &SnapshotInner) -> Result<Merged, ReadError> {
        let levels: Vec<&Level> = snapshot.oldest_first().collect();
        Merged::new(
            Arc::clone(&snapshot.version),
            &levels,
            snapshot.end_sequence,
            snapshot.max_event,
            true,
        )
    }

    fn compute(&self, error: &arrow_schema::ArrowError) -> ReadError {
        ReadError::Compute {
            table: self.version.definition.name.clone(),
            problem: error.to_string(),
        }
    }

    /// The next rows only; deletes are dropped.
    pub(crate) fn next_batch(&mut self) -> Result<Option<RecordBatch>, ReadError> {
        while let Some(step) = self.next_step()? {
            if step.batch.num_rows() > 0 {
                return Ok(Some(step.batch));
            }
        }
        Ok(None)
    }

    /// The next rows and deletes; `None` at the end.
    pub(crate) fn next_step(&mut self) -> Result<Option<Step>, ReadError> {
        while self.out.picks.len() < STEP_ROWS && self.out.deletes.len() < STEP_ROWS {
            if !self.take_key()? {
                break;
            }
        }
        if self.out.picks.is_empty() && self.out.deletes.is_empty() {
            return Ok(None);
        }
        let out = std::mem::take(&mut self.out);
        for cursor in &mut self.cursors {
            cursor.source = None;
        }
        let batch = if out.picks.is_empty() {
            RecordBatch::new_empty(Arc::clone(&self.version.log_schema))
        } else {
            copy_picks(&out.sources, &out.picks).map_err(|e| self.compute(&e))?
        };
        Ok(Some(Step {
            batch,
            keys: out.keys,
            sequences: out.sequences,
            deletes: out.deletes,
        }))
    }

    /// The cursor with the least next row.
    fn least(&self) -> Option<usize> {
        let mut least: Option<(usize, &[u8], RowOrder)> = None;
        for (i, cursor) in self.cursors.iter().enumerate() {
            let Some((key, order)) = cursor.peek() else {
                continue;
            };
            if least.is_none_or(|(_, k, o)| (key, order) < (k, o)) {
                least = Some((i, key, order));
            }
        }
        least.map(|(i, _, _)| i)
    }

    /// Takes every version of the next key. False at the end.
    fn take_key(&mut self) -> Result<bool, ReadError> {
        let mut least = self.least();
        let row_key = least
            .and_then(|i| self.cursors[i].peek())
            .map(|(key, _)| key);
        let delete_key = self.deletes.get(self.next_delete).map(|d| d.key.as_slice());
        let mut key = std::mem::take(&mut self.key);
        key.clear();
        match (row_key, delete_key) {
            (None, None) => return Ok(false),
            (Some(row), Some(delete)) => key.extend_from_slice(row.min(delete)),
            (Some(row), None) => key.extend_from_slice(row),
            (None, Some(delete)) => key.extend_from_slice(delete),
        }
        let mut best: Option<Candidate> = None;
        while let Some(i) = least {
            match self.cursors[i].peek() {
                Some((next, order)) if next == key => {
                    let candidate = self.pick(i, order);
                    self.cursors[i].advance(&self.version)?;
                    least = self.least();
                    if order.event < self.cut {
                        continue;
                    }
                    if self.latest {
                        best = Some(candidate);
                    } else {
                        self.keep(&key, candidate);
                    }
                }
                _ => break,
            }
        }
        let mut best_delete: Option<usize> = None;
        while let Some(delete) = self.deletes.get(self.next_delete).filter(|d| d.key == key) {
            if delete.order.event >= self.cut {
                if self.latest {
                    best_delete = Some(self.next_delete);
                } else {
                    self.out.deletes.push(delete.clone());
                }
            }
            self.next_delete += 1;
        }
        match (best, best_delete.map(|i| &self.deletes[i])) {
            (Some(row), Some(delete)) if delete.order > row.order => {
                self.out.deletes.push(delete.clone())
            }
            (None, Some(delete)) => self.out.deletes.push(delete.clone()),
            (Some(row), _) => self.keep(&key, row),
            (None, None) => {}
        }
        self.key = key;
        Ok(true)
    }

    fn pick(&mut self, cursor: usize, order: RowOrder) -> Candidate {
        let out = &mut self.out;
        let cursor = &mut self.cursors[cursor];
        let source = match cursor.source {
            Some(source) => source,
            None => {
                out.sources.push(cursor.window_batch());
                cursor.source = Some(out.sources.len() - 1);
                out.sources.len() - 1
            }
        };
        Candidate {
            order,
            source,
            row: cursor.at(),
        }
    }

    fn keep(&mut self, key: &[u8], row: Candidate) {
        self.out.picks.push((row.source, row.row));
        self.out.keys.push(key);
        self.out.sequences.push(row.order.sequence);
    }
}

/// The picked rows: where they lie, if they follow each other in one batch, else copied.
fn copy_picks(
    sources: &[RecordBatch],
    picks: &[(usize, usize)],
) -> Result<RecordBatch, arrow_schema::ArrowError> {
    if let [(source, first), ..] = *picks
        && picks
            .iter()
            .enumerate()
            .all(|(i, pick)| *pick == (source, first + i))
    {
        return Ok(sources[source].slice(first, picks.len()));
    }
    let sources: Vec<&RecordBatch> = sources.iter().collect();
    interleave_record_batch(&sources, picks)
}

/// What a merge wrote.
pub(crate) struct Written {
    pub meta: SegmentMeta,
    pub event_range: Option<(i64, i64)>,
}

/// What a merge made of its levels.
pub(crate) struct Output {
    /// `None` when nothing is left to keep.
    pub written: Option<Written>,
    /// One past the greatest sequence of a delete that was dropped; 0 when none was.
    pub dropped: u64,
}

/// What may still meet the rows of a merge: it decides which deletes it keeps.
pub(crate) struct Merging {
    /// No older level exists.
    pub bottom: bool,
    /// The greatest event time by which rows still to come are late.
    pub late_from: Option<i64>,
}

/// Writes the rows of `levels` as one segment, as seen at `snapshot`.
pub(crate) fn write_segment(
    snapshot: &SnapshotInner,
    levels: &[&Level],
    merging: Merging,
    dir: &Path,
    id: SegmentId,
    options: &SegmentWriterOptions,
) -> Result<Output, WorkError> {
    let version = Arc::clone(&snapshot.version);
    let latest = version.latest();
    let mut merged = Merged::new(
        Arc::clone(&version),
        levels,
        snapshot.end_sequence,
        snapshot.max_event,
        latest,
    )?;
    let compute = |e: arrow_schema::ArrowError| {
        WorkError::Read(ReadError::Compute {
            table: version.definition.name.clone(),
            problem: e.to_string(),
        })
    };
    // In a latest table a delete at the bottom hides nothing once no older row can come:
    // at once without event time, behind `late_bound` with it.
    let droppable_before = match (merging.bottom && latest, version.event_time) {
        (true, None) => i64::MAX,
        (true, Some(_)) => version.late_before(merging.late_from),
        (false, _) => i64::MIN,
    };
    let mut writer: Option<SegmentWriter> = None;
    let mut event_range: Option<(i64, i64)> = None;
    let mut widen = |low: Option<i64>, high: Option<i64>| {
        if let (Some(low), Some(high)) = (low, high) {
            event_range = Some(
                event_range.map_or((low, high), |(l, h): (i64, i64)| (l.min(low), h.max(high))),
            );
        }
    };
    let mut dropped = 0;
    while let Some(step) = merged.next_step()? {
        let kept = |d: &&DeleteEntry| d.order.event >= droppable_before;
        let (deletes, gone): (Vec<_>, Vec<_>) = step.deletes.iter().partition(kept);
        let ends = gone.iter().map(|d| d.order.sequence.saturating_add(1));
        dropped = ends.fold(dropped, u64::max);
        if step.batch.num_rows() == 0 && deletes.is_empty() {
            continue;
        }
        let writer = match &mut writer {
            Some(writer) => writer,
            None => writer.insert(SegmentWriter::create(
                dir,
                id,
                Arc::clone(&version.storage_schema),
                version.key_columns,
                version.key_encoder.clone(),
                version.segment_options(options),
            )?),
        };
        if step.batch.num_rows() > 0 {
            let times = version.times_of(&step.batch).map_err(compute)?;
            widen(times.min_event(), times.max_event());
            let batch = RecordBatch::try_new(
                Arc::clone(&version.storage_schema),
                step.batch.columns().to_vec(),
            )
            .map_err(compute)?;
            writer.push(&batch, &step.keys, &step.sequences)?;
        }
        if !deletes.is_empty() {
            let mut keys = EncodedKeys::default();
            deletes.iter().for_each(|d| keys.push(&d.key));
            let column =
                |f: fn(&RowOrder) -> i64| deletes.iter().map(|d| f(&d.order)).collect::<Vec<_>>();
            let (events, created) = (column(|o| o.event), column(|o| o.created));
            let sequences: Vec<u64> = deletes.iter().map(|d| d.order.sequence).collect();
            if version.event_time.is_some() {
                widen(events.iter().copied().min(), events.iter().copied().max());
            }
            writer.push_deletes(&keys, &events, &created, &sequences)?;
        }
        crate::fail::point("merge.writing");
    }
    let written = match writer {
        Some(writer) => Some(Written {
            meta: writer.finish()?,
            event_range,
        }),
        None => None,
    };
    Ok(Output { written, dropped })
}
