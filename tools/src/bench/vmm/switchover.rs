//! This program's own machines.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use switchover_hybrid::report::SideReport;

use super::{Machine, Vmm};
use crate::bench::run_error::RunError;
use crate::bench::schema::OURS;
use crate::confine::filter::Mode;
use crate::qmp_client::QmpClient;

const REPORT: &str = "x-switchover-report";

/// `switchover run` of one executable.
#[derive(Clone, Debug)]
pub struct Switchover {
    /// The executable.
    pub executable: PathBuf,
    /// What its lanes are protected by.
    pub lanes: Lanes,
    /// Whether it is confined to its system calls.
    pub seccomp: Mode,
}

/// What lanes are protected by.
#[derive(Clone, Debug)]
pub enum Lanes {
    /// Nothing; they stay within this host, though perhaps not within one of its networks.
    Plain,
    /// TLS, with credentials from this folder.
    Tls(PathBuf),
}

impl Vmm for Switchover {
    fn name(&self) -> &'static str {
        OURS
    }

    fn is_vcpu_thread(&self, name: &str) -> bool {
        name.strip_prefix("vcpu").is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    }

    fn source(&self, machine: &Machine, qmp: &Path) -> Command {
        let mut command = self.run(machine, qmp);
        command.arg("--kernel").arg(&machine.kernel).arg("--append").arg(&machine.append);
        command
    }

    fn destination(&self, machine: &Machine, qmp: &Path) -> Command {
        let mut command = self.run(machine, qmp);
        command.args(["--incoming", "defer"]);
        command
    }

    fn report(&self, who: &'static str, qmp: &mut QmpClient) -> Result<Option<SideReport>, RunError> {
        let report = qmp.execute(REPORT, json!({})).map_err(RunError::on(who))?;
        let report = serde_json::from_value(report).map_err(|error| RunError::Answer {
            who,
            command: REPORT,
            what: format!("a report that can be read: {error}"),
        })?;
        Ok(Some(report))
    }
}

impl Switchover {
    fn run(&self, machine: &Machine, qmp: &Path) -> Command {
        let mut command = Command::new(&self.executable);
        command.args(["run", "--serial", "stdio", "--memory", &machine.memory.to_string()]);
        command.args(["--vcpus", &machine.vcpus.to_string()]);
        match &self.lanes {
            Lanes::Plain => command.arg("--allow-plain"),
            Lanes::Tls(folder) => command.arg("--tls-creds").arg(folder),
        };
        command.args(["--seccomp", self.seccomp.name()]);
        command.arg("--qmp").arg(format!("unix:{}", qmp.display()));
        command
    }
}
