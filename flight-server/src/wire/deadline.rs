//! The deadline that a gRPC client sends with its request: past it, nothing is begun any more.
//! It ends with the head of the reply; a stream is ended by its client.

use std::convert::Infallible;
use std::time::Duration;

use http::{HeaderMap, Response};
use tonic::{Code, Status};

use super::body::Body;
use crate::error::Failure;

const HEADER: &str = "grpc-timeout";
/// As the protocol has it.
const MAX_DIGITS: usize = 8;

/// How long the client waits. A header that is none is as if it were absent.
pub(super) fn of(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(HEADER)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > MAX_DIGITS || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

/// The answer, or the refusal once the time is over; what was being done is dropped then.
pub(super) async fn within(
    after: Duration,
    answer: impl Future<Output = Result<Response<Body>, Infallible>>,
) -> Result<Response<Body>, Infallible> {
    tokio::time::timeout(after, answer)
        .await
        .unwrap_or_else(|_| {
            let failure = Failure::new(
                Code::DeadlineExceeded,
                "DEADLINE",
                format!("the request's own deadline of {after:?} (grpc-timeout) has passed"),
            );
            Ok(Status::from(failure).into_http())
        })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_deadline_is_read_as_grpc_writes_it_and_anything_else_is_none() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(HEADER, HeaderValue::from_static(text));
            of(&headers)
        };
        assert_eq!(read("2S"), Some(Duration::from_secs(2)));
        assert_eq!(
            read("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("7u"), Some(Duration::from_micros(7)));
        assert_eq!(read("0n"), Some(Duration::ZERO));
        for broken in ["", "S", "2", "-2S", "+2S", "123456789S", "2s", "2 S"] {
            assert_eq!(read(broken), None, "{broken:?}");
        }
        assert_eq!(of(&HeaderMap::new()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_longer_than_its_deadline_is_refused() {
        let late = async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            Ok(Response::new(Body::default()))
        };
        let reply = within(Duration::from_secs(1), late).await.unwrap();
        let code = reply.headers().get("grpc-status").unwrap();
        assert_eq!(code, "4");
        let soon = async { Ok(Response::new(Body::default())) };
        let reply = within(Duration::from_secs(1), soon).await.unwrap();
        assert!(reply.headers().get("grpc-status").is_none());
    }
}
