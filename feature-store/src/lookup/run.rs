//! One table's part of a reply: its keys found, and what they have written to its columns.

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::DataType;
use pinion_schemas::{EncodedKeys, key_hash};

use super::gather::{Cell, Sink, Slot, Target, compute};
use super::prepare::PreparedPart;
use super::probe::{Found, Keys, ProbeScratch};
use super::reply::{PartPlan, ReplyRequest, ReplyShape};
use super::template::Shape;
use super::{DEADLINE_STEP, ValueStatus, is_past};
use crate::error::ReadError;
use crate::level::Level;
use crate::snapshot::Snapshot;

/// Packed rows that are read together: their slots stay in the nearest cache from one column to
/// the next.
const SLOTS: usize = 64;

/// Validity and times of one table's part of a reply.
#[derive(Default)]
pub(super) struct Fill {
    pub(super) targets: Vec<Target>,
    pub(super) validity: Vec<u8>,
    pub(super) nulls: Vec<usize>,
    pub(super) item_nulls: Vec<usize>,
    pub(super) events: Vec<i64>,
    pub(super) event_validity: Vec<u8>,
    pub(super) event_nulls: usize,
}

/// The keys of a request as one or several tables have them.
pub(super) struct Encoding<'r> {
    part: &'r PartPlan,
    snapshot: &'r Snapshot,
    pub(super) encoded: EncodedKeys,
    pub(super) hashes: Vec<u64>,
}

impl<'r> Encoding<'r> {
    pub(super) fn new(
        part: &'r PartPlan,
        snapshot: &'r Snapshot,
        request: &RecordBatch,
    ) -> Result<Encoding<'r>, ReadError> {
        let given: Vec<ArrayRef> = part
            .keys
            .iter()
            .map(|&column| ArrayRef::clone(request.column(column)))
            .collect();
        let encoded = snapshot.encode_keys(&snapshot.key_columns(&given)?)?;
        Ok(Encoding {
            part,
            snapshot,
            hashes: encoded.iter().map(key_hash).collect(),
            encoded,
        })
    }

    /// Whether another table would encode its keys the same.
    pub(super) fn fits(&self, part: &PartPlan, snapshot: &Snapshot) -> bool {
        let types = |snapshot: &'_ Snapshot| -> Vec<DataType> {
            let version = &snapshot.0.version;
            let fields = version.storage_schema.fields().iter();
            fields
                .take(version.key_columns)
                .map(|field| field.data_type().clone())
                .collect()
        };
        self.part.keys == part.keys && types(self.snapshot) == types(snapshot)
    }
}

/// One table's part of one reply.
pub(super) struct PartRun<'r, 'a> {
    pub(super) shape: &'r ReplyShape,
    pub(super) part: &'r PartPlan,
    pub(super) prepared: &'a PreparedPart,
    pub(super) snapshot: &'a Snapshot,
    pub(super) rows: usize,
    pub(super) moment: ReplyRequest,
}

impl<'a> PartRun<'_, 'a> {
    /// Finds the keys and writes what they have. Returns whether the deadline passed.
    pub(super) fn run(
        &self,
        keys: &Keys<'_>,
        fill: &mut Fill,
        places: &[usize],
        texts: &mut Vec<Vec<&'a [u8]>>,
        (found, probe): (&mut Vec<Found>, &mut ProbeScratch),
        body: &mut [u8],
    ) -> Result<bool, ReadError> {
        let PartRun {
            shape,
            part,
            prepared,
            snapshot,
            rows,
            moment,
        } = *self;
        let inner = snapshot.0.as_ref();
        fill.begin(part, places, rows, shape.event_time, texts);
        let levels: Vec<&Level> = inner.newest_first().collect();
        let expired_before = snapshot.expired_before(shape.as_of_nanos, Some(moment.now_nanos));
        let mut window = snapshot.window(shape.as_of_nanos);
        window.wants_event = shape.event_time || expired_before != i64::MIN;
        let Some(resolved) = prepared.resolved() else {
            return Ok(false);
        };
        let Fill {
            targets,
            validity,
            nulls,
            item_nulls,
            events,
            event_validity,
            event_nulls,
        } = fill;
        let mut sink = Sink {
            body,
            targets,
            defaults: &resolved.defaults,
            use_defaults: shape.defaults,
            validity,
            nulls,
            item_nulls,
            texts,
        };
        let table = snapshot.table();
        found.resize(rows.min(DEADLINE_STEP), Found::MISSING);
        let mut cells: Vec<Cell<'a>> = Vec::new();
        let mut slots: Vec<Slot<'a>> = Vec::new();
        let mut kept: Vec<usize> = Vec::new();
        let mut partial = false;
        for start in (0..rows).step_by(DEADLINE_STEP) {
            let range = start..rows.min(start + DEADLINE_STEP);
            let found = &mut found[..range.len()];
            partial = partial || is_past(moment.deadline);
            if partial {
                found.fill(Found::NOT_READ);
            } else {
                inner.find_all(&levels, keys, range.clone(), window, found, probe)?;
            }
            cells.clear();
            slots.clear();
            kept.clear();
            for (row, found) in range.zip(&*found) {
                if shape.event_time {
                    if found.is_row() {
                        events[row] = found.event;
                    } else {
                        event_validity[row / 8] &= !(1 << (row % 8));
                        *event_nulls += 1;
                    }
                }
                let place = usize::try_from(found.level)
                    .ok()
                    .filter(|_| found.is_row())
                    .and_then(|level| levels.get(level).zip(prepared.level_maps.get(level)));
                let Some((&level, &map_number)) = place else {
                    let status = match *found {
                        Found::NOT_READ => ValueStatus::NotRead,
                        _ => ValueStatus::NotFound,
                    };
                    sink.blank(row, status);
                    continue;
                };
                if found.event < expired_before {
                    if !shape.keep_expired {
                        sink.blank(row, ValueStatus::OutsideMaxAge);
                        continue;
                    }
                    kept.push(row);
                }
                let map = &resolved.maps[map_number];
                if !map.absent.is_empty() {
                    sink.absent_features(row, map);
                }
                let (batch, at, raw) = match level {
                    Level::Segment(segment) => {
                        if let (Some(rows), Some(packed)) = (segment.segment.packed(), &map.packed)
                        {
                            slots.push(Slot {
                                row,
                                bytes: rows.slot(found.row),
                                level: found.level as usize,
                                stored: found.row,
                            });
                            if packed.unpacked.is_empty() {
                                continue;
                            }
                        }
                        let (number, at) = segment.segment.batch_of_row(found.row);
                        let batch = segment.segment.batch_ref(number);
                        let batch = batch.map_err(|damage| segment.error(damage))?;
                        let raw = segment.segment.raw(number);
                        (
                            batch,
                            at,
                            Some(raw.map_err(|damage| segment.error(damage))?),
                        )
                    }
                    Level::Log(log) => {
                        let (batch, at) = log.row(found.row).ok_or_else(|| ReadError::Log {
                            table: table.to_owned(),
                            log: log.log.incarnation,
                            problem: format!("row {} is not in it", found.row),
                        })?;
                        (batch, at, None)
                    }
                };
                cells.push(Cell {
                    row,
                    batch,
                    at,
                    map: map_number,
                    packed: level.packed().is_some(),
                    raw,
                });
            }
            if !slots.is_sorted_by_key(|slot| slot.level) {
                slots.sort_by_key(|slot| slot.level);
            }
            for slots in slots.chunk_by(|a, b| a.level == b.level) {
                let Some(first) = slots.first() else { continue };
                let map_number = prepared.level_maps[first.level];
                if let Level::Segment(segment) = levels[first.level]
                    && let Some(rows) = segment.segment.packed()
                    && let Some(packed) = &resolved.maps[map_number].packed
                {
                    for slots in slots.chunks(SLOTS) {
                        sink.packed(rows, slots, packed)
                            .map_err(|row| segment.error(segment.segment.packed_damage(row)))?;
                    }
                }
            }
            let kind = |cell: &Cell<'_>| (cell.map, cell.packed, cell.raw.is_some());
            cells.sort_by_key(kind);
            for cells in cells.chunk_by(|a, b| kind(a) == kind(b)) {
                let Some(first) = cells.first() else { continue };
                let map = &resolved.maps[first.map];
                let stored = match &map.packed {
                    Some(packed) if first.packed => &packed.unpacked,
                    _ => &map.stored,
                };
                for stored in stored {
                    let data_type = map.schema.field(stored.column).data_type();
                    sink.column(cells, stored, data_type)
                        .map_err(|error| compute(table, &error))?;
                }
            }
            for &row in &kept {
                sink.set_status(row, ValueStatus::OutsideMaxAge);
            }
        }
        Ok(partial)
    }
}

impl Fill {
    /// Makes room for so many rows, all valid.
    fn begin(
        &mut self,
        part: &PartPlan,
        places: &[usize],
        rows: usize,
        event_time: bool,
        texts: &mut Vec<Vec<&[u8]>>,
    ) {
        let row_bits = rows.div_ceil(8);
        self.targets.clear();
        let mut validity_bytes = 0;
        for (&(value, status), &shape) in part.columns.iter().zip(&part.shapes) {
            let validity_at = validity_bytes;
            validity_bytes += row_bits;
            let items_at = validity_bytes;
            if let Shape::List { items, .. } = shape {
                validity_bytes += (rows * items).div_ceil(8);
            }
            let text = texts.len();
            if let Shape::Text { .. } = shape {
                texts.push(vec![&[]; rows]);
            }
            self.targets.push(Target {
                shape,
                at: places[value],
                validity_at,
                items_at,
                text,
                status_at: status.map(|column| places[column]),
            });
        }
        self.validity.clear();
        self.validity.resize(validity_bytes, 0xff);
        for counts in [&mut self.nulls, &mut self.item_nulls] {
            counts.clear();
            counts.resize(part.shapes.len(), 0);
        }
        self.event_nulls = 0;
        if event_time {
            self.events.clear();
            self.events.resize(rows, 0);
            self.event_validity.clear();
            self.event_validity.resize(row_bits, 0xff);
        }
    }
}
