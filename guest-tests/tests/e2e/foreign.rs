//! A guest that is none of ours boots, moves by QMP, and goes on counting.

use switchover_guest_tests::foreign::counter;
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, destination, migrate};
use switchover_guest_tests::waiting::until;

/// Its first number.
const FIRST: u64 = 0x40;

/// How far `text` counts: one number a line, none left out, none twice.
fn counted(text: &str) -> u64 {
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let mut next = FIRST;
    for line in text[..whole].lines() {
        assert_eq!(line, format!("{next:08x}"), "after {} numbers", next - FIRST);
        next += 1;
    }
    next - FIRST
}

fn goes_on_counting(test: &str, transport: Transport) {
    let Some(lab) = switchover_guest_tests::lab::Lab::open(test) else { return };
    let spec = Spec { kernel: Some(lab.file("counter.elf", &counter())), ..Spec::default() };
    let mut source = Machine::start(&lab, &spec);
    until("it has counted past all of its pages", || (counted(&source.serial().text()) > 150).then_some(()));
    let (mut there, to) = destination(&lab, &spec, transport);
    migrate(&mut source, &mut there, &to);
    let there_too = there.serial();
    until("it has counted past all of its pages again", || (there_too.text().lines().count() > 150).then_some(()));
    source.quit();
    there.quit();
    let all = source.serial().to_end() + &there.serial().to_end();
    assert!(counted(&all) > 300);
    lab.close();
}

#[test]
fn a_foreign_guest_moves_over_tcp() {
    goes_on_counting("a_foreign_guest_moves_over_tcp", Transport::Tcp);
}

#[test]
fn a_foreign_guest_moves_over_a_unix_socket() {
    goes_on_counting("a_foreign_guest_moves_over_a_unix_socket", Transport::Unix);
}
