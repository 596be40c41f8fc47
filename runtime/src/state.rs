//! The saved state's form: sections, each with its own kind, number, version, length and checksum.
//!
//! ```text
//! magic 8 · version 4 · sections 4 │ kind 2 · number 2 · version 4 · length 4 · CRC-32 4 · payload │ …
//! ```
//!
//! All numbers are little-endian; the CRC covers the section's header before it and the payload; the payload is postcard.
//! A reader says what it expects, and takes nothing less and nothing more: each way in which bytes can differ from that is
//! an error of its own. Nothing is allocated by a length that was not checked against the bytes that are there.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// The version of the form and of all sections' contents together: what the handshake compares.
pub const STATE_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"SWOVRSTA";
const FILE_HEADER: usize = 16;
const SECTION_HEADER: usize = 16;
const CRC_AT: usize = 12;

/// What a section holds. The numbers are for good: a new meaning gets a new one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum Kind {
    /// One vCPU.
    Vcpu = 1,
    /// One of the two 8259 interrupt controllers.
    Pic = 2,
    /// The I/O APIC.
    Ioapic = 3,
    /// The 8254 timer.
    Pit = 4,
    /// The clocks.
    Clock = 5,
    /// The serial port.
    Serial = 6,
    /// The host files that are open.
    HostFiles = 7,
}

impl Kind {
    const ALL: [Self; 7] = [Self::Vcpu, Self::Pic, Self::Ioapic, Self::Pit, Self::Clock, Self::Serial, Self::HostFiles];

    fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == number)
    }

    /// The version of this kind's contents that is written, and the only one that is read.
    const fn version(self) -> u32 {
        match self {
            Self::Vcpu | Self::Pic | Self::Ioapic | Self::Pit | Self::Clock | Self::Serial | Self::HostFiles => 1,
        }
    }
}

/// One section: its kind, and its number among those of its kind.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SectionId {
    /// What it holds.
    pub kind: Kind,
    /// Counted from 0.
    pub number: u16,
}

impl SectionId {
    /// The section of `kind` with that number.
    #[must_use]
    pub const fn new(kind: Kind, number: u16) -> Self {
        Self { kind, number }
    }
}

impl fmt::Display for SectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Vcpu => "vCPU",
            Kind::Pic => "PIC",
            Kind::Ioapic => "I/O APIC",
            Kind::Pit => "PIT",
            Kind::Clock => "clock",
            Kind::Serial => "serial port",
            Kind::HostFiles => "host files",
        };
        write!(f, "{kind} {}", self.number)
    }
}

/// Bytes are not the saved state that was expected.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum StateError {
    /// Another kind of file altogether.
    #[error("this is no saved state: it does not begin with the magic number of one")]
    Magic,
    /// Written by another version.
    #[error(
        "the state is of version {found}, this build reads version {STATE_VERSION}: run the same version on both sides"
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// A section of another version.
    #[error("section {section} is of version {found}, this build reads version {expected}")]
    SectionVersion {
        /// Which.
        section: SectionId,
        /// Its version.
        found: u32,
        /// The one that would do.
        expected: u32,
    },
    /// It ends too early.
    #[error("the state ends after {have} bytes, in the middle of {within}")]
    Truncated {
        /// How many bytes there are.
        have: usize,
        /// What was being read.
        within: &'static str,
    },
    /// It goes on after its end.
    #[error("{extra} bytes follow the state's last section")]
    TrailingBytes {
        /// How many.
        extra: usize,
    },
    /// Bytes were changed.
    #[error("section {section} is damaged: its CRC is {found:#010x}, its bytes have {computed:#010x}")]
    Crc {
        /// Which.
        section: SectionId,
        /// As written in it.
        found: u32,
        /// As its bytes have it.
        computed: u32,
    },
    /// A section that this build does not know.
    #[error("the state has a section of the unknown kind {kind}")]
    UnknownKind {
        /// The number in place of a kind.
        kind: u16,
    },
    /// A section that this machine has no use for.
    #[error("the state has a section {section}, which this machine has no place for")]
    Unexpected {
        /// Which.
        section: SectionId,
    },
    /// A section twice.
    #[error("the state has section {section} twice")]
    Duplicate {
        /// Which.
        section: SectionId,
    },
    /// A section not at all.
    #[error("the state lacks section {section}")]
    Missing {
        /// Which.
        section: SectionId,
    },
    /// A section whose contents do not fill it, or do not fit it.
    #[error("section {section} has {found} bytes, its contents take {expected}")]
    Size {
        /// Which.
        section: SectionId,
        /// Its length.
        found: usize,
        /// What its contents come to.
        expected: usize,
    },
    /// A section whose contents make no sense.
    #[error("section {section} cannot be read: {reason}")]
    Contents {
        /// Which.
        section: SectionId,
        /// Why.
        reason: String,
    },
    /// A value that cannot be written.
    #[error("section {section} cannot be written: {reason}")]
    Write {
        /// Which.
        section: SectionId,
        /// Why.
        reason: String,
    },
}

/// A state being written.
#[derive(Debug)]
pub struct StateWriter {
    bytes: Vec<u8>,
    sections: u32,
}

impl Default for StateWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl StateWriter {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        let mut bytes = Vec::with_capacity(32 * 1024);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&STATE_VERSION.to_le_bytes());
        bytes.extend_from_slice(&0_u32.to_le_bytes());
        Self { bytes, sections: 0 }
    }

    /// Adds a section.
    ///
    /// # Errors
    /// When the value cannot be written down, or is of 4 GiB or more.
    pub fn add<T: Serialize>(&mut self, section: SectionId, value: &T) -> Result<(), StateError> {
        let failed = |reason: String| StateError::Write { section, reason };
        let payload = postcard::to_allocvec(value).map_err(|error| failed(error.to_string()))?;
        let length = u32::try_from(payload.len()).map_err(|error| failed(error.to_string()))?;
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&(section.kind as u16).to_le_bytes());
        self.bytes.extend_from_slice(&section.number.to_le_bytes());
        self.bytes.extend_from_slice(&section.kind.version().to_le_bytes());
        self.bytes.extend_from_slice(&length.to_le_bytes());
        let crc = checksum(self.bytes.get(start..).unwrap_or_default(), &payload);
        self.bytes.extend_from_slice(&crc.to_le_bytes());
        self.bytes.extend_from_slice(&payload);
        self.sections += 1;
        Ok(())
    }

    /// The whole state.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        if let Some(count) = self.bytes.get_mut(12..FILE_HEADER) {
            count.copy_from_slice(&self.sections.to_le_bytes());
        }
        self.bytes
    }
}

/// A state that has been checked down to its sections' checksums.
#[derive(Debug)]
pub struct StateReader<'a> {
    sections: Vec<(SectionId, &'a [u8])>,
}

impl<'a> StateReader<'a> {
    /// Takes `bytes` for a state that has exactly the `expected` sections, in any order.
    ///
    /// # Errors
    /// When it has not.
    pub fn new(bytes: &'a [u8], expected: &[SectionId]) -> Result<Self, StateError> {
        let sections = read_sections(bytes, |section| expected.contains(&section))?;
        match expected.iter().find(|wanted| !sections.iter().any(|(known, _)| known == *wanted)) {
            Some(section) => Err(StateError::Missing { section: *section }),
            None => Ok(Self { sections }),
        }
    }

    /// The contents of a section.
    ///
    /// # Errors
    /// When they make no sense, or do not fill the section exactly.
    pub fn read<T: DeserializeOwned + Serialize>(&self, section: SectionId) -> Result<T, StateError> {
        let payload = self
            .sections
            .iter()
            .find_map(|(known, payload)| (*known == section).then_some(*payload))
            .ok_or(StateError::Missing { section })?;
        let contents = |error: postcard::Error| StateError::Contents { section, reason: error.to_string() };
        let value = postcard::from_bytes::<T>(payload).map_err(contents)?;
        // The serde of kvm-bindings pads what is too short and cuts what is too long. Written again, such a value gives
        // itself away by its length; so does one with bytes after it.
        let expected = postcard::to_allocvec(&value).map_err(contents)?.len();
        if expected != payload.len() {
            return Err(StateError::Size { section, found: payload.len(), expected });
        }
        Ok(value)
    }
}

/// The sections of a state and their contents, in its order, whatever machine it is of. Each is checked by its checksum.
///
/// # Errors
/// When the bytes are no state of this version.
pub fn sections(bytes: &[u8]) -> Result<Vec<(SectionId, &[u8])>, StateError> {
    read_sections(bytes, |_| true)
}

/// The same of those that are `admitted`; others are an error.
fn read_sections(bytes: &[u8], admitted: impl Fn(SectionId) -> bool) -> Result<Vec<(SectionId, &[u8])>, StateError> {
    let mut rest = Rest { bytes, total: bytes.len() };
    if rest.bytes.len() >= MAGIC.len() && !rest.bytes.starts_with(&MAGIC) {
        return Err(StateError::Magic);
    }
    rest.take(MAGIC.len(), "its header")?;
    let version = rest.u32("its header")?;
    if version != STATE_VERSION {
        return Err(StateError::Version { found: version });
    }
    let count = rest.u32("its header")?;
    let mut sections: Vec<(SectionId, &[u8])> = Vec::new();
    for _ in 0..count {
        let (section, payload) = rest.section()?;
        if sections.iter().any(|(known, _)| *known == section) {
            return Err(StateError::Duplicate { section });
        }
        if !admitted(section) {
            return Err(StateError::Unexpected { section });
        }
        sections.push((section, payload));
    }
    if rest.bytes.is_empty() { Ok(sections) } else { Err(StateError::TrailingBytes { extra: rest.bytes.len() }) }
}

/// What is still to be read.
struct Rest<'a> {
    bytes: &'a [u8],
    total: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, length: usize, within: &'static str) -> Result<&'a [u8], StateError> {
        let (taken, rest) =
            self.bytes.split_at_checked(length).ok_or(StateError::Truncated { have: self.total, within })?;
        self.bytes = rest;
        Ok(taken)
    }

    fn u32(&mut self, within: &'static str) -> Result<u32, StateError> {
        self.take(4, within).map(u32_at_start)
    }

    fn section(&mut self) -> Result<(SectionId, &'a [u8]), StateError> {
        const WITHIN: &str = "a section's header";
        let header = self.take(SECTION_HEADER, WITHIN)?;
        let mut fields = Rest { bytes: header, total: self.total };
        let kind_and_number = fields.u32(WITHIN)?.to_le_bytes();
        let [kind_low, kind_high, number_low, number_high] = kind_and_number;
        let (version, length, crc) = (fields.u32(WITHIN)?, fields.u32(WITHIN)?, fields.u32(WITHIN)?);
        let number = u16::from_le_bytes([number_low, number_high]);
        let kind = u16::from_le_bytes([kind_low, kind_high]);
        let kind = Kind::from_number(kind).ok_or(StateError::UnknownKind { kind })?;
        let section = SectionId { kind, number };
        if version != kind.version() {
            return Err(StateError::SectionVersion { section, found: version, expected: kind.version() });
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let payload = self.take(length, "a section's contents")?;
        let computed = checksum(header.get(..CRC_AT).unwrap_or_default(), payload);
        if computed != crc {
            return Err(StateError::Crc { section, found: crc, computed });
        }
        Ok((section, payload))
    }
}

fn u32_at_start(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CLOCK: SectionId = SectionId::new(Kind::Clock, 0);
    const SERIAL: SectionId = SectionId::new(Kind::Serial, 0);
    const EXPECTED: [SectionId; 2] = [CLOCK, SERIAL];

    fn written() -> Vec<u8> {
        let mut writer = StateWriter::new();
        writer.add(CLOCK, &(1_u64, vec![7_u8; 40])).unwrap();
        writer.add(SERIAL, &"text".to_owned()).unwrap();
        writer.finish()
    }

    fn error(bytes: &[u8]) -> StateError {
        StateReader::new(bytes, &EXPECTED).unwrap_err()
    }

    /// Changes the first section's header and makes its CRC fit again.
    fn with_header(at: usize, value: u8) -> Vec<u8> {
        let mut bytes = written();
        bytes[FILE_HEADER + at] = value;
        let start = FILE_HEADER + SECTION_HEADER;
        let length = u32_at_start(&written()[FILE_HEADER + 8..]) as usize;
        let crc = checksum(&bytes[FILE_HEADER..FILE_HEADER + CRC_AT], &bytes[start..start + length]);
        bytes[FILE_HEADER + CRC_AT..start].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = written();
        let reader = StateReader::new(&bytes, &EXPECTED).unwrap();
        assert_eq!(reader.read::<(u64, Vec<u8>)>(CLOCK).unwrap(), (1, vec![7; 40]));
        assert_eq!(reader.read::<String>(SERIAL).unwrap(), "text");
    }

    #[test]
    fn sections_are_told_apart_whatever_machine_they_are_of() {
        let bytes = written();
        let found: Vec<_> = sections(&bytes).unwrap().into_iter().map(|(section, _)| section).collect();
        assert_eq!(found, EXPECTED);
        assert_eq!(sections(&bytes[..bytes.len() - 1]).unwrap_err(), error(&bytes[..bytes.len() - 1]));
    }

    #[test]
    fn every_kind_of_damage_has_its_error() {
        let good = written();
        let mut bytes = good.clone();
        bytes[0] ^= 1;
        assert_eq!(error(&bytes), StateError::Magic);

        let mut bytes = good.clone();
        bytes[8] = 9;
        assert_eq!(error(&bytes), StateError::Version { found: 9 });

        assert_eq!(error(&with_header(0, 99)), StateError::UnknownKind { kind: 99 });
        let other = SectionId::new(Kind::Clock, 3);
        assert_eq!(error(&with_header(2, 3)), StateError::Unexpected { section: other });
        assert_eq!(error(&with_header(4, 2)), StateError::SectionVersion { section: CLOCK, found: 2, expected: 1 });

        let mut bytes = good.clone();
        bytes[FILE_HEADER + SECTION_HEADER + 5] ^= 0x40;
        assert!(matches!(error(&bytes), StateError::Crc { section: CLOCK, .. }));

        for length in 0..good.len() {
            assert!(matches!(error(&good[..length]), StateError::Truncated { .. }), "of {length} bytes");
        }
        let mut bytes = good.clone();
        bytes.push(0);
        assert_eq!(error(&bytes), StateError::TrailingBytes { extra: 1 });
    }

    #[test]
    fn a_section_must_be_there_exactly_once() {
        let mut writer = StateWriter::new();
        writer.add(CLOCK, &1_u8).unwrap();
        assert_eq!(error(&writer.finish()), StateError::Missing { section: SERIAL });
        let mut writer = StateWriter::new();
        writer.add(CLOCK, &1_u8).unwrap();
        writer.add(CLOCK, &1_u8).unwrap();
        assert_eq!(error(&writer.finish()), StateError::Duplicate { section: CLOCK });
    }

    #[test]
    fn contents_must_fill_their_section() {
        let bytes = written();
        let reader = StateReader::new(&bytes, &EXPECTED).unwrap();
        assert!(matches!(reader.read::<u8>(CLOCK), Err(StateError::Size { section: CLOCK, expected: 1, .. })));
        assert!(matches!(reader.read::<(u64, Vec<u8>, u64)>(CLOCK), Err(StateError::Contents { .. })));
    }

    #[test]
    fn kvm_structures_of_another_size_are_refused() {
        let mut writer = StateWriter::new();
        writer.add(CLOCK, &vec![0_u8; 12]).unwrap();
        writer.add(SERIAL, &vec![0_u8; 200]).unwrap();
        let bytes = writer.finish();
        let reader = StateReader::new(&bytes, &EXPECTED).unwrap();
        for section in EXPECTED {
            assert!(matches!(reader.read::<kvm_bindings::kvm_regs>(section), Err(StateError::Size { .. })));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = StateReader::new(&bytes, &EXPECTED);
        }

        #[test]
        fn changed_bytes_are_noticed(at in 0..written().len(), by in 1..=255_u8) {
            let mut bytes = written();
            bytes[at] ^= by;
            prop_assert!(StateReader::new(&bytes, &EXPECTED).is_err());
        }

        #[test]
        fn arbitrary_contents_never_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let crc_header = [5, 0, 0, 0, 1, 0, 0, 0, u8::try_from(payload.len()).unwrap(), 0, 0, 0];
            let mut bytes = [&MAGIC[..], &STATE_VERSION.to_le_bytes(), &1_u32.to_le_bytes(), &crc_header].concat();
            bytes.extend(checksum(&crc_header, &payload).to_le_bytes());
            bytes.extend(&payload);
            let reader = StateReader::new(&bytes, &[CLOCK]).unwrap();
            let _ = reader.read::<(u64, Vec<u8>)>(CLOCK);
            let _ = reader.read::<kvm_bindings::kvm_irqchip>(CLOCK);
        }
    }
}
