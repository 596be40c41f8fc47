//! The guest that works on a file of the host: it opens one, writes 16 bytes, writes 12 more, closes it, and ends itself with 0.
//!
//! On its command line, `wait` has it wait between the two writes for the file `./go` to appear, and `save` has it ask to be saved there.
//!
//! It prints nothing: the device's log says what it does.

use core::cell::UnsafeCell;
use core::hint::spin_loop;

use crate::cpu::{port_out_32, tsc};
use crate::platform::{self, EXIT_DONE, EXIT_REFUSED};
use crate::start_info::{COMMAND_LINE_MAX, StartInfo};
use crate::{serial, traps};

/// Where the device is told of a request.
const PORT: u16 = 0x5c0;

const OPEN: u64 = 1;
const WRITE: u64 = 3;
const CLOSE: u64 = 4;
const SAVE: u64 = 5;

/// `O_RDWR | O_CREAT | O_LARGEFILE`, as Linux has them, and permissions for all.
const FLAGS: u64 = 0x8042;
const MODE: u64 = 0o777;

const PATH: &[u8] = b"./ay_caramba";
const FIRST: &[u8; 16] = b"written before.\n";
const SECOND: &[u8; 12] = b"and after.\n\n";
const GO: &[u8] = b"./go";

/// Between two looks for a file: about a hundredth of a second.
const PAUSE_TICKS: u64 = 25_000_000;

/// A request, as the device finds it.
#[repr(C, align(8))]
struct Request(UnsafeCell<[u64; 6]>);

// SAFETY: one vCPU uses it.
unsafe impl Sync for Request {}

static REQUEST: Request = Request(UnsafeCell::new([0; 6]));

/// What the one vCPU runs.
pub fn run() -> ! {
    traps::init();
    platform::quiet();
    serial::init();
    let between = Between::read().unwrap_or_else(|reason| platform::fail(EXIT_REFUSED, format_args!("E {reason}")));
    let file = needed("open a file", ask(OPEN, [address(PATH), PATH.len() as u64, FLAGS, MODE]));
    needed("write", ask(WRITE, [file, address(FIRST), FIRST.len() as u64, 0]));
    match between {
        Between::Nothing => {}
        Between::Wait => wait_for_the_file(),
        Between::Save => {
            needed("be saved", ask(SAVE, [0; 4]));
        }
    }
    needed("write", ask(WRITE, [file, address(SECOND), SECOND.len() as u64, 0]));
    needed("close a file", ask(CLOSE, [file, 0, 0, 0]));
    platform::exit(EXIT_DONE)
}

/// What it does between its two writes.
enum Between {
    Nothing,
    Wait,
    Save,
}

impl Between {
    fn read() -> Result<Self, &'static str> {
        let mut buffer = [0; COMMAND_LINE_MAX];
        match StartInfo::find()?.command_line(&mut buffer)?.trim_ascii() {
            b"" => Ok(Self::Nothing),
            b"wait" => Ok(Self::Wait),
            b"save" => Ok(Self::Save),
            _ => Err("the command line is neither empty nor `wait` nor `save`"),
        }
    }
}

fn wait_for_the_file() {
    while ask(OPEN, [address(GO), GO.len() as u64, 0, 0]) < 0 {
        let until = tsc() + PAUSE_TICKS;
        while tsc() < until {
            spin_loop();
        }
    }
}

fn address(bytes: &[u8]) -> u64 {
    // Memory is mapped identically.
    bytes.as_ptr().addr() as u64
}

/// Has the device do something, and says what came of it.
fn ask(operation: u64, [first, second, third, fourth]: [u64; 4]) -> i64 {
    let request = REQUEST.0.get();
    // SAFETY: one vCPU uses it, and the device only while that is in `port_out_32`.
    unsafe { request.write_volatile([operation, 0, first, second, third, fourth]) };
    #[expect(clippy::cast_possible_truncation, reason = "the image lies below 4 GiB")]
    port_out_32(PORT, request.addr() as u32);
    // SAFETY: as above.
    let [_, result, ..] = unsafe { request.read_volatile() };
    result.cast_signed()
}

fn needed(what: &str, result: i64) -> u64 {
    u64::try_from(result).unwrap_or_else(|_| {
        platform::fail(EXIT_REFUSED, format_args!("E the host does not let this guest {what}: error {}", -result))
    })
}
