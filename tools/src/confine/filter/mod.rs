//! Programs that the kernel runs before every system call, made of the [list](super::calls).

use std::collections::BTreeMap;
use std::process;

use clap::ValueEnum;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter, apply_filter_all_threads,
};
use thiserror::Error;

use super::calls::{self, Call, Condition};

/// What happens to calls that are not on the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mode {
    /// They end the process.
    On,
    /// They are made, and the kernel notes them in its audit log.
    Log,
    /// They are made; there is no list.
    Off,
}

impl Mode {
    /// Its name on command lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Log => "log",
            Self::Off => "off",
        }
    }
}

/// The kernel does not confine this process.
#[derive(Debug, Error)]
pub enum FilterError {
    /// The list makes no program.
    #[error("cannot make a program for the kernel of the list of system calls: {0}; this is an error of this program")]
    Compile(#[from] BackendError),
    /// The kernel does not take the program.
    #[error(
        "cannot confine this process to its system calls: {0}; does this kernel have seccomp filters? --seccomp off does without"
    )]
    Apply(#[from] seccompiler::Error),
    /// No handler for violations.
    #[error("cannot take the signal that says which system call was denied: {0}; --seccomp off does without")]
    Handler(#[source] nix::errno::Errno),
}

/// A program for the kernel.
#[derive(Clone, Debug)]
pub struct Program(BpfProgram);

impl Program {
    /// From here on it looks at every call of this thread, and of those that this thread starts.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn apply(&self) -> Result<(), FilterError> {
        Ok(apply_filter(&self.0)?)
    }

    /// From here on it looks at every call of every thread of this process. None can be without.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn apply_to_all_threads(&self) -> Result<(), FilterError> {
        Ok(apply_filter_all_threads(&self.0)?)
    }

    /// How many instructions the kernel may have to run.
    #[must_use]
    pub fn length(&self) -> usize {
        self.0.len()
    }
}

/// What confines this process, in the order in which it is to be applied. The strictest answer of all counts.
///
/// # Errors
/// When the list makes no program.
pub fn machine(mode: Mode) -> Result<Vec<Program>, FilterError> {
    let Some(unlisted) = of_unlisted(mode, SeccompAction::Trap) else { return Ok(Vec::new()) };
    let listed = calls::of_a_machine(process::id()).into_iter().flat_map(|group| group.calls);
    let list = program(listed, SeccompAction::Allow, unlisted)?;
    let mut programs = Vec::new();
    for refusal in calls::refused() {
        let answer = SeccompAction::Errno(refusal.errno.unsigned_abs());
        programs.push(program(refusal.calls, answer, SeccompAction::Allow)?);
    }
    // The list last: it does not let another one be applied.
    programs.push(list);
    Ok(programs)
}

/// What confines the child of this process that makes rings for it. It has nobody to tell why it ends.
///
/// # Errors
/// When the list makes no program.
pub fn ring_maker(mode: Mode) -> Result<Program, FilterError> {
    let unlisted = of_unlisted(mode, SeccompAction::KillProcess).unwrap_or(SeccompAction::Log);
    let listed = calls::of_the_ring_maker(process::id()).into_iter().flat_map(|group| group.calls);
    program(listed, SeccompAction::Allow, unlisted)
}

fn of_unlisted(mode: Mode, on: SeccompAction) -> Option<SeccompAction> {
    match mode {
        Mode::On => Some(on),
        Mode::Log => Some(SeccompAction::Log),
        Mode::Off => None,
    }
}

fn program(
    calls: impl IntoIterator<Item = Call>,
    listed: SeccompAction,
    others: SeccompAction,
) -> Result<Program, FilterError> {
    let mut rules = BTreeMap::new();
    for call in calls {
        let alternatives = call.alternatives.iter().map(|conditions| rule(conditions));
        rules.insert(call.number, alternatives.collect::<Result<Vec<_>, _>>()?);
    }
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, others, listed, architecture)?;
    Ok(Program(BpfProgram::try_from(filter)?))
}

fn rule(conditions: &[Condition]) -> Result<SeccompRule, BackendError> {
    let condition = |condition: &Condition| {
        let through = match condition.mask {
            u32::MAX => SeccompCmpOp::Eq,
            mask => SeccompCmpOp::MaskedEq(mask.into()),
        };
        SeccompCondition::new(condition.argument, SeccompCmpArgLen::Dword, through, condition.value.into())
    };
    SeccompRule::new(conditions.iter().map(condition).collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_make_programs_that_the_kernel_takes() {
        // `BPF_MAXINSNS` of linux/bpf_common.h.
        const MOST: usize = 4096;
        let programs = machine(Mode::On).unwrap();
        assert_eq!(programs.len(), calls::refused().len() + 1);
        assert!(programs.iter().all(|program| (1..MOST).contains(&program.length())));
        assert!(ring_maker(Mode::On).unwrap().length() < programs.last().unwrap().length());
        assert!(machine(Mode::Off).unwrap().is_empty());
    }
}
