//! Metrics of the lane: the families of Flight's requests, with handles kept per connection,
//! because a lookup takes microseconds and looking a metric up takes some of them.

use std::time::Instant;

use metrics::{Counter, Histogram, counter, histogram};
use pinion_feature_store::Table;
use tonic::Code;

use super::frame::Request;
use crate::measure;

/// Counts the requests of one connection.
#[derive(Debug)]
pub(super) struct Meter {
    lookups: Counter,
    lookup_seconds: Histogram,
}

impl std::fmt::Debug for TableMeter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TableMeter").finish_non_exhaustive()
    }
}

impl Meter {
    pub(super) fn new() -> Meter {
        let method = Request::Lookup.method();
        Meter {
            lookups: counter!("pinion_requests_total", "method" => method, "code" => "OK"),
            lookup_seconds: histogram!("pinion_request_seconds", "method" => method),
        }
    }

    /// Counts a request that was answered.
    pub(super) fn count(&self, request: Request, code: Code, started: Instant) {
        let seconds = started.elapsed().as_secs_f64();
        if request == Request::Lookup && code == Code::Ok {
            self.lookups.increment(1);
            self.lookup_seconds.record(seconds);
            return;
        }
        let method = request.method();
        let code = measure::code_name(code);
        counter!("pinion_requests_total", "method" => method, "code" => code).increment(1);
        histogram!("pinion_request_seconds", "method" => method).record(seconds);
    }
}

/// Rows and bytes that left for one table.
pub(super) struct TableMeter {
    rows: Counter,
    bytes: Counter,
}

impl TableMeter {
    pub(super) fn new(table: &Table) -> TableMeter {
        let method = Request::Lookup.method();
        TableMeter {
            rows: counter!("pinion_rows_sent_total", "method" => method, "table" => table.name()),
            bytes: counter!("pinion_bytes_sent_total", "method" => method, "table" => table.name()),
        }
    }

    pub(super) fn sent(&self, rows: u64, bytes: u64) {
        self.rows.increment(rows);
        self.bytes.increment(bytes);
    }
}
