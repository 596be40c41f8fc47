//! A guest that is none of ours: a PVH ELF assembled by hand, which knows nothing of this project.

/// Where it is linked.
const BASE: u32 = 0x10_0000;

/// Counts for ever, printing each number as eight hexadecimal digits and a line feed on the UART at 0x3f8, from 0x40
/// on. It keeps no number: each is made of a word in one of 64 pages, taken in turn, and of that page's index, so
/// that a lost or old page shows as a number that comes again or too early.
#[must_use]
pub fn counter() -> Vec<u8> {
    let mut code = vec![0x31, 0xed]; // xor ebp, ebp
    let next = code.len();
    code.extend([0x89, 0xe8]); // mov eax, ebp
    code.extend([0x83, 0xe0, 0x3f]); // and eax, 63
    code.extend([0x89, 0xc6]); // mov esi, eax
    code.extend([0xc1, 0xe0, 0x0c]); // shl eax, 12
    code.extend([0xff, 0x80, 0x00, 0x00, 0x40, 0x00]); // inc dword [eax + 0x400000]
    code.extend([0x8b, 0x98, 0x00, 0x00, 0x40, 0x00]); // mov ebx, [eax + 0x400000]
    code.extend([0xc1, 0xe3, 0x06]); // shl ebx, 6
    code.extend([0x09, 0xf3]); // or ebx, esi
    code.push(0x45); // inc ebp
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    code.extend([0xb9, 0x08, 0x00, 0x00, 0x00]); // mov ecx, 8
    let digit = code.len();
    code.extend([0xc1, 0xc3, 0x04]); // rol ebx, 4
    code.extend([0x88, 0xd8]); // mov al, bl
    code.extend([0x24, 0x0f]); // and al, 15
    code.extend([0x3c, 0x0a]); // cmp al, 10
    code.extend([0x72, 0x02]); // jb +2
    code.extend([0x04, 0x27]); // add al, 'a' - '0' - 10
    code.extend([0x04, 0x30]); // add al, '0'
    code.push(0xee); // out dx, al
    code.push(0x49); // dec ecx
    jump(&mut code, 0x75, digit); // jnz digit
    code.extend([0xb0, 0x0a]); // mov al, 10
    code.push(0xee); // out dx, al
    jump(&mut code, 0xeb, next); // jmp next
    elf(&code, true)
}

/// A 64-bit ELF with `code`, which starts it at its first byte if there is a PVH note, and nowhere if not.
#[must_use]
pub fn elf(code: &[u8], with_note: bool) -> Vec<u8> {
    const CODE_AT: u64 = 0x100;
    const NOTE_AT: u64 = 64 + 2 * 56;
    const NOTE_BYTES: u64 = 20;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for number in [u64::from(BASE), 64, 0] {
        file.extend(number.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for number in [64_u16, 56, 2, 0, 0, 0] {
        file.extend(number.to_le_bytes());
    }
    let length = code.len() as u64;
    for (kind, offset, address, size) in [(1_u32, CODE_AT, u64::from(BASE), length), (4, NOTE_AT, 0, NOTE_BYTES)] {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for number in [offset, address, address, size, size, 4] {
            file.extend(number.to_le_bytes());
        }
    }
    // Of another kind than PVH's where there is to be none.
    for number in [4_u32, 4, if with_note { 18 } else { 6 }] {
        file.extend(number.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(BASE.to_le_bytes());
    file.resize(usize::try_from(CODE_AT).unwrap(), 0);
    file.extend(code);
    file
}

/// A short jump back.
fn jump(code: &mut Vec<u8>, opcode: u8, to: usize) {
    let distance = code.len() + 2 - to;
    code.extend([opcode, (-i8::try_from(distance).unwrap()).to_le_bytes()[0]]);
}
