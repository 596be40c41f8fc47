use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::*;

fn unix() -> (OwnedFd, OwnedFd) {
    let (a, b) = UnixStream::pair().unwrap();
    (a.into(), b.into())
}

fn tcp() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (a.into(), listener.accept().unwrap().0.into())
}

/// Bytes that repeat with no power of two.
fn pattern(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

#[test]
fn large_vectored_transfers_arrive_whole() {
    // More parts than one call takes, sizes that never line up between the two sides, empty parts among them.
    let content = pattern(3_000_000);
    for (near, far) in [unix(), tcp()] {
        let sent = content.clone();
        let source = thread::spawn(move || {
            let mut parts: Vec<_> = sent.chunks(1009).map(IoSlice::new).collect();
            parts.insert(5, IoSlice::new(&[]));
            parts.push(IoSlice::new(&[]));
            assert!(parts.len() > 2 * MAX_PARTS);
            Ring::new(1).unwrap().send_all(near.as_fd(), &parts).unwrap()
        });
        let mut received = vec![0; content.len()];
        let mut parts: Vec<_> = received.chunks_mut(1361).map(IoSliceMut::new).collect();
        let mut ring = Ring::new(1).unwrap();
        ring.recv_exact(far.as_fd(), &mut parts).unwrap();
        assert_eq!(source.join().unwrap(), content.len());
        assert!(received == content, "the content differs");
        assert!(ring.scratch.is_empty());
    }
}

#[test]
fn single_parts_arrive_whole() {
    let content = pattern(5_000_000);
    for (near, far) in [unix(), tcp()] {
        let sent = content.clone();
        let source = thread::spawn(move || {
            Ring::new(1).unwrap().send_all(near.as_fd(), &[IoSlice::new(&sent)]).unwrap();
        });
        let mut received = vec![0; content.len()];
        Ring::new(1).unwrap().recv_exact(far.as_fd(), &mut [IoSliceMut::new(&mut received)]).unwrap();
        source.join().unwrap();
        assert!(received == content, "the content differs");
    }
}

#[test]
fn dribbled_bytes_are_put_together() {
    let (near, far) = unix();
    let source = thread::spawn(move || {
        let mut near = UnixStream::from(near);
        for byte in b"switchover" {
            near.write_all(&[*byte]).unwrap();
            thread::yield_now();
        }
        near
    });
    let (mut a, mut b) = ([0; 3], [0; 7]);
    let mut parts = [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)];
    Ring::new(1).unwrap().recv_exact(far.as_fd(), &mut parts).unwrap();
    assert_eq!((&a, &b), (b"swi", b"tchover"));
    drop(source.join().unwrap());
}

#[test]
fn an_end_in_the_middle_says_how_far_it_came() {
    for parts in [1, 2] {
        let (near, far) = unix();
        UnixStream::from(near).write_all(b"abc").unwrap();
        let mut buffer = [0; 8];
        let mut slices: Vec<_> = buffer.chunks_mut(8 / parts).map(IoSliceMut::new).collect();
        let mut ring = Ring::new(1).unwrap();
        let error = ring.recv_exact(far.as_fd(), &mut slices).unwrap_err();
        assert!(matches!(error, RingError::Closed { got: 3, wanted: 8 }), "{error}");
        assert_eq!(&buffer[..4], b"abc\0");
    }
}

#[test]
fn a_shutdown_wakes_receiver_and_sender() {
    let (near, far) = unix();
    let shut = UnixStream::from(far.try_clone().unwrap());
    let waiting =
        thread::spawn(move || Ring::new(1).unwrap().recv_exact(far.as_fd(), &mut [IoSliceMut::new(&mut [0; 8])]));
    shut.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(waiting.join().unwrap(), Err(RingError::Closed { got: 0, wanted: 8 })));

    let shut = UnixStream::from(near.try_clone().unwrap());
    let waiting = thread::spawn(move || {
        // More than any socket's buffer holds, and nobody reads.
        Ring::new(1).unwrap().send_all(near.as_fd(), &[IoSlice::new(&vec![0; 64 << 20])])
    });
    shut.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(waiting.join().unwrap(), Err(RingError::Io { operation: "send", .. })));
}

#[test]
fn nothing_is_a_transfer_too() {
    let (near, far) = unix();
    let mut ring = Ring::new(1).unwrap();
    assert_eq!(ring.send_all(near.as_fd(), &[IoSlice::new(&[])]).unwrap(), 0);
    ring.recv_exact(far.as_fd(), &mut []).unwrap();
}

#[test]
fn a_non_blocking_socket_is_waited_for() {
    let (near, far) = unix();
    let (near, far) = (UnixStream::from(near), UnixStream::from(far));
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    let content = pattern(4_000_000);
    let sent = content.clone();
    let source = thread::spawn(move || {
        Ring::new(1).unwrap().send_all(near.as_fd(), &[IoSlice::new(&sent)]).unwrap();
    });
    let mut received = vec![0; content.len()];
    Ring::new(1).unwrap().recv_exact(far.as_fd(), &mut [IoSliceMut::new(&mut received)]).unwrap();
    source.join().unwrap();
    assert!(received == content, "the content differs");
}

#[test]
fn a_ring_may_change_threads_between_transfers() {
    let (near, far) = unix();
    let mut far = UnixStream::from(far);
    let mut ring = Ring::new(1).unwrap();
    ring.send_all(near.as_fd(), &[IoSlice::new(b"a")]).unwrap();
    let (mut ring, near) = thread::spawn(move || {
        ring.send_all(near.as_fd(), &[IoSlice::new(b"b")]).unwrap();
        (ring, near)
    })
    .join()
    .unwrap();
    ring.send_all(near.as_fd(), &[IoSlice::new(b"c")]).unwrap();
    let mut read = [0; 3];
    far.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"abc");
}

#[test]
fn an_error_of_the_socket_leaves_the_ring_usable() {
    let (near, far) = unix();
    drop(far);
    let mut ring = Ring::new(1).unwrap();
    let error = ring.send_all(near.as_fd(), &[IoSlice::new(b"a")]).unwrap_err();
    assert!(error.to_string().contains("cannot send"), "{error}");
    let (near, far) = unix();
    ring.send_all(near.as_fd(), &[IoSlice::new(b"a")]).unwrap();
    ring.recv_exact(far.as_fd(), &mut [IoSliceMut::new(&mut [0; 1])]).unwrap();
}

#[test]
fn a_short_transfer_goes_on_where_it_ended() {
    let memory = [0_u8; 100];
    let part = |at: usize, length| libc::iovec { iov_base: memory[at..].as_ptr().cast_mut().cast(), iov_len: length };
    // The offset and length of the first part that remains, and how many there are.
    let rest = |count| {
        let mut parts = [part(0, 0), part(0, 10), part(20, 0), part(20, 5), part(40, 60)];
        let rest = skip(&mut parts, count);
        let first = rest.first().map(|first| (first.iov_base as usize - memory.as_ptr() as usize, first.iov_len));
        (first, rest.len())
    };
    assert_eq!(rest(0), (Some((0, 10)), 4));
    assert_eq!(rest(3), (Some((3, 7)), 4));
    assert_eq!(rest(10), (Some((20, 5)), 2));
    assert_eq!(rest(14), (Some((24, 1)), 2));
    assert_eq!(rest(15), (Some((40, 60)), 1));
    assert_eq!(rest(74), (Some((99, 1)), 1));
    assert_eq!(rest(75), (None, 0));
}
