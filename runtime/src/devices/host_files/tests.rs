use std::fs;
use std::io::Read as _;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use switchover_pager::ram::Ram;
use switchover_wire::description::RamRegion;
use switchover_wire::types::{PageCount, PageIndex};
use tempfile::TempDir;

use super::request::REQUEST_BYTES;
use super::*;
use crate::devices::output::Output;

const PAGES: u64 = 8;
const REQUEST_AT: u64 = 0x1000;
const PATH_AT: u64 = 0x2000;
const DATA_AT: u64 = 0x3000;

const CREATE: u64 = 0x8042;

/// A device, its directory, and the guest's side of it.
struct Guest {
    device: HostFiles,
    folder: TempDir,
}

impl Guest {
    fn new() -> Self {
        Self::over(tempfile::tempdir().unwrap())
    }

    fn over(folder: TempDir) -> Self {
        let regions = vec![RamRegion { guest_address: 0, pages: PageCount(PAGES) }];
        let memory = GuestMemory::new(Ram::new(PageCount(PAGES)).unwrap(), regions).unwrap();
        fs::create_dir_all(folder.path().join("inside")).unwrap();
        let device = HostFiles::new(memory, &folder.path().join("inside"), Log::default()).unwrap();
        Self { device, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("inside").join(name)
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.device.memory.mapped().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn ask(&self, words: [u64; 5]) -> i64 {
        let [operation, first, second, third, fourth] = words;
        let request: Vec<u8> =
            [operation, 77, first, second, third, fourth].into_iter().flat_map(u64::to_le_bytes).collect();
        self.put(REQUEST_AT, &request);
        self.device.write(&u32::try_from(REQUEST_AT).unwrap().to_le_bytes(), &|| true);
        self.device.memory.read_u64(REQUEST_AT + 8).unwrap().cast_signed()
    }

    fn open(&self, path: &str, flags: u64) -> i64 {
        self.put(PATH_AT, path.as_bytes());
        self.ask([1, PATH_AT, path.len() as u64, flags, 0o777])
    }

    fn write(&self, file: u64, bytes: &[u8]) -> i64 {
        self.put(DATA_AT, bytes);
        self.ask([3, file, DATA_AT, bytes.len() as u64, 0])
    }
}

const fn error(errno: Errno) -> i64 {
    -(errno as i64)
}

#[test]
fn a_file_is_made_written_read_and_closed() {
    let guest = Guest::new();
    assert_eq!(guest.open("./new", CREATE), 3);
    assert_eq!(guest.open("inside", CREATE), 4, "the lowest number that is free");
    assert_eq!(guest.write(3, b"hello "), 6);
    assert_eq!(guest.write(3, b"world"), 5);
    assert_eq!(fs::read(guest.path("new")).unwrap(), b"hello world");
    assert_eq!(guest.ask([4, 3, 0, 0, 0]), 0);
    assert_eq!(guest.ask([4, 3, 0, 0, 0]), error(Errno::EBADF));
    assert_eq!(guest.write(3, b"more"), error(Errno::EBADF));

    assert_eq!(guest.open("new", 0), 3);
    assert_eq!(guest.ask([2, 3, DATA_AT, 100, 0]), 11);
    let mut read = [0; 12];
    guest.device.memory.mapped().read_slice(&mut read, GuestAddress(DATA_AT)).unwrap();
    assert_eq!(&read[..11], b"hello world");
    assert!(guest.device.memory.book().noted().contains(PageIndex(DATA_AT / 4096)), "written by the device");
    assert_eq!(guest.ask([2, 3, DATA_AT, 100, 0]), 0, "its end");
    assert_eq!(guest.write(3, b"x"), error(Errno::EBADF), "opened for reading");
}

#[test]
fn nothing_outside_of_the_directory_can_be_reached() {
    let guest = Guest::new();
    fs::write(guest.folder.path().join("secret"), b"secret").unwrap();
    symlink("../secret", guest.path("link")).unwrap();
    symlink(guest.folder.path(), guest.path("folder")).unwrap();
    for path in ["../secret", "/etc/passwd", "link", "folder/secret", "../inside/new", "/proc/self/exe"] {
        for flags in [0, CREATE] {
            assert_eq!(guest.open(path, flags), error(Errno::EXDEV), "{path}");
        }
    }
    symlink("real", guest.path("alias")).unwrap();
    assert_eq!(guest.open("alias", CREATE), 3, "a link within");
}

#[test]
fn only_ordinary_files_are_for_guests() {
    let guest = Guest::new();
    mkfifo(&guest.path("pipe"), Mode::S_IRWXU).unwrap();
    fs::create_dir(guest.path("folder")).unwrap();
    assert_eq!(guest.open("pipe", 0), error(Errno::EPERM));
    assert_eq!(guest.open("folder", 0), error(Errno::EISDIR));
    assert_eq!(guest.open("missing", 0), error(Errno::ENOENT));
    assert_eq!(guest.open("", 0), error(Errno::ENOENT));
    assert_eq!(guest.open("nul\0nul", CREATE), error(Errno::EINVAL));
    // O_PATH, O_TMPFILE and O_DIRECT, and a flag that does not exist.
    for flags in [0o10_000_000, 0o20_200_002, 0o40_000, 1 << 31, 1 << 40] {
        assert_eq!(guest.open("folder", flags), error(Errno::EINVAL), "{flags:o}");
    }
}

#[test]
fn what_is_not_memory_is_an_error_and_changes_nothing() {
    let guest = Guest::new();
    let end = PAGES * 4096;
    assert_eq!(guest.open("file", CREATE), 3);
    assert_eq!(guest.write(3, b"four"), 4);
    for (address, count) in [(end, 1), (end - 1, 2), (u64::MAX, 2), (DATA_AT, end), (u64::MAX - 1, 1 << 40)] {
        assert_eq!(guest.ask([2, 3, address, count, 0]), error(Errno::EFAULT));
        assert_eq!(guest.ask([3, 3, address, count, 0]), error(Errno::EFAULT));
    }
    assert_eq!(guest.ask([1, end - 1, 2, CREATE, 0]), error(Errno::EFAULT));
    assert_eq!(guest.ask([1, PATH_AT, 4096, CREATE, 0]), error(Errno::ENAMETOOLONG));
    guest.put(PATH_AT, b"\xff");
    assert_eq!(guest.ask([1, PATH_AT, 1, CREATE, 0]), error(Errno::EILSEQ));
    assert_eq!(guest.ask([9, 0, 0, 0, 0]), error(Errno::ENOSYS));
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"four");
    // Requests that are none: nobody can be told.
    for address in [0xffff_fff8_u64, end - REQUEST_BYTES as u64 + 8, REQUEST_AT + 4] {
        guest.device.write(&u32::try_from(address).unwrap().to_le_bytes(), &|| true);
    }
    guest.device.write(&[0], &|| true);
}

#[test]
fn a_guest_has_so_many_files_open_and_no_more() {
    let guest = Guest::new();
    for number in 3..259 {
        assert_eq!(guest.open("file", CREATE), number);
    }
    assert_eq!(guest.open("file", CREATE), error(Errno::EMFILE));
    assert_eq!(guest.ask([4, 100, 0, 0, 0]), 0);
    assert_eq!(guest.open("file", CREATE), 100);
}

#[test]
fn open_files_travel_with_where_the_guest_is_in_them() {
    const CREATE_EMPTY_EXCLUSIVELY: u64 = CREATE | 0o1000 | 0o200;
    let guest = Guest::new();
    assert_eq!(guest.open("first", CREATE), 3);
    assert_eq!(guest.open("./second", CREATE_EMPTY_EXCLUSIVELY), 4);
    assert_eq!(guest.open("appended", CREATE | 0o2000), 5);
    assert_eq!(guest.write(4, b"before, "), 8);
    assert_eq!(guest.ask([4, 3, 0, 0, 0]), 0);
    let saved = guest.device.save().unwrap();

    let there = Guest::over(guest.folder);
    there.device.load(there.device.reopen(&saved).unwrap());
    assert_eq!(there.write(4, b"after"), 5);
    assert_eq!(fs::read(there.path("second")).unwrap(), b"before, after", "neither emptied nor written over");
    fs::write(there.path("appended"), b"somebody else's, ").unwrap();
    assert_eq!(there.write(5, b"ours"), 4);
    assert_eq!(fs::read(there.path("appended")).unwrap(), b"somebody else's, ours");
    assert_eq!(there.open("first", 0), 3, "what was closed is free");
}

#[test]
fn files_that_the_other_side_lacks_are_named() {
    let guest = Guest::new();
    assert_eq!(guest.open("only here", CREATE), 3);
    let saved = guest.device.save().unwrap();
    let error = Guest::new().device.reopen(&saved).unwrap_err();
    assert!(error.contains("\"only here\"") && error.contains("ENOENT"), "{error}");
}

#[test]
fn saved_files_that_make_no_sense_are_refused() {
    let guest = Guest::new();
    fs::write(guest.path("file"), b"").unwrap();
    for (numbers, paths) in [
        ([2_u32, 3], ["file", "file"]),
        ([259, 3], ["file", "file"]),
        ([3, 3], ["file", "file"]),
        ([3, 4], ["file", "../x"]),
    ] {
        // As many bytes as postcard makes of it: number, path, flags and offset of each.
        let saved: SavedHostFiles = postcard::from_bytes(
            &postcard::to_allocvec(&[(numbers[0], paths[0], 0_u32, 0_u64), (numbers[1], paths[1], 0, 0)].to_vec())
                .unwrap(),
        )
        .unwrap();
        assert!(guest.device.reopen(&saved).is_err(), "{numbers:?} {paths:?}");
    }
}

#[test]
fn each_request_is_a_line_of_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let mut guest = Guest::new();
    guest.device.log = Log::new(Output::file(&log).unwrap(), None);
    assert_eq!(guest.open("./ay_caramba", CREATE), 3);
    assert_eq!(guest.write(3, b"0123456789abcdef"), 16);
    assert_eq!(guest.ask([2, 3, DATA_AT, 1, 0]), 0);
    assert_eq!(guest.ask([4, 3, 0, 0, 0]), 0);
    assert_eq!(guest.open("\u{1b}[2J\n", 0), -2);
    let mut said = String::new();
    fs::File::open(&log).unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(
        said,
        "OPEN ./ay_caramba 32834 511 - return 3\nWRITE 3 3000 16 - return 16\nREAD 3 3000 1 - return 0\n\
         CLOSE 3 - return 0\nOPEN \\u{1b}[2J\\n 0 511 - return -2\n"
    );
}

#[test]
fn a_guest_that_nobody_saves_is_told_so() {
    let guest = Guest::new();
    assert_eq!(guest.ask([5, 0, 0, 0, 0]), error(Errno::ENOTSUP));
}

#[test]
fn a_guest_that_asks_to_be_saved_goes_no_further_until_it_leaves_or_is_answered() {
    let mut guest = Guest::new();
    let log = guest.folder.path().join("log");
    guest.device.log = Log::new(Output::file(&log).unwrap(), Some("HERE".to_owned()));
    let heard = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&heard);
    guest.device.tell_of_wishes(move || {
        counted.fetch_add(1, Ordering::SeqCst);
    });
    let result = |guest: &Guest| guest.device.memory.read_u64(REQUEST_AT + 8).unwrap().cast_signed();
    let asks = |guest: &Guest, leaving: &AtomicBool, meanwhile: &dyn Fn()| {
        let request: Vec<u8> = [5, 77, 0, 0, 0, 0_u64].into_iter().flat_map(u64::to_le_bytes).collect();
        guest.put(REQUEST_AT, &request);
        let before = heard.load(Ordering::SeqCst);
        thread::scope(|scope| {
            let at = u32::try_from(REQUEST_AT).unwrap().to_le_bytes();
            let vcpu = scope.spawn(move || guest.device.write(&at, &|| leaving.load(Ordering::SeqCst)));
            while heard.load(Ordering::SeqCst) == before {
                thread::yield_now();
            }
            thread::sleep(Duration::from_millis(20));
            assert!(!vcpu.is_finished(), "it went on");
            assert_eq!(result(guest), 0, "what the restored guest finds");
            meanwhile();
        });
    };

    // It is paused and saved, and the one that goes on here afterwards finds the same.
    let leaving = AtomicBool::new(false);
    asks(&guest, &leaving, &|| leaving.store(true, Ordering::SeqCst));
    guest.device.saved();
    guest.device.refuse_to_save(Errno::EIO);
    assert_eq!(result(&guest), 0);
    // It is not paused, as nothing could be begun.
    let stays = AtomicBool::new(false);
    asks(&guest, &stays, &|| guest.device.refuse_to_save(Errno::EBUSY));
    assert_eq!(result(&guest), error(Errno::EBUSY));
    // It was paused, and the save failed. Meanwhile nobody else can ask.
    let leaving = AtomicBool::new(false);
    asks(&guest, &leaving, &|| leaving.store(true, Ordering::SeqCst));
    guest.put(PATH_AT, &[5_u64, 77, 0, 0, 0, 0].into_iter().flat_map(u64::to_le_bytes).collect::<Vec<_>>());
    guest.device.write(&u32::try_from(PATH_AT).unwrap().to_le_bytes(), &|| true);
    assert_eq!(guest.device.memory.read_u64(PATH_AT + 8).unwrap().cast_signed(), error(Errno::EBUSY));
    guest.device.refuse_to_save(Errno::EIO);
    assert_eq!(result(&guest), error(Errno::EIO));
    let lines = fs::read_to_string(log).unwrap();
    let save = "HERE: VM_APP - SAVE OPERATION";
    assert_eq!(
        lines.lines().collect::<Vec<_>>(),
        [
            save,
            save,
            &format!("{save} - return -16"),
            save,
            &format!("{save} - return -16"),
            &format!("{save} - return -5")
        ]
    );
}
