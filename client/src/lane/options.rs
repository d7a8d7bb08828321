//! Limits and sizes of a lane client.

use std::time::Duration;

/// How a lane client connects and what it takes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LaneOptions {
    /// How long to wait for the socket to take or give anything; `None`: for ever. Default
    /// 90 s: a lookup may wait for a barrier for up to 60.
    pub timeout: Option<Duration>,
    /// Largest reply, bytes. Default 256 MiB.
    pub max_reply_bytes: usize,
    /// Free receive memory that is kept for the next replies. Default 64 MiB.
    pub pool_bytes: usize,
}

impl Default for LaneOptions {
    fn default() -> LaneOptions {
        LaneOptions {
            timeout: Some(Duration::from_secs(90)),
            max_reply_bytes: 256 << 20,
            pool_bytes: 64 << 20,
        }
    }
}
