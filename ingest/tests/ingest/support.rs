//! A broker with one topic, an empty store, and waiting for what is to come.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use pinion_feature_store::{Commit, Position, ScanRequest, Store, StoreOptions, Table};
use pinion_ingest::{Ingest, IngestConfig, IngestHandle, SourceState};
use pinion_schemas::TableDefinition;
use rdkafka::ClientConfig;
use rdkafka::message::ToBytes;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};

/// The topic.
pub const TOPIC: &str = "events";

/// A mock cluster with [`TOPIC`], and a store of its own.
pub struct Bench {
    pub cluster: MockCluster<'static, DefaultProducerContext>,
    /// The next offset of every partition that has records.
    pub produced: BTreeMap<i32, i64>,
    pub producer: BaseProducer,
    dir: tempfile::TempDir,
}

impl Bench {
    pub fn new(partitions: i32, brokers: i32) -> Bench {
        let cluster = MockCluster::new(brokers).expect("mock cluster");
        cluster
            .create_topic(TOPIC, partitions, brokers)
            .expect("topic");
        let producer = ClientConfig::new()
            .set("bootstrap.servers", cluster.bootstrap_servers())
            .set("linger.ms", "0")
            .set("reconnect.backoff.max.ms", "100")
            .create()
            .expect("producer");
        let dir = tempfile::tempdir().expect("directory");
        Store::init(dir.path()).expect("init");
        Bench {
            cluster,
            produced: BTreeMap::new(),
            producer,
            dir,
        }
    }

    pub fn open(&self) -> Store {
        self.open_with(StoreOptions::default())
    }

    pub fn open_with(&self, options: StoreOptions) -> Store {
        Store::open(self.dir.path(), options).expect("open")
    }

    /// Settings under which a test waits for little.
    pub fn config(&self) -> IngestConfig {
        IngestConfig {
            brokers: Some(self.cluster.bootstrap_servers()),
            fetch_wait: Duration::from_millis(10),
            catalog_poll: Duration::from_millis(20),
            discovery_interval: Duration::from_millis(500),
            request_timeout: Duration::from_secs(2),
            min_free_disk: Some(1),
            ..IngestConfig::default()
        }
    }

    pub fn start(&self, store: &Store) -> IngestHandle {
        Ingest::start(store.clone(), self.config()).expect("ingest")
    }

    /// Sends a record to the partition that it names.
    pub fn produce<K, P>(&mut self, record: BaseRecord<'_, K, P>)
    where
        K: ToBytes + ?Sized,
        P: ToBytes + ?Sized,
    {
        let partition = record.partition.expect("a partition");
        let sent = self.producer.send(record);
        sent.map_err(|(e, _)| e).expect("send");
        *self.produced.entry(partition).or_default() += 1;
    }

    /// Waits until the brokers have all of it.
    pub fn flush(&self) {
        self.producer.flush(Duration::from_secs(20)).expect("flush");
    }

    /// Whether a table has all of it.
    pub fn is_read(&self, table: &Table) -> bool {
        let positions = table.positions();
        let mut produced = self.produced.iter();
        produced.all(|(p, end)| positions.next_offset(TOPIC, *p) == Some(*end))
    }
}

/// Applies a definition and returns its table.
pub fn apply(store: &Store, text: &str) -> Table {
    let definition = TableDefinition::parse_toml(text).expect("definition");
    let name = definition.name.clone();
    store.apply(vec![definition]).expect("apply");
    store.table(&name).expect("table")
}

/// Puts a table that has read the topic somewhere else in it, existing or not.
pub fn place(table: &Table, partition: i32, next_offset: i64, leader_epoch: Option<i32>) {
    let positions = table.positions();
    let position = Position {
        topic: TOPIC.to_owned(),
        topic_id: positions.topic_id(TOPIC).expect("a topic id").to_owned(),
        partition,
        next_offset,
        leader_epoch,
    };
    let commit = Commit {
        positions: vec![position],
        ..Commit::default()
    };
    table.commit(commit).expect("commit");
}

/// The values of the feature `v`, in order.
pub fn values(table: &Table) -> Vec<Option<i64>> {
    let request = ScanRequest {
        columns: Some(vec!["v".to_owned()]),
        ..ScanRequest::default()
    };
    let mut found = Vec::new();
    for scanned in table.snapshot().scan(&request).expect("scan") {
        let batch = scanned.expect("batch").batch;
        found.extend(batch.column(0).as_primitive::<Int64Type>().iter());
    }
    found.sort_unstable();
    found
}

/// What a table's source does; `None` while it has none.
pub fn state(ingest: &IngestHandle, table: &str) -> Option<SourceState> {
    let mut tables = ingest.status().into_iter().flat_map(|s| s.tables);
    tables.find(|t| t.table == table).map(|t| t.state)
}

/// Waits half a minute at most.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "timed out waiting for {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
