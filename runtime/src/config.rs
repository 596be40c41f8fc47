//! What a virtual machine is built from.

use std::path::PathBuf;

use switchover_wire::types::PageCount;

/// Where the guest's serial port leads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SerialTarget {
    /// This process' standard output; standard input too, where it is a terminal or a pipe.
    Stdio,
    /// A file, created or emptied first.
    File(PathBuf),
    /// Nowhere.
    Null,
}

/// Files of the host that the guest may open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostFilesConfig {
    /// They lie under this directory.
    pub directory: PathBuf,
    /// Whether each request is noted on standard output, in a line of its own, and how.
    pub log: HostFilesLog,
}

/// What is printed of the things that a guest does with its host files.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum HostFilesLog {
    /// Nothing.
    #[default]
    Off,
    /// A line for each.
    Lines,
    /// Lines that begin with this name.
    Named(String),
}

/// How it is found out what the guest writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DirtyTracking {
    /// As is best for migrations: by bitmaps where KVM has them, otherwise by rings. A look at the bitmap of 512 MiB takes 10
    /// to 25 µs and changes nothing; rings take 0.05 to 3 ms, protect what the guest is writing once more, which costs it a
    /// fault a page, and can overrun (measured by `dirty_tracking` in `benches`).
    #[default]
    Auto,
    /// By a bitmap of each memory slot.
    Log,
    /// By a ring of each vCPU, which also tells vCPUs apart.
    Ring,
}

/// A virtual machine to build.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmConfig {
    /// The 64-bit ELF with a PVH note to boot. An incoming machine loads none: its memory brings its own.
    pub kernel: Option<PathBuf>,
    /// The kernel's command line, handed over byte for byte.
    pub append: String,
    /// A file that the guest finds as its first boot module.
    pub initrd: Option<PathBuf>,
    /// Guest RAM.
    pub memory: PageCount,
    /// Number of vCPUs, at least 1.
    pub vcpus: u8,
    /// Where the serial port leads.
    pub serial: SerialTarget,
    /// Whether an incoming machine may take its memory from the host only as pages arrive.
    pub lazy_memory: bool,
    /// Files of the host that the guest may open, if any. Source and destination must have this alike.
    pub host_files: Option<HostFilesConfig>,
    /// How it is found out what the guest writes.
    pub dirty_tracking: DirtyTracking,
}
