//! Epochs: a stretch of generations of one key index.
//!
//! A pin that is filled anew numbers its rows anew: a new epoch begins, and leases on older
//! generations keep theirs. The index is made from the snapshot that the pin was filled from, after
//! it can be leased: values need no index. A fresh pin makes it at once, for the changes to come (and
//! before it is leased where it was filled anew, while the generation before answers); a frozen one
//! when it is first asked; one that is lent has none, since its segments have.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::Field;
use parking_lot::{Mutex, RwLock};
use pinion_feature_store::{CleanSnapshot, Snapshot, cast_key};
use pinion_schemas::{KeyEncoder, TableDefinition, format_type, key_hash, storage_type};

use super::error::PinError;
use super::index::{IndexBuilder, KeyIndex, Keys, Plan};
use super::journal::{Before, Forgotten, Journal};

/// Whoever waits for an index that another thread makes asks so often whether to go on.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Keys looked up before a refresh may go between.
const KEYS_A_LOCK: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(crate) struct Epoch {
    columns: Vec<Field>,
    encoder: KeyEncoder,
    /// Where the index comes from, until it is made.
    source: Mutex<Option<Snapshot>>,
    /// Files that are lent, which have indexes of their own.
    lent: Option<Arc<CleanSnapshot>>,
    indexed: OnceLock<RwLock<Indexed>>,
    /// How many leases there are on each generation.
    held: Mutex<BTreeMap<u64, u32>>,
    journal_max_bytes: usize,
}

#[derive(Debug)]
struct Indexed {
    index: KeyIndex,
    journal: Journal,
}

impl Epoch {
    /// Of a snapshot's rows; without an index yet, and until then it keeps the snapshot's files.
    pub fn of_snapshot(snapshot: &Snapshot, journal_max_bytes: usize) -> Result<Epoch, PinError> {
        Ok(Epoch {
            source: Mutex::new(Some(snapshot.clone())),
            ..Epoch::new(snapshot.definition(), journal_max_bytes)?
        })
    }

    /// Of files that are lent.
    pub fn of_files(
        definition: &TableDefinition,
        files: Arc<CleanSnapshot>,
    ) -> Result<Epoch, PinError> {
        Ok(Epoch {
            lent: Some(files),
            ..Epoch::new(definition, 0)?
        })
    }

    fn new(definition: &TableDefinition, journal_max_bytes: usize) -> Result<Epoch, PinError> {
        let schema = definition.schema();
        let fields = schema.fields().iter().take(definition.entity.len());
        let fields: Vec<_> = fields.map(|field| field.as_ref().clone()).collect();
        let encoder = KeyEncoder::new(&fields).map_err(|e| PinError::Features {
            problem: e.to_string(),
        })?;
        Ok(Epoch {
            encoder,
            columns: fields,
            source: Mutex::new(None),
            lent: None,
            indexed: OnceLock::new(),
            held: Mutex::new(BTreeMap::new()),
            journal_max_bytes,
        })
    }

    /// The index; made here if this is its first use.
    fn indexed(&self) -> Result<&RwLock<Indexed>, PinError> {
        self.index(&|| Ok(()))
    }

    /// Makes the index, unless it is there.
    ///
    /// # Errors
    ///
    /// Those of reading, and of `go_on`, which is asked before each batch of rows, and while
    /// somebody else makes the index: another call begins anew.
    pub fn make_index(&self, go_on: &dyn Fn() -> Result<(), PinError>) -> Result<(), PinError> {
        self.index(go_on).map(|_| ())
    }

    fn index(
        &self,
        go_on: &dyn Fn() -> Result<(), PinError>,
    ) -> Result<&RwLock<Indexed>, PinError> {
        if let Some(indexed) = self.indexed.get() {
            return Ok(indexed);
        }
        // Whoever comes second waits here, and finds it made.
        let mut source = loop {
            if let Some(source) = self.source.try_lock_for(ASK_EVERY) {
                break source;
            }
            go_on()?;
        };
        if let Some(snapshot) = &*source {
            let mut index = IndexBuilder::default();
            // In the order of the fill, which is that of the snapshot.
            for rows in snapshot.latest_rows(Some(&[]))? {
                go_on()?;
                index.extend(&rows?.keys);
            }
            let indexed = RwLock::new(Indexed {
                index: index.build(),
                journal: Journal::default(),
            });
            self.indexed.get_or_init(|| indexed);
            *source = None;
        }
        self.indexed.get().ok_or_else(|| PinError::Inconsistent {
            problem: "no key index".to_owned(),
        })
    }

    /// What a change would do to the rows.
    pub fn plan(&self, present: &Keys, gone: &Keys) -> Result<Plan, PinError> {
        Ok(self.indexed()?.read().index.plan(present, gone))
    }

    /// Does what was planned with the same `present`, as generation `number`.
    pub fn apply(&self, number: u64, plan: &Plan, present: &Keys) -> Result<(), PinError> {
        let mut indexed = self.indexed()?.write();
        let Indexed { index, journal } = &mut *indexed;
        journal.note(number, index, plan, present, self.journal_max_bytes);
        index.apply(plan, present);
        Ok(())
    }

    /// Notes a lease on a generation.
    pub fn hold(&self, number: u64) {
        *self.held.lock().entry(number).or_default() += 1;
    }

    /// Notes the end of one.
    pub fn let_go(&self, number: u64) {
        let mut held = self.held.lock();
        if let Some(count) = held.get_mut(&number) {
            *count -= 1;
            if *count == 0 {
                held.remove(&number);
            }
        }
    }

    /// Drops what no lease needs, now that `newest` is the one that new leases get.
    pub fn trim(&self, newest: u64) {
        let oldest = self.held.lock().keys().next().copied();
        if let Some(indexed) = self.indexed.get() {
            let oldest = oldest.unwrap_or(newest).min(newest);
            indexed.write().journal.trim(oldest, self.journal_max_bytes);
        }
    }

    /// The rows that keys have in a generation, -1 for none.
    ///
    /// Columns are found by name, others are left alone; types are those that a lookup takes.
    pub fn rows(&self, generation: u64, keys: &RecordBatch) -> Result<Vec<i64>, PinError> {
        let columns: Vec<ArrayRef> = self
            .columns
            .iter()
            .map(|field| {
                let column = keys.column_by_name(field.name());
                let column = column.ok_or_else(|| PinError::KeyColumn {
                    column: field.name().clone(),
                })?;
                let stored = storage_type(field.data_type());
                cast_key(column, &stored).map_err(|source| PinError::KeyType {
                    column: field.name().clone(),
                    given: format_type(column.data_type()),
                    declared: format_type(field.data_type()),
                    source,
                })
            })
            .collect::<Result<_, _>>()?;
        let encoded = self.encoder.encode(&columns)?;
        if let Some(files) = &self.lent {
            let hashes: Vec<u64> = encoded.iter().map(key_hash).collect();
            return Ok(files.row_numbers(&encoded, &hashes)?);
        }
        let indexed = self.indexed()?;
        let mut rows = Vec::with_capacity(encoded.len());
        for first in (0..encoded.len()).step_by(KEYS_A_LOCK) {
            let some = first..encoded.len().min(first + KEYS_A_LOCK);
            // The answer for one generation is the same whatever the index does between.
            let indexed = indexed.read();
            for key in some.map(|at| encoded.get(at)) {
                let row = match indexed.journal.at(generation, key) {
                    Ok(Before::Row(row)) => row,
                    Ok(Before::Unchanged) => indexed.index.find(key, key_hash(key)),
                    Err(Forgotten) => return Err(self.forgotten(generation)),
                };
                rows.push(row.map_or(-1, i64::from));
            }
        }
        Ok(rows)
    }

    fn forgotten(&self, generation: u64) -> PinError {
        PinError::RowsForgotten {
            generation,
            kept_bytes: self.journal_max_bytes as u64,
        }
    }

    /// Bytes of host memory for the index and the notes, about.
    pub fn host_bytes(&self) -> u64 {
        self.indexed.get().map_or(0, |indexed| {
            let indexed = indexed.read();
            indexed.index.bytes() + indexed.journal.bytes() as u64
        })
    }

    /// Does something while the index is being changed.
    #[cfg(test)]
    pub fn while_indexing<T>(&self, work: impl FnOnce() -> T) -> T {
        let _changed = self.indexed.get().map(RwLock::write);
        work()
    }

    /// Panics where the index contradicts itself.
    #[cfg(test)]
    pub fn check(&self) {
        if let Some(indexed) = self.indexed.get() {
            indexed.read().index.check();
        }
    }
}
