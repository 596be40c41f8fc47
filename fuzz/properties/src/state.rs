use switchover_runtime::arch::{Parts, SavedMachine};

use crate::input::Input;

const HEADER: usize = 16;
const CRC_AT: usize = 12;

/// Saved states. The first byte says how many vCPUs are expected, whether host files are, and with its highest bit that the sections' checksums are made
/// to fit.
pub fn state(bytes: &[u8]) {
    let mut input = Input(bytes);
    let how = input.u8();
    let parts = Parts { vcpus: usize::from(how & 3) + 1, host_files: how & 4 != 0 };
    let mut state = input.0.to_vec();
    if how & 0x80 != 0 {
        seal(&mut state);
    }
    let Ok(saved) = SavedMachine::read(&state, parts) else { return };
    let written = saved.write().unwrap();
    assert_eq!(written.len(), state.len(), "something was cut off, or filled up");
    let again = SavedMachine::read(&written, parts).unwrap();
    assert_eq!(again.write().unwrap(), written);
}

/// Writes the checksum of each section that there is.
fn seal(state: &mut [u8]) {
    let Some((_, mut rest)) = state.split_at_mut_checked(HEADER) else { return };
    while let Some((header, behind)) = rest.split_at_mut_checked(HEADER) {
        let length = u32::from_le_bytes(*header[8..].first_chunk().unwrap()) as usize;
        let Some((payload, behind)) = behind.split_at_mut_checked(length) else { return };
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&header[..CRC_AT]);
        hasher.update(payload);
        header[CRC_AT..].copy_from_slice(&hasher.finalize().to_le_bytes());
        rest = behind;
    }
}
