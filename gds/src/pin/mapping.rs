//! Mappings: slots, or files, that a consumer has imported.
//!
//! What another process has mapped cannot be taken back. So a mapping keeps the memory of the
//! slots it was given descriptors of, and with it their bytes in the budget, whatever becomes of
//! the pin or its layout; a pin that is mapped is not evicted, since that would free nothing.
//! Files that are lent it keeps on disk in the same way.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use arrow_schema::{Field, Schema, SchemaRef};
use pinion_feature_store::{CleanFile, CleanSnapshot};
use pinion_schemas::storage_type;
use serde_json::{Value, json};

use super::error::PinError;
use super::generation::{Generation, millis};
use super::lease::Holder;
use super::names::PinId;
use super::pin::Pin;
use super::ring::Kept;
use crate::layout::{Column, Layout};

/// The slots of one layout of one pin, held for a consumer. Dropping it says that the consumer
/// has unmapped them.
#[derive(Debug)]
#[must_use = "without the mapping, the memory counts as free"]
pub struct Mapping {
    pub(super) id: u64,
    pub(super) pin: Arc<Pin>,
    pub(super) layout: Arc<Layout>,
    pub(super) newest: Generation,
    pub(super) kept: Vec<Kept>,
}

/// A mapping, as `pins` lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappingNote {
    /// Who holds it.
    pub holder: Holder,
    /// The layout's number.
    pub layout: u64,
    /// Bytes of its slots, or of its files.
    pub bytes: u64,
    /// Since when.
    pub since: Instant,
}

impl Mapping {
    /// Which pin.
    pub fn pin(&self) -> PinId {
        self.pin.id()
    }

    /// The pin's name.
    pub fn name(&self) -> &str {
        self.pin.name()
    }

    /// The table's name.
    pub fn table(&self) -> String {
        self.pin.spec.table.name()
    }

    /// The table's key columns, pinned or not.
    pub fn key(&self) -> Vec<String> {
        let definition = self.pin.spec.table.definition();
        let keys = definition.entity.iter();
        keys.map(|key| key.name.clone()).collect()
    }

    /// What is where.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The generation that was the newest when the mapping was made; unleased: it may be gone.
    pub fn newest(&self) -> &Generation {
        &self.newest
    }

    /// Bytes that it keeps.
    pub fn bytes(&self) -> u64 {
        let kept = self.kept.iter().map(|kept| match kept {
            Kept::Slot(memory) => memory.region.bytes(),
            Kept::Files(files) => files.file_bytes(),
        });
        kept.sum()
    }

    /// The files, where files are lent.
    pub fn files(&self) -> Option<&Arc<CleanSnapshot>> {
        self.kept.iter().find_map(|kept| match kept {
            Kept::Slot(_) => None,
            Kept::Files(files) => Some(files),
        })
    }

    /// The pinned columns as the table declares them.
    pub fn schema(&self) -> SchemaRef {
        if let Some(files) = self.files() {
            return files.schema();
        }
        self.fields(|column| column.data_type.clone())
    }

    /// The pinned columns as they lie: dictionaries as their plain values.
    pub fn stored_schema(&self) -> SchemaRef {
        if let Some(files) = self.files() {
            return files.stored_schema();
        }
        self.fields(|column| storage_type(&column.data_type))
    }

    fn fields(&self, data_type: impl Fn(&Column) -> arrow_schema::DataType) -> SchemaRef {
        let columns = self.layout.shape.columns.iter();
        let fields: Vec<Field> = columns
            .map(|column| Field::new(&column.name, data_type(column), column.nullable))
            .collect();
        Arc::new(Schema::new(fields))
    }

    /// A new descriptor for each slot, or for each file, in order.
    ///
    /// # Errors
    ///
    /// The device's, or the system's.
    pub fn export(&self) -> Result<Vec<OwnedFd>, PinError> {
        let mut exported = Vec::new();
        for kept in &self.kept {
            match kept {
                Kept::Slot(memory) => exported.push(memory.region.export()?),
                Kept::Files(files) => {
                    let opened = files.open().map_err(|source| PinError::Io {
                        action: format!("open the segments of table {:?}", self.table()),
                        source,
                    })?;
                    exported.extend(opened.into_iter().map(OwnedFd::from));
                }
            }
        }
        Ok(exported)
    }

    /// Bytes of the allocation behind each descriptor, which the device has rounded up.
    fn slot_bytes(&self) -> u64 {
        self.kept.first().map_or(0, |kept| match kept {
            Kept::Slot(memory) => memory.region.bytes(),
            Kept::Files(_) => 0,
        })
    }

    fn layout_json(&self) -> Value {
        let mut layout = json!(&*self.layout);
        layout["form"] = self.pin.placed.form.to_string().into();
        let Some(files) = self.files() else {
            layout["slot_bytes"] = self.slot_bytes().into();
            return layout;
        };
        let part = |(number, file): (usize, CleanFile)| {
            json!({
                "kind": "mapped",
                "descriptor": number,
                "bytes": file.file.bytes(),
                "rows": file.rows,
                "dirty": 0,
                "masks_offset": 0,
            })
        };
        json!({
            "layout": layout["layout"],
            "kind": layout["kind"],
            "form": layout["form"],
            "device": layout["device"],
            "parts": files.files().enumerate().map(part).collect::<Vec<_>>(),
        })
    }

    /// What a consumer is told beside the descriptors.
    pub fn to_json(&self) -> Value {
        json!({
            "pin": self.pin().to_string(),
            "name": self.name(),
            "table": self.table(),
            "key": self.key(),
            "layout": self.layout_json(),
            "generation": self.newest.to_json(self.pin.stall().as_ref()),
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.pin.unmapped(self.id);
    }
}

impl MappingNote {
    /// As `pins` lists it.
    pub fn to_json(&self) -> Value {
        json!({
            "pid": self.holder.pid,
            "layout": self.layout,
            "bytes": self.bytes,
            "age_ms": millis(self.since),
        })
    }
}
