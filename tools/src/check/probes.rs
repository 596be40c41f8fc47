//! The single looks. Each tries the very thing that a migration does, rather than guessing from versions.

use std::error::Error;
use std::fs;
use std::io;
use std::path::Path;

use io_uring::{IoUring, Probe, opcode};
use kvm_ioctls::{Cap, Kvm};
use nix::sys::resource::{Resource, getrlimit};
use switchover_pager::ram::Ram;
use switchover_pager::uffd::Watch;
use switchover_pager::uffd::write::WriteWatch;
use switchover_wire::ring::{EventRing, Ring};
use switchover_wire::types::{PageCount, PageIndex};

use super::{Finding, Verdict};

/// The only version of KVM's API that there ever was in a released kernel (Documentation/virt/kvm/api.rst).
const KVM_API_VERSION: i32 = 12;

/// What the runtime asks of KVM. Dirty logging and the rest that every KVM of the last ten years has is not looked for.
const KVM_NEEDS: [(Cap, &str); 6] = [
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::Pit2, "an in-kernel timer"),
    (Cap::ExtCpuid, "CPUID tables"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::AdjustClock, "guest clock adjustment"),
    (Cap::UserMemory, "memory slots"),
];

/// Open files of a machine in the middle of a migration, with the most bulk lanes: some 80. The rest is room.
const FILES_NEEDED: u64 = 256;

/// What `tools/demo` wants free: two machines of 512 MiB and room to breathe.
const MEMORY_WANTED_MIB: u64 = 1536;

/// Everything, in the order in which it is needed.
pub fn all() -> Vec<Finding> {
    let mut findings = vec![
        Finding { name: "platform", verdict: platform() },
        Finding { name: "kvm", verdict: kvm() },
        Finding { name: "userfaultfd", verdict: userfaultfd() },
        Finding { name: "protection", verdict: protection() },
        Finding { name: "io_uring", verdict: io_uring() },
        Finding { name: "files", verdict: files() },
        Finding { name: "memory", verdict: memory() },
    ];
    findings.push(Finding {
        name: "qemu",
        verdict: program(&["qemu-system-x86_64"], "`bench --peer qemu` compares with it: apt install qemu-system-x86"),
    });
    findings.push(Finding {
        name: "chromium",
        verdict: program(
            &["chromium", "chromium-browser", "google-chrome"],
            "only for turning report.html into a picture: apt install chromium, or open the report in any browser",
        ),
    });
    findings
}

fn platform() -> Verdict {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let seen = format!("{} on Linux {}", std::env::consts::ARCH, kernel.trim());
    if cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        Verdict::Fine(seen)
    } else {
        Verdict::Missing { seen, fix: "only Linux on x86-64 is built".to_owned() }
    }
}

fn kvm() -> Verdict {
    let missing = |seen: String, fix: &str| Verdict::Missing { seen, fix: fix.to_owned() };
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let fix = match io::Error::from_raw_os_error(error.errno()).kind() {
                io::ErrorKind::NotFound => {
                    "load the module (modprobe kvm_intel or kvm_amd), switch virtualisation on in the firmware; in a \
                     virtual machine, let its host pass nested virtualisation on; in a container, pass the device in \
                     (docker run --device /dev/kvm)"
                }
                io::ErrorKind::PermissionDenied => {
                    "become a member of the group kvm (sudo usermod -aG kvm $USER, then log in again), or run as root"
                }
                _ => "see dmesg for what KVM says",
            };
            return missing(format!("/dev/kvm does not open: {error}"), fix);
        }
    };
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return missing(
            format!("API version {version}, where {KVM_API_VERSION} is needed"),
            "use a kernel of this century",
        );
    }
    let lacking: Vec<_> =
        KVM_NEEDS.into_iter().filter_map(|(cap, name)| (!kvm.check_extension(cap)).then_some(name)).collect();
    if !lacking.is_empty() {
        return missing(format!("KVM lacks {}", lacking.join(", ")), "use a newer kernel");
    }
    if let Err(error) = kvm.create_vm() {
        return missing(format!("no machine can be created: {error}"), "see dmesg for what KVM says");
    }
    Verdict::Fine(format!("/dev/kvm, API {version}, {} vCPUs recommended at most", kvm.get_nr_vcpus()))
}

fn userfaultfd() -> Verdict {
    let missing = |seen: String| Verdict::Missing {
        seen,
        fix: "Linux 5.14 or later with CONFIG_USERFAULTFD, and one of: root (CAP_SYS_PTRACE); access to \
              /dev/userfaultfd (sudo setfacl -m u:$USER:rw /dev/userfaultfd, Linux 6.1 or later); or sudo sysctl \
              vm.unprivileged_userfaultfd=1. Faults that KVM takes in the kernel must be covered: user-mode-only is \
              not enough"
            .to_owned(),
    };
    let watched = Ram::new(PageCount(1)).map_err(|error| innermost(&error)).and_then(|ram| {
        let watch = Watch::register(ram).map_err(|error| innermost(&error))?;
        watch.unregister().map_err(|error| innermost(&error))
    });
    match watched {
        Ok(()) => Verdict::Fine("missing and minor faults on shared memory, the kernel's own included".to_owned()),
        Err(error) => missing(format!("a page cannot be watched: {error}")),
    }
}

fn protection() -> Verdict {
    let protected = Ram::new(PageCount(1)).map_err(|error| innermost(&error)).and_then(|ram| {
        let watch = WriteWatch::register(ram).map_err(|error| innermost(&error))?;
        watch.protect(PageIndex(0), PageCount(1)).map_err(|error| innermost(&error))
    });
    match protected {
        Ok(()) => Verdict::Fine("writes to shared memory can be made to wait".to_owned()),
        Err(error) => Verdict::Wanting {
            seen: format!("a page cannot be protected: {error}"),
            fix: "guests can be saved while they stand still, and not while they run: that takes Linux 5.19 or later"
                .to_owned(),
        },
    }
}

/// What was at the bottom of an error: here the kernel's own words, where the rest is advice that a fix repeats.
fn innermost(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

fn io_uring() -> Verdict {
    let fix = "Linux 5.14 or later; where io_uring is switched off, sudo sysctl kernel.io_uring_disabled=0; in a \
               container, a seccomp profile that lets io_uring_setup pass";
    let missing = |seen: String| Verdict::Missing { seen, fix: fix.to_owned() };
    // The rings as migrations make them, with their restrictions: a plain one might be let pass where these are not.
    let ours = Ring::new(2).and_then(|_| EventRing::new(8)).map(drop).map_err(|error| error.to_string());
    let mut probe = Probe::new();
    let probed = ours.and_then(|()| {
        IoUring::new(8).and_then(|ring| ring.submitter().register_probe(&mut probe)).map_err(|error| error.to_string())
    });
    if let Err(error) = probed {
        return missing(error);
    }
    let needed = [
        (opcode::Send::CODE, "SEND"),
        (opcode::Recv::CODE, "RECV"),
        (opcode::SendMsg::CODE, "SENDMSG"),
        (opcode::RecvMsg::CODE, "RECVMSG"),
        (opcode::PollAdd::CODE, "POLL_ADD"),
        (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
    ];
    let lacking: Vec<_> =
        needed.into_iter().filter_map(|(code, name)| (!probe.is_supported(code)).then_some(name)).collect();
    if lacking.is_empty() {
        Verdict::Fine(needed.map(|(_, name)| name).join(", "))
    } else {
        missing(format!("it lacks {}", lacking.join(", ")))
    }
}

fn files() -> Verdict {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, _)) if soft >= FILES_NEEDED => Verdict::Fine(format!("{soft} may be open at once")),
        Ok((soft, hard)) => Verdict::Missing {
            seen: format!("only {soft} may be open at once, {FILES_NEEDED} are needed"),
            fix: format!("ulimit -n {}", hard.clamp(FILES_NEEDED, 4096)),
        },
        Err(errno) => {
            Verdict::Missing { seen: format!("the limit cannot be read: {errno}"), fix: "see ulimit -n".to_owned() }
        }
    }
}

fn memory() -> Verdict {
    let Some(available) = fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(available_mib) else {
        return Verdict::Wanting {
            seen: "/proc/meminfo does not say how much is free".to_owned(),
            fix: "see to it yourself that a guest's memory is free before it moves here".to_owned(),
        };
    };
    let locked = match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, _)) if soft == nix::libc::RLIM_INFINITY => "no limit on locked memory".to_owned(),
        Ok((soft, _)) => format!("{} KiB may be locked; none has to be", soft >> 10),
        Err(errno) => format!("the limit on locked memory cannot be read: {errno}"),
    };
    if available >= MEMORY_WANTED_MIB {
        return Verdict::Fine(format!("{available} MiB free; {locked}"));
    }
    Verdict::Wanting {
        seen: format!("only {available} MiB free; {locked}"),
        fix: format!("tools/demo wants {MEMORY_WANTED_MIB} MiB; smaller guests (--memory 256M) do with less"),
    }
}

/// `MemAvailable` of /proc/meminfo.
fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib >> 10)
}

fn program(names: &[&str], fix: &str) -> Verdict {
    let folders: Vec<_> = std::env::var_os("PATH").iter().flat_map(std::env::split_paths).collect();
    let found =
        names.iter().find_map(|name| folders.iter().map(|folder| folder.join(name)).find(|path| is_program(path)));
    match found {
        Some(path) => Verdict::Fine(path.display().to_string()),
        None => Verdict::Wanting { seen: "not installed".to_owned(), fix: fix.to_owned() },
    }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read_from_the_kernels_words() {
        let text = "MemTotal:       24683520 kB\nMemFree:  1 kB\nMemAvailable:   24158208 kB\n";
        assert_eq!(available_mib(text), Some(23592));
        assert_eq!(available_mib("MemTotal: 5 kB\n"), None);
        assert_eq!(available_mib("MemAvailable: many\n"), None);
    }

    #[test]
    fn a_program_is_found_in_the_path_or_not_at_all() {
        assert!(matches!(program(&["no-such-program", "sh"], ""), Verdict::Fine(path) if path.ends_with("/sh")));
        assert!(matches!(program(&["no-such-program"], "x"), Verdict::Wanting { fix, .. } if fix == "x"));
    }
}
