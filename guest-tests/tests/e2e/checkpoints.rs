//! Checkpoints of guests that run, and guests that go on from them.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::{Lab, binary, switchover};
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, begin, destination, finish};
use switchover_guest_tests::waiting::until;
use switchover_tools::rng::Rng;

use crate::lab;

fn guest(lab: &Lab) -> Spec {
    lab.guest("random", "ws=8M period=50")
}

/// Takes so many, one after the other.
fn take(machine: &Machine, folder: &Path, count: u64, keep: u8) -> Vec<String> {
    let ended = switchover(&[
        "checkpoint",
        "--qmp",
        &machine.qmp_endpoint(),
        "--to",
        folder.to_str().unwrap(),
        "--every",
        "50ms",
        "--count",
        &count.to_string(),
        "--keep",
        &keep.to_string(),
    ]);
    assert_eq!((ended.status, &*ended.stderr), (Some(0), ""), "{ended:?}");
    ended.stdout.lines().map(str::to_owned).collect()
}

fn images(folder: &Path) -> Vec<PathBuf> {
    let mut images: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    images.sort();
    images
}

fn whole(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "image")
}

fn verify(image: &Path) {
    let verified = switchover(&["image", "verify", image.to_str().unwrap()]);
    assert_eq!(verified.status, Some(0), "{verified:?}");
}

/// A machine in which the guest of `image` goes on, and finds its memory as it left it.
fn restore(lab: &Lab, spec: &Spec, image: &Path) -> Machine {
    verify(image);
    let more = vec!["--restore".to_owned(), image.display().to_string()];
    let machine = Machine::start(lab, &Spec { kernel: None, append: String::new(), more, ..spec.clone() });
    let told = machine.serial();
    let sound = until("the restored guest works on", || {
        let text = told.text();
        let (lines, _) = text.rsplit_once('\n')?;
        let lines: Vec<_> = lines.lines().skip(1).filter(|line| line.starts_with("P ")).collect();
        (lines.len() >= 2).then(|| lines.iter().all(|line| line.contains(" bad 0 ")))
    });
    assert!(sound, "{}", told.text());
    machine
}

#[test]
fn a_guest_goes_on_from_each_checkpoint_of_a_series() {
    let lab = lab!("a_guest_goes_on_from_each_checkpoint_of_a_series");
    let (spec, folder) = (guest(&lab), lab.path("checkpoints"));
    let mut machine = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&machine);
    journey.works_on(1);
    let told = take(&machine, &folder, 4, 6);
    assert!(told[0].contains(": all of the guest"), "{told:?}");
    assert!(told[1..].iter().all(|line| line.contains(": what was written since the last one")), "{told:?}");
    // The next command goes on with it, and lets older ones go, but perhaps for the one that all are based on.
    let more = take(&machine, &folder, 1, 3);
    assert!(more[0].contains("checkpoint-000005.image: what was written since"), "{more:?}");
    let names: Vec<_> =
        images(&folder).iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    let newest = [3, 4, 5].map(|number| format!("checkpoint-{number:06}.image"));
    assert!(names == newest || names == [&["checkpoint-000001.image".to_owned()], &newest[..]].concat(), "{names:?}");
    let pruned = images(&folder).iter().map(|path| path.to_str().unwrap().to_owned()).collect::<Vec<_>>();
    let pruned = switchover(&[vec!["image".to_owned(), "prune".to_owned(), "--keep=3".to_owned()], pruned].concat());
    assert_eq!((pruned.status, images(&folder).len()), (Some(0), 3), "{pruned:?}");
    journey.works_on(1);
    for image in images(&folder) {
        restore(&lab, &spec, &image).quit();
    }
    let inspected = switchover(&["image", "inspect", images(&folder)[1].to_str().unwrap()]).stdout;
    assert!(inspected.contains("checkpoint-000003.image, whose differences it holds"), "{inspected}");
    // One by itself.
    let flat = lab.path("flat.image");
    let merged = switchover(&["image", "merge", images(&folder)[2].to_str().unwrap(), "--to", flat.to_str().unwrap()]);
    assert_eq!(merged.status, Some(0), "{merged:?}");
    fs::remove_dir_all(&folder).unwrap();
    restore(&lab, &spec, &flat).quit();
    machine.quit();
    lab.close();
}

#[test]
fn whoever_needs_the_book_of_written_pages_ends_a_series() {
    let lab = lab!("whoever_needs_the_book_of_written_pages_ends_a_series");
    let (spec, folder) = (guest(&lab), lab.path("checkpoints"));
    let mut machine = Machine::start(&lab, &spec);
    Journey::from(&machine).works_on(1);
    let is_full = |machine: &Machine| take(machine, &folder, 1, 6)[0].contains(": all of the guest");
    assert!(is_full(&machine) && !is_full(&machine));
    // A measurement by that book.
    machine.execute("calc-dirty-rate", json!({ "calc-time": 1, "mode": "dirty-bitmap" }));
    until("it is measured", || (machine.execute("query-dirty-rate", json!({}))["status"] == "measured").then_some(()));
    assert!(is_full(&machine) && !is_full(&machine));
    // A migration that is called off.
    let (mut there, to) = destination(&lab, &spec, Transport::Unix);
    begin(&mut machine, &to);
    machine.execute("migrate_cancel", json!({}));
    machine.wait_migration("cancelled");
    assert_eq!(there.wait_end(), 1);
    assert!(is_full(&machine) && !is_full(&machine));
    // Another process has the guest.
    let (mut there, to) = destination(&lab, &spec, Transport::Unix);
    begin(&mut machine, &to);
    finish(&mut machine, &mut there);
    machine.quit();
    assert!(is_full(&there) && !is_full(&there));
    let base = images(&folder)[0].clone();
    let wrong = there.refuses("x-switchover-checkpoint", json!({ "to": folder.join("a"), "base": base }));
    assert!(wrong.contains("is not this machine's last checkpoint"), "{wrong}");
    for image in images(&folder) {
        restore(&lab, &spec, &image).quit();
    }
    there.quit();
    lab.close();
}

#[test]
fn a_series_goes_on_until_it_is_ended() {
    let lab = lab!("a_series_goes_on_until_it_is_ended");
    let (spec, folder) = (guest(&lab), lab.path("checkpoints"));
    let mut machine = Machine::start(&lab, &spec);
    Journey::from(&machine).works_on(1);
    let mut child = series(&machine, &folder).spawn().unwrap();
    until("there are some", || {
        (folder.is_dir() && images(&folder).iter().filter(|path| whole(path)).count() >= 3).then_some(())
    });
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(images(&folder).iter().all(|path| whole(path)), "{:?}", images(&folder));
    restore(&lab, &spec, images(&folder).last().unwrap()).quit();
    machine.quit();
    lab.close();
}

#[test]
fn a_folder_that_somebody_else_is_at_is_waited_for() {
    let lab = lab!("a_folder_that_somebody_else_is_at_is_waited_for");
    let (spec, folder) = (guest(&lab), lab.path("checkpoints"));
    let mut machine = Machine::start(&lab, &spec);
    Journey::from(&machine).works_on(1);
    fs::create_dir(&folder).unwrap();
    let lock = Flock::lock(File::open(&folder).unwrap(), FlockArg::LockExclusive).unwrap();
    let mut child = series(&machine, &folder).stderr(Stdio::piped()).spawn().unwrap();
    let mut told = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut told).unwrap();
    assert!(told.contains("somebody else"), "{told}");
    assert!(images(&folder).is_empty() && child.try_wait().unwrap().is_none());
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "there is no checkpoint");
    let mut child = series(&machine, &folder).spawn().unwrap();
    drop(lock);
    until("there is one", || images(&folder).iter().any(|path| whole(path)).then_some(()));
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    assert!(child.wait().unwrap().success());
    machine.quit();
    lab.close();
}

fn series(machine: &Machine, folder: &Path) -> Command {
    let mut command = Command::new(binary());
    command.args(["checkpoint", "--qmp", &machine.qmp_endpoint(), "--to", folder.to_str().unwrap()]);
    command.args(["--every", "10ms", "--keep", "2"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// How often somebody is killed in the suite. `SWITCHOVER_CHECKPOINT_KILLS` says otherwise.
const KILLS: u64 = 9;

#[test]
fn whoever_is_killed_while_there_are_checkpoints_leaves_them_whole() {
    let kills = std::env::var("SWITCHOVER_CHECKPOINT_KILLS").map_or(KILLS, |text| text.parse().unwrap());
    let lab = lab!("whoever_is_killed_while_there_are_checkpoints_leaves_them_whole");
    let (spec, folder) = (guest(&lab), lab.path("checkpoints"));
    let mut machine = Machine::start(&lab, &spec);
    Journey::from(&machine).works_on(1);
    take(&machine, &folder, 2, 2);
    let mut rng = Rng::new(kills);
    for point in 0..kills {
        // While it takes them, and merges them.
        let mut child = series(&machine, &folder).spawn().unwrap();
        thread::sleep(Duration::from_micros(rng.below(1_500_000) as u64));
        let machine_too = point % 3 == 2;
        if machine_too {
            machine.kill();
            fs::remove_file(machine.qmp_path()).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let left: Vec<_> = images(&folder).into_iter().filter(|path| whole(path)).collect();
        // Some that were to go may still be there.
        assert!(left.len() >= 2, "{left:?}");
        left.iter().for_each(|image| verify(image));
        if machine_too {
            machine = restore(&lab, &spec, left.last().unwrap());
        }
    }
    take(&machine, &folder, 1, 2);
    let left: Vec<_> = images(&folder).into_iter().filter(|path| whole(path)).collect();
    assert!(left.len() == 2 || left.len() == 3, "two, and perhaps what they are based on: {left:?}");
    left.iter().for_each(|image| restore(&lab, &spec, image).quit());
    machine.quit();
    lab.close();
}
