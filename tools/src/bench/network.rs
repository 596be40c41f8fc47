//! Two network namespaces joined by a pair of virtual Ethernet devices, shaped by token buckets.
//!
//! ```text
//!   source's process ── veth 198.18.0.1 ═══ TBF each way ═══ 198.18.0.2 veth ── destination's process
//! ```
//!
//! The namespaces have no name: they live as long as a descriptor or a process refers to them, and the devices live as
//! long as the namespaces. So nothing is left behind, however the bench ends, not even when it is killed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use super::bandwidth::Bandwidth;
use crate::failure::Failure;

/// The destination's address: of the block that is set apart for benchmarks of networks (RFC 2544).
pub const DESTINATION_ADDRESS: &str = "198.18.0.2";
const SOURCE_ADDRESS: &str = "198.18.0.1";
const DEVICE: &str = "veth0";
/// A full bucket lets through what the rate would in this time: short against a blackout, long against a timer's tick.
const BURST_S: f64 = 0.001;
/// A segment that the kernel hands over whole, with room for its headers; a smaller bucket would never hold it.
const LEAST_BURST: u64 = 128 << 10;
/// The longest that a packet waits for tokens before packets are dropped: some round trips, as in a switch's buffer.
const QUEUE: &str = "5ms";

/// The two namespaces.
#[derive(Debug)]
pub struct Network {
    source: Namespace,
    destination: Namespace,
}

/// A network namespace, kept by a descriptor.
#[derive(Debug)]
pub struct Namespace(File);

impl Network {
    /// Makes the namespaces and joins them.
    ///
    /// # Errors
    /// When this process may not, or `ip` or `tc` are missing or fail.
    pub fn new() -> Result<Self, Failure> {
        let network = Self { source: Namespace::new()?, destination: Namespace::new()? };
        let destination = network.destination.path();
        network.source.configure(&[
            "ip",
            "link",
            "add",
            DEVICE,
            "type",
            "veth",
            "peer",
            "name",
            DEVICE,
            "netns",
            &destination,
        ])?;
        for (namespace, address) in [(&network.source, SOURCE_ADDRESS), (&network.destination, DESTINATION_ADDRESS)] {
            namespace.configure(&["ip", "address", "add", &format!("{address}/30"), "dev", DEVICE])?;
            namespace.configure(&["ip", "link", "set", DEVICE, "up"])?;
            namespace.configure(&["ip", "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }

    /// Bounds what either side may send to `bandwidth`.
    ///
    /// # Errors
    /// When `tc` fails.
    pub fn shape(&self, bandwidth: Bandwidth) -> Result<(), Failure> {
        for namespace in [&self.source, &self.destination] {
            // There may be none yet.
            let _ = namespace.run(&["tc", "qdisc", "del", "dev", DEVICE, "root"]);
            if let Some(bits) = bandwidth.bits_per_second() {
                let (rate, burst) = (format!("{bits}bit"), burst(bits).to_string());
                namespace.configure(&[
                    "tc", "qdisc", "add", "dev", DEVICE, "root", "tbf", "rate", &rate, "burst", &burst, "latency",
                    QUEUE,
                ])?;
            }
        }
        Ok(())
    }

    /// Where the source's process is to run.
    #[must_use]
    pub fn source(&self) -> &Namespace {
        &self.source
    }

    /// Where the destination's is.
    #[must_use]
    pub fn destination(&self) -> &Namespace {
        &self.destination
    }
}

impl Namespace {
    /// A new one, with nothing in it but a loopback device that is down.
    fn new() -> Result<Self, Failure> {
        // A thread of its own moves into it, and ends: this process' other threads stay where they are.
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let made = made.join().unwrap_or_else(|_| Err(io::Error::other("the thread that makes it died")));
        made.map(Self).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => Failure::failed(
                "--link veth makes two network namespaces, which needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN): run the \
                 bench as root, or bound tcp by --bandwidth alone",
            ),
            _ => Failure::failed(format_args!(
                "cannot make a network namespace: {error}; --link tcp with --bandwidth needs none"
            )),
        })
    }

    /// Has `command` run in it.
    ///
    /// # Errors
    /// When the namespace's descriptor cannot be duplicated.
    pub fn enter(&self, command: &mut Command) -> io::Result<()> {
        let namespace = self.0.try_clone()?;
        // SAFETY: between fork and exec only async-signal-safe functions may be called; `setns` is a plain system call,
        // and nothing here allocates or locks. The descriptor is closed on exec.
        unsafe {
            command.pre_exec(move || Ok(setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?));
        }
        Ok(())
    }

    /// A path to it that other processes can open while this one lives.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.descriptor().as_raw_fd())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Runs a command of iproute2 in it, which must succeed.
    fn configure(&self, command: &[&str]) -> Result<(), Failure> {
        self.run(command).map_err(|reason| {
            Failure::failed(format_args!(
                "cannot lay the network of --link veth: `{}`: {reason}; --link tcp with --bandwidth needs none",
                command.join(" ")
            ))
        })
    }

    fn run(&self, command: &[&str]) -> Result<(), String> {
        let (program, arguments) = command.split_first().ok_or("there is nothing to run")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        self.enter(&mut command).map_err(|error| error.to_string())?;
        match command.output() {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(format!("there is no program `{program}`; install iproute2"))
            }
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Bytes in a full bucket.
fn burst(bits_per_second: u64) -> u64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a bandwidth's thousandth"
    )]
    let bytes = (bits_per_second as f64 / 8.0 * BURST_S) as u64;
    bytes.max(LEAST_BURST)
}

#[cfg(test)]
mod tests {
    use std::os::linux::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_bucket_holds_a_segment_and_no_more_than_a_millisecond() {
        assert_eq!(burst(100_000_000), 128 << 10);
        assert_eq!(burst(10_000_000_000), 1_250_000);
    }

    /// Needs root; says so and is content elsewhere.
    #[test]
    fn the_sides_are_joined_and_shaped_and_this_process_stays_where_it_is() {
        let here = || std::fs::metadata("/proc/self/ns/net").unwrap().st_ino();
        let before = here();
        let network = match Network::new() {
            Ok(network) => network,
            Err(failure) => {
                assert!(failure.sentence.contains("--link"), "{}", failure.sentence);
                return;
            }
        };
        assert_eq!(here(), before);
        network.shape("1G".parse().unwrap()).unwrap();
        network.shape("100M".parse().unwrap()).unwrap();
        let mut show = Command::new("tc");
        show.args(["qdisc", "show", "dev", DEVICE]);
        network.destination().enter(&mut show).unwrap();
        let shown = String::from_utf8(show.output().unwrap().stdout).unwrap();
        assert!(shown.contains("tbf") && shown.contains("rate 100Mbit"), "{shown}");
        network.shape(Bandwidth::UNLIMITED).unwrap();

        let mut show = Command::new("ip");
        show.args(["-brief", "address"]);
        network.source().enter(&mut show).unwrap();
        let shown = String::from_utf8(show.output().unwrap().stdout).unwrap();
        assert!(shown.contains(SOURCE_ADDRESS) && !shown.contains("eth1"), "{shown}");
    }

    #[test]
    fn what_fails_is_named_with_its_reason() {
        let Ok(namespace) = Namespace::new() else { return };
        let failure = namespace.configure(&["ip", "link", "set", "nowhere0", "up"]).unwrap_err();
        assert!(
            failure.sentence.contains("nowhere0") && failure.sentence.contains("--link tcp"),
            "{}",
            failure.sentence
        );
        assert!(namespace.run(&["no-such-program"]).unwrap_err().contains("install"));
    }
}
