//! Counters and histograms of requests. Names and labels are stable: dashboards use them.

use std::time::Instant;

use metrics::{Gauge, counter, gauge, histogram};
use pinion_feature_store::{ReadError, Scan, ScanBatch};
use tonic::Code;

/// One request while it runs. Dropping it without [`Request::finish`] counts as cancelled.
pub(crate) struct Request {
    method: &'static str,
    started: Instant,
    finished: bool,
}

impl Request {
    pub(crate) fn start(method: &'static str) -> Request {
        gauge!("pinion_requests_in_flight", "method" => method).increment(1.0);
        Request {
            method,
            started: Instant::now(),
            finished: false,
        }
    }

    pub(crate) fn finish(mut self, code: Code) {
        self.record(code);
    }

    fn record(&mut self, code: Code) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        gauge!("pinion_requests_in_flight", "method" => self.method).decrement(1.0);
        counter!("pinion_requests_total", "method" => self.method, "code" => code_name(code))
            .increment(1);
        histogram!("pinion_request_seconds", "method" => self.method)
            .record(self.started.elapsed().as_secs_f64());
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.record(Code::Cancelled);
    }
}

/// Rows and bytes that left for one table.
pub(crate) fn sent(method: &'static str, table: &str, rows: u64, bytes: u64) {
    counter!("pinion_rows_sent_total", "method" => method, "table" => table.to_owned())
        .increment(rows);
    counter!("pinion_bytes_sent_total", "method" => method, "table" => table.to_owned())
        .increment(bytes);
}

/// Body bytes of DoGet replies, by how they left.
pub(crate) fn handed_over(referenced: u64, copied: u64) {
    counter!("pinion_scan_body_bytes_total", "how" => "referenced").increment(referenced);
    counter!("pinion_scan_body_bytes_total", "how" => "copied").increment(copied);
}

/// Bytes of DoGet replies that were handed to HTTP/2 and are not written yet.
pub(crate) fn bytes_in_flight() -> Gauge {
    gauge!("pinion_scan_bytes_in_flight")
}

/// A scan that counts what it looked at once it is over, finished or not.
pub(crate) struct CountedScan(pub(crate) Scan);

impl Iterator for CountedScan {
    type Item = Result<ScanBatch, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()
    }
}

impl Drop for CountedScan {
    fn drop(&mut self) {
        let table = self.0.snapshot().table().to_owned();
        let figures = self.0.figures();
        counter!("pinion_scan_batches_read_total", "table" => table.clone())
            .increment(figures.batches_read);
        counter!("pinion_scan_batches_skipped_total", "table" => table.clone())
            .increment(figures.batches_skipped);
        counter!("pinion_scan_rows_examined_total", "table" => table)
            .increment(figures.rows_examined);
    }
}

/// Rows that a put committed.
pub(crate) fn put(table: &str, rows: u64) {
    counter!("pinion_put_rows_total", "table" => table.to_owned()).increment(rows);
}

/// The name of a code in labels.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
