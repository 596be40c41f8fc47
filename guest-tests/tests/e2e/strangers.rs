//! Whoever else connects to a destination: nothing that they send ends it, keeps its source out or reaches its guest.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};

use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::lab::Lab;
use switchover_guest_tests::machine::Machine;
use switchover_guest_tests::moving::{Transport, begin, destination, finish};

use crate::lab;

fn connect(to: &str) -> TcpStream {
    TcpStream::connect(to.strip_prefix("tcp:").unwrap()).unwrap()
}

/// Says each kind of garbage on a connection of its own, and hears each one being ended.
fn garbage(to: &str) {
    let noise: Vec<u8> = (0..100_000_u32).map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    for bytes in [b"GET / HTTP/1.1\r\nHost: destination\r\n\r\n", &noise[..], &[0; 4096], &[0xff; 4096], b"", b"x"] {
        let mut stranger = connect(to);
        // It may be hung up on while it still speaks.
        let _ = stranger.write_all(bytes);
        let _ = stranger.shutdown(Shutdown::Write);
        let mut heard = Vec::new();
        let _ = stranger.read_to_end(&mut heard);
        // A refusal may be said; a welcome or a page never.
        assert!(heard.len() < 4096, "{} bytes were told to a stranger", heard.len());
    }
}

/// Moves a guest past `strangers`, who come before the migration and again in the middle of it.
fn moves_past(lab: Lab, strangers: impl Fn(&str) -> Vec<TcpStream>) {
    let spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    let before = strangers(&to);
    begin(&mut source, &to);
    let during = strangers(&to);
    finish(&mut source, &mut there);
    drop((before, during));
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

#[test]
fn garbage_on_the_port_does_no_harm() {
    moves_past(lab!("garbage_on_the_port_does_no_harm"), |to| {
        garbage(to);
        Vec::new()
    });
}

#[test]
fn fifty_connections_that_come_and_go_do_no_harm() {
    moves_past(lab!("fifty_connections_that_come_and_go_do_no_harm"), |to| {
        for _ in 0..50 {
            let _ = connect(to).write_all(b"hello?");
        }
        Vec::new()
    });
}

#[test]
fn half_a_handshake_kept_open_does_no_harm() {
    moves_past(lab!("half_a_handshake_kept_open_does_no_harm"), |to| {
        let mut silent: Vec<_> = (0..5).map(|_| connect(to)).collect();
        for (length, stranger) in silent.iter_mut().enumerate() {
            // What a source would begin with, cut short. None at all is a stranger who never speaks.
            let _ = stranger.write_all(&b"SWITCHOVER"[..length]);
        }
        silent
    });
}

#[test]
fn fifty_connections_that_stay_and_say_nothing_do_not_keep_the_source_out() {
    moves_past(lab!("fifty_connections_that_stay_and_say_nothing_do_not_keep_the_source_out"), |to| {
        (0..50).map(|_| connect(to)).collect()
    });
}
