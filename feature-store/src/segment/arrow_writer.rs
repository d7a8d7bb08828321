//! Writes the Arrow files of a segment, batch by batch.

use std::collections::HashMap;
use std::path::Path;

use arrow_array::RecordBatch;
use arrow_ipc::Block;
use arrow_schema::{ArrowError, SchemaRef};

use super::body::{self, BodyParts, BodyPlan, Placing, Views};
use super::cut::Cutter;
use super::files::PartialFile;
use super::message;
use super::meta::{ArrowFileMeta, BatchMeta};
use super::statistics::{Statistics, StatisticsBuilder};
use super::{PAGE_BYTES, SEGMENT_FORMAT_VERSION, SegmentError, SegmentId, SegmentWriterOptions};

/// Footer key: the version of the format.
pub(super) const FORMAT_KEY: &str = "pinion.format";
/// Footer key: rows of a full batch.
pub(super) const BATCH_ROWS_KEY: &str = "pinion.batch_rows";
/// Footer key: which columns lie side by side.
pub(super) const GROUPS_KEY: &str = "pinion.groups";

/// One Arrow file being written.
pub(super) struct ArrowFileWriter {
    id: SegmentId,
    file: PartialFile,
    schema: SchemaRef,
    cutter: Cutter,
    head_bytes: u64,
    head_crc32: u32,
    blocks: Vec<Block>,
    batches: Vec<BatchMeta>,
    statistics: StatisticsBuilder,
}

impl ArrowFileWriter {
    pub(super) fn create(
        dir: &Path,
        id: SegmentId,
        suffix: &'static str,
        schema: SchemaRef,
        options: &SegmentWriterOptions,
    ) -> Result<Self, SegmentError> {
        body::check_types(&schema)?;
        let mut file = PartialFile::create(dir, id, suffix)?;
        let mut head = message::OPENING.to_vec();
        let framed = message::framed(&message::schema_message(&schema), head.len() as u64, 8);
        head.extend_from_slice(&framed);
        file.append(&head)?;
        Ok(ArrowFileWriter {
            id,
            cutter: Cutter::new(
                schema.clone(),
                options.max_body_bytes,
                options.max_batch_rows,
            ),
            head_bytes: head.len() as u64,
            head_crc32: crc32fast::hash(&head),
            file,
            statistics: StatisticsBuilder::new(&schema),
            schema,
            blocks: Vec::new(),
            batches: Vec::new(),
        })
    }

    /// Adds rows; full batches are written at once, the rest waits.
    pub(super) fn push(&mut self, batch: &RecordBatch) -> Result<(), SegmentError> {
        let id = self.id;
        // The columns, under this segment's schema: checks types and nulls.
        let batch = RecordBatch::try_new(self.schema.clone(), batch.columns().to_vec())
            .map_err(|source| SegmentError::Schema { id, source })?;
        self.cutter.push(batch);
        self.write_cut(false)
    }

    pub(super) fn position(&self) -> u64 {
        self.file.position()
    }

    /// Writes what is pending and the footer, and tells what is known of each batch. The file
    /// still has to be sealed and published.
    pub(super) fn finish(
        mut self,
    ) -> Result<((PartialFile, ArrowFileMeta), Statistics), SegmentError> {
        self.write_cut(true)?;
        let batch_rows = self.cutter.batch_rows();
        let groups = serde_json::to_string(&body::groups(&self.schema, batch_rows))
            .map_err(|error| self.layout(ArrowError::JsonError(error.to_string())))?;
        let metadata = HashMap::from([
            (FORMAT_KEY.to_owned(), SEGMENT_FORMAT_VERSION.to_string()),
            (BATCH_ROWS_KEY.to_owned(), batch_rows.to_string()),
            (GROUPS_KEY.to_owned(), groups),
        ]);
        let mut tail = message::END_OF_STREAM.to_vec();
        tail.extend_from_slice(&message::footer(&self.schema, &self.blocks, &metadata));
        self.file.append(&tail)?;
        let meta = ArrowFileMeta {
            batch_rows: batch_rows as u32,
            head_bytes: self.head_bytes,
            head_crc32: self.head_crc32,
            tail_bytes: tail.len() as u64,
            footer_crc32: crc32fast::hash(&tail),
            batches: self.batches,
        };
        let id = self.id;
        let statistics = self
            .statistics
            .finish()
            .map_err(|source| SegmentError::Layout { id, source })?;
        Ok(((self.file, meta), statistics))
    }

    fn write_cut(&mut self, end_of_input: bool) -> Result<(), SegmentError> {
        let id = self.id;
        let layout = |source| SegmentError::Layout { id, source };
        while let Some(batch) = self.cutter.next(end_of_input).map_err(layout)? {
            self.statistics.push(&batch).map_err(layout)?;
            let parts = body::collect(batch.columns(), Views::Compact).map_err(layout)?;
            self.write_batch(batch.num_rows(), &parts)?;
        }
        Ok(())
    }

    fn write_batch(&mut self, rows: usize, parts: &BodyParts) -> Result<(), SegmentError> {
        let lengths: Vec<_> = parts
            .buffers
            .iter()
            .map(|(class, bytes)| (*class, bytes.len()))
            .collect();
        let plan = body::place(&lengths, Placing::Pages);
        let buffers: Vec<_> = plan
            .offsets
            .iter()
            .zip(&lengths)
            .map(|(offset, (_, bytes))| (*offset, *bytes))
            .collect();
        let message = message::batch_message(
            rows,
            &parts.nodes,
            &buffers,
            &parts.variadic_counts,
            plan.body_bytes,
        );
        let position = self.file.position();
        let metadata = message::framed(&message, position, PAGE_BYTES as u64);
        let metadata_bytes = i32::try_from(metadata.len()).map_err(|_| {
            self.layout(ArrowError::IpcError(
                "the metadata of a batch exceeds 2 GiB".to_owned(),
            ))
        })?;
        self.file.append(&metadata)?;
        let body_crc32 = self.write_body(parts, &plan)?;
        self.blocks.push(Block::new(
            position as i64,
            metadata_bytes,
            plan.body_bytes as i64,
        ));
        self.batches.push(BatchMeta {
            rows: rows as u32,
            metadata_crc32: crc32fast::hash(&metadata),
            body_crc32,
        });
        Ok(())
    }

    fn write_body(&mut self, parts: &BodyParts, plan: &BodyPlan) -> Result<u32, SegmentError> {
        const PADDING: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
        let mut crc = crc32fast::Hasher::new();
        let mut end = 0;
        for &number in &plan.physical_order {
            let (_, buffer) = &parts.buffers[number];
            let padding = &PADDING[..plan.offsets[number] - end];
            for bytes in [padding, buffer.as_slice()] {
                crc.update(bytes);
                self.file.append(bytes)?;
            }
            end = plan.offsets[number] + buffer.len();
        }
        let padding = &PADDING[..plan.body_bytes - end];
        crc.update(padding);
        self.file.append(padding)?;
        Ok(crc.finalize())
    }

    fn layout(&self, source: ArrowError) -> SegmentError {
        SegmentError::Layout {
            id: self.id,
            source,
        }
    }
}
