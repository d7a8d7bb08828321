//! Reads a table from a Flight server again and again, by this client or by arrow-flight's, and
//! prints one JSON object a pass: rows, bytes, seconds, and the CPU this process used.
//!
//! Both validate what they read. `bytes` are the Arrow bytes of the rows.

mod support;

use std::path::PathBuf;
use std::time::Instant;

use arrow_array::{Array, RecordBatch};
use arrow_flight::Ticket;
use arrow_flight::decode::FlightRecordBatchStream;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_client::FlightServiceClient;
use futures::{StreamExt, TryStreamExt};
use hyper_util::rt::TokioIo;
use pinion_client::{Address, Client, ClientOptions, Scan};
use serde_json::json;
use support::{Arguments, cpu_seconds};
use tonic::transport::{Channel, Endpoint};

const USAGE: &str = "scan_bench: a table from a Flight server, again and again

  --url grpc://HOST:PORT  or grpc+unix:///PATH
  --table name            the table
  --ticket text           instead of the table: the ticket's bytes
  --via pinion            or arrow-flight: which client (default pinion)
  --passes n              how often (default 5)
  --parallel n            connections that read endpoints side by side (default 1; pinion)
  --window-mib n          HTTP/2 window of a stream (default 16)
  --frame-kib n           largest HTTP/2 frame (default 112; pinion)
  --threads n             threads of the runtime (default 2)
";

#[derive(Default)]
struct Pass {
    rows: usize,
    bytes: usize,
    batches: usize,
}

impl Pass {
    fn count(&mut self, batch: &RecordBatch) {
        self.rows += batch.num_rows();
        self.batches += 1;
        for column in batch.columns() {
            self.bytes += column.to_data().get_slice_memory_size().unwrap_or(0);
        }
    }
}

fn main() {
    let arguments = Arguments::parse(USAGE);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(arguments.number("threads", 2))
        .enable_all()
        .build()
        .expect("cannot start a runtime");
    // On a worker, so that both clients' reader and connection are tasks alike.
    runtime.block_on(async {
        tokio::spawn(run(arguments)).await.expect("a pass failed");
    });
}

async fn run(arguments: Arguments) {
    let url = arguments.needed("url");
    let via = arguments.text("via").unwrap_or("pinion");
    let ticket = match (arguments.text("ticket"), arguments.text("table")) {
        (Some(ticket), _) => ticket.to_owned(),
        (None, table) => Scan::table(table.unwrap_or_default()).to_json(),
    };
    let window = arguments.number::<u32>("window-mib", 16) << 20;
    let parallel: usize = arguments.number("parallel", 1);
    let mut options = ClientOptions::default();
    options.max_message_bytes = u32::MAX.into();
    options.stream_window_bytes = window;
    options.connection_window_bytes = window.saturating_mul(2);
    options.max_frame_bytes = arguments.number::<u32>("frame-kib", 112) << 10;
    let ours = Client::connect_with(url, options)
        .await
        .expect("cannot connect");
    let theirs =
        FlightServiceClient::new(channel(url, window).await).max_decoding_message_size(usize::MAX);
    for pass in 0..arguments.number::<usize>("passes", 5) {
        let (began, cpu) = (Instant::now(), cpu_seconds());
        let read = match via {
            "pinion" if parallel > 1 => {
                let scan = Scan::table(arguments.needed("table")).parallel(parallel);
                let mut stream = ours.scan(&scan).await.expect("cannot scan");
                let mut read = Pass::default();
                while let Some(batch) = stream.next().await {
                    read.count(&batch.expect("cannot read"));
                }
                read
            }
            "pinion" => {
                let mut stream = ours.get(ticket.clone()).await.expect("cannot scan");
                let mut read = Pass::default();
                while let Some(batch) = stream.next().await {
                    read.count(&batch.expect("cannot read"));
                }
                read
            }
            "arrow-flight" => {
                let ticket = Ticket::new(ticket.clone());
                let mut client = theirs.clone();
                let replies = client
                    .do_get(ticket)
                    .await
                    .expect("cannot scan")
                    .into_inner();
                let mut stream = FlightRecordBatchStream::new_from_flight_data(
                    replies.map_err(FlightError::from),
                );
                let mut read = Pass::default();
                while let Some(batch) = stream.next().await {
                    read.count(&batch.expect("cannot read"));
                }
                read
            }
            other => panic!("--via {other}: pinion or arrow-flight"),
        };
        let (seconds, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        println!(
            "{}",
            json!({
                "via": via, "pass": pass, "rows": read.rows, "batches": read.batches,
                "bytes": read.bytes, "seconds": seconds, "client_cpu_seconds": cpu,
                "gigabytes_per_second": read.bytes as f64 / 1e9 / seconds,
            })
        );
    }
}

async fn channel(url: &str, window: u32) -> Channel {
    let windows = |endpoint: Endpoint| {
        endpoint
            .initial_stream_window_size(window)
            .initial_connection_window_size(window.saturating_mul(2))
    };
    let connected = match url.parse::<Address>().expect("no URL of a server") {
        Address::Tcp(host) => {
            let endpoint = Endpoint::from_shared(format!("http://{host}")).expect("no URL");
            windows(endpoint).tcp_nodelay(true).connect().await
        }
        Address::Unix(path) => {
            let connector = tower::service_fn(move |_| {
                let path: PathBuf = path.clone();
                async move {
                    let stream = tokio::net::UnixStream::connect(path).await?;
                    Ok::<_, std::io::Error>(TokioIo::new(stream))
                }
            });
            windows(Endpoint::from_static("http://localhost"))
                .connect_with_connector(connector)
                .await
        }
        other => panic!("{other}: no Flight server"),
    };
    connected.expect("cannot connect")
}
