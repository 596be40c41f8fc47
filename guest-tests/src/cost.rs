//! What a process holds while something is done to it.

use std::fs;
use std::time::Duration;

use crate::watching::Watching;

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// What a process holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cost {
    /// Memory of its own that is there, in bytes (`RssAnon`): a guest's memory, which is a file, is none of it.
    pub memory: u64,
    /// Open files.
    pub files: usize,
    /// Threads.
    pub threads: usize,
}

impl Cost {
    /// Of the process `pid`, now; `None` once it has ended.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.trim().split(' ').next());
        let memory = field("RssAnon:")?.parse::<u64>().ok()? << 10;
        let threads = field("Threads:")?.parse().ok()?;
        Some(Self { memory, files: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count(), threads })
    }

    fn most(self, other: Self) -> Self {
        Self {
            memory: self.memory.max(other.memory),
            files: self.files.max(other.files),
            threads: self.threads.max(other.threads),
        }
    }

    /// How much more this is than `before`.
    #[must_use]
    pub const fn beyond(self, before: Self) -> Self {
        Self {
            memory: self.memory.saturating_sub(before.memory),
            files: self.files.saturating_sub(before.files),
            threads: self.threads.saturating_sub(before.threads),
        }
    }
}

/// Looks at a process again and again. Dropping it ends that.
#[derive(Debug)]
pub struct Watched {
    before: Cost,
    most: Watching<Cost>,
}

impl Watched {
    /// From now on.
    ///
    /// # Panics
    /// When the process has ended.
    #[must_use]
    pub fn from_now(pid: u32) -> Self {
        let before = Cost::of(pid).expect("a process");
        let look = move |most: &mut Cost| *most = most.most(Cost::of(pid).unwrap_or_default());
        Self { before, most: Watching::from_now(before, LOOK, look) }
    }

    /// The most that it held since, beyond what it held when that began.
    ///
    /// # Panics
    /// When it could not be looked at.
    #[must_use]
    pub fn grew_by(self) -> Cost {
        self.most.end().beyond(self.before)
    }
}
