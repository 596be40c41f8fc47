//! The `uri` or `channels` of `migrate` and `migrate-incoming`.

use std::path::PathBuf;

use serde_json::Value;
use switchover_wire::address::Address;

use super::arguments::{Arguments, objects};
use super::refusal::Refusal;

/// Where a guest goes, or comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// Another machine.
    Machine(Address),
    /// An image.
    File(PathBuf),
}

/// Takes `uri` or `channels` out of a command's arguments.
///
/// # Errors
/// When neither or both are there, or what is there names neither an address nor a file.
pub fn take_target(arguments: &mut Arguments) -> Result<Target, Refusal> {
    let uri: Option<String> = arguments.optional("uri")?;
    let channels: Vec<Value> = arguments.optional("channels")?.unwrap_or_default();
    let mut channels = objects("channels", channels)?.into_iter();
    match (uri, channels.next(), channels.next()) {
        (Some(uri), None, _) => match uri.strip_prefix("file:") {
            Some(path) => file(path),
            None => parse_uri(&uri).map(Target::Machine),
        },
        (None, Some(channel), None) => main_channel(channel),
        (None, Some(_), Some(_)) => Err(Refusal::generic("Channel list has more than one main entry")),
        _ => Err(Refusal::generic("need either 'uri' or 'channels' argument")),
    }
}

/// The file of a `file:` URI.
fn file(path: &str) -> Result<Target, Refusal> {
    if path.contains(",offset=") {
        return Err(no_offset());
    }
    if path.is_empty() || path.contains('\0') {
        return Err(Refusal::generic("the path of the file is missing: write for example file:/var/lib/guest.image"));
    }
    Ok(Target::File(path.into()))
}

fn no_offset() -> Refusal {
    Refusal::generic("an image begins at the beginning of its file: leave 'offset' out, and name a file for it alone")
}

fn main_channel(mut channel: Arguments) -> Result<Target, Refusal> {
    let name: String = channel.required("channel-type")?;
    let mut address: Arguments = channel.required("addr")?;
    channel.finish()?;
    match name.as_str() {
        "main" => {}
        "cpr" => return Err(Refusal::generic("Channel type 'cpr' is not built; give one channel of type 'main'")),
        other => return Err(Refusal::not_accepted("channel-type", other)),
    }
    let transport: String = address.required("transport")?;
    match transport.as_str() {
        "socket" => {}
        "file" => {
            let filename: String = address.required("filename")?;
            if address.optional::<u64>("offset")?.is_some_and(|offset| offset > 0) {
                return Err(no_offset());
            }
            address.finish()?;
            return file(&filename);
        }
        "exec" | "rdma" => return Err(not_built("transport", &transport)),
        other => return Err(Refusal::not_accepted("transport", other)),
    }
    let kind: String = address.required("type")?;
    let found = match kind.as_str() {
        "inet" => {
            let host: String = address.required("host")?;
            let port: String = address.required("port")?;
            if host.contains(':') { format!("tcp:[{host}]:{port}") } else { format!("tcp:{host}:{port}") }
        }
        "unix" => format!("unix:{}", address.required::<String>("path")?),
        "vsock" | "fd" => return Err(not_built("type", &kind)),
        other => return Err(Refusal::not_accepted("type", other)),
    };
    for (name, reason) in SOCKET_OPTIONS {
        if kind == "inet" && address.has(name) {
            return Err(Refusal::generic(format_args!("Parameter 'addr.{name}' cannot be set here: {reason}")));
        }
    }
    address.finish()?;
    found.parse().map(Target::Machine).map_err(Refusal::generic)
}

/// What QEMU's `InetSocketAddress` has besides host and port.
const SOCKET_OPTIONS: [(&str, &str); 6] = [
    ("numeric", "write the host as an address, and nobody looks up a name"),
    ("to", "one port is taken, not a range; port 0 lets the kernel choose one"),
    ("ipv4", "the host decides: write 0.0.0.0, or an IPv4 address"),
    ("ipv6", "the host decides: write ::, or an IPv6 address"),
    ("keep-alive", "dead peers are found by heartbeats, within x-switchover-silence"),
    ("mptcp", "lanes are plain TCP; give the migration several with multifd-channels"),
];

/// Transports of QEMU that are not built, as a uri begins with them.
const NO_TRANSPORTS: [&str; 4] = ["exec", "fd", "rdma", "vsock"];

/// A command's `uri`.
///
/// # Errors
/// When it names no address that lanes can go to.
pub fn parse_uri(uri: &str) -> Result<Address, Refusal> {
    match uri.split_once(':') {
        Some(("tcp" | "unix", _)) => uri.parse().map_err(Refusal::generic),
        Some(("file", _)) => Err(Refusal::generic("a lost link is joined over a socket, never through a file")),
        Some((known, _)) if NO_TRANSPORTS.contains(&known) => Err(Refusal::generic(format_args!(
            "migration protocol '{known}' is not built: write for example tcp:10.0.0.2:4444 or unix:/run/switchover.sock"
        ))),
        _ => Err(Refusal::generic(format_args!(
            "unknown migration protocol: {uri}: write for example tcp:10.0.0.2:4444 or unix:/run/switchover.sock"
        ))),
    }
}

fn not_built(name: &str, value: &str) -> Refusal {
    Refusal::generic(format_args!(
        "Parameter '{name}' cannot be '{value}' here: migrations go over sockets of type 'inet' or 'unix'"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn take(value: &Value) -> Result<String, String> {
        let mut arguments = Arguments::new(value.as_object().unwrap().clone());
        let target = take_target(&mut arguments).map_err(|refusal| refusal.desc)?;
        Ok(match target {
            Target::Machine(address) => address.to_string(),
            Target::File(path) => format!("file {}", path.display()),
        })
    }

    fn channel(addr: &Value) -> Value {
        json!({ "channels": [{ "channel-type": "main", "addr": addr }] })
    }

    #[test]
    fn both_spellings_name_the_same_address() {
        for (arguments, address) in [
            (json!({"uri": "tcp:10.0.0.2:4444"}), "tcp:10.0.0.2:4444"),
            (json!({"uri": "unix:/run/m", "channels": []}), "unix:/run/m"),
            (
                channel(&json!({"transport": "socket", "type": "inet", "host": "10.0.0.2", "port": "4444"})),
                "tcp:10.0.0.2:4444",
            ),
            (channel(&json!({"transport": "socket", "type": "inet", "host": "::1", "port": "1"})), "tcp:[::1]:1"),
            (channel(&json!({"transport": "socket", "type": "unix", "path": "/run/m"})), "unix:/run/m"),
            (json!({"uri": "file:/a/b:c"}), "file /a/b:c"),
            (json!({"uri": "file:a"}), "file a"),
            (channel(&json!({"transport": "file", "filename": "/a", "offset": 0})), "file /a"),
        ] {
            assert_eq!(take(&arguments), Ok(address.to_owned()));
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let inet = json!({"transport": "socket", "type": "inet", "host": "h", "port": "1"});
        for (arguments, part) in [
            (json!({}), "need either 'uri' or 'channels' argument"),
            (json!({"channels": []}), "need either 'uri' or 'channels' argument"),
            (json!({"uri": "tcp:h:1", "channels": channel(&inet)["channels"]}), "need either 'uri' or 'channels'"),
            (json!({"uri": "foo:bar"}), "unknown migration protocol: foo:bar"),
            (json!({"uri": "foo"}), "unknown migration protocol: foo"),
            (json!({"uri": "exec:cat"}), "migration protocol 'exec' is not built"),
            (json!({"uri": "file:"}), "the path of the file is missing"),
            (json!({"uri": "file:/a,offset=0x1000"}), "leave 'offset' out"),
            (channel(&json!({"transport": "file", "filename": "/a", "offset": 4096})), "leave 'offset' out"),
            (channel(&json!({"transport": "file", "filename": ""})), "the path of the file is missing"),
            (channel(&json!({"transport": "file"})), "Parameter 'channels[0].addr.filename' is missing"),
            (json!({"uri": "tcp:h"}), "`tcp:h` is no address: the port is missing"),
            (json!({"channels": [{"channel-type": "x", "addr": {}}]}), "'channel-type' does not accept value 'x'"),
            (json!({"channels": [{"channel-type": "main"}]}), "'channels[0].addr' is missing"),
            (channel(&json!({"transport": "rdma"})), "'transport' cannot be 'rdma' here"),
            (channel(&json!({"transport": "blah"})), "'transport' does not accept value 'blah'"),
            (channel(&json!({"transport": "socket", "type": "vsock"})), "'type' cannot be 'vsock' here"),
            (
                channel(&json!({"transport": "socket", "type": "inet", "host": "h"})),
                "Parameter 'channels[0].addr.port' is missing",
            ),
            (
                channel(&json!({"transport": "socket", "type": "inet", "host": "h", "port": 1})),
                "Invalid parameter type for 'channels[0].addr.port', expected: string",
            ),
            (
                channel(&json!({"transport": "socket", "type": "inet", "host": "h", "port": "1", "to": 5})),
                "Parameter 'addr.to' cannot be set here: one port is taken",
            ),
        ] {
            let error = take(&arguments).unwrap_err();
            assert!(error.contains(part), "{arguments}: {error}");
        }
    }
}
