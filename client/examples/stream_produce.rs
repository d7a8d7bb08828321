//! Events at a steady rate into Kafka, whether or not anybody keeps up: each at its time.
//!
//! Every value is JSON of about the size asked for. One in so many is a sentinel: its key is
//! `s` and the nanoseconds of the wall clock just before it was handed to the producer, which
//! its feature `stamp` repeats. Prints one JSON object at the end.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rdkafka::ClientConfig;
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::{ClientContext, Message};
use serde_json::json;
use support::{Arguments, cpu_seconds};

const USAGE: &str = "stream_produce: events at a steady rate into Kafka

  --brokers host:port
  --topic name
  --rate r                events a second (default 1000)
  --seconds s             how long (default 5)
  --keys n                different keys besides the sentinels' (default 100000)
  --bytes b               size of a value (default 200)
  --sentinel-every n      one in n is a sentinel; 0 for none (default 100)
";

#[derive(Default)]
struct Delivered {
    good: AtomicU64,
    bad: AtomicU64,
}

struct Reports(Arc<Delivered>);

impl ClientContext for Reports {}

impl ProducerContext for Reports {
    type DeliveryOpaque = ();

    fn delivery(&self, delivery: &DeliveryResult<'_>, (): ()) {
        match delivery {
            Ok(message) => {
                debug_assert!(message.offset() >= 0);
                self.0.good.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => {
                self.0.bad.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn main() {
    let arguments = Arguments::parse(USAGE);
    let topic = arguments.needed("topic");
    let rate: f64 = arguments.number("rate", 1_000.0);
    let seconds: f64 = arguments.number("seconds", 5.0);
    let keys: u64 = arguments.number("keys", 100_000);
    let bytes: usize = arguments.number("bytes", 200);
    let sentinel_every: u64 = arguments.number("sentinel-every", 100);

    let delivered = Arc::new(Delivered::default());
    let producer: ThreadedProducer<Reports> = ClientConfig::new()
        .set("bootstrap.servers", arguments.needed("brokers"))
        .set("acks", "all")
        .set("linger.ms", "0")
        // What comes while a request is under way goes with the next.
        .set("max.in.flight.requests.per.connection", "1")
        .set("socket.nagle.disable", "true")
        .set("queue.buffering.max.messages", "2000000")
        .create_with_context(Reports(Arc::clone(&delivered)))
        .expect("the producer starts");

    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut late = Duration::ZERO;
    let mut refused = 0_u64;
    let total = (rate * seconds) as u64;
    let began = Instant::now();
    for number in 0..total {
        let due = Duration::from_secs_f64(number as f64 / rate);
        loop {
            let elapsed = began.elapsed();
            if elapsed >= due {
                late = late.max(elapsed - due);
                break;
            }
            std::thread::sleep(due - elapsed);
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let sentinel = sentinel_every > 0 && number % sentinel_every == 0;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("a clock");
        let (key, stamp) = if sentinel {
            (format!("s{}", now.as_nanos()), now.as_nanos() as i64)
        } else {
            (format!("k{}", random % keys), 0)
        };
        let mut value = format!(
            r#"{{"id":"{key}","ts":{},"n":{number},"x":{:.6},"stamp":{stamp},"pad":""#,
            now.as_micros(),
            (random >> 11) as f64 / (1_u64 << 53) as f64,
        );
        for _ in value.len() + 2..bytes {
            value.push('x');
        }
        value.push_str("\"}");
        if producer
            .send(BaseRecord::to(topic).key(&key).payload(&value))
            .is_err()
        {
            refused += 1;
        }
    }
    let sending = began.elapsed();
    producer
        .flush(Duration::from_secs(30))
        .expect("everything is delivered");
    println!(
        "{}",
        json!({
            "events": total,
            "delivered": delivered.good.load(Ordering::Relaxed),
            "failed": delivered.bad.load(Ordering::Relaxed) + refused,
            "events_per_second": total as f64 / sending.as_secs_f64(),
            "latest_ms": late.as_secs_f64() * 1e3,
            "cpu_seconds": cpu_seconds(),
        })
    );
}
