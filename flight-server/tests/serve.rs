//! The server itself: health, admin port, shutdown, slow readers, exposure.

mod common;

use std::time::Duration;

use arrow_flight::Ticket;
use common::*;
use futures::StreamExt;
use pinion_feature_store::{Store, StoreOptions};
use pinion_flight_server::{Hooks, ServeError, ServerConfig, serve};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

async fn http_get(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    reply
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_serving_and_the_admin_port_answers() {
    let server = TestServer::with_rows().await;
    let channel = uds_channel(server.addresses.uds.clone().unwrap()).await;
    let mut health = HealthClient::new(channel);
    let request = HealthCheckRequest {
        service: String::new(),
    };
    assert_eq!(health.check(request).await.unwrap().into_inner().status, 1);
    let admin = server.addresses.admin.unwrap();
    assert!(http_get(admin, "/livez").await.starts_with("HTTP/1.1 200"));
    assert!(http_get(admin, "/readyz").await.starts_with("HTTP/1.1 200"));
    let metrics = http_get(admin, "/metrics").await;
    assert!(
        metrics.contains("pinion_table_rows{table=\"weather\"} 3"),
        "{metrics}"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_removes_the_socket_and_cuts_off_streams_that_do_not_end() {
    let server = TestServer::with_rows().await;
    let socket = server.addresses.uds.clone().unwrap();
    let mut client = server.client().await;
    let endless = futures::stream::iter(upload(
        command(json!({"lookup": {"features": ["weather:temp"]}})),
        vec![keys("origin", &["EWR"])],
    ))
    .chain(futures::stream::pending());
    let mut replies = client.do_exchange(endless).await.unwrap().into_inner();
    replies.next().await.unwrap().unwrap();
    let stopped = tokio::time::timeout(Duration::from_secs(8), server.stop()).await;
    assert!(stopped.is_ok(), "the server did not stop");
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stops_reading_holds_no_more_than_its_scan_and_others_go_on() {
    let server = TestServer::start_with(|config| {
        config.max_scans = 2;
        config.reader_idle = Duration::from_millis(300);
    })
    .await;
    server.apply(&[PLANES]).await.unwrap();
    let mut client = server.client().await;
    let names: Vec<String> = (0..400_000).map(|i| format!("N{i:06}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    put(&mut client, "planes", planes(&names)).await.unwrap();

    let ticket = || Ticket::new(json!({"scan": {"table": "planes"}}).to_string());
    let mut idle_client = server.client().await;
    let idle = idle_client.do_get(ticket()).await.unwrap().into_inner();
    let mut other = server.uds_client().await;
    assert_eq!(
        get(&mut other, ticket().ticket).await.unwrap().rows(),
        400_000
    );
    drop(idle);
    // Its thread is free again soon after: two more scans fit at once.
    tokio::time::sleep(Duration::from_millis(600)).await;
    let mut second = server.client().await;
    let (a, b) = tokio::join!(
        get(&mut other, ticket().ticket),
        get(&mut second, ticket().ticket)
    );
    assert_eq!((a.unwrap().rows(), b.unwrap().rows()), (400_000, 400_000));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_beyond_loopback_need_insecure() {
    let dir = tempfile::tempdir().unwrap();
    Store::init(dir.path()).unwrap();
    let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
    let config = ServerConfig {
        flight: vec!["0.0.0.0:0".parse().unwrap()],
        ..ServerConfig::default()
    };
    let error = serve(store, Hooks::default(), config, |_| {}, async {})
        .await
        .unwrap_err();
    assert!(matches!(error, ServeError::Config(_)));
    assert!(error.to_string().contains("--insecure"), "{error}");
}
