//! A lane's bytes, whatever carries them: as they are, or in TLS records.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;
use std::{mem, slice};

use super::{Ring, RingError};
use crate::socket::Socket;
use crate::tls::Tls;
use crate::tls::record::{MAX_PLAINTEXT, Opener, Sealed};

/// One operation at a time: two entries are one more than needed.
const RING_ENTRIES: u32 = 2;

/// Plaintext that is sealed before it is sent: enough that a frame does not cost an operation for each record, and little enough
/// that it is still in the cache when the kernel copies it.
const SEALED_AT_ONCE: usize = 4 * MAX_PLAINTEXT;

/// The longest first part that gets a record of its own before a long rest: a frame's header, which is wanted first, and without
/// which the pages behind it fill records.
const HEADER_LIMIT: usize = 64;

/// A lane for a thread that does one transfer at a time and waits for it.
///
/// As a [`Ring`], it may move between threads at the price of a new ring. One thread sends at a time, and one receives.
pub struct Stream {
    socket: Arc<Socket>,
    ring: Ring,
    /// Working copy of the caller's parts; empty between calls.
    scratch: Vec<libc::iovec>,
    /// On a TLS lane, made when something is sent first.
    sealed: Option<Sealed>,
    /// On a TLS lane, taken when something is received first, and given back in the end.
    opener: Option<Box<Opener>>,
}

// SAFETY: the raw pointers in `scratch` exist only during a call, which borrows the stream exclusively, and are cleared before it
// returns; all else is `Send`.
unsafe impl Send for Stream {}

impl Stream {
    /// Over `socket`, which nobody else sends on or receives from meanwhile in the same direction.
    ///
    /// # Errors
    /// When the kernel gives no ring.
    pub fn new(socket: Arc<Socket>) -> Result<Self, RingError> {
        Ok(Self { socket, ring: Ring::new(RING_ENTRIES)?, scratch: Vec::new(), sealed: None, opener: None })
    }

    /// As [`Ring::spin_for`].
    pub const fn spin_for(&mut self, most: Duration) {
        self.ring.spin_for(most);
    }

    /// As [`Ring::send_all`]. The bytes are counted as they are before they are sealed.
    ///
    /// # Errors
    /// When the connection breaks; an unknown part of the bytes may have been sent then.
    pub fn send_all(&mut self, parts: &[IoSlice<'_>]) -> Result<usize, RingError> {
        if self.socket.tls().is_none() {
            return self.ring.send_all(self.socket.as_fd(), parts);
        }
        let raw = |part: &IoSlice<'_>| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
        // SAFETY: the parts are borrowed for the whole call, and nobody writes what is borrowed.
        self.with_scratch(parts.iter().map(raw), |stream, parts| unsafe { stream.seal_and_send(parts, copy_own) })
    }

    /// As [`Ring::recv_exact`].
    ///
    /// # Errors
    /// [`RingError::Closed`] when the stream ends before that; and when what comes is no record of this lane.
    pub fn recv_exact(&mut self, parts: &mut [IoSliceMut<'_>]) -> Result<(), RingError> {
        if self.socket.tls().is_none() {
            return self.ring.recv_exact(self.socket.as_fd(), parts);
        }
        let raw = |part: &mut IoSliceMut<'_>| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() };
        // SAFETY: the parts are exclusively borrowed for the whole call.
        self.with_scratch(parts.iter_mut().map(raw), |stream, parts| unsafe { stream.receive_and_open(parts) })
    }

    /// As [`Ring::send_all_raw`].
    ///
    /// # Errors
    /// As for [`send_all`](Self::send_all).
    ///
    /// # Safety
    /// Every part must be readable for the whole call. Other writers are allowed only where torn content is.
    pub unsafe fn send_all_raw(&mut self, parts: &mut [libc::iovec]) -> Result<usize, RingError> {
        if self.socket.tls().is_none() {
            // SAFETY: the caller's promise is the callee's.
            return unsafe { self.ring.send_all_raw(self.socket.as_fd(), parts) };
        }
        // SAFETY: the caller's promise is the callee's; the copy allows for other writers.
        unsafe { self.seal_and_send(parts, copy_shared) }
    }

    /// As [`Ring::recv_exact_raw`].
    ///
    /// # Errors
    /// As for [`recv_exact`](Self::recv_exact).
    ///
    /// # Safety
    /// Every part must be writable for the whole call, with no Rust reference into it.
    pub unsafe fn recv_exact_raw(&mut self, parts: &mut [libc::iovec]) -> Result<(), RingError> {
        if self.socket.tls().is_none() {
            // SAFETY: the caller's promise is the callee's.
            return unsafe { self.ring.recv_exact_raw(self.socket.as_fd(), parts) };
        }
        // SAFETY: the caller's promise is the callee's.
        unsafe { self.receive_and_open(parts) }
    }

    fn with_scratch<T>(
        &mut self,
        parts: impl Iterator<Item = libc::iovec>,
        work: impl FnOnce(&mut Self, &mut [libc::iovec]) -> T,
    ) -> T {
        let mut scratch = mem::take(&mut self.scratch);
        scratch.extend(parts);
        let result = work(self, &mut scratch);
        scratch.clear();
        self.scratch = scratch;
        result
    }

    /// # Safety
    /// Every part must be readable until this returns, and `copy` allow for whoever writes it meanwhile.
    unsafe fn seal_and_send(
        &mut self,
        parts: &[libc::iovec],
        copy: unsafe fn(*const u8, &mut [u8]),
    ) -> Result<usize, RingError> {
        let Some(tls) = self.socket.tls() else { return Ok(0) };
        let sealed = self.sealed.get_or_insert_with(|| Sealed::with_room_for(SEALED_AT_ONCE));
        sealed.clear();
        let total = parts.iter().map(|part| part.iov_len).sum::<usize>();
        let mut cursor = Cursor { parts, at: 0 };
        let mut left = total;
        let mut next = match parts {
            [first, _, ..] if total > MAX_PLAINTEXT && first.iov_len <= HEADER_LIMIT => first.iov_len,
            _ => left.min(MAX_PLAINTEXT),
        };
        // Held until all is sent: records go in the order in which they were sealed.
        let mut sealer = tls.sealer();
        while left > 0 {
            if !sealed.has_room_for(next) {
                self.ring.send_all(self.socket.as_fd(), &[IoSlice::new(sealed.bytes())])?;
                sealed.clear();
            }
            sealer.seal(sealed, next, |room| {
                let mut filled = 0;
                while filled < room.len() {
                    let Some((from, length)) = cursor.next(room.len() - filled) else { break };
                    // SAFETY: `length` bytes from there are of a part, which the caller keeps readable.
                    unsafe { copy(from, &mut room[filled..filled + length]) };
                    filled += length;
                }
            })?;
            left -= next;
            next = left.min(MAX_PLAINTEXT);
        }
        self.ring.send_all(self.socket.as_fd(), &[IoSlice::new(sealed.bytes())])?;
        Ok(total)
    }

    /// # Safety
    /// Every part must be writable until this returns, with no Rust reference into it.
    unsafe fn receive_and_open(&mut self, parts: &[libc::iovec]) -> Result<(), RingError> {
        let wanted = parts.iter().map(|part| part.iov_len).sum::<usize>();
        let mut cursor = Cursor { parts, at: 0 };
        let mut got = 0;
        if self.opener.is_none() {
            self.opener = self.socket.tls().map(Tls::take_opener).transpose()?;
        }
        let Some(opener) = &mut self.opener else { return Ok(()) };
        while got < wanted {
            let plain = opener.plaintext()?;
            if plain.is_empty() {
                let (space, needed) = opener.space(wanted - got);
                // No more than must come, so that waiting for it cannot be in vain.
                match self.ring.recv_exact(self.socket.as_fd(), &mut [IoSliceMut::new(&mut space[..needed])]) {
                    Ok(()) => opener.received(needed),
                    Err(RingError::Closed { got: last, .. }) => {
                        // The last record may say why.
                        opener.received(last);
                        while let plain @ [_, ..] = opener.plaintext()? {
                            let count = plain.len();
                            opener.take(count);
                        }
                        return Err(RingError::Closed { got, wanted });
                    }
                    Err(error) => return Err(error),
                }
                continue;
            }
            let Some((to, length)) = cursor.next(plain.len()) else { break };
            // SAFETY: `length` bytes from there are of a part, which the caller keeps writable and nobody else refers to; `plain`
            // has as many.
            unsafe { std::ptr::copy_nonoverlapping(plain.as_ptr(), to.cast_mut(), length) };
            opener.take(length);
            got += length;
        }
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let (Some(opener), Some(tls)) = (self.opener.take(), self.socket.tls()) {
            tls.give_back(opener);
        }
    }
}

/// A place within parts.
struct Cursor<'a> {
    parts: &'a [libc::iovec],
    /// Bytes of the first part that are behind it.
    at: usize,
}

impl Cursor<'_> {
    /// The next bytes that lie together, at most so many; `None` at the end.
    fn next(&mut self, most: usize) -> Option<(*const u8, usize)> {
        while let [first, rest @ ..] = self.parts {
            let left = first.iov_len - self.at;
            if left == 0 {
                (self.parts, self.at) = (rest, 0);
                continue;
            }
            let start = first.iov_base.cast::<u8>().wrapping_add(self.at).cast_const();
            let length = left.min(most);
            self.at += length;
            return Some((start, length));
        }
        None
    }
}

/// Copies what nobody writes meanwhile.
///
/// # Safety
/// As many bytes as `to` has must be readable at `from`, and not change.
unsafe fn copy_own(from: *const u8, to: &mut [u8]) {
    // SAFETY: the caller's promise.
    to.copy_from_slice(unsafe { slice::from_raw_parts(from, to.len()) });
}

/// Copies what a guest may be writing: half of it may be from before a write and half from after. Rust's own loads are atomic, so
/// that this is no undefined behaviour.
///
/// # Safety
/// As many bytes as `to` has must be readable at `from`.
unsafe fn copy_shared(from: *const u8, to: &mut [u8]) {
    // SAFETY: the bytes are readable, and every bit pattern is a number; they are only loaded atomically.
    let bytes = unsafe { slice::from_raw_parts(from.cast::<AtomicU8>(), to.len()) };
    // SAFETY: as above, of aligned words, which `align_to` finds.
    let (front, words, back) = unsafe { bytes.align_to::<AtomicU64>() };
    let (to_front, rest) = to.split_at_mut(front.len());
    let (to_words, to_back) = rest.split_at_mut(words.len() * 8);
    let load = |to: &mut [u8], from: &[AtomicU8]| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.load(Ordering::Relaxed));
    };
    load(to_front, front);
    for (to, from) in to_words.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&from.load(Ordering::Relaxed).to_ne_bytes());
    }
    load(to_back, back);
}
