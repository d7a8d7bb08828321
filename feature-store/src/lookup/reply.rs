//! A stream's lookups: one request of keys in, one encoded record batch out.

use std::time::Instant;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, SchemaRef};
use bytes::{Bytes, BytesMut};
use pinion_schemas::{EncodedKeys, key_hash};

use super::gather::{Cell, Sink, Target, compute};
use super::prepare::PreparedPart;
use super::probe::{Found, Keys, ProbeScratch};
use super::template::{Shape, Template};
use super::{DEADLINE_STEP, ValueStatus, is_past};
use crate::error::ReadError;
use crate::level::Level;
use crate::snapshot::Snapshot;

/// Buffers of this size or more start on a multiple of it in the body.
const ALIGNMENT_BYTES: usize = 64;
/// Smaller ones on a multiple of this: small replies are mostly padding otherwise.
const SMALL_ALIGNMENT_BYTES: usize = 16;
/// The body's length is a multiple of this.
const BODY_ALIGNMENT_BYTES: usize = 8;
/// A body buffer that grew past this is not kept for the next reply.
const KEPT_BODY_BYTES: usize = 16 << 20;

/// What a stream asks of one table.
#[derive(Debug, Clone)]
pub struct ReplyPart {
    /// The request's columns that are the table's key, in the order of its entity.
    pub keys: Vec<usize>,
    /// Names of the features.
    pub features: Vec<String>,
}

/// What every request of a stream asks, and what its replies look like.
#[derive(Debug, Clone)]
pub struct ReplyShape {
    /// One for each table.
    pub parts: Vec<ReplyPart>,
    /// The features in the order of the reply: part, and place among the part's features.
    /// Each feature of each part stands here once.
    pub outputs: Vec<(usize, usize)>,
    /// Columns of a request.
    pub request: SchemaRef,
    /// Columns of a reply, dictionaries as their values: the request's, the outputs, then a status per output and an event
    /// time per output of a table that has event time, as asked.
    pub reply: SchemaRef,
    /// Whether statuses are asked for.
    pub status: bool,
    /// Whether event times are asked for.
    pub event_time: bool,
    /// As in [`super::LookupRequest`].
    pub as_of_nanos: Option<i64>,
    /// As in [`super::LookupRequest`].
    pub keep_expired: bool,
    /// As in [`super::LookupRequest`].
    pub defaults: bool,
}

/// What differs from request to request, beside the keys.
#[derive(Debug, Clone, Copy)]
pub struct ReplyRequest {
    /// The clock that ttl is judged by when the stream has no `as_of`.
    pub now_nanos: i64,
    /// Keys not looked for by then are answered [`ValueStatus::NotRead`].
    pub deadline: Option<Instant>,
}

/// An encoded reply: a record batch message of the Arrow IPC format.
#[derive(Debug, Clone)]
pub struct ReplyMessage {
    /// The flatbuffer, without the framing of 8 bytes that streams put before it; with that
    /// its length is a multiple of 64.
    pub header: Bytes,
    /// The buffers. Those of 64 bytes or more start on multiples of 64, others of 16.
    pub body: Bytes,
    /// True when the deadline passed before all keys were looked for.
    pub partial: bool,
}

#[derive(Debug, Clone, Copy)]
enum Role {
    Request(usize),
    Feature { part: usize, feature: usize },
    Status { part: usize, feature: usize },
    Event { part: usize },
}

#[derive(Debug)]
struct Column {
    role: Role,
    shape: Shape,
    /// Of its first array in the message.
    node: usize,
    /// Of its first buffer in the message.
    buffer: usize,
}

/// What one table's features are in the reply.
#[derive(Debug)]
struct PartPlan {
    keys: Vec<usize>,
    features: Vec<String>,
    types: Vec<DataType>,
    shapes: Vec<Shape>,
    /// Column of the reply of each feature, and of its status.
    columns: Vec<(usize, Option<usize>)>,
}

/// A stream's lookups, prepared: see the module above.
///
/// It answers exactly as [`Snapshot::lookup`] does, in the order asked, duplicates included.
#[derive(Debug)]
pub struct ReplyPlan {
    shape: ReplyShape,
    parts: Vec<PartPlan>,
    columns: Vec<Column>,
    template: Template,
}

/// The room one stream's replies are made in, kept from one to the next.
#[derive(Default)]
pub struct ReplyScratch {
    prepared: Vec<PreparedPart>,
    fills: Vec<Fill>,
    places: Vec<usize>,
    found: Vec<Found>,
    probe: ProbeScratch,
    header: BytesMut,
    body: BytesMut,
}

impl std::fmt::Debug for ReplyScratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplyScratch").finish_non_exhaustive()
    }
}

/// Validity and times of one table's part of a reply.
#[derive(Default)]
struct Fill {
    targets: Vec<Target>,
    validity: Vec<u8>,
    nulls: Vec<usize>,
    item_nulls: Vec<usize>,
    events: Vec<i64>,
    event_validity: Vec<u8>,
    event_nulls: usize,
}

impl ReplyPlan {
    /// Prepares a stream. `None` if a column of the reply has a type that is left to the IPC
    /// writer: nested ones but fixed-size lists of primitives, views, dictionaries. (A feature
    /// that is a dictionary has a plan where the reply says the type of its values.)
    pub fn new(shape: ReplyShape, snapshots: &[Snapshot]) -> Option<ReplyPlan> {
        if snapshots.len() != shape.parts.len() {
            return None;
        }
        let mut roles: Vec<Role> = (0..shape.request.fields().len()).map(Role::Request).collect();
        let outputs = || shape.outputs.iter().copied();
        roles.extend(outputs().map(|(part, feature)| Role::Feature { part, feature }));
        if shape.status {
            roles.extend(outputs().map(|(part, feature)| Role::Status { part, feature }));
        }
        if shape.event_time {
            let timed = |part: usize| snapshots.get(part)?.0.version.event_time;
            let timed = outputs().filter(|(part, _)| timed(*part).is_some());
            roles.extend(timed.map(|(part, _)| Role::Event { part }));
        }
        if roles.len() != shape.reply.fields().len() {
            return None;
        }
        let mut columns = Vec::with_capacity(roles.len());
        let (mut node, mut buffer) = (0, 0);
        for (role, field) in roles.into_iter().zip(shape.reply.fields()) {
            let column = Column {
                role,
                shape: Shape::of(field.data_type())?,
                node,
                buffer,
            };
            if let Role::Request(at) = role {
                // A request's lists are rare, and their items may be anything.
                let same = shape.request.field(at).data_type() == field.data_type();
                if !same || matches!(column.shape, Shape::List { .. }) {
                    return None;
                }
            }
            node += column.shape.nodes();
            buffer += column.shape.buffers();
            columns.push(column);
        }
        let mut parts = Vec::with_capacity(shape.parts.len());
        for (number, part) in shape.parts.iter().enumerate() {
            let mut plan = PartPlan {
                keys: part.keys.clone(),
                features: part.features.clone(),
                types: Vec::new(),
                shapes: Vec::new(),
                columns: Vec::new(),
            };
            for wanted in 0..part.features.len() {
                let place = |is: &dyn Fn(Role) -> bool| {
                    columns.iter().position(|column: &Column| is(column.role))
                };
                let value = place(&|role| {
                    matches!(role, Role::Feature { part, feature } if (part, feature) == (number, wanted))
                })?;
                let status = place(&|role| {
                    matches!(role, Role::Status { part, feature } if (part, feature) == (number, wanted))
                });
                plan.columns.push((value, status));
                plan.shapes.push(columns.get(value)?.shape);
                plan.types.push(shape.reply.field(value).data_type().clone());
            }
            parts.push(plan);
        }
        let shapes: Vec<Shape> = columns.iter().map(|column| column.shape).collect();
        Some(ReplyPlan {
            template: Template::new(&shapes)?,
            shape,
            parts,
            columns,
        })
    }

    /// Answers one batch of keys, one snapshot for each part.
    ///
    /// Returns `None` where [`Snapshot::lookup`] must answer instead: a feature has another type
    /// by now, or a log of an earlier process is not in memory. Nothing is lost then but the
    /// time of finding out, some microseconds.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::lookup`].
    pub fn fill(
        &self,
        scratch: &mut ReplyScratch,
        request: &RecordBatch,
        snapshots: &[Snapshot],
        moment: ReplyRequest,
    ) -> Result<Option<ReplyMessage>, ReadError> {
        let rows = request.num_rows();
        if snapshots.len() != self.parts.len() || !self.fits(request) {
            return Ok(None);
        }
        let ReplyScratch {
            prepared,
            fills,
            places,
            found,
            probe,
            header,
            body,
        } = scratch;
        prepared.resize_with(self.parts.len(), PreparedPart::default);
        fills.resize_with(self.parts.len(), Fill::default);
        for ((part, prepared), snapshot) in self.parts.iter().zip(&mut *prepared).zip(snapshots) {
            for level in snapshot.0.newest_first() {
                if let Level::Log(log) = level {
                    log.prepare(rows)?;
                    if !log.is_warm() && log.visible_rows > 0 {
                        return Ok(None);
                    }
                }
            }
            if prepared
                .resolve(snapshot, &part.features, &part.types, &part.shapes)
                .is_none()
            {
                return Ok(None);
            }
        }

        let mut end = 0;
        places.clear();
        for column in &self.columns {
            let bytes = column.shape.fixed_bytes(rows);
            end = aligned(end, bytes);
            places.push(end);
            end += bytes;
        }
        if body.capacity() > KEPT_BODY_BYTES {
            *body = BytesMut::new();
        }
        body.clear();
        body.resize(end, 0);
        for (column, &at) in self.columns.iter().zip(&*places) {
            if matches!(column.role, Role::Status { .. }) {
                body[at..at + rows].fill(ValueStatus::Present as u8);
            }
        }
        let prepared: &[PreparedPart] = prepared;
        let mut texts: Vec<Vec<Vec<&[u8]>>> = Vec::with_capacity(self.parts.len());
        let mut encodings: Vec<Encoding<'_>> = Vec::new();
        let mut partial = false;
        for (number, (part, snapshot)) in self.parts.iter().zip(snapshots).enumerate() {
            let (Some(prepared), Some(fill)) = (prepared.get(number), fills.get_mut(number)) else {
                return Ok(None);
            };
            let mut part_texts: Vec<Vec<&[u8]>> = Vec::new();
            // Tables of one request mostly have the same key: it is encoded once.
            let same = encodings.iter().position(|e| e.fits(part, snapshot));
            let encoding = match same {
                Some(at) => at,
                None => {
                    encodings.push(Encoding::new(part, snapshot, request)?);
                    encodings.len() - 1
                }
            };
            let Some(encoding) = encodings.get(encoding) else {
                return Ok(None);
            };
            let run = PartRun {
                plan: self,
                part,
                prepared,
                snapshot,
                rows,
                moment,
            };
            let keys = Keys {
                encoded: &encoding.encoded,
                hashes: &encoding.hashes,
            };
            partial |= run.run(&keys, fill, places, &mut part_texts, (found, probe), body)?;
            texts.push(part_texts);
        }

        header.clear();
        header.extend_from_slice(self.template.header());
        let mut writer = Writer {
            template: &self.template,
            header,
            body,
            rows,
        };
        for (column, &at) in self.columns.iter().zip(&*places) {
            let done = match column.role {
                Role::Request(index) => writer.request(column, at, request.column(index)),
                Role::Feature { part, feature } => fills
                    .get(part)
                    .zip(texts.get(part))
                    .and_then(|(fill, texts)| writer.feature(column, at, feature, fill, texts)),
                Role::Status { .. } => {
                    writer.plain(column, at, 0, &[]);
                    Some(())
                }
                Role::Event { part } => fills
                    .get(part)
                    .map(|fill| writer.events(column, at, fill)),
            };
            // A text column of more than 2 GiB: the other path says what is too large.
            if done.is_none() {
                return Ok(None);
            }
        }
        let body_bytes = writer.finish();
        self.template.set_message(header, rows, body_bytes);
        Ok(Some(ReplyMessage {
            header: header.split().freeze(),
            body: body.split().freeze(),
            partial,
        }))
    }

    /// Whether the request's columns are those the plan was made for.
    fn fits(&self, request: &RecordBatch) -> bool {
        let due = self.shape.request.fields();
        request.num_columns() == due.len()
            && request
                .columns()
                .iter()
                .zip(due)
                .all(|(column, field)| column.data_type() == field.data_type())
    }
}

fn aligned(end: usize, bytes: usize) -> usize {
    end.next_multiple_of(if bytes >= ALIGNMENT_BYTES {
        ALIGNMENT_BYTES
    } else {
        SMALL_ALIGNMENT_BYTES
    })
}

/// The keys of a request as one or several tables have them.
struct Encoding<'r> {
    part: &'r PartPlan,
    snapshot: &'r Snapshot,
    encoded: EncodedKeys,
    hashes: Vec<u64>,
}

impl<'r> Encoding<'r> {
    fn new(
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
    fn fits(&self, part: &PartPlan, snapshot: &Snapshot) -> bool {
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
struct PartRun<'r, 'a> {
    plan: &'r ReplyPlan,
    part: &'r PartPlan,
    prepared: &'a PreparedPart,
    snapshot: &'a Snapshot,
    rows: usize,
    moment: ReplyRequest,
}

impl<'a> PartRun<'_, 'a> {
    /// Finds the keys and writes what they have. Returns whether the deadline passed.
    fn run(
        &self,
        keys: &Keys<'_>,
        fill: &mut Fill,
        places: &[usize],
        texts: &mut Vec<Vec<&'a [u8]>>,
        (found, probe): (&mut Vec<Found>, &mut ProbeScratch),
        body: &mut [u8],
    ) -> Result<bool, ReadError> {
        let PartRun {
            plan,
            part,
            prepared,
            snapshot,
            rows,
            moment,
        } = *self;
        let shape = &plan.shape;
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
                let (batch, at) = match level {
                    Level::Segment(segment) => {
                        if let (Some(rows), Some(packed)) = (segment.segment.packed(), &map.packed)
                        {
                            let slot = rows.slot(found.row);
                            if sink.packed(row, rows, slot, packed).is_none() {
                                let damage = segment.segment.packed_damage(found.row);
                                return Err(segment.error(damage));
                            }
                            if packed.unpacked.is_empty() {
                                continue;
                            }
                        }
                        let (batch, at) = segment.segment.batch_of_row(found.row);
                        let batch = segment.segment.batch_ref(batch);
                        (batch.map_err(|damage| segment.error(damage))?, at)
                    }
                    Level::Log(log) => log.row(found.row).ok_or_else(|| ReadError::Log {
                        table: table.to_owned(),
                        log: log.log.incarnation,
                        problem: format!("row {} is not in it", found.row),
                    })?,
                };
                cells.push(Cell {
                    row,
                    batch,
                    at,
                    map: map_number,
                    packed: level.packed().is_some(),
                });
            }
            cells.sort_by_key(|cell| (cell.map, cell.packed));
            for cells in cells.chunk_by(|a, b| (a.map, a.packed) == (b.map, b.packed)) {
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

/// Writes what comes after the values, and the numbers of the header.
struct Writer<'w> {
    template: &'w Template,
    header: &'w mut BytesMut,
    body: &'w mut BytesMut,
    rows: usize,
}

impl Writer<'_> {
    fn append(&mut self, bytes: &[u8]) -> usize {
        let at = aligned(self.body.len(), bytes.len());
        self.body.resize(at, 0);
        self.body.extend_from_slice(bytes);
        at
    }

    /// The node and the validity of a column.
    fn node(&mut self, column: &Column, nulls: usize, validity: &[u8]) {
        let (at, bytes) = if nulls > 0 {
            (self.append(validity), validity.len())
        } else {
            (self.body.len(), 0)
        };
        self.template
            .set_node(self.header, column.node, self.rows, nulls);
        self.template
            .set_buffer(self.header, column.buffer, at, bytes);
    }

    /// A column whose values stand at `at` already.
    fn plain(&mut self, column: &Column, at: usize, nulls: usize, validity: &[u8]) {
        self.node(column, nulls, validity);
        let bytes = column.shape.fixed_bytes(self.rows);
        self.template
            .set_buffer(self.header, column.buffer + 1, at, bytes);
    }

    fn feature(
        &mut self,
        column: &Column,
        at: usize,
        feature: usize,
        fill: &Fill,
        texts: &[Vec<&[u8]>],
    ) -> Option<()> {
        let target = fill.targets.get(feature)?;
        let row_bits = self.rows.div_ceil(8);
        let validity = fill
            .validity
            .get(target.validity_at..target.validity_at + row_bits)?;
        let nulls = *fill.nulls.get(feature)?;
        match column.shape {
            Shape::Fixed { .. } | Shape::Bits => self.plain(column, at, nulls, validity),
            Shape::Text { offset_bytes } => {
                let texts = texts.get(target.text)?;
                self.node(column, nulls, validity);
                let total: usize = texts.iter().map(|text| text.len()).sum();
                if offset_bytes == 4 && i32::try_from(total).is_err() {
                    return None;
                }
                let start = aligned(self.body.len(), total);
                self.body.resize(start, 0);
                self.body.reserve(total);
                let mut end = 0_usize;
                for (row, text) in texts.iter().enumerate() {
                    self.body.extend_from_slice(text);
                    end += text.len();
                    let place = at + (row + 1) * offset_bytes;
                    let bytes = (end as u64).to_le_bytes();
                    self.body[place..place + offset_bytes].copy_from_slice(&bytes[..offset_bytes]);
                }
                self.text_buffers(column, at, start, total);
            }
            Shape::List { items, .. } => {
                self.node(column, nulls, validity);
                let item_nulls = *fill.item_nulls.get(feature)?;
                let item_bits = (self.rows * items).div_ceil(8);
                let validity = fill
                    .validity
                    .get(target.items_at..target.items_at + item_bits)?;
                let (validity_at, validity_bytes) = match item_nulls {
                    0 => (self.body.len(), 0),
                    _ => (self.append(validity), item_bits),
                };
                self.template.set_node(
                    self.header,
                    column.node + 1,
                    self.rows * items,
                    item_nulls,
                );
                self.template.set_buffer(
                    self.header,
                    column.buffer + 1,
                    validity_at,
                    validity_bytes,
                );
                let bytes = column.shape.fixed_bytes(self.rows);
                self.template
                    .set_buffer(self.header, column.buffer + 2, at, bytes);
            }
        }
        Some(())
    }

    fn text_buffers(&mut self, column: &Column, offsets_at: usize, start: usize, bytes: usize) {
        let offsets_bytes = column.shape.fixed_bytes(self.rows);
        self.template
            .set_buffer(self.header, column.buffer + 1, offsets_at, offsets_bytes);
        self.template
            .set_buffer(self.header, column.buffer + 2, start, bytes);
    }

    fn events(&mut self, column: &Column, at: usize, fill: &Fill) {
        for (row, event) in fill.events.iter().enumerate() {
            match column.shape {
                Shape::Fixed { width: 4 } => {
                    let days = (*event).clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
                    self.body[at + row * 4..at + row * 4 + 4].copy_from_slice(&days.to_le_bytes());
                }
                _ => {
                    self.body[at + row * 8..at + row * 8 + 8].copy_from_slice(&event.to_le_bytes());
                }
            }
        }
        self.plain(column, at, fill.event_nulls, &fill.event_validity);
    }

    /// A column of the request, as it came.
    fn request(&mut self, column: &Column, at: usize, array: &ArrayRef) -> Option<()> {
        let nulls = array.null_count();
        let validity = array
            .nulls()
            .filter(|_| nulls > 0)
            .map(|nulls| nulls.inner().sliced());
        let validity = validity.as_ref().map_or(&[][..], |bits| bits.as_slice());
        let validity = validity.get(..self.rows.div_ceil(8)).unwrap_or(validity);
        match (column.shape, array.data_type()) {
            (Shape::Fixed { width }, _) => {
                let data = array.to_data();
                let start = data.offset() * width;
                let bytes = self.rows * width;
                let values = data.buffers().first()?.get(start..start + bytes)?;
                self.body[at..at + bytes].copy_from_slice(values);
                self.plain(column, at, nulls, validity);
            }
            (Shape::Bits, _) => {
                let bits = array.as_boolean().values().sliced();
                let bytes = self.rows.div_ceil(8);
                self.body[at..at + bytes].copy_from_slice(bits.get(..bytes)?);
                self.plain(column, at, nulls, validity);
            }
            (Shape::Text { .. }, DataType::Utf8) => {
                let array = array.as_string::<i32>();
                self.node(column, nulls, validity);
                self.text(column, at, array.value_offsets(), array.value_data())?;
            }
            (Shape::Text { .. }, DataType::LargeUtf8) => {
                let array = array.as_string::<i64>();
                self.node(column, nulls, validity);
                self.text(column, at, array.value_offsets(), array.value_data())?;
            }
            (Shape::Text { .. }, DataType::Binary) => {
                let array = array.as_binary::<i32>();
                self.node(column, nulls, validity);
                self.text(column, at, array.value_offsets(), array.value_data())?;
            }
            (Shape::Text { .. }, DataType::LargeBinary) => {
                let array = array.as_binary::<i64>();
                self.node(column, nulls, validity);
                self.text(column, at, array.value_offsets(), array.value_data())?;
            }
            _ => return None,
        }
        Some(())
    }

    /// Offsets that begin at zero, and the bytes between the first and the last.
    fn text<O: arrow_array::OffsetSizeTrait>(
        &mut self,
        column: &Column,
        at: usize,
        offsets: &[O],
        data: &[u8],
    ) -> Option<()> {
        let first = offsets.first()?.as_usize();
        let last = offsets.last()?.as_usize();
        let width = size_of::<O>();
        for (row, offset) in offsets.iter().enumerate() {
            let bytes = ((offset.as_usize() - first) as u64).to_le_bytes();
            let place = at + row * width;
            self.body
                .get_mut(place..place + width)?
                .copy_from_slice(&bytes[..width]);
        }
        let start = self.append(data.get(first..last)?);
        self.text_buffers(column, at, start, last - first);
        Some(())
    }

    /// Pads the body; returns its length.
    fn finish(self) -> usize {
        let bytes = self.body.len().next_multiple_of(BODY_ALIGNMENT_BYTES);
        self.body.resize(bytes, 0);
        bytes
    }
}
