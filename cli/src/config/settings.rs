//! Every setting there is: its name, kind, default and meaning.

/// How a setting's value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file or directory.
    Path,
    /// Text without further rules.
    Text,
    /// `true` or `false`.
    Switch,
    /// A whole number.
    Count,
    /// Bytes: a whole number, or text such as `"64 MiB"`.
    Bytes,
    /// A length of time: text such as `"10m"` or `"500ms"`.
    Duration,
    /// One of a few words.
    Word(&'static [&'static str]),
    /// A list of texts; in the environment and in flags split at commas.
    List,
}

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// `section.key`, or `key` outside any section.
    pub path: &'static str,
    /// How it is written.
    pub kind: Kind,
    /// Its value when nobody sets it; `None`: unset.
    pub default: Option<&'static str>,
    /// What it does.
    pub about: &'static str,
}

const fn setting(
    path: &'static str,
    kind: Kind,
    default: Option<&'static str>,
    about: &'static str,
) -> Setting {
    Setting {
        path,
        kind,
        default,
        about,
    }
}

/// The section whose keys are not listed here: they go to librdkafka as they are.
pub const KAFKA_OPTIONS: &str = "kafka.options";

/// All settings, in the order `pinion config` prints them.
pub const SETTINGS: &[Setting] = &[
    setting("data", Kind::Path, None, "Data directory to work on"),
    setting(
        "server",
        Kind::Text,
        None,
        "Server to talk to: grpc://HOST:PORT or grpc+unix:///PATH",
    ),
    setting(
        "output",
        Kind::Word(&["table", "json", "csv", "arrow"]),
        Some("table"),
        "Form of the output",
    ),
    setting(
        "log.level",
        Kind::Text,
        Some("info"),
        "What a server logs: error, warn, info, debug, trace, or a tracing filter",
    ),
    setting(
        "log.format",
        Kind::Word(&["text", "json"]),
        Some("text"),
        "Form of the log lines",
    ),
    setting(
        "serve.flight",
        Kind::List,
        Some("127.0.0.1:8815"),
        "Addresses of Arrow Flight; \"none\" for no TCP at all",
    ),
    setting("serve.uds", Kind::Path, None, "Unix socket of Arrow Flight"),
    setting(
        "serve.admin",
        Kind::Text,
        None,
        "Address of health, readiness and metrics over HTTP",
    ),
    setting(
        "serve.insecure",
        Kind::Switch,
        Some("false"),
        "Allow addresses other than loopback, without authentication",
    ),
    setting(
        "serve.ready_file",
        Kind::Path,
        None,
        "File that names the bound addresses once the server is ready",
    ),
    setting(
        "serve.max_message_bytes",
        Kind::Bytes,
        None,
        "Largest message sent unless a request asks for more",
    ),
    setting(
        "serve.sendfile",
        Kind::Word(&["auto", "on", "off"]),
        Some("auto"),
        "Send mapped rows over the Unix socket by sendfile",
    ),
    setting(
        "lane.path",
        Kind::Path,
        None,
        "Unix socket of the local lane: lookups and mapped tables for this machine",
    ),
    setting(
        "lane.max_connections",
        Kind::Count,
        None,
        "Connections of the local lane at once; each holds a thread",
    ),
    setting(
        "lane.max_request_bytes",
        Kind::Bytes,
        None,
        "Largest request over the local lane",
    ),
    setting(
        "lane.spin_micros",
        Kind::Count,
        None,
        "How long a lane connection looks for its next request before it sleeps",
    ),
    setting(
        "lane.priority",
        Kind::Count,
        None,
        "How far the lane's threads stand above the rest of the server: lowers their nice value (CAP_SYS_NICE)",
    ),
    setting(
        "lane.lease_term",
        Kind::Duration,
        None,
        "How long a lease of mapped files runs before it is overdue",
    ),
    setting(
        "lane.leased_max_bytes",
        Kind::Bytes,
        None,
        "Disk that leased files may hold",
    ),
    setting(
        "store.delta_max_bytes",
        Kind::Bytes,
        None,
        "A log of this size becomes a segment",
    ),
    setting(
        "store.delta_max_rows",
        Kind::Count,
        None,
        "A log of this many rows becomes a segment",
    ),
    setting(
        "store.snapshot_grace",
        Kind::Duration,
        None,
        "How long a replaced snapshot stays usable",
    ),
    setting(
        "store.retained_max_bytes",
        Kind::Bytes,
        None,
        "Disk that replaced snapshots may hold",
    ),
    setting("store.put_max_bytes", Kind::Bytes, None, "Largest commit"),
    setting(
        "store.sync_interval",
        Kind::Duration,
        None,
        "How often logs are synced in the background",
    ),
    setting(
        "store.max_segments",
        Kind::Count,
        None,
        "Segments of a table at rest",
    ),
    setting(
        "load.memory_bytes",
        Kind::Bytes,
        Some("512 MiB"),
        "Memory a bulk load sorts in",
    ),
    setting(
        "gds.load_path",
        Kind::Word(&["auto", "direct", "bounce", "host"]),
        Some("auto"),
        "Fastest way to load device memory; slower ones are taken where it does not work",
    ),
    setting(
        "gds.require",
        Kind::Word(&["direct", "bounce", "host"]),
        None,
        "With a load path slower than this one the server does not start",
    ),
    setting(
        "gds.cufile",
        Kind::Path,
        None,
        "libcufile.so.0 to use; when unset it is looked for",
    ),
    setting(
        "gds.budget_bytes",
        Kind::Bytes,
        None,
        "Memory of each device that pins may hold",
    ),
    setting(
        "gds.stale_max_bytes",
        Kind::Bytes,
        Some("16 GiB"),
        "Disk that lent pins may keep of segments that their tables use no more",
    ),
    setting(
        "gds.pinned_max_bytes",
        Kind::Bytes,
        None,
        "Pinned host memory that loads may hold",
    ),
    setting(
        "gds.probe_binary",
        Kind::Path,
        None,
        "Program that asks the GPU's drivers in a process of its own; when unset this one",
    ),
    setting(
        "kafka.brokers",
        Kind::Text,
        None,
        "Brokers of tables that name none: HOST:PORT,...",
    ),
    setting(
        "kafka.registry",
        Kind::Text,
        None,
        "URL of the schema registry of tables that name none: http://HOST:PORT",
    ),
    setting(
        "kafka.instance",
        Kind::Text,
        None,
        "Name in consumer groups, for lag monitors",
    ),
    setting(
        "kafka.monitors",
        Kind::Switch,
        Some("false"),
        "Tell the brokers the positions, as offsets of groups pinion.<instance>.<table>",
    ),
    setting(
        "kafka.value_max_bytes",
        Kind::Bytes,
        Some("1 MiB"),
        "Largest value that is decoded (Arrow: 64 times that); larger ones become dead letters",
    ),
    setting(
        "kafka.queue_bytes",
        Kind::Bytes,
        Some("16 MiB"),
        "Records that each source may hold prefetched",
    ),
    setting(
        "kafka.memory_bytes",
        Kind::Bytes,
        Some("1 GiB"),
        "Memory of streams: prefetched records, and rows in logs; sources wait beyond it",
    ),
    setting(
        "kafka.min_free_disk",
        Kind::Bytes,
        None,
        "Sources wait while the disk has less free; a twentieth of it, at most 1 GiB, when unset",
    ),
    setting(
        "kafka.secrets_dir",
        Kind::Path,
        None,
        "Where options of tables may name files with secrets",
    ),
];

/// The setting of that name.
pub fn find(path: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.path == path)
}

/// The name nearest to `path`, when one is near enough to have been meant.
pub fn nearest(path: &str) -> Option<&'static str> {
    SETTINGS
        .iter()
        .map(|setting| (strsim::jaro_winkler(path, setting.path), setting.path))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}
