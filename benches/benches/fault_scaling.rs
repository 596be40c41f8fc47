//! How remote faults scale with threads that fault, and with the lanes and userfaultfds that serve them: no KVM, both pagers in
//! this process, sockets between them.
//!
//! N threads write to the pages of one region, each page once, in one random order that they share. Nothing is pushed, so every
//! page is a remote fault: userfaultfd, request, answer, placement, wake. Beside it the same writes to a region that is populated
//! and watched by nobody, which costs the kernel's own minor fault.
//!
//! ```text
//!   cargo bench -p switchover-benches --bench fault_scaling -- --threads 1,8,64 --shards 1,4 --runs 5 --pages 16384 --sockets pair
//! ```

use std::error::Error;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use switchover_pager::destination::DestinationPager;
use switchover_pager::lane::{Notify, PageLane, PagerEvent};
use switchover_pager::ram::Ram;
use switchover_pager::source::{Rest, SourcePager};
use switchover_wire::address::Address;
use switchover_wire::clock::Nanos;
use switchover_wire::socket::{Listener, Socket};
use switchover_wire::types::{LaneId, LaneRole, PAGE_SIZE, PageCount, PageIndex};

type Failure = Box<dyn Error + Send + Sync>;

/// How long what takes a moment may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What to measure.
struct Plan {
    threads: Vec<usize>,
    shards: Vec<u8>,
    /// Pages of the region, each touched once in a run.
    pages: u64,
    /// Runs of each combination, all combinations in turn; the median by rate is shown.
    runs: usize,
    /// TCP over loopback, or a pair of unix sockets.
    tcp: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self { threads: vec![1, 2, 4, 8, 16, 32, 64], shards: vec![1, 2, 4, 8], pages: 8192, runs: 3, tcp: true }
    }
}

impl Plan {
    fn from_arguments() -> Result<Self, Failure> {
        let mut plan = Self::default();
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            // Cargo's own.
            if name == "--bench" {
                continue;
            }
            let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--threads" => plan.threads = list(&value)?,
                "--shards" => plan.shards = list(&value)?,
                "--pages" => plan.pages = value.parse()?,
                "--runs" => plan.runs = value.parse()?,
                "--sockets" => plan.tcp = value == "tcp",
                _ => {
                    return Err(
                        format!("unknown: {name}; there are --threads --shards --pages --runs --sockets").into()
                    );
                }
            }
        }
        Ok(plan)
    }
}

fn list<T: std::str::FromStr<Err: Error + Send + Sync + 'static>>(text: &str) -> Result<Vec<T>, Failure> {
    Ok(text.split(',').map(str::parse).collect::<Result<_, _>>()?)
}

/// One run of one combination.
#[derive(Clone, Copy, Default)]
struct Figures {
    faults_per_second: u64,
    p50_ns: u64,
    p99_ns: u64,
    /// CPU time of both pagers' threads, for each fault.
    cpu_ns: u64,
}

fn main() -> Result<(), Failure> {
    let plan = Plan::from_arguments()?;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let sockets = if plan.tcp { "TCP over loopback" } else { "unix sockets" };
    println!("{} pages, each written once; {cores} cores; {sockets}; median of {} runs", plan.pages, plan.runs);
    let from = filled(plan.pages)?;
    let order = shuffled(plan.pages);
    // No shard: nobody watches.
    let kinds: Vec<Option<u8>> = std::iter::once(None).chain(plan.shards.iter().copied().map(Some)).collect();
    let mut seen = vec![Vec::new(); kinds.len() * plan.threads.len()];
    for _ in 0..plan.runs {
        let mut cell = seen.iter_mut();
        for threads in &plan.threads {
            for (kind, figures) in kinds.iter().zip(&mut cell) {
                figures.push(match kind {
                    None => plain(*threads, &order)?,
                    Some(shards) => match remote(&plan, &from, *threads, *shards, &order) {
                        Ok(figures) => figures,
                        Err(error) => {
                            println!("SKIP fault_scaling: {error}");
                            return Ok(());
                        }
                    },
                });
            }
        }
    }
    println!(
        "{:>8} {:>9} {:>12} {:>10} {:>10} {:>14} {:>14}",
        "threads", "shards", "faults/s", "p50 µs", "p99 µs", "pager CPU µs", "of one shard"
    );
    let mut cells = seen.into_iter();
    for threads in &plan.threads {
        let mut one_shard = None;
        for (kind, runs) in kinds.iter().zip(&mut cells) {
            let Figures { faults_per_second, p50_ns, p99_ns, cpu_ns } = median(runs);
            let (name, cpu, share) = match kind {
                None => ("unwatched".to_owned(), String::new(), String::new()),
                Some(shards) => {
                    let one = *one_shard.get_or_insert(faults_per_second);
                    let percent = faults_per_second * 100 / one.max(1);
                    (shards.to_string(), micros(cpu_ns), format!("{percent} %"))
                }
            };
            let (p50, p99) = (micros(p50_ns), micros(p99_ns));
            println!("{threads:>8} {name:>9} {faults_per_second:>12} {p50:>10} {p99:>10} {cpu:>14} {share:>14}");
        }
    }
    Ok(())
}

/// The region as its source has it: each page full of its number, counted from 1.
fn filled(pages: u64) -> Result<Ram, Failure> {
    let ram = Ram::new(PageCount(pages))?;
    for page in 0..pages {
        for word in 0..PAGE_SIZE / 8 {
            // SAFETY: inside the guest mapping of RAM that only this thread knows.
            unsafe { word_of(&ram, page, word).write(page + 1) };
        }
    }
    Ok(ram)
}

/// The same writes where the kernel alone answers.
fn plain(threads: usize, order: &Arc<[u64]>) -> Result<Figures, Failure> {
    let ram = Ram::new(PageCount(order.len() as u64))?;
    ram.populate()?;
    touch(&ram, threads, order, false)
}

/// All of the region fetched from `from`, fault by fault.
fn remote(plan: &Plan, from: &Ram, threads: usize, shards: u8, order: &Arc<[u64]>) -> Result<Figures, Failure> {
    let (near, far) = lanes(shards, plan.tcp)?;
    let deaf: Notify = Arc::new(|_| {});
    let (sender, events) = channel();
    let notify: Notify = Arc::new(move |event| sender.send(event).unwrap_or(()));
    let ram = Ram::new(from.pages())?;
    let mut source = SourcePager::start(from.clone(), near, 0, &deaf)?;
    let mut destination = DestinationPager::start(ram.clone(), far, false, &notify)?;
    let rest = Rest::all(from.pages());
    destination.hand_over(&rest.missing)?;
    // And no sweep.
    source.start_serving(&[], rest);
    let figures = touch(&ram, threads, order, true)?;
    // The last page is under its thread a moment before it is counted.
    match events.recv_timeout(PATIENCE)? {
        PagerEvent::Complete => destination.finish()?,
        other => return Err(format!("{other:?}").into()),
    }
    source.stop();
    let pages = from.pages().0;
    let stats = destination.fault_stats();
    if stats.remote != pages {
        return Err(format!("{} of {pages} pages were remote faults", stats.remote).into());
    }
    let cpu = [destination.cpu(), source.cpu()].map(|cpu| cpu.user + cpu.system).iter().sum::<Duration>();
    let cpu_ns = u64::try_from(cpu.as_nanos()).unwrap_or(u64::MAX) / pages.max(1);
    Ok(Figures { cpu_ns, ..figures })
}

/// Writes to every page once, in this order, on so many threads; afterwards the page must be what it was elsewhere, if it was.
fn touch(ram: &Ram, threads: usize, order: &Arc<[u64]>, came: bool) -> Result<Figures, Failure> {
    let start = Nanos::now();
    let work = |thread: usize| {
        let (ram, order) = (ram.clone(), Arc::clone(order));
        thread::spawn(move || {
            let mut took = Vec::with_capacity(order.len() / threads + 1);
            for page in order.iter().skip(thread).step_by(threads) {
                let before = Nanos::now();
                // SAFETY: inside the guest mapping; each page is one thread's. Volatile, as another mapping fills it.
                unsafe { word_of(&ram, *page, 0).write_volatile(0) };
                took.push(Nanos::now().since(before));
                // SAFETY: as above.
                let word = unsafe { word_of(&ram, *page, PAGE_SIZE / 8 - 1).read_volatile() };
                if came && word != *page + 1 {
                    return Err(format!("page {page} holds {word}"));
                }
            }
            Ok(took)
        })
    };
    let workers: Vec<_> = (0..threads).map(work).collect();
    let mut all = Vec::with_capacity(order.len());
    for worker in workers {
        all.extend(worker.join().map_err(|_| "a faulting thread panicked")??);
    }
    let elapsed = Nanos::now().since(start);
    all.sort_unstable();
    let at = |percent: usize| all.get((all.len() * percent / 100).min(all.len().saturating_sub(1))).copied();
    Ok(Figures {
        faults_per_second: (all.len() as u64).saturating_mul(1_000_000_000) / elapsed.max(1),
        p50_ns: at(50).unwrap_or(0),
        p99_ns: at(99).unwrap_or(0),
        cpu_ns: 0,
    })
}

/// Both ends of as many fault lanes.
fn lanes(count: u8, tcp: bool) -> Result<(Vec<PageLane>, Vec<PageLane>), Failure> {
    let (mut near, mut far) = (Vec::new(), Vec::new());
    for index in 0..count {
        let (one, two) = if tcp { tcp_pair()? } else { Socket::pair()? };
        let id = LaneId { role: LaneRole::Fault, index };
        for (socket, side) in [(one, &mut near), (two, &mut far)] {
            side.push(PageLane { id, socket: Arc::new(socket), checksums: true });
        }
    }
    Ok((near, far))
}

fn tcp_pair() -> Result<(Socket, Socket), Failure> {
    let listener = Listener::bind(&Address::Tcp { host: "127.0.0.1".to_owned(), port: 0 })?;
    let one = Socket::connect(&listener.address(), PATIENCE)?;
    let two = listener.accept()?.ok_or("the listener was closed")?;
    for socket in [&one, &two] {
        socket.tune(LaneRole::Fault)?;
    }
    Ok((one, two))
}

/// All pages, in an order that has nothing to do with where they lie; the same in every run.
fn shuffled(pages: u64) -> Arc<[u64]> {
    let mut order: Vec<u64> = (0..pages).collect();
    let mut state = 1_u64;
    for last in (1..order.len()).rev() {
        // The constants of Knuth's MMIX generator; Fisher and Yates' shuffle.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let other = usize::try_from((state >> 33) % (last as u64 + 1)).unwrap_or(0);
        order.swap(last, other);
    }
    order.into()
}

fn word_of(ram: &Ram, page: u64, word: usize) -> *mut u64 {
    let offset = usize::try_from(PageIndex(page).offset()).unwrap_or(usize::MAX);
    ram.guest_base().wrapping_add(offset + word * 8).cast()
}

/// The run in the middle.
fn median(mut runs: Vec<Figures>) -> Figures {
    runs.sort_by_key(|figures| figures.faults_per_second);
    runs.get(runs.len() / 2).copied().unwrap_or_default()
}

fn micros(ns: u64) -> String {
    format!("{}.{}", ns / 1000, ns / 100 % 10)
}
