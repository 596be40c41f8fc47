//! A guest that asks to be saved: what its two machines print, to the letter.

use std::fs;
use std::path::PathBuf;

use switchover_guest_tests::lab::{Ended, Lab, switchover};
use switchover_guest_tests::machine::Spec;
use switchover_guest_tests::moving::{Transport, destination};

use crate::lab;

/// A guest that opens a file, writes 16 bytes, asks to be saved, writes 12 more, closes the file and ends itself with 0.
struct Scene {
    kernel: PathBuf,
    directory: PathBuf,
}

impl Scene {
    fn of(lab: &Lab) -> Self {
        let directory = lab.path("files");
        fs::create_dir(&directory).unwrap();
        Self { kernel: lab.guest("hostfile", "save").kernel.unwrap(), directory }
    }

    /// A machine with that guest, or another one, until its end.
    fn run(&self, more: &[&str]) -> Ended {
        let directory = self.directory.to_str().unwrap();
        switchover(&[&["run", "--memory", "64M", "--host-files", directory], more].concat())
    }

    fn boot(&self, more: &[&str]) -> Ended {
        self.run(&[&["--kernel", self.kernel.to_str().unwrap(), "--append", "save"], more].concat())
    }

    fn written(&self) -> String {
        fs::read_to_string(self.directory.join("ay_caramba")).unwrap()
    }
}

const FIRST_PART: &str = "written before.\n";
const BOTH_PARTS: &str = "written before.\nand after.\n\n";

/// The address in the line of a write, which is wherever the guest was built to have its bytes, put in for `@`.
fn with_address(expected: &str, printed: &str) -> String {
    let address = printed.lines().find_map(|line| line.split_once("WRITE 3 ")?.1.split(' ').next());
    expected.replace('@', address.unwrap_or("@"))
}

fn prints(printed: &str, expected: &str) {
    assert_eq!(printed, with_address(expected, printed));
}

#[test]
fn a_guest_saves_itself_and_works_on_in_a_new_process() {
    let lab = lab!("a_guest_saves_itself_and_works_on_in_a_new_process");
    let scene = Scene::of(&lab);
    let image = lab.path("guest.image");
    let to = format!("file:{}", image.display());
    let first = scene.boot(&["--log-host-files", "--on-save", &to]);
    assert_eq!((first.status, &*first.stderr), (Some(0), ""), "{first:?}");
    prints(&first.stdout, "OPEN ./ay_caramba 32834 511 - return 3\nWRITE 3 @ 16 - return 16\nSAVE OPERATION\n");
    assert_eq!(scene.written(), FIRST_PART);
    let second = scene.run(&["--log-host-files", "--restore", image.to_str().unwrap()]);
    assert_eq!((second.status, &*second.stderr), (Some(0), ""), "{second:?}");
    prints(&second.stdout, "RESTORE OPERATION\nWRITE 3 @ 12 - return 12\nCLOSE 3 - return 0\nEXIT 0\n");
    assert_eq!(scene.written(), BOTH_PARTS);
    lab.close();
}

#[test]
fn a_guest_sends_itself_to_a_server_and_works_on_there() {
    for transport in [Transport::Tcp, Transport::Unix] {
        let lab = lab!("a_guest_sends_itself_to_a_server_and_works_on_there");
        let scene = Scene::of(&lab);
        let directory = scene.directory.to_str().unwrap().to_owned();
        let more = vec!["--host-files".to_owned(), directory, "--log-host-files=VMM_SERVER".to_owned()];
        let (mut server, to) = destination(&lab, &Spec { more, ..Spec::default() }, transport);
        let client = scene.boot(&["--log-host-files=VMM_CLIENT", "--on-save", &to]);
        assert_eq!(client.status, Some(0), "{client:?}");
        prints(
            &client.stdout,
            "VMM_CLIENT: VM_APP - OPEN ./ay_caramba 32834 511 - return 3\n\
             VMM_CLIENT: VM_APP - WRITE 3 @ 16 - return 16\n\
             VMM_CLIENT: VM_APP - SAVE OPERATION\n\
             VMM_CLIENT: VM_APP - VM STATE SENT\n\
             VMM_CLIENT: EXITING\n",
        );
        assert_eq!(server.wait_end(), 0, "{}", server.stderr().text());
        prints(
            &server.serial().to_end(),
            "VMM_SERVER: VM_APP - RESTORE OPERATION\n\
             VMM_SERVER: VM_APP - WRITE 3 @ 12 - return 12\n\
             VMM_SERVER: VM_APP - CLOSE 3 - return 0\n\
             VMM_SERVER: VM_APP - EXIT 0\n",
        );
        assert_eq!(scene.written(), BOTH_PARTS);
        lab.close();
    }
}

#[test]
fn a_guest_that_cannot_be_saved_is_told_so_and_runs_on() {
    let lab = lab!("a_guest_that_cannot_be_saved_is_told_so_and_runs_on");
    let scene = Scene::of(&lab);
    // Nobody listens there; no image can be made there; nobody does it at all.
    let nobody = format!("unix:{}", lab.path("nobody").display());
    for (on_save, lines) in [
        (&["--on-save", &*nobody][..], "SAVE OPERATION\nSAVE OPERATION - return -5\n"),
        (&["--on-save", "file:/proc/nowhere/guest.image"], "SAVE OPERATION\nSAVE OPERATION - return -16\n"),
        (&[], "SAVE OPERATION - return -95\n"),
    ] {
        let ended = scene.boot(&[&["--log-host-files"], on_save].concat());
        // This guest insists on it, and ends with an error of its own: so it ran on.
        assert_eq!(ended.status, Some(1), "{ended:?}");
        assert!(ended.stderr.contains("the guest ended itself with the code"), "{ended:?}");
        assert_eq!(ended.stderr.contains("the guest asked to be saved"), !on_save.is_empty(), "{ended:?}");
        // Without what it prints itself.
        let kinds = ["OPEN", "WRITE", "SAVE", "CLOSE"];
        let logged = |line: &&str| kinds.iter().any(|kind| line.starts_with(kind));
        let log: String = ended.stdout.split_inclusive('\n').filter(logged).collect();
        prints(&log, &format!("OPEN ./ay_caramba 32834 511 - return 3\nWRITE 3 @ 16 - return 16\n{lines}"));
        assert_eq!(scene.written(), FIRST_PART);
    }
    lab.close();
}

#[test]
fn where_a_guest_is_saved_to_must_be_somewhere() {
    let lab = lab!("where_a_guest_is_saved_to_must_be_somewhere");
    let scene = Scene::of(&lab);
    for (wrong, words) in [("file:", "the path of the image is missing"), ("nowhere", "nowhere")] {
        let ended = scene.boot(&["--on-save", wrong]);
        assert_eq!(ended.status, Some(2), "{ended:?}");
        assert!(ended.stderr.contains(words), "{ended:?}");
    }
    let without = switchover(&["run", "--kernel", scene.kernel.to_str().unwrap(), "--on-save", "file:a"]);
    assert_eq!(without.status, Some(2));
    assert!(without.stderr.contains("--host-files"), "{without:?}");
    lab.close();
}
