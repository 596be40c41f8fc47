//! One rollback at a time for a machine, whatever checkpoint it goes back to.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;

use crate::failure::Failure;

/// Machines that no other rollback on this host has. By names that nobody has to remove: those of abstract unix sockets are gone with the
/// process. They are of one network namespace, as the processes of one user are.
#[derive(Debug)]
pub struct Held {
    _names: Vec<UnixListener>,
}

impl Held {
    /// Takes the machines at these QMP sockets, whose paths are absolute.
    ///
    /// # Errors
    /// When another rollback has one of them.
    pub fn take(sockets: [&Path; 3]) -> Result<Self, Failure> {
        let name = |socket: &Path| -> io::Result<UnixListener> {
            // However the folder is spelt. The socket itself need not be there.
            let folder = socket.parent().and_then(|folder| folder.canonicalize().ok());
            let path =
                folder.zip(socket.file_name()).map_or_else(|| socket.to_owned(), |(folder, name)| folder.join(name));
            // A path may be longer than a name can be.
            let hash = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(format!("switchover-rollback-{}", &hash[..32]))?)
        };
        let take = |socket: &Path| {
            name(socket).map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => Failure::failed(format_args!(
                    "another rollback has the machine at {}: wait for its end",
                    socket.display()
                )),
                _ => Failure::failed(format_args!("cannot keep other rollbacks from {}: {error}", socket.display())),
            })
        };
        Ok(Self { _names: sockets.into_iter().map(take).collect::<Result<_, _>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_taken_by_one_at_a_time_however_its_folder_is_spelt() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let held = Held::take([&at("a"), &at("b"), &at("c")]).unwrap();
        let other = at(".").join("b");
        let refused = Held::take([&at("d"), &other, &at("e")]).unwrap_err();
        assert!(refused.sentence.contains("another rollback"), "{}", refused.sentence);
        drop(held);
        Held::take([&at("d"), &other, &at("e")]).unwrap();
    }
}
