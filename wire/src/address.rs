//! Where a destination listens, as QEMU writes it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// The longest path that fits a unix socket's address (`sun_path` less its final zero).
const MAX_UNIX_PATH: usize = 107;

/// Where a destination listens and a source connects to.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Address {
    /// `tcp:HOST:PORT`.
    Tcp {
        /// A name or an address, without brackets. Empty (QEMU's `tcp::4444`) means every interface when listening,
        /// and nothing that can be connected to.
        host: String,
        /// 0 lets the kernel choose when listening.
        port: u16,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
}

/// A text that is no address.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("`{text}` is no address: {reason}; write for example {example}")]
pub struct AddressError {
    text: String,
    reason: &'static str,
    example: &'static str,
}

const ANY_EXAMPLE: &str = "tcp:10.0.0.2:4444 or unix:/run/switchover.sock";
const TCP_EXAMPLE: &str = "tcp:10.0.0.2:4444";
const IPV6_EXAMPLE: &str = "tcp:[2001:db8::2]:4444";
const UNIX_EXAMPLE: &str = "unix:/run/switchover.sock";

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = |reason, example| AddressError { text: text.to_owned(), reason, example };
        let Some((kind, rest)) = text.split_once(':') else {
            return Err(wrong("it has no `tcp:` or `unix:` in front", ANY_EXAMPLE));
        };
        match kind {
            "tcp" => parse_tcp(rest).map_err(|(reason, example)| wrong(reason, example)),
            "unix" if rest.is_empty() => Err(wrong("the path is missing", UNIX_EXAMPLE)),
            "unix" if rest.contains('\0') => Err(wrong("the path contains a zero byte", UNIX_EXAMPLE)),
            "unix" if rest.len() > MAX_UNIX_PATH => {
                Err(wrong("the path is longer than the 107 bytes that a unix socket can have", UNIX_EXAMPLE))
            }
            "unix" => Ok(Self::Unix(PathBuf::from(rest))),
            _ => Err(wrong("only `tcp:` and `unix:` are known", ANY_EXAMPLE)),
        }
    }
}

fn parse_tcp(rest: &str) -> Result<Address, (&'static str, &'static str)> {
    let (host, port) = if let Some(bracketed) = rest.strip_prefix('[') {
        bracketed.split_once("]:").ok_or(("after `[` there must come `]:PORT`", IPV6_EXAMPLE))?
    } else {
        let (host, port) = rest.rsplit_once(':').ok_or(("the port is missing", TCP_EXAMPLE))?;
        if host.contains(':') {
            return Err(("an IPv6 address needs brackets", IPV6_EXAMPLE));
        }
        (host, port)
    };
    if host.chars().any(|c| c.is_whitespace() || c.is_control() || "[]/,".contains(c)) {
        return Err(("the host has a character in it that no host has", TCP_EXAMPLE));
    }
    // `u16::from_str` takes a plus sign.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(("the port is not a number", TCP_EXAMPLE));
    }
    let port = port.parse().map_err(|_| ("the port is not between 0 and 65535", TCP_EXAMPLE))?;
    Ok(Address::Tcp { host: host.to_owned(), port })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn addresses_are_read_and_written_alike() {
        for (text, address) in [
            ("tcp:10.0.0.2:4444", tcp("10.0.0.2", 4444)),
            ("tcp:localhost:0", tcp("localhost", 0)),
            ("tcp::4444", tcp("", 4444)),
            ("tcp:[::1]:65535", tcp("::1", 65535)),
            ("unix:/run/a b:c.sock", Address::Unix(PathBuf::from("/run/a b:c.sock"))),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), address);
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_an_example() {
        let long = format!("unix:/{}", "x".repeat(107));
        for (text, reason) in [
            ("", "no `tcp:`"),
            ("10.0.0.2:4444", "only `tcp:` and `unix:`"),
            ("fd:3", "only `tcp:` and `unix:`"),
            ("tcp:10.0.0.2", "the port is missing"),
            ("tcp:host:", "the port is not between"),
            ("tcp:host:+1", "the port is not a number"),
            ("tcp:host:65536", "the port is not between"),
            ("tcp:::1:4444", "needs brackets"),
            ("tcp:[::1]", "`]:PORT`"),
            ("tcp:a b:1", "a character in it"),
            ("tcp:a,b:1", "a character in it"),
            ("unix:", "the path is missing"),
            (long.as_str(), "107 bytes"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
            assert!(error.contains("write for example"), "{error}");
        }
    }
}
