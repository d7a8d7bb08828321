//! The HTTP admin port: `/livez`, `/readyz`, `/metrics`. Plain text, no writes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics::{counter, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use pinion_feature_store::TableStats;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::serve::ServeError;
use crate::service::SharedContext;

/// Seconds: from tens of microseconds to ten seconds.
const BUCKETS_SECONDS: &[f64] = &[
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0,
];

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Makes this process record metrics, for `/metrics` to show. Called by [`crate::serve`];
/// call it earlier to count what happens before. Later calls do nothing.
pub fn install_metrics() {
    metrics_handle();
}

fn metrics_handle() -> &'static PrometheusHandle {
    RECORDER.get_or_init(|| {
        let builder = PrometheusBuilder::new();
        // The only error is an empty list of buckets.
        let recorder = match builder.set_buckets(BUCKETS_SECONDS) {
            Ok(builder) => builder.build_recorder(),
            Err(_) => PrometheusBuilder::new().build_recorder(),
        };
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is installed; /metrics shows nothing");
        }
        handle
    })
}

/// How often values that histograms collected are added up when nobody looks at `/metrics`:
/// until then each takes memory of its own.
const UPKEEP: Duration = Duration::from_secs(5);

/// Keeps the memory of metrics bounded until `stopped` says so.
pub(crate) async fn upkeep(mut stopped: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(UPKEEP) => {}
            _ = stopped.wait_for(|stopped| *stopped) => return,
        }
        if let Some(handle) = RECORDER.get() {
            handle.run_upkeep();
        }
    }
}

#[derive(Clone)]
struct Admin {
    context: SharedContext,
    ready: Arc<AtomicBool>,
}

/// Serves the admin port until `stopped` says so.
pub(crate) async fn serve(
    listener: TcpListener,
    context: SharedContext,
    ready: Arc<AtomicBool>,
    mut stopped: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    install_metrics();
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(show_metrics))
        .with_state(Admin { context, ready });
    axum::serve(listener, router)
        .with_graceful_shutdown(async move {
            let _ = stopped.wait_for(|stopped| *stopped).await;
        })
        .await
        .map_err(|source| ServeError::Serve {
            what: "admin",
            source: source.into(),
        })
}

/// 200 while requests are served, 503 before and after. A table that takes no writes is
/// named, and still served.
async fn readyz(State(admin): State<Admin>) -> (StatusCode, String) {
    if !admin.ready.load(Ordering::Acquire) {
        return (StatusCode::SERVICE_UNAVAILABLE, "not serving\n".to_owned());
    }
    let read_only: String = admin
        .context
        .store
        .tables()
        .iter()
        .map(|table| table.stats())
        .filter_map(|stats| {
            let cause = stats.read_only?;
            Some(format!(
                "degraded: table {} is read-only: {cause}\n",
                stats.table
            ))
        })
        .collect();
    (StatusCode::OK, format!("{read_only}ok\n"))
}

async fn show_metrics(State(admin): State<Admin>) -> impl IntoResponse {
    for table in admin.context.store.tables() {
        record_table(&table.stats());
    }
    if let Some(sources) = &admin.context.hooks.sources {
        sources.record_metrics();
    }
    if let Some(pins) = &admin.context.hooks.pins {
        pins.record_metrics();
    }
    let open = admin.context.config.max_scans - admin.context.scans.available_permits();
    gauge!("pinion_scans_open").set(open as f64);
    let leases = admin.context.leases.totals();
    gauge!("pinion_leases").set(leases.leases as f64);
    gauge!("pinion_leases_overdue").set(leases.overdue as f64);
    gauge!("pinion_leased_bytes").set(leases.bytes as f64);
    let handle = metrics_handle();
    handle.run_upkeep();
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        handle.render(),
    )
}

fn record_table(stats: &TableStats) {
    let table = || stats.table.clone();
    let superseded: u64 = stats.segments.iter().map(|s| s.superseded_rows).sum();
    gauge!("pinion_table_rows", "table" => table()).set(stats.rows as f64);
    gauge!("pinion_table_sequence", "table" => table()).set(stats.next_sequence as f64);
    gauge!("pinion_table_segments", "table" => table()).set(stats.segments.len() as f64);
    gauge!("pinion_table_superseded_rows", "table" => table()).set(superseded as f64);
    gauge!("pinion_table_log_rows", "table" => table()).set(stats.log_rows as f64);
    gauge!("pinion_table_log_bytes", "table" => table()).set(stats.log_bytes as f64);
    gauge!("pinion_table_bytes", "table" => table()).set(stats.bytes as f64);
    gauge!("pinion_table_dead_letters", "table" => table()).set(stats.dead_letters as f64);
    gauge!("pinion_table_read_only", "table" => table()).set(if stats.read_only.is_some() {
        1.0
    } else {
        0.0
    });
    counter!("pinion_table_merges_total", "table" => table()).absolute(stats.merges);
    counter!("pinion_table_segment_bytes_written_total", "table" => table())
        .absolute(stats.segment_bytes_written);
    counter!("pinion_table_log_bytes_written_total", "table" => table())
        .absolute(stats.log_bytes_written);
}
