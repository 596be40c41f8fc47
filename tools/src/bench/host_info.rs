//! The machine that figures were measured on.

use std::fs;

use serde::{Deserialize, Serialize};

/// The machine and its kernel. What cannot be found out is empty or 0.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HostInfo {
    /// `model name` of `/proc/cpuinfo`.
    pub cpu: String,
    /// CPUs that this process may run on.
    pub cpus: u64,
    /// Bytes of memory.
    pub memory: u64,
    /// The kernel's release.
    pub kernel: String,
    /// `x86_64` and so on.
    pub architecture: String,
    /// Whether the CPU says that it is itself virtual.
    pub virtualised: bool,
    /// The KVM modules that are there: `kvm_intel`, `kvm_amd`, `kvm_pvm`, …
    pub kvm: String,
    /// The cpufreq governor of CPU 0.
    pub governor: String,
    /// Setting of `/sys/kernel/mm/transparent_hugepage/shmem_enabled`.
    pub shmem_huge_pages: String,
}

impl HostInfo {
    /// This host.
    #[must_use]
    pub fn here() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let huge = read("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
        Self {
            cpu: cpuinfo_field(&cpuinfo, "model name").to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, |cpus| cpus.get() as u64),
            memory: memory(&read("/proc/meminfo")),
            kernel: read("/proc/sys/kernel/osrelease"),
            architecture: std::env::consts::ARCH.to_owned(),
            virtualised: cpuinfo_field(&cpuinfo, "flags").split(' ').any(|flag| flag == "hypervisor"),
            kvm: kvm_modules(),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            shmem_huge_pages: selected(&huge).to_owned(),
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn cpuinfo_field<'a>(cpuinfo: &'a str, name: &str) -> &'a str {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map_or("", |(_, value)| value.trim())
}

fn memory(meminfo: &str) -> u64 {
    let kib = cpuinfo_field(meminfo, "MemTotal").trim_end_matches(" kB").parse::<u64>();
    kib.map_or(0, |kib| kib * 1024)
}

/// Built-in modules are found here as well as loaded ones.
fn kvm_modules() -> String {
    let entries = fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("kvm_")).collect();
    names.sort();
    names.join(" ")
}

/// The choice in brackets of a sysfs file that lists them.
fn selected(choices: &str) -> &str {
    choices.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(choices, |(choice, _)| choice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_a_kernel_a_cpu_and_memory() {
        let host = HostInfo::here();
        assert!(!host.kernel.is_empty() && host.cpus > 0 && host.memory > 1 << 20, "{host:?}");
    }

    #[test]
    fn files_of_proc_and_sys_are_understood() {
        assert_eq!(memory("MemTotal:       24588584 kB\nMemFree: 1 kB"), 24_588_584 * 1024);
        assert_eq!(cpuinfo_field("processor\t: 0\nmodel name\t: A B\n", "model name"), "A B");
        assert_eq!(selected("always within_size [never] force"), "never");
    }
}
