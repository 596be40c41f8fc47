//! A bulk stream: 64 pages at a time over TCP, with io_uring at both ends, from populated memory into populated memory.
//!
//! It is the least that can be called a drain: nobody looks at the pages, claims or maps them. Its rate is what a drain is read
//! against, and beside it the loaded floor is measured.
//!
//! This is the one module here that gives memory to io_uring. Its invariant: a ring has one operation under way at most, and the
//! call that began it returns only when it has completed. So the memory of a call's operation lives as long as its caller keeps
//! it, which is for the whole call.

use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::region::PAGE;
use super::request::tcp_pair;
use super::{FloorError, Way};

/// Bytes of a frame: 64 pages, as many as a pusher sends at once.
const FRAME: usize = 64 * PAGE;
/// Memory on each side of a connection: more than processors cache.
const SIDE: usize = 128 << 20;

/// The memory of connections, which can be streamed over again and again.
pub struct Stream {
    connections: Vec<Memory>,
    /// Bits a second of all connections together.
    limit: Option<u64>,
}

/// What one connection sends from, and receives into.
struct Memory {
    from: MmapRaw,
    to: MmapRaw,
}

/// What a stream that runs has carried so far.
pub struct Carried {
    bytes: AtomicU64,
    began: Instant,
}

impl Stream {
    /// Memory for `connections`, all of it populated; together they are to carry `limit` bits a second, or what they can.
    ///
    /// # Errors
    /// When there is not so much memory.
    pub fn new(connections: usize, limit: Option<u64>) -> Result<Self, FloorError> {
        let connections = (0..connections).map(|_| Ok(Memory { from: populated()?, to: populated()? }));
        Ok(Self { connections: connections.collect::<Result<_, FloorError>>()?, limit })
    }

    /// Runs `work` while the stream runs.
    ///
    /// # Errors
    /// When the stream breaks, or `work` fails.
    pub fn beside<T>(&self, work: impl FnOnce(&Carried) -> Result<T, FloorError>) -> Result<T, FloorError> {
        let carried = Carried { bytes: AtomicU64::new(0), began: Instant::now() };
        let stop = AtomicBool::new(false);
        let limit = self.limit.map(|bits| bits / 8 / self.connections.len().max(1) as u64);
        thread::scope(|scope| {
            let (stop, carried) = (&stop, &carried);
            let mut threads = Vec::new();
            let mut start = || {
                for memory in &self.connections {
                    let (near, far) = tcp_pair(Way::Sleeping)?;
                    let push = move || push(&near, &memory.from, limit, stop);
                    threads.push(spawn(scope, "floor pusher", push)?);
                    threads.push(spawn(scope, "floor receiver", move || receive(&far, &memory.to, carried))?);
                }
                Ok(())
            };
            let done = start().and_then(|()| work(carried));
            // Every pusher ends behind its frame, and its receiver with the connection.
            stop.store(true, Ordering::Release);
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(()))).and(done)
        })
    }
}

impl Carried {
    /// Bytes received since it began, and how long that is.
    #[must_use]
    pub fn now(&self) -> (u64, Duration) {
        (self.bytes.load(Ordering::Relaxed), self.began.elapsed())
    }
}

/// Bits a second between two readings of [`Carried::now`].
#[must_use]
pub fn bits_per_second(before: (u64, Duration), after: (u64, Duration)) -> u64 {
    let bits = u128::from(after.0.saturating_sub(before.0)) * 8;
    let ns = after.1.saturating_sub(before.1).as_nanos().max(1);
    u64::try_from(bits * 1_000_000_000 / ns).unwrap_or(u64::MAX)
}

type Thread<'scope> = thread::ScopedJoinHandle<'scope, Result<(), FloorError>>;

fn spawn<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    name: &str,
    body: impl FnOnce() -> Result<(), FloorError> + Send + 'scope,
) -> Result<Thread<'scope>, FloorError> {
    thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, body).map_err(FloorError::on("start a thread"))
}

/// A memfd whose pages are there and mapped.
fn populated() -> Result<MmapRaw, FloorError> {
    let failed = FloorError::on("make a memfd for a stream");
    let fd =
        memfd_create(c"floor stream", MFdFlags::MFD_CLOEXEC).map_err(FloorError::on("make a memfd for a stream"))?;
    let file = File::from(fd);
    file.set_len(SIDE as u64).map_err(&failed)?;
    MmapOptions::new().len(SIDE).populate().map_raw(&file).map_err(&failed)
}

/// Sends frame after frame, no faster than `limit` bytes a second, until told to stop. The connection ends with it.
fn push(connection: &TcpStream, memory: &MmapRaw, limit: Option<u64>, stop: &AtomicBool) -> Result<(), FloorError> {
    let mut ring = Ring::new()?;
    let pause = limit.map(|bytes| Duration::from_nanos(FRAME as u64 * 1_000_000_000 / bytes.max(1)));
    let mut turn = Instant::now();
    let mut at = 0;
    while !stop.load(Ordering::Acquire) {
        if let Some(pause) = pause {
            thread::sleep(turn.saturating_duration_since(Instant::now()));
            // What was missed while others had the processor is not made up for beyond a few frames.
            turn = (turn + pause).max(Instant::now().checked_sub(pause * 4).unwrap_or(turn));
        }
        if !ring.transfer(connection, memory, at, Direction::Send)? {
            return Err(FloorError::on("stream over TCP")("the connection was closed"));
        }
        at = next(at);
    }
    let _ = connection.shutdown(std::net::Shutdown::Both);
    Ok(())
}

/// Receives frame after frame until the connection ends.
fn receive(connection: &TcpStream, memory: &MmapRaw, carried: &Carried) -> Result<(), FloorError> {
    let mut ring = Ring::new()?;
    let mut at = 0;
    while ring.transfer(connection, memory, at, Direction::Receive)? {
        carried.bytes.fetch_add(FRAME as u64, Ordering::Relaxed);
        at = next(at);
    }
    Ok(())
}

/// Where the frame after that at `at` lies.
const fn next(at: usize) -> usize {
    if at + 2 * FRAME <= SIDE { at + FRAME } else { 0 }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Send,
    Receive,
}

/// An io_uring with one operation under way at most.
struct Ring(IoUring);

impl Ring {
    /// For the calling thread.
    fn new() -> Result<Self, FloorError> {
        let build = |fast: bool| {
            let mut builder = IoUring::builder();
            if fast {
                // Linux 6.1.
                builder.setup_single_issuer().setup_defer_taskrun();
            }
            builder.build(2)
        };
        build(true).or_else(|_| build(false)).map(Self).map_err(FloorError::on("set up an io_uring"))
    }

    /// Sends the frame at `at` in `memory`, or receives one to there. False where the connection had ended before its last byte.
    fn transfer(
        &mut self,
        connection: &TcpStream,
        memory: &MmapRaw,
        at: usize,
        direction: Direction,
    ) -> Result<bool, FloorError> {
        assert!(at <= memory.len() && FRAME <= memory.len() - at, "the frame lies outside of its memory");
        let fd = types::Fd(connection.as_raw_fd());
        let mut done = 0;
        while done < FRAME {
            let start = memory.as_mut_ptr().wrapping_add(at + done);
            let left = u32::try_from(FRAME - done).unwrap_or(0);
            let entry = match direction {
                Direction::Send => {
                    opcode::Send::new(fd, start, left).flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL).build()
                }
                Direction::Receive => opcode::Recv::new(fd, start, left).flags(libc::MSG_WAITALL).build(),
            };
            // SAFETY: `start` and `left` lie in the mapping, which is borrowed for this call, as is the connection; nobody
            // holds a reference into the mapping, which is only ever reached through raw pointers.
            match unsafe { self.complete(&entry) } {
                Ok(0) => return Ok(false),
                Ok(bytes) => done += bytes,
                // The other end has gone.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ECONNRESET | libc::EPIPE)) => return Ok(false),
                Err(error) => return Err(FloorError::on("stream over TCP with io_uring")(error)),
            }
        }
        Ok(true)
    }

    /// Carries one operation out, and says how many bytes it moved.
    ///
    /// # Safety
    /// What the operation reads or writes must stay until this returns.
    unsafe fn complete(&mut self, entry: &Entry) -> io::Result<usize> {
        // SAFETY: this returns only when the operation has completed, or ends the process; until then its memory stays, as
        // the caller promises.
        unsafe { self.0.submission().push(entry) }.map_err(|_| io::Error::other("the ring is full"))?;
        loop {
            match self.0.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(error) => {
                    // The kernel may still use the memory, and nothing tells when it is done.
                    eprintln!("an io_uring with an operation under way fails: {error}");
                    std::process::abort();
                }
            }
            if let Some(completion) = self.0.completion().next() {
                let result = completion.result();
                return usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_carries_what_it_says_and_ends() {
        let stream = Stream::new(2, None).unwrap();
        let (before, after) = stream
            .beside(|carried| {
                let before = carried.now();
                while carried.now().0 - before.0 < 4 * FRAME as u64 {
                    thread::yield_now();
                }
                Ok((before, carried.now()))
            })
            .unwrap();
        assert!(bits_per_second(before, after) > 0);
        // It ends with what it runs beside, however that ends.
        let failed = stream.beside(|_| Err::<(), _>(FloorError::on("do this")("it is not to be done")));
        assert!(failed.is_err());
    }

    #[test]
    fn a_frame_is_where_there_is_room_for_all_of_it() {
        assert_eq!((next(0), next(SIDE - 2 * FRAME), next(SIDE - FRAME)), (FRAME, SIDE - FRAME, 0));
    }

    #[test]
    fn a_rate_is_bits_over_time() {
        let second = Duration::from_secs(1);
        assert_eq!(bits_per_second((1000, second), (2000, second * 2)), 8000);
        assert_eq!(bits_per_second((5, second), (5, second)), 0);
    }
}
