//! A source that connects to what is no destination says so, and its guest runs on.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;

use serde_json::json;
use switchover_guest_tests::journey::Journey;
use switchover_guest_tests::machine::{Machine, Spec};
use switchover_guest_tests::moving::{Transport, allow_postcopy, begin, destination, finish};

use crate::lab;

/// Listens for one source and plays `part` to it. Its address, and what the source said first.
fn impostor(part: impl FnOnce(&mut TcpStream, &[u8]) + Send + 'static) -> (String, thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("tcp:{}", listener.local_addr().unwrap());
    let heard = thread::spawn(move || {
        let (mut source, _) = listener.accept().unwrap();
        let mut hello = vec![0; 65536];
        let count = source.read(&mut hello).unwrap();
        hello.truncate(count);
        part(&mut source, &hello);
        hello
    });
    (to, heard)
}

/// Sends the guest there: it fails, and the guest runs on. Returns what the source said first.
fn fails(source: &mut Machine, (to, heard): (String, thread::JoinHandle<Vec<u8>>)) -> Vec<u8> {
    allow_postcopy(source);
    source.execute("migrate", json!({ "uri": to }));
    let error = source.wait_migration("failed")["error-desc"].as_str().unwrap().to_owned();
    println!("{error}");
    assert!(error.contains(&to) && error.contains("unharmed on the source"), "{error}");
    assert!(!error.contains("refused"), "nobody was there who could refuse: {error}");
    assert_eq!(source.run_state(), "running");
    heard.join().unwrap()
}

#[test]
fn what_is_no_destination_is_told_apart_and_half_a_true_handshake_does_no_harm() {
    let lab = lab!("what_is_no_destination_is_told_apart_and_half_a_true_handshake_does_no_harm");
    let spec: Spec = lab.guest("random", "ws=8M period=50");
    let mut source = Machine::start(&lab, &spec);
    let mut journey = Journey::from(&source);
    journey.works_on(1);
    let hello = fails(&mut source, impostor(|_, _| ()));
    fails(
        &mut source,
        impostor(|source, _| {
            let _ = source.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nthis is a web server\r\n");
        }),
    );
    fails(
        &mut source,
        impostor(|source, _| {
            let _ = source.write_all(&[0xff; 8192]);
        }),
    );
    // A silent one: the source gives up by itself.
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let silent = impostor(move |_, _| {
        let _ = held.recv();
    });
    allow_postcopy(&mut source);
    source.execute("migrate", json!({ "uri": silent.0 }));
    source.wait_migration("failed");
    drop(hold);
    silent.1.join().unwrap();
    journey.works_on(1);

    // Cut at every kind of place, kept open or closed: what a source says is not taken before all of it is there.
    let (mut there, to) = destination(&lab, &spec, Transport::Tcp);
    assert!(hello.len() > 16, "a source said only {hello:?}");
    let address = to.strip_prefix("tcp:").unwrap();
    let mut open = Vec::new();
    for length in [1, 4, 8, 16, hello.len() / 2, hello.len() - 1] {
        let mut stranger = TcpStream::connect(address).unwrap();
        stranger.write_all(&hello[..length]).unwrap();
        open.push(stranger);
        TcpStream::connect(address).unwrap().write_all(&hello[..length]).unwrap();
    }
    // One bit of it is wrong.
    for position in 0..hello.len().min(48) {
        let mut damaged = hello[..hello.len() - 1].to_vec();
        damaged[position] ^= 0x40;
        let mut stranger = TcpStream::connect(address).unwrap();
        let _ = stranger.write_all(&damaged);
        let _ = stranger.shutdown(std::net::Shutdown::Write);
        let _ = stranger.read_to_end(&mut Vec::new());
    }
    begin(&mut source, &to);
    finish(&mut source, &mut there);
    drop(open);
    journey.ends_at(&mut source, &mut there, 1);
    lab.close();
}

#[test]
fn an_echo_is_no_destination_either() {
    let lab = lab!("an_echo_is_no_destination_either");
    let mut source = Machine::start(&lab, &lab.guest("random", "ws=8M period=50"));
    let mut journey = Journey::from(&source);
    // An echo: the right magic, the wrong side. Several times, because sessions have random names.
    for _ in 0..8 {
        fails(
            &mut source,
            impostor(|source, hello| {
                let _ = source.write_all(hello);
            }),
        );
    }
    journey.works_on(1);
    source.quit();
    journey.log();
    lab.close();
}
