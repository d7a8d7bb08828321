//! Lookups: the latest value of some features for some keys, with a status per value.
//!
//! There are two ways to an answer, and they agree on every value:
//!
//! - [`Snapshot::lookup`] asks key by key and gathers column by column, whatever the types. It
//!   is this file, and the rules are read here.
//! - [`ReplyPlan`] answers a stream of requests of one shape: names are resolved once, keys are
//!   probed together (`probe`), rows are read from packed slots or columns straight into the
//!   body of the reply (`run`, `gather`, by the plans of `prepare`), and the message before the
//!   body is a template (`template`, `writer`). It knows the flat types; `reply` puts it together.

mod gather;
mod prepare;
mod probe;
mod reply;
mod run;
mod size;
mod template;
mod writer;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use arrow_array::{Array, ArrayRef, BooleanArray, Scalar, UInt8Array, UInt64Array, new_null_array};
use arrow_schema::{ArrowError, DataType, FieldRef};
use arrow_select::interleave::interleave;
use arrow_select::zip::zip;

use pinion_schemas::EncodedKeys;

use crate::compat::{ColumnFrom, Version, default_value};
use crate::delta::Found;
use crate::error::ReadError;
use crate::level::Level;
use crate::order;
use crate::snapshot::{Snapshot, SnapshotInner};

use self::probe::Window;
pub(crate) use self::probe::rows_in;
pub use self::reply::{ReplyMessage, ReplyPart, ReplyPlan, ReplyRequest, ReplyScratch, ReplyShape};

/// What became of one value. The same numbers in every protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ValueStatus {
    /// The row exists and the value is not null.
    Present = 1,
    /// The row exists and the value is null.
    NullValue = 2,
    /// No row, or a delete.
    NotFound = 3,
    /// The row is older than the table's ttl; the value is blanked unless asked to be kept.
    OutsideMaxAge = 4,
    /// The deadline passed before the key was looked for.
    NotRead = 5,
}

/// Keys between two looks at the clock.
const DEADLINE_STEP: usize = 256;

/// Which values to look up.
#[derive(Debug, Clone)]
pub struct LookupRequest {
    /// Key columns in the order of the definition's `entity`, of equal length. Types that
    /// widen to the key's are cast.
    pub keys: Vec<ArrayRef>,
    /// Feature names; may repeat.
    pub features: Vec<String>,
    /// The moment to answer for, in nanoseconds since the Unix epoch; later rows are
    /// invisible. Ignored by tables without event time.
    pub as_of_nanos: Option<i64>,
    /// The clock that ttl is judged by when there is no `as_of_nanos`; default: now.
    pub now_nanos: Option<i64>,
    /// Return values outside their max age instead of blanking them.
    pub keep_expired: bool,
    /// Return a feature's default, if it has one, where the value would be null. The status
    /// stays.
    pub defaults: bool,
    /// Say what became of each value; by default so.
    pub status: bool,
    /// Keys not looked for by then are answered [`ValueStatus::NotRead`].
    pub deadline: Option<Instant>,
    /// Most bytes of values to return. What a dictionary encodes counts an eighth: the reply
    /// holds each of its values once.
    pub max_bytes: Option<usize>,
}

impl Default for LookupRequest {
    fn default() -> LookupRequest {
        LookupRequest {
            keys: Vec::new(),
            features: Vec::new(),
            as_of_nanos: None,
            now_nanos: None,
            keep_expired: false,
            defaults: false,
            status: true,
            deadline: None,
            max_bytes: None,
        }
    }
}

/// One row per key asked, one column per feature asked, both in the order asked.
#[derive(Debug, Clone)]
pub struct LookupResult {
    /// The values, in the types of the definition.
    pub columns: Vec<ArrayRef>,
    /// Field of each column, nullable.
    pub fields: Vec<FieldRef>,
    /// A [`ValueStatus`] per value; none at all unless asked for.
    pub status: Vec<UInt8Array>,
    /// Event time of each row, null where none was found; `None` for tables without event
    /// time.
    pub event_time: Option<ArrayRef>,
    /// True when the deadline passed before all keys were looked for.
    pub partial: bool,
}

/// Where the row for one key was found.
struct Hit<'a> {
    level: &'a Level,
    /// Of the level, newest first.
    number: usize,
    found: Found,
}

/// What became of one key.
enum Answer<'a> {
    Row(Hit<'a>),
    Missing,
    NotRead,
}

impl<'a> Answer<'a> {
    fn row(&self) -> Option<&Hit<'a>> {
        match self {
            Answer::Row(hit) => Some(hit),
            Answer::Missing | Answer::NotRead => None,
        }
    }
}

impl Snapshot {
    /// Looks up `request.features` for every key.
    ///
    /// One index probe per key and level, newest first; copies only the values returned.
    ///
    /// # Errors
    ///
    /// `UnknownFeature` and `Keys` before anything is read. `Segment` or `Log` if stored
    /// data is damaged, `ReplyTooLarge` before more than `max_bytes` are copied, `DictionaryFull`
    /// if the indices of a dictionary cannot name the values of so many keys: nothing is
    /// returned, and the snapshot stays usable.
    pub fn lookup(&self, request: &LookupRequest) -> Result<LookupResult, ReadError> {
        let inner = self.0.as_ref();
        let version = &inner.version;
        let features = request
            .features
            .iter()
            .map(|name| self.feature_column(name))
            .collect::<Result<Vec<_>, _>>()?;
        let keys = self.key_columns(&request.keys)?;
        let encoded = self.encode_keys(&keys)?;
        let rows = keys.first().map_or(0, |k| k.len());

        let window = self.window(request.as_of_nanos);
        let expired_before = self.expired_before(request.as_of_nanos, request.now_nanos);

        for level in inner.newest_first() {
            if let Level::Log(log) = level {
                log.prepare(rows)?;
            }
        }
        let mut answers: Vec<Answer<'_>> = Vec::with_capacity(rows);
        let mut late = false;
        for i in 0..rows {
            if i % DEADLINE_STEP == 0 {
                late = late || is_past(request.deadline);
            }
            if late {
                answers.push(Answer::NotRead);
                continue;
            }
            let key = encoded.get(i);
            let hash = pinion_schemas::key_hash(key);
            let hit = inner.winner(key, hash, window.until, version.latest())?;
            answers.push(match hit {
                Some(hit) if !hit.found.deleted && window.holds(hit.found.order.event) => {
                    Answer::Row(hit)
                }
                _ => Answer::Missing,
            });
        }
        self.answer(&features, &answers, expired_before, request)
    }

    /// The versions that may answer a lookup as of a moment, or now.
    fn window(&self, as_of_nanos: Option<i64>) -> Window {
        let version = &self.0.version;
        Window {
            from: version.cut(self.0.max_event),
            until: match (as_of_nanos, version.event_type()) {
                (Some(nanos), Some(data_type)) => {
                    order::ticks_at_or_before(data_type, i128::from(nanos))
                }
                _ => i64::MAX,
            },
            wants_event: true,
        }
    }

    fn feature_column(&self, name: &str) -> Result<usize, ReadError> {
        let version = &self.0.version;
        version
            .definition
            .column_index(name)
            .filter(|&i| version.feature_at(i).is_some())
            .ok_or_else(|| {
                self.unknown_feature(
                    name,
                    version.definition.features.iter().map(|f| f.name.as_str()),
                )
            })
    }

    pub(crate) fn unknown_feature<'a>(
        &self,
        name: &str,
        known: impl Iterator<Item = &'a str>,
    ) -> ReadError {
        ReadError::UnknownFeature {
            table: self.table().to_owned(),
            feature: name.to_owned(),
            hint: pinion_schemas::nearest(name, known).map(str::to_owned),
        }
    }

    /// Key columns as the table stores them.
    fn key_columns(&self, given: &[ArrayRef]) -> Result<Vec<ArrayRef>, ReadError> {
        let version = &self.0.version;
        let problem = |problem: String| ReadError::Keys {
            table: self.table().to_owned(),
            problem,
        };
        let fields = &version.storage_schema.fields()[..version.key_columns];
        if given.len() != fields.len() {
            return Err(problem(format!(
                "{} key columns were given, its entity has {}",
                given.len(),
                fields.len()
            )));
        }
        let rows = given.first().map_or(0, |k| k.len());
        let mut columns = Vec::with_capacity(fields.len());
        for (column, field) in given.iter().zip(fields) {
            if column.len() != rows {
                return Err(problem("the key columns differ in length".to_owned()));
            }
            if let Some(row) = (0..column.len()).find(|&r| column.is_null(r)) {
                return Err(problem(format!(
                    "key column {:?} is null at row {row}",
                    field.name()
                )));
            }
            columns.push(cast_key(column, field.data_type()).map_err(|e| {
                problem(format!(
                    "key column {:?} is {}, its entity says {}: {e}",
                    field.name(),
                    column.data_type(),
                    field.data_type()
                ))
            })?);
        }
        Ok(columns)
    }

    fn encode_keys(&self, columns: &[ArrayRef]) -> Result<EncodedKeys, ReadError> {
        let encoder = &self.0.version.key_encoder;
        encoder.encode(columns).map_err(|e| ReadError::Keys {
            table: self.table().to_owned(),
            problem: e.to_string(),
        })
    }

    /// Rows with event times below this are outside their max age.
    fn expired_before(&self, as_of_nanos: Option<i64>, now_nanos: Option<i64>) -> i64 {
        let version = &self.0.version;
        match (&version.definition.ttl, version.event_type()) {
            (Some(ttl), Some(data_type)) => {
                let judged_at = as_of_nanos.or(now_nanos).unwrap_or_else(order::now_nanos);
                order::ticks_at_or_after(data_type, i128::from(judged_at) - i128::from(ttl.nanos()))
            }
            _ => i64::MIN,
        }
    }

    fn answer(
        &self,
        features: &[usize],
        answers: &[Answer<'_>],
        expired_before: i64,
        request: &LookupRequest,
    ) -> Result<LookupResult, ReadError> {
        let version = &self.0.version;
        let compute = |e: ArrowError| ReadError::Compute {
            table: self.table().to_owned(),
            problem: e.to_string(),
        };
        let sources = Sources::new(answers)?;
        let expired: Vec<bool> = answers
            .iter()
            .map(|a| {
                a.row()
                    .is_some_and(|h| h.found.order.event < expired_before)
            })
            .collect();
        let blank = (!request.keep_expired && expired.contains(&true))
            .then(|| BooleanArray::from(expired.clone()));

        let mut result = LookupResult {
            columns: Vec::new(),
            fields: Vec::new(),
            status: Vec::new(),
            event_time: None,
            partial: answers.iter().any(|a| matches!(a, Answer::NotRead)),
        };
        let mut bytes = 0_usize;
        for &column in features {
            if let Some(limit_bytes) = request.max_bytes {
                let values = sources.bytes(version, column).map_err(compute)?;
                let encoded = matches!(
                    version.schema.field(column).data_type(),
                    DataType::Dictionary(..)
                );
                bytes = bytes.saturating_add(if encoded { values / 8 } else { values });
                if bytes > limit_bytes {
                    return Err(ReadError::ReplyTooLarge {
                        rows: answers.len(),
                        bytes,
                        limit_bytes,
                    });
                }
            }
            let stored = sources.column(version, column).map_err(compute)?;
            if request.status {
                let status = (0..answers.len()).map(|i| {
                    let status = match (&answers[i], expired[i]) {
                        (Answer::Missing, _) => ValueStatus::NotFound,
                        (Answer::NotRead, _) => ValueStatus::NotRead,
                        (Answer::Row(_), true) => ValueStatus::OutsideMaxAge,
                        (Answer::Row(_), false) if stored.is_null(i) => ValueStatus::NullValue,
                        (Answer::Row(_), false) => ValueStatus::Present,
                    };
                    status as u8
                });
                result.status.push(UInt8Array::from_iter_values(status));
            }
            let mut kept = match &blank {
                Some(mask) => arrow_select::nullif::nullif(&stored, mask).map_err(compute)?,
                None => stored,
            };
            if request.defaults && kept.null_count() > 0 {
                kept = self.with_default(column, &kept).map_err(compute)?;
            }
            let field = version.schema.field(column);
            let column = to_user_type(&kept, field.data_type()).map_err(|error| match error {
                ArrowError::DictionaryKeyOverflowError => ReadError::DictionaryFull {
                    table: self.table().to_owned(),
                    feature: field.name().clone(),
                    data_type: pinion_schemas::format_type(field.data_type()),
                    rows: answers.len(),
                },
                error => compute(error),
            })?;
            result.columns.push(column);
            result
                .fields
                .push(Arc::new(field.clone().with_nullable(true)));
        }
        if let Some(data_type) = version.event_type() {
            let events = answers.iter().map(|a| a.row().map(|h| h.found.order.event));
            result.event_time = Some(order::time_array(data_type, events).map_err(compute)?);
        }
        Ok(result)
    }
}

impl Snapshot {
    /// The feature's default where its values are null.
    fn with_default(&self, column: usize, values: &ArrayRef) -> Result<ArrayRef, ArrowError> {
        let version = &self.0.version;
        let Some(feature) = version.feature_at(column).filter(|f| f.default.is_some()) else {
            return Ok(Arc::clone(values));
        };
        let one = default_value(feature, values.data_type())?;
        let valid: BooleanArray = (0..values.len())
            .map(|i| Some(values.is_valid(i)))
            .collect();
        zip(&valid, values, &Scalar::new(one))
    }
}

/// True once a deadline has passed.
fn is_past(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

impl SnapshotInner {
    /// The version of a key, given with its hash, that decides, among those with an event time
    /// of at most `until` (in latest tables: among all).
    fn winner(
        &self,
        key: &[u8],
        hash: u64,
        until: i64,
        latest: bool,
    ) -> Result<Option<Hit<'_>>, ReadError> {
        let mut best: Option<Hit<'_>> = None;
        for (number, level) in self.newest_first().enumerate() {
            // A strictly greater version elsewhere cannot exist once every time here is
            // below the best one found.
            if best
                .as_ref()
                .is_some_and(|b| b.found.order.event > level.max_event())
            {
                continue;
            }
            if let Some(found) = level.find(key, hash, until, latest)?
                && best.as_ref().is_none_or(|b| b.found.order < found.order)
            {
                best = Some(Hit {
                    level,
                    number,
                    found,
                });
                if latest {
                    break;
                }
            }
        }
        Ok(best)
    }

    /// The winner of a key in a latest table, as a load asks: level and version.
    pub(crate) fn latest_winner(
        &self,
        key: &[u8],
        hash: u64,
    ) -> Result<Option<(&Level, Found)>, ReadError> {
        Ok(self
            .winner(key, hash, i64::MAX, true)?
            .map(|hit| (hit.level, hit.found)))
    }
}

/// The batches that hits lie in, each once, and where each hit is.
struct Sources<'a> {
    /// Level and batch; the row numbers asked of it.
    parts: Vec<(&'a Level, arrow_array::RecordBatch, Vec<u64>)>,
    /// (part + 1, place among the rows asked of it); (0, 0) for a miss.
    places: Vec<(usize, usize)>,
}

impl<'a> Sources<'a> {
    fn new(answers: &[Answer<'a>]) -> Result<Sources<'a>, ReadError> {
        let mut numbers: HashMap<(usize, usize), usize> = HashMap::new();
        let mut sources = Sources {
            parts: Vec::new(),
            places: Vec::with_capacity(answers.len()),
        };
        for answer in answers {
            let Some(hit) = answer.row() else {
                sources.places.push((0, 0));
                continue;
            };
            let (batch, at) = hit.level.batch_of(hit.found.row)?;
            // One batch is one set of column buffers: its first column's address names it.
            let address = std::ptr::from_ref(hit.level) as usize;
            let buffer = batch
                .columns()
                .first()
                .map_or(0, |c| Arc::as_ptr(c).cast::<u8>() as usize);
            let number = *numbers.entry((address, buffer)).or_insert_with(|| {
                sources.parts.push((hit.level, batch, Vec::new()));
                sources.parts.len() - 1
            });
            let rows = &mut sources.parts[number].2;
            rows.push(at as u64);
            sources.places.push((number + 1, rows.len() - 1));
        }
        Ok(sources)
    }

    /// Bytes of the values of one column, as they are stored.
    fn bytes(&self, version: &Version, column: usize) -> Result<usize, ArrowError> {
        let mut bytes = 0_usize;
        for (level, batch, rows) in &self.parts {
            let from = version.column_from(level.version(), column)?;
            for &row in rows {
                let value = match &from {
                    ColumnFrom::Same(at) | ColumnFrom::Cast(at, _) => {
                        size::value_bytes(batch.column(*at), row as usize)
                    }
                    ColumnFrom::Absent(one) => size::value_bytes(one, 0),
                };
                bytes = bytes.saturating_add(value);
            }
        }
        Ok(bytes)
    }

    /// One column of the current version for every hit; null for misses.
    fn column(&self, version: &Version, column: usize) -> Result<ArrayRef, ArrowError> {
        let data_type = version.storage_schema.field(column).data_type();
        let mut parts: Vec<ArrayRef> = vec![new_null_array(data_type, 1)];
        for (level, batch, rows) in &self.parts {
            let from = version.column_from(level.version(), column)?;
            parts.push(from.read_rows(batch, &UInt64Array::from(rows.clone()))?);
        }
        if parts.len() == 1 {
            return Ok(new_null_array(data_type, self.places.len()));
        }
        let references: Vec<&dyn Array> = parts.iter().map(AsRef::as_ref).collect();
        interleave(&references, &self.places)
    }
}

/// A stored column as users see it: dictionaries are encoded at this edge.
pub(crate) fn to_user_type(
    stored: &ArrayRef,
    data_type: &DataType,
) -> Result<ArrayRef, ArrowError> {
    if stored.data_type() == data_type {
        Ok(Arc::clone(stored))
    } else {
        arrow_cast::cast(stored, data_type)
    }
}

/// A key column as the table stores it. Values that do not fit are refused, never wrapped
/// or rounded.
///
/// # Errors
///
/// A type from which no cast is lossless, or a value that does not fit.
pub fn cast_key(column: &ArrayRef, to: &DataType) -> Result<ArrayRef, ArrowError> {
    if column.data_type() == to {
        return Ok(Arc::clone(column));
    }
    let from = column.data_type();
    let plain = |t: &DataType| match t {
        DataType::Dictionary(_, value) => value.as_ref().clone(),
        other => other.clone(),
    };
    let kind = |t: &DataType| match plain(t) {
        t if t.is_integer() => 1,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => 2,
        DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView
        | DataType::FixedSizeBinary(_) => 3,
        DataType::Timestamp(..) => 4,
        DataType::Decimal128(..) | DataType::Decimal256(..) => 5,
        DataType::Date32 | DataType::Date64 => 6,
        DataType::Time32(_) | DataType::Time64(_) => 7,
        _ => 0,
    };
    if kind(from) == 0 || kind(from) != kind(to) {
        return Err(ArrowError::CastError("no lossless cast".to_owned()));
    }
    let options = arrow_cast::CastOptions {
        safe: false,
        ..Default::default()
    };
    let cast = arrow_cast::cast_with_options(column, to, &options)?;
    // Coarser times and scales round: they must come back as they were.
    if matches!(kind(to), 4..=7) {
        let back = arrow_cast::cast_with_options(&cast, from, &options)?;
        if back.to_data() != column.to_data() {
            return Err(ArrowError::CastError(
                "the values would be rounded".to_owned(),
            ));
        }
    }
    Ok(cast)
}
