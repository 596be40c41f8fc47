//! The socket: a thread that accepts, a thread for each connection, and one that tells events to all of them.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, UNIX_EPOCH};

use crossbeam::channel::{Receiver, Sender, bounded, never, select};
use serde_json::{Value, json};
use switchover_wire::socket::{Listener, Socket, SocketError};
use thiserror::Error;
use tracing::{debug, warn};

use super::commands::Commands;
use super::controller::{Controller, Event, TimedEvent};
use super::endpoint::Endpoint;
use super::framing::Framing;
use super::parameters::Parameters;
use super::session::{Session, Then, greeting};

/// Longest command taken. The longest sensible one is a few hundred bytes.
const INPUT_LIMIT: usize = 1 << 20;
/// Connections at a time. Each costs a thread.
const CONNECTIONS: usize = 64;
/// How long a client may leave its socket full before it is disconnected: events must reach the others.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// The socket could not be served.
#[derive(Debug, Error)]
pub enum ServerError {
    /// It could not be listened on.
    #[error("cannot serve QMP: {0}")]
    Socket(#[from] SocketError),
    /// A thread could not be started.
    #[error("cannot start a thread for QMP: {0}; is the process limit (`ulimit -u`) reached?")]
    Thread(io::Error),
}

/// A QMP server. It ends with [`close`](Self::close), or when it is dropped.
pub struct Server {
    shared: Arc<Shared>,
    /// Dropping it tells the announcing thread to come to an end.
    announcing: Option<(Sender<()>, JoinHandle<()>)>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    listener: Listener,
    commands: Commands,
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    open: HashMap<u64, Arc<Connection>>,
    threads: Vec<JoinHandle<()>>,
}

struct Connection {
    /// One whole message at a time, be it a reply or an event.
    writer: Mutex<UnixStream>,
    /// For ending it while the writer is busy.
    handle: UnixStream,
    tells_events: AtomicBool,
}

/// A socket that clients can connect to already, and where nobody answers yet.
#[derive(Debug)]
pub struct Bound(Listener);

impl Bound {
    /// Takes the socket. A machine does so before it starts its guest, and serves it afterwards: so neither can a guest
    /// run that nobody can control, nor is a client's command overtaken by what the machine was told in the first place.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn at(endpoint: &Endpoint) -> Result<Self, ServerError> {
        Ok(Self(Listener::bind(&endpoint.address())?))
    }
}

impl Server {
    /// Serves `controller` on a socket, with these parameters to begin with, and tells whoever is connected of `events`.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        Bound(listener): Bound,
        controller: Arc<dyn Controller>,
        parameters: Parameters,
        events: Receiver<TimedEvent>,
    ) -> Result<Self, ServerError> {
        let commands = Commands::with(controller, parameters);
        let shared = Arc::new(Shared { listener, commands, connections: Mutex::default() });
        let mut server = Self { shared: Arc::clone(&shared), announcing: None, accepting: None };
        let (goes_on, ends) = bounded(0);
        let announcer = Arc::clone(&shared);
        server.announcing = Some((goes_on, spawn("qmp-events", move || announce(&announcer, &events, &ends))?));
        server.accepting = Some(spawn("qmp-accept", move || accept(&shared))?);
        Ok(server)
    }

    /// Ends it: the events that have happened are told, connections closed, threads joined, the socket's file removed.
    pub fn close(self) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.listener.close();
        join(self.accepting.take());
        if let Some((goes_on, thread)) = self.announcing.take() {
            drop(goes_on);
            join(Some(thread));
        }
        let threads = {
            let mut connections = self.shared.connections();
            connections.open.values().for_each(|connection| connection.end());
            std::mem::take(&mut connections.threads)
        };
        threads.into_iter().for_each(|thread| join(Some(thread)));
    }
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    fn new(stream: &UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let writer = Mutex::new(stream.try_clone()?);
        Ok(Self { writer, handle: stream.try_clone()?, tells_events: AtomicBool::new(false) })
    }

    fn send(&self, message: &Value) -> io::Result<()> {
        write_line(&mut self.writer(), message)
    }

    /// Sends the reply that ends the negotiation: every event from now on comes behind it, and none is lost.
    fn send_and_tell_events(&self, reply: &Value) -> io::Result<()> {
        let mut writer = self.writer();
        self.tells_events.store(true, Ordering::SeqCst);
        write_line(&mut writer, reply)
    }

    fn writer(&self) -> MutexGuard<'_, UnixStream> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        // It fails only where the client has ended it already.
        let _ = self.handle.shutdown(Shutdown::Both);
    }
}

fn write_line(writer: &mut UnixStream, message: &Value) -> io::Result<()> {
    let mut text = message.to_string();
    text.push_str("\r\n");
    writer.write_all(text.as_bytes())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, ServerError> {
    thread::Builder::new().name(name.to_owned()).spawn(work).map_err(ServerError::Thread)
}

fn join(thread: Option<JoinHandle<()>>) {
    // A thread that panicked has ended the process already.
    let _ = thread.map(JoinHandle::join);
}

fn accept(shared: &Arc<Shared>) {
    loop {
        match shared.listener.accept() {
            Ok(Some(socket)) => {
                if let Err(error) = welcome(shared, &socket) {
                    warn!(%error, "a QMP connection was lost");
                }
            }
            Ok(None) => return,
            Err(error) => {
                warn!(%error, "no more QMP connections are taken");
                return;
            }
        }
    }
}

fn welcome(shared: &Arc<Shared>, socket: &Socket) -> Result<(), ServerError> {
    let stream = UnixStream::from(socket.as_fd().try_clone_to_owned().map_err(ServerError::Thread)?);
    let connection = Arc::new(Connection::new(&stream).map_err(ServerError::Thread)?);
    let mut connections = shared.connections();
    connections.threads.retain(|thread| !thread.is_finished());
    if connections.open.len() >= CONNECTIONS {
        warn!("{CONNECTIONS} QMP connections are open already: another one was closed");
        return Ok(());
    }
    let key = connections.next;
    connections.next += 1;
    let (serving, served) = (Arc::clone(shared), Arc::clone(&connection));
    let thread = spawn("qmp-connection", move || {
        if let Err(error) = serve(&serving.commands, &served, stream) {
            debug!(%error, "a QMP connection ended");
        }
        serving.connections().open.remove(&key);
        served.end();
    })?;
    connections.threads.push(thread);
    connections.open.insert(key, connection);
    Ok(())
}

/// Answers one client until it goes.
fn serve(commands: &Commands, connection: &Connection, mut stream: UnixStream) -> io::Result<()> {
    let mut session = Session::default();
    let mut framing = Framing::new(INPUT_LIMIT);
    let mut bytes = [0; 4096];
    connection.send(&greeting())?;
    loop {
        let count = match stream.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        for input in framing.feed(bytes.get(..count).unwrap_or_default()) {
            let answer = session.answer(commands, input);
            match answer.then {
                Then::GoOn => connection.send(&answer.reply)?,
                Then::TellEvents => connection.send_and_tell_events(&answer.reply)?,
                Then::Quit => {
                    let sent = connection.send(&answer.reply);
                    // A client that quits and goes without its reply still means it.
                    commands.end();
                    sent?;
                }
            }
        }
    }
}

/// Tells events until `ends` is disconnected, and then those that are left.
fn announce(shared: &Shared, events: &Receiver<TimedEvent>, ends: &Receiver<()>) {
    let mut source = events.clone();
    loop {
        select! {
            recv(source) -> event => match event {
                Ok(event) => tell(shared, event),
                // Nobody is left who could say anything: wait for the end.
                Err(_) => source = never(),
            },
            recv(ends) -> _ => break,
        }
    }
    events.try_iter().for_each(|event| tell(shared, event));
}

fn tell(shared: &Shared, TimedEvent { event, at }: TimedEvent) {
    if matches!(event, Event::Migration(_) | Event::MigrationPass(_)) && !shared.commands.tells_migration_events() {
        return;
    }
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut message = json!({
        "event": name(event),
        "timestamp": { "seconds": since.as_secs(), "microseconds": since.subsec_micros() },
    });
    match event {
        Event::Stop | Event::Resume => {}
        Event::Shutdown { guest, reason } => message["data"] = json!({ "guest": guest, "reason": reason }),
        Event::Migration(status) => message["data"] = json!({ "status": status }),
        Event::MigrationPass(pass) => message["data"] = json!({ "pass": pass }),
    }
    // Not under the lock: one client that does not read must not hold up a new one.
    let listening: Vec<_> = shared.connections().open.values().map(Arc::clone).collect();
    for connection in listening.iter().filter(|connection| connection.tells_events.load(Ordering::SeqCst)) {
        if connection.send(&message).is_err() {
            connection.end();
        }
    }
}

const fn name(event: Event) -> &'static str {
    match event {
        Event::Stop => "STOP",
        Event::Resume => "RESUME",
        Event::Shutdown { .. } => "SHUTDOWN",
        Event::Migration(_) => "MIGRATION",
        Event::MigrationPass(_) => "MIGRATION_PASS",
    }
}
