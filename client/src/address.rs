//! Where a server listens, as a URL says it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::ClientError;

/// An address of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// Flight over TCP: `grpc://HOST:PORT`; `grpc+tcp://`, `http://` and a bare `HOST:PORT` are
    /// the same.
    Tcp(String),
    /// Flight over a Unix socket: `grpc+unix:///PATH`; `unix://` is the same.
    Unix(PathBuf),
    /// The local lane: `lane:///PATH`.
    Lane(PathBuf),
}

impl FromStr for Address {
    type Err = ClientError;

    fn from_str(url: &str) -> Result<Address, ClientError> {
        let refused = || ClientError::Address {
            url: url.to_owned(),
        };
        let path = |path: &str| {
            if path.is_empty() {
                Err(refused())
            } else {
                Ok(PathBuf::from(path))
            }
        };
        if let Some(rest) = url
            .strip_prefix("grpc+unix://")
            .or_else(|| url.strip_prefix("unix://"))
        {
            return path(rest).map(Address::Unix);
        }
        if let Some(rest) = url.strip_prefix("lane://") {
            return path(rest).map(Address::Lane);
        }
        let host = match url.split_once("://") {
            Some(("grpc" | "grpc+tcp" | "http", host)) => host,
            Some(_) => return Err(refused()),
            None => url,
        };
        let host = host.trim_end_matches('/');
        let has_port = host
            .rsplit_once(':')
            .is_some_and(|(name, port)| !name.is_empty() && port.parse::<u16>().is_ok());
        // What an HTTP authority cannot hold is refused here, not at the first call.
        if has_port && host.parse::<http::uri::Authority>().is_ok() {
            Ok(Address::Tcp(host.to_owned()))
        } else {
            Err(refused())
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(host) => write!(f, "grpc://{host}"),
            Address::Unix(path) => write!(f, "grpc+unix://{}", path.display()),
            Address::Lane(path) => write!(f, "lane://{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_urls_are_tcp_or_a_socket() {
        let tcp = Address::Tcp("127.0.0.1:8815".to_owned());
        for url in [
            "grpc://127.0.0.1:8815",
            "127.0.0.1:8815",
            "http://127.0.0.1:8815/",
            "grpc+tcp://127.0.0.1:8815",
        ] {
            assert_eq!(url.parse::<Address>().unwrap(), tcp, "{url}");
        }
        assert_eq!(
            "grpc+unix:///run/p.sock".parse::<Address>().unwrap(),
            Address::Unix(PathBuf::from("/run/p.sock"))
        );
        assert_eq!(
            "lane:///run/lane.sock".parse::<Address>().unwrap(),
            Address::Lane(PathBuf::from("/run/lane.sock"))
        );
        assert_eq!(
            "[::1]:8815".parse::<Address>().unwrap().to_string(),
            "grpc://[::1]:8815"
        );
        for url in [
            "",
            "grpc://",
            "grpc://host",
            "ftp://host:1",
            "grpc+unix://",
            "lane://",
            "host:x",
            ":1",
            "a b:1",
        ] {
            assert!(url.parse::<Address>().is_err(), "{url}");
        }
    }
}
