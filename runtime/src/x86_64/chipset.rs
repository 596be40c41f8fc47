//! What KVM emulates for the machine as a whole: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip,
    kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::layout;
use crate::error::VmError;

/// Interrupt controllers and timer. None of it points into guest memory.
#[derive(Clone, Debug)]
pub struct SavedChipset {
    /// The two PICs.
    pub pics: [SavedIrqchip; 2],
    /// The I/O APIC.
    pub ioapic: SavedIrqchip,
    /// The timer.
    pub pit: SavedPit,
}

/// One interrupt controller.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedIrqchip(kvm_irqchip);

/// The timer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedPit(kvm_pit_state2);

/// Gives a new VM its chipset. To be called before any vCPU is made.
///
/// # Errors
/// When KVM refuses.
pub fn create(vm: &VmFd) -> Result<(), VmError> {
    vm.set_identity_map_address(layout::IDENTITY_MAP).map_err(VmError::kvm("place the identity map"))?;
    // Only VMX without unrestricted guests needs it, and KVM without VMX may not know the call.
    if let Err(error) = vm.set_tss_address(layout::TSS) {
        tracing::debug!(%error, "KVM takes no TSS address");
    }
    vm.create_irq_chip().map_err(VmError::kvm("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(VmError::kvm("create the timer"))
}

/// Reads the chipset.
///
/// # Errors
/// When KVM does not give it.
pub fn save(vm: &VmFd) -> Result<SavedChipset, VmError> {
    let chip = |chip_id| -> Result<SavedIrqchip, VmError> {
        let mut state = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut state).map_err(VmError::kvm(format!("read interrupt controller {chip_id}")))?;
        Ok(SavedIrqchip(state))
    };
    Ok(SavedChipset {
        pics: [chip(KVM_IRQCHIP_PIC_MASTER)?, chip(KVM_IRQCHIP_PIC_SLAVE)?],
        ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
        pit: SavedPit(vm.get_pit2().map_err(VmError::kvm("read the timer"))?),
    })
}

/// Sets the chipset. The vCPUs' local APICs must be set already: the I/O APIC delivers to them what it still holds.
///
/// # Errors
/// When KVM refuses.
pub fn load(vm: &VmFd, saved: &SavedChipset) -> Result<(), VmError> {
    let ids = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
    for (chip_id, chip) in ids.into_iter().zip([&saved.pics[0], &saved.pics[1], &saved.ioapic]) {
        // Whatever the section says, it is loaded into the controller that the section is for.
        let chip = kvm_irqchip { chip_id, ..chip.0 };
        vm.set_irqchip(&chip).map_err(VmError::kvm(format!("set interrupt controller {chip_id}")))?;
    }
    // Last: its interrupt goes through the controllers.
    vm.set_pit2(&saved.pit.0).map_err(VmError::kvm("set the timer"))
}
