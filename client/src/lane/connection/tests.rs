use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// Greets and echoes; counts connections.
fn echo(listener: UnixListener, connections: Arc<AtomicUsize>) {
    for stream in listener.incoming() {
        connections.fetch_add(1, Ordering::SeqCst);
        let mut stream = stream.unwrap();
        std::thread::spawn(move || {
            let mut header = [0; HEADER_BYTES];
            while stream.read_exact(&mut header).is_ok() {
                let hello = header[4] == Kind::Hello as u8;
                let length = Header::read(&header).payload_bytes as usize;
                let mut payload = vec![0; length];
                stream.read_exact(&mut payload).unwrap();
                if hello {
                    header[12] = 1;
                    payload = b"{}".to_vec();
                    header[0] = 2;
                }
                header[4] |= 128;
                stream.write_all(&header).unwrap();
                stream.write_all(&payload).unwrap();
            }
        });
    }
}

fn ping(connection: &mut Connection) {
    connection.ensure().unwrap();
    connection
        .request(Kind::Ping, 0, 0, b"ping", Kind::Pong)
        .unwrap();
}

#[test]
fn a_forked_child_leaves_its_parents_connection_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lane.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    std::thread::spawn(move || echo(listener, counted));
    let mut connection = Connection::new(path, None);
    ping(&mut connection);
    assert_eq!(connections.load(Ordering::SeqCst), 1);

    // As a child finds it: connected, with a reply under way, by another process.
    let parents = connection.socket.as_mut().unwrap();
    parents.process += 1;
    let parents = parents.stream.get_ref().try_clone().unwrap();
    connection.in_flight.push_back(InFlight {
        request_id: 1,
        index: 0,
        rows: 1,
        bytes: 1,
    });
    let error = connection.rows_header(1 << 20).unwrap_err();
    assert!(error.to_string().contains("forked"), "{error}");
    ping(&mut connection);
    assert_eq!(connections.load(Ordering::SeqCst), 2);
    // The parent's is still open, and nothing was read from it or written to it.
    parents.set_nonblocking(true).unwrap();
    let mut byte = [0];
    let error = (&parents).read(&mut byte).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}
