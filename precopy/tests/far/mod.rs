//! A destination that is played by the test: it applies frames late, acknowledges them later still, and checks that no page
//! comes in a second version before the first was acknowledged.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use switchover_pager::lane::PageLane;
use switchover_wire::checksum::Checksum;
use switchover_wire::encoding::{Encoding, Page, PageDecoder, Payload};
use switchover_wire::frame::bulk::{BulkFrame, Taken};
use switchover_wire::ring::Ring;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

/// Numbers that look random and are the same every time.
#[derive(Clone, Copy)]
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// How a destination treats a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    /// Takes its time with each frame, and with each receipt.
    Late,
    /// Takes frames, and never says so.
    Silent,
    /// Takes nothing.
    Stuck,
}

pub struct Far {
    memory: Arc<Memory>,
    lanes: Vec<PageLane>,
    threads: Vec<JoinHandle<()>>,
}

struct Memory {
    pages: Box<[Mutex<Option<Box<Page>>>]>,
    /// Lane number + 1 of the frame that a page came in and that was not acknowledged; 0 for none.
    under_way: Box<[AtomicU8]>,
    frames: AtomicU64,
}

impl Far {
    pub fn new(pages: PageCount, lanes: Vec<PageLane>, manners: &[Manner], seed: u64) -> Self {
        let memory = Arc::new(Memory {
            pages: (0..pages.0).map(|_| Mutex::default()).collect(),
            under_way: (0..pages.0).map(|_| AtomicU8::new(0)).collect(),
            frames: AtomicU64::new(0),
        });
        let take = |(index, (lane, manner)): (usize, (&PageLane, &Manner))| {
            let (memory, lane, manner) = (Arc::clone(&memory), lane.clone(), *manner);
            let dice = Dice((seed * 131 + index as u64 + 1).wrapping_mul(0x9e37_79b9));
            let number = u8::try_from(index + 1).unwrap();
            thread::spawn(move || Taker { memory, lane, manner, dice, number, ring: Ring::new(2).unwrap() }.run(pages))
        };
        let threads = lanes.iter().zip(manners).enumerate().map(take).collect();
        Self { memory, lanes, threads }
    }

    /// Whether `page` is here as it is in `bytes`.
    pub fn has(&self, page: PageIndex, bytes: &Page) -> bool {
        match &*self.memory.page(page).lock().unwrap() {
            Some(own) => own[..] == bytes[..],
            None => false,
        }
    }

    /// The number of the lane whose frame `page` came in, if that was not acknowledged.
    pub fn under_way(&self, page: PageIndex) -> Option<usize> {
        usize::from(self.memory.mark(page).load(Ordering::SeqCst)).checked_sub(1)
    }

    pub fn frames(&self) -> u64 {
        self.memory.frames.load(Ordering::SeqCst)
    }

    /// Ends all lanes.
    ///
    /// # Panics
    /// When a lane has found something wrong.
    pub fn end(self) {
        self.lanes.iter().for_each(|lane| lane.socket.shutdown());
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

impl Memory {
    fn page(&self, page: PageIndex) -> &Mutex<Option<Box<Page>>> {
        &self.pages[usize::try_from(page.0).unwrap()]
    }

    fn mark(&self, page: PageIndex) -> &AtomicU8 {
        &self.under_way[usize::try_from(page.0).unwrap()]
    }

    fn put(&self, page: PageIndex, bytes: Box<Page>) {
        *self.page(page).lock().unwrap() = Some(bytes);
    }
}

struct Taker {
    memory: Arc<Memory>,
    lane: PageLane,
    manner: Manner,
    dice: Dice,
    number: u8,
    ring: Ring,
}

impl Drop for Taker {
    /// Whoever has found something wrong reads no more: the other side must not wait for it.
    fn drop(&mut self) {
        if thread::panicking() {
            self.lane.socket.shutdown();
        }
    }
}

impl Taker {
    fn run(mut self, ram: PageCount) {
        let mut decoder = PageDecoder::new();
        let mut taken = 0;
        // What was taken and not acknowledged, and the receipts that are due: after how many frames.
        let (mut owed, mut due) = (VecDeque::<Vec<PageIndex>>::new(), VecDeque::<u64>::new());
        let mut told = 0;
        if self.manner == Manner::Stuck {
            return;
        }
        loop {
            // Nothing more may come before a receipt: those are only late while something is coming.
            while due.len() > 3 || (!due.is_empty() && (self.dice.below(3) > 0 || self.is_quiet())) {
                self.linger();
                let frames = due.pop_front().unwrap();
                for page in owed.drain(..usize::try_from(frames - told).unwrap()).flatten() {
                    self.memory.mark(page).store(0, Ordering::SeqCst);
                }
                told = frames;
                let receipt = Taken { frames }.encode();
                if self.ring.send_all(self.lane.socket.as_fd(), &[IoSlice::new(&receipt)]).is_err() {
                    return;
                }
            }
            let mut header = [0; BulkFrame::LEN];
            if self.receive(&mut header).is_none() {
                return;
            }
            let (frame, flags, checksum) = BulkFrame::decode(&header, ram).unwrap();
            assert!(flags.precopy);
            let pages = pages_of(&frame);
            for page in &pages {
                let before = self.memory.mark(*page).swap(self.number, Ordering::SeqCst);
                assert_eq!(before, 0, "{page} came on lane {} in a second version", self.number - 1);
            }
            self.linger();
            if self.apply(&frame, checksum, ram, &mut decoder).is_none() {
                return;
            }
            taken += 1;
            self.memory.frames.fetch_add(1, Ordering::SeqCst);
            owed.push_back(pages);
            if flags.acknowledge && self.manner == Manner::Late {
                due.push_back(taken);
            }
        }
    }

    /// Whether nothing more is on the lane for now.
    fn is_quiet(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut fds = [PollFd::new(self.lane.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO) == Ok(0)
    }

    fn receive(&mut self, bytes: &mut [u8]) -> Option<()> {
        self.ring.recv_exact(self.lane.socket.as_fd(), &mut [IoSliceMut::new(bytes)]).ok()
    }

    /// Sometimes it takes a while.
    fn linger(&mut self) {
        if self.dice.below(6) == 0 {
            thread::sleep(Duration::from_micros(self.dice.below(800)));
        }
    }

    fn apply(
        &mut self,
        frame: &BulkFrame,
        checksum: Checksum,
        ram: PageCount,
        decoder: &mut PageDecoder,
    ) -> Option<()> {
        let zero = || Box::new([0; PAGE_SIZE]);
        let mut bytes = vec![0; frame.payload()];
        self.receive(&mut bytes)?;
        // Whatever the guest wrote meanwhile.
        checksum.check(frame.name(), [&bytes[..]]).unwrap();
        match *frame {
            BulkFrame::Zeros { .. } => pages_of(frame).into_iter().for_each(|page| self.memory.put(page, zero())),
            BulkFrame::Chunk { first, data, zero: none } => {
                for (page, bytes) in bits(first, data).zip(bytes.chunks_exact(PAGE_SIZE)) {
                    self.memory.put(page, Box::new(bytes.try_into().unwrap()));
                }
                bits(first, none).for_each(|page| self.memory.put(page, zero()));
            }
            BulkFrame::Packed { first, data, zero: none, .. } => {
                let parsed = Payload::parse(first, data, none, &bytes, ram).unwrap();
                for entry in parsed.entries() {
                    let mut page = self.memory.page(entry.page()).lock().unwrap().clone().unwrap_or_else(|| {
                        assert_ne!(entry.encoding(), Encoding::Delta, "a difference to what never came");
                        zero()
                    });
                    // What another page is the same as must be acknowledged, and stay until this frame is.
                    let mut held = |other, bytes: &mut Page| {
                        assert_eq!(self.memory.mark(other).load(Ordering::SeqCst), 0, "{other} is under way");
                        let own = self.memory.page(other).lock().unwrap();
                        own.as_ref().map(|own| bytes.copy_from_slice(&own[..])).is_some()
                    };
                    decoder.decode(&entry, &mut page, &mut held).unwrap();
                    self.memory.put(entry.page(), page);
                }
                bits(first, none).for_each(|page| self.memory.put(page, zero()));
            }
            BulkFrame::Check => {}
            BulkFrame::End { .. } => panic!("an end before the handoff"),
        }
        Some(())
    }
}

fn pages_of(frame: &BulkFrame) -> Vec<PageIndex> {
    match *frame {
        BulkFrame::Chunk { first, data, zero } | BulkFrame::Packed { first, data, zero, .. } => {
            bits(first, data | zero).collect()
        }
        BulkFrame::Zeros { first, count } => (first.0..first.0 + count.0).map(PageIndex).collect(),
        BulkFrame::Check | BulkFrame::End { .. } => Vec::new(),
    }
}

fn bits(first: PageIndex, mask: u64) -> impl Iterator<Item = PageIndex> {
    (0..64).filter(move |bit| mask >> bit & 1 == 1).map(move |bit| PageIndex(first.0 + bit))
}
