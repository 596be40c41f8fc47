//! The built-in guests: freestanding programs that verify every page they visit and report every gap they feel.
//!
//! Their package, `guest-tests/guests`, says what they print and understand. They are embedded so that `switchover
//! bench` needs no file beside it; the same bytes boot under `qemu-system-x86_64 -kernel`.

macro_rules! guests {
    (moved: $($moved:literal),+; others: $($other:literal),+ $(,)?) => {
        /// The names of those that a bench moves, the one that is moved by default first.
        pub const NAMES: &[&str] = &[$($moved),+];

        /// The names of all others.
        #[cfg(test)]
        const OTHERS: &[&str] = &[$($other),+];

        /// The ELF file of the guest with this name; `None` where there is no such guest.
        #[must_use]
        pub fn builtin(name: &str) -> Option<&'static [u8]> {
            match name {
                $($moved => Some(include_bytes!(concat!(env!("SWITCHOVER_GUESTS"), "/", $moved))),)+
                $($other => Some(include_bytes!(concat!(env!("SWITCHOVER_GUESTS"), "/", $other))),)+
                _ => None,
            }
        }
    };
}

guests!(moved: "random", "sequential", "hotset", "reader", "idle", "once"; others: "hostfile");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_is_an_executable_with_a_pvh_entry() {
        for name in NAMES.iter().chain(OTHERS) {
            let elf = builtin(name).unwrap_or_else(|| panic!("{name} is missing"));
            assert_eq!(&elf[..5], b"\x7fELF\x02", "{name} is not a 64-bit ELF file");
            assert_eq!(elf[16..18], 2_u16.to_le_bytes(), "{name} is not linked to a fixed address");
            // Name length, entry length, type, name; the entry follows.
            let mut note = Vec::new();
            for word in [4_u32, 8, 18] {
                note.extend(word.to_le_bytes());
            }
            note.extend(b"Xen\0");
            let at = elf.windows(note.len()).position(|window| window == note);
            let at = at.unwrap_or_else(|| panic!("{name} has no PVH note")) + note.len();
            assert_eq!(elf[at..at + 8], elf[24..32], "{name}'s PVH entry is not its ELF entry");
        }
    }

    #[test]
    fn an_unknown_name_is_no_guest() {
        assert!(builtin("nothing").is_none());
    }
}
