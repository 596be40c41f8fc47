//! A request of 16 bytes and a page in return, over a stream socket.

use std::hint::spin_loop;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use switchover_wire::clock::Nanos;

use super::{FloorError, Samples, Way};

/// As long as a page request.
const REQUEST: usize = 16;
/// A page.
const RESPONSE: usize = 4096;

/// What the lanes of a migration prefer to BBR, which many hosts default to and which holds back a connection that it does
/// not know yet.
const CONGESTION_CONTROL: &str = "cubic";

/// Over TCP on the loopback interface.
///
/// # Errors
/// When the sockets fail.
pub fn over_tcp(way: Way, budget: Duration) -> Result<Samples, FloorError> {
    let (near, far) = tcp_pair(way)?;
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

/// Two ends of a TCP connection on the loopback interface, with a lane's options: blocking, to be slept on, or nonblocking, to
/// be spun on.
///
/// # Errors
/// When there is none.
pub fn tcp_pair(way: Way) -> Result<(TcpStream, TcpStream), FloorError> {
    let failed = FloorError::on("connect over TCP on the loopback interface");
    let pair = || {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let (far, _) = listener.accept()?;
        for stream in [&near, &far] {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(way == Way::Spinning)?;
            // A host without it goes on with its own.
            let _ = setsockopt(stream, sockopt::TcpCongestion, &CONGESTION_CONTROL.into());
        }
        Ok::<_, io::Error>((near, far))
    };
    pair().map_err(&failed)
}

fn round_trips<S: Read + Write + Send>(near: S, far: S, budget: Duration) -> Result<Samples, FloorError> {
    answered(near, far, |near| {
        let mut samples = Samples::new(budget)?;
        while samples.wants_more() {
            let start = Nanos::now();
            near.ask()?;
            samples.record(Nanos::now().since(start));
        }
        Ok(samples)
    })
}

/// The end that asks.
pub struct Near<S> {
    stream: S,
    response: [u8; RESPONSE],
}

impl<S: Read + Write> Near<S> {
    /// Sends a request and waits for its page.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn ask(&mut self) -> Result<(), FloorError> {
        let asked = send(&mut self.stream, &[3; REQUEST]).and_then(|()| receive(&mut self.stream, &mut self.response));
        asked.map_err(FloorError::on("exchange messages with a thread of this process"))
    }
}

/// Runs `work` while another thread answers what it asks. Blocking sockets are slept on, nonblocking ones spun on, by both
/// ends.
///
/// # Errors
/// When there is no thread, or `work` fails.
pub fn answered<S: Read + Write + Send, T>(
    near: S,
    mut far: S,
    work: impl FnOnce(&mut Near<S>) -> Result<T, FloorError>,
) -> Result<T, FloorError> {
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
        let mut near = Near { stream: near, response: [0; RESPONSE] };
        let done = work(&mut near);
        drop(near);
        done
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
