//! Who is on the other side of a socket, and whether they may be.

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tonic::Code;

use crate::error::Failure;

/// A connected process, as the kernel saw it when it connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer {
    /// 0 where the server cannot see the process: another container's.
    pub(super) pid: u32,
    pub(super) uid: u32,
    gid: u32,
}

impl Peer {
    /// The process behind a connection. Call it inside a runtime; the socket blocks afterwards.
    pub(super) fn of(socket: &UnixStream) -> std::io::Result<Peer> {
        // The standard library does not offer the credentials; rustix takes a process id for
        // a number that is never 0, and it is 0 for a process of another container.
        socket.set_nonblocking(true)?;
        let found = tokio::net::UnixStream::from_std(socket.try_clone()?)
            .and_then(|socket| socket.peer_cred());
        socket.set_nonblocking(false)?;
        let found = found?;
        Ok(Peer {
            pid: found.pid().map_or(0, i32::unsigned_abs),
            uid: found.uid(),
            gid: found.gid(),
        })
    }
}

/// Who is let in: the server's own user, root, and the group that the socket belongs to.
///
/// The socket's mode says the same; this holds also where somebody widened that.
#[derive(Debug)]
pub(super) struct Door {
    uid: u32,
    socket: PathBuf,
}

impl Door {
    /// The door of a socket that this process bound at `path`.
    pub(super) fn of(path: &Path) -> Door {
        Door {
            uid: rustix::process::geteuid().as_raw(),
            socket: path.to_owned(),
        }
    }

    /// Refuses a peer that may not be here.
    pub(super) fn admit(&self, peer: &Peer) -> Result<(), Failure> {
        if peer.uid == self.uid || peer.uid == 0 {
            return Ok(());
        }
        // Asked each time: an operator may give the socket to a group at any time.
        let group = std::fs::symlink_metadata(&self.socket).map(|socket| socket.gid());
        let is_member = |gid: u32| {
            peer.gid == gid
                || std::fs::read_to_string(format!("/proc/{}/status", peer.pid))
                    .is_ok_and(|status| has_group(&status, peer.uid, gid))
        };
        if group.as_ref().is_ok_and(|gid| is_member(*gid)) {
            return Ok(());
        }
        let group = group.map_or_else(|_| "none".to_owned(), |gid| gid.to_string());
        Err(Failure::new(
            Code::PermissionDenied,
            "PEER_REFUSED",
            format!(
                "user {} may not use this socket: it is open to user {}, root, and group {group}",
                peer.uid, self.uid
            ),
        )
        .with("uid", peer.uid)
        .with("pid", peer.pid))
    }
}

/// Whether the text of a `/proc/PID/status` is of a process of that user, and in that group.
/// The user is compared because the number of a process that ended may be given again.
fn has_group(status: &str, uid: u32, gid: u32) -> bool {
    let numbers = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default()
            .split_ascii_whitespace()
            .filter_map(|number| number.parse::<u32>().ok())
    };
    // Real, effective, saved, file system.
    numbers("Uid:").nth(1) == Some(uid) && numbers("Groups:").any(|group| group == gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_user_root_and_the_socket_s_group_come_in() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let own_group = file.as_file().metadata().unwrap().gid();
        let door = Door {
            uid: 500,
            socket: file.path().to_owned(),
        };
        let peer = |uid, gid| Peer {
            // No process has this number: its groups are not known.
            pid: u32::MAX,
            uid,
            gid,
        };
        for (uid, gid) in [(500, 7), (0, 7), (600, own_group)] {
            door.admit(&peer(uid, gid)).unwrap();
        }
        let refused = door.admit(&peer(601, own_group + 1)).unwrap_err().to_json();
        assert_eq!(refused["error"], "PEER_REFUSED");
        assert_eq!(refused["uid"], 601);
        assert!(refused["message"].as_str().unwrap().contains("601"));
    }

    #[test]
    fn further_groups_count_only_of_the_same_user_s_process() {
        let status = "Name:\tpython\nUid:\t601\t601\t601\t601\nGid:\t7\t7\t7\t7\nGroups:\t7 50 \n";
        assert!(has_group(status, 601, 50));
        assert!(!has_group(status, 602, 50));
        assert!(!has_group(status, 601, 5));
        assert!(!has_group("", 0, 0));
    }
}
