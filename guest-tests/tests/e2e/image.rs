//! Guests saved to files and restored from them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::{Lab, switchover};
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::waiting::until;

use crate::lab;

/// A machine like `spec` in which the guest of `image` is restored.
fn restored(spec: &Spec, image: &Path) -> Spec {
    let more = vec!["--restore".to_owned(), image.display().to_string()];
    Spec { kernel: None, append: String::new(), more, ..spec.clone() }
}

fn uri(image: &Path) -> serde_json::Value {
    json!({ "uri": format!("file:{}", image.display()) })
}

fn save(machine: &mut Machine, image: &Path) -> serde_json::Value {
    machine.execute("migrate", uri(image));
    machine.wait_migration("completed")
}

fn verify(image: &Path) {
    let verified = switchover(&["image", "verify", image.to_str().unwrap()]);
    assert_eq!(verified.status, Some(0), "{verified:?}");
}

/// Starts a machine that must refuse an image and end, and returns what it says.
fn refused(lab: &Lab, image: &Path, memory: &str, vcpus: &str) -> String {
    let qmp = lab.path("refusing.qmp");
    let image = image.to_str().unwrap();
    let arguments = ["run", "--restore", image, "--memory", memory, "--vcpus", vcpus, "--serial", "stdio", "--qmp"];
    let ended = switchover(&[&arguments[..], &[&format!("unix:{}", qmp.display())]].concat());
    assert_eq!((ended.status, ended.stdout.as_str()), (Some(1), ""), "{ended:?}");
    assert!(!qmp.exists(), "it left its QMP socket behind");
    ended.stderr
}

fn saved_and_restored(test: &str, vcpus: u8, compress: bool) {
    let Some(lab) = Lab::open(test) else { return };
    let image = lab.path("guest.image");
    let spec = Spec { vcpus, ..lab.guest("random", &format!("ws=16M period=50 vcpus={vcpus}")) };
    let mut here = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&here);
    journey.works_on(1);
    here.execute("migrate-set-parameters", json!({ "x-switchover-compress-image": compress }));
    let look = save(&mut here, &image);
    assert_eq!((&look["ram"]["remaining"], &look["ram"]["total"]), (&json!(0), &json!(64 << 20)), "{look}");
    assert!(look["ram"]["normal"].as_u64().unwrap() >= (16 << 20) / 4096, "{look}");
    assert_eq!(here.run_state(), "postmigrate");
    here.quit();
    verify(&image);
    // Twice, to see that a restored guest can be saved again.
    let mut there = Machine::start(&lab, &restored(&spec, &image));
    journey.goes_to(&there);
    journey.works_on(1);
    assert_eq!(there.run_state(), "running");
    save(&mut there, &image);
    there.quit();
    let mut last = Machine::start(&lab, &restored(&spec, &image));
    journey.goes_to(&last);
    journey.works_on(2);
    last.quit();
    journey.log();
    lab.close();
}

#[test]
fn a_saved_guest_works_on_in_a_new_process() {
    saved_and_restored("a_saved_guest_works_on_in_a_new_process", 1, false);
}

#[test]
fn a_compressed_guest_of_two_vcpus_works_on_in_a_new_process() {
    saved_and_restored("a_compressed_guest_of_two_vcpus_works_on_in_a_new_process", 2, true);
}

#[test]
fn the_command_saves_a_guest_that_may_go_on_beside_its_image() {
    let lab = lab!("the_command_saves_a_guest_that_may_go_on_beside_its_image");
    let image = lab.path("guest.image");
    let spec = lab.guest("random", "ws=8M period=50");
    let mut here = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&here);
    journey.works_on(1);
    // What an earlier migration may have left switched on.
    let capabilities = json!([{ "capability": "postcopy-ram", "state": true }]);
    here.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }));
    let reason = here.refuses("migrate", uri(&image));
    assert!(reason.contains("'postcopy-ram' off"), "{reason}");
    let arguments = ["save", "--qmp", &here.qmp_endpoint(), "--to", image.to_str().unwrap(), "--compress"];
    let ended = switchover(&arguments);
    assert!(ended.status == Some(0) && ended.stdout.starts_with("saved to "), "{ended:?}");
    verify(&image);
    let told = switchover(&["image", "inspect", image.to_str().unwrap()]);
    assert!(told.stdout.contains("running") && told.stdout.contains("vCPU 0"), "{told:?}");

    let reason = here.refuses("migrate", uri(&lab.path("another")));
    assert!(reason.contains("paused due to previous migration"), "{reason}");
    here.execute("cont", json!({}));
    assert_eq!(here.run_state(), "running");
    journey.works_on(1);
    // Its memory is another by now, and the machine is the same.
    let later = lab.path("later.image");
    save(&mut here, &later);
    let differing = switchover(&["image", "diff", image.to_str().unwrap(), later.to_str().unwrap()]);
    assert_eq!(differing.status, Some(1), "{differing:?}");
    assert!(differing.stdout.contains("memory") && !differing.stdout.contains("machine"), "{differing:?}");
    here.quit();
    journey.log();
    lab.close();
}

#[test]
fn a_live_save_leaves_the_guest_running_and_is_restored_sound() {
    let lab = lab!("a_live_save_leaves_the_guest_running_and_is_restored_sound");
    let image = lab.path("guest.image");
    let spec = Spec { vcpus: 2, ..lab.guest("random", "ws=16M period=50 vcpus=2") };
    let mut here = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&here);
    journey.works_on(1);
    for _ in 0..2 {
        let ended = switchover(&["save", "--qmp", &here.qmp_endpoint(), "--to", image.to_str().unwrap(), "--live"]);
        assert!(ended.status == Some(0) && ended.stdout.contains("and runs"), "{ended:?}");
        assert_eq!(here.run_state(), "running");
        verify(&image);
        journey.works_on(1);
    }
    // Its words since the save are heard twice: by itself, and from the image.
    let mut there = Machine::start(&lab, &restored(&spec, &image));
    there.wait_migration("completed");
    let text = there.serial();
    // Down to what follows `bad`: the last line may be cut anywhere.
    let period = |line: &str| line.starts_with("P ") && line.contains(" h: ");
    until("the restored guest works on", || {
        (text.text().lines().filter(|line| period(line)).count() > 4).then_some(())
    });
    let spoiled = text.text().lines().any(|line| period(line) && !line.contains(" bad 0 "));
    assert!(!spoiled, "{}", text.text());
    there.quit();
    journey.works_on(1);
    here.quit();
    journey.log();
    lab.close();
}

#[test]
fn a_guest_that_its_user_had_paused_is_restored_paused() {
    let lab = lab!("a_guest_that_its_user_had_paused_is_restored_paused");
    let image = lab.path("guest.image");
    let spec = lab.guest("random", "ws=8M period=50");
    let mut here = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&here);
    journey.works_on(1);
    here.execute("stop", json!({}));
    save(&mut here, &image);
    here.quit();
    let mut there = Machine::start(&lab, &restored(&spec, &image));
    there.wait_migration("completed");
    assert_eq!(there.run_state(), "paused");
    there.execute("cont", json!({}));
    journey.goes_to(&there);
    journey.works_on(1);
    there.quit();
    lab.close();
}

#[test]
fn what_does_not_fit_or_is_damaged_is_refused_and_nothing_runs() {
    let lab = lab!("what_does_not_fit_or_is_damaged_is_refused_and_nothing_runs");
    let image = lab.path("guest.image");
    let spec = lab.guest("random", "ws=8M period=50");
    let mut here = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&here);
    journey.works_on(1);
    save(&mut here, &image);
    here.quit();

    assert!(refused(&lab, &image, "128M", "1").contains("`--memory`"));
    assert!(refused(&lab, &image, "64M", "2").contains("`--vcpus`"));
    assert!(refused(&lab, &lab.path("none"), "64M", "1").contains("open the image"));
    let foreign = lab.file("foreign", b"\x7fELF and more");
    assert!(refused(&lab, &foreign, "64M", "1").contains("no image of a guest"));
    let length = fs::metadata(&image).unwrap().len();
    let copy = lab.path("copy");
    // A byte that is not zero lies in a page that is restored.
    let within =
        fs::read(&image).unwrap().iter().skip(4096 * 256).position(|byte| *byte != 0).unwrap() as u64 + 4096 * 256;
    for (at, told) in [(8, "an image of version"), (within, "has not the hash"), (length - 5, "root hash")] {
        fs::copy(&image, &copy).unwrap();
        let file = File::options().read(true).write(true).open(&copy).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 2], at).unwrap();
        let said = refused(&lab, &copy, "64M", "1");
        assert!(said.contains(told), "{at}: {said}");
    }
    fs::copy(&image, &copy).unwrap();
    File::options().write(true).open(&copy).unwrap().set_len(length - 1).unwrap();
    assert!(refused(&lab, &copy, "64M", "1").contains("cut short"));

    // A machine that waits goes on waiting when it has refused one.
    let mut there = Machine::start(&lab, &spec.incoming("defer"));
    let reason = there.refuses("migrate-incoming", uri(&copy));
    assert!(reason.contains("cut short"), "{reason}");
    assert_eq!(there.run_state(), "inmigrate");
    there.execute("migrate-incoming", uri(&image));
    there.wait_migration("completed");
    journey.goes_to(&there);
    journey.works_on(1);
    there.quit();
    lab.close();
}

/// A small file system in memory, unmounted when the test ends.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, said visibly, where this user may not mount one.
    fn mount(test: &str, at: PathBuf) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        let mut mount = Command::new("mount");
        let done = mount.args(["-t", "tmpfs", "-o", "size=4M", "tmpfs"]).arg(&at).output();
        match done {
            Ok(output) if output.status.success() => Some(Self(at)),
            _ => {
                println!("SKIP {test}: cannot mount a small tmpfs; that takes root");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_save_that_finds_no_room_or_no_place_leaves_the_guest_running() {
    const TEST: &str = "a_save_that_finds_no_room_or_no_place_leaves_the_guest_running";
    let lab = lab!("a_save_that_finds_no_room_or_no_place_leaves_the_guest_running");
    let spec = lab.guest("random", "ws=16M period=50");
    let mut here = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&here);
    journey.works_on(1);
    let reason = here.refuses("migrate", uri(&lab.path("none/guest.image")));
    assert!(reason.contains("does the folder exist?"), "{reason}");
    assert_eq!(here.run_state(), "running");
    if let Some(disk) = SmallDisk::mount(TEST, lab.path("disk")) {
        here.execute("migrate", uri(&disk.0.join("guest.image")));
        let look = here.wait_migration("failed");
        let reason = look["error-desc"].as_str().unwrap();
        assert!(reason.contains("free as much room") && reason.contains("unharmed"), "{reason}");
        assert_eq!(fs::read_dir(&disk.0).unwrap().count(), 0, "half an image is left behind");
        until("the guest runs on", || (here.run_state() == "running").then_some(()));
    }
    journey.works_on(2);
    // And it can still be saved, elsewhere.
    save(&mut here, &lab.path("guest.image"));
    verify(&lab.path("guest.image"));
    here.quit();
    journey.log();
    lab.close();
}

/// Kills, unless `SWITCHOVER_SAVE_KILLS` says otherwise.
const SAVE_KILLS: u64 = 8;

#[test]
fn whoever_is_killed_while_it_saves_leaves_a_whole_image() {
    let kills = std::env::var("SWITCHOVER_SAVE_KILLS").map_or(SAVE_KILLS, |text| text.parse().unwrap());
    let lab = lab!("whoever_is_killed_while_it_saves_leaves_a_whole_image");
    let image = lab.path("guest.image");
    let spec = lab.guest("random", "ws=16M period=50");
    let mut machine = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&machine);
    journey.works_on(1);
    save(&mut machine, &image);
    machine.execute("cont", json!({}));
    for point in 0..kills {
        let live = point % 2 == 1;
        machine.execute("migrate-set-parameters", json!({ "x-switchover-live-save": live }));
        machine.execute("migrate", uri(&image));
        until("it has come that far", || {
            let look = machine.execute("query-migrate", json!({}));
            let left = look["ram"]["remaining"].as_u64().unwrap_or(64 << 20);
            (look["status"] == "completed" || ((64 << 20) - left) * kills >= point * (64 << 20)).then_some(())
        });
        machine.kill();
        fs::remove_file(machine.qmp_path()).unwrap();
        verify(&image);
        // The guest goes on from it, whichever it is; what it had done since is lost with its machine.
        machine = Machine::start(&lab, &restored(&spec, &image));
        machine.wait_migration("completed");
        assert_eq!(machine.run_state(), "running");
    }
    let text = machine.serial();
    until("the guest works on", || text.text().contains("bad 0").then_some(()));
    assert!(!text.text().lines().any(|line| line.contains(" h: ") && !line.contains(" bad 0 ")), "{}", text.text());
    machine.quit();
    lab.close();
}
