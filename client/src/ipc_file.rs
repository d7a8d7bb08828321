//! Arrow IPC files in memory: their record batches, each decoded where it lies when it is asked
//! for.
//!
//! Everything that a file says of itself is compared with its length before it is followed.
//!
//! Elsewhere: messages (`decode`), what their headers must look like (`layout`).

use std::sync::Arc;

use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_buffer::Buffer;
use arrow_ipc::{Block, Footer};
use arrow_schema::SchemaRef;

use crate::decode::{self, StreamDecoder};
use crate::error::{ClientError, Result};

/// Begins and ends a file.
const MAGIC: &[u8] = b"ARROW1";
/// Bytes behind the footer: its length, and the magic.
const TAIL_BYTES: usize = 4 + MAGIC.len();

/// See the module.
#[derive(Debug)]
pub(crate) struct IpcFile {
    bytes: Buffer,
    decoder: StreamDecoder,
    batches: Vec<Place>,
    /// The file's number of each column of `schema`.
    columns: Vec<usize>,
    schema: SchemaRef,
}

/// Where a record batch lies.
#[derive(Debug)]
struct Place {
    start: usize,
    header_bytes: usize,
    body_bytes: usize,
}

impl IpcFile {
    /// A file of which the columns of `schema` are read, found by name. Reads the footer.
    ///
    /// # Errors
    ///
    /// `Reply` for bytes that are no such file, and columns that it does not have.
    pub(crate) fn open(bytes: Buffer, schema: SchemaRef) -> Result<IpcFile> {
        let footer = footer(&bytes)?;
        if footer.dictionaries().is_some_and(|all| !all.is_empty()) {
            return Err(ClientError::reply("a file with dictionaries"));
        }
        let stored = footer
            .schema()
            .ok_or_else(|| ClientError::reply("a file without schema"))?;
        let stored = Arc::new(decode::checked_schema(stored)?);
        let columns = schema.fields().iter().map(|wanted| {
            let found = stored.column_with_name(wanted.name());
            let found = found.filter(|(_, field)| field.data_type() == wanted.data_type());
            found.map(|(at, _)| at).ok_or_else(|| {
                ClientError::reply(format!("a file without the column {:?}", wanted.name()))
            })
        });
        let columns = columns.collect::<Result<_>>()?;
        let blocks = footer.recordBatches().into_iter().flatten();
        let batches = blocks
            .map(|block| place(block, bytes.len()))
            .collect::<Result<_>>()?;
        Ok(IpcFile {
            decoder: StreamDecoder::with_schema(stored, bytes.len() as u64)?,
            bytes,
            batches,
            columns,
            schema,
        })
    }

    /// Number of its record batches.
    pub(crate) fn len(&self) -> usize {
        self.batches.len()
    }

    /// The wanted columns of a batch that there is; they share the file's memory.
    ///
    /// # Errors
    ///
    /// `Reply` for a batch that contradicts itself or the schema.
    pub(crate) fn batch(&self, number: usize) -> Result<RecordBatch> {
        let place = &self.batches[number];
        let body = place.start + place.header_bytes;
        let message = &self.bytes[place.start..body];
        let header = &message[decode::encapsulated(message)?];
        let body = self.bytes.slice_with_length(body, place.body_bytes);
        let batch = self.decoder.decode_columns(header, &body, &self.columns)?;
        // The same types; other notes on the fields perhaps.
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        let columns = batch.columns().to_vec();
        RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)
            .map_err(ClientError::decode)
    }
}

fn footer(bytes: &[u8]) -> Result<Footer<'_>> {
    let none = || ClientError::reply("a file that is no Arrow IPC file");
    let end = bytes.len().checked_sub(TAIL_BYTES).ok_or_else(none)?;
    let (length, magic) = bytes[end..].split_at(4);
    let length = <[u8; 4]>::try_from(length).map_err(|_| none())?;
    let length = usize::try_from(i32::from_le_bytes(length)).map_err(|_| none())?;
    if !bytes.starts_with(MAGIC) || magic != MAGIC {
        return Err(none());
    }
    let start = end.checked_sub(length).ok_or_else(none)?;
    arrow_ipc::root_as_footer_with_opts(&decode::verifier(), &bytes[start..end])
        .map_err(|error| ClientError::reply(format!("the footer of a file: {error}")))
}

fn place(block: &Block, file_bytes: usize) -> Result<Place> {
    let place = || {
        let place = Place {
            start: usize::try_from(block.offset()).ok()?,
            header_bytes: usize::try_from(block.metaDataLength()).ok()?,
            body_bytes: usize::try_from(block.bodyLength()).ok()?,
        };
        let body = place.start.checked_add(place.header_bytes)?;
        let end = body.checked_add(place.body_bytes)?;
        (end <= file_bytes).then_some(place)
    };
    place().ok_or_else(|| ClientError::reply("a batch outside of its file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::{ArrayRef, Int64Array, StringArray};
    use arrow_ipc::writer::FileWriter;

    fn rows() -> RecordBatch {
        let numbers: ArrayRef = Arc::new(Int64Array::from_iter([Some(1), None, Some(3)]));
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["one", "", "three"]));
        RecordBatch::try_from_iter([("n", numbers), ("t", texts)]).unwrap()
    }

    fn file() -> Vec<u8> {
        let mut writer = FileWriter::try_new(Vec::new(), &rows().schema()).unwrap();
        writer.write(&rows()).unwrap();
        writer.write(&rows().slice(1, 1)).unwrap();
        writer.into_inner().unwrap()
    }

    fn read(bytes: Vec<u8>, schema: &SchemaRef) -> Result<Vec<RecordBatch>> {
        let file = IpcFile::open(Buffer::from_vec(bytes), Arc::clone(schema))?;
        (0..file.len()).map(|number| file.batch(number)).collect()
    }

    #[test]
    fn columns_are_read_by_name_and_in_the_order_asked() {
        let whole = read(file(), &rows().schema()).unwrap();
        assert_eq!(whole, [rows(), rows().slice(1, 1)]);
        let swapped = rows().project(&[1, 0]).unwrap();
        assert_eq!(read(file(), &swapped.schema()).unwrap()[0], swapped);
        let other = RecordBatch::try_from_iter([("n", Arc::clone(rows().column(1)))]).unwrap();
        assert!(read(file(), &other.schema()).is_err());
    }

    #[test]
    fn a_file_with_any_byte_changed_or_cut_anywhere_is_read_or_refused() {
        let (good, schema) = (file(), rows().schema());
        for at in 0..good.len() {
            for value in [0, 0x7F, 0xFF, good[at] ^ 1] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let _ = read(bytes, &schema);
            }
            assert!(read(good[..at].to_vec(), &schema).is_err());
        }
    }
}
