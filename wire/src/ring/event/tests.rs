use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::*;

const FOREVER: Option<Duration> = Some(Duration::from_secs(20));

fn wait_one(ring: &mut EventRing) -> Completion {
    loop {
        if let Some(completion) = ring.next() {
            return completion;
        }
        ring.submit_and_wait(1, FOREVER).unwrap();
    }
}

#[test]
fn transfers_come_back_with_their_tokens() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut ring = EventRing::new(8).unwrap();
    let (message, mut buffer) = (*b"switchover", [0_u8; 10]);
    // SAFETY: both buffers outlive the completions, which are awaited below.
    unsafe {
        ring.recv(far.as_fd(), buffer.as_mut_ptr(), buffer.len(), 7).unwrap();
        ring.send(near.as_fd(), message.as_ptr(), message.len(), 8).unwrap();
    }
    let mut tokens = [wait_one(&mut ring), wait_one(&mut ring)].map(|done| (done.token, done.result.unwrap()));
    tokens.sort_unstable();
    assert_eq!(tokens, [(7, 10), (8, 10)]);
    assert_eq!(buffer, message);
    assert!(ring.next().is_none());
}

#[test]
fn a_reception_waits_for_all_of_it_and_ends_with_the_stream() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut ring = EventRing::new(8).unwrap();
    let mut buffer = [0_u8; 8];
    // SAFETY: the buffer outlives the completions, which are awaited below.
    unsafe { ring.recv(far.as_fd(), buffer.as_mut_ptr(), 8, 1) }.unwrap();
    near.write_all(b"half").unwrap();
    ring.submit_and_wait(1, Some(Duration::from_millis(10))).unwrap();
    assert!(ring.next().is_none(), "half a message is none");
    near.write_all(b"half").unwrap();
    assert_eq!(wait_one(&mut ring).result.unwrap(), 8);
    // SAFETY: as above.
    unsafe { ring.recv(far.as_fd(), buffer.as_mut_ptr(), 8, 2) }.unwrap();
    near.write_all(b"cut").unwrap();
    drop(near);
    assert_eq!(wait_one(&mut ring).result.unwrap(), 3);
    assert_eq!(&buffer, b"cutfhalf");
}

#[test]
fn sending_to_nobody_is_an_error_and_no_signal() {
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    let mut ring = EventRing::new(8).unwrap();
    let message = [1_u8];
    // SAFETY: the buffer outlives the completion, which is awaited below.
    unsafe { ring.send(near.as_fd(), message.as_ptr(), 1, 1) }.unwrap();
    assert_eq!(wait_one(&mut ring).result.unwrap_err().raw_os_error(), Some(libc::EPIPE));
}

#[test]
fn a_poll_reports_again_and_again() {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let mut ring = EventRing::new(8).unwrap();
    ring.poll_multishot(far.as_fd(), 3).unwrap();
    for round in 0..100_u8 {
        near.write_all(&[round]).unwrap();
        let event = wait_one(&mut ring);
        assert_eq!((event.token, event.result.unwrap() & 1), (3, 1));
        let mut byte = [0];
        far.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [round]);
    }
}

#[test]
fn a_poll_that_the_kernel_ended_is_armed_again() {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let (mut other, other_far) = UnixStream::pair().unwrap();
    let mut ring = EventRing::new(1).unwrap();
    let room = ring.uring.params().cq_entries();
    ring.poll_multishot(other_far.as_fd(), 4).unwrap();
    ring.poll_multishot(far.as_fd(), 3).unwrap();
    ring.submit().unwrap();
    // More events than the completion queue holds, none of them taken: the kernel ends the multishot polls.
    for _ in 0..room + 4 {
        near.write_all(&[1]).unwrap();
        other.write_all(&[1]).unwrap();
        ring.submit_and_wait(1, Some(Duration::ZERO)).unwrap();
    }
    let mut events = 0;
    while ring.next().is_some() {
        events += 1;
    }
    assert!(events >= 2);
    let _ = far.read(&mut [0; 64]).unwrap();
    loop {
        near.write_all(&[2]).unwrap();
        let event = wait_one(&mut ring);
        if event.token == 3 {
            event.result.unwrap();
            break;
        }
    }
}

#[test]
fn a_timeout_is_no_error() {
    let (_near, far) = UnixStream::pair().unwrap();
    let mut ring = EventRing::new(8).unwrap();
    ring.poll_multishot(far.as_fd(), 3).unwrap();
    // Apart from the wait, which reports a success where it also submits something.
    ring.submit().unwrap();
    ring.submit_and_wait(1, Some(Duration::from_millis(1))).unwrap();
    assert!(ring.next().is_none());
}

#[test]
fn spinning_without_waiting_sees_completions() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut ring = EventRing::new(8).unwrap();
    let mut buffer = [0_u8; 4];
    // SAFETY: the buffer outlives the completion, which is awaited below.
    unsafe { ring.recv(far.as_fd(), buffer.as_mut_ptr(), 4, 1) }.unwrap();
    ring.submit().unwrap();
    near.write_all(b"spin").unwrap();
    let completion = loop {
        ring.submit().unwrap();
        if let Some(completion) = ring.next() {
            break completion;
        }
    };
    assert_eq!((completion.result.unwrap(), &buffer), (4, b"spin"));
}

#[test]
fn more_operations_than_entries_may_be_under_way() {
    let pairs: Vec<_> = (0..40).map(|_| UnixStream::pair().unwrap()).collect();
    let mut ring = EventRing::new(2).unwrap();
    let mut buffers = [[0_u8; 1]; 40];
    for (token, ((_, far), buffer)) in pairs.iter().zip(&mut buffers).enumerate() {
        // SAFETY: the buffers outlive the completions, which are awaited below.
        unsafe { ring.recv(far.as_fd(), buffer.as_mut_ptr(), 1, token as u64) }.unwrap();
    }
    for (index, (near, _)) in (0..40).zip(&pairs) {
        let mut near = near;
        near.write_all(&[index]).unwrap();
    }
    let mut seen: Vec<u64> = (0..40).map(|_| wait_one(&mut ring).token).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..40).collect::<Vec<u64>>());
    assert!((0..40).eq(buffers.iter().map(|buffer| buffer[0])));
}

#[test]
fn dropping_the_ring_takes_the_kernel_off_the_memory() {
    let mut pairs: Vec<_> = (0..64).map(|_| UnixStream::pair().unwrap()).collect();
    for submitted in [false, true, true, true, true] {
        let mut buffers = [[0_u8; 4]; 64];
        let mut ring = EventRing::new(8).unwrap();
        ring.poll_multishot(pairs[0].1.as_fd(), 2).unwrap();
        for ((_, far), buffer) in pairs.iter().zip(&mut buffers) {
            // SAFETY: the ring goes before the buffers.
            unsafe { ring.recv(far.as_fd(), buffer.as_mut_ptr(), 4, 1) }.unwrap();
        }
        if submitted {
            ring.submit().unwrap();
        }
        drop(ring);
        for (near, far) in &mut pairs {
            near.write_all(b"late").unwrap();
            let mut read = [0; 4];
            far.set_nonblocking(true).unwrap();
            far.read_exact(&mut read).expect("the ring took what came after it had gone");
            assert_eq!(&read, b"late");
        }
        assert_eq!(buffers, [[0; 4]; 64]);
    }
}

#[test]
fn when_the_ring_has_gone_the_kernel_holds_nothing_for_it() {
    for _ in 0..20 {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut ring = EventRing::new(8).unwrap();
        let mut buffer = [0_u8; 4];
        ring.poll_multishot(far.as_fd(), 2).unwrap();
        // SAFETY: the ring goes before the buffer.
        unsafe { ring.recv(far.as_fd(), buffer.as_mut_ptr(), 4, 1) }.unwrap();
        ring.submit().unwrap();
        drop(far);
        near.set_nonblocking(true).unwrap();
        assert_eq!(near.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock, "the operations hold it open");
        drop(ring);
        assert_eq!(near.read(&mut [0]).expect("the last reference has gone with the ring"), 0);
    }
}

#[test]
fn cancelling_leaves_nothing_under_way() {
    let (_near, far) = UnixStream::pair().unwrap();
    let mut ring = EventRing::new(2).unwrap();
    let mut buffer = [0_u8; 4];
    ring.poll_multishot(far.as_fd(), 1).unwrap();
    for _ in 0..8 {
        // SAFETY: the ring goes before the buffer; nothing is ever sent, so nothing is written twice.
        unsafe { ring.recv(far.as_fd(), buffer.as_mut_ptr(), 4, 2) }.unwrap();
    }
    assert_eq!(ring.transfers, 8);
    ring.cancel_all().unwrap();
    assert_eq!(ring.transfers, 0);
    assert!(ring.slots.iter().all(|slot| matches!(slot, Slot::Free)));
}

#[test]
fn a_ring_is_its_first_threads() {
    let mut ring = EventRing::new(8).unwrap();
    let (_near, far) = UnixStream::pair().unwrap();
    let mut ring = thread::spawn(move || {
        ring.submit().unwrap();
        ring
    })
    .join()
    .unwrap();
    ring.poll_multishot(far.as_fd(), 1).unwrap();
    let refused = ring.submit();
    // Kernels before 6.1 let every thread submit.
    assert!(refused.is_ok() || refused.unwrap_err().raw_os_error() == Some(libc::EEXIST));
}
