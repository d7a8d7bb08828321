//! Mappings: slots that a consumer has imported.
//!
//! What another process has mapped cannot be taken back. So a mapping keeps the memory of the
//! slots it was given descriptors of, and with it their bytes in the budget, whatever becomes of
//! the pin or its layout; a pin that is mapped is not evicted, since that would free nothing.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use arrow_schema::{Field, Schema, SchemaRef};
use pinion_schemas::storage_type;
use serde_json::{Value, json};

use super::generation::{Generation, millis};
use super::lease::Holder;
use super::names::PinId;
use super::pin::Pin;
use super::ring::SlotMemory;
use crate::error::GdsError;
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
    pub(super) memory: Vec<Arc<SlotMemory>>,
}

/// A mapping, as `pins` lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappingNote {
    /// Who holds it.
    pub holder: Holder,
    /// The layout's number.
    pub layout: u64,
    /// Bytes of its slots.
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
        self.memory.iter().map(|slot| slot.region.bytes()).sum()
    }

    /// The pinned columns as the table declares them.
    pub fn schema(&self) -> SchemaRef {
        self.fields(|column| column.data_type.clone())
    }

    /// The pinned columns as they lie: dictionaries as their plain values.
    pub fn stored_schema(&self) -> SchemaRef {
        self.fields(|column| storage_type(&column.data_type))
    }

    fn fields(&self, data_type: impl Fn(&Column) -> arrow_schema::DataType) -> SchemaRef {
        let columns = self.layout.shape.columns.iter();
        let fields: Vec<Field> = columns
            .map(|column| Field::new(&column.name, data_type(column), column.nullable))
            .collect();
        Arc::new(Schema::new(fields))
    }

    /// A new descriptor for each slot, in order.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn export(&self) -> Result<Vec<OwnedFd>, GdsError> {
        let slots = self.memory.iter();
        slots.map(|slot| slot.region.export()).collect()
    }

    /// Bytes of the allocation behind each descriptor, which the device has rounded up.
    pub fn slot_bytes(&self) -> u64 {
        self.memory.first().map_or(0, |slot| slot.region.bytes())
    }

    /// What a consumer is told beside the descriptors.
    pub fn to_json(&self) -> Value {
        let mut layout = json!(&*self.layout);
        layout["slot_bytes"] = self.slot_bytes().into();
        json!({
            "pin": self.pin().to_string(),
            "name": self.name(),
            "table": self.table(),
            "key": self.key(),
            "layout": layout,
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
