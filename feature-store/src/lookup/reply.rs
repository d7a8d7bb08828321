//! A stream's lookups: one request of keys in, one encoded record batch out.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use arrow_array::RecordBatch;
use arrow_schema::{DataType, SchemaRef};
use bytes::{Bytes, BytesMut};

use super::ValueStatus;
use super::prepare::PreparedPart;
use super::probe::{Found, Keys, ProbeScratch};
use super::run::{Encoding, Fill, PartRun};
use super::template::{Shape, Template};
use super::writer::{Writer, aligned};
use crate::error::ReadError;
use crate::level::Level;
use crate::snapshot::Snapshot;

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
    /// A reply whose body would be larger is refused before it is made.
    pub max_body_bytes: usize,
}

/// An encoded reply: a record batch message of the Arrow IPC format.
#[derive(Debug, Clone)]
pub struct ReplyMessage {
    /// The flatbuffer, without the framing of 8 bytes that streams put before it; with that
    /// its length is a multiple of 64.
    pub header: Bytes,
    /// The buffers. Those of 64 bytes or more start on multiples of 64, of 32 or more on
    /// multiples of 32, others of 16.
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
pub(super) struct Column {
    role: Role,
    pub(super) shape: Shape,
    /// Of its first array in the message.
    pub(super) node: usize,
    /// Of its first buffer in the message.
    pub(super) buffer: usize,
}

/// What one table's features are in the reply.
#[derive(Debug)]
pub(super) struct PartPlan {
    pub(super) keys: Vec<usize>,
    features: Vec<String>,
    types: Vec<DataType>,
    pub(super) shapes: Vec<Shape>,
    /// Column of the reply of each feature, and of its status.
    pub(super) columns: Vec<(usize, Option<usize>)>,
}

impl PartPlan {
    /// `None` if a feature is not in the reply.
    fn new(
        number: usize,
        part: &ReplyPart,
        columns: &[Column],
        reply: &SchemaRef,
    ) -> Option<PartPlan> {
        let mut values = vec![None; part.features.len()];
        let mut statuses = vec![None; part.features.len()];
        for (at, column) in columns.iter().enumerate() {
            match column.role {
                Role::Feature { part, feature } if part == number => {
                    *values.get_mut(feature)? = Some((at, column.shape));
                }
                Role::Status { part, feature } if part == number => {
                    *statuses.get_mut(feature)? = Some(at);
                }
                _ => {}
            }
        }
        let mut plan = PartPlan {
            keys: part.keys.clone(),
            features: part.features.clone(),
            types: Vec::with_capacity(values.len()),
            shapes: Vec::with_capacity(values.len()),
            columns: Vec::with_capacity(values.len()),
        };
        for (value, status) in values.into_iter().zip(statuses) {
            let (at, shape) = value?;
            plan.types.push(reply.field(at).data_type().clone());
            plan.shapes.push(shape);
            plan.columns.push((at, status));
        }
        Some(plan)
    }
}

/// A stream's lookups, prepared: see the module above.
///
/// It answers exactly as [`Snapshot::lookup`] does, in the order asked, duplicates included.
#[derive(Debug)]
pub struct ReplyPlan {
    /// Tells plans apart, so that what a scratch has prepared for one is not used for another.
    number: u64,
    shape: ReplyShape,
    parts: Vec<PartPlan>,
    columns: Vec<Column>,
    template: Template,
}

/// The room that replies are made in, kept from one to the next. Best used for one plan; with
/// another one it prepares anew.
#[derive(Default)]
pub struct ReplyScratch {
    /// Number of the plan it is prepared for; 0 for none.
    plan: u64,
    prepared: Vec<PreparedPart>,
    room: Room,
}

/// The part of a scratch that grows with the replies, and is of no plan.
#[derive(Default)]
struct Room {
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

impl ReplyScratch {
    /// Trades the memory that replies are made in for that of `other`; what is prepared for a
    /// plan stays. So many plans that are asked in turns share the memory of one.
    pub fn swap_room(&mut self, other: &mut ReplyScratch) {
        std::mem::swap(&mut self.room, &mut other.room);
    }
}

impl ReplyPlan {
    /// Prepares a stream. `None` if a column of the reply has a type that is left to the IPC
    /// writer: nested ones but fixed-size lists of primitives, views, dictionaries. (A feature
    /// that is a dictionary has a plan where the reply says the type of its values.)
    pub fn new(shape: ReplyShape, snapshots: &[Snapshot]) -> Option<ReplyPlan> {
        let given = shape.request.fields().len();
        let mut keys = shape.parts.iter().flat_map(|part| &part.keys);
        if snapshots.len() != shape.parts.len() || keys.any(|key| *key >= given) {
            return None;
        }
        let mut roles: Vec<Role> = (0..given).map(Role::Request).collect();
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
        let parts = (0..)
            .zip(&shape.parts)
            .map(|(number, part)| PartPlan::new(number, part, &columns, &shape.reply))
            .collect::<Option<Vec<_>>>()?;
        let shapes: Vec<Shape> = columns.iter().map(|column| column.shape).collect();
        static PLANS: AtomicU64 = AtomicU64::new(1);
        Some(ReplyPlan {
            number: PLANS.fetch_add(1, Ordering::Relaxed),
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
        if scratch.plan != self.number {
            scratch.plan = self.number;
            scratch.prepared.clear();
        }
        let ReplyScratch {
            plan: _,
            prepared,
            room,
        } = scratch;
        let Room {
            fills,
            places,
            found,
            probe,
            header,
            body,
        } = room;
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
        let check_bytes = |bytes: usize| match bytes > moment.max_body_bytes {
            true => Err(ReadError::ReplyTooLarge {
                rows,
                bytes,
                limit_bytes: moment.max_body_bytes,
            }),
            false => Ok(()),
        };
        check_bytes(end)?;
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
                shape: &self.shape,
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

        // Nothing was copied of the texts yet.
        let text_bytes = texts
            .iter()
            .flatten()
            .flatten()
            .fold(0_usize, |sum, text| sum.saturating_add(text.len()));
        check_bytes(end.saturating_add(text_bytes))?;
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
                Role::Event { part } => fills.get(part).map(|fill| writer.events(column, at, fill)),
            };
            // A text column of more than 2 GiB: the other path says what is too large.
            if done.is_none() {
                return Ok(None);
            }
        }
        let body_bytes = writer.finish();
        self.template.set_message(header, rows, body_bytes);
        let reply = ReplyMessage {
            header: header.split().freeze(),
            body: body.split().freeze(),
            partial,
        };
        // What is left of a large allocation would keep all of it.
        if reply.body.len() > KEPT_BODY_BYTES {
            *body = BytesMut::new();
        }
        Ok(Some(reply))
    }

    /// What the body of a reply to so many keys takes at least, before texts and validity: so
    /// that a reply over a limit can be refused before it is made.
    pub fn least_body_bytes(&self, rows: usize) -> usize {
        self.columns
            .iter()
            .map(|column| column.shape.fixed_bytes(rows))
            .fold(0, usize::saturating_add)
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
