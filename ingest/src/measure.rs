//! Metrics of the sources. Names and labels are stable: dashboards use them.
//!
//! The source's threads count in memory of their own; here that is handed to the recorder when
//! somebody looks. So the histograms are counters with a label `le`, as Prometheus spells them.

use metrics::{counter, gauge};

use crate::freshness::Buckets;
use crate::status::{SourceState, SourceStatus, TableProgress};

/// Hands the figures of all sources to the recorder.
pub(crate) fn record(sources: &[SourceStatus]) {
    for source in sources {
        for table in &source.tables {
            record_table(source, table);
        }
    }
}

fn record_table(source: &SourceStatus, progress: &TableProgress) {
    let labels = || {
        [
            ("table", progress.table.clone()),
            ("topic", source.topic.clone()),
        ]
    };
    for (name, count) in [
        ("pinion_source_rows_total", progress.rows),
        ("pinion_source_deletes_total", progress.deletes),
        ("pinion_source_late_rows_total", progress.late),
        ("pinion_source_dead_letters_total", progress.dead_letters),
        ("pinion_source_filtered_total", progress.filtered),
        ("pinion_source_duplicates_total", progress.duplicates),
    ] {
        counter!(name, &labels()).absolute(count);
    }
    gauge!("pinion_source_lag_seconds", &labels()).set(progress.lag_seconds);
    let running = matches!(progress.state, SourceState::Running);
    gauge!("pinion_source_running", &labels()).set(if running { 1.0 } else { 0.0 });
    for (partition, next) in &progress.positions {
        let mut labels = labels().to_vec();
        labels.push(("partition", partition.to_string()));
        gauge!("pinion_source_position", &labels).set(*next as f64);
        if let Some(end) = source.end_offsets.get(partition) {
            gauge!("pinion_source_lag_records", &labels)
                .set(end.saturating_sub(*next).max(0) as f64);
        }
    }
    let Some(freshness) = &progress.freshness else {
        return;
    };
    for (partition, figures) in freshness.partitions() {
        let labels = vec![
            ("table", progress.table.clone()),
            ("partition", partition.to_string()),
        ];
        counter!("pinion_freshness_skewed_total", &labels).absolute(figures.skewed);
        counter!("pinion_freshness_backlog_total", &labels).absolute(figures.backlog);
        histogram(
            "pinion_freshness_received_seconds",
            &labels,
            &figures.received,
        );
        for (kind, buckets) in &figures.record {
            let mut labels = labels.clone();
            labels.push(("timestamp", kind.name().to_owned()));
            histogram("pinion_freshness_record_seconds", &labels, buckets);
        }
    }
}

fn histogram(name: &str, labels: &[(&'static str, String)], buckets: &Buckets) {
    for (bound, count) in buckets.cumulative() {
        let mut labels = labels.to_vec();
        labels.push((
            "le",
            bound.map_or_else(|| "+Inf".to_owned(), |b| b.to_string()),
        ));
        counter!(format!("{name}_bucket"), &labels).absolute(count);
    }
    counter!(format!("{name}_count"), labels).absolute(buckets.count());
    gauge!(format!("{name}_sum"), labels).set(buckets.sum_seconds);
}
