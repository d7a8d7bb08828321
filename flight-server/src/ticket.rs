//! Tickets: what GetFlightInfo hands out and DoGet takes back.
//!
//! A ticket holds everything DoGet needs (table ids, definition versions, snapshots, the
//! command), so the server keeps nothing about it. It is authenticated with a key kept in the
//! data directory: a client cannot make one that names a table or snapshot it was not given.
//! Layout: `PINT`, one version byte, HMAC-SHA256 over all the rest, then JSON. The ticket of a
//! part of a scan has version 2, so that earlier releases, which would read the whole, refuse
//! it; all others have version 1.
//!
//! A ticket that starts with `{` is a command in JSON, written by hand.

use bytes::Bytes;
use hmac::{Hmac, Mac};
use pinion_feature_store::{ScanPart, SnapshotId, TableId};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::command::{Command, CommandError};
use crate::error::Failure;

const MAGIC: &[u8; 4] = b"PINT";
/// Of tickets that any release reads.
const FIRST_VERSION: u8 = 1;
/// Of tickets for a part of a scan, and the newest that is read.
const VERSION: u8 = 2;
const MAC_BYTES: usize = 32;

/// What a ticket stands for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ticket {
    /// One per table, in the order the command names them.
    pub(crate) tables: Vec<TicketTable>,
    pub(crate) command: Command,
    /// Only this part of a scan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) part: Option<ScanPart>,
}

/// One table as it was when the ticket was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TicketTable {
    pub(crate) id: TableId,
    pub(crate) definition_version: u32,
    pub(crate) snapshot: SnapshotId,
}

/// A ticket as it came.
#[derive(Debug)]
pub(crate) enum TicketRequest {
    /// One of ours.
    Issued(Ticket),
    /// Written by hand: no snapshot was promised.
    Command(Command),
}

/// Why a ticket is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TicketError {
    #[error(
        "not a Pinion ticket ({bytes} bytes): use one from GetFlightInfo, or a JSON command such as {{\"scan\": {{\"table\": \"weather\"}}}}"
    )]
    NotATicket { bytes: usize },
    #[error("the ticket has format version {found}; this release reads version {supported}")]
    NewerVersion { found: u8, supported: u8 },
    #[error(
        "the ticket was not made by this store, or was changed: ask for a new one with GetFlightInfo"
    )]
    Forged,
}

impl Ticket {
    /// The ticket's bytes.
    pub(crate) fn seal(&self, key: &[u8; 32]) -> Result<Bytes, Failure> {
        let body = serde_json::to_vec(self).map_err(|error| {
            Failure::new(
                tonic::Code::Internal,
                "TICKET",
                format!("cannot write a ticket: {error}"),
            )
        })?;
        let mut bytes = Vec::with_capacity(MAGIC.len() + 1 + MAC_BYTES + body.len());
        bytes.extend_from_slice(MAGIC);
        let version = match self.part {
            Some(_) => VERSION,
            None => FIRST_VERSION,
        };
        bytes.push(version);
        bytes.extend_from_slice(&mac(key, version, &body).finalize().into_bytes());
        bytes.extend_from_slice(&body);
        Ok(bytes.into())
    }
}

impl TicketRequest {
    /// Reads and verifies a ticket.
    pub(crate) fn open(bytes: &[u8], key: &[u8; 32]) -> Result<TicketRequest, Failure> {
        if bytes.trim_ascii_start().first() == Some(&b'{') {
            return Ok(TicketRequest::Command(Command::parse(bytes)?));
        }
        let not_a_ticket = TicketError::NotATicket { bytes: bytes.len() };
        let Some(([version], rest)) = bytes
            .strip_prefix(MAGIC)
            .and_then(|rest| rest.split_first_chunk::<1>())
        else {
            return Err(not_a_ticket.into());
        };
        if !(FIRST_VERSION..=VERSION).contains(version) {
            let error = TicketError::NewerVersion {
                found: *version,
                supported: VERSION,
            };
            return Err(error.into());
        }
        let Some((code, body)) = rest.split_first_chunk::<MAC_BYTES>() else {
            return Err(not_a_ticket.into());
        };
        // Constant time.
        mac(key, *version, body)
            .verify_slice(code)
            .map_err(|_| TicketError::Forged)?;
        let ticket: Ticket =
            serde_json::from_slice(body).map_err(|error| CommandError::Syntax {
                problem: error.to_string(),
            })?;
        Ok(TicketRequest::Issued(ticket))
    }
}

fn mac(key: &[u8; 32], version: u8, body: &[u8]) -> Hmac<Sha256> {
    let block: [u8; 64] = {
        let mut block = [0u8; 64];
        block[..32].copy_from_slice(key);
        block
    };
    // A key padded with zeros to the hash's block is the same HMAC key.
    let mut mac = <Hmac<Sha256> as Mac>::new(&block.into());
    mac.update(MAGIC);
    mac.update(&[version]);
    mac.update(body);
    mac
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::ScanCommand;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use tonic::Code;

    const KEY: [u8; 32] = [7; 32];

    fn ticket() -> Ticket {
        Ticket {
            tables: vec![TicketTable {
                id: TableId(3),
                definition_version: 2,
                snapshot: "5-77".parse().unwrap(),
            }],
            command: Command::Scan(ScanCommand {
                table: "weather".into(),
                ..Default::default()
            }),
            part: None,
        }
    }

    #[test]
    fn a_sealed_ticket_opens_again() {
        let sealed = ticket().seal(&KEY).unwrap();
        match TicketRequest::open(&sealed, &KEY).unwrap() {
            TicketRequest::Issued(opened) => assert_eq!(opened, ticket()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_ticket_of_a_part_has_a_version_that_earlier_releases_refuse() {
        assert_eq!(ticket().seal(&KEY).unwrap()[4], 1);
        let part = serde_json::from_str(r#"{"layout": 7, "from_unit": 1, "end_unit": 3}"#);
        let part = Ticket {
            part: Some(part.unwrap()),
            ..ticket()
        };
        let sealed = part.seal(&KEY).unwrap();
        assert_eq!(sealed[4], 2);
        match TicketRequest::open(&sealed, &KEY).unwrap() {
            TicketRequest::Issued(opened) => assert_eq!(opened, part),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_changed_byte_and_another_key_is_refused() {
        let sealed = ticket().seal(&KEY).unwrap();
        for at in 0..sealed.len() {
            let mut changed = sealed.to_vec();
            changed[at] ^= 0x20;
            assert!(TicketRequest::open(&changed, &KEY).is_err(), "byte {at}");
        }
        let error = TicketRequest::open(&sealed, &[8; 32]).unwrap_err();
        assert_eq!(error.code(), Code::PermissionDenied);
    }

    #[test]
    fn random_bytes_are_invalid_argument() {
        let mut random = StdRng::seed_from_u64(1);
        for length in [0usize, 1, 4, 5, 36, 37, 38, 500] {
            let bytes: Vec<u8> = (0..length).map(|_| random.random::<u8>() | 0x80).collect();
            let error = TicketRequest::open(&bytes, &KEY).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument);
        }
    }

    #[test]
    fn a_newer_version_is_refused_with_both_named() {
        let mut sealed = ticket().seal(&KEY).unwrap().to_vec();
        sealed[4] = 9;
        let error = TicketError::NewerVersion {
            found: 9,
            supported: VERSION,
        };
        assert!(error.to_string().contains('9') && error.to_string().contains('2'));
        assert_eq!(
            TicketRequest::open(&sealed, &KEY).unwrap_err().code(),
            Code::InvalidArgument
        );
    }
}
