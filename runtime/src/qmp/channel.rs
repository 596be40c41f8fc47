//! The `uri` or `channels` of `migrate` and `migrate-incoming`.

use serde_json::Value;
use switchover_wire::address::Address;

use super::arguments::{Arguments, objects};
use super::refusal::Refusal;

/// Takes `uri` or `channels` out of a command's arguments.
///
/// # Errors
/// When neither or both are there, or what is there names no address.
pub fn take_address(arguments: &mut Arguments) -> Result<Address, Refusal> {
    let uri: Option<String> = arguments.optional("uri")?;
    let channels: Vec<Value> = arguments.optional("channels")?.unwrap_or_default();
    let mut channels = objects("channels", channels)?.into_iter();
    match (uri, channels.next(), channels.next()) {
        (Some(uri), None, _) => parse_uri(&uri),
        (None, Some(channel), None) => main_channel(channel),
        (None, Some(_), Some(_)) => Err(Refusal::generic("Channel list has more than one main entry")),
        _ => Err(Refusal::generic("need either 'uri' or 'channels' argument")),
    }
}

fn main_channel(mut channel: Arguments) -> Result<Address, Refusal> {
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
        "exec" | "rdma" | "file" => return Err(not_built("transport", &transport)),
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
    found.parse().map_err(Refusal::generic)
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
const NO_TRANSPORTS: [&str; 5] = ["exec", "fd", "file", "rdma", "vsock"];

/// A command's `uri`.
///
/// # Errors
/// When it names no address that lanes can go to.
pub fn parse_uri(uri: &str) -> Result<Address, Refusal> {
    match uri.split_once(':') {
        Some(("tcp" | "unix", _)) => uri.parse().map_err(Refusal::generic),
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
        take_address(&mut arguments).map(|address| address.to_string()).map_err(|refusal| refusal.desc)
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
