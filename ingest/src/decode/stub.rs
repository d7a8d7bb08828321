//! A schema registry for tests: answers what it was told, on a port of its own.
#![allow(dead_code)] // Each test uses some of it.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

/// A running registry; dropping it closes its port.
pub(crate) struct StubRegistry {
    port: u16,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    answers: Mutex<HashMap<String, String>>,
    authorization: Mutex<Option<String>>,
    requests: AtomicUsize,
    stopping: AtomicBool,
}

impl StubRegistry {
    pub(crate) fn start() -> StubRegistry {
        StubRegistry::start_on(0)
    }

    /// On that port, or a free one for 0.
    pub(crate) fn start_on(port: u16) -> StubRegistry {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("port");
        let port = listener.local_addr().expect("address").port();
        let shared = Arc::new(Shared::default());
        let served = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if served.stopping.load(Ordering::SeqCst) {
                    return;
                }
                served.answer(stream);
            }
        });
        StubRegistry {
            port,
            shared,
            thread: Some(thread),
        }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on `path` is answered with `body`.
    pub(crate) fn put(&self, path: &str, body: &str) {
        self.shared
            .answers
            .lock()
            .insert(format!("/{path}"), body.to_owned());
    }

    /// Registers a schema under a number.
    pub(crate) fn put_schema(&self, id: u32, language: &str, schema: &str) {
        let answer = serde_json::json!({ "schema": schema, "schemaType": language });
        self.put(&format!("schemas/ids/{id}"), &answer.to_string());
    }

    pub(crate) fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn last_authorization(&self) -> Option<String> {
        self.shared.authorization.lock().clone()
    }
}

impl Drop for StubRegistry {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn answer(&self, mut stream: TcpStream) {
        let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
        let mut request = Vec::new();
        let mut step = [0_u8; 1024];
        while !request.windows(4).any(|w| w == b"\r\n\r\n") {
            match stream.read(&mut step) {
                Ok(got) if got > 0 => request.extend_from_slice(&step[..got]),
                _ => return,
            }
        }
        self.requests.fetch_add(1, Ordering::SeqCst);
        let request = String::from_utf8_lossy(&request);
        let path = request.split(' ').nth(1).unwrap_or_default();
        *self.authorization.lock() = request
            .lines()
            .find_map(|line| line.strip_prefix("authorization: "))
            .map(str::to_owned);
        let (status, body) = match self.answers.lock().get(path) {
            Some(body) => ("200 OK", body.clone()),
            None => ("404 Not Found", r#"{"error_code":40403}"#.to_owned()),
        };
        let answer = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        let _ = stream.write_all(answer.as_bytes());
    }
}
