//! Guests that return to a checkpoint.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::{Ended, Lab, binary, switchover};
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, allow_postcopy, destination, slow_down};
use switchover_guest_tests::waiting::until;
use switchover_tools::rng::Rng;

use crate::lab;

const STEPS: [&str; 8] = ["fence", "verify", "stop", "restore", "confirm", "resume", "record", "clean up"];

/// A guest that had a checkpoint made before it moved, and the machine that waits for it.
struct Scene {
    spec: Spec,
    checkpoint: PathBuf,
    source: Machine,
    there: Machine,
    again: Machine,
}

impl Scene {
    /// With all of the move done.
    fn moved(lab: &Lab) -> Self {
        let spec = lab.guest("random", "ws=8M period=50");
        let source = Machine::start(lab, &spec);
        Journey::from(&source).works_on(1);
        let (there, to) = destination(lab, &spec, Transport::Tcp);
        let checkpoint = lab.path("before.image");
        let moved = switchover(&[
            "migrate",
            "--qmp",
            &source.qmp_endpoint(),
            "--to",
            &to,
            "--checkpoint",
            checkpoint.to_str().unwrap(),
        ]);
        assert_eq!(moved.status, Some(0), "{moved:?}");
        assert!(moved.stdout.contains("saved to ") && moved.stdout.contains("and runs"), "{moved:?}");
        works_on(&there);
        let again = Machine::start(lab, &spec.incoming("defer"));
        Self { spec, checkpoint, source, there, again }
    }

    fn arguments(&self) -> Vec<String> {
        let sockets = [&self.source, &self.there, &self.again].map(Machine::qmp_endpoint);
        let checkpoint = self.checkpoint.to_str().unwrap().to_owned();
        let mut arguments = vec!["rollback".to_owned(), "--checkpoint".to_owned(), checkpoint];
        for (name, socket) in ["--source", "--destination", "--into"].into_iter().zip(sockets) {
            arguments.extend([name.to_owned(), socket]);
        }
        arguments
    }

    fn roll_back(&self) -> Ended {
        switchover(&self.arguments())
    }

    /// It runs where it was to, nowhere else, and finds its memory as it left it.
    fn is_back(&mut self) {
        assert_eq!((self.source.wait_end(), self.there.wait_end()), (0, 0));
        assert_eq!(self.again.run_state(), "running");
        works_on(&self.again);
    }

    /// Alters a byte of the checkpoint, in a page that is not zero: wherever the first one is.
    fn damage(&self) {
        let image = File::options().read(true).write(true).open(&self.checkpoint).unwrap();
        let mut byte = [0];
        let at = (0x1000..).step_by(8).find(|at| image.read_exact_at(&mut byte, *at).is_ok() && byte != [0]).unwrap();
        image.write_all_at(&[!byte[0]], at).unwrap();
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        PathBuf::from(format!("{}{suffix}", self.checkpoint.display()))
    }
}

/// Waits until the guest has told of two more periods in which it found everything as it had left it. It begins in the midst of its own
/// story, and of a line.
fn works_on(machine: &Machine) {
    let told = machine.serial();
    let before = told.text().len();
    let sound = until("the guest works on", || {
        let text = told.text();
        let (whole, _) = text[before..].rsplit_once('\n')?;
        let lines: Vec<_> = whole.lines().skip(1).filter(|line| line.starts_with("P ")).collect();
        (lines.len() >= 2).then(|| lines.iter().all(|line| line.contains(" bad 0 ")))
    });
    assert!(sound, "{}", told.text());
}

fn steps(printed: &str) -> Vec<&str> {
    let named = |line: &str| STEPS.into_iter().find(|step| line.starts_with(step));
    printed.lines().filter_map(named).collect()
}

fn audit_verifies(path: &Path) {
    let verified = switchover(&["audit", "verify", path.to_str().unwrap()]);
    assert_eq!(verified.status, Some(0), "{verified:?}");
}

#[test]
fn a_guest_returns_to_its_checkpoint_in_stated_steps() {
    let lab = lab!("a_guest_returns_to_its_checkpoint_in_stated_steps");
    let mut scene = Scene::moved(&lab);
    let ended = scene.roll_back();
    assert_eq!((ended.status, &*ended.stderr), (Some(0), ""), "{ended:?}");
    assert_eq!(steps(&ended.stdout), STEPS);
    scene.is_back();
    let record = scene.beside(".rollbacks");
    assert!(fs::read_to_string(&record).unwrap().contains("before.image"));
    audit_verifies(&record);
    // Once more is once too often, and does no harm.
    let repeated = scene.roll_back();
    assert_eq!((repeated.status, repeated.stdout.contains("back already")), (Some(0), true), "{repeated:?}");
    assert_eq!(scene.again.run_state(), "running");
    works_on(&scene.again);
    scene.again.quit();
    lab.close();
}

#[test]
fn a_guest_returns_while_its_memory_still_follows_it() {
    let lab = lab!("a_guest_returns_while_its_memory_still_follows_it");
    let mut scene = Scene::moved(&lab);
    // On from there, to a third one, slowly.
    let (mut third, to) = destination(&lab, &scene.spec, Transport::Unix);
    allow_postcopy(&mut scene.there);
    slow_down(&mut scene.there, 1 << 20);
    scene.there.execute("migrate", json!({ "uri": to }));
    scene.there.execute("migrate-start-postcopy", json!({}));
    until("its memory follows it", || (third.run_state() == "running").then_some(()));
    scene.source.quit();
    std::mem::swap(&mut scene.source, &mut scene.there);
    scene.there = third;
    let ended = scene.roll_back();
    assert_eq!((ended.status, steps(&ended.stdout)), (Some(0), STEPS.to_vec()), "{ended:?}");
    scene.is_back();
    scene.again.quit();
    lab.close();
}

#[test]
fn a_damaged_checkpoint_changes_nothing() {
    let lab = lab!("a_damaged_checkpoint_changes_nothing");
    let mut scene = Scene::moved(&lab);
    scene.damage();
    let ended = scene.roll_back();
    assert_eq!(ended.status, Some(1), "{ended:?}");
    for words in ["chunk", "nothing was rolled back", "the guest goes on at the destination"] {
        assert!(ended.stderr.contains(words), "{words} is not in {ended:?}");
    }
    assert_eq!((&*scene.there.run_state(), &*scene.again.run_state()), ("running", "inmigrate"));
    works_on(&scene.there);
    assert!(!scene.beside(".rollback").exists());
    [scene.source, scene.there, scene.again].iter_mut().for_each(Machine::quit);
    lab.close();
}

#[test]
fn who_cannot_be_reached_is_not_taken_for_fenced() {
    let lab = lab!("who_cannot_be_reached_is_not_taken_for_fenced");
    let mut scene = Scene::moved(&lab);
    scene.source.quit();
    let refused = scene.roll_back();
    assert_eq!(refused.status, Some(1), "{refused:?}");
    assert!(
        refused.stderr.contains("the source does not answer") && refused.stderr.contains("--fenced"),
        "{refused:?}"
    );
    assert_eq!(scene.there.run_state(), "running");
    let ended = switchover(&[scene.arguments(), vec!["--fenced".to_owned()]].concat());
    assert_eq!(ended.status, Some(0), "{ended:?}");
    scene.is_back();
    scene.again.quit();
    lab.close();
}

#[test]
fn who_hangs_is_not_taken_for_ended_even_when_a_rollback_has_begun() {
    let lab = lab!("who_hangs_is_not_taken_for_ended_even_when_a_rollback_has_begun");
    let mut scene = Scene::moved(&lab);
    scene.there.signal(Signal::SIGSTOP);
    // As if it had begun before that machine hung.
    leave_journal(&scene, [&scene.source, &scene.there, &scene.again], &[("fence", "begun")]);
    let refused = scene.roll_back();
    assert_eq!(refused.status, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("the destination at") && refused.stderr.contains("does not answer"), "{refused:?}");
    assert_eq!(scene.again.run_state(), "inmigrate");
    scene.there.signal(Signal::SIGCONT);
    let ended = scene.roll_back();
    assert_eq!(ended.status, Some(0), "{ended:?}");
    scene.is_back();
    scene.again.quit();
    lab.close();
}

#[test]
fn a_guest_that_was_fenced_goes_on_when_a_later_run_finds_the_checkpoint_damaged() {
    let lab = lab!("a_guest_that_was_fenced_goes_on_when_a_later_run_finds_the_checkpoint_damaged");
    let mut scene = Scene::moved(&lab);
    scene.damage();
    // Killed as soon as the guest stands still, or a little later.
    let mut child =
        Command::new(binary()).args(scene.arguments()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until("it is fenced, or all is over", || {
        (scene.there.run_state() == "paused" || child.try_wait().unwrap().is_some()).then_some(())
    });
    let _ = child.kill();
    child.wait().unwrap();
    let ended = scene.roll_back();
    assert_eq!(ended.status, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("the guest goes on at the destination"), "{ended:?}");
    assert_eq!(scene.there.run_state(), "running");
    works_on(&scene.there);
    [scene.source, scene.there, scene.again].iter_mut().for_each(Machine::quit);
    lab.close();
}

#[test]
fn a_machine_that_has_a_guest_is_given_no_other() {
    let lab = lab!("a_machine_that_has_a_guest_is_given_no_other");
    let mut scene = Scene::moved(&lab);
    scene.again.quit();
    let refused = scene.roll_back();
    assert_eq!(refused.status, Some(1), "{refused:?}");
    assert!(
        refused.stderr.contains("no machine waits") && refused.stderr.contains("nothing was touched"),
        "{refused:?}"
    );
    scene.again = Machine::start(&lab, &scene.spec);
    let refused = scene.roll_back();
    assert_eq!(refused.status, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("does not wait for a guest") && refused.stderr.contains("nothing was touched"));
    assert_eq!((&*scene.again.run_state(), &*scene.there.run_state()), ("running", "running"));
    assert!(!scene.beside(".rollback").exists());
    [scene.source, scene.there, scene.again].iter_mut().for_each(Machine::quit);
    lab.close();
}

/// What a rollback of this scene that was killed has left, by its steps and stages.
fn leave_journal(scene: &Scene, sockets: [&Machine; 3], steps: &[(&str, &str)]) {
    let known = switchover(&["image", "inspect", "--json", scene.checkpoint.to_str().unwrap()]).stdout;
    let moment = serde_json::from_str::<serde_json::Value>(&known).unwrap()["moment"].take();
    let [source, destination, into] = sockets.map(|machine| machine.qmp_path().to_str().unwrap().to_owned());
    let subject = json!({ "moment": moment, "source": source, "destination": destination, "into": into });
    let steps = steps.iter().map(|(step, stage)| json!({ "step": step, "stage": stage, "at": 0 }));
    let lines = std::iter::once(json!({ "rollback": subject, "at": 0 })).chain(steps);
    fs::write(scene.beside(".rollback"), lines.map(|line| format!("{line}\n")).collect::<String>()).unwrap();
}

#[test]
fn another_rollback_to_the_checkpoint_waits_for_the_end_of_the_first() {
    let lab = lab!("another_rollback_to_the_checkpoint_waits_for_the_end_of_the_first");
    let mut scene = Scene::moved(&lab);
    let other = Machine::start(&lab, &scene.spec.incoming("defer"));
    leave_journal(&scene, [&scene.source, &scene.there, &other], &[("fence", "begun")]);
    let refused = scene.roll_back();
    assert_eq!(refused.status, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("did not come to its end"), "{refused:?}");
    assert_eq!(scene.there.run_state(), "running");
    [scene.source, scene.there, scene.again, other].iter_mut().for_each(Machine::quit);
    lab.close();
}

#[test]
fn a_guest_that_may_have_gone_on_from_where_it_came_back_to_is_not_restored_again() {
    let lab = lab!("a_guest_that_may_have_gone_on_from_where_it_came_back_to_is_not_restored_again");
    let mut scene = Scene::moved(&lab);
    let all = ["fence", "verify", "stop", "restore", "confirm"].map(|step| (step, "done"));
    leave_journal(&scene, [&scene.source, &scene.there, &scene.again], &[&all[..], &[("resume", "begun")]].concat());
    [&mut scene.source, &mut scene.there].into_iter().for_each(Machine::quit);
    let refused = scene.roll_back();
    assert_eq!(refused.status, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("it may have moved on") && refused.stderr.contains(".rollback"), "{refused:?}");
    assert_eq!(scene.again.run_state(), "inmigrate");
    scene.again.quit();
    let refused = scene.roll_back();
    assert!(refused.stderr.contains("it may have moved on"), "{refused:?}");
    fs::remove_file(scene.beside(".rollback")).unwrap();
    scene.again = Machine::start(&lab, &scene.spec.incoming("defer"));
    let ended = switchover(&[scene.arguments(), vec!["--fenced".to_owned()]].concat());
    assert_eq!(ended.status, Some(0), "{ended:?}");
    works_on(&scene.again);
    scene.again.quit();
    lab.close();
}

#[test]
fn what_is_no_socket_is_not_cleared_away() {
    let lab = lab!("what_is_no_socket_is_not_cleared_away");
    let mut scene = Scene::moved(&lab);
    [&mut scene.source, &mut scene.there].into_iter().for_each(Machine::quit);
    let precious = lab.path("precious");
    fs::write(&precious, "letters").unwrap();
    let mut arguments = scene.arguments();
    arguments[6] = format!("unix:{}", precious.display());
    let ended = switchover(&[arguments, vec!["--fenced".to_owned()]].concat());
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert_eq!(fs::read_to_string(&precious).unwrap(), "letters");
    works_on(&scene.again);
    scene.again.quit();
    lab.close();
}

#[test]
fn a_rollback_is_known_from_whichever_folder_it_is_run() {
    let lab = lab!("a_rollback_is_known_from_whichever_folder_it_is_run");
    let mut scene = Scene::moved(&lab);
    leave_journal(&scene, [&scene.source, &scene.there, &scene.again], &[("fence", "begun")]);
    // The same words in another folder, where nobody listens: that is not to have ended.
    let elsewhere = lab.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let name = |machine: &Machine| format!("unix:{}", machine.qmp_path().file_name().unwrap().to_str().unwrap());
    let mut arguments = scene.arguments();
    for (place, machine) in [(4, &scene.source), (6, &scene.there), (8, &scene.again)] {
        arguments[place] = name(machine);
    }
    let run = |folder: &Path| Command::new(binary()).args(&arguments).current_dir(folder).output().unwrap();
    let refused = run(&elsewhere);
    let told = String::from_utf8(refused.stderr).unwrap();
    assert!(told.contains("did not come to its end"), "{told}");
    assert_eq!(scene.there.run_state(), "running");
    let ended = run(scene.source.qmp_path().parent().unwrap());
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    scene.is_back();
    scene.again.quit();
    lab.close();
}

#[test]
fn a_machine_that_waits_for_the_guest_starts_it_again_when_nothing_was_rolled_back() {
    let lab = lab!("a_machine_that_waits_for_the_guest_starts_it_again_when_nothing_was_rolled_back");
    let mut scene = Scene::moved(&lab);
    scene.damage();
    // The guest is where it has moved to, and would move on.
    let (third, to) = destination(&lab, &scene.spec, Transport::Unix);
    scene.source.quit();
    scene.source = std::mem::replace(&mut scene.there, third);
    let ended = scene.roll_back();
    assert!(ended.stderr.contains("the guest goes on at the source"), "{ended:?}");
    scene.source.execute("migrate", json!({ "uri": to }));
    until("it runs there", || (scene.there.run_state() == "running").then_some(()));
    works_on(&scene.there);
    [scene.source, scene.there, scene.again].iter_mut().for_each(Machine::quit);
    lab.close();
}

#[test]
fn of_a_guest_that_was_saved_and_restored_elsewhere_none_runs_twice() {
    let lab = lab!("of_a_guest_that_was_saved_and_restored_elsewhere_none_runs_twice");
    let mut scene = Scene::moved(&lab);
    // From where it has moved to, into another machine; where it was saved it could go on.
    let image = lab.path("saved.image");
    let saved = switchover(&["save", "--qmp", &scene.there.qmp_endpoint(), "--to", image.to_str().unwrap()]);
    assert_eq!(saved.status, Some(0), "{saved:?}");
    let more = vec!["--restore".to_owned(), image.display().to_string()];
    let restored = Spec { kernel: None, append: String::new(), more, ..scene.spec.clone() };
    scene.source.quit();
    scene.source = std::mem::replace(&mut scene.there, Machine::start(&lab, &restored));
    until("it runs there", || (scene.there.run_state() == "running").then_some(()));
    scene.damage();
    let ended = scene.roll_back();
    assert!(ended.stderr.contains("the guest goes on at the destination"), "{ended:?}");
    assert_eq!((&*scene.there.run_state(), &*scene.source.run_state()), ("running", "postmigrate"));
    [scene.source, scene.there, scene.again].iter_mut().for_each(Machine::quit);
    lab.close();
}

/// How often a rollback is killed in the suite. `SWITCHOVER_ROLLBACK_KILLS` says otherwise.
const KILLS: u64 = 12;

#[test]
fn a_rollback_that_is_killed_is_run_again_and_leaves_one_guest() {
    let kills = std::env::var("SWITCHOVER_ROLLBACK_KILLS").map_or(KILLS, |text| text.parse().unwrap());
    let lab = lab!("a_rollback_that_is_killed_is_run_again_and_leaves_one_guest");
    let mut scene = Scene::moved(&lab);
    let mut rng = Rng::new(kills);
    let mut killed = 0;
    while killed < kills {
        // Until one comes to its end before it is killed. Each is given longer: a step that was begun is begun again.
        let mut longest = 60_000;
        let ended = loop {
            let mut child = Command::new(binary())
                .args(scene.arguments())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            thread::sleep(Duration::from_micros(rng.below(longest) as u64));
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            killed += 1;
            longest += longest / 4;
        };
        assert!(ended.success(), "{:?} {}", scene.roll_back(), fs::read_to_string(scene.beside(".rollback")).unwrap());
        scene.is_back();
        audit_verifies(&scene.beside(".rollbacks"));
        // From here to a machine that it never gets to.
        let (there, again) = (scene.spec.incoming("defer"), scene.spec.incoming("defer"));
        scene.source = std::mem::replace(&mut scene.again, Machine::start(&lab, &again));
        scene.there = Machine::start(&lab, &there);
    }
    println!("killed {killed} times");
    [scene.source, scene.there, scene.again].iter_mut().for_each(Machine::quit);
    lab.close();
}
