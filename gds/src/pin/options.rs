//! Sizes and bounds of pins.

use std::time::Duration;

pub use super::columns::Headroom;

/// See the fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinOptions {
    /// Bytes that pins may take of each device; `None`: nine tenths of what is free at the start.
    /// Never more than is free then, since consumers of an earlier server may hold old pins.
    pub budget_bytes: Option<u64>,
    /// Bytes of disk that pins whose files are lent may keep of segments that their tables use no
    /// more. Over it such pins are evicted, those that nobody has mapped, the longest unused
    /// first.
    pub stale_max_bytes: u64,
    /// Room of fresh pins beyond what they hold.
    pub headroom: Headroom,
    /// Changes of rows that are kept per pin to answer for older generations that are leased. A
    /// change that alone takes more is not kept, and no generation before it answered for.
    pub journal_max_bytes: usize,
    /// Edits that are kept per pin for slots that are leased; slots further behind are copied. A
    /// change whose rows and edits take more of the host fills the pin anew.
    pub edits_max_bytes: u64,
    /// A change of more rows than this, gone ones too, and than half of the table, fills the pin
    /// anew.
    pub refill_over_rows: u64,
    /// Least time between two generations of a pin.
    pub min_interval: Duration,
    /// How long to wait after a failure before the next try; twice as long after each further one
    /// in a row, up to a minute.
    pub retry_after: Duration,
    /// Refresh, and look after lent files, on threads. Without them the caller does, with
    /// [`super::Pins::refresh`].
    pub background: bool,
}

impl Default for PinOptions {
    fn default() -> PinOptions {
        PinOptions {
            budget_bytes: None,
            stale_max_bytes: 16 << 30,
            headroom: Headroom::default(),
            journal_max_bytes: 64 << 20,
            edits_max_bytes: 256 << 20,
            refill_over_rows: 1 << 16,
            min_interval: Duration::from_millis(5),
            retry_after: Duration::from_millis(500),
            background: true,
        }
    }
}

impl PinOptions {
    /// What a layout must have over for a refill to stay in it.
    pub(crate) fn refill_headroom(&self) -> Headroom {
        Headroom {
            rows_percent: 0,
            rows: 0,
            parts_percent: self.headroom.parts_percent / 4,
            parts: self.headroom.parts / 4,
        }
    }
}
