//! `switchover run`: a machine in this process, from its start to its end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::str::FromStr;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use kvm_ioctls::Kvm;
use serde_json::json;
use switchover_hybrid::lazy::Lazily;
use switchover_hybrid::monitor::{Limits, Mode};
use switchover_hybrid::settings::Settings;
use switchover_pager::uffd::device;
use switchover_runtime::audit::Audit;
use switchover_runtime::config::{DirtyTracking, HostFilesConfig, HostFilesLog, SerialTarget, VmConfig};
use switchover_runtime::controller::VmController;
use switchover_runtime::on_save::{self, OnSave};
use switchover_runtime::qmp::controller::Controller as _;
use switchover_runtime::qmp::endpoint::Endpoint;
use switchover_runtime::qmp::parameters::Parameters;
use switchover_runtime::qmp::security::security;
use switchover_runtime::qmp::server::{Bound, Server};
use switchover_runtime::run_state::ExitReason;
use switchover_runtime::vm::{Vm, open_kvm};
use switchover_wire::address::{Address, AddressError};
use switchover_wire::ring::maker;
use switchover_wire::tls::Role;

use crate::allocator;
use crate::confine;
use crate::confine::filter;
use crate::confine::privileges::{self, Kept};
use crate::confine::user::RunAs;
use crate::failure::{Failure, say};
use crate::signals::EndRequests;
use crate::size::Size;

/// What `switchover run` takes.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// The guest: a 64-bit ELF with a PVH note, as `qemu -kernel` boots it. Not read with --incoming or --restore
    #[arg(long, value_name = "ELF", required_unless_present_any = ["incoming", "restore"])]
    kernel: Option<PathBuf>,

    /// The guest's command line
    #[arg(long, value_name = "STRING", default_value = "", hide_default_value = true)]
    append: String,

    /// A file that the guest finds as its first boot module
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Guest memory, with a unit: K, M, G or T. Source and destination must be given the same
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: Size,

    /// Number of vCPUs. Source and destination must be given the same
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    vcpus: u8,

    /// Where the guest's serial port (a 16550 at 0x3f8) leads: stdio, file:PATH or null
    #[arg(long, value_name = "TARGET", default_value = "stdio")]
    serial: Serial,

    /// Let the guest open, read and write the files under this directory. Source and destination must both be given one, and see
    /// the same files in it
    #[arg(long, value_name = "DIR")]
    host_files: Option<PathBuf>,

    /// Print each request for a host file, and the guest's exit, in a line of its own. With a name, each line begins with it
    #[arg(long, value_name = "NAME", requires = "host_files", num_args = 0..=1, require_equals = true)]
    log_host_files: Option<Option<String>>,

    /// Where the guest goes when it asks its host files' device to be saved: into an image, or to a machine that waits for it. This
    /// machine ends when that is done. Without this, the guest is told that it cannot be saved
    #[arg(long, value_name = "file:PATH|tcp:HOST:PORT|unix:PATH", requires = "host_files")]
    on_save: Option<SaveTo>,

    /// Socket to control the machine by, in QEMU's protocol
    #[arg(long, value_name = "unix:PATH")]
    qmp: Option<Endpoint>,

    /// Boot nothing: wait for a guest to move here, at this address, or once `migrate-incoming` says where (defer)
    #[arg(long, value_name = "defer|tcp:HOST:PORT|unix:PATH")]
    incoming: Option<IncomingAt>,

    /// Boot nothing: restore the guest of this image, which `switchover save` wrote, and run it
    #[arg(long, value_name = "FILE", conflicts_with = "incoming")]
    restore: Option<PathBuf>,

    /// Run the restored guest at once: its memory is loaded as it is touched, and the rest meanwhile. What it touches first is kept
    /// beside the image, as FILE.working-set, so that the next time it is loaded first
    #[arg(long, requires = "restore")]
    lazy: bool,

    /// Neither use nor keep a working set
    #[arg(long, requires = "lazy")]
    no_working_set: bool,

    /// Do not reserve memory before a guest moves here. Zero pages then cost none, and the guest is lost if memory
    /// runs out after the handoff
    #[arg(long, requires = "incoming")]
    lazy_memory: bool,

    /// Note what happens to the machine in this file, one JSON object a line, each with the hash of the one before. An existing
    /// file is gone on with; `switchover audit verify` checks it
    #[arg(long, value_name = "FILE")]
    audit: Option<PathBuf>,

    /// How a migration finds out what the guest writes: by KVM's bitmaps (log), by a ring of each vCPU (ring), which a
    /// limit of vCPUs' dirty rates needs, or by what is there, bitmaps first (auto)
    #[arg(long, value_name = "auto|log|ring", default_value = "auto", hide_possible_values = true)]
    dirty_tracking: Tracking,

    /// Folder of this machine's certificates and keys (see `switchover certs --help`): guests move over TLS only, and only
    /// between machines with certificates of the same CA
    #[arg(long, value_name = "DIR")]
    tls_creds: Option<PathBuf>,

    /// Without TLS: let guests move to and from other hosts nevertheless. Whoever is on the way can read and change them
    #[arg(long, conflicts_with = "tls_creds")]
    allow_plain: bool,

    /// Run as this user and group, without further groups; needs root. What the machine opens must be that user's: kernel, serial
    /// and audit files, the folder of the QMP socket, certificates and keys. Only /dev/kvm and /dev/userfaultfd are opened before
    #[arg(long, value_name = "NAME|UID[:GID]")]
    user: Option<RunAs>,

    /// What happens when the running machine makes a system call that it has no reason to make, which shows that somebody has taken
    /// it over: it ends, with the call's name on standard error (on); the kernel notes the call in its own audit log, and it is made
    /// (log); nothing, there is no filter (off)
    #[arg(long, value_name = "on|log|off", default_value = "on", hide_possible_values = true)]
    seccomp: filter::Mode,
}

const EXAMPLES: &str = "\
Examples:
  Boot a guest and see its serial port here:
    switchover run --kernel guest.elf --append 'size=256M seed=1' --memory 512M
  Two machines that a guest can move between (then see `switchover migrate --help`):
    switchover run --kernel guest.elf --qmp unix:/tmp/source.qmp
    switchover run --incoming tcp:127.0.0.1:4444 --qmp unix:/tmp/destination.qmp
  The same for a guest that comes from another host, over TLS:
    switchover run --incoming tcp:0.0.0.0:4444 --tls-creds /etc/switchover \\
      --qmp unix:/tmp/destination.qmp
  A guest that was saved (see `switchover save --help`), here or on another host:
    switchover run --restore guest.image --memory 512M --qmp unix:/tmp/source.qmp
  The same, running at once while its memory follows:
    switchover run --restore guest.image --lazy --memory 512M --qmp unix:/tmp/source.qmp
  A machine with the rights of a user that owns nothing else:
    switchover run --incoming tcp:0.0.0.0:4444 --tls-creds /etc/switchover \\
      --qmp unix:/run/guest/qmp --user guest
  Talk to one by hand:
    printf '%s\\n' '{\"execute\":\"qmp_capabilities\"}' '{\"execute\":\"query-status\"}' |
      nc -U -q1 /tmp/source.qmp

The machine ends when its guest ends it (port 0xf4, as QEMU's isa-debug-exit; the keyboard controller's reset; a triple \
fault), by QMP `quit`, or by Ctrl-C. A source whose guest has moved away stays, paused, until one of the last two. A guest that was \
saved stays too, and QMP `cont` lets it go on.

A restored guest goes on where it was when it was saved, and its clocks have gone on meanwhile, as if it had stood still. All of its \
memory is loaded and verified before it runs. An image that is damaged, or of a machine that does not match this one, is refused. \
With --lazy each part of its memory is verified before it is used; where one is damaged, the guest is stopped, and this process ends \
with status 1. The image stays as it is, and must stay until all of it is loaded (`query-migrate` says `completed`).

Exit status: 0 when the guest wrote 0 to port 0xf4 (QEMU would exit with 1), by `quit` and by Ctrl-C; 1 when the guest \
wrote anything else, reset itself, or could not be run or received; 2 for bad usage.";

/// Where a machine without a guest waits for one.
#[derive(Clone, PartialEq, Eq, Debug)]
enum IncomingAt {
    /// Wherever `migrate-incoming` says.
    Deferred,
    /// Here.
    Address(Address),
}

impl FromStr for IncomingAt {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text == "defer" { Ok(Self::Deferred) } else { text.parse().map(Self::Address) }
    }
}

/// Where a guest goes that asks to be saved.
#[derive(Clone, PartialEq, Eq, Debug)]
enum SaveTo {
    Image(PathBuf),
    Machine(Address),
}

impl FromStr for SaveTo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("file:") {
            Some("") => Err("the path of the image is missing: write for example file:guest.image".to_owned()),
            Some(path) => Ok(Self::Image(path.into())),
            None => text.parse().map(Self::Machine).map_err(|error: AddressError| error.to_string()),
        }
    }
}

/// How it is found out what the guest writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Tracking {
    Auto,
    Log,
    Ring,
}

impl From<Tracking> for DirtyTracking {
    fn from(tracking: Tracking) -> Self {
        match tracking {
            Tracking::Auto => Self::Auto,
            Tracking::Log => Self::Log,
            Tracking::Ring => Self::Ring,
        }
    }
}

/// Where the serial port leads.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Serial(SerialTarget);

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self(SerialTarget::Stdio)),
            None if text == "null" => Ok(Self(SerialTarget::Null)),
            Some(("file", path)) if !path.is_empty() => Ok(Self(SerialTarget::File(path.into()))),
            _ => Err("it is none of stdio, null and file:PATH".to_owned()),
        }
    }
}

/// Runs a machine until it is over.
///
/// # Errors
/// When it cannot be built or served, its guest fails, or none arrives.
pub fn main(args: RunArgs) -> Result<(), Failure> {
    if args.qmp.is_none() && args.incoming == Some(IncomingAt::Deferred) {
        return Err(Failure::usage(
            "--incoming defer waits for `migrate-incoming` on a QMP socket, and there is none: add --qmp unix:PATH",
        ));
    }
    let parameters = parameters(args.tls_creds.as_deref(), args.allow_plain)?;
    allocator::keep_large_blocks();
    let kvm = give_up_privileges(args.user, args.incoming.is_some() || args.lazy)?;
    confine::split_off_the_ring_maker(args.seccomp).map_err(Failure::failed)?;
    let (asked, ends) = crossbeam::channel::unbounded();
    // Before the machine has threads: they inherit that these signals are not theirs.
    let _requests = EndRequests::take(move |number| {
        let _ = asked.send(number);
    })?;
    let waits = args.incoming.is_some() || args.restore.is_some();
    let config = VmConfig {
        kernel: args.kernel.filter(|_| !waits),
        append: args.append,
        initrd: args.initrd,
        memory: args.memory.0,
        vcpus: args.vcpus,
        serial: args.serial.0,
        // What is restored takes the memory that it needs as it is loaded, before the guest runs.
        lazy_memory: args.lazy_memory || args.restore.is_some(),
        host_files: args.host_files.map(|directory| HostFilesConfig {
            directory,
            log: match args.log_host_files {
                None => HostFilesLog::Off,
                Some(None) => HostFilesLog::Lines,
                Some(Some(name)) => HostFilesLog::Named(name),
            },
        }),
        dirty_tracking: args.dirty_tracking.into(),
    };
    let no_threads = |error| Failure::failed(format_args!("cannot start the machine's threads: {error}"));
    let audit = args.audit.as_deref().map(Audit::append).transpose().map_err(Failure::failed)?.unwrap_or_default();
    audit.note("start", json!({ "version": env!("CARGO_PKG_VERSION"), "pid": process::id(), "waits": waits }));
    let socket = args.qmp.as_ref().map(Bound::at).transpose().map_err(Failure::failed)?;
    let vm = if waits { Vm::incoming_on(&kvm, &config) } else { Vm::boot_on(&kvm, &config) };
    let vm = vm.map_err(Failure::failed)?;
    let (controller, events) = VmController::new(Arc::clone(&vm), args.lazy_memory, audit).map_err(no_threads)?;
    let (ended, path) = (Arc::clone(&controller), args.qmp.as_ref().map(|endpoint| endpoint.path().to_owned()));
    let take_ends = move || ends.into_iter().for_each(|number: u32| end(&ended, number, path.as_deref()));
    std::thread::Builder::new().name("end".to_owned()).spawn(take_ends).map_err(no_threads)?;
    if let Some(to) = args.on_save {
        on_save::attend(&vm, &controller, on_save(to, &parameters)?).map_err(no_threads)?;
    }
    // What comes from here on comes from others: the guest, the network, clients, an image.
    confine::confine_all_threads(args.seccomp).map_err(Failure::failed)?;
    match &args.restore {
        Some(image) if args.lazy => {
            let how = Lazily { working_set: !args.no_working_set };
            controller.restore_lazily(image, how).map_err(Failure::failed)?;
        }
        Some(image) => controller.restore(image).map_err(Failure::failed)?,
        None => begin(&vm, &controller, args.incoming.as_ref(), &parameters)?,
    }
    let serve = |socket| Server::start(socket, Arc::<VmController>::clone(&controller), parameters, events);
    let server = socket.map(serve).transpose().map_err(Failure::failed)?;
    let exit = vm.wait_exit();
    controller.finish(&exit);
    drop(server);
    maker::end();
    judge(exit)
}

/// Opens what only the user that started this process may open, and becomes one that may do next to nothing.
fn give_up_privileges(user: Option<RunAs>, watches: bool) -> Result<Kvm, Failure> {
    let kvm = open_kvm().map_err(Failure::failed)?;
    // A source has no use for it. Where it may not be opened, a migration that comes says so.
    let by_device = !watches || device::keep().unwrap_or(true);
    let by_anybody = || fs::read_to_string(UNPRIVILEGED_USERFAULTFD).is_ok_and(|set| set.trim() == "1");
    let kept = Kept { sys_ptrace: !by_device && !by_anybody() };
    privileges::give_up(user, kept).map_err(Failure::failed)?;
    Ok(kvm)
}

/// Whether a host without `/dev/userfaultfd` gives userfaultfds for KVM's faults to anybody.
const UNPRIVILEGED_USERFAULTFD: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// What the machine's migrations are protected by, unless its clients say otherwise.
fn parameters(tls_creds: Option<&Path>, allow_plain: bool) -> Result<Parameters, Failure> {
    let mut parameters = Parameters { allow_plain, ..Parameters::default() };
    if let Some(folder) = tls_creds {
        let text =
            folder.to_str().ok_or_else(|| Failure::usage("the folder of --tls-creds has a name that is no text"))?;
        text.clone_into(&mut parameters.tls_creds);
    }
    Ok(parameters)
}

/// What becomes of a guest that asks to be saved.
fn on_save(to: SaveTo, parameters: &Parameters) -> Result<OnSave, Failure> {
    Ok(match to {
        SaveTo::Image(path) => OnSave::File(path),
        SaveTo::Machine(address) => {
            let security = security(parameters, Role::Source).map_err(Failure::failed)?;
            // It stands still meanwhile: nothing is won by letting it run before all of it is there.
            let limits = Limits { mode: Mode::Precopy, ..Limits::default() };
            let settings = Settings { limits, postcopy: false, ..Settings::default() };
            OnSave::Machine(address, Box::new((settings, security)))
        }
    })
}

fn begin(
    vm: &Vm,
    controller: &VmController,
    incoming: Option<&IncomingAt>,
    parameters: &Parameters,
) -> Result<(), Failure> {
    match incoming {
        None => vm.cont().map_err(Failure::failed),
        Some(IncomingAt::Deferred) => Ok(()),
        Some(IncomingAt::Address(address)) => {
            let security = security(parameters, Role::Destination).map_err(Failure::failed)?;
            controller.listen(address, Settings::default(), security).map_err(Failure::failed)?;
            if let Some(at) = controller.migration().and_then(|migration| migration.listening_at) {
                tracing::info!("waiting for a guest to move here, at {at}");
            }
            Ok(())
        }
    }
}

/// Someone wants this process to end, for the `number`th time. A guest that still lives on this side's pages is not
/// given up the first time.
fn end(controller: &VmController, number: u32, qmp: Option<&std::path::Path>) {
    match controller.may_quit() {
        Err(reason) if number == 1 => say(format_args!("{reason}; or end it once more to lose it")),
        _ if number <= 2 => controller.end(),
        _ => {
            // It was asked to end and does not come to it.
            if let Some(path) = qmp {
                let _ = fs::remove_file(path);
            }
            process::exit(1);
        }
    }
}

/// What the machine's end means for whoever started it.
fn judge(exit: ExitReason) -> Result<(), Failure> {
    match exit {
        ExitReason::Quit => Ok(()),
        ExitReason::Failed(reason) => Err(Failure::failed(reason)),
        ExitReason::Shutdown => Err(Failure::failed(
            "the guest reset itself, or triple-faulted; where it should not have, dmesg of this host may say why",
        )),
        // QEMU's exit status of a guest's word is twice the word and one.
        ExitReason::Guest(status) if status >> 1 == 0 => Ok(()),
        ExitReason::Guest(status) => Err(Failure::failed(format_args!(
            "the guest ended itself with the code {}, where 0 is success",
            status >> 1
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_word_becomes_an_exit_status() {
        assert_eq!(judge(ExitReason::Guest(1)), Ok(()));
        assert_eq!(judge(ExitReason::Quit), Ok(()));
        let failed = judge(ExitReason::Guest(5)).unwrap_err();
        assert_eq!((failed.status, failed.sentence.contains("code 2")), (1, true));
        assert_eq!(judge(ExitReason::Shutdown).unwrap_err().status, 1);
        assert_eq!(judge(ExitReason::Failed("why".to_owned())).unwrap_err().sentence, "why");
    }

    #[test]
    fn targets_and_addresses_are_read() {
        assert_eq!("file:/tmp/a:b".parse(), Ok(Serial(SerialTarget::File("/tmp/a:b".into()))));
        assert_eq!("null".parse(), Ok(Serial(SerialTarget::Null)));
        assert!("file:".parse::<Serial>().is_err() && "tty".parse::<Serial>().is_err());
        assert_eq!("defer".parse(), Ok(IncomingAt::Deferred));
        assert_eq!("tcp::4444".parse::<IncomingAt>().unwrap(), IncomingAt::Address("tcp::4444".parse().unwrap()));
    }
}
