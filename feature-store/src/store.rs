//! A store: a directory of tables under one lock.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use pinion_schemas::{ServiceDefinition, TableDefinition, nearest, plan_evolution};

use crate::catalog::{Catalog, TableEntry, TableId, TablePlan, VersionEntry};
use crate::check::{self, CheckReport};
use crate::compat::Version;
use crate::error::{ApplyError, OpenError, UnknownService, UnknownTable};
use crate::lock::StoreLock;
use crate::numbered::CreateNumberedError;
use crate::segment::SegmentWriterOptions;
use crate::services::{self, Service, ServicePlan, ServiceVersion};
use crate::table::{Table, TableDirs, open_table};
use crate::worker::{self, Wake};

/// Sizes, times and bounds of a store.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// A log of this size is closed and becomes a segment.
    pub delta_max_bytes: u64,
    /// Likewise at this many rows.
    pub delta_max_rows: u32,
    /// How long a snapshot that was handed out stays usable after it was replaced.
    pub snapshot_grace: Duration,
    /// Retained snapshots may keep at most this many bytes of files out of use.
    pub retained_max_bytes: u64,
    /// Largest single commit, as the log keeps its rows: absent features filled in,
    /// dictionaries and views expanded.
    pub put_max_bytes: u64,
    /// How often logs are synced that nobody waits for.
    pub sync_interval: Duration,
    /// Segments of a table at rest.
    pub max_segments: usize,
    /// Flush and merge in the background. Without it the caller does.
    pub background: bool,
    /// How many put ids a table remembers.
    pub put_ids_kept: usize,
    /// How segments are written.
    pub segment: SegmentWriterOptions,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions {
            delta_max_bytes: 64 << 20,
            delta_max_rows: 1 << 18,
            snapshot_grace: Duration::from_secs(600),
            retained_max_bytes: 16 << 30,
            put_max_bytes: 256 << 20,
            sync_interval: Duration::from_secs(1),
            max_segments: 12,
            background: true,
            put_ids_kept: 16_384,
            segment: SegmentWriterOptions::default(),
        }
    }
}

/// An open store. Cheap to clone; closed when the last clone is dropped.
#[derive(Clone)]
pub struct Store(Arc<StoreInner>);

pub(crate) struct StoreInner {
    dir: PathBuf,
    pub options: Arc<StoreOptions>,
    catalog: Mutex<Catalog>,
    catalog_number: std::sync::atomic::AtomicU64,
    tables: ArcSwap<BTreeMap<String, Table>>,
    /// Those of the catalog, for requests: they do not wait for an apply.
    services: ArcSwap<Vec<Service>>,
    ticket_key: [u8; 32],
    pub wake: Arc<Wake>,
    closed: AtomicBool,
    /// A catalog was published whose name a power cut may take: no number is safe to use.
    catalog_uncertain: AtomicBool,
    writable: bool,
    _lock: StoreLock,
}

const CATALOG_DIR: &str = "catalog";
const KEY_FILE: &str = "ticket.key";

fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> OpenError + 'a {
    move |source| OpenError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

impl StoreInner {
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(crate) fn tables(&self) -> Vec<Table> {
        self.tables.load().values().cloned().collect()
    }
}

impl Drop for StoreInner {
    fn drop(&mut self) {
        if self.writable {
            for table in self.tables() {
                table.0.sync();
            }
        }
    }
}

impl Store {
    /// Creates an empty store in `dir`, creating the directory if need be. Does nothing to
    /// a store that exists.
    pub fn init(dir: &Path) -> Result<(), OpenError> {
        fs::create_dir_all(dir).map_err(io("create", dir))?;
        let _lock = StoreLock::take(dir, true)?;
        let catalog_dir = dir.join(CATALOG_DIR);
        fs::create_dir_all(&catalog_dir).map_err(io("create", &catalog_dir))?;
        fs::create_dir_all(dir.join("tables")).map_err(io("create", dir))?;
        let key_path = dir.join(KEY_FILE);
        if !key_path.exists() {
            let partial = dir.join("ticket.key.partial");
            let mut key = Vec::with_capacity(32);
            key.extend_from_slice(uuid::Uuid::new_v4().as_bytes());
            key.extend_from_slice(uuid::Uuid::new_v4().as_bytes());
            let mut options = fs::OpenOptions::new();
            options.write(true).create(true).truncate(true);
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            let mut file = options.open(&partial).map_err(io("create", &partial))?;
            std::io::Write::write_all(&mut file, &key).map_err(io("write", &partial))?;
            crate::fail::sync_all(&file).map_err(io("sync", &partial))?;
            fs::rename(&partial, &key_path).map_err(io("create", &key_path))?;
        }
        if Catalog::read_newest(&catalog_dir)?.is_none() {
            let catalog = Catalog {
                number: 1,
                next_table: 1,
                ..Catalog::default()
            };
            catalog.create(&catalog_dir).map_err(|error| match error {
                CreateNumberedError::NotCreated(e) | CreateNumberedError::Uncertain(e) => {
                    io("write", &catalog_dir)(e)
                }
            })?;
        }
        crate::fail::sync_dir(dir).map_err(io("sync", dir))
    }

    /// Opens a store for reading and writing; nobody else may have it open.
    ///
    /// Recovers what a crash left: costs one pass over each table's closed logs.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Store, OpenError> {
        Store::open_as(dir, options, true)
    }

    /// Opens a store for reading, as it was left; others may read it too. Writes nothing.
    pub fn open_read_only(dir: &Path, options: StoreOptions) -> Result<Store, OpenError> {
        Store::open_as(dir, options, false)
    }

    fn open_as(dir: &Path, options: StoreOptions, writable: bool) -> Result<Store, OpenError> {
        let catalog_dir = dir.join(CATALOG_DIR);
        if !catalog_dir.is_dir() {
            return Err(OpenError::NotAStore {
                dir: dir.to_owned(),
            });
        }
        let lock = StoreLock::take(dir, writable)?;
        let Some((catalog, fell_back)) = Catalog::read_newest(&catalog_dir)? else {
            return Err(OpenError::NotAStore {
                dir: dir.to_owned(),
            });
        };
        let key_path = dir.join(KEY_FILE);
        let key = fs::read(&key_path).map_err(io("read", &key_path))?;
        let ticket_key: [u8; 32] = key.try_into().map_err(|_| OpenError::Damaged {
            what: key_path.display().to_string(),
            problem: "it has not 32 bytes".to_owned(),
        })?;
        let options = Arc::new(options);
        let wake = Arc::new(Wake::default());
        if fell_back {
            tracing::warn!(
                catalog = catalog.number,
                "the newest catalog is damaged; this older one is used, and nothing is swept"
            );
        } else if writable {
            remove_dropped_tables(dir, &catalog);
        }
        let mut tables = BTreeMap::new();
        for entry in &catalog.tables {
            let table = open_table(dir, entry, &options, &wake, writable)?;
            tables.insert(table.name(), table);
        }
        let store = Arc::new(StoreInner {
            dir: dir.to_owned(),
            options,
            catalog_number: catalog.number.into(),
            tables: ArcSwap::from_pointee(tables),
            services: ArcSwap::from_pointee(catalog.services.clone()),
            ticket_key,
            wake,
            catalog: Mutex::new(catalog),
            closed: AtomicBool::new(false),
            catalog_uncertain: AtomicBool::new(false),
            writable,
            _lock: lock,
        });
        if writable && store.options.background {
            worker::start(&store).map_err(io("start the background threads of", dir))?;
        }
        Ok(Store(store))
    }

    /// The data directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Secret that authenticates tickets; made with the store, never changes.
    pub fn ticket_key(&self) -> [u8; 32] {
        self.0.ticket_key
    }

    /// Grows with every apply and drop.
    pub fn catalog_version(&self) -> u64 {
        self.0.catalog_number.load(Ordering::Acquire)
    }

    /// What [`Store::apply`] would do.
    pub fn plan(&self, definitions: &[TableDefinition]) -> Result<Vec<TablePlan>, ApplyError> {
        plan(&self.0.catalog.lock(), definitions)
    }

    /// What [`Store::apply_all`] would do.
    pub fn plan_all(
        &self,
        tables: &[TableDefinition],
        services: &[ServiceDefinition],
    ) -> Result<Plans, ApplyError> {
        plan_all(&self.0.catalog.lock(), tables, services)
    }

    /// As [`Store::apply_all`], for tables only.
    pub fn apply(&self, definitions: Vec<TableDefinition>) -> Result<Vec<TablePlan>, ApplyError> {
        Ok(self.apply_all(definitions, Vec::new())?.tables)
    }

    /// Creates and changes tables and services: all of them or, on error, none. A service may
    /// name tables and features of the same apply. No stored file is rewritten.
    pub fn apply_all(
        &self,
        definitions: Vec<TableDefinition>,
        services: Vec<ServiceDefinition>,
    ) -> Result<Plans, ApplyError> {
        if !self.0.writable {
            return Err(ApplyError::ReadOnly);
        }
        let mut catalog = self.0.catalog.lock();
        let plans = plan_all(&catalog, &definitions, &services)?;
        if plans.change_nothing() {
            // An earlier apply may have stored them without taking them into use.
            self.take_into_use(&catalog)?;
            return Ok(plans);
        }
        let write = |e: OpenError| ApplyError::Write(Box::new(e));
        let mut next = catalog.clone();
        next.number += 1;
        services::put(&mut next, services);
        for (definition, plan) in definitions.into_iter().zip(&plans.tables) {
            let definition = Arc::new(definition);
            match plan {
                TablePlan::Unchanged { .. } => {}
                TablePlan::Create { .. } => {
                    let id = TableId(next.next_table);
                    next.next_table += 1;
                    let dirs = TableDirs::of(&self.0.dir, id);
                    dirs.create()
                        .map_err(|e| write(io("create", &dirs.segments)(e)))?;
                    next.tables.push(TableEntry {
                        id,
                        versions: vec![VersionEntry {
                            version: 1,
                            definition,
                        }],
                    });
                }
                TablePlan::Change { table, .. } => {
                    let entry = next
                        .tables
                        .iter_mut()
                        .find(|t| t.current().is_some_and(|v| v.definition.name == *table));
                    if let Some(entry) = entry {
                        let version = entry.current().map_or(1, |v| v.version + 1);
                        // Versions are checked to be usable before they are written.
                        Version::new(version, Arc::clone(&definition)).map_err(|problem| {
                            write(OpenError::Damaged {
                                what: format!("definition of {table}"),
                                problem,
                            })
                        })?;
                        entry.versions.push(VersionEntry {
                            version,
                            definition,
                        });
                    }
                }
            }
        }
        self.publish_catalog(&mut catalog, next)?;
        let in_use = self.take_into_use(&catalog);
        self.announce(&catalog);
        in_use?;
        Ok(plans)
    }

    /// Makes `next` the store's catalog, on disk and in memory.
    fn publish_catalog(&self, catalog: &mut Catalog, next: Catalog) -> Result<(), ApplyError> {
        let catalog_dir = self.0.dir.join(CATALOG_DIR);
        let error = |source| Box::new(io("write", &catalog_dir)(source));
        if self.0.catalog_uncertain.load(Ordering::Acquire) {
            let earlier = std::io::Error::other("an earlier sync of the directory failed");
            return Err(ApplyError::Uncertain(error(earlier)));
        }
        match next.create(&catalog_dir) {
            Ok(()) => {}
            Err(CreateNumberedError::NotCreated(e)) => return Err(ApplyError::Write(error(e))),
            Err(CreateNumberedError::Uncertain(e)) => {
                self.0.catalog_uncertain.store(true, Ordering::Release);
                return Err(ApplyError::Uncertain(error(e)));
            }
        }
        *catalog = next;
        self.0.services.store(Arc::new(catalog.services.clone()));
        Ok(())
    }

    /// Tells those who follow the catalog. Only once the tables are in use: who looks at a new
    /// version and misses its tables would not look again.
    fn announce(&self, catalog: &Catalog) {
        self.0
            .catalog_number
            .store(catalog.number, Ordering::Release);
    }

    /// Brings open tables in line with the published catalog: those that are not, because
    /// they are new, changed, or an earlier attempt failed. One that fails keeps no other.
    fn take_into_use(&self, catalog: &Catalog) -> Result<(), ApplyError> {
        let mut tables = BTreeMap::clone(&self.0.tables.load());
        let mut failed = None;
        for entry in &catalog.tables {
            let Some(current) = entry.current() else {
                continue;
            };
            let open = tables
                .get(&current.definition.name)
                .filter(|t| t.id() == entry.id);
            let outcome = match open {
                Some(table) if table.definition_version() == current.version => Ok(()),
                Some(table) => Version::new(current.version, Arc::clone(&current.definition))
                    .and_then(|version| {
                        let changed = table.0.change_version(Arc::new(version));
                        changed.map_err(|e| e.to_string())
                    })
                    .map_err(|problem| OpenError::Damaged {
                        what: format!("log of table {}", table.name()),
                        problem,
                    }),
                None => open_table(&self.0.dir, entry, &self.0.options, &self.0.wake, true).map(
                    |table| {
                        tables.insert(table.name(), table);
                    },
                ),
            };
            failed = failed.or(outcome.err());
        }
        self.0.tables.store(Arc::new(tables));
        failed.map_or(Ok(()), |e| Err(ApplyError::NotInUse(Box::new(e))))
    }

    /// Removes a table and its files. Running readers finish.
    pub fn drop_table(&self, name: &str) -> Result<(), ApplyError> {
        if !self.0.writable {
            return Err(ApplyError::ReadOnly);
        }
        // Under the lock: another drop and apply may give the name to another table.
        let mut catalog = self.0.catalog.lock();
        let table = self.table(name)?;
        let services = services::users_of(&catalog, name);
        if !services.is_empty() {
            return Err(ApplyError::TableInUse {
                table: name.to_owned(),
                services,
            });
        }
        let mut next = catalog.clone();
        next.number += 1;
        next.tables.retain(|t| t.id != table.id());
        if let Err(error) = self.publish_catalog(&mut catalog, next) {
            if matches!(error, ApplyError::Uncertain(_)) {
                // The next open may find it dropped: no row must be acknowledged any more.
                table
                    .0
                    .set_read_only("whether its drop is on disk is not known");
            }
            return Err(error);
        }
        let mut tables = BTreeMap::clone(&self.0.tables.load());
        tables.remove(name);
        self.0.tables.store(Arc::new(tables));
        table.0.mark_dropped();
        self.announce(&catalog);
        drop(catalog);
        // A merge that runs may still write there; it removes the folder when it is done,
        // and the next open what is left.
        table.0.remove_if_dropped();
        Ok(())
    }

    /// Removes a service, all its versions.
    pub fn drop_service(&self, name: &str) -> Result<(), ApplyError> {
        if !self.0.writable {
            return Err(ApplyError::ReadOnly);
        }
        let mut catalog = self.0.catalog.lock();
        if services::resolve(&catalog.services, name).is_ok() && name.contains('@') {
            return Err(ApplyError::UnknownService(UnknownService {
                reference: name.to_owned(),
                problem: "a service is dropped with all its versions; give the name alone"
                    .to_owned(),
            }));
        }
        services::resolve(&catalog.services, name)?;
        let mut next = catalog.clone();
        next.number += 1;
        next.services.retain(|service| service.name != name);
        self.publish_catalog(&mut catalog, next)?;
        self.announce(&catalog);
        Ok(())
    }

    /// Every service, by name.
    pub fn services(&self) -> Vec<Service> {
        let mut services = Vec::clone(&self.0.services.load());
        services.sort_by(|a, b| a.name.cmp(&b.name));
        services
    }

    /// One version of a service: `ranking@v2`, or the newest for `ranking`.
    pub fn service(&self, reference: &str) -> Result<ServiceVersion, UnknownService> {
        services::resolve(&self.0.services.load(), reference)
    }

    /// Every table, by name.
    pub fn tables(&self) -> Vec<Table> {
        self.0.tables()
    }

    /// A table by name.
    pub fn table(&self, name: &str) -> Result<Table, UnknownTable> {
        let tables = self.0.tables.load();
        tables.get(name).cloned().ok_or_else(|| UnknownTable {
            name: name.to_owned(),
            hint: nearest(name, tables.keys().map(String::as_str)).map(str::to_owned),
        })
    }

    /// A table by identity.
    pub fn table_by_id(&self, id: TableId) -> Option<Table> {
        self.0
            .tables
            .load()
            .values()
            .find(|t| t.id() == id)
            .cloned()
    }

    /// Verifies every checksum and invariant. Reads everything once.
    pub fn check(&self) -> CheckReport {
        check::check(&self.tables())
    }

    /// Syncs every log and stops the background threads. Later commits still work; they
    /// are synced when somebody waits for them.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::Release);
        self.0.wake.now();
        for table in self.tables() {
            table.0.sync();
        }
    }
}

/// Removes the folders of tables that the catalog does not name: a drop that was cut short,
/// or a creation that never came to be. What cannot be removed is left for the next open.
fn remove_dropped_tables(dir: &Path, catalog: &Catalog) {
    let Ok(entries) = fs::read_dir(dir.join("tables")) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.parse::<TableId>().ok());
        if let Some(id) = id
            && !catalog.tables.iter().any(|t| t.id == id)
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// What an apply does, or would do: a plan for each definition, in the order given.
#[derive(Debug, Clone, PartialEq)]
pub struct Plans {
    /// For tables.
    pub tables: Vec<TablePlan>,
    /// For services.
    pub services: Vec<ServicePlan>,
}

impl Plans {
    fn change_nothing(&self) -> bool {
        let tables = self
            .tables
            .iter()
            .all(|p| matches!(p, TablePlan::Unchanged { .. }));
        tables
            && self
                .services
                .iter()
                .all(|p| matches!(p, ServicePlan::Unchanged { .. }))
    }
}

fn plan_all(
    catalog: &Catalog,
    tables: &[TableDefinition],
    services: &[ServiceDefinition],
) -> Result<Plans, ApplyError> {
    Ok(Plans {
        tables: plan(catalog, tables)?,
        services: services::plan(catalog, tables, services)?,
    })
}

fn plan(catalog: &Catalog, definitions: &[TableDefinition]) -> Result<Vec<TablePlan>, ApplyError> {
    let mut plans = Vec::with_capacity(definitions.len());
    for (i, new) in definitions.iter().enumerate() {
        if definitions[..i].iter().any(|d| d.name == new.name) {
            return Err(ApplyError::Duplicate {
                table: new.name.clone(),
            });
        }
        let old = catalog
            .tables
            .iter()
            .filter_map(TableEntry::current)
            .find(|v| v.definition.name == new.name);
        plans.push(match old {
            None => TablePlan::Create {
                table: new.name.clone(),
            },
            Some(old) if *old.definition == *new => TablePlan::Unchanged {
                table: new.name.clone(),
            },
            Some(old) => {
                let changes = plan_evolution(&old.definition, new).map_err(|source| {
                    ApplyError::Evolution {
                        table: new.name.clone(),
                        source,
                    }
                })?;
                TablePlan::Change {
                    table: new.name.clone(),
                    changes,
                }
            }
        });
    }
    Ok(plans)
}
