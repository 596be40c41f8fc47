//! A machine's saved state as a whole: which sections it has, and in which order they are written.

use super::chipset::SavedChipset;
use super::clock::SavedClock;
use super::vcpu_state::SavedVcpu;
use crate::devices::host_files::SavedHostFiles;
use crate::devices::serial::SavedSerial;
use crate::state::{Kind, SectionId, StateError, StateReader, StateWriter};

const PICS: [SectionId; 2] = [SectionId::new(Kind::Pic, 0), SectionId::new(Kind::Pic, 1)];
const IOAPIC: SectionId = SectionId::new(Kind::Ioapic, 0);
const PIT: SectionId = SectionId::new(Kind::Pit, 0);
const CLOCK: SectionId = SectionId::new(Kind::Clock, 0);
/// The serial port's section.
pub(super) const SERIAL: SectionId = SectionId::new(Kind::Serial, 0);
/// The section of the host files, where the machine has them.
pub(super) const HOST_FILES: SectionId = SectionId::new(Kind::HostFiles, 0);

/// What a machine is made of, so far as its saved state depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parts {
    /// How many vCPUs.
    pub vcpus: usize,
    /// Whether it has host files.
    pub host_files: bool,
}

/// Everything of a machine but its memory.
#[derive(Clone, Debug)]
pub struct SavedMachine {
    pub(super) vcpus: Vec<SavedVcpu>,
    pub(super) chipset: SavedChipset,
    pub(super) clock: SavedClock,
    pub(super) serial: SavedSerial,
    pub(super) host_files: Option<SavedHostFiles>,
}

impl SavedMachine {
    /// What was written down of a machine of these parts. All of it is read, so that damage is found before any of it is
    /// used.
    ///
    /// # Errors
    /// When the bytes are not such a state.
    pub fn read(state: &[u8], parts: Parts) -> Result<Self, StateError> {
        let numbers = || (0..).take(parts.vcpus).map(|number| SectionId::new(Kind::Vcpu, number));
        let files = parts.host_files.then_some(HOST_FILES);
        let sections: Vec<_> = numbers().chain(PICS).chain([IOAPIC, PIT, CLOCK, SERIAL]).chain(files).collect();
        let reader = StateReader::new(state, &sections)?;
        Ok(Self {
            vcpus: numbers().map(|section| reader.read(section)).collect::<Result<_, _>>()?,
            chipset: SavedChipset {
                pics: [reader.read(PICS[0])?, reader.read(PICS[1])?],
                ioapic: reader.read(IOAPIC)?,
                pit: reader.read(PIT)?,
            },
            clock: reader.read(CLOCK)?,
            serial: reader.read(SERIAL)?,
            host_files: files.map(|section| reader.read(section)).transpose()?,
        })
    }

    /// Writes it down.
    ///
    /// # Errors
    /// When a part of it cannot be written.
    pub fn write(&self) -> Result<Vec<u8>, StateError> {
        let mut writer = StateWriter::new();
        for (number, vcpu) in (0..).zip(&self.vcpus) {
            writer.add(SectionId::new(Kind::Vcpu, number), vcpu)?;
        }
        for (section, pic) in PICS.into_iter().zip(&self.chipset.pics) {
            writer.add(section, pic)?;
        }
        writer.add(IOAPIC, &self.chipset.ioapic)?;
        writer.add(PIT, &self.chipset.pit)?;
        writer.add(CLOCK, &self.clock)?;
        writer.add(SERIAL, &self.serial)?;
        if let Some(files) = &self.host_files {
            writer.add(HOST_FILES, files)?;
        }
        Ok(writer.finish())
    }
}
