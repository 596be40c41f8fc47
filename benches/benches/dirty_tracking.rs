//! What it costs to find out what a guest writes, by KVM's bitmaps and by its rings: the calls, and the guest.
//!
//! Real guests run, and rounds are gone through as pre-copy does: peek, then span by span rearm and copy the pages, at the
//! pace of a link of 8 Gbit/s. Each line is one guest, one kind of tracking and one span.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use switchover_hybrid::machine::Machine as _;
use switchover_precopy::bitmap::PageBitmap;
use switchover_runtime::config::{DirtyTracking, SerialTarget, VmConfig};
use switchover_runtime::vm::Vm;
use switchover_tools::guests;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};
use tempfile::NamedTempFile;

type Failure = Box<dyn std::error::Error>;

const MEMORY: PageCount = PageCount(512 << 8);
/// How long a guest is watched, untracked and then tracked.
const WATCHED: Duration = Duration::from_millis(1500);
/// Name, command line: all pages at random as fast as it can; few of many; one page in 100 µs.
const GUESTS: [(&str, &str); 3] =
    [("random", "ws=256M period=50"), ("hotset", "ws=256M period=50"), ("random", "ws=256M period=50 pace=100000")];
/// A page on the link.
const PAGE_TIME: Duration = Duration::from_micros(4);
/// The least between two peeks.
const LEAST_ROUND: Duration = Duration::from_millis(20);
/// Pages that one rearm is for.
const SPANS: [usize; 4] = [64, 1024, 16_384, 131_072];

/// What went on while a guest was tracked.
#[derive(Default)]
struct Rounds {
    rounds: u32,
    pages: u64,
    peeking: Duration,
    rearming: Duration,
    lasting: Duration,
}

fn main() -> Result<(), Failure> {
    if kvm_ioctls::Kvm::new().is_err() {
        println!("SKIP dirty_tracking: /dev/kvm cannot be opened");
        return Ok(());
    }
    println!(
        "{:<34} {:<4} {:>7} {:>9} {:>9} {:>10} {:>9} {:>9} {:>7}",
        "guest", "by", "span", "start", "peek", "rearm/page", "pages", "round", "guest"
    );
    for (name, append) in GUESTS {
        for (tracking, label) in [(DirtyTracking::Log, "log"), (DirtyTracking::Ring, "ring")] {
            for span in SPANS {
                if let Err(error) = measure(name, append, tracking, label, span) {
                    println!("SKIP {name} {append} {label}: {error}");
                }
            }
        }
    }
    Ok(())
}

fn measure(name: &str, append: &str, tracking: DirtyTracking, label: &str, span: usize) -> Result<(), Failure> {
    let mut kernel = NamedTempFile::new()?;
    kernel.write_all(guests::builtin(name).ok_or("no such guest")?)?;
    let serial = NamedTempFile::new()?;
    let vm = Vm::boot(&VmConfig {
        kernel: Some(kernel.path().to_owned()),
        append: append.to_owned(),
        initrd: None,
        memory: MEMORY,
        vcpus: 1,
        serial: SerialTarget::File(serial.path().to_owned()),
        lazy_memory: false,
        host_files: None,
        dirty_tracking: tracking,
    })?;
    vm.cont()?;
    while !fs::read_to_string(serial.path())?.contains("P 4 ") {
        sleep(Duration::from_millis(10));
    }
    let free = visits_a_second(serial.path(), || {
        sleep(WATCHED);
        Ok(())
    })?;

    let log = vm.dirty_log();
    let begin = Instant::now();
    log.start()?;
    let started = begin.elapsed();
    let mut sum = Rounds::default();
    let tracked = visits_a_second(serial.path(), || {
        // The first round sends everything, and is no measure of the guest's writes.
        go_round(&vm, span, &mut Rounds::default())?;
        let end = Instant::now() + WATCHED;
        while Instant::now() < end {
            go_round(&vm, span, &mut sum)?;
        }
        Ok(())
    })?;
    log.stop();
    let each = |total: Duration| total / sum.rounds.max(1);
    println!(
        "{:<34} {label:<4} {span:>7} {:>6} µs {:>6} µs {:>7} ns {:>9} {:>6} ms {:>5} %",
        format!("{name} {append}"),
        started.as_micros(),
        each(sum.peeking).as_micros(),
        sum.rearming.as_nanos() / u128::from(sum.pages.max(1)),
        sum.pages / u64::from(sum.rounds.max(1)),
        each(sum.lasting).as_millis(),
        tracked * 100 / free.max(1),
    );
    Ok(())
}

/// A round of pre-copy.
fn go_round(vm: &Arc<Vm>, span: usize, sum: &mut Rounds) -> Result<(), Failure> {
    let (log, ram) = (vm.dirty_log(), vm.ram());
    let mut noted = PageBitmap::new(MEMORY);
    let round = Instant::now();
    log.peek(&mut noted)?;
    sum.peeking += round.elapsed();
    let mut words = vec![0_u64; usize::try_from(MEMORY.0 / 64)?];
    for page in noted.iter() {
        words[usize::try_from(page.0 / 64)?] |= 1 << (page.0 % 64);
    }
    let (mut buffer, mut sent) = (vec![0_u8; PAGE_SIZE], 0);
    for (first, words) in (0_u64..).step_by(span).zip(words.chunks(span / 64)) {
        if words.iter().all(|word| *word == 0) {
            continue;
        }
        let begin = Instant::now();
        log.rearm(PageIndex(first), words)?;
        let rearmed = Instant::now();
        for page in (first..).zip((0..words.len() * 64).map(|bit| words[bit / 64] >> (bit % 64) & 1)) {
            if let (page, 1) = page {
                let at = ram.guest_base().wrapping_add(usize::try_from(PageIndex(page).offset())?);
                // SAFETY: a whole page inside the guest mapping, which `ram` keeps, into a buffer of a page. What the guest
                // writes meanwhile makes no difference here.
                unsafe { std::ptr::copy_nonoverlapping(at, buffer.as_mut_ptr(), PAGE_SIZE) };
                std::hint::black_box(&mut buffer);
            }
        }
        sum.rearming += rearmed - begin;
        // Against the round's beginning: many short sleeps would each be too long.
        sent += words.iter().map(|word| word.count_ones()).sum::<u32>();
        let ahead = (PAGE_TIME * sent).saturating_sub(round.elapsed());
        if ahead > Duration::from_millis(1) {
            sleep(ahead);
        }
    }
    sleep(LEAST_ROUND.saturating_sub(round.elapsed()));
    sum.lasting += round.elapsed();
    sum.pages += noted.count().0;
    sum.rounds += 1;
    Ok(())
}

/// The guest's rate while something goes on, by what it reports of itself.
fn visits_a_second(serial: &Path, work: impl FnOnce() -> Result<(), Failure>) -> Result<u64, Failure> {
    let lines_before = fs::read_to_string(serial)?.lines().count();
    let begin = Instant::now();
    work()?;
    let passed = begin.elapsed();
    let visits: u64 = fs::read_to_string(serial)?
        .lines()
        .skip(lines_before)
        .filter_map(|line| line.strip_prefix("P ")?.split(' ').nth(2)?.parse::<u64>().ok())
        .sum();
    Ok(u64::try_from(u128::from(visits) * 1_000_000 / passed.as_micros().max(1))?)
}
