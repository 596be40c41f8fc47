//! Where the QMP socket is, as QEMU's `-qmp` option writes it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use switchover_wire::address::Address;
use thiserror::Error;

/// A unix socket to listen on: `unix:PATH`. QEMU's `,server`, `,server=on`, `,nowait` and `,wait=off` behind the path
/// are taken and change nothing, because this is what is done anyway.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint(PathBuf);

/// A text that names no QMP socket.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("`{text}` is no QMP socket: {reason}; write for example unix:/run/switchover-qmp.sock")]
pub struct EndpointError {
    text: String,
    reason: String,
}

impl Endpoint {
    /// The socket at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The same as an address.
    #[must_use]
    pub fn address(&self) -> Address {
        Address::Unix(self.0.clone())
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let wrong = |reason: String| EndpointError { text: text.to_owned(), reason };
        let mut parts = text.split(',');
        let address = parts.next().unwrap_or_default();
        for option in parts {
            match option {
                "server" | "server=on" | "nowait" | "wait=off" => {}
                "server=off" => return Err(wrong("this side listens and cannot be told to connect".to_owned())),
                "wait" | "wait=on" => {
                    return Err(wrong(
                        "the guest does not wait for a connection; leave it paused with `stop`".to_owned(),
                    ));
                }
                other => return Err(wrong(format!("the option `{other}` is unknown"))),
            }
        }
        if address == "unix:" {
            return Err(wrong("the path is missing".to_owned()));
        }
        match address.parse() {
            Ok(Address::Unix(path)) => Ok(Self(path)),
            Ok(Address::Tcp { .. }) => Err(wrong("QMP is spoken on unix sockets only".to_owned())),
            Err(error) if address.starts_with("unix:") => Err(wrong(error.to_string())),
            Err(_) => Err(wrong("it has no `unix:` in front".to_owned())),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.0.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_spellings_are_taken() {
        for text in ["unix:/run/q", "unix:/run/q,server", "unix:/run/q,server,nowait", "unix:/run/q,server=on,wait=off"]
        {
            assert_eq!(text.parse::<Endpoint>().unwrap(), Endpoint::at("/run/q"), "{text}");
        }
        assert_eq!(Endpoint::at("/run/q").to_string(), "unix:/run/q");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, reason) in [
            ("", "no `unix:`"),
            ("/run/q", "no `unix:`"),
            ("unix:", "path is missing"),
            ("tcp:127.0.0.1:1", "unix sockets only"),
            ("unix:/run/q,server=off", "cannot be told to connect"),
            ("unix:/run/q,wait=on", "does not wait"),
            ("unix:/run/q,colour=red", "`colour=red` is unknown"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
