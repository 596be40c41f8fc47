//! What becomes of a guest that asks to be saved: operation 5 of its [host files](crate::devices::host_files).

use std::path::PathBuf;
use std::sync::Arc;
use std::{io, thread};

use crossbeam::channel::{Receiver, bounded};
use nix::errno::Errno;
use switchover_hybrid::saving::How;
use switchover_hybrid::security::Security;
use switchover_hybrid::settings::Settings;
use switchover_hybrid::status::MigrationStatus;
use switchover_wire::address::Address;

use crate::controller::VmController;
use crate::devices::host_files::HostFiles;
use crate::qmp::controller::{ControlError, Controller as _};
use crate::run_state::RunState;
use crate::vm::Vm;

/// Where a guest goes that asks to be saved.
pub enum OnSave {
    /// Into an image.
    File(PathBuf),
    /// To a machine that waits for it, by a migration with these settings.
    Machine(Address, Box<(Settings, Security)>),
}

/// Saves the guest of `controller`'s machine whenever it asks for that, and ends the machine when that is done. A guest that cannot be
/// saved goes on, and is told so.
///
/// # Errors
/// When no thread can be started.
pub fn attend(vm: &Arc<Vm>, controller: &Arc<VmController>, on_save: OnSave) -> io::Result<()> {
    let Some(files) = vm.host_files() else { return Ok(()) };
    // One wish at a time.
    let (asked, wishes) = bounded(1);
    files.tell_of_wishes(move || {
        let _ = asked.try_send(());
    });
    let (vm, controller) = (Arc::clone(vm), Arc::clone(controller));
    let attendant = move || {
        if let Some(files) = vm.host_files() {
            serve(&wishes, files, &controller, &on_save);
        }
    };
    thread::Builder::new().name("on-save".to_owned()).spawn(attendant).map(drop)
}

fn serve(wishes: &Receiver<()>, files: &HostFiles, controller: &VmController, on_save: &OnSave) {
    for () in wishes {
        match fulfil(controller, on_save) {
            Ok(Some(MigrationStatus::Completed)) => {
                files.saved();
                if let OnSave::Machine(..) = on_save {
                    files.log().note(format_args!("VM STATE SENT"));
                    files.log().note_of_machine("EXITING");
                }
                return controller.end();
            }
            Ok(_) => {
                let reason = controller.migration().and_then(|migration| migration.progress.error).unwrap_or_default();
                tracing::error!(reason, "the guest asked to be saved, and was not");
                // Where it had been paused for it, it was told when it was let go on. What is not here any more is left alone.
                if matches!(controller.run_state(), RunState::Running | RunState::Paused) {
                    files.refuse_to_save(Errno::EIO);
                }
            }
            Err(error) => {
                tracing::error!(%error, "the guest asked to be saved, and cannot be");
                files.refuse_to_save(Errno::EBUSY);
            }
        }
    }
}

/// Begins it, and waits for its end.
fn fulfil(controller: &VmController, on_save: &OnSave) -> Result<Option<MigrationStatus>, ControlError> {
    match on_save {
        OnSave::File(path) => controller.save(path, How::default())?,
        OnSave::Machine(address, how) => {
            let (settings, security) = &**how;
            controller.migrate(address.clone(), *settings, security.clone())?;
        }
    }
    Ok(controller.wait_until_it_has_left())
}
