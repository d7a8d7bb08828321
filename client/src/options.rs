//! Limits and sizes of a client.

use std::time::Duration;

/// How a client connects and what it takes. `ClientOptions::default()` suits a model server.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ClientOptions {
    /// Largest reply message, bytes. Default 256 MiB: Pinion's stay under 4 MiB unless asked
    /// otherwise, other servers send what they like.
    pub max_message_bytes: u64,
    /// Bytes of one reply that may be under way before they are read. Default 16 MiB. Together
    /// with the message being read it bounds what a stream holds that nobody reads.
    pub stream_window_bytes: u32,
    /// As `stream_window_bytes`, for all streams of a connection together. Default 32 MiB.
    pub connection_window_bytes: u32,
    /// Largest HTTP/2 frame that the server may send, 16 KiB to 16 MiB - 1. Default 112 KiB:
    /// large enough to cost few calls, and below the 128 KiB from which the C library takes memory
    /// from the system anew, page by page: with frames of 256 KiB most scans took twice the time.
    pub max_frame_bytes: u32,
    /// Free receive memory that is kept for the next messages. Default 64 MiB.
    pub pool_bytes: usize,
    /// How long connecting may take. Default 10 s.
    pub connect_timeout: Duration,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            max_message_bytes: 256 << 20,
            stream_window_bytes: 16 << 20,
            connection_window_bytes: 32 << 20,
            max_frame_bytes: 112 << 10,
            pool_bytes: 64 << 20,
            connect_timeout: Duration::from_secs(10),
        }
    }
}
