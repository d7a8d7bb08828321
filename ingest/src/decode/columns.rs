//! Rows in formats that decode to columns: Avro, Protobuf, Arrow.
//!
//! Values are decoded together, schema by schema; what their columns give is brought to the
//! table's types, what stands beside the value (key, headers, place) is added per record, and
//! the rows are put back in the order of their records.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use arrow_array::{ArrayRef, BooleanArray, RecordBatch, UInt64Array};
use arrow_schema::{ArrowError, SchemaRef};
use arrow_select::filter::filter_record_batch;
use arrow_select::take::{take, take_record_batch};
use pinion_feature_store::json::{Json, KeyBuilder, Members, RowBuilder};
use pinion_schemas::{KafkaSource, TableDefinition, ValueFormat};

use super::envelope::{AFTER, BEFORE, Change, OP, change_of, puts};
use super::fit::plain_text;
use super::frame::header;
use super::shape::{Shape, find};
use super::to_json::members;
use super::{
    ArrowFormat, AvroFormat, DecodeProblem, DecodeSettings, Decoded, DecodedKeys, DecoderError,
    Format, Incoming, Item, Language, ProtobufFormat, RecordFrame, Run, RunKind, SourceBatch,
    VALUE_HEADER,
};

/// Reads columns for one table.
#[derive(Debug)]
pub(super) struct ColumnBody {
    format: Format,
    shape: Shape,
    schema: SchemaRef,
    /// Columns that are not read from the value, row by row of the records.
    beside: RowBuilder,
    /// Where those columns are in the schema.
    beside_places: Vec<usize>,
    keys: KeyBuilder,
    is_framed: bool,
    /// The reason of a misfit names the schema, where the schema is not the record's own.
    names_schema: bool,
}

/// Rows of the table, and the record of each.
type Rows = (RecordBatch, Vec<usize>);

/// What is gathered from a micro-batch before it is put in order.
#[derive(Default)]
struct Gathered {
    rows: Vec<Rows>,
    /// Records that delete: the event's rows as JSON, or nothing for a tombstone.
    deletes: BTreeMap<usize, Option<Json<'static>>>,
    refused: Vec<(usize, String)>,
    filtered: u64,
}

impl ColumnBody {
    pub(super) fn new(
        definition: &TableDefinition,
        source: &KafkaSource,
        settings: &DecodeSettings,
    ) -> Result<ColumnBody, DecoderError> {
        let shape = Shape::new(definition, source)?;
        let mut beside = RowBuilder::beside_the_value(definition, &source.fields)?;
        beside.set_key_format(source.key);
        let schema = definition.storage_schema();
        let beside_places = beside
            .schema()
            .fields()
            .iter()
            .filter_map(|field| schema.index_of(field.name()).ok())
            .collect();
        let own = source.schema.as_ref();
        let format = match source.format {
            ValueFormat::Protobuf => Format::Protobuf(ProtobufFormat::new(
                settings.schemas(source, own, &Language::Protobuf)?,
                source.message.clone(),
                wanted(&shape, source),
            )),
            ValueFormat::Avro => Format::Avro(Box::new(AvroFormat::new(
                settings.schemas(source, own, &Language::Avro)?,
                false,
            ))),
            ValueFormat::Arrow | ValueFormat::Json | ValueFormat::JsonSchema => {
                Format::Arrow(Box::new(ArrowFormat::new()))
            }
        };
        Ok(ColumnBody {
            is_framed: own.is_none() && !matches!(format, Format::Arrow(_)),
            names_schema: own.is_none() && !matches!(format, Format::Arrow(_)),
            format,
            shape,
            schema,
            beside,
            beside_places,
            keys: KeyBuilder::new(definition, &source.fields, source.key)?,
        })
    }

    pub(super) fn reads_key(&self) -> bool {
        self.beside.reads_key()
    }

    pub(super) fn decode(
        &mut self,
        frame: &RecordFrame,
        records: &[Incoming<'_>],
        selected: &[usize],
        keys: &DecodedKeys,
    ) -> Result<Decoded, DecodeProblem> {
        let mut gathered = Gathered::default();
        let mut items = Vec::with_capacity(selected.len());
        for &index in selected {
            let Some(record) = records.get(index) else {
                continue;
            };
            let Some(value) = record.value else {
                if frame.takes_tombstones {
                    gathered.deletes.insert(index, None);
                } else {
                    gathered.filtered += 1;
                }
                continue;
            };
            match frame.value(value) {
                Ok(bytes) => items.push(Item {
                    record: index,
                    bytes,
                    frame_header: if self.is_framed {
                        header(&record.headers, VALUE_HEADER)
                    } else {
                        None
                    },
                }),
                Err(reason) => gathered.refused.push((index, reason)),
            }
        }
        let (batches, refused) = self.format.decode(&items)?;
        gathered.refused.extend(refused);
        for source in batches {
            self.take_rows(frame, records, keys, source, &mut gathered)?;
        }
        let deletes = self.take_deletes(frame, records, keys, &mut gathered)?;
        let rows = in_order(&self.schema, gathered.rows)?;
        Ok(Decoded {
            runs: alternate(rows, deletes),
            refused: gathered.refused,
            filtered: gathered.filtered,
        })
    }

    /// Rows of one batch; its deletes are set aside.
    fn take_rows(
        &mut self,
        frame: &RecordFrame,
        records: &[Incoming<'_>],
        keys: &DecodedKeys,
        source: SourceBatch,
        gathered: &mut Gathered,
    ) -> Result<(), ArrowError> {
        let SourceBatch {
            label,
            mut batch,
            records: mut of_row,
            is_bare: _,
        } = source;
        let row = frame.envelope.map(|_| AFTER);
        if row.is_some() {
            let puts = split_changes(&self.shape, &batch, &of_row, gathered)?;
            keep(&mut batch, &mut of_row, &puts)?;
        }
        if let Some(takes) = self.shape.matching(&batch, row)? {
            let before = of_row.len();
            keep(&mut batch, &mut of_row, &takes)?;
            gathered.filtered += (before - of_row.len()) as u64;
        }
        if of_row.is_empty() {
            return Ok(());
        }
        let shaped = self.shape.shape(&batch, row)?;
        let mut refused: BTreeMap<usize, String> = BTreeMap::new();
        for (row, reason) in shaped.refused {
            if let Some(record) = of_row.get(row) {
                refused.entry(*record).or_insert_with(|| {
                    if self.names_schema {
                        format!("{label}: {reason}")
                    } else {
                        reason
                    }
                });
            }
        }
        let beside = self.take_beside(frame, records, keys, (&batch, &of_row), &mut refused)?;
        let mut columns: Vec<Option<ArrayRef>> = vec![None; self.schema.fields().len()];
        for (place, column) in shaped.columns.into_iter().chain(beside) {
            if let Some(slot) = columns.get_mut(place) {
                *slot = Some(column);
            }
        }
        let columns: Vec<ArrayRef> = columns.into_iter().flatten().collect();
        if refused.is_empty() {
            let rows = RecordBatch::try_new(SchemaRef::clone(&self.schema), columns)?;
            gathered.rows.push((rows, of_row));
            return Ok(());
        }
        // Refused rows may hold nulls where the schema has none: they go before it is applied.
        let takes: BooleanArray = of_row
            .iter()
            .map(|record| Some(!refused.contains_key(record)))
            .collect();
        let columns = columns
            .iter()
            .map(|column| arrow_select::filter::filter(column, &takes))
            .collect::<Result<Vec<_>, _>>()?;
        of_row.retain(|record| !refused.contains_key(record));
        gathered.refused.extend(refused);
        let rows = RecordBatch::try_new(SchemaRef::clone(&self.schema), columns)?;
        gathered.rows.push((rows, of_row));
        Ok(())
    }

    /// The columns beside the value, one value per row; those of refused records mean nothing.
    fn take_beside(
        &mut self,
        frame: &RecordFrame,
        records: &[Incoming<'_>],
        keys: &DecodedKeys,
        (batch, of_row): (&RecordBatch, &[usize]),
        refused: &mut BTreeMap<usize, String>,
    ) -> Result<Vec<(usize, ArrayRef)>, ArrowError> {
        if self.beside_places.is_empty() {
            return Ok(Vec::new());
        }
        debug_assert_eq!(batch.num_rows(), of_row.len());
        let nothing = Json::Object(Members::default());
        // Row of `beside` for each row of the batch.
        let mut places: Vec<Option<u64>> = Vec::with_capacity(of_row.len());
        let mut last: Option<(usize, Option<u64>)> = None;
        for &index in of_row {
            if let Some((record, place)) = last
                && record == index
            {
                places.push(place);
                continue;
            }
            let place = match refused.entry(index) {
                Entry::Occupied(_) => None,
                Entry::Vacant(free) => {
                    let appended = match records.get(index) {
                        None => Err("the record is gone".to_owned()),
                        Some(record) => keys.of(index).and_then(|key| {
                            self.beside
                                .append(&nothing, &record.meta(&frame.topic, key))
                                .map_err(|e| e.to_string())
                        }),
                    };
                    match appended {
                        Ok(()) => Some(self.beside.rows() as u64 - 1),
                        Err(reason) => {
                            free.insert(reason);
                            None
                        }
                    }
                }
            };
            places.push(place);
            last = Some((index, place));
        }
        let beside = self.beside.finish()?;
        let is_row_by_row = beside.num_rows() == of_row.len();
        let places = UInt64Array::from(places);
        self.beside_places
            .iter()
            .zip(beside.columns())
            .map(|(place, column)| {
                let column = if is_row_by_row {
                    ArrayRef::clone(column)
                } else {
                    take(column, &places, None)?
                };
                Ok((*place, column))
            })
            .collect()
    }

    /// The deletes, in the order of their records.
    fn take_deletes(
        &mut self,
        frame: &RecordFrame,
        records: &[Incoming<'_>],
        keys: &DecodedKeys,
        gathered: &mut Gathered,
    ) -> Result<Option<Rows>, ArrowError> {
        let mut of_row = Vec::new();
        for (index, event) in std::mem::take(&mut gathered.deletes) {
            let Some(record) = records.get(index) else {
                continue;
            };
            let appended = keys.of(index).and_then(|key| {
                let mut meta = record.meta(&frame.topic, key);
                let image = match &event {
                    None => None,
                    Some(event) => match change_of(event)? {
                        Change::Delete { before, changed_at } => {
                            meta.envelope = Some(event);
                            Some((before, changed_at))
                        }
                        Change::Upsert(_) | Change::Nothing => {
                            return Err("field op: the event is no delete".to_owned());
                        }
                    },
                };
                self.keys
                    .append_image(&meta, image)
                    .map_err(|e| e.to_string())
            });
            match appended {
                Ok(()) => of_row.push(index),
                Err(reason) => gathered.refused.push((index, reason)),
            }
        }
        if of_row.is_empty() {
            return Ok(None);
        }
        Ok(Some((self.keys.finish()?, of_row)))
    }
}

/// Paths of a Protobuf message that are read; `None` for all.
fn wanted(shape: &Shape, source: &KafkaSource) -> Option<Vec<Vec<String>>> {
    if shape.wants_all_fields() {
        return None;
    }
    if source.envelope.is_none() {
        return Some(shape.paths(None));
    }
    let mut paths = shape.paths(Some(AFTER));
    paths.extend(shape.paths(Some(BEFORE)));
    for path in [&[OP][..], &["ts_ms"], &["source", "ts_ms"]] {
        paths.push(path.iter().map(|&step| step.to_owned()).collect());
    }
    Some(paths)
}

/// Which rows of change events put a row. Deletes are set aside, all else is refused.
fn split_changes(
    shape: &Shape,
    batch: &RecordBatch,
    of_row: &[usize],
    gathered: &mut Gathered,
) -> Result<BooleanArray, ArrowError> {
    let of_table = shape.matching(batch, Some(BEFORE))?;
    let ops = find(batch, None, &[OP.to_owned()]).ok().flatten();
    let schema = batch.schema();
    let mut takes = Vec::with_capacity(of_row.len());
    for (row, &record) in of_row.iter().enumerate() {
        let op = ops
            .as_ref()
            .and_then(|(_, ops)| plain_text(ops.as_ref(), row));
        if op.as_deref().is_some_and(puts) {
            takes.push(true);
            continue;
        }
        takes.push(false);
        let event = Json::from(members(schema.fields(), batch.columns(), row));
        match change_of(&event) {
            // Another table's row is not deleted here.
            Ok(Change::Delete { .. })
                if event.get(BEFORE).is_some_and(|before| !before.is_null())
                    && of_table.as_ref().is_some_and(|of| !of.value(row)) =>
            {
                gathered.filtered += 1;
            }
            Ok(Change::Delete { .. }) => {
                gathered.deletes.insert(record, Some(event));
            }
            Ok(Change::Upsert(_) | Change::Nothing) => gathered.filtered += 1,
            Err(reason) => gathered.refused.push((record, reason)),
        }
    }
    Ok(BooleanArray::from(takes))
}

fn keep(
    batch: &mut RecordBatch,
    of_row: &mut Vec<usize>,
    takes: &BooleanArray,
) -> Result<(), ArrowError> {
    if takes.true_count() == takes.len() {
        return Ok(());
    }
    *batch = filter_record_batch(batch, takes)?;
    let mut rows = takes.iter();
    of_row.retain(|_| rows.next().flatten().unwrap_or(false));
    Ok(())
}

/// All rows as one batch, in the order of their records; rows of a record keep theirs.
fn in_order(schema: &SchemaRef, mut parts: Vec<Rows>) -> Result<Option<Rows>, ArrowError> {
    parts.retain(|(_, of_row)| !of_row.is_empty());
    if parts.len() <= 1 {
        return Ok(parts.pop());
    }
    let batches: Vec<&RecordBatch> = parts.iter().map(|(batch, _)| batch).collect();
    let joined = arrow_select::concat::concat_batches(schema, batches)?;
    let of_row: Vec<usize> = parts
        .iter()
        .flat_map(|(_, of_row)| of_row)
        .copied()
        .collect();
    if of_row.is_sorted() {
        return Ok(Some((joined, of_row)));
    }
    let mut order: Vec<(usize, u64)> = of_row.into_iter().zip(0..).collect();
    // Stable by its second half.
    order.sort_unstable();
    let places = UInt64Array::from_iter_values(order.iter().map(|(_, place)| *place));
    let of_row = order.into_iter().map(|(record, _)| record).collect();
    Ok(Some((take_record_batch(&joined, &places)?, of_row)))
}

/// Rows and deletes as runs, in the order of their records. Nothing is copied.
fn alternate(rows: Option<Rows>, deletes: Option<Rows>) -> Vec<Run> {
    let whole = |kind, (batch, records): Rows| Run {
        kind,
        batch,
        records,
    };
    let (rows, deletes) = match (rows, deletes) {
        (None, None) => return Vec::new(),
        (Some(rows), None) => return vec![whole(RunKind::Upsert, rows)],
        (None, Some(deletes)) => return vec![whole(RunKind::Delete, deletes)],
        (Some(rows), Some(deletes)) => (rows, deletes),
    };
    let sides = [(RunKind::Upsert, rows), (RunKind::Delete, deletes)];
    let mut at = [0_usize, 0];
    let mut runs = Vec::new();
    loop {
        let next = |side: usize| sides[side].1.1.get(at[side]).copied();
        let side = match (next(0), next(1)) {
            (None, None) => return runs,
            (Some(_), None) => 0,
            (None, Some(_)) => 1,
            (Some(row), Some(delete)) => usize::from(delete < row),
        };
        let until = next(1 - side).unwrap_or(usize::MAX);
        let (kind, (batch, records)) = &sides[side];
        let rest = records.get(at[side]..).unwrap_or_default();
        let count = rest.partition_point(|record| *record < until);
        debug_assert!(count > 0);
        runs.push(Run {
            kind: *kind,
            batch: batch.slice(at[side], count),
            records: rest.get(..count).unwrap_or_default().to_vec(),
        });
        at[side] += count;
    }
}
