//! A request of 16 bytes and a page in return, over a stream socket.

use std::hint::spin_loop;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use switchover_wire::clock::Nanos;

use super::{FloorError, Samples, Way};

/// As long as a page request.
const REQUEST: usize = 16;
/// A page.
const RESPONSE: usize = 4096;

/// Over TCP on the loopback interface.
///
/// # Errors
/// When the sockets fail.
pub fn over_tcp(way: Way, budget: Duration) -> Result<Samples, FloorError> {
    let failed = FloorError::on("connect over TCP on the loopback interface");
    let pair = || {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let (far, _) = listener.accept()?;
        for stream in [&near, &far] {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(way == Way::Spinning)?;
        }
        Ok::<_, io::Error>((near, far))
    };
    let (near, far) = pair().map_err(&failed)?;
    round_trips(near, far, budget)
}

/// Over a unix socket.
///
/// # Errors
/// When the sockets fail.
pub fn over_unix(way: Way, budget: Duration) -> Result<Samples, FloorError> {
    let failed = FloorError::on("connect over a unix socket");
    let pair = || {
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(way == Way::Spinning)?;
        far.set_nonblocking(way == Way::Spinning)?;
        Ok::<_, io::Error>((near, far))
    };
    let (near, far) = pair().map_err(&failed)?;
    round_trips(near, far, budget)
}

/// Blocking sockets are slept on, nonblocking ones spun on, by both ends.
fn round_trips<S: Read + Write + Send>(mut near: S, mut far: S, budget: Duration) -> Result<Samples, FloorError> {
    let failed = FloorError::on("exchange messages with a thread of this process");
    thread::scope(|scope| {
        let respond = move || {
            let (mut request, response) = ([0; REQUEST], [7; RESPONSE]);
            // Ends with the other side's end of the stream.
            while receive(&mut far, &mut request).is_ok() && send(&mut far, &response).is_ok() {}
        };
        thread::Builder::new()
            .name("floor responder".to_owned())
            .spawn_scoped(scope, respond)
            .map_err(FloorError::on("start a thread"))?;
        let mut samples = Samples::new(budget)?;
        let (request, mut response) = ([3; REQUEST], [0; RESPONSE]);
        while samples.wants_more() {
            let start = Nanos::now();
            send(&mut near, &request).map_err(&failed)?;
            receive(&mut near, &mut response).map_err(&failed)?;
            samples.record(Nanos::now().since(start));
        }
        drop(near);
        Ok(samples)
    })
}

fn receive(from: &mut impl Read, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match from.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => buffer = buffer.split_at_mut(count.min(buffer.len())).1,
            Err(error) if would_block(&error) => spin_loop(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn send(to: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if would_block(&error) => spin_loop(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
