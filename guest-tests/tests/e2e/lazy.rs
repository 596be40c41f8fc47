//! Guests that run before their memory is restored from a file.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::{Lab, switchover};
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::waiting::until;

use crate::lab;

/// What a guest's memory in these tests takes to come is enough to be seen, and little enough to be waited for.
const GUEST: &str = "ws=32M period=50";

/// A guest that was saved, and the machine that it was in.
struct Saved {
    spec: Spec,
    journey: Journey,
    image: PathBuf,
}

fn saved(lab: &Lab, vcpus: u8, compress: bool) -> Saved {
    let image = lab.path("guest.image");
    let spec = Spec { vcpus, ..lab.guest("random", &format!("{GUEST} vcpus={vcpus}")) };
    let mut here = Machine::start(lab, &spec);
    let mut journey = Journey::from(&here);
    journey.works_on(1);
    here.execute("migrate-set-parameters", json!({ "x-switchover-compress-image": compress }));
    here.execute("migrate", json!({ "uri": format!("file:{}", image.display()) }));
    here.wait_migration("completed");
    here.quit();
    Saved { spec, journey, image }
}

/// A machine like `spec` in which the guest of `image` runs at once.
fn lazily(spec: &Spec, image: &Path, more: &[&str]) -> Spec {
    let mut arguments = vec!["--restore".to_owned(), image.display().to_string(), "--lazy".to_owned()];
    arguments.extend(more.iter().map(|&word| word.to_owned()));
    Spec { kernel: None, append: String::new(), more: arguments, ..spec.clone() }
}

fn working_set(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".working-set");
    name.into()
}

/// Faults that its guest has waited for, and pages that were not here when it ran.
fn faults(machine: &mut Machine) -> u64 {
    let report = machine.execute("x-switchover-report", json!({}));
    let count = |name: &str| report["faults"][name].as_u64().unwrap();
    let instant = |name: &str| report["instants"][name].as_u64().unwrap();
    assert!(instant("commit_ns") < instant("last_page_ns"), "it was to run only when all was here: {report}");
    count("remote") + count("raced") + count("joined") + count("local")
}

/// What a guest says whose words nobody heard before.
fn is_sound(machine: &Machine) {
    let text = machine.serial();
    let period = |line: &&str| line.starts_with("P ") && line.contains(" h: ");
    until("the restored guest works on", || (text.text().lines().filter(period).count() > 4).then_some(()));
    let spoiled = text.text().lines().filter(period).any(|line| !line.contains(" bad 0 "));
    assert!(!spoiled, "{}", text.text());
}

fn sound_with_and_without_working_set(test: &str, vcpus: u8, compress: bool) {
    let Some(lab) = Lab::open(test) else { return };
    let Saved { spec, mut journey, image } = saved(&lab, vcpus, compress);
    let set = working_set(&image);
    let mut counts = Vec::new();
    for restore in 0..2 {
        let mut there = Machine::start(&lab, &lazily(&spec, &image, &[]));
        is_sound(&there);
        there.wait_migration("completed");
        counts.push(faults(&mut there));
        assert!(set.is_file(), "restore {restore} kept no working set");
        there.quit();
    }
    assert!(counts[1] * 4 < counts[0], "faults of one restore after the other: {counts:?}");
    // It takes up its journey once, without the set, and can be saved again.
    let mut last = Machine::start(&lab, &lazily(&spec, &image, &["--no-working-set"]));
    journey.goes_to(&last);
    journey.works_on(2);
    last.wait_migration("completed");
    last.execute("migrate", json!({ "uri": format!("file:{}", lab.path("again").display()) }));
    last.wait_migration("completed");
    last.quit();
    journey.log();
    let verified = switchover(&["image", "verify", lab.path("again").to_str().unwrap()]);
    assert_eq!(verified.status, Some(0), "{verified:?}");
    lab.close();
}

#[test]
fn a_guest_runs_before_its_memory_is_restored() {
    sound_with_and_without_working_set("a_guest_runs_before_its_memory_is_restored", 1, false);
}

#[test]
fn a_compressed_guest_of_two_vcpus_runs_before_its_memory_is_restored() {
    const TEST: &str = "a_compressed_guest_of_two_vcpus_runs_before_its_memory_is_restored";
    sound_with_and_without_working_set(TEST, 2, true);
}

/// Changes a byte that is not zero of a page in the last third of the guest's working set.
fn damage(image: &Path) {
    let bytes = fs::read(image).unwrap();
    let from = 30 << 20;
    let at = from + bytes[from..].iter().position(|byte| *byte != 0).unwrap();
    File::options().write(true).open(image).unwrap().write_all_at(&[bytes[at] ^ 2], at as u64).unwrap();
}

#[test]
fn a_damaged_part_stops_a_guest_that_runs_already() {
    let lab = lab!("a_damaged_part_stops_a_guest_that_runs_already");
    let Saved { spec, image, .. } = saved(&lab, 1, false);
    damage(&image);
    let mut there = Machine::start(&lab, &Spec { more: Vec::new(), ..spec.incoming("defer") });
    there.execute("migrate-set-parameters", json!({ "x-switchover-lazy-restore": true }));
    there.execute("migrate-incoming", json!({ "uri": format!("file:{}", image.display()) }));
    assert_eq!(there.wait_end(), 1);
    let said = there.stderr().to_end();
    assert!(said.contains("has not the hash") && said.contains("was stopped"), "{said}");
    let text = there.serial().to_end();
    // What it says first may be the end of a line.
    let spoiled = |line: &str| line.starts_with("P ") && line.contains(" h: ") && !line.contains(" bad 0 ");
    assert!(!text.lines().any(spoiled), "{text}");
    assert!(!working_set(&image).exists(), "what it touched is kept");
    lab.close();
}

#[test]
fn two_guests_run_of_one_image_and_one_is_ended_in_the_middle() {
    let lab = lab!("two_guests_run_of_one_image_and_one_is_ended_in_the_middle");
    let Saved { spec, image, .. } = saved(&lab, 1, false);
    let before = fs::read(&image).unwrap();
    let [mut one, mut two, mut three] = [(); 3].map(|()| Machine::start(&lab, &lazily(&spec, &image, &[])));
    // What it is watched for after its start has not passed: nobody may leave yet, and whoever is ended leaves nothing.
    let look = one.execute("query-migrate", json!({}));
    assert_eq!(look["status"], "postcopy-active", "{look}");
    let elsewhere = json!({ "uri": format!("file:{}", lab.path("elsewhere").display()) });
    let reason = one.refuses("migrate", elsewhere);
    assert!(reason.contains("under way") || reason.contains("There's a migration process in progress"), "{reason}");
    one.signal(Signal::SIGINT);
    assert_eq!(one.wait_end(), 0);
    assert!(!one.qmp_path().exists());
    two.kill();
    fs::remove_file(two.qmp_path()).unwrap();
    is_sound(&three);
    let look: Value = three.wait_migration("completed");
    assert_eq!(look["ram"]["remaining"], 0, "{look}");
    three.quit();
    assert!(fs::read(&image).unwrap() == before, "the image is another");
    let left: Vec<_> = fs::read_dir(image.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains(".partial")), "{left:?}");
    lab.close();
}
